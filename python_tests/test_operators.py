"""Every operator with numbers x dtype x shape x layout against float64.

Each operand has NaN around it in memory. A check is (what, result, truth, size, roundings), as
`helpers.within` accepts it. Each entry of TABLE makes the checks of one operator for one Case.
LOTR_CPU_ISA chooses the instruction set; `test_lower_instruction_sets` runs the table with each.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import pytest
import torch
from helpers import (
    BETA,
    DTYPES,
    HALVES,
    LAYOUTS,
    OPERATORS,
    SCHEMAS,
    arguments,
    copy64,
    laid_out,
    new_memory_is_nan,
    operator,
    relative,
    run_python,
    sums_dtype,
    untouched,
    within,
    worst,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from lotr_ext import reference
from lotr_ext.core import fallback, kernel_support
from lotr_ext.core.call import RowChoice
from lotr_ext.core.kernel_support import trial_obstacle

ops = torch.ops.lotr
Check = tuple[str, Tensor, Tensor, Tensor, int]
# How often values on the way to an element are rounded, see `helpers.within`.
ONCE = 1  # the element
ROUNDED_SUM = 5  # up to four operands and the sum
ROUNDED_Y = 5  # u, F, the base product, the factors and y
ROUNDED_DX = 6  # g, du, F, A, the base product and dx
S = 0.37
SEED = -(2**61) + 12345678901
# M, K, N, r_in: full blocks of each kernel, their remainders, panels that are cut short. r_out is
# r_in + 1, up to 256.
SHAPES = [
    (0, 5, 3, 2),
    (1, 1, 1, 1),
    (1, 64, 48, 16),
    (5, 7, 9, 3),
    (7, 129, 31, 8),
    (16, 64, 64, 16),
    (97, 77, 130, 17),
    (130, 200, 96, 64),
    (257, 65, 67, 33),
    (29, 31, 70, 100),
    (33, 300, 129, 255),
    (3, 600, 5, 5),
]
# x's dtype, the factors'
DTYPE_PAIRS = [(t, t) for t in DTYPES] + [(t, torch.float32) for t in HALVES]
each_dtype_pair = pytest.mark.parametrize(
    "dtype, factors", DTYPE_PAIRS, ids=lambda t: str(t).removeprefix("torch.")
)


class Case:
    """Operands of one shape, dtype and layout, of about 1 in size."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        factors: torch.dtype,
        layout: str = "contiguous",
        p: float = 0.0,
    ):
        self.m, self.k, self.n, self.r = shape
        self.r_out = self.r + 1
        self.dtype = dtype
        self.factors = factors
        self.layout = layout
        self.acc = sums_dtype(dtype)
        self.p = p
        self.seed = torch.tensor([SEED]) if p else None
        self.generator = torch.Generator().manual_seed(sum(shape))
        self.x = self.make(self.m, self.k)
        self.g = self.make(self.m, self.n)
        self.u = self.make(self.m, self.r)
        self.weight = self.make(self.n, self.k)
        self.bias = self.make(1, self.n)[0]
        self.A = self.factor(self.k, self.r)
        self.F = self.factor(self.n, self.r)
        self.B = self.factor(self.n, self.r_out)
        self.cores = self.factor(2, self.r, self.r_out)
        self.core = self.cores[0]

    def make(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*size, generator=self.generator, dtype=torch.float64)
        values /= size[-1] ** 0.25
        return laid_out(values.to(dtype or self.dtype), self.layout)

    def factor(self, *size: int) -> Tensor:
        return self.make(*size, dtype=self.factors)

    def sums(self, *size: int) -> Tensor:
        return self.make(*size, dtype=self.acc)

    def wide(self, *tensors: Tensor) -> list[Tensor]:
        """In float64, as the products see them: factors rounded to x's dtype."""
        return [copy64(t.to(self.dtype) if t.dtype == self.factors else t) for t in tensors]

    def B_and_core(self) -> tuple[Tensor, Tensor]:
        """Returns B and G in float64. Operators fold them before they round to x's dtype."""
        return self.B.double(), self.core.double()

    def mask(self, columns: int) -> Tensor:
        """The dropout mask [m, columns] in float64."""
        return reference.dropout_mask(self.m, columns, self.p, SEED)

    def dense_if_bfloat16(self, *tensors: Tensor) -> list[Tensor]:
        """Operands of the library's product.

        On a CPU with AMX, torch 2.13 multiplies what is between bfloat16 rows as well.
        """
        return [t.contiguous() if self.dtype == torch.bfloat16 else t for t in tensors]


