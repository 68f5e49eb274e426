"""The table KERNELS: each kernel as a problem with inputs in poisoned memory and its float64 truth.

A problem runs in the executor's module (csrc/simt). On a GPU the operators that launch the kernels
run the table of test_operators.py (python_tests/cuda).
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

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


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem.

    m tokens, k and n columns of the large matrices (n 0: half of k), ranks r and r2 (0: the same).
    The device has `sms` multiprocessors. bare: without the optional operands: a bias, sums that are
    added to, dB, dx, the tokens of rows.
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
# splits and more.
QUICK = [
    Shape(0, 64, 16),
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
    numbers: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Callable[[], Output]] = field(default_factory=dict)
    check: Callable[[Views], None] = lambda views: None

    def run(self, lib: ModuleType, **options: object) -> Views:
        """Returns the outputs by name, in new poisoned memory, and checks what is around them.

        Args:
            lib: The executor's module.
            options: For the executor.
        """
        outputs = {name: make() for name, make in self.outputs.items()}
        views = {name: output.view for name, output in outputs.items()}
        lib.set_device(**self.device)
        lib.set_options(sm90=self.kernel == "gemm_lotr", **options)
        lib.run(self.kernel, self.inputs | views, self.numbers)
        for output in outputs.values():
            output.check_outside()
        return views

    def checked(self, lib: ModuleType, **options: object) -> dict[str, bytes]:
        """Runs once, checks the values, and returns the bits of the outputs."""
        views = self.run(lib, **options)
        self.check(views)
        return {name: np.ascontiguousarray(view).tobytes() for name, view in views.items()}


class Maker:
    """Random operands of a shape and element type, and the comparison of results."""

    def __init__(self, shape: Shape, kind: str, name: str):
        self.shape = shape
        self.kind = kind
        self.name = f"{name} {kind} {shape}"
        self.dtype = DTYPE[kind]
        self.rng = np.random.default_rng(zlib.crc32(self.name.encode()))

    def values(self, *size: int) -> np.ndarray:
        return self.rng.standard_normal(size)

    def floats(self, *size: int) -> np.ndarray:
        return self.values(*size).astype(FLOAT)

    def large(self, rows: int, cols: int) -> np.ndarray:
        return place(narrow(self.values(rows, cols), self.kind), self.dtype, self.shape.layout)

    def factor(self, rows: int, cols: int) -> np.ndarray:
        if self.shape.float_factors:
            return place(self.floats(rows, cols), FLOAT, self.shape.layout)
        return self.large(rows, cols)

    def op(self, a: np.ndarray) -> np.ndarray:
        """Returns the values of an operand that the kernel's product uses."""
        return operand(a, self.kind)

    def problem(self, kernel: str, inputs: Views, **numbers: float) -> Problem:
        return Problem(self.name, kernel, {"multiprocessors": self.shape.sms}, inputs, numbers)

    def with_dropout(self, problem: Problem) -> np.ndarray | float:
        """Adds the shape's dropout to a problem. Returns the mask, scaled by 1 / (1 - p)."""
        shape = self.shape
        if not shape.p:
            return 1.0
        problem.inputs["seed"] = np.array([SEED], np.int64)
        problem.numbers["p"] = shape.p
        return philox_keep(SEED, shape.m, shape.k, shape.p) / (1 - shape.p)

    def out(
        self,
        *size: int,
        start: np.ndarray | None = None,
        dtype: type | None = None,
        packed: bool = False,
    ):
        """Returns a function that creates an output, by default of the kernel's type and of NaN."""
        layout = PACKED if packed else self.shape.layout
        return lambda: Output(size, dtype or self.dtype, layout, start)

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


def shrink(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "shrink")
    x = t.large(shape.m, shape.k)
    A = t.factor(shape.k, shape.r)
    problem = t.problem("shrink", {"x": x, "A": A})
    mask = t.with_dropout(problem)
    problem.outputs = {"u": t.out(shape.m, shape.r)}
    problem.check = lambda out: t.close(out["u"], t.op(x) * mask, t.op(A), "u")
    return problem


