"""What LoTR as a PEFT method refuses: packages, configurations and models."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from peft_toys import ConvToy, config, ours, peft, tuned, with_two
from torch import nn
from toys import IDS, assert_unchanged, refused, snapshot, toy

from lotr_ext import apply_lotr
from lotr_ext.model.config import LoTRConfig


@pytest.mark.parametrize("version", ["0.14.0", "0.20.9", "unknown"])
def test_a_peft_too_old_is_named(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    want = f"expected PEFT {ours.MINIMUM_PEFT[0]}.{ours.MINIMUM_PEFT[1]} or later, got {version}"
    with pytest.raises(ImportError, match=re.escape(want)):
        ours._check_version()


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"expected PEFT 0.21 or later, got none that can be imported"):
        ours._check_version()


def test_another_method_of_that_name_is_not_overwritten(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "LOTR", peft.LoraConfig)
    with pytest.raises(RuntimeError, match=r"expected PEFT without a method LOTR, got one by peft\.tuners\.lora"):
        ours._register()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"rank": 0}, ValueError, "rank: expected at least 1"),
        ({"rank": 2.5}, TypeError, "rank: expected an int"),
        ({"init": "svd"}, ValueError, "init: expected one that does not change the base weights"),
        ({"init": "zeros"}, ValueError, "init: expected one of"),
        ({"alpha": 2, "scaling": 1.0}, ValueError, "scaling: expected it alone"),
        ({"dropout": 1.0}, ValueError, "dropout: expected a number"),
        ({"train": []}, ValueError, "train: expected at least one"),
        ({"bias": "lora_only"}, ValueError, "bias: expected one of none, all, lotr_only"),
        ({"group_by": lambda name, module: "g"}, ValueError, "group_by: expected .* got a callable"),
        ({"target_modules": "q", "layers_to_transform": [0]}, ValueError, "layers_to_transform: expected None"),
        ({"layers_pattern": "blocks"}, ValueError, "layers_pattern: expected it with layers_to_transform"),
        ({"task_type": "NONSENSE"}, ValueError, "Invalid task type"),
    ],
)
def test_configurations_that_cannot_be(settings, kind, message):
    with pytest.raises(kind, match=message):
        config(**settings)


def tied() -> nn.Module:
    net = toy()
    net.blocks[1].q.weight = net.blocks[0].q.weight
    return net


def in_two_places() -> nn.Module:
    net = toy()
    net.blocks[1].q = net.blocks[0].q
    return net


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)


@pytest.mark.parametrize(
    ("make", "settings", "kind", "message"),
    [
        (toy, {"target_modules": ["norm"]}, TypeError, r"expected nn.Linear, .* got 'blocks.0.norm' \(LayerNorm\)"),
        (toy, {"target_modules": ["embed"]}, TypeError, r"got 'embed' \(Embedding\)"),
        (toy, {"target_modules": ["query"]}, ValueError, "not found in the base model"),
        (toy, {"target_modules": None}, ValueError, "Please specify `target_modules`"),
        (tied, {}, ValueError, "expected layers with a weight of their own, got 'blocks.0.q', tied to blocks.1.q.weight"),
        (in_two_places, {}, ValueError, "expected layers in one place each, got one at blocks.0.q, blocks.1.q"),
        (Attention, {"target_modules": ["out_proj"]}, ValueError, "MultiheadAttention reads without calling it"),
        (
            toy,
            {"target_modules": ["q", "up"], "group_by": {f"blocks.{i}.{n}": "one" for i in (0, 1) for n in ("q", "up")}},
            ValueError,
            "group_by: expected layers of one shape in group 'one'",
        ),
        (toy, {"group_by": {"blocks.0.q": "g"}}, ValueError, "expected a group for each adapted layer, got none for"),
        (
            lambda: apply_lotr(toy(), LoTRConfig(rank=2, target_modules=["k"])),
            {},
            RuntimeError,
            "model: expected one with no adapter",
        ),
        (
            lambda: peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=["q"])).base_model.model,
            {},
            TypeError,
            "expected layers without adapters of other methods, got 'blocks.0.q'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a")
def test_models_that_cannot_be_adapted_stay_as_they_are(make, settings, kind, message):
    model = make()
    with refused(model, kind, match=message):
        peft.get_peft_model(model, config(**settings))


def test_a_second_adapter_that_is_refused_leaves_the_first():
    model = tuned()
    y = model(IDS)
    before = snapshot(model)
    for settings, kind in (({"target_modules": ["norm"]}, TypeError), ({"target_modules": ["none"]}, ValueError)):
        with pytest.raises(kind):
            model.add_adapter("bad", config(**settings))
    for name in ("q", "16x32"):  # parts of the names of its tensors: PEFT would leave them out of a saved "default"
        with pytest.raises(
            ValueError, match=f"adapter_name: expected a name that no adapted module or group has, got '{name}'"
        ):
            model.add_adapter(name, config(target_modules=["q", "up"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("bad", peft.LoraConfig(target_modules=["q"]))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"] and torch.equal(model(IDS), y)


@pytest.mark.parametrize("first", [True, False])
def test_an_injection_that_fails_half_way_is_taken_back(first, monkeypatch):
    model = toy() if first else tuned()
    before = snapshot(model)
    add, calls = ours.LoTRPeftLinear.add, []

    def fails(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        add(self, *args)

    monkeypatch.setattr(ours.LoTRPeftLinear, "add", fails)
    with pytest.raises(MemoryError):
        both = config(target_modules=["q", "up"])
        peft.get_peft_model(model, both) if first else model.add_adapter("bad", both)
    assert_unchanged(model, before)


def test_loading_on_a_model_of_other_sizes(tmp_path):
    tuned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the model's 6 LoTR tensors, got .* missing .*24x24\.A"):
        peft.PeftModel.from_pretrained(toy(d=24), tmp_path)
    with pytest.raises(ValueError, match=r"not found in the base model"):
        peft.PeftModel.from_pretrained(ConvToy(), tmp_path)
    with pytest.raises(ValueError, match=r"expected the model's 8 LoTR tensors, got 6"):
        peft.PeftModel.from_pretrained(toy(layers=3), tmp_path)


def test_what_lora_has_and_lotr_has_not():
    model = with_two()
    for argument, call in (  # of adapters with factors of their own; over the same factors: test_peft_shared.py
        ("adapter_names", lambda: model(ids=IDS, adapter_names=["default", "other"] * 2)),
        ("adapters", lambda: model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")),
    ):
        with pytest.raises(ValueError, match=f"{argument}: expected adapters over the same factors"):
            call()
    with pytest.raises(ValueError, match=r"does not support PeftType\.LOTR because it uses shared state"):
        peft.inject_adapter_in_model(config(), toy())
    with pytest.raises(ValueError, match="LOTR"):
        peft.get_peft_model(toy(), config(), mixed=True)
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="unknown"):
            call("unknown")
