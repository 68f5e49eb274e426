"""Tiny random checkpoints of transformers in quantised formats: loaded with their experts packed, and dense by transformers
itself, adapted, they compute the same.

torchao and bitsandbytes are tested in the process of layers/test_quantized.py.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import packed
import pytest
import torch
import transformers
from mixtures import adapted, logits, loss, mixture
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lotr_ext import disabled, load_adapter, save_adapter, trainable_summary, unload
from lotr_ext.interop.packed import keep_packed
from nets import relative


def write(model: nn.Module, tensors: dict[str, torch.Tensor], quantised: dict, path: Path) -> Path:
    model.config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def gpt_oss(path: Path) -> Path:
    """As OpenAI stores it."""
    model, _ = packed.mxfp4(torch.bfloat16)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return write(model, model.state_dict(), {"quant_method": "mxfp4", "modules_to_not_convert": skipped}, path)


def fp8(name: str, path: Path) -> Path:
    """Every linear layer and each expert by itself, in blocks of 16, as DeepSeek stores them, by transformers' own rounding."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8} if name == "DeepseekV3" else {}
    model = mixture(name, torch.bfloat16, moe_intermediate_size=32, **sizes)
    model.save_pretrained(path)
    config = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    rounds, tensors = Fp8Quantize(SimpleNamespace(quantization_config=config)), load_file(path / "model.safetensors")
    rounded = {}
    for key, tensor in tensors.items():
        rounded |= rounds.convert({key: tensor}) if key.endswith("_proj.weight") else {key: tensor}
    return write(model, rounded, {"quant_method": "fp8", "weight_block_size": [16, 16]}, path)


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mxfp4": (gpt_oss, "mxfp4"),
    "fp8 of Qwen3": (lambda path: fp8("Qwen3Moe", path), "fp8 by blocks"),
    "fp8 of DeepSeek-V3": (lambda path: fp8("DeepseekV3", path), "fp8 by blocks"),
}


@pytest.mark.parametrize("make, name", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_experts_stay_packed_and_compute_what_transformers_dequantised_does(make, name, tmp_path):
    path = make(tmp_path / "base")
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    kept = AutoModelForCausalLM.from_pretrained(path, config=keep_packed(path), dtype=torch.bfloat16)
    numbers = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (kept, dense)]
    assert numbers[0] < numbers[1] and torch.equal(before := logits(kept), logits(dense))
    models = []
    for model in (kept, copy.deepcopy(dense)):
        torch.manual_seed(5)
        models.append(adapted(model=model, target_modules=["o_proj"]))
        loss(model).backward()
    assert torch.equal(*(logits(model) for model in models)) and not torch.equal(logits(kept), before)
    want = dict(models[1].named_parameters())
    trained = {key: p.grad for key, p in kept.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(grad, want[key].grad) for key, grad in trained.items())
    assert {found for _, found in trainable_summary(kept).formats} == {name}

    save_adapter(kept, tmp_path / "adapter")
    again = load_adapter(
        AutoModelForCausalLM.from_pretrained(path, config=keep_packed(AutoConfig.from_pretrained(path)), dtype=torch.bfloat16),
        tmp_path / "adapter",
    )
    assert torch.equal(logits(again), logits(kept))
    with disabled(again):
        assert torch.equal(logits(again), before)
    assert torch.equal(logits(unload(again, merge=False)), before)


def test_other_checkpoints_are_refused_by_keep_packed(tmp_path):
    mixture("Mixtral").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: expected a checkpoint in mxfp4 or fp8, got one without a format"):
        keep_packed(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(ValueError, match="got 'awq'"):
        keep_packed(config)


def test_scales_that_do_not_fit_the_checkpoint(tmp_path):
    path = gpt_oss(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(path, config=keep_packed(path), dtype=torch.bfloat16)
    experts = kept.model.layers[1].mlp.experts
    experts.gate_up_proj_scales = nn.Parameter(experts.gate_up_proj_scales[:3], requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1.*gate_up_proj_scales: expected shape \(4, 64, 1\).*got \(3, 64, 1\)"):
        adapted(model=kept)


def test_transformers_own_mxfp4_experts_are_refused_by_name():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = mixture("GptOss", intermediate_size=32)
    experts = model.model.layers[0].mlp.experts = Mxfp4GptOssExperts(model.config)
    for loaded in (False, True):  # where the kernels run, another object takes the parameter's place
        if loaded:
            del experts.gate_up_proj
            experts.gate_up_proj = SimpleNamespace(storage=None)
        with pytest.raises(TypeError, match=r"layers\.0.*gate_up_proj', quantised experts of Mxfp4GptOssExperts .*keep_packed"):
            adapted(model=model, target_parameters=["experts.gate_up_proj"])


# ---- the real libraries ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="tested where it is on the path")
def test_torchao_checkpoint_with_experts_and_linear_layers(tmp_path):
    from torchao import quantization

    plain = mixture("Mixtral", torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    int8 = quantization.Int8WeightOnlyConfig()
    patterns = {r"re:.*experts\.(gate_up_proj|down_proj)": int8, r"re:.*[qv]_proj": int8}
    config = transformers.TorchAoConfig(quantization.FqnToConfig(patterns))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.bfloat16)
    model.set_experts_implementation("eager")  # the only one of transformers' that reads such a weight
    before = logits(model)
    assert not torch.equal(before, logits(plain))
    model = adapted(model=model, random=False, target_modules=["q_proj", "v_proj", "k_proj"])
    assert relative(logits(model), before.double()) < 0.02
    found = dict(trainable_summary(model).formats)
    assert len(found) == 2 * (2 + 2) and set(found.values()) == {"torchao Int8Tensor"}
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="tested where it is on the path")
def test_bitsandbytes_checkpoint_with_experts_packed_after_loading(tmp_path):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    sizes = {"hidden_size": 64, "intermediate_size": 64}
    mixture("Mixtral", torch.bfloat16, **sizes).save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.bfloat16)
    for module in packed.experts_of(model):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(module, name, quant_type="nf4")
    with torch.no_grad():
        before = loss(model.train())  # by bitsandbytes, which makes all experts dense
    model = adapted(model=model, random=False, target_modules=["q_proj", "v_proj"])
    assert dict(trainable_summary(model).formats).keys() == {n for n, m in model.named_modules() if hasattr(m, "start_core")}
    assert set(dict(trainable_summary(model).formats).values()) == {"bitsandbytes nf4"}
    found = loss(model)
    found.backward()
    assert torch.equal(found, before)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
