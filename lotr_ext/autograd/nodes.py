"""The autograd nodes of layers that may share u = x A with siblings on the same x (`siblings.py`).

    LoTRLead                 the first layer called on x: its y, and u and x's place in the graph (route) for those that follow
    LoTRExpand               a layer that follows
    LoTRShrink + LoTRAdd     the same in two steps, over a base module whose own forward made y

Each factor's gradient goes to the group's `SharedGradient` where there is one, else back to autograd. A backward that is
itself recorded (create_graph=True) runs differentiable torch products instead of kernels.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..ops import Gradients
from ..ops.products import (
    accumulate_dtype,
    add_expand,
    fold_differentiable,
    hand_over,
    here,
    private_write,
    recorded,
    rows,
    shared_sum,
    to,
)
from . import direction
from .direction import KEEP, Dropout
from .shared_gradient import SharedGradient
from .shared_input import SharedInput

if TYPE_CHECKING:
    from ..model.scope import Slot


class Base(NamedTuple):
    """The frozen layer, in a tuple so that autograd does not see it; what to compute in under autocast; the strategy."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype | None
    strategy: str


class LoTRLead(Function):
    """y = x W^T + bias + u F^T, u = drop(x) A, F = s B G^T, for the first of the layers on x; the others take u and route.

    apply(x [..., k], A, B, core, token, base, scaling, dropout, shared_A, shared_B, shared_input, slot, values) -> y [..., n],
    u [m, r_in], route [..., k]. route has one element of memory and is never read. values: A as a forward scope cast it, or A.
    slot, token: as for LoTRExpand. shared_input: a weak reference to what the siblings find.
    backward, once, when all siblings have been there (dx', k': theirs, summed by autograd):
        k = g F + k',  dx = dx' + g W + drop(k A^T),  dA += drop(x)^T k,  Q = g^T u,  dB += s Q G,  dG = s Q^T B
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        core: Tensor,
        token: Tensor | None,
        base: Base,
        scaling: float,
        dropout: Dropout,
        shared_A: SharedGradient | None,
        shared_B: SharedGradient | None,
        shared_input,
        slot: Slot | None,
        values: Tensor,
    ):
        ctx.set_materialize_grads(False)
        need_x, need_A, need_B, need_core = ctx.needs_input_grad[:4]
        weight, bias, dtype, strategy = base
        factors = here(x.device, values, B, core)
        F = None if slot is None else slot.F
        y, u, F = direction.forward(x, weight, bias, *factors, scaling, dtype, strategy, None, F, dropout)
        ctx.save_for_backward(
            x if need_A else None,
            weight if need_x else None,
            A if need_x else None,
            u if need_B or need_core else None,
            F if need_x or need_A else None,
            *(B, core, dropout.seed),
        )
        ctx.scaling, ctx.strategy, ctx.p, ctx.slot, ctx.x_shape = scaling, strategy, dropout.p, slot, x.shape
        ctx.shared, ctx.shared_B, ctx.hub_B, ctx.input = shared_A, shared_B, B, shared_input
        ctx.hub, ctx.values = A, None if values is A else values  # hub: else a forward's next layers might find it gone
        return y, u, _route_of(ctx, x, y.dtype)

    @staticmethod
    def backward(ctx, g, k, dx):
        private = sys.getrefcount(dx) <= _Probe.count
        shared_input = ctx.input()
        try:
            x, weight, A, u, F, B, core, seed = ctx.saved_tensors
        except RuntimeError:  # freed, if a sibling goes backward by itself after this layer has
            if g is not None:
                raise
            x, A = _recall(ctx, shared_input)
            seed = None
        if shared_input is not None:
            shared_input.spend()
        if g is None:  # siblings alone
            return *_shrink_backward(ctx, k, dx, x, A, Dropout(ctx.p, seed), private), *(None,) * 11
        need_x, need_A, need_B, need_core = ctx.needs_input_grad[:4]
        if recorded():
            own_k, dB, dcore = _expand_recorded(ctx, g, u, B, core, need_x or need_A, need_B, need_core)
            if own_k is not None:
                k = own_k if k is None else own_k + k
            if need_x:
                own_dx = g @ to(weight, g.dtype)
                dx = own_dx if dx is None else own_dx + dx
            dx, dA = _shrink_backward(ctx, k, dx, x, A, Dropout(ctx.p, seed), False)
            return dx, dA, dB, dcore, *(None,) * 9
        hub, values = here(g.device, ctx.hub, ctx.hub if ctx.values is None else ctx.values)
        theirs = {
            "k": None if k is None else to(k, g.dtype),
            "dx": None if dx is None else _own(dx, g.dtype, private),
            "dA": shared_sum(ctx.shared, hub) if need_A else None,
            "dropout": Dropout(ctx.p, seed) if ctx.p else KEEP,
        }
        dx, _, dA, dB, dcore = _backward(ctx, g, weight, x, u, values, F, B, core, **theirs)
        return dx, dA, dB, dcore, *(None,) * 9


class LoTRExpand(Function):
    """y = x W^T + bias + u F^T, F = s B G^T.   backward: dx = g W,  k = g F,  Q = g^T u,  dB += s Q G,  dG = s Q^T B.

    apply(route, u, B, core, token, (x,), base, scaling, shared_B, shared_input, slot): route stands for x, which comes in a
    tuple so that autograd does not see it. In a forward scope slot brings F, and takes Q, and token is its place in the graph
    (`scope.py`).
    """

    @staticmethod
    def forward(ctx, route, u, B, core, token, x, base: Base, scaling: float, shared_B, shared_input: SharedInput, slot):
        ctx.set_materialize_grads(False)
        (x,) = x
        weight, bias, dtype, strategy = base
        need_x, need_u, need_B, need_core = ctx.needs_input_grad[:4]
        F = None if slot is None else slot.F
        u_here, *factors = here(x.device, u, B, core)
        y, _, F = direction.forward(x, weight, bias, None, *factors, scaling, dtype, strategy, u_here, F)
        ctx.save_for_backward(weight if need_x else None, F if need_u else None, u if need_B or need_core else None, B, core)
        ctx.scaling, ctx.strategy, ctx.slot = scaling, strategy, slot
        ctx.shared_B, ctx.hub_B, ctx.input = shared_B, B, shared_input
        return y

    @staticmethod
    def backward(ctx, g):
        ctx.input.forget()
        if g is None:
            return (None,) * 11
        weight, F, u, B, core = ctx.saved_tensors
        need_x, need_u, need_B, need_core = ctx.needs_input_grad[:4]
        if recorded():
            dx = g @ to(weight, g.dtype) if need_x else None
            return dx, *_expand_recorded(ctx, g, u, B, core, need_u, need_B, need_core), *(None,) * 7
        dx, k, _, dB, dcore = _backward(ctx, g, weight, None, u, None, F, B, core)
        return dx, k, dB, dcore, *(None,) * 7


class LoTRShrink(Function):
    """u = drop(x) A and route.   backward: dx += drop(k A^T),  dA += drop(x)^T k,  k = du as autograd summed it over siblings.

    apply(x [..., k], A [k, r_in], dtype, dropout, shared, shared_input, values) -> u [m, r_in], route [..., k] in dtype.
    values: A as a forward scope cast it, or A.
    """

    @staticmethod
    def forward(ctx, x, A, dtype, dropout: Dropout, shared: SharedGradient | None, shared_input, values: Tensor):
        ctx.set_materialize_grads(False)
        need_x, need_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_A else None, A if need_x else None, dropout.seed)
        ctx.p, ctx.x_shape, ctx.shared, ctx.input = dropout.p, x.shape, shared, shared_input
        ctx.hub, ctx.values = A, None if values is A else values
        with private_write():
            u = ops.shrink(rows(to(x, dtype)), *here(x.device, values), p=dropout.p, seed=dropout.seed)
        return u, _route_of(ctx, x, dtype)

    @staticmethod
    def backward(ctx, k, dx):
        private = sys.getrefcount(dx) <= _Probe.count
        shared_input = ctx.input()
        try:
            x, A, seed = ctx.saved_tensors
        except RuntimeError:  # freed, if a sibling went backward by itself; but then x may still be there
            x, A = _recall(ctx, shared_input)
            seed = None
        if shared_input is not None:
            shared_input.spend()
        return *_shrink_backward(ctx, k, dx, x, A, Dropout(ctx.p, seed), private), *(None,) * 5


class LoTRAdd(Function):
    """y + u F^T over any base module's output y [..., n].   backward: dy = g, and the rest as LoTRExpand.

    apply(y, u, B, core, token, scaling, shared_B, shared_input, slot); y is left alone, since its maker may need it for its own
    backward.
    """

    @staticmethod
    def forward(ctx, y, u, B, core, token, scaling, shared_B, shared_input: SharedInput, slot: Slot | None):
        ctx.set_materialize_grads(False)
        _, need_u, need_B, need_core = ctx.needs_input_grad[:4]
        if slot is not None:
            F = slot.F
        else:
            B_here, core_here = here(u.device, B, core)
            with private_write():
                F = ops.fold(B_here, core_here.unsqueeze(0), scaling, u.dtype).squeeze(0)
        ctx.save_for_backward(F if need_u else None, u if need_B or need_core else None, B, core)
        ctx.scaling, ctx.strategy, ctx.slot, ctx.dtype = scaling, "two_pass", slot, u.dtype
        ctx.shared_B, ctx.hub_B, ctx.input = shared_B, B, shared_input
        if y.dtype == u.dtype:
            return add_expand(y, u, F, private=False)
        delta = torch.zeros(y.shape, dtype=u.dtype, device=u.device)
        return y + to(add_expand(delta, u, F, private=True), y.dtype)

    @staticmethod
    def backward(ctx, g):
        ctx.input.forget()
        if g is None:
            return (None,) * 9
        F, u, B, core = ctx.saved_tensors
        _, need_u, need_B, need_core = ctx.needs_input_grad[:4]
        if recorded():
            return g, *_expand_recorded(ctx, to(g, ctx.dtype), u, B, core, need_u, need_B, need_core), *(None,) * 5
        _, k, _, dB, dcore = _backward(ctx, to(g, ctx.dtype), None, None, u, None, F, B, core)
        return g, k, dB, dcore, *(None,) * 5


def _route_of(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x's place in the graph: x's shape over one element of memory."""
    route = torch.empty_strided(x.shape, (0,) * x.dim(), dtype=dtype, device=x.device)
    if not ctx.needs_input_grad[0]:
        ctx.mark_non_differentiable(route)
    return route


