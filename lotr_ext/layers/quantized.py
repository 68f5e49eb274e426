"""Layers with a quantised weight: how to recognise them, and how to dequantise them by the quantiser's own code.

torchao, optimum-quanto   nn.Linear whose weight is a tensor subclass with dequantize()
bitsandbytes              Linear4bit, Linear8bitLt: its functional.dequantize_4bit, functional.int8_vectorwise_dequant
HQQ and others            a module with a dequantize() of its own, which returns W [out_features, in_features]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compat import FakeTensor
from .sharded import in_parts

__all__ = ["base_format", "dense_weight", "dequantizer", "has_plain_weight", "is_plain"]


def has_plain_weight(module: nn.Module) -> bool:
    """Whether products may read module.weight: a floating tensor that holds its own values, and no codes of one byte."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and is_plain(weight) and weight.is_floating_point() and weight.dtype.itemsize > 1


def base_format(module: nn.Module) -> str | None:
    """The name of a module's quantised format; None for a plain weight."""
    if has_plain_weight(module):
        return None
    weight = getattr(module, "weight", None)
    library, kind = type(weight).__module__.partition(".")[0], type(weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        return f"bitsandbytes {weight.quant_type if kind == 'Params4bit' else 'int8'}"
    if isinstance(weight, Tensor) and not is_plain(weight):
        return f"{library} {kind}"
    return type(module).__name__


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its own values: of no subclass but torch's own for parts, for tracing and for lazy modules."""
    kinds = (FakeTensor, nn.parameter.UninitializedTensorMixin)
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, kinds) or in_parts(tensor)


def _from_bitsandbytes(module: nn.Module) -> Callable[[], Tensor] | None:
    weight = getattr(module, "weight", None)
    if not type(weight).__module__.startswith("bitsandbytes"):
        return None
    kind = type(weight).__name__
    if kind == "Params4bit" and weight.quant_state is not None:
        from bitsandbytes.functional import dequantize_4bit

        def dense() -> Tensor:
            module.state_dict()  # evaluation on a CPU packs the codes for its kernels; this brings them back in order
            return dequantize_4bit(weight.data, weight.quant_state)

        return dense
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return None if scales is None else lambda: int8_vectorwise_dequant(weight.data, scales)
    return None


def dequantizer(module: nn.Module) -> Callable[[], Tensor] | None:
    """A function that returns W [out_features, in_features] of a quantised module; None if there is none."""
    found = _from_bitsandbytes(module)
    if found is not None:
        return found
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not has_plain_weight(module) and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize
    own = getattr(module, "dequantize", None)
    return own if callable(own) else None


def dense_weight(module: nn.Module, in_features: int, out_features: int) -> Tensor:
    """W [out_features, in_features] of a quantised module, in the dtype in which the quantiser gives it.

    Raises:
        TypeError: nothing dequantises the module. ValueError: it gave another shape, or no floating tensor.
    """
    make, kind = dequantizer(module), type(module).__name__
    if make is None:
        raise TypeError(f"dequantize: expected a quantised layer whose weight can be made dense, got {kind}")
    with torch.no_grad():
        weight = make()
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (out_features, in_features) or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"dequantize: expected floating [{out_features}, {in_features}] of {kind}, got {got}")
    return weight.detach()
