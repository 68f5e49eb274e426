"""apply_lotr on layers that need care."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from toys import IDS, Largest, Tied, Toy, adapted, loss, plain, randomize, target_names, toy

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped
from lotr_ext.layers.layer import LoTRLayer
from lotr_ext.model.adapted import adapted_layers, lotr_parameters
from lotr_ext.model.apply import apply_lotr
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.merging import merge, unload
from lotr_ext.model.summary import trainable_summary

# ---- weights that are shared, or read without a call -----------------------------------------------------------------


def test_tied_output_layer_is_left_out_and_never_merged_into() -> None:
    assert "head" not in target_names(Tied()) and len(target_names(Tied())) == 12
    with pytest.raises(ValueError, match=r"head.*tied to embed.weight"):
        target_names(Tied(), target_modules=["q", "head"])
    model = Toy(classes=29)
    apply_lotr(model, LoTRConfig(rank=2))
    randomize(model)
    model.head.weight = model.embed.weight  # tied after the fact, as tie_weights() may do
    before = model.embed.weight.detach().clone()
    for call in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(RuntimeError, match=r"head.*tied to embed.weight"):
            call(model)
    assert torch.equal(model.embed.weight, before) and not model.blocks[0].q.merged


def test_weights_tied_through_memory_are_noticed() -> None:
    model = Toy(classes=29)
    model.head.weight = nn.Parameter(model.embed.weight.data)
    assert "head" not in target_names(model)


def test_multihead_attention_out_proj_is_refused_by_name() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn.out_proj.*MultiheadAttention reads"):
        apply_lotr(model, LoTRConfig(rank=2, target_modules=["out_proj"]))
    with pytest.warns(UserWarning, match="left out self_attn.out_proj"):
        assert target_names(model) == ["linear1", "linear2"]


@pytest.mark.filterwarnings("ignore:lotr_ext. left out", "ignore:.*nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_calls_its_adapted_layers(norm_first: bool) -> None:
    def encoder() -> nn.TransformerEncoder:
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2).eval()

    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    model = apply_lotr(encoder(), LoTRConfig(rank=4))
    randomize(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        want = plain(copy.deepcopy(model))(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        got = model(x, src_key_padding_mask=mask)
        assert torch.allclose(got[~mask], want[~mask], atol=1e-5)
        assert (got - encoder()(x, src_key_padding_mask=mask))[~mask].abs().max() > 0.1
    unload(model, merge=False)
    fresh = encoder()
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == {
        k: v for k, v in vars(fresh).items() if not k.startswith("_")
    }
    assert model.layers[0].activation_relu_or_gelu == fresh.layers[0].activation_relu_or_gelu == 1


# ---- other kinds of layers -------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """Stands in for a quantised layer: its stored weight is not W."""

    def __init__(self, n: int, k: int):
        super().__init__()
        self.in_features, self.out_features = k, n
        self.register_buffer("packed", torch.randint(-8, 8, (n, k), dtype=torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype) * 0.05)


def test_foreign_linear_modules_are_wrapped_and_called() -> None:
    model = toy()
    for block in model.blocks:
        block.q = Doubled(16, 16)
    base = model(IDS)
    assert not any(n.endswith("q") for n in target_names(model))  # "all-linear" takes no module that it does not know
    apply_lotr(model, LoTRConfig(rank=4, target_modules=["q", "v"]))
    assert torch.equal(model(IDS), base) and isinstance(model.blocks[0].q, LoTRWrapped)
    randomize(model)
    assert torch.allclose(model(IDS), plain(copy.deepcopy(model))(IDS), atol=1e-5)
    with pytest.raises(TypeError, match=r"blocks.0.q.*Doubled"):
        merge(model)
    assert not model.blocks[0].v.merged
    unload(model, merge=False)
    assert isinstance(model.blocks[0].q, Doubled) and torch.equal(model(IDS), base)


def test_hooks_and_parametrizations_of_a_layer_are_kept() -> None:
    model, calls = toy(), []
    model.blocks[0].q.register_forward_hook(lambda module, args, y: calls.append(1))
    parametrizations.weight_norm(model.blocks[1].q)
    base = model(IDS)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["q", "v"]))
    assert torch.equal(model(IDS), base) and len(calls) == 2
    assert [type(model.blocks[i].q) for i in range(2)] == [LoTRWrapped] * 2
    loss(model).backward()
    assert model.blocks[1].q.core.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["start_core", "core", "factors", "magnitude", "merged", "base_layer", "in_use"])
def test_names_in_the_model_are_free(name: str) -> None:
    model = toy()
    model.add_module(name, model.head)
    model.blocks[0].add_module(name, model.blocks[0].q)
    base = model(IDS)
    apply_lotr(model, LoTRConfig(rank=2))
    assert torch.allclose(model(IDS), base, atol=1e-6)
    randomize(model)
    assert torch.allclose(model(IDS), plain(copy.deepcopy(model))(IDS), atol=1e-5)


class Transparent(nn.Module):
    """Has all attributes of the module inside."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, x):
        return self.inside(x)


