"""Many tasks over one model: TaskBank holds the cores of all tasks in one parameter a layer, use_tasks chooses by row or token.

    y_i = x_i W^T + bias + s ((x_i A) G_task(i)) B^T

A task is r_in r_out numbers a layer over factors that all tasks share. A task's file contains only these numbers, and a
checksum of the factors.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapted import adapted_layers, attach, expect_unmerged
from .core._torch_private import current_backward
from .core.request import current_request, open_request, state_of
from .factors import LoTRFactor
from .functional import check_dimension, check_index
from .layers import LoTRLayer
from .storage import checked_path, checksum, expect_names, put_tensors, tensors_in
from .targets import group_of
from .transformers_experts import CHILD

__all__ = ["TaskBank", "use_tasks"]

Model = TypeVar("Model", bound=nn.Module)
Source = Mapping[str, Tensor] | str | PathLike[str]
FORMAT = {"format": "lotr_task", "version": "1"}
_changes = (
    threading.RLock()
)  # one lock for all banks: a bank with a lock of its own could not be copied or pickled
_CACHES = ("past_key_values", "cache", "cache_params", "past_key_value", "layer_past", "mems")


class TaskBank(nn.Module):
    """Slots for `tasks` tasks over the factors of an adapted model; registered as `model.lotr_tasks`.

    cores: for each adapted layer, in the model's order, a parameter [tasks, r_in, r_out] (experts: [tasks, e, r_in, r_out]) of
    the dtype and on the device of its core, frozen until `requires_grad_()` is called. taken [tasks] (bool): which slots hold
    a task; a free slot is zero. `use_tasks(model, index)` runs batches whose row i is of task index[i].

    Tasks may be added and removed in any thread between two forwards without a graph. A backward whose forward came before such
    a change raises, as after any in-place write. `del model.lotr_tasks` removes the bank.
    Raises TypeError: tasks is no int. ValueError: fewer than one, or an adapter of init "svd". RuntimeError: no adapter, or a
    bank that exists already.
    """

    def __init__(self, model: nn.Module, tasks: int):
        super().__init__()
        self._hooks: list[RemovableHandle] = []
        layers = adapted_layers(model)
        if hasattr(model, "lotr_tasks"):
            raise RuntimeError(
                "TaskBank: expected a model without a bank, got one with a bank; del model.lotr_tasks first"
            )
        check_dimension("tasks", tasks)
        for name, layer in layers.items():
            if layer.start_core is not None:
                raise ValueError(
                    f'TaskBank: expected an adapter with another init than "svd", which moves a part of the base weights into '
                    f"the adapter, so that rows without a task would not be the base model's, got {name!r} with it"
                )
        with torch.no_grad():
            cores = [
                torch.zeros_like(layer.core.detach()).expand(tasks, *layer.core.shape).clone()
                for layer in layers.values()
            ]
        self.cores = nn.ParameterList(nn.Parameter(core, requires_grad=False) for core in cores)
        self.register_buffer("taken", torch.zeros(tasks, dtype=torch.bool, device="cpu"))
        self._layers, self._factors = (
            tuple(layers),
            _in_order(model, layers),
        )  # the model registers the factors
        self._scalings = tuple(float(layer.scaling) for layer in layers.values())
        attach(model, "lotr_tasks", self)
        called = {
            id(m): m for m in (layer.called_module() for layer in layers.values())
        }  # a host calls its experts
        self._hooks += [
            module.register_forward_pre_hook(_refuse_without_request) for module in called.values()
        ]
        if not isinstance(model, LoTRLayer):
            self._hooks.append(model.register_forward_pre_hook(_note_columns, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(_forget_columns, always_call=True))

    def forward(self, x: Tensor) -> Tensor:
        """Returns its input, because nn.Sequential calls all its children."""
        return x

    def __len__(self) -> int:
        return int(self.taken.sum())

    def __del__(self) -> None:
        self.remove_hooks()

    # ---- tasks, one by one -------------------------------------------------------------------------------------------

    def add(self, source: Source | None = None) -> int:
        """Adds a task in the first free slot. Returns the slot.

        source: its cores [r_in, r_out] (experts: [e, r_in, r_out]) by `<layer>.core`, a file that `save` wrote, or None for a
        task with zero cores, equal to the base model.
        Raises RuntimeError: no slot is free. TypeError, ValueError: no task's file; other layers, shapes, factors or scalings,
        or no floating dtype. Nothing is changed then.
        """
        values = self._values(source)
        with _changes:
            free = (~self.taken).nonzero()
            if not len(free):
                raise RuntimeError(
                    f"add: expected a free slot, got {len(self.taken)} that are all taken"
                )
            slot = int(free[0])
            self._write(slot, values, taken=True)
        return slot

    def replace(self, task: int, source: Source | None) -> None:
        """Replaces a task by another one. source and errors as in `add`."""
        values = self._values(source)
        with _changes:
            self._write(self._slot(task), values, taken=True)

    def remove(self, task: int) -> None:
        """Removes a task: its slot becomes zero and free. Raises TypeError or ValueError if there is no such task."""
        with _changes:
            self._write(self._slot(task), self._values(None), taken=False)

    def cores_of(self, task: int) -> dict[str, Tensor]:
        """The cores of a task by `<layer>.core`, as views of the bank. Raises TypeError or ValueError: no such task."""
        slot = self._slot(task)
        return {f"{name}.core": core.detach()[slot] for name, core in zip(self._layers, self.cores)}

    def save(self, task: int, path: str | PathLike[str]) -> None:
        """Writes a task into a safetensors file, whole or not at all: `<layer>.core` for each layer.

        Raises TypeError or ValueError: no path, no such task; OSError: the disk.
        """
        target = checked_path(path, "path")
        with _changes:
            put_tensors(target.parent, target.name, self.cores_of(task), self._metadata())

    # ---- details -----------------------------------------------------------------------------------------------------

    def remove_hooks(self) -> None:
        """Removes the bank's hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _slot(self, task: object) -> int:
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"task: expected an int, got {type(task).__name__} {task!r}")
        if not 0 <= task < len(self.taken) or not self.taken[task]:
            raise ValueError(f"task: expected a task of the bank, as add returned it, got {task}")
        return task

    @torch.no_grad()
    def _write(self, slot: int, values: Sequence[Tensor], *, taken: bool) -> None:
        """Writes a task into a slot, whose gradient becomes zero."""
        self.taken[slot] = taken
        for core, value in zip(self.cores, values, strict=True):
            core[slot].copy_(value)
            if (
                core.grad is not None
            ):  # of the slot's last task; it would move this one, and count in a norm for clipping
                core.grad[slot].zero_()

    def _values(self, source: Source | None) -> list[Tensor]:
        """The cores of a task, checked."""
        if source is None:
            return [torch.zeros_like(core.detach()[0]) for core in self.cores]
        tensors = source if isinstance(source, Mapping) else self._read(source)
        names = [f"{name}.core" for name in self._layers]
        expect_names("source", names, tensors)
        for name, core in zip(names, self.cores):
            value = tensors[name]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: expected a floating tensor, got {got}")
            if value.layout is not torch.strided:
                raise TypeError(
                    f"{name}: expected a dense tensor, got layout {value.layout}. "
                    f"Pass its to_dense()."
                )
            if value.is_meta and not core.is_meta:
                raise ValueError(
                    f"{name}: expected values as the bank has on {core.device}, got a tensor on "
                    f"the meta device. Load its values first."
                )
            if value.shape != core.shape[1:]:
                raise ValueError(
                    f"{name}: expected shape {tuple(core.shape[1:])}, got {tuple(value.shape)}"
                )
        return [tensors[name].detach() for name in names]

    def _read(self, source: object) -> dict[str, Tensor]:
        """The cores of a file."""
        path = checked_path(source, "source")
        tensors, metadata = tensors_in(path, "source")
        for key, want in self._metadata().items():
            if (got := metadata.get(key)) != want:
                raise ValueError(
                    f"source: expected {key} {want:.200} as the model has, got {got!s:.200} in {path}"
                )
        return tensors

    def _metadata(self) -> dict[str, str]:
        factors = [(part, factor.value) for part, factor in self._factors]
        return task_metadata(factors, self._scalings)


def task_metadata(
    factors: Iterable[tuple[str, Tensor]], scalings: Sequence[float]
) -> dict[str, str]:
    """The metadata of a task's file.

    Args:
        factors: ("A" or "B", its value), in the order of the groups' names.
        scalings: of each layer. The file has one number if they are equal, else a list.
    """
    scaling = repr(scalings[0]) if len(set(scalings)) == 1 else json.dumps(list(scalings))
    return FORMAT | {"scaling": scaling, "factors": checksum(factors)}


def _in_order(
    model: nn.Module, layers: Mapping[str, LoTRLayer]
) -> tuple[tuple[str, LoTRFactor], ...]:
    """("A" or "B", factor) of a model, each once, in the order of the groups' names: the same after a reload."""
    group_by, found = getattr(getattr(model, "lotr_config", None), "group_by", "shape"), {}
    for name, layer in layers.items():
        for part, factor in (("A", layer.factors.A), ("B", layer.factors.B)):
            group = group_of(name, layer, (layer.in_features, layer.out_features), group_by)
            key = (f"{part}_{factor.features}", part) if group_by == "width" else (group, part)
            found.setdefault(id(factor), (key, part, factor))
    return tuple(
        (part, factor) for _, part, factor in sorted(found.values(), key=lambda one: one[0])
    )


