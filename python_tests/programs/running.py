"""Runs programs in batches, each a search of hypothesis with a seed of its own, and shrinks those that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from programs.builder import Builder
from programs.checking import Fault, check
from programs.script import compiled, standalone
from programs.steps import programs

BATCH = 50
SHRINKS = 200  # programs that one search for a smaller one may run


class Batch(NamedTuple):
    """programs: how many different ones; seed: of the search."""

    programs: int
    seed: int


class Found(NamedTuple):
    """A fault, and the program that shows it; dtype: the coarsest in which it computes."""

    batch: Batch
    source: str
    dtype: torch.dtype
    fault: Fault

    def script(self) -> str:
        return standalone(self.source, self.dtype, self.fault.text)


class Result(NamedTuple):
    """Of a batch: how many programs ran, and what was wrong."""

    programs: int
    faults: list[Found]


class Shown(Exception):
    """The program at hand has the fault that is being shrunk."""


class Enough(KeyboardInterrupt):
    """Ends a search at once: hypothesis lets nothing else through."""


def batches(count: int, first_seed: int) -> list[Batch]:
    return [Batch(min(BATCH, count - i), first_seed * 1_000_000 + i // BATCH) for i in range(0, count, BATCH)]


def search(batch: Batch, test: Callable[[str, torch.dtype], None], *phases: Phase) -> None:
    """Runs test on the programs of a batch: always the same ones, for nothing is kept from run to run."""
    options = settings(
        max_examples=batch.programs + 5,  # some come twice
        phases=phases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )

    seen: set[str] = set()

    def once(b: Builder) -> None:
        source = b.source()
        if phases == (Phase.generate,) and (source in seen or len(seen) == batch.programs):
            return
        seen.add(source)
        test(source, b.coarsest)

    seed(batch.seed)(options(given(programs())(once)))()


def run_batch(batch: Batch, notes: Path | None = None) -> Result:
    """Runs all programs of a batch, whatever is wrong with them. notes: a folder for the program at hand, should it kill us."""
    torch.set_num_threads(1)
    faults: list[Found] = []
    count = 0

    def test(source: str, dtype: torch.dtype) -> None:
        nonlocal count
        count += 1
        if notes is not None:
            (notes / f"running-{os.getpid()}.py").write_text(source)
        found = look(batch, source, dtype)
        if found is not None:
            faults.append(found)

    search(batch, test, Phase.generate)
    return Result(count, faults)


def look(batch: Batch, source: str, dtype: torch.dtype) -> Found | None:
    fault = check(compiled(source), dtype)
    return None if fault is None else Found(batch, source, dtype, fault)


def shrunk(found: Found) -> Found:
    """A small program with a fault of the same kind: the least that hypothesis finds in the batch, less the lines it can do
    without."""
    last, runs = found, 0

    def test(source: str, dtype: torch.dtype) -> None:
        nonlocal last, runs
        runs += last is not found  # those before the first fault do not count
        if runs > SHRINKS:
            raise Enough
        other = look(found.batch, source, dtype)
        if other is not None and other.fault.kind == found.fault.kind:
            last = other
            raise Shown

    try:
        search(found.batch, test, Phase.generate, Phase.shrink)
    except (Shown, Enough):
        pass
    return without_lines(last)


def without_lines(found: Found) -> Found:
    """found without each line, or block, whose absence leaves a fault of the same kind."""
    lines = found.source.splitlines()
    i = len(lines) - 1
    while i > 0 and not lines[i].startswith("def program"):
        depth = len(lines[i]) - len(lines[i].lstrip())
        end = next((j for j in range(i + 1, len(lines)) if len(lines[j]) - len(lines[j].lstrip()) <= depth), len(lines))
        source = "\n".join(lines[:i] + lines[end:]) + "\n"
        try:
            other = look(found.batch, source, found.dtype)
        except SyntaxError:
            other = None
        if other is not None and other.fault.kind == found.fault.kind:
            found, lines = other, source.splitlines()
        i = min(i, len(lines)) - 1
    return found
