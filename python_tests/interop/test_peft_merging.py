"""Merging by PEFT as autograd, reparametrisations and training see it; what PEFT's own tests do not ask for."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft_toys import base, config, peft, randomize
from torch import nn
from torch.nn.utils import parametrizations, prune
from toys import IDS, assert_unchanged, no_warnings, snapshot

REPARAMETRISED = {
    "old weight_norm": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


def adapted(**settings) -> nn.Module:
    model = peft.get_peft_model(base(), config(**settings))
    randomize(model)
    return model


@pytest.mark.parametrize("how", ["merge", "unmerge"])
def test_a_weight_changed_before_backward_raises(how, either_path):
    model = adapted(modules_to_save=["embed"])
    if how == "unmerge":
        model.merge_adapter()
    y = model(IDS)
    model.merge_adapter() if how == "merge" else model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_reparametrised_base_is_refused_by_name_and_nothing_is_changed(how, kind):
    model = adapted().eval()
    second = [name for name, m in model.base_model.model.named_modules() if hasattr(m, "lotr_adapter")][1]
    REPARAMETRISED[kind](model.base_model.model.get_submodule(second).base_layer)
    before, y = snapshot(model), model(IDS)
    with pytest.raises(TypeError, match=rf"merge: expected .*{second}"):
        getattr(model, how)()
    assert_unchanged(model, before)
    assert torch.equal(model(IDS), y)


def test_training_while_merged_warns_once():
    model = adapted(modules_to_save=["head"])
    model.merge_adapter()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model(IDS).sum().backward()
    assert ["not trained" in str(w.message) for w in found] == [True]
    model.unmerge_adapter()
    with no_warnings():
        model(IDS).sum().backward()
