"""The table KERNELS: each kernel as a problem with inputs in poisoned memory and its float64 truth.

A problem runs in the executor's module (csrc/simt). On a GPU the operators that launch the kernels
run the table of test_operators.py (python_tests/cuda).
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import numpy as np
from arrays import (
    ALIGNED,
    COLUMNS,
    DTYPE,
    ODD,
    PACKED,
    ROWS_OF_16_BYTES,
    Layout,
    Output,
    check_close,
    narrow,
    operand,
    philox_keep,
    place,
    wide,
)

SEED = -0x123456789ABCDEF  # negative: all 64 bits matter
FLOAT = np.float32
Views = dict[str, np.ndarray]
Outputs = dict[str, Callable[[], Output]]  # functions, because each run has new outputs
Check = Callable[[Views], None]


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem.

    m tokens, k and n columns of the large matrices (n 0: half of k), ranks r and r2 (0: the same).
    The device has `sms` multiprocessors. bare: without the optional operands: a bias, sums that are
    added to, dB, dx, the tokens of rows. cores: of per-row cores (0: 1 to 9, by k).
    """

    m: int
    k: int
    r: int
    layout: Layout = ALIGNED
    p: float = 0.0
    sms: int = 132
    r2: int = 0
    n: int = 0
    bare: bool = False
    float_factors: bool = False
    cores: int = 0

    @property
    def other(self) -> int:
        return self.r2 or self.r

    @property
    def columns(self) -> int:
        return self.n or max(1, self.k // 2)

    def __str__(self) -> str:
        place = {PACKED: "packed", ALIGNED: "aligned", ODD: "odd", COLUMNS: "columns"}[self.layout]
        flags = f"-p{self.p}" * bool(self.p) + "-bare" * self.bare + "-float" * self.float_factors
        return f"{self.m}x{self.k}x{self.columns}-r{self.r}-{place}-sm{self.sms}{flags}"


# Odd, ragged, strided, unaligned, transposed; ranks 1 to 256; no token and one; fewer tiles than
# splits and more; more cores than rows.
QUICK = [
    Shape(0, 64, 16),
    Shape(0, 64, 16, bare=True),
    Shape(40, 8, 4, cores=3000),
    Shape(1, 1, 1, ODD, 0.5),
    Shape(1, 1000, 8, sms=8),
    Shape(2, 333, 5, ODD, 0.1, bare=True),
    Shape(3, 129, 17, COLUMNS),
    Shape(16, 256, 16, PACKED, bare=True),
    Shape(17, 65, 33, ODD, sms=1),
    Shape(31, 255, 31, sms=3, float_factors=True),
    Shape(33, 31, 256),
    Shape(48, 200, 128, p=0.25),
    Shape(64, 128, 32, PACKED, 0.5, 4, bare=True),
    Shape(100, 100, 100, COLUMNS, sms=5),
    Shape(65, 72, 200, sms=3),
    Shape(150, 70, 60, ODD, sms=2, r2=7),
    Shape(256, 256, 16, PACKED, sms=3, bare=True),
    Shape(385, 130, 10, ODD, sms=8, float_factors=True),
]
SHAPES = [
    *QUICK,
    Shape(1, 64, 16, PACKED),
    Shape(5, 7, 3, COLUMNS, 0.3),
    Shape(16, 512, 64, sms=4, r2=32),
    Shape(65, 200, 12, ODD, 0.1, 6, r2=20, bare=True),
    Shape(127, 129, 16, sms=12, bare=True),
    Shape(129, 257, 1, p=0.9, sms=20),
    Shape(130, 40, 129, sms=4),
    Shape(200, 330, 24, PACKED, sms=16),
    Shape(256, 320, 32, p=0.1, sms=2),
    Shape(67, 100, 250, sms=2),
    Shape(400, 24, 4, PACKED, 0.4, 11, bare=True),
    Shape(600, 90, 36, sms=2, r2=50, bare=True),
    Shape(1030, 8, 16, PACKED, sms=40),
    Shape(300, 560, 24, sms=10),
    Shape(700, 512, 13, ODD, sms=16),
    Shape(2040, 40, 13, ODD, sms=16),
]
# For gemm_lotr: ragged in every extent; one tile and several per pair of blocks; fewer k-steps than
# the ring has stages, and more; both steps of the rank.
FUSED_QUICK = [
    Shape(0, 16, 4, n=16),
    Shape(1, 1, 1, n=1, sms=1),
    Shape(1, 8, 65, n=264, sms=2),
    Shape(130, 520, 1, n=264, sms=2),
    Shape(200, 72, 128, n=200, sms=2, bare=True),
    Shape(300, 200, 11, n=331, sms=2),
    Shape(200, 328, 50, n=520, sms=4),
]
FUSED_SHAPES = [
    *FUSED_QUICK,
    Shape(520, 136, 64, n=520, sms=4, bare=True),
    Shape(257, 264, 80, n=257, sms=2),
    # More bands of tiles than are walked together, two columns of them.
    Shape(2400, 8, 8, n=300, sms=6),
]


@dataclass
class Problem:
    """One call of a kernel: inputs, functions that create outputs, the check of their values."""

    name: str
    kernel: str
    device: dict[str, int]  # for which plans are made
    inputs: Views
    numbers: dict[str, float]
    outputs: Outputs
    check: Check

    def run(self, lib: ModuleType, **options: object) -> Views:
        """Returns the outputs by name, and checks that nothing else was written.

        Args:
            lib: The executor's module.
            options: For the executor.
        """
        outputs = {name: make() for name, make in self.outputs.items()}
        views = {name: output.view for name, output in outputs.items()}
        before = {name: array.copy() for name, array in self.inputs.items()}
        lib.set_device(**self.device)
        lib.set_options(sm90=self.kernel == "gemm_lotr", **options)
        lib.run(self.kernel, self.inputs | views, self.numbers)
        for output in outputs.values():
            output.check_outside()
        for name, array in before.items():
            np.testing.assert_array_equal(self.inputs[name], array, f"{self.name}: input {name}")
        return views

    def checked(self, lib: ModuleType, **options: object) -> dict[str, bytes]:
        """Runs once, checks the values, and returns the bits of the outputs."""
        views = self.run(lib, **options)
        self.check(views)
        return {name: np.ascontiguousarray(view).tobytes() for name, view in views.items()}


class Maker:
    """Random operands of a shape and element type, and the comparison of results."""

    def __init__(self, kernel: str, shape: Shape, kind: str):
        self.shape = shape
        self.kind = kind
        self.name = f"{kernel} {kind} {shape}"
        self.dtype = DTYPE[kind]
        self.rng = np.random.default_rng(zlib.crc32(self.name.encode()))

    def floats(self, *size: int) -> np.ndarray:
        return self.rng.standard_normal(size, FLOAT)

    def stored(self, rows: int, cols: int) -> np.ndarray:
        """Returns values of the kernel's type."""
        return narrow(self.floats(rows, cols), self.kind)

    def large(self, rows: int, cols: int) -> np.ndarray:
        return place(self.stored(rows, cols), self.dtype, self.shape.layout)

    def factor(self, rows: int, cols: int) -> np.ndarray:
        if self.shape.float_factors:
            return place(self.floats(rows, cols), FLOAT, self.shape.layout)
        return self.large(rows, cols)

    def op(self, a: np.ndarray) -> np.ndarray:
        """Returns the values of an operand that the kernel's product uses."""
        return operand(a, self.kind)

    def problem(
        self, kernel: str, inputs: Views, outputs: Outputs, check: Check, **numbers: float
    ) -> Problem:
        device = {"multiprocessors": self.shape.sms}
        return Problem(self.name, kernel, device, inputs, numbers, outputs, check)

    def with_dropout(self, problem: Problem) -> Problem:
        """Adds the shape's dropout, whose effect is `mask`."""
        if self.shape.p:
            problem.inputs["seed"] = np.array([SEED], np.int64)
            problem.numbers["p"] = self.shape.p
        return problem

    @cached_property
    def mask(self) -> np.ndarray | float:
        """1 / (1 - p) for the elements [m, k] that dropout keeps, else 0."""
        shape = self.shape
        if not shape.p:
            return 1.0
        return philox_keep(SEED, shape.m, shape.k, shape.p) / (1 - shape.p)

    def out(
        self,
        *size: int,
        start: np.ndarray | None = None,
        dtype: type | None = None,
        packed: bool = False,
    ) -> Callable[[], Output]:
        """Returns a function that creates an output, by default of the kernel's type and of NaN."""
        layout = PACKED if packed else self.shape.layout
        return lambda: Output(size, dtype or self.dtype, layout, start)

    def sum(self, rows: int, cols: int) -> tuple[np.ndarray | float, Callable[[], Output]]:
        """Returns what a float32 sum is added to, and the function that creates it.

        bare: It is not added to anything, and is packed, as it must be without tokens.
        """
        if self.shape.bare:
            return 0.0, self.out(rows, cols, dtype=FLOAT, packed=True)
        start = self.floats(rows, cols)
        return start, self.out(rows, cols, start=start, dtype=FLOAT)

    def close(
        self,
        result,
        left,
        right,
        what: str,
        add=0.0,
        mask=1.0,
        kind: str | None = None,
        scale: float = 1.0,
    ) -> None:
        """Asserts result = add + mask scale (left right), by float64 and float32 arithmetic."""
        kind = kind or self.kind
        truth = add + mask * scale * (left @ right)
        eager = add + mask * scale * (left.astype("f4") @ right.astype("f4"))
        size = np.abs(add) + np.abs(mask * scale) * (np.abs(left) @ np.abs(right))
        check_close(result, truth, narrow(eager, kind), size, kind, f"{self.name}: {what}")


def shrink(t: Maker, shape: Shape) -> Problem:
    x = t.large(shape.m, shape.k)
    A = t.factor(shape.k, shape.r)
    problem = t.problem(
        "shrink",
        {"x": x, "A": A},
        {"u": t.out(shape.m, shape.r)},
        lambda out: t.close(out["u"], t.op(x) * t.mask, t.op(A), "u"),
    )
    return t.with_dropout(problem)


def shrink_core(t: Maker, shape: Shape) -> Problem:
    """shrink of few tokens: u and h = 3 u core from one launch."""
    x = t.large(shape.m, shape.k)
    A = t.factor(shape.k, shape.r)
    core = t.factor(shape.r, shape.other)
    outputs = {"u": t.out(shape.m, shape.r), "h": t.out(shape.m, shape.other)}

    def check(out: Views) -> None:
        t.close(out["u"], t.op(x), t.op(A), "u", scale=0.5)
        t.close(out["h"], t.op(out["u"]), t.op(core), "h", scale=3.0)  # of the u that is stored

    inputs = {"x": x, "A": A, "core": core}
    return t.problem("shrink", inputs, outputs, check, scale=0.5, core_scale=3.0)


def expand(
    t: Maker,
    shape: Shape,
    add: np.ndarray | float,
    y0: np.ndarray | None = None,
    **inputs: np.ndarray,
) -> Problem:
    """y = add + drop(u F^T), where `add` is y0, or the start or bias in `inputs`, or zero."""
    u = t.large(shape.m, shape.r)
    F = t.factor(shape.k, shape.r)
    problem = t.problem(
        "expand_add",
        {"u": u, "F": F, **inputs},
        {"y": t.out(shape.m, shape.k, start=y0)},
        lambda out: t.close(out["y"], t.op(u), t.op(F).T, "y", add, t.mask),
        fresh=y0 is None,
    )
    return t.with_dropout(problem)


def expand_add(t: Maker, shape: Shape) -> Problem:
    """y += u F^T."""
    y0 = t.stored(shape.m, shape.k)
    return expand(t, shape, wide(y0), y0)


def expand_fresh(t: Maker, shape: Shape) -> Problem:
    """y = bias + u F^T, or without the bias."""
    if shape.bare:
        return expand(t, shape, 0.0)
    bias = t.large(1, shape.k)[0]
    return expand(t, shape, wide(bias), bias=bias)


# The layout of `start` for each layout of y: both by chunks with other strides, one of them, none.
START_LAYOUT = {
    PACKED: Layout(pad=16, multiple=16),
    ALIGNED: ODD,
    ODD: COLUMNS,
    COLUMNS: PACKED,
}


def expand_from(t: Maker, shape: Shape) -> Problem:
    """y = start + u F^T from another matrix."""
    start = place(t.stored(shape.m, shape.k), t.dtype, START_LAYOUT[shape.layout])
    return expand(t, shape, wide(start), start=start)


def factor_grad(t: Maker, shape: Shape) -> Problem:
    """D += x^T v; bare: D = x^T v."""
    x = t.large(shape.m, shape.k)
    v = t.large(shape.m, shape.r)
    D0, D = t.sum(shape.k, shape.r)
    problem = t.problem(
        "factor_grad",
        {"x": x, "v": v},
        {"D": D},
        lambda out: t.close(out["D"], (t.op(x) * t.mask).T, t.op(v), "D", D0, kind="fp32"),
        accumulate=not shape.bare,
    )
    return t.with_dropout(problem)


def shrink_grad(t: Maker, shape: Shape) -> Problem:
    """du = g F and Q += g^T u; bare: Q = g^T u."""
    g = t.large(shape.m, shape.k)
    F = t.factor(shape.k, shape.r)
    u = t.large(shape.m, shape.r)
    Q0, Q = t.sum(shape.k, shape.r)

    def check(out: Views) -> None:
        t.close(out["du"], t.op(g), t.op(F), "du")
        t.close(out["Q"], t.op(g).T, t.op(u), "Q", Q0, kind="fp32")

    inputs = {"g": g, "F": F, "u": u}
    outputs = {"du": t.out(shape.m, shape.r), "Q": Q}
    return t.problem("shrink_grad", inputs, outputs, check, accumulate=not shape.bare)


def gemm_lotr(t: Maker, shape: Shape, backward: bool = False) -> Problem:
    """y = x W^T + bias + u F^T. Backward, with the same names: y = x W + u F^T, W [k, n]."""
    sizes = (shape.k, shape.columns) if backward else (shape.columns, shape.k)
    inputs = {
        "x": t.large(shape.m, shape.k),
        "W": t.large(*sizes),
        "u": t.large(shape.m, shape.r),
        "F": t.large(shape.columns, shape.r),
    }
    left = np.hstack([wide(inputs["x"]), wide(inputs["u"])])
    W = wide(inputs["W"])
    right = np.vstack([W if backward else W.T, wide(inputs["F"]).T])
    bias = 0.0
    if not shape.bare:
        inputs["bias"] = t.large(1, shape.columns)
        bias = wide(inputs["bias"])
    return t.problem(
        "gemm_lotr",
        inputs,
        {"y": t.out(shape.m, shape.columns)},
        lambda out: t.close(out["y"], left, right, "y", bias),
        backward=backward,
    )


def gemm_lotr_backward(t: Maker, shape: Shape) -> Problem:
    return gemm_lotr(t, shape, True)


def pack(t: Maker, shape: Shape) -> Problem:
    """A copy in the kernel's type, with rows at multiples of 16 bytes. Padding is not written."""
    matrix = t.factor(shape.m, shape.k)
    return t.problem(
        "pack",
        {"from": matrix},
        {"to": lambda: Output((shape.m, shape.k), t.dtype, ROWS_OF_16_BYTES)},
        lambda out: np.testing.assert_array_equal(wide(out["to"]), t.op(matrix)),
    )


# ---- the core ----


def fold(t: Maker, shape: Shape) -> Problem:
    B = t.factor(shape.k, shape.other)
    core = t.factor(shape.r, shape.other)
    return t.problem(
        "fold",
        {"B": B, "core": core},
        {"F": t.out(shape.k, shape.r)},
        lambda out: t.close(out["F"], wide(B), wide(core).T, "F", scale=0.25),
        scale=0.25,
    )


def fold_grad(t: Maker, shape: Shape) -> Problem:
    """dcore = s Q^T B, dB += s Q core. Only dcore if bare, only dB if the shape has dropout."""
    B = t.factor(shape.k, shape.other)
    core = t.factor(shape.r, shape.other)
    Q = t.floats(shape.k, shape.r)
    dB0 = t.floats(shape.k, shape.other)
    outputs: Outputs = {}
    if shape.bare or not shape.p:
        outputs["dcore"] = t.out(shape.r, shape.other, dtype=FLOAT, packed=True)
    if not shape.bare:
        outputs["dB"] = t.out(shape.k, shape.other, start=dB0, dtype=FLOAT)

    def check(out: Views) -> None:
        if "dcore" in out:
            t.close(out["dcore"], wide(Q).T, wide(B), "dcore", scale=0.25, kind="fp32")
        if "dB" in out:
            t.close(out["dB"], wide(Q), wide(core), "dB", dB0, scale=0.25, kind="fp32")

    return t.problem("fold_grad", {"Q": Q, "B": B, "core": core}, outputs, check, scale=0.25)


# ---- the few-token form: products of products, of which the inner one may be stored rounded ----

ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}


