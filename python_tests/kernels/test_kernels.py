"""Every kernel, element type and shape against float64, with the same bits in several schedules."""

from types import ModuleType

import numpy as np
import pytest
from arrays import ALIGNED, COLUMNS, ODD, PACKED
from cases import CASES, FUSED, Shape, problem_of, shapes_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep import failures

MANY = ["forward", "reverse", *map(str, (2, 3, 4, 5, 102, 103, 104, 105))]
EVERY_CASE = pytest.mark.parametrize(("kernel", "kind"), CASES)


@EVERY_CASE
def test_kernel(lib: ModuleType, kernel: str, kind: str) -> None:
    few = kernel.startswith(("small", "row"))  # composed of other kernels; many barriers
    shapes = shapes_of(kernel, quick=True)[:: 2 if few else 1]
    assert not failures(
        lib, (problem_of(kernel, shape, kind) for shape in shapes), ["reverse", "101"]
    )


@pytest.mark.full
@EVERY_CASE
def test_kernel_all_shapes(lib: ModuleType, kernel: str, kind: str) -> None:
    assert not failures(lib, (problem_of(kernel, shape, kind) for shape in shapes_of(kernel)), MANY)


def any_shape(fused: bool) -> st.SearchStrategy[Shape]:
    most = 128 if fused else 256
    return st.builds(
        Shape,
        m=st.integers(0, 300),
        k=st.integers(1, 400),
        r=st.one_of(st.integers(1, 40), st.integers(1, most)),
        layout=st.just(ALIGNED) if fused else st.sampled_from([PACKED, ALIGNED, ODD, COLUMNS]),
        p=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
        sms=st.sampled_from([1, 2, 5, 16, 132]),
        r2=st.integers(0, 70),
        n=st.integers(1, 400),
        bare=st.booleans(),
        float_factors=st.booleans(),
    )


@pytest.mark.full
@EVERY_CASE
def test_kernel_any_shape(lib: ModuleType, kernel: str, kind: str) -> None:
    @settings(
        max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(any_shape(kernel in FUSED), st.integers(1, 200))
    def check(shape: Shape, seed: int) -> None:
        assert not failures(lib, [problem_of(kernel, shape, kind)], [str(seed)])

    check()


def test_a_scaling_comes_last_in_float16(lib: ModuleType) -> None:
    """s u G and s g B leave float16's range; y and the gradients do not."""
    generator = np.random.default_rng(0)
    half = np.float16
    s = 4000.0
    x, A, core, B = (
        generator.normal(scale=scale, size=size).astype(half)
        for size, scale in (((20, 24), 1.0), ((24, 4), 0.5), ((4, 3), 30.0), ((40, 3), 1e-4))
    )
    g = generator.normal(scale=0.01, size=(20, 40)).astype(half)
    y = np.zeros((20, 40), half)
    u = np.zeros((20, 4), half)
    dB = np.zeros((40, 3), np.float32)
    dcore = np.zeros((4, 3), np.float32)
    factors = {"A": A, "core": core, "B": B, "u": u}
    lib.run("small_forward", factors | {"x": x, "y": y}, {"scale": s})
    lib.run("small_backward", factors | {"g": g, "dB": dB, "dcore": dcore}, {"scale": s})
    x, A, core, B, g = (t.astype(np.float64) for t in (x, A, core, B, g))
    h = x @ A @ core
    assert np.abs(s * h).max() > np.finfo(half).max
    for result, truth in ((y, s * h @ B.T), (dB, s * g.T @ h), (dcore, s * (x @ A).T @ (g @ B))):
        assert np.abs(result - truth).max() <= 0.01 * np.abs(truth).max()
