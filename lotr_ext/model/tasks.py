"""Many tasks over one model: TaskBank holds the cores of all tasks in one parameter per layer; `mixed` chooses by row.

    y_i = x_i W^T + bias + s ((x_i A) G_task(i)) B^T

A task is r_in r_out numbers per layer over factors that all tasks share. A task's file contains only these numbers, and a
checksum of the factors.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autograd.tensor_parallel import is_dtensor
from ..files import check_regular, put_file
from ..layers.checks import check_dimension
from ..layers.layer import LoTRLayer
from ..layers.mixture import Mixture
from ..layers.sharded import agreed, gathered, parted_as
from ..layers.sums import Rule, check_weights
from .adapted import adapted_layers, refuse_magnitudes, refuse_starts
from .parked import parked_of
from .saved import module_prefixes
from .shared_factors import Owner, factors_checksum
from .task_optimizer import STATE, TaskOptimizer, noted_cores

__all__ = ["TaskBank", "bank_of", "cores_and_scalings"]

Source = Mapping[str, Tensor] | str | PathLike[str]
_FORMAT = {"format": "lotr_task", "version": "1"}
_changes = threading.RLock()  # one lock for all banks, since a bank with its own lock could not be copied or pickled


class TaskBank(nn.Module):
    """Slots for `tasks` tasks over the factors of model's active adapter; registered as `model.lotr_tasks`.

    cores: for each adapted layer, in the model's order, a parameter [tasks, r_in, r_out] (experts: [tasks, e, r_in, r_out]) of
    the dtype and on the device of its core, frozen until `requires_grad_()` is called. taken [tasks] (bool): which slots hold
    a task; a free slot is zero.

    With expert parallelism each process has the cores of its experts for all tasks, and all processes must call the bank's
    methods together.

    `mixed(model, index)` runs batches whose row i is of task index[i], with the scaling that each layer had when the bank was
    created. Tasks may be added and removed in any thread between two forwards without a graph. A backward whose forward came
    before such a change raises, as after any in-place write.

    Raises:
        TypeError: tasks is no int. ValueError: fewer than one, or an adapter with magnitudes or of init "svd".
            RuntimeError: no adapter, layers built by hand, a copy of an adapted block, a model that FSDP holds in parts, or a
            bank that exists already.
    """

    def __init__(self, model: nn.Module, tasks: int):
        super().__init__()
        layers = adapted_layers(model)
        parked_of(model, "TaskBank", in_parts_too=True)
        if hasattr(model, "lotr_tasks"):
            raise RuntimeError("TaskBank: expected a model without a bank, got one with a bank; del model.lotr_tasks first")
        check_dimension("tasks", tasks)
        refuse_magnitudes(layers, "TaskBank")
        refuse_starts(layers, "TaskBank")
        module_prefixes(model, layers)  # raises for a copied block, whose factors are in no group
        cores = (_slots(layer.core.detach(), tasks) for layer in layers.values())
        self.cores = nn.ParameterList(nn.Parameter(core, requires_grad=False) for core in cores)
        self.register_buffer("taken", torch.zeros(tasks, dtype=torch.bool, device="cpu"))
        self.writes = [0] * tasks  # write counts of the slots: a write ends a task's optimizer state
        self._layers = tuple(layers)
        self._scalings = tuple(layer.scaling for layer in layers.values())
        self._owners: dict[str, Owner] = dict(model.lotr_factors.items())  # the model registers them
        model.lotr_tasks = self

    def forward(self, x: Tensor) -> Tensor:
        """Returns its input, since nn.Sequential calls all its children."""
        return x

    def __len__(self) -> int:
        return int(self.taken.sum())

    # ---- tasks, one by one -------------------------------------------------------------------------------------------

    def add(self, source: Source | None = None) -> int:
        """Adds a task in the first free slot. Returns the slot.

        source: its cores [r_in, r_out] (experts: [e, r_in, r_out]) by layer name, a file that `save` wrote, or None for a task
        with zero cores, equal to the base model.

        Raises:
            RuntimeError: no slot is free. TypeError, ValueError: no task's file; other layers, shapes, factors or scalings,
                or no floating dtype. Nothing is changed then.
        """
        values = self._values(source)
        with _changes:
            free = (~self.taken).nonzero()
            if not len(free):
                raise RuntimeError(f"add: expected a free slot, got {len(self.taken)} that are all taken")
            slot = int(free[0])
            self._write(slot, values, taken=True)
        return slot

    def replace(self, task: int, source: Source | None) -> None:
        """Replaces `task` by another task. source and errors as in `add`."""
        values = self._values(source)
        with _changes:
            self._write(self._slot(task), values, taken=True)

    def drop(self, task: int) -> None:
        """Removes a task: its slot becomes zero and free.

        Raises:
            TypeError, ValueError: no such task.
        """
        with _changes:
            self._write(self._slot(task), self._values(None), taken=False)

    def combine(
        self, tasks: Mapping[int, float], method: str = "linear", *, density: float | None = None, seed: int = 0
    ) -> int:
        """Adds a weighted sum of tasks in the first free slot. Returns the slot.

        tasks: weights by task. method: "linear", the exact sum of the adapters; or "ties" (arXiv 2306.01708), "dare" (arXiv
        2311.03099), "dare_ties" or "magnitude_prune" of each core, as PEFT defines them. density: the fraction of a core's
        elements that these methods keep, in (0, 1]. seed: of the elements that "dare" and "dare_ties" drop. Sums in float64.

        Raises:
            TypeError, ValueError: no such task, no or no finite weights, an unknown method or density. RuntimeError: no slot
                is free. Nothing is changed then.
        """
        rule, weights = Rule(method, density, seed), check_weights("tasks", tasks)
        with _changes:
            cores = [{name: gathered(core) for name, core in self.cores_of(task).items()} for task in weights]
            return self.add(rule.sum_by_name(cores, list(weights.values())))

    def cores_of(self, task: int) -> dict[str, Tensor]:
        """The cores [r_in, r_out] of a task by layer name, as views of the bank.

        Raises:
            TypeError, ValueError: no such task.
        """
        slot = self._slot(task)
        return {f"{name}.core": core.detach()[slot] for name, core in zip(self._layers, self.cores, strict=True)}

    def save(self, task: int, path: str | PathLike[str]) -> None:
        """Writes a task into a safetensors file, atomically: `<layer>.core` [r_in, r_out] for each layer.

        Raises:
            TypeError, ValueError: no path, no such task.
        """
        self._save(task, path, lambda: ({}, {}))

    # ---- training ----------------------------------------------------------------------------------------------------

    def optimizer(self, optimizer_class: type[torch.optim.Optimizer], **settings: Any) -> TaskOptimizer:
        """A torch optimizer with a state per task: a step changes only the tasks that had rows in the batch.

            optimizer = bank.requires_grad_().optimizer(torch.optim.AdamW, lr=1e-3)
            with mixed(model, index):
                loss(model(x)).backward()
            optimizer.step()

        Each task is updated as by its own torch optimizer that steps only when the task has rows: momentum, the step count of a
        bias correction and weight decay are per task. A task's state is created when it is first trained, and dropped when the
        task is dropped or replaced. The default is foreach=True unless settings contain foreach, fused or a tensor; fused=True
        is the fastest if torch supports it. Create the optimizer after the model was moved. A second optimizer of a bank
        replaces the first one.

        optimizer_class: one whose state belongs to each parameter, such as all of torch's except LBFGS and SparseAdam.
        settings: its arguments.

        Raises:
            TypeError: no optimizer class, or one that keeps state for all parameters together or needs more than gradients; or
                settings that it does not accept; or a bank whose experts are in parts.
        """
        if any(map(is_dtensor, self.cores)):
            raise TypeError(
                "optimizer: expected whole cores in each process, got experts in parts; use a torch optimizer over the bank's "
                "parameters"
            )
        return TaskOptimizer(self, optimizer_class, **settings)

    # ---- details -----------------------------------------------------------------------------------------------------

    def check_factors(self, model: nn.Module, argument: str) -> None:
        """Raises ValueError unless the model's active adapter has the factors of the tasks. argument: for the message."""
        for group, owner in self._owners.items():
            if model.lotr_factors[group] is not owner:
                raise ValueError(f"{argument}: expected tasks of the active adapter's factors, got others in {group!r}")

    def uses(self, factors: Mapping[str, Owner]) -> bool:
        """Whether the tasks are over these factors, by group."""
        return all(factors[group] is owner for group, owner in self._owners.items())

    @property
    def scalings(self) -> dict[str, float]:
        """The tasks' scaling of each layer, by its name."""
        return dict(zip(self._layers, self._scalings, strict=True))

    def mixtures(self, model: nn.Module, index: Tensor) -> list[Mixture]:
        """A Mixture of the bank's tasks for each layer, in the model's order, for `mixed`."""
        if index.dtype != torch.int64:
            raise TypeError(f"names: expected adapter names or an int64 index of tasks, got {index.dtype}")
        if index.is_meta and not self.taken.is_meta:
            raise ValueError("names: expected an index with values, got one on the meta device; create it on another device")
        if index.dim() not in (1, 2) or 0 in index.shape[1:]:
            got = tuple(index.shape)
            raise ValueError(f"names: expected an index [b], a task per row, or [b, tokens], one per token, got shape {got}")
        if index.dim() == 2 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"names: expected an index [b] for a model with an encoder and a decoder, whose tokens differ, got shape "
                f"{tuple(index.shape)}"
            )
        self.check_factors(model, "names")
        if index.device.type == "cpu" and self.taken.device.type == "cpu" and index.numel():
            own = index[index >= 0]
            if int(index.min()) < -1 or int(index.max()) >= len(self.taken):
                got = f"{int(index.min())} to {int(index.max())}"
                raise ValueError(f"names: expected tasks in [-1, {len(self.taken)}), got {got}")
            if not bool(self.taken[own].all()):
                raise ValueError(f"names: expected tasks of the bank, got {int(own[~self.taken[own]][0])}, a free slot")
        cores = noted_cores(self, index)
        return [Mixture(core, scaling, index) for core, scaling in zip(cores, self._scalings, strict=True)]

    def _save(self, task: int, path: object, more: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]) -> None:
        """`save` with more tensors, whose names begin with STATE, and metadata; `more` is called under the same lock."""
        target, together = _path(path), any(map(is_dtensor, self.cores))

        def write() -> None:
            if not together or dist.get_rank() == 0:
                put_file(target.parent, target.name, safetensors.torch.save(cores | tensors, self._metadata() | metadata))

        with _changes:
            cores = {name: gathered(core).to("cpu", copy=True).contiguous() for name, core in self.cores_of(task).items()}
            tensors, metadata = more()
        agreed("save", write, together=together)

    def _slot(self, task: object) -> int:
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"task: expected an int, got {type(task).__name__} {task!r}")
        if not 0 <= task < len(self.taken) or not self.taken[task]:
            raise ValueError(f"task: expected a task of the bank, as add returned it, got {task}")
        return task

    @torch.no_grad()
    def _write(self, slot: int, values: Sequence[Tensor], *, taken: bool) -> None:
        """Writes a task into a slot, whose gradient becomes zero; on an exception the slot keeps its old values."""
        parts = [*(core[slot] for core in self.cores), self.taken[slot]]
        before = [part.clone() for part in parts]
        try:
            for part, value in zip(parts, (*values, torch.tensor(taken, device="cpu")), strict=True):
                part.copy_(value)
            self.writes[slot] += 1
        except BaseException:
            for part, value in zip(parts, before, strict=True):
                part.copy_(value)
            raise
        for core in self.cores:
            if core.grad is not None:  # of the slot's last task; it would move this one, and count in a norm for clipping
                core.grad[slot].zero_()

    def _values(self, source: Source | None) -> list[Tensor]:
        """The cores of a task, checked, in the dtype and on the device of the bank."""
        if source is None:
            return [torch.zeros_like(core.detach()[0]) for core in self.cores]
        tensors = source if isinstance(source, Mapping) else self._read(source)[0]
        names = [f"{name}.core" for name in self._layers]
        if set(tensors) != set(names):
            missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
            raise ValueError(f"source: expected {len(names)} cores, got {missing[:1]} missing, {extra[:1]} of no layer")
        values = []
        for name, core in zip(names, self.cores, strict=True):
            value = tensors[name]
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            if value.shape != core.shape[1:]:
                raise ValueError(f"{name}: expected shape {tuple(core.shape[1:])}, got {tuple(value.shape)}")
            if not value.is_floating_point():
                raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
            if value.is_meta and not core.is_meta:
                raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
            held = value.detach().to(core.dtype)
            if _max(value.dtype) > _max(core.dtype) and not value.is_meta and bool((held.isinf() & value.isfinite()).any()):
                raise ValueError(f"{name}: expected values that the bank's {core.dtype} can hold, got larger {value.dtype}")
            values.append(parted_as(held.to(core.device), core.detach()[0]))
        return values

    def _read(self, source: object) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
        """The cores of a file, its other tensors, and its metadata."""
        path = _path(source)
        try:
            check_regular(path)
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                for key, want in self._metadata().items():
                    got = metadata.get(key)
                    if got != want and (key != "factors" or got != self._checksum()):
                        raise ValueError(f"source: expected {key} {want:.200} as the model has, got {got!s:.200} in {path}")
                cores, others = ([n for n in file.keys() if n.startswith(STATE) == state] for state in (False, True))
                return {n: file.get_tensor(n) for n in cores}, {n: file.get_tensor(n) for n in others}, metadata
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"source: expected a safetensors file, got {path} ({error})") from None

    def _metadata(self) -> dict[str, str]:
        return task_metadata(self._scalings, self._owners)

    def _checksum(self) -> str:
        """The checksum of the factors in the form that version 0.1.0 wrote: in the order of the model's groups."""
        return factors_checksum(self._owners)


