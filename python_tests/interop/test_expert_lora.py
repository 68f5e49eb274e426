"""Experts' adapters as LoRA: what PEFT loads computes the same, shared outer factors say the same, with and without a model."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from mixtures import adapted, logits, mixture
from safetensors.torch import load_file
from tiny_models import LLAMA, transformers

from lotr_ext import LoTRConfig, LoTRExperts, apply_lotr, save_adapter
from lotr_ext.interop import expert_lora_factors, export_lora, lora_factors, lotr_to_lora
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.experts import parameter_name
from nets import relative


def both(tmp_path, model, **options) -> list:
    """The folders that export_lora and, from a saved adapter, lotr_to_lora write: of the same tensors and settings."""
    export_lora(model, tmp_path / "model", **options)
    save_adapter(model, tmp_path / "saved")
    lotr_to_lora(tmp_path / "saved", tmp_path / "file", **options)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("model", "file"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    return [tmp_path / "model", tmp_path / "file"]


@pytest.mark.parametrize("rank", [4, (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
def test_peft_computes_the_same(tmp_path, name, rank):
    settings = {"target_modules": ["q_proj"]} if name != "NemotronH" else {}
    plain = mixture(name)
    model = adapted(name, model=copy.deepcopy(plain), rank=rank, alpha=6.0, dropout=0.1, **settings).eval()
    want = logits(model)
    for folder in both(tmp_path, model):
        found = json.loads((folder / "adapter_config.json").read_text())
        assert found["r"] == (rank if isinstance(rank, int) else 3) and found["lora_dropout"] == 0.0
        assert len(found["target_parameters"]) == 2 * (2 if name != "NemotronH" else 1)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
        assert relative(logits(loaded), want) < 1e-5 and not torch.allclose(want, logits(plain))


def test_the_keys_of_shared_outer_factors(tmp_path):
    model = adapted(target_modules=["q_proj"])
    at = "base_model.model.model.layers.0.mlp.experts"
    for folder in both(tmp_path, model, experts="shared-outer"):
        tensors = load_file(folder / "adapter_model.safetensors")
        shapes = {key.removeprefix(f"{at}."): tuple(t.shape) for key, t in tensors.items() if key.startswith(at)}
        assert shapes == {
            "gate_up_proj.lora_A.weight": (1, 4, 32),
            "gate_up_proj.lora_B.weight": (4, 48, 4),
            "down_proj.lora_A.weight": (4, 4, 24),
            "down_proj.lora_B.weight": (1, 32, 4),
        }
        config = json.loads((folder / "adapter_config.json").read_text())
        assert "target_parameters" not in config
    assert json.loads((tmp_path / "model" / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj",
        "gate_up_proj",
        "q_proj",
    ]
    export_lora(model, tmp_path / "peft")
    tensors_of_peft = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {key.removeprefix(f"{at}."): tuple(t.shape) for key, t in tensors_of_peft.items() if key.startswith(at)} == {
        "base_layer.lora_A.weight": (4 * 4, 32),  # gate_up's
        "base_layer.lora_B.weight": (48, 4 * 4),
        "lora_A.weight": (4 * 4, 24),  # down's
        "lora_B.weight": (32, 4 * 4),
    }
    scaling = config["lora_alpha"] / config["r"]
    for name, layer in adapted_layers(model).items():
        if isinstance(layer, LoTRExperts):
            A, B = (tensors[f"base_model.model.{parameter_name(name)}.lora_{part}.weight"] for part in "AB")
            assert relative((scaling * B @ A).expand(4, -1, -1), layer.delta_weight()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_core_on_either_side(dtype):
    layer = LoTRExperts(3, 7, 5, (2, 4), scaling=0.3, dtype=dtype)
    torch.nn.init.normal_(layer.core)
    for side, rank, shapes in (("A", 4, ((3, 4, 7), (1, 5, 4))), ("B", 2, ((1, 2, 7), (3, 5, 2))), (None, 2, None)):
        found = expert_lora_factors(layer, side)
        assert found.rank == rank and found.sizes == (7, 5) and found.A.dtype == dtype
        assert shapes is None or (tuple(found.A.shape), tuple(found.B.shape)) == shapes
        assert relative(found.delta(), layer.delta_weight()) < 1e-6


def test_refusals(tmp_path):
    layer = LoTRExperts(3, 7, 5, 2)
    with pytest.raises(ValueError, match="core: expected 'A', 'B' or None, got 'C'"):
        expert_lora_factors(layer, "C")
    with pytest.raises(TypeError, match="layer: expected a linear layer, got LoTRExperts; expert_lora_factors takes it"):
        lora_factors(layer)
    with pytest.raises(TypeError, match="layer: expected LoTRExperts, got Linear"):
        expert_lora_factors(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="experts: expected one of peft, shared-outer, vllm-shared, per-expert, got 'vllm'"):
        export_lora(adapted(), tmp_path / "none", experts="vllm")
    with pytest.raises(TypeError, match="model: expected experts of transformers, got 'one', a LoTRExperts"):
        export_lora(torch.nn.ModuleDict({"one": layer}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("targets", [["o_proj", "gate_proj", "up_proj", "down_proj"], ["o_proj"]])
def test_layers_that_peft_takes_for_experts_are_named(tmp_path, targets):
    """PEFT takes a DeepSeek-V2's gate_proj, up_proj and down_proj for experts, also in dense blocks and shared experts."""
    sizes = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = transformers.DeepseekV2Config(
        **{**LLAMA, "num_key_value_heads": 4}, **sizes, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    plain = transformers.DeepseekV2ForCausalLM(config).eval()
    model = apply_lotr(copy.deepcopy(plain), LoTRConfig(rank=2, target_modules=targets)).eval()
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.core)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        export_lora(model, tmp_path, base_model="none")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    lost = not torch.allclose(logits(loaded), logits(model), atol=1e-4)
    assert lost == any("gate_proj" in str(w.message) and "PEFT" in str(w.message) for w in found)
    assert not (lost and targets == ["o_proj"])
