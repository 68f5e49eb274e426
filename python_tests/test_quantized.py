"""Adapters on quantized layers: the base's forward runs, and merging needs `dequantize`.

Stand-ins run everywhere. torchao and bitsandbytes are installed in a separate folder, because
transformers imports torchao, with warnings, wherever it finds it. `test_with_the_libraries` runs
this file again with that folder on the path.
"""

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from helpers import relative, run_python, worst
from models import moved
from torch import Tensor, nn

from lotr_ext import (
    LoTRConfig,
    LoTRWrapped,
    apply_lotr,
    explain,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)

LIBRARIES = Path(sys.prefix) / "quantized"
K = 64  # bitsandbytes' kernels need multiples of 32
X = torch.randn(6, K, generator=torch.Generator().manual_seed(1))
CONFIG = LoTRConfig(rank=4, scaling=1.0, target_modules=["up", "down"])


class Packed(Tensor):
    """A weight like torchao's: a tensor subclass that supports only F.linear."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes = codes
        self.scale = scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].dequantize(), args[2])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        raise NotImplementedError(f"{function} of a quantized weight")


def packed(linear: nn.Linear) -> nn.Linear:
    codes = zoo.Codes(linear)
    linear.weight = nn.Parameter(Packed(codes.codes, codes.scale), requires_grad=False)
    return linear


def by_torchao(config: object, linear: nn.Linear) -> nn.Module:
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, config)
    return holder[0]


def by_bitsandbytes(kind: str, settings: dict[str, object], linear: nn.Linear) -> nn.Module:
    sizes = (linear.in_features, linear.out_features)
    layer = getattr(bitsandbytes.nn, kind)(*sizes, bias=linear.bias is not None, **settings)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


QUANTIZED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "module": zoo.Dense,
    "tensor subclass": packed,
}
if importlib.util.find_spec("torchao"):
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    int4 = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))
    QUANTIZED["torchao int8"] = partial(by_torchao, quantization.Int8WeightOnlyConfig())
    QUANTIZED["torchao int4"] = partial(by_torchao, int4)
if importlib.util.find_spec("bitsandbytes"):
    import bitsandbytes

    nf4 = {"compute_dtype": torch.float32, "quant_type": "nf4"}
    eight_bits = {"has_fp16_weights": False}
    QUANTIZED["bitsandbytes 4 bit"] = partial(by_bitsandbytes, "Linear4bit", nf4)
    QUANTIZED["bitsandbytes 8 bit"] = partial(by_bitsandbytes, "Linear8bitLt", eight_bits)


def wide_net(convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Returns two blocks of quantized layers with two shapes."""
    net = zoo.Mlp()
    for block in net.blocks:
        for name, sizes in (("up", (K, 96)), ("down", (96, K))):
            block[name] = convert(zoo.fill(nn.Linear(*sizes), 0, K**-0.5))
    net.head = nn.Linear(K, 3)
    return net


def updated(layer: LoTRWrapped, x: Tensor) -> Tensor:
    """Returns the layer's output in plain PyTorch."""
    A, B = (factor.value for factor in (layer.factors.A, layer.factors.B))
    return layer.base_layer(x) + layer.scaling * x @ A @ layer.core @ B.T


@pytest.mark.parametrize("name", QUANTIZED)
def test_trains_saves_and_merges_on_request(name: str, form: str, tmp_path: Path) -> None:
    base = wide_net(QUANTIZED[name])
    model = apply_lotr(copy.deepcopy(base), CONFIG)
    layers = [layer for block in model.blocks for layer in block.values()]
    assert {type(layer) for layer in layers} == {LoTRWrapped}
    assert torch.equal(model(X), base(X))
    moved(model)
    # Token ids have no floating dtype. explain then uses a parameter's, not a quantized weight's.
    assert explain(model, torch.zeros(6, dtype=torch.long)) == explain(model, X)

    for layer in layers:
        x = torch.randn(6, layer.in_features)
        parameters = list(layer.adapter_parameters())
        outputs = (layer(x), updated(layer, x))
        gradients = [torch.autograd.grad(y.square().sum(), parameters) for y in outputs]
        assert worst(*gradients) < 1e-4

    save_adapter(model, tmp_path)
    y = model.eval()(X).detach()
    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    # bitsandbytes with 8 bits also rounds x, and its evaluation rounds the scales permanently.
    tolerance = 0.03 if "bitsandbytes" in name else 2e-5
    assert relative(loaded(X), y) <= tolerance

    with pytest.raises(TypeError, match=r"merge: expected .*dequantize=True"):
        merge(model)
    merge(model, dequantize=True)
    assert {type(layer.base_layer) for layer in layers} == {nn.Linear}
    assert relative(model(X), y) < tolerance
    unmerge(model)
    assert relative(model(X), y) < tolerance
    unload(model, merge=True, dequantize=True)
    assert type(model.blocks[0].up) is nn.Linear
    assert relative(model(X), y) < tolerance


MERGES = {
    "merge": merge,
    "merge with dequantize": partial(merge, dequantize=True),
    "unload": partial(unload, merge=True, dequantize=True),
}


def dequantized_to(result: object, linear: nn.Linear) -> zoo.Dense:
    """Returns a quantized layer whose dequantize returns something other than its weight."""
    layer = zoo.Dense(linear)
    layer.dequantize = lambda: result
    return layer


NOT_DENSE = {
    "no dequantize": zoo.Codes,
    "another shape": partial(dequantized_to, torch.zeros(3, K)),
    "not a tensor": partial(dequantized_to, "W"),
}


@pytest.mark.parametrize("call", MERGES)
@pytest.mark.parametrize("base", NOT_DENSE)
def test_a_base_that_cannot_be_made_dense_is_never_merged(call: str, base: str) -> None:
    model = moved(apply_lotr(wide_net(NOT_DENSE[base]), CONFIG))
    before = model(X).detach()
    with pytest.raises(TypeError, match="merge: expected"):
        MERGES[call](model)
    assert torch.equal(model(X), before)
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dense_layer_shares_nothing_and_the_base_comes_back(dtype: torch.dtype) -> None:
    """The base takes the mode that the layer has when it is unmerged."""
    layer = moved(apply_lotr(wide_net(zoo.Dense), CONFIG)).blocks[0].up
    base = layer.base_layer
    bias = base.bias.detach().clone()
    expected = (base.dequantize() + layer.delta_weight()).to(dtype)
    layer.merge(dequantize=dtype)
    assert torch.equal(layer.base_layer.weight, expected)
    assert layer.base_layer.bias.dtype == dtype
    nn.init.zeros_(layer.base_layer.bias)
    layer.eval().unmerge()
    assert layer.base_layer is base
    assert torch.equal(base.bias, bias)
    assert not base.training


@pytest.mark.skipif("LOTR_QUANTIZED" in os.environ, reason="runs this file")
def test_with_the_libraries() -> None:
    if not LIBRARIES.is_dir():
        pytest.skip("torchao and bitsandbytes are missing: make quantized")
    path = os.pathsep.join([str(LIBRARIES), os.environ["PYTHONPATH"]])  # conftest.py has set it
    options = ["-v", "-n", "0", "-p", "no:cacheprovider", "-k", "torchao or bitsandbytes"]
    environment = {**os.environ, "PYTHONPATH": path, "LOTR_QUANTIZED": "1"}
    process = run_python("-m", "pytest", *options, __file__, env=environment)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-1000:]
    passed = [line for line in process.stdout.splitlines() if "PASSED" in line]
    for name in ("torchao int8", "torchao int4", "bitsandbytes 4 bit", "bitsandbytes 8 bit"):
        assert any(name in line for line in passed), name
