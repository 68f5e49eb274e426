"""The table KERNELS: each kernel as a problem with inputs in poisoned memory and its float64 truth.

A function of the table declares the operands that one kernel gets by name. For u = x A:

    x = problem.large("x", shape.m, shape.k)
    A = problem.factor("A", shape.k, shape.r)
    problem.product("u", problem.operand(x), A)

`problem.run(lib)` then runs the kernel in the executor's module (csrc/simt), and compares u
with x A in float64.

Not here: the sizes (shapes.py), and the operators that launch the kernels on a GPU
(python_tests/cuda).
"""

import zlib
from collections.abc import Callable
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
from shapes import FUSED, Shape

SEED = -0x123456789ABCDEF  # negative: all 64 bits matter
FLOAT = np.float32
SCALING = 0.125


class Problem:
    """One call of a kernel: its inputs and outputs, and the checks of their values.

    Args:
        name: A key of KERNELS, whose function declares the operands.
        shape: The sizes.
        kind: The type of the elements, a key of DTYPE.
    """

    def __init__(self, name: str, shape: Shape, kind: str):
        self.name = f"{name} {kind} {shape}"
        self.kernel = name  # of the executor's module; some rows of KERNELS set another one
        self.shape = shape
        self.dtype = DTYPE[kind]
        self.device = {"multiprocessors": shape.sms}  # The plan of the launch depends on it.
        self.rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        self.inputs: dict[str, np.ndarray] = {}
        self.numbers: dict[str, float] = {}
        self.outputs: dict[str, Array] = {}
        self.checks: list[Callable[[], None]] = []
        KERNELS[name](self, shape)

    # ---- values ----

    def floats(self, *size: int) -> np.ndarray:
        return self.rng.standard_normal(size, FLOAT)

    def stored(self, *size: int) -> np.ndarray:
        """Returns values of the kernel's type."""
        return narrow(self.floats(*size), self.dtype)

    def operand(self, a: np.ndarray) -> np.ndarray:
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
        self.outputs[name] = Array(size, dtype or self.dtype, layout or self.shape.layout, start)
        return self.outputs[name].view

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
            name: The name of the output.
            left: Stored values, or float64. It may be an output, which is read after the launch.
            right: The same.
            add: What the kernel adds the product to.
            mask: What the product is multiplied by, element by element.
            scale: What the product is multiplied by.
            size: The output's shape, by default [rows of left, columns of right].
            output: Arguments of `out`.
        """
        view = self.out(name, size or (left.shape[0], right.shape[1]), **output)
        self.checks.append(partial(self.check_product, name, left, right, add, mask * scale))
        return view

    def float_sum(self, name: str, left: np.ndarray, right: np.ndarray) -> None:
        """Declares a float32 output that left right is added to.

        A minimal problem has a new output. It is packed, as it must be without tokens.
        """
        self.numbers["accumulate"] = not self.shape.minimal
        if self.shape.minimal:
            self.product(name, left, right, dtype=FLOAT, layout=PACKED)
        else:
            start = self.floats(left.shape[0], right.shape[1])
            self.product(name, left, right, dtype=FLOAT, start=start)

    def check_product(
        self,
        name: str,
        left: np.ndarray,
        right: np.ndarray,
        add: np.ndarray | float,
        mask: np.ndarray | float,
    ) -> None:
        """Asserts that an output is start + add + mask (left right).

        The truth is computed in float64. The same formula in float32 shows which error is usual.
        """
        output = self.outputs[name]
        start = add if output.values is None else add + wide(output.values)
        a = self.operand(left)
        b = self.operand(right)
        truth = start + mask * (a @ b)
        eager = start + mask * (a.astype("f4") @ b.astype("f4"))
        size = np.abs(start) + np.abs(mask) * (np.abs(a) @ np.abs(b))
        slack = 8 * 2.0**-24 * size  # of another order of summation in float32
        check_close(output.view.reshape(truth.shape), truth, eager, slack, f"{self.name}: {name}")

    # ---- the call ----

    def run(self, lib: ModuleType, **options: object) -> dict[str, bytes]:
        """Runs the kernel, and checks the outputs and that nothing else was written.

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
        # sm90: gemm_lotr needs the shared memory of an H100.
        lib.set_options(sm90=self.kernel == "gemm_lotr", **options)
        lib.run(self.kernel, self.inputs | views, self.numbers)
        for output in self.outputs.values():
            output.check_outside()
        for name, array in before.items():
            np.testing.assert_array_equal(self.inputs[name], array, f"{self.name}: input {name}")
        for check in self.checks:
            check()
        return {name: np.ascontiguousarray(view).tobytes() for name, view in views.items()}


