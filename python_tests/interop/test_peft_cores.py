"""PEFT with cores that are made of fewer numbers (LoTRPeftConfig.core), and with one A a width in and one B a width out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_toys import FEWER_NUMBERS, base, close, config, loaded, peft, randomize, trained, tuned
from torch import nn
from toys import IDS, refused

from lotr_ext import LoTRConfig, apply_lotr, cores, load_adapter, save_adapter
from nets import OpCounter


def in_another_order(model: nn.Module) -> nn.Module:
    """The model with the children of its blocks defined in the opposite order."""
    for block in model.blocks:
        block._modules = dict(reversed(block._modules.items()))
    return model


def test_by_width_siblings_share_u(monkeypatch, two_nodes) -> None:
    model = tuned(**FEWER_NUMBERS[-1])
    assert set(model.base_model.lotr_factors["default"]) == {"A_16", "A_32", "B_16", "B_32"}
    counter = OpCounter(monkeypatch)
    model(IDS)
    assert counter["shrink"] == 2 * 3 and counter["fold"] == 2  # a block: q and k, up, down; B of 16 and of 32


@pytest.mark.parametrize("settings", FEWER_NUMBERS, ids=str)
def test_saved_loaded_merged_switched_and_deleted(settings: dict, tmp_path: Path) -> None:
    model = tuned(**settings)
    want = model(IDS).detach()
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(again(IDS), want) and not any("default" in key for key in peft.get_peft_model_state_dict(again))
    assert close(again.merge_and_unload()(IDS), want)
    model.add_adapter("other", config(**settings))
    randomize(model, "other")
    model.set_adapter("other")
    assert {name for name in trained(model) if "default" in name} == set() and not torch.equal(model(IDS), want)
    model.set_adapter("default")
    assert torch.equal(model(IDS), want)
    model.delete_adapter("other")
    assert list(model.base_model.lotr_cores) == ["default"] * ("core" in settings) and torch.equal(model(IDS), want)


@pytest.mark.parametrize("core", cores.FORMS)
def test_loaded_onto_a_model_that_defines_its_layers_in_another_order(core: str, tmp_path: Path) -> None:
    model = tuned(core=core, target_modules=["q", "k", "up"])
    want = model(IDS).detach()
    model.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(in_another_order(base()), tmp_path / "peft").eval()
    assert close(again(IDS), want)
    again.save_pretrained(tmp_path / "again")
    for folder in ("peft", "again"):
        assert close(loaded(tmp_path / folder)(IDS), want)
        save_adapter(load_adapter(in_another_order(base()), tmp_path / folder), tmp_path / "lotr")
        onto_adapted = apply_lotr(base(), LoTRConfig(rank=4, core=core, target_modules=["q", "k", "up"]))
        for plain in (base(), in_another_order(base()), onto_adapted):
            assert close(load_adapter(plain, tmp_path / "lotr").eval()(IDS), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [*FEWER_NUMBERS, {"magnitude": True}], ids=str)
def test_loaded_with_low_cpu_mem_usage(settings: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tuned(**settings)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base().to(dtype), tmp_path, low_cpu_mem_usage=True).eval()
    want, got = (peft.get_peft_model_state_dict(one) for one in (model, again))
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())  # of float32, over a base of any dtype
    assert dtype != torch.float32 or torch.equal(again(IDS), model(IDS))


def test_half_precision_gets_float32_cores() -> None:
    model = peft.get_peft_model(base().bfloat16(), config(core="train", target_modules=["q", "k", "up"]))
    assert {p.dtype for n, p in model.named_parameters() if "lotr_" in n} == {torch.float32}
    assert model.base_model.model.blocks[0].q.lotr_adapter["default"].core.dtype == torch.float32


def test_what_cannot_be_saved_or_made_is_refused() -> None:
    for core, message in (
        (cores.TrainCores, "which cannot be saved"),
        ("custom", "which cannot be saved"),
        ("tuck", "core: exp"),
    ):
        with pytest.raises(ValueError, match=message):
            config(core=core)
    model = base()
    with refused(model, ValueError, match="rank: expected one rank for CPCores"):
        peft.get_peft_model(model, config(core="cp", rank=(2, 3), target_modules=["q"]))
