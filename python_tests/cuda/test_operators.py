"""The kernel tests of python_tests/kernels on a GPU: same shapes, poison and float64 truth; and once on the CPU operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.gpu.torch_library import TorchLibrary
from csrc.simt.checks.arrays import TYPES
from csrc.simt.checks.cases import KERNELS
from csrc.simt.checks.shapes import SHAPES

# without the unfolded form's inner part, what runs on Hopper alone (test_fused_layer.py), and a part of layer_forward
OPERATORS = [name for name in KERNELS if name not in ("shrink_core", "fold_transposed", "expand_scaled")]


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


def check_layer_with_a_scale(device: str, dtype: torch.dtype, close: float, m: int, strategy: int) -> None:
    torch.manual_seed(0)
    k, n, r, s = 136, 264, 24, 0.5
    x, weight, bias = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (n,)))
    A, B, core, scale = (torch.randn(*size, device=device) for size in ((k, r), (n, r), (r, r), (n,)))
    y, *_ = torch.ops.lotr.layer_forward(x, weight, bias, A, B, core, s, strategy, None, None, 0.0, None, scale)
    wide_x, wide_weight, wide_bias, A, B, core, scale = (t.double() for t in (x, weight, bias, A, B, core, scale))
    want = wide_bias + scale * (wide_x @ wide_weight.T + s * wide_x @ A @ core @ B.T)
    assert ((y.double() - want).norm() / want.norm()).item() < close


SCALED = [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)]


@pytest.mark.parametrize("m, strategy", [(1000, 0), (6, 4)])
@pytest.mark.parametrize("dtype, close", SCALED)
def test_layer_with_a_scale(backend: TorchLibrary, dtype: torch.dtype, close: float, m: int, strategy: int) -> None:
    check_layer_with_a_scale("cuda", dtype, close, m, strategy)


@pytest.mark.parametrize("m, strategy", [(1000, 0), (6, 4)])
@pytest.mark.parametrize("dtype, close", SCALED)
def test_layer_with_a_scale_cpu(dtype: torch.dtype, close: float, m: int, strategy: int) -> None:
    check_layer_with_a_scale("cpu", dtype, close, m, strategy)