def shrink_core(shape: Shape, kind: str) -> Problem:
    """shrink of few tokens: u and h = 3 u core from one launch."""
    t = Maker(shape, kind, "shrink_core")
    x = t.large(shape.m, shape.k)
    A = t.factor(shape.k, shape.r)
    core = t.factor(shape.r, shape.other)
    problem = t.problem("shrink", {"x": x, "A": A, "core": core}, scale=0.5, core_scale=3.0)
    problem.outputs = {"u": t.out(shape.m, shape.r), "h": t.out(shape.m, shape.other)}

    def check(out: Views) -> None:
        t.close(out["u"], t.op(x), t.op(A), "u", scale=0.5)
        t.close(out["h"], t.op(out["u"]), t.op(core), "h", scale=3.0)  # of the u that is stored

    problem.check = check
    return problem


def expand_add(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "expand_add")
    u = t.large(shape.m, shape.r)
    F = t.factor(shape.k, shape.r)
    y0 = narrow(t.values(shape.m, shape.k), kind)
    problem = t.problem("expand_add", {"u": u, "F": F})
    mask = t.with_dropout(problem)
    problem.outputs = {"y": t.out(shape.m, shape.k, start=y0)}
    problem.check = lambda out: t.close(out["y"], t.op(u), t.op(F).T, "y", wide(y0), mask)
    return problem


def expand_fresh(shape: Shape, kind: str) -> Problem:
    """y = bias + u F^T, whatever y holds (here NaN)."""
    t = Maker(shape, kind, "expand_fresh")
    u = t.large(shape.m, shape.r)
    F = t.factor(shape.k, shape.r)
    problem = t.problem("expand_add", {"u": u, "F": F}, fresh=1)
    mask = t.with_dropout(problem)
    bias = np.zeros(shape.k)
    if not shape.bare:
        problem.inputs["bias"] = t.large(1, shape.k)[0]
        bias = wide(problem.inputs["bias"])
    problem.outputs = {"y": t.out(shape.m, shape.k)}
    problem.check = lambda out: t.close(
        out["y"], t.op(u), t.op(F).T, "y", bias[None].repeat(shape.m, 0), mask
    )
    return problem


# The layout of `start` for each layout of y: both by chunks with other strides, one of them, none.
START_LAYOUT = {
    PACKED: Layout(pad=16, multiple=16),
    ALIGNED: ODD,
    ODD: COLUMNS,
    COLUMNS: PACKED,
}


def expand_from(shape: Shape, kind: str) -> Problem:
    """y = start + u F^T from another matrix, which stays as it is."""
    t = Maker(shape, kind, "expand_from")
    u = t.large(shape.m, shape.r)
    F = t.factor(shape.k, shape.r)
    values = narrow(t.values(shape.m, shape.k), kind)
    start = place(values, t.dtype, START_LAYOUT[shape.layout])
    problem = t.problem("expand_add", {"u": u, "F": F, "start": start})
    mask = t.with_dropout(problem)
    problem.outputs = {"y": t.out(shape.m, shape.k)}

    def check(out: Views) -> None:
        t.close(out["y"], t.op(u), t.op(F).T, "y", wide(values), mask)
        np.testing.assert_array_equal(start, values)

    problem.check = check
    return problem


def factor_grad(shape: Shape, kind: str) -> Problem:
    """D += x^T v; bare: D = x^T v, whatever D holds."""
    t = Maker(shape, kind, "factor_grad")
    x = t.large(shape.m, shape.k)
    v = t.large(shape.m, shape.r)
    D0 = t.floats(shape.k, shape.r)
    problem = t.problem("factor_grad", {"x": x, "v": v}, accumulate=not shape.bare)
    left = (t.op(x) * t.with_dropout(problem)).T
    problem.outputs = {"D": t.out(shape.k, shape.r, start=None if shape.bare else D0, dtype=FLOAT)}
    problem.check = lambda out: t.close(
        out["D"], left, t.op(v), "D", 0.0 if shape.bare else D0, kind="fp32"
    )
    return problem


