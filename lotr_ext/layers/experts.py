"""Experts of a mixture, adapted: lotr_grouped_linear, the functional form, and LoTRExperts, the module.

    y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((x_t(i) A) G_c(i)) B^T      row i is token t(i), routed to expert c(i)

All experts (and any other layer of the same shape) share A and B; each expert has its own core G_c.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autograd.call import Call, call_routed, compute_dtype
from ..autograd.tensor_parallel import ExpertsCut, experts_cut, is_dtensor, rows_of
from ..ops.composite import delta_weight
from ..ops.grouped import Packed, expert_of_rows, grouped_linear, of_groups_alone
from .checks import check_beside, check_dimension, check_dtype, check_index, check_number, check_tensor
from .factors import LoTRFactors
from .layer import LoTRLayer
from .mixture import cores_of, cores_of_rows
from .quantized import is_plain
from .settings import Settings
from .sharded import parted_as

__all__ = ["LoTRExperts", "lotr_grouped_linear"]


def _check_routing(x: Tensor, experts: int, features: int, offs: object, tokens: object) -> None:
    check_tensor("x", x, "rows" if tokens is None else "m", features)
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

    weight [e, n, k] (any layout, also a transposed view), bias [e, n] or None, A [k, r_in], B [n, r_out], cores
    [e, r_in, r_out]. offs [e] (int32): the end of each expert's rows, as in torch.nn.functional.grouped_mm. Rows from
    offs[-1] on belong to no expert: they are not read, and are zero in y and in dx. A token without an expert is zero in dx.
    tokens None: x [rows, k] is already sorted by expert. tokens [rows] (int64): x [m, k] has one row per token, row i is token
    tokens[i], and x A is computed once per token. core_index (int64), one for each row of x: the task whose core for the row's
    expert is used, from cores [t, e, r_in, r_out]; -1: none.
    x, weight and bias share a dtype (or autocast is on), the adapter may be float32 beside a half-precision x. Differentiable
    in x, A, B and cores, and in weight and bias if they require grad.
    Raises TypeError or ValueError that names the argument; on a GPU the values of offs and tokens are not checked.
    """
    check_tensor("weight", weight, "e", "n", "k")
    e, n, k = weight.shape
    _check_routing(x, e, k, offs, tokens)
    check_tensor("A", A, k, "r_in")
    check_tensor("B", B, n, "r_out")
    check_tensor("cores", cores, *(() if core_index is None else ("t",)), e, A.shape[1], B.shape[1])
    if core_index is not None:
        check_index("core_index", core_index, len(cores))
        if core_index.shape != x.shape[:1]:
            raise ValueError(f"core_index: expected one index per row of x {tuple(x.shape)}, got {tuple(core_index.shape)}")
        core_index = core_index.to(x.device)
    if bias is not None:
        check_tensor("bias", bias, e, n)
    check_beside(x, {"weight": weight, "bias": bias}, {"A": A, "B": B, "cores": cores})
    check_number("scaling", scaling)

    def run(x: Tensor, tokens: Tensor | None) -> Tensor:
        if core_index is None:
            return call_routed(x, weight, bias, offs, tokens, None, A, B, cores, None, Call(cores, float(scaling)))
        tasks = core_index[: x.shape[0]] if tokens is None else core_index[tokens]
        index = cores_of_rows(tasks, expert_of_rows(offs, len(tasks)), e)
        call = Call(cores[0], float(scaling))
        return call_routed(x, weight, bias, offs, tokens, None, A, B, cores.flatten(0, 1), index, call)

    return of_groups_alone(run, x, offs, tokens)


