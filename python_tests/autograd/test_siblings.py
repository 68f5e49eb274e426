"""Layers called on the same x share u = x A, and nothing else ever does. Counts are calls of our operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lotr_ext.autograd import sharing
from lotr_ext.autograd.call import Call, call_linear
from nets import Truth, dropped, relative, right

pytestmark = pytest.mark.usefixtures("two_nodes")
CLOSE = 5e-6
GRAD_MODES = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


def test_q_k_v_share_one_shrink_and_one_backward(net, x, counter):
    """3 blocks of q, k, v on one x and o on another: 6 shrinks for 12 layers, and 6 passes over x for dA."""
    truth = Truth(net, x)
    x.requires_grad_()
    y = net(x)
    assert counter.take() == {"shrink": 6, "fold": 12, "expand_add_": 12}
    y.square().sum().backward()
    assert counter.take() == {"shrink_grad_": 12, "fold_grad": 12, "expand_add_": 6, "factor_grad_": 6}
    assert relative(y, truth.y) < 1e-6 and relative(x.grad, truth.x.grad) < CLOSE and truth.error(net) < CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_recomputation_shares_the_same(net, x, counter, reentrant):
    truth = Truth(net, x)
    net.reentrant = reentrant
    x.requires_grad_()
    y = net(x)
    assert counter.take()["shrink"] == 6
    y.square().sum().backward()
    assert counter["shrink"] == 6 and counter["factor_grad_"] == 6
    assert relative(x.grad, truth.x.grad) < CLOSE and truth.error(net) < CLOSE


def test_recomputation_saves_what_the_first_pass_saved(net, x):
    """checkpoint itself compares shape, dtype and device of every saved tensor; early stop off, so that it sees them all."""
    runs: list[int] = []

    def region(t):
        runs.append(1)
        return net.blocks[0](t)

    x.requires_grad_()
    with set_checkpoint_early_stop(False):
        checkpoint(region, x, use_reentrant=False, determinism_check="default").sum().backward()
    assert len(runs) == 2


def test_without_gradients(net, x, counter):
    want = Truth(net, x).y
    with torch.no_grad():
        net(x)
    assert counter.take()["shrink"] == 6
    with torch.inference_mode():
        y = net(x)
    assert counter.take()["shrink"] == 12 and relative(y, want) < 1e-6  # inference tensors have no version: never shared


CHANGES = {
    "in place": lambda x: x.mul_(2),
    ".data": lambda x: setattr(x, "data", torch.randn(24, 24)),
    "transposed in place": lambda x: x.t_(),
    "resized": lambda x: x.resize_(3, 24),
}


@GRAD_MODES
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_x_never_reuses_u(net, change, grad):
    block = net.blocks[0]
    with torch.set_grad_enabled(grad):
        x = torch.randn(24, 24)
        keep = block.q(x)
        CHANGES[change](x)
        assert right(net, block.k, x)
    del keep


@GRAD_MODES
def test_another_x_never_reuses_u(net, grad):
    block = net.blocks[0]
    with torch.set_grad_enabled(grad):
        x, other = torch.randn(6, 24), torch.randn(6, 24)
        keep = block.q(x)
        assert right(net, block.k, other) and right(net, block.v, x)
    del keep


@GRAD_MODES
def test_calls_on_two_cuda_streams_share_nothing(net, x, counter, monkeypatch, grad):
    """A stream waits for another only where the user makes it, and the user does not see u. Here the streams are pretended; on
    a GPU: test_calls_on_two_streams in test_device.py."""
    stream = 1
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(sharing, "stream_of", lambda t: stream)
    block = net.blocks[0]
    with torch.set_grad_enabled(grad):
        q = block.q(x)
        stream = 2
        k, v = block.k(x), block.v(x)
    assert counter["shrink"] == 2
    assert right(net, block.q, x, q) and right(net, block.k, x, k) and right(net, block.v, x, v)


@GRAD_MODES
def test_a_changed_A_never_reuses_u(net, grad):
    block, A = net.blocks[0], net.factors.A
    with torch.set_grad_enabled(grad):
        x = torch.randn(6, 24)
        keep = [block.q(x)]
        A.data = A.data * 3
        assert right(net, block.k, x)
        x = torch.randn(6, 24)
        keep.append(block.q(x))
        with torch.no_grad():
            A.mul_(2)
        assert right(net, block.k, x)
        x = torch.randn(6, 24)
        keep.append(block.q(x))
        A.data.mul_(2)  # leaves no trace: seen because the same layer comes again
        assert right(net, block.q, x) and right(net, block.k, x)


@GRAD_MODES
def test_a_fused_optimizers_step_between_siblings_is_seen(net, grad):
    """It bumps no version."""
    block, A = net.blocks[0], net.factors.A
    optimizer = torch.optim.AdamW([A], lr=0.5, fused=True)
    A.grad = torch.randn_like(A)
    with torch.set_grad_enabled(grad):
        x = torch.randn(6, 24)
        keep = block.q(x)
        version = A._version
        optimizer.step()
        assert A._version == version
        assert right(net, block.k, x)
    del keep


def test_the_same_layer_called_twice_starts_anew(net, counter):
    q, k = net.blocks[0].q, net.blocks[0].k
    x = torch.randn(6, 24)
    keep = [q(x), k(x), q(x), k(x)]
    assert counter.take()["shrink"] == 2
    del keep


def test_another_grad_mode_never_reuses_u(net, counter):
    q, k = net.blocks[0].q, net.blocks[0].k
    x = torch.randn(6, 24, requires_grad=True)
    with torch.no_grad():
        q(x)
    y = k(x)
    assert counter.take()["shrink"] == 2 and y.grad_fn is not None
    y.sum().backward()
    assert x.grad is not None


def test_requires_grad_changed_between(net):
    q, k = net.blocks[0].q, net.blocks[0].k
    x = torch.randn(6, 24)
    keep = q(x)
    x.requires_grad_()
    k(x).sum().backward()
    assert x.grad is not None
    h = torch.randn(6, 24, requires_grad=True)
    x = h * 1
    keep = q(x)
    x.detach_().requires_grad_()
    k(x).sum().backward()
    assert x.grad is not None and h.grad is None
    x = torch.randn(6, 24, requires_grad=True)
    keep = q(x)
    net.factors.A.requires_grad_(False)
    net.factors.A.grad = None
    k(x).sum().backward()
    assert net.factors.A.grad is None and x.grad is not None
    del keep


def test_another_autocast_state_never_reuses_u(net, counter):
    q, k, v = net.blocks[0].q, net.blocks[0].k, net.blocks[0].v
    x = torch.randn(6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = q(x), k(x)
    assert counter.take()["shrink"] == 1 and low[0].dtype == torch.bfloat16
    y = v(x)
    assert counter.take()["shrink"] == 1 and y.dtype == torch.float32 and right(net, v, x, y)


def test_dropout_is_shared_by_siblings_of_one_p(net, counter):
    q, k, v = net.blocks[0].q, net.blocks[0].k, net.blocks[0].v
    q.dropout = k.dropout = 0.5
    v.dropout = 0.25
    net.train()
    x = torch.randn(40, 24)
    keep = [q(x), k(x), v(x)]
    assert counter.take()["shrink"] == 2
    net.eval()
    keep = [q(x), k(x), v(x)]
    assert counter.take()["shrink"] == 1
    del keep


@GRAD_MODES
def test_dropout_is_shared_on_the_composite_path_too(net, grad):
    """q and k by torch's products, v by kernels: all see the same drop(x), which an identity for an adapter shows."""
    q, k, v = net.blocks[0].q, net.blocks[0].k, net.blocks[0].v
    for layer in (q, k, v):
        layer.dropout = 0.5
        layer.core.data.copy_(q.core)
        layer.weight.data.zero_(), layer.bias.data.zero_()
    q.strategy = "composite"
    k.weight.requires_grad_()  # the base is trained: with dropout torch's products too
    net.train()
    with torch.set_grad_enabled(grad):
        for order in ((q, k, v), (v, k, q)):
            x = torch.randn(40, 24)
            first, *others = (layer(x) for layer in order)
            assert first.abs().max() > 1e-3 and all(relative(y, first.double()) < CLOSE for y in others)
            assert relative(q(torch.randn(40, 24)), first.double()) > 0.1
    eye = torch.eye(24)
    call = Call(eye, 1.0, 0.25, strategy="composite")
    kept = call_linear(torch.ones(4000, 24), torch.zeros(24, 24), None, eye, eye, call)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs((kept > 0).float().mean() - 0.75) < 0.01


