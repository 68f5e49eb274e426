"""A scale of the rows of the weight: y = bias + scale (x W^T + u F^T), and its backward, against float64. Each instruction set,
odd sizes and threads: test_cpu_kernels.py. CUDA: test_cuda_operators.py."""

from __future__ import annotations

import pytest
import torch
from test_layer_operators import CLOSE, SHAPES, Layer, S, Seen, poisoned  # noqa: F401

from lotr_ext import ops, reference
from nets import relative


@pytest.fixture(params=CLOSE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def scaled(shape, dtype, **options) -> tuple[Layer, torch.Tensor]:
    """A layer, and scales of both signs that are not close to 0."""
    layer, n = Layer(shape, dtype, **options), shape[2]
    return layer, ((torch.rand(n) + 0.5) * torch.randn(n).sign()).to(ops.accumulate_dtype(dtype))


def forward(layer: Layer, scale, order: int = 0, unfolded: bool = False, bias: bool = True):
    p, seed = layer.dropout
    tensors = (layer.x, layer.weight, layer.bias if bias else None, layer.A, layer.B, layer.core)
    return ops.layer_forward(*tensors, S, order, unfolded, p=p, seed=seed, scale=scale)


@pytest.mark.parametrize("order, unfolded", [(0, False), (1, False), (0, True), (1, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, order, unfolded, dtype):
    layer, scale = scaled(shape, dtype, p=0.0 if unfolded else 0.4)
    product, *_ = layer.truth(bias=False)
    for bias in (True, False):
        y, u, F = forward(layer, scale, order, unfolded, bias)
        want = scale.double() * product + (layer.bias.double() if bias else 0)
        assert y.dtype == dtype and relative(y, want) < CLOSE[dtype]
        assert relative(u, layer.truth()[1]) < CLOSE[dtype] and (F is None) == unfolded


@pytest.mark.parametrize("unfolded", [False, True])
def test_gradients_are_those_of_autograd(unfolded, dtype):
    layer, scale = scaled((130, 64, 48, 16, 5), dtype, leading=(2, 65), p=0.0 if unfolded else 0.4)
    y, u, F = forward(layer, scale, 1, unfolded)
    g0, dscale = ops.scale_backward(layer.g, y, layer.bias, scale)
    p, seed = layer.dropout
    factors = (layer.weight, layer.x, u, layer.A, F, layer.B, layer.core)
    dx, _, *rest = ops.layer_backward(g0, *factors, S, 1, unfolded, need_B=True, need_core=True, p=p, seed=seed)

    g, x, weight, A, B, core, wide_scale = (t.requires_grad_() for t in (*layer.wide(), scale.double()))
    truth = layer.bias.double() + wide_scale * reference.forward(x, weight, None, A, B, core, S, layer.mask)
    wanted = torch.autograd.grad((g.detach() * truth).sum(), (x, A, B, core, wide_scale))
    assert dscale.dtype == scale.dtype
    for got, want in zip((dx.view_as(wanted[0]), *rest, dscale), wanted):
        assert relative(got, want) < 2 * CLOSE[dtype]


def test_scale_of_zero_gives_the_bias_and_no_gradient(dtype):
    layer, scale = scaled((130, 64, 48, 16, 5), dtype)
    scale[[3, 47]] = 0.0
    y, *_ = forward(layer, scale)
    g0, dscale = ops.scale_backward(layer.g, y, layer.bias, scale)
    assert (y[:, [3, 47]] == layer.bias[[3, 47]]).all()
    assert not g0[:, [3, 47]].any() and not dscale[[3, 47]].any() and dscale.isfinite().all()


@pytest.mark.parametrize("layout", ["3-D", "transposed", "every other", "expanded", "middle", "one token"])
def test_layouts(layout):
    """Strides, offsets and leading dimensions of g and y, each beside the other as it lies usually."""
    t = {
        "3-D": lambda: torch.randn(4, 5, 18),
        "transposed": lambda: torch.randn(18, 20).t(),
        "every other": lambda: torch.randn(40, 40)[::2, 1:37:2],
        "expanded": lambda: torch.randn(()).expand(20, 18),
        "middle": lambda: torch.randn(5, 4, 18).transpose(0, 1),  # its leading dimensions do not lie as one
        "one token": lambda: torch.randn(18),
    }[layout]()
    other, bias, scale = torch.randn(t.shape), torch.randn(36)[::2], torch.rand(54)[::3] + 0.5
    for g, y, b in ((t, other, bias), (other, t, bias), (t, t, None)):
        g0, dscale = ops.scale_backward(g, y, b, scale)
        assert g0.is_contiguous() and torch.equal(g0, g * scale)
        products = (g.double() * (y.double() - (0 if b is None else b.double()))).reshape(-1, 18)
        assert relative(dscale, products.sum(0) / scale.double()) < 2e-6


def test_a_dispatch_mode_sees_the_parts(dtype):
    for unfolded in (False, True):
        layer, scale = scaled((130, 64, 48, 16, 5), dtype, leading=(2, 65), p=0.0 if unfolded else 0.3)
        want = forward(layer, scale, 1, unfolded)
        with Seen() as seen:
            got = forward(layer, scale, 1, unfolded)
            gradients = ops.scale_backward(layer.g, want[0], layer.bias, scale)
        assert {"shrink", "mul", "scale_backward"} <= set(seen.names) and "layer_forward" not in seen.names
        assert relative(got[0], want[0].double()) < CLOSE[dtype] and got[0].dtype == dtype
        assert all(map(torch.equal, gradients, ops.scale_backward(layer.g, want[0], layer.bias, scale)))


def test_bad_input_is_named():
    layer, scale = scaled((6, 8, 5, 3, 2), torch.float32)
    layer.x, half = layer.x.bfloat16(), torch.bfloat16
    good = (layer.g, torch.randn(6, 5), layer.bias, scale)
    cases = [
        (0, torch.randn(()), r"g: expected a tensor \[.., N\]"),
        (0, torch.randn(6, 0), "g: expected at least 1 in dimension 1"),
        (0, torch.randn(6, 5, dtype=half), "y: expected dtype torch.bfloat16"),
        (0, torch.randn(5, 5), "y: expected 5 tokens, as in g"),
        (1, torch.randn(6, 4), "y: expected size 5 in dimension 1"),
        (2, torch.randn(1, 5), "bias: expected a 1-D tensor"),
        (2, torch.randn(5, dtype=half), "bias: expected dtype torch.float32"),
        (3, torch.randn(4), "scale: expected size 5 in dimension 0"),
        (3, torch.randn(5).double(), "scale: expected dtype torch.float32"),
        (3, torch.randn(5, requires_grad=True), "expected tensors that need no gradient"),
    ]
    for index, bad, message in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.scale_backward(*good[:index], bad, *good[index + 1 :])
    layer = Layer((6, 8, 5, 3, 2), half)
    for bad, message in (
        (scale.to(half), "scale: expected dtype torch.float32, got torch.bfloat16"),
        (torch.randn(1, 5), r"scale: expected a 1-D tensor \[N\]"),
        (torch.randn(8), "scale: expected size 5"),
        (torch.randn(5, requires_grad=True), "expected tensors that need no gradient"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(layer, bad)
    with pytest.raises(RuntimeError, match=r"strategy: expected 0 .two_pass. or 1 .beta."):
        forward(layer, scale, 2)
