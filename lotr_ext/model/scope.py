"""The hooks that open and close the forward scope (`autograd.bank`) around each forward of an adapted model.

If a KeyboardInterrupt ends a forward, its scope stays open; the next `open_scope` drops it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..autograd.bank import Scope, _open, open_scope
from ..compat import is_compiling
from ..layers.core import HasCore
from ..layers.placement import check_not_offloaded
from ..layers.request import NOW

if TYPE_CHECKING:
    from ..autograd.sharing import SharedFactor


class _Layers:
    """The adapted layers of a model by their B, found at the first forward. Copies and pickles start empty.

    parts: for each A, B and core once, the module that has it and its name there.
    """

    def __init__(self) -> None:
        self.by_B: dict[SharedFactor, list[nn.Module]] | None = None
        self.parts: dict[tuple[nn.Module, str], None] = {}

    def __reduce__(self):
        return _Layers, ()

    def of(self, model: nn.Module) -> dict[SharedFactor, list[nn.Module]]:
        if self.by_B is None:
            self.by_B = {}
            for module in model.modules():
                if not isinstance(module, HasCore):  # an adapted layer, or a core under PEFT
                    continue
                self.parts |= dict.fromkeys((*module.factors.owners, (module, "core")))
                if getattr(module, "in_use", True):
                    self.by_B.setdefault(module.factors._group.B, []).append(module)
        if torch.is_grad_enabled():
            check_not_offloaded(self.parts)
        return self.by_B


def _enter(model: nn.Module, args, kwargs) -> None:
    if not is_compiling():
        open_scope()  # drops scopes of forwards that ended before their last hook
        cached = None if NOW.any is None else _cached(args, kwargs)
        _open.stack.append(Scope(model, model._lotr_layers.of(model), sys._getframe(1), cached))


def _cached(args, kwargs) -> tuple[int | Tensor, int] | None:
    """The tokens per row in the cache of a transformers model's forward, and in the forward itself; None without a cache."""
    cache = next((own for name in ("cache", "past_key_values") if (own := kwargs.get(name)) is not None), None)
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    tokens = next((t for t in given if isinstance(t, Tensor) and t.dim() > 1), None)
    if tokens is None or not hasattr(cache, "get_seq_length"):
        return None
    past = cache.get_seq_length()
    if isinstance(past, Tensor):
        return past.clone(), tokens.shape[1]  # a static cache changes its count in place
    if past == 0:  # also of MiniMax's cache after tokens: its first layer keeps no tokens, but a state
        layers = (layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
        past = max((layer.get_seq_length() for layer in layers), default=0)
    return past, tokens.shape[1]


def _leave(model: nn.Module, args, output) -> None:
    if not is_compiling():
        stack = _open.stack
        for i in reversed(range(len(stack))):
            if stack[i].model() is model:
                del stack[i:]
                return


def attach_scope(model: nn.Module) -> None:
    """Opens a scope around each forward of model. Call it again after layers were added or removed."""
    detach_scope(model)
    model._lotr_layers = _Layers()
    model._lotr_hooks = (
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, always_call=True),
    )


def detach_scope(model: nn.Module) -> None:
    """Undoes attach_scope."""
    for handle in model.__dict__.pop("_lotr_hooks", ()):
        handle.remove()
    model.__dict__.pop("_lotr_layers", None)
