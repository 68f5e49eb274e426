"""The executor's schedules, late copies, sparse arrays, launches, coverage.

test_mistakes.py has its errors.
"""

import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = PROGRAMS / "behaviour.cpp"


def line_of(mark: str) -> int:
    return next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if mark in line)


def run(*arguments: str, mode: str = "plain", **schedule: object) -> str:
    env = build.environment(mode) | {
        f"LOTR_SIMT_{name.upper()}": str(value) for name, value in schedule.items()
    }
    done = subprocess.run(
        [build.program(mode, SOURCE), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=1000,
    )
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


def test_shared_memory_starts_as_nan() -> None:
    assert run("poison") == "128"


def test_copies_land_at_the_wait() -> None:
    assert run("copies") in ("nan 7", "-nan 7")


def test_sparse_arrays_reach_beyond_31_bits() -> None:
    assert run("sparse") == "7"


def test_launches_are_listed() -> None:
    assert run("launches") == "first 2 3 32 2 64\nsecond 2 3 32 2 64"


def test_early_launches() -> None:
    """Whether each launch was early, how many blocks let the next start, and the sum of all."""
    assert run("early") == "1 2 0 2 6"


def test_thousands_of_blocks() -> None:
    assert run("blocks") == "8000"


def test_bad_options() -> None:
    assert run("schedule", preempt=256) == "error: set_options: preempt is 256, expected 0 to 255"
    assert "LOTR_SIMT_ORDER: expected forward, reverse or random, got sideways" in run(
        "schedule", order="sideways"
    )


def test_leaving_out_a_barrier() -> None:
    first = line_of("FIRST BARRIER")
    second = line_of("SECOND BARRIER")
    verdict, *sites = run("skip", "0").splitlines()
    assert verdict == "right"
    assert sites[:2] == [f"__syncthreads {first} 256", f"__syncthreads {second} 256"]
    assert run("skip", str(first)).startswith("wrong")
    assert run("skip", str(second)).startswith("wrong")


@pytest.mark.full
def test_coverage() -> None:
    """Lines are counted although threads leave functions and return on another stack."""
    build.reset_coverage()
    run("skip", "0", mode="coverage")
    ran, total, missed = build.coverage(PROGRAMS)["behaviour.cpp"]
    source = SOURCE.read_text().splitlines()
    assert 0 < ran < total and len(missed) == total - ran

    def covered(text: str) -> bool:
        return not any(text in source[number - 1] for number in missed)

    assert covered("// FIRST BARRIER") and covered("out[t] = ptx::load_shared(&s.f[t ^ 1]);")
    assert not covered("ptx::cp_async16")
