"""The executor's counters, for kernels with traffic that can be counted by hand (counters.cpp)."""

import json
from pathlib import Path

import pytest

from csrc.simt import build

SOURCE = Path(__file__).parent / "programs" / "counters.cpp"
# An array has [bytes read, sectors read, bytes written, sectors written], and "shared" has [phases,
# wavefronts].
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


@pytest.mark.parametrize(
    ("mode", "order"),
    [("plain", "forward"), ("plain", "reverse"), ("plain", "random"), ("race", "forward")],
)
def test_known_answers(mode: str, order: str) -> None:
    """The race build also sees plain accesses, of which there are 32 x 4 bytes of x."""
    done = build.run_program(mode, SOURCE, order=order, preempt=64)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert counts.keys() == EXPECTED.keys()
    for kernel, values in EXPECTED.items():
        unwrapped = 32 * 4 if (mode, kernel) == ("race", "plain_access") else 0
        expected = values | {"unwrapped": unwrapped}
        assert {name: counts[kernel][name] for name in expected} == expected, kernel
