"""One A a width in and one B a width out over all layers (group_by="width"), against plain autograd in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import IDS, PlainLoTR, Toy, adapted, loss, plain, refused, toy

from lotr_ext import (
    LoTRConfig,
    LoTRFactor,
    LoTRFactors,
    LoTRLinear,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    save_adapter,
    trainable_summary,
)
from nets import OpCounter, relative

D, KV, FF = 24, 8, 40


class LlamaBlock(nn.Module):
    """The linear layers of a Llama block with grouped queries: q, o [d, d], k, v [d, kv], gate, up [d, ff], down [ff, d]."""

    def __init__(self, d: int = D, kv: int = KV, ff: int = FF, device: str | None = None):
        super().__init__()
        sizes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, ff), "up": (d, ff), "down": (ff, d)}
        for name, (k, n) in sizes.items():
            setattr(self, name, nn.Linear(k, n, bias=False, device=device))
        self.heads = d // kv

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        x = x + self.o(torch.sigmoid(self.q(h)) * (self.k(h) * self.v(h)).repeat(1, self.heads))
        h = torch.tanh(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))


class Llama(nn.Sequential):
    """[m, d] -> [m, d]. reentrant: None without checkpointing, else its use_reentrant."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in (m for m in self if isinstance(m, LlamaBlock)):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def llama(group_by: str = "width", **settings) -> Llama:
    torch.manual_seed(0)
    model = apply_lotr(Llama(LlamaBlock(), LlamaBlock()), LoTRConfig(rank=4, group_by=group_by, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def grads(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of sum(y^2) by state_dict's names, x's among them."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"x": x.grad}


def truth(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    twin = plain(copy.deepcopy(model).double())
    twin.reentrant = None
    return grads(twin, x.double())


def assert_right(model: nn.Module, x: Tensor) -> None:
    want, got = truth(model, x), grads(model, x)
    assert got.keys() == want.keys() and len(got) > 1
    assert max(relative(got[name], value) for name, value in want.items()) < 5e-6


X = torch.randn(150, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("train", [("A", "B", "core"), ("B", "core"), ("A", "core")], ids=lambda t: "".join(t))
@pytest.mark.usefixtures("either_path")
def test_gradients_are_those_of_plain_autograd(reentrant, train) -> None:
    model = llama(train=train)
    model.reentrant = reentrant
    assert_right(model, X)
    assert_right(model, X)  # a second round


def test_a_llama_block_shrinks_four_times_for_seven_layers(monkeypatch, two_nodes) -> None:
    """By shape k and v have another A than q: five."""
    counter = OpCounter(monkeypatch)
    for group_by, shrinks in (("width", 4), ("shape", 5)):
        model = llama(group_by)
        counter.clear()
        y = model(X.clone().requires_grad_())
        forward = counter.take()
        assert forward["shrink"] == 2 * shrinks and forward["expand_add_"] == 2 * 7
        y.square().sum().backward()
        backward = counter.take()  # a pass over x for dA and one onto dx a shrink
        assert backward["factor_grad_"] == 2 * shrinks and backward["expand_add_"] == 2 * shrinks


def test_sizes_at_llama_3_8b() -> None:
    blocks = nn.Sequential(*(LlamaBlock(4096, 1024, 14336, device="meta") for _ in range(32)))
    count = {}
    for group_by in ("width", "shape"):
        model = apply_lotr(copy.deepcopy(blocks), LoTRConfig(rank=16, group_by=group_by))
        count[group_by] = trainable_summary(model).adapter
    assert count == {"width": 663_552, "shape": 860_160}
    assert sum(16 * (m.in_features + m.out_features) for m in blocks.modules() if isinstance(m, nn.Linear)) == 41_943_040


def test_an_adapter_is_not_loaded_onto_other_groups(tmp_path: Path) -> None:
    save_adapter(llama(), tmp_path)
    by_shape = llama("shape")
    with refused(
        by_shape, ValueError, match=r"0\.q: expected factors 'lotr_factors\.24x24' as in the model, got \('lotr_factors"
    ):
        load_adapter(by_shape, tmp_path)


def test_rank_in_and_rank_out() -> None:
    torch.manual_seed(0)
    model = apply_lotr(Llama(LlamaBlock(), LlamaBlock()), LoTRConfig(rank=(3, 5), group_by="width"))
    assert model.lotr_factors[f"A_{D}"].value.shape == (D, 3) and model.lotr_factors[f"B_{D}"].value.shape == (D, 5)
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.normal_(0, 0.3)
    assert_right(model, X)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def by_hand() -> tuple[nn.Module, LoTRFactor]:
    """Three layers on one x that have A, with B of their own or shared."""
    torch.manual_seed(0)
    A = LoTRFactor(D, 4)
    B = {n: LoTRFactor(n, 4) for n in (D, KV)}
    model = nn.ModuleList(LoTRLinear(D, n, factors=LoTRFactors.of(A, B[n])) for n in (D, KV, KV))
    with torch.no_grad():
        for layer in model:
            layer.core.normal_(0, 0.3)
    return model, A


def test_by_hand(monkeypatch, two_nodes, tmp_path: Path) -> None:
    model, A = by_hand()
    counter = OpCounter(monkeypatch)
    x = X.clone().requires_grad_()
    sum(layer(x).square().sum() for layer in model).backward()
    assert counter["shrink"] == counter["factor_grad_"] == 1 and A._shared.pending() == 0
    twin = nn.ModuleList(PlainLoTR(layer) for layer in copy.deepcopy(model).double())
    for layer in twin:
        layer.pair[0].factor_A.value.grad = layer.pair[0].factor_B.value.grad = None
    z = X.double().requires_grad_()
    sum(layer(z).square().sum() for layer in twin).backward()
    assert relative(A.value.grad, twin[0].pair[0].A.grad) < 5e-6 and relative(x.grad, z.grad) < 5e-6
    for layer, other in zip(model, twin, strict=True):
        assert relative(layer.factors.B.grad, other.pair[0].B.grad) < 5e-6
        assert relative(layer.core.grad, other.core.grad) < 5e-6
    save_adapter(model, tmp_path)
    fresh, fresh_A = by_hand()
    with torch.no_grad():
        fresh_A.value.zero_()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh[1](X), model[1](X))
    state = model.state_dict()
    assert sum(key.endswith(".value") for key in state) == 6  # by each name that it has
    other, other_A = by_hand()
    other.load_state_dict(state)
    assert torch.equal(other_A.value, A.value)
    state["1.factors.factor_A.value"] = state["0.factors.factor_A.value"] + 1
    with pytest.raises(RuntimeError, match=r"1\.factors\.factor_A\.value: expected the values of 0\.factors\.factor_A\.value"):
        other.load_state_dict(state)


def test_factors_that_make_no_pair_are_refused() -> None:
    A, B = LoTRFactor(8, 4), LoTRFactor(6, 4)
    assert LoTRFactors.of(A, LoTRFactor(6, 2), (4, 2)).rank == (4, 2)
    for arguments, error, message in (
        ((A, B.value), TypeError, "B: expected a LoTRFactor, got Parameter"),
        ((A, A), ValueError, "B: expected another factor than A, got the same one"),
        ((A, LoTRFactor(6, 2)), ValueError, "B: expected a factor of rank 4, as A has, got one of rank 2"),
        ((A, B, (4, 3)), ValueError, "B: expected a factor of rank 3, as given, got one of rank 4"),
        ((A, B, 2), ValueError, "A: expected a factor of rank 2, as given, got one of rank 4"),
        ((A, LoTRFactor(6, 4, dtype=torch.float64)), TypeError, "B: expected dtype torch.float32, as A has, got torch.float64"),
    ):
        with pytest.raises(error, match=message.replace("(", r"\(")):
            LoTRFactors.of(*arguments)
    for arguments, error, message in (
        ((0, 4), ValueError, "features: expected at least 1, got 0"),
        ((4, "r"), TypeError, "rank: expected an int, got str 'r'"),
    ):
        with pytest.raises(error, match=message):
            LoTRFactor(*arguments)
    with pytest.raises(ValueError, match=r"factors: expected \(in_features, out_features\) = \(8, 7\), got \(8, 6\)"):
        LoTRLinear(8, 7, factors=LoTRFactors.of(A, B))


def test_svd_is_refused() -> None:
    with pytest.raises(ValueError, match='init: expected another one with group_by "width"'):
        LoTRConfig(group_by="width", init="svd")


def test_a_head_trained_beside_it_goes_along(tmp_path: Path) -> None:
    model = adapted(group_by="width", target_modules="all-linear", exclude_modules=["head"], modules_to_save=["head"])
    assert isinstance(model, Toy) and set(model.lotr_factors) == {"A_16", "A_32", "B_16", "B_32"}
    loss(model).backward()
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(toy(), tmp_path)(IDS), model(IDS))