def shrink_grad(shape: Shape, kind: str) -> Problem:
    """k = g F and Q += g^T u; bare: Q = g^T u, whatever Q holds."""
    t = Maker(shape, kind, "shrink_grad")
    g = t.large(shape.m, shape.k)
    F = t.factor(shape.k, shape.r)
    u = t.large(shape.m, shape.r)
    Q0 = t.floats(shape.k, shape.r)
    problem = t.problem("shrink_grad", {"g": g, "F": F, "u": u}, accumulate=not shape.bare)
    Q = t.out(shape.k, shape.r, start=None if shape.bare else Q0, dtype=FLOAT, packed=shape.bare)
    problem.outputs = {"k": t.out(shape.m, shape.r), "Q": Q}

    def check(out: Views) -> None:
        t.close(out["k"], t.op(g), t.op(F), "k")
        t.close(out["Q"], t.op(g).T, t.op(u), "Q", 0.0 if shape.bare else Q0, kind="fp32")

    problem.check = check
    return problem


def gemm_lotr(shape: Shape, kind: str, backward: bool = False) -> Problem:
    """y = x W^T + bias + u F^T. Backward, with the same names: y = x W + u F^T, W [k, n]."""
    m = shape.m
    k = shape.k
    n = shape.columns
    r = shape.r
    t = Maker(shape, kind, "gemm_lotr_backward" if backward else "gemm_lotr")
    x = t.large(m, k)
    W = t.large(*((k, n) if backward else (n, k)))
    u = t.large(m, r)
    F = t.large(n, r)
    problem = t.problem("gemm_lotr", {"x": x, "W": W, "u": u, "F": F}, backward=backward)
    bias = np.zeros((1, n))
    if not shape.bare:
        problem.inputs["bias"] = t.large(1, n)
        bias = wide(problem.inputs["bias"])
    problem.outputs = {"y": t.out(m, n)}

    def check(out: Views) -> None:
        left = np.hstack([wide(x), wide(u)])
        right = np.vstack([wide(W) if backward else wide(W).T, wide(F).T])
        t.close(out["y"], left, right, "y", bias.repeat(m, 0))

    problem.check = check
    return problem


def gemm_lotr_backward(shape: Shape, kind: str) -> Problem:
    return gemm_lotr(shape, kind, True)


def pack(shape: Shape, kind: str) -> Problem:
    """A copy in the kernel's type, with rows at multiples of 16 bytes. Padding is not written."""
    t = Maker(shape, kind, "pack")
    matrix = t.factor(shape.m, shape.k)
    problem = t.problem("pack", {"from": matrix})
    problem.outputs = {"to": lambda: Output((shape.m, shape.k), t.dtype, ROWS_OF_16_BYTES)}
    problem.check = lambda out: np.testing.assert_array_equal(wide(out["to"]), t.op(matrix))
    return problem


# ---- the core ----


def fold(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "fold")
    B = t.factor(shape.k, shape.other)
    core = t.factor(shape.r, shape.other)
    problem = t.problem("fold", {"B": B, "core": core}, scale=0.25)
    problem.outputs = {"F": t.out(shape.k, shape.r)}
    problem.check = lambda out: t.close(out["F"], wide(B), wide(core).T, "F", scale=0.25)
    return problem


def fold_grad(shape: Shape, kind: str) -> Problem:
    """dcore = s Q^T B, dB += s Q core. Only dcore if bare, only dB if the shape has dropout."""
    t = Maker(shape, kind, "fold_grad")
    B = t.factor(shape.k, shape.other)
    core = t.factor(shape.r, shape.other)
    Q = t.floats(shape.k, shape.r)
    dB0 = t.floats(shape.k, shape.other)
    problem = t.problem("fold_grad", {"Q": Q, "B": B, "core": core}, scale=0.25)
    if shape.bare or not shape.p:
        problem.outputs["dcore"] = t.out(shape.r, shape.other, dtype=FLOAT, packed=True)
    if not shape.bare:
        problem.outputs["dB"] = t.out(shape.k, shape.other, start=dB0, dtype=FLOAT)

    def check(out: Views) -> None:
        if "dcore" in out:
            t.close(out["dcore"], wide(Q).T, wide(B), "dcore", scale=0.25, kind="fp32")
        if "dB" in out:
            t.close(out["dB"], wide(Q), wide(core), "dB", dB0, scale=0.25, kind="fp32")

    problem.check = check
    return problem


# ---- the few-token form: products of products, of which the inner one may be stored rounded ----

ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}


