"""The files that the vLLM plugin reads. python_tests/serving loads them into an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, vllm
from lotr_ext.adapted import adapted_layers
from lotr_ext.convert import export_lora
from lotr_ext.files import state_of
from lotr_ext.vllm import export_factors, export_task

KEY = "model.layers.0.self_attn.k_proj.core"
Change = Callable[[dict, dict], object]  # of a task's tensors and metadata
CHANGES: dict[str, tuple[Change, str]] = {
    "NaN": (lambda t, m: t[KEY].fill_(torch.nan), f"expected finite values, got others in {KEY}"),
    "another rank": (lambda t, m: t.update({KEY: t[KEY][:-1].clone()}), f"{KEY}: expected"),
    "integers": (lambda t, m: t.update({KEY: t[KEY].int()}), f"{KEY}: expected a floating"),
    "no core": (lambda t, m: t.pop(KEY), f"expected the model's 8, got 7: missing {KEY}"),
    "another layer": (lambda t, m: t.update(other=t[KEY].clone()), "not in the model other"),
    "other factors": (lambda t, m: m.update(factors="0" * 64), "made for other A and B"),
    "another scaling": (lambda t, m: m.update(scaling="3.0"), "expected a task for scaling"),
    "another format": (lambda t, m: m.update(format="pt"), "expected a task's file"),
    "a newer version": (lambda t, m: m.update(version="9"), "expected a task's file"),
}


def adapted(**settings: object) -> nn.Module:
    config = LoTRConfig(
        **{"rank": (2, 3), "group_by": "width", "target_modules": zoo.TARGETS["llama"], **settings}
    )
    return zoo.fill(
        apply_lotr(zoo.net("llama"), config), 7, 0.3, lambda name: name.endswith("core")
    )


@pytest.mark.parametrize(
    ("group_by", "factor_count"),
    [("width", 3), ("layer", 16)],  # A_16, B_16, B_8; a pair for each of eight layers
)
def test_a_task_is_read_over_the_factors_of_its_model(
    group_by: str, factor_count: int, tmp_path: Path
) -> None:
    model = adapted(scaling=2.0, group_by=group_by)
    bank = TaskBank(model, 2)
    task = bank.add(
        {name: torch.randn(core.shape) for name, core in bank.cores_of(bank.add()).items()}
    )
    export_factors(model, tmp_path / "factors")
    export_task(model, tmp_path / "own")
    export_task(model, tmp_path / "task", task=task, base_model="base")
    factors = vllm.read_factors(tmp_path / "factors")
    from_model = vllm.factors_of(state_of(model), "test")
    assert factors.task_format.metadata() == from_model.task_format.metadata()
    assert len(factors.tensors) == factor_count
    for folder, cores in (
        ("own", {f"{n}.core": m.core for n, m in model.named_modules() if hasattr(m, "factors")}),
        ("task", None),
    ):
        vector = vllm.read_task(tmp_path / folder, factors)
        for name, span in factors.spans.items():
            expected = (cores or bank.cores_of(task))[f"{name}.core"]
            assert torch.equal(vector[span].view(factors.core_shape(name)), 2.0 * expected)
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == (
        "LORA",
        3,
        "base",
    )
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("scaling", [2.0, "per layer"])
def test_the_engine_and_a_bank_read_the_same_file(scaling: object, tmp_path: Path) -> None:
    model = adapted(scaling=2.0)
    if scaling == "per layer":
        for i, layer in enumerate(adapted_layers(model).values()):
            layer.scaling = 1.0 + i
    bank = TaskBank(model, 3)
    task = bank.add({name: torch.randn(c.shape) for name, c in bank.cores_of(bank.add()).items()})
    export_task(model, tmp_path / "task", task=task)
    for name, core in bank.cores_of(bank.add(tmp_path / "task" / "lotr_task.safetensors")).items():
        assert torch.equal(core, bank.cores_of(task)[name])
    bank.save(task, tmp_path / "other" / "lotr_task.safetensors")
    factors = vllm.factors_of(state_of(model), "test")
    vector = vllm.read_task(tmp_path / "other", factors)
    assert torch.equal(vector, vllm.read_task(tmp_path / "task", factors))
    for name, layer in adapted_layers(model).items():
        core = layer.scaling * bank.cores_of(task)[f"{name}.core"]
        assert torch.equal(vector[factors.spans[name]].view(core.shape), core)


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_is_no_task_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    model = adapted()
    export_task(model, tmp_path)
    path = tmp_path / "lotr_task.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises((TypeError, ValueError), match=message):
        vllm.read_task(tmp_path, vllm.factors_of(state_of(model), "test"))


def test_a_folder_without_a_task_is_refused(tmp_path: Path) -> None:
    """Such as that of a LoRA, or one whose configuration is truncated as well."""
    model = adapted()
    factors = vllm.factors_of(state_of(model), "test")
    export_lora(model, tmp_path)
    with pytest.raises(ValueError, match="expected a task by export_task, got an adapter of LORA"):
        vllm.read_task(tmp_path, factors)
    config = tmp_path / "adapter_config.json"
    config.write_bytes(config.read_bytes()[:-9])
    with pytest.raises(ValueError, match="adapter: expected a JSON file"):
        vllm.read_task(tmp_path, factors)


def test_a_truncated_task_is_refused(tmp_path: Path) -> None:
    model = adapted()
    export_task(model, tmp_path)
    path = tmp_path / "lotr_task.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="adapter: expected a safetensors file"):
        vllm.read_task(tmp_path, vllm.factors_of(state_of(model), "test"))


@pytest.mark.parametrize(
    ("net", "settings", "message"),
    [
        ("llama", {"init": "svd", "group_by": "shape", "rank": 2}, "init 'svd' in 'model.layers.0"),
        ("llama", {"modules_to_save": ["lm_head"]}, "without modules_to_save, got lm_head"),
        ("mixture", {"group_by": "shape"}, "expected adapted linear layers, got experts"),
    ],
)
def test_what_the_engine_cannot_hold_is_not_exported(
    net: str, settings: dict, message: str, tmp_path: Path
) -> None:
    if net == "mixture":
        model = apply_lotr(
            zoo.net(net), LoTRConfig(rank=2, target_parameters=zoo.TARGETS[net], **settings)
        )
    else:
        model = adapted(**settings)
    for export in (export_factors, export_task):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_variable_vllm_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOTR_FACTORS", raising=False)
    vllm.register()
