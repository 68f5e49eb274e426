"""The hub: many layers, one accumulator a factor, one gradient for autograd. Truth: plain autograd in float64."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint
from toys import at_once

import lotr_ext
from lotr_ext.autograd import shared_gradient as hub
from nets import Boom, Net, Truth, plain, relative, shapes_of_sums

CLOSE = 5e-6  # relative, float32 against float64
CHECKPOINTS = pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])


def test_equals_plain_autograd_in_float64(either_path, x):
    net = Net(dtype=torch.float64)
    x = x.double().requires_grad_()
    truth = Truth(net, x)
    y = net.step(x)
    assert relative(y, truth.y) < 1e-13
    assert relative(x.grad, truth.x.grad) < 1e-12
    assert truth.error(net) < 1e-12


@CHECKPOINTS
def test_float32_gradients(either_path, net, x, reentrant):
    truth = Truth(net, x)
    net.reentrant = reentrant
    x.requires_grad_()
    net.step(x)
    assert relative(x.grad, truth.x.grad) < CLOSE
    assert truth.error(net) < CLOSE
    assert net.pending() == 0


def test_hooks_fire_once_a_backward(either_path, net, x):
    seen = []
    for factor in (net.factors.A, net.factors.B):
        factor.register_hook(lambda g: seen.append("hook"))
        factor.register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    net.step(x)
    assert sorted(seen) == ["hook", "hook", "post", "post"]


def test_error_in_bfloat16_is_below_plain_autograd(two_nodes):
    """32 layers: one float32 sum rounds once, autograd's bfloat16 sum 31 times."""
    net = Net(d=32, rank=8, n=8, dtype=torch.bfloat16)
    net.factors.to(torch.bfloat16)
    x = torch.randn(64, 32).bfloat16()
    truth = Truth(net, x)
    net.step(x)
    ours = relative(net.factors.A.grad, truth.A.grad), relative(net.factors.B.grad, truth.B.grad)
    net.zero_grad(set_to_none=True)
    A, B = net.factors.A, net.factors.B
    h = x
    for block in net.blocks:
        z = block.norm(h)
        q, k, v, o = (
            lambda t, l=layer: l._base(t) + l.scaling * (t @ A @ l.core.to(A.dtype) @ B.mT)
            for layer in (block.q, block.k, block.v, block.o)
        )
        h = h + torch.tanh(o(torch.sigmoid(q(z)) * torch.tanh(k(z)) + v(z)))
    h.square().sum().backward()
    eager = relative(A.grad, truth.A.grad), relative(B.grad, truth.B.grad)
    assert ours[0] < eager[0] and ours[1] < eager[1], (ours, eager)


def test_same_bits_twice(either_path, net, x):
    grads = []
    for _ in range(2):
        net.step(x)
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_two_forwards_before_two_backwards(either_path, net, x):
    other = torch.randn_like(x)
    truths = Truth(net, x), Truth(net, other)
    first, second = net(x), net(other)
    second.square().sum().backward()
    first.square().sum().backward()
    assert relative(net.factors.A.grad, truths[0].A.grad + truths[1].A.grad) < CLOSE
    assert relative(net.factors.B.grad, truths[0].B.grad + truths[1].B.grad) < CLOSE


def test_micro_batches_accumulate(either_path, net, x):
    truth = Truth(net, x)
    for part in x.split(2):
        net(part).square().sum().backward()
    assert truth.error(net) < CLOSE


def test_retain_graph(either_path, net, x):
    truth = Truth(net, x)
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative(net.factors.A.grad, 2 * truth.A.grad) < CLOSE
    assert relative(net.factors.B.grad, 2 * truth.B.grad) < CLOSE


def test_grad_of_a_subset(either_path, net, x):
    truth = Truth(net, x)
    x.requires_grad_()
    for tensor, want in ((x, truth.x), (net.factors.A, truth.A), (net.factors.B, truth.B)):
        (got,) = torch.autograd.grad(net(x).square().sum(), [tensor])
        assert relative(got, want.grad) < CLOSE
        assert net.pending() == 0 and net.factors.A.grad is None
    net(x).square().sum().backward(inputs=[net.factors.A])
    assert relative(net.factors.A.grad, truth.A.grad) < CLOSE and net.factors.B.grad is None and net.pending() == 0


def test_two_partial_backwards_on_one_graph(either_path, net, x):
    truth = Truth(net, x)
    loss = net(x).square().sum()
    (first,) = torch.autograd.grad(loss, [net.factors.A], retain_graph=True)
    second, _ = torch.autograd.grad(loss, [net.factors.A, net.blocks[1].k.core])
    assert relative(first, truth.A.grad) < CLOSE and relative(second, truth.A.grad) < CLOSE and net.pending() == 0


