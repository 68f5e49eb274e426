"""Plans (`plan_call`) and runs one call of one adapted layer.

call_linear   over a frozen weight and bias: y = x W^T + bias + s ((drop(x) A) G) B^T
call_packed   over a frozen quantised weight that is dequantised for each product
add_adapter   adds to the y of any other base
add_rows      adds to y, with a core for each row of the batch (`mixed`); linear_rows: the same with the base product
call_routed   the matrices of a mixture's experts
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, get_num_threads, is_grad_enabled, nn
from torch.nn import functional as nnf

from .. import ops
from ..compat import any_autocast, dispatch_modes, is_compiling, jit_tracing, private_write, transformed
from ..ops import composite, planner, tuned
from ..ops.composite import base_linear, here, rows, to
from ..ops.grouped import Packed, grouped_linear
from ..ops.planner import Plan
from . import traced
from .one_node import LoTRFunction
from .row_nodes import expand_rows
from .sharing import Call, SharedInput
from .tensor_parallel import call_cut, is_dtensor
from .two_nodes import expand, shared_u

FUSED = planner.ORDERS["fused"]
_CPU = torch.device("cpu")  # one object: saves 0.1 us in the look-up of a plan
_PLAIN = (Tensor, nn.Parameter)
_WEIGHTS = (nn.Parameter, Tensor, type(None))
_INTEGERS_AND_COMPLEX = (t for t in vars(torch).values() if isinstance(t, torch.dtype) and not t.is_floating_point)
_NOT_CAST = frozenset((torch.float64, *_INTEGERS_AND_COMPLEX))  # by autocast


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """autocast's dtype for x; None if it does not apply."""
    if not any_autocast():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype not in _NOT_CAST else None


# ---- planning --------------------------------------------------------------------------------------------------------


def plan_call(
    x: Tensor, A: Tensor, call: Call, weight: Tensor | None, device: torch.device | None = None, purpose: str = "run"
) -> Plan:
    """The plan of a call. A real call and `explain` both use this function, so they agree.

    weight: of a frozen product x W^T that the nodes compute, None for another base. device: assumed for x. purpose:
    "run", "explain" (times nothing) or "tune" (ignores measured choices).
    """
    if (torch.compiler.is_compiling() and is_compiling()) or jit_tracing() is not None:
        return traced.plan(x, A, weight)  # before any read of sizes, which would become guards
    if transformed():
        why = "under a functorch transform or forward AD: the composite is differentiable by any of them"
    elif type(x) not in _PLAIN or type(A) not in _PLAIN or type(weight) not in _WEIGHTS:
        names = {"x": x, "A": A, "weight": weight}
        others = (f"{name} is a {type(t).__name__}" for name, t in names.items() if type(t) not in _WEIGHTS)
        why = f"{', '.join(others)}: only plain tensors go to kernels"
    elif x.layout is not torch.strided:
        why = f"x has layout {x.layout}: only strided tensors go to kernels"
    else:
        why = None
    shape, core = x.shape, call.core.shape
    elements, r_in, r_out = 0 if x.is_nested else shape.numel(), core[-2], core[-1]
    tokens = elements // shape[-1]
    # with a frozen A, one node would keep x for a double backward
    one = weight is not None and not call.p and (A.requires_grad or not x.requires_grad)
    graph, where = is_grad_enabled(), device or (_CPU if x.is_cpu else x.device)
    plan = _plan(
        tokens >= planner.BETA_TOKENS,
        tokens < planner.FEW_TOKENS,
        one,
        not call.shares,
        elements * (r_in + planner.READING) < planner.LITTLE_WORK,
        graph,
        r_in if r_in > r_out else r_out,
        A.dtype,
        call.compute,
        where,
        why,
        call.strategy,
        planner.LOTR_STRATEGY,
    )
    if tuned.on and purpose != "tune" and plan.nodes and weight is not None:
        if call.strategy is None and not planner.LOTR_STRATEGY:
            setting = get_num_threads() if where.type == "cpu" else tuned.float32_setting(call.compute)
            key = (plan, tokens, shape[-1], weight.shape[0], r_in, r_out, A.dtype, call.compute, where, graph, setting)
            found = tuned.plans.get(key)  # runs no Python code, with or without an answer
            plan = found or tuned.apply(plan, problem_of(plan, x, A, call, weight, device), purpose == "run", key)
    return plan if plan.order != FUSED else _fused(plan, tokens, x, call, weight, one)


def _forced(call: Call) -> tuple[str | None, str]:
    """(the forced strategy, or None; what forces it)"""
    return planner.forced_strategy(call.strategy, planner.LOTR_STRATEGY)


