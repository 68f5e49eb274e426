"""PEFT with one A a width in and one B a width out (group_by="width")."""

from __future__ import annotations

from pathlib import Path

import torch
from peft_toys import base, gradients, peft, plain, trained, tuned
from toys import IDS

from nets import OpCounter

SETTINGS = {"target_modules": ["q", "k", "up", "down"], "group_by": "width"}


def test_gradients_are_those_of_plain_torch_and_siblings_share_u(monkeypatch, two_nodes) -> None:
    model = tuned(**SETTINGS)
    truth = plain(model, ["default"])
    assert set(model.base_model.lotr_factors["default"]) == {"A_16", "A_32", "B_16", "B_32"}
    counter = OpCounter(monkeypatch)
    assert (model(IDS) - truth(IDS)).abs().max() < 1e-5
    assert counter["shrink"] == 2 * 3 and counter["fold"] == 2  # a block: q and k, up, down; B of 16 and of 32
    ours, theirs = gradients(model), gradients(truth)
    assert ours.keys() == theirs.keys() and len(ours) == len(trained(model))
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    model = tuned(**SETTINGS)
    want = model(IDS).detach()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(loaded(IDS), want)
    assert (loaded.merge_and_unload()(IDS) - want).abs().max() < 1e-5
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(IDS), base()(IDS))
