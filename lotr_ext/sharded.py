"""Models that several processes train: DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO.

Each process adds its layers' gradients of A and of B into one sum, and autograd sees each sum once a backward, so training in
several processes reduces A once and B once a step. Under FSDP2 and ZeRO-3 a process holds only a part of a tensor. `gathered`
gives whole tensors for a file, and `write_parts` distributes whole tensors again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["agreed", "gathered", "in_parts", "shard_factors", "unwrapped", "write_parts", "writes_files"]

T = TypeVar("T")


def _class(module: str, name: str) -> type | tuple[()]:
    """A class of a module that was imported, otherwise (): then no object is of this class, and the import would take a
    second."""
    return getattr(sys.modules.get(module), name, ())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and DeepSpeed's engine."""
    wrappers = nn.parallel.DistributedDataParallel, _class("deepspeed.runtime.engine", "DeepSpeedEngine")
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    return model


def shard_factors(model: nn.Module, **options: Any) -> nn.Module:
    """Shards A and B of an adapted model with FSDP2. Call it before `fully_shard` of the blocks and of the model.

    Each factor is gathered by itself, around the calls that read it, and stays gathered until the backward has ended: that
    takes one gather a factor and step instead of one a layer. options: as for torch's `fully_shard` (mesh, mp_policy, ..).
    """
    from torch.distributed.fsdp import fully_shard

    from .linear import LoTRFactor

    for module in model.modules():
        if isinstance(module, LoTRFactor):
            fully_shard(module, **{"reshard_after_forward": False, **options})
    return model


# ---- whole tensors ---------------------------------------------------------------------------------------------------


def _is_dtensor(tensor: Tensor) -> bool:
    return isinstance(tensor, _class("torch.distributed.tensor", "DTensor"))


def _is_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # ZeRO-3's mark of its parameters


def in_parts(tensors: Iterable[Tensor]) -> bool:
    """Whether a process holds only a part of one of the tensors: a DTensor, or a parameter of ZeRO-3."""
    return any(_is_dtensor(tensor) or _is_zero(tensor) for tensor in tensors)


def _reshard(model: nn.Module) -> None:
    """Frees the tensors that FSDP2 gathered for a forward, so that the parameters are the optimizer's parts again."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, fsdp):
            module.reshard()


@torch.no_grad()
def gathered(model: nn.Module, tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Whole, plain tensors by name. A collective if the model is held in parts: every process must call it.

    tensors: returns the model's tensors by name, after FSDP2 has freed what it gathered for the last forward.
    """
    _reshard(model)
    found = {name: tensor.full_tensor() if _is_dtensor(tensor) else tensor for name, tensor in tensors().items()}
    if zero := {name: tensor for name, tensor in found.items() if _is_zero(tensor)}:
        with _zero_gathered(zero.values()):
            found |= {name: tensor.detach().clone() for name, tensor in zero.items()}
    return found


@torch.no_grad()
def write_parts(model: nn.Module, targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies whole values, which all processes have, into the model's tensors of the same names, or into this process's parts.

    Also into the float32 copies that a ZeRO optimizer keeps of half-precision parameters.
    """
    _reshard(model)
    zero = {name: tensor for name, tensor in targets.items() if _is_zero(tensor)}
    for name, target in targets.items():
        if name in zero:
            continue
        value = values[name].to(target.device, target.dtype)
        if _is_dtensor(target):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)
    if zero:
        with _zero_gathered(zero.values(), modifier_rank=0):
            for name, target in zero.items():
                target.data.copy_(values[name])
    if "deepspeed.utils" in sys.modules:
        _write_zero_masters(targets, values)


def _zero_gathered(tensors: Iterable[Tensor], modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(tensors), modifier_rank=modifier_rank)


def _write_zero_masters(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    for name, target in targets.items():
        if hasattr(target, "_hp_mapping") or _is_zero(target):
            safe_set_full_fp32_param(target, values[name].float().to(target.device))


# ---- processes -------------------------------------------------------------------------------------------------------


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def writes_files(model: nn.Module) -> bool:
    """Whether this process writes the files of a model that several processes hold, whole or in parts: process 0 does."""
    return _processes() == 1 or dist.get_rank() == 0


def agreed(where: str, work: Callable[[], T], together: bool = True) -> T:
    """Runs work() in every process. If it fails in one process it fails in all, so that no process waits for a failed one.

    together: whether the other processes call this, too.

    Raises:
        In the failed process its own exception; in the others RuntimeError with its message and the process's rank.
    """
    if not together or _processes() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except BaseException as caught:  # also KeyboardInterrupt: the other processes wait for an answer
        error = caught
    failures: list[str | None] = [None] * _processes()
    dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RuntimeError(f"{where}: expected all processes to succeed, got an error in process {rank}: {failure}")
    return result
