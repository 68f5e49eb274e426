"""Siblings: what dies when, checkpoint regions, backwards of their own, and other ways through a graph."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nets import Truth, dropped, plain, relative, right

pytestmark = pytest.mark.usefixtures("two_nodes")
CLOSE = 5e-6
GRAD_MODES = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


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


@pytest.mark.parametrize("part", ["A", "B", "core", "x"])
def test_saved_copies_give_the_gradients_of_the_forward_after_a_change(net, part):
    q, k, (A, B) = net.blocks[0].q, net.blocks[0].k, (net.factors.A, net.factors.B)
    leaf = torch.randn(40, 24, requires_grad=True)
    z, A_, B_, G, H = (t.detach().double().requires_grad_() for t in (leaf, A, B, q.core, k.core))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        x = leaf * 1
        loss = q(x).square().sum() + k(x).square().sum()
    with torch.no_grad():
        {"A": A, "B": B, "core": q.core, "x": x}[part].mul_(2)
    loss.backward()
    sum(plain(layer, A_, B_, core, z).square().sum() for layer, core in ((q, G), (k, H))).backward()
    for got, want in ((leaf, z), (A, A_), (B, B_), (q.core, G), (k.core, H)):
        assert relative(got.grad, want.grad) < CLOSE


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
