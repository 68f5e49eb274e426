"""LoTR in vLLM: the engine holds A and B once, and loads a task as r_in r_out numbers per layer.

    export_factors(model, "factors")         once: the adapter, from which the engine reads A and B
    export_task(model, "legal", task=3)      a task of the model's TaskBank, a few hundred kB

    LOTR_FACTORS=factors vllm serve BASE --enable-lora --max-loras 64 --lora-modules legal=legal

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It does nothing
unless LOTR_FACTORS is set. Otherwise every adapter that the engine loads must be a task over these
factors.

A task is a folder that the requests, resolvers and HTTP endpoints of vLLM accept as an adapter:

    adapter_config.json       as PEFT's. An engine without the plugin refuses the folder, because it
                              has no tensors of a LoRA.
    lotr_task.safetensors     as `TaskBank.save` writes it

This file needs no vLLM. Not here: the layers of vLLM with cores (engine.py).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_state import AdapterState, LayerEntry, start_key
from ..convert.lora import put_folder
from ..saving import adapter_of, save_adapter
from ..storage import FilePath
from ..task_files import TaskFormat, task_format_of

__all__ = ["export_factors", "export_task", "register"]

TENSORS_NAME = "lotr_task.safetensors"


@dataclass(frozen=True)
class EngineFactors:
    """The factors of an adapter, as the engine holds them.

    Attributes:
        layers: The adapted layers, with the names of their A and B in tensors, and s.
        tensors: A [k, r_in] and B [n, r_out], each once.
        spans: By layer, the slice of its core in the vector of a task, which has all cores.
        task_format: What a task over these factors consists of.
        on_device: A cache of engine.py: the tensors that it has moved to a device.
    """

    layers: Mapping[str, LayerEntry]
    tensors: Mapping[str, Tensor]
    spans: Mapping[str, slice]
    task_format: TaskFormat
    on_device: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)


def factors_of(adapter: AdapterState, where: str) -> EngineFactors:
    """Returns the factors of an adapter.

    Args:
        adapter: From a model or a folder.
        where: The function or variable that names it, for the error.

    Raises:
        ValueError: If the engine cannot split it into factors and cores.
    """
    _check_servable(adapter, where)
    layers = adapter.layers
    task_format = task_format_of(adapter)
    tensors = {key: adapter.tensors[key] for entry in layers.values() for key in (entry.A, entry.B)}
    sizes = [math.prod(shape) for shape in task_format.shapes.values()]
    spans = {
        name: slice(end - size, end) for name, size, end in zip(layers, sizes, accumulate(sizes))
    }
    return EngineFactors(layers, tensors, spans, task_format)


def _check_servable(adapter: AdapterState, where: str) -> None:
    for name, entry in adapter.layers.items():
        if entry.experts:
            raise ValueError(
                f"{where}: expected adapted linear layers, got experts in {name!r}. "
                f"lotr_ext.convert.export_lora writes them for vLLM's LoRA."
            )
        if start_key(entry.A) in adapter.tensors:
            raise ValueError(
                f"{where}: expected an adapter that changes no base weight, got init 'svd' in "
                f"{name!r}. lotr_ext.convert.export_lora writes it for vLLM's LoRA, at twice "
                f"the rank."
            )
    if adapter.modules_to_save:
        raise ValueError(
            f"{where}: expected an adapter without modules_to_save, got "
            f"{', '.join(adapter.modules_to_save)}. Merge them into the base model that the engine "
            f"serves."
        )


# ---- export --------------------------------------------------------------------------------------


def export_factors(model: nn.Module, directory: FilePath) -> None:
    """Writes the folder that LOTR_FACTORS names: the model's adapter, as `save_adapter` does.

    Raises:
        RuntimeError: If the model has no adapter.
        ValueError: If it has experts, init "svd" or modules_to_save, which the engine cannot hold.
    """
    factors_of(adapter_of(model), "export_factors")
    save_adapter(model, directory)


@torch.no_grad()
def export_task(
    model: nn.Module,
    directory: FilePath,
    *,
    task: int | None = None,
    base_model: str | None = None,
) -> None:
    """Writes a task for the engine.

    Args:
        model: An adapted model.
        directory: Created if it does not exist. Its name can serve as the adapter's name in the
            engine.
        task: A task of the model's TaskBank. If None, the cores of the model's adapter.
        base_model: The path or name of the base model, which vLLM's resolver of folders needs. If
            None, the one from which the model was loaded.

    Raises:
        RuntimeError: If the model has no adapter.
        AttributeError: If a task is given and the model has no TaskBank.
        ValueError: If there is no such task, or if the engine cannot hold the adapter.
        FileExistsError: If directory is a file.
        OSError: If a file cannot be written. The directory then has no adapter_config.json, so that
            the engine refuses it.
    """
    adapter = adapter_of(model)
    task_format = factors_of(adapter, "export_task").task_format
    cores = adapter.tensors if task is None else model.lotr_tasks.cores_of(task)
    rank = max(max(shape) for shape in task_format.shapes.values())
    # vLLM reads this file before it calls the plugin, so it must be one that the engine accepts.
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.layers}),
        "base_model_name_or_path": base_model or adapter.base.name,
    }
    tensors = {name: cores[name] for name in task_format.shapes}
    put_folder(Path(directory), TENSORS_NAME, tensors, config, task_format.metadata())


# ---- in the engine -------------------------------------------------------------------------------


def read_task(directory: FilePath, factors: EngineFactors) -> Tensor:
    """Returns the cores s G in a folder of `export_task` as one vector, by `EngineFactors.spans`.

    Raises:
        TypeError, ValueError: If it is not a complete task over these factors with finite values.
    """
    path = Path(directory) / TENSORS_NAME
    if not path.exists():
        raise ValueError(
            f"adapter: expected a task by export_task, got {directory} without {TENSORS_NAME}. An "
            f"engine with LOTR_FACTORS serves only tasks."
        )
    tensors = factors.task_format.read(path, "adapter")
    damaged = [name for name, core in tensors.items() if not bool(core.isfinite().all())]
    if damaged:
        raise ValueError(
            f"adapter: expected finite values, got others in {damaged[0]} in {directory}. Train "
            f"the task again."
        )
    # The engine's kernels add (u G) B^T, so the scaling belongs to the core.
    return torch.cat(
        [
            entry.scaling * tensors[f"{name}.core"].flatten()
            for name, entry in factors.layers.items()
        ]
    )


@cache  # vLLM may call it again, and `install` would then replace what it has replaced
def register() -> None:
    """Makes vLLM serve tasks over the factors in the folder LOTR_FACTORS: vLLM's entry point.

    Does nothing if the variable is not set.

    Raises:
        RuntimeError: If this version of vLLM is not tested, unless LOTR_VLLM_ANY=1.
        ValueError: If there is no such folder, or it has an adapter that the engine cannot hold.
    """
    if os.environ.get("LOTR_FACTORS"):
        # Only here: engine.py imports vLLM, and exporting works without it.
        from .engine import install

        adapter = AdapterState.read(Path(os.environ["LOTR_FACTORS"]))
        install(factors_of(adapter, "LOTR_FACTORS"))