class Rounded(NamedTuple):
    """A matrix and the mean square of its rounding error in units of the type.

    h and du may be stored rounded or not.
    """

    value: np.ndarray
    square: np.ndarray

    @classmethod
    def product(cls, scale: float, left: np.ndarray, right: np.ndarray) -> "Rounded":
        """Returns scale left right. Its error is the error of the terms, which may cancel."""
        value = scale * (left @ right)
        return cls(value, np.maximum(value**2, scale**2 * (left**2 @ right**2)))

    @property
    def T(self) -> "Rounded":
        return Rounded(self.value.T, self.square.T)


def check_unfolded(
    t: Maker, what: str, result: np.ndarray, left: Rounded, right: np.ndarray, add: np.ndarray
) -> None:
    """Asserts result = add + left right, off by at most four rounding errors of `left`."""
    unit = ROUNDING[t.kind]
    truth = wide(add) + left.value @ right
    size = np.abs(wide(add)) + np.abs(left.value) @ np.abs(right)
    error = np.abs(wide(result) - truth)
    rounding = np.abs(truth) * (unit if result.dtype == t.dtype else 2.0**-22)
    allowed = 4 * unit * np.sqrt(left.square @ right**2) + rounding + 1e-6 * size + 1e-30
    assert np.isfinite(error).all() and (error <= allowed).all(), (
        f"{t.name}: {what} is off by {error.max():.3g}"
    )


