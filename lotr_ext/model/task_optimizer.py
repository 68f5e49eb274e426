"""`TaskOptimizer`: an optimizer state for each task of a bank. A step moves the tasks that had rows, and no others.

Each (task, layer) is a parameter of one torch optimizer: a view [r_in, r_out] of the bank's core, made when the task is first
trained. A step gives this optimizer the views of the tasks that had rows, each with its row of the bank's gradient. So a task's
momentum, step count and weight decay are those of the task trained alone.

Which tasks had rows is noted in backward, by a node on the way to each core (`noted_cores`): a row's gradient may be zero.
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
from torch.compiler import is_compiling

from ..compat import graph_task, same_storage
from ..layers.checks import check_index

__all__ = ["TaskOptimizer"]

STATE = "state/"  # in a file, before the names of what is no core
Bank = nn.Module  # a TaskBank, whose module imports this one
_of_bank: weakref.WeakKeyDictionary[Bank, weakref.ref[TaskOptimizer]] = weakref.WeakKeyDictionary()


class _Task(NamedTuple):
    """The parameters of a task, one a layer, and the count of its place's writes when they were made."""

    parameters: list[nn.Parameter]
    writes: int


class TaskOptimizer(torch.optim.Optimizer):
    """A torch optimizer with a state for each task of a bank; made by `TaskBank.optimizer`, where its arguments are described.

    param_groups: one group with the bank's cores and the settings, as schedulers, GradScaler and clipping expect.
    """

    def __init__(self, bank: Bank, optimizer_class: type[torch.optim.Optimizer], **settings: Any):
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(f"optimizer_class: expected a class of torch.optim.Optimizer, got {optimizer_class!r:.80}")
        given = {name for name, value in settings.items() if value is not None}
        if "foreach" in inspect.signature(optimizer_class).parameters and not given & {"foreach", "fused"}:
            settings["foreach"] = True
        self._class, self._settings = optimizer_class, settings
        self._inner = self._probe(bank)
        self._bank, self._layers = bank, [f"{name}.core" for name in bank._layers]
        super().__init__(list(bank.cores), self._inner.defaults)
        self._storages = [core.untyped_storage() for core in bank.cores]
        self._tasks: dict[int, _Task] = {}
        self._noted: list[list[Tensor]] = [[] for _ in self._layers]  # by layer: the indices whose rows gave its gradient
        self._noted_in = [-1] * len(self._layers)  # the backward that the last of them is from
        self._writes = list(bank.writes)  # into the bank's places, as of the first backward since the last step
        _of_bank[bank] = weakref.ref(self)

    def _make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return self._class(parameters, **self._settings)

    def _probe(self, bank: Bank) -> torch.optim.Optimizer:
        """A new optimizer, after a step of one zero parameter: TypeError if that step needs more than a gradient, or leaves
        state outside of its parameter's."""
        parameter = nn.Parameter(torch.zeros_like(bank.cores[0].detach()[0]))
        parameter.grad = torch.zeros_like(parameter)
        inner, name = self._make([parameter]), self._class.__name__
        before = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        try:
            inner.step()
        except Exception as error:  # of any package's optimizer
            raise TypeError(
                f"optimizer_class: expected an optimizer that steps by dense gradients alone, got {name} "
                f"({type(error).__name__}: {error!s:.100}); take another one, such as AdamW or SGD"
            ) from None
        changed = [key for key, value in inner.param_groups[0].items() if key != "params" and before.get(key, ...) is not value]
        if changed or set(inner.state) - {parameter}:
            raise TypeError(
                f"optimizer_class: expected an optimizer whose state belongs to each parameter, got {name}, which keeps "
                f"{changed or 'state'} for all together; take another one, such as AdamW or SGD"
            )
        return self._make([parameter])

    def add_param_group(self, param_group: dict) -> None:
        """Called once, by the constructor. Raises RuntimeError later: other parameters need an optimizer of their own."""
        if self.param_groups:
            raise RuntimeError("add_param_group: expected the bank's cores alone, got more; give them another optimizer")
        super().add_param_group(param_group)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forgets which tasks had rows."""
        super().zero_grad(set_to_none)
        self._forget_rows()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, index: Tensor | None = None) -> float | None:
        """Moves the tasks that had rows in the backwards since the last step or zero_grad; others keep values and state.

        index: the tasks of the step instead, an int64 tensor of any shape, -1 for none. Needed where backward is compiled, and
        in distributed training: the tasks of all processes together.

        Raises:
            TypeError, ValueError: index of another dtype, or with tasks that the bank does not have. RuntimeError: a gradient
                of which no rows are known; a bank that was moved, cast or replaced. Nothing has moved then.
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
                increment_version(tuple(moving))  # a backward through a forward of before raises
        finally:
            for parameter in parameters:
                parameter.grad = None
            self._inner.param_groups = [settings | {"params": []}]
        self._forget_rows()
        return loss

    def _with_gradients(self, l: int, tasks: list[int]) -> list[nn.Parameter]:
        """The parameters of tasks in layer l, each with its gradient."""
        gradient, parameters = self._bank.cores[l].grad, [self._parameters(task)[l] for task in tasks]
        rows = gradient[torch.tensor(tasks, device=gradient.device)].unbind(0)
        for parameter, row in zip(parameters, rows, strict=True):
            parameter.grad = row
        return parameters

    def _tasks_of_layers(self, index: Tensor | None) -> list[list[int]]:
        """The tasks to move in each layer; none in one without a gradient."""
        trained = [core.grad is not None for core in self._bank.cores]
        if index is not None:
            check_index("index", index, len(self._bank.taken))
            tasks, taken = _tasks_in([index]), self._bank.taken.tolist()
            if free := [task for task in tasks if not taken[task]]:
                raise ValueError(f"index: expected tasks of the bank, got {free[0]}, a free place")
            return [tasks if own else [] for own in trained]
        world = torch.distributed.get_world_size() if _distributed() else 1
        if world > 1 and any(trained):
            raise RuntimeError(
                f"index: expected the tasks of all {world} processes, got None; gather their indices, step(index=...)"
            )
        found: dict[tuple[int, ...], list[int]] = {}
        tasks = []
        for own, noted, name in zip(trained, self._noted, self._layers, strict=True):
            if own and not noted:
                raise RuntimeError(
                    f"step: expected tasks with rows in {name}, got a gradient and no rows: its backward was compiled, or ran "
                    "before this optimizer was made or after its last step; give step(index=...)"
                )
            key = tuple(id(one) for one in noted)  # most layers have the same
            if own and key not in found:
                found[key] = self._unchanged(_tasks_in(noted))
            tasks.append(found[key] if own else [])
        return tasks

    def _unchanged(self, tasks: list[int]) -> list[int]:
        """Those whose places have the tasks that they had when the gradients were made."""
        taken, writes = self._bank.taken.tolist(), self._bank.writes
        return [task for task in tasks if taken[task] and writes[task] == self._writes[task]]

    def _note(self, l: int, index: Tensor) -> None:
        """That rows of an index gave a gradient to layer l: called in backward, before the gradient is added."""
        if self._bank.cores[l].grad is None and self._noted_in[l] != graph_task():
            self._noted[l].clear()  # of a gradient that was thrown away
        self._noted_in[l] = graph_task()
        if not any(self._noted):
            self._writes = list(self._bank.writes)
        if all(one is not index for one in self._noted[l]):
            self._noted[l].append(index)

    def _forget_rows(self) -> None:
        for noted in self._noted:
            noted.clear()

    # ---- parameters of tasks -----------------------------------------------------------------------------------------

    def _parameters(self, task: int) -> list[nn.Parameter]:
        """Those of a task, with the state that a new optimizer begins with if it has none."""
        found, writes = self._tasks.get(task), self._bank.writes[task]
        if found is not None and found.writes == writes:
            return found.parameters
        self._forget(task)  # the place has another task now
        parameters = [nn.Parameter(core.detach()[task]) for core in self._bank.cores]
        self._inner.state.update(self._make(parameters).state)  # some have a state from the start, as Adagrad's
        self._tasks[task] = _Task(parameters, writes)
        return parameters

    def _forget(self, task: int) -> None:
        for parameter in self._tasks.pop(task, _Task([], 0)).parameters:
            self._inner.state.pop(parameter, None)

    def _look_for_moves(self) -> None:
        """Finds the views anew where a core has other memory; RuntimeError for another dtype, device or parameter."""
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
        """The state of a task by layer name: that of a torch optimizer's parameter. {} if it was never trained."""
        self._bank.cores_of(task)
        found = self._tasks.get(task)
        if found is None or found.writes != self._bank.writes[task]:
            return {}
        named = zip(self._layers, found.parameters, strict=True)
        return {name: dict(state) for name, parameter in named if (state := self._inner.state.get(parameter))}

    def state_dict(self) -> dict[str, Any]:
        """That of a torch optimizer, and `tasks`: {task: {layer name: state}} of those that were trained."""
        taken = self._bank.taken.tolist()
        tasks = {task: state for task in sorted(self._tasks) if taken[task] and (state := self.state_of(task))}
        return super().state_dict() | {"class": self._class.__name__, "tasks": tasks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Settings and all tasks' states from `state_dict`. Load the bank first.

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
        """`TaskBank.save` with the task's state: `add` reads it, and so does `TaskBank.add`, which leaves the state out.

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
        """Puts a task and its state into the first free place of the bank, which it returns.

        Raises:
            As `TaskBank.add`; ValueError: a file without state, or with that of another class. Nothing is changed then.
        """
        cores, tensors, metadata = self._bank._read(path)
        if metadata.get("optimizer") != self._class.__name__:
            got = metadata.get("optimizer", "a file without state")
            raise ValueError(f"source: expected the state of {self._class.__name__}, got {got}; TaskBank.add takes the cores")
        state: dict[str, dict[str, Any]] = {}
        for key, value in (tensors | json.loads(metadata["values"])).items():
            name, _, what = key.removeprefix(STATE).rpartition("/")
            state.setdefault(name, {})[what] = value
        own = self._loaded(state, "source")
        task = self._bank.add(cores)
        self._take(task, *own)
        return task

    def _loaded(self, state: Mapping[str, Mapping[str, Any]], where: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        """Parameters like a task's, and an optimizer that has their state, on the bank's device."""
        if unknown := sorted(set(state) - set(self._layers)):
            raise ValueError(f"{where}: expected the state of layers of the bank, got that of {unknown[0]}")
        parameters = [nn.Parameter(core.detach()[0]) for core in self._bank.cores]
        for name, core in zip(self._layers, parameters, strict=True):
            for key, value in state.get(name, {}).items():
                shape = tuple(value.shape) if isinstance(value, Tensor) else ()
                # one number, one a row or column, or one an element
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


_ADVICE = "make the optimizer after the model was moved, and load its state_dict"


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# ---- which tasks had rows --------------------------------------------------------------------------------------------


def _tasks_in(indices: Iterable[Tensor]) -> list[int]:
    """The tasks in some indices, in order."""
    found = torch.cat([index.reshape(-1).cpu() for index in indices]).unique().tolist()
    return [task for task in found if task >= 0]


class _Noted(torch.autograd.Function):
    """A core, as it is. Its backward notes that rows of index gave it a gradient."""

    @staticmethod
    def forward(core: Tensor, index: Tensor, l: int, optimizer: TaskOptimizer) -> Tensor:
        return core.detach()  # a view would say, of a write in place, that it is this Function's fault

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.index, ctx.l, ctx.optimizer = inputs

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.optimizer._note(ctx.l, ctx.index)
        return gradient, None, None, None


class _Snapshots:
    """Copies of an index that its owner may write to, one a version."""

    def __init__(self, index: Tensor):
        self.index, self.version, self.copy = index, -2, index

    def now(self) -> Tensor:
        version = -1 if self.index.is_inference() else self.index._version
        if version != self.version or version < 0:
            self.version, self.copy = version, self.index.detach().clone()
        return self.copy


def noted_cores(bank: Bank, index: Tensor) -> list[Tensor | Callable[[Tensor, int], Tensor]]:
    """What a Mixture takes the cores of each layer from: the bank's, by way of a node if an optimizer of the bank lives."""
    optimizer = _of_bank.get(bank, lambda: None)()
    if optimizer is None:
        return list(bank.cores)
    snapshots = _Snapshots(index)
    return [partial(_noted, core, snapshots, l, optimizer) for l, core in enumerate(bank.cores)]


def _noted(core: Tensor, snapshots: _Snapshots, l: int, optimizer: TaskOptimizer, own: Tensor, b: int) -> Tensor:
    if is_compiling() or not torch.is_grad_enabled() or not core.requires_grad:
        return core
    return _Noted.apply(core, snapshots.now(), l, optimizer)
