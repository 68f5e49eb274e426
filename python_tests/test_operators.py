"""OPERATORS: every operator with numbers x dtype x shape x layout against float64.

Each operand has NaN around it in memory. A check is (what, result, truth, size, rounded), as
`helpers.within` accepts it. Each entry of TABLE makes the checks of one operator for one Case.
LOTR_CPU_ISA chooses the instruction set; `test_lower_instruction_sets` runs the table with each.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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
Check = tuple[str, Tensor, Tensor, Tensor, float]
S = 0.37
SEED = -(2**61) + 12345678901
# M, K, N, r_in: full blocks of each kernel, their remainders, panels that are cut short. r_out is
# r_in + 1, up to 256.
SHAPES = [
    *(
        (0, 5, 3, 2),
        (1, 1, 1, 1),
        (1, 64, 48, 16),
        (5, 7, 9, 3),
        (7, 129, 31, 8),
        (16, 64, 64, 16),
        (97, 77, 130, 17),
    ),
    *(
        (130, 200, 96, 64),
        (257, 65, 67, 33),
        (29, 31, 70, 100),
        (33, 300, 129, 255),
        (3, 600, 5, 5),
    ),
]
KINDS = [(t, t) for t in DTYPES] + [(t, torch.float32) for t in HALVES]  # x's dtype, the factors'
of_kinds = pytest.mark.parametrize(
    "dtype, factors", KINDS, ids=lambda t: str(t).removeprefix("torch.")
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

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns B and G in float64. They are multiplied before they are rounded to x's dtype."""
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
    dx: Tensor,
    du: Tensor,
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
    yield "u", ops.shrink(c.x, c.A, c.p, c.seed), *both(torch.matmul, x * c.mask(c.k), A), 1


def expand_add_(c: Case) -> Iterator[Check]:
    y = laid_out(c.g, c.layout)
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert untouched(y)
    yield "y", y, *both(plus_product, *c.wide(c.g, c.u, c.F), c.mask(c.n)), 1


def expand(c: Case) -> Iterator[Check]:
    yield "y", ops.expand(c.g, c.u, c.F), *both(plus_product, *c.wide(c.g, c.u, c.F)), 1


def fold(c: Case) -> Iterator[Check]:
    yield "F", ops.fold(c.B, c.core, S, c.dtype), *both(reference.fold, *c.folded(), S), 1


