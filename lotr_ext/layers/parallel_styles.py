"""Tensor parallelism around a layer's forward: the hooks of torch's `parallelize_module`, the style of transformers'
`tp_plan`. Both are moved to the adapted layer, and back to the plain one."""

from __future__ import annotations

from functools import partial
from inspect import isfunction
from typing import Any

from torch import Tensor, nn

from ..autograd.call import Call
from ..autograd.tensor_parallel import Cut, cut_of, is_dtensor
from .layer import LoTRLayer

_FORWARD_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves tensor parallelism from source's forward to target's: the hooks of `parallelize_module`, or the style of
    transformers' `tp_plan`."""
    if is_dtensor(getattr(source, "weight", None)):
        for name in _FORWARD_HOOKS:
            getattr(target, name).update(getattr(source, name))
            getattr(source, name).clear()
    if (found := tp_style(source)) is None:
        return
    style, mesh = found
    del source.forward
    if isinstance(target, LoTRLayer) and is_dtensor(target.weight):
        target.forward = partial(_forward_in_part, target, cut_of(target.weight))
    if hasattr(source, "config"):  # a style for latent attention reads it
        target.config = source.config
    style.install_forward(target, mesh)


def _forward_in_part(layer: LoTRLayer, cut: Cut, x: Tensor) -> Tensor:
    """layer(x) inside of a style of transformers, which, while no graph is recorded, gives plain tensors in place of DTensors:
    x, weight and bias are this process's parts then, and so are the rows of A and B."""
    if is_dtensor(layer.weight):
        return type(layer).forward(layer, x)
    off, mixture = layer._state()
    if layer.merged or (off and layer.start_core is None):
        return layer._base(x)
    of_A, of_B = cut.rows
    if off:
        start = Call(layer.start_core, layer.scaling)
        return layer._call(x, start, layer.factors.start_A[of_A], layer.factors.start_B[of_B])
    call = Call(layer.core, layer.scaling, layer.dropout if layer.training else 0.0, strategy=layer.strategy)
    run = partial(layer._call, x, call) if mixture is None else partial(layer._call_mixed, x, call, mixture)
    return layer.factors(lambda A, B: run(A[of_A], B[of_B]))


def tp_style(module: nn.Module) -> tuple[Any, Any] | None:
    """(style, mesh) of transformers' tensor parallelism around module's forward; None for a forward that has none."""
    own = vars(module).get("forward")
    names = own.__code__.co_freevars if isfunction(own) else ()
    found = {name: cell.cell_contents for name, cell in zip(names, own.__closure__ or ())} if names else {}
    style, mesh = found.get("self"), found.get("mesh")
    return None if mesh is None or not hasattr(style, "install_forward") else (style, mesh)
