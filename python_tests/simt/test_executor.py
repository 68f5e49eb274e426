"""The executor's schedules, late copies, sparse arrays, launches.

test_mistakes.py has its errors.
"""

from pathlib import Path

import pytest

from csrc.simt import build

SOURCE = Path(__file__).parent / "programs" / "behavior.cpp"


def line_of(mark: str) -> int:
    return next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if mark in line)


def run(*arguments: str, mode: str = "plain", **schedule: object) -> str:
    done = build.run_program(mode, SOURCE, *arguments, **schedule)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rstrip("\n")


def threads(**schedule: object) -> list[int]:
    return [int(word) for word in run("schedule", **schedule).split()]


def test_schedules() -> None:
    in_order = list(range(192))
    assert threads(order="forward") == in_order
    assert threads(order="reverse") == in_order[::-1]
    first, other, again = (threads(order="random", seed=seed, preempt=16) for seed in (1, 2, 1))
    assert first == again != other
    assert sorted(first) == in_order
    # Neither block 0 in order nor block 2 in reverse comes first.
    assert first[:64] not in (in_order[:64], in_order[:127:-1])


# What each subcommand prints. The sign of a NaN is not checked.
PRINTED = {
    "poison": "128",  # shared memory starts as NaN
    "copies": "nan 7",  # copies land at the wait
    "sparse": "7",  # arrays of more than 2^31 elements
    "launches": "first 2 3 32 2 64\nsecond 2 3 32 2 64",
    # For each launch, whether it was early and how many blocks let the next one begin. Then the
    # value to which every block of both launches added 1.
    "early": "1 2 0 2 6",
    "blocks": "8000",
}


@pytest.mark.parametrize("program", PRINTED)
def test_programs(program: str) -> None:
    assert run(program).removeprefix("-") == PRINTED[program]


def test_bad_options() -> None:
    assert run("schedule", preempt=256) == "error: set_options: preempt is 256, expected 0 to 255"
    assert "LOTR_SIMT_ORDER: expected forward, reverse or random, got sideways" in run(
        "schedule", order="sideways"
    )


def test_leaving_out_a_barrier() -> None:
    lines = [line_of("FIRST BARRIER"), line_of("SECOND BARRIER")]
    verdict, *sites = run("skip", "0").splitlines()
    assert verdict == "right"
    assert sites[:2] == [f"__syncthreads {line} 256" for line in lines]
    assert all(run("skip", str(line)).startswith("wrong") for line in lines)
