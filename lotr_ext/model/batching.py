"""Continuous batching of adapted transformers models (`generate_batch`), which calls the model in a thread of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.request import NOW
from .adapted import layers_in
from .replaced import ReplacedMethod

__all__ = ["hook_batching", "unhook_batching"]

_NAME = "init_continuous_batching"  # generate_batch and continuous_batching_context_manager call it first


class InitContinuousBatching(ReplacedMethod):
    """Replaces init_continuous_batching of a model with adapted layers: refuses it inside `disabled` and `mixed`, which the
    thread that runs the model would not see."""

    name = _NAME

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method of the model's class. Raises RuntimeError inside `disabled`, `mixed` or `per_example`."""
        model = self.model
        if NOW.any is not None and any(layer._said != (False, None) for layer in layers_in(model).values()):
            raise RuntimeError(
                f"{_NAME}: expected a call outside of disabled and mixed, got one inside: continuous batching runs the model "
                "in another thread, which these contexts do not reach; call generate, or select the adapter by set_adapter"
            )
        return getattr(type(model), _NAME)(model, *args, **kwargs)


def hook_batching(model: nn.Module) -> None:
    """Replaces init_continuous_batching of the model and of its parts."""
    for module in model.modules():
        if callable(getattr(type(module), _NAME, None)):
            module.__dict__[_NAME] = InitContinuousBatching(module)


def unhook_batching(model: nn.Module) -> None:
    """Undoes hook_batching."""
    for module in model.modules():
        if isinstance(vars(module).get(_NAME), InitContinuousBatching):
            del module.__dict__[_NAME]