# ---- a request -------------------------------------------------------------------------------------------------------


@contextmanager
def use_tasks(model: Model, index: Tensor, *, flat: bool = False) -> Iterator[Model]:
    """Inside the context, row i of a batch uses the task index[i] of the model's `TaskBank`; -1: the base model.

    One forward computes the whole batch: x A and the product with B are one product each, and only the core is chosen per row,
    so the time does not depend on the number of tasks. The cores get gradients if the bank requires them. Do not change the
    index inside the context.

    index: int64, [b], or [b, t] with a task per token. Then all adapted layers must get as many tokens as the model, [b, t, k];
    with a key-value cache (`generate`), columns count from the row's first token in the cache, and tokens after the last column
    use the last column. flat: whether a layer may get the tokens of all rows in one list [m, k], row after row and equally many
    of each, as in transformers' OPT; also so in a model with adapted experts. Experts choose a core by row and expert.

    The context is in force for the thread that opened it, and for the backwards that it starts. Under activation checkpointing
    call backward inside it; outside, it raises.
    Raises TypeError, ValueError: no index of tasks, or a free slot. RuntimeError: no adapter, no bank, or a merged model. In a
    layer, ValueError: an input whose rows or tokens are not the index's.
    """
    bank = getattr(model, "lotr_tasks", None)
    layers = adapted_layers(model)
    if not isinstance(bank, TaskBank):
        raise RuntimeError(
            "use_tasks: expected a model with a TaskBank, got one without. Create TaskBank(model, tasks) first."
        )
    expect_unmerged(layers, "use_tasks")
    _check_index(model, bank, index)
    request = _Request(index, flat or any(layer.num_experts for layer in layers.values()))
    states = {
        layer: _LayerTasks(cores, request)
        for layer, cores in zip(layers.values(), bank.cores, strict=True)
    }
    with open_request(states if isinstance(model, LoTRLayer) else {model: request, **states}):
        yield model


def _check_index(model: nn.Module, bank: TaskBank, index: object) -> None:
    check_index("index", index, len(bank.taken))
    if index.dim() not in (1, 2) or 0 in index.shape[1:]:
        raise ValueError(
            f"index: expected shape [b], a task per row, or [b, tokens], one per token, got shape {tuple(index.shape)}"
        )
    if index.dim() == 2 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"index: expected shape [b] for a model with an encoder and a decoder, whose tokens differ, got "
            f"{tuple(index.shape)}"
        )
    if index.device.type == "cpu" and bank.taken.device.type == "cpu":
        own = index[index >= 0]
        if not bool(bank.taken[own].all()):
            raise ValueError(
                f"index: expected tasks of the bank, got {int(own[~bank.taken[own]][0])}, a free slot"
            )


class _LayerTasks(NamedTuple):
    """The state of a layer in an open `use_tasks`, a `TaskState`."""

    cores: Tensor
    request: _Request

    def index_of(self, x: Tensor) -> Tensor:
        return self.request.index_of(x)


