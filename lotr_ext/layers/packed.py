"""Quantised experts: the supported formats, a module's packed tensors, and reading them by the formats' own libraries.

| format | tensors of an experts module, for its parameter p | made dense by |
|---|---|---|
| mxfp4 | p_blocks [e, n, k / 32, 16], p_scales [e, n, k / 32], bytes, as GPT-OSS is stored | transformers |
| fp8, by blocks | p [e, n, k] float8, p_scale_inv: a scale a block of `block_size` | transformers |
| fp4, by 32 | p [e, n, k / 2] int8, p_scale_inv [e, n, k / 32] (DeepSeek-V4) | transformers |
| nvfp4 | p_packed [e, n, k / 2] bytes, p_scale [e, n, k / 16] float8, p_global_scale [e, 1 or 2], a divisor, as \
compressed-tensors stores them; or p, p_scale, p_scale_2, a factor, as modelopt does | transformers |
| nf4, fp4 | p with bitsandbytes' parametrization (`bitsandbytes.nn.parametrize`) | bitsandbytes |
| a tensor subclass | p with slices and `dequantize()`: torchao's | torchao |

`packed` finds the format of a parameter and checks its tensors; the objects it returns are `ops.grouped.Packed`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.grouped import Packed
from .quantized import is_plain

__all__ = ["expert_parameters", "packed", "weight_of"]

_BLOCKS, _SCALES, _INVERSE = "_blocks", "_scales", "_scale_inv"
_PACKED, _SCALE, _DIVISOR, _FACTOR = "_packed", "_scale", "_global_scale", "_scale_2"
_KERNEL = "_precision_config"  # beside a weight in the layout of transformers' mxfp4 kernels
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def expert_parameters(module: nn.Module) -> Iterator[str]:
    """The names of a module's own parameters, and of those that it has in packed form."""
    for name, _ in module.named_parameters(recurse=False):
        yield name
        for suffix in (_BLOCKS, _PACKED):
            if name.endswith(suffix):
                yield name.removesuffix(suffix)
    kernels = (name.removesuffix(_KERNEL) for name in vars(module) if name.endswith(_KERNEL))
    yield from (name for name in kernels if name not in module._parameters)
    yield from (name for name in getattr(module, "parametrizations", ()) if _state_of(module, name) is not None)


def weight_of(module: nn.Module, parameter: str, transposed: bool) -> Tensor | Packed:
    """The current W [e, n, k] of an experts module, dense or packed. transposed: whether its class stores [e, k, n]."""
    tensor = module._parameters.get(parameter)
    if tensor is None or not is_plain(tensor) or tensor.dtype.itemsize == 1:
        found = packed(module, parameter, transposed)
        if found is not None:
            return found
    stored = getattr(module, parameter)
    return stored.mT if transposed else stored


def packed(module: nn.Module, parameter: str, transposed: bool = False, where: str = "") -> Packed | None:
    """The packed weight [e, n, k] of an experts module; None if the parameter is a plain floating tensor or unknown.

    transposed: whether the class stores dense experts as [e, k, n]; so is a tensor subclass. where: the module's name,
    for errors.

    Raises:
        ValueError: scales of a wrong shape. TypeError: tensors of wrong dtypes.
    """
    name = f"{where}.{parameter}" if where else parameter
    if parametrize.is_parametrized(module, parameter):
        state = _state_of(module, parameter)
        if state is None or len(state.shape) != 3:
            return None
        found = Bitsandbytes(name, module.parametrizations[parameter].original, state)
        return found.mT if transposed else found
    blocks, tensor = getattr(module, f"{parameter}{_BLOCKS}", None), module._parameters.get(parameter)
    if blocks is not None:
        return Mxfp4(name, blocks, getattr(module, f"{parameter}{_SCALES}", None))
    if (codes := module._parameters.get(f"{parameter}{_PACKED}")) is not None:
        parts = (getattr(module, f"{parameter}{part}", None) for part in (_SCALE, _DIVISOR))
        return NVFP4((f"{name}{_PACKED}", f"{name}{_SCALE}", f"{name}{_DIVISOR}"), codes, *parts, divide=True)
    if tensor is None or tensor.dim() != 3:
        return None
    if tensor.dtype == torch.uint8 and hasattr(module, f"{parameter}{_FACTOR}"):
        parts = (getattr(module, f"{parameter}{part}", None) for part in (_SCALE, _FACTOR))
        return NVFP4((name, f"{name}{_SCALE}", f"{name}{_FACTOR}"), tensor, *parts, divide=False)
    if is_plain(tensor):
        if tensor.dtype not in (*_FP8, torch.int8):
            return None
        scales = module._parameters.get(f"{parameter}{_INVERSE}")
        return None if scales is None else ByBlocks(name, tensor, scales, getattr(module, "block_size", None))
    if type(tensor).dequantize is not Tensor.dequantize:
        found = Subclass(tensor)
        return found.mT if transposed else found
    return None


