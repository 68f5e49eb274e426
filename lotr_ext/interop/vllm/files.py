"""Files of factors and tasks for the engine.

Factors are a folder of `save_adapter`, of which the engine reads A, B and the layers.

A task is a folder that vLLM's requests, resolvers and HTTP endpoints take for an adapter's. An engine without
the plugin refuses it, because it does not know the names of the tensors.

    adapter_config.json       PEFT's, with lotr_factors: a checksum of the task's factors
    lotr_task.safetensors     <layer>.core = s G [r_in, r_out]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import folder, parse_json, placed, read_bytes, together
from ...model.adapted import adapted_layers
from ...model.adapter_files import Manifest, serialized, tensors_of
from ...model.peft_files import read_either
from ...model.saving import contents, save_adapter, unwrapped
from ...model.shared_factors import add_values
from ...model.tasks import cores_and_scalings
from ..lora import loaded_from

__all__ = [
    "Factors",
    "check_finite",
    "export_factors",
    "export_task",
    "factors_of",
    "read_factors",
    "read_task",
]

CONFIG_NAME, TENSORS_NAME, CHECKSUM = "adapter_config.json", "lotr_task.safetensors", "lotr_factors"


@dataclass(frozen=True)
class Factors:
    """layers: {adapted layer: the names of its A [k, r_in] and B [n, r_out] in tensors}."""

    layers: dict[str, tuple[str, str]]
    tensors: dict[str, Tensor]

    @property
    def checksum(self) -> str:
        """SHA-256 of the layers' names and the factors' values."""
        digest = hashlib.sha256(json.dumps(sorted(self.layers.items())).encode())
        for name, tensor in sorted(self.tensors.items()):
            add_values(digest, name, tensor)
        return digest.hexdigest()

    def core_shape(self, layer: str) -> tuple[int, int]:
        """(r_in, r_out) of a layer."""
        A, B = self.layers[layer]
        return self.tensors[A].shape[1], self.tensors[B].shape[1]

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Each layer's slice of one vector with all cores, in the order of the layers' names."""
        found, at = {}, 0
        for layer in sorted(self.layers):
            r_in, r_out = self.core_shape(layer)
            found[layer] = slice(at, at := at + r_in * r_out)
        return found

    @property
    def numbers(self) -> int:
        """The number of elements in a task."""
        return max((span.stop for span in self.spans.values()), default=0)


def factors_of(manifest: Manifest, tensors: dict[str, Tensor], where: str) -> Factors:
    """The factors of an adapter's layers. Raises ValueError for an adapter that vLLM cannot split into factors and cores."""
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
        if f"{name}.magnitude" in tensors:
            raise ValueError(f"{where}: expected an adapter without magnitudes, got {name} with; merge it into the base model")
        layers[name] = (entry.tensor("A"), entry.tensor("B"))
    if manifest.modules_to_save:
        raise ValueError(f"{where}: expected an adapter without modules_to_save, got {manifest.modules_to_save[0]!r}")
    return Factors(layers, {key: tensors[key] for pair in layers.values() for key in pair})


def export_factors(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes the folder that LOTR_FACTORS names: the model's active adapter, as `save_adapter` does.

    Raises:
        ValueError: experts, init "svd", magnitudes or modules_to_save, which the engine cannot hold. RuntimeError: no adapter.
    """
    factors_of(*contents(unwrapped(model)), "export_factors")
    save_adapter(model, directory)


def read_factors(directory: str | PathLike[str]) -> Factors:
    """The factors in a folder of `export_factors` or `save_adapter`.

    Raises:
        ValueError: no such folder, or an adapter that the engine cannot hold.
    """
    return factors_of(*read_either(Path(directory)), "LOTR_FACTORS")


@torch.no_grad()
def export_task(
    model: nn.Module, directory: str | PathLike[str], *, task: int | None = None, base_model: str | None = None
) -> None:
    """Writes a task for the engine: its cores with their scaling, and the checksum of the model's factors.

    Args:
        model: a model from `apply_lotr`.
        directory: created if it does not exist. Its name can serve as the adapter's name in the engine.
        task: a task of the model's TaskBank; None for the cores of the model's active adapter.
        base_model: the base model's path or name, which vLLM's resolver of folders needs. None: as the model was loaded.

    Raises:
        RuntimeError: no adapter, or a task of a model without a bank. ValueError: no such task, an adapter that the engine
            cannot hold, a bank over the factors of an inactive adapter, or directory is a file.
    """
    model, directory = unwrapped(model), Path(directory)
    factors = factors_of(*contents(model), "export_task")
    layers = adapted_layers(model)
    scaled = zip(layers, *cores_and_scalings(model, layers, task, "export_task"), strict=True)
    cores = {f"{name}.core": scaling * core for name, core, scaling in scaled}
    rank = max(max(factors.core_shape(name)) for name in factors.layers)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors.layers}),
        "base_model_name_or_path": base_model or loaded_from(model),
        CHECKSUM: factors.checksum,
    }
    text = (json.dumps(config, indent=2) + "\n").encode()
    with folder(directory), together(directory):
        with placed(directory, {TENSORS_NAME: serialized(cores), CONFIG_NAME: text}, apart=CONFIG_NAME):
            pass


def _vector(tensors: Mapping[str, Tensor], factors: Factors, where: str) -> Tensor:
    """All cores in one vector, by `Factors.spans`. ValueError unless tensors are one core of the right shape per layer."""
    names = {f"{layer}.core": layer for layer in factors.layers}
    if tensors.keys() != names.keys():
        missing, extra = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
        raise ValueError(f"{where}: expected {len(names)} cores, got {missing[:1]} missing and {extra[:1]} besides")
    for name, layer in names.items():
        core, shape = tensors[name], factors.core_shape(layer)
        if tuple(core.shape) != shape or not core.is_floating_point():
            raise ValueError(f"{where}: expected floating values {shape} in {name}, got {core.dtype} {tuple(core.shape)}")
    return torch.cat([tensors[f"{layer}.core"].flatten() for layer in factors.spans])


def check_finite(cores: Tensor, factors: Factors, where: str) -> None:
    """Raises ValueError with a layer's name if the vector of cores is not finite."""
    if not bool(cores.isfinite().all()):
        layer = next(layer for layer, span in factors.spans.items() if not bool(cores[span].isfinite().all()))
        raise ValueError(f"{where}: expected finite values in {layer}.core, got values that are not finite")


def read_task(directory: str | PathLike[str], factors: Factors, checksum: str) -> Tensor:
    """The cores in a folder of `export_task`, in one vector by `Factors.spans`.

    checksum: that of factors, given because computing it takes time.

    Raises:
        ValueError: anything but a complete task over these factors, finite and of their shapes.
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
            "serves only tasks"
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
    cores = _vector(tensors, factors, f"adapter {path}")
    check_finite(cores, factors, f"adapter {path}")
    return cores
