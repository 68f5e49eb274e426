"""Many tasks over one model: TaskBank, the cores of all of them in one parameter a layer, which `mixed` picks from by row.

    y_i = x_i W^T + bias + s ((x_i A) G_task(i)) B^T

A task is r_in r_out numbers a layer over factors that all share; a file of a task holds just these. It names the factors that
they belong to by a checksum of their values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import put_file
from ..layers.mixture import Mixture
from .apply import adapted_layers
from .shared_factors import Owner, SharedFactors, factors_by_part

__all__ = ["TaskBank", "bank_of"]

Source = Mapping[str, Tensor] | str | PathLike[str]
_FORMAT = {"format": "lotr_task", "version": "1"}


class TaskBank(nn.Module):
    """Places for `tasks` tasks over the factors of model's active adapter; registered as `model.lotr_tasks`.

    cores: for each adapted layer, in the model's order, a parameter [tasks, r_in, r_out], of experts [tasks, e, r_in, r_out],
    of the dtype and on the device of its core, frozen until `requires_grad_()` is called. taken [tasks] (bool): which places
    hold a task; a free place is zero.

    `mixed(model, index)` runs batches whose row i is of task index[i]. Tasks may come and go at any time between two forwards
    without a graph; a backward whose forward came before one raises, as after any write in place.

    Raises:
        TypeError: tasks is no int. ValueError: fewer than one. RuntimeError: no adapter, layers built by hand, or a
            bank that is there already.
    """

    def __init__(self, model: nn.Module, tasks: int):
        super().__init__()
        layers = adapted_layers(model)
        if not isinstance(getattr(model, "lotr_factors", None), SharedFactors):
            raise RuntimeError("TaskBank: expected a model from apply_lotr, got one whose layers were built by hand")
        if hasattr(model, "lotr_tasks"):
            raise RuntimeError("TaskBank: expected a model without a bank, got one with; del model.lotr_tasks first")
        if isinstance(tasks, bool) or not isinstance(tasks, int):
            raise TypeError(f"tasks: expected an int, got {type(tasks).__name__} {tasks!r}")
        if tasks < 1:
            raise ValueError(f"tasks: expected at least 1, got {tasks}")
        cores = (layer.core.detach().new_zeros(tasks, *layer.core.shape) for layer in layers.values())
        self.cores = nn.ParameterList(nn.Parameter(core, requires_grad=False) for core in cores)
        self.register_buffer("taken", torch.zeros(tasks, dtype=torch.bool, device="cpu"))
        self._layers = tuple(layers)
        self._scaling = next(iter(layers.values())).scaling
        self._owners: dict[str, Owner] = dict(model.lotr_factors.items())  # which the model registers
        model.lotr_tasks = self

    def forward(self, x: Tensor) -> Tensor:
        """Returns its input: nn.Sequential calls all it registers."""
        return x

    def __len__(self) -> int:
        return int(self.taken.sum())

    # ---- tasks, one by one -------------------------------------------------------------------------------------------

    def add(self, source: Source | None = None) -> int:
        """Puts a task into the first free place, which it returns.

        source: its cores [r_in, r_out] (of experts [e, r_in, r_out]) by layer name, a file that `save` wrote, or None for a
        task that starts as the base model does, at zero.

        Raises:
            RuntimeError: no place is free. TypeError, ValueError: other layers, shapes, factors or scaling; nothing is changed.
        """
        free = (~self.taken).nonzero()
        if not len(free):
            raise RuntimeError(f"add: expected a free place, got {len(self.taken)} that are all taken")
        place = int(free[0])
        self._write(place, source)
        self.taken[place] = True
        return place

    def replace(self, task: int, source: Source | None) -> None:
        """Another task in the place of `task`. source and errors as in `add`."""
        self._write(self._place(task), source)

    def drop(self, task: int) -> None:
        """Takes a task out: its place is zero, and free.

        Raises:
            TypeError, ValueError: no such task.
        """
        self._write(self._place(task), None)
        self.taken[task] = False

    def cores_of(self, task: int) -> dict[str, Tensor]:
        """The cores [r_in, r_out] of a task by layer name, views of the bank.

        Raises:
            TypeError, ValueError: no such task.
        """
        place = self._place(task)
        return {f"{name}.core": core.detach()[place] for name, core in zip(self._layers, self.cores, strict=True)}

    def save(self, task: int, path: str | PathLike[str]) -> None:
        """Writes a task into a safetensors file, whole or not at all: `<layer>.core` [r_in, r_out] a layer.

        Raises:
            TypeError, ValueError: no path, no such task.
        """
        tensors = {name: core.cpu().contiguous() for name, core in self.cores_of(task).items()}
        target = _path(path)
        metadata = _FORMAT | {"factors": self._checksum(), "scaling": repr(self._scaling)}
        put_file(target.parent, target.name, safetensors.torch.save(tensors, metadata))

    # ---- details -----------------------------------------------------------------------------------------------------

    def mixtures(self, model: nn.Module, index: Tensor) -> list[Mixture]:
        """What each layer has of the tasks of a batch, by `mixed`."""
        if index.dtype != torch.int64:
            raise TypeError(f"names: expected adapter names or an int64 index of tasks, got {index.dtype}")
        if index.dim() != 1 or not len(index):
            raise ValueError(f"names: expected an index [b] of one task a row, got shape {tuple(index.shape)}")
        for group, owner in self._owners.items():
            if model.lotr_factors[group] is not owner:
                raise ValueError(f"names: expected tasks of the active adapter's factors, got others in {group!r}")
        if index.device.type == "cpu" and self.taken.device.type == "cpu":
            own = index[index >= 0]
            if int(index.min()) < -1 or int(index.max()) >= len(self.taken):
                got = f"{int(index.min())} to {int(index.max())}"
                raise ValueError(f"names: expected tasks in [-1, {len(self.taken)}), got {got}")
            if not bool(self.taken[own].all()):
                raise ValueError(f"names: expected tasks of the bank, got {int(own[~self.taken[own]][0])}, a free place")
        return [Mixture(core, self._scaling, index) for core in self.cores]

    def _place(self, task: object) -> int:
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"task: expected an int, got {type(task).__name__} {task!r}")
        if not 0 <= task < len(self.taken) or not self.taken[task]:
            raise ValueError(f"task: expected one that add has returned, got {task}")
        return task

    @torch.no_grad()
    def _write(self, place: int, source: Source | None) -> None:
        if source is None:
            for core in self.cores:
                core[place] = 0
            return
        tensors = source if isinstance(source, Mapping) else self._read(_path(source))
        names = [f"{name}.core" for name in self._layers]
        if set(tensors) != set(names):
            missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
            raise ValueError(f"source: expected {len(names)} cores, got {missing[:1]} missing, {extra[:1]} of no layer here")
        for name, core in zip(names, self.cores, strict=True):
            if not isinstance(tensors[name], Tensor) or tensors[name].shape != core.shape[1:]:
                got = getattr(tensors[name], "shape", type(tensors[name]).__name__)
                raise ValueError(f"{name}: expected shape {tuple(core.shape[1:])}, got {got}")
        for name, core in zip(names, self.cores, strict=True):
            core[place].copy_(tensors[name])

    def _read(self, path: Path) -> dict[str, Tensor]:
        with safetensors.safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        for key, want in (_FORMAT | {"scaling": repr(self._scaling), "factors": self._checksum()}).items():
            if metadata.get(key) != want:
                raise ValueError(f"source: expected {key} {want} as the model has, got {metadata.get(key)} in {path}")
        return tensors

    def _checksum(self) -> str:
        """Of the values of all factors."""
        digest = hashlib.sha256()
        for part, module, name in factors_by_part(self._owners):
            values = getattr(module, name).detach().cpu().contiguous()
            digest.update(f"{part} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def bank_of(model: nn.Module, where: str) -> TaskBank:
    """The model's bank; RuntimeError without one."""
    bank = getattr(model, "lotr_tasks", None)
    if not isinstance(bank, TaskBank):
        raise RuntimeError(f"{where}: expected a model with a TaskBank for an index of tasks, got one without")
    return bank


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"source: expected cores by layer name or a path, got {type(path).__name__}")
    return Path(path)
