"""Layers called on the same x share u = x A, and nothing else ever does. Counts are calls of our operators."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from lotr_ext import reference
from lotr_ext.autograd.call import Call, call_linear
from nets import Net, Truth, plain, relative, right

pytestmark = pytest.mark.usefixtures("two_nodes")
CLOSE = 5e-6
GRAD_MODES = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 7, 24)


def dropped(t: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return t.double() * reference.dropout_mask(*t.shape, p, int(seed))


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


# ---- memory ----------------------------------------------------------------------------------------------------------


def gone(*references: weakref.ref) -> bool:
    gc.collect()
    return all(reference() is None for reference in references)


def test_no_activation_is_kept_alive(net):
    q, k = net.blocks[0].q, net.blocks[0].k

    def leaf():
        x = torch.randn(6, 24, requires_grad=True)
        return weakref.ref(x), weakref.ref(q(x)), weakref.ref(k(x))

    def inner():
        x = torch.randn(6, 24, requires_grad=True) * 1
        return weakref.ref(x), weakref.ref(q(x))

    def without_graph():
        with torch.no_grad():
            x = torch.randn(6, 24)
            q(x)
            found = net.factors._group.A._newest.input()
            return weakref.ref(x), weakref.ref(found.u)

    for make in (leaf, inner, without_graph):
        assert gone(*make()), make.__name__


def test_x_dies_though_the_graph_lives_when_A_is_frozen(net):
    net.factors.A.requires_grad_(False)
    x = torch.randn(6, 24, requires_grad=True) * 1
    y = net.blocks[0].q(x) + net.blocks[0].k(x)
    reference = weakref.ref(x)
    del x
    assert gone(reference)
    y.sum().backward()


def test_nothing_outlives_a_checkpoint_region(net):
    references = []

    def region(t):
        x = torch.sin(t)
        a, b = net.blocks[0].q(x), net.blocks[0].k(x)
        references[:] = weakref.ref(x), weakref.ref(net.factors._group.A._newest.input().u)
        return a * b

    y = checkpoint(region, torch.randn(6, 24, requires_grad=True), use_reentrant=False)
    assert gone(*references)
    y.sum().backward()


# ---- other ways through a graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_checkpoint_regions_on_one_x(net, leaf, reentrant):
    block = net.blocks[0]
    start = torch.randn(6, 24, requires_grad=True)
    x = start if leaf else start * 1

    def region(t):
        return block.q(t) * block.k(t)

    parts = [checkpoint(region, x, use_reentrant=reentrant) for _ in range(2)]
    (block.v(x) + parts[0] + parts[1] + block.o(x)).sum().backward()
    A, B = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B))
    z = start.detach().double().requires_grad_()
    q, k, v, o = (plain(layer, A, B, layer.core.detach().double(), z) for layer in (block.q, block.k, block.v, block.o))
    (v + 2 * q * k + o).sum().backward()
    for got, want in ((start, z), (net.factors.A, A), (net.factors.B, B)):
        assert relative(got.grad, want.grad) < CLOSE


def test_selective_checkpointing(net):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(6, 24, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    net.blocks[0](checkpoint(net.blocks[1], x, use_reentrant=False, context_fn=contexts)).sum().backward()
    got = net.factors.A.grad.clone()
    net.zero_grad(set_to_none=True)
    net.blocks[0](net.blocks[1](x)).sum().backward()
    assert torch.allclose(got, net.factors.A.grad, atol=1e-5)


def test_save_on_cpu(net, x):
    truth = Truth(net, x)
    for reentrant in (None, False):
        net.reentrant = reentrant
        with torch.autograd.graph.save_on_cpu():
            net.step(x.requires_grad_())
        assert truth.error(net) < CLOSE


def test_siblings_in_two_backwards(net):
    q, k = net.blocks[0].q, net.blocks[0].k
    for requires_grad in (True, False):
        net.zero_grad(set_to_none=True)
        x = torch.randn(40, 24, requires_grad=requires_grad)
        a, b = q(x), k(x)
        a.square().sum().backward()
        b.square().sum().backward()
        A, B = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B))
        z = x.detach().double().requires_grad_()
        sum(plain(layer, A, B, layer.core.detach().double(), z).square().sum() for layer in (q, k)).backward()
        assert relative(net.factors.A.grad, A.grad) < CLOSE and relative(net.factors.B.grad, B.grad) < CLOSE
        assert not requires_grad or relative(x.grad, z.grad) < CLOSE


@pytest.mark.parametrize("why", ["x changed", "twice through one"])
def test_a_second_backward_that_cannot_be_right_raises(net, why):
    q, k = net.blocks[0].q, net.blocks[0].k
    x = torch.randn(40, 24)
    a, b = q(x), k(x)
    a.sum().backward()
    if why == "x changed":
        x.mul_(2)
    with pytest.raises(RuntimeError):
        (a if why == "twice through one" else b).sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("x_gone", [False, True])
def test_siblings_in_backwards_of_their_own_in_any_order(net, p, order, x_gone, monkeypatch):
    """As in plain torch, where each sibling has a graph of its own; the mask is one for all of them."""
    seeds: list[torch.Tensor] = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **kw: seeds.append(randint(*a, **kw)) or seeds[-1])
    layers = [net.blocks[0].q, net.blocks[0].k, net.blocks[0].v]
    for layer in layers:
        layer.dropout = p
    leaf = torch.randn(40, 24, requires_grad=True)
    x = leaf.view_as(leaf)
    ys = [layer(x) for layer in layers]
    assert len(seeds) == (p > 0)
    if x_gone:
        del x
    for i in order:
        ys[i].square().sum().backward()
    A, B = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B))
    z = leaf.detach().double().requires_grad_()
    masked = z * dropped(torch.ones(40, 24), seeds[0], p) if p else z
    for layer in layers:
        base = nn.functional.linear(z, layer.weight.double(), layer.bias.double())
        (base + layer.scaling * (masked @ A @ layer.core.detach().double() @ B.mT)).square().sum().backward(retain_graph=True)
    for got, want in ((leaf, z), (net.factors.A, A), (net.factors.B, B)):
        assert relative(got.grad, want.grad) < CLOSE


def test_only_one_sibling_goes_backward(net):
    q, k = net.blocks[0].q, net.blocks[0].k
    x = torch.randn(40, 24, requires_grad=True)
    a, b = q(x), k(x)
    del b
    a.sum().backward()
    z = x.detach().double().requires_grad_()
    plain(q, net.factors.A.detach().double(), net.factors.B.detach().double(), q.core.detach().double(), z).sum().backward()
    assert relative(x.grad, z.grad) < CLOSE


def test_a_gradient_kept_by_a_hook_is_not_overwritten(net):
    """Of every node of the graph, all that goes in and comes out."""
    x = torch.randn(6, 24, requires_grad=True)
    y = net.blocks[0].q(x) * net.blocks[0].k(x) + net.blocks[0].v(x)
    kept, seen, todo = [], set(), [y.grad_fn]

    def keep(*gradients) -> None:
        kept.extend((g, g.clone()) for part in gradients for g in part if g is not None)

    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            node.register_hook(keep)
            todo += [following for following, _ in node.next_functions if following is not None]
    y.sum().backward()
    assert len(kept) > 8 and all(torch.equal(*pair) for pair in kept)


def test_one_x_over_many_steps(net):
    """A fused optimizer changes A without a trace; each step's u is its own all the same."""
    block, x = net.blocks[0], torch.randn(4, 24)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for make in (lambda p: torch.optim.SGD(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01, fused=True)):
        optimizer = make(parameters)
        for i in range(4):
            net.zero_grad(set_to_none=True)
            order = [block.q, block.k, block.v]
            order = order[i % 3 :] + order[: i % 3]
            outs = [layer(x) for layer in order]
            assert all(right(net, layer, x, y) for layer, y in zip(order, outs))
            sum(y.square().sum() for y in outs).backward()
            optimizer.step()
            with torch.no_grad():
                assert all(right(net, layer, x) for layer in order[:2])


def test_users_may_write_into_a_layers_output(net):
    x = torch.randn(40, 24, requires_grad=True)
    net.blocks[0].q(x).relu_().sum().backward()
    assert x.grad is not None
    h = torch.randn(40, 24, requires_grad=True)
    x = h * 1
    y = net.blocks[0].q(x)
    x.relu_()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
