"""The table of kernels (python_tests/kernels/cases.py) through torch.ops.lotr: the same shapes, poison and float64 truth."""

from __future__ import annotations

import pytest
from arrays import DTYPE
from cases import KERNELS, SHAPES
from torch_backend import TorchBackend

# not by themselves: parts of layer_forward and layer_backward_
OPERATORS = [name for name in KERNELS if name not in ("shrink_core", "expand_fresh", "fold_grad")]


@pytest.mark.parametrize("kind", DTYPE)
@pytest.mark.parametrize("kernel", OPERATORS)
def test_operator(kernel: str, kind: str, device: str) -> None:
    """On a GPU in all shapes, and twice with the same bits; on a CPU in few."""
    backend = TorchBackend(device)
    for shape in SHAPES if device == "cuda" else SHAPES[::6]:
        problem = KERNELS[kernel](shape, kind)
        first = problem.checked(backend)
        assert device == "cpu" or problem.checked(backend) == first, f"{problem.name}: other bits"
