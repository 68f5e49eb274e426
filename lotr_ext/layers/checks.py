"""Checks of arguments. Each raises TypeError or ValueError with the argument's name, what was expected and what was given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..autograd.call import compute_dtype
from ..compat import is_compiling
from ..ops.planner import DTYPES

__all__ = [
    "check_beside",
    "check_dimension",
    "check_dtype",
    "check_index",
    "check_number",
    "check_probability",
    "check_rank",
    "check_tensor",
    "check_values",
]

_LARGEST = 2**31 - 1  # of a dimension


def check_dimension(name: str, value: object) -> int:
    """Returns value if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if value > _LARGEST:
        raise ValueError(f"{name}: expected at most {_LARGEST}, got an int of {value.bit_length()} bits")
    return value


def check_rank(rank: object) -> tuple[int, int]:
    """(r_in, r_out) of rank, an int or a pair."""
    pair = rank if isinstance(rank, (tuple, list)) else (rank, rank)
    if len(pair) != 2:
        raise ValueError(f"rank: expected an int or a pair (r_in, r_out), got {rank!r}")
    return check_dimension("rank", pair[0]), check_dimension("rank", pair[1])


def check_dtype(dtype: object, name: str = "dtype") -> None:
    """Raises TypeError unless dtype is None or one in which layers compute."""
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype!r}")


def check_index(name: str, index: object, count: int) -> None:
    """index must be an int64 tensor; on a CPU also with values in [-1, count), where -1 means none."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    if index.device.type != "cpu" or not index.numel() or is_compiling():
        return
    least, most = int(index.min()), int(index.max())
    if least < -1 or most >= count:
        raise ValueError(f"{name}: expected indices in [-1, {count}), got {least} to {most}")


def check_number(name: str, value: object) -> None:
    """value must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int larger than any float
        raise ValueError(f"{name}: expected a finite number, got an int of {value.bit_length()} bits") from None
    if not finite:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_probability(name: str, value: object) -> None:
    """value must be a number in [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def check_tensor(name: str, tensor: object, *shape: int | str) -> None:
    """tensor must be floating and have this shape, in which a string means any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(isinstance(want, int) and want != size for want, size in zip(shape, got)):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {got}")


def check_values(name: str, part: str, tensor: Tensor) -> None:
    """tensor, the part of layer `name` in a file, must have finite values of a dtype in which layers compute."""
    known = not tensor.is_meta and tensor.dtype in DTYPES.values() and tensor.numel()
    if not (known and torch.isfinite(tensor).all()):
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name}: expected finite floating values in {part}, got {got} without")


def check_beside(x: Tensor, base: Mapping[str, Tensor | None], adapter: Mapping[str, Tensor]) -> None:
    """The base's tensors must have x's dtype, unless autocast casts them, and its device. The adapter's may be on another
    device, but must have values if x has."""
    cast = compute_dtype(x) is not None
    for name, tensor in base.items():
        if tensor is not None and tensor.dtype != x.dtype and not cast:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    for name, tensor in base.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    for name, tensor in adapter.items():
        if tensor.is_meta != x.is_meta:
            raise ValueError(f"{name}: expected values as x has on {x.device}, got a tensor on {tensor.device}")