S = 0.125  # the scaling


def small_forward(t: Maker, shape: Shape) -> Problem:
    """u = x A, y += s (u core) B^T."""
    x = t.large(shape.m, shape.k)
    A = t.factor(shape.k, shape.r)
    core = t.factor(shape.r, shape.other)
    B = t.factor(shape.columns, shape.other)
    y0 = t.stored(shape.m, shape.columns)

    def check(out: Views) -> None:
        t.close(out["u"], t.op(x), t.op(A), "u")
        h = Rounded.product(S, t.op(out["u"]), t.op(core))
        check_unfolded(t, "y", out["y"], h, t.op(B).T, y0)

    inputs = {"x": x, "A": A, "core": core, "B": B}
    outputs = {"y": t.out(*y0.shape, start=y0), "u": t.out(shape.m, shape.r)}
    return t.problem("small_forward", inputs, outputs, check, scale=S)


def small_backward(t: Maker, shape: Shape) -> Problem:
    """h = s g B, du = h core^T, dx += du A^T, dA += x^T du, dB += s g^T (u core), dcore = u^T h.

    bare: without dx and dA.
    """
    x = t.large(shape.m, shape.k)
    g = t.large(shape.m, shape.columns)
    u = t.large(shape.m, shape.r)
    A = t.factor(shape.k, shape.r)
    core = t.factor(shape.r, shape.other)
    B = t.factor(shape.columns, shape.other)
    dx0 = t.stored(shape.m, shape.k)
    dA0 = t.floats(*A.shape)
    dB0 = t.floats(*B.shape)
    inputs = {"g": g, "u": u, "A": A, "core": core, "B": B}
    outputs = {
        "dB": t.out(*B.shape, start=dB0, dtype=FLOAT),
        "dcore": t.out(*core.shape, dtype=FLOAT, packed=True),
    }
    if not shape.bare:
        inputs["x"] = x
        outputs["dx"] = t.out(*dx0.shape, start=dx0)
        outputs["dA"] = t.out(*A.shape, start=dA0, dtype=FLOAT)

    def check(out: Views) -> None:
        G = t.op(core)
        uG = Rounded.product(S, t.op(u), G)
        h = Rounded.product(S, t.op(g), t.op(B))
        du = Rounded(h.value @ G.T, h.square @ (G**2).T)
        check_unfolded(t, "dB", out["dB"].T, uG.T, t.op(g), dB0.T)
        check_unfolded(t, "dcore", out["dcore"].T, h.T, t.op(u), np.zeros(core.T.shape))
        if not shape.bare:
            check_unfolded(t, "dx", out["dx"], du, t.op(A).T, dx0)
            check_unfolded(t, "dA", out["dA"].T, du.T, t.op(x), dA0.T)

    return t.problem("small_backward", inputs, outputs, check, scale=S)


