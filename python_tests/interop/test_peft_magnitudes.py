"""Magnitudes (DoRA) beside PEFT: LoTRPeftConfig(magnitude=True), and PEFT's own DoRA as a second truth."""

from __future__ import annotations

import copy

import pytest
import torch
from peft_toys import Conv1D, base, config, peft, tuned
from torch import Tensor, nn
from toys import IDS

from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter, set_adapter
from lotr_ext.interop import export_lora, lora_to_lotr, lotr_to_lora
from lotr_ext.interop.peft import LoTRPeftLinear
from lotr_ext.interop.vllm.files import export_factors
from lotr_ext.layers.magnitude import stored_in
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.peft_files import lotr_to_peft
from nets import relative


def layers_of(model: nn.Module) -> dict[str, LoTRPeftLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoTRPeftLinear)}


def dense(model: nn.Module, kind: str = "toy", name: str = "default") -> nn.Module:
    """The base with each weight as the formula of DoRA has it."""
    plain = base(kind)
    for at, layer in layers_of(model).items():
        core, own = layer.lotr_adapter[name], plain.get_submodule(at.removeprefix("base_model.model."))
        rows = stored_in(layer.base_layer)[1]().detach() + core.delta()
        rows = rows * (core.magnitude.detach() / rows.norm(dim=1)).unsqueeze(1)
        own.weight.data = rows.T.contiguous() if isinstance(own, Conv1D) else rows
    return plain


class One(nn.Module):
    def __init__(self, k: int, n: int, bias: bool, conv: bool):
        super().__init__()
        self.layer = Conv1D(n, k) if conv else nn.Linear(k, n, bias)
        nn.init.normal_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("form", ["bias", "no bias", "conv1d"])
