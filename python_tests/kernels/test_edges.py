"""What the table of shapes does not reach: rows without a core or token, offsets beyond 31 bits, grids beyond their limits, bad
arguments, plans from LOTR_CUDA_PLAN, launches that begin early."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from arrays import ODD, narrow, wide
from cases import KERNELS, SHAPES, Shape

HERE = Path(__file__).resolve().parent
C, R, NAN = 4, 16, np.float32("nan")


# ---- a core a row ----


def rows_of(count: int, tokens: int, cores: int = C, r: int = R) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    index, token = rng.integers(0, cores, count), rng.integers(0, tokens, count)
    return {"u": draw(tokens, r), "cores": draw(cores, r, r), "g": draw(count, r), "index": index, "tokens": token}


def forward(lib: ModuleType, given: dict[str, np.ndarray]) -> np.ndarray:
    h = np.full(given["g"].shape, NAN)
    lib.run("row_core", {"h": h, **{name: a for name, a in given.items() if name != "g"}})
    return h


def backward(lib: ModuleType, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    du, dcores = np.full(given["u"].shape, NAN), np.full(given["cores"].shape, NAN)
    lib.run("row_core_backward", {**given, "du": du, "dcores": dcores})
    return du, dcores


def test_rows_whose_core_or_token_does_not_exist(lib: ModuleType) -> None:
    """NaN and no gradient; the other rows have what they have without them."""
    for seed in (1, 2):
        lib.set_options(order="random", seed=seed)
        given = rows_of(50, 9)
        given["index"][[3, 20, 30]] = -2, C, 2**40
        given["tokens"][[7, 21, 40]] = -1, 9, -(2**40)
        given["index"][11] = -1
        bad = np.isin(np.arange(50), [3, 20, 30, 7, 21, 40])
        h = forward(lib, given)
        assert np.isnan(h[bad]).all() and not np.isnan(h[~bad]).any() and not h[11].any()
        kept = given | {name: given[name][~bad] for name in ("g", "index", "tokens")}
        np.testing.assert_array_equal(h[~bad], forward(lib, kept))
        for got, want in zip(backward(lib, given), backward(lib, kept), strict=True):
            np.testing.assert_array_equal(got, want)


def test_no_row_and_no_token(lib: ModuleType) -> None:
    for count, tokens in ((0, 3), (0, 0)):
        given = rows_of(count, max(tokens, 1))
        given["u"] = given["u"][:tokens]
        assert forward(lib, given).shape == (count, R)
        assert not any(a.any() for a in backward(lib, given))


def test_many_cores_of_which_few_have_rows(lib: ModuleType) -> None:
    given = rows_of(40, 10, 3000, 4)
    h, (du, dcores) = forward(lib, given), backward(lib, given)
    for i, (core, token) in enumerate(zip(given["index"], given["tokens"], strict=True)):
        np.testing.assert_allclose(h[i], given["u"][token] @ given["cores"][core], rtol=1e-5, atol=1e-5)
    assert not np.delete(dcores, given["index"], 0).any() and dcores[given["index"]].any((1, 2)).all()
    assert np.isfinite(du).all()


# ---- sizes: sparse arrays, of which only the touched pages take memory ----

ROW = 1 << 27  # elements from row to row
M, K = 20, 72  # the last row starts at 19 * 2^27 > 2^31


def test_rows_beyond_31_bits(lib: ModuleType) -> None:
    """Small integers, so that every product is exact and equality is the check."""
    rng = np.random.default_rng(0)
    x, A, u = (rng.integers(-4, 5, shape).astype(np.float64) for shape in ((M, K), (K, R), (M, R)))
    far = lambda cols: lib.sparse_array([M, ROW], np.dtype(np.uint16))[:, :cols]  # noqa: E731
    lib.set_device(multiprocessors=4)
    big, narrow_A, narrow_u = far(K), narrow(A, "bf16"), narrow(u, "bf16")
    big[...] = narrow(x, "bf16")
    product = wide(narrow(x @ A, "bf16"))
    out, k, y = far(R), far(R), far(K)
    D, Q = np.ones((K, R), np.float32), np.zeros((K, R), np.float32)
    lib.run("shrink", {"x": big, "A": narrow_A, "u": out})
    lib.run("factor_grad", {"D": D, "x": big, "v": narrow_u})
    lib.run("shrink_grad", {"g": big, "F": narrow_A, "u": narrow_u, "k": k, "Q": Q})
    lib.run("expand_add", {"y": y, "u": narrow_u, "F": narrow_A})
    assert (wide(out) == product).all() and (wide(k) == product).all()
    assert (D == 1 + x.T @ u).all() and (Q == x.T @ u).all()
    assert (wide(y) == wide(narrow(u @ A.T, "bf16"))).all()


@pytest.mark.full
def test_more_columns_than_a_grid_has_in_y(lib: ModuleType) -> None:
    """65,535 tiles of 64 columns that lie apart: x is packed first, tile by tile."""
    cols = 65_536 * 64 + 3
    x, A = lib.sparse_array([2, 3 * cols], np.dtype(np.uint16))[:, ::3], lib.sparse_array([cols, 8], np.dtype(np.uint16))
    ends, out = [0, 1, cols // 2, cols - 2, cols - 1], np.zeros((2, 8), np.uint16)
    values, factors = np.arange(10.0).reshape(2, 5) - 4, np.arange(40.0).reshape(5, 8) % 7
    x[:, ends], A[ends] = narrow(values, "bf16"), narrow(factors, "bf16")
    lib.run("shrink", {"x": x, "A": A, "u": out})
    assert (wide(out) == values @ factors).all()


# ---- bad arguments: refused before anything is written ----


def bf16(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint16)


GOOD = {"x": bf16(2, 8), "A": bf16(8, 4), "u": bf16(2, 4)}
BAD = [
    ("shrunk", GOOD, {}, "run: name: expected one of shrink, .*, got shrunk"),
    ("shrink", GOOD | {"B": bf16(2, 2)}, {}, r"shrink: arrays: expected x A u \[ seed core h \], got .*B"),
    ("shrink", {"x": bf16(2, 8), "A": bf16(8, 4)}, {}, "shrink: arrays: expected .*, got no u"),
    ("shrink", GOOD, {"s": 1}, "shrink: numbers: expected p=0 scale=1 core_scale=1, got s"),
    ("shrink", GOOD, {"p": 0.5}, "shrink: seed: expected an array beside p, got none"),
    ("shrink", GOOD | {"A": bf16(7, 4)}, {}, r"shrink: A: expected shape \[8, 4\], got shape \[7, 4\]"),
    ("shrink", GOOD | {"x": bf16(2, 8).astype(int)}, {}, "shrink: x: expected float32, float16 or uint16 .*, got int64"),
    (
        "shrink",
        GOOD | {"u": np.zeros((2, 4), np.float32)},
        {},
        "shrink: u: expected the element type of the input, got float32",
    ),
    ("shrink", GOOD | {"A": bf16(8, 257), "u": bf16(2, 257)}, {}, "shrink: A: expected a rank from 1 to 256, got 257"),
    ("expand_add", {"y": bf16(2, 8), "u": bf16(2, 300), "F": bf16(8, 300)}, {}, "F: expected a rank from 1 to 256, got 300"),
    (
        "fold",
        {"B": bf16(8, 257), "core": bf16(4, 257), "F": bf16(8, 4)},
        {},
        "B: expected a rank from 1 to 256, got 257",
    ),
]


@pytest.mark.parametrize(("name", "arrays", "numbers", "message"), BAD)
def test_bad_argument_is_named(lib: ModuleType, name: str, arrays: dict, numbers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lib.run(name, arrays, numbers)
    assert not any(a.any() for a in arrays.values())


# ---- plans: a process reads LOTR_CUDA_PLAN at the first launch that it is not refused at ----

PROGRAM = f"""
import os, sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]
import numpy as np
from cases import KERNELS, Shape
from csrc.simt import build
lib = build.load("plain")

