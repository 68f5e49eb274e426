"""Reads LoRA adapters that PEFT saved: the two factors and the scaling of each layer, and modules_to_save.

y = x W^T + scaling (x A^T) B^T      A [r, K], B [N, r], scaling = lora_alpha / r  (or / sqrt(r) with use_rslora)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import check_regular, parse_json, read_bytes, together
from ..layers.checks import check_number, check_values
from ..model.targets import name_ends_with

__all__ = ["LoRAAdapter", "LoRALayer", "read_lora"]

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Features of a LoRA beyond x W^T plus the two factors; a LoTR adapter cannot hold them.
_NOT_PLAIN = {
    "use_dora": "a norm for each output feature (DoRA)",
    "lora_bias": "a trained bias in lora_B",
    "target_parameters": "adapters on bare parameters",
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "layers that the base model has not",
    "alora_invocation_tokens": "an adapter that is on for some tokens only",
    "use_qalora": "an input that is averaged over groups of features",
    "use_bdlora": "factors that are block-diagonal",
    "arrow_config": "a router over several adapters",
    "kasa_config": "a diagonal between the factors, and changed base weights",
    "monteclora_config": "factors that are drawn at random",
}
_MOVED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRALayer:
    """One layer's factors: A [r, K], B [N, r]; scaling * B @ A is added to W [N, K]. magnitude [N]: the lengths of the rows
    of the sum (DoRA), None for LoRA."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.A.shape[1], self.B.shape[0]


@dataclass(frozen=True)
class LoRAAdapter:
    """A whole adapter. saved: parameters of modules_to_save by full name; modules_to_save: name endings, as configured,
    of those that are in the file."""

    layers: dict[str, LoRALayer]
    saved: dict[str, Tensor]
    modules_to_save: tuple[str, ...]
    dropout: float


def read_lora(source: str | PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> LoRAAdapter:
    """Reads and checks a PEFT LoRA adapter.

    Args:
        source: a directory with adapter_config.json and adapter_model.safetensors (or .bin), or the tensors themselves, as
            `peft.get_peft_model_state_dict` gives them.
        config: the content of adapter_config.json; needed with tensors (r, lora_alpha and all fields that are not the default).

    Raises:
        ValueError: no such adapter; another method than LoRA; a LoRA with more than its two factors (DoRA, biases, embeddings,
            weights moved by its init); factors missing, of shapes that do not fit, or not finite.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("config: expected r, lora_alpha, ... with a state dict, got None")
        tensors = dict(source)
    else:
        directory = Path(source)
        with together(directory) if directory.is_dir() else nullcontext():  # an export may be writing it
            if config is None:
                config = _read_config(directory)
            _check_config(config)
            tensors = _read_tensors(directory)
    _check_config(config)
    endings = tuple(config.get("modules_to_save") or ())
    factors: dict[str, dict[str, Tensor]] = {}
    saved, foreign = {}, []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        name = key.removeprefix("base_model.model.")
        if found is not None:
            factors.setdefault(found["name"], {})[found["part"]] = tensor
        elif modules_holding(name, endings):
            saved[name] = tensor
        else:
            foreign.append(key)
    if foreign:
        raise ValueError(f"adapter: expected lora_A, lora_B and modules_to_save, got also {', '.join(sorted(foreign)[:3])}")
    if not factors:
        raise ValueError(f"adapter: expected tensors <layer>.lora_A.weight and .lora_B.weight, got {len(tensors)} others")
    layers = {name: _layer(name, parts, config) for name, parts in factors.items()}
    # of a classifier PEFT writes all names that a head may have, so some of them match no module
    endings = tuple(ending for ending in endings if any(modules_holding(name, (ending,)) for name in saved))
    return LoRAAdapter(layers, saved, endings, _finite("lora_dropout", config.get("lora_dropout", 0.0)))


def modules_holding(key: str, endings: tuple[str, ...]) -> list[str]:
    """The modules that contain a tensor of that name and that one of the endings matches."""
    parts = key.split(".")
    names = [".".join(parts[:i]) for i in range(1, len(parts))]
    return [name for name in names if any(name_ends_with(name, ending) for ending in endings)]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        config = parse_json(read_bytes(path))
    except OSError as error:
        raise ValueError(f"source: expected a directory with {path.name}, got {directory} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if path is None:
        raise ValueError(f"source: expected {' or '.join(_FILES)} in {directory}, got neither")
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a file of safetensors or torch.save; no code in it is executed.

    Raises:
        ValueError: another kind of file.
    """
    from safetensors.torch import load_file

    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"source: expected a file that can be read, got {path} ({error.strerror})") from None
    except Exception as error:  # a damaged pickle makes torch.load raise errors of any kind
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected tensors by safetensors or torch.save, got something else ({first or type(error).__name__})"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return dict(tensors)


def _check_config(config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        hint = "; lotr_ext.load_adapter reads it as it is" if config["peft_type"] == "LOTR" else ""
        raise ValueError(f"peft_type: expected LORA, got {config['peft_type']!r}{hint}")
    for field, meaning in _NOT_PLAIN.items():
        if config.get(field):
            raise ValueError(f"{field}: expected a LoRA of two factors a layer, got {meaning}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias: expected 'none', got {config['bias']!r}: LoTR trains no biases")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, Mapping):
            raise ValueError(f"{field}: expected numbers by pattern, got {config[field]!r}")
    names = config.get("modules_to_save") or ()
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modules_to_save: expected names of modules, got {names!r}")
    init = str(config.get("init_lora_weights", True))
    if init.lower().startswith(_MOVED_WEIGHTS):
        raise ValueError(
            f"init_lora_weights: expected an init that leaves the base weights as they are, got {init!r}; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )


def _layer(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoRALayer:
    if set(parts) != {"A", "B"}:
        raise ValueError(f"{name}: expected lora_A and lora_B, got only lora_{next(iter(parts))}")
    A, B = parts["A"], parts["B"]
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not (A.numel() and B.numel()):
        raise ValueError(f"{name}: expected lora_A [r, K] and lora_B [N, r], got {tuple(A.shape)} and {tuple(B.shape)}")
    for part, tensor in parts.items():
        check_values(name, f"lora_{part}", tensor)
    rank = _setting(name, "r", "rank_pattern", config)
    if rank is not None and rank != A.shape[0]:
        raise ValueError(f"{name}: expected rank {rank:g} as configured, got lora_A {tuple(A.shape)}")
    alpha = _setting(name, "lora_alpha", "alpha_pattern", config)
    if alpha is None:
        raise ValueError("lora_alpha: expected a number in the configuration, got None")
    return LoRALayer(A, B, alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0]))


def _setting(name: str, field: str, patterns: str, config: Mapping[str, Any]) -> float | None:
    """A layer's value: that of the first pattern that matches the end of its name, otherwise the common one."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise ValueError(f"{patterns}: expected regular expressions, got {pattern!r} ({error})") from None
        if found:
            return _finite(pattern, value)
    value = config.get(field)
    return None if value is None else _finite(field, value)


def _finite(name: str, value: object) -> float:
    check_number(name, value)
    return float(value)
