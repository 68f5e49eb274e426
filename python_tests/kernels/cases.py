"""The table KERNELS: each kernel as a problem with inputs in poisoned memory and its float64 truth.

A problem runs in the executor's module (csrc/simt). On a GPU the operators that launch the kernels
run the table of test_operators.py (python_tests/cuda).
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    UNIT,
    Array,
    Layout,
    check_close,
    narrow,
    philox_keep,
    wide,
)

SEED = -0x123456789ABCDEF  # negative: all 64 bits matter
FLOAT = np.float32


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem.

    m tokens, k and n columns of the large matrices (n 0: half of k), ranks r and r2 (0: the same).
    p: the probability of dropout; fold_grad, which has none, omits dcore if it is not 0. The device
    has `sms` multiprocessors. bare: without the optional operands: a bias, sums that are added to,
    dB, dx, the tokens of rows. cores: of per-row cores (0: 1 to 9, by k).
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
# At least two blocks in each dimension of every grid, and walks of more tiles than the ring has
# stages, so that every stage is filled a second time; with and without dropout, aligned and not. On
# few multiprocessors a block has several tiles.
PIPELINE = [
    Shape(700, 560, 16, sms=2),
    Shape(700, 560, 16, sms=5),
    Shape(330, 700, 40, p=0.25, sms=6, r2=20, bare=True),
    Shape(330, 600, 40, sms=6),  # parts of Q of several column tiles
    Shape(520, 264, 16, ODD, 0.1, 4),
    Shape(1700, 40, 16, ODD, 0.1, 4, bare=True),
    Shape(130, 1700, 16, sms=6),
    Shape(200, 400, 100, PACKED, sms=5),
    Shape(130, 3000, 13, ODD, 0.1, 12),  # parts of u, of factor_grad's D: at a rank that parts pad
    Shape(150, 300, 200, PACKED, 0.5, 6),
    Shape(2000, 70, 13, sms=12),
]
FUSED_PIPELINE = [
    # More k-steps than stages, three tiles for a pair of blocks.
    Shape(130, 328, 16, n=600, sms=2),
    # So few k-steps that the stages of the next tile are loaded meanwhile.
    Shape(260, 40, 100, n=264, sms=2, bare=True),
]


class Problem:
    """One call of a kernel, which a function of KERNELS declares operand by operand.

    It has the inputs, the outputs, and the checks of their values.
    """

    def __init__(self, kernel: str, shape: Shape, kind: str):
        self.name = f"{kernel} {kind} {shape}"
        self.kernel = kernel  # of the executor's module; some rows of KERNELS run another row's
        self.shape = shape
        self.dtype = DTYPE[kind]
        self.device = {"multiprocessors": shape.sms}  # for which plans are made
        self.rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        self.inputs: dict[str, np.ndarray] = {}
        self.numbers: dict[str, float] = {}
        self.outputs: dict[str, Array] = {}
        self.checks: list[Callable[[], None]] = []
        KERNELS[kernel](self, shape)

    # ---- values ----

    def floats(self, *size: int) -> np.ndarray:
        return self.rng.standard_normal(size, FLOAT)

    def stored(self, *size: int) -> np.ndarray:
        """Returns values of the kernel's type."""
        return narrow(self.floats(*size), self.dtype)

    def op(self, a: np.ndarray) -> np.ndarray:
        """Returns the values that a product uses: float32 factors of half types are rounded."""
        return wide(narrow(a, self.dtype) if a.dtype == FLOAT else a)

    # ---- inputs ----

    def place(self, name: str, values: np.ndarray, layout: Layout | None = None) -> np.ndarray:
        """Declares an input with these values, in poisoned memory."""
        array = Array(values.shape, values.dtype.type, layout or self.shape.layout, values)
        self.inputs[name] = array.view
        return array.view

    def large(self, name: str, *size: int) -> np.ndarray:
        return self.place(name, self.stored(*size))

    def factor(self, name: str, *size: int) -> np.ndarray:
        is_float = self.shape.float_factors
        return self.place(name, self.floats(*size) if is_float else self.stored(*size))

    def dropout(self) -> np.ndarray | float:
        """Declares the shape's dropout.

        Returns:
            1 / (1 - p) for the elements [m, k] that it keeps, else 0.
        """
        shape = self.shape
        if not shape.p:
            return 1.0
        self.inputs["seed"] = np.array([SEED], np.int64)
        self.numbers["p"] = shape.p
        return philox_keep(SEED, shape.m, shape.k, shape.p) / (1 - shape.p)

    # ---- outputs ----

    def out(
        self,
        name: str,
        size: tuple[int, ...],
        start: np.ndarray | None = None,
        dtype: type | None = None,
        layout: Layout | None = None,
    ) -> np.ndarray:
        """Declares an output, by default of the kernel's type. It holds `start`, or NaN."""
        array = Array(size, dtype or self.dtype, layout or self.shape.layout, start)
        self.outputs[name] = array
        return array.view

    def product(
        self,
        name: str,
        left: np.ndarray,
        right: np.ndarray,
        *,
        add: np.ndarray | float = 0.0,
        mask: np.ndarray | float = 1.0,
        scale: float = 1.0,
        size: tuple[int, ...] | None = None,
        **output: object,
    ) -> np.ndarray:
        """Declares an output that must hold start + add + mask scale (left right).

        Args:
            name: Of the output.
            left: Stored values, or float64. It may be an output, which is read after the launch.
            right: The same.
            add: What the kernel adds the product to.
            mask: Of the product.
            scale: Of the product.
            size: Of the output, by default [rows of left, columns of right].
            output: For `out`.
        """
        view = self.out(name, size or (left.shape[0], right.shape[1]), **output)
        self.checks.append(partial(self.close, name, left, right, add, mask * scale))
        return view

    def sum(self, name: str, left: np.ndarray, right: np.ndarray) -> None:
        """Declares a float32 sum, which is added to.

        bare: It is not, and is packed, as it must be without tokens.
        """
        self.numbers["accumulate"] = not self.shape.bare
        if self.shape.bare:
            self.product(name, left, right, dtype=FLOAT, layout=PACKED)
        else:
            start = self.floats(left.shape[0], right.shape[1])
            self.product(name, left, right, dtype=FLOAT, start=start)

    def close(
        self,
        name: str,
        left: np.ndarray,
        right: np.ndarray,
        add: np.ndarray | float,
        mask: np.ndarray | float,
    ) -> None:
        """Asserts that an output is start + add + mask (left right), by float64 and float32."""
        output = self.outputs[name]
        start = add if output.values is None else add + wide(output.values)
        a = self.op(left)
        b = self.op(right)
        truth = start + mask * (a @ b)
        eager = start + mask * (a.astype("f4") @ b.astype("f4"))
        size = np.abs(start) + np.abs(mask) * (np.abs(a) @ np.abs(b))
        slack = 8 * 2.0**-24 * size  # of another order of summation in float32
        result = output.view.reshape(truth.shape)
        check_close(result, truth, eager, slack, f"{self.name}: {name}")

    # ---- the call ----

    def checked(self, lib: ModuleType, **options: object) -> dict[str, bytes]:
        """Runs once, and checks the outputs and that nothing else was written.

        Args:
            lib: The executor's module.
            options: For the executor.

        Returns:
            The bits of the outputs.
        """
        for output in self.outputs.values():
            output.reset()
        views = {name: output.view for name, output in self.outputs.items()}
        before = {name: array.copy() for name, array in self.inputs.items()}
        lib.set_device(**self.device)
        lib.set_options(sm90=self.kernel == "gemm_lotr", **options)
        lib.run(self.kernel, self.inputs | views, self.numbers)
        for output in self.outputs.values():
            output.check_outside()
        for name, array in before.items():
            np.testing.assert_array_equal(self.inputs[name], array, f"{self.name}: input {name}")
        for check in self.checks:
            check()
        return {name: np.ascontiguousarray(view).tobytes() for name, view in views.items()}


