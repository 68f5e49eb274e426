"""Tiny mixtures whose experts are packed in a quantised format, beside the same mixtures made dense."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator

import torch
from mixtures import mixture
from torch import Tensor, nn


def experts_of(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if hasattr(m, "is_transposed"))


def e2m1(codes: Tensor) -> Tensor:
    """Numbers of 4 bits (a sign, 2 bits of exponent, one of mantissa) as float64, by the definition."""
    codes = codes.long()
    sign, exponent, mantissa = 1.0 - 2.0 * (codes >> 3), (codes >> 1) & 3, codes & 1
    return sign * torch.where(exponent == 0, mantissa * 0.5, 2.0 ** (exponent - 1) * (1 + mantissa * 0.5))


def nibbles(packed: Tensor) -> Tensor:
    """[..., k / 2] bytes -> [..., k] codes, the low half of a byte first."""
    packed = packed.view(torch.uint8).int()
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def in_pairs(make: Callable[[nn.Module, str, Tensor], Tensor], model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(packed, dense): make packs the parameter of an experts module whose W [e, n, k] is given, and returns W after that."""
    dense = copy.deepcopy(model)
    for module, twin in zip(experts_of(model), experts_of(dense), strict=True):
        for name in [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]:
            stored = getattr(twin, name).detach()
            W = make(module, name, stored.mT if twin.is_transposed else stored)
            getattr(twin, name).data = (W.mT if twin.is_transposed else W).to(stored.dtype)
    return model, dense


def mxfp4(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """GPT-OSS with random bytes."""
    gen = torch.Generator().manual_seed(1)

    def make(module: nn.Module, name: str, W: Tensor) -> Tensor:
        e, n, k = W.shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8, generator=gen)
        scales = torch.randint(119, 125, (e, n, k // 32), dtype=torch.uint8, generator=gen)
        delattr(module, name)
        for part, tensor in (("blocks", blocks), ("scales", scales)):
            module.register_parameter(f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))
        return (e2m1(nibbles(blocks)) * 2.0 ** (scales.double() - 127).unsqueeze(-1)).reshape(e, n, k)

    return in_pairs(make, mixture("GptOss", dtype, intermediate_size=32))


def fp8(dtype: torch.dtype = torch.float32, name: str = "Qwen3Moe", block: int = 8, **settings) -> tuple[nn.Module, nn.Module]:
    """transformers' FP8Experts in the place of a mixture's own, with random numbers and scales."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    gen, model = torch.Generator().manual_seed(1), mixture(name, dtype, **settings)
    dense = copy.deepcopy(model)
    kind = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    for at, twin in [(n, m) for n, m in dense.named_modules() if hasattr(m, "is_transposed")]:
        module = kind(twin.config, block_size=(block, block))
        for own in ("gate_up_proj", "down_proj"):
            codes, scales = getattr(module, own), getattr(module, f"{own}_scale_inv")
            codes.data = torch.randn(codes.shape, generator=gen).mul_(20).to(codes.dtype)
            scales.data = torch.rand(scales.shape, generator=gen).mul_(0.01).add_(1e-3)
            _, n, k = codes.shape
            rows = torch.arange(n) // (block if n > block else n // scales.shape[1])
            W = codes.double() * scales.double()[:, rows][:, :, torch.arange(k) // block]
            getattr(twin, own).data = W.to(dtype) if dtype == torch.float64 else W.float().to(dtype)
        model.set_submodule(at, module.requires_grad_(False))
    return model, dense


def nvfp4(dtype: torch.dtype = torch.float32, *, divide: bool = True) -> tuple[nn.Module, nn.Module]:
    """Random bytes and scales, as compressed-tensors (divide) or modelopt name them; wide scales for a gate and an up part.

    The scale of a block is made in float32, as by both, and the number times it is rounded once.
    """
    gen = torch.Generator().manual_seed(1)

    def make(module: nn.Module, name: str, W: Tensor) -> Tensor:
        e, n, k = W.shape
        codes = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, generator=gen)
        scales = torch.rand(e, n, k // 16, generator=gen).mul_(200).to(torch.float8_e4m3fn)
        halves = 2 if name == "gate_up_proj" else 1
        wide = torch.rand(e, halves, generator=gen) * 100 + 1000
        wide = wide if divide else 1 / wide
        delattr(module, name)
        parts = {"_packed": codes, "_scale": scales, "_global_scale": wide}
        for part, tensor in (parts if divide else {"": codes, "_scale": scales, "_scale_2": wide}).items():
            module.register_parameter(f"{name}{part}", nn.Parameter(tensor, requires_grad=False))
        rows = wide.repeat_interleave(n // halves, 1).unsqueeze(2)
        scale = scales.float().repeat_interleave(16, 2)
        return (e2m1(nibbles(codes)) * (scale / rows if divide else scale * rows).double()).float()

    return in_pairs(make, mixture("Mixtral", dtype, intermediate_size=32))


def bitsandbytes(dtype: torch.dtype = torch.float32, *, nested: bool = False, **settings) -> tuple[nn.Module, nn.Module]:
    """nf4, through bitsandbytes' own parametrization of a parameter."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    def make(module: nn.Module, name: str, W: Tensor) -> Tensor:
        replace_parameter_4bit(module, name, compress_statistics=nested, quant_type="nf4")
        W = getattr(module, name).detach()  # all of it, as bitsandbytes makes it dense
        return W.mT if module.is_transposed else W

    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, **settings}  # on a CPU it expects rows of whole blocks
    return in_pairs(make, mixture("GptOss", dtype, **sizes))


def torchao(config: str, dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Module, nn.Module]:
    """By torchao's own `quantize_` of a parameter."""
    from torchao import quantization

    def make(module: nn.Module, name: str, W: Tensor) -> Tensor:
        one = quantization.FqnToConfig({name: getattr(quantization, config)()})
        quantization.quantize_(module, one, filter_fn=None)
        return getattr(module, name).dequantize()

    return in_pairs(make, mixture("Mixtral", dtype, **settings))


FORMATS: dict[str, Callable[..., tuple[nn.Module, nn.Module]]] = {
    "mxfp4": mxfp4,
    "fp8 by blocks": fp8,
    "nvfp4": nvfp4,
    "nvfp4 of modelopt": lambda *a: nvfp4(*a, divide=False),
}
if importlib.util.find_spec("bitsandbytes"):
    FORMATS |= {"bitsandbytes nf4": bitsandbytes, "bitsandbytes nf4 nested": lambda *a, **k: bitsandbytes(*a, nested=True, **k)}
if importlib.util.find_spec("torchao"):
    FORMATS["torchao Int8Tensor"] = lambda *a, **k: torchao("Int8WeightOnlyConfig", *a, **k)
    FORMATS["torchao Float8Tensor"] = lambda *a, **k: torchao("Float8WeightOnlyConfig", *a, **k)
