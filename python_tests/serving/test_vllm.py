"""Tasks in vLLM on the CPU: the same tokens as in PyTorch, mixed batches, and refused requests.

Needs a Python with vLLM: `make serve-test` installs one, LOTR_VLLM_PYTHON names another.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
NEW = 10


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
    for i in range(tasks):
        g = torch.Generator().manual_seed(i)
        task = bank.add()
        bank.replace(
            task,
            {
                name: torch.randn(core.shape, generator=g) * 0.7
                for name, core in bank.cores_of(task).items()
            },
        )
    export_factors(model, folder / "factors")
    for i in range(tasks):
        export_task(model, folder / f"task-{i}", task=i)
    return model


@torch.no_grad()
def greedy(model: nn.Module, tasks: list[int]) -> list[list[int]]:
    """Returns the tokens from PyTorch, row i with task tasks[i] or -1 for the base model."""
    with use_tasks(model, torch.tensor(tasks)):
        rows = IDS[: len(tasks)]
        tokens = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
    return tokens[:, rows.shape[1] :].tolist()


def run(folder: Path, steps: list[dict], *, factors: Path | bool = True, **options) -> list:
    where = folder / "factors" if factors is True else factors
    spec = {
        "model": str(folder / "base"),
        "factors": str(where) if where else None,
        "options": options,
    }
    (folder / "spec.json").write_text(json.dumps({**spec, "steps": steps}))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("LOTR_")
    } | {"PYTHONPATH": str(ROOT)}
    command = [PYTHON, Path(__file__).with_name("engine.py"), folder / "spec.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def load(folder: Path, number: int, **more) -> dict:
    return {"load": [folder.name, number, str(folder)], **more}


def batch(numbers: list[int | None]) -> dict:
    return {
        "generate": [[IDS[i].tolist(), number] for i, number in enumerate(numbers)],
        "tokens": NEW,
    }


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen3", {"group_by": "shape"}),
        (
            "llama",
            {"group_by": "name", "target_modules": ["q_proj", "v_proj", "down_proj"], "rank": 12},
        ),  # over max_lora_rank
        ("phi3", {}),
        ("qwen3-moe", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    ],
    ids=["llama-width", "qwen3-shape", "llama-name", "phi3-fused", "qwen3-moe-attention"],
)
def test_tokens_are_the_same_as_in_pytorch(tmp_path: Path, kind: str, settings: dict) -> None:
    model = banked(kind, tmp_path, 3, **settings)
    steps = [load(tmp_path / f"task-{i}", i + 1) for i in range(3)]
    mixes = [[1, None, 3, 2, 1], [None] * 5, [2, 2, 2, 2, 2]]
    results = run(tmp_path, [*steps, *map(batch, mixes)], max_loras=4, max_cpu_loras=8)
    assert results[:3] == [None] * 3
    for mix, tokens in zip(mixes, results[3:], strict=True):
        assert tokens == greedy(model, [-1 if number is None else number - 1 for number in mix])
    assert len({str(tokens) for tokens in results[3:]}) == 3  # the tasks differ


def test_two_processes_share_the_layers(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 3)
    mix = [1, None, 3, 2, 1]
    steps = [load(tmp_path / f"task-{i}", i + 1) for i in range(3)]
    results = run(tmp_path, [*steps, batch(mix)], max_loras=4, tensor_parallel_size=2)
    assert results[-1] == greedy(model, [-1 if number is None else number - 1 for number in mix])


def test_more_tasks_than_slots_come_and_go(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 6)
    steps = [load(tmp_path / f"task-{i}", i + 1) for i in range(6)]
    mixes = [[1, 2, None, None, 1], [3, 4, 3, None, 4], [1, 6, 1, 6, None], [5, 5, 5, 5, 5]]
    results = run(tmp_path, [*steps, *map(batch, mixes)], max_loras=2, max_cpu_loras=8)
    for mix, tokens in zip(mixes, results[6:], strict=True):
        assert tokens == greedy(model, [-1 if number is None else number - 1 for number in mix])


def test_a_task_is_replaced_while_the_engine_runs(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 2)
    first = greedy(model, [0] * 5)
    moved = tmp_path / "new"
    export_task(model, moved, task=1)
    steps = [
        load(tmp_path / "task-0", 1),
        batch([1] * 5),
        load(moved, 1, inplace=True),
        batch([1] * 5),
    ]
    results = run(tmp_path, steps, max_loras=2)
    assert results[1] == first and results[3] == greedy(model, [1] * 5) != first


def test_bad_tasks_are_refused_and_the_engine_continues(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 1)
    export_lora(model, tmp_path / "lora", base_model="base")
    banked("llama", tmp_path / "other-rank", 1, rank=4)
    banked("llama", tmp_path / "other-factors", 1, init="normal")
    spoiled = {name: spoil(tmp_path, name) for name in ("nan", "shape", "missing", "cut")}
    wrong = [
        tmp_path / "lora",
        tmp_path / "factors",
        tmp_path / "other-rank" / "task-0",
        tmp_path / "other-factors" / "task-0",
        *spoiled.values(),
        tmp_path / "nowhere",
    ]
    steps = [load(folder, i + 2) for i, folder in enumerate(wrong)]
    results = run(
        tmp_path, [load(tmp_path / "task-0", 1), *steps, batch([1, None, 1, None, 1])], max_loras=2
    )
    core = "model.layers.0.mlp.down_proj.core"
    messages = [
        "expected a task by export_task, got ",
        "expected a task by export_task",
        "expected the ranks of the adapter",
        "expected a task with factors",
        f"expected finite values, got others in {core}",
        f"{core}: expected the ranks of the adapter",
        f"missing {core}; not in the model none",
        "expected a safetensors file",
        "expected a task by export_task",
    ]
    for message, result in zip(messages, results[1:-1], strict=True):
        assert isinstance(result, dict) and message in result["error"], (message, result)
    assert results[-1] == greedy(model, [0, -1, 0, -1, 0])


def test_factors_of_another_base_end_the_start(tmp_path: Path) -> None:
    banked("llama", tmp_path, 1)
    banked("llama", tmp_path / "wider", 1, {"intermediate_size": 160})
    with pytest.raises(
        AssertionError,
        match=r"LOTR_FACTORS: expected \(128, 96\) features at model.layers.0.mlp.gate_proj, got",
    ):
        run(tmp_path, [], factors=tmp_path / "wider" / "factors", max_loras=2)


def spoil(folder: Path, how: str) -> Path:
    """Returns a copy of task-0 with something wrong in its tensors."""
    target = folder / how
    shutil.copytree(folder / "task-0", target)
    path = target / "lotr_task.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    key = min(tensors)
    if how == "nan":
        tensors[key][0, 0] = float("nan")
    elif how == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif how == "missing":
        del tensors[key]
    save_file(tensors, path, metadata)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    return target
