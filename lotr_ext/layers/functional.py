"""lotr_linear, the functional form of an adapted layer, and explain, which reports what a layer would run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd.call import Call, call_linear, compute_dtype, plan_call
from ..autograd.magnitude import Norms, scaled_linear
from ..autograd.tensor_parallel import cut_of, is_dtensor, local_operands
from ..ops import cuda_plans, planner
from ..ops.planner import Plan
from .checks import check_beside, check_index, check_number, check_probability, check_tensor
from .experts import LoTRExperts
from .factors import LoTRFactors
from .layer import LoTRLayer
from .mixture import call_mixed
from .wrapped import LoTRWrapped


def lotr_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    strategy: str | None = None,
    core_index: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling ((drop(x) A) core) B^T  (arXiv 2402.01376).

    x [..., k], weight [n, k], bias [n] or None, A [k, r_in], B [n, r_out], core [r_in, r_out] -> [..., n] in x's dtype
    (autocast's under autocast). x, weight and bias share a dtype, the adapter may be float32 beside a half-precision x.
    Differentiable in x, A, B and core, and in weight and bias if they require grad (library products).
    dropout_p in [0, 1): dropout of the adapter's x when training. strategy forces one of
    `planner.STRATEGIES`. core_index (int64) picks from core [t, r_in, r_out] for each row of x, [b] of x [b, ..., k], or for
    each token, [b, tokens] of x [b, tokens, ..., k]; -1: y is x W^T + bias there. One batch serves several tasks, with one
    product with A and one with B for the whole batch. On a GPU its values are not checked, as in `ops.row_core`.
    magnitude [n]: m of y = bias + (m / c) (x W^T + scaling ((drop(x) A) core) B^T), c_n = |W_n + scaling B_n core^T A^T| (DoRA,
    arXiv 2402.09353); differentiable, with c constant. Each call computes c with one product W A, which LoTRLinear caches. Not
    with core_index.
    Raises TypeError or ValueError with the argument's name, what was expected and what was given, before anything runs.
    """
    check_tensor("weight", weight, "out_features", "in_features")
    n, k = weight.shape
    _check_input(x, k)
    if bias is not None:
        check_tensor("bias", bias, n)
    check_tensor("A", A, k, "r_in")
    check_tensor("B", B, n, "r_out")
    if core_index is None:
        check_tensor("core", core, A.shape[1], B.shape[1])
    else:
        _check_cores(x, core, core_index, (A.shape[1], B.shape[1]))
    adapter = {"A": A, "B": B, "core": core}
    if magnitude is not None:
        check_tensor("magnitude", magnitude, n)
        adapter["magnitude"] = magnitude
        if core_index is not None:
            raise ValueError("magnitude: expected None with core_index, because each core has its own lengths c, got a tensor")
    check_beside(x, {"weight": weight, "bias": bias}, adapter)
    check_number("scaling", scaling)
    check_probability("dropout_p", dropout_p)
    p = dropout_p if training else 0.0
    if core_index is not None:
        call = Call(core[0], float(scaling), p, strategy=strategy)
        return call_mixed(x, (weight, bias), A, B, core, core_index, call)
    call = Call(core, float(scaling), p, strategy=strategy)
    if magnitude is not None:
        made = Norms().rows(magnitude, weight, lambda: weight, A, B, core, call.scaling)
        return scaled_linear(x, weight, bias, A, B, call, made)
    return call_linear(x, weight, bias, A, B, call)


