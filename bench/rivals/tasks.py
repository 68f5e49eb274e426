"""Many tasks over one small transformer of random weights, and the ways to train a batch of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, TaskBank, apply_lotr

from ..measure.session import bytes_text, time_text

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
STAGES = ("forward", "backward", "optimizer")
HEADS = ("", *STAGES, "step", "over one adapter", "optimizer's state")
# tokens per row x rows x tasks in the bank x width x blocks x rank
SHAPES = {"cpu": "16x64x1000x512x4x16", "cuda": "64x64x1000x2048x8x16"}


class Way(NamedTuple):
    """How a batch is trained. index: a task per "row", per "token", or per token of the second half of each row ("activated");
    None: one adapter. per_task: whether it uses the bank's optimizer."""

    label: str
    index: str | None
    per_task: bool
    fused: bool = False


FLOOR = "one"
WAYS = {
    FLOOR: Way("one adapter, AdamW", None, False),
    "whole-bank": Way("a task a row, AdamW over the whole bank", "row", False),
    "whole-bank-fused": Way("a task a row, AdamW over the whole bank, fused", "row", False, True),
    "per-task": Way("a task a row, bank.optimizer(AdamW)", "row", True),
    "per-task-fused": Way("a task a row, bank.optimizer(AdamW), fused", "row", True, True),
    "by-token": Way("a task a token, bank.optimizer(AdamW), fused", "token", True, True),
    "activated": Way("half the tokens the base's, bank.optimizer(AdamW), fused", "activated", True, True),
}
LABELS = {name: way.label for name, way in WAYS.items()}


def transformer(hidden: int, layers: int) -> nn.Module:
    """A causal language model with fixed random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(**shape, num_attention_heads=max(1, hidden // 64), vocab_size=2048, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


def with_tasks(hidden: int, layers: int, rank: int, tasks: int) -> tuple[nn.Module, TaskBank]:
    """The adapted model and its full bank."""
    model = apply_lotr(transformer(hidden, layers), LoTRConfig(rank=rank, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if name.endswith(".core"):
            nn.init.normal_(parameter)
    bank = TaskBank(model, tasks)
    for _ in range(tasks):
        bank.add()
    with torch.no_grad():
        for core in bank.cores:
            core.normal_()
    return model, bank


def task_of_row(rows: int, kinds: int, tasks: int, seed: int | None = None) -> Tensor:
    """The task of each row: `kinds` of all tasks, in random order."""
    draw = torch.Generator().manual_seed(kinds if seed is None else seed)
    chosen = torch.randperm(tasks, generator=draw)[:kinds]
    return chosen[torch.arange(rows) % len(chosen)][torch.randperm(rows, generator=draw)]


def index_of(way: Way, rows: Tensor, tokens: int) -> Tensor:
    """The index of a way for `mixed`, from the tasks [b] of the rows. "token": each token of a row has another row's task."""
    if way.index == "row":
        return rows
    if way.index == "token":
        return rows[(torch.arange(len(rows)).unsqueeze(1) + torch.arange(tokens)) % len(rows)]
    return torch.where(torch.arange(tokens) < tokens // 2, -1, rows.unsqueeze(1))


def optimizer_of(way: Way, model: nn.Module, bank: TaskBank) -> torch.optim.Optimizer:
    """The optimizer of only the cores: one adapter's, or the bank's. Every task has a state, as after long training."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    settings = {"lr": 1e-3, "weight_decay": 0.0, **({"fused": True} if way.fused else {})}
    if way.index is None:
        cores = [parameter for name, parameter in model.named_parameters() if name.endswith(".core")]
        return torch.optim.AdamW([core.requires_grad_() for core in cores], **settings)
    bank.requires_grad_()
    for core in bank.cores:
        core.grad = torch.zeros_like(core)  # so the steps change nothing
    if not way.per_task:
        optimizer = torch.optim.AdamW(bank.parameters(), **settings)
        optimizer.step()
        return optimizer
    optimizer = bank.optimizer(torch.optim.AdamW, **settings)
    optimizer.step(index=torch.arange(len(bank)))
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of an optimizer's state."""

    def size(value: object) -> int:
        if isinstance(value, dict):
            return sum(size(one) for one in value.values())
        return value.nbytes if isinstance(value, Tensor) else 0

    kept = optimizer.state_dict()
    return size(kept["state"]) + size(kept.get("tasks", {}))


def row_of(result: dict) -> list[str]:
    """Label, times, excess over one adapter, the optimizer's state."""
    times = [time_text(result[stage]["seconds"][1]) for stage in (*STAGES, "step")]
    excess = "" if result["rival"] == FLOOR else f"{result['step']['excess'][1]:+.1%}"
    return [LABELS[result["rival"]], *times, excess, bytes_text(result["state_bytes"])]
