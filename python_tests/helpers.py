"""Shared by the tests: comparisons, tensors surrounded by NaN, errors that name an argument."""

import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OLD_FILES = ROOT / "python_tests" / "data" / "bd4494a"  # adapters that lotr_ext 0.1.0 saved
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
# What operators support: a dtype of x, and one of the factors.
DTYPE_PAIRS = [*((t, t) for t in DTYPES), *((t, torch.float32) for t in HALVES)]

# The unit roundoff of a result.
ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}
# The bound of a layer's relative error, over all of its operations.
CLOSE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 4e-2, torch.float16: 6e-3}
# The bound of the error of a long sum in this dtype, relative to the sum of absolute products.
SUM_ERROR = {torch.float32: 1e-6, torch.float64: 2e-15}


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over tokens and layers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_python(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments. `options` go to subprocess.run."""
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, **options
    )


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
    return max((relative(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)


class Exact(NamedTuple):
    """A result in float64, and how far from it rounding may move an element.

    Attributes:
        value: The result.
        size: The sum of the absolute products of each element.
        roundings: How many values are rounded to the result's dtype on the way to an element. If it
            is 1, only the element itself is rounded, and the bound is relative to its value.
            Otherwise the bound is relative to its size, because rounded terms may cancel.
    """

    value: Tensor
    size: Tensor
    roundings: int = 1


def mismatch(actual: Tensor, exact: Exact) -> str | None:
    """Returns what is wrong with a result, beyond rounding. None if nothing is."""
    truth = exact.value
    if actual.shape != truth.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    scale = truth.abs() if exact.roundings == 1 else exact.size
    allowed = 1.001 * exact.roundings * ROUNDOFF[actual.dtype] * scale
    allowed = allowed + SUM_ERROR[sums_dtype(actual.dtype)] * exact.size + 1e-300
    if actual.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # half the distance of subnormal numbers
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
    # Not a subclass, such as the NotImplementedError of an operator without a kernel.
    assert type(raised.value) in ERRORS, type(raised.value)
    assert re.search(rf"\b{re.escape(name)}\b[^:]*: expected .*, got ", message, re.S), message