def rows_of(c: Case) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """Yields (index, offs, tokens) and what they mean: the core and the token of each row."""
    rows = torch.arange(c.m)
    index = (rows * 5 + 1) % 4 % 3 - 1
    tokens = (rows * 7 + 3) % max(c.m, 1) // 2
    yield (index, None, tokens), index, tokens
    yield (index, None, None), index, rows
    offs = torch.tensor([c.m // 3, c.m - c.m // 4], dtype=torch.int32)
    of_offs = torch.where(rows < offs[0], 0, torch.where(rows < offs[1], 1, -1))
    yield (None, offs, tokens), of_offs, tokens
    permuted = torch.cat([rows[:1], rows[1:-1].flip(0), rows[1:][-1:]])  # but the first and last
    yield (0 * index, None, permuted), 0 * index, permuted


def row_core(c: Case) -> Iterator[Check]:
    for choice, index, tokens in rows_of(c):
        formula = partial(row_outputs, index=index, tokens=tokens)
        truth_and_size = both(formula, *c.wide(c.u, c.cores))
        of_fallback = fallback.row_core(c.u, c.cores, S, RowChoice(*choice))
        yield "h", ops.row_core(c.u, c.cores, *choice, S), *truth_and_size, 1
        yield "h of the fallback", of_fallback, *truth_and_size, 1


def row_core_backward(c: Case) -> Iterator[Check]:
    dh = c.make(c.m, c.r_out)
    for choice, index, tokens in rows_of(c):
        results = ops.row_core_backward(dh, c.u, c.cores, *choice, S, True, True)
        formula = partial(row_gradients, index=index, tokens=tokens)
        truths, sizes = both(formula, *c.wide(c.u, c.cores, dh))
        yield "du", results[0], truths[0], sizes[0], 1
        yield "dG", results[1], truths[1], sizes[1], 1


def strategies_and_biases(c: Case) -> Iterator[tuple[int, tuple[Tensor | None, Tensor | None]]]:
    """Each strategy with a bias and its float64 copy, and without one."""
    return itertools.product((0, BETA), ((c.bias, copy64(c.bias)), (None, None)))


def layer_forward(c: Case) -> Iterator[Check]:
    yield from outputs_from_x(c, ops.layer_forward, c.p, c.seed)
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    for strategy, (bias, _) in strategies_and_biases(c):
        folded = (c.B, c.core, S, strategy)
        y, u, F = ops.layer_forward(x, weight, bias, c.A, *folded, c.p, c.seed)
        yield f"F {strategy}", F, *both(reference.fold, *c.folded(), S), 1
        again = ops.layer_forward_projected(x, weight, bias, u, *folded)
        assert all(map(torch.equal, again, (y, F)))
        assert torch.equal(ops.layer_forward_rows(x, weight, bias, u, F, strategy), y)


def layer_forward_few_tokens(c: Case) -> Iterator[Check]:
    yield from outputs_from_x(c, ops.layer_forward_few_tokens)


def outputs_from_x(c: Case, run: Callable, *dropout: object) -> Iterator[Check]:
    """Checks y and u of a forward that starts at x."""
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    wide_x, W, A = c.wide(c.x, c.weight, c.A)
    mask = c.mask(c.k)
    for strategy, (bias, wide_bias) in strategies_and_biases(c):
        y, u, *_ = run(x, weight, bias, c.A, c.B, c.core, S, strategy, *dropout)
        operands = (wide_x, W, wide_bias, A, *c.folded(), S, mask)
        # u, F, the base product, the factors and y itself are rounded
        yield f"y {strategy}", y, *both(reference.forward, *operands), 5
        yield f"u {strategy}", u, *both(torch.matmul, wide_x * mask, A), 1


def layer_forward_projected(c: Case) -> Iterator[Check]:
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    wide_x, W, u = c.wide(c.x, c.weight, c.u)
    for strategy, (bias, wide_bias) in strategies_and_biases(c):
        y, F = ops.layer_forward_projected(x, weight, bias, c.u, c.B, c.core, S, strategy)
        yield f"y {strategy}", y, *both(layer_of_u, wide_x, W, wide_bias, u, *c.folded(), S), 5
        yield f"F {strategy}", F, *both(reference.fold, *c.folded(), S), 1


def layer_forward_rows(c: Case) -> Iterator[Check]:
    """B has the place of F, which is not folded."""
    x, weight = c.dense_if_bfloat16(c.x, c.weight)
    wide_x, W, u, B = c.wide(c.x, c.weight, c.u, c.F)
    identity = torch.eye(c.r, dtype=torch.float64)
    for strategy, (bias, wide_bias) in strategies_and_biases(c):
        y = ops.layer_forward_rows(x, weight, bias, c.u, c.F, strategy)
        yield f"y {strategy}", y, *both(layer_of_u, wide_x, W, wide_bias, u, B, identity, 1.0), 5


def layer_backward_(c: Case) -> Iterator[Check]:
    F = reference.fold(*c.folded(), S).to(c.dtype)
    yield from gradients_to_x(c, ops.layer_backward_, (F,), (c.p, c.seed))


def layer_backward_few_tokens_(c: Case) -> Iterator[Check]:
    yield from gradients_to_x(c, ops.layer_backward_few_tokens_, (), ())


def gradients_to_x(
    c: Case, run: Callable, folded: tuple[Tensor, ...], dropout: tuple
) -> Iterator[Check]:
    """Checks the gradients of a forward that starts at x, new and added to sums."""
    g, weight, x = c.dense_if_bfloat16(c.g, c.weight, c.x)
    operands = (*c.wide(c.g, c.weight, c.x, c.u, c.A), *c.folded(), c.mask(c.k))
    for strategy in (0, BETA):
        head = (g, weight, x, c.u, c.A, *folded, c.B, c.core, S, strategy)
        sums = (c.sums(c.k, c.r), c.sums(c.n, c.r_out))
        starts = [copy64(total) for total in sums]
        new = run(*head, None, None, True, True, *dropout)
        dx, dA, dB, dG = run(*head, *sums, True, True, *dropout)
        assert dA is None and dB is None
        assert all(map(untouched, sums))
        for results, start in ((new, (ZERO, ZERO)), ((dx, *sums, dG), starts)):
            truths, sizes = both(layer_gradients, *operands, *start)
            yield f"dx {strategy}", results[0], truths[0], sizes[0], 6
            for what, *of_factor in zip(("dA", "dB", "dG"), results[1:], truths[1:], sizes[1:]):
                yield from rounded(c, f"{what} {strategy}", *of_factor)


def layer_backward_projected_(c: Case) -> Iterator[Check]:
    g, weight, dx = c.dense_if_bfloat16(c.g, c.weight, c.make(c.m, c.k))
    du = c.make(c.m, c.r)
    dB = c.sums(c.n, c.r_out)
    starts = [copy64(t) for t in (dx, du, dB)]
    head = (g, weight, c.u, c.F, c.B, c.core, S)
    new = ops.layer_backward_projected_(*head, None, None, None, True, True)
    no_dx, du_sum, no_dB, dG = ops.layer_backward_projected_(*head, du, dx, dB, True, True)
    assert no_dx is None and no_dB is None
    assert untouched(dB)
    operands = (*c.wide(c.g, c.weight, c.u, c.F), *c.folded())
    for results, start, roundings in ((new, [ZERO] * 3, 1), ((dx, du_sum, dB, dG), starts, 2)):
        truths, sizes = both(gradients_of_u, *operands, *start)
        yield "dx", results[0], truths[0], sizes[0], 6
        yield "du", results[1], truths[1], sizes[1], roundings
        for what, *of_factor in zip(("dB", "dG"), results[2:], truths[2:], sizes[2:]):
            yield from rounded(c, what, *of_factor)


def layer_backward_rows_(c: Case) -> Iterator[Check]:
    g, weight, dx = c.dense_if_bfloat16(c.g, c.weight, c.make(c.m, c.k))
    dB = c.sums(c.n, c.r)
    dx_start = copy64(dx)
    dB_start = copy64(dB)
    new = ops.layer_backward_rows_(g, weight, c.u, c.F, None, None, True, True)
    no_dx, dh, no_dB = ops.layer_backward_rows_(g, weight, c.u, c.F, dx, dB, True, True)
    assert no_dx is None and no_dB is None
    assert untouched(dB)
    wide_g, W, u, F = c.wide(c.g, c.weight, c.u, c.F)
    for results, dx0, dB0 in ((new, ZERO, ZERO), ((dx, dh, dB), dx_start, dB_start)):
        yield "dx", results[0], *both(plus_product, dx0, wide_g, W.mT), 6
        yield "dh", results[1], *both(torch.matmul, wide_g, F), 1
        yield "dB", results[2], *both(plus_product, dB0, wide_g.mT, u.mT), 1


def du_and_Q(c: Case, u: Tensor, Q: Tensor, F: Tensor, need_du: bool = True) -> Tensor | None:
    """Adds g^T u to Q; returns du = g F."""
    return ops.layer_backward_rows_(c.g, None, u, F, None, Q, need_du, True)[1]


def backward_sums(c: Case) -> Iterator[Check]:
    """The backwards without the base product, with and without du."""
    g, W, u, F = c.wide(c.g, c.weight, c.u, c.F)
    for need_du in (True, False):
        Q = c.sums(c.n, c.r)
        dB = c.sums(c.n, c.r_out)
        Q_start = copy64(Q)
        dB_start = copy64(dB)
        du = du_and_Q(c, c.u, Q, c.F, need_du)
        head = (c.g, None, c.u, c.F if need_du else None, c.B, c.core, S)
        _, also_du, _, dG = ops.layer_backward_projected_(*head, None, None, dB, True, True)
        assert untouched(Q)
        assert untouched(dB)
        assert (du is None) == (also_du is None) == (not need_du)
        if need_du:
            assert torch.equal(also_du, du)
            yield "du", du, *both(torch.matmul, g, F), 1
        yield "Q", Q, *both(plus_product, Q_start, g.mT, u.mT), 1
        operands = (g, W, u, F, *c.folded(), ZERO, ZERO, dB_start)
        truths, sizes = both(gradients_of_u, *operands)
        yield from rounded(c, "dB", dB, truths[2], sizes[2])
        yield from rounded(c, "dG", dG, truths[3], sizes[3])


def rounded(c: Case, what: str, result: Tensor, truth: Tensor, size: Tensor) -> Iterator[Check]:
    """A sum of operands that were rounded to x's dtype up to four times."""
    assert result.dtype in (c.acc, c.factors)
    exact = result.double()
    yield what, exact.to(c.dtype), truth, size, 5
    is_wide = result.dtype == torch.float32 and c.dtype in HALVES
    if is_wide and result.numel() > 64 and bool(truth.any()):
        assert relative(exact.to(c.dtype), exact) > 0, f"{what} was rounded to {c.dtype}"


def shrink_backward_(c: Case) -> Iterator[Check]:
    dx = c.make(c.m, c.k)
    dA = c.sums(c.k, c.r)
    dx_start = copy64(dx)
    dA_start = copy64(dA)
    new = ops.shrink_backward_(c.u, None, c.x, None, None, c.p, c.seed)
    ops.shrink_backward_(c.u, dx, c.x, c.A, dA, c.p, c.seed)
    assert untouched(dx)
    assert untouched(dA)
    mask = c.mask(c.k)
    du, x, A = c.wide(c.u, c.x, c.A)
    yield "dx", dx, *both(plus_product, dx_start, du, A, mask), 1
    for result, start in ((dA, dA_start), (new, ZERO)):
        yield "dA", result, *both(plus_product, start, (x * mask).mT, du.mT), 1


TABLE: dict[str, Callable[[Case], Iterator[Check]]] = {
    f.__name__: f
    for f in (
        *(shrink, expand_add_, expand, fold, row_core, row_core_backward),
        *(layer_forward, layer_forward_few_tokens, layer_forward_projected, layer_forward_rows),
        *(layer_backward_, layer_backward_few_tokens_, layer_backward_projected_),
        *(layer_backward_rows_, backward_sums, shrink_backward_),
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


@of_kinds
@pytest.mark.parametrize("name", TABLE)
def test_numbers(name: str, dtype: torch.dtype, factors: torch.dtype) -> None:
    """Each shape contiguous and in one other layout, in turn."""
    for i, shape in enumerate(SHAPES):
        for layout in (LAYOUTS[0], LAYOUTS[1 + i % 3]):
            check(name, Case(shape, dtype, factors, layout), f"{shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DROPS)
def test_numbers_with_dropout(name: str, dtype: torch.dtype) -> None:
    for i, p in enumerate((0.1, 0.5, 0.93)):
        for shape in ((1, 1, 1, 1), (13, 67, 35, 5), (120, 130, 131, 16)):
            check(name, Case(shape, dtype, dtype, LAYOUTS[i], p), f"{shape} p = {p}")


# ---- bits, NaN, dropout --------------------------------------------------------------------------


def results(name: str, case: Case) -> list[Tensor]:
    return [result for _, result, *_ in TABLE[name](case)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in TABLE if not n.startswith("layer_")])
def test_same_bits_at_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """Also for odd numbers of tokens, where the last pair has one row.

    The layers' operators contain the library's product, which promises no bits.
    """
    before = torch.get_num_threads()
    for shape in ((1100, 300, 200, 16), (301, 130, 65, 40), (17000, 40, 65, 4)):
        runs = []
        p = 0.4 if name in DROPS and shape[0] < 1000 else 0.0
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(name, Case(shape, dtype, dtype, p=p)))
        torch.set_num_threads(before)
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
        runs.append(results("shrink", c) + results("shrink_backward_", c))
    assert all(map(torch.equal, *runs))
    y = c.g.clone()
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert torch.equal(y[c.mask(c.n) == 0], c.g[c.mask(c.n) == 0])  # not even rounded again


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_column(bad: float, dtype: torch.dtype) -> None:
    """Row 37 is in a tile that is cut short, column 65 past the full steps."""
    c = Case((41, 67, 130, 18), dtype, dtype)
    c.x[37, 65] = bad
    c.u[37, 17] = bad
    c.g[37, 129] = bad
    ones = torch.ones_like(c.u)
    y = torch.ones_like(c.g)
    dA = torch.zeros(c.k, c.r, dtype=c.acc)
    Q = torch.zeros(c.n, c.r, dtype=c.acc)
    ops.expand_add_(y, c.u, c.F)
    ops.shrink_backward_(ones, None, c.x, None, dA)
    du = du_and_Q(c, ones, Q, c.F)
    for result, row in ((ops.shrink(c.x, c.A), 37), (y, 37), (du, 37), (dA, 65), (Q, 129)):
        expected = torch.ones_like(result, dtype=torch.bool)
        expected[row] = False
        assert torch.equal(result.isfinite(), expected)


def test_a_number_equal_to_the_threshold_is_kept() -> None:
    number = int(reference.philox_4x32_10(torch.tensor([0]), 5)[0, 1])  # of element 1
    assert ops.shrink(torch.ones(1, 4), torch.eye(4), number / 2**32, torch.tensor([5]))[0, 1] > 0


@pytest.mark.parametrize("lead", [(4, 5), (20, 1), (2, 0)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    """x [.., k] and g [.., n] as many rows: 3-D, a view of a larger tensor, empty."""
    c = Case((lead[0] * lead[1], 24, 18, 4), torch.float32, torch.float32)
    views = [
        torch.full((*lead, 3, t.shape[1]), float("nan"))[:, :, 1].copy_(t.view(*lead, t.shape[1]))
        for t in (c.x, c.g)
    ]
    rows = [t.view(*lead, t.shape[1]) for t in (c.x, c.g)]
    for (x, g), strategy in itertools.product((rows, views), (0, BETA)):
        head = (c.weight, c.bias, c.A, c.B, c.core, S, strategy)
        y, u, F = ops.layer_forward(x, *head)
        flat_y, flat_u, _ = ops.layer_forward(c.x, *head)
        assert torch.equal(u, flat_u)
        few, _ = ops.layer_forward_few_tokens(x, *head)
        tail = (c.B, c.core, S, strategy, None, None, True, True)
        flat_dx, *flat_gradients = ops.layer_backward_(c.g, c.weight, c.x, u, c.A, F, *tail)
        flat = (flat_y.view(y.shape), flat_dx.view(x.shape), *flat_gradients)
        dx, *gradients = ops.layer_backward_(g, c.weight, x, u, c.A, F, *tail)
        assert worst((y, dx, *gradients), flat) < 1e-5
        dx, *gradients = ops.layer_backward_few_tokens_(g, c.weight, x, u, c.A, *tail)
        assert worst((few, dx, *gradients), flat) < 1e-5


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    c = Case((7, 24, 17, 4), torch.float32, torch.float32)
    for run, folded in ((ops.layer_backward_, (c.F,)), (ops.layer_backward_few_tokens_, ())):
        tail = (c.u, c.A, *folded, c.B, c.core, S, 0, None, None)
        full = run(c.g, c.weight, c.x, *tail, True, True)
        for need in itertools.product((False, True), repeat=4):
            weight = c.weight if need[0] else None
            x = c.x if need[1] else None
            part = run(c.g, weight, x, *tail, *need[2:])
            expected = [gradient if needed else None for gradient, needed in zip(full, need)]
            assert worst(part, expected) == 0


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


def test_a_view_past_the_end_of_its_storage_is_refused() -> None:
    """The storage has as many bytes as the view, but the view does not start at its beginning."""
    x = torch.randn(20)[10:].view(2, 5)
    x.untyped_storage().resize_(15 * x.element_size())
    with pytest.raises(RuntimeError, match="x: expected a tensor with memory"):
        ops.shrink(x, torch.randn(5, 3))


@pytest.mark.parametrize("wide", ["A", "B", "core"])
def test_new_gradients_of_factors_with_two_dtypes(wide: str) -> None:
    """They have the dtype of sums: a factor in float32 gets a gradient that was not rounded."""
    c = Case((40, 24, 17, 4), torch.bfloat16, torch.bfloat16)
    factors = {"A": c.A, "B": c.B, "core": c.core}
    factors[wide] = factors[wide].float()
    A, *further = factors.values()
    head = (*c.dense_if_bfloat16(c.g, c.weight, c.x), c.u, A)
    tail = (*further, S, 0, None, None, True, True)
    few = ops.layer_backward_few_tokens_(*head, *tail)
    folded = ops.layer_backward_(*head, c.F, *tail)
    for gradient in (*few[1:], *folded[1:]):
        assert gradient.dtype == torch.float32
        assert relative(gradient.bfloat16(), gradient) > 0
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, (*head, c.F, *tail))
        assert layouts(ops.layer_backward_(*fakes)) == layouts(folded)


# ---- as torch sees them --------------------------------------------------------------------------


def layouts(results: object) -> list[object]:
    results = results if isinstance(results, tuple) else (results,)
    return [None if t is None else (t.shape, t.dtype, t.stride()) for t in results]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_without_values(name: str, dtype: torch.dtype) -> None:
    """The fake kernels, by which torch.compile works, have the results' shapes, dtypes, strides."""
    for inputs in arguments(name, dtype):
        real = operator(name)(*inputs)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in inputs]
            assert layouts(real) == layouts(operator(name)(*fakes))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "linear"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Not of `linear`, which compilers take apart. Decompositions round in several steps."""
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for inputs in arguments(name, dtype):
        opcheck(operator(name), inputs, **tolerance)


def test_expand_add_bumps_the_version_counter() -> None:
    """Else a backward that saved y before would silently use the new values."""
    y, u, F, *_ = arguments("expand_add_")[0]
    before = y._version
    ops.expand_add_(y, u, F)
    assert y._version == before + 1


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
        return
    options = "-q -x -n 0 -p no:cacheprovider -k numbers"
    command = [sys.executable, "-m", "pytest", *options.split(), __file__]
    environment = {**os.environ, "LOTR_CPU_ISA": isa}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "(what this CPU runs), got " in run.stdout + run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]
