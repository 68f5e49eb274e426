"""The files of factors and tasks that the vLLM plugin reads. python_tests/serving runs them in an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, vllm
from lotr_ext.files import state_of
from lotr_ext.vllm import export_factors, export_task

KEY = "model.layers.0.self_attn.k_proj.core"
Change = Callable[[dict, dict], object]  # of a task's tensors and configuration
CHANGES: dict[str, tuple[Change, str]] = {
    "NaN": (lambda t, c: t[KEY].fill_(torch.nan), f"expected finite values in {KEY}"),
    "another shape": (
        lambda t, c: t.update({KEY: t[KEY][:-1].clone()}),
        rf"expected floating values \(2, 3\) in {KEY}",
    ),
    "integers": (
        lambda t, c: t.update({KEY: t[KEY].int()}),
        rf"expected floating values \(2, 3\) in {KEY}",
    ),
    "no core": (lambda t, c: t.pop(KEY), f"expected the model's 8, got 7: missing {KEY}"),
    "other factors": (
        lambda t, c: c.update(lotr_factors="0" * 64),
        "expected a task over the engine's factors",
    ),
    "a LoRA": (
        lambda t, c: c.pop("lotr_factors"),
        "expected a task by export_task, got an adapter of LORA",
    ),
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
    assert factors.checksum == from_model.checksum
    assert len(factors.tensors) == factor_count
    for folder, cores in (
        ("own", {f"{n}.core": m.core for n, m in model.named_modules() if hasattr(m, "factors")}),
        ("task", None),
    ):
        vector = vllm.read_task(tmp_path / folder, factors)
        for name, span in factors.spans.items():
            want = (cores or bank.cores_of(task))[f"{name}.core"]
            assert torch.equal(vector[span].view(factors.core_shape(name)), 2.0 * want)
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == (
        "LORA",
        3,
        "base",
    )
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_is_no_task_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    export_task(model := adapted(), tmp_path)
    file, config = tmp_path / "lotr_task.safetensors", tmp_path / "adapter_config.json"
    tensors, content = load_file(file), json.loads(config.read_text())
    change(tensors, content)
    save_file(tensors, file)
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        vllm.read_task(tmp_path, vllm.factors_of(state_of(model), "test"))


@pytest.mark.parametrize(
    ("name", "kind"), [("lotr_task.safetensors", "safetensors"), ("adapter_config.json", "JSON")]
)
def test_a_truncated_file_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    export_task(model := adapted(), tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"adapter: expected a {kind} file"):
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
