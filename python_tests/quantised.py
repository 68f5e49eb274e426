"""Layers whose weight is quantised: stand-ins, and those of the libraries that this process finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from toys import Toy, toy

TARGETS = ["q", "v", "down"]


class Forbidden(Tensor):
    """A weight of which only the class may be looked at."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("the weight of a quantised layer was read")


class Rounded(nn.Module):
    """A quantised layer as others build them: codes and a scale a row, and a weight that must not be touched."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        return Forbidden(1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Dense(Rounded):
    """One that can be made dense again."""

    answer: Callable[[Tensor], object] = staticmethod(lambda weight: weight)

    def dequantize(self) -> object:
        return self.answer(self.codes.float() * self.scale)


class Codes(Tensor):
    """A weight as torchao makes it: a tensor subclass of floating dtype that holds codes, known to F.linear alone."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.dequantize(), bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        raise NotImplementedError(f"{function} of a quantised weight")


def codes(model: Toy) -> Toy:
    for block in model.blocks:
        for name in TARGETS:
            rounded = Rounded(getattr(block, name))
            getattr(block, name).weight = nn.Parameter(Codes(rounded.codes, rounded.scale), requires_grad=False)
    return model


def with_layers(kind: Callable[[nn.Linear], nn.Module], model: Toy | None = None) -> Toy:
    model = toy() if model is None else model
    for block in model.blocks:
        for name in TARGETS:
            setattr(block, name, kind(getattr(block, name)))
    return model


def torchao_int8(model: Toy) -> Toy:
    from torchao import quantization

    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    return model


def torchao_int4(model: Toy) -> Toy:
    """4-bit codes in groups of 8, the form that torchao runs on a CPU."""
    from torchao import quantization

    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(8))
    quantization.quantize_(model.blocks, config)
    return model


def bitsandbytes_layers(model: Toy, make: Callable[..., nn.Module]) -> Toy:
    def converted(linear: nn.Linear) -> nn.Module:
        layer = make(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return with_layers(converted, model)


def bitsandbytes_4bit(model: Toy) -> Toy:
    import bitsandbytes as bnb

    return bitsandbytes_layers(model, lambda *a, **k: bnb.nn.Linear4bit(*a, **k, compute_dtype=torch.float32, quant_type="nf4"))


def bitsandbytes_8bit(model: Toy) -> Toy:
    import bitsandbytes as bnb

    return bitsandbytes_layers(model, lambda *a, **k: bnb.nn.Linear8bitLt(*a, **k, has_fp16_weights=False))


QUANTISED: dict[str, Callable[[Toy], Toy]] = {"stand-in": lambda model: with_layers(Dense, model), "tensor subclass": codes}
if importlib.util.find_spec("torchao"):
    QUANTISED |= {"torchao int8": torchao_int8, "torchao int4": torchao_int4}
if importlib.util.find_spec("bitsandbytes"):
    QUANTISED |= {"bitsandbytes 4 bit": bitsandbytes_4bit, "bitsandbytes 8 bit": bitsandbytes_8bit}
