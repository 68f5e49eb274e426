"""A saved LoTR adapter as a LoRA of llama.cpp: one GGUF file, which `llama-server --lora FILE` and its bindings load.

Tensors are `<weight>.lora_a` [r, k] and `<weight>.lora_b` [n, r] beside the base's `<weight>` in llama.cpp's names, such as
`blk.0.attn_q.weight`. llama.cpp computes y + (alpha / r) B A x with one alpha for all layers, so a layer's own scaling is
multiplied into its lora_b.

llama.cpp stores q and k of Llama models with the two halves of each head interleaved, as its rotary embedding reads them
(`permute` in its convert_hf_to_gguf.py). lora_b of q and k has its rows in the same order.
"""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import folder, parse_json, put_file, read_bytes
from ..model.peft_files import read_either
from .lora import lora_of
from .lora_files import LoRALayer

__all__ = ["ARCHITECTURES", "lotr_to_gguf"]


class Architecture(NamedTuple):
    """name: in llama.cpp. interleaved: whether the two halves of each head are interleaved in q and k."""

    name: str
    interleaved: bool


ARCHITECTURES = {  # by transformers' model_type
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
}


def lotr_to_gguf(
    source: str | PathLike[str], path: str | PathLike[str], *, base_model: str | PathLike[str]
) -> dict[str, LoRALayer]:
    """Writes the LoTR adapter in `source` as a GGUF LoRA file in float32; needs the package gguf.

    Args:
        source: a directory with a LoTR adapter, by `save_adapter` or by PEFT.
        path: the file, written whole or not at all.
        base_model: the directory of the base model; its config.json has the architecture and the numbers of heads.

    Returns:
        The LoRA layers by name, as `lotr_to_lora` returns them.

    Raises:
        ImportError: no package gguf. ValueError: no such adapter; one with experts or modules_to_save, which llama.cpp does not
            read; no config.json; an architecture without an entry in `ARCHITECTURES`; a layer that llama.cpp does not have.
    """
    gguf = _package()
    config = _read_config(Path(base_model))
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"base_model: expected a model type of {', '.join(ARCHITECTURES)}, got {kind!r}")
    architecture, depth = ARCHITECTURES[kind], _count(config, "num_hidden_layers")
    layers, experts, saved = lora_of(*read_either(Path(source)), "peft")
    for what, names in (("experts", experts), ("modules_to_save", saved)):
        if names:
            raise ValueError(f"source: expected only linear layers, got {what} ({min(names)}), which a GGUF LoRA does not hold")
    if dora := [name for name, layer in layers.items() if layer.magnitude is not None]:
        raise ValueError(
            f"source: expected no magnitudes, which a GGUF LoRA does not hold, got some in {dora[0]!r}; merge them"
        )
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(arch, depth)
    alpha = float(max(layer.rank for layer in layers.values()))
    heads = {}
    if architecture.interleaved:
        heads["attn_q"] = _count(config, "num_attention_heads")
        heads["attn_k"] = _count(config, "num_key_value_heads") if "num_key_value_heads" in config else heads["attn_q"]
    tensors = {}
    for name, layer in layers.items():
        at = table.get_name(name) or table.get_name(f"model.{name}")
        if at is None:
            raise ValueError(f"source: expected layers of {architecture.name} as llama.cpp has them, got {name!r}")
        B = layer.B.float() * (layer.scaling * layer.rank / alpha)
        of = heads.get(at.rpartition(".")[2])
        tensors |= {
            f"{at}.weight.lora_a": layer.A.float(),
            f"{at}.weight.lora_b": B if of is None else interleave_halves(B, of),
        }
    path = Path(path)
    with folder(path.parent):
        put_file(path.parent, path.name, _file(gguf, architecture.name, alpha, tensors))
    return layers


def interleave_halves(rows: Tensor, heads: int) -> Tensor:
    """Returns rows [heads d, ...] in the order 0, d/2, 1, d/2 + 1, ... within each head."""
    if rows.shape[0] % (2 * heads):
        raise ValueError(f"base_model: expected {heads} heads of an even size, got {rows.shape[0]} rows of q or k")
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("lotr_to_gguf: expected the package gguf, got none: pip install gguf") from None
    return gguf


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_bytes(directory / "config.json"))
    except (OSError, ValueError) as error:
        raise ValueError(f"base_model: expected a directory with config.json, got {directory} ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"base_model: expected an object in config.json, got {type(config).__name__}")
    return config


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"base_model: expected a positive {key} in config.json, got {value!r}")
    return value


def _file(gguf: Any, architecture: str, alpha: float, tensors: dict[str, Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "lora.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.contiguous().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