class LoTRExperts(LoTRLayer):
    """One matrix of each expert of a mixture, W [e, n, k] frozen, adapted by shared factors and a core per expert.

    forward(x, offs, tokens=None) -> [rows, out_features], as `lotr_grouped_linear`. Arguments as LoTRLinear's; the adapter
    starts at zero, so the module starts as the plain grouped product. factors may be those of other LoTRExperts and of
    LoTRLinear layers of the same (in_features, out_features).

    state_dict: `weight` [e, out_features, in_features], `bias` [e, out_features], `core` [e, r_in, r_out]; and `factors.A`,
    `factors.B` unless an owner registers the factors.
    """

    num_experts: int
    _cut_with_base = ("weight", "bias", "core")

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
        scaling: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        settings = Settings(alpha, rslora, scaling, dropout)
        check_dtype(dtype)
        check_dimension("num_experts", num_experts)
        factors = self._factors_for(factors, rank, (in_features, out_features), device, dtype)
        super().__init__()
        weight = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        bound = in_features**-0.5  # as nn.Linear starts
        self.weight = nn.Parameter(weight if weight.is_meta else weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(weight.new_zeros(num_experts, out_features)) if bias else None
        self._check_device(factors, weight.device)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self._attach(factors, weight.device, settings)

    @classmethod
    def from_weight(
        cls,
        weight: nn.Parameter,
        factors: LoTRFactors,
        *,
        bias: nn.Parameter | None = None,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: float | None = None,
        dropout: float = 0.0,
    ) -> LoTRExperts:
        """Adapts weight [e, n, k] and bias [e, n]: uses the tensors themselves, not copies, and freezes them."""
        settings = Settings(alpha, rslora, scaling, dropout)
        for name, parameter, shape in (("weight", weight, ("e", "n", "k")), ("bias", bias, tuple(weight.shape[:2]))):
            if parameter is not None:
                check_tensor(name, parameter, *shape)
                if not isinstance(parameter, nn.Parameter) or not is_plain(parameter):
                    raise TypeError(f"{name}: expected a plain nn.Parameter, got {type(parameter).__name__}")
        e, n, k = weight.shape
        cls._check_factors(factors, k, n)
        cls._check_device(factors, weight.device)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_experts, layer.in_features, layer.out_features = e, k, n
        layer.weight, layer.bias = weight, bias
        layer._attach(factors, weight.device, settings)
        return layer

    def _zero_core(self, factors: LoTRFactors, device: torch.device) -> Tensor:
        core = torch.zeros(self.num_experts, factors.r_in, factors.r_out, device=device, dtype=factors.A.dtype)
        return core if self.cut is None or self.cut.by != "experts" else parted_as(core, self.weight)

    def forward(self, x: Tensor, offs: Tensor, tokens: Tensor | None = None) -> Tensor:
        bias = self.bias.to_local() if is_dtensor(self.bias) else self.bias
        return self.routed(x, self._local_matrix(), bias, offs, tokens)

    def routed(
        self,
        x: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        offs: Tensor,
        tokens: Tensor | None,
        tasks: Tensor | None = None,
        padded: bool = True,
    ) -> Tensor:
        """forward with the owner's current weight [e, n, k] and bias [e, n], which are whole during the owner's forward.
        tasks [rows]: while `mixed` is on, the adapter of each row, -1 for none. padded: whether some rows may be of no
        expert, or some tokens of no row."""

        def run(x: Tensor, tokens: Tensor | None) -> Tensor:
            return self._run(x, weight, bias, offs, tokens, tasks)

        _check_routing(x, weight.shape[0], weight.shape[2], offs, tokens)
        if self.merged and self.notice is not None:
            self.notice.warn(self.adapter_parameters())
        return of_groups_alone(run, x, offs, tokens) if padded else run(x, tokens)

    def _run(
        self, x: Tensor, weight: Tensor | Packed, bias: Tensor | None, offs: Tensor, tokens: Tensor | None, tasks: Tensor | None
    ) -> Tensor:
        off, mixture = self._state()
        if self.merged or off:
            return grouped_linear(x if tokens is None else x[tokens], weight, offs, bias, compute_dtype(x))
        p, factors, cut = self.dropout if self.training else 0.0, self.factors, self.cut
        call, index = Call(self.core, self.scaling, p, factors._group, self, self.strategy), None
        if mixture is not None:
            if tasks is None:
                raise RuntimeError("mixed: expected experts that their transformers module calls, got a call by hand")
            if callable(mixture.cores) and is_dtensor(self.core):
                raise TypeError("per_example: expected whole experts in each process, got experts in parts")
            tasks = tasks[: (x if tokens is None else tokens).shape[0]]
            index = cores_of_rows(tasks, expert_of_rows(offs, len(tasks)), weight.shape[0])
            call.core, call.scaling = cores_of(mixture, self.core, len(mixture.index)), mixture.scaling

        def routed(A: Tensor, B: Tensor) -> Tensor:
            if cut is not None:
                A, B = cut.localise(A, B, call)
            cores = call.core if index is None else call.core.flatten(0, 1)
            return call_routed(x, weight, bias, offs, tokens, None, A, B, cores, index, call)

        return factors(routed)

    def _matrix(self) -> Tensor:
        return self.weight

    @property
    def cut(self) -> ExpertsCut | None:
        """How the matrices are sharded over processes; None if each process has them whole."""
        return experts_cut(self.weight) if is_dtensor(self.weight) else None

    def _local_delta(self) -> Tensor:
        if (cut := self.cut) is None:
            return self.delta_weight()
        core = self.core.to_local() if is_dtensor(self.core) else self.core
        return self.factors(lambda A, B: delta_weight(rows_of(A, *cut.of_A), rows_of(B, *cut.of_B), core, self.scaling))

    def to_base(self) -> nn.Module:
        """Raises TypeError: no plain module computes a grouped product. `weight` is the current weight."""
        raise TypeError("to_base: expected a layer with a plain form, got LoTRExperts; take its weight")

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"
