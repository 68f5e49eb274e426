"""What the counted bytes would cost on a GPU: a projection, no measurement, and labelled so wherever it appears.

Each operator takes the longer of its operations at the GPU's matrix speed and its bytes at its memory bandwidth, both at the
fractions below; operators follow one another, and launches cost nothing. Library operators are taken at their least bytes; of
our kernels the bytes of the large matrices are those that the executor counted, see layer_traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..measure.bounds import DIRECTIONS, Work
from ..measure.shapes import Shape
from .counts import Key, Row
from .layer import Steps, all_steps

FLOPS_REACHED, BANDWIDTH_REACHED = 0.8, 0.9  # of the data sheet's, by large products and by long streams
LABEL = "projection, not measured"


@dataclass(frozen=True)
class Gpu:
    """From the vendor's data sheet: dense bf16 operations a second, bytes a second, multiprocessors."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int

    def seconds(self, work: Work) -> float:
        return max(work.flops / (FLOPS_REACHED * self.flops_per_s), work.bytes / (BANDWIDTH_REACHED * self.bytes_per_s))


GPUS = {
    "a100": Gpu("A100 80GB SXM", 312e12, 2.039e12, 108),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, 132),
    "h200": Gpu("H200", 989e12, 4.8e12, 132),
    "b200": Gpu("B200", 2250e12, 8.0e12, 148),
    "rtx4090": Gpu("RTX 4090", 165.2e12, 1.008e12, 128),
}


def seconds(steps: Steps, direction: str, gpu: Gpu) -> float:
    """Of "forward", "backward" or both ("step")."""
    names = ("forward", "backward") if direction == "step" else (direction,)
    return sum(gpu.seconds(step.work) for name in names for step in steps[name])


def excess(shape: Shape, rows: dict[Key, Row], gpu: Gpu) -> dict[str, dict[str, float]]:
    """Projected time over the frozen layer less one, by rival and direction."""
    found = all_steps(shape, rows, gpu.multiprocessors)
    frozen = {direction: seconds(found["frozen"], direction, gpu) for direction in DIRECTIONS}
    return {
        name: {direction: seconds(steps, direction, gpu) / frozen[direction] - 1 for direction in DIRECTIONS}
        for name, steps in found.items()
        if name != "frozen"
    }


def assumptions() -> str:
    return (
        f"{LABEL}: each operator at the longer of its operations ({FLOPS_REACHED:.0%} of the data sheet's bf16 speed) and its "
        f"bytes ({BANDWIDTH_REACHED:.0%} of its bandwidth), launches free"
    )


def table(shape: Shape, rows: dict[Key, Row], gpus: list[str]):
    """Forward / backward / both of every rival on every GPU."""
    from ..measure.session import new_table

    m, k, n, r = shape
    title = f"Time over the frozen layer, {m} x {k} x {n}, r = {r}, bf16: {LABEL}; forward, backward, both"
    result = new_table(title, "", *(GPUS[gpu].name for gpu in gpus))
    columns = {gpu: excess(shape, rows, GPUS[gpu]) for gpu in gpus}
    for name in columns[gpus[0]]:
        cells = (", ".join(f"{columns[gpu][name][direction]:.1%}" for direction in DIRECTIONS) for gpu in gpus)
        result.add_row(name, *cells)
    result.caption, result.caption_justify = assumptions(), "left"
    return result
