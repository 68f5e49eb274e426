"""Every kernel, element type and shape against float64, under several schedules of threads and blocks: same bits in all."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csrc.simt.checks.arrays import ALIGNED, COLUMNS, ODD, PACKED, TYPES
from csrc.simt.checks.cases import KERNELS
from csrc.simt.checks.problem import Problem
from csrc.simt.checks.shapes import SHAPES, Shape

LAYOUTS = [PACKED, ALIGNED, ODD, COLUMNS]
SCHEDULES = [{"order": "forward"}, {"order": "reverse"}, *({"order": "random", "seed": s} for s in range(1, 6))]


def bits(a: np.ndarray) -> bytes:
    return np.ascontiguousarray(a).tobytes()


def in_turn(grids: list[tuple], values: list[tuple], quick: int) -> list:
    """Each of grids with each of values; `make test` has one for each grid, the first `quick` values in turn."""
    every = [(i, v, (*grid, *value)) for i, grid in enumerate(grids) for v, value in enumerate(values)]
    return [pytest.param(*case, marks=[pytest.mark.full] * (v != i % quick)) for i, v, case in every]


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


@pytest.mark.parametrize(
    "kernel, kind",
    [(k, t) for k in KERNELS for t in TYPES if t in ("bf16", "fp16") or not k.endswith("_wgmma")],  # which no float32 has
)
def test_kernel(lib, kernel: str, kind: str) -> None:
    """Each third shape: of every rank class and layout, with dropout, without clusters, without tokens."""
    some = SHAPES[::3]
    assert {s.layout for s in some} == set(LAYOUTS) and {s.early for s in some} == {True, False}
    assert {min(r for r in (16, 64, 128, 256) if s.r <= r) for s in some} == {16, 64, 128, 256} and any(s.p for s in some)
    for shape in some[:: 2 if kernel in ("small", "rows") else 1]:  # made of the other kernels; many barriers
        run_all(lib, KERNELS[kernel](shape, kind), SCHEDULES[1:3])


@pytest.mark.full
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_all_shapes(lib, kernel: str, kind: str) -> None:
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
            early=st.booleans(),
        )
    )
    def check(shape: Shape) -> None:
        run_all(lib, KERNELS[kernel](shape, kind), [{"order": "random", "seed": random.Random(str(shape)).randrange(1 << 30)}])

    check()


def test_the_shapes_have_splits_of_every_kind(lib) -> None:
    """Clusters of each size, and sums through memory of few splits and of many, by the last block and by all of them; of two
    splits by the last, where there are no clusters, only without room: the next test."""
    for kernel in ("factor_grad", "shrink_grad"):
        seen = set()
        for shape in (s for s in SHAPES if s.m and s.r <= 64):
            lib.set_device(multiprocessors=shape.sms, early=shape.early)
            plan = lib.plan(kernel, shape.m, shape.k, shape.r, 2, shape.sms)
            splits = plan["m_blocks"]
            assert shape.early or not plan["cluster"]
            assert not shape.early or not plan["together"]
            kind = "cluster" if plan["cluster"] else "together" if plan["together"] else "memory"
            seen.add((kind, splits if plan["cluster"] else min(splits, 5)))
        clusters = {("cluster", 2), ("cluster", 4), ("cluster", 8)}
        assert {("memory", 3), ("memory", 5), ("together", 2), ("together", 5)} | clusters <= seen, (kernel, seen)


# of the types of a size, one in `make test`: test_kernel has all, some of them without clusters
@pytest.mark.parametrize("kind", [t if t in ("bf16", "fp32") else pytest.param(t, marks=pytest.mark.full) for t in TYPES])
@pytest.mark.parametrize("kernel", ["factor_grad", "shrink_grad"])
def test_without_clusters_all_blocks_sum_or_the_last(lib, kernel: str, kind: str) -> None:
    """A cooperative launch where the plan says so, of no more blocks than the GPU holds; where it finds no room, as under MPS,
    another one with the same bits. No count of arrivals is left behind."""
    seen = []
    for shape in (s for s in SHAPES if not s.early):
        problem, first = KERNELS[kernel](shape, kind), {}
        for room in (None, 1, None):
            lib.set_options(order="random", seed=7, room=room)
            lib.reset_counters()
            outputs = problem.run(lib)
            launch = lib.counters()["launches"][-1]
            grid, element = np.prod(launch["grid"]), 2 if kind in ("bf16", "fp16") else 4
            plan = lib.plan(kernel, shape.m, shape.k, shape.r, element, shape.sms)
            if launch["name"] == kernel:
                assert launch["cooperative"] == (plan["together"] and room is None), (shape, plan)
            assert not launch["cooperative"] or grid <= 2 * shape.sms
            seen.append(launch["cooperative"])
            assert lib.arrivals() == 0
            first = first or {name: a.copy() for name, a in outputs.items()}
            problem.check(outputs)
            assert all(bits(a) == bits(first[name]) for name, a in outputs.items()), shape
    lib.set_options()
    assert sum(seen) >= 8


def test_a_scaling_comes_last_in_float16(lib) -> None:
    """s u G and s g B leave the range, y and the gradients do not."""
    generator, half, s = np.random.default_rng(0), np.float16, 4000.0
    x, A, core, B = (
        generator.normal(scale=scale, size=size).astype(half)
        for size, scale in (((20, 24), 1.0), ((24, 4), 0.5), ((4, 3), 30.0), ((40, 3), 1e-4))
    )
    g = generator.normal(scale=0.01, size=(20, 40)).astype(half)
    y, u = np.zeros((20, 40), half), np.zeros((20, 4), half)
    dB, dcore = np.zeros((40, 3), np.float32), np.zeros((4, 3), np.float32)
    lib.small_forward_(y, x, A, core, B, s, u)
    lib.small_backward_(g=g, u=u, A=A, core=core, B=B, scaling=s, dx=None, x=None, dA=None, dB=dB, dcore=dcore)
    x, A, core, B, g = (t.astype(np.float64) for t in (x, A, core, B, g))
    h = x @ A @ core
    assert np.abs(s * h).max() > np.finfo(half).max
    for got, want in ((y, s * h @ B.T), (dB, s * g.T @ h), (dcore, s * (x @ A).T @ (g @ B))):
        assert np.abs(got - want).max() <= 0.01 * np.abs(want).max()