def test_dropout_gradients(net, monkeypatch):
    """Against float64 with the mask that the reference draws from the same seed."""
    q, k, p = net.blocks[0].q, net.blocks[0].k, 0.4
    q.dropout = k.dropout = p
    seeds: list[torch.Tensor] = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **kw: seeds.append(randint(*a, **kw)) or seeds[-1])
    x = torch.randn(9, 24, requires_grad=True)
    y = q(x).square() + k(x)
    y.sum().backward()
    assert len(seeds) == 1
    A, B = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B))
    cores = [layer.core.detach().double().requires_grad_() for layer in (q, k)]
    z = x.detach().double().requires_grad_()
    masked = z * (dropped(torch.ones(9, 24), seeds[0], p))
    outs = [
        nn.functional.linear(z, layer.weight.double(), layer.bias.double()) + layer.scaling * (masked @ A @ core @ B.mT)
        for layer, core in zip((q, k), cores)
    ]
    (outs[0].square() + outs[1]).sum().backward()
    for got, want in ((x, z), (net.factors.A, A), (net.factors.B, B), (q.core, cores[0]), (k.core, cores[1])):
        assert relative(got.grad, want.grad) < CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_follows_manual_seed_and_checkpointing(net, x, reentrant):
    for layer in net.layers():
        layer.dropout = 0.3
    grads = []
    for mode in (None, None, reentrant):
        net.reentrant = mode
        torch.manual_seed(3)
        net.step(x.requires_grad_())
        grads.append((net.factors.A.grad, net.blocks[0].k.core.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert relative(grads[2][0], grads[0][0].double()) < 1e-6 and relative(grads[2][1], grads[0][1].double()) < 1e-6
    net.step(x)
    assert not torch.equal(net.factors.A.grad, grads[0][0])


def test_dropout_double_backward(net):
    wide = net.double()
    q = wide.blocks[0].q
    q.dropout = 0.5
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    q.leave_factors_to_owner()

    def function(t, A, B):
        torch.manual_seed(1)
        wide.factors.A.data, wide.factors.B.data = A.data, B.data
        return torch.func.functional_call(wide.factors, {"A": A, "B": B}, (lambda a, b: call(t, a, b),))

    def call(t, A, B):
        return call_linear(t, q.weight, q.bias, A, B, Call(q.core, q.scaling, 0.5))

    A, B = (p.detach().clone().requires_grad_() for p in (wide.factors.A, wide.factors.B))
    assert torch.autograd.gradcheck(function, (x, A, B)) and torch.autograd.gradgradcheck(function, (x, A, B))
