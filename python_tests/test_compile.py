"""Compiled and exported layers.

Graphs of torch.compile contain our operators. Graphs of torch.export and ONNX contain the PyTorch
fallback.
"""

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import CLOSE, relative, worst
from layers import (
    K,
    Net,
    agree,
    inputs,
    loss,
    no_grad_first,
    once,
    sides,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRLinear, disabled

# ---- compiled ------------------------------------------------------------------------------------

GRAPH_KINDS = ("siblings", "two Bs", "wrapped", "function", "rows")


def compiled(net: Net, backend: str = "aot_eager", **options: bool) -> Net:
    """Returns the net with a compiled forward."""
    torch._dynamo.reset()
    other = copy.copy(net)
    other.forward = torch.compile(net.forward, fullgraph=True, backend=backend, **options)
    return other


@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_compile(kind: str) -> None:
    """One graph with gradients and one without, also for another number of tokens."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    net = compiled(Net(kind), dynamic=True)
    # Not the width: torch would take the two sizes of x to be equal.
    for tokens in (30, 18):
        for context in (once, no_grad_first):
            agree(net, context, inputs(tokens))
    assert counters["stats"]["unique_graphs"] == 2


def graphs_of(net: Net, x: Tensor) -> list[str]:
    """Returns the nodes of the compiled forward and of the compiled backward graph as text."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(" ".join(str((node.target, node.args)) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    loss(torch.compile(net, fullgraph=True, backend=backend)(x)).backward()
    return graphs


def test_compiled_graphs_contain_our_operators(shared: None) -> None:
    forward, backward = graphs_of(Net("siblings"), inputs(6))
    assert "lotr.shrink" in forward
    assert "lotr.layer_forward" in forward
    assert "lotr.layer_backward_" in backward
    assert "lotr.shrink_backward_" in backward


@pytest.mark.parametrize("where", ["inside", "outside", "each layer"])
def test_compile_and_checkpoint(where: str) -> None:
    torch._dynamo.reset()
    net = Net("siblings")
    other = copy.copy(net)
    run = partial(torch.compile, fullgraph=where != "each layer", backend="aot_eager")
    if where == "inside":
        other.forward = run(lambda x: checkpoint(net, x, use_reentrant=False))
    elif where == "outside":
        graph = run(net.forward)
        other.forward = lambda x: checkpoint(graph, x, use_reentrant=False)
    else:
        layers = [run(layer) for layer in net.layers]
        other.forward = lambda x: net.wire(lambda i, h: layers[i](h), x)
    agree(other, once, inputs(6))


@pytest.mark.parametrize("kind", ["siblings", "rows of siblings"])
def test_compiled_autograd(kind: str, shared: None) -> None:
    """Dynamo traces the backward, which then runs as the PyTorch fallback."""
    torch._dynamo.reset()
    ours, truth = sides(Net(kind), inputs(6))
    with ours.net.request():
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
    torch._dynamo.reset()
    net = nn.Sequential(LoTRLinear(K, K, 2), nn.Tanh())
    x = inputs(6, dtype=torch.float32)
    nn.init.normal_(net[0].core)
    compiled_net = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        assert relative(compiled_net(x), net(x)) < 1e-6
        with disabled(net):
            assert relative(compiled_net(x), torch.tanh(net[0].base(x))) < 1e-6


@pytest.mark.parametrize("kind", ["siblings", "wrapped"])
def test_export(kind: str) -> None:
    """An exported program contains none of our operators."""
    net = Net(kind)
    program = torch.export.export(net, (inputs(6),))
    assert "lotr" not in str(program.graph)
    assert relative(program.module()(inputs(6)), net(inputs(6))) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["siblings", "conv1d", "wrapped"])
def test_onnx(kind: str) -> None:
    """onnx's reference evaluator computes the same from an exported file."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    net = Net(kind, torch.float32).eval()
    x = inputs(6, dtype=torch.float32)
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    (y,) = ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, {"x": x.numpy()})
    assert relative(torch.from_numpy(y), net(x)) < 1e-5


def test_inductor() -> None:
    net = compiled(Net("siblings", torch.float32), backend="inductor")
    agree(net, once, inputs(6, dtype=torch.float32), 1e-5)
