"""Every kernel, element type and shape against float64, with the same bits in several schedules."""

from types import ModuleType

import numpy as np
import pytest
from arrays import ALIGNED, COLUMNS, ODD, PACKED
from cases import CASES, Problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import FUSED, Shape, shapes_of
from sweep import failures

each_case = pytest.mark.parametrize(("kernel", "kind"), CASES)


@each_case
def test_kernel(lib: ModuleType, kernel: str, kind: str) -> None:
    step = 2 if kernel.startswith(("few_tokens", "row")) else 1  # these have many barriers
    problems = (Problem(kernel, shape, kind) for shape in shapes_of(kernel, "quick")[::step])
    assert not list(failures(lib, problems, ["reverse", "101"]))


def any_shape(fused: bool) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        m=st.integers(0, 300),
        k=st.integers(1, 400),
        r=st.one_of(st.integers(1, 40), st.integers(1, 128 if fused else 256)),
        layout=st.just(ALIGNED) if fused else st.sampled_from([PACKED, ALIGNED, ODD, COLUMNS]),
        p=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
        sms=st.sampled_from([1, 2, 5, 16, 132]),
        other_r=st.integers(0, 70),
        n=st.integers(1, 400),
        minimal=st.booleans(),
        float_factors=st.booleans(),
    )


@pytest.mark.full
@each_case
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data(), seed=st.integers(1, 200))
def test_kernel_any_shape(
    lib: ModuleType, kernel: str, kind: str, data: st.DataObject, seed: int
) -> None:
    shape = data.draw(any_shape(kernel in FUSED))
    assert not list(failures(lib, [Problem(kernel, shape, kind)], [str(seed)]))


def test_a_scaling_comes_last_in_float16(lib: ModuleType) -> None:
    """s u G and s g B leave float16's range; y and the gradients do not."""
    rng = np.random.default_rng(0)
    s = 4000.0
    operands = {
        "x": ((20, 24), 1.0),
        "A": ((24, 4), 0.5),
        "core": ((4, 3), 30.0),
        "B": ((40, 3), 1e-4),
        "g": ((20, 40), 0.01),
    }
    arrays = {
        name: rng.normal(scale=scale, size=size).astype(np.float16)
        for name, (size, scale) in operands.items()
    }
    x, A, core, B, g = (a.astype(np.float64) for a in arrays.values())
    h = x @ A @ core
    assert np.abs(s * h).max() > np.finfo(np.float16).max
    truths = {"y": s * h @ B.T, "dB": s * g.T @ h, "dcore": s * (x @ A).T @ (g @ B)}
    arrays |= {"y": np.zeros((20, 40), np.float16), "u": np.zeros((20, 4), np.float16)}
    arrays |= {"dB": np.zeros((40, 3), np.float32), "dcore": np.zeros((4, 3), np.float32)}
    forward_operands = ("y", "x", "A", "core", "B", "u")
    backward_operands = ("g", "u", "A", "core", "B", "dB", "dcore")
    lib.run("few_tokens_forward", {name: arrays[name] for name in forward_operands}, {"scale": s})
    lib.run("few_tokens_backward", {name: arrays[name] for name in backward_operands}, {"scale": s})
    for name, truth in truths.items():
        assert np.abs(arrays[name] - truth).max() <= 0.01 * np.abs(truth).max()
