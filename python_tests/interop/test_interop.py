"""LoTR adapters exported to PEFT, loaded by the real PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import IDS, Toy, adapted, randomize, toy

from lotr_ext import LoTRFactors, LoTRLinear, save_adapter
from lotr_ext.interop import export_lora, lora_factors, lotr_to_lora
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.apply import apply_lotr
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.merging import merge

peft = pytest.importorskip("peft", reason="peft is not installed")


def loaded(base: nn.Module, directory: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and of unexpected keys
        return peft.PeftModel.from_pretrained(base, str(directory))


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 4),
        ({"alpha": 8.0, "target_modules": ["q", "v", "up", "down"]}, 4),
        ({"rank": (3, 5), "scaling": 0.37}, 3),
        ({"rank": (6, 2), "alpha": -3.0, "group_by": "name"}, 2),
        ({"target_modules": ["0.q", "1.k"], "dropout": 0.1}, 4),
        ({"modules_to_save": ["head", "0.norm"], "rslora": True, "alpha": 3.0}, 4),
        ({"init": "svd", "alpha": 2.0}, 8),
    ],
)
def test_peft_gives_the_same_outputs(tmp_path: Path, settings: dict, rank: int) -> None:
    model = adapted(**settings).eval()
    for parameter in model.head.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    export_lora(model, tmp_path / "lora")
    other = loaded(toy(), tmp_path / "lora").eval()
    assert torch.allclose(other(IDS), model(IDS), atol=2e-5) and (other(IDS) - toy()(IDS)).abs().max() > 0.01
    adapters = [m for m in other.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(adapters) == len(adapted_layers(model)) and {m.r["default"] for m in adapters} == {rank}
    assert torch.allclose(other.merge_and_unload()(IDS), model(IDS), atol=2e-5)
    if settings.get("init") != "svd":
        export_lora(merge(model), tmp_path / "merged")
        assert torch.allclose(loaded(toy(), tmp_path / "merged").eval()(IDS), model(IDS), atol=2e-5)


class Mixed(nn.Module):
    """Groups of different ranks and scalings, built by hand; names that are endings of others."""

    def __init__(self, lotr: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.inner = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}),
        )
        if lotr:
            self.a = LoTRLinear.from_linear(self.a, LoTRFactors(6, 6, 2), alpha=3.0)
            self.inner["a"] = LoTRLinear.from_linear(self.inner["a"], LoTRFactors(6, 6, 4), scaling=-1.0)
            self.inner["b"] = LoTRLinear.from_linear(self.inner["b"], LoTRFactors(6, 6, (3, 4)), scaling=0.5)

    def forward(self, x):
        return self.inner["b"](torch.tanh(self.inner["a"](self.b(torch.tanh(self.a(x))))))


def test_rank_and_alpha_patterns_and_exact_targets(tmp_path: Path) -> None:
    model, x = Mixed(lotr=True), torch.randn(5, 6)
    randomize(model)
    export_lora(model, tmp_path)
    other = loaded(Mixed(lotr=False), tmp_path)
    assert torch.allclose(other(x), model(x), atol=1e-5)
    ranks = {n: m.r["default"] for n, m in other.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert ranks == {"base_model.model.a": 2, "base_model.model.inner.a": 4, "base_model.model.inner.b": 3}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^a": 2, "inner.b": 3}


def test_a_reader_of_r_and_lora_alpha_alone_gets_every_layers_scaling(tmp_path: Path) -> None:
    """As TGI and older versions of vLLM, which do not read the patterns."""
    model = Mixed(lotr=True)
    randomize(model)
    layers = adapted_layers(model)
    deltas = {name: layer.delta_weight() for name, layer in layers.items()}
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["r"] == 4  # no layer has a higher rank
    for name, delta in deltas.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(config["lora_alpha"] / config["r"] * B @ A, delta, atol=1e-6)


def test_a_converted_file_names_its_modules_one_by_one(tmp_path: Path) -> None:
    """SGLang refuses a regex in target_modules; a PEFT model of the base has no other adapted module."""
    model = adapted()
    randomize(model)
    save_adapter(model, tmp_path / "saved")
    lotr_to_lora(tmp_path / "saved", tmp_path / "lora", base_model="base")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(adapted_layers(model))


def test_gpt2_conv1d_and_bert_heads(tmp_path: Path) -> None:
    from tiny_models import bert, gpt2

    def seeded(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    cases = [
        (gpt2, {"target_modules": ["c_attn", "c_fc"]}, "CAUSAL_LM"),
        (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}, "SEQ_CLS"),
    ]
    for i, (make, settings, task) in enumerate(cases):
        model = apply_lotr(seeded(make), LoTRConfig(rank=4, alpha=8.0, **settings)).eval()
        randomize(model)
        export_lora(model, tmp_path / str(i), task_type=task)
        config = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        assert (config["fan_in_fan_out"], config["r"], config["lora_alpha"]) == (make is gpt2, 4, 8)
        assert sorted(config["target_modules"]) == sorted(settings["target_modules"])
        assert config["modules_to_save"] == settings.get("modules_to_save")
        other = loaded(seeded(make), tmp_path / str(i)).eval()
        assert torch.allclose(other(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=2e-5)


def test_factors_in_the_adapters_dtype() -> None:
    layer = adapted(adapter_dtype=torch.float64).blocks[0].q
    lora_A, lora_B = lora_factors(layer)
    assert lora_A.dtype == torch.float64 and torch.allclose(layer.scaling * lora_B @ lora_A, layer.delta_weight().double())


def twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with torch.device("meta"):
        meta = apply_lotr(Toy(), LoTRConfig(rank=2))
    cases = [
        (toy(), "x", RuntimeError, "model: expected one with a LoTR adapter"),
        (meta, "x", RuntimeError, "expected tensors with values"),
        (adapted(), "file", ValueError, "directory: expected"),
        ([], "x", TypeError, "model: expected an nn.Module"),
        (adapted(), b"x", TypeError, "directory: expected a path, got bytes"),
        (apply_lotr(twice(), LoTRConfig(rank=2)), "x", ValueError, "expected layers in one place each, got one at 0 and 2"),
    ]
    for model, where, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_lora(model, tmp_path / where if isinstance(where, str) else where)
    for rank in (2.5, True):
        with pytest.raises(TypeError, match="pad_rank: expected an int"):
            export_lora(adapted(), tmp_path / "x", pad_rank=rank)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(TypeError, match="layer: expected a LoTRLayer, got Linear"):
        lora_factors(nn.Linear(2, 2))