def shrink(p: Problem, shape: Shape) -> None:
    x = p.large("x", shape.m, shape.k)
    A = p.factor("A", shape.k, shape.r)
    p.product("u", p.op(x) * p.dropout(), A)


def shrink_core(p: Problem, shape: Shape) -> None:
    """shrink of few tokens: u and h = 3 u core, of the u that is stored, from one launch."""
    p.kernel = "shrink"
    p.numbers = {"scale": 0.5, "core_scale": 3.0}
    x = p.large("x", shape.m, shape.k)
    A = p.factor("A", shape.k, shape.r)
    core = p.factor("core", shape.r, shape.other)
    u = p.product("u", x, A, scale=0.5)
    p.product("h", u, core, scale=3.0)


def expand(
    p: Problem,
    shape: Shape,
    add: np.ndarray | float = 0.0,
    start: np.ndarray | None = None,
) -> None:
    """y = drop(u F^T) + `start`, which y holds, or `add`: another matrix, a bias or nothing."""
    p.kernel = "expand_add"
    p.numbers["fresh"] = start is None
    u = p.large("u", shape.m, shape.r)
    F = p.factor("F", shape.k, shape.r)
    p.product("y", u, F.T, add=add, mask=p.dropout(), start=start)


def expand_add(p: Problem, shape: Shape) -> None:
    """y += u F^T."""
    expand(p, shape, start=p.stored(shape.m, shape.k))