def test_the_numbers_are_those_of_peft_dora(form, tokens):
    """The same A, B G^T and m: the same y, and the same gradients of x and m."""
    net = One(21, 13, form == "bias", form == "conv1d").double()
    settings = {"r": 3, "lora_alpha": 2.1, "target_modules": ["layer"], "use_dora": True}
    settings["fan_in_fan_out"] = form == "conv1d"
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**settings)).double().base_model.model
    lotr = LoTRConfig(rank=3, alpha=2.1, target_modules=["layer"], magnitude=True, adapter_dtype=torch.float64)
    own = apply_lotr(net, lotr).layer
    dora = theirs.layer.lora_magnitude_vector["default"]
    with torch.no_grad():
        assert relative(own.magnitude, dora.weight) < 1e-12
        own.core.normal_()
        own.magnitude.mul_(torch.rand_like(own.magnitude) + 0.5)
        dora.weight.copy_(own.magnitude)
        theirs.layer.lora_A["default"].weight.copy_(own.factors.A.T)
        theirs.layer.lora_B["default"].weight.copy_(own.factors.B @ own.core.T)
    x = torch.randn(tokens, 21, dtype=torch.float64, requires_grad=True)
    y, want = own(x), theirs(x)
    assert relative(y, want) < 1e-12
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, own.magnitude), g)
    for a, b in zip(ours, torch.autograd.grad(want, (x, dora.weight), g), strict=True):
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("kind, settings", [("toy", {}), ("conv", {"target_modules": ["up", "down"]})])
@pytest.mark.parametrize("name", ["magnitude", "use_dora"])
def test_as_a_method_of_peft(kind, settings, name, tmp_path):
    fresh = tuned(kind, random=False, **settings, **{name: True})
    assert relative(fresh(IDS), base(kind)(IDS)) < 1e-6 and fresh.peft_config["default"].magnitude
    model = tuned(kind, **settings, **{name: True})
    want = dense(model, kind)(IDS)
    assert relative(model(IDS), want) < 1e-5
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert sum(key.endswith(".magnitude") for key in trained) == len(layers_of(model))
    with model.disable_adapter():
        assert relative(model(IDS), base(kind)(IDS)) < 1e-6
    before = [stored_in(layer.base_layer)[0].detach().clone() for layer in layers_of(model).values()]
    model.merge_adapter()
    assert relative(model(IDS), want) < 1e-5
    model.unmerge_adapter()
    after = [stored_in(layer.base_layer)[0] for layer in layers_of(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=low).eval()
        assert relative(again(IDS), want) < 1e-5
    assert relative(load_adapter(base(kind), tmp_path)(IDS), want) < 1e-5
    assert relative(model.merge_and_unload()(IDS), want) < 1e-5


def test_gradients_of_a_peft_model():
    model = tuned(magnitude=True)
    own = apply_lotr(base(), LoTRConfig(rank=4, target_modules=["q", "v"], magnitude=True))
    cores = [layer.lotr_adapter["default"] for layer in layers_of(model).values()]
    with torch.no_grad():
        own.lotr_factors.load_state_dict(model.base_model.lotr_factors["default"].state_dict())
        for layer, core in zip(adapted_layers(own).values(), cores, strict=True):
            layer.core.copy_(core.core)
            layer.magnitude.copy_(core.magnitude)
    for m in (model, own):
        m(IDS).square().sum().backward()
    for layer, core in zip(adapted_layers(own).values(), cores, strict=True):
        assert relative(core.magnitude.grad, layer.magnitude.grad) < 1e-5 and relative(core.core.grad, layer.core.grad) < 1e-5


def test_half_precision_starts_as_the_base():
    """m stays in float32 where the base is in bfloat16."""
    net = base().bfloat16()
    model = peft.get_peft_model(copy.deepcopy(net), config(magnitude=True))
    assert {layer.lotr_adapter["default"].magnitude.dtype for layer in layers_of(model).values()} == {torch.float32}
    assert relative(model(IDS), net(IDS)) < 1e-2


@pytest.mark.parametrize("core, name", [("dense", None), ("cp", None), ("dense", "second")])
def test_load_adapter_keeps_float32_magnitudes_beside_half_precision_factors(core, name, tmp_path):
    """name: beside an adapter that the model has."""
    own = config(magnitude=True, core=core)
    model = peft.get_peft_model(base().bfloat16(), own, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    onto = base().bfloat16()
    if name is not None:
        apply_lotr(onto, LoTRConfig(rank=2, target_modules=["q", "v"]))
        first = onto.eval()(IDS)
    load_adapter(onto, tmp_path, name=name)
    if name is not None:
        assert torch.equal(onto(IDS), first)
        set_adapter(onto, name)
    layers = adapted_layers(onto).values()
    assert {(m.magnitude.dtype, m.factors.A.dtype, m.magnitude.requires_grad) for m in layers} == {
        (torch.float32, torch.bfloat16, True)
    }
    assert torch.equal(onto.eval()(IDS), model.eval()(IDS))
    save_adapter(onto, tmp_path / "lotr")
    assert torch.equal(load_adapter(base().bfloat16(), tmp_path / "lotr").eval()(IDS), model(IDS))


def test_several_adapters():
    model = tuned(magnitude=True)
    first = model(IDS)
    model.add_adapter("second", config(magnitude=True, rank=3))
    model.add_adapter("plain", config(share_factors="default"))
    model.set_adapter("second")
    assert relative(model(IDS), base()(IDS)) < 1e-6
    model.set_adapter("default")
    assert relative(model(IDS), first) < 1e-6
    with pytest.raises(ValueError, match="set_adapter: expected an adapter with magnitudes alone"):
        model.base_model.set_adapter(["default", "second"])
    assert relative(model(IDS), first) < 1e-6
    with pytest.raises(ValueError, match="merge: expected an adapter with magnitudes alone"):
        model.merge_adapter(["default", "second"])
    with pytest.raises(ValueError, match="adapter_names: expected adapters without magnitudes"):
        model.eval()(IDS, adapter_names=["default"] * len(IDS))
    with pytest.raises(ValueError, match="adapters: expected adapters without magnitudes"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "sum")
    assert relative(model(IDS), first) < 1e-6


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, targets", [("toy", ["q", "up"]), ("conv", ["up", "down"])])
@pytest.mark.parametrize("way", ["export_lora", "lotr_to_lora", "svd"])
def test_exported_as_a_dora_of_peft(kind, targets, way, tmp_path):
    settings = LoTRConfig(rank=3, scaling=0.7, target_modules=targets, magnitude=True, init="svd" if way == "svd" else "normal")
    model = apply_lotr(base(kind), settings).eval()
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.core.normal_()
            layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    want = model(IDS)
    if way == "lotr_to_lora":
        save_adapter(model, tmp_path / "own")
        lotr_to_lora(tmp_path / "own", tmp_path / "lora", base_model="here", fan_in_fan_out=kind == "conv")
    else:
        export_lora(model, tmp_path / "lora", base_model="here")
    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "lora").eval()
    assert relative(again(IDS), want) < 1e-5
    assert again.peft_config["default"].use_dora
    with pytest.raises(ValueError, match="use_dora: expected a LoRA of two factors"):
        lora_to_lotr(tmp_path / "lora", rank=3)


def test_lotr_to_peft(tmp_path):
    model = apply_lotr(base(), LoTRConfig(rank=3, target_modules=["q"], magnitude=True)).eval()
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.core.normal_()
            layer.magnitude.mul_(1.5)
    save_adapter(model, tmp_path / "own")
    lotr_to_peft(tmp_path / "own", tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    assert relative(again(IDS), model(IDS)) < 1e-5


def test_what_servers_cannot_hold_is_refused(tmp_path):
    model = apply_lotr(base(), LoTRConfig(rank=3, target_modules=["q"], magnitude=True))
    with pytest.raises(ValueError, match="export_factors: expected an adapter without magnitudes"):
        export_factors(model, tmp_path / "vllm")
    model.blocks[0].q.hold_magnitude(None)
    with pytest.raises(ValueError, match="model: expected magnitudes in all layers or in none"):
        export_lora(model, tmp_path / "lora", base_model="here")
    assert not (tmp_path / "lora").exists()
