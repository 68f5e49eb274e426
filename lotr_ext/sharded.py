"""Models that several processes train: DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO.

Each process adds its layers' gradients of A and of B into one sum, and autograd sees each sum once a backward, so training in
several processes reduces A once and B once a step. Under FSDP2 and ZeRO-3 a process holds only a part of a tensor:
`save_adapter` and `load_adapter` here gather whole tensors for the file and distribute them again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import files
from .factors import LoTRFactor

__all__ = ["load_adapter", "save_adapter", "shard_factors"]

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)


def shard_factors(model: Model, **options: Any) -> Model:
    """Shards A and B of an adapted model with FSDP2. Call it before `fully_shard` of the blocks and of the model.

    Each factor is gathered by itself, around the calls that read it, and stays gathered until the backward has ended: one
    gather a factor and step instead of one a layer. options: as for torch's `fully_shard` (mesh, mp_policy, ..).
    """
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, LoTRFactor):
            fully_shard(module, **{"reshard_after_forward": False, **options})
    return model


def save_adapter(model: nn.Module, directory: str | PathLike[str]) -> None:
    """`lotr_ext.save_adapter` of a model that several processes hold, whole or in parts. All processes must call it.

    They gather the tensors, process 0 writes, and all wait for it. model: with its wrapper (DistributedDataParallel,
    DeepSpeed's engine, FSDP2's model).

    Raises as `lotr_ext.save_adapter`; RuntimeError in all other processes if one of them fails.
    """
    inner, path = unwrapped(model), files.checked_path(directory, "directory")
    _reshard(inner)
    document, tensors = files.contents(inner, whole)

    def write() -> None:
        if _processes() == 1 or dist.get_rank() == 0:
            files.write(path, document, tensors)

    files.warn_of_unsaved(inner)
    _agreed("save_adapter", write)


def load_adapter(model: Model, directory: str | PathLike[str], *, cast: bool = False) -> Model:
    """`lotr_ext.load_adapter` into a model that several processes hold, whole or in parts. All processes must call it.

    A model in parts must be adapted already, because its parameters are sharded after `apply_lotr`. Each process reads the
    directory. A ZeRO optimizer's float32 copies of half-precision parameters are set, too.

    Raises as `lotr_ext.load_adapter`; RuntimeError in all other processes if one of them fails.
    """
    inner, path = unwrapped(model), files.checked_path(directory, "directory")
    document, tensors = _agreed("load_adapter", lambda: files.read(path))
    _reshard(inner)
    files.load_into(inner, document, tensors, cast=cast, write_=_write)
    return model


# ---- tensors in parts ------------------------------------------------------------------------------------------------


def _class(module: str, name: str) -> type | tuple[()]:
    """A class of a module that was imported, otherwise (): then no object is of this class, and the import would take a
    second."""
    return getattr(sys.modules.get(module), name, ())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and DeepSpeed's engine."""
    return files.unwrapped(model, _class("deepspeed.runtime.engine", "DeepSpeedEngine"))[0]


def _reshard(model: nn.Module) -> None:
    """Frees the tensors that FSDP2 gathered for a forward, so that the parameters are the optimizer's parts again."""
    fsdp = _class("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, fsdp):
            module.reshard()


def _zero_gathered(tensor: Tensor, modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=modifier_rank)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor or of a parameter of ZeRO-3, which all processes gather together; any other tensor as it is."""
    if hasattr(tensor, "ds_id"):  # ZeRO-3's mark
        with _zero_gathered(tensor):
            return tensor.detach().clone()
    return (
        tensor.full_tensor()
        if isinstance(tensor, _class("torch.distributed.tensor", "DTensor"))
        else tensor
    )


@torch.no_grad()
def _write(target: Tensor, value: Tensor) -> None:
    """Writes a whole value, which all processes have, into a tensor, or into this process's part of it."""
    if hasattr(target, "ds_id"):
        with _zero_gathered(target, modifier_rank=0):
            target.data.copy_(value)
    elif isinstance(target, _class("torch.distributed.tensor", "DTensor")):
        from torch.distributed.tensor import distribute_tensor

        given = value.to(target.device, target.dtype)
        target.copy_(
            distribute_tensor(given, target.device_mesh, target.placements, src_data_rank=None)
        )
    else:
        target.copy_(value)
    _write_master(target)


def _write_master(parameter: Tensor) -> None:
    """Writes a parameter's new value into the float32 copy of a ZeRO optimizer, whose next step would restore the old one."""
    if (fragments := sys.modules.get("deepspeed.utils.tensor_fragment")) is None:
        return
    if (
        hasattr(parameter, "_z3_optimizer") and parameter.requires_grad
    ):  # this process's part: nothing is sent
        get, put, value = (
            fragments.safe_get_local_fp32_param,
            fragments.safe_set_local_fp32_param,
            parameter.ds_tensor,
        )
    elif hasattr(parameter, "_hp_mapping"):
        get, put, value = (
            fragments.safe_get_full_fp32_param,
            fragments.safe_set_full_fp32_param,
            parameter,
        )
    else:
        return
    if (master := get(parameter)) is not None:
        put(parameter, value.detach().float().view_as(master))


# ---- processes -------------------------------------------------------------------------------------------------------


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _agreed(where: str, work: Callable[[], T]) -> T:
    """Runs work() in every process. If it fails in one process it fails in all, so that no process waits for a failed one."""
    if _processes() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except (
        BaseException
    ) as caught:  # also KeyboardInterrupt: the other processes wait for an answer
        error = caught
    failures: list[str | None] = [None] * _processes()
    dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RuntimeError(
                f"{where}: expected all processes to succeed, got an error in process {rank}: {failure}"
            )
    return result
