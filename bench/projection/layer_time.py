"""Projects the time of a layer on a GPU. It is not a measurement, and is labelled so everywhere.

Each library operator takes the longer of its operations at the GPU's matrix speed and its bytes at its memory bandwidth, both
at the fractions of assumptions.py, and moves its least bytes. Our kernels take the times that model.py reads off their machine
code and their counted bytes; fused that of fused.py. Operators follow one another, each a launch. From compute capability 9.0
on a kernel of ours that follows one of ours is launched early: while that one still sums. Everything is projected three times,
with all assumptions low, likely and high; rivals under the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

from ..measure.bounds import DIRECTIONS
from ..measure.names import NAMES
from ..measure.shapes import Shape
from .assumptions import FLOPS_REACHED, LEVELS, ONE_STEP, Assumed, Spread
from .cards import CARDS, Card
from .counts import SMALL, Key, Row
from .layer import BETA, FUSED, IN_DRAM, Step, Steps, all_steps
from .model import gap

LABEL = "projection, not measured"


class KernelTime(NamedTuple):
    """Seconds of a kernel of ours, memsets included; of these, the last ones in which the next launch may begin (None: it is
    launched as a library's kernel is, and lets nothing begin)."""

    seconds: float
    after: float | None = None


Times = dict[Key, KernelTime]  # on one GPU, under one set of assumptions
Levels = dict[str, Times]  # by the names of LEVELS
Excess = dict[str, dict[str, Spread]]  # time over the frozen layer less one, by rival and direction


def library_seconds(step: Step, card: Card, assumed: Assumed) -> float:
    """The seconds of one operator that is not a large kernel of ours, without its launch."""
    if step.name in SMALL:  # of ours, with little more than its latency
        return assumed.fold / step.layers + step.work.bytes / (assumed.bandwidth * card.bytes_per_s)
    reached = assumed.one_step if 0 < step.inner <= ONE_STEP else assumed.bandwidth
    products = step.work.flops / (FLOPS_REACHED * card.flops_per_s)
    shown = assumed.exposed * step.added / (assumed.bandwidth * card.bytes_per_s)
    return max(products + shown, step.work.bytes / (reached * card.bytes_per_s), assumed.fold)


def seconds(steps: Steps, direction: str, card: Card, times: Times, assumed: Assumed) -> float:
    """The seconds of "forward", "backward" or both ("step"). Raises KeyError if a kernel of ours has no time."""
    names = ("forward", "backward") if direction == "step" else (direction,)
    return sum(_in_turn(steps[name], card, times, assumed) for name in names)


def _in_turn(steps: list[Step], card: Card, times: Times, assumed: Assumed) -> float:
    """The seconds of sequential operators, each with its launch, which several layers may share."""
    total, after = 0.0, None
    for step in steps:
        own = KernelTime(library_seconds(step, card, assumed)) if step.kernel is None else times[step.kernel]
        total += own.seconds + gap(card, after if own.after is not None else None, assumed) / step.layers
        if step.layers == 1:  # otherwise rarely between
            after = own.after
    return total


def over_frozen(found: dict[str, Steps], card: Card, levels: Levels) -> Excess:
    """Projected time over that of "frozen", minus one."""
    every = {
        level: {n: {d: seconds(s, d, card, times, LEVELS[level]) for d in DIRECTIONS} for n, s in found.items()}
        for level, times in levels.items()
    }
    return {
        name: {d: Spread(*(own[name][d] / own["frozen"][d] - 1 for own in every.values())) for d in DIRECTIONS}
        for name in found
        if name != "frozen"
    }


def excess(shape: Shape, rows: dict[Key, Row], card: Card, levels: Levels) -> Excess:
    """The excess of a single layer; with fused if levels have it."""
    found = all_steps(shape, rows, card.multiprocessors)
    del found[IN_DRAM]  # a statement about bytes; the times contain what comes from L2 and what does not
    fused = [step.kernel for steps in found[FUSED].values() for step in steps if step.name == "gemm_lotr"]
    if not all(key in times for times in levels.values() for key in fused):
        del found[FUSED]
    return over_frozen(found, card, levels)


def assumptions() -> str:
    """The assumptions in one sentence."""
    return (
        f"{LABEL}: our kernels as their machine code is modelled; library operators at the longer of their operations "
        f"({FLOPS_REACHED:.0%} of the data sheet's bf16 speed) and their bytes. The first value is with likely assumptions; in "
        "brackets, with all of them low and with all of them high"
    )


def table_of(title: str, columns: dict[str, Excess], label: dict[str, str] = NAMES):
    """A row per rival, a column per GPU: forward, backward, and both with their interval."""
    from ..measure.session import Table

    result = Table(f"{title}: {LABEL}; forward, backward, both (low-high)", "", *(CARDS[gpu].name for gpu in columns))
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        own = (column.get(name) for column in columns.values())
        result.add_row(label.get(name, name), *("-" if e is None else _cell(e) for e in own))
    return result


def _cell(own: dict[str, Spread]) -> str:
    return f"{own['forward'].likely:.0%}, {own['backward'].likely:.0%}, {own['step'].percent()}"


def table(shape: Shape, rows: dict[Key, Row], levels: dict[str, Levels]):
    """Every rival on every GPU of levels."""
    m, k, n, r = shape
    columns = {gpu: excess(shape, rows, CARDS[gpu], own) for gpu, own in levels.items()}
    return table_of(f"Time over the frozen layer in %, {m} x {k} x {n}, r = {r}, bf16", columns)


STEP_HEADS = ("direction", "operator", "us")


def step_rows(shape: Shape, rows: dict[Key, Row], card: Card, levels: Levels) -> list[list[str]]:
    """The parts of beta's time over the frozen layer: a row per operator, and one for the launches."""
    found = all_steps(shape, rows, card.multiprocessors)

    def own(step: Step, level: str) -> float:
        return library_seconds(step, card, LEVELS[level]) if step.kernel is None else levels[level][step.kernel].seconds

    lines, launches = [], dict.fromkeys(LEVELS, 0.0)
    for direction, steps in found[BETA].items():
        frozen = found["frozen"][direction]
        for level, times in levels.items():
            whole = (seconds(way, direction, card, times, LEVELS[level]) for way in (found[BETA], found["frozen"]))
            launches[level] += next(whole) - next(whole)
        for step in steps:
            base = frozen if step.name == "base product" else []
            spread = Spread(*(own(step, level) - sum(own(one, level) for one in base) for level in levels))
            launches = {level: launches[level] - value for level, value in zip(LEVELS, spread)}
            lines.append([direction, step.name + ", over the frozen one" * bool(base), spread.us()])
    return [*lines, ["both", "launches", Spread(*launches.values()).us()]]
