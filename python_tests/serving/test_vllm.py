"""Tasks in vLLM on the CPU: the same tokens as in PyTorch, mixed batches, and refused requests.

Needs a Python with vLLM: `make serve-test` installs one, LOTR_VLLM_PYTHON names another.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks
from lotr_ext.convert import export_lora
from lotr_ext.vllm import export_factors, export_task

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LOTR_VLLM_PYTHON", ROOT / ".venv" / "vllm" / "bin" / "python"))
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no vLLM: {PYTHON} is missing (make serve-test)"
)

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 32}),
    "phi3": (  # qkv_proj and gate_up_proj are one module each
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
}
IDS = torch.randint(3, 250, (5, 9), generator=torch.Generator().manual_seed(3))
NEW_TOKENS = 10
Mix = list[int | None]  # of each row, the number of its task, or None for the base model
# (a key of MODELS, the adapter's settings)
ENGINES = {
    "llama-width": ("llama", {}),
    "qwen3-shape": ("qwen3", {"group_by": "shape"}),
    "llama-name": (  # over max_lora_rank
        "llama",
        {"group_by": "name", "target_modules": ["q_proj", "v_proj", "down_proj"], "rank": 12},
    ),
    "phi3-fused": ("phi3", {}),
    "qwen3-moe-attention": (
        "qwen3-moe",
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
}


def base(kind: str, folder: Path, **sizes) -> nn.Module:
    """Returns a tiny model with random weights, which it also saves in folder/base."""
    model_class, config_class, more = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **more, **sizes})).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "base")
    return model


def banked(
    kind: str, folder: Path, tasks: int, sizes: dict[str, int] | None = None, **settings
) -> nn.Module:
    """Returns the model with a bank of random tasks, and exports its factors and tasks."""
    options = {
        "rank": (3, 5),
        "scaling": 7.5,
        "target_modules": "all-linear",
        "group_by": "width",
        **settings,
    }
    model = apply_lotr(base(kind, folder, **(sizes or {})), LoTRConfig(**options))
    bank = TaskBank(model, tasks)
    export_factors(model, folder / "factors")
    for i in range(tasks):
        generator = torch.Generator().manual_seed(i)
        for core in bank.cores_of(bank.add()).values():  # views of the bank
            core.normal_(std=0.7, generator=generator)
        export_task(model, folder / f"task-{i}", task=i)
    return model


@torch.no_grad()
def greedy(model: nn.Module, numbers: Mix) -> list[list[int]]:
    """Returns the tokens from PyTorch. Row i has the task of numbers[i], or only the base model."""
    rows = IDS[: len(numbers)]
    # Tasks count from 0 in a bank and from 1 in vLLM. The base model is -1 in a bank.
    with use_tasks(model, torch.tensor([(number or 0) - 1 for number in numbers])):
        tokens = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return tokens[:, rows.shape[1] :].tolist()


def run(folder: Path, steps: list[dict], *, factors: Path | None = None, **options) -> list:
    """Returns the results of an engine's steps. Its factors come from the folder by default."""
    spec = {
        "model": str(folder / "base"),
        "factors": str(factors or folder / "factors"),
        "options": options,
        "steps": steps,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    environment = {key: text for key, text in os.environ.items() if not key.startswith("LOTR_")}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("engine.py"), folder / "spec.json"],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def load(folder: Path, number: int, **more) -> dict:
    return {"load": [folder.name, number, str(folder)], **more}


def batch(numbers: Mix) -> dict:
    return {
        "generate": [[IDS[i].tolist(), number] for i, number in enumerate(numbers)],
        "tokens": NEW_TOKENS,
    }


def check_mixes(folder: Path, model: nn.Module, mixes: list[Mix], **options) -> None:
    """Loads all tasks, which must differ, and compares each mix of them with PyTorch."""
    count = len(model.lotr_tasks)
    loads = [load(folder / f"task-{i}", i + 1) for i in range(count)]
    results = run(folder, [*loads, *map(batch, mixes)], **options)
    assert results[:count] == [None] * count
    for mix, tokens in zip(mixes, results[count:], strict=True):
        assert tokens == greedy(model, mix)
    assert len({str(tokens) for tokens in results[count:]}) == len(mixes)


@pytest.mark.parametrize(("kind", "settings"), ENGINES.values(), ids=ENGINES)
def test_tokens_are_the_same_as_in_pytorch(tmp_path: Path, kind: str, settings: dict) -> None:
    model = banked(kind, tmp_path, 3, **settings)
    mixes = [[1, None, 3, 2, 1], [None] * 5, [2, 2, 2, 2, 2]]
    check_mixes(tmp_path, model, mixes, max_loras=4, max_cpu_loras=8)


def test_two_processes_share_the_layers(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 3)
    check_mixes(tmp_path, model, [[1, None, 3, 2, 1]], max_loras=4, tensor_parallel_size=2)


def test_more_tasks_than_slots_come_and_go(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 6)
    mixes = [[1, 2, None, None, 1], [3, 4, 3, None, 4], [1, 6, 1, 6, None], [5, 5, 5, 5, 5]]
    check_mixes(tmp_path, model, mixes, max_loras=2, max_cpu_loras=8)


def test_a_task_is_replaced_while_the_engine_runs(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 2)
    export_task(model, tmp_path / "new", task=1)
    steps = [
        load(tmp_path / "task-0", 1),
        batch([1] * 5),
        load(tmp_path / "new", 1, inplace=True),
        batch([1] * 5),
    ]
    results = run(tmp_path, steps, max_loras=2)
    assert results[1] == greedy(model, [1] * 5)
    assert results[3] == greedy(model, [2] * 5) != results[1]


def test_bad_tasks_are_refused_and_the_engine_continues(tmp_path: Path) -> None:
    """test_vllm_files.py tests every kind of bad task."""
    model = banked("llama", tmp_path, 1)
    export_lora(model, tmp_path / "lora", base_model="base")
    banked("llama", tmp_path / "other-rank", 1, rank=4)
    banked("llama", tmp_path / "other-factors", 1, init="normal")
    messages = {
        tmp_path / "lora": "expected a task by export_task, got ",
        tmp_path / "factors": "expected a task by export_task",
        tmp_path / "other-rank" / "task-0": "expected the ranks of the adapter",
        tmp_path / "other-factors" / "task-0": "expected a task for the A and B of this adapter",
        tmp_path / "nowhere": "expected a task by export_task",
    }
    mix = [1, None, 1, None, 1]
    bad_loads = [load(folder, number) for number, folder in enumerate(messages, 2)]
    steps = [load(tmp_path / "task-0", 1), *bad_loads, batch(mix)]
    _, *refused, tokens = run(tmp_path, steps, max_loras=2)
    for message, result in zip(messages.values(), refused, strict=True):
        assert message in result["error"]
    assert tokens == greedy(model, mix)


def test_factors_of_another_base_end_the_start(tmp_path: Path) -> None:
    banked("llama", tmp_path, 1)
    banked("llama", tmp_path / "wider", 1, {"intermediate_size": 160})
    with pytest.raises(
        AssertionError,
        match=r"LOTR_FACTORS: expected \(128, 96\) features at model.layers.0.mlp.gate_proj, got",
    ):
        run(tmp_path, [], factors=tmp_path / "wider" / "factors", max_loras=2)
