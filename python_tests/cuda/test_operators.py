"""The kernel tests of python_tests/kernels on a GPU: same shapes, poison and float64 truth; and once on the CPU operators."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import TYPES
from cases import KERNELS
from shapes import SHAPES
from torch_backend import TorchLibrary

# without small_forward_'s inner part, and what runs on Hopper alone (test_fused_layer.py)
OPERATORS = [name for name in KERNELS if name not in ("shrink_core", "fold_transposed")]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", OPERATORS)
def test_operator(backend: TorchLibrary, kernel: str, kind: str) -> None:
    for shape in SHAPES:
        problem = KERNELS[kernel](shape, kind)
        first = problem.run(backend)
        problem.check(first)
        for name, a in problem.run(backend).items():
            assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(first[name]).tobytes(), f"{name}: other bits"


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", OPERATORS)
def test_operator_cpu(kernel: str, kind: str) -> None:
    """The same on the CPU operators: what runs here without a GPU, and proof that the tests can pass and fail."""
    backend = TorchLibrary("cpu")
    for shape in SHAPES[::3]:
        problem = KERNELS[kernel](shape, kind)
        problem.check(problem.run(backend))
