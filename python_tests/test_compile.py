"""Compiled and exported layers: torch.compile with our operators in the graph, torch.export and ONNX by torch's products."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import relative, worst
from layers import (
    K,
    Net,
    Side,
    check_masks,
    inputs,
    linear_with_dropout,
    loss,
    no_grad_first,
    once,
    sides,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRLinear, disabled

# ---- compiled --------------------------------------------------------------------------------------------------------

GRAPH_KINDS = ("siblings", "two Bs", "wrapped", "function", "rows")


@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_compile(kind: str) -> None:
    """One graph, with our operators, forward and backward; no recompilation for another number of tokens."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    net = Net(kind)
    compiled = copy.copy(net)
    compiled.forward = torch.compile(net.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (30, 18):  # not the width, with which torch would take the size of x to be equal
        for context in (once, no_grad_first):
            assert (
                worst(
                    *(
                        context(s)
                        for s in (
                            Side(compiled, inputs(tokens), False),
                            Side(net, inputs(tokens), True),
                        )
                    )
                )
                < 1e-10
            )
    assert counters["stats"]["unique_graphs"] == 2  # with gradients, and without


def operators_of(net: Net, x: Tensor) -> list[set[str]]:
    """Our operators in the forward and in the backward graph."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    seen: list[set[str]] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        seen.append(
            {
                word
                for n in graph.graph.nodes
                for word in str((n.target, n.args)).split("'")
                if "lotr." in word
            }
        )
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    loss(torch.compile(net, fullgraph=True, backend=backend)(x)).backward()
    return seen


def test_compiled_graphs_contain_our_operators(shared: None) -> None:
    forward, backward = ("".join(found) for found in operators_of(Net("siblings"), inputs(6)))
    assert "lotr.shrink" in forward and "lotr.layer_forward" in forward
    assert "lotr.layer_backward_" in backward and "lotr.shrink_backward_" in backward


@pytest.mark.parametrize("where", ["inside", "outside", "each layer"])
def test_compile_and_checkpoint(where: str) -> None:
    torch._dynamo.reset()
    net = Net("siblings")
    compiled = copy.copy(net)
    run = partial(torch.compile, fullgraph=where != "each layer", backend="aot_eager")
    if where == "inside":
        compiled.forward = run(lambda x: checkpoint(net, x, use_reentrant=False))
    elif where == "outside":
        graph = run(net.forward)
        compiled.forward = lambda x: checkpoint(graph, x, use_reentrant=False)
    else:
        layers = [run(layer) for layer in net.layers]
        compiled.forward = lambda x: net.wire(lambda i, h: layers[i](h), x)
    assert (
        worst(*(once(s) for s in (Side(compiled, inputs(6), False), Side(net, inputs(6), True))))
        < 1e-10
    )


@pytest.mark.parametrize("kind", ["siblings", "rows of siblings"])
def test_compiled_autograd(kind: str, shared: None) -> None:
    """Dynamo traces the backward, which then consists of PyTorch operations."""
    torch._dynamo.reset()
    ours, truth = sides(Net(kind), inputs(6))
    with ours.net.request():
        y = ours()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss(y).backward()
    assert worst([leaf.grad for leaf in ours.wanted], once(truth)[1:]) < 1e-10


def test_compile_with_dropout_and_autocast() -> None:
    """The compiled backward uses the forward's mask: without a bias the layer is linear in x, so <dx, x> = <y, g>."""
    torch._dynamo.reset()
    layer = linear_with_dropout()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_masks(compiled, layer)
    net = Net("siblings", torch.float32)
    graph = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            relative(
                graph(inputs(60, dtype=torch.float32)), net(inputs(60, dtype=torch.float32)).float()
            )
            < 4e-2
        )


def test_a_compiled_model_can_be_disabled() -> None:
    torch._dynamo.reset()
    net, x = nn.Sequential(LoTRLinear(K, K, 2), nn.Tanh()), inputs(6, dtype=torch.float32)
    nn.init.normal_(net[0].core)
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        assert relative(compiled(x), net(x)) < 1e-6
        with disabled(net):
            assert relative(compiled(x), torch.tanh(net[0].base(x))) < 1e-6


def test_export() -> None:
    """By the formula: an exported program has none of our operators."""
    for kind in ("siblings", "wrapped"):
        net = Net(kind)
        program = torch.export.export(net, (inputs(6),))
        assert (
            "lotr" not in str(program.graph)
            and relative(program.module()(inputs(6)), net(inputs(6))) < 1e-12
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["siblings", "conv1d", "wrapped"])
def test_onnx(kind: str) -> None:
    """An exported file computes the same in onnx's own evaluator."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    net, file, x = Net(kind, torch.float32).eval(), io.BytesIO(), inputs(6, dtype=torch.float32)
    torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    (y,) = ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, {"x": x.numpy()})
    assert relative(torch.from_numpy(y), net(x)) < 1e-5


def test_inductor() -> None:
    torch._dynamo.reset()
    net, x = Net("siblings", torch.float32), inputs(6, dtype=torch.float32)
    graph = torch.compile(net, fullgraph=True)
    a, b = (
        torch.autograd.grad(loss(f(x)), [p for p in net.parameters() if p.requires_grad])
        for f in (graph, net)
    )
    assert worst(a, b) < 1e-5