def expand_fresh(p: Problem, shape: Shape) -> None:
    """y = bias + u F^T, or without the bias."""
    expand(p, shape, 0.0 if shape.bare else wide(p.large("bias", shape.k)))


# The layout of `start` for each layout of y: both by chunks with other strides, one of them, none.
START_LAYOUT = {
    PACKED: Layout(pad=16, multiple=16),
    ALIGNED: ODD,
    ODD: COLUMNS,
    COLUMNS: PACKED,
}


def expand_from(p: Problem, shape: Shape) -> None:
    """y = start + u F^T from another matrix."""
    expand(p, shape, wide(p.place("start", p.stored(shape.m, shape.k), START_LAYOUT[shape.layout])))


def factor_grad(p: Problem, shape: Shape) -> None:
    """D += x^T v; bare: D = x^T v."""
    x = p.large("x", shape.m, shape.k)
    v = p.large("v", shape.m, shape.r)
    p.sum("D", (p.op(x) * p.dropout()).T, v)


def shrink_grad(p: Problem, shape: Shape) -> None:
    """du = g F and Q += g^T u; bare: Q = g^T u."""
    g = p.large("g", shape.m, shape.k)
    F = p.factor("F", shape.k, shape.r)
    u = p.large("u", shape.m, shape.r)
    p.product("du", g, F)
    p.sum("Q", g.T, u)


def gemm_lotr(p: Problem, shape: Shape, backward: bool = False) -> None:
    """y = x W^T + bias + u F^T. Backward, with the same names: y = x W + u F^T, W [k, n]."""
    p.kernel = "gemm_lotr"
    p.numbers["backward"] = backward
    x = p.large("x", shape.m, shape.k)
    W = p.large("W", shape.k, shape.columns) if backward else p.large("W", shape.columns, shape.k).T
    u = p.large("u", shape.m, shape.r)
    F = p.large("F", shape.columns, shape.r)
    bias = 0.0 if shape.bare else wide(p.large("bias", 1, shape.columns))
    p.product("y", np.hstack([x, u]), np.vstack([W, F.T]), add=bias)


def pack(p: Problem, shape: Shape) -> None:
    """A copy in the kernel's type, with rows at multiples of 16 bytes. Padding is not written."""
    matrix = p.factor("from", shape.m, shape.k)
    copy = p.out("to", matrix.shape, layout=ROWS_OF_16_BYTES)
    p.checks.append(lambda: np.testing.assert_array_equal(wide(copy), p.op(matrix)))


# ---- the core ----


def fold(p: Problem, shape: Shape) -> None:
    p.numbers["scale"] = 0.25
    B = p.factor("B", shape.k, shape.other)
    core = p.factor("core", shape.r, shape.other)
    p.product("F", wide(B), wide(core).T, scale=0.25)


