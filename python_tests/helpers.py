"""What the tables of tests share: comparisons with bounds, tensors with NaN around them, good arguments of operators."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lotr_ext import reference

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
BETA = 1  # a strategy of the layers' operators; the other one on a CPU is 0
# the unit roundoff of a result, and the bound on a long sum in the dtype of sums, both relative to the sum of absolute products
ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}
# the relative error of a whole step in each dtype
CLOSE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 6e-3}
OF_SUMS = {torch.float32: 1e-6, torch.float64: 2e-15}


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens and layers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- comparisons -----------------------------------------------------------------------------------------------------


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """|got - want| / |want|; infinite for a NaN, another shape, and a missing tensor unless want is zero or missing too."""
    if got is None or want is None:
        other = want if got is None else got
        return 0.0 if other is None or not bool(other.any()) else float("inf")
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.detach().double()
    error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")  # max() over errors would hide a NaN


def worst(got: Iterable[Tensor | None], want: Iterable[Tensor | None]) -> float:
    """The largest relative error of pairs of tensors."""
    return max((relative(a, b) for a, b in zip(list(got), list(want), strict=True)), default=0.0)


def within(got: Tensor, truth: Tensor, size: Tensor, rounded: float = 1.0) -> str | None:
    """None if got is truth up to rounding, else the error. All bounds are for each element alone.

    truth: in float64. size: the sum of the absolute products of each element, in float64. rounded: how many operands of these
    products, with the result, were rounded to got's dtype.
    """
    if got.shape != truth.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    allowed = rounded * ROUNDOFF[got.dtype] * (truth.abs() if rounded == 1.0 else size)
    allowed = 1.001 * allowed + OF_SUMS[sums_dtype(got.dtype)] * size + 1e-300
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # below the smallest normal number
    wrong = ~((got.double() - truth).abs() <= allowed)  # also NaN
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {wrong.numel()} elements, first {at}: {got[at].item()!r}, expected {truth[at].item()!r}"


# ---- tensors ---------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "rows apart", "columns apart", "transposed")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values as a view with other strides, NaN in each element of the storage that is not its own."""
    *lead, rows, cols = t.shape
    if layout == "contiguous":
        return t.clone()
    if layout == "rows apart":
        view = torch.full((*lead, rows + 2, cols + 5), float("nan"), dtype=t.dtype)[
            ..., 1 : rows + 1, 3 : cols + 3
        ]
    elif layout == "columns apart":
        view = torch.full((*lead, rows, 3 * cols + 1), float("nan"), dtype=t.dtype)[
            ..., 1 : 3 * cols + 1 : 3
        ]
    else:
        view = torch.full((*lead, cols, rows + 3), float("nan"), dtype=t.dtype)[
            ..., 1 : rows + 1
        ].transpose(-1, -2)
    return view.copy_(t)


def untouched(view: Tensor) -> bool:
    """Whether the storage beside a view of `laid_out` still is NaN."""
    if view._base is None:
        return True
    beside = view._base.clone()
    beside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(beside.isnan().all())


def copy64(t: Tensor) -> Tensor:
    """A copy in float64."""
    return t.detach().to(torch.float64, copy=True)


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Context in which a new tensor that is not written comes out as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x [m, k] in float64 after the dropout that every kernel draws for (p, seed)."""
    return x.double() * reference.dropout_mask(*x.shape, p, seed)


# ---- operators -------------------------------------------------------------------------------------------------------

M, K, N, R, Q = 6, 5, 4, 3, 2  # tokens, in, out, r_in, r_out
SCHEMAS = {
    s.name.removeprefix("lotr::"): s
    for s in torch._C._jit_get_all_schemas()
    if s.name.startswith("lotr::")
}
ON_CUDA_ALONE = {"cuda_versions", "cuda_plans", "gemm_lotr_refusal"}
NO_NUMBERS = {"info", *ON_CUDA_ALONE}
OPERATORS = sorted(set(SCHEMAS) - NO_NUMBERS)


def operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.lotr, name).default


def arguments(name: str, dtype: torch.dtype = torch.float32, R: int = R, Q: int = Q) -> list[tuple]:
    """Good arguments of an operator, one tuple for each form that it has.

    Optional arguments are given where they go together. A new operator without an entry here fails
    every test that walks over the schemas.

    Args:
        R: r_in.
        Q: r_out.
    """
    seed, offs = torch.tensor([7]), torch.tensor([2, M], dtype=torch.int32)
    index, tokens = torch.tensor([0, 1, -1, 1, 0, 1]), torch.tensor([5, 4, 3, 2, 1, 0])

    def t(*size: int) -> Tensor:
        return torch.randn(*size).to(dtype)

    def acc(*size: int) -> Tensor:
        return torch.randn(*size).to(sums_dtype(dtype))

    x, weight, bias, A, F = t(M, K), t(N, K), t(N), t(K, R), t(N, R)
    x_of_two = t(3, 2, K)  # leading dimensions
    g, g_of_two = t(M, N), t(3, 2, N)
    u, du, dx = t(M, R), t(M, R), t(M, K)
    core_part = t(N, Q), t(R, Q), 0.7  # B, core, scaling
    return {
        "shrink": [(t(M, K), t(K, R), 0.5, seed), (t(0, K), t(K, R), 0.0, None)],
        "expand_add_": [(t(M, N), t(M, R), t(N, R), 0.5, seed)],
        "fold": [(t(N, Q), t(R, Q), 0.7, dtype)],
        "expand": [(t(M, N), t(M, R), t(N, R)), (t(3, 2, N), t(M, R), t(N, R))],
        "layer_forward": [
            (x, weight, bias, A, *core_part, 0, 0.5, seed),
            (x_of_two, weight, None, A, *core_part, BETA, 0.0, None),
        ],
        "layer_forward_few_tokens": [
            (x, weight, bias, A, *core_part, 0),
            (x_of_two, weight, None, A, *core_part, BETA),
        ],
        "layer_forward_projected": [
            (x, weight, bias, u, *core_part, BETA),
            (x_of_two, weight, None, u, *core_part, 0),
        ],
        "layer_forward_rows": [
            (x, weight, bias, u, F, BETA),
            (x_of_two, weight, None, u, F, 0),
        ],
        "layer_backward_": [
            (g, weight, x, u, A, F, *core_part, BETA, acc(K, R), acc(N, Q), True, True, 0.5, seed),
            (g_of_two, weight, x, u, A, F, *core_part, 0, None, None, True, True, 0.0, None),
            (g, None, None, u, A, F, *core_part, 0, None, None, False, True, 0.0, None),
        ],
        "layer_backward_few_tokens_": [
            (g, weight, x, u, A, *core_part, BETA, acc(K, R), acc(N, Q), True, True),
            (g_of_two, weight, x, u, A, *core_part, 0, None, None, True, True),
        ],
        "layer_backward_projected_": [
            (g, weight, u, F, *core_part, du, dx, acc(N, Q), True, True),
            (g_of_two, weight, u, F, *core_part, None, None, None, True, True),
            (g, None, u, None, *core_part, None, None, None, True, False),
        ],
        "layer_backward_rows_": [
            (g, weight, u, F, dx, acc(N, R), True, True),
            (g_of_two, weight, u, F, None, None, True, True),
            (g, None, u, F, None, None, False, True),
        ],
        "shrink_backward_": [
            (t(M, R), t(M, K), t(M, K), t(K, R), acc(K, R), 0.5, seed),
            (t(M, R), None, t(M, K), None, None, 0.0, None),
        ],
        "row_core": [
            (t(M, R), t(2, R, Q), index, None, tokens, 0.7),
            (t(M, R), t(2, R, Q), None, offs, None, 0.7),
        ],
        "row_core_backward": [(t(M, Q), t(M, R), t(2, R, Q), None, offs, tokens, 0.7, True, True)],
        "grouped_mm": [(t(M, K), t(2, N, K), offs)],
        "grouped_outer": [(t(M, N), t(M, K), offs)],
        "dropout_mask": [(M, N, 0.5, seed, dtype)],
        "linear": [(t(M, K), t(N, K), t(N), t(K, R), t(N, Q), t(R, Q), 0.7, 0.0, None, None, "1")],
    }[name]


# ---- errors ----------------------------------------------------------------------------------------------------------

ERRORS = (TypeError, ValueError, RuntimeError)


@contextmanager
def refused(
    name: str, kinds: type[Exception] | tuple[type[Exception], ...] = ERRORS
) -> Iterator[None]:
    """Expects an error of a plain type whose message names the argument, what was expected and what was found."""
    with pytest.raises(kinds) as raised:
        yield
    message = str(raised.value)
    assert type(raised.value) in (TypeError, ValueError, RuntimeError), type(raised.value)
    assert re.search(rf"\b{re.escape(name)}\b[^:]*: expected .*, got ", message, re.S), message
