"""Experts of a mixture, adapted: the function `lotr_grouped_linear` and the module `LoTRExperts`.

    y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((x_t(i) A) G_c(i)) B^T

Row i is token t(i), which the router sent to expert c(i). All experts, and any other layer of the
same shape, share A and B. Each expert has its own core G_c. u = x A is computed once per token,
before the token is sent to its experts, and the product with B is one product for all experts.

Not here: the experts classes of transformers (transformers_experts.py) and the products
(core/grouped.py, core/dispatch.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import (
    check_dimension,
    check_index,
    check_integers,
    check_number,
    check_range,
    check_tensor,
    check_values,
    is_cheap_to_read,
)
from .core import dispatch, grouped
from .core.call import LayerCall, RowChoice, index_from_offs
from .core.request import ADAPTER_OFF, state_of
from .factors import LoTRFactors, Scaling, factors_for, scaling_of
from .layers import LoTRLayer


@dataclass(frozen=True)
class Routing:
    """Which expert and which token the rows of a mixture belong to. The rows are sorted by expert.

    Three tokens, each sent to two of three experts:

        row i            0  1  2  3  4  5
        expert c(i)      0  0  1  1  2  2      offs = [2, 4, 6]
        token t(i)       0  1  1  2  0  2

    The first projection of the experts reads x [3, k], so reads = tokens. The second one reads the
    activations of the rows [6, k], so reads = None.

    Attributes:
        offs: Where the rows of each expert end [e] (int32). Rows past the last end belong to no
            expert.
        reads: The row of x that each row reads [rows] (int64). None if x has these rows itself.
        tokens: The token t(i) of each row [rows] (int64), by which a request finds its task. None
            if the rows are the tokens themselves.
    """

    offs: Tensor
    reads: Tensor | None = None
    tokens: Tensor | None = None

    def choice(self, cores: Tensor, tasks: Tensor | None) -> tuple[RowChoice, Tensor]:
        """Returns the choice of each row's core, and the cores [c, r_in, r_out] that it indexes.

        Args:
            cores: [e, r_in, r_out], or [t, e, r_in, r_out] with tasks.
            tasks: The task of each token (int64), -1 for none. If None, the expert of a row is the
                index of its core.
        """
        if tasks is None:
            return RowChoice(index=None, offs=self.offs, reads=self.reads), cores
        task = tasks if self.tokens is None else tasks[self.tokens]
        experts = cores.shape[1]
        expert = index_from_offs(self.offs, len(task), experts)
        # A row without a task computes only the base. A row past the last end has no expert.
        has_core = (task >= 0) & (expert >= 0)
        # The core of task t and expert c has the index t e + c in the flattened cores.
        index = torch.where(has_core, task * experts + expert, -1)
        return RowChoice(index, reads=self.reads), cores.flatten(0, 1)

    def zero_unread_rows(self, x: Tensor) -> Tensor:
        """Returns x with zeros in the rows that no expert reads.

        Such rows may hold anything, even NaN, which would spread in dA = x^T du: zero times NaN is
        NaN.
        """
        if self.reads is None:
            return self.zero_past_end(x)
        # Rows past the last end get the index len(x), which is cut off below.
        read = self.reads.masked_fill(self._is_past_end(self.reads), len(x))
        is_unread = torch.ones(len(x) + 1, dtype=torch.bool, device=read.device)
        return _with_zeros(x, is_unread.index_fill(0, read, False)[: len(x)])

    def zero_past_end(self, rows: Tensor) -> Tensor:
        """Returns rows with zeros past the last end.

        Their gradient there is then zero, too. If it were NaN, it would spread in dB = g^T h.
        """
        return _with_zeros(rows, self._is_past_end(rows))

    def _is_past_end(self, rows: Tensor) -> Tensor:
        # Not a slice up to the last end, which is on the GPU: reading it would wait.
        return torch.arange(len(rows), device=self.offs.device) >= self.offs[-1]


def _with_zeros(x: Tensor, is_zero: Tensor) -> Tensor:
    """Returns x with zeros in some rows, x itself if there are none.

    On a GPU and in a compiled graph it always copies. Looking for such rows would wait for the GPU,
    or break the graph.
    """
    if is_cheap_to_read(is_zero) and not bool(is_zero.any()):
        return x
    return x.masked_fill(is_zero.unsqueeze(1), 0)


# ---- the function --------------------------------------------------------------------------------


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
    """Computes y_i = x_t(i) W_c(i)^T + bias_c(i) + scaling ((x_t(i) A) G_c(i)) B^T [rows, n].

    The rows are sorted by expert. x, weight and bias have one dtype, unless autocast is on. The
    adapter may be float32 with a half-precision x. The result is differentiable in x, A, B and
    cores, and in weight and bias if they require grad.

    Args:
        x: [rows, k] sorted by expert, or [m, k] with tokens.
        weight: [e, n, k] in any layout, for example a transposed view.
        offs: Where the rows of each expert end [e] (int32), as for
            torch.nn.functional.grouped_mm. Rows past the last end belong to no expert. They are not
            read, and are zero in y and in the gradient of x.
        A: [k, r_in].
        B: [n, r_out].
        cores: [e, r_in, r_out], or [t, e, r_in, r_out] with a core_index.
        scaling: s.
        bias: [e, n].
        tokens: The row of x that each row reads [rows] (int64). With it, x A is computed once per
            token. Rows past the last end need a valid entry, too.
        core_index: The task of each row of x (int64), -1 for none. Task and expert choose the core.

    Raises:
        TypeError, ValueError: If an argument has the wrong type, shape or value. The message names
            it. On a GPU the values of offs, tokens and core_index are not checked.
    """
    check_tensor("weight", weight, "e", "n", "k")
    e, n, k = weight.shape
    _check_routing(x, offs, tokens, experts=e, in_features=k, dtype=weight.dtype)
    check_tensor("A", A, k, "r_in")
    check_tensor("B", B, n, "r_out")
    lead = () if core_index is None else ("t",)
    check_tensor("cores", cores, *lead, e, A.shape[1], B.shape[1])
    if bias is not None:
        check_tensor("bias", bias, e, n)
        # A sum would silently have the wider dtype.
        if bias.dtype != weight.dtype and dispatch.autocast_dtype(x) is None:
            raise TypeError(f"bias: expected weight's dtype {weight.dtype}, got {bias.dtype}")
    check_values(x, {"weight": weight, "A": A, "B": B, "cores": cores})
    check_number("scaling", scaling)
    if core_index is not None:
        check_index("core_index", core_index, len(cores), x)
    tasks = None if core_index is None else core_index.to(x.device)
    routing = Routing(offs, reads=tokens, tokens=tokens)
    choice, flat_cores = routing.choice(cores, tasks)
    x = routing.zero_unread_rows(x)
    call = LayerCall(x, weight, bias, A, B, flat_cores, float(scaling), choice=choice)
    return routing.zero_past_end(dispatch.grouped_linear(call, offs))


def _check_routing(
    x: Tensor, offs: object, tokens: object, *, experts: int, in_features: int, dtype: torch.dtype
) -> None:
    # With tokens, rows may read one row of x more than once.
    check_tensor("x", x, "rows" if tokens is None else "m", in_features)
    if x.dtype != dtype and dispatch.autocast_dtype(x) is None:
        raise TypeError(f"x: expected the weight's dtype {dtype}, got {x.dtype}. Convert x.")
    check_integers("offs", offs, torch.int32)
    if offs.shape != (experts,):
        raise ValueError(
            f"offs: expected one end per expert, shape ({experts},), got {tuple(offs.shape)}"
        )
    if tokens is not None:
        check_integers("tokens", tokens, torch.int64)
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected shape [rows], got {tuple(tokens.shape)}")
        check_range("tokens", tokens, 0, len(x))


# ---- the module ----------------------------------------------------------------------------------


class LoTRExperts(LoTRLayer):
    """One matrix of each expert of a mixture, W [e, n, k] frozen, with an adapter.

    Each expert has a core, and all share the factors. The adapter starts at zero, so the module
    starts as the plain grouped product. The factors may be those of other LoTRExperts and of
    LoTRLinear layers of the same (in_features, out_features).

    state_dict: `weight` [e, out_features, in_features], `bias` [e, out_features] and `core`
    [e, r_in, r_out], and also `factors.A.value` and `factors.B.value` unless an owner registers the
    factors.

    Args:
        num_experts: e.
        in_features: k. This and all further arguments are as for `LoTRLinear`, but `bias` is False
            by default.

    Raises:
        TypeError, ValueError: If an argument has the wrong type or value. The message names it.
    """

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
        # Checked before the weight is allocated, which may take gigabytes.
        check_dimension("num_experts", num_experts)
        factors = factors_for(factors, rank, (in_features, out_features), device, dtype)
        s = scaling_of(factors.rank, alpha, rslora, scaling)
        super().__init__()
        weight = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        bound = in_features**-0.5  # as nn.Linear starts
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(weight.new_zeros(num_experts, out_features)) if bias else None
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self._add_adapter(factors, s, dropout, weight.device, lead=(num_experts,))

    def forward(self, x: Tensor, offs: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Computes the experts, as `lotr_grouped_linear` does.

        Args:
            x: [rows, in_features] sorted by expert, or [m, in_features] with tokens.
            offs: Where the rows of each expert end [e] (int32).
            tokens: The row of x that each row reads [rows] (int64).

        Returns:
            [rows, out_features].
        """
        _check_routing(
            x,
            offs,
            tokens,
            experts=self.num_experts,
            in_features=self.in_features,
            dtype=self.weight.dtype,
        )
        routing = Routing(offs, reads=tokens, tokens=tokens)
        y = self.routed(
            routing.zero_unread_rows(x), self.weight, self.bias, routing, request_input=x
        )
        return routing.zero_past_end(y)

    def routed(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        request_input: Tensor,
    ) -> Tensor:
        """Returns y [rows, out_features], without checks of the arguments.

        Args:
            x: The rows that `routing.reads` indexes, or one row per row of y. Unread rows are zero
                (`zero_unread_rows`), or at least not NaN.
            weight: [e, n, k], full (unsharded) during the forward of the module that owns it.
            bias: [e, n].
            routing: The expert and the token of each row of y.
            request_input: The tokens [m, ..] before they are sent to experts, to which the tasks of
                a request belong.
        """
        state = state_of(self)
        # Unlike in LoTRLayer, no start is added back: experts cannot have init "svd".
        if self.merged or state is ADAPTER_OFF:
            return grouped.linear(x, weight, bias, routing.offs, routing.reads)
        if state is None:
            choice, cores = routing.choice(self.core, tasks=None)
        else:
            choice, cores = routing.choice(state.cores, state.index_of(request_input))
        dropout = self.dropout if self.training else 0.0

        def compute(A: Tensor, B: Tensor) -> Tensor:
            call = LayerCall(x, weight, bias, A, B, cores, self.scaling, dropout, choice=choice)
            return dispatch.grouped_linear(call, routing.offs, self.factors.caches, self)

        return self.factors.read(compute)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"