# ---- per-row cores ----


class Rows:
    """Rows of tokens with cores, by an index in any order, some without a core.

    bare: by the ends of each core's rows, one row per token.
    """

    def __init__(self, t: Maker, shape: Shape):
        self.op = t.op
        self.count = shape.cores or 1 + shape.k % 9
        self.cores = np.stack([t.factor(shape.r, shape.other) for _ in range(self.count)])
        self.g = t.large(shape.m, shape.other)
        self.u = t.large(shape.m if shape.bare else shape.m // 3 + 1, shape.r)
        self.index = t.rng.integers(-1, self.count, shape.m)
        self.tokens = t.rng.integers(0, len(self.u), shape.m)
        self.index[self.index == self.count // 2] = -1  # and some cores without a row
        self.inputs: Views = {"index": self.index, "tokens": self.tokens}
        if shape.bare:
            self.tokens = np.arange(shape.m)
            self.index = np.sort(self.index % (self.count + 1))  # rows without a core come last
            ends = np.searchsorted(self.index, range(self.count), "right")
            self.inputs = {"offs": ends.astype(np.int32)}
        self.inputs |= {"u": self.u, "cores": self.cores}

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (index of a core, its rows, their u, the core, their g) in float64."""
        for core in range(self.count):
            rows = self.index == core
            u = self.op(self.u[self.tokens[rows]])
            yield core, rows, u, self.op(self.cores[core]), self.op(self.g[rows])


def row_core(t: Maker, shape: Shape) -> Problem:
    rows = Rows(t, shape)

    def check(out: Views) -> None:
        for core, of_core, u, G, _ in rows:
            t.close(out["h"][of_core], u, G, f"h of core {core}", scale=S)
        without_core = ~np.isin(rows.index, range(rows.count))
        assert not wide(out["h"][without_core]).any(), "rows without a core are zero"

    return t.problem("row_core", rows.inputs, {"h": t.out(shape.m, shape.other)}, check, scale=S)


def row_core_backward(t: Maker, shape: Shape) -> Problem:
    rows = Rows(t, shape)

    def check(out: Views) -> None:
        du = np.zeros(rows.u.shape)
        size = np.zeros(rows.u.shape)
        for core, of_core, u, G, g in rows:
            t.close(out["dcores"][core], u.T, g, f"dcores[{core}]", scale=S, kind="fp32")
            np.add.at(du, rows.tokens[of_core], S * g @ G.T)
            np.add.at(size, rows.tokens[of_core], S * np.abs(g) @ np.abs(G).T)
        check_close(out["du"], du, narrow(du, t.kind), size, t.kind, f"{t.name}: du")

    outputs = {
        "du": t.out(*rows.u.shape),
        "dcores": t.out(rows.count, shape.r, shape.other, dtype=FLOAT),
    }
    inputs = rows.inputs | {"g": rows.g}
    return t.problem("row_core_backward", inputs, outputs, check, scale=S)


FUSED = ("gemm_lotr", "gemm_lotr_backward")
_LARGE = (
    shrink,
    shrink_core,
    expand_add,
    expand_fresh,
    expand_from,
    factor_grad,
    shrink_grad,
    pack,
)
_SMALL = (fold, fold_grad, small_forward, small_backward, row_core, row_core_backward)
KERNELS: dict[str, Callable[[Maker, Shape], Problem]] = {
    f.__name__: f for f in (*_LARGE, *_SMALL, gemm_lotr, gemm_lotr_backward)
}
CASES = [(name, kind) for name in KERNELS for kind in DTYPE if name not in FUSED or kind != "fp32"]


def problem_of(kernel: str, shape: Shape, kind: str) -> Problem:
    return KERNELS[kernel](Maker(kernel, shape, kind), shape)


def shapes_of(kernel: str, quick: bool = False) -> list[Shape]:
    """All shapes that a kernel takes, or the few of `make test`."""
    if kernel in FUSED:
        return FUSED_QUICK if quick else FUSED_SHAPES
    return QUICK if quick else SHAPES
