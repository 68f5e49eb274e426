"""What the model takes as given: cards' data sheets, latencies that others measured, and a few fractions; each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from ..traffic.projection import GPUS, Gpu
from .issue import Latencies

REACHED = 0.94  # of the data sheet's bandwidth by long streams
BEGIN = 1.0e-6  # seconds from a kernel's start to its blocks' first loads
LAUNCH = 2.0e-6  # seconds between dependent kernels on one stream, launch or memset
SHARPNESS = 8  # of `together`


def together(seconds: list[float]) -> float:
    """Limits that overlap, but not quite where two are equal: a power mean, 9 % above either of two equal ones."""
    most = max(seconds)
    return most * sum((s / most) ** SHARPNESS for s in seconds) ** (1 / SHARPNESS) if most else 0.0


@dataclass(frozen=True)
class Card:
    """A GPU as the model sees it."""

    gpu: Gpu
    architecture: str  # that its kernels are compiled for
    clock: float  # cycles a second
    shared_bytes: int  # of a multiprocessor
    threads: int
    memory_latency: float  # seconds, loaded
    l2_latency: int  # cycles
    l2_bytes_a_cycle: float  # a multiprocessor, when all read
    matrix_cycles: float  # of a scheduler for one m16n8k16 with float32 sums
    l2_bytes_one: float = 64.0  # a cycle, of a multiprocessor that reads alone
    shared_reserved: int = 1024  # bytes a block

    @property
    def name(self) -> str:
        return self.gpu.name

    @property
    def bandwidth(self) -> float:
        return self.gpu.bytes_per_s

    @property
    def multiprocessors(self) -> int:
        return self.gpu.multiprocessors

    def latencies(self, dtype: str) -> Latencies:
        return Latencies(matrix=self.matrix_cycles, global_load=self.l2_latency)


CARDS = {
    "a100": Card(GPUS["a100"], "80", 1.41e9, 164 * 1024, 2048, 600e-9, 262, 27.0, 8.0),
    "h100": Card(GPUS["h100"], "90a", 1.83e9, 228 * 1024, 2048, 600e-9, 263, 27.0, 6.4),
    "h200": Card(GPUS["h200"], "90a", 1.83e9, 228 * 1024, 2048, 600e-9, 263, 27.0, 6.4),
    "b200": Card(GPUS["b200"], "100a", 1.86e9, 228 * 1024, 2048, 700e-9, 300, 27.0, 8.0),
}
