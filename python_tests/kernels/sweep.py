"""Runs kernels in one build of the executor: for the sanitizers and the race detector.

python sweep.py --mode race --shapes pipeline --kinds bf16,fp32 --schedules forward,reverse,1,101
Prints one line for each failure and exits with 1 if there was one.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from arrays import DTYPE
from cases import CASES, KERNELS, Problem
from shapes import shapes_of

from csrc.simt import build


def problems(which: str, kinds: Iterable[str], kernels: Iterable[str]) -> Iterator[Problem]:
    """Yields one problem at a time, because each holds its arrays in memory."""
    cases = [(kernel, kind) for kernel in kernels for kind in kinds if (kernel, kind) in CASES]
    return (
        Problem(kernel, shape, kind) for kernel, kind in cases for shape in shapes_of(kernel, which)
    )


def schedule(name: str) -> dict[str, str | int]:
    """Returns options for forward, reverse, or the seed of a random order.

    Seeds above 100 also switch threads at 24 of 256 memory accesses.
    """
    if name in ("forward", "reverse"):
        return {"order": name}
    return {"order": "random", "seed": int(name), "preempt": 24 if int(name) > 100 else 0}


def failures(lib: ModuleType, cases: Iterable[Problem], schedules: Iterable[str]) -> Iterator[str]:
    """Yields one line for each case that fails. Its bits must not depend on the schedule."""
    for problem in cases:
        bits: list[dict[str, bytes]] = []
        for order in schedules:
            try:
                bits.append(problem.run(lib, **schedule(order)))
                assert bits[-1] == bits[0], "other bits than in another schedule"
            except (AssertionError, RuntimeError) as error:
                yield f"{problem.name} {order}: {' '.join(str(error).split())}"
                break


def in_process(mode: str, module: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this file with a module that is built already, in a process of its mode."""
    command = [sys.executable, __file__, "--mode", mode, "--module", str(module), *arguments]
    environment = build.python_environment(mode)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="plain")
    parser.add_argument("--module", type=Path, help="a module that is built already")
    parser.add_argument("--shapes", default="some", choices=["some", "pipeline", "quick", "all"])
    parser.add_argument("--kinds", default=",".join(DTYPE))
    parser.add_argument("--schedules", default="forward,reverse,1")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument(
        "--skip", help="FILE:LINE of csrc/cuda, whose barriers and waits are skipped"
    )
    options = parser.parse_args(arguments)
    lib = build.load(options.mode, options.module)
    if options.skip:
        file, _, line = options.skip.partition(":")
        lib.skip_synchronization(file, int(line))
    cases = problems(options.shapes, options.kinds.split(","), options.kernels.split(","))
    lines = list(failures(lib, cases, options.schedules.split(",")))
    print(*lines, f"{len(lines)} failures", sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