# ---- formulas in float64 -------------------------------------------------------------------------


def both(formula: Callable, *operands: Tensor | float | None) -> tuple:
    """Returns the value of a formula, and the sum of the absolute products in it.

    Formulas only add and multiply, so the sum is the value for the absolute operands.
    """
    sizes = [None if operand is None else abs(operand) for operand in operands]
    return formula(*operands), formula(*sizes)


def plus_product(y: Tensor, u: Tensor, F: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    return y + mask * (u @ F.mT)


def layer_of_u(
    x: Tensor, W: Tensor, bias: Tensor | None, u: Tensor, B: Tensor, G: Tensor, s: float
) -> Tensor:
    y = x @ W.mT + u @ reference.fold(B, G, s).mT
    return y if bias is None else y + bias


def layer_gradients(
    g: Tensor,
    W: Tensor,
    x: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    G: Tensor,
    mask: Tensor,
    dA: Tensor,
    dB: Tensor,
) -> tuple[Tensor, ...]:
    """(dx, dA, dB, dG), the gradients of the factors added to dA and dB."""
    du = g @ reference.fold(B, G, S)
    Q = g.mT @ u
    dx = g @ W + mask * (du @ A.mT)
    return dx, dA + (x * mask).mT @ du, dB + S * Q @ G, S * Q.mT @ B


def gradients_of_u(
    g: Tensor,
    W: Tensor,
    u: Tensor,
    F: Tensor,
    B: Tensor,
    G: Tensor,
    du: Tensor,
    dx: Tensor,
    dB: Tensor,
) -> tuple[Tensor, ...]:
    """(dx, du, dB, dG), all but the last added to the given ones."""
    Q = g.mT @ u
    return dx + g @ W, du + g @ F, dB + S * Q @ G, S * Q.mT @ B


def row_outputs(u: Tensor, cores: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """h_i = S u_t(i) G_c(i), zero where c(i) is -1."""
    core_rows = cores[index.clamp(min=0)] * (index >= 0)[:, None, None]
    return (S * u[tokens].unsqueeze(1) @ core_rows).squeeze(1)


def row_gradients(
    u: Tensor, cores: Tensor, dh: Tensor, index: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (u, cores)]
    return torch.autograd.grad(row_outputs(*leaves, index, tokens), leaves, dh)


# ---- the table -----------------------------------------------------------------------------------

ZERO = torch.zeros((), dtype=torch.float64)


def shrink(c: Case) -> Iterator[Check]:
    x, A = c.wide(c.x, c.A)
    yield "u", ops.shrink(c.x, c.A, c.p, c.seed), *both(torch.matmul, x * c.mask(c.k), A), ONCE


def expand_add_(c: Case) -> Iterator[Check]:
    y = laid_out(c.g, c.layout)
    version = y._version
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert y._version > version  # otherwise a backward that saved y would use the new values
    assert untouched(y)
    yield "y", y, *both(plus_product, *c.wide(c.g, c.u, c.F), c.mask(c.n)), ONCE


def expand(c: Case) -> Iterator[Check]:
    yield "y", ops.expand(c.g, c.u, c.F), *both(plus_product, *c.wide(c.g, c.u, c.F)), ONCE


def fold(c: Case) -> Iterator[Check]:
    yield (
        "F",
        ops.fold(c.B, c.core, S, c.dtype),
        *both(reference.fold, *c.B_and_core(), S),
        ONCE,
    )


def rows_of(c: Case) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """Yields (index, offs, tokens) and what they mean: the core and the token of each row."""
    rows = torch.arange(c.m)
    index = torch.tensor([0, 1, -1, -1]).repeat(c.m // 4 + 1)[: c.m]
    tokens = (rows * 7 + 3) % max(c.m, 1) // 2  # each about twice, in no order
    yield (index, None, tokens), index, tokens
    yield (index, None, None), index, rows
    ends = (c.m // 3, c.m - c.m // 4)
    sizes = torch.tensor([ends[0], ends[1] - ends[0], c.m - ends[1]])
    core_of_row = torch.tensor([0, 1, -1]).repeat_interleave(sizes)
    yield (None, torch.tensor(ends, dtype=torch.int32), tokens), core_of_row, tokens
    # A check of the first and the last row alone would take these rows for rows in order.
    reversed_inside = torch.cat([rows[:1], rows[1:-1].flip(0), rows[1:][-1:]])
    yield (0 * index, None, reversed_inside), 0 * index, reversed_inside


def row_core(c: Case) -> Iterator[Check]:
    for choice, index, tokens in rows_of(c):
        formula = partial(row_outputs, index=index, tokens=tokens)
        truth_and_size = both(formula, *c.wide(c.u, c.cores))
        fallback_h = fallback.row_core(c.u, c.cores, S, RowChoice(*choice))
        yield "h", ops.row_core(c.u, c.cores, *choice, S), *truth_and_size, ONCE
        yield "h of the fallback", fallback_h, *truth_and_size, ONCE


def row_core_backward(c: Case) -> Iterator[Check]:
    dh = c.make(c.m, c.r_out)
    for choice, index, tokens in rows_of(c):
        du, dG = ops.row_core_backward(dh, c.u, c.cores, *choice, S, True, True)
        formula = partial(row_gradients, index=index, tokens=tokens)
        truths, sizes = both(formula, *c.wide(c.u, c.cores, dh))
        yield "du", du, truths[0], sizes[0], ONCE
        yield "dG", dG, truths[1], sizes[1], ONCE


def strategies_and_biases(c: Case) -> Iterator[tuple[int, tuple[Tensor | None, Tensor | None]]]:
    """Each strategy with a bias and its float64 copy, and without one."""
    return itertools.product((0, BETA), ((c.bias, copy64(c.bias)), (None, None)))


def layer_forward(c: Case) -> Iterator[Check]:
    yield from outputs_from_x(c, ops.layer_forward, c.p, c.seed)


def layer_forward_few_tokens(c: Case) -> Iterator[Check]:
    yield from outputs_from_x(c, ops.layer_forward_few_tokens)


def outputs_from_x(c: Case, run: Callable, *dropout: object) -> Iterator[Check]:
    """Checks the results of a forward that starts at x: y and u, and F if it folds."""
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    wide_x, W, A = c.wide(c.x, c.weight, c.A)
    mask = c.mask(c.k)
    for strategy, (bias, wide_bias) in strategies_and_biases(c):
        y, u, *folded = run(x, weight, bias, c.A, c.B, c.core, S, strategy, *dropout)
        operands = (wide_x, W, wide_bias, A, *c.B_and_core(), S, mask)
        yield f"y {strategy}", y, *both(reference.forward, *operands), ROUNDED_Y
        yield f"u {strategy}", u, *both(torch.matmul, wide_x * mask, A), ONCE
        for F in folded:
            yield f"F {strategy}", F, *both(reference.fold, *c.B_and_core(), S), ONCE


def layer_forward_projected(c: Case) -> Iterator[Check]:
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    wide_x, W, u = c.wide(c.x, c.weight, c.u)
    for strategy, (bias, wide_bias) in strategies_and_biases(c):
        y, F = ops.layer_forward_projected(x, weight, bias, c.u, c.B, c.core, S, strategy)
        operands = (wide_x, W, wide_bias, u, *c.B_and_core(), S)
        yield f"y {strategy}", y, *both(layer_of_u, *operands), ROUNDED_Y
        yield f"F {strategy}", F, *both(reference.fold, *c.B_and_core(), S), ONCE


def layer_forward_rows(c: Case) -> Iterator[Check]:
    """B has the place of F, which is not folded."""
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    wide_x, W, u, B = c.wide(c.x, c.weight, c.u, c.F)
    identity = torch.eye(c.r, dtype=torch.float64)
    for strategy, (bias, wide_bias) in strategies_and_biases(c):
        y = ops.layer_forward_rows(x, weight, bias, c.u, c.F, strategy)
        operands = (wide_x, W, wide_bias, u, B, identity, 1.0)
        yield f"y {strategy}", y, *both(layer_of_u, *operands), ROUNDED_Y


def new_and_added(*sums: Tensor) -> Iterator[tuple[tuple[Tensor | None, ...], list[Tensor]]]:
    """Yields what a backward adds gradients to, and its values: first nothing, then these sums."""
    yield (None,) * len(sums), [ZERO] * len(sums)
    yield sums, [copy64(total) for total in sums]


def gradients_of(
    results: Sequence[Tensor | None], sums: Sequence[Tensor | None]
) -> Iterator[Tensor]:
    """Yields the gradients of a backward: its results, or the sums that it changed in place."""
    for result, total in zip(results, sums, strict=True):
        assert (result is None) == (total is not None)
        assert total is None or untouched(total)
        yield result if total is None else total


def layer_backward_(c: Case) -> Iterator[Check]:
    F = reference.fold(*c.B_and_core(), S).to(c.dtype)
    yield from gradients_to_x(c, ops.layer_backward_, (F,), (c.p, c.seed))


def layer_backward_few_tokens_(c: Case) -> Iterator[Check]:
    yield from gradients_to_x(c, ops.layer_backward_few_tokens_, (), ())


def gradients_to_x(
    c: Case, run: Callable, folded: tuple[Tensor, ...], dropout: tuple
) -> Iterator[Check]:
    """Checks the gradients of a forward that starts at x."""
    g, weight, x = c.dense_if_bfloat16(c.g, c.weight, c.x)
    operands = (*c.wide(c.g, c.weight, c.x, c.u, c.A), *c.B_and_core(), c.mask(c.k))
    for strategy in (0, BETA):
        head = (g, weight, x, c.u, c.A, *folded, c.B, c.core, S, strategy)
        for sums, starts in new_and_added(c.sums(c.k, c.r), c.sums(c.n, c.r_out)):
            dx, *new_dA_and_dB, dG = run(*head, *sums, True, True, *dropout)
            truths, sizes = both(layer_gradients, *operands, *starts)
            yield f"dx {strategy}", dx, truths[0], sizes[0], ROUNDED_DX
            dA, dB = gradients_of(new_dA_and_dB, sums)
            yield from rounded(c, f"dA {strategy}", dA, truths[1], sizes[1])
            yield from rounded(c, f"dB {strategy}", dB, truths[2], sizes[2])
            yield from rounded(c, f"dG {strategy}", dG, truths[3], sizes[3])


def layer_backward_projected_(c: Case) -> Iterator[Check]:
    g, weight, dx_sum = c.dense_if_bfloat16(c.g, c.weight, c.make(c.m, c.k))
    operands = (*c.wide(c.g, c.weight, c.u, c.F), *c.B_and_core())
    for sums, starts in new_and_added(c.make(c.m, c.r), dx_sum, c.sums(c.n, c.r_out)):
        new_dx, du, new_dB, dG = ops.layer_backward_projected_(
            g, weight, c.u, c.F, c.B, c.core, S, *sums, True, True
        )
        truths, sizes = both(gradients_of_u, *operands, *starts)
        dx, dB = gradients_of((new_dx, new_dB), sums[1:])
        yield "dx", dx, truths[0], sizes[0], ROUNDED_DX
        yield "du", du, truths[1], sizes[1], ONCE if sums[0] is None else 2  # du is rounded before
        yield from rounded(c, "dB", dB, truths[2], sizes[2])
        yield from rounded(c, "dG", dG, truths[3], sizes[3])


def layer_backward_rows_(c: Case) -> Iterator[Check]:
    g, weight, dx_sum = c.dense_if_bfloat16(c.g, c.weight, c.make(c.m, c.k))
    wide_g, W, u, F = c.wide(c.g, c.weight, c.u, c.F)
    for sums, starts in new_and_added(dx_sum, c.sums(c.n, c.r)):
        new_dx, dh, new_dB = ops.layer_backward_rows_(g, weight, c.u, c.F, *sums, True, True)
        dx, dB = gradients_of((new_dx, new_dB), sums)
        yield "dx", dx, *both(plus_product, starts[0], wide_g, W.mT), ROUNDED_DX
        yield "dh", dh, *both(torch.matmul, wide_g, F), ONCE
        yield "dB", dB, *both(plus_product, starts[1], wide_g.mT, u.mT), ONCE


def backward_sums(c: Case) -> Iterator[Check]:
    """The backwards without the base product, with and without du."""
    g, W, u, F = c.wide(c.g, c.weight, c.u, c.F)
    for need_du in (True, False):
        Q = c.sums(c.n, c.r)
        dB = c.sums(c.n, c.r_out)
        Q_start, dB_start = map(copy64, (Q, dB))
        _, dh, _ = ops.layer_backward_rows_(c.g, None, c.u, c.F, None, Q, need_du, True)
        head = (c.g, None, c.u, c.F if need_du else None, c.B, c.core, S)
        _, du, _, dG = ops.layer_backward_projected_(*head, None, None, dB, True, True)
        assert all(map(untouched, (Q, dB)))
        for gradient in (dh, du):
            assert (gradient is not None) == need_du
            if need_du:
                yield "du", gradient, *both(torch.matmul, g, F), ONCE
        yield "Q", Q, *both(plus_product, Q_start, g.mT, u.mT), ONCE
        truths, sizes = both(gradients_of_u, g, W, u, F, *c.B_and_core(), ZERO, ZERO, dB_start)
        yield from rounded(c, "dB", dB, truths[2], sizes[2])
        yield from rounded(c, "dG", dG, truths[3], sizes[3])


def rounded(c: Case, what: str, result: Tensor, truth: Tensor, size: Tensor) -> Iterator[Check]:
    """Checks a sum of products of rounded operands. The sum itself must not be rounded."""
    assert result.dtype in (c.acc, c.factors)
    exact = result.double()
    yield what, exact.to(c.dtype), truth, size, ROUNDED_SUM
    is_wide = result.dtype == torch.float32 and c.dtype in HALVES
    if is_wide and result.numel() > 64 and bool(truth.any()):
        assert relative(exact.to(c.dtype), exact) > 0, f"{what} was rounded to {c.dtype}"


def shrink_backward_(c: Case) -> Iterator[Check]:
    """A new dA, then dA and dx added to sums."""
    mask = c.mask(c.k)
    du, x, A = c.wide(c.u, c.x, c.A)
    dx = c.make(c.m, c.k)
    dx_start = copy64(dx)
    for (dA_sum,), (dA_start,) in new_and_added(c.sums(c.k, c.r)):
        operands = (None, c.x, None) if dA_sum is None else (dx, c.x, c.A)
        new_dA = ops.shrink_backward_(c.u, *operands, dA_sum, c.p, c.seed)
        (dA,) = gradients_of([new_dA], [dA_sum])
        yield "dA", dA, *both(plus_product, dA_start, (x * mask).mT, du.mT), ONCE
    assert untouched(dx)
    yield "dx", dx, *both(plus_product, dx_start, du, A, mask), ONCE


TABLE: dict[str, Callable[[Case], Iterator[Check]]] = {
    f.__name__: f
    for f in (
        shrink,
        expand_add_,
        expand,
        fold,
        row_core,
        row_core_backward,
        layer_forward,
        layer_forward_few_tokens,
        layer_forward_projected,
        layer_forward_rows,
        layer_backward_,
        layer_backward_few_tokens_,
        layer_backward_projected_,
        layer_backward_rows_,
        backward_sums,
        shrink_backward_,
    )
}
DROPS = ("shrink", "expand_add_", "layer_forward", "layer_backward_", "shrink_backward_")
# Python formulas. test_layers.py and test_experts.py have their numbers.
FORMULAS = {"grouped_mm", "grouped_outer", "linear", "dropout_mask"}


def test_every_operator_is_in_the_table() -> None:
    assert set(OPERATORS) - FORMULAS == set(TABLE) - {"backward_sums"}


def check(name: str, case: Case, where: str) -> None:
    with new_memory_is_nan():
        for what, result, truth, size, roundings in TABLE[name](case):
            error = within(result, truth, size, roundings)
            assert error is None, f"{name}, {where}: {what}: {error}"


@each_dtype_pair
@pytest.mark.parametrize("name", TABLE)
def test_numbers(name: str, dtype: torch.dtype, factors: torch.dtype) -> None:
    """Each shape contiguous and in one other layout, in turn, and once with dropout."""
    for i, shape in enumerate(SHAPES):
        for layout in (LAYOUTS[0], LAYOUTS[1 + i % 3]):
            check(name, Case(shape, dtype, factors, layout), f"{shape} {layout}")
        if name in DROPS:
            p = (0.1, 0.5, 0.93)[i % 3]
            check(name, Case(shape, dtype, factors, LAYOUTS[i % 4], p), f"{shape} p = {p}")


# ---- bits, NaN, dropout --------------------------------------------------------------------------


def results_of(name: str, case: Case) -> list[Tensor]:
    return [result for _, result, *_ in TABLE[name](case)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in TABLE if not n.startswith("layer_")])
def test_same_bits_at_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """Also for odd numbers of tokens, where the last pair has one row.

    The layers' operators contain the library's product, which promises no bits.
    """
    for shape in ((1100, 300, 200, 16), (301, 130, 65, 40), (17000, 40, 65, 4)):
        runs = []
        p = 0.4 if name in DROPS and shape[0] < 1000 else 0.0
        for threads in (3, 2, 1):  # the last one is the number of all tests
            torch.set_num_threads(threads)
            runs.append(results_of(name, Case(shape, dtype, dtype, p=p)))
        for run in runs[1:]:
            assert all(map(torch.equal, run, runs[0])), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_no_cache_holds(dtype: torch.dtype) -> None:
    """At rank 3 few rows fit into a CPU's L2. At rank 127 g is read twice: the sums do not fit."""
    for rank in (3, 127):
        check("backward_sums", Case((150, 3, 6000, rank), dtype, dtype), str(rank))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_dropped_may_be_nan(dtype: torch.dtype) -> None:
    runs = []
    for value in (0.0, float("nan")):
        c = Case((13, 67, 35, 5), dtype, dtype, p=0.5)
        c.x.masked_fill_(c.mask(c.k) == 0, value)
        runs.append(results_of("shrink", c) + results_of("shrink_backward_", c))
    assert all(map(torch.equal, *runs))
    y = c.g.clone()
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert torch.equal(y[c.mask(c.n) == 0], c.g[c.mask(c.n) == 0])  # not even rounded again


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_column(bad: float, dtype: torch.dtype) -> None:
    """Row 37 is in a tile that is cut short, column 65 past the full steps."""
    c = Case((41, 67, 130, 18), dtype, dtype)
    c.x[37, 65] = c.u[37, 17] = c.g[37, 129] = bad
    ones = torch.ones_like(c.u)
    y = torch.ones_like(c.g)
    ops.expand_add_(y, c.u, c.F)
    dA = ops.shrink_backward_(ones, None, c.x, None, None)
    _, du, Q = ops.layer_backward_rows_(c.g, None, ones, c.F, None, None, True, True)
    for result, row in ((ops.shrink(c.x, c.A), 37), (y, 37), (du, 37), (dA, 65), (Q, 129)):
        expected = torch.ones_like(result, dtype=torch.bool)
        expected[row] = False
        assert torch.equal(result.isfinite(), expected)


def test_a_number_equal_to_the_threshold_is_kept() -> None:
    number = int(reference.philox_4x32_10(torch.tensor([0]), 5)[0, 1])  # of element 1
    assert ops.shrink(torch.ones(1, 4), torch.eye(4), number / 2**32, torch.tensor([5]))[0, 1] > 0


def test_more_cores_and_tokens_than_int32_counts() -> None:
    many = 2**31 + 9
    u = torch.randn(2, 3)
    cores = torch.randn(1, 3, 5)
    last = torch.tensor([many - 1, 2**31])
    h = ops.row_core(u, cores.expand(many, 3, 5), last, None, None, S)
    assert torch.allclose(h, S * u @ cores[0])
    h = ops.row_core(u[:1].expand(many, 3), cores, torch.tensor([0, 0]), None, last, S)
    assert torch.allclose(h, S * u[:1] @ cores[0])


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_few_tokens_past_the_range_of_float16(sign: int) -> None:
    """s u G exceeds 65504, but y and the gradients do not. The scaling is then applied last."""
    scaling = 5000.0
    sizes = ((5, 7), (9, 7), (7, 3), (9, 3), (3, 3), (5, 9))
    values = (1.0, 0.5, 1 / 7, 0.001, 8.0 * sign, 0.001)
    x, weight, A, B, core, g = map(partial(torch.full, dtype=torch.float16), sizes, values)
    y, u = ops.layer_forward_few_tokens(x, weight, None, A, B, core, scaling, BETA)
    gradients = ops.layer_backward_few_tokens_(
        g, weight, x, u, A, B, core, scaling, BETA, None, None, True, True
    )
    wide_x, W, *factors = (t.double() for t in (x, weight, A, B, core))
    truth = reference.forward(wide_x, W, None, *factors, scaling)
    expected = reference.backward(g.double(), wide_x, W, *factors, scaling)
    assert worst((y, *gradients), (truth, *expected[:4])) < 5e-3


@pytest.mark.parametrize("wide", ["A", "B", "core"])
def test_new_gradients_of_factors_with_two_dtypes(wide: str) -> None:
    """They have the dtype of sums: a factor in float32 gets a gradient that was not rounded."""
    c = Case((40, 24, 17, 4), torch.bfloat16, torch.bfloat16)
    factors = {"A": c.A, "B": c.B, "core": c.core}
    factors[wide] = factors[wide].float()
    A, *further = factors.values()
    head = (*c.dense_if_bfloat16(c.g, c.weight, c.x), c.u, A)
    tail = (*further, S, 0, None, None, True, True)
    for run, operands in (
        (ops.layer_backward_few_tokens_, (*head, *tail)),
        (ops.layer_backward_, (*head, c.F, *tail)),
    ):
        opcheck(run.default, operands, test_utils="test_faketensor")
        for gradient in run(*operands)[1:]:
            assert gradient.dtype == torch.float32
            assert relative(gradient.bfloat16(), gradient) > 0


# ---- as torch sees them --------------------------------------------------------------------------

# Results [rows, rank], by their names in the schemas. On CUDA their rows start at 16 bytes.
PADDED = {"u", "F", "h", "du", "dh"}


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "linear"])
def test_strides_on_cuda(name: str, dtype: torch.dtype) -> None:
    """The fake kernels promise torch.compile the strides that csrc/torch makes on CUDA."""

    def on_cuda(tensor: Tensor) -> Tensor:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, meta, torch.device("cuda:0"))

    for rank in range(1, 18):
        for inputs in arguments(name, dtype, R=rank, Q=rank + 1):
            with FakeTensorMode() as mode:
                results = operator(name)(*tree_map_only(Tensor, on_cuda, inputs))
            results = results if isinstance(results, tuple) else (results,)
            has_du = name == "layer_backward_projected_" and inputs[7] is not None
            for declared, result in zip(SCHEMAS[name].returns, results):
                if result is None:
                    continue
                row_stride = result.shape[-1]
                # torch adds an argument du, and the result of that sum has dense rows.
                if declared.name in PADDED and not (has_du and declared.name == "du"):
                    row_stride = -(-row_stride * result.itemsize // 16) * 16 // result.itemsize
                strides = (row_stride * result.shape[1], row_stride, 1)
                assert result.stride() == strides[-result.dim() :], (declared.name, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "linear"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """The fake kernels, by which torch.compile works, have the results' shapes, dtypes, strides.

    Not of `linear`, which compilers take apart. Decompositions round in several steps.
    """
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {}
    for inputs in arguments(name, dtype):
        opcheck(operator(name), inputs, **tolerance)


def test_the_check_of_a_device_also_while_a_caller_traces() -> None:
    with FakeTensorMode():
        assert trial_obstacle(torch.device("cpu")) is None
        assert "meta" in trial_obstacle(torch.device("meta"))


def test_a_gpu_on_which_the_first_layer_is_wrong_warns() -> None:
    """Layers then run the PyTorch fallback. That must not happen in silence."""
    package = mock.patch.multiple(
        kernel_support,
        build_info=lambda: {"cuda": {"built": True, "archs": ["90a"]}},
        trial_obstacle=lambda device: "got 135.0",
    )
    gpu = mock.patch.multiple(
        torch.cuda,
        device_count=lambda: 1,
        get_device_capability=lambda index: (9, 0),
        is_current_stream_capturing=lambda: False,
    )
    check_device = kernel_support.cuda_obstacle.__wrapped__  # without its cache
    with package, gpu, pytest.warns(UserWarning, match=r"fallback.*got 135\.0"):
        assert "got 135.0" in check_device(0)


# ---- the specification ---------------------------------------------------------------------------


def test_reference_by_autograd() -> None:
    """The backward of the specification was derived by hand."""
    shapes = ((4, 6), (5, 6), (5,), (6, 3), (5, 2), (3, 2))
    x, W, bias, A, B, core = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    mask = reference.dropout_mask(4, 6, 0.5, 77)
    y = reference.forward(x, W, bias, A, B, core, 0.7, mask)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, A, B, core), g)
    gradients = reference.backward(g, x, W, A, B, core, 0.7, mask)
    assert worst(gradients, expected) < 1e-12


def test_philox_known_answers() -> None:
    """Random123's published vector for philox4x32-10 of zeros."""
    words = reference.philox_4x32_10(torch.tensor([0]), 0)
    assert words[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


# ---- instruction sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_lower_instruction_sets(isa: str) -> None:
    """The numbers with each instruction set that this CPU has below its best."""
    if json.loads(ops.info())["cpu"]["isa"] == isa or "LOTR_CPU_ISA" in os.environ:
        pytest.skip("test_numbers has run with it")
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", "numbers"]
    environment = {**os.environ, "LOTR_CPU_ISA": isa}
    run = run_python("-m", "pytest", *options, __file__, env=environment)
    if "(what this CPU runs), got " in run.stdout + run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]
