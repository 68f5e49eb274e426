"""Memory of weights, adapter, gradients and optimizer of three large models, counted on the meta device: python -m bench.memory

transformers builds each model without memory, apply_lotr adapts all linear layers of its blocks and its experts at rank 16, and
the elements of its tensors are counted. Bytes per element, and the share of each of p tensor and expert parallel processes:

    adapted weights       bf16 2; fp8 1, and a float32 for 128 x 128; 4 bits 1/2, and a byte for 32 (mxfp4)      1 / p
    embedding, head, biases of experts    bf16 2                                                                 1 / p
    norms, routers, other biases          bf16 2                                                                 all
    A, B, cores of linear layers          float32 4, their gradients 4, AdamW's two moments 8                    all
    cores of experts                      likewise                                                               1 / p

Activations are not counted. For comparison, LoRA of that rank is counted, with a pair for each linear layer and each expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .measure.session import start
from .measure.store import RESULTS, commit, write_whole

RANK, PROCESSES = 16, (1, 2, 8)
FORMATS = {"bf16": 2.0, "fp8": 1 + 4 / 128**2, "4-bit": 1 / 2 + 1 / 32}  # bytes per element of an adapted weight
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Shape(NamedTuple):
    """A model's config in transformers; the numbers are from its config.json on the Hugging Face hub."""

    source: str
    kind: str
    sizes: dict[str, Any]
    modules: list[str]
    experts: list[str] | None


MODELS = {
    "Llama-3-8B": Shape(
        "meta-llama/Meta-Llama-3-8B",
        "LlamaConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
        ATTENTION + MLP,
        None,
    ),
    "Qwen3-30B-A3B": Shape(
        "Qwen/Qwen3-30B-A3B",
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "vocab_size": 151936},
        ATTENTION,
        EXPERTS,
    ),
    "GPT-OSS-20B": Shape(
        "openai/gpt-oss-20b",
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "vocab_size": 201088},
        ATTENTION,
        EXPERTS,
    ),
}


def counted(shape: Shape) -> dict[str, int]:
    """The number of elements of a model's tensors by kind."""
    import torch
    import transformers

    from lotr_ext import LoTRConfig, apply_lotr, lotr_parameters
    from lotr_ext.model.adapted import adapted_layers

    config = getattr(transformers, shape.kind)(**shape.sizes, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = sum(p.numel() for p in model.parameters())
    cut = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    cut |= {id(p) for name, p in model.named_parameters() if ".experts." in name and "bias" in name}
    beside = sum(p.numel() for p in model.parameters() if id(p) in cut)
    apply_lotr(model, LoTRConfig(rank=RANK, target_modules=shape.modules, target_parameters=shape.experts))
    layers = adapted_layers(model).values()
    experts = [max(1, getattr(layer, "num_experts", 0)) for layer in layers]
    adapted = sum(n * layer.in_features * layer.out_features for n, layer in zip(experts, layers))
    return {
        "adapted": adapted,
        "cut": beside,
        "whole": base - adapted - beside,
        "expert_cores": sum(layer.core.numel() for n, layer in zip(experts, layers) if n > 1),
        "adapter": sum(p.numel() for p in lotr_parameters(model)),
        "lora_experts": RANK * sum(n * (layer.in_features + layer.out_features) for n, layer in zip(experts, layers) if n > 1),
        "lora": RANK * sum(n * (layer.in_features + layer.out_features) for n, layer in zip(experts, layers)),
    }


def base_bytes(count: Mapping[str, int], form: str, processes: int) -> float:
    """The bytes of the frozen weights in each process."""
    return (FORMATS[form] * count["adapted"] + 2 * count["cut"]) / processes + 2 * count["whole"]


def trained(count: Mapping[str, int], processes: int, adapter: str = "adapter", experts: str = "expert_cores") -> float:
    """The number of trained elements in each process."""
    return count[adapter] - count[experts] + count[experts] / processes


def kept(results: Path) -> dict[str, Any] | None:
    path = results / "memory.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for memory.json (bench/results)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    found = {"commit": commit(), "rank": RANK, "models": {name: counted(shape) for name, shape in MODELS.items()}}
    write_whole(options.results / "memory.json", json.dumps(found, indent=1) + "\n")
    print(f"kept {options.results / 'memory.json'}; python -m bench.report writes the tables of docs/distributed.md")
    return 0


if __name__ == "__main__":
    start("bench.memory", main)