class Rounded:
    """A matrix and the mean square of its rounding error in units of the type.

    h and k may be stored rounded or not.
    """

    def __init__(self, value: np.ndarray, square: np.ndarray):
        self.value = value
        self.square = square

    @classmethod
    def product(cls, scale: float, left: np.ndarray, right: np.ndarray) -> "Rounded":
        """Returns scale left right. Its error is the error of the terms, which may cancel."""
        value = scale * (left @ right)
        return cls(value, np.maximum(value**2, scale**2 * (left**2 @ right**2)))


def check_unfolded(
    t: Maker,
    result: np.ndarray,
    left: Rounded,
    right: np.ndarray,
    add: np.ndarray,
    kind: str,
    what: str,
) -> None:
    """Asserts result = add + left right, off by at most four rounding errors of `left`."""
    unit = ROUNDING[t.kind]
    truth = wide(add) + left.value @ right
    size = np.abs(wide(add)) + np.abs(left.value) @ np.abs(right)
    error = np.abs(wide(result) - truth)
    rounding = np.abs(truth) * (unit if kind == t.kind else 2.0**-22)
    allowed = 4 * unit * np.sqrt(left.square @ right**2) + rounding + 1e-6 * size + 1e-30
    assert np.isfinite(error).all() and (error <= allowed).all(), (
        f"{t.name}: {what} is off by {error.max():.3g}"
    )


def small_forward(shape: Shape, kind: str) -> Problem:
    """u = x A, y += s (u core) B^T."""
    t = Maker(shape, kind, "small_forward")
    m = shape.m
    k = shape.k
    n = shape.columns
    s = 0.125
    x = t.large(m, k)
    A = t.factor(k, shape.r)
    core = t.factor(shape.r, shape.other)
    B = t.factor(n, shape.other)
    y0 = narrow(t.values(m, n), kind)
    problem = t.problem("small_forward", {"x": x, "A": A, "core": core, "B": B}, scale=s)
    problem.outputs = {"y": t.out(m, n, start=y0), "u": t.out(m, shape.r)}

    def check(out: Views) -> None:
        t.close(out["u"], t.op(x), t.op(A), "u")
        check_unfolded(
            t, out["y"], Rounded.product(s, t.op(out["u"]), t.op(core)), t.op(B).T, y0, kind, "y"
        )

    problem.check = check
    return problem


def small_backward(shape: Shape, kind: str) -> Problem:
    """h = g B, k = s h core^T, dx += k A^T, dA += x^T k, dB += s g^T (u core), dcore = s u^T h.

    bare: without dx and dA.
    """
    t = Maker(shape, kind, "small_backward")
    m = shape.m
    k = shape.k
    n = shape.columns
    r = shape.r
    q = shape.other
    s = 0.125
    x = t.large(m, k)
    g = t.large(m, n)
    u = t.large(m, r)
    A = t.factor(k, r)
    core = t.factor(r, q)
    B = t.factor(n, q)
    dx0 = narrow(t.values(m, k), kind)
    dA0 = t.floats(k, r)
    dB0 = t.floats(n, q)
    problem = t.problem("small_backward", {"g": g, "u": u, "A": A, "core": core, "B": B}, scale=s)
    problem.outputs = {
        "dB": t.out(n, q, start=dB0, dtype=FLOAT),
        "dcore": t.out(r, q, dtype=FLOAT, packed=True),
    }
    if not shape.bare:
        problem.inputs["x"] = x
        problem.outputs |= {"dx": t.out(m, k, start=dx0), "dA": t.out(k, r, start=dA0, dtype=FLOAT)}

    def check(out: Views) -> None:
        wide_g = t.op(g)
        c = t.op(core)
        h_u = Rounded.product(s, t.op(u), c)
        h = Rounded.product(s, wide_g, t.op(B))
        k_ = Rounded(h.value @ c.T, h.square @ (c**2).T)
        turned = lambda matrix: Rounded(matrix.value.T, matrix.square.T)  # noqa: E731
        check_unfolded(t, out["dB"].T, turned(h_u), wide_g, dB0.T, "fp32", "dB")
        check_unfolded(
            t, out["dcore"].T, turned(h), t.op(u), np.zeros((q, r), FLOAT), "fp32", "dcore"
        )
        if "dx" in out:
            check_unfolded(t, out["dx"], k_, t.op(A).T, dx0, kind, "dx")
            check_unfolded(t, out["dA"].T, turned(k_), t.op(x), dA0.T, "fp32", "dA")

    problem.check = check
    return problem


