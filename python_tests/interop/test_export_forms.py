"""What servers read of an exported LoRA: the keys, shapes and values of each form of experts, names, base model, padding."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from mixtures import IDS, adapted, mixture
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, lotr_parameters, save_adapter
from lotr_ext.convert import main
from lotr_ext.interop import export_lora, lotr_to_lora
from lotr_ext.interop.vllm import export_factors, export_task
from lotr_ext.interop.vllm.files import read_factors, read_task
from lotr_ext.layers.experts import LoTRExperts
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.experts import parameter_name
from nets import relative

_PREFIX = "base_model.model."
TYPES = {"Mixtral": "mixtral", "GptOss": "gpt_oss"}  # whose experts servers name or lay out in their own way


def exports(folder: Path, model, name: str, **options) -> list[dict[str, Tensor]]:
    """The tensors that export_lora writes, and lotr_to_lora from the saved adapter."""
    export_lora(model, folder / "model", base_model="base", **options)
    save_adapter(model, folder / "saved")
    hosts = TYPES.get(name) if options["experts"] in ("vllm-shared", "per-expert") else None  # what the model's type says
    lotr_to_lora(folder / "saved", folder / "file", base_model="base", hosts=hosts, **options)
    return [load_file(folder / part / "adapter_model.safetensors") for part in ("model", "file")]


def deltas(model) -> dict[str, Tensor]:
    """Of each adapted parameter of experts [e, n, k], by its name."""
    layers = {n: layer for n, layer in adapted_layers(model).items() if isinstance(layer, LoTRExperts)}
    return {parameter_name(n): layer.delta_weight() for n, layer in layers.items()}


def halves(delta: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (delta[:, ::2], delta[:, 1::2]) if interleaved else delta.chunk(2, 1)


def test_the_keys_of_pefts_form(tmp_path: Path) -> None:
    """PEFT's names of experts: base_layer is the first parameter, gate_up_proj; the ranks of all experts stand in one."""
    for tensors in exports(tmp_path, adapted(target_modules=["q_proj"]), "Mixtral", experts="peft"):
        at = f"{_PREFIX}model.layers.0."
        assert {key.removeprefix(at): tuple(t.shape) for key, t in tensors.items() if key.startswith(at)} == {
            "mlp.experts.base_layer.lora_A.weight": (16, 32),
            "mlp.experts.base_layer.lora_B.weight": (48, 16),
            "mlp.experts.lora_A.weight": (16, 24),
            "mlp.experts.lora_B.weight": (32, 16),
            "self_attn.q_proj.lora_A.weight": (4, 32),
            "self_attn.q_proj.lora_B.weight": (32, 4),
        }


def test_the_keys_of_a_task_for_vllms_plugin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = apply_lotr(llama(), LoTRConfig(rank=(2, 3), alpha=6.0, target_modules=["q_proj", "down_proj"], group_by="width"))
    bank = TaskBank(model, 2)
    task = bank.add({name: torch.randn(2, 3) for name in bank.cores_of(bank.add())})
    export_task(model, tmp_path / "task", task=task, base_model="base")
    export_factors(model, tmp_path / "factors")
    tensors = load_file(tmp_path / "task" / "lotr_task.safetensors")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("mlp.down_proj", "self_attn.q_proj")]
    assert {name: tuple(core.shape) for name, core in tensors.items()} == {f"{name}.core": (2, 3) for name in names}
    layer = adapted_layers(model)[names[0]]
    assert torch.equal(tensors[f"{names[0]}.core"], layer.scaling * bank.cores_of(task)[f"{names[0]}.core"])
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    factors = read_factors(tmp_path / "factors")
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 3,
        "target_modules": ["down_proj", "q_proj"],
        "base_model_name_or_path": "base",
        "lotr_factors": factors.checksum,
    }
    cores = read_task(tmp_path / "task", factors, factors.checksum)
    assert torch.equal(cores, torch.cat([tensors[f"{name}.core"].flatten() for name in sorted(names)]))
    with pytest.raises(ValueError, match=r"adapter: expected a task over the engine's factors other, got one over"):
        read_task(tmp_path / "task", factors, "other")
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == ["adapter_config.json", "lotr_task.safetensors"]


