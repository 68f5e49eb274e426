"""Sharded tensors: DTensors (FSDP2, tensor parallelism) and parameters of DeepSpeed's ZeRO-3.

A process holds only its shard of such a tensor. This file recognizes them, gathers full tensors and
writes full values into them. It imports neither package: a class that was never imported has no
instances.

Not here: models in several processes (sharded.py).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def imported_class(module: str, name: str) -> type | tuple[()]:
    """Returns a class if its module was imported, else (), of which nothing is an instance.

    Importing torch.distributed.tensor or DeepSpeed takes seconds.
    """
    return getattr(sys.modules.get(module), name, ())


def is_dtensor(tensor: object) -> bool:
    """Whether FSDP2 or tensor parallelism shards tensor."""
    return isinstance(tensor, imported_class("torch.distributed.tensor", "DTensor"))


def _is_zero3(tensor: object) -> bool:
    return hasattr(tensor, "ds_id")  # DeepSpeed has no class for it


def is_sharded(tensor: object) -> bool:
    """Whether tensor is a DTensor or a parameter of ZeRO-3."""
    return _is_zero3(tensor) or is_dtensor(tensor)


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards the module's parameters, or FSDP1 wraps it."""
    return isinstance(
        module,
        (
            imported_class("torch.distributed.fsdp", "FSDPModule"),
            imported_class("torch.distributed.fsdp", "FullyShardedDataParallel"),
        ),
    )


def is_in_fsdp1(module: nn.Module) -> bool:
    """Whether FSDP1 wraps the module or one around it. Its parameters are then plain views."""
    return getattr(module, "_is_fsdp_managed_module", False)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of the full tensor. ZeRO-3 leaves an empty tensor between two calls."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _gathered_by_zero3(tensor: Tensor, modifier_rank: int | None = None) -> Any:
    # A context in which the tensor is full. What process modifier_rank writes into it stays.
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=modifier_rank)


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor, which all processes gather together.

    A tensor that is not sharded is returned itself.
    """
    if _is_zero3(tensor):
        with _gathered_by_zero3(tensor):
            # A copy, because DeepSpeed frees the gathered values when the context ends.
            return tensor.detach().clone()
    if is_dtensor(tensor):
        return tensor.full_tensor()
    return tensor


def expect_full(tensor: Tensor) -> Tensor:
    """Returns tensor.

    Raises:
        TypeError: If it is sharded.
    """
    if is_sharded(tensor):
        raise TypeError(
            "model: expected full tensors, got a sharded model. Use the functions of "
            "lotr_ext.sharded, in all processes."
        )
    return tensor


@torch.no_grad()
def copy_full(target: Tensor, value: Tensor) -> None:
    """Copies a full value, which all processes have, into a tensor that may be sharded.

    A ZeRO optimizer has a float32 copy of each half-precision parameter, which is set, too. Its
    next step would otherwise restore the old value.
    """
    if _is_zero3(target):
        # All processes write the same value, of which process 0's is kept.
        with _gathered_by_zero3(target, modifier_rank=0):
            target.data.copy_(value)
    elif is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        full_value = value.to(target.device, target.dtype)
        # No source: each process cuts its shard from the full value, and nothing is sent.
        target.copy_(
            distribute_tensor(full_value, target.device_mesh, target.placements, src_data_rank=None)
        )
    else:
        target.copy_(value)
    # The float32 copy. DeepSpeed finds it by these attributes, in ZeRO-3 and in ZeRO-1 and 2.
    fragments = sys.modules.get("deepspeed.utils.tensor_fragment")
    if hasattr(target, "_z3_optimizer"):
        # Each process sets its shard, so nothing is sent.
        fragments.safe_set_local_fp32_param(target, target.ds_tensor)
    elif hasattr(target, "_hp_mapping"):
        fragments.safe_set_full_fp32_param(target, target)


@contextmanager
def full_tensors_in(module: nn.Module, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces the sharded parameters of a module by full tensors, inside the context.

    For a forward of the module outside of the model's forward, in which FSDP2 or ZeRO-3 would
    gather them.

    Args:
        module: The module.
        gather: Returns the full tensor of a sharded one.
    """
    sharded = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if is_sharded(parameter)
    ]
    gathered = [gather(parameter) for _, _, parameter in sharded]
    try:
        for (owner, name, _), tensor in zip(sharded, gathered):
            owner._parameters[name] = tensor
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter
