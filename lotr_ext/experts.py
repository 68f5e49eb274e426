"""Experts of a mixture, adapted: lotr_grouped_linear, the functional form, LoTRExperts, the module, and transformers' mixtures.

    y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((x_t(i) A) G_c(i)) B^T      row i is token t(i), routed to expert c(i)

All experts (and any other layer of the same shape) share A and B; each expert has its own core G_c. x A is computed once a
token, before the token is sent to its experts, and the product with B is one dense product for all experts.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .core import dispatch, fallback
from .core.dispatch import Caches
from .core.factor_cache import FactorCache
from .core.nodes import RowChoice
from .core.operators import DTYPES, fake_kernel
from .core.request import ADAPTER_OFF, state_of
from .factors import LoTRFactors, Scaling, factors_for, scaling_of
from .functional import (
    check_beside,
    check_dimension,
    check_dtype,
    check_index,
    check_number,
    check_probability,
    check_tensor,
)
from .layers import LoTRLayer

__all__ = [
    "LoTRExperts",
    "adapt_parameter",
    "expert_sizes",
    "lotr_grouped_linear",
    "release",
    "why_not",
]


# ---- the frozen product, rows sorted by expert -----------------------------------------------------------------------


def _ends(offs: Tensor, rows: int) -> list[int]:
    """offs as numbers. Raises ValueError unless they ascend in [0, rows]."""
    ends = offs.tolist()
    if any(a > b for a, b in pairwise([0, *ends, rows])):
        raise ValueError(f"offs: expected ascending ends in [0, {rows}], got {ends}")
    return ends


def _torch_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own grouped product runs: bfloat16 on a GPU from sm_80 on, with rows or columns aligned to 16 bytes."""
    if (
        not x.is_cuda
        or x.dtype != torch.bfloat16
        or not x.shape[0]
        or torch.cuda.get_device_capability(x.device) < (8, 0)
    ):
        return False
    sizes = x.stride(0), max(weight.stride(1), weight.stride(2))
    return (
        x.stride(1) == 1
        and 1 in (weight.stride(1), weight.stride(2))
        and all(size % 8 == 0 for size in sizes)
    )


@torch.library.custom_op("lotr::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """y_i = x_i W_c(i)^T: x [rows, k], weight [e, n, k] of x's dtype, offs [e] (int32) -> [rows, n]; zero from offs[-1] on.

    One product an expert, except where torch's grouped product runs. An operator, so that a compiled graph contains no loop.
    """
    if _torch_takes(x, weight):
        y = nnf.grouped_mm(x, weight.mT, offs=offs)
        return y.masked_fill_((torch.arange(len(x), device=x.device) >= offs[-1]).unsqueeze(1), 0)
    y, ends = x.new_empty(x.shape[0], weight.shape[1]), _ends(offs, x.shape[0])
    for expert, (start, end) in enumerate(pairwise([0, *ends])):
        if end > start:
            torch.mm(x[start:end], weight[expert].t(), out=y[start:end])
    y[ends[-1] :].zero_()
    return y


@torch.library.custom_op("lotr::grouped_outer", mutates_args=())
def grouped_outer(g: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """dW_c = sum over the rows of c of g_i^T x_i: g [rows, n], x [rows, k], offs [e] -> [e, n, k]."""
    dW = g.new_zeros(offs.shape[0], g.shape[1], x.shape[1])
    for expert, (start, end) in enumerate(pairwise([0, *_ends(offs, g.shape[0])])):
        if end > start:
            torch.mm(g[start:end].t(), x[start:end], out=dW[expert])
    return dW


@fake_kernel("grouped_mm")
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@fake_kernel("grouped_outer")
def _(g: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return g.new_empty(offs.shape[0], g.shape[1], x.shape[1])


def _save(ctx, inputs, output) -> None:
    first, second, offs = inputs
    need_first, need_second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(first if need_second else None, second if need_first else None, offs)


def _grouped_mm_backward(ctx, g: Tensor):
    x, weight, offs = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    g = g.contiguous()  # a sum's gradient is one element, expanded
    return (
        grouped_mm(g, weight.mT, offs) if need_x else None,
        grouped_outer(g, x, offs) if need_weight else None,
        None,
    )


def _grouped_outer_backward(ctx, dW: Tensor):
    g, x, offs = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    return (
        grouped_mm(x, dW, offs) if need_g else None,
        grouped_mm(g, dW.mT, offs) if need_x else None,
        None,
    )


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save)
grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save)


def grouped_linear(
    x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None, tokens: Tensor | None
) -> Tensor:
    """y_i = x_t(i) W_c(i)^T + bias_c(i), zero in rows without an expert."""
    rows = x if tokens is None else x[tokens]
    y = grouped_mm(rows.contiguous(), weight, offs)
    if bias is None:
        return y
    index = fallback.cores_of_groups(offs, len(y), len(bias))
    return y + torch.where((index < 0).unsqueeze(1), 0, bias[index.clamp(min=0)])


# ---- the adapter -----------------------------------------------------------------------------------------------------


def _routed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offs: Tensor,
    tokens: Tensor | None,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    scaling: float,
    p: float = 0.0,
    index: Tensor | None = None,
    caches: Caches | None = None,
    layer: object = None,
) -> Tensor:
    """lotr_grouped_linear without checks. index [rows]: the core of each row among cores [c, r_in, r_out]; None: by offs."""
    if (dtype := dispatch.autocast_dtype(x)) is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        x = x.to(dtype) if caches is None else caches.A.cast(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _routed(
                x, weight, bias, offs, tokens, A, B, cores, scaling, p, index, caches, layer
            )
    y = grouped_linear(x, weight, offs, bias, tokens)
    if (
        torch.compiler.is_compiling()
        or dispatch.fallback_reason(x, None, A, B, cores, y) is not None
    ):
        rows = fallback.cores_of_groups(offs, len(y), len(cores)) if index is None else index
        u = (nnf.dropout(x, p) if p else x) @ A.to(x.device, x.dtype)
        return y + fallback.expand_rows(
            fallback.row_core(u, cores.to(x.device), scaling, rows, tokens), B.to(x.device)
        )
    choice = RowChoice(index, offs if index is None else None, tokens)
    caches = caches or Caches(FactorCache(), FactorCache())
    return dispatch.run_nodes(x, None, None, A, B, cores, scaling, p, y, choice, caches, layer)


def lotr_grouped_linear(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    tokens: Tensor | None = None,
    core_index: Tensor | None = None,
) -> Tensor:
    """y_i = x_t(i) W_c(i)^T + bias_c(i) + scaling ((x_t(i) A) G_c(i)) B^T for rows sorted by expert: [rows, n].

    weight [e, n, k] (any layout, also a transposed view), bias [e, n] or None, A [k, r_in], B [n, r_out], cores [e, r_in,
    r_out]. offs [e] (int32): where each expert's rows end, as for torch.nn.functional.grouped_mm. Rows from offs[-1] on belong
    to no expert and are zero in y. tokens None: x [rows, k] is sorted by expert. tokens [rows] (int64): x [m, k] has one row a
    token, row i is token tokens[i], and x A is computed once a token. core_index (int64), one for each row of x: the task whose
    core for the row's expert is used, from cores [t, e, r_in, r_out]; -1: none.
    x, weight and bias share a dtype (or autocast is on); the adapter may be float32 beside a half-precision x. Differentiable
    in x, A, B and cores, and in weight and bias if they require grad.

    Raises TypeError or ValueError that names the argument. On a GPU the values of offs, tokens and core_index are not checked.
    """
    check_tensor("weight", weight, "e", "n", "k")
    e, n, k = weight.shape
    _check_routing(x, e, k, offs, tokens)
    check_tensor("A", A, k, "r_in")
    check_tensor("B", B, n, "r_out")
    check_tensor("cores", cores, *(() if core_index is None else ("t",)), e, A.shape[1], B.shape[1])
    if bias is not None:
        check_tensor("bias", bias, e, n)
    check_beside(x, {"weight": weight, "bias": bias}, {"A": A, "B": B, "cores": cores})
    check_number("scaling", scaling)
    index = None
    if core_index is not None:
        check_index("core_index", core_index, len(cores))
        if core_index.shape != x.shape[:1]:
            raise ValueError(
                f"core_index: expected one index per row of x {tuple(x.shape)}, got {tuple(core_index.shape)}"
            )
        index, cores = _of_tasks(core_index.to(x.device), cores, offs, tokens)
    x = _without_unread_rows(x, offs, tokens)
    return _routed(x, weight, bias, offs, tokens, A, B, cores, float(scaling), index=index)


def _of_tasks(
    tasks: Tensor, cores: Tensor, offs: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the core of each row, cores [t e, r_in, r_out]) for tasks [m] of the rows of x and cores [t, e, r_in, r_out]."""
    tasks = tasks if tokens is None else tasks[tokens]
    expert = fallback.cores_of_groups(offs, len(tasks), cores.shape[1])
    index = torch.where((tasks < 0) | (expert < 0), -1, tasks * cores.shape[1] + expert)
    return index, cores.flatten(0, 1)


def _check_routing(x: Tensor, experts: int, in_features: int, offs: object, tokens: object) -> None:
    check_tensor("x", x, "rows" if tokens is None else "m", in_features)
    for name, tensor, dtype in (("offs", offs, torch.int32), ("tokens", tokens, torch.int64)):
        if tensor is None and name == "tokens":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")
        if tensor.dim() != 1 or (name == "offs" and tensor.shape[0] != experts):
            want = f"one end per expert, shape ({experts},)" if name == "offs" else "shape [rows]"
            raise ValueError(f"{name}: expected {want}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    if tokens is not None and _has_values(tokens) and tokens.numel():
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= len(x):
            raise ValueError(
                f"tokens: expected rows of x in [0, {len(x)}), got {least} to {most}. "
                f"Pass a valid token also for rows without an expert."
            )


def _has_values(tensor: Tensor) -> bool:
    """Whether reading the tensor's values neither waits for a GPU nor breaks a graph."""
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def _without_unread_rows(x: Tensor, offs: Tensor, tokens: Tensor | None) -> Tensor:
    """Returns x with zeros in the rows that no expert reads, so that whatever they hold does not
    reach dA = x^T du: zero times NaN is NaN.

    Returns x itself if all its rows are read. On a GPU and in a compiled graph this is not known
    without waiting for the values, and the result is a copy.
    """
    if tokens is None:
        is_unread = torch.arange(len(x), device=x.device) >= offs[-1]
    else:
        past_end = torch.arange(len(tokens), device=x.device) >= offs[-1]
        is_unread = torch.ones(len(x) + 1, dtype=torch.bool, device=x.device)
        # One more row takes the rows of no expert.
        is_unread = is_unread.index_fill(0, tokens.masked_fill(past_end, len(x)), False)[:-1]
    if _has_values(is_unread) and not bool(is_unread.any()):
        return x
    return x.masked_fill(is_unread.unsqueeze(1), 0)


class LoTRExperts(LoTRLayer):
    """One matrix of each expert of a mixture, W [e, n, k] frozen, adapted by shared factors and a core an expert.

    forward(x, offs, tokens=None) -> [rows, out_features], as `lotr_grouped_linear`. Arguments as LoTRLinear's. The adapter
    starts at zero, so the module starts as the plain grouped product. factors may be those of other LoTRExperts and of
    LoTRLinear layers of the same (in_features, out_features).

    state_dict: `weight` [e, out_features, in_features], `bias` [e, out_features], `core` [e, r_in, r_out]; and
    `factors.A.value`, `factors.B.value` unless an owner registers the factors.
    """

    num_experts: int

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int | tuple[int, int] | None = None,
        *,
        bias: bool = False,
        factors: LoTRFactors | None = None,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: Scaling = "auto",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_dtype(dtype)
        check_dimension("num_experts", num_experts)
        check_probability("dropout", dropout)
        factors = factors_for(factors, rank, (in_features, out_features), device, dtype)
        s = scaling_of(factors.rank, alpha, rslora, scaling)
        super().__init__()
        weight = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        bound = in_features**-0.5  # as nn.Linear starts
        self.weight = nn.Parameter(weight if weight.is_meta else weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(weight.new_zeros(num_experts, out_features)) if bias else None
        self.num_experts, self.in_features, self.out_features = (
            num_experts,
            in_features,
            out_features,
        )
        self._add_adapter(factors, s, dropout, weight.device, lead=(num_experts,))

    def forward(self, x: Tensor, offs: Tensor, tokens: Tensor | None = None) -> Tensor:
        _check_routing(x, self.num_experts, self.in_features, offs, tokens)
        rows = _without_unread_rows(x, offs, tokens)
        return self.routed(rows, self.matrix(), self.bias, offs, tokens, x)

    def routed(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        offs: Tensor,
        tokens: Tensor | None,
        of_request: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """forward with the owner's weight [e, n, k] and bias [e, n], which are whole during the owner's forward. of_request:
        the input whose rows a request's tasks are for; rows: which of them each row of x is, None for the same."""
        state, cores, index = state_of(self), self.core, None
        if self.merged or state is ADAPTER_OFF:
            return grouped_linear(x, weight, offs, bias, tokens)
        if state is not None:
            cores, tasks = state(of_request)
            index, cores = _of_tasks(tasks if rows is None else tasks[rows], cores, offs, tokens)
        factors, p, s = self.factors, self.dropout if self.training else 0.0, self.scaling
        caches = factors.caches
        return factors.read(
            lambda A, B: _routed(
                x, weight, bias, offs, tokens, A, B, cores, s, p, index, caches, self
            )
        )

    def matrix(self) -> Tensor:
        """W [e, n, k]."""
        return self.weight

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"


# ---- transformers' mixtures ------------------------------------------------------------------------------------------
#
# Their experts classes have the matrices as 3-D parameters, describe the layout (`is_transposed`, `has_bias`, `has_gate`,
# `has_post_expert_norm`), and call the function registered under the name in their configuration. `_experts_forward` is
# registered for all classes. An adapted module gets a copy of the configuration that names it: otherwise another choice for the
# model, or for decoding, would skip the adapter without an error.

CHILD = "lotr"  # the child of an experts module that holds the adapters of its parameters, by their names
_IMPLEMENTATION = "lotr"  # the name in transformers' interface
_ATTRIBUTES = (
    "is_transposed",
    "has_bias",
    "num_experts",
    "config",
)  # of every class that takes implementations


class AdaptedExperts(nn.ModuleDict):
    """The adapters of an experts module, by parameter. config: the module's original configuration."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register()  # a pickle may be loaded in a process in which nothing was adapted


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts_forward)


def _first_projection(module: nn.Module) -> str:
    """The name of the parameter that is multiplied with the module's input."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def why_not(module: nn.Module, parameter: str) -> str | None:
    """Why a parameter cannot be adapted as experts' matrices, for the "got" of an error; None if it can."""
    kind, tensor = type(module).__name__, module._parameters.get(parameter)
    if tensor is None or tensor.dim() != 3:
        shape = "no" if tensor is None else f"a {tensor.dim()}-D"
        return f"{shape} parameter of {kind}; target_modules adapts linear layers"
    if type(tensor) is not nn.Parameter or tensor.dtype not in DTYPES.values():
        return f"experts of {kind} that are quantised or in parts ({type(tensor).__name__}, {tensor.dtype}); load them dense"
    takes = all(hasattr(module, name) for name in _ATTRIBUTES) and hasattr(
        type(module).forward, "__wrapped__"
    )
    if not takes or not hasattr(module.config, "_experts_implementation"):
        return f"a parameter of {kind}, whose class takes no implementations of experts (use_experts_implementation)"
    if parameter not in (_first_projection(module), "down_proj"):
        return f"a parameter of {kind} that is neither its {_first_projection(module)} nor its down_proj"
    return None


def expert_sizes(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(experts, in_features, out_features) of a parameter that can be adapted."""
    e, n, k = getattr(module, parameter).shape
    return (e, n, k) if module.is_transposed else (e, k, n)


class LoTRHostedExperts(LoTRExperts):
    """The adapter of one 3-D parameter of a transformers experts module, its host. Its only parameter is `core` [e, r_in,
    r_out].

    The host keeps the weights under their names and passes them in its forward, so that they are whole also in sharded
    training.
    """

    def __init__(
        self,
        host: nn.Module,
        parameter: str,
        factors: LoTRFactors,
        scaling: float,
        dropout: float = 0.0,
    ):
        nn.Module.__init__(self)
        self.__dict__["host"] = host  # not a child: the host has this module as its child
        self.parameter, self.transposed = parameter, host.is_transposed
        self.bias_name = f"{parameter}_bias" if host.has_bias else None
        self.num_experts, self.in_features, self.out_features = expert_sizes(host, parameter)
        for name in (parameter, self.bias_name):
            if name is not None:
                getattr(host, name).requires_grad_(False)
        self._add_adapter(
            factors, scaling, dropout, getattr(host, parameter).device, lead=(self.num_experts,)
        )
        self.train(host.training)

    def matrix(self) -> Tensor:
        weight = getattr(self.host, self.parameter)
        return weight.mT if self.transposed else weight

    @property
    def weight(self) -> Tensor:
        """W [e, n, k]: a transposed view if the host stores [e, k, n]."""
        return self.matrix()

    @property
    def bias(self) -> Tensor | None:
        """[e, n], or None."""
        return None if self.bias_name is None else getattr(self.host, self.bias_name)

    def _weight_to_write(self, where: str) -> Tensor:
        weight = self.host._parameters.get(self.parameter)
        if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
            raise TypeError(
                f"{where}: expected a whole, plain {self.parameter}, got {type(weight).__name__}"
            )
        return self.matrix()


def adapt_parameter(
    module: nn.Module, parameter: str, factors: LoTRFactors, scaling: float, dropout: float = 0.0
) -> LoTRHostedExperts:
    """Adds an adapter for a parameter for which `why_not` is None, as `module.lotr[parameter]`."""
    layer = LoTRHostedExperts(module, parameter, factors, scaling, dropout)
    if CHILD not in module._modules:
        _register()
        setattr(module, CHILD, AdaptedExperts(module.config))
        module.config = copy.copy(module.config)
        module.config._experts_implementation_internal = (
            _IMPLEMENTATION  # the property would change the sub-configurations, too
        )
    getattr(module, CHILD)[parameter] = layer
    return layer


def release(module: nn.Module) -> None:
    """Removes all adapters from an experts module."""
    adapted = getattr(module, CHILD)
    for layer in adapted.values():
        layer.give_start_back()
    module.config = adapted.config
    delattr(module, CHILD)


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of adapted experts: hidden_states [m, hidden], top_k_index and top_k_weights [m, top_k] -> as
    hidden_states."""
    (m, top_k), e = top_k_index.shape, self.num_experts
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offs = torch.searchsorted(
        experts, torch.arange(1, e + 1, device=experts.device, dtype=experts.dtype), out_int32=True
    )
    tokens = order // top_k
    y = _projected(self, _first_projection(self), hidden_states, offs, tokens, hidden_states, None)
    y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)
    y = _projected(self, "down_proj", y, offs, None, hidden_states, tokens)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return (
        y[back].view(m, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)
    )  # a fixed order of sums: deterministic


def _projected(
    module: nn.Module,
    parameter: str,
    x: Tensor,
    offs: Tensor,
    tokens: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """x through one projection. tokens: which row of x each sorted row is. rows: which token of hidden_states each row of x is;
    a request's tasks are those of the tokens."""
    weight, bias = (
        getattr(module, parameter),
        getattr(module, f"{parameter}_bias") if module.has_bias else None,
    )
    weight = weight.mT if module.is_transposed else weight
    if dispatch.autocast_dtype(x) is None:
        x = x.to(weight.dtype)  # as transformers' own grouped products do
    layer = getattr(module, CHILD)._modules.get(parameter)
    if layer is None:
        return grouped_linear(x, weight, offs, bias, tokens)
    return layer.routed(x, weight, bias, offs, tokens, hidden_states, rows)
