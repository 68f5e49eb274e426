"""`TaskOptimizer`: an optimizer with a state per task of a bank. A step changes only the tasks that had rows in the batch.

Each (task, layer) is a parameter of one torch optimizer: a view [r_in, r_out] of the bank's core, made when the task is first
trained. A step passes to this optimizer the views of the tasks that had rows, each with its part of the bank's gradient. So a
task's momentum, step count and weight decay are the same as if it were trained alone.

An autograd node before each core (`noted_cores`) records the tasks that had rows: their gradients may be zero, so the gradient
does not show it.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..compat import graph_task, is_compiling, same_storage
from ..layers.checks import check_index

__all__ = ["TaskOptimizer"]

STATE = "state/"  # in a file, the prefix of the names of tensors that are no cores
Bank = nn.Module  # a TaskBank, whose module imports this one
_of_bank: weakref.WeakKeyDictionary[Bank, weakref.ref[TaskOptimizer]] = weakref.WeakKeyDictionary()


class _Task(NamedTuple):
    """The parameters of a task, one per layer, and the write count of its slot when they were created."""

    parameters: list[nn.Parameter]
    writes: int


class TaskOptimizer(torch.optim.Optimizer):
    """A torch optimizer with a state per task of a bank. Created by `TaskBank.optimizer`, which describes the arguments.

    param_groups: one group with the bank's cores and the settings, for schedulers, GradScaler and clipping. Copy or pickle it
    together with the model.
    """

    def __init__(self, bank: Bank, optimizer_class: type[torch.optim.Optimizer], **settings: Any):
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(f"optimizer_class: expected a class of torch.optim.Optimizer, got {optimizer_class!r:.80}")
        given = {name for name, value in settings.items() if value is not None}
        numbers = not any(isinstance(value, Tensor) for value in settings.values())  # Adam refuses a tensor with foreach=True
        if numbers and "foreach" in inspect.signature(optimizer_class).parameters and not given & {"foreach", "fused"}:
            settings["foreach"] = True
        self._class, self._settings = optimizer_class, settings
        self._inner = self._probe(bank)
        self._bank, self._layers = bank, [f"{name}.core" for name in bank._layers]
        super().__init__(list(bank.cores), self._inner.defaults)
        self._storages = [core.untyped_storage() for core in bank.cores]
        self._tasks: dict[int, _Task] = {}
        self._writes = list(bank.writes)  # the slots' write counts at the last backward
        # by layer: the indices whose rows made its gradient, and the write counts then
        self._noted: list[list[tuple[Tensor, list[int]]]] = [[] for _ in self._layers]
        self._noted_in = [-1] * len(self._layers)  # the backward that the last of them was noted in
        _of_bank[bank] = weakref.ref(self)

    def _make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return self._class(parameters, **self._settings)

    def _probe(self, bank: Bank) -> torch.optim.Optimizer:
        """A new optimizer. Tests a step with one zero parameter first: raises TypeError if the step needs more than a gradient,
        or keeps state that does not belong to a parameter."""
        parameter = nn.Parameter(torch.zeros_like(bank.cores[0].detach()[0]))
        parameter.grad = torch.zeros_like(parameter)
        inner, name = self._make([parameter]), self._class.__name__
        before = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        try:
            inner.step()
        except Exception as error:  # another package's optimizer may raise anything
            raise TypeError(
                f"optimizer_class: expected an optimizer that needs only dense gradients, got {name} "
                f"({type(error).__name__}: {error!s:.100}); use another one, such as AdamW or SGD"
            ) from None
        changed = [key for key, value in inner.param_groups[0].items() if key != "params" and before.get(key, ...) is not value]
        if changed or set(inner.state) - {parameter}:
            raise TypeError(
                f"optimizer_class: expected an optimizer whose state belongs to each parameter, got {name}, which keeps "
                f"{changed or 'state'} for all together; use another one, such as AdamW or SGD"
            )
        return self._make([parameter])

    def __reduce__(self) -> tuple:  # a copy or pickle is of the bank too, and knows of no rows
        return _restored, (self._bank, self._class, self._settings, self.state_dict())

    def add_param_group(self, param_group: dict) -> None:
        """Raises RuntimeError except in the constructor: other parameters need another optimizer."""
        if self.param_groups:
            raise RuntimeError("add_param_group: expected only the bank's cores, got more; use another optimizer for them")
        super().add_param_group(param_group)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and forgets which tasks had rows."""
        super().zero_grad(set_to_none)
        self._forget_rows()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, index: Tensor | None = None) -> float | None:
        """Updates the tasks that had rows in the backwards since the last step or zero_grad; others keep values and state.

        index: the tasks to update instead, an int64 tensor of any shape, -1 for none. Needed with a compiled backward, and in
        distributed training, where it has the tasks of all processes.

        Raises:
            TypeError, ValueError: index of another dtype, or with tasks that the bank does not have. RuntimeError: a gradient
                without known rows; a bank that was moved, cast or replaced. Nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tasks = self._tasks_of_layers(index)
        self._look_for_moves()
        moving = {core: self._with_gradients(l, tasks[l]) for l, core in enumerate(self._bank.cores) if tasks[l]}
        parameters = [parameter for layer in moving.values() for parameter in layer]
        settings = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        try:
            if parameters:
                self._inner.param_groups = [settings | {"params": parameters}]
                self._inner.step()
                increment_version(tuple(moving))  # so that a backward through an earlier forward raises
        finally:
            for parameter in parameters:
                parameter.grad = None
            self._inner.param_groups = [settings | {"params": []}]
        self._forget_rows()
        return loss

    def _with_gradients(self, l: int, tasks: list[int]) -> list[nn.Parameter]:
        """The parameters of the tasks in layer l, each with its gradient set."""
        gradient, parameters = self._bank.cores[l].grad, [self._parameters(task)[l] for task in tasks]
        rows = gradient[torch.tensor(tasks, device=gradient.device)].unbind(0)
        for parameter, row in zip(parameters, rows, strict=True):
            parameter.grad = row
        return parameters

    def _tasks_of_layers(self, index: Tensor | None) -> list[list[int]]:
        """The tasks to update in each layer; none in a layer without a gradient."""
        trained = [core.grad is not None for core in self._bank.cores]
        if index is not None:
            check_index("index", index, len(self._bank.taken))
            tasks, taken = _tasks_in([index]), self._bank.taken.tolist()
            if free := [task for task in tasks if not taken[task]]:
                raise ValueError(f"index: expected tasks of the bank, got {free[0]}, a free slot")
            return [tasks if own else [] for own in trained]
        world = torch.distributed.get_world_size() if _distributed() else 1
        if world > 1 and any(trained):
            raise RuntimeError(
                f"index: expected the tasks of all {world} processes, got None; gather their indices and call step(index=...)"
            )
        found: dict[tuple[int, ...], list[int]] = {}
        tasks = []
        for own, noted, name in zip(trained, self._noted, self._layers, strict=True):
            if own and not noted:
                raise RuntimeError(
                    f"step: expected tasks with rows in {name}, got a gradient without rows: its backward was compiled, or ran "
                    "before this optimizer was created or its last step; call step(index=...)"
                )
            key = tuple(id(part) for one in noted for part in one)  # most layers have the same indices
            if own and key not in found:
                found[key] = self._current(noted)
            tasks.append(found[key] if own else [])
        return tasks

    def _current(self, noted: Sequence[tuple[Tensor, list[int]]]) -> list[int]:
        """The tasks that had rows in some indices, without rows of a task that was dropped or replaced since."""
        taken, now, tasks = self._bank.taken.tolist(), self._bank.writes, set[int]()
        for writes in {id(own): own for _, own in noted}.values():
            rows = _tasks_in(index for index, own in noted if own is writes)
            tasks.update(task for task in rows if taken[task] and writes[task] == now[task])
        return sorted(tasks)

    def _note(self, l: int, index: Tensor) -> None:
        """Records that rows of an index gave layer l a gradient. Called in backward, before the gradient is added."""
        if self._bank.cores[l].grad is None and self._noted_in[l] != graph_task():
            self._noted[l].clear()  # they belong to a gradient that was dropped
        self._noted_in[l] = graph_task()
        if self._writes != self._bank.writes:
            self._writes = list(self._bank.writes)
        if all(one is not index or writes is not self._writes for one, writes in self._noted[l]):
            self._noted[l].append((index, self._writes))

    def _forget_rows(self) -> None:
        for noted in self._noted:
            noted.clear()

    # ---- parameters of tasks -----------------------------------------------------------------------------------------

    def _parameters(self, task: int) -> list[nn.Parameter]:
        """The parameters of a task; created, with a new optimizer's initial state, if it has none."""
        found, writes = self._tasks.get(task), self._bank.writes[task]
        if found is not None and found.writes == writes:
            return found.parameters
        self._forget(task)  # the slot now holds another task
        parameters = [nn.Parameter(core.detach()[task]) for core in self._bank.cores]
        self._inner.state.update(self._make(parameters).state)  # some optimizers, such as Adagrad, create state at once
        self._tasks[task] = _Task(parameters, writes)
        return parameters

    def _forget(self, task: int) -> None:
        for parameter in self._tasks.pop(task, _Task([], 0)).parameters:
            self._inner.state.pop(parameter, None)

    def _look_for_moves(self) -> None:
        """Updates the views of cores whose memory has moved. Raises RuntimeError for another dtype, device or parameter."""
        held = self.param_groups[0]["params"]
        for l, core in enumerate(self._bank.cores):
            if core is not held[l]:
                raise RuntimeError(f"step: expected the bank's parameters, got another one in {self._layers[l]}; {_ADVICE}")
            if same_storage(core.untyped_storage(), self._storages[l]):
                continue
            for task, own in self._tasks.items():
                old, new = own.parameters[l], core.detach()[task]
                if (old.dtype, old.device) != (new.dtype, new.device):
                    was, now = f"{old.dtype} on {old.device}", f"{new.dtype} on {new.device}"
                    raise RuntimeError(f"step: expected cores in {was}, as the state is, got {now}; {_ADVICE}")
                old.data = new
            self._storages[l] = core.untyped_storage()

    # ---- saving ------------------------------------------------------------------------------------------------------

    def state_of(self, task: int) -> dict[str, dict[str, Any]]:
        """The state of a task by layer name, as a torch optimizer has it per parameter. {} if the task was never trained."""
        self._bank.cores_of(task)
        found = self._tasks.get(task)
        if found is None or found.writes != self._bank.writes[task]:
            return {}
        named = zip(self._layers, found.parameters, strict=True)
        return {name: dict(state) for name, parameter in named if (state := self._inner.state.get(parameter))}

    def state_dict(self) -> dict[str, Any]:
        """A torch optimizer's state_dict, with `tasks`: {task: {layer name: state}} of the tasks that were trained."""
        taken = self._bank.taken.tolist()
        tasks = {task: state for task in sorted(self._tasks) if taken[task] and (state := self.state_of(task))}
        return super().state_dict() | {"class": self._class.__name__, "tasks": tasks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads settings and the states of all tasks. Load the bank first.

        Raises:
            ValueError: the state of another class, of other layers, or of a task that the bank does not have. Nothing is
                changed then.
        """
        if state_dict.get("class") != self._class.__name__ or "tasks" not in state_dict:
            raise ValueError(f"state_dict: expected one of {self._class.__name__}, got {state_dict.get('class')!r}")
        states = {}
        for task, state in state_dict["tasks"].items():
            if not (0 <= task < len(self._bank.taken) and self._bank.taken[task]):
                raise ValueError(f"state_dict: expected tasks of the bank, got {task}, which it does not have; load it first")
            states[task] = self._loaded(state, "state_dict")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for task in list(self._tasks):
            self._forget(task)
        for task, own in states.items():
            self._take(task, *own)
        self._forget_rows()

    def save(self, task: int, path: str | PathLike[str]) -> None:
        """Writes a task as `TaskBank.save` does, with its state. `add` reads both, `TaskBank.add` only the cores.

        Raises:
            TypeError, ValueError: no path, no such task.
        """

        def state() -> tuple[dict[str, Tensor], dict[str, str]]:
            parts = {f"{STATE}{name}/{key}": value for name, own in self.state_of(task).items() for key, value in own.items()}
            tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in parts.items() if isinstance(v, Tensor)}
            others = {k: v for k, v in parts.items() if k not in tensors}
            return tensors, {"optimizer": self._class.__name__, "values": json.dumps(others)}

        self._bank._save(task, path, state)

    def add(self, path: str | PathLike[str]) -> int:
        """Adds a task and its state from a file in the first free slot of the bank. Returns the slot.

        Raises:
            As `TaskBank.add`; ValueError: a file without state, or with that of another class. Nothing is changed then.
        """
        cores, tensors, metadata = self._bank._read(path)
        if metadata.get("optimizer") != self._class.__name__:
            got = metadata.get("optimizer", "a file without state")
            raise ValueError(f"source: expected the state of {self._class.__name__}, got {got}; TaskBank.add reads the cores")
        try:
            numbers = dict(json.loads(metadata["values"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"source: expected the state's numbers in its metadata, got a damaged file {path}") from None
        state: dict[str, dict[str, Any]] = {}
        for key, value in (tensors | numbers).items():
            name, _, what = key.removeprefix(STATE).rpartition("/")
            state.setdefault(name, {})[what] = value
        own = self._loaded(state, "source")
        task = self._bank.add(cores)
        self._take(task, *own)
        return task

    def _loaded(self, state: Mapping[str, Mapping[str, Any]], where: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        """Parameters of a task's shapes, and an optimizer with their state, on the bank's device."""
        if unknown := sorted(set(state) - set(self._layers)):
            raise ValueError(f"{where}: expected the state of layers of the bank, got that of {unknown[0]}")
        parameters = [nn.Parameter(core.detach()[0]) for core in self._bank.cores]
        for name, core in zip(self._layers, parameters, strict=True):
            for key, value in state.get(name, {}).items():
                shape = tuple(value.shape) if isinstance(value, Tensor) else ()
                # one number, one per row or column, or one per element
                if shape and (len(shape) != core.dim() or any(n not in (1, own) for n, own in zip(shape, core.shape))):
                    raise ValueError(f"{where}: expected state of {name} like {tuple(core.shape)}, got {key} of shape {shape}")
        optimizer = self._make(parameters)
        fresh = optimizer.state_dict()
        given = {i: dict(state[name]) for i, name in enumerate(self._layers) if name in state}
        optimizer.load_state_dict({"state": given, "param_groups": fresh["param_groups"]})
        return parameters, optimizer

    def _take(self, task: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._forget(task)
        for parameter, core in zip(parameters, self._bank.cores, strict=True):
            parameter.data = core.detach()[task]
        self._inner.state.update(optimizer.state)
        self._tasks[task] = _Task(parameters, self._bank.writes[task])


def _restored(bank: Bank, optimizer_class: type, settings: dict[str, Any], state: Mapping[str, Any]) -> TaskOptimizer:
    optimizer = TaskOptimizer(bank, optimizer_class, **settings)
    optimizer.load_state_dict(state)
    return optimizer


_ADVICE = "create the optimizer after the model was moved, and load its state_dict"


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# ---- which tasks had rows --------------------------------------------------------------------------------------------


def _tasks_in(indices: Iterable[Tensor]) -> list[int]:
    """The tasks in some indices, in order."""
    found = torch.cat([index.reshape(-1).cpu() for index in indices]).unique().tolist()
    return [task for task in found if task >= 0]


class _Noted(torch.autograd.Function):
    """The identity on a core. Its backward records that rows of index gave it a gradient."""

    @staticmethod
    def forward(core: Tensor, index: Tensor, l: int, optimizer: TaskOptimizer) -> Tensor:
        return core.detach()  # for a view, autograd's error about an in-place write would blame this Function

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.index, ctx.l, ctx.optimizer = inputs

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.optimizer._note(ctx.l, ctx.index)
        return gradient, None, None, None


class _Snapshots:
    """Copies of an index, one per version, since the user may write to the index."""

    def __init__(self, index: Tensor):
        self.index, self.version, self.copy = index, -2, index

    def now(self) -> Tensor:
        version = -1 if self.index.is_inference() else self.index._version
        if version != self.version or version < 0:
            self.version, self.copy = version, self.index.detach().clone()
        return self.copy


def noted_cores(bank: Bank, index: Tensor) -> list[Tensor | Callable[[Tensor, int], Tensor]]:
    """The sources of each layer's cores for a Mixture: the bank's cores, through a node if the bank has an optimizer."""
    optimizer = _of_bank.get(bank, lambda: None)()
    if optimizer is None:
        return list(bank.cores)
    snapshots = _Snapshots(index)
    return [partial(_noted, core, snapshots, l, optimizer) for l, core in enumerate(bank.cores)]


def _noted(core: Tensor, snapshots: _Snapshots, l: int, optimizer: TaskOptimizer, own: Tensor, b: int) -> Tensor:
    if is_compiling() or not torch.is_grad_enabled() or not core.requires_grad:
        return core
    return _Noted.apply(core, snapshots.now(), l, optimizer)
