"""Compiled and exported layers.

Graphs of torch.compile contain our operators. Graphs of torch.export and ONNX contain the PyTorch
fallback.
"""

import io
from functools import partial

import pytest
import torch
from contexts import CONTEXTS, no_grad_first, once
from helpers import CLOSE, relative, worst
from layers import (
    K,
    Net,
    agree,
    inputs,
    loss,
    siblings,
    sides,
)
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRLinear, disabled

# ---- compiled ------------------------------------------------------------------------------------

GRAPH_KINDS = ("siblings", "two Bs", "wrapped", "function", "rows")


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


def compiled(net: Net, backend: str = "aot_eager", **options: bool) -> Net:
    """Compiles a net. Its truth, a copy, is not compiled."""
    net.compile(fullgraph=True, backend=backend, **options)
    return net


@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_compile(kind: str) -> None:
    """One graph with gradients and one without, also for another number of tokens."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    net = compiled(Net(kind), dynamic=True)
    # Not 12 tokens: that is K, and torch.compile would treat both sizes of x as one.
    for tokens in (30, 18):
        for context in (once, no_grad_first):
            agree(net, context, inputs(tokens))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("form", ["shared"], indirect=True)
def test_compiled_graphs_contain_our_operators(form: str) -> None:
    backend = AotEagerAndRecordGraphs()
    net = torch.compile(Net("siblings"), fullgraph=True, backend=backend)
    loss(net(inputs(6))).backward()
    forward = str(backend.fw_graphs[0].graph)
    assert "lotr.shrink" in forward
    assert "lotr.layer_forward" in forward
    backward = str(backend.bw_graphs[0].graph)
    assert "lotr.layer_backward_" in backward
    assert "lotr.shrink_backward_" in backward


@pytest.mark.parametrize("where", ["inside", "outside", "each layer"])
def test_compile_and_checkpoint(where: str) -> None:
    net = Net("siblings")
    if where == "inside":
        net.wire = lambda call, x: checkpoint(partial(siblings, call), x, use_reentrant=False)
    for module in net.layers if where == "each layer" else [net]:
        module.compile(fullgraph=True, backend="aot_eager")
    agree(net, once if where == "inside" else CONTEXTS["checkpoint"], inputs(6))


@pytest.mark.parametrize("form", ["shared"], indirect=True)
@pytest.mark.parametrize("kind", ["siblings", "rows of siblings"])
def test_compiled_autograd(kind: str, form: str) -> None:
    """Dynamo traces the backward, which then runs as the PyTorch fallback."""
    ours, truth = sides(Net(kind), inputs(6))
    y = ours()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss(y).backward()
    assert worst([leaf.grad for leaf in ours.targets], once(truth)[1:]) < 1e-10


def test_compile_with_dropout() -> None:
    """The compiled backward uses the same mask as the forward."""
    agree(compiled(Net("siblings", dropout=0.4)), once, inputs(6))


def test_compile_with_autocast() -> None:
    net = compiled(Net("siblings", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        agree(net, once, inputs(60, dtype=torch.float32), CLOSE[torch.bfloat16])


def test_a_compiled_model_can_be_disabled() -> None:
    net = nn.Sequential(LoTRLinear(K, K, 2), nn.Tanh())
    x = inputs(6, dtype=torch.float32)
    nn.init.normal_(net[0].core)
    compiled_net = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        assert relative(compiled_net(x), net(x)) < 1e-6
        with disabled(net):
            assert relative(compiled_net(x), torch.tanh(net[0].compute_base(x))) < 1e-6


@pytest.mark.parametrize("kind", ["siblings", "wrapped"])
def test_export(kind: str) -> None:
    net = Net(kind)
    program = torch.export.export(net, (inputs(6),))
    assert "lotr" not in str(program.graph)
    assert relative(program.module()(inputs(6)), net(inputs(6))) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["siblings", "conv1d", "wrapped"])
def test_onnx(kind: str) -> None:
    """onnx's reference evaluator computes the same from an exported file."""
    onnx_reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    net = Net(kind, torch.float32).eval()
    x = inputs(6, dtype=torch.float32)
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    (y,) = onnx_reference.ReferenceEvaluator(file.getvalue()).run(None, {"x": x.numpy()})
    assert relative(torch.from_numpy(y), net(x)) < 1e-5


def test_inductor() -> None:
    net = compiled(Net("siblings", torch.float32), backend="inductor")
    agree(net, once, inputs(6, dtype=torch.float32), 1e-5)