def _fused(plan: Plan, tokens: int, x: Tensor, call: Call, weight: Tensor | None, one: bool) -> Plan:
    """The plan of a call with strategy fused: one node, because the launch computes u. Strategy beta if fused cannot run."""
    if not plan.nodes:
        return plan
    if plan.unfolded:
        why = "the unfolded form has no F to go into the base product"
    elif tokens < planner.FEW_TOKENS:
        why = "few tokens"
    elif weight is None:
        why = "the base is not a plain frozen product"
    elif call.p:
        why = "dropout"
    elif call.scale is not None:
        why = "magnitudes"
    elif not one:
        why = "A is frozen and x needs a gradient: u and x would both be saved"
    else:
        why = planner.fused_refusal(x, weight, call.core.shape[0], call.compute) if x.is_cuda else None
        if why is None:
            return plan._replace(nodes=1, why="u = x A is made inside the base product, for each layer by itself")
        forced, by = _forced(call)
        if forced is not None:
            raise ValueError(f"{by}: expected a strategy that runs here, got 'fused': {why}")
    return plan.taking("beta", f"instead of fused, {plan.reason}: {why}")


def problem_of(
    plan: Plan, x: Tensor, A: Tensor, call: Call, weight: Tensor, device: torch.device | None = None
) -> tuned.Problem:
    """The key, among the tuner's answers, of a call that runs plan."""
    form = "unfolded" if plan.unfolded else "alone" if plan.nodes == 1 else "siblings"
    sizes = (tuned.rounded(x.numel() // x.shape[-1]), x.shape[-1], weight.shape[0], *call.core.shape[-2:])
    return tuned.Problem(device or x.device, call.compute, A.dtype, *sizes, form, is_grad_enabled(), plan.strategy)


@functools.lru_cache(maxsize=1024)  # every call needs one of these few answers
def _plan(
    many: bool,
    few: bool,
    one: bool,
    alone: bool,
    little: bool,
    graph: bool,
    rank: int,
    A_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    why: str | None,
    strategy: str | None,
    environment: str | None,
) -> Plan:
    if device.type == "cuda":
        tuned.read_once()  # measured plans of the kernels
    plan = planner.plan_of(many, rank, dtype, device, strategy, environment)
    if why is not None or plan.strategy == "composite":
        return plan._replace(why=why or plan.reason)
    if A_dtype != dtype and (A_dtype != torch.float32 or dtype not in planner.HALVES):
        names = (str(t).removeprefix("torch.") for t in (A_dtype, dtype))
        return plan._replace(why="factors in {} beside x in {}: kernels take x's dtype, or float32 beside half".format(*names))
    if dtype == torch.float16:
        if one:
            return plan._replace(nodes=1, why="float16: unfolded, because s B G^T could overflow", unfolded=True)
        return plan._replace(why="float16, where one node cannot be used: unfolded, because s B G^T could overflow")
    if one and few and planner.is_unfolded(0, dtype, device, graph):
        return plan._replace(nodes=1, why="few tokens: the unfolded form as one node costs least", unfolded=True)
    if one and alone:
        return plan._replace(nodes=1, why="no other layer has these factors: nothing to share")
    if one and little and device.type == "cpu":
        return plan._replace(nodes=1, why="little work on x: sharing u would save less than the host overhead of a second node")
    return plan._replace(nodes=2, why="siblings on the same x share one u = x A")


# ---- running ---------------------------------------------------------------------------------------------------------


def call_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, call: Call) -> Tensor:
    """y = x W^T + bias + s ((drop(x) A) G) B^T. If weight or bias is trained, autograd differentiates the base product."""
    if call.dtype is None:
        if any_autocast() and compute_dtype(x) is not None:
            return explicitly_cast(call_linear, x, weight, bias, A, B, call)
        call.compute = dtype = x.dtype
        if dtype != weight.dtype and type(weight) in _PLAIN:
            raise TypeError(f"x: expected dtype {weight.dtype}, as the weight has, got {dtype}")
    if x.is_meta != weight.is_meta:
        raise ValueError(f"x: expected a tensor on {weight.device}, as the weight is, got one on {x.device}")
    grad = is_grad_enabled()
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return add_adapter(x, base_linear(x, weight, bias, call.dtype), A, B, call)
    plan = call.plan = plan_call(x, A, call, weight)
    nodes = plan.nodes
    if nodes == 0:
        if is_dtensor(weight) and not is_dtensor(A):
            return call_cut(call_linear, add_adapter, x, weight, bias, A, B, call)
        if plan is traced.PLAN:
            return traced.adapted(x, None, weight, bias, A, B, call)
        return _composite(x, base_linear(x, weight, bias, call.dtype), A, B, call)
    in_graph = grad and (x.requires_grad or A.requires_grad or B.requires_grad or call.core.requires_grad)
    if nodes == 2:
        found = shared_u(x, A, B, call)
        return expand(found, None, (x, weight, bias), B, call, in_graph)
    if in_graph:
        if call.shares:
            A, B = call.group.A.view(A, call.owner), call.group.B.view(B, call.owner)
        return LoTRFunction.run(x, weight, bias, A, B, call.core, call)
    factors, operands = here(x.device, A, B, call.core), call.cast(x, weight, bias)
    return ops.layer_forward(*operands, *factors, call.scaling, plan.order, plan.unfolded, scale=call.scale)[0]


def call_packed(
    x: Tensor,
    dense: Callable[[], Tensor],
    bias: Tensor | None,
    base: Callable[[Tensor], Tensor],
    A: Tensor,
    B: Tensor,
    call: Call,
) -> Tensor:
    """`call_linear` over the frozen weight that dense() returns in x's dtype, in the forward and again in the backward; not
    kept in between. Without kernels, the adapter is added to base(x)."""
    call.compute = x.dtype
    call.plan = plan_call(x, A, call, None)
    if call.plan.nodes == 0:
        return add_adapter(x, base(x), A, B, call)
    call.dense = dense
    in_graph = is_grad_enabled() and any(t.requires_grad for t in (x, A, B, call.core))
    return expand(shared_u(x, A, B, call), None, (x, dense(), bias), B, call, in_graph)


def explicitly_cast(run: Callable[..., Tensor], x: Tensor, *rest) -> Tensor:
    """Runs run(x, .., call) with autocast off and its dtype in the call, which casts explicitly."""
    rest[-1].dtype = rest[-1].compute = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return run(x, *rest)


def _check_base(y: object, B: Tensor) -> None:
    """Of what an adapted layer's own forward has returned."""
    if not isinstance(y, Tensor) or (not y.is_nested and y.shape[-1] != B.shape[0]):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"the adapted layer: expected it to return a tensor [..., {B.shape[0]}], got {got}; do not adapt it")