def fold_grad(p: Problem, shape: Shape) -> None:
    """dcore = s Q^T B, dB += s Q core. bare: only dcore; else, if p is not 0, only dB."""
    p.numbers["scale"] = 0.25
    B = p.factor("B", shape.k, shape.other)
    core = p.factor("core", shape.r, shape.other)
    Q = p.place("Q", p.floats(shape.k, shape.r))
    if shape.bare or not shape.p:
        p.product("dcore", wide(Q).T, wide(B), scale=0.25, dtype=FLOAT, layout=PACKED)
    if not shape.bare:
        start = p.floats(shape.k, shape.other)
        p.product("dB", wide(Q), wide(core), scale=0.25, dtype=FLOAT, start=start)


# ---- the few-token form: products of products, of which the inner one may be stored rounded ----

SCALING = 0.125


class Rounded(NamedTuple):
    """A matrix that may be stored rounded, and the mean square error in units of the type."""

    value: np.ndarray
    square: np.ndarray

    @property
    def T(self) -> "Rounded":
        return Rounded(self.value.T, self.square.T)

    def inherited(self, right: "Rounded") -> np.ndarray:
        """Returns the mean square of the error that the operands give to self right."""
        return self.square @ right.value**2 + self.value**2 @ right.square

    def product(self, right: "Rounded", scale: float = 1.0) -> "Rounded":
        """Returns scale self right. When stored it has the error of its terms, which may cancel."""
        value = scale * (self.value @ right.value)
        terms = scale**2 * (self.value**2 @ right.value**2)
        return Rounded(value, np.maximum(value**2, terms) + scale**2 * self.inherited(right))


def exact(p: Problem, stored: np.ndarray) -> Rounded:
    return Rounded(p.op(stored), np.zeros(stored.shape))


def product_of_products(
    p: Problem,
    name: str,
    left: Rounded,
    right: Rounded,
    start: np.ndarray | None = None,
    **output: object,
) -> None:
    """Declares an output start + left right, off by at most four of the operands' errors.

    For the few-token form, which multiplies with the core what is a product already.
    """
    unit = max(UNIT[p.dtype], 2.0**-20)  # in float32 the order of a sum matters more
    view = p.out(name, (left.value.shape[0], right.value.shape[1]), start, **output)
    add = 0.0 if start is None else wide(start)
    truth = add + left.value @ right.value
    size = np.abs(add) + np.abs(left.value) @ np.abs(right.value)
    slack = 4 * unit * np.sqrt(left.inherited(right)) + 1e-6 * size
    p.checks.append(partial(check_close, view, truth, truth, slack, f"{p.name}: {name}"))


def few_tokens_forward(p: Problem, shape: Shape) -> None:
    """u = x A, y += s (u core) B^T."""
    p.numbers["scale"] = SCALING
    x = exact(p, p.large("x", shape.m, shape.k))
    A = exact(p, p.factor("A", shape.k, shape.r))
    core = exact(p, p.factor("core", shape.r, shape.other))
    B = exact(p, p.factor("B", shape.columns, shape.other))
    p.product("u", x.value, A.value)
    product_of_products(
        p, "y", x.product(A).product(core, SCALING), B.T, p.stored(shape.m, shape.columns)
    )


def few_tokens_backward(p: Problem, shape: Shape) -> None:
    """h = s g B, du = h core^T, dx += du A^T, dA += x^T du, dB += s g^T (u core), dcore = u^T h.

    bare: without dx and dA.
    """
    p.numbers["scale"] = SCALING
    g = exact(p, p.large("g", shape.m, shape.columns))
    u = exact(p, p.large("u", shape.m, shape.r))
    A = exact(p, p.factor("A", shape.k, shape.r))
    core = exact(p, p.factor("core", shape.r, shape.other))
    B = exact(p, p.factor("B", shape.columns, shape.other))
    h = g.product(B, SCALING)
    product_of_products(
        p, "dB", g.T, u.product(core, SCALING), p.floats(shape.columns, shape.other), dtype=FLOAT
    )
    product_of_products(p, "dcore", u.T, h, dtype=FLOAT, layout=PACKED)
    if not shape.bare:
        x = exact(p, p.large("x", shape.m, shape.k))
        du = h.product(core.T)
        product_of_products(p, "dx", du, A.T, p.stored(shape.m, shape.k))
        product_of_products(p, "dA", x.T, du, p.floats(shape.k, shape.r), dtype=FLOAT)