def test_wrapper_with_the_attributes_of_the_adapted_layer() -> None:
    model = toy()
    model.blocks[0].q = Transparent(model.blocks[0].q)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["inside", "v"]))
    randomize(model)
    assert torch.allclose(model(IDS), plain(copy.deepcopy(model))(IDS), atol=1e-5)
    assert len(adapted_layers(model)) == 3 and sum(len(of) for of in model._lotr_layers.by_B.values()) == 3


class Tagged(nn.Linear):
    """With nn.Linear's own forward."""


def test_what_others_have_added_to_a_layer_is_kept() -> None:
    model = toy()
    linear = Tagged(16, 16)
    linear.tag, linear.extra, linear.child = "q", nn.Parameter(torch.ones(2)), nn.LayerNorm(3)
    linear.register_buffer("seen", torch.zeros(()))
    linear.register_buffer("passing", torch.zeros(()), persistent=False)
    model.blocks[0].q = linear
    keys, y = list(model.state_dict()), model(IDS)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["q", "v"]))
    layer = model.blocks[0].q
    assert isinstance(layer, LoTRLinear) and layer.tag == "q" and layer.seen is linear.seen
    assert set(keys) <= set(model.state_dict()) and not layer.extra.requires_grad
    layer.tag = "changed"
    for one in (copy.deepcopy(model), model):
        unload(merge(one), merge=True)
        assert sorted(one.state_dict()) == sorted(keys) and torch.equal(one(IDS), y)
        plain_layer = one.blocks[0].q
        assert type(plain_layer) is Tagged and plain_layer.tag == "changed" and "passing" in dict(plain_layer.named_buffers())


# ---- settings, devices -----------------------------------------------------------------------------------------------


def test_settings_reach_the_layers() -> None:
    model = adapted(rank=(2, 8), alpha=4.0, rslora=True, dropout=0.25)
    assert {(layer.scaling, layer.dropout) for layer in adapted_layers(model).values()} == {(4.0 / 8**0.5, 0.25)}
    for scaling, expected in ((0.7, 0.7), ("auto", 4.0 * (8 / 2) ** 1.5)):
        assert {layer.scaling for layer in adapted_layers(adapted(scaling=scaling, rank=2)).values()} == {expected}
    diagonal = adapted(scaling="auto", rank=2, core="diagonal")
    assert {layer.scaling for layer in adapted_layers(diagonal).values()} == {4.0 * (8 / 2) ** 0.5}
    assert not torch.equal(model.train()(IDS), model(IDS)) and torch.equal(model.eval()(IDS), model(IDS))
    assert all(layer.training == (i < 1) for i, layer in enumerate([adapted().train().blocks[0].q, model.blocks[0].q]))


def test_meta_model_is_adapted_without_memory() -> None:
    with torch.device("meta"):
        model = apply_lotr(Toy(), LoTRConfig(rank=4))
    assert all(p.is_meta for p in model.parameters())
    assert trainable_summary(model).adapter == sum(p.numel() for p in lotr_parameters(model))


def test_from_linear_allocates_no_dense_layer() -> None:
    linear, factors = nn.Linear(64, 64), LoTRFactors(64, 64, 2)
    with Largest() as seen:
        layer = LoTRLinear.from_linear(linear, factors)
        kept = layer.to_base()
    assert layer.weight is linear.weight is kept.weight and layer.bias is linear.bias
    assert seen.elements < 64 * 64


def test_layers_are_lotr_layers_for_isinstance_and_linear_too() -> None:
    layer = adapted().blocks[0].q
    assert isinstance(layer, LoTRLayer) and isinstance(layer, nn.Linear)
