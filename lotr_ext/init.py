"""Initial values of factors and cores.

factors   orthonormal   A^T A = START^2 I (or A A^T where r > d): the core's gradient does not grow with the width
          normal        START N(0, 1), as in the paper's code
          kaiming       START U(-1/sqrt(d), 1/sqrt(d)), as LoRA's A
cores     zero          delta W = 0, so the model starts unchanged
          identity      G = I, and B starts at zero so that the model still starts unchanged (as LoRA does)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CORE_INITS", "FACTOR_INITS", "START", "fill_core_", "fill_factor_"]

# Multiplies the initial factors, and divides s by its cube (linear.scaling_of). Under AdamW, A, B and G times a, the rate times
# a and s times a^-3 is exactly the same path, so this constant moves LoTR's best learning rate onto LoRA's (docs/choosing.md).
START = 0.4
CORE_INITS = ("zero", "identity")


def _orthonormal(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A random [d, r] with orthonormal columns, or rows when r > d; uniform over all of them (the sign of R's diagonal)."""
    if r > d:
        return _orthonormal(r, d, dtype, device, generator).T
    q, upper = torch.linalg.qr(torch.randn(d, r, dtype=dtype, device=device, generator=generator))
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(dtype)


def _normal(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(d, r, dtype=dtype, device=device, generator=generator)


def _kaiming(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(d, r, dtype=dtype, device=device, generator=generator) - 1) / math.sqrt(d)


_FILLS: dict[str, Callable[..., Tensor]] = {"orthonormal": _orthonormal, "normal": _normal, "kaiming": _kaiming}
FACTOR_INITS = tuple(_FILLS)


def fill_factor_(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fills a factor [d, r] in place with START times the values of an init, and returns it. Nothing is drawn on the meta
    device.

    Values are drawn in float32 (float64 for float64) and cast once. generator: of the tensor's device; None for torch's global
    one.

    Raises:
        ValueError: an unknown init, or a tensor that is not 2-D. TypeError: a dtype that is not floating.
    """
    if init not in _FILLS:
        raise ValueError(f"init: expected one of {', '.join(FACTOR_INITS)}, got {init!r}")
    if tensor.dim() != 2:
        raise ValueError(f"tensor: expected 2 dimensions [d, r], got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating dtype, got {tensor.dtype}")
    if tensor.is_meta:
        return tensor
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return tensor.copy_(START * _FILLS[init](*tensor.shape, wide, tensor.device, generator))


def fill_core_(tensor: Tensor, init: str) -> Tensor:
    """Fills a core [r_in, r_out], or experts' [e, r_in, r_out], in place: "zero", or "identity" (ones on the diagonal).

    Raises:
        ValueError: an unknown init, or a tensor that is not 2-D or 3-D.
    """
    if init not in CORE_INITS:
        raise ValueError(f"core_init: expected one of {', '.join(CORE_INITS)}, got {init!r}")
    if tensor.dim() not in (2, 3):
        raise ValueError(f"tensor: expected 2 dimensions [r_in, r_out], or 3 with experts, got shape {tuple(tensor.shape)}")
    with torch.no_grad():
        tensor.zero_()
        if init == "identity":
            tensor.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return tensor
