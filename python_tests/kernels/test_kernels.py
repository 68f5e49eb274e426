"""Every kernel, element type and shape against float64, under several schedules of threads and blocks: same bits in all."""

from __future__ import annotations

import random

import numpy as np
import pytest
from arrays import ALIGNED, COLUMNS, ODD, PACKED, TYPES
from cases import KERNELS, SHAPES, Problem, Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYOUTS = [PACKED, ALIGNED, ODD, COLUMNS]
SCHEDULES = [{"order": "forward"}, {"order": "reverse"}, *({"order": "random", "seed": s} for s in range(1, 6))]


def bits(a: np.ndarray) -> bytes:
    return np.ascontiguousarray(a).tobytes()


def run_all(lib, problem: Problem, schedules: list[dict]) -> None:
    """Checks the first schedule's outputs, and that the others give the same bits."""
    first: dict[str, np.ndarray] = {}
    for schedule in schedules:
        lib.set_options(**schedule)
        outputs = problem.run(lib)
        if not first:
            problem.check(outputs)
            first = {name: a.copy() for name, a in outputs.items()}
        for name, a in outputs.items():
            assert bits(a) == bits(first[name]), f"{name} depends on the schedule {schedule}"
    lib.set_options()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(lib, kernel: str, kind: str) -> None:
    assert len(SHAPES) >= 40
    some = kernel in ("small", "rows")  # made of the other kernels; three launches of many barriers, and no matrix instruction
    for shape in SHAPES[:: 3 if kernel == "rows" else 1]:
        run_all(lib, KERNELS[kernel](shape, kind), SCHEDULES[:3] if some else SCHEDULES)


@pytest.mark.full
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_many_schedules(lib, kernel: str, kind: str) -> None:
    for shape in SHAPES:
        run_all(
            lib, KERNELS[kernel](shape, kind), [{"order": "random", "seed": s, "preempt": 8 * (s % 3)} for s in range(6, 26)]
        )


@pytest.mark.full
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_any_shape(lib, kernel: str, kind: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.builds(
            Shape,
            m=st.integers(0, 300),
            k=st.integers(1, 400),
            r=st.one_of(st.integers(1, 40), st.integers(1, 256)),
            layout=st.sampled_from(LAYOUTS),
            p=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
            sms=st.sampled_from([1, 2, 5, 16, 132]),
            r2=st.integers(0, 70),
            layers=st.integers(1, 3),
            float_factors=st.booleans(),
        )
    )
    def check(shape: Shape) -> None:
        run_all(lib, KERNELS[kernel](shape, kind), [{"order": "random", "seed": random.Random(str(shape)).randrange(1 << 30)}])

    check()
