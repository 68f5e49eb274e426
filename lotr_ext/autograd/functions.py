"""The autograd Functions of an adapted layer. Equations: `reference.py`; which runs when: `call.py`.

    LoTRFunction   a layer by itself: y = x W^T + bias + s ((x A) G) B^T
    LoTRShrink     u = drop(x) A, and x's place in the graph (route), for all layers on x
    LoTRExpand     y = x W^T + bias + u F^T, or onto a given y, with F = s B G^T: one layer

Each runs one operator a direction. A factor's gradient goes to the group's `SharedGradient` where it has one, else back to
autograd. A backward that is itself recorded (create_graph=True) or batched runs torch's products instead, and hands all
gradients to autograd.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from .. import ops
from ..compat import (
    OLD_VMAP,
    Node,
    dispatch_key_included,
    dispatch_modes,
    functorch_active,
    graph_task,
    private_write,
    saved_if,
    saved_or_changed,
    saved_tensor_hook,
    wants,
)
from ..ops import composite
from ..ops.composite import here, rows, to
from .record import Call
from .shared_input import SharedInput, keeps_all_by_itself


def recorded(g: Tensor) -> bool:
    """Whether the running backward of g takes torch's own products: it is being recorded, for double backward or by compiled
    autograd, or batched, by is_grads_batched or vmap. AOTAutograd, which traces it with tensors of its own, takes the nodes."""
    compiled = is_compiling() and type(g) is Tensor
    return is_grad_enabled() or compiled or dispatch_key_included(OLD_VMAP) or functorch_active()


def kept_core(core: Tensor) -> Tensor:
    """core as it is saved: a copy where hooks pack what is saved, for autograd then does not notice that core was changed in
    place, and dB needs it, where the unfolded formula needs u G alone."""
    return core if keeps_all_by_itself() else core.detach().clone()


def versions(B: Tensor, core: Tensor) -> tuple[Tensor, int, Tensor, int] | None:
    """For a forward under a dispatch mode: selective checkpointing keeps what was made of B and core, and autograd is then not
    there to notice that they were changed."""
    return None if is_compiling() or B.is_inference() or core.is_inference() else (B, B._version, core, core._version)


def refuse_changed(made_of: tuple[Tensor, int, Tensor, int], need_k: bool, need_B: bool, need_core: bool) -> None:
    """Raises where a gradient is asked for that is made of a B or core which is not as it was in the forward."""
    B, version_B, core, version_core = made_of
    for name, t, before, read in (("B", B, version_B, need_k or need_core), ("core", core, version_core, need_k or need_B)):
        if read and t._version != before:
            raise RuntimeError(
                f"lotr_ext: {name}: expected version {before}, got {t._version}: it was changed in place between the forward "
                "and the backward of a layer under selective checkpointing, which keeps what was made of it"
            )


class LoTRFunction(Node):
    """y = x W^T + bias + s ((x A) G) B^T as one node.

    apply(x [..., k], weight [n, k], bias [n] or None, A [k, r_in], B [n, r_out], core [r_in, r_out], scaling) -> [..., n].
    Differentiable, also twice, in all six tensors. The layers give their `Call` in scaling's place, and with it dtype, plan and
    where A's and B's gradients are summed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, core, call: Call | float):
        need_x, need_weight, _, need_A, need_B, need_core, _ = ctx.needs_input_grad
        if not isinstance(call, Call):
            call = Call.of_function(x, core, call, any(ctx.needs_input_grad))
        x_, weight_, bias_, A_, B_, core_, plan = x, weight, bias, A, B, core, call.plan
        if call.dtype is not None:
            x_, weight_, bias_ = call.cast(x, weight, bias)
        # three device objects less, 0.1 us, where all are on the CPU
        call.apart = not ((x.is_cpu and A.is_cpu and core.is_cpu) or A.device == x.device == core.device)
        if call.apart:
            A_, B_, core_ = here(x.device, A, B, core)
        y, u, F = ops.layer_forward(x_, weight_, bias_, A_, B_, core_, call.scaling, plan.order, plan.unfolded)
        ctx.save_for_backward(
            x if need_x or need_weight or need_A else None,  # with x: for kept_u, which layers avoid where A is frozen
            weight if need_x else None,
            A if need_x else None,
            B if need_x or need_A or need_core else None,
            (core if saved_tensor_hook(False) is None else kept_core(core)) if need_x or need_A or need_B else None,
            u if need_B or need_core else None,
            F if need_x or need_A else None,
        )
        # A, B and core are kept here too: a gradient that does not need their saved copy must not raise when they were changed
        # in place, and a checkpoint's forward saves no tensor, yet its next layers must find the same A and B
        ctx.call, call.factors = call, (A, B, core)
        if dispatch_modes():
            call.made_of = versions(B, core)
        return y

    @staticmethod
    def backward(ctx, g):
        if recorded(g):
            return *LoTRFunction._recorded(ctx, g), None
        call = ctx.call
        try:
            x, weight, A, B, core, u, F = ctx.saved_tensors
            need_x, need_weight, need_bias, need_A, need_B, need_core, _ = ctx.needs_input_grad
        except RuntimeError:  # freed, or changed
            wanted, (x, weight, A, B, core, u, F) = LoTRFunction._read(ctx)
            need_x, need_weight, need_bias, need_A, need_B, need_core = wanted
        if call.made_of is not None:
            refuse_changed(call.made_of, need_x or need_A, need_B, need_core)
        if A is None or B is None or core is None:
            A, B, core = (own if saved is None else saved for own, saved in zip(call.factors, (A, B, core)))
        if call.apart:
            A, B, core = here(g.device, A, B, core)
        sum_A = sum_B = None
        if call.shares:
            sum_A = call.group.A.accumulator(A) if need_A else None
            sum_B = call.group.B.accumulator(B) if need_B else None
        plan, weight, x_ = call.plan, weight if need_x else None, x if need_A else None
        if call.dtype is not None:
            weight, x_ = call.cast(weight, x_)
        order, unfolded = plan.order, plan.unfolded
        dx, _, dA, dB, dcore = ops.layer_backward(
            g, weight, x_, u, A, F, B, core, call.scaling, order, unfolded, sum_A, sum_B, need_B, need_core
        )
        dweight = rows(g).t() @ rows(to(x, g.dtype)) if need_weight else None
        dbias = rows(g).sum(0) if need_bias else None
        return dx, dweight, dbias, dA, dB, dcore, None

    @staticmethod
    def _read(ctx) -> tuple[Sequence[bool], Sequence[Tensor | None]]:
        """Which gradients the running backward goes on with, and of what was saved that which they are made of: the rest may
        have changed."""
        end = len(ctx.next_functions)  # a bias of None has no place among them
        wanted = [need and wants(ctx, i if i < 3 else end - 6 + i) for i, need in enumerate(ctx.needs_input_grad[:6])]
        x, weight, _, A, B, core = wanted
        return wanted, saved_if(ctx, weight or A, x, x, x or A or core, x or A or B, B or core, x or A)

    @staticmethod
    def _recorded(ctx, g) -> tuple[Tensor | None, ...]:
        compiled = is_compiling()
        wanted, saved = (ctx.needs_input_grad[:6], ctx.saved_tensors) if compiled else LoTRFunction._read(ctx)
        want_x, want_weight, want_bias, want_A, want_B, want_core = wanted
        if ctx.call.made_of is not None:
            refuse_changed(ctx.call.made_of, want_x or want_A, want_B, want_core)
        x, weight, A, B, core, u, _ = saved
        core = None if core is None else ctx.call.factors[2]  # hooks are given a copy, which has no graph
        if u is not None and is_grad_enabled() and not compiled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
            u = kept_u(ctx, u, x, A)
        shape, g = g.shape, rows(g)
        k, dB, dcore = composite.expand_backward(g, u, B, core, ctx.call.scaling, want_x or want_A, want_B, want_core)
        flat = None if x is None else rows(to(x, g.dtype))
        dx = None
        if want_x:
            dx = g @ to(weight, g.dtype) + k @ to(A, g.dtype).to(g.device).t()
            dx = dx.view(*shape[:-1], dx.shape[-1])
        dA = flat.t() @ k if want_A else None
        home = (None if d is None else d.to(t.device, t.dtype) for d, t in zip((dA, dB, dcore), ctx.call.factors))
        return dx, g.t() @ flat if want_weight else None, g.sum(0) if want_bias else None, *home


