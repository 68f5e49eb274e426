"""What a layer would cost on a GPU: a projection, no measurement, and labelled so wherever it appears.

Each library operator takes the longer of its operations at the GPU's matrix speed and its bytes at its memory bandwidth, both
at the fractions below, and moves its least bytes. Our kernels take the times that bench.static reads off their machine code
and their counted bytes; fused that of fused.py, which takes its main loop to be as fast as the library's product:
a hope before a GPU has run it. Operators follow one another, each a launch; fold and fold_grad are one launch for the layers of
a group. From compute capability 9.0 on a kernel of ours that follows one of ours is launched early: while that one still sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..measure.bounds import DIRECTIONS, Work
from ..measure.names import NAMES
from ..measure.shapes import Shape
from .counts import Key, Row
from .layer import FUSED, IN_DRAM, LAYERS, Step, Steps, all_steps

FLOPS_REACHED, BANDWIDTH_REACHED = 0.8, 0.9  # of the data sheet's, by large products and by long streams
LAUNCH = 2.0e-6  # seconds between two kernels of a stream, the second after the first; a memset as well
EARLY = 0.5e-6  # the least of those seconds where the launch hides behind the end of the kernel ahead
LABEL = "projection, not measured"


class KernelTime(NamedTuple):
    """Seconds of a kernel of ours, memsets included; of these, the last ones in which the next launch may begin (None: it is
    launched as a library's kernel is, and lets nothing begin)."""

    seconds: float
    after: float | None = None


Times = dict[Key, KernelTime]  # on one GPU


@dataclass(frozen=True)
class Gpu:
    """From the vendor's data sheet: dense bf16 operations a second, bytes a second, multiprocessors."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int
    early: bool = False  # whether our kernels' launches may be early: compute capability 9.0 and later

    def seconds(self, work: Work) -> float:
        return max(work.flops / (FLOPS_REACHED * self.flops_per_s), work.bytes / (BANDWIDTH_REACHED * self.bytes_per_s))


GPUS = {
    "a100": Gpu("A100 80GB SXM", 312e12, 2.039e12, 108),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, 132, True),
    "h200": Gpu("H200", 989e12, 4.8e12, 132, True),
    "b200": Gpu("B200", 2250e12, 8.0e12, 148, True),
    "rtx4090": Gpu("RTX 4090", 165.2e12, 1.008e12, 128),
}


def gap(gpu: Gpu, after: float | None) -> float:
    """Seconds between two kernels of a stream. after: how long the one ahead still runs when the second may begin; None: as
    long as any that was not launched early."""
    return LAUNCH if after is None or not gpu.early else max(EARLY, LAUNCH - after)


def seconds(steps: Steps, direction: str, gpu: Gpu, times: Times) -> float:
    """Of "forward", "backward" or both ("step"). KeyError where a kernel of ours has no time."""
    names = ("forward", "backward") if direction == "step" else (direction,)
    return sum(_in_turn(steps[name], gpu, times) for name in names)


def _in_turn(steps: list[Step], gpu: Gpu, times: Times) -> float:
    """Operators one after another, each with its launch, which several layers may share."""
    total, after = 0.0, None
    for step in steps:
        own = KernelTime(gpu.seconds(step.work)) if step.kernel is None else times[step.kernel]
        total += own.seconds + gap(gpu, after if own.after is not None else None) / step.layers
        if step.layers == 1:  # else hardly ever in between
            after = own.after
    return total


def excess(shape: Shape, rows: dict[Key, Row], gpu: Gpu, times: Times) -> dict[str, dict[str, float]]:
    """Projected time over the frozen layer less one, by rival and direction; of fused where times have it."""
    found = all_steps(shape, rows, gpu.multiprocessors)
    del found[IN_DRAM]  # a statement about bytes; the times contain what comes from L2 and what does not
    if not all(step.kernel in times for steps in found[FUSED].values() for step in steps if step.name == "gemm_lotr"):
        del found[FUSED]
    frozen = {direction: seconds(found["frozen"], direction, gpu, times) for direction in DIRECTIONS}
    return {
        name: {direction: seconds(steps, direction, gpu, times) / frozen[direction] - 1 for direction in DIRECTIONS}
        for name, steps in found.items()
        if name != "frozen"
    }


def assumptions() -> str:
    return (
        f"{LABEL}: our kernels as bench.static models their machine code; library operators at the longer of their operations "
        f"({FLOPS_REACHED:.0%} of the data sheet's bf16 speed) and their bytes ({BANDWIDTH_REACHED:.0%} of its bandwidth); "
        f"a launch {LAUNCH * 1e6:.0f} us each, fold and fold_grad one for {LAYERS} layers; one of ours after one of ours hides "
        f"behind that one's sum from compute capability 9.0 on, but for {EARLY * 1e6:.1f} us; "
        "fused, on Hopper alone, with a main loop as fast as the library's product"
    )


def table(shape: Shape, rows: dict[Key, Row], times: dict[str, Times]):
    """Forward / backward / both of every rival on every GPU of times."""
    from ..measure.session import new_table

    m, k, n, r = shape
    title = f"Time over the frozen layer, {m} x {k} x {n}, r = {r}, bf16: {LABEL}; forward, backward, both"
    result = new_table(title, "", *(GPUS[gpu].name for gpu in times))
    columns = {gpu: excess(shape, rows, GPUS[gpu], own) for gpu, own in times.items()}
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = (
            ", ".join(f"{column[name][direction]:.1%}" for direction in DIRECTIONS) if name in column else "-"
            for column in columns.values()
        )
        result.add_row(NAMES.get(name, name), *cells)
    result.caption, result.caption_justify = assumptions(), "left"
    return result
