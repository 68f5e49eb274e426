"""Every kernel, element type and shape against float64, under several schedules of threads and blocks: the same bits in all."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import pytest
from arrays import ALIGNED, COLUMNS, DTYPE, ODD, PACKED
from cases import KERNELS, SHAPES, Problem, Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYOUTS = [PACKED, ALIGNED, ODD, COLUMNS]
SCHEDULES = [{"order": "reverse"}, {"order": "random", "seed": 1}, {"order": "forward"}]
MANY = [{"order": "random", "seed": seed, "preempt": 8 * (seed % 3)} for seed in range(2, 22)]
EVERY_CASE = pytest.mark.parametrize(("kernel", "kind"), [(kernel, kind) for kernel in KERNELS for kind in DTYPE])


def run_all(lib: ModuleType, problem: Problem, schedules: list[dict]) -> None:
    """Checks the values, and that each schedule gives the same bits."""
    found = []
    for schedule in schedules:
        lib.set_options(**schedule)
        found.append(problem.checked(lib))
    different = [name for name in found[0] if any(bits[name] != found[0][name] for bits in found)]
    assert not different, f"{problem.name}: bits depend on the schedule: {different}"


def test_the_quick_shapes_have_every_rank_class_layout_and_dropout() -> None:
    some = SHAPES[::3]
    assert (
        {shape.layout for shape in some} == set(LAYOUTS)
        and any(shape.p for shape in some)
        and any(not shape.m for shape in some)
    )
    assert {min(R for R in (16, 32, 64, 128, 256) if shape.r <= R) for shape in some} == {16, 32, 64, 128, 256}


@EVERY_CASE
def test_kernel(lib: ModuleType, kernel: str, kind: str) -> None:
    few = kernel.startswith(("small", "row"))  # made of the other kernels; many barriers
    for shape in SHAPES[:: 6 if few else 3]:
        run_all(lib, KERNELS[kernel](shape, kind), SCHEDULES[:2])


@pytest.mark.full
@EVERY_CASE
def test_kernel_all_shapes(lib: ModuleType, kernel: str, kind: str) -> None:
    for shape in SHAPES:
        run_all(lib, KERNELS[kernel](shape, kind), SCHEDULES + MANY[:: 10 if kernel.startswith("row") else 5])


@pytest.mark.full
@EVERY_CASE
def test_kernel_many_schedules(lib: ModuleType, kernel: str, kind: str) -> None:
    for shape in SHAPES[::2]:
        run_all(lib, KERNELS[kernel](shape, kind), MANY)


@pytest.mark.full
@EVERY_CASE
def test_kernel_any_shape(lib: ModuleType, kernel: str, kind: str) -> None:
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


def test_a_scaling_comes_last_in_float16(lib: ModuleType) -> None:
    """s u G and s g B leave float16's range; y and the gradients do not."""
    generator, half, s = np.random.default_rng(0), np.float16, 4000.0
    x, A, core, B = (
        generator.normal(scale=scale, size=size).astype(half)
        for size, scale in (((20, 24), 1.0), ((24, 4), 0.5), ((4, 3), 30.0), ((40, 3), 1e-4))
    )
    g = generator.normal(scale=0.01, size=(20, 40)).astype(half)
    y, u = np.zeros((20, 40), half), np.zeros((20, 4), half)
    dB, dcore = np.zeros((40, 3), np.float32), np.zeros((4, 3), np.float32)
    factors = {"A": A, "core": core, "B": B, "u": u}
    lib.run("small_forward", factors | {"x": x, "y": y}, {"scale": s})
    lib.run("small_backward", factors | {"g": g, "dB": dB, "dcore": dcore}, {"scale": s})
    x, A, core, B, g = (t.astype(np.float64) for t in (x, A, core, B, g))
    h = x @ A @ core
    assert np.abs(s * h).max() > np.finfo(half).max
    for got, want in ((y, s * h @ B.T), (dB, s * g.T @ h), (dcore, s * (x @ A).T @ (g @ B))):
        assert np.abs(got - want).max() <= 0.01 * np.abs(want).max()
