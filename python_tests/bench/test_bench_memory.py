"""bench.memory counts models of known sizes, and its kept counts are those of the models as they are published."""

from __future__ import annotations

import pytest
import transformers

from bench import memory
from bench.measure.store import RESULTS
from lotr_ext import LoTRConfig, apply_lotr, lotr_parameters

TINY = memory.Shape(
    "none",
    "Qwen3MoeConfig",
    {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4},
    memory.ATTENTION,
    memory.EXPERTS,
)


def test_the_count_of_a_small_mixture_is_that_of_its_tensors():
    found = memory.counted(TINY)
    attention, experts, router = 2 * 32 * 32 + 2 * 32 * 16, 4 * (32 * 32 + 32 * 16), 4 * 32
    assert found["adapted"] == 2 * (attention + experts) and found["cut"] == 2 * 50 * 32
    assert found["whole"] == 2 * (router + 2 * 32 + 2 * 8) + 32
    config = transformers.Qwen3MoeConfig(**TINY.sizes, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert found["adapted"] + found["cut"] + found["whole"] == sum(p.numel() for p in model.parameters())
    apply_lotr(model, LoTRConfig(rank=memory.RANK, target_modules=TINY.modules, target_parameters=TINY.experts))
    assert found["adapter"] == sum(p.numel() for p in lotr_parameters(model))
    assert found["expert_cores"] == 2 * 2 * 4 * memory.RANK**2
    assert found["lora_experts"] == memory.RANK * 2 * 4 * (32 + 32 + 16 + 32)
    assert found["lora"] - found["lora_experts"] == memory.RANK * 2 * (2 * (32 + 32) + 2 * (32 + 16))


def test_bytes_by_format_and_processes():
    count = {"adapted": 2**14, "cut": 8, "whole": 3, "adapter": 10, "expert_cores": 8}
    sizes = {form: memory.base_bytes(count, form, 1) - 2 * 11 for form in memory.FORMATS}
    assert sizes == {"bf16": 2**15, "fp8": 2**14 + 4, "4-bit": 2**13 + 2**9}
    assert memory.base_bytes(count, "bf16", 2) == 2**14 + 8 + 6
    assert memory.trained(count, 1) == 10 and memory.trained(count, 4) == 4


@pytest.mark.parametrize(
    ("name", "elements"), [("Llama-3-8B", 8030261248), ("Qwen3-30B-A3B", 30532122624), ("GPT-OSS-20B", 20914757184)]
)
def test_kept_counts_have_the_elements_of_the_published_checkpoints(name: str, elements: int):
    count = memory.kept(RESULTS)["models"][name]
    assert count["adapted"] + count["cut"] + count["whole"] == elements
    assert count["expert_cores"] <= count["adapter"] < count["lora"]


def test_a_run_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MODELS", {"tiny": TINY})
    assert memory.kept(tmp_path) is None and memory.main(["--results", str(tmp_path)]) == 0
    assert memory.kept(tmp_path)["models"] == {"tiny": memory.counted(TINY)}
