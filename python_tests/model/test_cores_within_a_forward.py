"""Cores made of shared numbers, within one forward: random ones, and ones whose parameters are replaced half-way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRConfig, apply_lotr
from lotr_ext.cores import FORMS, Cores
from nets import relative

D, R, LAYERS = 12, 4, 4
pytestmark = pytest.mark.usefixtures("two_nodes")


class Dropped(Cores):
    """The cores are parameters, elements of which are dropped each time."""

    def __init__(self, places, rank):
        super().__init__(places, rank)
        self.values = nn.Parameter(torch.zeros(len(self.places), self.r_in, self.r_out))

    def make(self, index: int | None = None) -> Tensor:
        return nnf.dropout(self.values if index is None else self.values[index], 0.5, self.training)


class Chain(nn.Module):
    """reentrant: of a checkpoint around each two layers; None without."""

    def __init__(self) -> None:
        super().__init__()
        pairs = (nn.ModuleDict({"q": nn.Linear(D, D), "v": nn.Linear(D, D)}) for _ in range(LAYERS // 2))
        self.blocks = nn.ModuleList(pairs)
        self.reentrant: bool | None = None

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for block in self.blocks for layer in block.values()]

    def pair(self, i: int, x: Tensor) -> Tensor:
        return torch.tanh(self.layers[i + 1](torch.tanh(self.layers[i](x))))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, LAYERS, 2):
            x = self.pair(i, x) if self.reentrant is None else checkpoint(self.pair, i, x, use_reentrant=self.reentrant)
        return x


def adapted(core) -> Chain:
    torch.manual_seed(0)
    model = apply_lotr(Chain(), LoTRConfig(rank=R, core=core, target_modules=["q", "v"]))
    for parameter in (*model.lotr_factors.parameters(), *model.lotr_cores.parameters()):
        nn.init.normal_(parameter, std=0.4)
    return model


def truth(model: Chain, x: Tensor, core_of) -> Tensor:
    factors = model.lotr_factors[f"{D}x{D}"]
    for i, layer in enumerate(model.layers):
        x = torch.tanh(nnf.linear(x, layer.weight, layer.bias) + layer.scaling * (x @ factors.A @ core_of(i) @ factors.B.T))
    return x


def gradients(model: Chain, y: Tensor, x: Tensor) -> list[Tensor]:
    y.square().sum().backward()
    found = [t.grad for t in (x, *model.lotr_factors.parameters(), *model.lotr_cores.parameters())]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_random_cores_draw_in_a_recomputation_what_they_drew_before(reentrant: bool | None) -> None:
    model = adapted(Dropped)
    model.reentrant = reentrant
    x = torch.randn(7, 30, D)
    runs = []
    for call in (model, lambda x: truth(model, x, lambda i: nnf.dropout(model.lotr_cores.values[i], 0.5))):
        torch.manual_seed(3)
        y = call(own := x.clone().requires_grad_())
        runs.append([y.detach(), *gradients(model, y, own)])
    for got, want in zip(*runs, strict=True):
        assert relative(got, want.double()) < 1e-5


class DroppedCore(nn.Module):
    """A core of one layer's own, of which elements are dropped each time."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(R, R))  # a name of any kind: it once was a method that lotr_ext called

    def forward(self) -> Tensor:
        return nnf.dropout(self.shared, 0.5)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_random_core_of_one_layer_draws_in_a_recomputation_what_it_drew_before(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model = apply_lotr(Chain(), LoTRConfig(rank=R, target_modules=["q", "v"]))
    for i, layer in enumerate(model.layers):
        nn.init.normal_(layer.core)
        if i % 2:
            layer.use_core(DroppedCore())
    model.reentrant = reentrant
    x, runs = torch.randn(7, 30, D), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for call in (model, lambda x: truth(model, x, lambda i: model.layers[i].core)):
        torch.manual_seed(3)
        y = call(own := x.clone().requires_grad_())
        y.square().sum().backward()
        runs.append([y.detach(), own.grad, *(p.grad for p in trained)])
        model.zero_grad()
    for got, want in zip(*runs, strict=True):
        assert relative(got, want.double()) < 1e-5


def test_cores_that_draw_nothing_in_evaluation_are_made_at_once(monkeypatch) -> None:
    model, calls = adapted(Dropped), []
    monkeypatch.setattr(Dropped, "make", lambda self, index=None, make=Dropped.make: calls.append(index) or make(self, index))
    model.eval()(torch.randn(7, 30, D))
    assert calls == [None]


@pytest.mark.parametrize("core", ["tucker", "few", "diagonal"])
def test_a_parameter_or_buffer_replaced_within_a_forward_is_the_one_of_later_layers(core: str) -> None:
    model = adapted(core)
    cores, x = model.lotr_cores, torch.randn(7, 30, D)
    name, old = next(iter(cores.named_buffers() if core == "few" else cores.named_parameters()))
    new = torch.randn_like(old) if core == "few" else nn.Parameter(torch.randn_like(old))
    while new._version < old._version:  # which a version alone cannot tell from the old one
        torch.autograd.graph.increment_version(new)

    def replace(*_: object) -> None:
        setattr(cores, name, new)

    def true_core(i: int) -> Tensor:
        setattr(cores, name, old if i < 2 else new)
        return cores.make(i)

    model.layers[2].register_forward_pre_hook(replace)
    y = model(x)
    with torch.no_grad():
        assert relative(y, truth(model, x, true_core).double()) < 1e-5


@pytest.mark.parametrize("core", list(FORMS))
def test_all_gradients_come_from_the_cores_of_a_recomputation(core: str) -> None:
    """Where what the cores are made of changes between forward and backward. Those of a train came from the older ones."""
    model = adapted(core)
    x = torch.randn(40, D, requires_grad=True)
    middle = model.pair(0, x).detach()
    model.reentrant = False
    y = model(x)
    with torch.no_grad():
        for parameter in model.lotr_cores.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    got = gradients(model, y, x)
    x.grad = None

    # the recomputation of each region begins with what the forward gave it
    middle.requires_grad_()
    model.pair(2, middle).backward(2 * y.detach())
    model.pair(0, x).backward(middle.grad)
    want = [t.grad for t in (x, *model.lotr_factors.parameters(), *model.lotr_cores.parameters())]
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 5e-6


class Squared(Cores):
    """Each core is a square's square: autograd keeps the inner square."""

    def __init__(self, places, rank):
        super().__init__(places, rank)
        self.roots = nn.Parameter(torch.ones(len(self.places), self.r_in, self.r_out))

    def make(self, index: int | None = None) -> Tensor:
        return (self.roots if index is None else self.roots[index]).square().square()


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_core_keeps_of_older_parameters_is_an_error(reentrant: bool) -> None:
    """The recomputation reads the new ones, and does not make again what autograd kept. Reentrant checkpointing does."""
    model = adapted(Squared)
    model.reentrant = reentrant
    x = torch.randn(40, D, requires_grad=True)
    gradients(model, model(x), x)
    y = model(x)
    with torch.no_grad():
        model.lotr_cores.roots.mul_(0.9)
    if reentrant:
        gradients(model, y, x)
    else:
        with pytest.raises(RuntimeError, match="core: expected the parameters of Squared as the forward read them"):
            gradients(model, y, x)
