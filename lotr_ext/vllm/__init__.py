"""LoTR in vLLM: the engine holds A and B once, and loads a task as r_in r_out numbers a layer.

    export_factors(model, "factors")                      once: an adapter's folder, from which the engine reads A and B
    export_task(model, "legal", task=3)                   a task of the model's TaskBank, a few hundred kB

    LOTR_FACTORS=factors  vllm serve BASE --enable-lora --max-loras 64 --max-lora-rank 16 --lora-modules legal=legal

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It does nothing unless LOTR_FACTORS is set.
With it, every adapter that the engine loads must be a task over these factors. This file needs no vLLM; `engine` has vLLM's
layers with cores.

A task is a folder that vLLM's requests, resolvers and HTTP endpoints take for an adapter's:

    adapter_config.json       PEFT's, with lotr_factors: a checksum of the task's factors. An engine without the plugin refuses
                              the folder, because it has no tensors of a LoRA.
    lotr_task.safetensors     <layer>.core = s G [r_in, r_out]
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_state import AdapterState, LayerEntry
from ..convert.lora import CONFIG_NAME, put_folder
from ..convert.to_lora import bank_of
from ..files import save_adapter, state_of
from ..old_files import start_key
from ..storage import checked_path, checksum, expect_names, json_in, tensors_in

__all__ = ["export_factors", "export_task", "register"]

TENSORS_NAME, CHECKSUM = "lotr_task.safetensors", "lotr_factors"


@dataclass(frozen=True)
class Factors:
    """layers: {adapted layer: the names of its A [k, r_in] and B [n, r_out] in tensors}."""

    layers: dict[str, tuple[str, str]]
    tensors: dict[str, Tensor]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the layers' names and the factors' values."""
        return checksum(
            sorted(self.tensors.items()), json.dumps(sorted(self.layers.items())).encode()
        )

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


def factors_of(adapter: AdapterState, where: str) -> Factors:
    """Returns the factors of an adapter.

    Raises:
        ValueError: If the engine cannot split it into factors and cores.
    """
    names: dict[str, str] = {}
    layers = {}
    for name, entry in sorted(adapter.layers.items()):
        if entry.experts:
            raise ValueError(
                f"{where}: expected adapted linear layers, got experts in {name!r}. lotr_ext.convert.export_lora writes them "
                f"for vLLM's own LoRA."
            )
        if start_key(entry.A) in adapter.tensors:
            raise ValueError(
                f"{where}: expected an adapter that changes no base weight, got init 'svd' in {name!r}. "
                f"lotr_ext.convert.export_lora writes it for vLLM's own LoRA, at twice the rank."
            )
        A = names.setdefault(entry.A, f"A{len(names)}")
        B = names.setdefault(entry.B, f"B{len(names)}")
        layers[name] = (A, B)
    if adapter.modules_to_save:
        raise ValueError(
            f"{where}: expected an adapter without modules_to_save, got "
            f"{', '.join(adapter.modules_to_save)}"
        )
    tensors = {new_name: adapter.tensors[key].detach() for key, new_name in names.items()}
    return Factors(layers, tensors)


def read_factors(directory: str | PathLike[str]) -> Factors:
    """The factors in a folder of `save_adapter`. Raises ValueError: no such folder, or an adapter that the engine cannot
    hold."""
    return factors_of(AdapterState.read(checked_path(directory, "LOTR_FACTORS")), "LOTR_FACTORS")


def export_factors(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes the folder that LOTR_FACTORS names: the model's adapter, as `save_adapter` does.

    Raises ValueError: experts, init "svd" or modules_to_save, which the engine cannot hold. RuntimeError: no adapter.
    """
    factors_of(state_of(model), "export_factors")
    save_adapter(model, directory)


@torch.no_grad()
def export_task(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    task: int | None = None,
    base_model: str | None = None,
) -> None:
    """Writes a task for the engine: its cores with their scaling, and the checksum of the model's factors.

    Args:
        model: a model from `apply_lotr`.
        directory: created if it does not exist. Its name can serve as the adapter's name in the engine.
        task: a task of the model's TaskBank; None for the cores of the model's adapter.
        base_model: the base model's path or name, which vLLM's resolver of folders needs. None: as the model was loaded.

    Raises RuntimeError: no adapter, or a task of a model without a bank. ValueError: no such task, an adapter that the engine
    cannot hold, or directory is a file.
    """
    directory = checked_path(directory, "directory")
    adapter = state_of(model)
    factors = factors_of(adapter, "export_task")
    layers: dict[str, LayerEntry] = adapter.layers
    cores = adapter.tensors if task is None else bank_of(model).cores_of(task)
    scaled = {
        f"{name}.core": entry.scaling * cores[f"{name}.core"] for name, entry in layers.items()
    }
    rank = max(max(factors.core_shape(name)) for name in layers)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "base_model_name_or_path": base_model
        or getattr(getattr(model, "config", None), "_name_or_path", None)
        or None,
        CHECKSUM: factors.checksum,
    }
    put_folder(directory, TENSORS_NAME, scaled, config)


def read_task(directory: str | PathLike[str], factors: Factors) -> Tensor:
    """The cores in a folder of `export_task`, in one vector by `Factors.spans`.

    Raises ValueError: anything but a complete task over these factors, finite and of their shapes.
    """
    directory = Path(directory)
    config = json_in(directory / CONFIG_NAME, "adapter")
    if CHECKSUM not in config:
        raise ValueError(
            f"adapter: expected a task by export_task, got an adapter of {config.get('peft_type')} in {directory}. An engine "
            f"with LOTR_FACTORS serves only tasks."
        )
    if config[CHECKSUM] != factors.checksum:
        raise ValueError(
            f"adapter: expected a task over the engine's factors {factors.checksum[:12]}, got one over "
            f"{str(config[CHECKSUM])[:12]} in {directory}. Export it from a model with the factors that LOTR_FACTORS names."
        )
    tensors, _ = tensors_in(directory / TENSORS_NAME, "adapter")
    return _vector(tensors, factors, f"adapter {directory}")


def _vector(tensors: Mapping[str, Tensor], factors: Factors, where: str) -> Tensor:
    """All cores in one vector, by `Factors.spans`. ValueError unless tensors are one finite core of the right shape a layer."""
    names = {f"{layer}.core": layer for layer in factors.spans}
    expect_names(where, names, tensors)
    for name, layer in names.items():
        core, shape = tensors[name], factors.core_shape(layer)
        if tuple(core.shape) != shape or not core.is_floating_point():
            raise ValueError(
                f"{where}: expected floating values {shape} in {name}, got {core.dtype} {tuple(core.shape)}"
            )
        if not bool(core.isfinite().all()):
            raise ValueError(
                f"{where}: expected finite values in {name}, got values that are not finite"
            )
    return torch.cat([tensors[name].flatten() for name in names])


@cache
def served() -> Factors:
    """The factors in the folder LOTR_FACTORS."""
    return read_factors(os.environ["LOTR_FACTORS"])


@cache
def register() -> None:
    """vLLM's entry point: serves tasks over the factors in the folder LOTR_FACTORS. Without it, vLLM is not changed.

    Raises RuntimeError: a version of vLLM that is not tested. ValueError: no such folder.
    """
    if os.environ.get("LOTR_FACTORS"):
        from .engine import install

        install(served())