# ---- per-row cores ----


class Rows:
    """Rows of tokens with cores, by an index in any order, some without a core.

    bare: by the ends of each core's rows, one row per token.
    """

    def __init__(self, shape: Shape, kind: str, name: str):
        self.t = t = Maker(shape, kind, name)
        m = shape.m
        self.count = 1 + shape.k % 9
        self.cores = np.stack([t.factor(shape.r, shape.other) for _ in range(self.count)])
        self.g = t.large(m, shape.other)
        self.u = t.large(m if shape.bare else m // 3 + 1, shape.r)
        self.index = t.rng.integers(-1, self.count, m)
        self.tokens = t.rng.integers(0, len(self.u), m)
        self.index[self.index == self.count // 2] = -1  # and some cores without a row
        self.inputs: Views = {"index": self.index, "tokens": self.tokens}
        if shape.bare:
            self.tokens = np.arange(m)
            index = np.sort(self.index)
            without_core = np.count_nonzero(index < 0)
            self.index = np.roll(index, -without_core)  # they come last
            ends = [
                np.count_nonzero((self.index >= 0) & (self.index <= core))
                for core in range(self.count)
            ]
            self.inputs = {"offs": np.array(ends, np.int32)}
        self.inputs |= {"u": self.u, "cores": self.cores}

    def each(self) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Returns (index of a core, its rows, their u, the core, their g) in float64."""
        op = self.t.op
        parts = []
        for core in range(self.count):
            rows = self.index == core
            u = op(self.u)[self.tokens[rows]]
            parts.append((core, rows, u, op(self.cores[core]), op(self.g)[rows]))
        return parts


def row_core(shape: Shape, kind: str) -> Problem:
    rows = Rows(shape, kind, "row_core")
    t = rows.t
    s = 0.5
    problem = t.problem("row_core", rows.inputs, scale=s)
    problem.outputs = {"h": t.out(shape.m, shape.other)}

    def check(out: Views) -> None:
        for core, of_core, u, G, _ in rows.each():
            t.close(out["h"][of_core], u, G, f"h of core {core}", scale=s)
        assert not wide(out["h"][rows.index < 0]).any(), "rows without a core are zero"

    problem.check = check
    return problem


def row_core_backward(shape: Shape, kind: str) -> Problem:
    rows = Rows(shape, kind, "row_core_backward")
    t = rows.t
    s = 0.5
    problem = t.problem("row_core_backward", rows.inputs | {"g": rows.g}, scale=s)
    dcores = t.out(rows.count, shape.r, shape.other, dtype=FLOAT)
    problem.outputs = {"du": t.out(*rows.u.shape), "dcores": dcores}

    def check(out: Views) -> None:
        du = np.zeros(rows.u.shape)
        size = np.zeros(rows.u.shape)
        for core, of_core, u, G, g in rows.each():
            t.close(out["dcores"][core], u.T, g, f"dcores[{core}]", scale=s, kind="fp32")
            np.add.at(du, rows.tokens[of_core], s * g @ G.T)
            np.add.at(size, rows.tokens[of_core], s * np.abs(g) @ np.abs(G).T)
        check_close(out["du"], du, narrow(du, kind), size, kind, f"{t.name}: du")

    problem.check = check
    return problem


FUSED = (gemm_lotr, gemm_lotr_backward)
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
KERNELS: dict[str, Callable[[Shape, str], Problem]] = {
    f.__name__: f for f in (*_LARGE, *_SMALL, *FUSED)
}
CASES = [
    (name, kind)
    for name, f in KERNELS.items()
    for kind in DTYPE
    if f not in FUSED or kind != "fp32"
]


def shapes_of(kernel: str, quick: bool = False) -> list[Shape]:
    """All shapes that a kernel takes, or the few of `make test`."""
    if KERNELS[kernel] in FUSED:
        return FUSED_QUICK if quick else FUSED_SHAPES
    return QUICK if quick else SHAPES
