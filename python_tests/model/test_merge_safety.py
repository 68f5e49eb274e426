"""merge, unmerge and unload of whole models: autograd sees them, all or nothing changes, no adapter is lost unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import IDS, REPARAMETRISED, adapted, assert_unchanged, no_warnings, snapshot

from lotr_ext import LoTRLinear, add_adapter, merge, save_adapter, set_adapter, unload, unmerge
from lotr_ext.layers import merging
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.loading import load_adapter


def modules(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


# ---- between a forward and its backward ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["merge", "unmerge", "unload", "unload of a start", "load of a start"])
def test_a_change_of_the_weights_before_backward_raises(how, tmp_path, either_path):
    model = adapted(**({"init": "svd"} if "start" in how else {}), modules_to_save=["embed"])
    if "load of" in how:
        save_adapter(adapted(init="svd", seed=1, modules_to_save=["embed"]), tmp_path)
    if how == "unmerge":
        merge(model)
    y = model(IDS)
    if how == "merge":
        merge(model)
    elif how == "unmerge":
        unmerge(model)
    elif how == "load of a start":
        weight = adapted_layers(model)["blocks.1.v"].weight
        version = weight._version
        load_adapter(model, tmp_path)
        assert weight._version > version
    else:
        unload(model, merge=how == "unload")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_another_adapters_head_before_backward_raises():
    model = adapted(modules_to_save=["head"])
    add_adapter(model, "other")
    x = torch.randn(3, 16, requires_grad=True)
    y = model.head(x)
    set_adapter(model, "other")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_leaves_the_weights_alone_leaves_the_backward_alone():
    model = adapted(modules_to_save=["embed"])
    model(IDS).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = model(IDS)
    unload(model, merge=False)
    y.sum().backward()
    got = dict(model.named_parameters())
    assert all(torch.equal(got[name].grad, grad) for name, grad in want.items() if name in got)


# ---- all or nothing --------------------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], write: int) -> None:
    """call, with Ctrl-C during that write of a weight: Python raises it when the copy has ended."""
    written, written_by = [], merging.write_

    def stopped(target: Tensor, value: Tensor) -> None:
        written_by(target, value)
        written.append(target)
        if len(written) == write:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(merging, "write_", stopped)
        call()


@pytest.mark.parametrize("write", [1, 3])
def test_an_interrupted_merge_merges_nothing(write: int, monkeypatch) -> None:
    model = adapted()
    before = snapshot(model)
    interrupted(monkeypatch, lambda: merge(model), write)
    assert_unchanged(model, before)
    assert not any(layer.merged or layer.weight_backup is not None for layer in adapted_layers(model).values())


@pytest.mark.parametrize("keep_backup", [True, False])
def test_an_interrupted_unmerge_is_finished_by_another(keep_backup: bool, monkeypatch) -> None:
    model = adapted()
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model, keep_backup=keep_backup)
    interrupted(monkeypatch, lambda: unmerge(model), 3)
    unmerge(model)
    got = model.state_dict()
    assert all(torch.allclose(got[name], tensor, rtol=0, atol=1e-6 * (not keep_backup)) for name, tensor in want.items())


@pytest.mark.parametrize("kind", [*REPARAMETRISED, "pruned bias"])
@pytest.mark.parametrize("how", ["merge", "unload, merged", "unload"])
def test_a_reparametrised_layer_is_refused_by_name_before_anything_changes(how, kind):
    model = adapted().eval()
    second = list(adapted_layers(model))[1]
    layer = model.get_submodule(second)
    prune.random_unstructured(layer, "bias", 0.5) if kind == "pruned bias" else REPARAMETRISED[kind](layer)
    before, places, y = snapshot(model), modules(model), model(IDS)
    if how == "merge" and kind == "pruned bias":
        merge(model)
        torch.testing.assert_close(model(IDS), y)
        return
    with pytest.raises(TypeError, match=rf"expected a (weight|bias) that is a parameter, got '{second}\.(weight|bias)'"):
        merge(model) if how == "merge" else unload(model, merge="merged" in how)
    assert_unchanged(model, before)
    assert modules(model) == places and torch.equal(model(IDS), y)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_a_layer_reparametrised_while_merged_keeps_the_model_merged():
    model = adapted().eval()
    merge(model)
    prune.random_unstructured(model.blocks[0].v, "weight", 0.5)
    before = model.blocks[0].q.weight.clone()
    for undo in (unmerge, lambda m: unload(m, merge=False)):
        with pytest.raises(TypeError, match=r"expected a weight that is a parameter, got 'blocks.0.v.weight'"):
            undo(model)
        assert all(layer.merged for layer in adapted_layers(model).values())
        assert torch.equal(model.blocks[0].q.weight, before)


def test_unload_that_fails_in_the_middle_takes_the_merges_back(monkeypatch):
    """As where memory runs out at a later layer."""
    model = adapted().eval()
    before, places, y = snapshot(model), modules(model), model(IDS)
    real, calls = LoTRLinear.merge, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        real(self, *args, **kwargs)

    monkeypatch.setattr(LoTRLinear, "merge", failing)
    with pytest.raises(MemoryError):
        unload(model, merge=True)
    assert modules(model) == places
    torch.testing.assert_close({k: t.detach() for k, t in model.state_dict().items()}, before["tensors"])
    torch.testing.assert_close(model(IDS), y)
    unload(model, merge=False)


# ---- training while merged -------------------------------------------------------------------------------------------


def test_training_while_merged_warns_once_for_the_whole_model():
    model = adapted(modules_to_save=["head"], target_modules=["q", "v", "up"])
    merge(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model(IDS).sum().backward()
    assert [str(w.message)[:8] for w in found] == ["lotr_ext"] and "not trained" in str(found[0].message)
    assert model.head.weight.grad is not None


def test_predicting_while_merged_warns_of_nothing():
    model = adapted(modules_to_save=["head"])
    merge(model)
    with no_warnings():
        with torch.no_grad():
            model(IDS)
        unload(model, merge=True)
        model(IDS).sum().backward()
    assert isinstance(model.head.weight.grad, Tensor)