@pytest.mark.parametrize("core", ["diagonal", "cp", "tucker", "train", "few"])
def test_a_task_has_dense_cores_of_any_form(tmp_path: Path, core: str) -> None:
    torch.manual_seed(0)
    model = apply_lotr(llama(), LoTRConfig(rank=4, target_modules=["q_proj", "v_proj"], core=core))
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.normal_()
    export_task(model, tmp_path / "task", base_model="base")
    tensors = load_file(tmp_path / "task" / "lotr_task.safetensors")
    assert len(tensors) == 4
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(tensors[f"{name}.core"], layer.scaling * layer.core.detach(), atol=0, rtol=0)
        assert tensors[f"{name}.core"].abs().max() > 0


def llama() -> torch.nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_the_keys_of_vllms_shared_form(tmp_path: Path) -> None:
    for tensors in exports(tmp_path, adapted(target_modules=["q_proj"]), "Mixtral", experts="vllm-shared"):
        at = f"{_PREFIX}model.layers.0.block_sparse_moe.experts."
        assert {key.removeprefix(at): tuple(t.shape) for key, t in tensors.items() if key.startswith(at)} == {
            "w1.lora_A.weight": (1, 4, 32),
            "w1.lora_B.weight": (4, 24, 4),
            "w2.lora_A.weight": (4, 4, 24),
            "w2.lora_B.weight": (1, 32, 4),
            "w3.lora_A.weight": (1, 4, 32),
            "w3.lora_B.weight": (4, 24, 4),
        }
        assert not any(".mlp." in key for key in tensors)