# ---- tokens times A or F -------------------------------------------------------------------------


def shrink(problem: Problem, shape: Shape) -> None:
    x = problem.large("x", shape.m, shape.k)
    A = problem.factor("A", shape.k, shape.r)
    problem.product("u", problem.operand(x) * problem.dropout(), A)


def shrink_core(problem: Problem, shape: Shape) -> None:
    """shrink of few tokens: u and h = 3 u core, of the u that is stored, from one launch."""
    problem.kernel = "shrink"
    problem.numbers = {"scale": 0.5, "core_scale": 3.0}
    x = problem.large("x", shape.m, shape.k)
    A = problem.factor("A", shape.k, shape.r)
    core = problem.factor("core", shape.r, shape.r_out)
    problem.product("h", problem.product("u", x, A, scale=0.5), core, scale=3.0)


def expand(
    problem: Problem,
    shape: Shape,
    add: np.ndarray | float = 0.0,
    start: np.ndarray | None = None,
) -> None:
    """y = drop(u F^T) + `start`, which y holds, or `add`: another matrix, a bias or nothing."""
    problem.kernel = "expand_add"
    problem.numbers["from_bias"] = start is None
    u = problem.large("u", shape.m, shape.r)
    F = problem.factor("F", shape.k, shape.r)
    problem.product("y", u, F.T, add=add, mask=problem.dropout(), start=start)


def expand_add(problem: Problem, shape: Shape) -> None:
    """y += u F^T."""
    expand(problem, shape, start=problem.stored(shape.m, shape.k))


def expand_fresh(problem: Problem, shape: Shape) -> None:
    """y = bias + u F^T, or without the bias."""
    expand(problem, shape, 0.0 if shape.minimal else wide(problem.large("bias", shape.k)))


# The layout of the operand "start" for each layout of y, and which of the two is read in chunks of
# 16 bytes.
START_LAYOUT = {
    PACKED: Layout(pad=16, multiple=16),  # both, with other strides
    ALIGNED: ODD,  # only y
    ODD: COLUMNS,  # neither
    COLUMNS: PACKED,  # only start
}


def expand_from(problem: Problem, shape: Shape) -> None:
    """y = start + u F^T from another matrix."""
    values = problem.stored(shape.m, shape.k)
    expand(problem, shape, wide(problem.place("start", values, START_LAYOUT[shape.layout])))


def factor_grad(problem: Problem, shape: Shape) -> None:
    """D += x^T v."""
    x = problem.large("x", shape.m, shape.k)
    v = problem.large("v", shape.m, shape.r)
    problem.float_sum("D", (problem.operand(x) * problem.dropout()).T, v)


def shrink_grad(problem: Problem, shape: Shape) -> None:
    """du = g F and Q += g^T u."""
    g = problem.large("g", shape.m, shape.k)
    F = problem.factor("F", shape.k, shape.r)
    u = problem.large("u", shape.m, shape.r)
    problem.product("du", g, F)
    problem.float_sum("Q", g.T, u)


def gemm_lotr(problem: Problem, shape: Shape, backward: bool = False) -> None:
    """y = x W^T + bias + u F^T. Backward, with the same names: y = x W + u F^T, W [k, n]."""
    problem.kernel = "gemm_lotr"
    problem.numbers["backward"] = backward
    x = problem.large("x", shape.m, shape.k)
    sizes = (shape.out_features, shape.k)
    W = problem.large("W", *(reversed(sizes) if backward else sizes))
    u = problem.large("u", shape.m, shape.r)
    F = problem.large("F", shape.out_features, shape.r)
    bias = 0.0 if shape.minimal else wide(problem.large("bias", 1, shape.out_features))
    problem.product("y", np.hstack([x, u]), np.vstack([W if backward else W.T, F.T]), add=bias)