@CHECKPOINTS
def test_an_exception_in_backward_leaves_no_trace(either_path, net, x, reentrant):
    truth = Truth(net, x)
    h = x.clone().requires_grad_()
    for i, block in enumerate(net.blocks):
        h = block(h) if reentrant is None else checkpoint(block, h, use_reentrant=reentrant)
        h = Boom.apply(h) if i == 0 else h
    with pytest.raises(RuntimeError, match="boom"):
        h.square().sum().backward()
    assert net.pending() == 0
    net.reentrant = reentrant
    net.step(x.clone().requires_grad_())
    assert truth.error(net) < CLOSE


def test_a_raising_hook_leaves_no_trace(either_path, net, x):
    truth = Truth(net, x)

    def fail(gradient):
        raise ValueError("hook")

    handle = net.factors.B.register_hook(fail)
    with pytest.raises(ValueError, match="hook"):
        net(x).sum().backward()
    handle.remove()
    assert net.pending() == 0
    net.step(x)
    assert truth.error(net) < CLOSE


@pytest.mark.parametrize(
    "trained",
    list(itertools.product((False, True), repeat=3)),
    ids=lambda trained: "".join(name for name, on in zip("ABG", trained) if on) or "nothing",
)
def test_frozen_in_all_combinations(either_path, net, x, trained, monkeypatch):
    """And nothing is allocated for a frozen factor: its accumulator is never asked for."""
    truth = Truth(net, x)
    asked = []
    accumulator = hub.SharedGradient.accumulator
    monkeypatch.setattr(hub.SharedGradient, "accumulator", lambda self, *a: asked.append(self) or accumulator(self, *a))
    A, B, core = trained
    net.factors.A.requires_grad_(A)
    net.factors.B.requires_grad_(B)
    for layer in net.layers():
        layer.core.requires_grad_(core)
    x.requires_grad_()
    net.step(x)
    assert relative(x.grad, truth.x.grad) < CLOSE
    for factor, want, on in ((net.factors.A, truth.A, A), (net.factors.B, truth.B, B)):
        assert relative(factor.grad, want.grad) < CLOSE if on else factor.grad is None
    for layer, want in zip(net.layers(), truth.cores):
        assert relative(layer.core.grad, want.grad) < CLOSE if core else layer.core.grad is None
    assert (net.factors._group.A in asked) == A and (net.factors._group.B in asked) == B


def test_x_is_not_kept_when_A_is_frozen(either_path, net):
    saved: list[torch.Tensor] = []
    layer = net.blocks[0].q
    net.factors.A.requires_grad_(False)
    x = torch.randn(40, 24, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved and all(t.data_ptr() != x.data_ptr() for t in saved)
    net.factors.A.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_a_32_layer_backward_makes_one_accumulator_a_factor(two_nodes, x, monkeypatch):
    net = Net(d=24, rank=4, n=8)
    made = shapes_of_sums(monkeypatch)
    net(x).square().sum().backward()
    assert made == [net.factors.B.shape, net.factors.A.shape]


@CHECKPOINTS
def test_autograd_sees_one_gradient_a_factor(our_path, net, x, reentrant):
    """Of all nodes that lead to a factor, one hands it a gradient."""
    net.reentrant = reentrant
    x.requires_grad_()
    y = net(x)
    given: list[torch.Tensor] = []

    def watch(node, i: int, leaf: torch.Tensor) -> None:
        node.register_hook(lambda inputs, outputs: given.append(leaf) if inputs[i] is not None else None)

    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for i, (following, _) in enumerate(node.next_functions):
            if following is not None:
                todo.append(following)
                if hasattr(following, "variable"):
                    watch(node, i, following.variable)
    y.square().sum().backward()
    for factor in (net.factors.A, net.factors.B):
        assert factor.grad is not None
        if not reentrant:  # whose backwards run inside of one another, on graphs made on the way
            assert sum(leaf is factor for leaf in given) == 1


def test_parts_that_cancel_in_bfloat16_factors(either_path):
    """The first layer's part and the last one's are 64 times the others' and cancel: rounded by themselves, they would leave
    their rounding behind."""
    net = Net(n=1)
    net.factors.to(torch.bfloat16)
    layers, scales = net.layers(), (64, 1, 1, -64)
    layers[3].core.data.copy_(layers[0].core)
    x, g = torch.randn(200, 24, dtype=torch.bfloat16), torch.randn(200, 24, dtype=torch.bfloat16)
    net.to(torch.bfloat16)
    total = sum(scale * layer(x * 1) for scale, layer in zip(scales, layers))
    (found,) = torch.autograd.grad(total, net.factors.A, g)
    A, B = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B))
    cores = [layer.core.detach().double() for layer in layers]
    parts = (plain(layer, A, B, core, x.double()) for layer, core in zip(layers, cores))
    (expected,) = torch.autograd.grad(sum(s * part for s, part in zip(scales, parts)), A, g.double())
    assert relative(found, expected) < 0.02


