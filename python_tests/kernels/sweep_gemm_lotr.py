"""Runs gemm_lotr in one build of the executor, in a process of its own: for the sanitizer, race and coverage tests.

python sweep_gemm_lotr.py --mode race --cases quick --schedules forward/1,1/4
A schedule is an order (forward, reverse, or the seed of a random one) and how many clusters run at the same time.
Prints one line for each failure and exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import gemm_lotr_cases as gemm  # noqa: E402

SETS = {"small": gemm.SMALL, "quick": gemm.QUICK, "all": gemm.ALL}


def failures(lib: ModuleType, cases: list[gemm.Case], schedules: list[str], first: bool = False) -> list[str]:
    """What went wrong, one line each; with `first` the search ends there. The bits must not depend on the schedule."""
    found: list[str] = []
    for case in cases:
        bits: set[tuple[bytes, ...]] = set()
        for name in schedules:
            lib.set_options(**gemm.schedule(name))
            try:
                bits.add(tuple(gemm.run(lib, case)))
                assert len(bits) == 1, "other bits than in another schedule"
            except (AssertionError, RuntimeError) as error:
                found.append(f"gemm_lotr {case} {name}: {' '.join(str(error).split())}")
                if first:
                    return found
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="plain")
    parser.add_argument("--cases", default="quick", choices=SETS)
    parser.add_argument("--schedules", default="forward/1")
    parser.add_argument("--module", type=Path, help="a module that is built already")
    options = parser.parse_args(arguments)
    from csrc.simt import build

    lib = build.load(options.mode, options.module)
    found = failures(lib, SETS[options.cases], options.schedules.split(","))
    print(*found, sep="\n")
    if options.mode == "coverage":
        lib.write_coverage()
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
