"""What the model takes as given, each with where it comes from. What has no source but experience says so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .issue import SCHEDULERS, Latencies
from .layer_time import EARLY, GPUS, LAUNCH, Gpu

REACHED = 0.94  # of the data sheet's bandwidth, by long streams of 16-byte copies
BEGIN = 1.0e-6  # seconds from a kernel's start to its blocks' first copies
SHARPNESS = 8  # of `together`
REGISTERS, REGISTER_UNIT, WARP_UNIT = 65536, 256, 4  # of a multiprocessor, a warp; warps that get theirs together
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # of a block
L2_ONE = 64.0  # bytes a cycle that one multiprocessor gets from L2
CLUSTER_ONE = 13.0  # bytes a cycle that each multiprocessor gets from shared memory of its cluster


def together(seconds: list[float]) -> float:
    """Limits that overlap, but not quite where two are equal: a power mean, 9 % above either of two equal ones."""
    most = max(seconds)
    return most * sum((s / most) ** SHARPNESS for s in seconds) ** (1 / SHARPNESS) if most else 0.0


@dataclass(frozen=True)
class Card:
    """A GPU as the model sees it."""

    gpu: Gpu
    architecture: str  # that its kernels are compiled for
    pattern: str  # of the names that drivers give it
    clock: float  # cycles a second
    shared_bytes: int  # of a multiprocessor
    threads: int
    memory_latency: float  # seconds, under load
    l2_latency: int  # cycles
    l2_bytes_a_cycle: float  # of a multiprocessor, when all read
    matrix_cycles: float  # of a scheduler for one m16n8k16 with float32 sums

    @property
    def name(self) -> str:
        return self.gpu.name

    @property
    def bandwidth(self) -> float:
        return self.gpu.bytes_per_s

    @property
    def multiprocessors(self) -> int:
        return self.gpu.multiprocessors

    def latencies(self) -> Latencies:
        wgmma = 2 * 16 * 8 * 16 * SCHEDULERS * self.multiprocessors * self.clock / self.gpu.flops_per_s
        return Latencies(matrix=self.matrix_cycles, global_load=self.l2_latency, wgmma=wgmma)

    def is_called(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None


CARDS = {
    "a100": Card(GPUS["a100"], "80", r"A100", 1.41e9, 164 << 10, 2048, 600e-9, 262, 27, 8),
    "h100": Card(GPUS["h100"], "90a", r"H100", 1.83e9, 228 << 10, 2048, 600e-9, 263, 27, 6.4),
    "h200": Card(GPUS["h200"], "90a", r"H200", 1.83e9, 228 << 10, 2048, 600e-9, 263, 27, 6.4),
    "b200": Card(GPUS["b200"], "100a", r"B200", 1.86e9, 228 << 10, 2048, 700e-9, 300, 27, 8),
    "rtx4090": Card(GPUS["rtx4090"], "89", r"RTX 4090", 2.52e9, 100 << 10, 1536, 700e-9, 273, 27, 32),
}

SOURCES = [
    ("bandwidth, multiprocessors, matrix speed", "the vendor's data sheets, as in bench/projection/layer_time.py"),
    ("clock", "data sheet's matrix speed over multiprocessors and operations a cycle: the boost clock; a hot card runs slower"),
    (
        "registers, shared memory, threads of a multiprocessor; registers go to four warps at a time",
        "CUDA programming guide, technical specifications by compute capability; as the compiler counts, too",
    ),
    (
        "an integer instruction takes its unit 2 cycles a warp, a multiply-add 2, float 1",
        "CUDA programming guide, arithmetic throughput (64 and 128 results a cycle and multiprocessor); "
        "the compiler's own stalls between such instructions agree",
    ),
    (
        "cycles between instructions, scoreboards",
        "the compiler's control fields in the machine code; their layout: arXiv 1804.06826",
    ),
    (
        "latency of shared memory 29 cycles, of L2 262 to 273",
        "assumed, of the size that microbenchmarks report (A100, H100 PCIe and RTX 4090 are those of arXiv 2402.13499)",
    ),
    (
        "m16n8k16 takes a scheduler 8 cycles on an A100, 32 on an RTX 4090 (data sheet), 6.4 on an H100",
        "an H100's assumed: mma.sync at 63 % of its peak, which wgmma alone reaches; a B200's: an A100's a multiprocessor",
    ),
    (
        "wgmma runs at the data sheet's peak, its operands at 128 bytes a cycle, B once for a warpgroup, transposed ones too; "
        "bulk copies take the same path; the warp that issues them costs nothing; in flight is half of shrink_grad's ring, and "
        "all stages of the others' but those that are multiplied and as many before; a multicast is read from L2 once and "
        "takes the path of each block that it goes to",
        "assumed, the peak by the data sheet; the rings from the kernels' sources",
    ),
    (
        "a block's last sums on their way through its shared memory take a store, a barrier, a load, and 128 bytes a cycle; "
        "its last store an L2 latency",
        "assumed: other warps do the same, so that nothing hides it",
    ),
    ("a barrier of a cluster takes as long as a load from L2", "assumed"),
    ("shared-memory and load path: 128 bytes a cycle and multiprocessor", "CUDA programming guide (32 banks of 4 bytes)"),
    (
        "latency of memory under load 600 ns (B200, RTX 4090: 700)",
        "assumed: about twice an idle GPU's",
    ),
    (f"{REACHED:.0%} of the data sheet's bandwidth is reached", "assumed: what STREAM-like programs are reported to reach"),
    (
        "factor_grad's rows of 64 bytes at rank 16 reach it too",
        "assumed: they are whole sectors, and blocks with the other half of a line walk the same rows at the same time",
    ),
    (
        f"L2 gives {L2_ONE:.0f} bytes a cycle to one multiprocessor, 27 to each when all read",
        "assumed, from A100's 5120 a cycle for all",
    ),
    (
        "blocks read what they sum at the end at the same time, at L2's 27 bytes a cycle; so they store it where they wait for "
        "one another; a cooperative launch costs no more than another, its wait an L2 latency; one of clusters is possible",
        "assumed: blocks of the same work end together; the driver may take longer to make sure of the room; clusters: "
        "NVlabs/cuda-oxide issues 480 and 505, which launch such kernels on Hopper",
    ),
    (
        f"shared memory of a cluster gives {CLUSTER_ONE:.0f} bytes a cycle to each multiprocessor; its latency and a cluster's "
        "barrier are an L2 latency each; blocks of clusters begin like others, as many on each multiprocessor",
        "bandwidth: 2.65e12 bytes a second in clusters of 4 on an H100 PCIe (arXiv 2402.13499), which reports a latency of 180 "
        "cycles; the rest assumed",
    ),
    (f"a kernel begins {BEGIN * 1e6:.0f} us after its start; {LAUNCH * 1e6:.0f} us between kernels of a stream", "assumed"),
    (
        "an early launch of ours behind a kernel of ours takes that time from where this one lets it begin, not from its end: "
        f"what is left is at least {EARLY * 1e6:.1f} us",
        "CUDA programming guide, programmatic dependent launch: it may begin once all blocks have let it; the rest assumed",
    ),
    (
        "blocks of shrink_grad keep pace: the warps that sum k, and without wgmma Q's column tiles but the last, are done "
        "before the last tile's products are, and cost those that multiply nothing but the bytes",
        "assumed: all blocks run at the same time and move the same bytes; a block that falls back sums more, the others less",
    ),
    ("a barrier 20 cycles, a taken branch 8, constants and special registers 30", "assumed"),
    ("no instruction-cache misses, no throttling, L2 keeps factors and partial sums", "assumed"),
]


def lines() -> list[str]:
    """The assumptions, one a line."""
    return [f"{what}: {source}" for what, source in SOURCES]
