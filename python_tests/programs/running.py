"""Runs programs in batches, each a search of hypothesis with a seed of its own, and shrinks those that fail."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from programs.checking import Fault, check
from programs.script import compiled, standalone
from programs.steps import programs

BATCH = 50


class Batch(NamedTuple):
    """programs: how many; seed: of the search."""

    programs: int
    seed: int


class Found(NamedTuple):
    """A fault, and the program that shows it."""

    batch: Batch
    source: str
    dtype: torch.dtype
    fault: Fault

    def script(self) -> str:
        return standalone(self.source, self.dtype, self.fault.text)


class Result(NamedTuple):
    programs: int
    faults: list[Found]


def batches(count: int, first_seed: int) -> list[Batch]:
    return [Batch(min(BATCH, count - i), first_seed * 1_000_000 + i // BATCH) for i in range(0, count, BATCH)]


def search(batch: Batch, test, phases: tuple[Phase, ...]) -> None:
    """Runs test on the programs of a batch."""
    options = settings(
        max_examples=batch.programs,
        phases=phases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    seed(batch.seed)(options(given(programs())(test)))()


def run_batch(batch: Batch) -> Result:
    torch.set_num_threads(1)
    faults: list[Found] = []
    count = 0

    def test(b) -> None:
        nonlocal count
        count += 1
        source = b.source()
        fault = check(compiled(source), b.coarsest)
        if fault is not None:
            faults.append(Found(batch, source, b.coarsest, fault))

    search(batch, test, (Phase.generate,))
    return Result(count, faults)


def shrunk(found: Found) -> Found:
    """The least program of its batch with a fault of this kind."""
    last = [found]

    class Shown(Exception):
        pass

    def test(b) -> None:
        source = b.source()
        fault = check(compiled(source), b.coarsest)
        if fault is not None and fault.kind == found.fault.kind:
            last[0] = Found(found.batch, source, b.coarsest, fault)
            raise Shown

    try:
        search(found.batch, test, (Phase.generate, Phase.shrink))
    except Shown:
        pass
    return last[0]
