"""gemm_lotr on a Hopper GPU: the operator, and the strategy FUSED of a layer, against float64. Once on a CPU with another
strategy, which shows that the checks can pass."""

from __future__ import annotations

import pytest
import torch

from lotr_ext.ops import BETA

FUSED = 2  # csrc/torch/check.h
CLOSE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 64, 72, 16), (300, 328, 200, 11), (1000, 776, 1032, 128), (2048, 4096, 4096, 16)]  # M, N, K, r


def random(device: str, dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(*size, device=device).to(dtype)


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error < CLOSE[got.dtype], f"relative error {error:.2g}"


def fused_or_skip(x: torch.Tensor, weight: torch.Tensor, r: int, backward: bool = False) -> None:
    if not hasattr(torch.ops.lotr, "gemm_lotr"):
        pytest.skip("this build has no code for sm_90a")
    if reason := torch.ops.lotr.gemm_lotr_refusal(x, weight, r, backward):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("m, n, k, r", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_operator(m: int, n: int, k: int, r: int, dtype: torch.dtype, backward: bool) -> None:
    x, weight = random("cuda", dtype, m, n if backward else k), random("cuda", dtype, n, k) / k**0.5
    u, F = random("cuda", dtype, m, r), random("cuda", dtype, k if backward else n, r)
    bias = None if backward else random("cuda", dtype, n)
    fused_or_skip(x, weight, r, backward)
    want = x.double() @ (weight.double() if backward else weight.double().T) + u.double() @ F.double().T
    y = torch.ops.lotr.gemm_lotr(x, weight, bias, u, F, backward)
    check(y, want if bias is None else want + bias.double())
    for _ in range(20):
        assert torch.equal(torch.ops.lotr.gemm_lotr(x, weight, bias, u, F, backward), y), "other bits"


def check_layer(device: str, dtype: torch.dtype, strategy: int, m: int, n: int, k: int, r: int) -> None:
    """y, dx, dA, dB and dcore of one layer."""
    x, weight, bias = (random(device, dtype, *size) for size in ((m, k), (n, k), (n,)))
    weight /= k**0.5
    g, s = random(device, dtype, m, n), 0.5
    A, B, core = (random(device, dtype, *size) / size[0] ** 0.5 for size in ((k, r), (n, r), (r, r)))
    y, u, F = torch.ops.lotr.layer_forward(x, weight, bias, A, B, core, s, strategy)
    dx, _, dA, dB, dcore = torch.ops.lotr.layer_backward_(
        g, weight, x, u, A, F, B, core, s, strategy, None, None, None, None, None, True, True
    )
    leaves = [t.double().requires_grad_() for t in (x, A, B, core)]
    wide_x, wide_A, wide_B, wide_core = leaves
    want = wide_x @ weight.double().T + bias.double() + s * wide_x @ wide_A @ wide_core @ wide_B.T
    check(y, want)
    for got, of in zip((dx, dA, dB, dcore), torch.autograd.grad(want, leaves, g.double()), strict=True):
        check(got, of)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("m, n, k, r", SHAPES[1:])
def test_layer(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    fused_or_skip(torch.empty(m, k, device="cuda", dtype=dtype), torch.empty(n, k, device="cuda", dtype=dtype), r)
    check_layer("cuda", dtype, FUSED, m, n, k, r)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_layer_cpu(dtype: torch.dtype) -> None:
    check_layer("cpu", dtype, BETA, *SHAPES[1])


def test_graph() -> None:
    """A captured launch, replayed beside launches in another stream."""
    x, weight, u, F = (random("cuda", torch.bfloat16, *size) for size in ((700, 512), (768, 512), (700, 16), (768, 16)))
    fused_or_skip(x, weight, 16)
    want = torch.ops.lotr.gemm_lotr(x, weight, None, u, F, False)
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        y = torch.ops.lotr.gemm_lotr(x, weight, None, u, F, False)
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(other):
            beside = torch.ops.lotr.gemm_lotr(x, weight, None, u, F, False)
    torch.cuda.synchronize()
    assert torch.equal(y, want) and torch.equal(beside, want)


def test_another_architecture() -> None:
    """The operator itself names the reason."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) == (9, 0) or not hasattr(torch.ops.lotr, "gemm_lotr"):
        pytest.skip("expected code for 90a and a GPU that is no Hopper")
    x = random("cuda", torch.bfloat16, 256, 64)
    said = torch.ops.lotr.gemm_lotr_refusal(x, x[:48], 16, False)
    assert said == f"device: expected compute capability 9.0, got {major}.{minor}"
