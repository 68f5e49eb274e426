"""The GPUs for which times are projected."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .issue import SCHEDULERS, Latencies

REGISTERS, REGISTER_UNIT, WARP_UNIT = 65536, 256, 4  # of a multiprocessor, a warp; warps that get theirs together
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # of a block
L2_ONE = 64.0  # bytes a cycle that one multiprocessor gets from L2
CLUSTER_ONE = 13.0  # bytes a cycle that each multiprocessor gets from shared memory of its cluster


@dataclass(frozen=True)
class Card:
    """A GPU. Speeds, multiprocessors and memory are of the vendor's data sheet; `assumptions.SOURCES` has the rest's origin."""

    name: str
    flops_per_s: float  # dense bf16
    bytes_per_s: float
    multiprocessors: int
    architecture: str  # that its kernels are compiled for
    pattern: str  # of the names that drivers give it
    clock: float  # cycles a second
    shared_bytes: int  # of a multiprocessor
    threads: int  # of a multiprocessor
    memory_latency: float  # seconds, under load
    l2_latency: int  # cycles
    matrix_cycles: float  # of a scheduler for one m16n8k16 with float32 sums
    l2_bytes_a_cycle: float = 27  # of a multiprocessor, when all read

    @property
    def early(self) -> bool:
        """Whether our kernels' launches may be early: compute capability 9.0 and later."""
        return int(self.architecture.rstrip("a")) >= 90

    def latencies(self) -> Latencies:
        wgmma = 2 * 16 * 8 * 16 * SCHEDULERS * self.multiprocessors * self.clock / self.flops_per_s
        return Latencies(matrix=self.matrix_cycles, global_load=self.l2_latency, wgmma=wgmma)

    def is_called(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None


CARDS = {
    "a100": Card("A100 80GB SXM", 312e12, 2.039e12, 108, "80", r"A100", 1.41e9, 164 << 10, 2048, 600e-9, 262, 8),
    "h100": Card("H100 SXM", 989e12, 3.35e12, 132, "90a", r"H100", 1.83e9, 228 << 10, 2048, 600e-9, 263, 6.4),
    "h200": Card("H200", 989e12, 4.8e12, 132, "90a", r"H200", 1.83e9, 228 << 10, 2048, 600e-9, 263, 6.4),
    "b200": Card("B200", 2250e12, 8.0e12, 148, "100a", r"B200", 1.86e9, 228 << 10, 2048, 700e-9, 300, 8),
    "rtx4090": Card("RTX 4090", 165.2e12, 1.008e12, 128, "89", r"RTX 4090", 2.52e9, 100 << 10, 1536, 700e-9, 273, 32),
}


def card_called(name: str) -> str | None:
    """The key in CARDS for a driver's name of a GPU; None for an unknown one."""
    return next((key for key, card in CARDS.items() if card.is_called(name)), None)
