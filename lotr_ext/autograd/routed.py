"""One call of an adapted mixture's matrices: y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((drop(x) A)_t(i) G_c(i)) B^T.

    x [m, k], A --> LoTRShrink: u, once a token --> row_core: a row's own core --> h --+
    x [m, k]    --> the rows of each expert     --> grouped_mm: the frozen product y --+--> LoTRExpand: y + h B^T

The frozen product reads x as LoTRShrink hands it on, so that its gradient of x comes to LoTRShrink, which adds k A^T to it in
place. LoTRExpand adds to y in place too, since no other code has a reference to it.
A and B are dense products for all experts, by the nodes of any other call, so that siblings share u and the factors have their
shared gradients; only the small product with a row's core knows of experts.
"""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..compat import any_autocast, dispatch_modes
from ..ops.composite import to
from ..ops.grouped import grouped_linear
from .call import compute_dtype, dropped_input, explicitly_cast, plan_call, plus_unfolded, row_cores
from .record import Call
from .siblings import expand_rows, shared_u


def call_routed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offs: Tensor,
    tokens: Tensor | None,
    y: Tensor | None,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    index: Tensor | None,
    call: Call,
) -> Tensor:
    """x [m, k], weight [e, n, k], bias [e, n], offs [e], tokens [rows], cores [e, r_in, r_out] -> [rows, n]. weight and bias
    may be trained: autograd differentiates their product by itself. y [rows, n]: what to add the adapter to, if not that.
    index [rows]: which of cores [c, r_in, r_out] a row takes, -1 for none, where that is not its expert's."""
    if call.dtype is None:
        if any_autocast() and compute_dtype(x) is not None:
            return explicitly_cast(call_routed, x, weight, bias, offs, tokens, y, A, B, cores, index, call)
        call.compute = x.dtype
        if x.dtype != weight.dtype:
            raise TypeError(f"x: expected dtype {weight.dtype}, as the weight has, got {x.dtype}")
    call.plan, compute = plan_call(x, A, call, None), call.compute
    cores = row_cores(cores, x, compute)
    if call.plan.nodes == 0:
        u = to(dropped_input(x, A, call), compute) @ to(A, compute).to(x.device)
    else:
        found = shared_u(x, A, B, call)
        u = found.u
        if found.route is not None and found.route.dtype == x.dtype:
            x = found.route
    last = call.plan.nodes == 0  # the scaling, as in `plus_unfolded`
    which = {"offs": offs} if index is None else {"index": index}
    # first: it looks at offs and tokens
    h = ops.row_core(u, cores, **which, tokens=tokens, scaling=1.0 if last else call.scaling)
    if y is None:
        y = grouped_linear(x if tokens is None else x[tokens], weight, offs, bias, call.dtype)
        # what selective checkpointing keeps may not change
        call.owns_y = not last and y.dtype == u.dtype and not dispatch_modes()
    if last:
        return plus_unfolded(y, h, B, call.scaling)
    return expand_rows(found, y, h, B, call)
