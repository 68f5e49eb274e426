"""The forward scope: fold and fold_grad once for a group and step, the same numbers, and nothing outlives a forward."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import ops
from lotr_ext.autograd import bank, sharing
from lotr_ext.model import scope
from lotr_ext.model.scope import attach_scope, detach_scope
from nets import Net, Truth, plain, relative, shapes_of_sums

pytestmark = pytest.mark.usefixtures("two_nodes")
CLOSE = 5e-6


@pytest.fixture
def net() -> Net:
    net = Net()
    attach_scope(net)
    return net


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 7, 24)


def test_one_fold_and_one_fold_grad_a_step(net, x, counter):
    """12 layers: forward 2 launches a layer at most besides the base product, backward 3, and one fold each way for all."""
    truth = Truth(net, x)
    x.requires_grad_()
    y = net(x)
    assert counter.take() == {"fold": 1, "shrink": 6, "expand_add_": 12}
    y.square().sum().backward()
    assert counter.take() == {"fold_grad": 1, "shrink_grad_": 12, "expand_add_": 6, "factor_grad_": 6}
    assert relative(y, truth.y) < 1e-6 and relative(x.grad, truth.x.grad) < CLOSE and truth.error(net) < CLOSE


def test_one_bank_and_one_accumulator_a_factor(net, x, monkeypatch):
    made = shapes_of_sums(monkeypatch)
    net(x).square().sum().backward()
    assert sorted(made) == sorted([torch.Size([12, 24, 4]), net.factors.A.shape])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(net, x, reentrant):
    truth = Truth(net, x)
    net.reentrant = reentrant
    net.step(x.requires_grad_())
    assert truth.error(net) < CLOSE and relative(x.grad, truth.x.grad) < CLOSE


def test_each_cuda_stream_has_its_own_folded_factors(net, x, counter, monkeypatch):
    """Layers on a second stream do not read what the first one computes at the same time."""
    truth, stream = Truth(net, x), [1]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for module in (bank, sharing):
        monkeypatch.setattr(module, "stream_of", lambda t: stream[0])
    net.blocks[1].register_forward_pre_hook(lambda module, args: stream.insert(0, 2))
    y = net(x)
    assert counter["fold"] == 2
    y.square().sum().backward()
    assert counter["fold_grad"] == 2 and relative(y, truth.y) < 1e-6 and truth.error(net) < CLOSE


def test_partial_failed_and_repeated_backwards(net, x):
    truth = Truth(net, x)
    loss = net(x).square().sum()
    core = net.blocks[1].k.core
    got_B, got_core = torch.autograd.grad(loss, [net.factors.B, core], retain_graph=True)
    assert relative(got_B, truth.B.grad) < CLOSE and relative(got_core, truth.cores[5].grad) < CLOSE

    def fail(gradient):
        raise ValueError("hook")

    handle = net.blocks[0].q.core.register_hook(fail)
    with pytest.raises(ValueError, match="hook"):
        loss.backward(retain_graph=True)
    handle.remove()
    net.zero_grad(set_to_none=True)
    loss.backward()
    assert truth.error(net) < CLOSE


def test_two_forwards_before_two_backwards(net, x):
    other = torch.randn_like(x)
    truths = Truth(net, x), Truth(net, other)
    first, second = net(x), net(other)
    first.square().sum().backward()
    second.square().sum().backward()
    assert relative(net.factors.B.grad, truths[0].B.grad + truths[1].B.grad) < CLOSE
    assert relative(net.blocks[0].q.core.grad, truths[0].cores[0].grad + truths[1].cores[0].grad) < CLOSE


def test_a_part_of_the_layers_used(net):
    """Layers without a part in the loss get a zero gradient or none, the others theirs."""
    x = torch.randn(6, 24)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.blocks[0].q(x)

    part = Part()
    attach_scope(part)
    part(x).square().sum().backward()
    A, B, core = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B, net.blocks[0].q.core))
    plain(net.blocks[0].q, A, B, core, x.double()).square().sum().backward()
    assert relative(net.blocks[0].q.core.grad, core.grad) < CLOSE and relative(net.factors.B.grad, B.grad) < CLOSE
    assert relative(net.factors.A.grad, A.grad) < CLOSE
    other = net.blocks[0].k.core.grad
    assert other is None or not other.any()


def test_double_backward(net):
    x = torch.randn(6, 24, requires_grad=True)
    truth = Truth(net, x)
    wanted = [x, net.factors.A, net.factors.B, net.blocks[1].v.core]
    got = torch.autograd.grad(net(x).square().sum(), wanted, create_graph=True)
    for gradient, want in zip(got, (truth.x, truth.A, truth.B, truth.cores[6])):
        assert relative(gradient, want.grad) < CLOSE
    net.zero_grad(set_to_none=True)
    got[0].square().sum().backward()
    ours = [p.grad for p in (net.factors.A, net.factors.B, net.blocks[1].v.core)]
    detach_scope(net)
    net.zero_grad(set_to_none=True)
    (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    for got_, want in zip(ours, (net.factors.A, net.factors.B, net.blocks[1].v.core)):
        assert relative(got_, want.grad.double()) < CLOSE


@pytest.mark.parametrize("training", [True, False])
def test_every_forward_sees_fresh_values(net, x, training):
    net.train(training)
    with torch.set_grad_enabled(training):
        net(x)
        for parameter in (net.factors.B, net.blocks[1].q.core, net.factors.A):
            parameter.data.mul_(1.5)
            assert relative(net(x), _value(net, x)) < 1e-5
        net.blocks[1].q.core = nn.Parameter(torch.randn(4, 4))
        assert relative(net(x), _value(net, x)) < 1e-5


def _value(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return Truth(net, x).y


def test_a_change_within_a_forward_is_seen(net, x):
    def change(module, args):
        with torch.no_grad():
            net.blocks[2].q.core.mul_(2)

    handle = net.blocks[1].register_forward_hook(lambda module, args, output: change(module, args))
    y = net(x)
    handle.remove()
    assert relative(y, _value(net, x)) < 1e-5


def test_a_change_before_backward_is_noticed(net, x):
    for parameter in (net.factors.B, net.blocks[1].q.core):
        loss = net(x).square().sum()
        with torch.no_grad():
            parameter.mul_(1.01)
        with pytest.raises(RuntimeError, match=r"inplace|in-place"):
            loss.backward()


def test_nothing_outlives_a_forward(net, x):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("forward")

    net(x)
    assert not scope._open.stack
    block, net.blocks[1] = net.blocks[1], Fails()
    with pytest.raises(RuntimeError, match="forward"):
        net(x)
    assert not scope._open.stack
    net.blocks[1] = block
    attach_scope(net)
    net.factors.B.data.mul_(2)
    assert relative(net(x), _value(net, x)) < 1e-5


def test_different_scalings_and_merged_layers(net, x):
    net.blocks[0].q.scaling = 0.5
    truth = Truth(net, x)
    net.step(x)
    assert truth.error(net) < CLOSE
    net.blocks[0].q.scaling = 1.0
    want = _value(net, x)
    net.blocks[1].k.merge()
    assert relative(net(x), want) < 1e-5
    net.blocks[1].k.unmerge()
    net.step(x)
    assert Truth(net, x).error(net) < CLOSE


def test_a_layer_called_by_itself_and_twice(net, counter):
    x = torch.randn(6, 24)
    net.blocks[0].q(x)
    assert counter.take() == {"shrink": 1, "fold": 1, "expand_add_": 1}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.blocks[0].q(torch.tanh(self.net.blocks[0].q(x)))

    twice = Twice()
    attach_scope(twice)
    twice(x).square().sum().backward()
    q = net.blocks[0].q
    A, B, core = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B, q.core))
    plain(q, A, B, core, torch.tanh(plain(q, A, B, core, x.double()))).square().sum().backward()
    for got, want in ((net.factors.A, A), (net.factors.B, B), (q.core, core)):
        assert relative(got.grad, want.grad) < CLOSE


def test_copies_open_scopes_of_their_own(net, x, counter):
    net(x)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        counter.take()
        copied(x)
        assert counter.take()["fold"] == 1
        copied.step(x)
        assert Truth(copied, x).error(copied) < CLOSE


def test_detach(net, x, counter):
    detach_scope(net)
    net(x)
    assert counter.take()["fold"] == 12 and not net._forward_hooks and not net._forward_pre_hooks


def test_a_checkpointed_whole_model(net, x):
    truth = Truth(net, x)
    checkpoint(net, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    assert truth.error(net) < CLOSE


def test_A_is_cast_once_a_forward(x, monkeypatch):
    """float32 factors beside a bfloat16 base."""
    net = Net(dtype=torch.bfloat16)
    attach_scope(net)
    dtypes = []
    shrink = ops.shrink

    def spy(x, A, **rest):
        dtypes.append((A.dtype, A.data_ptr()))
        return shrink(x, A, **rest)

    monkeypatch.setattr(ops, "shrink", spy)
    net(x.bfloat16())
    assert len(dtypes) == 6 and len(set(dtypes)) == 1 and dtypes[0][0] == torch.bfloat16


def test_a_recomputation_reads_an_A_that_was_changed_since(net, x):
    """The cast that the forward made of A is then older than u, which the checkpoint computes again."""
    half = Net(dtype=torch.bfloat16)
    half.load_state_dict(net.state_dict())
    attach_scope(half)
    gradients = []
    for model in (net, half):
        model.reentrant = False
        given = x.to(model.blocks[0].q.weight.dtype).requires_grad_()
        y = model(given)
        with torch.no_grad():
            model.factors.A.mul_(3.0)
        gradients.append(torch.autograd.grad(y.sum(), (given, model.factors.A)))
    for of_float, of_half in zip(*gradients, strict=True):
        assert relative(of_half, of_float) < 0.05


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, ValueError])
def test_a_forward_that_ends_by_an_exception_of_any_kind_leaves_nothing(net, x, kind):
    """The layer is then called by itself with a B and core that have changed without a trace."""

    def interrupt(*_):
        raise kind

    layers = [m for m in net.modules() if hasattr(m, "start_core")]
    handle = layers[-1].register_forward_pre_hook(interrupt)
    inputs = []
    layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with pytest.raises(kind) as raised:  # keeps the frames of the forward alive
        net(x)
    handle.remove()
    for t in (layers[0].core, layers[0].factors.B):
        t.data.mul_(2)
    layer, given = layers[0], inputs[0]
    core, A, B = (t.double() for t in (layer.core, layer.factors.A, layer.factors.B))
    want = given.double() @ layer.weight.double().T + layer.bias.double() + layer.scaling * (given.double() @ A @ core @ B.T)
    assert raised.value is not None and relative(layer(given), want) < 1e-6
    assert not scope._open.stack


def test_an_interrupted_forward_within_another(net, x, counter):
    """The outer one goes on with its own scope."""
    inner = Net()
    attach_scope(inner)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with contextlib.suppress(KeyboardInterrupt):
                inner(x)
            return self.net(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    outer = Outer()
    detach_scope(net)
    attach_scope(outer)
    next(m for m in inner.modules() if hasattr(m, "start_core")).register_forward_hook(interrupt)
    truth = Truth(net, x)
    assert relative(outer(x), truth.y) < 1e-6
    assert counter.take()["fold"] == 2 and not scope._open.stack