def add_adapter(x: Tensor, y: Tensor, A: Tensor, B: Tensor, call: Call) -> Tensor:
    """y + s ((drop(x) A) G) B^T."""
    if call.dtype is None:
        _check_base(y, B)
        if compute_dtype(x) is not None:
            return explicitly_cast(add_adapter, x, y, A, B, call)
        call.compute = x.dtype
    call.plan = plan_call(x, A, call, None)
    if call.plan.nodes == 0:
        if call.plan is traced.PLAN:
            return traced.adapted(x, y, None, None, A, B, call)
        return _composite(x, y, A, B, call)
    found = shared_u(x, A, B, call)
    in_graph = is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B, call.core))
    return expand(found, y, (None, None, None), B, call, in_graph)


def add_rows(x: Tensor, y: Tensor, A: Tensor, B: Tensor, cores: Tensor, index: Tensor, call: Call) -> Tensor:
    """y + s ((drop(x) A) cores[index[i]]) B^T for row i of x [b, ..., k], one core for all its tokens; -1: none. index [b],
    or of more of x's leading dimensions."""
    if call.dtype is None:
        _check_base(y, B)
        if compute_dtype(x) is not None:
            return explicitly_cast(add_rows, x, y, A, B, cores, index, call)
        call.compute = x.dtype
    call.plan, compute = plan_call(x, A, call, None), call.compute
    if call.plan.nodes == 0:
        u, index = to(dropped_input(x, A, call), compute) @ to(A, compute).to(x.device), _index_of_tokens(x, index)
        return plus_unfolded(y, ops.row_core(rows(u), row_cores(cores, x, compute), index=index), B, call.scaling)
    return expand_rows(*_through_cores(x, A, B, cores, index, call), y, (None, None, None), B, call)


def linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, cores: Tensor, index: Tensor, call: Call
) -> Tensor:
    """x W^T + bias + s ((drop(x) A) cores[index[i]]) B^T, as `add_rows`. If weight or bias is trained, autograd differentiates
    the base product."""
    if call.dtype is None:
        if compute_dtype(x) is not None:
            return explicitly_cast(linear_rows, x, weight, bias, A, B, cores, index, call)
        call.compute = x.dtype
    call.plan = plan_call(x, A, call, None)
    trained = is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    own = type(weight) in _PLAIN and type(bias) in _WEIGHTS and weight.dtype == x.dtype == call.compute
    if call.plan.nodes == 0 or trained or not (own or call.dtype is not None):
        return add_rows(x, base_linear(x, weight, bias, call.dtype), A, B, cores, index, call)
    return expand_rows(*_through_cores(x, A, B, cores, index, call), None, (x, weight, bias), B, call)