def _backward(ctx, g, weight, x, u, A, F, B, core, **theirs) -> Gradients:
    """`direction.backward` of a node whose inputs are (x's place, u or A, B, core, ..). Q goes to the bank in a forward scope,
    dB to the shared sum where there is one. x, A, theirs: of a node that makes the pass over x for its siblings too."""
    _, _, need_B, need_core = ctx.needs_input_grad[:4]
    B_here, core_here = here(g.device, B, core)
    Q = ctx.slot.bank.accumulator(ctx.slot.index) if ctx.slot is not None and (need_B or need_core) else None
    own = Q is None
    sums = {"Q": Q, "dB": shared_sum(ctx.shared_B, B_here) if own and need_B else None}
    needs = {"need_B": own and need_B, "need_core": own and need_core}
    factors = (A, F, B_here, core_here, ctx.scaling, ctx.strategy)
    return direction.backward(g, weight, x, u, *factors, **sums, **needs, **theirs)


def _expand_recorded(
    ctx, g, u, B, core, need_k: bool, need_B: bool, need_core: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """k, dB and dG in differentiable products."""
    g = rows(g)
    B_here, core_here = here(g.device, B, core)
    k = g @ fold_differentiable(B_here, core_here, ctx.scaling, g.dtype) if need_k else None
    dB = dcore = None
    if need_B or need_core:
        wide = accumulate_dtype(B.dtype)
        Q = to(g.mT @ u, wide) * ctx.scaling
        dB = hand_over(ctx.shared_B, ctx.hub_B, Q @ to(core_here, wide)) if need_B else None
        dcore = to(Q.mT @ to(B_here, wide), core.dtype) if need_core else None
    return k, dB, dcore


def _recall(ctx, shared_input: SharedInput | None) -> tuple[Tensor | None, Tensor | None]:
    """x and A of a node whose saved tensors a first backward has freed, if they are still what they were; else raises."""
    if ctx.p > 0.0 or shared_input is None or not shared_input.recalls(ctx.hub):
        raise
    need_x, need_A = ctx.needs_input_grad[:2]
    return shared_input.x() if need_A else None, ctx.hub if need_x else None


def _shrink_backward(
    ctx, k: Tensor | None, dx: Tensor | None, x: Tensor | None, A: Tensor | None, dropout: Dropout, private: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx + drop(k A^T) with A, and dA = drop(x)^T k with x."""
    if k is None:
        return dx, None
    device, dA = k.device, None
    if recorded():
        mask = None
        if dropout.p:
            mask = ops.dropout_mask(ctx.x_shape[:-1].numel(), ctx.x_shape[-1], dropout.p, dropout.seed, k.dtype)
        if A is not None:
            part = k @ to(A, k.dtype).to(device).mT
            part = (part if mask is None else part * mask).view(ctx.x_shape)
            dx = part if dx is None else dx + part
        if x is not None:
            dropped = rows(to(x, k.dtype))
            dA = hand_over(ctx.shared, ctx.hub, (dropped if mask is None else dropped * mask).mT @ k)
        return dx, dA
    if A is not None:
        new = dx is None or dx.dtype != k.dtype
        dx = torch.zeros(ctx.x_shape, dtype=k.dtype, device=device) if dx is None else to(dx, k.dtype)
        (values,) = here(device, A if ctx.values is None else ctx.values)
        dx = add_expand(dx, k, values, private or new, *dropout)
    if x is not None:
        factor = ctx.hub.to(device)
        total = shared_sum(ctx.shared, factor)
        if total is None:
            total = dA = torch.zeros(factor.shape, dtype=accumulate_dtype(factor.dtype), device=device)
        with private_write():
            ops.factor_grad_(total, rows(to(x, k.dtype)), k, p=dropout.p, seed=dropout.seed)
    return dx, dA


def _own(dx: Tensor, dtype: torch.dtype, private: bool) -> Tensor:
    """dx in dtype, to be written into: itself where no one else can hold it."""
    if dx.dtype == dtype and private and dx.is_contiguous():
        return dx
    return dx.to(dtype, memory_format=torch.contiguous_format, copy=True)


# Function.apply without its look for functorch's wrappers, which `layer_call.decide` has had
apply_lead, apply_expand, apply_shrink, apply_add = (
    super(Function, node).apply for node in (LoTRLead, LoTRExpand, LoTRShrink, LoTRAdd)
)


class _Probe(Function):
    """count: how many references the engine and a backward of this module's form hold to dx, which varies with Python."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x + 1, x + 1

    @staticmethod
    def backward(ctx, k, dx):
        _Probe.count = sys.getrefcount(dx)
        return dx


with torch.inference_mode(False), torch.enable_grad():
    _u, _route = _Probe.apply(torch.zeros(1, device="cpu", requires_grad=True))
    (_u + 2 * _route).sum().backward()
