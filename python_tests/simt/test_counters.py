"""The executor's counters, for kernels with traffic that can be counted by hand (counters.cpp)."""

import json
from pathlib import Path

import pytest

from csrc.simt import build

SOURCE = Path(__file__).parent / "programs" / "counters.cpp"
# array: bytes read, sectors read, bytes written, sectors written
EXPECTED: dict[str, dict] = {
    "coalesced16": {"x": [1024, 32, 0, 0], "y": [0, 0, 256, 8], "threads": 64, "launches": 1},
    "strided": {"x": [128, 32, 0, 0], "y": [0, 0, 128, 4]},  # a sector for each lane
    "broadcast": {"x": [4, 1, 0, 0]},
    # 64 bytes that start 2 bytes into a sector
    "straddling": {"x": [64, 3, 0, 0], "y": [0, 0, 64, 2]},
    "half_the_lanes": {"x": [192, 6, 0, 0], "y": [0, 0, 192, 6]},
    "zero_fill": {"x": [8 * 16 + 4, 5, 0, 0], "shared": [4, 4], "async_copies": 32},
    "unregistered": {"x": [0, 0, 0, 0], "(unregistered)": [128, 4, 0, 0]},
    "shared_rows": {"shared": [9, 9]},
    "shared_columns": {"shared": [6, 66]},
    "ldmatrix_rows": {"shared": [10, 24], "ldmatrix": 3, "collectives": 3},
    "collectives": {
        "barriers": 2 * 2,
        "mma": 2 * 2 * 3,
        "collectives": 2 * 2 * (3 + 5),
        "blocks": 2,
        "threads": 128,
    },
    "plain_access": {"x": [0, 0, 0, 0], "y": [0, 0, 0, 0]},
}


def counted(mode: str, order: str) -> dict[str, dict]:
    done = build.run_program(mode, SOURCE, order=order, preempt=64)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_known_answers(order: str) -> None:
    counts = counted("plain", order)
    assert counts.keys() == EXPECTED.keys()
    for kernel, values in EXPECTED.items():
        assert {name: counts[kernel][name] for name in values} == values, kernel


def test_race_build_counts_the_same_and_sees_plain_accesses() -> None:
    counts = counted("race", "forward")
    for kernel, values in EXPECTED.items():
        assert {name: counts[kernel][name] for name in values} == values, kernel
    assert counts["plain_access"]["unwrapped"] == 32 * 4  # of x
    assert sum(line["unwrapped"] for line in counts.values()) == 32 * 4
