"""Counts of what a step costs the host: Python calls and operators, which are the same on a busy and an idle machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .timing import Timed

PACKAGE = str(Path(__file__).resolve().parents[2] / "lotr_ext")


def python_calls(call: Callable[[], object]) -> Counter[str]:
    """How often each function that is written in Python was called during call, by its file."""
    found: Counter[str] = Counter()

    def seen(frame, event, argument) -> None:
        if event == "call":
            found[frame.f_code.co_filename] += 1

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def package_calls(found: Counter[str]) -> int:
    """Of those, the calls of functions in lotr_ext's files."""
    return sum(count for file, count in found.items() if file.startswith(PACKAGE))


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher's end, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_step(timed: Timed, layers: int) -> dict[str, dict[str, float]]:
    """Of a step that has run before, a layer: {"forward": {"calls", "own", "operators"}, "backward": ..}.

    calls: of Python functions; own: those of lotr_ext; operators: below autograd. On the calling thread, which on a CPU is
    where backward runs too.
    """
    counts: dict[str, dict[str, float]] = {}
    for what in ("calls", "operators"):
        timed.prepare()
        state: object = None
        for direction, stage in zip(("forward", "backward"), timed.stages):
            kept: list[object] = []
            own = counts.setdefault(direction, {})
            with torch.autograd.set_multithreading_enabled(False):
                if what == "calls":
                    found = python_calls(lambda stage=stage, state=state, kept=kept: kept.append(stage(state)))
                    own["calls"] = (sum(found.values()) - 1) / layers  # less our own lambda
                    own["own"] = package_calls(found) / layers
                else:
                    with Operators() as operators:
                        kept.append(stage(state))
                    own["operators"] = sum(operators.found.values()) / layers
            state = kept[0]
    return counts
