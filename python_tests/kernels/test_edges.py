"""Cases that the table of shapes does not reach.

Rows without a core or token, offsets beyond 31 bits, a grid beyond its limit, bad arguments, plans
from LOTR_CUDA_PLAN, early launches.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType

import numpy as np
import pytest
from arrays import Array, Layout, narrow, wide
from cases import KERNELS, Problem
from shapes import FUSED, Shape, shapes_of

from csrc.simt import build

BF16 = np.uint16
R = 16


# ---- per-row cores ----


def results(lib: ModuleType, g: np.ndarray, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    h, du, dcores = (np.full_like(a, np.nan) for a in (g, inputs["u"], inputs["cores"]))
    lib.run("row_core", {**inputs, "h": h})
    lib.run("row_core_backward", {**inputs, "g": g, "du": du, "dcores": dcores})
    return [h, du, dcores]


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_whose_core_or_token_does_not_exist(lib: ModuleType, seed: int) -> None:
    """Such rows are NaN and have no gradient. The other rows do not change."""
    rng = np.random.default_rng(seed)
    g, u, cores = (rng.standard_normal(size, np.float32) for size in ((50, R), (9, R), (4, R, R)))
    index = rng.integers(0, len(cores), len(g))
    tokens = rng.integers(0, len(u), len(g))
    index[[3, 11, 20, 30]] = [-2, -1, len(cores), 2**40]
    tokens[[7, 21, 40]] = [-1, len(u), -(2**40)]
    is_good = ~np.isin(np.arange(len(g)), [3, 20, 30, 7, 21, 40])
    lib.set_options(order="random", seed=seed)
    inputs = {"u": u, "cores": cores, "index": index, "tokens": tokens}
    h, *gradients = results(lib, g, inputs)
    assert np.isnan(h[~is_good]).all() and not h[11].any()
    good_inputs = inputs | {"index": index[is_good], "tokens": tokens[is_good]}
    expected = results(lib, g[is_good], good_inputs)
    for result, value in zip([h[is_good], *gradients], expected, strict=True):
        np.testing.assert_array_equal(result, value)  # NaN would equal NaN
        assert np.isfinite(value).all()


# ---- sizes: sparse arrays, of which only the touched pages take memory ----

ROW = 1 << 27  # elements from row to row
M = 20  # the last row starts at 19 * 2^27 > 2^31
K = 72


def test_rows_beyond_31_bits(lib: ModuleType) -> None:
    """Small integers, so that every product is exact and equality is the check."""
    rng = np.random.default_rng(0)
    x, A, v = (rng.integers(-4, 5, shape).astype(float) for shape in ((M, K), (K, R), (M, R)))
    factors = {"A": narrow(A, BF16), "v": narrow(v, BF16)}
    wide_x, u, du, y = (
        lib.sparse_array([M, ROW], np.dtype(BF16))[:, :cols] for cols in (K, R, R, K)
    )
    wide_x[...] = narrow(x, BF16)
    D = np.ones((K, R), np.float32)
    Q = np.zeros((K, R), np.float32)
    lib.set_device(multiprocessors=4)
    lib.run("shrink", {"x": wide_x, "A": factors["A"], "u": u})
    lib.run("factor_grad", {"D": D, "x": wide_x, "v": factors["v"]})
    lib.run("shrink_grad", {"g": wide_x, "F": factors["A"], "u": factors["v"], "du": du, "Q": Q})
    lib.run("expand_add", {"y": y, "u": factors["v"], "F": factors["A"]})
    for result, truth in ((u, x @ A), (D, 1 + x.T @ v), (du, x @ A), (Q, x.T @ v), (y, v @ A.T)):
        np.testing.assert_array_equal(wide(result), truth)


@pytest.mark.full
def test_more_columns_than_a_grid_has_in_y(lib: ModuleType) -> None:
    """More than 65,535 tiles of 64 strided columns. x is packed first, tile by tile."""
    cols = 65_536 * 64 + 3
    x = lib.sparse_array([2, 3 * cols], np.dtype(BF16))[:, ::3]
    A = lib.sparse_array([cols, 8], np.dtype(BF16))
    u = np.zeros((2, 8), BF16)
    ends = [0, 1, cols // 2, cols - 2, cols - 1]
    x[:, ends] = narrow(np.arange(10.0).reshape(2, 5) - 4, BF16)
    A[ends] = narrow(np.arange(40.0).reshape(5, 8) % 7, BF16)
    lib.run("shrink", {"x": x, "A": A, "u": u})
    assert (wide(u) == wide(x[:, ends]) @ wide(A[ends])).all()


# ---- bad arguments: refused before anything is written ----


def bf16(rows: int, cols: int, stride: int = 0, start: int = 0) -> np.ndarray:
    """Returns zeros with this row stride, `start` elements after a multiple of 16 bytes."""
    layout = Layout(start, max(0, stride - cols))
    return Array((rows, cols), BF16, layout, np.zeros((rows, cols))).view


BAD_ROW_STRIDE = (
    r"expected a row stride that is a multiple of 8, at least {} and at most 2\^30, got {}"
)
GOOD = {
    "fold": {"B": bf16(8, 4), "core": bf16(4, 4), "F": bf16(8, 4)},
    "shrink": {"x": bf16(2, 8), "A": bf16(8, 4), "u": bf16(2, 4)},
    "expand_add": {"y": bf16(2, 8), "u": bf16(2, 4), "F": bf16(8, 4)},
    "gemm_lotr": {
        "y": bf16(20, 24),
        "x": bf16(20, 16),
        "W": bf16(24, 16),
        "u": bf16(20, 5, 8),
        "F": bf16(24, 5, 8),
    },
}


def bad(kernel: str, message: str, numbers: dict | None = None, **arrays: np.ndarray) -> tuple:
    """Returns a row of BAD. The arrays replace good ones or are added. None leaves one out."""
    return kernel, GOOD.get(kernel, {}) | arrays, numbers or {}, message


BAD = [
    bad("shrunk", "run: name: expected one of shrink, .*, got shrunk"),
    bad("shrink", r"shrink: arrays: expected x A u \[ seed core h \], got .*B", B=bf16(2, 2)),
    bad("shrink", "shrink: arrays: expected .*, got no u", u=None),
    bad("shrink", "shrink: numbers: expected p=0 scale=1 core_scale=1, got s", numbers={"s": 1}),
    bad(
        "shrink",
        "shrink: seed: expected an array, because p is not 0, got none",
        numbers={"p": 0.5},
    ),
    bad("shrink", r"shrink: A: expected shape \[8, 4\], got shape \[7, 4\]", A=bf16(7, 4)),
    bad(
        "shrink",
        "shrink: x: expected float32, float16 or uint16 .*, got int64",
        x=bf16(2, 8).astype(int),
    ),
    bad(
        "shrink",
        "u: expected the element type of the input, got float32",
        u=np.zeros((2, 4), np.float32),
    ),
    bad(
        "shrink",
        "shrink: A: expected a rank from 1 to 256, got 257",
        A=bf16(8, 257),
        u=bf16(2, 257),
    ),
    bad("expand_add", "F: expected a rank from 1 to 256, got 300", u=bf16(2, 300), F=bf16(8, 300)),
    bad("gemm_lotr", "gemm_lotr: x: " + BAD_ROW_STRIDE.format(16, 20), x=bf16(20, 16, 20)),
    bad(
        "gemm_lotr",
        "gemm_lotr: x: " + BAD_ROW_STRIDE.format(16, 2**30 + 8),
        y=bf16(2, 24),
        x=np.zeros((2, 2**30 + 8), BF16)[:, :16],  # pages that are never touched take no memory
        u=bf16(2, 5, 8),
    ),
    bad(
        "gemm_lotr",
        "gemm_lotr: x: expected an address divisible by 16, got a remainder of 8",
        x=bf16(20, 16, 24, 4),
    ),
    bad("gemm_lotr", "gemm_lotr: x: expected a column stride of 1, got 24", x=bf16(16, 20, 24).T),
    bad("gemm_lotr", "gemm_lotr: W: " + BAD_ROW_STRIDE.format(16, 17), W=bf16(24, 16, 17)),
    bad("gemm_lotr", "gemm_lotr: u: " + BAD_ROW_STRIDE.format(5, 5), u=bf16(20, 5)),
    bad("gemm_lotr", "gemm_lotr: F: " + BAD_ROW_STRIDE.format(5, 12), F=bf16(24, 5, 12)),
    bad("gemm_lotr", "gemm_lotr: y: " + BAD_ROW_STRIDE.format(24, 28), y=bf16(20, 24, 28)),
    bad(
        "gemm_lotr",
        "gemm_lotr: r: expected 1 to 128, got 129",
        u=bf16(20, 129, 136),
        F=bf16(24, 129, 136),
    ),
    bad("gemm_lotr", "gemm_lotr: r: expected 1 to 128, got 0", u=bf16(20, 0, 8), F=bf16(24, 0, 8)),
    bad(
        "gemm_lotr", r"gemm_lotr: K: expected 1 to 2\^30, got 0", x=bf16(20, 0, 8), W=bf16(24, 0, 8)
    ),
    bad(
        "gemm_lotr",
        "dtype: expected bfloat16 or float16, got float32",
        **{name: np.zeros(a.shape, np.float32) for name, a in GOOD["gemm_lotr"].items()},
    ),
    bad(
        "fold", "fold: B: expected a rank from 1 to 256, got 257", B=bf16(8, 257), core=bf16(4, 257)
    ),
]


@pytest.mark.parametrize(("kernel", "arrays", "numbers", "message"), BAD)
def test_bad_argument_is_named(
    lib: ModuleType, kernel: str, arrays: dict, numbers: dict, message: str
) -> None:
    arrays = {name: a for name, a in arrays.items() if a is not None}
    with pytest.raises(ValueError, match=message):
        lib.run(kernel, arrays, numbers)
    assert not any(a.any() for a in arrays.values())


# ---- plans: launches parse LOTR_CUDA_PLAN until its text is valid. A process keeps that plan ----


@pytest.fixture
def process() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


def launched(plan: str, op: str) -> tuple[str, int]:
    """Returns the plan of a launch as text, and how many blocks it had."""
    os.environ["LOTR_CUDA_PLAN"] = plan
    lib = build.load("plain")
    lib.reset_counters()
    # row_core_grad is a launch of row_core_backward, here of 7 cores.
    kernel, n = ("row_core_backward", 7) if op == "row_core_grad" else (op, 600)
    Problem(kernel, Shape(330, 600, 20, sms=12, other_r=12, cores=7), "bf16").run(lib)
    grids = {launch["name"]: launch["grid"] for launch in lib.counters()["launches"]}
    return lib.plan_text(op, M=330, N=n, r=20, r_out=12), np.prod(grids[op])


PLANS = {
    "shrink": "rows=128 cols=64 m_blocks=3 n_blocks=2",
    "expand_add": "rows=128 cols=64 m_blocks=1 n_blocks=10",
    "factor_grad": "rows=64 cols=128 m_blocks=3 n_blocks=5",
    "shrink_grad": "rows=64 cols=128 m_blocks=2 n_blocks=5",
    "row_core_grad": "splits=3",
}


def test_a_plan_of_the_environment_is_printed_and_launched(process: Executor) -> None:
    plan = "; ".join(f"{op} {words}" for op, words in PLANS.items())
    for op, words in PLANS.items():
        text, blocks = process.submit(launched, plan, op).result()
        assert text.startswith(f"{op} {words}: {blocks} blocks")


# Texts that are not plans, and the bad word of each.
NOT_PLANS = {
    "shrunk rows=64": "shrunk",
    "shrink rows": "rows",
    "shrink splits=2": "splits=2",
    "fold_grad rows=64": "rows=64",
    "rows=64": "rows=64",
    "shrink rows=99999999999999999999": "rows=99999999999999999999",
}
# Plans that no kernel can run, and how the error ends.
IMPOSSIBLE = {
    "shrink m_blocks=99": "m_blocks from 1 to 6, got 99",
    "expand_add n_blocks=1": "at least 2 n_blocks of expand_add, got 1",
    "factor_grad cols=77": "a tile that the kernel is compiled for, as 64 x 128, got 64 x 77",
    "fold_grad splits=4000": "splits from 1 to 19, got 4000",
}


def test_bad_plan_is_refused(process: Executor) -> None:
    # A process keeps its first plan, so the texts that are not plans come first.
    refusals = [(text, "shrink", f"got {word}") for text, word in NOT_PLANS.items()]
    plan = "; ".join(IMPOSSIBLE)
    refusals += [(plan, words.split()[0], message) for words, message in IMPOSSIBLE.items()]
    for text, op, message in refusals:
        with pytest.raises(ValueError, match=f"^LOTR_CUDA_PLAN: expected .*{re.escape(message)}$"):
            process.submit(launched, text, op).result()


# ---- launches ----


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launch_is_early_and_lets_the_next_begin(lib: ModuleType, kernel: str) -> None:
    """Every block lets it begin, with parts and without. A card without early launches has none."""
    for shape in (Shape(3, 129, 17), Shape(130, 900, 13, sms=16)):
        problem = Problem(kernel, shape, "bf16")
        bits = []
        for early in (True, False):
            problem.device["early"] = early
            lib.reset_counters()
            bits.append(problem.run(lib))
            for launch in lib.counters()["launches"]:
                assert launch["early"] == early, (shape, launch)
                assert launch["launched_dependents"] == np.prod(launch["grid"]), (shape, launch)
        assert bits[0] == bits[1], shape


@pytest.mark.parametrize("kernel", FUSED)
def test_bits_do_not_depend_on_the_number_of_multiprocessors(lib: ModuleType, kernel: str) -> None:
    problem = Problem(kernel, shapes_of(kernel, "quick")[-1], "bf16")
    first = problem.run(lib)
    problem.device["multiprocessors"] = 6
    assert problem.run(lib) == first
