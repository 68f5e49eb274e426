"""An adapted model on a GPU: compiled, and as one CUDA graph of forward, backward and optimizer. Run on the CPU the same way,
without the graph, by the test whose name ends in _cpu: what it compares would be noticed there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from stacks import D, Stack, definition, make, trained_grads
from torch import Tensor

from nets import relative

STEPS = 4


def errors(model: Stack, call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The worst error of call's gradients against the definition in float64."""
    want = definition(model)
    want(x.double()).square().mean().backward()
    model.zero_grad()
    call(x).float().square().mean().backward()
    got, wanted = trained_grads(model), trained_grads(want)
    return max(relative(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the latter: CUDA graphs of torch's own making
def test_a_compiled_model_has_the_gradients_of_the_definition(mode: str, checkpointing: bool) -> None:
    torch.compiler.reset()
    model = make(2, reentrant=False if checkpointing else None).cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for tokens in (
        40,
        40,
        300,
        2100,
    ):  # two of one length, so that a graph is captured; above 1024 the order of products is another
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, tokens // 2, D, device="cuda")
        assert errors(model, compiled, x) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiled_model_under_autocast(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = make(2).cuda()
    compiled = torch.compile(model, fullgraph=True)

    def call(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def cast(x: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype):
                return run(x)

        return cast

    x = torch.randn(2, 600, D, device="cuda")
    assert errors(model, call(compiled), x) < 2.5 * errors(model, call(model), x) + 1e-3


class Trained:
    """A model, its optimizer and where its batches lie; `step` is all that a graph captures."""

    def __init__(self, model: Stack, device: str, dropout: float = 0.0) -> None:
        self.model = copy.deepcopy(model).to(device).train()
        for module in self.model.modules():
            if hasattr(module, "dropout"):
                module.dropout = dropout
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=device == "cuda")
        self.x = torch.zeros(2, 150, D, device=device)
        self.loss = torch.zeros((), device=device)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]


def batches(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 150, D, generator=generator).to(device) for _ in range(STEPS)]


def run(trained: Trained, step: Callable[[], None]) -> list[float]:
    """The losses of one step a batch, which the second of two equal runs must repeat."""
    losses = []
    for x in batches(trained.x.device.type):
        trained.x.copy_(x)
        step()
        losses.append(trained.loss.item())
    return losses


def compare(one: Trained, other: Trained, losses: tuple[list[float], list[float]]) -> None:
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) == STEPS
    for a, b in zip(one.values(), other.values(), strict=True):
        assert relative(a, b.double()) < 1e-4


def test_a_whole_step_captured_and_replayed() -> None:
    """Forward in its scope, the sums of the shared gradients, AdamW: replayed on new batches, against steps without a graph."""
    start = make(2)
    plain, graphed = Trained(start, "cuda"), Trained(start, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks: warm up off the default stream
        for _ in range(3):
            graphed.step()
            plain.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graphed.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        graphed.step()
    compare(plain, graphed, (run(plain, plain.step), run(graphed, graph.replay)))


def test_a_captured_step_with_dropout_draws_a_new_mask_at_each_replay() -> None:
    trained = Trained(make(2), "cuda", dropout=0.5)
    for group in trained.optimizer.param_groups:
        group["lr"] = torch.tensor(0.0, device="cuda")
        group["weight_decay"] = 0.0
    trained.x.normal_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trained.step()
    losses = []
    for _ in range(4):
        graph.replay()
        losses.append(trained.loss.item())
    assert len(set(losses)) == 4


def test_two_equal_runs_agree_and_a_step_left_out_is_noticed_cpu() -> None:
    start = make(2)
    one, other, less = (Trained(start, "cpu") for _ in range(3))
    compare(one, other, (run(one, one.step), run(other, other.step)))
    skipped = iter([False, True, False, False])
    losses = run(less, lambda: None if next(skipped) else less.step())
    with pytest.raises(AssertionError):
        compare(one, less, (run(Trained(start, "cpu"), one.step), losses))
