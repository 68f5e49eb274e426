"""gemm_lotr as problems: inputs in poisoned memory, outputs full of NaN, the float64 truth.

    forward   y = x W^T + bias + u F^T        backward   dx = g W + k A^T

in the forward pass's names: `W` is [n, k], in the backward pass as it lies there, [k, n].

python gemm_lotr_cases.py --mode race --cases small --schedules forward,1,103
Runs them in one build of the executor, prints a line for each failure and exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from arrays import DTYPE, PACKED, Layout, Output, check_close, narrow, place, wide  # noqa: E402


@dataclass(frozen=True)
class Case:
    """m tokens, n and k columns of y and x, r the rank. The GPU has `sms` multiprocessors: sms / 2 pairs of blocks."""

    m: int
    n: int
    k: int
    r: int
    kind: str = "bf16"
    backward: bool = False
    bias: bool = True
    sms: int = 2
    early: bool = True

    def __str__(self) -> str:
        flags = "-backward" * self.backward + "-bias" * self.bias + "-late" * (not self.early)
        return f"{self.m}x{self.n}x{self.k}-r{self.r}-{self.kind}{flags}-sms{self.sms}"


def aligned(cols: int) -> Layout:
    """Rows and first element at multiples of 16 bytes, NaN between the rows."""
    return Layout(8, -cols % 8 + 8)


class Inputs:
    """Of one launch; the values depend on the problem, not on the GPU."""

    def __init__(self, case: Case):
        rng = np.random.default_rng(zlib.crc32(str(replace(case, sms=2, early=True)).encode()))
        self.case = case

        def matrix(rows: int, cols: int, scale: float = 1.0) -> np.ndarray:
            return place(narrow(rng.standard_normal((rows, cols)) * scale, case.kind), DTYPE[case.kind], aligned(cols))

        self.arrays = {
            "x": matrix(case.m, case.k),
            "W": matrix(*((case.k, case.n) if case.backward else (case.n, case.k))),
            "u": matrix(case.m, case.r),
            "F": matrix(case.n, case.r, 0.5),
        }
        if case.bias:
            self.arrays["bias"] = narrow(rng.standard_normal((1, case.n)) * 4, case.kind)  # nothing lies around it

    def launch(self, lib: ModuleType, packed: bool = False) -> np.ndarray:
        """y, after a look at what lies around it; packed: nothing does."""
        case = self.case
        y = Output((case.m, case.n), DTYPE[case.kind], PACKED if packed else aligned(case.n))
        lib.set_device(multiprocessors=case.sms, early=case.early)
        lib.run("gemm_lotr", {"y": y.view, **self.arrays}, {"backward": case.backward})
        y.check_outside()
        return y.view

    def check(self, y: np.ndarray) -> None:
        x, W, u, F = (wide(self.arrays[name]) for name in ("x", "W", "u", "F"))
        left, right = np.hstack([x, u]), np.vstack([W if self.case.backward else W.T, F.T])
        bias = wide(self.arrays["bias"]) if self.case.bias else np.zeros((1, self.case.n))
        eager = narrow(bias + left.astype(np.float32) @ right.astype(np.float32), self.case.kind)
        size = np.abs(bias) + np.abs(left) @ np.abs(right)
        check_close(y, left @ right + bias, eager, size, self.case.kind, f"gemm_lotr {self.case}: y")


def run(lib: ModuleType, case: Case) -> bytes:
    """One checked launch; the bits of y."""
    inputs = Inputs(case)
    y = inputs.launch(lib)
    inputs.check(y)
    return np.ascontiguousarray(y).tobytes()


def set_schedule(lib: ModuleType, name: str, **options) -> None:
    """forward, reverse, or the seed of a random order, above 100 with switches at memory accesses."""
    if name.isdigit():
        options |= {"order": "random", "seed": int(name), "preempt": 24 if int(name) > 100 else 0}
    else:
        options["order"] = name
    lib.set_options(sm90=True, **options)


def failures(lib: ModuleType, cases: Iterable[Case], schedules: Iterable[str]) -> list[str]:
    """What went wrong first in each case. The bits must not depend on the schedule."""
    found = []
    for case in cases:
        bits = set()
        for name in schedules:
            set_schedule(lib, name)
            try:
                bits.add(run(lib, case))
                assert len(bits) == 1, "other bits than in another schedule"
            except (AssertionError, RuntimeError) as error:
                found.append(f"{case} {name}: {' '.join(str(error).split())}")
                break
    set_schedule(lib, "forward")
    return found


# Ragged in every extent; one tile and several a pair; fewer k-steps than the ring has stages, and more; both steps of the rank.
QUICK = [
    Case(300, 331, 200, 11),
    Case(520, 520, 136, 64, sms=4),
    Case(130, 300, 136, 100, bias=False),
    Case(300, 331, 136, 30, backward=True, bias=False),
    Case(200, 520, 328, 50, backward=True, bias=False, sms=4),
    Case(200, 200, 72, 128, "fp16", backward=True, bias=False),
    Case(200, 280, 264, 16, "fp16"),
    Case(140, 280, 136, 8, "fp16", backward=True, bias=False, early=False),
    Case(130, 264, 520, 1),
    Case(5, 7, 8, 3),
    Case(1, 1, 1, 1, sms=1),
    Case(1, 264, 8, 65, "fp16", backward=True),
    Case(0, 16, 16, 4),
]
RANKS = [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 81, 96, 127, 128]
ALL = QUICK + [
    Case(140, 72, 72, r, kind, backward, bias=bool(i % 3))
    for i, r in enumerate(RANKS)
    for kind, backward in [(("bf16", "fp16")[i % 2], False), (("fp16", "bf16")[i % 2], True)]
]
ALL += [Case(m, n, k, 16, backward=bool(k % 16)) for m in (255, 257) for n in (64, 255, 257) for k in (64, 72, 256, 264)]
# The order of tiles: more bands than are walked together, several columns.
ALL += [Case(2400, 300, 8, 8, sms=6), Case(2400, 264, 8, 8, "fp16", backward=True, bias=False, sms=4)]
# For leaving out one synchronisation: all code paths, in problems that are over soon.
SMALL = [
    Case(130, 600, 328, 16),  # more k-steps than stages, three tiles a pair
    Case(260, 264, 40, 100, backward=True, bias=False),  # so few that the next tile's stages are loaded meanwhile
]
SETS = {"quick": QUICK, "all": ALL, "small": SMALL}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="plain")
    parser.add_argument("--cases", default="quick", choices=SETS)
    parser.add_argument("--schedules", default="forward,reverse,1,103")
    parser.add_argument("--module", type=Path, help="a module that is built already")
    options = parser.parse_args()
    from csrc.simt import build

    cases = SETS[options.cases]
    found = failures(build.load(options.mode, options.module), cases, options.schedules.split(","))
    print(*found, f"{len(cases)} cases: {len(found)} failures", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
