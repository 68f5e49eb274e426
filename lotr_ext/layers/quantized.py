"""Layers with a quantised weight: how to recognise them, and how to dequantise them by the quantiser's own code.

torchao, optimum-quanto   nn.Linear whose weight is a tensor subclass with dequantize()
bitsandbytes              Linear4bit, Linear8bitLt: its functional.dequantize_4bit, functional.int8_vectorwise_dequant
transformers              FP8Linear: its scales by blocks
compressed-tensors        nn.Linear with its own forward, which makes the weight dense; merging is refused
HQQ and others            a module with dequantize(), which returns W [out_features, in_features]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import FakeTensor
from .sharded import in_parts

__all__ = [
    *("base_format", "dense_weight", "dequantizer", "has_plain_weight", "is_conv1d", "is_plain", "one_layer"),
    "ready_to_train",
]


# From so many tokens on, a weight that is made dense twice and one pass over y less cost no more than the base's own forward
# and backward, measured on a CPU (bench.quantised). torchao's own keep a dense weight until the backward.
_ONE_LAYER = {"Params4bit": 1024, "Int8Tensor": 2048, "IntxUnpackedToInt8Tensor": 1024, "Float8Tensor": 2048}


def has_plain_weight(module: nn.Module) -> bool:
    """Whether products may read module.weight: a floating tensor that holds its values, and not codes of one byte."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and is_plain(weight) and weight.is_floating_point() and weight.dtype.itemsize > 1


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D, by its attributes: transformers may not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


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
    if hasattr(module, "weight_scale_inv"):
        return "fp8 by blocks"
    if (scheme := getattr(module, "quantization_scheme", None)) is not None:
        return f"compressed-tensors {getattr(scheme.format, 'value', scheme.format)}"
    return type(module).__name__


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its values: not a subclass, except torch's own for sharding, tracing and lazy modules."""
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
            if _is_packed_for_cpu(weight):
                module.state_dict()  # restores the order of the codes
            return dequantize_4bit(weight.data, weight.quant_state)

        return dense
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return None if scales is None else lambda: int8_vectorwise_dequant(weight.data, scales)
    return None


def _is_packed_for_cpu(weight: Any) -> bool:
    """Whether bitsandbytes has packed the codes for its CPU kernels, which it does in an evaluation."""
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def ready_to_train(module: nn.Module) -> None:
    """Undoes the packing of an evaluation before a forward with gradients: bitsandbytes' CPU kernels have no backward."""
    if _is_packed_for_cpu(getattr(module, "weight", None)):
        module.state_dict()


def one_layer(module: nn.Module, x: Tensor) -> Callable[[], Tensor] | None:
    """A function that returns W of a quantised module in x's dtype, if its own forward is x W^T + bias and slower in training.

    None for few tokens, hooks, quantised activations, a bias or a product in another dtype, and other formats.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    least = _ONE_LAYER.get(type(weight).__name__)
    if least is None or x.numel() < least * x.shape[-1] or (bias is not None and bias.dtype != x.dtype):
        return None
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if any(
        getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
    ):
        return None
    own = module.compute_dtype or x.dtype if type(weight).__name__ == "Params4bit" else weight.dtype
    make = dequantizer(module) if own == x.dtype else None

    def dense() -> Tensor:
        with torch.no_grad():
            return make().detach().to(x.dtype)

    return None if make is None else dense


def _from_blocks(weight: Tensor, scales: Tensor, block: list[int] | None) -> Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    return _dequantize_fp8_weight(weight, scales, block, torch.float32)


def dequantizer(module: nn.Module) -> Callable[[], Tensor] | None:
    """A function that returns W [out_features, in_features] of a quantised module; None if none is known."""
    found = _from_bitsandbytes(module)
    if found is not None:
        return found
    weight, scales = (getattr(module, name, None) for name in ("weight", "weight_scale_inv"))
    if isinstance(scales, Tensor) and is_plain(weight) and weight.dtype == torch.float8_e4m3fn:
        return lambda: _from_blocks(weight.detach(), scales.detach(), module.block_size)
    if isinstance(weight, Tensor) and not has_plain_weight(module) and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize
    own = getattr(module, "dequantize", None)
    return own if callable(own) else None


def dense_weight(module: nn.Module, in_features: int, out_features: int) -> Tensor:
    """W [out_features, in_features] of a quantised module, in the dtype of the quantiser's result.

    Raises:
        TypeError: no known way to dequantise the module. ValueError: the result has another shape or is not floating.
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
