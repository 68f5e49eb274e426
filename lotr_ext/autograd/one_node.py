"""LoTRFunction: an adapted layer as one autograd node (`Plan.nodes` 1). Equations: `reference.py`; choice of nodes: `call.py`.

It runs one operator per direction. A factor's gradient is added to its `SharedGradient` if another layer has the factor,
else it is returned to autograd. A backward that is itself recorded (create_graph=True) or batched runs torch's own products
instead, and returns all gradients to autograd. So do the nodes of `two_nodes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, is_grad_enabled

from .. import ops
from ..compat import (
    Node,
    dispatch_modes,
    functorch_active,
    is_compiling,
    kept,
    recorded,
    saved_if,
    saved_or_changed,
    saved_tensor_hook,
    wants,
)
from ..ops import composite
from ..ops.composite import here, rows, to
from .sharing import Call


class LoTRFunction(Node):
    """y = x W^T + bias + s ((x A) G) B^T as one node.

    apply(x [..., k], weight [n, k], bias [n] or None, A [k, r_in], B [n, r_out], core [r_in, r_out], scaling) -> [..., n].
    Differentiable, also twice, in all six tensors. Layers pass their `Call` as scaling: it has the scaling, the dtype,
    the plan, and the sums of A's and B's gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, core, call: Call | float):
        need_x, need_weight, _, need_A, need_B, need_core, _ = ctx.needs_input_grad
        if not isinstance(call, Call):
            call = Call.of_function(x, core, call, any(ctx.needs_input_grad))
        x_, weight_, bias_, A_, B_, core_, plan = x, weight, bias, A, B, core, call.plan
        if call.dtype is not None:
            x_, weight_, bias_ = call.cast(x, weight, bias)
        # on the CPU: three device objects less, 0.1 us
        call.apart = not ((x.is_cpu and A.is_cpu and core.is_cpu) or A.device == x.device == core.device)
        if call.apart:
            A_, B_, core_ = here(x.device, A, B, core)
        factors = (A_, B_, core_, call.scaling)
        y, u, F = ops.layer_forward(x_, weight_, bias_, *factors, plan.order, plan.unfolded, scale=call.scale)
        ctx.save_for_backward(
            x if need_x or need_weight or need_A else None,  # with x: for kept_u, which layers with a frozen A avoid
            weight if need_x else None,
            A if need_x else None,
            B if need_x or need_A or need_core else None,
            (core if saved_tensor_hook(False) is None else kept(core)) if need_x or need_A or need_B else None,
            u if need_B or need_core else None,
            F if need_x or need_A else None,
        )
        # A, B and core are kept here too: a gradient that does not need their saved copy must not raise when they were changed
        # in place, and a checkpoint's forward saves no tensor, but its next layers must find the same A and B
        ctx.call, call.factors = call, (A, B, core)
        if dispatch_modes():
            call.note_versions(B=B, core=core)
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
        if call.read is not None:
            call.refuse_changed(B=need_x or need_A or need_core, core=need_x or need_A or need_B)
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
        """The gradients that the running backward needs, and the saved tensors that they depend on: the others may have
        changed."""
        end = len(ctx.next_functions)  # a bias of None is not among them
        wanted = [need and wants(ctx, i if i < 3 else end - 6 + i) for i, need in enumerate(ctx.needs_input_grad[:6])]
        x, weight, _, A, B, core = wanted
        return wanted, saved_if(ctx, weight or A, x, x, x or A or core, x or A or B, B or core, x or A)

    @staticmethod
    def _recorded(ctx, g) -> tuple[Tensor | None, ...]:
        compiled = is_compiling()
        wanted, saved = (ctx.needs_input_grad[:6], ctx.saved_tensors) if compiled else LoTRFunction._read(ctx)
        want_x, want_weight, want_bias, want_A, want_B, want_core = wanted
        if ctx.call.read is not None:
            ctx.call.refuse_changed(B=want_x or want_A or want_core, core=want_x or want_A or want_B)
        x, weight, A, B, core, u, _ = saved
        core = None if core is None else ctx.call.factors[2]  # hooks get a copy, which has no graph
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
    """u = x A with the value that a LoTRFunction saved, as a differentiable function of x and A: dB and dG depend on it, so a
    double backward needs its gradient.

    x and A: as unpacked from node, None if not unpacked yet; a checkpoint allows only one unpacking of a tensor. If x
    or A was changed in place since the forward, a gradient that reaches u raises, as in torch's products.
    """
    of_x = of_A = None
    if x is None:
        x, of_x = saved_or_changed(node, 0)
    if A is None:
        A, of_A = saved_or_changed(node, 2) if node.needs_input_grad[0] else (node.call.factors[0], None)
    error = of_x or of_A
    made = rows(to(x, u.dtype)) @ to(A, u.dtype).to(u.device)
    if error is None:
        return made + (u - made).detach()  # u's saved value: A may have changed if only x was read
    if functorch_active():
        raise error

    def refuse(_: Tensor) -> None:
        raise error

    made.register_hook(refuse)
    return torch.where(torch.zeros((), dtype=torch.bool, device=u.device), made, u.detach())
