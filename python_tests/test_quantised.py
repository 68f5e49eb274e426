"""Adapters over quantised layers: the base's own forward runs, and merging happens on request only.

Stand-ins run everywhere. The libraries are in a folder of their own, because transformers imports torchao, loudly, wherever it
finds it: `test_with_the_libraries` runs this file again with them.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from helpers import relative, worst
from torch import Tensor, nn
from torch.nn import functional as nnf

from lotr_ext import (
    LoTRConfig,
    LoTRFactors,
    LoTRWrapped,
    adapt,
    apply_lotr,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)

LIBRARIES = Path(sys.prefix) / "quantized"
K = 64  # bitsandbytes' kernels need multiples of 32


class Codes(nn.Module):
    """A quantised layer as others build them: codes and a scale for each row; its weight must not be read."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    @property
    def weight(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Dense(Codes):
    """One that can be made dense."""

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale


class Packed(Tensor):
    """A weight as torchao makes it: a tensor subclass that F.linear alone knows."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nnf.linear:
            return nnf.linear(args[0], args[1].dequantize(), args[2])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        raise NotImplementedError(f"{function} of a quantised weight")


def packed(linear: nn.Linear) -> nn.Linear:
    codes = Codes(linear)
    linear.weight = nn.Parameter(Packed(codes.codes, codes.scale), requires_grad=False)
    return linear


def torchao(config: Callable[[], object]) -> Callable[[nn.Linear], nn.Module]:
    def convert(linear: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        holder = nn.Sequential(linear)
        quantize_(holder, config())
        return holder[0]

    return convert


def torchao_int4() -> object:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))


def torchao_int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def bitsandbytes(kind: str, **settings: object) -> Callable[[nn.Linear], nn.Module]:
    def convert(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        layer = getattr(bnb.nn, kind)(
            linear.in_features, linear.out_features, bias=linear.bias is not None, **settings
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return convert


QUANTISED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "module": Dense,
    "tensor subclass": packed,
}
if importlib.util.find_spec("torchao"):
    QUANTISED |= {"torchao int8": torchao(torchao_int8), "torchao int4": torchao(torchao_int4)}
if importlib.util.find_spec("bitsandbytes"):
    QUANTISED |= {
        "bitsandbytes 4 bit": bitsandbytes(
            "Linear4bit", compute_dtype=torch.float32, quant_type="nf4"
        ),
        "bitsandbytes 8 bit": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    }


def wide_net(convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Two quantised blocks of two shapes."""
    net = zoo.Mlp()
    for block in net.blocks:
        for name, sizes in (("up", (K, 96)), ("down", (96, K))):
            block[name] = convert(zoo.fill(nn.Linear(*sizes), 0, K**-0.5))
    net.head = nn.Linear(K, 3)
    return net


def adapted(net: nn.Module) -> nn.Module:
    model = apply_lotr(net, LoTRConfig(rank=4, scaling=1.0, target_modules=["up", "down"]))
    return zoo.fill(model, 7, 0.2, lambda name: name.endswith(".core"))


def x_of(tokens: int = 6) -> Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(1))


def updated(layer: LoTRWrapped, x: Tensor) -> Tensor:
    """The layer's output in plain PyTorch."""
    A, B = layer.factors.A.value, layer.factors.B.value
    return layer.base_layer(x) + layer.scaling * x @ A @ layer.core @ B.T


