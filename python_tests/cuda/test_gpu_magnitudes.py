"""Layers with magnitudes (DoRA) on a GPU, against autograd in float64. The same comparison on a CPU ends in _cpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lotr_ext import LoTRLinear
from lotr_ext.autograd.magnitude import row_lengths
from nets import relative

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def layer_of(dtype: torch.dtype) -> LoTRLinear:
    layer = LoTRLinear(200, 136, 12, dtype=dtype, magnitude=True)
    nn.init.normal_(layer.core, 0, 0.3)
    with torch.no_grad():
        layer.magnitude.mul_(torch.rand(136) + 0.5)
    return layer


def by_definition(layer: LoTRLinear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """c [n] and y [m, n] of layer's parameters in float64, and the gradients of sum(y^2) in x, A, B, the core and m."""
    weight, bias = layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu()
    parts = (x, layer.factors.A, layer.factors.B, layer.core, layer.magnitude)
    wide_x, A, B, core, m = (t.detach().double().cpu().requires_grad_() for t in parts)
    full = weight + layer.scaling * B @ core.T @ A.T
    c = full.norm(dim=1).detach()
    y = bias + (m / c) * (wide_x @ full.T)
    return c, [y, *torch.autograd.grad(y.square().sum(), (wide_x, A, B, core, m))]


def compare(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(dtype).to(device), torch.randn(300, 200, dtype=dtype).to(device).requires_grad_()
    c, want = by_definition(layer, x)
    y = layer(x)
    y.float().square().sum().backward()
    got = [y, x.grad, *(p.grad for p in (layer.factors.A, layer.factors.B, layer.core, layer.magnitude))]
    assert all(relative(a.detach().cpu(), b) < CLOSE[dtype] for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        lengths = row_lengths(layer.weight, layer.factors.A, layer.factors.B, layer.core, layer.scaling)
    assert lengths.dtype == torch.float32 and relative(lengths.cpu(), c) < min(CLOSE[dtype], 1e-3)


@DTYPES
def test_outputs_gradients_and_lengths(dtype: torch.dtype) -> None:
    compare("cuda", dtype)


@DTYPES
def test_outputs_gradients_and_lengths_cpu(dtype: torch.dtype) -> None:
    compare("cpu", dtype)
