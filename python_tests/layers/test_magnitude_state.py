"""Magnitudes (DoRA): what a layer keeps of c from call to call, its state, and merging."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from test_magnitude import EPSILON, dense, layer_of, moved
from torch import Tensor, nn

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped, reference
from lotr_ext.autograd import magnitude as of_rows
from nets import relative


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each product W A that is made, whether |W_n|^2 was made with it."""
    made, own = [], of_rows._measured

    def seen(*arguments):
        square, WA = arguments[-2:]
        if WA is None:
            made.append(square is None)
        return own(*arguments)

    monkeypatch.setattr(of_rows, "_measured", seen)
    return made


def test_norms_are_made_once_a_step(products):
    """And |W_n|^2 once for all."""
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.adapter_parameters(), lr=0.1)
    x = torch.randn(6, 20)
    layer(x)
    products.clear()
    for _ in range(3):
        layer(x).sum().backward()
        layer(x).sum().backward()
        optimizer.step()
    assert products == [False] * 2  # the first step has that of the forward before


def test_frozen_factors_keep_W_A(products):
    layer = layer_of()
    layer.factors.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.core, layer.magnitude], lr=0.1)
    x = torch.randn(6, 20)
    layer(x)
    products.clear()
    for _ in range(3):
        layer(x).sum().backward()
        optimizer.step()
    assert products == [] and relative(layer(x), dense(layer, x)) < 2e-6


def test_each_cuda_stream_makes_norms_of_its_own(products, monkeypatch):
    """What another stream computes may not be there yet."""
    layer, x, stream = layer_of(), torch.randn(6, 20), 0
    monkeypatch.setattr(of_rows, "stream_of", lambda t: stream)
    layer(x)
    products.clear()
    layer(x)
    stream = 1
    layer(x)
    layer(x)
    assert products == [True]


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_steps_of_an_optimizer_are_seen(fused):
    """A fused one moves no version counter."""
    layer = layer_of()
    optimizer = torch.optim.AdamW(layer.adapter_parameters(), lr=0.1, fused=fused)
    x = torch.randn(6, 20)
    for _ in range(2):
        layer(x).sum().backward()
        optimizer.step()
        assert relative(layer(x), dense(layer, x)) < 2e-6


@pytest.mark.parametrize("change", ["weight", "A", "B", "core", "magnitude", "scaling", "data", "dtype", "new core"])
def test_changes_are_seen(change):
    layer, x = layer_of(), torch.randn(6, 20)
    with torch.no_grad():
        layer(x)
        if change == "scaling":
            layer.scaling *= 2
        elif change == "data":
            layer.factors.A.data = torch.randn(20, 3)
        elif change == "dtype":
            layer, x = layer.double(), x.double()
        elif change == "new core":
            layer.core = nn.Parameter(torch.randn(3, 3))
        else:
            {"weight": layer.weight, "A": layer.factors.A, "B": layer.factors.B}.get(change, getattr(layer, change, None)).add_(
                1.0
            )
        assert relative(layer(x), dense(layer, x)) < 2e-6


@pytest.mark.parametrize("first", [None, "core", "magnitude"])
@pytest.mark.parametrize("part", ["core", "magnitude"])
def test_writes_through_data_are_seen(part, first):
    """As libraries swap in averaged parameters for an evaluation. What is seen of one part holds for all. first: changed
    before in a way that torch counts."""
    layer, x = layer_of(), torch.randn(6, 20)
    with torch.no_grad():
        layer(x)
        if first is not None:
            getattr(layer, first).mul_(1.1)
        for t in (layer.weight, layer.factors.A, layer.factors.B, getattr(layer, part)):
            t.data.mul_(1.5)
        assert relative(layer(x), dense(layer, x)) < 2e-6


def test_parameters_can_be_swapped():
    layer, x = layer_of(), torch.randn(6, 20)
    layer(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert relative(layer(x.double()), dense(layer, x.double())) < 1e-12


def test_copies_and_modes_have_norms_of_their_own():
    layer, x = layer_of(), torch.randn(6, 20, requires_grad=True)
    with torch.inference_mode():
        want = layer(x).clone()
    layer.strategy = "composite"
    layer(x).sum().backward()  # autograd saves c, which inference mode must not have made
    layer.strategy = None
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            assert torch.equal(other(x), want)
            other.factors.A.mul_(3)
            assert relative(other(x), dense(other, x)) < 2e-6 and torch.equal(layer(x), want)


# ---- state, merging --------------------------------------------------------------------------------------------------


def test_state_dict():
    layer, other = layer_of(), LoTRLinear(20, 14, 3, magnitude=True)
    assert set(layer.state_dict()) == {"weight", "bias", "core", "magnitude", "factors.A", "factors.B"}
    assert "magnitude" not in LoTRLinear(20, 14, 3).state_dict()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x = torch.randn(5, 20)
    assert relative(other(x), layer(x)) < 1e-6 and "magnitude=True" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype):
    layer, x = layer_of(dtype=dtype), torch.randn(9, 20, dtype=dtype)
    before, want = layer.weight.detach().clone(), layer(x).detach()
    layer.merge()
    assert relative(layer.weight.norm(dim=1), layer.magnitude) < EPSILON[dtype] and relative(layer(x), want) < EPSILON[dtype]
    layer.unmerge()
    assert torch.equal(layer.weight, before) and relative(layer(x), want) < EPSILON[dtype]
    assert relative(layer.to_linear()(x), want) < EPSILON[dtype]


def test_unmerge_without_a_copy_is_refused():
    layer = layer_of()
    layer.merge(keep_backup=False)
    with pytest.raises(RuntimeError, match="unmerge: expected a copy of the weight"):
        layer.unmerge()


def test_merge_of_a_wrapped_base():
    class Quantized(nn.Module):
        """A base that only its own code reads."""

        in_features, out_features = 20, 14

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (14, 20), dtype=torch.int8), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(14))

        def dequantize(self) -> Tensor:
            return self.weight.float() / 16

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.dequantize(), self.bias)

    layer = moved(LoTRWrapped.from_linear(Quantized(), LoTRFactors(20, 14, 3), magnitude=True))
    x = torch.randn(5, 20)
    W = layer.base_layer.dequantize()
    parts = (layer.bias, layer.factors.A, layer.factors.B, layer.core, layer.scaling)
    want = reference.forward(x, W, *parts, magnitude=layer.magnitude)
    assert relative(layer(x), want) < 2e-6
    layer.merge(dequantize=True)
    assert relative(layer(x), want) < 2e-6
    layer.unmerge()
    assert relative(layer(x), want) < 2e-6
    weight = weakref.ref(layer.base_layer.weight)
    layer.merge(keep_backup=False, dequantize=True)
    gc.collect()
    assert weight() is None
