"""Magnitudes (DoRA, arXiv 2402.09353): a trained length m_n for each row of W + F A^T, with F = s B G^T.

    c_n = |W_n + F_n A^T|,  c_n^2 = |W_n|^2 + 2 F_n (W A)_n + F_n (A^T A) F_n^T
    y = bias + (m / c) z,   z = x W^T + u F^T
    backward                g0 = (m / c) g is the gradient of z,  dm_n = sum_t g_tn z_tn / c_n

c is constant for the gradient, as in the paper and in PEFT. z is taken from the output, z = (y - bias) c / m: the next product
usually keeps y anyway, so no second activation is kept. An in-place change of y or bias before backward raises torch's error.

Norms            c of one layer, and what is kept of it between calls
LoTRMagnitude    y of z, as an autograd node behind those of the layer
scaled_linear    a layer over a frozen weight;  scaled: over any other base
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, is_grad_enabled, nn

from .. import ops
from ..compat import (
    Node,
    any_autocast,
    dispatch_modes,
    is_compiling,
    jit_tracing,
    recorded,
    saved_if,
    stream_of,
    transformed,
    wants,
)
from ..ops import accumulate_dtype
from ..ops.composite import delta_weight, row_norms, rows, to
from ..ops.planner import CPU_DTYPES, HALVES
from .call import call_linear, compute_dtype
from .sharing import Call, steps_taken

_PLAIN = (Tensor, nn.Parameter)


class Rows(NamedTuple):
    """Of one call: m, c and m / c [n], the last two without a graph."""

    magnitude: Tensor
    norm: Tensor
    scale: Tensor


# ---- c ---------------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What was made of weight, A, B, core and magnitude on a CUDA stream. marks: as these tensors were (`_mark`), when so many
    steps had been taken; values: of core and magnitude on a CPU."""

    refs: tuple[Callable[[], Tensor | None], ...]
    marks: list[tuple[int, int, bool]]
    values: tuple[Tensor, Tensor] | None
    scaling: float
    steps: int
    stream: int
    square: Tensor
    WA: Tensor
    norm: Tensor
    scale: Tensor

    def has(self, core: Tensor, m: Tensor) -> bool:
        """Whether core and m have their values still, as far as that can be seen without waiting for a GPU."""
        return self.values is None or (torch.equal(core, self.values[0]) and torch.equal(m, self.values[1]))


def _reference(t: Tensor) -> Callable[[], Tensor | None]:
    """A strong reference to a parameter, since torch.utils.swap_tensors, by which nn.Module.to may convert it, refuses tensors
    with weak references. A weak one to another tensor, which may be a weight made for one call."""
    return (lambda: t) if isinstance(t, nn.Parameter) else weakref.ref(t)


def _mark(t: Tensor) -> tuple[int, int, bool]:
    """A tensor's version, its memory, and whether an optimizer may change it."""
    return t._version, t.data_ptr() if type(t) in _PLAIN else 0, t.requires_grad


class Norms:
    """c [n] of one layer. Kept between calls: |W_n|^2 while W stays, W A while W and A stay, c and m / c while all stay.

    Nothing is kept where a change cannot be seen: under torch.compile, functorch and dispatch modes, of inference tensors,
    while a CUDA graph is captured, and in processes with FSDP or DeepSpeed. If core or m has changed and no optimizer has taken
    a step, everything is computed again, since W and A may have been written through `.data`, which no counter shows. For that,
    the values of core and m are compared, on a CPU only. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self):
        return Norms, ()

    def forget(self) -> None:
        """Drops what is kept, and with it the references to the layer's tensors."""
        self._kept = None

    def rows(
        self, m: Tensor, weight: Tensor, matrix: Callable[[], Tensor], A: Tensor, B: Tensor, core: Tensor, scaling: float
    ) -> Rows:
        """weight: the tensor in which W is stored, of any format; matrix: returns W [n, k] of it."""
        tensors = (weight, A, B, core, m)
        if is_compiling() or not all(map(_can_be_seen, tensors)) or _changes_unseen(weight):
            with _without_autocast(weight.device):
                norm = row_lengths(matrix().detach(), A.detach(), B.detach(), core.detach(), scaling)
                return Rows(m, norm, m.detach().to(norm) / norm)
        kept, steps, marks = self._kept, steps_taken(), list(map(_mark, tensors))
        stream = stream_of(weight)
        if kept is None or kept.stream != stream:
            same = [False] * 5
        else:
            stepped = kept.steps != steps  # a fused optimizer moves no version counter
            same = [
                ref() is t and old == mark and not (stepped and mark[2])
                for ref, old, t, mark in zip(kept.refs, kept.marks, tensors, marks)
            ]
            if not (stepped or (all(same[3:]) and kept.has(core, m))):  # written by hand, and perhaps W and A as well
                same = [False] * 5
            if all(same) and kept.scaling == scaling:
                return Rows(m, kept.norm, kept.scale)
        with torch.inference_mode(False), torch.no_grad(), _without_autocast(weight.device):
            square, WA = kept.square if same[0] else None, kept.WA if same[0] and same[1] else None
            square, WA, norm = _measured(weight, matrix, A, B, core, scaling, square, WA)
            scale = m.to(norm) / norm
            readable = all(type(t) in _PLAIN and t.is_cpu for t in (core, m))
            values = (core.detach().clone(), m.detach().clone()) if readable else None
        self._kept = _Kept(tuple(map(_reference, tensors)), marks, values, scaling, steps, stream, square, WA, norm, scale)
        return Rows(m, norm, scale)


