"""The two autograd nodes that siblings use (`Plan.nodes` 2), and the functions that run them. Their shared state: `sharing.py`.
Nodes with a core for each row: `row_nodes.py`.

LoTRShrink      u = drop(x) A, and route, which represents x in the graph, once for all layers on x
LoTRExpand      y = x W^T + bias + u F^T, or added to a given y, with F = s B G^T: one layer

shared_u        u for a call: a sibling's, or a new one from LoTRShrink
expand          y of it
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, is_grad_enabled

from .. import ops
from ..compat import (
    Node,
    dispatch_modes,
    graph_task,
    keeps_all_by_itself,
    kept,
    private_write,
    recorded,
    saved_if,
    saved_tensor_hook,
    wants,
)
from ..ops import composite
from ..ops.composite import here, rows, to
from .bank import open_scope
from .sharing import Call, SharedInput


class LoTRShrink(Node):
    """u = drop(x) A and route.   backward: dx += drop(k A^T),  dA += drop(x)^T k, from the pending gradients k and dx.

    apply(x [..., k], A [k, r_in], call, shared_input, A_cast, seed) -> u [m, r_in], route [..., k], in the compute dtype.
    A_cast: A, or its cast in a forward scope. shared_input: a weak reference to the siblings' SharedInput.
    """

    @staticmethod
    def forward(ctx, x, A, call: Call, shared_input, A_cast, seed):
        ctx.set_materialize_grads(False)
        need_x, need_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_A else None, A if need_x else None, seed)
        ctx.call, ctx.input, ctx.view, ctx.shape, ctx.device = call, shared_input, A, x.shape, x.device
        # None for A itself: saved-tensor hooks may have kept an older value of it
        ctx.A_cast = None if A_cast is A or not need_x else (A_cast, A._version)
        shared_input().node = weakref.ref(ctx)
        flat = x if x.dim() == 2 else rows(x)
        values = A_cast if A_cast.device == x.device else A_cast.to(x.device)
        if call.first is not None:  # traced: the layer's operator also computes u, one call less in the graph
            *base, B = call.first
            operands, factors = call.cast(x, *base), (values, B, call.core, call.scaling)
            y, u, F = ops.layer_forward(*operands, *factors, call.plan.order, p=call.p, seed=seed)
            call.made = y, F
        else:
            with private_write():  # bypasses the operator's autograd formula, which is Python
                u = ops.shrink(flat if x.dtype == call.compute else flat.to(call.compute), values, p=call.p, seed=seed)
        # route is x itself if a product outside the nodes may read it (experts): its gradient of x then arrives here
        own = x.dtype == call.compute
        route = x.detach() if own else torch.empty_strided(x.shape, (0,) * x.dim(), dtype=call.compute, device=x.device)
        if not need_x:
            ctx.mark_non_differentiable(route)
        return u, route

    @staticmethod
    def backward(ctx, k, dx):
        call, shared_input = ctx.call, ctx.input()
        if shared_input is not None:
            k, dx = shared_input.take(ctx.device, k, dx)
        waits = shared_input is not None and (shared_input.waiting or shared_input.kept is not None)
        if k is None and not waits:  # the last sibling did the rest
            return dx, None, None, None, None, None
        try:
            x, A, seed = ctx.saved_tensors
        except RuntimeError:  # freed, or changed
            x, A, seed = LoTRShrink._read(ctx, shared_input)
        else:
            if waits:
                shared_input.keep(x, A, seed)
        if k is None:
            return dx, None, None, None, None, None
        if recorded(k):
            return *LoTRShrink._recorded(ctx, k, dx, x, A, seed), None, None, None, None
        if A is not None:
            A = A if ctx.A_cast is None else LoTRShrink._cast(ctx, A)
            A = A if A.device == k.device else A.to(k.device)
        dA = None
        if x is not None:
            x = x if x.dtype == k.dtype else x.to(k.dtype)
            if call.shares:
                dA = call.group.A.accumulator(ctx.view if ctx.view.device == k.device else ctx.view.to(k.device))
        dx, new_dA = ops.shrink_backward(k, dx, x, A, dA, ctx.shape, call.p, seed)
        return dx, new_dA, None, None, None, None

    @staticmethod
    def rest(ctx) -> tuple[Tensor | None, ...] | None:
        """(x, A, seed, sum of A's gradient) for the last sibling, which then does this node's work with its products: k A^T
        comes before g W, so dx is not read again. None if this node must do it."""
        need_A, call = ctx.needs_input_grad[1], ctx.call
        if need_A and not call.shares:  # this node returns A's gradient to autograd
            return None
        try:
            x, A, seed = ctx.saved_tensors
        except RuntimeError:  # freed, or changed: left to this node
            return None
        A, view, there = A if ctx.A_cast is None else LoTRShrink._cast(ctx, A), ctx.view, ctx.device
        A = A if A.device == there else A.to(there)
        return x, A, seed, call.group.A.accumulator(view if view.device == there else view.to(there)) if need_A else None

    @staticmethod
    def _cast(ctx, A: Tensor) -> Tensor:
        """The forward's cast of the saved A. A itself if it was changed: then a checkpoint's recomputation has saved it, and
        computed u with the new value."""
        value, version = ctx.A_cast
        return value if A._version == version else A

    @staticmethod
    def _read(ctx, shared_input: SharedInput | None) -> Sequence[Tensor | None]:
        """The saved tensors that the needed gradients depend on: the others may have changed."""
        need_x, need_A = (need and wants(ctx, i) for i, need in enumerate(ctx.needs_input_grad[:2]))
        try:
            return saved_if(ctx, need_A, need_x, True)
        except RuntimeError:  # freed, if a sibling's backward ran earlier alone
            if shared_input is None:
                raise
            return shared_input.kept_if(need_A, need_x, True)

    @staticmethod
    def _recorded(ctx, k, dx, x, A, seed) -> tuple[Tensor | None, Tensor | None]:
        dA, p, shape = None, ctx.call.p, ctx.shape
        mask = ops.dropout_mask(shape[:-1].numel(), shape[-1], p, seed, k.dtype) if p else None
        if A is not None:
            part = k @ to(A, k.dtype).to(k.device).t()
            part = (part if mask is None else part * mask).view(shape)
            dx = part if dx is None else dx + part
        if x is not None:
            dropped = rows(to(x, k.dtype))
            dA = to((dropped if mask is None else dropped * mask).t() @ k, ctx.view.dtype)
        return dx, dA


class LoTRExpand(Node):
    """y = x W^T + bias + u F^T, or y + u F^T, with F = s B G^T.

    backward: dx = g W,  k = g F,  Q = g^T u,  dB += s Q G,  dG = s Q^T B, where dx and k are added to the siblings' sums.

    apply(route, u, B, core, F, y, (x, weight, bias), call, shared_input): route represents x, which is in a tuple so that
    autograd does not see it. F [l, n, r_in]: from the call's bank in a forward scope, where its gradient Q replaces
    those of B and core; otherwise None. y is not overwritten, because its backward may need it, unless call.owns_y;
    without y the base product is computed here.
    """

    @staticmethod
    def forward(ctx, route, u, B, core, F, y, base, call: Call, shared_input: SharedInput):
        ctx.set_materialize_grads(False)
        need_x, need_u, need_B, need_core, _, _ = ctx.needs_input_grad[:6]
        F_l = None if F is None else F[call.l]
        values = (B, core) if B.device == u.device == core.device else here(u.device, B, core)
        if call.made is not None:
            y, F_l = call.made
            call.made = None
        elif y is None:
            operands, order = base if call.dtype is None else call.cast(*base), call.plan.order
            y, _, F_l = ops.layer_forward(*operands, None, *values, call.scaling, order, False, u=u, F=F_l, scale=call.scale)
        else:
            if F_l is None:
                with private_write():
                    F_l = ops.fold(values[0], values[1].unsqueeze(0), call.scaling, u.dtype).squeeze(0)
            y = add_expand(y, u, F_l, call.owns_y)
            if call.owns_y:
                ctx.mark_dirty(y)
        ctx.save_for_backward(
            base[1] if need_x and call.dense is None else None,  # the weight
            F_l if need_u else None,
            u if need_B or need_core else None,
            B if need_u or need_core else None,
            (core if saved_tensor_hook(False) is None else kept(core)) if need_u or need_B else None,
        )
        ctx.call, ctx.input, ctx.F, ctx.factors = call, shared_input, F, (B, core)
        ctx.device = u.device
        if dispatch_modes():
            call.note_versions(B=B, core=core)
        ctx.summed = u is shared_input.u and route is not None  # for LoTRShrink; otherwise autograd passes k to u
        ctx.own = weakref.ref(ctx, shared_input.waiting.discard)  # an output that was freed gets no backward
        shared_input.waiting.add(ctx.own)
        return y

    @staticmethod
    def backward(ctx, g):
        call, (own_B, own_core) = ctx.call, ctx.factors
        total, shrink = ctx.input.pending(ctx.own, ctx.device)
        if g is None:
            return (None,) * 9
        try:
            weight, F_l, u, B, core = ctx.saved_tensors
            need_x, need_u, need_B, need_core, need_F, need_y = ctx.needs_input_grad[:6]
        except RuntimeError:  # freed, or changed
            (need_x, need_u, need_B, need_core, need_F, need_y), (weight, F_l, u, B, core) = LoTRExpand._read(ctx)
        if call.dense is not None and need_x:
            weight = call.dense()
        if call.read is not None:
            call.refuse_changed(B=need_u or need_core, core=need_u or need_B)
        if recorded(g):
            needs = need_x, need_u, need_B, need_core
            return *LoTRExpand._recorded(ctx, g, needs, weight, u, B, None if core is None else own_core), None, None, None
        dy = g if need_y else None
        g = g if g.dtype == call.compute else g.to(call.compute)
        values = own_B if B is None else B, own_core if core is None else core
        if not values[0].device == g.device == values[1].device:
            values = here(g.device, *values)
        weight = weight if need_x else None
        Q = sum_B = x = A = seed = sum_A = None
        if ctx.F is None:
            sum_B = call.group.B.accumulator(values[0]) if need_B and call.shares else None
        else:  # the shared gradient of F computes dB and dG from Q
            need_B = need_core = False
            if need_F:
                call.bank.gradient.came[graph_task()][call.l] = own_core if core is None else core
                Q = call.bank.gradient.accumulator(ctx.F)[call.l]
        k, dx = total.value if ctx.summed and total.value is not None else (None, None)
        if shrink is not None and ctx.summed and weight is not None and need_u and wants(ctx, 1):
            x, A, seed, sum_A = LoTRShrink.rest(shrink) or (None,) * 4
        if call.dtype is not None:
            weight, x = call.cast(weight, x)
        operands = (g, weight, x, u, A, F_l, *values, call.scaling, call.plan.order, False)
        sums = {"k": k, "dx": dx if weight is not None else None, "Q": Q, "dA": sum_A, "dB": sum_B}
        new_dx, new_k, _, dB, dcore = ops.layer_backward(
            *operands, **sums, need_B=need_B, need_core=need_core, p=0.0 if A is None else call.p, seed=seed
        )
        if ctx.summed:
            if A is not None:
                k = None  # used in dx and dA
            elif need_u:
                k = new_k
            total.value = k, new_dx if dx is None else dx
            new_k = None
        return None, new_k, dB, dcore, None, dy, None, None, None

    @staticmethod
    def _read(ctx) -> tuple[Sequence[bool], Sequence[Tensor | None]]:
        """The gradients that the running backward needs, and the saved tensors that they depend on: the others may have
        changed."""
        need_x, need_u, need_B, need_core, need_F, need_y = ctx.needs_input_grad[:6]
        first = int(ctx.summed)  # a route of None is not among the edges; it leads to LoTRShrink, and to x
        need_x = need_x and wants(ctx, 0) and wants(ctx.next_functions[0][0], 0)
        need_u, need_B, need_core = (need and wants(ctx, first + i) for i, need in enumerate((need_u, need_B, need_core)))
        needs = need_x, need_u, need_B, need_core, need_F and (need_B or need_core), need_y
        return needs, saved_if(ctx, need_x, need_u, need_B or need_core, need_u or need_core, need_u or need_B)

    @staticmethod
    def _recorded(ctx, g, needs, weight, u, B, core) -> tuple[Tensor | None, ...]:
        """Bypasses F, whose graph also contains the cores of other layers."""
        need_x, need_u, need_B, need_core = needs
        dy, g = g if ctx.needs_input_grad[5] else None, to(g, ctx.call.compute)
        dx = g @ to(weight, g.dtype) if need_x and weight is not None else None
        k, dB, dcore = composite.expand_backward(rows(g), u, B, core, ctx.call.scaling, need_u, need_B, need_core)
        home = (None if d is None else d.to(t.device, t.dtype) for d, t in zip((dB, dcore), ctx.factors))
        return dx, k, *home, None, dy


def add_expand(y: Tensor, u: Tensor, F: Tensor, in_place: bool = False) -> Tensor:
    """y [..., n] + u F^T in y's dtype, in new memory, or in place if y [m, n] has u's dtype."""
    if in_place:
        with private_write():  # mark_dirty changes its version
            ops.expand_add_(y, u, F)
        return y
    if y.dtype == u.dtype:
        return ops.expand(y, u, F)
    return y + to(ops.expand(u.new_zeros(y.shape), u, F), y.dtype)


# ---- running ---------------------------------------------------------------------------------------------------------


def shared_u(x: Tensor, A: Tensor, B: Tensor, call: Call) -> SharedInput:
    """u and route for a call: from a sibling that was called on this x, otherwise new."""
    # With saved-tensor hooks autograd does not check B and the cores: each node then saves its own, without a bank.
    watched = saved_tensor_hook(False) is None or keeps_all_by_itself()
    scope = open_scope() if call.group is not None and watched else None
    call.bank = None if scope is None else scope.bank(call.group.B, B, call.compute)
    group, graph = call.group, is_grad_enabled()
    how = (call.compute, call.dtype, call.p)
    found = SharedInput(x, A, None, None) if group is None else group.A.find(x, A, call.owner, how)
    if found.u is not None:
        if call.shares:
            group.A.view(A, call.owner)  # notes the owner: its next call starts a new round
        return found
    seed = found.drawn(x.device) if call.p else None
    values = A if call.bank is None or A.dtype == call.compute else scope.cast(group.A, A, call.compute)
    if graph and (A.requires_grad or x.requires_grad):
        view = group.A.view(A, call.owner) if call.shares else A
        values = view if values is A else values
        found.u, found.route = LoTRShrink.run(x, view, call, weakref.ref(found), values, seed)
    else:
        with torch.no_grad(), private_write():
            found.u = ops.shrink(rows(to(x, call.compute)), *here(x.device, values), p=call.p, seed=seed)
    if group is not None:
        group.A.offer(found)
    return found


def expand(found: SharedInput, y: Tensor | None, base: tuple, B: Tensor, call: Call, in_graph: bool) -> Tensor:
    """y = x W^T + bias + u F^T for base = (x, W, bias), or added to a given y."""
    bank, F, core, u = call.bank, None, call.core, found.u
    if bank is not None and bank.F is not None:
        call.l = bank.serves(call, B)
        trained = in_graph and (B.requires_grad or core.requires_grad)
        if call.l is not None and (bank.F.requires_grad or not trained):
            F = bank.F if trained or not bank.F.requires_grad else bank.F.detach()  # for other layers' cores
    if in_graph:
        view = B if F is not None or not call.shares else call.group.B.view(B, call.owner)
        return LoTRExpand.run(found.route, u, view, core, F, y, base, call, found)
    F_l = None if F is None else F[call.l]
    values = here(u.device, B, core)
    if y is None:
        operands = call.cast(*base)
        order, made = call.plan.order, {"u": u, "F": F_l, "scale": call.scale}
        return ops.layer_forward(*operands, None, *values, call.scaling, order, **made)[0]
    if F_l is None:
        F_l = ops.fold(values[0], values[1].unsqueeze(0), call.scaling, u.dtype).squeeze(0)
    return add_expand(y, u, F_l)
