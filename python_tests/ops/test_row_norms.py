"""c_n = |W_n + F_n A^T| and W A on a CPU, against float64. Each instruction set, odd sizes and threads: test_cpu_kernels.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lotr_ext import ops
from lotr_ext.ops import composite
from nets import relative

S = 0.7
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-3, torch.float16: 1e-4}  # A is rounded to W's dtype


@pytest.fixture(params=CLOSE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def operands(n: int, k: int, r_in: int, r_out: int, dtype: torch.dtype, factors: torch.dtype | None = None) -> list[Tensor]:
    """W, |W_n|^2, A, B, core."""
    weight = torch.randn(n, k).to(dtype)
    square = weight.to(ops.accumulate_dtype(dtype)).square().sum(1)
    sizes = ((k, r_in), (n, r_out), (r_in, r_out))
    return [weight, square, *(torch.randn(*size).div(size[1] ** 0.5).to(factors or dtype) for size in sizes)]


def truth(weight: Tensor, A: Tensor, B: Tensor, core: Tensor) -> Tensor:
    weight, A, B, core = (t.double() for t in (weight, A, B, core))
    return (weight + S * B @ core.T @ A.T).norm(dim=1)


@pytest.mark.parametrize("shape", [(768, 300, 16, 16), (33, 70, 5, 3), (1, 1, 1, 1), (130, 9, 64, 7), (7, 4, 33, 40)], ids=str)
def test_values(shape, dtype):
    weight, square, A, B, core = operands(*shape, dtype)
    norm, WA = ops.row_norms(weight, square, None, A, B, core, S)
    assert norm.dtype == WA.dtype == ops.accumulate_dtype(dtype)
    assert relative(norm, truth(weight, A, B, core)) < CLOSE[dtype]
    assert relative(WA, weight.double() @ A.double()) < CLOSE[dtype]
    again, same = ops.row_norms(weight, square, WA, A, B, core, S)
    assert same is WA and torch.equal(again, norm)
    close = composite.row_norms(square, WA, A, B, core, S, lambda: weight)
    assert relative(norm, close.double()) < max(CLOSE[dtype], 1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors_beside_a_half_weight(half):
    weight, square, A, B, core = operands(65, 80, 12, 9, half, torch.float32)
    norm, WA = ops.row_norms(weight, square, None, A, B, core, S)
    assert relative(norm, truth(weight, A, B, core)) < CLOSE[half]
    assert torch.equal(WA, ops.row_norms(weight, square, None, A.to(half).float(), B, core, S)[1])


def test_rows_that_nearly_cancel_are_measured(dtype):
    """Half of the rows are close to -F_n A^T: a difference of squares has no digits left there."""
    weight, square, A, B, core = operands(40, 96, 8, 8, dtype)
    delta = S * B.double() @ core.double().T @ A.double().T
    weight[::2] = (-delta * 1.01)[::2].to(dtype)
    square = weight.to(square.dtype).square().sum(1)
    norm, _ = ops.row_norms(weight, square, None, A, B, core, S)
    assert relative(norm[::2], truth(weight, A, B, core)[::2]) < 20 * CLOSE[dtype]


def test_rows_shorter_than_the_rank_are_measured():
    """The terms of F_n A^T nearly cancel, not W_n: the difference of squares has rounded their squares."""
    large = torch.linspace(1, 100, 1000)
    weight, A, B, core = torch.ones(1000, 1), torch.tensor([[1.0, 0.7]]), torch.stack([0.7 * large, -large], 1), torch.eye(2)
    norm, _ = ops.row_norms(weight, weight[:, 0], None, A, B, core, S)
    assert ((norm - truth(weight, A, B, core)).abs() <= 4 * torch.finfo(torch.float32).eps * (1 + 2 * S * large)).all()


def test_rows_of_zeros_and_of_no_numbers(dtype):
    weight, square, A, B, core = operands(6, 20, 3, 3, dtype)
    weight[1], B[1], weight[4] = 0, 0, float("nan")
    square = weight.to(square.dtype).square().sum(1)
    norm, _ = ops.row_norms(weight, square, None, A, B, core, S)
    assert norm[1] == torch.finfo(norm.dtype).tiny ** 0.5 and norm[4].isnan() and norm[[0, 2, 3, 5]].isfinite().all()


def test_layouts(dtype):
    weight, square, A, B, core = operands(26, 30, 20, 17, dtype)
    wide = torch.zeros(40, 64, dtype=square.dtype)
    want, WA = ops.row_norms(weight, square, None, A, B, core, S)
    strided = [weight.t().contiguous().t(), A.t().contiguous().t(), B.t().contiguous().t(), core.t().contiguous().t()]
    squares = torch.stack([square, square], 1)[:, 1]
    got, of_W = ops.row_norms(strided[0], squares, None, *strided[1:], S)
    assert relative(got, want.double()) < 1e-6 and relative(of_W, WA.double()) < 1e-6
    for place in (wide[:26, 3:23], wide[:26, ::3][:, :20], wide.t()[:26, :20]):
        place.copy_(WA)
        assert relative(ops.row_norms(weight, square, place, A, B, core, S)[0], want.double()) < 1e-6


def test_bad_input_is_named():
    good = operands(6, 8, 3, 2, torch.float32)
    good.insert(2, good[0] @ good[2])
    cases = [
        (0, torch.randn(6, 8, dtype=torch.float64), "core: expected dtype torch.float64, got torch.float32"),
        (0, torch.randn(6), r"weight: expected a 2-D tensor \[N, K\]"),
        (0, torch.randn(5, 8), "weight: expected size 6 in dimension 0"),
        (0, torch.randn(6, 7), "weight: expected size 8 in dimension 1"),
        (1, torch.randn(5), "square: expected size 6 in dimension 0"),
        (1, torch.randn(6).double(), "square: expected dtype torch.float32"),
        (2, torch.randn(6, 4), "WA: expected size 3 in dimension 1"),
        (2, torch.randn(6, 3).half(), "WA: expected dtype torch.float32"),
        (3, torch.randn(8, 4), "A: expected size 3 in dimension 1"),
        (4, torch.randn(6, 3), "core: expected size 3 in dimension 1"),
        (5, torch.randn(3), "core: expected a 2-D tensor"),
        (5, torch.randn(3, 2, requires_grad=True), "expected tensors that need no gradient"),
    ]
    for index, bad, message in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.row_norms(*good[:index], bad, *good[index + 1 :], S)
    with pytest.raises(RuntimeError, match="scaling: expected a finite number"):
        ops.row_norms(*good, float("inf"))
