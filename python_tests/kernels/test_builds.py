"""The kernels in the executor's other builds: sanitizers, race detector, coverage, and with one synchronisation left out.

`make test` has the race detector on some shapes and each sixteenth synchronisation left out, CI each eighth;
`make test-full` has all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def sweep(mode: str, *arguments: str, kind: str | None = None) -> None:
    """kind: the only element type that runs, all by default."""
    from csrc.simt import build

    done = subprocess.run(
        [sys.executable, str(HERE / "sweep.py"), "--mode", mode, "--module", str(build.module(mode, kind)), *arguments],
        capture_output=True,
        text=True,
        env=build.python_environment(mode),
        timeout=3000,
    )
    assert done.returncode == 0, f"{mode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def wide_sweep(mode: str, *arguments: str) -> None:
    """All kernels and shapes, in two processes."""
    from csrc.simt.checks.cases import KERNELS

    halves = [",".join(list(KERNELS)[i::2]) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda kernels: sweep(mode, "--shapes", "all", "--kernels", kernels, *arguments), halves))


def test_no_race() -> None:
    """Every kernel but `small`, which is made of the others."""
    from csrc.simt.checks.cases import KERNELS

    kernels = ",".join(kernel for kernel in KERNELS if kernel != "small")
    sweep("race", "--shapes", "some", "--kinds", "bf16", "--schedules", "forward", "--kernels", kernels, kind="bf16")
    sweep("race", "--shapes", "gemm_lotr_small", "--schedules", "2/3", kind="bf16")


@pytest.mark.full
def test_no_race_anywhere() -> None:
    wide_sweep("race", "--kinds", "bf16,fp16,tf32,fp32", "--schedules", "reverse,1,2")
    sweep("race", "--shapes", "gemm_lotr_quick", "--schedules", "forward/1,reverse/3,2/2,103/4")


@pytest.mark.full
def test_no_bad_access_anywhere() -> None:
    """AddressSanitizer and UBSan. In `make test` NaN around every array stands for them, and the executor's own checks."""
    wide_sweep("asan", "--kinds", "bf16,fp16,tf32,fp32", "--schedules", "reverse,1")
    sweep("asan", "--shapes", "gemm_lotr_quick", "--schedules", "reverse/2,103/3")


@pytest.mark.full
def test_every_line_of_the_kernels_runs() -> None:
    from csrc.simt import build

    build.reset_coverage()
    sweep("coverage", "--shapes", "all", "--kinds", "bf16,tf32,fp32", "--schedules", "forward")
    sweep("coverage", "--shapes", "gemm_lotr_quick", "--schedules", "2/2")
    kernels = {name: c for name, c in build.coverage().items() if name.endswith(".cuh")}
    assert {"shrink.cuh", "expand_add.cuh", "factor_grad.cuh", "shrink_grad.cuh", "fold.cuh", "rectangle.cuh"} <= set(kernels)
    gemm_lotr = {name: c for name, c in kernels.items() if name.startswith("gemm_lotr")}
    assert set(gemm_lotr) == {f"gemm_lotr{part}.cuh" for part in ("", "_factor", "_rows", "_traits")}
    assert not any(missed for _, _, missed in gemm_lotr.values()), gemm_lotr
    run, total = (sum(c[i] for c in kernels.values()) for i in (0, 1))
    for name, (lines_run, lines, missed) in kernels.items():
        print(f"{name:<20}{lines_run:>5} of {lines:>4} lines, not run: {missed or 'none'}")
    print(f"{'csrc/cuda/kernels':<20}{run:>5} of {total:>4} lines, {run / total:.1%}")
    assert run / total >= 0.98


@pytest.mark.parametrize("every", [16, pytest.param(8, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.full)])
def test_each_synchronisation_left_out_is_noticed(every: int) -> None:
    command = [sys.executable, str(HERE / "mutate_kernels.py"), "--every", str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ of \d+ places left out, 0 survived$", done.stdout, re.MULTILINE)
