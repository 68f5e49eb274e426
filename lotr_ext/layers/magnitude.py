"""The magnitudes m [out_features] of a layer (DoRA): their storage, initial values and merging."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..autograd.magnitude import Norms, Rows
from ..autograd.sharing import Call
from ..ops import accumulate_dtype
from .quantized import dense_weight, dequantizer, has_plain_weight, is_conv1d
from .sharded import in_parts

__all__ = ["HasMagnitude", "Stored", "no_magnitude", "stored_in", "with_lengths"]

Stored = tuple[Tensor, Callable[[], Tensor]]  # the tensor that stores W, and a function that returns W [n, k]


def no_magnitude(module: nn.Module) -> str | None:
    """Why the lengths of a layer's rows cannot be computed, for a message; None if they can."""
    weight, kind = getattr(module, "weight", None), type(module).__name__
    if not isinstance(weight, Tensor):
        return f"{kind} without a weight"
    if in_parts(weight):
        return f"{kind} whose weight is in parts"
    if weight.is_meta:
        return f"{kind} on the meta device"
    if not has_plain_weight(module):
        return None if dequantizer(module) is not None else f"{kind} whose weight cannot be made dense"
    return None if weight.dim() == 2 else f"{kind} with a weight of shape {tuple(weight.shape)}"


class _Magnitude:
    """`module.magnitude`: None for a module without. Not a property, as for `_Core`."""

    def __get__(self, module: HasMagnitude | None, owner: type | None = None) -> nn.Parameter | None:
        if module is None:
            return self
        magnitude = module._parameters.get("magnitude")
        if magnitude is None and module.norms is not None:  # `parametrize` has taken it, and puts a property in its place
            raise AttributeError(f"{type(module).__name__} has no parameter magnitude")
        return magnitude


class HasMagnitude(nn.Module):
    """Base class of modules that may have magnitudes: LoTRLayer, and LoTRCore, an adapter of PEFT's layers.

    magnitude: m, a parameter in the dtype of the factors, or None. norms: computes c; None without magnitudes.
    """

    magnitude = _Magnitude()
    norms: Norms | None = None

    def hold_magnitude(self, held: nn.Parameter | None) -> None:
        """Replaces the parameter, at the same position among the layer's parameters, without checks."""
        if held is None:
            self._parameters.pop("magnitude", None)
        else:
            self._parameters["magnitude"] = held  # register_parameter rejects a name that the class has
        self.norms = None if held is None else Norms()

    def rows_of(self, stored: Stored, A: Tensor, B: Tensor, call: Call) -> Rows:
        """m, c and m / c for a call."""
        return self.norms.rows(self.magnitude, *stored, A, B, call.core, call.scaling)


def stored_in(module: nn.Module) -> Stored:
    """The Stored of a layer that `no_magnitude` accepts."""
    weight = module.weight
    if not has_plain_weight(module):
        return weight, lambda: dense_weight(module, module.in_features, module.out_features)
    return weight, lambda: weight.t() if is_conv1d(module) else weight


def with_lengths(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """(m / c) (W + delta), c_n = |W_n + delta_n|: rows of length m. In float32 (or wider), cast once."""
    wide = torch.promote_types(accumulate_dtype(weight.dtype), delta.dtype)
    rows = weight.to(wide) + delta.to(weight.device, wide)
    c = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return (rows * (magnitude.detach().to(weight.device, wide).unsqueeze(1) / c)).to(weight.dtype)
