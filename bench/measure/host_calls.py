"""Counts of what a step costs the host: Python calls and operators, which are the same on a busy and an idle machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .timing import Timed

PACKAGE = str(Path(__file__).resolve().parents[2] / "lotr_ext")
_FAKES = str(Path(torch.__file__).parent / "_library" / "fake_impl.py")
Counts = dict[str, float]


def python_calls(call: Callable[[], object]) -> Counts:
    """calls: of functions that are written in Python; own: those of lotr_ext, less what stands in for kernels on meta."""
    found = {"calls": -1, "own": 0}  # less call itself

    def seen(frame, event, argument) -> None:
        if event == "call":
            found["calls"] += 1
            found["own"] += frame.f_code.co_filename.startswith(PACKAGE) and not _stands_in(frame)

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def _stands_in(frame) -> bool:
    """Whether it is, or is called by, an operator's shape function."""
    while frame is not None and frame.f_code.co_filename != _FAKES:
        frame = frame.f_back
    return frame is not None


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> Counts:
    """What reaches a dispatch mode, below autograd; a mode is shown the products that a fused operator is made of."""
    with _Operators() as mode:
        call()
    return {"operators": mode.count}


def dispatched(call: Callable[[], object]) -> Counts:
    """Operators that Python or autograd calls, without those that they call in turn."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {"dispatched": sum(_is_operator(event) and not _in_an_operator(event) for event in profiler.events())}


def _is_operator(event) -> bool:
    return event.name.startswith(("aten::", "lotr::"))


def _in_an_operator(event) -> bool:
    above = event.cpu_parent
    while above is not None and not _is_operator(above):
        above = above.cpu_parent
    return above is not None


def count_step(timed: Timed, layers: int) -> dict[str, Counts]:
    """Of a step that has run before, a layer: {"forward": {"calls", "own", "operators", "dispatched"}, "backward": ..}.

    Counted on the calling thread, on which backward runs here too.
    """
    counts: dict[str, Counts] = {"forward": {}, "backward": {}}
    with torch.autograd.set_multithreading_enabled(False):
        for count in (python_calls, operators, dispatched):
            timed.prepare()
            kept: list[object] = [None]  # what each stage returns
            for own, stage in zip(counts.values(), timed.stages):
                found = count(lambda stage=stage, kept=kept: kept.append(stage(kept[-1])))
                own |= {name: value / layers for name, value in found.items()}
    return counts


def count_text(counts: dict[str, Counts] | None, what: str) -> str:
    """ "forward + backward" of one count; - where there is none."""
    return "-" if counts is None else " + ".join(f"{counts[direction][what]:.0f}" for direction in ("forward", "backward"))