def pack(problem: Problem, shape: Shape) -> None:
    """A copy in the kernel's type, with rows at multiples of 16 bytes. Padding is not written."""
    matrix = problem.factor("from", shape.m, shape.k)
    copy = problem.out("to", matrix.shape, layout=ROWS_OF_16_BYTES)
    problem.checks.append(
        lambda: np.testing.assert_array_equal(wide(copy), problem.operand(matrix))
    )


# ---- the core ------------------------------------------------------------------------------------


def fold(problem: Problem, shape: Shape) -> None:
    problem.numbers["scale"] = 0.25
    B = problem.factor("B", shape.k, shape.r_out)
    core = problem.factor("core", shape.r, shape.r_out)
    problem.product("F", wide(B), wide(core).T, scale=0.25)


def fold_grad(problem: Problem, shape: Shape, outputs: tuple[str, ...] = ("dcore", "dB")) -> None:
    """dcore = s Q^T B, dB += s Q core."""
    problem.kernel = "fold_grad"
    problem.numbers["scale"] = 0.25
    B = problem.factor("B", shape.k, shape.r_out)
    core = problem.factor("core", shape.r, shape.r_out)
    Q = problem.place("Q", problem.floats(shape.k, shape.r))
    if "dcore" in outputs:
        problem.product("dcore", wide(Q).T, wide(B), scale=0.25, dtype=FLOAT, layout=PACKED)
    if "dB" in outputs:
        start = problem.floats(shape.k, shape.r_out)
        problem.product("dB", wide(Q), wide(core), scale=0.25, dtype=FLOAT, start=start)


# ---- the few-token form --------------------------------------------------------------------------

# Its operands may be products, which a kernel may store rounded. So the error of an output also
# depends on its operands' errors.


class Rounded(NamedTuple):
    """A matrix that may be stored rounded.

    `square_error` is its mean square error, over the square of its type's unit roundoff.
    """

    value: np.ndarray
    square_error: np.ndarray

    @property
    def T(self) -> "Rounded":
        return Rounded(self.value.T, self.square_error.T)

    def inherited(self, right: "Rounded") -> np.ndarray:
        """Returns the square error that self right has from its operands."""
        return self.square_error @ right.value**2 + self.value**2 @ right.square_error

    def product(self, right: "Rounded", scale: float = 1.0) -> "Rounded":
        """Returns scale self right. The roundings of its terms count even where they cancel."""
        value = scale * (self.value @ right.value)
        terms = scale**2 * (self.value**2 @ right.value**2)
        return Rounded(value, np.maximum(value**2, terms) + scale**2 * self.inherited(right))


def exact(problem: Problem, stored: np.ndarray) -> Rounded:
    return Rounded(problem.operand(stored), np.zeros(stored.shape))


def product_of_products(
    problem: Problem,
    name: str,
    left: Rounded,
    right: Rounded,
    start: np.ndarray | None = None,
    **output: object,
) -> None:
    """Declares an output start + left right, off by at most four of the operands' errors."""
    unit = max(UNIT[problem.dtype], 2.0**-20)  # in float32 the order of a sum matters more
    view = problem.out(name, (left.value.shape[0], right.value.shape[1]), start, **output)
    add = 0.0 if start is None else wide(start)
    truth = add + left.value @ right.value
    size = np.abs(add) + np.abs(left.value) @ np.abs(right.value)
    slack = 4 * unit * np.sqrt(left.inherited(right)) + 1e-6 * size
    problem.checks.append(
        partial(check_close, view, truth, truth, slack, f"{problem.name}: {name}")
    )


def few_tokens_forward(problem: Problem, shape: Shape) -> None:
    """u = x A, y += s (u core) B^T."""
    problem.numbers["scale"] = SCALING
    x = exact(problem, problem.large("x", shape.m, shape.k))
    A = exact(problem, problem.factor("A", shape.k, shape.r))
    core = exact(problem, problem.factor("core", shape.r, shape.r_out))
    B = exact(problem, problem.factor("B", shape.out_features, shape.r_out))
    problem.product("u", x.value, A.value)
    product_of_products(
        problem,
        "y",
        x.product(A).product(core, SCALING),
        B.T,
        problem.stored(shape.m, shape.out_features),
    )


