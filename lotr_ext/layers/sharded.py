"""Models that torch.distributed holds in parts (FSDP2, tensor parallelism): whole tensors out of parts, and parts out of
whole tensors. torch.distributed does the work; a plain model passes through untouched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .merging import write_

__all__ = ["copy_whole_", "gathered", "holds_parts", "in_parts", "reshard", "writing_rank", "written_by_rank_0"]


def _class(module: str, name: str) -> type | tuple[()]:
    """A class of torch.distributed, if its module was imported: before that nothing can be one, and it takes a second."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, ())


def in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: this process holds a part of it, or a replica that others know of."""
    return isinstance(tensor, _class("tensor", "DTensor"))


def holds_parts(model: nn.Module) -> bool:
    """Whether any tensor of the model is held in parts, by FSDP2 or as a DTensor."""
    fsdp = _class("fsdp", "FSDPModule")
    return any(isinstance(module, fsdp) for module in model.modules()) or any(
        in_parts(t) for t in (*model.parameters(), *model.buffers())
    )


def reshard(model: nn.Module) -> None:
    """Puts away what FSDP2 has gathered for a forward, so that parameters are the parts that their optimizer knows."""
    fsdp = _class("fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, fsdp):
            module.reshard()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on the CPU where they came in parts. A collective: every process must call it."""
    with torch.no_grad():
        return {name: t.full_tensor().cpu() if in_parts(t) else t for name, t in tensors.items()}


@torch.no_grad()
def copy_whole_(target: Tensor, value: Tensor) -> None:
    """target <- value, whole, which every process has: each keeps its own part of it, and nothing is sent."""
    if in_parts(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    write_(target, value)


def writing_rank(model: nn.Module) -> bool:
    """Whether this process is the one that writes for a DistributedDataParallel model: its replicas are all alike."""
    model = getattr(model, "_orig_mod", model)  # a compiled one
    return not isinstance(model, nn.parallel.DistributedDataParallel) or dist.get_rank(model.process_group) == 0


def written_by_rank_0(write: Callable[[], None]) -> None:
    """Calls write in process 0 and waits for it in all: every process must call this, and each learns of a failure.

    Raises:
        In process 0 what write raised, whatever it is; RuntimeError in the others, with its message.
    """
    failed: list[str | None] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as caught:  # of any kind: the others are waiting
            error, failed[0] = caught, f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0] is not None:
        raise RuntimeError(f"save_adapter: expected process 0 to write the files, got {failed[0]}")
