"""Bytes that each CUDA kernel moves, counted by the SIMT executor, over the least it could: python -m bench.traffic

The kernels run on the CPU with the split that the planner chooses for a GPU of 132 multiprocessors (H100). The counts are
exact and the same every time: what a warp's instruction touches in global memory, per array, and in 32-byte sectors.
"large" is what the kernel is about: x, g, or y in and out. Factors and partial sums are listed apart; most of what is
read again comes from L2.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(8192, 4096, 16), (1024, 1024, 64), (1024, 2048, 64)]
KERNELS = ("shrink", "expand_add", "factor_grad", "shrink_grad")
LARGE = {"shrink": "x", "expand_add": "y", "factor_grad": "x", "shrink_grad": "g"}


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: m tokens, n columns of the large matrix, rank r."""

    kernel: str
    m: int
    n: int
    r: int
    blocks: int
    large: int  # bytes of the large matrix, in and out
    moved: int  # of which moved, in fact
    factors: int
    partials: int
    sector_efficiency: float
    bank_conflicts: float  # wavefronts over phases
    launches: int

    @property
    def once(self) -> float:
        """How often the large matrix moves; 1 is the least."""
        return self.moved / self.large

    @property
    def extra(self) -> float:
        """Factors and partial sums over the large matrix."""
        return (self.factors + self.partials) / self.large

    @property
    def over_least(self) -> float:
        """Those bytes over the least that any split into so many blocks could have."""
        return (self.factors + self.partials) / least_extra(self.kernel, self.m, self.n, self.r, self.blocks)


def least_extra(kernel: str, m: int, n: int, r: int, blocks: int, element: int = 2) -> float:
    """Least bytes of factors and partial sums for s x t = `blocks` blocks, s along the tokens and t along the columns.

    The factor of the columns is read s times and that of the tokens t times; a partial sum is 4 bytes, written and read.
    """
    along_m = r * n * {"shrink": element, "expand_add": element, "factor_grad": 8, "shrink_grad": element + 8}[kernel]
    along_n = r * m * {"shrink": 8, "expand_add": element, "factor_grad": element, "shrink_grad": element + 8}[kernel]
    return 2 * (along_m * along_n * blocks) ** 0.5  # s along_m + t along_n is least where the two are equal


def executor() -> ModuleType:
    """The test module that runs the kernels on the CPU, built if need be."""
    path = ROOT / "python_tests" / "simt" / "build.py"
    if not path.exists():
        raise SystemExit(f"bench.traffic needs the repository's tests: expected {path}")
    spec = importlib.util.spec_from_file_location("build", path)
    build = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("build", build)
    spec.loader.exec_module(build)
    return build.load("plain")


def aligned(shape: tuple[int, int], dtype: type) -> np.ndarray:
    """Zeros from an address divisible by 256, as torch's allocator gives."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    raw = np.zeros(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size].view(dtype).reshape(shape)


def count(lib: ModuleType, kernel: str, m: int, n: int, r: int, multiprocessors: int = 132) -> Row:
    """Runs one kernel in bfloat16 and counts."""
    lib.set_device(multiprocessors=multiprocessors)
    lib.set_options(count_memory=True)
    lib.reset_counters()
    large, factor, narrow = aligned((m, n), np.uint16), aligned((n, r), np.uint16), aligned((m, r), np.uint16)
    if kernel == "shrink":
        lib.shrink(large, factor, narrow)
    elif kernel == "expand_add":
        lib.expand_add_(large, narrow, factor)
    elif kernel == "factor_grad":
        lib.factor_grad_(aligned((n, r), np.float32), large, narrow)
    elif kernel == "shrink_grad":
        lib.shrink_grad(large, factor, narrow, aligned((m, r), np.uint16), aligned((n, r), np.float32))
    else:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel}")
    counters = lib.counters()
    lib.set_options()
    arrays = {name: a for name, a in counters["arrays"].items() if a["read_bytes"] + a["written_bytes"]}
    total = {name: a["read_bytes"] + a["written_bytes"] for name, a in arrays.items()}
    sectors = sum(a["read_sectors"] + a["written_sectors"] for a in arrays.values())
    grid = counters["launches"][0]["grid"]
    main = LARGE[kernel]
    return Row(
        kernel=kernel,
        m=m,
        n=n,
        r=r,
        blocks=grid[0] * grid[1] * grid[2],
        large=large.nbytes * (2 if kernel == "expand_add" else 1),
        moved=total[main],
        # what is written once at the end is neither: u, k, Q and the accumulator
        factors=sum(a["read_bytes"] for name, a in arrays.items() if name not in (main, "workspace", "acc", "Q")),
        partials=total.get("workspace", 0),
        sector_efficiency=sum(total.values()) / (32 * sectors),
        bank_conflicts=counters["shared_wavefronts"] / max(1, counters["shared_phases"]),
        launches=len(counters["launches"]),
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU that is planned for (default 132)")
    options = parser.parse_args(arguments)
    if options.multiprocessors < 1:
        parser.error(f"--multiprocessors: expected at least 1, got {options.multiprocessors}")
    lib = executor()
    table = Table(title=f"Counted traffic, bf16, planned for {options.multiprocessors} multiprocessors (SIMT executor, no GPU)")
    for name in ("kernel", "M x N", "r", "blocks", "large, x its size", "factors", "partial sums", "x large", "x least"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for name in ("sectors used", "bank conflicts"):
        table.add_column(name, justify="right")
    for m, n, r in SHAPES:
        for kernel in KERNELS:
            row = count(lib, kernel, m, n, r, options.multiprocessors)
            table.add_row(
                kernel, f"{m} x {n}", str(r), str(row.blocks), f"{row.once:.4f}", f"{row.factors / 1e6:.2f} MB",
                f"{row.partials / 1e6:.2f} MB", f"{row.extra:.3f}", f"{row.over_least:.2f}",
                f"{row.sector_efficiency:.1%}", f"{row.bank_conflicts:.3f}",
            )  # fmt: skip
        table.add_section()
    Console(width=132).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
