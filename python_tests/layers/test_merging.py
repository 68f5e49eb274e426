"""Merging as autograd, reparametrisations and training see it: a changed weight is noticed, no adapter is lost unsaid."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from toys import REPARAMETRISED, no_warnings

from lotr_ext import LoTRFactors, LoTRLinear, adapt


def conv1d(k: int, n: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)


def layer_of(base: nn.Module | None = None) -> LoTRLinear:
    layer = adapt(base or nn.Linear(20, 14), LoTRFactors(20, 14, 3))
    nn.init.normal_(layer.core)
    return layer


# ---- between a forward and its backward ------------------------------------------------------------------------------


def change(layer: LoTRLinear, how: str) -> None:
    if how == "merge":
        layer.merge()
    else:
        layer.unmerge()


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("how", ["merge", "unmerge"])
def test_a_weight_changed_before_backward_raises(how, base, tokens, either_path):
    layer = layer_of(conv1d(20, 14) if base == "conv1d" else None)
    sibling = layer_of() if base == "linear" else None
    if sibling is not None:  # two layers of a group, so that both kinds of nodes run
        layer = LoTRLinear.from_linear(layer.to_base(), sibling.factors)
        nn.init.normal_(layer.core)
    if how == "unmerge":
        layer.merge()
    x = torch.randn(tokens, 20, requires_grad=True)
    y = layer(x)
    change(layer, how)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_made_in_inference_mode_can_be_merged():
    with torch.inference_mode():
        base = nn.Linear(20, 14)
    layer = layer_of(base)
    bits, want = base.weight.clone(), layer.weight + layer.delta_weight()
    with torch.no_grad():
        x = torch.randn(3, 20)
        before = layer(x)
    layer.merge()
    assert torch.equal(layer.weight, want)
    layer.unmerge()
    with torch.no_grad():
        assert torch.equal(layer.weight, bits) and torch.equal(layer(x), before)


def test_a_layer_is_merged_in_inference_mode_and_unmerged_outside():
    layer = layer_of()
    bits = layer.weight.clone()
    with torch.inference_mode():
        layer.merge()
    x = torch.randn(3, 20, requires_grad=True)
    layer.unmerge()
    layer(x).sum().backward()
    assert torch.equal(layer.weight, bits) and layer.core.grad is not None


# ---- a weight that something else computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_weight_reparametrised_after_adapting_is_refused_by_name(kind):
    layer = layer_of()
    REPARAMETRISED[kind](layer)
    x = torch.randn(3, 20)
    layer(x)
    layer.eval()
    before, state = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(TypeError, match=r"merge: expected a weight that is a parameter, got .*reparametrisation"):
        layer.merge()
    assert not layer.merged and torch.equal(layer(x), before)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    with pytest.raises(TypeError, match="to_base: expected a weight that is a parameter"):
        layer.to_base()


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_layer_reparametrised_while_merged_is_not_unmerged(kind):
    layer = layer_of()
    layer.merge()
    REPARAMETRISED[kind](layer)
    with pytest.raises(TypeError, match="unmerge: expected a weight that is a parameter"):
        layer.unmerge()
    assert layer.merged


def test_what_was_reparametrised_merges_once_it_is_a_parameter_again():
    layer = layer_of()
    prune.l1_unstructured(layer, "weight", 0.3)
    x = torch.randn(3, 20)
    before = layer(x)
    prune.remove(layer, "weight")
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_a_pruned_bias_is_no_obstacle_to_merging_and_is_not_lost():
    layer = layer_of()
    prune.l1_unstructured(layer, "bias", 0.3)
    x = torch.randn(3, 20)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="to_base: expected a bias that is a parameter"):
        layer.to_base()


# ---- training while merged -------------------------------------------------------------------------------------------


def test_a_forward_with_gradients_while_merged_warns_once_a_merge():
    layer, x = layer_of(), torch.randn(3, 20)
    with no_warnings():
        layer(x)
        layer.merge()
        with torch.no_grad():
            layer(x)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"merged.*is not trained.*unmerge"):
            layer(x)
        with no_warnings():
            layer(x)
        layer.unmerge()
        layer.merge()


def test_a_frozen_adapter_that_is_merged_warns_of_nothing():
    layer = layer_of().requires_grad_(False)
    layer.merge()
    with no_warnings():
        layer(torch.randn(3, 20, requires_grad=True))
        nn.Sequential(layer, nn.Linear(14, 2))(torch.randn(3, 20))


def test_a_merged_layer_still_compiles_whole():
    layer, x = layer_of(), torch.randn(3, 20)
    layer.merge()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        want = layer(x)
    torch.testing.assert_close(compiled(x), want)