def _check(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {got}; load the checkpoint's own tensor")
    if tuple(tensor.shape) not in shapes:
        want = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected shape {want}, as the packed weight needs, got {tuple(tensor.shape)}")


class Mxfp4(Packed):
    """GPT-OSS's: 32 numbers of 4 bits (E2M1) share an exponent of 8 bits. The values are exact in bfloat16."""

    format = "mxfp4"

    def __init__(self, name: str, blocks: Tensor, scales: Tensor | None):
        if blocks.dim() != 4 or blocks.shape[3] != 16:
            raise ValueError(f"{name}{_BLOCKS}: expected shape (e, n, k / 32, 16), got {tuple(blocks.shape)}")
        _check(f"{name}{_BLOCKS}", blocks, (torch.uint8,), (tuple(blocks.shape),))
        _check(f"{name}{_SCALES}", scales, (torch.uint8,), (tuple(blocks.shape[:3]),))
        e, n, groups, _ = blocks.shape
        self.blocks, self.scales, self.shape, self.device = blocks, scales, (e, n, 32 * groups), blocks.device

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(self.blocks[first:end], self.scales[first:end], dtype=dtype).mT


class ByBlocks(Packed):
    """transformers' FP8Experts: a scale for each block of numbers, which are float8, or two of 4 bits (E2M1) in a byte.

    Number times scale is made in float32 and rounded once, as transformers does when it makes a checkpoint dense.
    """

    def __init__(self, name: str, codes: Tensor, scales: Tensor, block: tuple[int, int] | None):
        e, n, k = codes.shape
        self.format = "fp8 by blocks" if codes.dtype in _FP8 else "fp4 by 32"
        if codes.dtype == torch.int8:
            k, block = 2 * k, (1, 32)
        rows, columns = (n, k) if block is None else block
        grid = math.ceil(n / rows), math.ceil(k / columns)
        shapes = ((e, *grid), (e, max(2, grid[0]), grid[1]))  # gate and up projections never share a scale
        _check(f"{name}{_INVERSE}", scales, (torch.float32, torch.float8_e8m0fnu, torch.bfloat16), shapes)
        rows = rows if scales.shape[1] == grid[0] else n // 2
        self.codes, self.scales, self.block, self.shape, self.device = codes, scales, [rows, columns], (e, n, k), codes.device

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

        codes, scales = self.codes[first:end], self.scales[first:end]
        if codes.dtype == torch.int8:
            return Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
        return _dequantize_fp8_weight(codes, scales, self.block, torch.float32).to(dtype)


class NVFP4(Packed):
    """16 numbers of 4 bits (E2M1) share a scale of 8 (E4M3), and a matrix, or each half of its rows, a scale in float32.

    names: of the codes, the scales and the scales of matrices, which divide (compressed-tensors) or multiply (modelopt). The
    scale is made in float32, and number times scale is rounded once.
    """

    format = "nvfp4"

    def __init__(self, names: tuple[str, str, str], codes: Tensor, scales: Tensor | None, wide: Tensor | None, *, divide: bool):
        if codes.dim() != 3:
            raise ValueError(f"{names[0]}: expected shape (e, n, k / 2), got {tuple(codes.shape)}")
        _check(names[0], codes, (torch.uint8,), (tuple(codes.shape),))
        e, n, half = codes.shape
        _check(names[1], scales, (torch.float8_e4m3fn,), ((e, n, half // 8),))
        _check(names[2], wide, (torch.float32,), ((e,), (e, 1), (e, 2)))
        self.codes, self.scales, self.wide, self.divide = codes, scales, wide, divide
        self.shape, self.device = (e, n, 2 * half), codes.device

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        n, wide = self.shape[1], self.wide[first:end].view(end - first, -1)
        wide = wide.repeat_interleave(n // wide.shape[1], 1).unsqueeze(2)
        scales = self.scales[first:end].float()
        scales = scales / wide if self.divide else scales * wide
        return Fp8Dequantize(None)._dequantize_one(self.codes[first:end].view(torch.int8), scales, dtype)


class Subclass(Packed):
    """A tensor subclass with slices along its first dimension and `dequantize()`, such as torchao's Int8Tensor."""

    def __init__(self, weight: Tensor):
        library = type(weight).__module__.partition(".")[0]
        self.format = f"{library} {type(weight).__name__}"
        self.weight, self.shape, self.dtype, self.device = weight, tuple(weight.shape), weight.dtype, weight.device

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.weight[first:end].dequantize().to(dtype)


def _state_of(module: nn.Module, parameter: str) -> Any:
    """bitsandbytes' QuantState of a parametrized parameter; None for another parametrization."""
    first, *others = module.parametrizations[parameter]
    ours = not others and type(first).__module__ == "bitsandbytes.nn.parametrize"
    return getattr(first, "quant_state", None) if ours else None


class Bitsandbytes(Packed):
    """bitsandbytes' nf4 and fp4: blocks of 32 to 4096 numbers in a row share their largest absolute value."""

    def __init__(self, name: str, codes: Tensor, state: Any):
        numbers = math.prod(state.shape)
        if codes.numel() * codes.element_size() != math.ceil(numbers / 2):
            got = codes.numel() * codes.element_size()
            raise ValueError(f"{name}: expected {math.ceil(numbers / 2)} bytes for shape {tuple(state.shape)}, got {got}")
        _check(f"{name}.absmax", state.absmax, (state.absmax.dtype,), ((math.ceil(numbers / state.blocksize),),))
        self.format = f"bitsandbytes {state.quant_type}"
        self.codes, self.state = codes.view(-1), state
        self.shape, self.dtype, self.device = tuple(state.shape), state.dtype, codes.device

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

        (e, n, k), state, size = self.shape, self.state, self.state.blocksize
        start, stop = first * n * k, end * n * k
        low, high = start // size * size, min(math.ceil(stop / size) * size, e * n * k)  # a block may span two experts
        part = copy.copy(state)
        part.shape, blocks = torch.Size((high - low,)), slice(low // size, math.ceil(high / size))
        part.absmax = state.absmax[blocks]
        if state.nested:  # the largest values are quantised too, in blocks
            inner, nested = copy.copy(state.state2), state.state2.blocksize
            outer = blocks.start // nested
            inner.absmax = inner.absmax[outer : math.ceil(blocks.stop / nested)]
            values = dequantize_blockwise(state.absmax[outer * nested : blocks.stop], inner) + state.offset
            part.absmax, part.nested = values[blocks.start - outer * nested :].float(), False
        codes = self.codes.view(torch.uint8)[low // 2 : math.ceil(high / 2)].view(-1, 1)
        return dequantize_4bit(codes, part).view(-1)[start - low : stop - low].view(end - first, n, k).to(dtype)
