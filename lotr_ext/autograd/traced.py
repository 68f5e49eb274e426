"""What an adapted layer is to torch.compile: one operator to Dynamo, nodes to AOTAutograd, kernels in the graph.

    Dynamo         y = lotr::adapted(x, y or W and bias, A, B, G, ..), into which it does not look
    AOTAutograd    calls `_adapted`, that operator's only implementation, above autograd and on the tensors that it traces with;
                   the nodes made here go backward once, by autograd's own engine, while it traces
    the graph      shrink, fold, layer_forward; layer_backward_, factor_grad_, expand_add_

So plain Python decides at compile time what is shared, and a step pays nothing for it. Siblings on one x have one u, and their
gradients of x and u are summed before one pass over x; that equal calls are one in a graph would do it forward alone. A and B
have one sum each, in float32, to which every layer's operator adds in place: the graph says so in its functional form, and the
compiler drops the copies. What the calls of a trace share hangs on the tensors that they are traced with, which no step sees.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function
from torch.compiler import is_exporting
from torch.nn import functional as nnf
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..compat import jit_tracing, transformed
from ..ops import composite, planner
from ..ops.composite import base_linear, rows, to
from ..ops.library import lotr
from ..ops.planner import Plan
from .functions import add_expand
from .record import Call

PLAN = Plan("composite", "traced by torch.compile", why="torch.compile: lotr::adapted decides what runs as it is traced")
_COMPOSITE = Plan("composite", "exported, or a subclass under torch.compile", why="torch's own products, for any backend")
_PLAIN = (Tensor, torch.nn.Parameter)


def plan(x: Tensor, A: Tensor, weight: Tensor | None) -> Plan:
    """PLAN for a call that torch.compile traces, the composite's for one that is exported or has a tensor subclass."""
    exported = is_exporting() or jit_tracing() is not None
    plain = type(x) in _PLAIN and type(A) in _PLAIN and (weight is None or type(weight) in _PLAIN)
    return PLAN if plain and not exported else _COMPOSITE


class _Sum:
    """The gradient of one tensor that many layers use, made by the first that adds to it."""

    def __init__(self, like: Tensor):
        self.size, self.dtype, self.device = like.shape, ops.accumulate_dtype(like.dtype), like.device
        self.value: Tensor | None = None

    def accumulator(self) -> Tensor:
        if self.value is None:
            self.value = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return self.value