def test_two_models_in_two_threads(either_path, x):
    nets = Net(), Net()
    alone = [copy.deepcopy(net) for net in nets]
    inputs = [torch.randn(5, 24) for _ in range(30)]

    def train(net: Net) -> None:
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3)
        for t in inputs:
            net.zero_grad(set_to_none=True)
            net(t).square().mean().backward()
            optimizer.step()

    assert at_once(*(functools.partial(train, net) for net in nets)) == []
    for net in alone:
        train(net)
    for net, one in zip(nets, alone):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), one.state_dict().values()))


def test_one_model_in_two_threads(either_path, net):
    errors: list[float] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(15):
            t = torch.randn(5, 24, generator=generator, requires_grad=True)
            got = torch.autograd.grad(net(t).square().sum(), [t, net.factors.A, net.factors.B])
            truth = Truth(net, t)
            errors.append(max(relative(a, b.grad) for a, b in zip(got, (truth.x, truth.A, truth.B))))

    assert at_once(*(functools.partial(work, seed) for seed in (1, 2))) == []
    assert len(errors) == 30 and max(errors) < 1e-5 and net.pending() == 0


def test_a_replica_in_another_thread_has_its_own_node(monkeypatch):
    """nn.DataParallel's replicas share the group and have their own factors; a thread may be interrupted as it makes a node."""
    shared, (one, other) = hub.SharedGradient(), (torch.randn(2, 2, requires_grad=True) for _ in range(2))
    run, users = hub.LoTRShared.run, [object() for _ in range(3)]

    def interrupted(*arguments):
        monkeypatch.setattr(hub.LoTRShared, "run", run)
        shared.view(other, users[0])
        return run(*arguments)

    monkeypatch.setattr(hub.LoTRShared, "run", interrupted)
    views = [shared.view(one, users[1]), shared.view(other, users[2])]
    for view, replica in zip(views, (one, other)):
        assert view.grad_fn.next_functions[0][0].variable is replica


def test_a_group_over_two_devices(two_nodes, net, x, monkeypatch):
    """Simulated: every second addition to a factor goes to the sum of another device."""
    truth = Truth(net, x)
    of_task = hub.SharedGradient.of_task
    turns = {net.factors._group.A: itertools.count(), net.factors._group.B: itertools.count()}

    def other_device(self, of, device):
        return of_task(self, torch.device("cpu", next(turns[self]) % 2), device)

    monkeypatch.setattr(hub.SharedGradient, "of_task", other_device)
    counts = []
    take = hub.SharedGradient.take
    monkeypatch.setattr(hub.SharedGradient, "take", lambda self, device: counts.append(self.pending()) or take(self, device))
    net.step(x)
    assert counts == [2, 2]
    assert truth.error(net) < CLOSE and net.pending() == 0


def test_double_backward(either_path):
    net = Net(8, 3, 2, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    names = ("factors.A", "factors.B", "blocks.0.q.core")
    for layer in net.layers():
        layer.leave_factors_to_owner()
    values = [dict(net.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def function(t, *parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters)), (t,))

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


def test_gradients_of_a_recorded_backward(either_path, net, x):
    """create_graph=True takes torch products instead of kernels: the same gradients."""
    truth = Truth(net, x)
    x.requires_grad_()
    wanted = [x, net.factors.A, net.factors.B, net.blocks[1].v.core]
    got = torch.autograd.grad(net(x).square().sum(), wanted, create_graph=True)
    for gradient, want in zip(got, (truth.x, truth.A, truth.B, truth.cores[6])):
        assert relative(gradient, want.grad) < CLOSE


def test_gradient_penalty_reaches_every_parameter(either_path, net):
    x = torch.randn(6, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is not None for p in (net.factors.A, net.factors.B, net.blocks[2].v.core))
    assert relative(gradient, Truth(net, x).x.grad) < CLOSE


def test_vmap_of_grad_and_forward_mode(net):
    for layer in net.layers():  # functional_call wants each module under one name
        layer.leave_factors_to_owner()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    call = torch.func.functional_call
    per_sample = torch.vmap(torch.func.grad(lambda p, t: call(net, p, (t,)).square().sum()), (None, 0))
    x = torch.randn(4, 3, 24)
    got = per_sample(parameters, x)["factors.A"]
    assert got.shape == (4, 24, 4)
    assert relative(got[1], Truth(net, x[1]).A.grad) < CLOSE
    _, tangent = torch.func.jvp(lambda t: net(t), (x,), (torch.ones_like(x),))
    wide = copy.deepcopy(net).double()
    step = 1e-6
    numeric = (wide(x.double() + step) - wide(x.double() - step)) / (2 * step)
    assert relative(tangent, numeric.detach()) < 1e-4


def test_public_functions_are_exported():
    assert issubclass(lotr_ext.LoTRFunction, Function) and issubclass(lotr_ext.LoTRShrink, Function)