def launch(kernel, op, *sizes):  # the plan that is printed, the blocks that were launched
    lib.reset_counters()
    KERNELS[kernel](Shape(330, 600, 20, sms=12, r2=12), "bf16").checked(lib)
    grid = next(one["grid"] for one in lib.counters()["launches"] if one["name"] == op)
    return lib.plan_text(op, *sizes, 20, 12), np.prod(grid)

def refused(kernel, plan=None):
    if plan:
        os.environ["LOTR_CUDA_PLAN"] = plan
    try:
        launch(kernel, kernel, 330, 600)
    except ValueError as error:
        return str(error)

"""


def printed(statements: str, plan: str = "") -> list[str]:
    """What the program prints."""
    environment = os.environ | {"LOTR_CUDA_PLAN": plan}
    command = [sys.executable, "-c", PROGRAM + statements]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True).stdout.splitlines()


def test_a_plan_of_the_environment_is_printed_and_launched(lib: ModuleType) -> None:
    """And the results stay right."""
    forced = {
        "shrink": "rows=64 cols=128 m_blocks=6 n_blocks=2",
        "expand_add": "rows=128 cols=64 m_blocks=1 n_blocks=10",
        "factor_grad": "rows=64 cols=128 m_blocks=3 n_blocks=5",
        "shrink_grad": "rows=64 cols=128 m_blocks=2 n_blocks=5",
        "row_core_grad": "splits=3",
    }
    calls = [(op, op, 330, 600) for op in forced if op != "row_core_grad"] + [("row_core_backward", "row_core_grad", 330, 7)]
    lines = printed(f"for call in {calls!r}: print(*launch(*call))", "; ".join(f"{op} {words}" for op, words in forced.items()))
    for (op, words), line in zip(forced.items(), lines, strict=True):
        text, blocks, launched = re.fullmatch(r"(.*): (\d+) blocks.* (\d+)", line).groups()
        assert text == f"{op} {words}" and blocks == launched, line


def test_a_plan_that_a_kernel_cannot_run_is_refused(lib: ModuleType) -> None:
    large = {"shrink": "m_blocks=99", "expand_add": "n_blocks=1", "factor_grad": "cols=77", "fold_grad": "splits=4000"}
    lines = printed(f"for name in {list(large)!r}: print(refused(name))", "; ".join(f"{op} {w}" for op, w in large.items()))
    assert [line.removeprefix("LOTR_CUDA_PLAN: expected ") for line in lines] == [
        "m_blocks from 1 to 6, got 99",
        "at least 2 n_blocks of expand_add, got 1",
        "a tile that the kernel is compiled for, as 64 x 128, got 64 x 77",
        "splits from 1 to 19, got 4000",
    ]


def test_what_is_no_plan_is_refused(lib: ModuleType) -> None:
    last_words = {
        "shrunk rows=64": "shrunk",
        "shrink rows": "rows",
        "shrink splits=2": "splits=2",
        "fold_grad rows=64": "rows=64",
        "rows=64": "rows=64",
        "shrink rows=99999999999999999999": "rows=99999999999999999999",
    }
    lines = printed(f"for plan in {list(last_words)!r}: print(refused('shrink', plan))")
    for word, line in zip(last_words.values(), lines, strict=True):
        assert line.startswith("LOTR_CUDA_PLAN: expected ") and line.endswith(f", got {word}")


# ---- launches ----


def test_every_launch_is_early_and_lets_the_next_begin(lib: ModuleType) -> None:
    """In every block, with parts to sum and without; on a card without early launches none is."""
    seen = set()
    for early in (True, False):
        for make in KERNELS.values():
            for shape in (Shape(700, 260, 16, ODD, sms=5, layers=2), Shape(90, 130, 40, p=0.25, sms=1)):
                problem = make(shape, "bf16")
                problem.device["early"] = early
                lib.reset_counters()
                problem.run(lib)
                for launch in lib.counters()["launches"]:
                    seen.add(launch["name"])
                    assert launch["early"] == early and launch["let_next"] == np.prod(launch["grid"]), (problem.name, launch)
    large, small = {"shrink", "expand_add", "factor_grad", "shrink_grad", "pack", "sum_parts"}, {"fold", "fold_grad"}
    assert seen == large | small | {"row_core", "row_core_grad", "row_ends", "sum_rows"}


def test_bits_do_not_depend_on_early_launches(lib: ModuleType) -> None:
    for kernel in KERNELS:
        problem = KERNELS[kernel](SHAPES[21], "bf16")
        first = problem.checked(lib)
        problem.device["early"] = False
        assert problem.checked(lib) == first, kernel
