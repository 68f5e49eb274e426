"""Checks of the fused strategy on a GPU. Each runs as its own program, so that a kernel that hangs ends with its process:

python -m bench.gpu.fused_checks numbers [--device cpu --strategy beta]

python_tests/cuda/test_fused_layer.py runs them all, under a watchdog.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from lotr_ext import LoTRFactors, LoTRLinear, explain

REPLAYS = 100_000
SIZES = [(300, 136, 264, 11), (128, 64, 64, 1), (1111, 520, 1000, 16), (513, 264, 776, 50), (260, 1032, 136, 100)]


def adapted(m: int, k: int, n: int, r: int, device: str, strategy: str, bias: bool = True) -> tuple[LoTRLinear, Tensor, Tensor]:
    """A layer with values everywhere, x [m, k] and g [m, n], in bfloat16 beside float32 factors."""
    torch.manual_seed(m)
    factors = LoTRFactors(k, n, r, device=device, dtype=torch.float32)
    layer = LoTRLinear(k, n, factors=factors, bias=bias, device=device, dtype=torch.bfloat16)
    layer.strategy = strategy
    torch.nn.init.normal_(layer.core)
    x = torch.randn(m, k, device=device).bfloat16().requires_grad_()
    found = explain(layer, x)
    assert found.strategy == strategy, found
    return layer, x, torch.randn(m, n, device=device).bfloat16()


def step(layer: LoTRLinear, x: Tensor, g: Tensor) -> list[Tensor]:
    """y and all gradients."""
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.factors.A, layer.factors.B, layer.core], g)]


def truth(layer: LoTRLinear, x: Tensor, g: Tensor) -> list[Tensor]:
    """The same in float64, by torch's own products."""
    x, A, B, core = (t.detach().double().requires_grad_() for t in (x, layer.factors.A, layer.factors.B, layer.core))
    y = x @ layer.weight.double().T + layer.scaling * (x @ A @ core) @ B.T
    y = y if layer.bias is None else y + layer.bias.double()
    return [y, *torch.autograd.grad(y, [x, A, B, core], g.double())]


def far(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]


def numbers(device: str, strategy: str) -> None:
    """No farther from float64 than twice the two_pass strategy; the same bits again; with a bias and without."""
    for (m, k, n, r), bias in itertools.product(SIZES, (True, False)):
        layer, x, g = adapted(m, k, n, r, device, strategy, bias)
        first, want = step(layer, x, g), truth(layer, x, g)
        assert all(torch.equal(a, b) for a, b in zip(first, step(layer, x, g))), "other bits"
        layer.strategy = "two_pass"
        for error, usual in zip(far(first, want), far(step(layer, x, g), want)):
            assert error <= 2 * usual + 1e-3, f"{m, k, n, r, bias}: {error} against {usual}"


def gradients(device: str, strategy: str) -> None:
    """What is not asked for is not made; a g whose rows lie badly takes another way; three dimensions."""
    layer, x, g = adapted(384, 136, 264, 16, device, strategy)
    want = step(layer, x, g)
    for got, index in ((torch.autograd.grad(layer(x), [layer.core], g)[0], 4), (torch.autograd.grad(layer(x), [x], g)[0], 1)):
        assert far([got], [want[index].double()])[0] < 1e-2
    spread = torch.randn(1, 264, device=device).bfloat16().expand(384, 264)
    assert max(far(step(layer, x, spread), truth(layer, x, spread))) < 3e-2
    batched = x.detach().view(3, 128, 136).requires_grad_()
    y = layer(batched)
    assert torch.equal(y.view(384, 264), want[0]) and y.is_contiguous()


def workspaces(device: str, strategy: str) -> None:
    """More tokens, fewer, more again on one stream; eight streams at once; a graph beside them."""
    layers = [adapted(m, 264, 392, 16, device, strategy) for m in (512, 130, 2000, 300, 1024, 129, 900, 260)]
    want = [[t.clone() for t in step(*one)] for one in layers]
    streams, beside = [torch.cuda.Stream() for _ in layers], torch.cuda.Stream()
    graph, made = captured(*layers[0])
    for turn in range(20):
        found = []
        for t in made:
            t.detach().zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(beside):
            graph.replay()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(step(*layers[(i + turn) % len(layers)]))
        torch.cuda.synchronize()
        for i, got in enumerate(found):
            assert all(torch.equal(a, b) for a, b in zip(got, want[(i + turn) % len(layers)])), f"turn {turn}, stream {i}"
        assert all(torch.equal(a, b) for a, b in zip(made, want[0])), f"turn {turn}, graph"


def captured(layer: LoTRLinear, x: Tensor, g: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # as torch asks: warm up off the default stream
        step(layer, x, g)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step(layer, x, g)
    return graph, made


def replays(device: str, strategy: str) -> None:
    """100,000 replays of a graph without a hang, right at the end, with new values in the same memory."""
    layer, x, g = adapted(300, 136, 264, 16, device, strategy)
    graph, made = captured(layer, x, g)
    for i in range(REPLAYS):
        graph.replay()
        if i % 1000 == 0:
            with torch.no_grad():
                x.normal_()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(made, step(layer, x, g)))


def occupied(device: str, strategy: str) -> None:
    """Beside a kernel that holds much of the GPU: fewer blocks run at a time than were launched."""
    layer, x, g = adapted(4096, 520, 1032, 16, device, strategy)
    want = [t.clone() for t in step(layer, x, g)]
    busy, other = torch.randn(8192, 8192, device=device), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(other):
            busy.sin_()
            torch.mm(busy, busy)
        got = step(layer, x, g)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    torch.cuda.synchronize()


def tuned(device: str, strategy: str) -> None:
    """The tuner times it beside the others."""
    from lotr_ext import tune

    layer, _, _ = adapted(2048, 1024, 1024, 16, device, strategy)
    layer.strategy = None
    for problem, answer in tune(layer, 2048, again=True).items():
        print(problem, answer)
        assert strategy in answer.seconds


def refused(device: str, strategy: str) -> None:
    """The operator by itself: it refuses what it cannot run before anything runs."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    usual = {"x": normal(300, 136), "weight": normal(264, 136), "bias": None, "At": normal(16, 136), "F": normal(264, 16)}
    backward = {"x": normal(300, 264), "At": normal(16, 264), "F": normal(136, 16), "backward": True}
    cases: list[tuple[dict, str]] = [
        ({"x": normal(300, 140)[:, :136]}, "x: expected a row stride that is a multiple of 8 and at least 136, got 140"),
        ({"weight": normal(264, 137)[:, :136]}, "W: expected a row stride that is a multiple of 8 and at least 136, got 137"),
        ({"At": normal(129, 136), "F": normal(264, 136)[:, :129]}, "r: expected 1 to 128, got 129"),
        ({"u_forward": normal(300, 16)}, "u_forward and Q: expected both or none, got one"),
        ({**backward, "bias": normal(136)}, "bias: expected None in the backward pass, got a tensor"),
    ]
    for change, text in cases:
        try:
            torch.ops.lotr.gemm_lotr(**{**usual, "backward": False, **change})
        except RuntimeError as error:
            assert f"lotr::gemm_lotr: {text}" in str(error), error
        else:
            raise AssertionError(f"not refused: {text}")
    torch.ops.lotr.gemm_lotr(**usual, backward=False)


def hang(device: str, strategy: str) -> None:
    """What the watchdog is for."""
    while True:
        pass


CHECKS = {f.__name__: f for f in (numbers, gradients, workspaces, replays, occupied, tuned, refused, hang)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--strategy", default="fused")
    options = parser.parse_args()
    CHECKS[options.check](options.device, options.strategy)
