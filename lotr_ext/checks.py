"""Checks of arguments. Each raises TypeError or ValueError: `<argument>: expected .., got ..`.

Not here: checks that need a model (targets.py) or a layer (layers.py).
"""

import sys
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .core.operators import DTYPES


def check_floating(name: str, tensor: object) -> None:
    """Checks that tensor is a tensor of a floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(tensor).__name__}. Convert it, for "
            f"example with torch.from_numpy."
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def check_input(x: object, in_features: int) -> None:
    """Checks that x is a floating tensor [.., in_features]."""
    check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"x: expected a last dimension of in_features = {in_features}, got shape "
            f"{tuple(x.shape)}"
        )


def check_dimension(name: str, value: object) -> int:
    """Returns value if it is an int of at least 1."""
    # bool is a subclass of int, and True would be a rank of 1.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value}")
    return value


def check_rank(rank: object) -> tuple[int, int]:
    """Returns (r_in, r_out) of a rank, which is an int or a pair."""
    pair = rank if isinstance(rank, (tuple, list)) else (rank, rank)
    if len(pair) != 2:
        raise ValueError(f"rank: expected an int or a pair (r_in, r_out), got {rank!r}")
    return check_dimension("rank", pair[0]), check_dimension("rank", pair[1])


def check_dtype(dtype: object) -> None:
    """Checks that dtype is None or one in which layers compute."""
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


def check_number(name: str, value: object) -> None:
    """Checks that value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    # A comparison with a symbol of torch.compile would add a guard. Not math.isfinite, which raises
    # OverflowError for an int that is too large for a float.
    if not torch.compiler.is_compiling() and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value!s:.40}")


def check_probability(name: str, value: object) -> None:
    """Checks that value is a number in [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def check_choice(
    name: str, value: object, choices: Collection[object], alternative: str = ""
) -> None:
    """Checks that value is one of the choices.

    Args:
        name: The argument or field, for the error.
        value: Its value.
        choices: The allowed values.
        alternative: Text for the message, about what else is allowed.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, choices))}{alternative}, got {value!r}"
        )


def check_index(name: str, index: object, count: int, x: Tensor | None = None) -> None:
    """Checks an index of cores: int64, with values in [-1, count). -1 means none.

    The values are checked only on the CPU, because reading them from a GPU would wait for it.

    Args:
        name: The argument, for the error.
        index: [b] or [b, tokens] if x is given.
        count: How many cores there are.
        x: The input [b, .., k]. The index is for its rows.
    """
    check_integers(name, index, torch.int64)
    if x is not None and (not 1 <= index.dim() < x.dim() or index.shape != x.shape[: index.dim()]):
        raise ValueError(
            f"{name}: expected one index per row or per token of x {tuple(x.shape)}, got shape "
            f"{tuple(index.shape)}"
        )
    check_range(name, index, -1, count)


def check_integers(name: str, tensor: object, dtype: torch.dtype) -> None:
    """Checks that tensor is a tensor of an integer dtype.

    Args:
        name: The argument, for the error.
        tensor: Its value.
        dtype: torch.int64 or torch.int32.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        actual = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {actual}")


def check_range(name: str, index: Tensor, start: int, end: int) -> None:
    """Checks that the values of an index are in [start, end), unless they are costly to read.

    Args:
        name: The argument, for the error.
        index: A tensor of integers.
        start: The least value that is allowed.
        end: The value after the largest one.
    """
    if not is_cheap_to_read(index) or not index.numel():
        return
    least = int(index.min())
    most = int(index.max())
    if least < start or most >= end:
        raise ValueError(f"{name}: expected values in [{start}, {end}), got {least} to {most}")


def is_cheap_to_read(tensor: Tensor) -> bool:
    """Whether reading the tensor's values neither waits for a GPU nor breaks a graph."""
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def check_tensor(name: str, tensor: object, *shape: int | str) -> None:
    """Checks that tensor is floating and has this shape. A string in it stands for any size."""
    check_floating(name, tensor)
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        isinstance(expected, str) or expected == size for expected, size in zip(shape, actual)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {actual}")


def check_values(x: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Checks that the tensors have values if x does, and none if x is on the meta device.

    If only one of them has values, torch returns memory that was never written.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta != x.is_meta:
            raise ValueError(
                f"{name}: expected a tensor on {x.device}, as x is, got one on {tensor.device}"
            )