class _Request:
    """What an open `use_tasks` tells the layers: the index of each input. columns: (tokens in the cache, tokens given) of the
    running forward, if it has a cache; cached: whether a forward in this context had one."""

    def __init__(self, index: Tensor, flat: bool):
        self.index, self.flat = index, flat
        self.on_device = {index.device: index}
        self.columns: tuple[int, int] | None = None
        self.cached = False

    def index_of(self, x: Tensor) -> Tensor:
        """The index of x: [b] of x [b, .., k], [b, tokens] of x [b, tokens, .., k], or [m] of a flat x [m, k]."""
        index = self.on_device.get(x.device)
        if index is None:  # copied once to each device
            index = self.on_device[x.device] = self.index.to(x.device)
        b = len(index)
        if self.flat and x.dim() == 2:
            each, rest = divmod(len(x), max(b, 1))
            if rest:
                raise ValueError(
                    f"x: expected the tokens of a batch of {b} rows of equal length, got {len(x)}"
                )
            return (
                index.repeat_interleave(each)
                if index.dim() == 1
                else self._of_columns(index, each).reshape(-1)
            )
        if x.dim() <= index.dim() or x.shape[0] != b:
            raise ValueError(
                f"x: expected a batch of {b} rows, one for each of the index {list(index.shape)} of tasks, got shape "
                f"{list(x.shape)}. If these are the tokens of all rows, row after row, pass use_tasks(.., flat=True)."
            )
        return index if index.dim() == 1 else self._of_columns(index, x.shape[1])

    def _of_columns(self, index: Tensor, count: int) -> Tensor:
        """The columns of an index [b, t] for the `count` tokens of each row of a layer's input."""
        if (
            self.columns is None and self.cached and current_backward() >= 0
        ):  # a checkpoint's recomputation
            raise RuntimeError(
                "use_tasks: expected no cache of keys and values in a context whose forward is recomputed, got one. Pass an "
                "index of one task per row, or open one context for the forward with a cache and another for the other."
            )
        t = index.shape[1]
        past, own = self.columns or (0, t)
        if count != own:
            raise ValueError(
                f"x: expected {own} tokens per row, as in the index of tasks or the call of the model, got {count}. Pass an "
                f"index [b] of one task per row. Steps after the index need a cache that the model's own forward gets."
            )
        return (
            index
            if self.columns is None
            else index[:, (torch.arange(own, device=index.device) + past).clamp(max=t - 1)]
        )


def _note_columns(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook before the model's forward: notes how many tokens are in the cache, for an index with a task per token."""
    request = state_of(model)
    if isinstance(request, _Request) and request.index.dim() == 2:
        request.columns = _cached(model, args, kwargs)
        request.cached = request.cached or request.columns is not None


def _forget_columns(model: nn.Module, args: tuple, output: object) -> None:
    request = state_of(model)
    if isinstance(request, _Request):
        request.columns = None


def _cached(model: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int] | None:
    """(tokens per row in the cache, tokens per row given) of a call of the model; None without a cache."""
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = {**bound, **bound.get("kwargs", {})}
    caches = [
        v
        for name, v in given.items()
        if v is not None and (name in _CACHES or hasattr(v, "get_seq_length"))
    ]
    if not caches:
        return None
    tokens = (
        given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    )
    layers = getattr(caches[0], "layers", None)
    held = [
        int(layer.get_seq_length()) for layer in layers or () if hasattr(layer, "get_seq_length")
    ]
    if len(caches) > 1 or tokens is None or layers is None or (layers and not held):
        raise ValueError(
            f"index: expected shape [b] for a call with {len(caches)} {type(caches[0]).__name__}, which does not say how many "
            f"tokens it holds, got an index per token. Pass one transformers Cache beside input_ids or inputs_embeds."
        )
    return max(held, default=0), tokens.shape[
        1
    ]  # the largest: a layer with a state instead of keys and values holds none


def _refuse_without_request(layer: nn.Module, args: tuple) -> None:
    """A hook on layers of a model with a bank: refuses a checkpoint's recomputation that no request reaches. It would compute
    without tasks."""
    if torch.compiler.is_compiling() or current_backward() < 0:
        return
    if (
        current_request()
        .keys()
        .isdisjoint((layer, *getattr(layer, CHILD, nn.ModuleDict()).values()))
    ):
        raise RuntimeError(
            "use_tasks: expected backward inside of the context, because a checkpoint recomputes a layer with its tasks, got "
            "one outside. To train the model's own adapter under checkpointing, remove the bank first (del model.lotr_tasks)."
        )
