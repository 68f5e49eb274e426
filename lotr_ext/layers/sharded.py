"""Sharded models, of which each process holds a part: FSDP2 and tensor parallelism (DTensors), FSDP1, DeepSpeed's ZeRO-3.

`whole` gathers whole tensors and writes changed ones back, with the functions of those libraries. It does nothing for a plain
model.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autograd.tensor_parallel import is_dtensor
from .merging import write_

__all__ = [
    *(
        "Slot",
        "StaysWhole",
        "agree_over",
        "agreed",
        "gathered",
        "all_results",
        "holds_parts",
        "in_parts",
        "in_place_of",
        "inside_wrappers",
        "is_tensor_parallel",
        "named_modules",
        "parted_as",
    ),
    *("reshard", "whole", "whole_shape", "writing_rank"),
]

T = TypeVar("T")
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")  # the wrappers' names for the wrapped module


def _class(module: str, name: str) -> type | tuple[()]:
    """A class if its module was imported, otherwise (): then no object has this class, and the import would take a second."""
    return getattr(sys.modules.get(module), name, ())


def _is_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # ZeRO-3's mark of its parameters


def _fsdp1() -> type | tuple[()]:
    return _class("torch.distributed.fsdp", "FullyShardedDataParallel")


def _engine() -> type | tuple[()]:
    return _class("deepspeed.runtime.engine", "DeepSpeedEngine")


def in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over processes: a DTensor, or a parameter of ZeRO-3 or FSDP1."""
    return is_dtensor(tensor) or _is_zero(tensor) or getattr(tensor, "_fsdp_flattened", False)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor. Not for a parameter of FSDP1, which does not store it."""
    return getattr(tensor, "ds_shape", tensor.shape)


def holds_parts(model: nn.Module, *, zero: bool = True) -> bool:
    """Whether any tensor of the model is held in parts. zero: whether ZeRO-3 counts, to which new parameters can be added."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    return any(isinstance(module, fsdp) for module in model.modules()) or any(
        in_parts(t) and (zero or not _is_zero(t)) for t in _tensors(model)
    )


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether all parts of a sharded model are DTensors, and none is of FSDP2, which gathers parameters for a forward."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    if any(isinstance(module, fsdp) for module in model.modules()):
        return False
    return all(is_dtensor(t) for t in _tensors(model) if in_parts(t))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, a shared one several times: parameters() would collect names and a set."""
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None:
                yield t


def reshard(model: nn.Module) -> None:
    """Frees the tensors that FSDP2 gathered for a forward, so that the parameters are the optimizer's parts again."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, fsdp):
            module.reshard()


# ---- wrappers --------------------------------------------------------------------------------------------------------


