"""Runs kernels in one build of the executor, in a process of its own: for the sanitizer, race and coverage tests.

python sweep.py --mode race --shapes pipeline --kinds bf16,fp32 --schedules forward,reverse,1,2
python sweep.py --mode race --shapes gemm_lotr_quick --schedules forward/1,101/4
Prints one line for each failure and exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import gemm_lotr_cases as gemm  # noqa: E402

from csrc.simt.checks.arrays import ALIGNED, ODD, PACKED  # noqa: E402
from csrc.simt.checks.cases import KERNELS  # noqa: E402
from csrc.simt.checks.problem import schedule  # noqa: E402
from csrc.simt.checks.shapes import SHAPES, Shape  # noqa: E402

# Two blocks or more in each dimension of every grid, and walks of more tiles than there are stages, so that every stage
# is filled a second time; with and without dropout, aligned and not. On two multiprocessors a block owns tiles in both
# directions.
PIPELINE = [
    Shape(700, 560, 16, ALIGNED, sms=5),
    Shape(700, 560, 16, ALIGNED, sms=2),
    Shape(330, 700, 40, ALIGNED, 0.25, 6, r2=20, layers=2),
    Shape(520, 264, 16, ODD, 0.1, 4),
    Shape(520, 264, 16, ODD, 0.1, 4, early=False),
    Shape(520, 264, 16, ODD, 0.1, 7),  # three splits, no cluster: the last block sums
    # of shrink_grad: sums of several column tiles, by all blocks or the last
    Shape(330, 600, 16, ALIGNED, sms=4, early=False),
    Shape(330, 600, 40, ALIGNED, sms=6),
    # of factor_grad at rank 16: splits that are a cluster, run together, or are summed by the last
    Shape(1700, 40, 16, ODD, 0.1, 4),
    Shape(1700, 40, 16, ODD, 0.1, 4, early=False),
    Shape(1700, 72, 16, ALIGNED, sms=3),
    Shape(130, 1700, 16, ALIGNED, sms=6),  # of shrink, whose warps share a tile's columns
    # of the kernels by wgmma, at ranks 16 and 31: swizzles of 32 and 64 bytes
    Shape(330, 200, 5, ALIGNED, sms=4),
    Shape(200, 330, 10, ALIGNED, sms=4),
    Shape(200, 400, 100, PACKED, sms=5, layers=2),
    Shape(150, 300, 200, PACKED, 0.5, 6),
]
SMALL = [s for s in SHAPES if s.m * s.k * s.r < 700_000]
SETS = {"pipeline": PIPELINE, "some": PIPELINE[::2] + PIPELINE[5:6], "small": SMALL, "all": SHAPES + PIPELINE}
GEMM_SETS = {"gemm_lotr_small": gemm.SMALL, "gemm_lotr_quick": gemm.QUICK, "gemm_lotr_all": gemm.ALL}


Check = Callable[[ModuleType], list[bytes]]  # runs a problem, checks its values, returns the bits of its outputs


def problems(shapes: list[Shape], kinds: list[str], kernels: list[str]) -> Iterator[tuple[str, Check]]:
    for shape in shapes:
        for kernel in kernels:
            for kind in kinds:
                yield f"{kernel} {kind} {shape}", KERNELS[kernel](shape, kind).checked


def gemm_lotr_problems(name: str) -> Iterator[tuple[str, Check]]:
    """Two launches on one workspace each."""
    for case in GEMM_SETS[name]:
        yield f"gemm_lotr {case}", lambda lib, case=case: gemm.run(lib, case)


def failures(lib: ModuleType, checks: Iterable[tuple[str, Check]], schedules: list[str], first: bool = False) -> list[str]:
    """What went wrong, one line each; with `first` the search ends there. The bits must not depend on the schedule."""
    found: list[str] = []
    for name, check in checks:
        bits: set[tuple[bytes, ...]] = set()
        for order in schedules:
            lib.set_options(**schedule(order))
            try:
                bits.add(tuple(check(lib)))
                assert len(bits) == 1, "other bits than in another schedule"
            except (AssertionError, RuntimeError) as error:
                found.append(f"{name} {order}: {' '.join(str(error).split())}")
                if first:
                    return found
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="plain")
    parser.add_argument("--shapes", default="small", choices=[*SETS, *GEMM_SETS])
    parser.add_argument("--kinds", default="bf16,fp32")
    parser.add_argument("--schedules", default="forward,reverse,1")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--module", type=Path, help="a module that is built already")
    options = parser.parse_args(arguments)
    from csrc.simt import build

    lib = build.load(options.mode, options.module)
    if options.shapes in GEMM_SETS:
        checks = gemm_lotr_problems(options.shapes)
    else:
        checks = problems(SETS[options.shapes], options.kinds.split(","), options.kernels.split(","))
    done, schedules = 0, options.schedules.split(",")

    def counted() -> Iterator[tuple[str, Check]]:  # a problem has its arrays: one at a time
        nonlocal done
        for check in checks:
            done += 1
            yield check

    found = failures(lib, counted(), schedules)
    print(*found, f"{done} problems, {len(schedules)} schedules each: {len(found)} failures", sep="\n")
    if options.mode == "coverage":
        lib.write_coverage()
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
