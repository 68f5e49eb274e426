"""The assumptions of the projection, each with its source, or marked as experience.

A quantity that was not measured is a range: low, likely and high, by the time that follows. A projection is made three times,
with all quantities low, all likely and all high, so its interval is wider than one of independent errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .cards import CLUSTER_ONE, L2_ONE

BEGIN = 1.0e-6  # seconds from a kernel's start to its blocks' first copies
EARLY = 0.5e-6  # the least seconds between two kernels where the launch hides behind the end of the kernel ahead
FLOPS_REACHED = 0.8  # of the data sheet's bf16 speed, by large products of the library
ONE_STEP = 64  # a product that sums over at most so many columns is one k-step of the library's kernels


class Range(NamedTuple):
    """A quantity that was not measured."""

    low: float
    likely: float
    high: float
    unit: str
    what: str
    origin: str

    def cells(self) -> list[str]:
        """what, low, likely, high, origin."""
        numbers = (f"{value:.0%}" if self.unit == "%" else f"{value:g}{self.unit}" for value in self[:3])
        return [self.what, *numbers, self.origin]


REVIEW = "a review of the kernels"
RANGES = {
    "bandwidth": Range(
        *(0.94, 0.90, 0.88, "%"),
        "share of the data sheet's bandwidth that is reached, by ours and by the library",
        "copies on an H100 measured about 3.0 TB/s, 90%",
    ),
    "one_step": Range(
        *(0.90, 0.70, 0.60, "%"),
        f"the same of a library product that sums over at most {ONE_STEP} columns, such as u B^T",
        f"{REVIEW}: 60-75% at rank 16; one k-step of a tile hides neither its first loads nor its last stores",
    ),
    "exposed": Range(
        *(0.0, 0.6, 0.8, ""),
        "share of the read of y that a base product does not hide when it adds onto y",
        f"{REVIEW}: 10-18 us of 22 at 8192 x 4096 on an H100, or hidden",
    ),
    "fold": Range(
        *(2.0, 2.5, 2.5, " us"),
        "latency of fold and of fold_grad, and the least time of any other kernel",
        f"{REVIEW}: 6-9 us for both with their launches",
    ),
    "fences": Range(
        *(0.5, 0.75, 1.0, " us"),
        "fetch of tensor maps and fences at the start of a kernel with bulk copies",
        f"{REVIEW}: 0.5-1 us a kernel",
    ),
    "chain": Range(
        *(1.5, 1.75, 2.0, " us"),
        "exchange of k between the blocks of a cluster in shrink_grad that its loop does not hide",
        f"{REVIEW}: 3-5 us a layer together with the fences",
    ),
    "launch": Range(
        *(1.0, 1.2, 2.0, " us"),
        "time between two kernels of a stream, or for a memset",
        f"{REVIEW}: about 1 us; 2 us was assumed before",
    ),
    "main_loop": Range(
        *(1.0, 0.96, 0.94, "%"), "speed of gemm_lotr's main loop, of the library's", f"{REVIEW}: 94-98%; equal at best"
    ),
    "scouts": Range(
        *(1.0, 1.25, 1.65, " x"),
        "a scout's k-step over what its share of L2 allows (395 to 527 clocks on an H100)",
        f"{REVIEW}: 500-650 clocks",
    ),
}


@dataclass(frozen=True)
class Assumed:
    """One value of each of RANGES; seconds where the range has us."""

    bandwidth: float
    one_step: float
    exposed: float
    fold: float
    fences: float
    chain: float
    launch: float
    main_loop: float
    scouts: float


def _level(index: int) -> Assumed:
    return Assumed(**{name: r[index] * (1e-6 if r.unit == " us" else 1) for name, r in RANGES.items()})


LEVELS = {name: _level(i) for i, name in enumerate(("low", "likely", "high"))}
LIKELY = LEVELS["likely"]


class Spread(NamedTuple):
    """A projected value with all assumptions low, likely, high."""

    low: float
    likely: float
    high: float

    @classmethod
    def of(cls, value: Callable[[Assumed], float]) -> Spread:
        return cls(*(value(assumed) for assumed in LEVELS.values()))

    def percent(self) -> str:
        return f"{self.likely:.0%} ({100 * self.low:.0f}-{100 * self.high:.0f})"

    def us(self) -> str:
        return f"{1e6 * self.likely:.1f} ({1e6 * self.low:.1f}-{1e6 * self.high:.1f})"


SOURCES = [
    ("bandwidth, multiprocessors, matrix speed", "the vendor's data sheets, as in cards.py"),
    (f"{FLOPS_REACHED:.0%} of the data sheet's bf16 speed by large products of the library", "assumed"),
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
    ("latency of memory under load 600 ns (B200, RTX 4090: 700)", "assumed: about twice an idle GPU's"),
    (
        "factor_grad's rows of 64 bytes at rank 16 reach the bandwidth of longer ones",
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
    (f"a kernel begins {BEGIN * 1e6:.0f} us after its start", "assumed"),
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


RANGE_HEADS = ("assumed", "low", "likely", "high", "origin")


def range_rows() -> list[list[str]]:
    """A row of RANGE_HEADS per quantity."""
    return [quantity.cells() for quantity in RANGES.values()]


def lines() -> list[str]:
    """The assumptions with a single value, one per line."""
    return [f"{what}: {source}" for what, source in SOURCES]