def _can_be_seen(t: Tensor) -> bool:
    return not (t.is_inference() or t.is_meta)


def _changes_unseen(weight: Tensor) -> bool:
    """Whether tensors may change without a sign of it, or what is kept would be replayed or counted wrongly."""
    if dispatch_modes() or transformed() or jit_tracing() is not None:
        return True
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    in_parts = "torch.distributed.fsdp" in sys.modules or "deepspeed" in sys.modules
    return in_parts and dist.is_available() and dist.is_initialized()


def _without_autocast(device: torch.device) -> torch.autocast | nullcontext:
    return torch.autocast(device.type, enabled=False) if any_autocast() else nullcontext()


_ROWS = 1024  # of a half-precision W that are cast at a time


def _wide(W: Tensor, A: Tensor) -> torch.dtype:
    return torch.promote_types(accumulate_dtype(W.dtype), accumulate_dtype(A.dtype))


def _measured(
    weight: Tensor,
    matrix: Callable[[], Tensor],
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    square: Tensor | None,
    WA: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(|W_n|^2, W A, c_n) in float32 (float64 for float64), of which the first two may be given."""
    dense = type(weight) in _PLAIN and weight.dtype in CPU_DTYPES  # else W is only made for a product that is not given
    W = matrix() if dense or square is None or WA is None else None
    if square is None:
        square = _squares(W, A)
    if dense and W.stride(1) == 1 and all(_suits(t, W) for t in (W, A, B, core)):
        return square, *reversed(ops.row_norms(W, square, WA, A, B, core, scaling))
    WA = _product(W, A) if WA is None else WA
    again = matrix if W is None else lambda: W  # to make a quantised W dense takes time
    # reading values would synchronise with a GPU
    return square, WA, row_norms(square, WA, A, B, core, scaling, again if WA.is_cpu else None)


def _suits(t: Tensor, W: Tensor) -> bool:
    """Whether `ops.row_norms` takes a tensor beside W."""
    plain = type(t) in _PLAIN and t.is_cpu and not t.is_neg()
    return plain and (t.dtype == W.dtype or (W.dtype in HALVES and t.dtype == torch.float32))


def _squares(W: Tensor, A: Tensor) -> Tensor:
    """|W_n|^2 [n] in float32 (float64 for float64)."""
    return torch.linalg.vector_norm(W, dim=1, dtype=_wide(W, A)).square()


def _product(W: Tensor, A: Tensor) -> Tensor:
    """W A [n, r_in] in float32 (float64 for float64)."""
    wide = _wide(W, A)
    if W.is_cuda and W.dtype in HALVES and wide == torch.float32 and not is_compiling():
        return torch.mm(W, A.to(W.device, W.dtype), out_dtype=wide)  # reads W as it is; on CUDA only
    A = A.to(W.device, wide)
    return W @ A if W.dtype == wide else torch.cat([to(part, wide) @ A for part in W.split(_ROWS)])


def row_lengths(W: Tensor, A: Tensor, B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """c [n] in float32 (float64 for float64). Reads no values on the host."""
    if W.shape[1] <= 2 * A.shape[1]:  # any such row can be near one that F A^T makes
        wide = _wide(W, A)
        full = to(W, wide) + delta_weight(A, B, core, scaling).to(W.device, wide)
        return torch.linalg.vector_norm(full, dim=1).clamp(min=torch.finfo(wide).tiny ** 0.5)
    return row_norms(_squares(W, A), _product(W, A), A, B, core, scaling)


# ---- y ---------------------------------------------------------------------------------------------------------------


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, call: Call, made: Rows) -> Tensor:
    """y = bias + (m / c) (x W^T + u F^T). If weight or bias is trained, autograd differentiates the base product."""
    trained = is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    # what selective checkpointing keeps may not change, and LoTRMagnitude marks y as changed
    if not (trained or is_compiling() or dispatch_modes()):
        call.scale = to(made.scale, accumulate_dtype(compute_dtype(x) or x.dtype))
    return scaled(call_linear(x, weight, bias, A, B, call), bias, made, call)


def scaled(y: Tensor, bias: Tensor | None, made: Rows, call: Call) -> Tensor:
    """bias + (m / c) (y - bias) of the y [..., n] that a call has made, or y where the call's nodes have scaled it."""
    graph = is_grad_enabled()
    if call.plan.nodes == 0 or (graph and bias is not None and bias.requires_grad):
        return _scale(y, bias, (made.magnitude.to(made.norm) / made.norm).to(y.device))
    applied = call.scale is not None
    scale = call.scale if applied else made.scale.to(y.device, accumulate_dtype(y.dtype))
    bias = None if bias is None else to(bias.detach(), y.dtype)
    if graph and (y.requires_grad or made.magnitude.requires_grad):
        return LoTRMagnitude.run(y, made.magnitude, (bias, made.norm, scale, applied))[0]
    return y if applied else _scale_(y, bias, scale)


def _scale(y: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """bias + scale (y - bias), rounded once to y's dtype."""
    if bias is not None and y.is_nested:  # addcmul takes none
        return to(y * scale + (bias - bias * scale), y.dtype)
    return to(y * scale if bias is None else torch.addcmul(bias - bias * scale, y, scale), y.dtype)


def _scale_(y: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """`_scale` into y. A new tensor under dispatch modes: what selective checkpointing keeps may not change."""
    if dispatch_modes():
        return _scale(y, bias, scale)
    return y.mul_(scale) if bias is None else torch.addcmul(bias - bias * scale, y, scale, out=y)


class LoTRMagnitude(Node):
    """y = bias + (m / c) z in the memory of the output of the layer's nodes, which save nothing of it.

    backward: g0 = (m / c) g for z,  dm_n = sum_t g_tn z_tn / c_n.

    apply(y [..., n], m [n], (bias, norm, scale, applied)) -> y, z: the given y is bias + z, or where the scale is applied the
    result. The output z has y's memory and represents z in the graph: a recorded backward makes dm from it. Made from y, whose
    graph has m, dm would seem to depend on m.
    """

    @staticmethod
    def forward(ctx, y, magnitude, rows):
        ctx.set_materialize_grads(False)
        bias, norm, scale, applied = rows
        if applied or (out := _scale_(y, bias, scale)) is y:
            ctx.mark_dirty(y)
        else:
            y = out
        need_y, need_m, _ = ctx.needs_input_grad
        z = y.detach() if need_m else None  # shares y's version counter
        if need_m and not need_y:
            ctx.mark_non_differentiable(z)
        # saved, so that a checkpoint's recomputation makes all of them of the same parameters, and a change of the bias raises
        ctx.save_for_backward(scale, norm, z, bias if need_m else None)
        # not saved: no gradient depends on its value, so an optimizer's step before backward must not raise
        ctx.magnitude = magnitude
        ctx.version = None if magnitude.grad_fn is None else magnitude._version
        return y, z

    @staticmethod
    def backward(ctx, g, dz):
        if g is None:
            return dz, None, None
        need_y, need_m = ctx.needs_input_grad[:2]
        try:
            scale, norm, z, bias = ctx.saved_tensors
        except RuntimeError as error:  # freed, or changed
            if need_m and wants(ctx, 1):
                if "inplace" not in str(error):
                    raise
                raise RuntimeError(
                    f"{error} lotr_ext: a layer with magnitudes needs its output and its bias in backward; follow it with "
                    "operations that are not in place, such as nn.ReLU(inplace=False), or do not adapt it (exclude_modules); "
                    "change the bias after backward"
                ) from None
            need_m = False
            scale, norm, z, bias = saved_if(ctx, True, True, False, False)
        dm = None
        if recorded(g):
            g0, dm = LoTRMagnitude._recorded(ctx, g, scale, norm, z, bias)
        elif need_m:
            g0, dscale = ops.scale_backward(g, z, bias, scale)
            dm = (dscale.to(norm) / norm).to(ctx.magnitude)
        else:
            g0 = torch.mul(g, scale, out=torch.empty_like(g))
        g0 = g0 if dz is None else g0 + dz
        return g0 if need_y else None, dm, None

    @staticmethod
    def _recorded(
        ctx, g: Tensor, scale: Tensor, norm: Tensor, z: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        magnitude = ctx.magnitude
        if ctx.version is not None and magnitude._version != ctx.version:  # its graph is now that of the change
            raise RuntimeError("magnitude: expected it as it was in the forward, got one changed by an inplace operation")
        of_m = (magnitude.to(norm) / norm).to(scale)
        of_m = of_m + (scale - of_m).detach()  # the forward's value, whatever the parameter is now
        g0 = to(g * of_m, g.dtype)
        if z is None:
            return g0, None
        wide = to(z, scale.dtype)
        dead = scale == 0  # y is the bias there; dm is 0, as `ops.scale_backward` has it
        value = (wide if bias is None else wide - to(bias, scale.dtype)) / torch.where(dead, 1, scale)
        z = torch.where(dead, 0, value.detach() + (wide - wide.detach()))  # the gradient of z, passed on as it is
        dm = (rows(to(g, z.dtype)) * rows(z)).sum(0).to(norm.device) / norm
        return g0, dm.to(magnitude)
