"""What PEFT's generic tests ask of any method, asked of LoTR: saving, loading, several adapters.

Theirs are tests/test_custom_models.py and tests/testing_common.py of huggingface/peft; docs/peft.md lists check by check.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from peft_toys import CASES, base, close, config, layers, loaded, made, peft, plain, randomize, step, trained, tuned, with_two
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from toys import IDS

each_case = pytest.mark.parametrize("case", CASES)


# ---- saving and loading ----------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=["plain", "meta", "train"])
def test_roundtrip(case, settings, tmp_path):
    model = made(case, random=False)
    step(model)
    model.save_pretrained(tmp_path)
    other = loaded(tmp_path, CASES[case][0], **settings)
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert torch.equal(other.eval()(IDS), model(IDS))
    states = [peft.get_peft_model_state_dict(m) for m in (model, other)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert (trained(other) == trained(model)) if "is_trainable" in settings else trained(other) == []
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert other.peft_config["default"].rank == model.peft_config["default"].rank
    given = config(**CASES[case][1])
    assert loaded(tmp_path, CASES[case][0], config=given).peft_config["default"] is given and given.inference_mode
    result = other.load_adapter(tmp_path, "more", low_cpu_mem_usage="low_cpu_mem_usage" in settings)
    other.set_adapter("more")
    assert result.missing_keys == [] and torch.equal(other.eval()(IDS), model(IDS))
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert torch.equal(loaded(tmp_path / "pickle", CASES[case][0])(IDS), model(IDS))


def test_names_of_adapters_that_are_parts_of_others_and_selected_saving(tmp_path):
    model = tuned()
    want = set(peft.get_peft_model_state_dict(model))
    for seed, name in enumerate(("default2", "other_default", "foodefault_bar", "efaul")):
        model.add_adapter(name, config())
        randomize(model, name, seed)
    model.save_pretrained(tmp_path, selected_adapters=["default", "efaul"])
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"efaul"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == want
    assert torch.equal(loaded(tmp_path)(IDS), model(IDS))
    model.set_adapter("efaul")
    assert torch.equal(loaded(tmp_path / "efaul")(IDS), model(IDS))


def test_the_adapters_name_makes_no_difference():
    models = {name: tuned(name=name) for name in ("default", "adapter", "other-name")}
    saved = {name: peft.get_peft_model_state_dict(model, adapter_name=name) for name, model in models.items()}
    for name, model in models.items():
        assert torch.equal(model(IDS), models["default"](IDS)) and saved[name].keys() == saved["default"].keys()
        assert all(torch.equal(value, saved["default"][key]) for key, value in saved[name].items())
        in_model = {key for key in model.state_dict() if "lotr_" in key}
        assert len(in_model) == len(saved[name]) == 6 and all(f".{name}." in key for key in in_model)


def test_the_base_models_state_dict_goes_out_and_in():
    from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

    model, want = made("modules_to_save"), base().state_dict()
    found = get_base_model_state_dict(model)
    assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
    for parameter in model.get_base_model().parameters():
        parameter.data.add_(1.0)
    assert not any(set_base_model_state_dict(model, want, strict=False))
    assert all(torch.equal(v, want[k]) for k, v in get_base_model_state_dict(model).items())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_adapters(dtype, upcast, low_memory, tmp_path):
    def check(model: nn.Module) -> None:
        assert {p.dtype for n, p in model.named_parameters() if "lotr_" in n} == {torch.float32 if upcast else dtype}
        assert model(IDS).isfinite().all()

    model = peft.get_peft_model(base().to(dtype), config(), autocast_adapter_dtype=upcast)
    model.add_adapter("other", config(), autocast_adapter_dtype=upcast)
    randomize(model)
    check(model)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": upcast, "low_cpu_mem_usage": low_memory}
    model = peft.PeftModel.from_pretrained(base().to(dtype), tmp_path, **options)
    model.load_adapter(tmp_path / "other", "other", **options)
    check(model)
    model.merge_adapter(safe_merge=True)
    model(IDS)
    model.unmerge_adapter()
    assert model.merge_and_unload()(IDS).isfinite().all()


@each_case
def test_copies_are_independent(case):
    model = made(case)
    y, copied, restored = model(IDS), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    step(copied)
    step(restored)
    assert torch.equal(model(IDS), y) and not close(copied(IDS), y) and close(copied(IDS), restored(IDS))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in copied.named_parameters()] == names  # A and B are still one pair a group


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_save_pretrained_refuses_a_state_dict_without_frozen_factors(tmp_path: Path) -> None:
    model = tuned(train=["core"])
    state = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(RuntimeError, match=r"state_dict: expected all of the adapter's tensors, got \d+ without .*\.A;"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.glob("adapter_*"))


def test_active_adapters():
    model = with_two()
    truth = {name: plain(model, [name])(IDS).float() for name in ("default", "other")}
    assert model.active_adapters == ["default"] and close(model(IDS), truth["default"])
    model.set_adapter("other")
    assert model.active_adapter == "other" and close(model(IDS), truth["other"])
    assert {tuple(layer.active_adapters) for layer in layers(model)} == {("other",)}
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("other", config())
    model.set_adapter("default")
    assert close(model(IDS), truth["default"])


def test_requires_grad_follows_the_active_adapter():
    model = with_two(modules_to_save=["head"])
    head = {f"base_model.model.head.modules_to_save.default.{p}" for p in ("weight", "bias")}
    own = {name: {n for n, _ in model.named_parameters() if "lotr_" in n and f".{name}." in n} for name in ("default", "other")}
    assert set(trained(model)) == own["default"] | head and len(own["default"]) == 6 and len(own["other"]) == 8
    for name, want in (("other", own["other"]), ("default", own["default"] | head)):
        model.set_adapter(name, inference_mode=True)
        assert trained(model) == []
        model.set_adapter(name)
        assert set(trained(model)) == want
        model.disable_adapter_layers()
        assert trained(model) == []
        model.enable_adapter_layers()
        assert set(trained(model)) == want
    model.set_requires_grad(["default", "other"], False)
    assert trained(model) == []
    model.set_requires_grad("other")
    assert set(trained(model)) == own["other"]


def test_loading_a_second_adapter_leaves_the_firsts_flags(tmp_path):
    tuned().save_pretrained(tmp_path)
    for first in (True, False):
        model = loaded(tmp_path, is_trainable=first)
        before = set(trained(model))
        for second in (False, True):
            model.load_adapter(tmp_path, f"second-{second}", is_trainable=second)
            now = {n for n in trained(model) if ".second-" not in n}
            assert now == before and (any(".second-True." in n for n in trained(model)) == second)
    model = loaded(tmp_path, is_trainable=True)
    model.set_requires_grad("default", False)
    model.add_adapter("new", config())
    assert trained(model) == []


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_deleting_adapters():
    model = tuned()
    for seed, name in enumerate(("other", "third")):
        model.add_adapter(name, config(rank=2 + seed))
        randomize(model, name, seed)
    truth = plain(model, ["other"])(IDS).float()
    model.delete_adapter("third")
    assert model.active_adapters == ["default"] and set(model.peft_config) == {"default", "other"}
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and close(model(IDS), truth)
    assert not any("default" in name for name, _ in model.named_modules())
    assert set(model.base_model.lotr_factors) == {"other"}
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.active_adapters == [] and not model.peft_config
    assert not any("lotr_" in name for name in model.state_dict())
    assert torch.equal(model.unload()(IDS), base()(IDS))


def test_a_merged_adapter_is_not_deleted():
    model = with_two()
    model.merge_adapter()
    with pytest.raises(ValueError, match=re.escape("Cannot delete adapter(s) ['default'] while they are merged")):
        model.delete_adapter("default")
    y = model(IDS)
    model.delete_adapter("other")
    assert torch.equal(model(IDS), y) and set(model.peft_config) == {"default"}
    model.unmerge_adapter()


def test_modules_to_save_of_several_adapters(tmp_path):
    model = tuned(modules_to_save=["head"])
    first = model(IDS)
    model.add_adapter("other", config(modules_to_save=["head"]))
    randomize(model, "other", seed=3)
    model.set_adapter("other")
    second = model(IDS)
    assert not close(first, second)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    assert torch.equal(model(IDS), first)
    with model.disable_adapter():
        assert torch.equal(model(IDS), base()(IDS))
    model.save_pretrained(tmp_path)
    fresh = loaded(tmp_path)
    fresh.load_adapter(tmp_path / "other", "other")
    assert torch.equal(fresh(IDS), first)
    fresh.set_adapter("other")
    assert torch.equal(fresh(IDS), second)


class Tanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


@pytest.mark.parametrize("name", ["default", "core", "parametrizations"])
def test_parametrized_cores_and_factors_go_out_and_in(name: str, tmp_path: Path) -> None:
    def parametrized(name: str, **settings) -> peft.PeftModel:
        model = tuned(name=name, **settings)
        for layer in layers(model):
            parametrize.register_parametrization(layer.lotr_adapter[name], "core", Tanh())
        parametrizations.weight_norm(model.base_model.lotr_factors[name]["16x16"], "A")
        model.set_adapter(name)
        return model

    model = parametrized(name)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 4 + 2 + 1 and all("parametrizations" in n or n.endswith(".B") for n in names)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    other = parametrized("another", random=False)
    other.load_adapter(folder, "another")
    with torch.no_grad():
        assert torch.equal(other(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"missing .*core"):
        peft.PeftModel.from_pretrained(base(), folder)
