"""The forward scope of an adapted model, in which `autograd.bank` does once what is common to all layers of a group.

It is opened by a hook before the model's forward and closed by one that always runs after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..autograd.bank import Scope, _open
from ..layers.placement import check_not_offloaded

if TYPE_CHECKING:
    from ..autograd.shared_input import Group


class _Layers:
    """The adapted layers of a model by group, found at its first forward. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self.by_group: dict[Group, list[nn.Module]] | None = None

    def __reduce__(self):
        return _Layers, ()

    def of(self, model: nn.Module) -> dict[Group, list[nn.Module]]:
        if self.by_group is None:
            self.by_group = {}
            for module in model.modules():
                if hasattr(module, "start_core") and not hasattr(module, "num_experts"):  # an adapted layer, PEFT's cores too
                    self.by_group.setdefault(module.factors._group, []).append(module)
        if torch.is_grad_enabled():
            for layers in self.by_group.values():
                check_not_offloaded(layers[0].factors, layers)
        return self.by_group


def _enter(model: nn.Module, args) -> None:
    if not torch.compiler.is_compiling():
        _leave(model, args, None)  # of a forward that was killed before its last hook
        _open.stack.append(Scope(model, model._lotr_layers.of(model)))


def _leave(model: nn.Module, args, output) -> None:
    if not torch.compiler.is_compiling():
        for i, scope in enumerate(_open.stack):
            if scope.model() is model:
                del _open.stack[i:]
                return


def attach_scope(model: nn.Module) -> None:
    """Opens a scope around each forward of model; again after layers were added or removed, to find them anew."""
    detach_scope(model)
    model._lotr_layers = _Layers()
    model._lotr_hooks = (
        model.register_forward_pre_hook(_enter),
        model.register_forward_hook(_leave, always_call=True),
    )


def detach_scope(model: nn.Module) -> None:
    """Undoes attach_scope."""
    for handle in model.__dict__.pop("_lotr_hooks", ()):
        handle.remove()
    model.__dict__.pop("_lotr_layers", None)
