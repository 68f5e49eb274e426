"""Shared gradients of models that are copied, cast, loaded, changed or used again."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from nets import Boom, Net, Truth, plain, relative

CLOSE = 5e-6  # relative, float32 against float64
CHECKPOINTS = pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])


def test_copies_keep_the_sharing(either_path, net, x):
    truth = Truth(net, x)
    graph = net(x)  # copying must not mind a graph that is alive
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert copied.factors.A is not net.factors.A and copied.factors._group is not net.factors._group
        assert all(layer.factors is copied.factors for layer in copied.layers())
        copied.step(x)
        assert truth.error(copied) < CLOSE
    graph.square().sum().backward()
    assert truth.error(net) < CLOSE


def test_to_dtype_and_back(either_path, net, x):
    truth = Truth(net, x)
    net.step(x)
    net.double()
    net.step(x.double())
    assert net.factors.A.grad.dtype == torch.float64
    assert Truth(net, x.double()).error(net) < 1e-12
    net.float()
    assert all(layer.factors is net.factors for layer in net.layers())
    net.step(x)
    assert truth.error(net) < CLOSE


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(either_path, net, x, assign):
    truth = Truth(net, x)
    for layer in net.layers():
        layer.leave_factors_to_owner()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    assert [key for key in state if key.endswith((".A", ".B"))] == ["factors.A", "factors.B"]
    other = Net()
    for layer in other.layers():
        layer.leave_factors_to_owner()
    other.step(x)
    other.load_state_dict(state, assign=assign)
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(name.endswith(("core", ".A", ".B")))
    other.step(x)
    assert truth.error(other) < CLOSE
    assert all(layer.factors is other.factors for layer in other.layers())


def test_parameters_come_once_in_a_model_built_by_hand(net):
    names = [name for name, _ in net.named_parameters() if name.endswith((".A", ".B"))]
    assert names == ["factors.A", "factors.B"]
    alone = nn.Sequential(*(layer for layer in net.layers()))  # the factors not registered by their owner
    assert sum(p is net.factors.A for p in alone.parameters()) == 1
    other = copy.deepcopy(alone)
    other.load_state_dict(alone.state_dict())


FRESH = {
    "optimizer": lambda net, p: torch.optim.AdamW([p], lr=0.1).step(),
    "fused optimizer": lambda net, p: torch.optim.AdamW([p], lr=0.1, fused=True).step(),
    "no_grad in place": lambda net, p: _no_grad(lambda: p.mul_(1.5)),
    ".data in place": lambda net, p: p.data.mul_(1.5),
    ".data assigned": lambda net, p: setattr(p, "data", p.data * 1.5),
    "load_state_dict": lambda net, p: net.load_state_dict({k: v * 1.5 for k, v in net.state_dict().items()}),
}


def _no_grad(function) -> None:
    with torch.no_grad():
        function()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", FRESH)
def test_a_change_of_any_kind_is_seen_by_the_next_forward(either_path, net, change, training):
    net.train(training)
    x = torch.randn(6, 24)
    layer = net.blocks[0].q
    for parameter in (net.factors.A, net.factors.B, layer.core):
        net.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()
        FRESH[change](net, parameter)
        y = layer(x)
        A, B, core = (t.detach().double() for t in (net.factors.A, net.factors.B, layer.core))
        assert relative(y, plain(layer, A, B, core, x.double())) < 1e-5


@pytest.mark.parametrize("name", ["A", "B", "core"])
def test_a_new_parameter_is_seen_by_the_next_forward(either_path, net, name):
    x = torch.randn(6, 24)
    layer = net.blocks[0].q
    layer(x)
    owner = layer if name == "core" else net.factors
    setattr(owner, name, nn.Parameter(torch.randn_like(getattr(owner, name))))
    y = layer(x)
    A, B, core = (t.detach().double() for t in (net.factors.A, net.factors.B, layer.core))
    assert relative(y, plain(layer, A, B, core, x.double())) < 1e-5
    net.step(x)
    assert Truth(net, x).error(net) < CLOSE


def test_a_change_between_forward_and_backward_is_noticed(either_path, net, x):
    y = net(x)
    with torch.no_grad():
        net.factors.A.mul_(1.01)
    with pytest.raises(RuntimeError, match=r"inplace|in-place"):
        y.sum().backward()


def test_a_layer_used_several_times(either_path, x):
    net = Net(n=1)
    block = net.blocks[0]
    repeated = Net(n=1)
    repeated.load_state_dict(net.state_dict())
    repeated.blocks = nn.ModuleList([repeated.blocks[0]] * 3)
    repeated.step(x)
    truth = Truth(repeated, x)
    assert relative(repeated.factors.A.grad, truth.A.grad) < CLOSE
    assert relative(repeated.factors.B.grad, truth.B.grad) < CLOSE
    assert block.q.core.grad is None


@pytest.mark.parametrize("kind", ["forward only", "training", "partial", "failed", "double backward"])
def test_memory_does_not_grow(either_path, net, kind):
    import gc

    x = torch.randn(5, 24, requires_grad=True)

    def once() -> None:
        if kind == "forward only":
            net(x)
        elif kind == "training":
            net.step(x)
        elif kind == "partial":
            torch.autograd.grad(net(x).sum(), [net.blocks[0].q.core])
        elif kind == "failed":
            with pytest.raises(RuntimeError, match="boom"):
                net.blocks[1](Boom.apply(net.blocks[0](x))).sum().backward()
        else:
            (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            net.zero_grad(set_to_none=True)
            g.sum().backward()

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for _ in range(3):
        once()
    before = tensors()
    for _ in range(10):
        once()
    assert tensors() <= before and net.pending() == 0