def _through_cores(x: Tensor, A: Tensor, B: Tensor, cores: Tensor, index: Tensor, call: Call) -> tuple[SharedInput, Tensor]:
    """(the SharedInput of x, s u_i cores[index[i]])"""
    found = shared_u(x, A, B, call)
    index, cores = _index_of_tokens(x, index), row_cores(cores, x, call.compute)
    graph = is_compiling() or (is_grad_enabled() and (found.u.requires_grad or cores.requires_grad))
    with nullcontext() if graph else private_write():  # bypasses the operator's autograd formula, which is Python
        return found, ops.row_core(found.u, cores, index=index, scaling=call.scaling)


def _index_of_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The index [m] of all tokens, from an index of x's rows or of more of its leading dimensions."""
    index = index.to(x.device)
    if index.dim() == 1 and x.shape[1:-1].numel() == 1:  # one token per row, as when a model generates
        return index
    if index.dim() < x.dim() - 1:
        index = index.view(*index.shape, *(1 for _ in range(x.dim() - 1 - index.dim()))).expand(x.shape[:-1])
    return index.reshape(-1)


def call_routed(
    x: Tensor,
    weight: Tensor | Packed,
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
    """y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((drop(x) A)_t(i) G_c(i)) B^T for the rows i of a mixture's experts c(i).

        x [m, k], A --> LoTRShrink: u, per token    --> row_core: each row's core    --> h --+
        x [m, k]    --> the rows of each expert     --> grouped_mm: the frozen product y --+--> LoTRExpandRows: y + h B^T

    x [m, k], weight [e, n, k], bias [e, n], offs [e], tokens [rows], cores [e, r_in, r_out] -> [rows, n]. weight and bias may
    be trained: autograd differentiates their product. y [rows, n]: the adapter is added to it instead of that product.
    index [rows]: which of cores [c, r_in, r_out] a row uses, -1 for none; None: its expert's.

    The frozen product reads x as LoTRShrink's route, so that its gradient of x arrives at LoTRShrink, which adds k A^T to it in
    place. The products with A and B are the same as in other layers: siblings share u, and factors have their shared gradients.
    """
    if call.dtype is None:
        if any_autocast() and compute_dtype(x) is not None:
            return explicitly_cast(call_routed, x, weight, bias, offs, tokens, y, A, B, cores, index, call)
        call.compute = x.dtype
        if weight.dtype not in (x.dtype, None):
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
    # first: it checks offs and tokens
    h = ops.row_core(u, cores, **which, tokens=tokens, scaling=1.0 if last else call.scaling)
    if y is None:
        y = grouped_linear(x if tokens is None else x[tokens], weight, offs, bias, call.dtype)
        # tensors that selective checkpointing keeps must not change
        call.owns_y = not last and y.dtype == u.dtype and not dispatch_modes()
    if last:
        return plus_unfolded(y, h, B, call.scaling)
    return expand_rows(found, h, y, (None, None, None), B, call)


def plus_unfolded(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y [..., n] + s h B^T. The scaling is applied last: in float16 s h could overflow although the result does not."""
    delta = (h @ to(B, h.dtype).to(h.device).transpose(0, 1)) * scaling
    return y + to(delta.view(y.shape), y.dtype)


def row_cores(cores: Tensor, x: Tensor, compute: torch.dtype) -> Tensor:
    """cores on x's device, in a dtype that row_core accepts: it rounds float32 ones itself, only those of the rows."""
    cores = cores.to(x.device)
    return cores if cores.dtype == torch.float32 and compute in planner.HALVES else to(cores, compute)


def _composite(x: Tensor, y: Tensor, A: Tensor, B: Tensor, call: Call) -> Tensor:
    delta = composite.adapter(dropped_input(x, A, call), A, B, call.core, call.scaling, call.compute)
    return y + to(delta.to(y.device), y.dtype)


def dropped_input(x: Tensor, A: Tensor, call: Call) -> Tensor:
    """drop(x) for the composite. Uses the siblings' mask if a kernel can draw it from their seed, otherwise torch's dropout."""
    if not call.p:
        return x
    eager = not (is_compiling() or jit_tracing() is not None or transformed()) and type(x) in _PLAIN
    if not eager or x.layout is not torch.strided or planner.obstacle_to_kernels(0, x.dtype, x.device) is not None:
        return nnf.dropout(x, call.p)
    group, how = call.group, (call.compute, call.dtype, call.p)
    found = SharedInput(x, A, None, None) if group is None else group.A.find(x, A, call.owner, how)
    keep = ops.dropout_mask(x.numel() // x.shape[-1], x.shape[-1], call.p, found.drawn(x.device), torch.float32) > 0
    if group is not None and found.u is None:
        group.A.offer(found)
    return torch.where(keep.view(x.shape), x * (1 / (1 - call.p)), 0)
