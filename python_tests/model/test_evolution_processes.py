"""CoreES with a population in several processes, against one process."""

from __future__ import annotations

import math

import gloo_evolution
import pytest
import torch
from gloo import values_of
from gloo_evolution import bank_of_blocks, evolve

from lotr_ext import CoreES


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_parts_of_processes_are_the_population(world: int) -> None:
    parts = []
    for rank in range(world):
        _, bank = bank_of_blocks(tasks=math.ceil(8 / world))
        part = CoreES(bank, 8, 0.3, lr=0.05, seed=7, processes=(rank, world))
        part.ask()
        part.tell(gloo_evolution.REWARDS)
        index = part.ask()
        parts.append([core.detach()[index] for core in bank.cores])
    _, one = bank_of_blocks(tasks=8)
    alone = CoreES(one, 8, 0.3, lr=0.05, seed=7)
    alone.ask()
    alone.tell(gloo_evolution.REWARDS)
    index = alone.ask()
    for l, core in enumerate(one.cores):
        assert torch.equal(torch.cat([part[l] for part in parts]), core[index])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    return values_of(["gloo_evolution:run", "gloo_evolution:failures"], tmp_path_factory.mktemp("gloo"))


def test_two_processes_equal_one_bit_for_bit(found: dict) -> None:
    want, _ = evolve()
    for mean, members in found["gloo_evolution:run"]:
        assert torch.equal(torch.tensor(mean, dtype=want.dtype), want) and members == 4


def test_a_failure_in_one_process_is_raised_in_both(found: dict) -> None:
    first, second = found["gloo_evolution:failures"]
    assert first["nan"].startswith("ValueError: rewards: expected rewards of all processes")
    assert second["nan"].startswith("ValueError: rewards: expected numbers, got nan for member 2")
    assert second["shape"].startswith("ValueError: rewards: expected shape (4,)") and first["shape"].startswith("ValueError")
    for one in (first, second):
        assert one["seed"].startswith("RuntimeError: tell: expected the same seed")
        assert one["generation"] == 0
