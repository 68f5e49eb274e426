"""What the executor promises: schedules, deadlock reports, late copies, sparse arrays, builds, coverage."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = PROGRAMS / "behaviour.cpp"
UCONTEXT = ("-DLOTR_SIMT_UCONTEXT=1",)


def line_of(mark: str) -> int:
    return next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if mark in line)


def run(*arguments: str, mode: str = "plain", defines: tuple[str, ...] = (), **schedule: object) -> str:
    env = build.environment(mode) | {f"LOTR_SIMT_{name.upper()}": str(value) for name, value in schedule.items()}
    program = build.program(mode, SOURCE, defines)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=env, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rstrip("\n")


def threads(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def test_schedules() -> None:
    in_order = list(range(192))
    assert threads(run("schedule", order="forward")) == in_order
    assert threads(run("schedule", order="reverse")) == in_order[::-1]
    some = [run("schedule", order="random", seed=seed, preempt=16) for seed in (1, 2, 1)]
    assert some[0] == some[2] != some[1]
    assert sorted(threads(some[0])) == in_order
    assert threads(some[0])[:64] not in (in_order[:64], in_order[:127:-1])


@pytest.mark.parametrize(
    "mode, defines",
    [("plain", ()), *(pytest.param(*more, marks=pytest.mark.full) for more in (("plain", UCONTEXT), ("asan", ())))],
)
def test_deadlock_names_the_line(mode: str, defines: tuple[str, ...]) -> None:
    report = run("deadlock", mode=mode, defines=defines)
    place = f"behaviour.cpp:{line_of('DEADLOCK LINE')}"
    assert report.startswith("error: kernel half: deadlock: no thread can go on")
    assert re.search(rf"block \(0,0,0\): 64 threads from 0 on are at __syncthreads, .*{place}", report)
    assert "block (0,0,0): 64 threads from 64 on have exited" in report


@pytest.mark.parametrize("mode", ["plain", pytest.param("asan", marks=pytest.mark.full)])
def test_a_failed_launch_leaves_nothing_behind(mode: str) -> None:
    assert threads(run("again", mode=mode)) == list(range(192))


@pytest.mark.full
def test_ucontext_fibers_run_the_same_schedule() -> None:
    schedule = {"order": "random", "seed": 5, "preempt": 32}
    assert run("schedule", defines=UCONTEXT, **schedule) == run("schedule", **schedule)


def test_shared_memory_starts_as_nan() -> None:
    assert run("poison") == "128"


def test_copies_land_at_the_wait() -> None:
    assert run("copies") in ("nan 7", "-nan 7")


def test_sparse_arrays_reach_beyond_31_bits() -> None:
    assert run("sparse") == "7"


def test_an_exception_in_a_kernel_is_an_error() -> None:
    assert "exception in a kernel: from a kernel" in run("throw")


def test_launches_that_a_gpu_would_refuse() -> None:
    assert run("no_grid") == "error: empty: a GPU would refuse this launch: gridDim.x is 0, expected 1 to 2147483647"
    assert "shared memory in bytes is 300000, expected 1 to 232448" in run("shared")
    assert "blocks in a cluster is 16, expected 1 to 8" in run("cluster")
    assert "tensor map: expected at least one row and column" in run("map")


def test_another_block_is_reached_only_after_a_barrier_of_the_cluster() -> None:
    message = rf"mbarrier\.arrive\.cluster at .*:{line_of('REMOTE LINE')}: no barrier of the cluster yet: block 1 may not"
    assert re.search(message, run("remote"))


def test_an_mbarrier_counts_20_bits() -> None:
    most = 2**20 - 1
    assert run("mbarrier", str(most), str(most)) == ""
    assert "1048576 arrivals, expected 1 to 2^20 - 1" in run("mbarrier", str(most + 1), "0")
    assert "1048576 bytes are announced, expected at most 2^20 - 1" in run("mbarrier", "1", str(most + 1))


def test_launches_are_listed() -> None:
    assert run("launches") == "first 2 3 32 2 64\nsecond 2 3 32 2 64"


def test_early_launches_wait_for_what_is_ahead() -> None:
    assert run("early", "0", "1") == "3 1 2" and run("early", "0", "0") == "3 0 2"
    refused = {
        1: rf"st\.global at .*:{line_of('EARLY STORE')}: global memory in an early launch before griddepcontrol\.wait",
        2: rf"cp\.async at .*:{line_of('EARLY COPY')}: global memory in an early launch before .* thread 5:",
        3: rf"griddepcontrol\.launch_dependents at .*:{line_of('EARLY LAUNCH')}: before griddepcontrol\.wait",
        4: r"thread exits from an early launch without griddepcontrol\.wait .* thread 100:",
    }
    for what, message in refused.items():
        assert re.search(message, run("early", str(what), "1")), what
        if what != 3:  # as ever, where the launch ahead has ended
            assert run("early", str(what), "0").startswith("2 0" if what == 1 else "3 0"), what


def test_thousands_of_blocks() -> None:
    assert run("blocks") == "8000"


def test_bad_options() -> None:
    assert run("schedule", preempt=256) == "error: set_options: preempt is 256, expected 0 to 255"
    assert "LOTR_SIMT_ORDER: expected forward, reverse or random, got sideways" in run("schedule", order="sideways")


def test_leaving_out_a_barrier() -> None:
    first, second = line_of("FIRST BARRIER"), line_of("SECOND BARRIER")
    verdict, *sites = run("skip", "0").splitlines()
    assert verdict == "right"
    assert sites[:2] == [f"__syncthreads {first} 256", f"__syncthreads {second} 256"]
    assert run("skip", str(first)).startswith("wrong")
    assert run("skip", str(second)).startswith("wrong")


@pytest.mark.full
def test_coverage() -> None:
    """Lines are counted although threads leave functions in the middle and come back on another stack."""
    program = build.program("coverage", PROGRAMS / "block.cpp")
    build.reset_coverage()
    assert subprocess.run([program, "0", "all"], capture_output=True, text=True).stdout.split() == ["ok"] * 22
    ran, total, missed = build.coverage(PROGRAMS)["block.cuh"]
    source = (PROGRAMS / "block.cuh").read_text().splitlines()
    assert 0.8 <= ran / total < 1 and len(missed) == total - ran

    def covered(text: str) -> bool:
        return not any(text in source[number - 1] for number in missed)

    assert not covered("sum = s.half;") and not covered("sum += s.part[WARPS]")  # only with a planted bug
    assert covered("ptx::barrier_sync(1") and covered("return v;") and covered("ptx::store(p.y")