def task_metadata(scalings: Sequence[float], owners: Mapping[str, Owner]) -> dict[str, str]:
    """The metadata of a task's file: the layers' scaling (a list if layers differ), and a checksum of the factors that does not
    depend on the order of the groups."""
    scaling = repr(scalings[0]) if len(set(scalings)) == 1 else json.dumps(scalings)
    return _FORMAT | {"scaling": scaling, "factors": factors_checksum(dict(sorted(owners.items())))}


def _slots(core: Tensor, tasks: int) -> Tensor:
    """Zeros [tasks, *core.shape], sharded as core is."""
    if not is_dtensor(core):
        return core.new_zeros(tasks, *core.shape)
    from torch.distributed.tensor import Shard, zeros

    cut = [Shard(placement.dim + 1) if placement.is_shard() else placement for placement in core.placements]
    return zeros(tasks, *core.shape, dtype=core.dtype, device_mesh=core.device_mesh, placements=cut)


def bank_of(model: nn.Module, where: str) -> TaskBank:
    """The model's bank. Raises RuntimeError if it has none."""
    bank = getattr(model, "lotr_tasks", None)
    if not isinstance(bank, TaskBank):
        raise RuntimeError(f"{where}: expected a model with a TaskBank for an index of tasks, got one without")
    return bank


def _max(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def cores_and_scalings(
    model: nn.Module, layers: Mapping[str, LoTRLayer], task: int | None, where: str
) -> tuple[list[Tensor], list[float]]:
    """The cores of the model's layers and their scalings: of a task of the model's bank, or of the active adapter for None.

    Raises:
        RuntimeError: no bank, or a layer that was added since. TypeError, ValueError: no such task, or a bank over other
            factors than the active adapter's.
    """
    if task is None:
        return [layer.core.detach() for layer in layers.values()], [layer.scaling for layer in layers.values()]
    bank = bank_of(model, where)
    bank.check_factors(model, "task")
    cores, scalings = bank.cores_of(task), bank.scalings
    if new := [name for name in layers if name not in scalings]:
        raise RuntimeError(f"{where}: expected the layers that the tasks were made for, got {new[0]!r}, which was added since")
    return [cores[f"{name}.core"] for name in layers], [scalings[name] for name in layers]


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"source: expected cores by layer name or a path, got {type(path).__name__}")
    return Path(path)
