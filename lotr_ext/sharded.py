"""Models that several processes train: DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO.

Training needs nothing special: in each process the layers add their gradients of A into one sum and
those of B into another, so the processes reduce A once and B once per step. Under FSDP2 and ZeRO-3
a process holds only a shard of each tensor. `save_adapter` here gathers full tensors for the file,
and `load_adapter` writes the shards.

Not here: how a sharded tensor is recognized and gathered (sharded_tensors.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from . import loading, saving
from .adapted import Model
from .adapter_state import AdapterState
from .factors import LoTRFactor
from .loading import Strictness
from .sharded_tensors import full_tensor, imported_class
from .storage import FilePath

__all__ = ["full_tensor", "load_adapter", "save_adapter", "shard_factors"]

T = TypeVar("T")


def shard_factors(model: Model, **options: Any) -> Model:
    """Shards A and B of an adapted model with FSDP2.

    Call it before `fully_shard` of the blocks and of the model. Each factor is gathered separately,
    around the calls that read it, and stays gathered until the backward has ended: one gather per
    factor and step instead of one per layer.

    Args:
        model: The adapted model.
        options: As for torch's `fully_shard` (mesh, mp_policy, ..).

    Returns:
        The same model.
    """
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, LoTRFactor):
            # Kept after the first read, because the next layer reads the same factor.
            fully_shard(module, **{"reshard_after_forward": False, **options})
    return model


def save_adapter(model: nn.Module, directory: FilePath) -> None:
    """Writes the adapter of a model that several processes train, sharded or not.

    All processes must call it. They gather the tensors, process 0 writes, and all wait for it.

    Args:
        model: With its wrapper: DistributedDataParallel, DeepSpeed's engine, FSDP2's model.
        directory: See `lotr_ext.save_adapter`, also for errors and warnings.

    Raises:
        RuntimeError: In the other processes if process 0 cannot write.
    """
    inner, _ = saving.unwrap(model)
    path = Path(directory)
    _reshard(inner)
    state = saving.adapter_of(inner, full_tensor)
    saving.warn_of_unsaved(inner)

    # All have the full tensors now. Several writers would replace each other's file.
    def write() -> None:
        if not _has_processes() or dist.get_rank() == 0:
            state.write(path)

    _in_agreement("save_adapter", write)


def load_adapter(
    model: Model,
    directory: FilePath,
    *,
    cast: bool = False,
    strict: Strictness = "targets",
) -> Model:
    """Loads an adapter into a model that several processes train, sharded or not.

    All processes must call it, and each of them reads the directory. The float32 copies that a ZeRO
    optimizer has of half-precision parameters are set, too.

    Args:
        model: With its wrapper. A sharded model must be adapted already, because its parameters are
            sharded after `apply_lotr`.
        directory: See `lotr_ext.load_adapter`, also for cast, strict, errors and warnings.

    Returns:
        The same model.

    Raises:
        RuntimeError: In all other processes if one of them cannot read the directory.
    """
    inner, _ = saving.unwrap(model)
    state = _in_agreement(
        "load_adapter", lambda: AdapterState.read(loading.local_folder(directory))
    )
    _reshard(inner)
    loading.load_state(inner, state, cast=cast, strict=strict, gather=full_tensor)
    return model


def _reshard(model: nn.Module) -> None:
    """Frees the full tensors that FSDP2 gathered for a forward.

    The parameters are then the shards, which the optimizer updates. A value that is loaded into a
    gathered tensor would be lost when FSDP2 frees it.
    """
    fsdp = imported_class("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, fsdp):
            module.reshard()


# ---- processes -----------------------------------------------------------------------------------


def _has_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def _in_agreement(caller: str, work: Callable[[], T]) -> T:
    """Runs work() in every process. If one process fails, all fail, so none waits for a failed one.

    Raises:
        RuntimeError: If another process fails.
    """
    if not _has_processes():
        return work()
    result = None
    error = None
    # A process that raises leaves the others waiting in the next collective operation.
    try:
        result = work()
    # Also KeyboardInterrupt, because the others wait for an answer.
    except BaseException as caught:
        error = caught
    failures: list[str | None] = [None] * dist.get_world_size()
    # As text, because an error of another package may not be importable in the other processes.
    dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RuntimeError(
                f"{caller}: expected all processes to succeed, got an error in process {rank}: "
                f"{failure}"
            )
    return result