def few_tokens_backward(problem: Problem, shape: Shape) -> None:
    """h = s g B, du = h core^T, dx += du A^T, dA += x^T du, dB += s g^T (u core), dcore = u^T h."""
    problem.numbers["scale"] = SCALING
    g = exact(problem, problem.large("g", shape.m, shape.out_features))
    u = exact(problem, problem.large("u", shape.m, shape.r))
    A = exact(problem, problem.factor("A", shape.k, shape.r))
    core = exact(problem, problem.factor("core", shape.r, shape.r_out))
    B = exact(problem, problem.factor("B", shape.out_features, shape.r_out))
    h = g.product(B, SCALING)
    product_of_products(
        problem,
        "dB",
        g.T,
        u.product(core, SCALING),
        problem.floats(shape.out_features, shape.r_out),
        dtype=FLOAT,
    )
    product_of_products(problem, "dcore", u.T, h, dtype=FLOAT, layout=PACKED)
    if not shape.minimal:
        x = exact(problem, problem.large("x", shape.m, shape.k))
        du = h.product(core.T)
        product_of_products(problem, "dx", du, A.T, problem.stored(shape.m, shape.k))
        product_of_products(problem, "dA", x.T, du, problem.floats(shape.k, shape.r), dtype=FLOAT)


# ---- per-row cores -------------------------------------------------------------------------------


class Rows:
    """Rows of tokens, each with one of several cores or with none.

    `index` has the core of each row, in any order, and `tokens` its token. The rows of a minimal
    problem are sorted by core, one row per token, and `offs` has the end of each core's rows.
    """

    def __init__(self, problem: Problem, shape: Shape):
        self.count = shape.cores or 1 + shape.k % 9
        self.index = problem.rng.integers(-1, self.count, shape.m)
        self.index[self.index == self.count // 2] = -1  # and some cores without a row
        if shape.minimal:
            self.tokens = np.arange(shape.m)
            self.index = np.sort(self.index % (self.count + 1))  # rows without a core come last
            ends = np.searchsorted(self.index, range(self.count), "right")
            problem.inputs["offs"] = ends.astype(np.int32)
        else:
            self.tokens = problem.rng.integers(0, shape.m // 3 + 1, shape.m)
            problem.inputs |= {"index": self.index, "tokens": self.tokens}
        self.u = problem.operand(
            problem.large("u", shape.m if shape.minimal else shape.m // 3 + 1, shape.r)
        )
        self.cores = problem.operand(problem.factor("cores", self.count, shape.r, shape.r_out))

    def by_core(self, rows: np.ndarray) -> np.ndarray:
        """Returns [rows, cores x columns]: each row in the columns of its core, zeros elsewhere.

        Its product with the cores, one below the other, is each row times its core.
        """
        has_core = self.index[:, None] == np.arange(self.count)
        spread = has_core[:, :, None] * rows[:, None, :]
        return spread.reshape(len(rows), self.count * rows.shape[1])


def row_core(problem: Problem, shape: Shape) -> None:
    problem.numbers["scale"] = SCALING
    rows = Rows(problem, shape)
    u = rows.by_core(rows.u[rows.tokens])
    problem.product("h", u, rows.cores.reshape(-1, shape.r_out), scale=SCALING)


def row_core_backward(problem: Problem, shape: Shape) -> None:
    problem.numbers["scale"] = SCALING
    rows = Rows(problem, shape)
    g = problem.operand(problem.large("g", shape.m, shape.r_out))
    has_token = np.arange(len(rows.u))[:, None] == rows.tokens  # [tokens, rows]
    transposed = rows.cores.transpose(0, 2, 1).reshape(-1, shape.r)
    problem.product("du", has_token @ rows.by_core(g), transposed, scale=SCALING)
    u = rows.by_core(rows.u[rows.tokens])
    problem.product("dcores", u.T, g, scale=SCALING, size=rows.cores.shape, dtype=FLOAT)


# ---- the table -----------------------------------------------------------------------------------

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
    "fold_grad_core": partial(fold_grad, outputs=("dcore",)),
    "fold_grad_B": partial(fold_grad, outputs=("dB",)),
    "few_tokens_forward": few_tokens_forward,
    "few_tokens_backward": few_tokens_backward,
    "row_core": row_core,
    "row_core_backward": row_core_backward,
    "gemm_lotr": gemm_lotr,
    "gemm_lotr_backward": partial(gemm_lotr, backward=True),
}
CASES = [(name, kind) for name in KERNELS for kind in DTYPE if name not in FUSED or kind != "fp32"]
