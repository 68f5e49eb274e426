"""Adapters across the two formats: load_adapter and convert read what PEFT saves, and PEFT what convert makes of a folder of
save_adapter. Each model is compared with the one that was saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mixtures
import peft
import pytest
import torch
from toys import IDS, Toy, randomize, refused, toy

from lotr_ext import LoTRConfig, apply_lotr, convert, load_adapter, save_adapter
from lotr_ext.interop import export_lora, lotr_to_lora, lotr_to_peft
from lotr_ext.interop.peft import LoTRPeftConfig
from lotr_ext.layers.cores import FORMS

KINDS = {
    "by shape": {"target_modules": ["q", "v", "up"]},
    "by name": {"group_by": "name"},
    "by block": {"group_by": "block", "target_modules": ["q", "v", "up"]},
    "by width": {"group_by": "width", "target_modules": ["q", "up", "down"]},
    "a pair of ranks": {"rank": (2, 3), "alpha": 6.0, "rslora": True},
    "a head": {"modules_to_save": ["head"], "scaling": 0.7, "dropout": 0.1},
    "a scaling that follows the rank": {"scaling": "auto"},
    **{core: {"core": core, "target_modules": ["q", "down"] if core != "dense" else ["q"]} for core in FORMS},
}
EACH = pytest.mark.parametrize("kind", KINDS)


def base() -> Toy:
    """11 layers: by name the tenth comes before the second."""
    return toy(layers=11)


def settings(kind: str) -> dict:
    return {"rank": 3, "target_modules": ["q", "v"], **KINDS[kind]}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "head" in name:
                parameter.normal_()
    return model.eval()


def by_peft(kind: str) -> peft.PeftModel:
    model = randomized(peft.get_peft_model(base(), LoTRPeftConfig(**settings(kind))))
    assert not torch.allclose(model(IDS), base()(IDS), atol=1e-3)
    return model


def assert_same(got: torch.nn.Module, want: torch.nn.Module) -> None:
    torch.testing.assert_close(got.eval()(IDS), want(IDS), rtol=1e-4, atol=1e-5)


@EACH
def test_load_adapter_reads_what_peft_saved(tmp_path: Path, kind: str) -> None:
    want = by_peft(kind)
    want.save_pretrained(tmp_path)
    onto_plain = load_adapter(base(), tmp_path)
    assert_same(onto_plain, want)
    onto_adapted = apply_lotr(base(), LoTRConfig(**settings(kind)))
    assert_same(load_adapter(onto_adapted, tmp_path), want)
    save_adapter(onto_plain, tmp_path / "again")
    assert_same(load_adapter(base(), tmp_path / "again"), want)


@EACH
def test_lotr_to_lora_reads_what_peft_saved(tmp_path: Path, kind: str) -> None:
    want = by_peft(kind)
    want.save_pretrained(tmp_path / "lotr")
    lotr_to_lora(tmp_path / "lotr", tmp_path / "lora")
    assert_same(peft.PeftModel.from_pretrained(base(), tmp_path / "lora"), want)


@EACH
def test_peft_reads_what_lotr_to_peft_makes(tmp_path: Path, kind: str) -> None:
    want = randomized(apply_lotr(base(), LoTRConfig(**settings(kind))))
    save_adapter(want, tmp_path / "lotr")
    assert convert.main(["lotr-to-peft", str(tmp_path / "lotr"), str(tmp_path / "peft")]) == 0
    assert_same(peft.PeftModel.from_pretrained(base(), tmp_path / "peft"), want)
    assert_same(load_adapter(base(), tmp_path / "peft"), want)
    trained = peft.PeftModel.from_pretrained(base(), tmp_path / "peft", is_trainable=True)
    trained.save_pretrained(tmp_path / "again")
    assert_same(load_adapter(base(), tmp_path / "again"), want)


def test_peft_names_the_command_for_a_folder_of_save_adapter(tmp_path: Path) -> None:
    save_adapter(apply_lotr(base(), LoTRConfig(**settings("by shape"))), tmp_path)
    model = by_peft("by name")
    for load in (lambda: peft.PeftModel.from_pretrained(base(), tmp_path), lambda: model.load_adapter(tmp_path, "another")):
        with pytest.raises(ValueError, match=r"lotr_ext\.convert lotr-to-peft"):
            load()


def test_load_adapter_names_the_command_for_a_lora(tmp_path: Path) -> None:
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lotr_ext\.convert lora-to-lotr"):
        load_adapter(base(), tmp_path)


def test_get_peft_model_names_its_configuration() -> None:
    with pytest.raises(AttributeError, match=r"expected lotr_ext\.interop\.peft\.LoTRPeftConfig"):
        peft.get_peft_model(base(), LoTRConfig())
    assert not hasattr(LoTRConfig(), "another")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "lotr_only"}, "bias: expected 'none'"),
        ({"layers": None}, "layers: expected the adapted layers, got none"),
        ({"layers": [3]}, "layers: expected the adapted layers"),
        ({"layers": [{"name": "blocks.0.q"}]}, "adapter: expected factors, cores"),
        ({"rank": 2**31 - 1}, r"expected floating values \[16, 2147483647\]"),
        ({"rank": 5}, r"expected floating values \[16, 5\]"),
        ({"core": "tucker"}, "lotr_cores.* got none"),
        ({"modules_to_save": 3}, "modules_to_save: expected"),
        ({"alpha": "x"}, "alpha: expected a number"),
    ],
)
def test_a_folder_of_peft_that_does_not_fit_is_refused(tmp_path: Path, config: dict, message: str) -> None:
    by_peft("by shape").save_pretrained(tmp_path)
    path, model = tmp_path / "adapter_config.json", base()
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with refused(model, ValueError, match=message):
        load_adapter(model, tmp_path)


def test_a_start_in_the_base_weights_is_not_written_for_peft(tmp_path: Path) -> None:
    save_adapter(apply_lotr(base(), LoTRConfig(**settings("by shape"), init="svd")), tmp_path / "lotr")
    with pytest.raises(ValueError, match="svd"):
        lotr_to_peft(tmp_path / "lotr", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_conversion_to_lora_does_not_replace_its_source(tmp_path: Path) -> None:
    by_peft("by shape").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="directory: expected another one than source"):
        lotr_to_lora(tmp_path, tmp_path / ".." / tmp_path.name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_task_type_that_peft_does_not_have_is_not_written(tmp_path: Path) -> None:
    model = apply_lotr(base(), LoTRConfig(rank=3, target_modules=["q"]))
    save_adapter(model, tmp_path / "lotr")
    for write in (export_lora, lambda _, to, **given: lotr_to_lora(tmp_path / "lotr", to, **given),
                  lambda _, to, **given: lotr_to_peft(tmp_path / "lotr", to, **given)):  # fmt: skip
        with pytest.raises(ValueError, match=r"task_type: expected one of SEQ_CLS, .*got 'causal_lm'"):
            write(model, tmp_path / "out", task_type="causal_lm")
        assert not (tmp_path / "out").exists()


def test_scalings_that_differ_are_not_written_for_peft(tmp_path: Path) -> None:
    model = apply_lotr(base(), LoTRConfig(**settings("by shape")))
    model.blocks[0].q.scaling = 3.0
    save_adapter(model, tmp_path / "lotr")
    with pytest.raises(ValueError, match="expected one scaling"):
        lotr_to_peft(tmp_path / "lotr", tmp_path / "peft")


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_go_both_ways(tmp_path: Path, name: str) -> None:
    plain = mixtures.mixture(name)
    settings = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj"], "target_parameters": mixtures.parameters_of(name)}
    theirs = peft.get_peft_model(copy.deepcopy(plain), LoTRPeftConfig(**settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(plain), tmp_path / "theirs").eval()
    save_adapter(ours, tmp_path / "ours")
    lotr_to_peft(tmp_path / "ours", tmp_path / "back")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back").eval()
    with torch.no_grad():
        want = theirs(mixtures.IDS, use_cache=False).logits
        assert not torch.allclose(want, plain.eval()(mixtures.IDS, use_cache=False).logits, atol=1e-3)
        for model in (ours, back):
            torch.testing.assert_close(model(mixtures.IDS, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
