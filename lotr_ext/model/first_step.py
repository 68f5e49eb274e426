"""Warns about an optimizer with parameters of an adapted model but none of its adapter, as one made before apply_lotr."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..compat import is_compiling
from ..layers.layer import LoTRLayer

__all__ = ["expect_training"]

_waiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # adapted models whose adapter no optimizer has stepped yet
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # optimizers that were checked
_handle: RemovableHandle | None = None


def expect_training(model: nn.Module) -> None:
    """Checks the first step of each optimizer until one holds parameters of the model's adapter. Warns once about one that
    holds only frozen parameters of the model. Then removes the hook on torch's optimizers."""
    global _handle
    _waiting.add(model)
    _seen.clear()
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _handle
    if is_compiling() or optimizer in _seen:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_waiting):
        layers = [m for m in model.modules() if isinstance(m, LoTRLayer)]
        trained = {id(p) for layer in layers for p in layer.adapter_parameters() if p.requires_grad}
        frozen = sum(id(p) in held and not p.requires_grad for p in model.parameters())
        if trained & held or frozen:
            _waiting.discard(model)
        if frozen and trained and not trained & held:
            warnings.warn(
                f"lotr_ext: this {type(optimizer).__name__} holds {frozen} frozen parameters of the adapted "
                f"{type(model).__name__} and none of its adapter, like one made before apply_lotr: its steps do not train the "
                "adapter; create the optimizer after apply_lotr, with lotr_parameters(model)",
                stacklevel=3,
            )
    _seen.add(optimizer)
    if not _waiting and _handle is not None:
        _handle.remove()
        _handle = None
