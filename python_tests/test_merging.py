"""Scalings and merging of layers."""

from collections.abc import Callable

import pytest
import torch
from helpers import CLOSE, HALVES, copy64, relative
from layers import SCALING, K, Net, inputs, loss
from torch import nn

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped, adapt
from lotr_ext.factors import scaling_of

SCALINGS = [
    ({"rank": 4, "alpha": 8.0}, 2.0),
    ({"rank": (2, 4), "alpha": 8}, 2.0),
    ({"rank": 4, "alpha": 8.0, "rslora": True}, 4.0),
    ({"rank": 4, "rslora": True}, 2.0),
    ({"rank": 4, "scaling": 0.3}, 0.3),
    ({"rank": 8}, 4 / 0.4**3),  # the factors start as 0.4 times orthonormal ones
    ({"rank": (2, 1)}, 4 * 4**1.5 / 0.4**3),
]


@pytest.mark.parametrize("settings, scaling", SCALINGS, ids=str)
def test_scaling(settings: dict[str, object], scaling: float) -> None:
    assert LoTRLinear(K, K, **settings).scaling == pytest.approx(scaling)


def test_scaling_of_diagonal_cores() -> None:
    assert scaling_of(2, diagonal=True) == pytest.approx(4 * 4**0.5 / 0.4**3)


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge(kind: str, dtype: torch.dtype) -> None:
    """The weight is W + delta, rounded once. unmerge restores the bits."""
    layer = Net(kind, dtype).layers[0]
    x = inputs(6, dtype=dtype)
    W = copy64(layer.weight_matrix())
    A, B, core = map(copy64, (layer.factors.A.value, layer.factors.B.value, layer.core))
    delta = SCALING * B @ core.T @ A.T
    before = layer.weight.detach().clone()
    y = layer(x)
    assert relative(layer.delta_weight(), delta) < 1e-6
    plain = layer.to_linear()
    layer.merge()
    ulp = torch.finfo(dtype).eps * (W + delta).abs()
    slack = {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, 0.0)  # the error of delta
    error = (layer.weight_matrix().double() - (W + delta)).abs()
    assert bool((error <= 0.5001 * ulp + slack).all())
    assert torch.equal(layer(x), layer.base(x))
    assert relative(layer(x), y.double()) < 2 * CLOSE[dtype]
    assert torch.equal(plain.weight, layer.weight_matrix())
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)
    layer.merge(keep_backup=False)
    layer.unmerge()
    assert relative(layer.weight, before.double()) < CLOSE[dtype]
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_plain_layers_share_no_tensor_and_keep_the_mode(kind: str, training: bool) -> None:
    layer = Net(kind).layers[0].train(training)
    x = inputs(6)
    y = layer(x)
    for merged in (False, True):
        if merged:
            layer.merge()
        plain = layer.to_linear()
        assert plain.training is training
        assert relative(plain(x), y) < 1e-12
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
        assert relative(layer(x), y) < 1e-12
    assert layer.to_base().training is training


@pytest.mark.parametrize("side", ["A", "B"])
def test_sharded_training_may_gather_one_factor(side: str) -> None:
    """A forward hook of the factor's module gathers its parameter."""
    net = Net("linear")
    expected = net(inputs(6))
    factor = getattr(net.layers[0].factors, side)
    value = factor.value.detach().clone()
    factor.value.data.zero_()

    def gather(*_: object) -> None:
        factor.value.data.copy_(value)

    factor.register_forward_pre_hook(gather)
    assert torch.equal(net(inputs(6)), expected)


def test_a_base_with_hooks_keeps_its_modes_and_can_be_merged() -> None:
    base = nn.Linear(K, K)
    base.inner = nn.Dropout().eval()
    base.register_forward_hook(lambda module, args, y: y)
    layer = LoTRWrapped.from_linear(base, LoTRFactors(K, K, 2))
    assert [module.training for module in base.modules()] == [True, False]
    layer.merge()
    assert layer.merged


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_a_layer_with_hooks_is_wrapped(register: Callable) -> None:
    linear = nn.Linear(K, K)
    register(linear, lambda *_: None)
    assert type(adapt(linear, LoTRFactors(K, K, 2))) is LoTRWrapped


def test_a_merge_between_forward_and_backward_is_refused(form: str) -> None:
    net = Net("linear")
    y = net(inputs(6).requires_grad_())
    net.layers[0].merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(y).backward()


def parametrized() -> LoTRLinear:
    layer = Net("linear").layers[0]
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def wrapped_linear(hooked: bool) -> LoTRWrapped:
    """Returns a wrapped nn.Linear. With a hook, its output is not a product with its weight."""
    layer = LoTRWrapped.from_linear(nn.Linear(K, K), LoTRFactors(K, K, 2))
    nn.init.normal_(layer.core)
    if hooked:
        layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


NOT_A_PRODUCT = {
    "a parametrized weight": (parametrized, "a weight that is a parameter"),
    "a base with a custom forward": (lambda: Net("wrapped").layers[0], ""),
    "a base with a hook": (lambda: wrapped_linear(hooked=True), "a base that returns"),
}


@pytest.mark.parametrize("case", NOT_A_PRODUCT)
def test_only_a_product_with_a_parameter_is_merged_into(case: str) -> None:
    make, message = NOT_A_PRODUCT[case]
    with pytest.raises(TypeError, match=f"merge: expected {message}"):
        make().merge()


def test_a_wrapped_linear_layer_is_merged_into() -> None:
    layer = wrapped_linear(hooked=False)
    x = inputs(6).float()
    expected = layer(x)
    layer.merge()
    assert relative(layer(x), expected) < 1e-5