class _Shared(Function):
    """t as all layers use it, on one device and in one dtype. backward: what they added up."""

    @staticmethod
    def forward(ctx, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.set_materialize_grads(False)
        there = t.to(device, dtype)
        ctx.was, ctx.total = (t.device, t.dtype), _Sum(there)
        return t.view_as(t) if there is t else there

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        total, ctx.total.value = ctx.total.value, None
        if grad is not None:  # of uses that are not our nodes'
            total = grad if total is None else total + grad
        return None if total is None else total.to(*ctx.was), None, None


class _Input:
    """One x with one A: u = drop(x) A for all layers on it, and what those of them bring that have been backward.

    node: its _Shrink, None where neither x nor A gets a gradient; waiting: the layers that have not been backward.
    """

    def __init__(self, A: Tensor, p: float, seed: Tensor | None):
        self.A, self.p, self.seed = weakref.ref(A), p, seed
        self.u: Tensor
        self.route: Tensor | None = None
        self.node: _Shrink | None = None
        self.k: Tensor | None = None
        self.dx: Tensor | None = None
        self.waiting = 0


_views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # t -> {(device, dtype, version): _Shared's, weakly}
_inputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # x -> {settings: [_Input, weakly where u is in a graph]}


def _view(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """t as layers use it: behind the one node of this trace if it gets a gradient."""
    if not (t.requires_grad and is_grad_enabled()):
        return t.detach().to(device, dtype)
    known, key = _views.setdefault(t, {}), (device, dtype, t._version)
    view = known[key]() if key in known else None
    if view is None:
        view = _Shared.apply(t, device, dtype)
        known[key] = weakref.ref(view)
    return view


def _input(x: Tensor, A: Tensor, compute: torch.dtype, p: float) -> _Input:
    """x's u: a sibling's, if one was called on the very same x, unchanged, with this A and these settings, else a new one."""
    graph = is_grad_enabled() and (x.requires_grad or A.requires_grad)
    settings = (x._version, A._version, compute, p, graph)
    known = _inputs.setdefault(x, {}).setdefault(settings, [])
    for reference in known:
        if (found := reference()) is not None and found.A() is A:
            return found
    found = _Input(A, p, torch.randint(0, 2**62, (1,), device=x.device) if p else None)
    view = _view(A, x.device, compute)
    if graph:
        found.u, found.route = _Shrink.apply(x, view, compute, found)
        known.append(weakref.ref(found))
    else:
        found.u = ops.shrink(rows(to(x, compute)), view, p=p, seed=found.seed)
        known.append(lambda: found)
    return found


class _Shrink(Function):
    """u = drop(x) A, and route, x's place in the graph. backward: what the layers have left to do for dx and dA."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, compute: torch.dtype, found: _Input):
        ctx.set_materialize_grads(False)
        need_x, need_A = ctx.needs_input_grad[:2]
        ctx.total = A.grad_fn.total if need_A else None
        ctx.shape, ctx.dtype, ctx.p = x.shape, x.dtype, found.p
        found.node, ctx.found = ctx, weakref.ref(found)  # u, which is in it, holds this node
        x = to(x, compute)
        ctx.save_for_backward(x if need_A else None, A if need_x else None, found.seed)
        route = x.new_empty(()).expand(x.shape)
        if not need_x:
            ctx.mark_non_differentiable(route)
        return ops.shrink(rows(x), A, p=found.p, seed=found.seed), route

    @staticmethod
    def backward(ctx, k: Tensor | None, dx: Tensor | None):
        found = ctx.found()
        if found is not None:
            dx = found.dx if dx is None else dx
            if found.k is not None:
                k = found.k if k is None else k + found.k
            found.k = found.dx = None
        if k is not None:
            x, A, seed = ctx.saved_tensors
            if x is not None:
                ops.factor_grad_(ctx.total.accumulator(), rows(x), k, p=ctx.p, seed=seed)
            if A is not None:
                flat = k.new_zeros(k.shape[0], A.shape[0]) if dx is None else rows(dx)
                ops.expand_add_(flat, k, A, p=ctx.p, seed=seed)
                dx = flat.view(ctx.shape)
        return None if dx is None else to(dx, ctx.dtype), None, None, None


class _Expand(Function):
    """y = x W^T + bias + u F^T, or onto a given y, with F = s B G^T. backward: `ops.layer`'s; k and dx go to x's `_Input`.

    The last layer on x to go backward does what `_Shrink` would have to: k A^T comes before its g W, and is not read again.
    """

    @staticmethod
    def forward(ctx, route, u, B, core, y, base: tuple, call: Call, found: _Input):
        ctx.set_materialize_grads(False)
        need_x, need_u, need_B, need_core = ctx.needs_input_grad[:4]
        x, weight, bias = base
        F = ops.fold(B, core.unsqueeze(0), call.scaling, u.dtype).squeeze(0)
        ctx.order = min(call.plan.order, 1)  # all in one launch would make u anew for each sibling
        ctx.total = B.grad_fn.total if need_B else None
        if y is None:
            y = lotr.layer_forward.default(x, weight, bias, None, B, core, call.scaling, ctx.order, u, F)[0]
        else:
            y = add_expand(y, u, F)
        ctx.save_for_backward(weight if need_x else None, F if need_u else None, u if need_B or need_core else None, B, core)
        ctx.call, ctx.found, ctx.own_u = call, found, u is found.u
        found.waiting += 1
        return y

    @staticmethod
    def backward(ctx, g: Tensor | None):
        found, call = ctx.found, ctx.call
        found.waiting -= 1
        if g is None:
            return (None,) * 8
        weight, F, u, B, core = ctx.saved_tensors
        _, need_u, need_B, need_core, need_y = ctx.needs_input_grad[:5]
        dy, k, x, A, seed, dA = g if need_y else None, None, None, None, None, None
        if ctx.own_u and need_u:
            k = found.k
            if weight is not None and found.waiting == 0:
                x, A, seed = found.node.saved_tensors
                dA = None if x is None else found.node.total.accumulator()
        dB = ctx.total.accumulator() if need_B else None
        g = to(g, call.compute).contiguous()
        new_dx, new_k, _, _, dcore = lotr.layer_backward_.default(
            *(g, weight, x, u, A, F, B, core, call.scaling, ctx.order, k, None if weight is None else found.dx, None, dA, dB),
            *(False, need_core, found.p if A is not None else 0.0, seed),
        )
        if weight is not None and found.dx is None:
            found.dx = new_dx
        if ctx.own_u and need_u:
            found.k, new_k = None if A is not None else new_k, None
        return None, new_k if need_u else None, None, to(dcore, core.dtype) if need_core else None, dy, None, None, None


def _adapted(x, y, weight, bias, A, B, core, scaling, dtype, p, strategy) -> Tensor:
    call = Call(core, scaling, p)
    call.dtype, call.compute = dtype, dtype or x.dtype
    tokens = x.numel() // x.shape[-1]
    known = isinstance(tokens, int)  # else any: no guard on how many
    many, forced = not known or tokens >= planner.BETA_TOKENS, (strategy, planner.environment_strategy())
    call.plan = planner.plan_of(many, max(core.shape), call.compute, x.device, *forced)
    if known and tokens < planner.FEW_TOKENS and x.device.type == "cpu" and not any(forced):  # the fold takes longer than x A
        call.plan = _COMPOSITE
    half = call.compute == torch.bfloat16
    ours = call.plan.strategy != "composite" and not (type(x) in _PLAIN or transformed())
    ours = ours and call.compute != torch.float16  # whose range F could leave, and s u G
    if not ours or not all(t.dtype == call.compute or (half and t.dtype == torch.float32) for t in (A, B, core)):
        y = base_linear(x, weight, bias, dtype) if y is None else y
        delta = composite.adapter(nnf.dropout(x, p) if p else x, A, B, core, scaling, call.compute)
        return y + to(delta.to(y.device), y.dtype)
    found = _input(x, A, call.compute, p)
    u, route, core = found.u, found.route, core.to(x.device)
    base = (None, None, None)
    if y is None:
        x, weight, bias = call.cast(x, weight, bias)
        base = x.contiguous(), weight, bias
    return _Expand.apply(route, u, _view(B, x.device, B.dtype), core, y, base, call, found)


_operators = torch.library.Library("lotr", "FRAGMENT")
_operators.define(
    "adapted(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor core, float scaling, "
    "ScalarType? dtype, float p, str? strategy) -> Tensor"
)
_operators.impl("adapted", _adapted, "CompositeImplicitAutograd")


def adapted(
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, call: Call
) -> Tensor:
    """What Dynamo takes up: y + s ((drop(x) A) G) B^T, with y = x W^T + bias where it is None."""
    values = (call.core, call.scaling, call.dtype, call.p, call.strategy)
    return lotr.adapted.default(x, y, weight, bias, A, B, *values)