def inside_wrappers(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, FullyShardedDataParallel, torch.compile and DeepSpeed's engine."""
    wrappers = nn.parallel.DistributedDataParallel, _fsdp1(), _engine()
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As model.named_modules(), by names without the wrappers inside the model (FSDP1's, activation
    checkpointing's, torch.compile's). A wrapper comes before its module, under the same name."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module


def writing_rank(model: nn.Module, together: bool = False) -> bool:
    """Whether this process writes the files of a replicated model. together: whether all processes save it together."""
    if together:
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    if isinstance(model, _engine()):
        return dist.get_rank() == 0
    return not isinstance(model, nn.parallel.DistributedDataParallel) or dist.get_rank(model.process_group) == 0


# ---- whole tensors ---------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """A module's parameter or buffer. full: its name in the model's state_dict."""

    full: str
    module: nn.Module
    name: str

    @property
    def place(self) -> dict[str, Any]:
        return self.module._parameters if self.name in self.module._parameters else self.module._buffers

    @property
    def tensor(self) -> Tensor | None:
        return self.place.get(self.name)


@contextmanager
def whole(
    model: nn.Module, slots: Iterable[Slot], state: Mapping[str, Tensor] | None = None, *, write: bool = False
) -> Iterator[None]:
    """Context in which each of the slots holds a whole, plain tensor, gathered from the parts of all processes.

    model: with its wrapper. A collective, which every process must call, unless state is given. state: whole
    tensors by full name, to be taken instead. write: what the tensors are at the end becomes the model's, in every process,
    which must all have the same; not after an error.

    Raises:
        RuntimeError: a tensor is missing in state; a parameter of FSDP1 without its FullyShardedDataParallel.
    """
    if state is None:
        reshard(model)
    every = [slot for slot in slots if slot.tensor is not None]
    parts = [slot for slot in every if in_parts(slot.tensor)]
    held = {id(slot.tensor): slot.tensor for slot in parts}  # shared tensors once
    values = _gathered(model, parts) if state is None else _from_state(parts, state)
    inside = {
        key: nn.Parameter(value, requires_grad=held[key].requires_grad) if isinstance(held[key], nn.Parameter) else value
        for key, value in values.items()
    }
    before = [(slot.place, slot.name, slot.tensor) for slot in parts]
    for place, name, tensor in before:
        place[name] = inside[id(tensor)]
    try:
        with _without_hooks(model):  # the modules that compute cores run inside, and need no gathering
            yield
    finally:
        for place, name, tensor in before:
            place[name] = tensor
    if write:
        _scattered(model, parts, values)
        _write_masters({id(t): (t, values.get(id(t), t)) for t in (slot.tensor for slot in every)}.values())


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, which all processes of its mesh must call together; any other tensor unchanged."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def parted_as(value: Tensor, like: Tensor) -> Tensor:
    """value, whole in all processes, distributed as like, if that is a DTensor. Nothing is sent."""
    if not is_dtensor(like) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Context without the modules' hooks: those of sharded training would look for its own parameters."""
    before = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    for module, _, _ in before:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, pre_hooks, hooks in before:
            module._forward_pre_hooks, module._forward_hooks = pre_hooks, hooks


def _from_state(slots: Sequence[Slot], state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    if missing := [slot.full for slot in slots if slot.full not in state]:
        raise RuntimeError(
            f"save_pretrained: expected {missing[0]} whole in state_dict, got a model held in parts and a state_dict without; "
            "call save_adapter in every process"
        )
    return {id(slot.tensor): state[slot.full].detach() for slot in slots}


@torch.no_grad()
def _gathered(model: nn.Module, slots: Sequence[Slot]) -> dict[int, Tensor]:
    """The whole tensors of slots that hold parts, by the parts' id."""
    found = {id(slot.tensor): gathered(slot.tensor) for slot in slots if is_dtensor(slot.tensor)}
    if zero := [slot.tensor for slot in slots if _is_zero(slot.tensor)]:
        with _zero_gathered(zero):
            found |= {id(t): t.detach().clone() for t in zero}
    keys = {slot: id(slot.tensor) for slot in slots}
    for own in _summoned(model, slots, writeback=False):
        found |= {keys[slot]: slot.tensor.detach().clone() for slot in own}
    return found


@torch.no_grad()
def _scattered(model: nn.Module, slots: Sequence[Slot], values: Mapping[int, Tensor]) -> None:
    """Writes each slot's part of the whole value, by the part's id."""
    for slot in slots:
        if is_dtensor(target := slot.tensor):
            write_(target, parted_as(values[id(target)], target))
    if zero := {id(slot.tensor): slot.tensor for slot in slots if _is_zero(slot.tensor)}:
        with _zero_gathered(list(zero.values()), modifier_rank=0):
            for key, target in zero.items():
                target.data.copy_(values[key])
    keys = {slot: id(slot.tensor) for slot in slots}
    for own in _summoned(model, slots, writeback=True):
        for slot in own:
            slot.tensor.copy_(values[keys[slot]])


def _zero_gathered(parameters: Sequence[Tensor], **settings: Any) -> Any:
    import deepspeed  # already imported: it created the parts

    return deepspeed.zero.GatheredParameters(parameters, **settings)


def _write_masters(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes new values into the float32 copies of DeepSpeed's optimizers, because the next step would restore the old
    values. A copy that rounds to the new value is kept. pairs: (parameter, new value)."""
    if (fragments := sys.modules.get("deepspeed.utils.tensor_fragment")) is None:
        return
    for parameter, value in pairs:
        if hasattr(parameter, "_z3_optimizer") and parameter.requires_grad:  # this process's part: nothing is sent
            get, put, value = fragments.safe_get_local_fp32_param, fragments.safe_set_local_fp32_param, parameter.ds_tensor
        elif hasattr(parameter, "_hp_mapping"):
            get, put = fragments.safe_get_full_fp32_param, fragments.safe_set_full_fp32_param
        else:
            continue
        value, master = value.detach(), get(parameter)
        if master is not None and not torch.equal(master.to(value.dtype).flatten(), value.flatten()):
            put(parameter, value.float().view_as(master))


def _summoned(model: nn.Module, slots: Sequence[Slot], *, writeback: bool) -> Iterator[list[Slot]]:
    """Yields the slots of each FSDP1 unit while its parameters are whole: one unit at a time, to save memory."""
    wanted = [slot for slot in slots if getattr(slot.tensor, "_fsdp_flattened", False)]
    if not wanted:
        return
    fsdp, unit_of = _fsdp1(), {}
    units = fsdp.fsdp_modules(model)
    for unit in units:  # outer units first
        unit_of |= dict.fromkeys(unit.modules(), unit)
    for slot in wanted:
        if slot.module not in unit_of:
            raise RuntimeError(
                f"model: expected what FullyShardedDataParallel returned, got {type(model).__name__}, which is inside of it; "
                f"{slot.full} is a part here"
            )
    for unit in units:
        own = [slot for slot in wanted if unit_of[slot.module] is unit]
        if own or unit._is_root is None:  # before its first use; otherwise an inner unit would become the root
            with fsdp.summon_full_params(unit, recurse=False, writeback=writeback):
                yield own


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


class StaysWhole(nn.Module):
    """Base class of modules whose own parameters stay plain tensors, the same in all processes, when `parallelize_module` would
    distribute them: they get rank 0's values."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if is_dtensor(param):
            param = in_place_of(self._parameters.get(name), param, param.detach().full_tensor())
        super().register_parameter(name, param)


def in_place_of(before: nn.Parameter | None, given: nn.Parameter, value: Tensor) -> nn.Parameter:
    """value as a parameter with the requires_grad of the previous or given one: RowwiseParallel would train what was
    frozen."""
    return nn.Parameter(value, requires_grad=(given if before is None else before).requires_grad)


@torch.no_grad()
def agree_over(weight: Tensor, tensors: Iterable[Tensor]) -> None:
    """Broadcasts tensors from the first process of weight's mesh, if it is a DTensor; each tensor once per mesh."""
    for t in tensors if is_dtensor(weight) else ():
        mesh = weight.device_mesh
        if getattr(t, "_lotr_mesh", None) == mesh or t.is_meta or is_dtensor(t):
            continue
        for axis in range(mesh.ndim):
            dist.broadcast(t.detach(), group=mesh.get_group(axis), group_src=0)
        t._lotr_mesh = mesh


# ---- processes -------------------------------------------------------------------------------------------------------


def agreed(where: str, work: Callable[[], T], *, together: bool = True) -> T:
    """Runs work() in every process. If it fails in one process it fails in all, so that no process waits for a failed one.

    together: whether the other processes call this too.

    Raises:
        In the failed process its own exception; in the others RuntimeError, with its message and the process's rank.
    """
    found: list[T] = []
    if together:
        all_results(where, lambda: found.append(work()))
    return found[0] if together else work()


def all_results(where: str, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The results of work() in each process of a group (None: all processes). If it fails in one it fails in all.

    Raises:
        As `agreed`; RuntimeError also if a process does not call this: after the group's timeout, or at once if it has ended.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [work()]
    result: T | None = None
    error: BaseException | None = None
    try:
        result = work()
    except BaseException as caught:  # also KeyboardInterrupt: the other processes wait for an answer
        error = caught
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, (result, None if error is None else f"{type(error).__name__}: {error}"), group)
    except RuntimeError as lost:
        raise RuntimeError(
            f"{where}: expected all processes to call it together, got no answer from another ({lost})"
        ) from lost
    if error is not None:
        raise error
    for rank, (_, failure) in zip(dist.get_process_group_ranks(group), found):
        if failure is not None:
            raise RuntimeError(f"{where}: expected all processes to succeed, got an error in process {rank}: {failure}")
    return [result for result, _ in found]
