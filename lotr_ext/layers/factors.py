"""LoTRFactors: the pair A, B that layers share. LoTRFactor: one of the two alone, for several pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..autograd.sharing import Group, SharedFactor
from .checks import check_dimension, check_dtype, check_rank
from .init import fill_factor_
from .sharded import StaysWhole, in_parts


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, where NaN equals NaN, so that files of a diverged run can be loaded."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _check_names_agree(module: nn.Module, names: tuple[str, ...], state_dict, prefix: str, errors: list[str]) -> None:
    """Adds an error to load_state_dict if two names of one tensor have different values. A model built by hand registers shared
    factors under many names."""
    if module._load is not None and module._load[0] is errors:
        for part in names:
            new, have = state_dict.get(f"{prefix}{part}"), getattr(module, part).detach()
            if new is None or new.is_meta or have.is_meta or in_parts(new) or in_parts(have) or new.shape != have.shape:
                continue
            if not same_values(new.to(have), have):
                other = module._load[1]
                errors.append(f"{prefix}{part}: expected the values of {other}{part}, with which it is shared, got others")


class LoTRFactor(StaysWhole):
    """One factor [features, rank]: an A of layers with that many in_features, or a B of layers with that many out_features. It
    may be in several pairs: `LoTRFactors.of(A, B)`.

    Its gradient is one float32 sum (float64 for float64) over the layers of all its pairs, and autograd sees one gradient
    per backward. Layers with the same A share u = x A, even if their B differ.
    init, device, dtype, errors and warnings: as for LoTRFactors. State: `value`.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        init: str = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_dimension("features", features)
        check_dimension("rank", rank)
        check_dtype(dtype)
        super().__init__()
        if rank > features:
            warnings.warn(
                f"lotr_ext: rank {rank} of a factor for {features} features: beyond these it adds parameters and no function "
                "that a lower rank has not",
                stacklevel=2,
            )
        self.features, self.rank = features, rank
        self.value = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self._shared = SharedFactor()
        self._load: tuple[list[str], str] | None = None
        fill_factor_(self.value, init)

    def forward(self, operation: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns operation(value): the only way to read the value, as for LoTRFactors."""
        return operation(self.value)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        _check_names_agree(self, ("value",), state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._load = errors, prefix

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"


class LoTRFactors(StaysWhole):
    """A [in_features, r_in] and B [out_features, r_out], one pair for a whole group of layers (arXiv 2402.01376).

    rank: an int, or (r_in, r_out). init: "orthonormal" (orthonormal columns; rows when the rank exceeds the width), "normal"
    (N(0, 1), the paper's) or "kaiming"; see `lotr_ext.init`. dtype: float32, float64, bfloat16 or float16, torch's default if
    None.
    Every layer's gradient of A and B is added into one accumulator each, in float32 (float64 for float64), and autograd sees
    one gradient per backward (`lotr_ext.autograd.shared_gradient`).
    Raises TypeError or ValueError naming the argument; warns about a rank above the widths.

    State: `A`, `B`; with an init that changed the base weights also the buffers `start_A`, `start_B`, which are not part of
    state_dict (`save_adapter` keeps them).
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | tuple[int, int],
        *,
        init: str = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_dimension("in_features", in_features)
        check_dimension("out_features", out_features)
        r_in, r_out = check_rank(rank)
        check_dtype(dtype)
        super().__init__()
        if r_in > in_features or r_out > out_features:
            warnings.warn(
                f"lotr_ext: rank {rank} over layers of {in_features} in and {out_features} out: beyond these widths it adds "
                "parameters and no function that a lower rank has not",
                stacklevel=2,
            )
        self.in_features, self.out_features, self.r_in, self.r_out = in_features, out_features, r_in, r_out
        self.A = nn.Parameter(torch.empty(in_features, r_in, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, r_out, device=device, dtype=dtype))
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)
        self._group = Group()
        self._load: tuple[list[str], str] | None = None
        fill_factor_(self.A, init)
        fill_factor_(self.B, init)

    @staticmethod
    def of(A: LoTRFactor, B: LoTRFactor, rank: int | tuple[int, int] | None = None) -> LoTRFactors:
        """A pair of two existing factors, which may also be in other pairs.

        rank: the required ranks, (r_in, r_out); None: the same rank for both.

        State: `factor_A.value`, `factor_B.value`.

        Raises:
            TypeError, ValueError: not a LoTRFactor, the same one twice, different dtypes, or other ranks.
        """
        return FactorPair(A, B, rank)

    @property
    def owners(self) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        """(module, attribute) of A and of B."""
        return (self, "A"), (self, "B")

    @property
    def rank(self) -> int | tuple[int, int]:
        """The rank as given: an int if r_in = r_out."""
        return self.r_in if self.r_in == self.r_out else (self.r_in, self.r_out)

    def forward(self, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns operation(A, B): the only way to read A and B, so that sharded training gathers them around this call.

        The operation holds x and its other tensors itself. If they were arguments, FSDP2 would wrap each x in a new tensor, so
        that siblings could not recognise it. It would also gather and reduce A around each layer's backward, before the shared
        gradient is complete.
        """
        own = self._parameters
        return operation(own["A"], own["B"]) if "A" in own and "B" in own else operation(self.A, self.B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoTRFactors:
        if self.start_A is not None and not self.start_A.is_meta and fn(self.start_A).is_meta:
            raise RuntimeError(
                'to: expected a device with values, got meta for factors of init "svd": their start, which the base weights '
                "lack and no state_dict holds, would be lost; save_adapter, and load it onto the new model"
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        _check_names_agree(self, ("A", "B"), state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._load = errors, prefix

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class FactorPair(LoTRFactors):
    """The pair of two LoTRFactor: `LoTRFactors.of`."""

    start_A = start_B = None

    def __init__(self, A: LoTRFactor, B: LoTRFactor, rank: int | tuple[int, int] | None = None):
        for name, factor in (("A", A), ("B", B)):
            if not isinstance(factor, LoTRFactor):
                raise TypeError(f"{name}: expected a LoTRFactor, got {type(factor).__name__}")
        if A is B:
            raise ValueError("B: expected another factor than A, got the same one")
        r_in, r_out = (A.rank, A.rank) if rank is None else check_rank(rank)
        for name, factor, want in (("A", A, r_in), ("B", B, r_out)):
            if factor.rank != want:
                why = "as A has" if rank is None else "as given"
                raise ValueError(f"{name}: expected a factor of rank {want}, {why}, got one of rank {factor.rank}")
        if A.value.dtype != B.value.dtype:
            raise TypeError(f"B: expected dtype {A.value.dtype}, as A has, got {B.value.dtype}")
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.r_in, self.r_out = A.features, B.features, r_in, r_out
        self.factor_A, self.factor_B = A, B
        self._group = Group(A._shared, B._shared)
        self._load = None

    @property
    def A(self) -> Tensor:
        return self.factor_A.value

    @property
    def B(self) -> Tensor:
        return self.factor_B.value

    @property
    def owners(self) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        return (self.factor_A, "value"), (self.factor_B, "value")

    def forward(self, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self.factor_A(lambda A: self.factor_B(partial(operation, A)))

    def _load_from_state_dict(self, *args) -> None:
        nn.Module._load_from_state_dict(self, *args)