@pytest.mark.parametrize(
    ("name", "at", "projections"),
    [
        ("Mixtral", "model.layers.1.block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("Qwen3Moe", "model.layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_the_keys_of_one_expert_after_another(tmp_path: Path, name: str, at: str, projections: tuple[str, ...]) -> None:
    gate, up, down = projections
    shapes = {gate: ((4, 32), (24, 4)), up: ((4, 32), (24, 4)), down: ((4, 24), (32, 4))}
    for tensors in exports(tmp_path, adapted(name), name, experts="per-expert"):
        for c in range(4 if name == "Mixtral" else 5):
            for projection, (A, B) in shapes.items():
                key = f"{_PREFIX}{at}.{c}.{projection}.lora_"
                assert (tuple(tensors[f"{key}A.weight"].shape), tuple(tensors[f"{key}B.weight"].shape)) == (A, B)


@pytest.mark.parametrize("rank", [4, (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("form", ["vllm-shared", "per-expert"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_each_expert_is_the_adapters(tmp_path: Path, name: str, form: str, rank: int | tuple[int, int]) -> None:
    model = adapted(name, rank=rank, alpha=6.0)
    gate, up, down = ("w1", "w3", "w2") if form == "vllm-shared" or name == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    for folder, tensors in zip(("model", "file"), exports(tmp_path, model, name, experts=form), strict=True):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        seen = set()
        for parameter, delta in deltas(model).items():
            experts = parameter.rpartition(".")[0]
            experts = experts.replace("mlp.experts", "block_sparse_moe.experts") if name == "Mixtral" else experts
            parts = {down: delta} if parameter.endswith("down_proj") else dict(zip((gate, up), halves(delta, name == "GptOss")))
            for projection, want in parts.items():
                for c, one in enumerate(want):
                    at = f"{experts}.{projection}" if form == "vllm-shared" else f"{experts}.{c}.{projection}"
                    keys = [f"{_PREFIX}{at}.lora_{part}.weight" for part in "AB"]
                    A, B = (
                        tensors[key][min(c, len(tensors[key]) - 1)] if form == "vllm-shared" else tensors[key] for key in keys
                    )
                    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
                    assert relative(scaling(parameter, config["r"], ranks, config["lora_alpha"], alphas) * B @ A, one) < 1e-6
                    seen |= set(keys)
        assert seen == set(tensors)


def scaling(name: str, r: int, ranks: dict[str, int], alpha: float, alphas: dict[str, float]) -> float:
    """By PEFT's rule for patterns."""
    r, alpha = (
        next((value for pattern, value in of.items() if name.endswith(pattern.lstrip("^").replace("\\", ""))), common)
        for of, common in ((ranks, r), (alphas, alpha))
    )
    return alpha / r


@pytest.mark.parametrize("form", ["peft", "per-expert", "vllm-shared", "shared-outer"])
def test_a_task_is_exported_as_if_its_cores_were_the_models(tmp_path: Path, form: str) -> None:
    model = adapted("Mixtral", rank=(3, 5), alpha=6.0, target_modules=["q_proj", "v_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bank = TaskBank(model, 2)
    bank.add()
    task = bank.add({name: torch.randn_like(core) for name, core in bank.cores_of(0).items()})
    export_lora(model, tmp_path / "task", experts=form, base_model="base", task=task)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            layer.core.copy_(bank.cores_of(task)[f"{name}.core"])
    export_lora(model, tmp_path / "own", experts=form, base_model="base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "task" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()
    bank.drop(task)
    with pytest.raises(ValueError, match="task: expected a task of the bank, as add returned it, got 1"):
        export_lora(model, tmp_path / "none", base_model="base", task=task)
    del model.lotr_tasks
    with pytest.raises(RuntimeError, match="export_lora: expected a model with a TaskBank"):
        export_lora(model, tmp_path / "none", base_model="base", task=0)
    assert not (tmp_path / "none").exists()


def test_ungated_experts_have_no_gate(tmp_path: Path) -> None:
    model = adapted("NemotronH")
    with pytest.raises(ValueError, match=r"experts: expected gated experts .* got up_proj"):
        export_lora(model, tmp_path / "none", experts="vllm-shared", base_model="base")
    assert not (tmp_path / "none").exists()
    export_lora(model, tmp_path / "one", experts="per-expert", base_model="base")
    kinds = {key.split(".experts.")[1].split(".")[1] for key in load_file(tmp_path / "one" / "adapter_model.safetensors")}
    assert kinds == {"up_proj", "down_proj"}


def test_names_of_hosts_may_be_given(tmp_path: Path) -> None:
    model, names = adapted("Qwen3Moe"), {"mlp.experts": "moe.experts"}
    export_lora(model, tmp_path / "peft", base_model="base")
    export_lora(model, tmp_path / "own", hosts=names, base_model="base")
    plain, own = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("peft", "own"))
    assert own.keys() == {key.replace(".mlp.experts.", ".moe.experts.") for key in plain} != plain.keys()
    with pytest.raises(ValueError, match="hosts: expected one of mixtral, gpt_oss, or names by name, got 'llama'"):
        export_lora(model, tmp_path / "none", hosts="llama")
    with pytest.raises(TypeError, match="hosts: expected a model type, or parts of module names by name, got"):
        export_lora(model, tmp_path / "none", hosts={"mlp": 3})
    assert not (tmp_path / "none").exists()


def test_the_base_model_is_written(tmp_path: Path) -> None:
    def written() -> str | None:
        return json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]

    model = adapted(model=mixture("Mixtral"))
    model.config._name_or_path = "where/it/lies"
    export_lora(model, tmp_path / "lora")
    assert written() == "where/it/lies"
    export_lora(model, tmp_path / "lora", base_model="elsewhere")
    assert written() == "elsewhere"
    model.config._name_or_path = ""
    with pytest.warns(UserWarning, match="base_model: expected where the base model is"):
        export_lora(model, tmp_path / "lora")
    assert written() is None
    save_adapter(model, tmp_path / "saved")
    assert main(["lotr-to-lora", str(tmp_path / "saved"), str(tmp_path / "lora"), "--base-model", "third"]) == 0
    assert written() == "third"


@pytest.mark.parametrize("form", ["peft", "shared-outer", "vllm-shared", "per-expert"])
def test_padded_factors_add_nothing(tmp_path: Path, form: str) -> None:
    plain = mixture("Mixtral")
    model = adapted(model=copy.deepcopy(plain), rank=(3, 5), alpha=6.0, target_modules=["q_proj"]).eval()
    one, two = exports(tmp_path, model, "Mixtral", experts=form, pad_rank=8)
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["r"] == 8 and not config["rank_pattern"]
    if form == "peft":
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "model").eval()
        with torch.no_grad():
            assert relative(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits) < 1e-5
    with pytest.raises(ValueError, match=r"pad_rank: expected at least 3, the rank of .*, got 2"):
        export_lora(model, tmp_path / "none", experts=form, pad_rank=2, base_model="base")
    assert not (tmp_path / "none").exists()
