"""The second node of layers with a core for each row or token, and the function that runs it; the first is LoTRShrink."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, is_grad_enabled

from .. import ops
from ..compat import Node, dispatch_modes, private_write, recorded, saved_if, wants
from ..ops.composite import here, rows, to
from .sharing import Call, SharedInput
from .two_nodes import add_expand


class LoTRExpandRows(Node):
    """x W^T + bias + h B^T, or y + h B^T in y's dtype.   backward: dx = g W,  dh = g B,  dB += g^T h, where dx is added
    to the siblings' sum.

    apply(route, h [m, r_out], B [n, r_out], y [..., n], (x, weight, bias), call, shared_input): h is made of shared_input's u,
    with a core for each row. route and the base are those of LoTRExpand, with h instead of u and B instead of F. y is
    written in place if call.owns_y.
    """

    @staticmethod
    def forward(ctx, route, h, B, y, base, call: Call, shared_input: SharedInput):
        ctx.set_materialize_grads(False)
        need_x, need_h, need_B, _ = ctx.needs_input_grad[:4]
        if y is None:
            y = _linear_rows(h, B, base, call)
        else:
            y = add_expand(y, h, to(*here(h.device, B), h.dtype), call.owns_y)
            if call.owns_y:
                ctx.mark_dirty(y)
        ctx.save_for_backward(h if need_B else None, B if need_h else None, base[1] if need_x else None)
        ctx.call, ctx.input, ctx.B, ctx.device, ctx.routed = call, shared_input, B, h.device, route is not None
        if dispatch_modes():
            call.note_versions(B=B)
        ctx.own = weakref.ref(ctx, shared_input.waiting.discard)
        shared_input.waiting.add(ctx.own)  # so that LoTRShrink keeps its saved tensors, if it runs backward without this node
        return y

    @staticmethod
    def backward(ctx, g):
        call = ctx.call
        total, _ = ctx.input.pending(ctx.own, ctx.device)
        if g is None:
            return (None,) * 7
        need_x, need_h, need_B, need_y = ctx.needs_input_grad[:4]
        try:
            h, B, weight = ctx.saved_tensors
        except RuntimeError:  # freed, or changed
            first = int(ctx.routed)  # as in LoTRExpand
            need_x = need_x and wants(ctx, 0) and wants(ctx.next_functions[0][0], 0)
            need_h, need_B = need_h and wants(ctx, first), need_B and wants(ctx, first + 1)
            h, B, weight = saved_if(ctx, need_B, need_h, need_x)
        if call.read is not None:
            call.refuse_changed(B=need_h)
        dy, g, dx, dh, dB = g if need_y else None, to(g, call.compute), None, None, None
        B = None if B is None else to(*here(g.device, B), g.dtype)
        (weight,) = call.cast(weight)
        if recorded(g):
            dx = None if weight is None else g @ to(weight, g.dtype)
            dh = rows(g) @ B if need_h else None
            dB = to((rows(g).t() @ h).to(ctx.B.device), ctx.B.dtype) if need_B else None
            return dx, dh, dB, dy, None, None, None
        sum_B = None
        if need_B:
            like = here(g.device, ctx.B)[0]
            sum_B = call.group.B.accumulator(like) if call.shares else None
            if sum_B is None:
                sum_B = dB = torch.zeros(like.shape, dtype=ops.accumulate_dtype(like.dtype), device=g.device)
        if weight is not None:
            k, dx = (None, None) if total.value is None else total.value
            values = _square(here(g.device, ctx.B)[0])
            new_dx, dh, _, _, _ = ops.layer_backward(g, weight, None, h, None, B, *values, 1.0, call.plan.order, dx=dx, Q=sum_B)
            total.value = k, new_dx if dx is None else dx
        else:
            dh = _shrink_grad(rows(g), B, h, sum_B)
        return None, dh, None if dB is None else dB.to(ctx.B.device, ctx.B.dtype), dy, None, None, None


def _linear_rows(h: Tensor, B: Tensor, base: tuple, call: Call) -> Tensor:
    """x W^T + bias + h B^T for base = (x, W, bias)."""
    values = _square(here(h.device, B)[0])
    return ops.layer_forward(*call.cast(*base), None, *values, 1.0, call.plan.order, u=h, F=to(values[0], h.dtype))[0]


def _square(B: Tensor) -> tuple[Tensor, Tensor]:
    """B and a core of the shape that the layer operators expect for u = h and F = B. They do not read the core."""
    return B, B.new_empty(B.shape[1], B.shape[1])


def _shrink_grad(g: Tensor, B: Tensor | None, h: Tensor | None, sum_B: Tensor | None) -> Tensor | None:
    """dh = g B if there is a B, and sum_B += g^T h."""
    with private_write():
        if sum_B is None:
            return None if B is None else ops.shrink(g, B)
        if B is not None:
            return ops.shrink_grad_(sum_B, g, B, h)
        ops.factor_grad_(sum_B, g, h)
        return None


def expand_rows(found: SharedInput, h: Tensor, y: Tensor | None, base: tuple, B: Tensor, call: Call) -> Tensor:
    """y + h B^T for h [rows, r_out], computed from found.u; without y, x W^T + bias + h B^T for base = (x, W, bias)."""
    tensors = (h, B, base[0] if y is None else y)
    if not (is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _linear_rows(h, B, base, call) if y is None else add_expand(y, h, *here(h.device, B), call.owns_y)
    view = call.group.B.view(B, call.owner) if call.shares else B
    return LoTRExpandRows.run(found.route if y is None else None, h, view, y, base, call, found)
