"""LoTR adapters in other tools: export as a PEFT LoRA adapter, exact.

    s B G_l^T A^T = s lora_B lora_A    with lora_A = (A G_l)^T [r_out, K], lora_B = B [N, r_out]
                                       or   lora_A = A^T [r_in, K],        lora_B = B G_l^T [N, r_in], whichever is smaller

So a LoTR of rank r on a layer is a LoRA of rank r on it, and whatever takes LoRA takes it; what is lost is only the size, for
a LoRA stores its factors for each layer. After init "svd" the base weights are W less the start adapter; a LoRA for the
unchanged W has to carry both, at twice the rank: [lora_B, -start_B] [lora_A; start_A].
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_files import put_file
from ..apply import adapted_layers
from ..checkpoint import saved_modules, saved_tensors, unwrapped
from ..layer import LoTRLayer
from ..linear import LoTRConv1D
from ..ops import accumulate_dtype

__all__ = ["export_lora", "lora_factors"]

_PREFIX = "base_model.model."


def _pair(A: Tensor, B: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """(lora_A [r, K], lora_B [N, r]) of the smaller of the two ranks."""
    r_in, r_out = core.shape
    return ((A @ core).T, B) if r_out <= r_in else (A.T, B @ core.T)


@torch.no_grad()
def lora_factors(layer: LoTRLayer) -> tuple[Tensor, Tensor]:
    """A layer's adapter as LoRA factors: scaling * lora_B @ lora_A is what it adds to the weight that it was made from.

    Returns:
        lora_A [r, K] and lora_B [N, r], contiguous, in the adapter's dtype (products are made in fp32, fp64 for fp64);
        r = min(r_in, r_out), twice that after init "svd".

    Raises:
        TypeError: not an adapted layer. RuntimeError: a layer on the meta device.
    """
    if not isinstance(layer, LoTRLayer):
        raise TypeError(f"layer: expected a LoTRLayer, got {type(layer).__name__}")
    if layer.core.is_meta:
        raise RuntimeError("layer: expected tensors with values, got a layer on the meta device")
    dtype = layer.core.dtype
    wide, factors = accumulate_dtype(dtype), layer.factors
    lora_A, lora_B = _pair(*(t.to(layer.core.device, wide) for t in (factors.A, factors.B, layer.core)))
    if layer.start_core is not None:
        start = (t.to(layer.core.device, wide) for t in (factors.start_A, factors.start_B, layer.start_core))
        start_A, start_B = _pair(*start)
        lora_A, lora_B = torch.cat([lora_A, start_A]), torch.cat([lora_B, -start_B], 1)
    return lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous()


def _exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """target_modules that by PEFT's rules match `names` and nothing else: last parts, full names, or else a regex."""
    want = set(names)
    everything = [name for name, _ in model.named_modules() if not name.startswith("lotr_factors")]
    for endings in ({name.rpartition(".")[2] for name in want}, want):
        found = {name for name in everything if any(name == e or name.endswith(f".{e}") for e in endings)}
        if found == want:
            return sorted(endings)
    return "|".join(map(re.escape, sorted(want)))


def _outermost(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _patterns(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and by full name the layers with another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def export_lora(model: nn.Module, directory: str | PathLike[str], *, task_type: str | None = None) -> None:
    """Writes the model's adapter as a PEFT LoRA adapter: adapter_config.json and adapter_model.safetensors in a directory.

    `peft.PeftModel.from_pretrained(base, directory)` then gives the same outputs up to rounding, for the base model that
    `apply_lotr` was given. modules_to_save go along. lora_alpha = s r, with rank and alpha patterns where layers differ.

    Args:
        model: an adapted model, merged or not, from `apply_lotr` or built by hand.
        directory: made if need be.
        task_type: PEFT's, such as "SEQ_CLS" or "CAUSAL_LM"; None for a plain PeftModel.

    Raises:
        TypeError: no nn.Module. RuntimeError: no adapter, or one on the meta device. ValueError: directory is a file.
    """
    from safetensors.torch import save

    model, directory = unwrapped(model), Path(directory)
    layers, saved = adapted_layers(model), saved_modules(model)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got the file {directory}")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, float] = {}
    for name, layer in layers.items():
        lora_A, lora_B = lora_factors(layer)
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": lora_A, f"{_PREFIX}{name}.lora_B.weight": lora_B.clone()}
        ranks[name] = lora_A.shape[0]
    tensors |= {f"{_PREFIX}{key}": value for key, value in saved_tensors(saved).items()}
    r, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns({name: _number(layer.scaling * ranks[name]) for name, layer in layers.items()})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": all(isinstance(layer, LoTRConv1D) for layer in layers.values()),
        "target_modules": _exact_targets(layers, model),
        "modules_to_save": _outermost(saved) or None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    put_file(directory, "adapter_model.safetensors", save(stored, metadata={"format": "pt"}))
    put_file(directory, "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def _number(value: float) -> float:
    """An int where it is one: some readers of LoRA expect it."""
    return int(value) if float(value).is_integer() else float(value)
