"""The files that the vLLM plugin reads. python_tests/serving loads them into an engine."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import same, trained
from safetensors.torch import save_file
from torch import nn

from lotr_ext import TaskBank, vllm
from lotr_ext.adapted import adapted_layers
from lotr_ext.adapter_state import AdapterState
from lotr_ext.convert import export_lora
from lotr_ext.saving import adapter_of
from lotr_ext.storage import tensors_in

FILE_NAME = "lotr_task.safetensors"
KEY = "model.layers.0.self_attn.k_proj.core"
Change = Callable[[dict, dict], object]  # of a task's tensors and metadata
CHANGES: dict[str, tuple[Change, str]] = {
    "NaN": (lambda t, m: t[KEY].fill_(torch.nan), f"expected finite values, got others in {KEY}"),
    "another rank": (lambda t, m: t.update({KEY: t[KEY][:-1].clone()}), f"{KEY}: expected"),
    "integers": (lambda t, m: t.update({KEY: t[KEY].int()}), f"{KEY}: expected a floating"),
    "no core": (lambda t, m: t.pop(KEY), f"expected the model's 8, got 7: missing {KEY}"),
    "another layer": (lambda t, m: t.update(other=t[KEY].clone()), "not in the model other"),
    "other factors": (lambda t, m: m.update(factors="0" * 64), "made for other A and B"),
    "another scaling": (lambda t, m: m.update(scaling="3.0"), "expected a task with scaling"),
    "another format": (lambda t, m: m.update(format="pt"), "expected a task with format"),
    "a newer version": (lambda t, m: m.update(version="9"), "expected a task with version"),
}


def adapted(net: str = "llama", **settings: object) -> nn.Module:
    return trained(net, **{"rank": (2, 3), "group_by": "width", **settings})


def read(model: nn.Module, folder: Path) -> torch.Tensor:
    """Reads a task as the plugin does, over the factors of a model."""
    return vllm.read_task(folder, vllm.factors_of(adapter_of(model), "test"))


@pytest.mark.parametrize(
    ("group_by", "factor_count", "scaling_step"),
    [("width", 3, 0.0), ("layer", 16, 0.0), ("width", 3, 1.0)],  # A_16, B_16, B_8; eight pairs
)
def test_a_task_is_read_over_the_factors_of_its_model(
    group_by: str, factor_count: int, scaling_step: float, tmp_path: Path
) -> None:
    model = adapted(scaling=2.0, group_by=group_by)
    layers = adapted_layers(model)
    for i, layer in enumerate(layers.values()):
        layer.scaling += scaling_step * i
    bank = TaskBank(model, 3)
    cores = {f"{name}.core": torch.randn(layer.core.shape) for name, layer in layers.items()}
    task = bank.add(cores)
    vllm.export_factors(model, tmp_path / "factors")
    vllm.export_task(model, tmp_path / "model")
    vllm.export_task(model, tmp_path / "task", task=task, base_model="base")
    bank.save(task, tmp_path / "saved" / FILE_NAME)
    assert same(bank.cores_of(bank.add(tmp_path / "task" / FILE_NAME)), cores)
    factors = vllm.factors_of(AdapterState.read(tmp_path / "factors"), "test")
    assert len(factors.tensors) == factor_count
    model_cores = {f"{name}.core": layer.core for name, layer in layers.items()}
    for folder, expected in (("model", model_cores), ("task", cores), ("saved", cores)):
        vector = vllm.read_task(tmp_path / folder, factors)
        for name, layer in layers.items():
            core = vector[factors.spans[name]].view(layer.core.shape)
            assert torch.equal(core, layer.scaling * expected[f"{name}.core"])
    written = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert {
        "peft_type": "LORA",
        "r": 3,
        "base_model_name_or_path": "base",
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
    }.items() <= written.items()


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_is_not_a_task_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    model = adapted()
    vllm.export_task(model, tmp_path)
    tensors, metadata = tensors_in(tmp_path / FILE_NAME, "adapter")
    change(tensors, metadata)
    save_file(tensors, tmp_path / FILE_NAME, metadata)
    with pytest.raises((TypeError, ValueError), match=message):
        read(model, tmp_path)


def test_a_folder_of_a_lora_is_refused(tmp_path: Path) -> None:
    model = adapted()
    export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"expected a task by export_task, got .*lora"):
        read(model, tmp_path / "lora")


@pytest.mark.parametrize(
    ("net", "settings", "message"),
    [
        ("llama", {"init": "svd", "group_by": "shape", "rank": 2}, "init 'svd' in 'model.layers.0"),
        ("llama", {"modules_to_save": ["lm_head"]}, "without modules_to_save, got lm_head"),
        ("mixture", {}, "expected adapted linear layers, got experts"),
    ],
)
def test_what_the_engine_cannot_hold_is_not_exported(
    net: str, settings: dict, message: str, tmp_path: Path
) -> None:
    model = adapted(net, **settings)
    for export in (vllm.export_factors, vllm.export_task):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_variable_vllm_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOTR_FACTORS", raising=False)
    vllm.register()
    assert "lotr_ext.vllm.engine" not in sys.modules