# ---- per-row cores ----


class Rows:
    """Rows of tokens with cores, by an index in any order, some without a core.

    bare: by the ends of each core's rows, one row per token.
    """

    def __init__(self, p: Problem, shape: Shape):
        self.count = shape.cores or 1 + shape.k % 9
        self.index = p.rng.integers(-1, self.count, shape.m)
        self.index[self.index == self.count // 2] = -1  # and some cores without a row
        if shape.bare:
            self.tokens = np.arange(shape.m)
            self.index = np.sort(self.index % (self.count + 1))  # rows without a core come last
            ends = np.searchsorted(self.index, range(self.count), "right")
            p.inputs["offs"] = ends.astype(np.int32)
        else:
            self.tokens = p.rng.integers(0, shape.m // 3 + 1, shape.m)
            p.inputs |= {"index": self.index, "tokens": self.tokens}
        self.u = p.op(p.large("u", shape.m if shape.bare else shape.m // 3 + 1, shape.r))
        self.cores = p.op(p.factor("cores", self.count, shape.r, shape.other))

    def by_core(self, rows: np.ndarray) -> np.ndarray:
        """Returns each row in the columns of its core: [rows, cores x columns], else zeros.

        With the cores one below the other, a product of it is the sum over each row's core.
        """
        has_core = self.index[:, None] == np.arange(self.count)
        spread = has_core[:, :, None] * rows[:, None, :]
        return spread.reshape(len(rows), self.count * rows.shape[1])


def row_core(p: Problem, shape: Shape) -> None:
    p.numbers["scale"] = SCALING
    rows = Rows(p, shape)
    u = rows.by_core(rows.u[rows.tokens])
    p.product("h", u, rows.cores.reshape(-1, shape.other), scale=SCALING)


def row_core_backward(p: Problem, shape: Shape) -> None:
    p.numbers["scale"] = SCALING
    rows = Rows(p, shape)
    g = p.op(p.large("g", shape.m, shape.other))
    has_token = np.arange(len(rows.u))[:, None] == rows.tokens  # [tokens, rows]
    transposed = rows.cores.transpose(0, 2, 1).reshape(-1, shape.r)
    p.product("du", has_token @ rows.by_core(g), transposed, scale=SCALING)
    u = rows.by_core(rows.u[rows.tokens])
    p.product("dcores", u.T, g, scale=SCALING, size=rows.cores.shape, dtype=FLOAT)


# ---- the table ----

KERNELS: dict[str, Callable[[Problem, Shape], None]] = {
    "shrink": shrink,
    "shrink_core": shrink_core,
    "expand_add": expand_add,
    "expand_fresh": expand_fresh,
    "expand_from": expand_from,
    "factor_grad": factor_grad,
    "shrink_grad": shrink_grad,
    "pack": pack,
    "fold": fold,
    "fold_grad": fold_grad,
    "few_tokens_forward": few_tokens_forward,
    "few_tokens_backward": few_tokens_backward,
    "row_core": row_core,
    "row_core_backward": row_core_backward,
    "gemm_lotr": gemm_lotr,
    "gemm_lotr_backward": partial(gemm_lotr, backward=True),
}
FUSED = ("gemm_lotr", "gemm_lotr_backward")
CASES = [(name, kind) for name in KERNELS for kind in DTYPE if name not in FUSED or kind != "fp32"]


SETS = {"quick": QUICK, "pipeline": PIPELINE, "some": PIPELINE[::2], "all": SHAPES + PIPELINE}
FUSED_SETS = {
    "quick": FUSED_QUICK,
    "pipeline": FUSED_PIPELINE,
    "some": FUSED_PIPELINE[::2],
    "all": FUSED_SHAPES + FUSED_PIPELINE,
}


def shapes_of(kernel: str, which: str) -> list[Shape]:
    """Returns shapes of a kernel: quick (of `make test`), pipeline, some (half of it) or all."""
    return (FUSED_SETS if kernel in FUSED else SETS)[which]