def kept_u(node, u: Tensor, x: Tensor | None, A: Tensor | None) -> Tensor:
    """u = x A as a LoTRFunction has kept it, in its place in the graph: dB and dG are made of it, and have gradients too.

    x and A as they were read of node, None where they were not yet: checkpoints bear no second reading. Where x or A is not
    what u was made of any more, a gradient that comes here raises, as it does at a product of torch's.
    """
    of_x = of_A = None
    if x is None:
        x, of_x = saved_or_changed(node, 0)
    if A is None:
        A, of_A = saved_or_changed(node, 2) if node.needs_input_grad[0] else (node.call.factors[0], None)
    error = of_x or of_A
    made = rows(to(x, u.dtype)) @ to(A, u.dtype).to(u.device)
    if error is None:
        return made + (u - made).detach()  # u's own value: A may be another where only x was read
    if functorch_active():
        raise error

    def refuse(_: Tensor) -> None:
        raise error

    made.register_hook(refuse)
    return torch.where(torch.zeros((), dtype=torch.bool, device=u.device), made, u.detach())


class LoTRShrink(Node):
    """u = drop(x) A and route.   backward: dx += drop(k A^T),  dA += drop(x)^T k, with k, dx as the siblings summed them.

    apply(x [..., k], A [k, r_in], call, shared_input, A_cast, seed) -> u [m, r_in], route [..., k], in the dtype to compute in.
    A_cast: A as a forward scope cast it, or A. shared_input: a weak reference to what the siblings find.
    """

    @staticmethod
    def forward(ctx, x, A, call: Call, shared_input, A_cast, seed):
        ctx.set_materialize_grads(False)
        need_x, need_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_A else None, A if need_x else None, seed)
        ctx.call, ctx.input, ctx.view, ctx.A_cast, ctx.shape, ctx.device = call, shared_input, A, A_cast, x.shape, x.device
        shared_input().node = weakref.ref(ctx)
        flat = x if x.dim() == 2 else rows(x)
        values = A_cast if A_cast.device == x.device else A_cast.to(x.device)
        if call.first is not None:  # traced: the layer's own operator makes u too, one call less in the graph
            *base, B = call.first
            operands, factors = call.cast(x, *base), (values, B, call.core, call.scaling)
            y, u, F = ops.layer_forward(*operands, *factors, call.plan.order, p=call.p, seed=seed)
            call.made = y, F
        else:
            with private_write():  # past the operator's own formula, which is Python
                u = ops.shrink(flat if x.dtype == call.compute else flat.to(call.compute), values, p=call.p, seed=seed)
        # x itself, for products that are not a layer's own, whose gradient of x then comes here; else one element of memory
        own = x.dtype == call.compute
        route = x.detach() if own else torch.empty_strided(x.shape, (0,) * x.dim(), dtype=call.compute, device=x.device)
        if not need_x:
            ctx.mark_non_differentiable(route)
        return u, route

    @staticmethod
    def backward(ctx, k, dx):
        call, shared_input = ctx.call, ctx.input()
        if shared_input is not None:
            k, dx = shared_input.total(ctx.device, k, dx)
        waits = shared_input is not None and (shared_input.waiting or shared_input.kept is not None)
        if k is None and not waits:  # the last sibling has done the rest
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
            A = ctx.A_cast if ctx.A_cast.device == k.device else ctx.A_cast.to(k.device)
        dA = None
        if x is not None:
            x = x if x.dtype == k.dtype else x.to(k.dtype)
            if call.shares:
                dA = call.group.A.accumulator(ctx.view if ctx.view.device == k.device else ctx.view.to(k.device))
        dx, new_dA = ops.shrink_backward(k, dx, x, A, dA, ctx.shape, call.p, seed)
        return dx, new_dA, None, None, None, None

    @staticmethod
    def rest(ctx) -> tuple[Tensor | None, ...] | None:
        """(x, A, seed, sum of A's gradient) for the last sibling, which then does what would be left for this node with its own
        products: k A^T comes before g W, and dx is not read again. None where this node has to."""
        need_A, call = ctx.needs_input_grad[1], ctx.call
        if need_A and not call.shares:  # A's gradient goes back to autograd from here
            return None
        try:
            x, A, seed = ctx.saved_tensors
        except RuntimeError:  # freed, or changed: this node knows what to do
            return None
        A, view, there = ctx.A_cast, ctx.view, ctx.device
        A = A if A.device == there else A.to(there)
        return x, A, seed, call.group.A.accumulator(view if view.device == there else view.to(there)) if need_A else None

    @staticmethod
    def _read(ctx, shared_input: SharedInput | None) -> Sequence[Tensor | None]:
        """What the gradients are made of that the running backward goes on with: the rest may have changed."""
        need_x, need_A = (need and wants(ctx, i) for i, need in enumerate(ctx.needs_input_grad[:2]))
        try:
            return saved_if(ctx, need_A, need_x, True)
        except RuntimeError:  # freed, if a sibling's backward has come before by itself
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

    backward: dx = g W,  k = g F,  Q = g^T u,  dB += s Q G,  dG = s Q^T B, where dx and k go to the siblings' sums.

    apply(route, u, B, core, F, y, (x, weight, bias), call, shared_input): route stands for x, which comes in a tuple so that
    autograd does not see it. F [l, n, r_in]: the call's bank has it in a forward scope, where its gradient is Q and stands for
    those of B and core; else None. y is left alone, since its maker may need it for its own backward, unless call.owns_y;
    without y the base product is made here.
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
            y, _, F_l = ops.layer_forward(*operands, None, *values, call.scaling, order, False, u=u, F=F_l)
        else:
            if F_l is None:
                with private_write():
                    F_l = ops.fold(values[0], values[1].unsqueeze(0), call.scaling, u.dtype).squeeze(0)
            y = add_expand(y, u, F_l, call.owns_y)
            if call.owns_y:
                ctx.mark_dirty(y)
        ctx.save_for_backward(
            base[1] if need_x else None,  # the weight
            F_l if need_u else None,
            u if need_B or need_core else None,
            B if need_u or need_core else None,
            (core if saved_tensor_hook(False) is None else kept_core(core)) if need_u or need_B else None,
        )
        ctx.call, ctx.input, ctx.F, ctx.factors = call, shared_input, F, (B, core)
        ctx.device = u.device
        if dispatch_modes():
            call.made_of = versions(B, core)
        ctx.summed = u is shared_input.u and route is not None  # for LoTRShrink; else k goes back the way that u came
        ctx.own = weakref.ref(ctx, shared_input.waiting.discard)  # an output that was freed gets no backward
        shared_input.waiting.add(ctx.own)
        return y

    @staticmethod
    def backward(ctx, g):
        call, nothing = ctx.call, (None,) * 3
        total, shrink = ctx.input.sum(ctx.own, ctx.device)
        if g is None:
            return (None,) * 9
        need_x, need_u, need_B, need_core, need_F, need_y = ctx.needs_input_grad[:6]
        try:
            weight, F_l, u, B, core = ctx.saved_tensors
        except RuntimeError:  # freed, or changed: what the wanted gradients are made of must be as it was
            first = int(ctx.summed)  # a route of None has no place among the edges; behind it is LoTRShrink, and x
            need_x = need_x and wants(ctx, 0) and wants(ctx.next_functions[0][0], 0)
            need_u, need_B, need_core = (need and wants(ctx, first + i) for i, need in enumerate((need_u, need_B, need_core)))
            need_F = need_F and (need_B or need_core)
            weight, F_l, u, B, core = saved_if(ctx, need_x, need_u, need_B or need_core, need_u or need_core, need_u or need_B)
        if call.made_of is not None:
            refuse_changed(call.made_of, need_u, need_B, need_core)
        if recorded(g):
            needs = need_x, need_u, need_B, need_core
            return *LoTRExpand._recorded(ctx, g, needs, weight, u, B, None if core is None else ctx.factors[1]), *nothing
        B, core = ctx.factors[0] if B is None else B, ctx.factors[1] if core is None else core
        dy = g if need_y else None
        g = g if g.dtype == call.compute else g.to(call.compute)
        if ctx.F is not None:  # which has them behind it
            need_B = need_core = False
        if need_F:
            call.bank.gradient.came[graph_task()].add(call.l)
        values = (B, core) if B.device == g.device == core.device else here(g.device, B, core)
        need_x = need_x and weight is not None
        k, dx = total.value if ctx.summed and total.value is not None else (None, None)
        last = shrink is not None and ctx.summed and need_x and need_u and wants(ctx, 1)
        x, A, seed, sum_A = (LoTRShrink.rest(shrink) if last else None) or (None,) * 4
        weight = weight if need_x else None
        if call.dtype is not None:
            weight, x = call.cast(weight, x)
        Q = call.bank.gradient.accumulator(ctx.F)[call.l] if need_F else None
        sum_B = call.group.B.accumulator(values[0]) if need_B and call.shares else None
        operands = (g, weight, x, u, A, F_l, *values, call.scaling, call.plan.order, False)
        sums = {"k": k, "dx": dx if need_x else None, "Q": Q, "dA": sum_A, "dB": sum_B}
        new_dx, new_k, _, dB, dcore = ops.layer_backward(
            *operands, **sums, need_B=need_B, need_core=need_core, p=0.0 if A is None else call.p, seed=seed
        )
        if ctx.summed:
            total.value = (None if A is not None else new_k if need_u else k, new_dx if need_x and dx is None else dx)
            new_k = None
        return None, new_k, dB, dcore, None, dy, *nothing

    @staticmethod
    def _recorded(ctx, g, needs, weight, u, B, core) -> tuple[Tensor | None, ...]:
        """Past F, in whose graph are the cores of other layers too."""
        need_x, need_u, need_B, need_core = needs
        dy, g = g if ctx.needs_input_grad[5] else None, to(g, ctx.call.compute)
        dx = g @ to(weight, g.dtype) if need_x and weight is not None else None
        k, dB, dcore = composite.expand_backward(rows(g), u, B, core, ctx.call.scaling, need_u, need_B, need_core)
        home = (None if d is None else d.to(t.device, t.dtype) for d, t in zip((dB, dcore), ctx.factors))
        return dx, k, *home, None, dy


def add_expand(y: Tensor, u: Tensor, F: Tensor, in_place: bool = False) -> Tensor:
    """y [..., n] + u F^T in y's dtype, in memory of its own or in place, where y [m, n] has u's dtype."""
    if in_place:
        with private_write():  # its version moves by mark_dirty
            ops.expand_add_(y, u, F)
        return y
    if y.dtype == u.dtype:
        return ops.expand(y, u, F)
    return y + to(ops.expand(u.new_zeros(y.shape), u, F), y.dtype)
