"""Runs kernels in one build of the executor: for the sanitizers, the race detector and coverage.

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

from arrays import DTYPE, ODD, PACKED
from cases import CASES, FUSED, KERNELS, Problem, Shape, shapes_of

from csrc.simt import build

# At least two blocks in each dimension of every grid, and walks of more tiles than the ring has
# stages, so that every stage is filled a second time; with and without dropout, aligned and not. On
# few multiprocessors a block has several tiles.
PIPELINE = [
    Shape(700, 560, 16, sms=2),
    Shape(700, 560, 16, sms=5),
    Shape(330, 700, 40, p=0.25, sms=6, r2=20, bare=True),
    Shape(330, 600, 40, sms=6),  # parts of Q of several column tiles
    Shape(520, 264, 16, ODD, 0.1, 4),
    Shape(1700, 40, 16, ODD, 0.1, 4, bare=True),
    Shape(130, 1700, 16, sms=6),
    Shape(200, 400, 100, PACKED, sms=5),
    Shape(130, 3000, 13, ODD, 0.1, 12),  # parts of u, of factor_grad's D: at a rank that parts pad
    Shape(150, 300, 200, PACKED, 0.5, 6),
    Shape(2000, 70, 13, sms=12),
]
FUSED_PIPELINE = [
    # More k-steps than stages, three tiles for a pair of blocks.
    Shape(130, 328, 16, n=600, sms=2),
    # So few k-steps that the stages of the next tile are loaded meanwhile.
    Shape(260, 40, 100, n=264, sms=2, bare=True),
]


def shapes(which: str, kernel: str) -> list[Shape]:
    """Returns shapes of a kernel: pipeline, some (half of it), quick (of `make test`) or all."""
    pipeline = FUSED_PIPELINE if kernel in FUSED else PIPELINE
    sets = {"pipeline": pipeline, "some": pipeline[::2], "quick": shapes_of(kernel, quick=True)}
    return sets.get(which, shapes_of(kernel) + pipeline)


def problems(which: str, kinds: Iterable[str], kernels: Iterable[str]) -> Iterator[Problem]:
    """Yields one problem at a time, because each has its arrays."""
    cases = [(kernel, kind) for kernel in kernels for kind in kinds if (kernel, kind) in CASES]
    return (
        Problem(kernel, shape, kind) for kernel, kind in cases for shape in shapes(which, kernel)
    )


def schedule(name: str) -> dict[str, str | int]:
    """Returns options for forward, reverse, or the seed of a random order.

    Seeds above 100 switch threads at memory accesses.
    """
    if name in ("forward", "reverse"):
        return {"order": name}
    return {"order": "random", "seed": int(name), "preempt": 24 if int(name) > 100 else 0}


def failures(
    lib: ModuleType, cases: Iterable[Problem], schedules: Iterable[str], first: bool = False
) -> list[str]:
    """Returns one line for each case that fails, or only one line (`first`).

    The bits must not depend on the schedule.
    """
    lines: list[str] = []
    for problem in cases:
        bits: list[dict[str, bytes]] = []
        for order in schedules:
            try:
                bits.append(problem.checked(lib, **schedule(order)))
                assert bits[-1] == bits[0], "other bits than in another schedule"
            except (AssertionError, RuntimeError) as error:
                lines.append(f"{problem.name} {order}: {' '.join(str(error).split())}")
                break
        if lines and first:
            break
    return lines


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
        lib.skip_synchronisation(file, int(line))
    cases = problems(options.shapes, options.kinds.split(","), options.kernels.split(","))
    lines = failures(lib, cases, options.schedules.split(","))
    print(*lines, f"{len(lines)} failures", sep="\n")
    if options.mode == "coverage":
        lib.write_coverage()
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