@pytest.mark.parametrize("name", QUANTISED)
def test_trains_saves_and_merges_on_request(name: str, form: str, tmp_path: Path) -> None:
    base = wide_net(QUANTISED[name])
    start = base(x_of()).detach()
    model = apply_lotr(
        copy.deepcopy(base), LoTRConfig(rank=4, scaling=1.0, target_modules=["up", "down"])
    )
    assert {type(block[n]) for block in model.blocks for n in block} == {
        LoTRWrapped
    } and torch.equal(model(x_of()), start)
    zoo.fill(model, 7, 0.2, lambda name: name.endswith(".core"))
    layers = [layer for block in model.blocks for layer in block.values()]
    for layer in layers:
        x, own = torch.randn(6, layer.in_features), list(layer.adapter_parameters())
        found = torch.autograd.grad(layer(x).square().sum(), own)
        assert worst(found, torch.autograd.grad(updated(layer, x).square().sum(), own)) < 1e-4
    save_adapter(model, tmp_path)
    trained = model.eval()(x_of()).detach()
    tolerance = (
        0.03 if "bitsandbytes" in name else 2e-5
    )  # its 8 bits round x too, its evaluation rounds scales for good
    assert (
        relative(load_adapter(copy.deepcopy(base), tmp_path).eval()(x_of()), trained) <= tolerance
    )
    with pytest.raises(TypeError, match=r"merge: expected .*dequantize=True"):
        merge(model)
    assert not any(layer.merged for layer in layers)
    merge(model, dequantize=True)
    assert {type(layer.base_layer) for layer in layers} == {nn.Linear}
    assert relative(model(x_of()), trained) < tolerance
    unmerge(model)
    assert relative(model(x_of()), trained) < tolerance
    unload(model, merge=True, dequantize=True)
    assert type(model.blocks[0].up) is nn.Linear and relative(model(x_of()), trained) < tolerance


def test_a_base_that_cannot_be_made_dense_is_never_merged() -> None:
    model = adapted(wide_net(Codes))
    before = model(x_of()).detach()
    for run in (
        merge,
        lambda m: merge(m, dequantize=True),
        lambda m: unload(m, merge=True, dequantize=True),
    ):
        with pytest.raises(TypeError, match="merge: expected"):
            run(model)
    assert torch.equal(model(x_of()), before) and not any(
        getattr(m, "merged", False) for m in model.modules()
    )


def test_the_dense_layer_has_the_dtype_that_was_asked_for() -> None:
    model = adapted(wide_net(Dense))
    layer = model.blocks[0].up
    want = (layer.base_layer.dequantize() + layer.delta_weight()).bfloat16()
    merge(model, dequantize=torch.bfloat16)
    assert (
        torch.equal(layer.base_layer.weight, want) and layer.base_layer.bias.dtype == torch.bfloat16
    )


def test_a_dense_layer_shares_no_bias_and_the_base_takes_the_mode() -> None:
    layer = adapted(wide_net(Dense)).blocks[0].up
    base = layer.base_layer
    bias = base.bias.detach().clone()
    layer.merge(dequantize=True)
    with torch.no_grad():
        layer.base_layer.bias.zero_()
    layer.eval()
    layer.unmerge()
    assert layer.base_layer is base
    assert torch.equal(base.bias, bias)
    assert not base.training


def test_without_a_backup_there_is_no_way_back() -> None:
    model = adapted(wide_net(Dense))
    merge(model, dequantize=True, keep_backup=False)
    for run in (unmerge, unload):
        with pytest.raises(RuntimeError, match="unmerge: expected the quantized base"):
            run(model)
    assert type(unload(model, merge=True).blocks[0].up) is nn.Linear


def test_what_a_dequantiser_returns_is_checked() -> None:
    for bad in (torch.zeros(3, K), "W"):
        base = Dense(nn.Linear(K, K))
        base.dequantize = lambda bad=bad: bad
        layer = adapt(base, LoTRFactors(K, K, 2))
        with pytest.raises(TypeError, match="merge: expected a dense"):
            layer.merge(dequantize=True)
        assert layer.base_layer is base and not layer.merged


@pytest.mark.skipif("LOTR_QUANTISED" in os.environ, reason="runs this file")
def test_with_the_libraries() -> None:
    """torchao and bitsandbytes, in a process of their own."""
    if not LIBRARIES.is_dir():
        pytest.skip("torchao and bitsandbytes are missing: make quantized")
    path = os.pathsep.join(filter(None, [str(LIBRARIES), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "PYTHONPATH": path, "LOTR_QUANTISED": "1"}
    run = subprocess.run(
        [*command, "-k", "torchao or bitsandbytes"], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    for name in ("torchao int8", "torchao int4", "bitsandbytes 4 bit", "bitsandbytes 8 bit"):
        assert any(name in line and "PASSED" in line for line in run.stdout.splitlines()), name
