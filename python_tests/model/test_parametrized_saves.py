"""Parametrized cores, A and B saved and loaded: onto their own kind, onto plain models and back; counted, merged, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from toys import IDS, Toy, adapted, assert_unchanged, randomize, refused, snapshot, toy

from lotr_ext import add_adapter, load_adapter, lotr_parameters, merge, mixed, save_adapter, trainable_summary, unload
from lotr_ext.interop import lotr_to_lora
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.adapter_files import read


class Tanh(nn.Module):
    """Values in (-1, 1), and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()

    def right_inverse(self, y: Tensor) -> Tensor:
        return y.clamp(-0.999, 0.999).atanh()


class Scale(nn.Module):
    """Trained itself, and shared by all who register it; no way back."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def register(model: Toy, kind: str) -> Toy:
    factors, layers, shared = model.lotr_factors["16x16"], adapted_layers(model), Scale()
    if kind == "tanh cores":
        for layer in layers.values():
            parametrize.register_parametrization(layer, "core", Tanh())
    elif kind == "orthogonal factors":
        for part in ("A", "B"):
            parametrizations.orthogonal(factors, part)
    elif kind == "weight_norm of A":
        parametrizations.weight_norm(factors, "A")
    elif kind == "a generator shared by the cores":
        for layer in layers.values():
            parametrize.register_parametrization(layer, "core", shared)
    return model


KINDS = ["tanh cores", "orthogonal factors", "weight_norm of A", "a generator shared by the cores"]
BACK = KINDS[:3]


def trained(kind: str, **settings) -> Toy:
    model = register(adapted(**settings), kind)
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    return model(IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_onto_a_model_with_the_same_parametrizations(kind: str, tmp_path: Path) -> None:
    model = trained(kind, modules_to_save=["head"])
    save_adapter(model, tmp_path)
    other = load_adapter(register(adapted(random=False, modules_to_save=["head"]), kind).eval(), tmp_path)
    assert torch.equal(out(other), out(model))
    want = dict(model.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in other.named_parameters())  # the originals, too: training goes on


@pytest.mark.parametrize("onto", ["base", "adapted"])
@pytest.mark.parametrize("kind", KINDS)
def test_onto_a_plain_model_the_values_are_loaded_with_a_warning(kind: str, onto: str, tmp_path: Path) -> None:
    model = trained(kind)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="the saved model had parametrizations"):
        other = load_adapter(toy() if onto == "base" else adapted(random=False), tmp_path).eval()
    assert torch.equal(out(other), out(model))
    assert all("parametrizations" not in name for name in other.state_dict())


@pytest.mark.parametrize("kind", BACK)
def test_a_plain_adapter_onto_a_parametrized_model(kind: str, tmp_path: Path) -> None:
    plain = adapted(random=False).eval()
    if kind != "orthogonal factors":
        randomize(plain)
    with torch.no_grad():
        for layer in adapted_layers(plain).values():
            layer.core.uniform_(-0.9, 0.9)
    save_adapter(plain, tmp_path)
    model = load_adapter(register(adapted(seed=3), kind).eval(), tmp_path)
    torch.testing.assert_close(model.lotr_factors["16x16"].A, plain.lotr_factors["16x16"].A, rtol=1e-4, atol=1e-5)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(layer.core, adapted_layers(plain)[name].core, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("tanh cores", 3.0, r"core: expected values that the model's parametrization can represent"),
        ("orthogonal factors", 3.0, r"lotr_factors.16x16.A: expected .*(values that|that can be set)"),
        ("a generator shared by the cores", 0.5, r"q.core: expected a parametrization that can be set to a value, got Scale"),
    ],
)
def test_values_that_a_parametrization_cannot_have_are_refused(kind: str, value: float, message: str, tmp_path: Path) -> None:
    plain = adapted()
    with torch.no_grad():
        for parameter in lotr_parameters(plain):
            parameter.fill_(value)
    save_adapter(plain, tmp_path)
    model = register(adapted(), kind)
    with refused(model, ValueError, match=message):
        load_adapter(model, tmp_path)


def test_originals_of_another_parametrization_are_refused(tmp_path: Path) -> None:
    save_adapter(trained("tanh cores"), tmp_path)
    model = adapted()
    for layer in adapted_layers(model).values():
        parametrize.register_parametrization(layer, "core", nn.Identity())
    with refused(model, ValueError, match=r"core: expected values that the model's parametrization can represent"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_the_parts_are_computed_from(kind: str) -> None:
    model = register(adapted(), kind)
    found = list(lotr_parameters(model))
    want = [p for name, p in model.named_parameters() if p.requires_grad]
    assert {id(p) for p in found} == {id(p) for p in want} and all(p.is_leaf for p in found)
    assert trainable_summary(model).adapter == trainable_summary(model).trained == sum(p.numel() for p in want)
    torch.optim.SGD(found, lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_parts_merge_unload_and_become_a_lora(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    y = out(model)
    save_adapter(model, tmp_path / "lotr")
    layers = lotr_to_lora(tmp_path / "lotr", tmp_path / "lora")
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(layers[name].scaling * layers[name].B @ layers[name].A, layer.delta_weight())
    merge(model)
    torch.testing.assert_close(out(model), y, rtol=1e-4, atol=1e-5)
    unload(model, merge=True)
    torch.testing.assert_close(out(model), y, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == toy().state_dict().keys()


def test_the_file_names_values_as_any_other_adapters(tmp_path: Path) -> None:
    model = trained("a generator shared by the cores")
    save_adapter(model, tmp_path)
    tensors = read(tmp_path)[1]
    assert torch.equal(tensors["blocks.1.v.core"], model.blocks[1].v.core)
    assert sum(key.endswith(".scale") for key in tensors) == 1  # shared: once


def test_several_adapters_refuse_parametrized_parts_by_name() -> None:
    for kind, part in (("tanh cores", "core"), ("weight_norm of A", "A")):
        model = register(adapted(), kind)
        before = snapshot(model)
        for action in (lambda m=model: add_adapter(m, "other"), lambda m=model: mixed(m, [None]).__enter__()):
            with pytest.raises(RuntimeError, match=rf"expected cores and .* parameters, got 'blocks.0.q', whose {part}"):
                action()
        assert_unchanged(model, before)
