"""Running a call by two nodes: LoTRShrink once for all siblings on an x, LoTRExpand for each layer."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, is_grad_enabled

from .. import ops
from ..compat import saved_tensor_hook
from ..ops.composite import here, rows, to
from .bank import open_scope
from .functions import LoTRExpand, LoTRShrink, add_expand
from .record import Call
from .shared_input import SharedInput, keeps_all_by_itself


def shared_u(x: Tensor, A: Tensor, B: Tensor, call: Call) -> SharedInput:
    """u and route for a call: a sibling's where one has been here with this very x, else new."""
    # what hooks pack, autograd does not watch: then dB and dG are made of what each node has saved
    watched = saved_tensor_hook(False) is None or keeps_all_by_itself()
    scope = open_scope() if call.group is not None and watched else None
    call.bank = None if scope is None else scope.bank(call.group.B, B, call.compute)
    group, graph = call.group, is_grad_enabled()
    how = (call.compute, call.dtype, call.p)
    found = SharedInput(x, A, None, None) if group is None else group.A.find(x, A, call.owner, how)
    if found.u is not None:
        if call.shares:
            group.A.view(A, call.owner)  # that the owner has been here, as a new round begins when it comes again
        return found
    seed = found.drawn(x.device) if call.p else None
    values = A if call.bank is None or A.dtype == call.compute else scope.cast(group.A, A, call.compute)
    if graph and (A.requires_grad or x.requires_grad):
        view = group.A.view(A, call.owner) if call.shares else A
        values = view if values is A else values
        found.u, found.route = LoTRShrink.run(x, view, call, weakref.ref(found), values, seed)
    else:
        with torch.no_grad():
            found.u = ops.shrink(rows(to(x, call.compute)), *here(x.device, values), p=call.p, seed=seed)
    if group is not None:
        group.A.offer(found)
    return found


def expand(found: SharedInput, y: Tensor | None, base: tuple, B: Tensor, call: Call, in_graph: bool) -> Tensor:
    """y = x W^T + bias + u F^T, or onto a given y."""
    bank, F, core, u = call.bank, None, call.core, found.u
    if bank is not None and bank.F is not None:
        call.l = bank.serves(call, B)
        trained = in_graph and (B.requires_grad or core.requires_grad)
        if call.l is not None and (bank.F.requires_grad or not trained):
            F = bank.F if trained or not bank.F.requires_grad else bank.F.detach()  # another layer's core may be trained alone
    if in_graph:
        view = B if F is not None or not call.shares else call.group.B.view(B, call.owner)
        return LoTRExpand.run(found.route, u, view, core, F, y, base, call, found)
    F_l = None if F is None else F[call.l]
    values = here(u.device, B, core)
    if y is None:
        operands = call.cast(*base)
        return ops.layer_forward(*operands, None, *values, call.scaling, call.plan.order, False, u=u, F=F_l)[0]
    if F_l is None:
        F_l = ops.fold(values[0], values[1].unsqueeze(0), call.scaling, u.dtype).squeeze(0)
    return add_expand(y, u, F_l)


def expand_rows(found: SharedInput, y: Tensor, h: Tensor, B: Tensor, call: Call) -> Tensor:
    """y + h B^T for an h [rows, r_out] that was made of u: an expand whose core is the identity."""
    if not (is_grad_enabled() and any(t.requires_grad for t in (y, h, B))):
        return add_expand(y, h, *here(h.device, B), call.owns_y)
    call = call.with_core(torch.eye(h.shape[1], dtype=B.dtype, device=B.device), 1.0)
    view = call.group.B.view(B, call.owner) if call.shares else B
    return LoTRExpand.run(None, h, view, call.core, None, y, (None, None, None), call, found)