def _check_input(x: object, k: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: expected a last dimension of in_features = {k}, got shape {tuple(x.shape)}")


def _check_cores(x: Tensor, core: object, core_index: object, ranks: tuple[int, int]) -> None:
    if not isinstance(core, Tensor) or core.dim() != 3 or tuple(core.shape[1:]) != ranks or core.shape[0] < 1:
        got = tuple(core.shape) if isinstance(core, Tensor) else type(core).__name__
        raise ValueError(f"core: expected shape (t, {ranks[0]}, {ranks[1]}) with core_index, got {got}")
    check_index("core_index", core_index, len(core))
    if core_index.dim() not in (1, 2) or core_index.dim() >= x.dim() or core_index.shape != x.shape[: core_index.dim()]:
        raise ValueError(
            f"core_index: expected one index per row or per token of x {tuple(x.shape)}, got shape {tuple(core_index.shape)}"
        )


def explain(layer: LoTRLayer, x: Tensor, *, device: torch.device | str | None = None, plans: bool | str = False) -> Plan:
    """Which path layer(x) takes and why, decided by the same code as a call; nothing is computed. x [..., in_features].

    device: the device to assume for layer and x, such as "cuda". plans: also how the CUDA kernels of a step divide their
    matrices into blocks, one line each; True: on this machine's GPU, without one on an H100; or "h100", "a100", "b200".
    Raises TypeError for another layer; ValueError for another shape, and for plans without CUDA kernels in this build or on
    another device.
    """
    if not isinstance(layer, LoTRLayer):
        raise TypeError(f"layer: expected an adapted layer (LoTRLinear, ...), got {type(layer).__name__}")
    if x.shape[-1:] != (layer.in_features,):
        raise ValueError(f"x: expected a last dimension of in_features = {layer.in_features}, got shape {tuple(x.shape)}")
    if layer.merged:
        return Plan("base", "the adapter is merged into the weight")
    if layer.disabled and layer.start_core is None:
        return Plan("base", "the adapter is disabled")
    p = layer.dropout if layer.training else 0.0
    call = Call(layer.core, layer.scaling, p, layer.factors._group, strategy=layer.strategy)
    other = isinstance(layer, LoTRWrapped | LoTRExperts) or layer.mixture is not None
    base = None if other else (layer.weight, layer.bias)
    plan = explain_call(x, layer.factors, call, base, device)
    if layer.norms is not None:
        plan = plan._replace(why=f"{plan.why}; LoTRMagnitude scales the rows by m / c")
    return _with_launches(plan, layer, x, call, device, plans) if plans else plan


def _with_launches(
    plan: Plan, layer: LoTRLayer, x: Tensor, call: Call, device: torch.device | str | None, plans: bool | str
) -> Plan:
    """plan with the plans of its CUDA kernels."""
    if (missing := cuda_plans.obstacle()) is not None:
        raise ValueError(f"plans: expected a build with CUDA kernels, got one without ({missing}). Leave plans out.")
    where = x.device if device is None else torch.device(device)
    if where.type != "cuda":
        raise ValueError(f"plans: expected a GPU, got device {where}. Pass device='cuda'; no GPU is needed.")
    here = where if torch.cuda.is_available() and not isinstance(plans, str) else None
    tokens, graph = x.numel() // x.shape[-1], torch.is_grad_enabled()
    assumed = plan
    if not plan.nodes:  # without a GPU: the choice of the heuristic
        assumed = Plan.of("beta" if tokens >= planner.BETA_TOKENS else "two_pass", "")
        assumed = assumed._replace(unfolded=planner.is_unfolded(tokens, call.compute, where, graph))
    sizes = (tokens, layer.in_features, layer.out_features, *layer.core.shape[-2:])
    launches = cuda_plans.launches(assumed, *sizes, graph, _cores_of_rows(layer, x), layer.norms is not None)
    card = plans if isinstance(plans, str) else "h100"
    return plan._replace(launches=tuple(cuda_plans.described(one, call.compute, here, card) for one in launches))


def _cores_of_rows(layer: LoTRLayer, x: Tensor) -> int:
    """Among how many cores each row of x has its own; 0 if all rows have the layer's one."""
    experts, mixture = len(layer.core) if layer.core.dim() == 3 else 1, layer.mixture
    if mixture is None:
        return experts if layer.core.dim() == 3 else 0
    if callable(mixture.cores):  # one for each row of the batch
        return experts * len(x if mixture.index is None else mixture.index)
    return experts * len(mixture.cores)


def explain_call(
    x: Tensor,
    factors: LoTRFactors,
    call: Call,
    base: tuple[Tensor, Tensor | None] | None,
    device: torch.device | str | None,
) -> Plan:
    """The Plan of one adapter's call on x. base: weight and bias if we compute the base product, None for another base."""
    trained = torch.is_grad_enabled() and base is not None and any(p.requires_grad for p in base if p is not None)
    weight = None if base is None or trained else base[0]
    where = None if device is None else torch.device(device)
    call.compute = compute_dtype(x) or x.dtype
    found: list[Plan] = []

    def look(A: Tensor, B: Tensor) -> Tensor:
        local, why = (x, A, weight), ""
        if is_dtensor(weight) and not is_dtensor(A) and (cut := cut_of(weight)) is not None:
            local = local_operands(cut, x, A, B, weight, call)
            why = f"; on local tensors, of W {tuple(weight.shape)} here {tuple(local[2].shape)}"
        plan = plan_call(local[0], local[1], call, local[2], where, "explain")
        plan = plan._replace(why=plan.why + why)
        found.append(plan if plan.nodes else plan._replace(strategy="composite"))
        return x

    factors(look)
    return found[0]
