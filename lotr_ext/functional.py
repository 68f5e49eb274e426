"""lotr_linear, the functional form of an adapted layer, and the checks of arguments that all files share.

Each check raises TypeError or ValueError: `<argument>: expected .., got ..`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .core import dispatch
from .core.operators import DTYPES

__all__ = ["lotr_linear"]

_LARGEST = 2**31 - 1  # of a dimension


def lotr_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    core_index: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling ((drop(x) A) core) B^T  (arXiv 2402.01376).

    x [..., k], weight [n, k], bias [n] or None, A [k, r_in], B [n, r_out], core [r_in, r_out] -> [..., n] in x's dtype
    (autocast's under autocast). x, weight and bias share a dtype; the adapter may be float32 beside a half-precision x.
    Differentiable in x, A, B and core, and in weight and bias if they require grad.

    dropout_p in [0, 1): probability of dropping an element of the adapter's x, when training. core_index (int64): which of core
    [t, r_in, r_out] a row of x uses: [b] of x [b, ..., k], or [b, tokens] of x [b, tokens, ..., k]; -1: y is x W^T + bias
    there. One batch then serves several tasks, with one product with A and one with B. On a GPU the values of core_index are
    not checked.

    Raises TypeError or ValueError with the argument's name, before anything runs.
    """
    check_tensor("weight", weight, "out_features", "in_features")
    n, k = weight.shape
    check_input(x, k)
    if bias is not None:
        check_tensor("bias", bias, n)
    check_tensor("A", A, k, "r_in")
    check_tensor("B", B, n, "r_out")
    lead = () if core_index is None else ("t",)
    check_tensor("core", core, *lead, A.shape[1], B.shape[1])
    if core_index is not None:
        check_index("core_index", core_index, len(core), x)
        core_index = core_index.to(x.device)
    check_beside(x, {"weight": weight, "bias": bias}, {"A": A, "B": B, "core": core})
    check_number("scaling", scaling)
    check_probability("dropout_p", dropout_p)
    p = dropout_p if training else 0.0
    return dispatch.linear(x, weight, bias, A, B, core, float(scaling), p, index=core_index)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_input(x: object, in_features: int) -> None:
    """x must be a floating tensor [..., in_features]."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x: expected a torch.Tensor, got {type(x).__name__}. Convert it, for example by torch.from_numpy."
        )
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"x: expected a last dimension of in_features = {in_features}, got shape {tuple(x.shape)}"
        )


def check_dimension(name: str, value: object) -> int:
    """Returns value if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{name}: expected an int from 1 to {_LARGEST}, got {value}")
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


def check_index(name: str, index: object, count: int, x: Tensor | None = None) -> None:
    """index must be an int64 tensor, on a CPU with values in [-1, count), where -1 means none; beside x [b, .., k], [b] or [b,
    tokens]."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    if x is not None and (not 1 <= index.dim() < x.dim() or index.shape != x.shape[: index.dim()]):
        raise ValueError(
            f"{name}: expected one index per row or per token of x {tuple(x.shape)}, got shape {tuple(index.shape)}"
        )
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    least, most = int(index.min()), int(index.max())
    if least < -1 or most >= count:
        raise ValueError(f"{name}: expected indices in [-1, {count}), got {least} to {most}")


def check_number(name: str, value: object) -> None:
    """value must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not torch.compiler.is_compiling() and not math.isfinite(
        value
    ):  # Dynamo cannot trace isfinite of a symbol
        raise ValueError(f"{name}: expected a finite number, got {value!s:.40}")


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
    if len(got) != len(shape) or any(
        isinstance(want, int) and want != size for want, size in zip(shape, got)
    ):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {got}")


def check_beside(
    x: Tensor, base: Mapping[str, Tensor | None], adapter: Mapping[str, Tensor]
) -> None:
    """The base's tensors must have x's dtype, unless autocast casts them, and its device. The adapter's may be on another
    device, but must have values if x has."""
    cast = torch.is_autocast_enabled(x.device.type) if x.device.type != "meta" else False
    for name, tensor in base.items():
        if tensor is not None and tensor.dtype != x.dtype and not cast:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    for name, tensor in adapter.items():
        if tensor.is_meta != x.is_meta:
            raise ValueError(
                f"{name}: expected values as x has on {x.device}, got a tensor on {tensor.device}"
            )
