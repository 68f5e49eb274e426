"""Shared by the tests: comparisons, tensors surrounded by NaN, good arguments of operators."""

import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
BETA = 1  # a strategy of the operators of layers; the other one on a CPU is 0

# The unit roundoff of a result.
ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}
# The relative error of all operations of a layer together.
CLOSE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 6e-3}
# The error of a long sum in this dtype, relative to the sum of absolute products.
OF_SUMS = {torch.float32: 1e-6, torch.float64: 2e-15}


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over tokens and layers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_python(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with these words. `options` go to subprocess.run."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


# ---- comparisons ---------------------------------------------------------------------------------


def relative(actual: Tensor | None, expected: Tensor | None) -> float:
    """Returns |actual - expected| / |expected|.

    A missing tensor stands for zero. The result is infinite for a NaN and for another shape.
    """
    if actual is None or expected is None:
        is_zero = not any(t.any() for t in (actual, expected) if t is not None)
        return 0.0 if is_zero else math.inf
    if actual.shape != expected.shape:
        return math.inf
    difference = actual.detach().double() - expected.detach().double()
    error = (difference.norm() / expected.detach().double().norm().clamp_min(1e-30)).item()
    return math.inf if math.isnan(error) else error  # max() over errors would hide a NaN


def worst(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    """Returns the largest relative error of pairs of tensors."""
    pairs = zip(actual, expected, strict=True)
    return max((relative(a, b) for a, b in pairs), default=0.0)


def within(actual: Tensor, truth: Tensor, size: Tensor, roundings: int = 1) -> str | None:
    """Compares each element with the truth, up to rounding.

    Args:
        actual: The result.
        truth: In float64.
        size: The sum of the absolute products of each element, in float64.
        roundings: How often values on the way to an element, itself included, were rounded to its
            dtype. 1: only the element, so that its error is relative to the truth, else to `size`.

    Returns:
        What is wrong, None if nothing is.
    """
    if actual.shape != truth.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    scale = truth.abs() if roundings == 1 else size
    allowed = 1.001 * roundings * ROUNDOFF[actual.dtype] * scale
    allowed = allowed + OF_SUMS[sums_dtype(actual.dtype)] * size + 1e-300
    if actual.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # below the smallest normal number
    is_wrong = ~((actual.double() - truth).abs() <= allowed)  # also if it is NaN
    if not bool(is_wrong.any()):
        return None
    first = tuple(is_wrong.nonzero()[0].tolist())
    return (
        f"{int(is_wrong.sum())} of {is_wrong.numel()} elements, first {first}: "
        f"{actual[first].item()!r}, expected {truth[first].item()!r}"
    )


# ---- tensors -------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "rows apart", "columns apart", "transposed")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Returns the values of t as a view with other strides. The storage around it is NaN."""
    if layout == "contiguous":
        return t.clone()
    *lead, rows, cols = t.shape

    def storage(*size: int) -> Tensor:
        return torch.full((*lead, *size), float("nan"), dtype=t.dtype)

    if layout == "rows apart":
        view = storage(rows + 2, cols + 5)[..., 1 : rows + 1, 3 : cols + 3]
    elif layout == "columns apart":
        view = storage(rows, 3 * cols + 1)[..., 1 : 3 * cols + 1 : 3]
    else:
        view = storage(cols, rows + 3)[..., 1 : rows + 1].transpose(-1, -2)
    return view.copy_(t)


def untouched(view: Tensor) -> bool:
    """Whether the storage around a view of `laid_out` is still NaN."""
    if view._base is None:
        return True
    surroundings = view._base.clone()
    surroundings.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(surroundings.isnan().all())


def copy64(t: Tensor) -> Tensor:
    """Returns a copy in float64."""
    return t.detach().to(torch.float64, copy=True)


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fills new tensors with NaN, so that elements that are never written are noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- operators -----------------------------------------------------------------------------------

M = 6  # tokens
K = 5  # in_features
N = 4  # out_features
R = 3  # r_in
Q = 2  # r_out
SCHEMAS = {
    schema.name.removeprefix("lotr::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("lotr::")
}
NO_NUMBERS = {"info", "cuda_versions", "cuda_plans", "gemm_lotr_refusal"}
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
    seed = torch.tensor([7])
    offs = torch.tensor([2, M], dtype=torch.int32)
    index = torch.tensor([0, 1, -1, 1, 0, 1])
    tokens = torch.tensor([5, 4, 3, 2, 1, 0])

    def t(*size: int) -> Tensor:
        return torch.randn(*size).to(dtype)

    def acc(*size: int) -> Tensor:
        return torch.randn(*size).to(sums_dtype(dtype))

    x = t(M, K)
    weight = t(N, K)
    bias = t(N)
    A = t(K, R)
    F = t(N, R)
    g = t(M, N)
    x_of_two = t(3, 2, K)  # leading dimensions
    g_of_two = t(3, 2, N)
    u = t(M, R)
    du = t(M, R)
    dx = t(M, K)
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
        # The last ones are p, y, index, offs, tokens, and the version of the formulas.
        "linear": [(x, weight, bias, A, *core_part, 0.0, None, None, None, None, "1")],
    }[name]


# ---- errors --------------------------------------------------------------------------------------

ERRORS = (TypeError, ValueError, RuntimeError)


@contextmanager
def refused(
    name: str, kinds: type[Exception] | tuple[type[Exception], ...] = ERRORS
) -> Iterator[None]:
    """Expects an error that names the argument, what was expected, and what it got instead."""
    with pytest.raises(kinds) as raised:
        yield
    message = str(raised.value)
    assert type(raised.value) in (TypeError, ValueError, RuntimeError), type(raised.value)
    assert re.search(rf"\b{re.escape(name)}\b[^:]*: expected .*, got ", message, re.S), message
