"""Adapters over bases that are no nn.Linear: wrapped, or transformers' Conv1D."""

from __future__ import annotations

import pytest
import torch
from test_linear import truth
from torch import nn

from lotr_ext import LoTRConv1D, LoTRFactors, LoTRWrapped, adapt, reference
from nets import relative


class Scaled(nn.Module):
    """A base that is no nn.Linear: its own forward must be called, its weight never read."""

    def __init__(self, k: int, n: int):
        super().__init__()
        self.in_features, self.out_features = k, n
        self.codes = nn.Parameter(torch.randint(-8, 8, (n, k)).to(torch.int8), requires_grad=False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.codes.to(x.dtype) * 0.1)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_wrapped_base(p):
    base = Scaled(20, 14)
    layer = adapt(base, LoTRFactors(20, 14, 3), dropout=p).eval()
    nn.init.normal_(layer.core)
    assert isinstance(layer, LoTRWrapped) and layer.base_layer is base
    x = torch.randn(9, 20, requires_grad=True)
    y = layer(x)
    assert base.calls == 1 and relative(y, truth(layer, x, base.codes * 0.1)) < 2e-6
    g = torch.randn_like(y)
    y.backward(g)
    wide = [t.detach().double() for t in (g, x, base.codes * 0.1, layer.factors.A, layer.factors.B, layer.core)]
    want = reference.backward(*wide, layer.scaling)
    for tensor, gradient in zip((x, layer.factors.A, layer.factors.B, layer.core), want):
        assert relative(tensor.grad, gradient) < 4e-6
    with pytest.raises(TypeError, match="Scaled"):
        layer.merge()
    assert layer.to_base() is base
    layer.train()
    layer(x).sum().backward()


def test_a_linear_with_its_own_forward_is_wrapped():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer = adapt(Own(20, 14), LoTRFactors(20, 14, 3))
    x = torch.randn(4, 20)
    assert isinstance(layer, LoTRWrapped) and torch.equal(layer(x), layer.base_layer(x))


def test_wrapped_bfloat16_base_under_autocast():
    layer = adapt(Scaled(20, 14), LoTRFactors(20, 14, 3))
    nn.init.normal_(layer.core)
    x = torch.randn(9, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert relative(y, truth(layer, x, layer.base_layer.codes * 0.1)) < 2e-2 and x.grad is not None


def test_the_argument_has_the_bases_name():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x, hooked = torch.randn(3, 6), nn.Linear(6, 4)
    hooked.register_forward_hook(lambda module, args, y: y.tanh())
    for base, name in ((nn.Linear(6, 4), "input"), (hooked, "input"), (Conv1D(4, 6), "x")):
        layer = adapt(base, LoTRFactors(6, 4, 2))
        assert torch.equal(layer(**{name: x}), layer(x))


def test_conv1d(either_path):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base = Conv1D(14, 20)
    layer = adapt(base, LoTRFactors(20, 14, 3))
    nn.init.normal_(layer.core)
    assert isinstance(layer, LoTRConv1D) and layer.weight is base.weight and list(layer.state_dict())[:2] == ["weight", "bias"]
    x = torch.randn(2, 9, 20, requires_grad=True)
    y = layer(x)
    assert relative(y, truth(layer, x, layer.weight.mT)) < 2e-6
    y.sum().backward()
    bits = layer.weight.clone()
    layer.merge()
    assert layer.weight.shape == (20, 14) and relative(layer(x), y.detach().double()) < 4e-6
    layer.unmerge()
    assert torch.equal(layer.weight, bits)
    assert relative(layer.to_linear()(x), y.detach().double()) < 4e-6
    assert type(layer.to_base()) is Conv1D and torch.equal(layer.to_base()(x), base(x))
