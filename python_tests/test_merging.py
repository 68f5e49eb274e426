"""Scalings, wrapping and merging of layers."""

from collections.abc import Callable

import pytest
import torch
from helpers import HALVES, copy64, relative
from layers import SCALING, K, Net, inputs, loss
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped, adapt
from lotr_ext.factors import scaling_of

# "auto" is 4 (8 / r)^1.5 / 0.4^3, where r is the larger rank (lotr_ext.factors.scaling_of).
SCALINGS = [
    ({"rank": 4, "alpha": 8.0}, 2.0),
    ({"rank": (2, 4), "alpha": 8}, 2.0),
    ({"rank": 4, "alpha": 8.0, "rslora": True}, 4.0),
    ({"rank": 4, "rslora": True}, 2.0),
    ({"rank": 4, "scaling": 0.3}, 0.3),
    ({"rank": 8}, 4 / 0.4**3),
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
def test_merge_rounds_once_and_unmerge_restores_the_bits(kind: str, dtype: torch.dtype) -> None:
    layer = Net(kind, dtype).layers[0]
    before = layer.weight.detach().clone()
    A, B, core = map(copy64, (layer.factors.A.value, layer.factors.B.value, layer.core))
    exact = copy64(layer.weight_matrix()) + SCALING * B @ core.T @ A.T
    layer.merge()
    slack = {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, 0.0)  # the error of delta
    bound = 0.5001 * torch.finfo(dtype).eps * exact.abs() + slack
    assert bool(((copy64(layer.weight_matrix()) - exact).abs() <= bound).all())
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_plain_layers_share_no_tensor_and_keep_the_mode(
    kind: str, training: bool, merged: bool
) -> None:
    layer = Net(kind).layers[0].train(training)
    x = inputs(6)
    y = layer(x)
    if merged:
        layer.merge()
    plain = layer.to_linear()
    assert relative(plain(x), y) < 1e-12
    plain.reset_parameters()
    assert relative(layer(x), y) < 1e-12
    assert plain.training is layer.to_base().training is training


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_hook_of_a_factor_runs_before_it_is_read(side: str) -> None:
    """Sharded training gathers a factor in such a hook."""
    layer = Net("linear").layers[0]
    factor = getattr(layer.factors, side)

    def zero(*_: object) -> None:
        nn.init.zeros_(factor.value)

    factor.register_forward_pre_hook(zero)
    assert torch.equal(layer(inputs(6)), layer.compute_base(inputs(6)))


def test_from_linear_keeps_the_modes_inside_of_the_base() -> None:
    base = nn.Linear(K, K)
    base.inner = nn.Dropout().eval()
    LoTRWrapped.from_linear(base, LoTRFactors(K, K, 2))
    assert [module.training for module in base.modules()] == [True, False]


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
        lambda linear, _: register_parametrization(linear, "bias", nn.Tanh()),
    ],
)
def test_a_layer_with_hooks_or_a_computed_bias_is_wrapped(register: Callable) -> None:
    linear = nn.Linear(K, K)
    register(linear, lambda *_: None)
    assert type(adapt(linear, LoTRFactors(K, K, 2))) is LoTRWrapped


def test_a_merge_between_forward_and_backward_is_refused(form: str) -> None:
    net = Net("linear")
    y = net(inputs(6).requires_grad_())
    net.layers[0].merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(y).backward()


def hooked(factor: float, first_weight: float = 0.5) -> LoTRWrapped:
    """Returns a wrapped nn.Linear with a hook that multiplies its output."""
    layer = LoTRWrapped.from_linear(nn.Linear(K, K), LoTRFactors(K, K, 2))
    layer.base_layer.weight.data[0, 0] = first_weight
    nn.init.normal_(layer.core)
    layer.base_layer.register_forward_hook(lambda module, args, y: factor * y)
    return layer


NOT_A_PRODUCT = {
    "a parametrized weight": (
        lambda: register_parametrization(Net("linear").layers[0], "weight", nn.Tanh()),
        "a weight that is a parameter",
    ),
    "a base with a custom forward": (lambda: Net("wrapped").layers[0], "a base that returns"),
    "a base with a hook": (lambda: hooked(2.0), "a base that returns"),
    "with NaN in the weight": (lambda: hooked(2.0, torch.nan), "a base that returns"),
    "with infinity in the weight": (lambda: hooked(2.0, torch.inf), "a base that returns"),
}


@pytest.mark.parametrize(("make", "message"), NOT_A_PRODUCT.values(), ids=NOT_A_PRODUCT)
def test_only_a_product_with_a_parameter_is_merged_into(
    make: Callable[[], LoTRLinear], message: str
) -> None:
    with pytest.raises(TypeError, match=f"merge: expected {message}"):
        make().merge()


# The first column of the output is not finite if the first weight is not.
@pytest.mark.parametrize(
    ("first_weight", "first_column"), [(0.5, 0), (torch.nan, 1), (torch.inf, 1)]
)
def test_a_base_with_a_hook_that_changes_nothing_is_merged_into(
    first_weight: float, first_column: int
) -> None:
    layer = hooked(1.0, first_weight)
    x = inputs(6).float()
    expected = layer(x)
    layer.merge()
    assert relative(layer(x)[:, first_column:], expected[:, first_column:]) < 1e-5
