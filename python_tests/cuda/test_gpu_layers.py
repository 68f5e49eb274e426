"""Layers, experts, tasks and models on a GPU against float64; compiled, autocast, CUDA graphs."""

import copy
from collections.abc import Callable

import models
import pytest
import torch
import zoo
from contexts import once
from helpers import relative, worst
from layers import KINDS, Net, agree, inputs
from test_experts import OFFS, ROWS, N, S, check, each_task_mode, each_token_mode, make
from test_tasks import INDEX, banked, output, row_by_row
from torch import Tensor, nn

from lotr_ext import lotr_grouped_linear

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
each_dtype = pytest.mark.parametrize("dtype", CLOSE, ids=str)


@each_dtype
@pytest.mark.parametrize("tokens", [3, 700])  # the few-token form, and u for all siblings
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("rows")])
def test_layers(kind: str, tokens: int, dtype: torch.dtype, device: str) -> None:
    """Output and all gradients of half-precision layers with float32 adapters."""
    net = Net(kind, dtype, torch.float32 if dtype != torch.float32 else None).to(device)
    agree(net, once, inputs(tokens, dtype=dtype).to(device), CLOSE[dtype])


@each_dtype
@each_task_mode
@each_token_mode
def test_experts(by_token: bool, tasks: bool, dtype: torch.dtype, device: str) -> None:
    """One expert has no rows, and six rows have no expert."""

    def on_device(**arguments: Tensor | None) -> Tensor:
        operands = {name: t if t is None else t.to(device) for name, t in arguments.items()}
        return lotr_grouped_linear(**operands, offs=OFFS.to(device), scaling=S).cpu()

    check(make(by_token, tasks, dtype), torch.randn(ROWS, N, dtype=dtype), on_device)


def test_tasks(device: str) -> None:
    """Four rows: two have one task, one has another task, and one has none."""
    model = banked("mlp").to(device)
    truth = copy.deepcopy(model).to("cpu", torch.float64)
    x = zoo.inputs("mlp", rows=4)
    y = output(model, x.to(device), INDEX.to(device))
    assert relative(y.cpu(), row_by_row(truth, x.double())) < 1e-5


# ---- models --------------------------------------------------------------------------------------


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).float().square().mean().backward()
    return [p.grad.cpu() for p in models.adapter_parameters(model)]


def definition(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the gradients by the formula, in float64."""
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    plain = zoo.net("mlp").double()
    parameters = models.adapter_parameters(exact)
    y = torch.func.functional_call(plain, models.written_out(exact, plain), (x.double().cpu(),))
    return list(torch.autograd.grad(y.square().mean(), parameters))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("tokens", [40, 2100])
def test_compiled_model(mode: str, tokens: int, device: str) -> None:
    """reduce-overhead uses torch's CUDA graphs."""
    torch.compiler.reset()
    model = models.trained("mlp").to(device)
    settings = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, fullgraph=True, **settings)
    for _ in range(3):  # a graph is captured at the second call
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, tokens // 2, zoo.WIDTH, device=device)
        assert worst(gradients(model, compiled, x), definition(model, x)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    model = models.trained("mlp").to(device)
    x = torch.randn(2, 600, zoo.WIDTH, device=device)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return model(x)

    assert worst(gradients(model, call, x), definition(model, x)) < CLOSE[dtype]


class TrainingRun:
    """A model, its optimizer and its batch buffer. A graph captures `step`."""

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).cuda()
        self.parameters = models.adapter_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, capturable=True)
        self.x = torch.zeros(2, 150, zoo.WIDTH, device="cuda")
        self.loss = torch.zeros((), device="cuda")

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())


def test_a_training_step_is_captured_and_replayed() -> None:
    """Replays of forward, backward and AdamW on new batches agree with eager steps."""
    start = models.trained("mlp")
    plain = TrainingRun(start)
    graphed = TrainingRun(start)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch requires a warm-up off the default stream
        for _ in range(3):
            graphed.step()
            plain.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graphed.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        graphed.step()
    for _ in range(4):
        graphed.x.normal_()
        plain.x.copy_(graphed.x)
        graph.replay()
        plain.step()
        assert relative(graphed.loss, plain.loss) < 1e-4
    assert worst(graphed.parameters, plain.parameters) < 1e-4
