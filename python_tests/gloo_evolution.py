"""An evolution of a small model in one process, and in two that each evaluate half of its members."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lotr_ext import CoreES, LoTRConfig, TaskBank, apply_lotr, mixed

REWARDS = [3.0, 1.0, 2.0, 2.0, 8.0, 0.5, -1.0, 4.0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * torch.sigmoid(self.k(x))
        return x + self.down(torch.tanh(self.up(x)))


def blocks(start: int = 0) -> nn.Module:
    torch.manual_seed(start)
    return nn.Sequential(Block(), Block())


def bank_of_blocks(
    dtype: torch.dtype = torch.float32, tasks: int = 8, rank: int | tuple[int, int] = (4, 3), start: int = 0
) -> tuple[nn.Module, TaskBank]:
    """A model of eight adapted layers and its bank, empty."""
    model = apply_lotr(blocks(start).to(dtype), LoTRConfig(rank=rank, alpha=4.0, target_modules=["q", "k", "up", "down"]))
    return model, TaskBank(model.to(dtype), tasks)


@torch.no_grad()
def score(model: nn.Module, index: Tensor) -> Tensor:
    """[members]: each over the same five tokens."""
    x = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(4)).repeat(len(index), 1, 1)
    with mixed(model, index):
        return -(model(x) - 0.5).square().mean((1, 2))


def evolve(
    generations: int = 4,
    seed: int = 7,
    order: Sequence[int] | None = None,
    es: CoreES | None = None,
    model: nn.Module | None = None,
) -> tuple[Tensor, CoreES]:
    """The mean after so many generations, and the strategy. order: in which the members are evaluated."""
    if es is None:
        model, bank = bank_of_blocks(tasks=8)
        es = CoreES(bank, 8, 0.3, lr=0.05, seed=seed)
    for _ in range(generations):
        index = es.ask()
        rewards = score(model, index)
        if order is not None:
            rewards = torch.empty_like(rewards)
            rewards[list(order)] = score(model, index[list(order)])
        es.tell(rewards)
    return torch.cat([core.flatten() for core in es.mean().values()]), es


def run(rank: int, folder: Path) -> tuple[list[float], int]:
    """The mean after an evolution in which this process evaluates its members, and how many these are."""
    mean, es = evolve()
    return mean.tolist(), len(es.ask())


def failures(rank: int, folder: Path) -> dict[str, object]:
    """What each process raises for a mistake in the second."""
    found: dict[str, object] = {}

    def tell(name: str, es: CoreES, rewards: Sequence[float]) -> None:
        es.ask()
        try:
            es.tell(rewards)
            found[name] = "no error"
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    es = CoreES(bank_of_blocks(tasks=4)[1], 8, 0.3, lr=0.05)
    tell("nan", es, [0.0, 1.0, float("nan") if rank else 2.0, 3.0])
    tell("shape", es, [0.0, 1.0, 2.0, 3.0, 4.0][: 4 + rank])
    tell("seed", CoreES(bank_of_blocks(tasks=4)[1], 8, 0.3, lr=0.05, seed=rank), [0.0, 1.0, 2.0, 3.0])
    found["generation"] = es.generation
    return found
