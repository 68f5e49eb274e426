"""An adapter's file identifies the base weights: others are warned of, the same are not, whatever holds them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import adapted, no_warnings, toy

from lotr_ext import LoTRConfig, add_adapter, apply_lotr, load_adapter, merge, save_adapter

OTHER = "the adapter was trained on other base weights than those of 'blocks.0.q'"


def file(folder: Path) -> Path:
    return folder / "lotr_adapter.json"


def test_another_base_is_warned_of_once(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    for model in (toy(seed=1), adapted(seed=1)):
        with pytest.warns(UserWarning, match=OTHER) as caught:
            load_adapter(model, tmp_path)
        assert len(caught) == 1
    one = toy()
    with torch.no_grad():
        one.blocks[1].v.weight.mul_(1.01)  # the last adapted layer alone
    with pytest.warns(UserWarning, match="other base weights than those of 'blocks.1.v'"):
        load_adapter(one, tmp_path)
    two = add_adapter(adapted(seed=1), "two")
    with pytest.warns(UserWarning, match=OTHER):
        load_adapter(two, tmp_path, name="two")


def hooked(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.q.register_forward_hook(lambda module, args, y: None)
    return model


def merged_in_place(model: nn.Module) -> nn.Module:
    return merge(model)


def merged_without_backup(model: nn.Module) -> nn.Module:
    return merge(model, keep_backup=False)


def trained_on(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    return model


@pytest.mark.parametrize("change", [copy.deepcopy, merged_in_place, merged_without_backup, trained_on, nn.Module.half])
def test_the_same_base_is_not_warned_of(change, tmp_path: Path) -> None:
    save_adapter(change(adapted()), tmp_path)
    cast = change is nn.Module.half  # whose weights are not compared
    assert (len(json.loads(file(tmp_path).read_text())["base_weights"]) == 0) == (change is merged_without_backup)
    with no_warnings():
        for model in (toy(), adapted(), hooked(toy()), toy().to(torch.bfloat16)):
            load_adapter(model, tmp_path, cast=cast)
        load_adapter(load_adapter(toy(), tmp_path, cast=cast), tmp_path, cast=cast)


def test_conv1d_merged_and_not_is_the_same_base(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(conv1d(8, 8), conv1d(12, 8))

    config = LoTRConfig(rank=2)
    for state in (lambda m: m, merge):
        model = apply_lotr(make(), config)
        nn.init.normal_(model[0].core)
        save_adapter(state(model), tmp_path)
        assert len(json.loads(file(tmp_path).read_text())["base_weights"]) == 2
        with no_warnings():
            load_adapter(make(), tmp_path)


def test_a_start_by_svd_which_changes_the_weights_is_no_other_base(tmp_path: Path) -> None:
    save_adapter(adapted(init="svd", random=False), tmp_path)
    with no_warnings():
        load_adapter(toy(), tmp_path)
        load_adapter(load_adapter(toy(), tmp_path), tmp_path)


def test_a_file_without_a_fingerprint_loads_and_one_with_nonsense_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    content = json.loads(file(tmp_path).read_text())
    del content["base_weights"]
    file(tmp_path).write_text(json.dumps(content))
    with no_warnings():
        load_adapter(toy(seed=1), tmp_path)
    for wrong in ([], {"blocks.0.q": 1}):
        file(tmp_path).write_text(json.dumps(content | {"base_weights": wrong}))
        with pytest.raises(ValueError, match=r"expected '?base_weights'? to be"):
            load_adapter(toy(), tmp_path)
    file(tmp_path).write_text(json.dumps(content | {"base_weights": {"nowhere": "float32:00", "blocks.0.q": ""}}))
    load_adapter(toy(), tmp_path)
