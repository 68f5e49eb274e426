"""Factors and tasks as vLLM loads them.

Factors are a folder of `save_adapter`, of which the engine reads A, B and the layers.

A task is a folder that looks like a PEFT LoRA, so that vLLM's requests, cache and HTTP endpoints take it:

    adapter_config.json           r, lora_alpha, target_modules, and lotr_factors: a checksum of the factors it belongs to
    adapter_model.safetensors     <layer>.lora_A.weight = (s G)^T [r_out, r_in], <layer>.lora_B.weight = [[1]]
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import folder, parse_json, placed, read_bytes, together
from ...model.adapter_files import Manifest, serialized, tensors_of
from ...model.peft_files import read_either
from ...model.saving import contents, save_adapter, unwrapped
from ...model.shared_factors import add_values
from ...model.tasks import bank_of
from ..lora import loaded_from

__all__ = ["Factors", "check_task", "export_factors", "export_task", "read_factors"]

PREFIX = "base_model.model."
CONFIG_NAME, TENSORS_NAME, CHECKSUM = "adapter_config.json", "adapter_model.safetensors", "lotr_factors"


@dataclass(frozen=True)
class Factors:
    """layers: for each adapted layer the names of its A [k, r_in] and B [n, r_out] in tensors."""

    layers: dict[str, tuple[str, str]]
    tensors: dict[str, Tensor]

    @property
    def checksum(self) -> str:
        """Of the layers' names and the factors' values."""
        digest = hashlib.sha256(json.dumps(sorted(self.layers.items())).encode())
        for name, tensor in sorted(self.tensors.items()):
            add_values(digest, name, tensor)
        return digest.hexdigest()

    def core_shape(self, layer: str) -> tuple[int, int]:
        """(r_in, r_out) of a layer."""
        A, B = self.layers[layer]
        return self.tensors[A].shape[1], self.tensors[B].shape[1]


def _factors(manifest: Manifest, tensors: dict[str, Tensor], where: str) -> Factors:
    """Of an adapter's layers, where vLLM can hold them apart from the cores."""
    layers = {}
    for name, entry in manifest.layers.items():
        if entry.experts:
            raise ValueError(
                f"{where}: expected adapted linear layers, got the experts {name}; export_lora(..., experts=...) writes "
                "them for vLLM's own LoRA"
            )
        if entry.tensor("start_A") in tensors:
            raise ValueError(
                f"{where}: expected an adapter that changes no base weight, got init 'svd' at {name}; export_lora writes it "
                "for vLLM's own LoRA, at twice the rank"
            )
        layers[name] = (entry.tensor("A"), entry.tensor("B"))
    if manifest.modules_to_save:
        raise ValueError(f"{where}: expected an adapter alone, got modules_to_save {manifest.modules_to_save[0]!r}")
    return Factors(layers, {key: tensors[key] for pair in layers.values() for key in pair})


def export_factors(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes the folder that LOTR_FACTORS names: the model's active adapter, as `save_adapter` does.

    Raises:
        ValueError: experts, init "svd" or modules_to_save, which the engine cannot hold. RuntimeError: no adapter.
    """
    _factors(*contents(unwrapped(model)), "export_factors")
    save_adapter(model, directory)


def read_factors(directory: str | PathLike[str]) -> Factors:
    """The factors in a folder of `export_factors` or `save_adapter`.

    Raises:
        ValueError: no such folder, or an adapter that the engine cannot hold.
    """
    return _factors(*read_either(Path(directory)), "LOTR_FACTORS")


@torch.no_grad()
def export_task(
    model: nn.Module, directory: str | PathLike[str], *, task: int | None = None, base_model: str | None = None
) -> None:
    """Writes a task for the engine: its cores with their scaling, and the checksum of the model's factors.

    Args:
        model: a model from `apply_lotr`.
        directory: made if need be. Its name may be the adapter's name in the engine.
        task: a task of the model's TaskBank; None for the cores of the model's active adapter.
        base_model: where the base model is, which vLLM's resolver of folders needs. None: where the model was loaded from.

    Raises:
        RuntimeError: no adapter, or a task of a model without a bank. ValueError: no such task, an adapter that the engine
            cannot hold, or directory is a file.
    """
    model, directory = unwrapped(model), Path(directory)
    manifest, tensors = contents(model)
    factors = _factors(manifest, tensors, "export_task")
    cores = tensors if task is None else bank_of(model, "export_task").cores_of(task)
    found: dict[str, Tensor] = {}
    for name, entry in manifest.layers.items():
        core = cores[f"{name}.core"].detach()
        found[f"{PREFIX}{name}.lora_A.weight"] = (entry.scaling * core).T.contiguous()
        found[f"{PREFIX}{name}.lora_B.weight"] = core.new_ones(1, 1)
    rank = max(max(factors.core_shape(name)) for name in factors.layers)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # alpha / r = 1: the cores have their scaling in them
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in factors.layers}),
        "base_model_name_or_path": base_model or loaded_from(model),
        CHECKSUM: factors.checksum,
    }
    text = (json.dumps(config, indent=2) + "\n").encode()
    with folder(directory), together(directory):
        with placed(directory, {TENSORS_NAME: serialized(found), CONFIG_NAME: text}, apart=CONFIG_NAME):
            pass


def check_task(directory: str | PathLike[str], factors: Factors, checksum: str) -> None:
    """ValueError unless directory holds a complete task over these factors, finite and of their shapes.

    checksum: that of factors, which takes time to compute.
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    try:
        config = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter: expected a directory of export_task, got {directory} ({error})") from None
    if not isinstance(config, dict) or CHECKSUM not in config:
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(
            f"adapter: expected a task by export_task, got an adapter of {kind} in {directory}; an engine with LOTR_FACTORS "
            "serves tasks alone"
        )
    if config[CHECKSUM] != checksum:
        raise ValueError(
            f"adapter: expected a task over the engine's factors {checksum[:12]}, got one over {str(config[CHECKSUM])[:12]} in "
            f"{directory}; export it from a model with the factors that LOTR_FACTORS names"
        )
    path = directory / TENSORS_NAME
    try:
        tensors = tensors_of(path, read_bytes(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter: expected a safetensors file, got {path} ({error})") from None
    wanted: dict[str, tuple[int, ...]] = {}
    for name in factors.layers:
        r_in, r_out = factors.core_shape(name)
        wanted |= {f"{PREFIX}{name}.lora_A.weight": (r_out, r_in), f"{PREFIX}{name}.lora_B.weight": (1, 1)}
    if tensors.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(
            f"adapter: expected {len(wanted)} tensors, got {missing[:1]} missing and {extra[:1]} besides in {path}"
        )
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            what = f"{tensor.dtype} {tuple(tensor.shape)}" if tuple(tensor.shape) != shape else "values that are not finite"
            raise ValueError(f"adapter: expected finite floating values {shape} in {name}, got {what} in {path}")
