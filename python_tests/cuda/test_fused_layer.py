"""gemm_lotr on a Hopper GPU: the strategy FUSED of a layer's operators, against float64. Once on a CPU with another
strategy, which shows that the checks can pass."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lotr_ext.ops import BETA

FUSED = 2  # csrc/torch/check.h
CLOSE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 64, 72, 16), (300, 328, 200, 11), (1000, 776, 1032, 128), (2048, 4096, 4096, 16)]  # M, N, K, r


def random(device: str, dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(*size, device=device).to(dtype)


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error < CLOSE[got.dtype], f"relative error {error:.2g}"


def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, u: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
    """y = x W^T + bias + u F^T in one launch; skips where the build or the GPU has none."""
    B, core = F.new_empty(len(F), 1), F.new_empty(F.shape[1], 1)  # not read beside F
    try:
        return torch.ops.lotr.layer_forward(x, weight, bias, None, B, core, 1.0, FUSED, u, F)[0]
    except RuntimeError as error:
        if "in a build without sm_90a" in str(error) or "device: expected compute capability 9.0" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("m, n, k, r", SHAPES)
def test_forward(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    x, weight, bias = random("cuda", dtype, m, k), random("cuda", dtype, n, k) / k**0.5, random("cuda", dtype, n)
    u, F = random("cuda", dtype, m, r), random("cuda", dtype, n, r)
    y = fused(x, weight, bias, u, F)
    check(y, x.double() @ weight.double().T + bias.double() + u.double() @ F.double().T)
    for _ in range(20):
        assert torch.equal(fused(x, weight, bias, u, F), y), "other bits"


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
    """The backward is fused too: its launch is that of the forward, with W as it lies."""
    fused(*(random("cuda", dtype, *size) for size in ((m, k), (n, k), (n,), (m, r), (n, r))))
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        check_layer("cuda", dtype, FUSED, m, n, k, r)
    assert sum("gemm_lotr" in event.name for event in profiled.events()) == 2


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_layer_cpu(dtype: torch.dtype) -> None:
    check_layer("cpu", dtype, BETA, *SHAPES[1])


def test_graph() -> None:
    """A captured launch, replayed beside launches in another stream."""
    x, weight, u, F = (random("cuda", torch.bfloat16, *size) for size in ((700, 512), (768, 512), (700, 16), (768, 16)))
    want = fused(x, weight, None, u, F)
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        y = fused(x, weight, None, u, F)
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(other):
            beside = fused(x, weight, None, u, F)
    torch.cuda.synchronize()
    assert torch.equal(y, want) and torch.equal(beside, want)
