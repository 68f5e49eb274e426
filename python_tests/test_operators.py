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
        self.A = self.factor(self.k, self.r)
        self.F = self.factor(self.n, self.r)
        self.B = self.factor(self.n, self.r_out)
        self.cores = self.factor(2, self.r, self.r_out)

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

    def mask(self, columns: int) -> Tensor:
        """The dropout mask [m, columns] in float64."""
        return reference.dropout_mask(self.m, columns, self.p, SEED)

    def dense_if_bfloat16(self, *tensors: Tensor) -> list[Tensor]:
        """Operands of the library's product.

        On a CPU with AMX, torch 2.13 multiplies what is between bfloat16 rows as well.
        """
        return [t.contiguous() if self.dtype == torch.bfloat16 else t for t in tensors]


# ---- the table -----------------------------------------------------------------------------------


def shrink(c: Case) -> Iterator[Check]:
    x, A = c.wide(c.x, c.A)
    x = x * c.mask(c.k)
    yield "u", ops.shrink(c.x, c.A, c.p, c.seed), x @ A, x.abs() @ A.abs(), 1


def expand_add_(c: Case) -> Iterator[Check]:
    y = laid_out(c.g, c.layout)
    before = copy64(c.g)
    u, F = c.wide(c.u, c.F)
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert untouched(y)
    mask = c.mask(c.n)
    yield "y", y, before + mask * (u @ F.T), before.abs() + mask * (u.abs() @ F.abs().T), 1


def expand(c: Case) -> Iterator[Check]:
    y, u, F = c.wide(c.g, c.u, c.F)
    yield "y", ops.expand(c.g, c.u, c.F), y + u @ F.T, y.abs() + u.abs() @ F.abs().T, 1


def fold(c: Case) -> Iterator[Check]:
    B = c.B.double()  # multiplied before they are rounded
    core = c.cores[0].double()
    yield "F", ops.fold(c.B, c.cores[0], S, c.dtype), S * B @ core.T, S * B.abs() @ core.abs().T, 1


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


def row_core(c: Case) -> Iterator[Check]:
    u, cores = c.wide(c.u, c.cores)
    for choice, index, tokens in rows_of(c):
        h = ops.row_core(c.u, c.cores, *choice, S)
        h_of_fallback = fallback.row_core(c.u, c.cores, S, RowChoice(*choice))
        core_rows = cores[index.clamp(min=0)] * (index >= 0).double()[:, None, None]
        u_rows = u[tokens].unsqueeze(1)
        truth = (S * u_rows @ core_rows).squeeze(1)
        size = (S * u_rows.abs() @ core_rows.abs()).squeeze(1)
        yield "h", h, truth, size, 1
        yield "h of the fallback", h_of_fallback, truth, size, 1


def row_core_backward(c: Case) -> Iterator[Check]:
    dh = c.make(c.m, c.r_out)
    u, cores, g = c.wide(c.u, c.cores, dh)
    for choice, index, tokens in rows_of(c):
        du, dcores = ops.row_core_backward(dh, c.u, c.cores, *choice, S, True, True)
        du_truth, dcores_truth = row_gradients(u, cores, g, index, tokens)
        du_size, dcores_size = row_gradients(u.abs(), cores.abs(), g.abs(), index, tokens)
        yield "du", du, du_truth, du_size, 1
        yield "dG", dcores, dcores_truth, dcores_size, 1


def row_gradients(u: Tensor, cores: Tensor, g: Tensor, index: Tensor, tokens: Tensor):
    """(du, dcores) of h_i = S u_t(i) G_c(i)."""
    du = torch.zeros_like(u)
    dcores = torch.zeros_like(cores)
    for core in range(2):
        rows = (index == core).nonzero().squeeze(1)
        du.index_add_(0, tokens[rows], S * g[rows] @ cores[core].T)
        dcores[core] = S * u[tokens[rows]].T @ g[rows]
    return du, dcores


class Layer:
    """The operands of a layer's operators, with what they mean in float64."""

    def __init__(self, c: Case):
        self.core = c.cores[0]
        self.bias = c.make(1, c.n)[0]
        self.x, self.g, self.weight = c.dense_if_bfloat16(c.x, c.g, c.make(c.n, c.k))
        self.wide_x, self.wide_g, self.W, self.A, self.u, self.wide_bias = c.wide(
            self.x, self.g, self.weight, c.A, c.u, self.bias
        )
        self.kept = self.wide_x * c.mask(c.k)
        self.new_u = self.kept @ self.A
        self.new_u_size = self.kept.abs() @ self.A.abs()
        self.B = c.B.double()
        self.G = self.core.double()
        self.F = S * self.B @ self.G.T
        self.F_size = S * self.B.abs() @ self.G.abs().T
        self.Q = self.wide_g.T @ self.u
        self.Q_size = self.wide_g.abs().T @ self.u.abs()

    def y(self, u: Tensor, u_size: Tensor, F: Tensor, F_size: Tensor, bias: Tensor | None):
        """(y, its size) of x W^T + bias + u F^T."""
        y = self.wide_x @ self.W.T + u @ F.T
        size = self.wide_x.abs() @ self.W.abs().T + u_size @ F_size.T
        if bias is None:
            return y, size
        return y + self.wide_bias, size + self.wide_bias.abs()

    def dx(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """(dx, its size) of start + g W."""
        return start + self.wide_g @ self.W, start.abs() + self.wide_g.abs() @ self.W.abs()


def layer_forward(c: Case) -> Iterator[Check]:
    t = Layer(c)
    for strategy, bias in itertools.product((0, BETA), (t.bias, None)):
        y, u, F = ops.layer_forward(t.x, t.weight, bias, c.A, c.B, t.core, S, strategy, c.p, c.seed)
        # u, F, the base product, the factors and y itself are rounded
        yield f"y {strategy}", y, *t.y(t.new_u, t.new_u_size, t.F, t.F_size, bias), 5
        yield f"u {strategy}", u, t.new_u, t.new_u_size, 1
        yield f"F {strategy}", F, t.F, t.F_size, 1
        again, again_F = ops.layer_forward_projected(
            t.x, t.weight, bias, u, c.B, t.core, S, strategy
        )
        assert torch.equal(again, y)
        assert torch.equal(again_F, F)
        assert torch.equal(ops.layer_forward_rows(t.x, t.weight, bias, u, F, strategy), y)


def layer_forward_few_tokens(c: Case) -> Iterator[Check]:
    t = Layer(c)
    for strategy, bias in itertools.product((0, BETA), (t.bias, None)):
        y, u = ops.layer_forward_few_tokens(t.x, t.weight, bias, c.A, c.B, t.core, S, strategy)
        yield f"y {strategy}", y, *t.y(t.new_u, t.new_u_size, t.F, t.F_size, bias), 5
        yield f"u {strategy}", u, t.new_u, t.new_u_size, 1


def layer_forward_projected(c: Case) -> Iterator[Check]:
    t = Layer(c)
    for strategy, bias in itertools.product((0, BETA), (t.bias, None)):
        y, F = ops.layer_forward_projected(t.x, t.weight, bias, c.u, c.B, t.core, S, strategy)
        yield f"y {strategy}", y, *t.y(t.u, t.u.abs(), t.F, t.F_size, bias), 5
        yield f"F {strategy}", F, t.F, t.F_size, 1


def layer_forward_rows(c: Case) -> Iterator[Check]:
    t = Layer(c)
    (B,) = c.wide(c.F)
    for strategy, bias in itertools.product((0, BETA), (t.bias, None)):
        y = ops.layer_forward_rows(t.x, t.weight, bias, c.u, c.F, strategy)
        yield f"y {strategy}", y, *t.y(t.u, t.u.abs(), B, B.abs(), bias), 5


def layer_backward_(c: Case) -> Iterator[Check]:
    F = Layer(c).F.to(c.dtype)
    yield from layer_gradients(c, ops.layer_backward_, (F,), (c.p, c.seed))


def layer_backward_few_tokens_(c: Case) -> Iterator[Check]:
    yield from layer_gradients(c, ops.layer_backward_few_tokens_, (), ())


def layer_gradients(
    c: Case, run: Callable, folded: tuple[Tensor, ...], dropout: tuple
) -> Iterator[Check]:
    """The gradients of a backward that starts at x, new and added to sums."""
    t = Layer(c)
    mask = c.mask(c.k)
    du = t.wide_g @ t.F
    du_size = t.wide_g.abs() @ t.F_size
    dA = t.kept.T @ du
    dA_size = t.kept.abs().T @ du_size
    dB = S * t.Q @ t.G
    dB_size = S * t.Q_size @ t.G.abs()
    dG = S * t.Q.T @ t.B
    dG_size = S * t.Q_size.T @ t.B.abs()
    zero = torch.zeros((), dtype=torch.float64)
    for strategy in (0, BETA):
        head = (t.g, t.weight, t.x, c.u, c.A, *folded, c.B, t.core, S, strategy)
        new = run(*head, None, None, True, True, *dropout)
        sums = (c.sums(c.k, c.r), c.sums(c.n, c.r_out))
        before = [copy64(total) for total in sums]
        added = run(*head, *sums, True, True, *dropout)
        assert [gradient is None for gradient in added] == [False, True, True, False]
        assert all(map(untouched, sums))
        dx, dx_size = t.dx(zero)
        dx = dx + mask * (du @ t.A.T)
        dx_size = dx_size + mask * (du_size @ t.A.abs().T)
        for result in (new, added):
            yield f"dx {strategy}", result[0], dx, dx_size, 6
            yield from rounded(c, f"dG {strategy}", result[3], dG, dG_size)
        for results, (dA0, dB0) in ((new[1:3], (zero, zero)), (sums, before)):
            dA_result, dB_result = results
            yield from rounded(c, f"dA {strategy}", dA_result, dA0 + dA, dA0.abs() + dA_size)
            yield from rounded(c, f"dB {strategy}", dB_result, dB0 + dB, dB0.abs() + dB_size)


def layer_backward_projected_(c: Case) -> Iterator[Check]:
    t = Layer(c)
    (F,) = c.wide(c.F)
    dB = S * t.Q @ t.G
    dB_size = S * t.Q_size @ t.G.abs()
    zero = torch.zeros((), dtype=torch.float64)
    new = ops.layer_backward_projected_(
        t.g, t.weight, c.u, c.F, c.B, t.core, S, None, None, None, True, True
    )
    du_before = c.make(c.m, c.r)
    dx_total = c.dense_if_bfloat16(c.make(c.m, c.k))[0]
    dB_total = c.sums(c.n, c.r_out)
    dx_before = copy64(dx_total)
    dB_before = copy64(dB_total)
    added = ops.layer_backward_projected_(
        t.g, t.weight, c.u, c.F, c.B, t.core, S, du_before, dx_total, dB_total, True, True
    )
    assert [gradient is None for gradient in added] == [True, False, True, False]
    assert untouched(dB_total)
    for result, dx, dB_result, du0, dx0, dB0 in (
        (new, new[0], new[2], zero, zero, zero),
        (added, dx_total, dB_total, copy64(du_before), dx_before, dB_before),
    ):
        yield "dx", dx, *t.dx(dx0), 6
        du_size = du0.abs() + t.wide_g.abs() @ F.abs()
        yield "du", result[1], du0 + t.wide_g @ F, du_size, 1 if du0 is zero else 2
        yield from rounded(c, "dB", dB_result, dB0 + dB, dB0.abs() + dB_size)
        yield from rounded(c, "dG", result[3], S * t.Q.T @ t.B, S * t.Q_size.T @ t.B.abs())


def layer_backward_rows_(c: Case) -> Iterator[Check]:
    t = Layer(c)
    (B,) = c.wide(c.F)
    zero = torch.zeros((), dtype=torch.float64)
    new = ops.layer_backward_rows_(t.g, t.weight, c.u, c.F, None, None, True, True)
    dx_total = c.dense_if_bfloat16(c.make(c.m, c.k))[0]
    dB_total = c.sums(c.n, c.r)
    dx_before = copy64(dx_total)
    dB_before = copy64(dB_total)
    added = ops.layer_backward_rows_(t.g, t.weight, c.u, c.F, dx_total, dB_total, True, True)
    assert [gradient is None for gradient in added] == [True, False, True]
    assert untouched(dB_total)
    for dx, dh, dB, dx0, dB0 in (
        (*new, zero, zero),
        (dx_total, added[1], dB_total, dx_before, dB_before),
    ):
        yield "dx", dx, *t.dx(dx0), 6
        yield "dh", dh, t.wide_g @ B, t.wide_g.abs() @ B.abs(), 1
        yield "dB", dB, dB0 + t.Q, dB0.abs() + t.Q_size, 1


def du_and_Q(c: Case, u: Tensor, Q: Tensor, F: Tensor, need_du: bool = True) -> Tensor | None:
    """Adds g^T u to Q; returns du = g F."""
    return ops.layer_backward_rows_(c.g, None, u, F, None, Q, need_du, True)[1]


def backward_sums(c: Case) -> Iterator[Check]:
    """The backwards without the base product, with and without du."""
    g, u, F_wide = c.wide(c.g, c.u, c.F)
    B = c.B.double()
    core = c.cores[0]
    G = core.double()
    sums = g.T @ u
    sizes = g.abs().T @ u.abs()
    for need_du in (True, False):
        Q = c.sums(c.n, c.r)
        dB = c.sums(c.n, c.r_out)
        before_Q = copy64(Q)
        before_dB = copy64(dB)
        du = du_and_Q(c, c.u, Q, c.F, need_du)
        F = c.F if need_du else None
        _, also_du, _, dG = ops.layer_backward_projected_(
            c.g, None, c.u, F, c.B, core, S, None, None, dB, True, True
        )
        assert untouched(Q)
        assert untouched(dB)
        assert (du is None) == (also_du is None) == (not need_du)
        if need_du:
            yield "du", du, g @ F_wide, g.abs() @ F_wide.abs(), 1
            assert torch.equal(also_du, du)
        yield "Q", Q, before_Q + sums, before_Q.abs() + sizes, 1
        yield from rounded(
            c, "dB", dB, before_dB + S * sums @ G, before_dB.abs() + S * sizes @ G.abs()
        )
        yield from rounded(c, "dG", dG, S * sums.T @ B, S * sizes.T @ B.abs())


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
    dx_before = copy64(dx)
    dA_before = copy64(dA)
    mask = c.mask(c.k)
    du, x, A = c.wide(c.u, c.x, c.A)
    new = ops.shrink_backward_(c.u, None, c.x, None, None, c.p, c.seed)
    ops.shrink_backward_(c.u, dx, c.x, c.A, dA, c.p, c.seed)
    assert untouched(dx)
    assert untouched(dA)
    product = mask * (du @ A.T)
    size = mask * (du.abs() @ A.abs().T)
    yield "dx", dx, dx_before + product, dx_before.abs() + size, 1
    kept = x * mask
    for result, start in ((dA, dA_before), (new, torch.zeros_like(dA_before))):
        yield "dA", result, start + kept.T @ du, start.abs() + kept.abs().T @ du.abs(), 1


def dropout_mask(c: Case) -> Iterator[Check]:
    mask = c.mask(c.k)
    yield "mask", ops.dropout_mask(c.m, c.k, c.p, torch.tensor([SEED]), c.dtype), mask, mask, 1


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
    c = Case((13, 67, 35, 5), dtype, dtype, p=0.5)
    mask = c.mask(c.k) > 0
    x = c.x.masked_fill(~mask, 0)
    c.x.masked_fill_(~mask, float("nan"))
    sums = [torch.zeros(c.k, c.r, dtype=c.acc) for _ in range(2)]
    for dA, operand in zip(sums, (c.x, x)):
        ops.shrink_backward_(c.u, None, operand, None, dA, c.p, c.seed)
    assert torch.equal(*sums)
    assert torch.equal(ops.shrink(c.x, c.A, c.p, c.seed), ops.shrink(x, c.A, c.p, c.seed))
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
    m = lead[0] * lead[1]
    c = Case((m, 24, 18, 4), torch.float32, torch.float32)
    weight = c.make(c.n, c.k)
    core = c.cores[0]
    bias = c.make(1, c.n)[0]
    views = [
        torch.full((*lead, 3, t.shape[1]), float("nan"))[:, :, 1].copy_(t.view(*lead, t.shape[1]))
        for t in (c.x, c.g)
    ]
    for x, g in ((c.x.view(*lead, c.k), c.g.view(*lead, c.n)), views):
        for strategy in (0, BETA):
            y, u, F = ops.layer_forward(x, weight, bias, c.A, c.B, core, S, strategy)
            flat_y, flat_u, _ = ops.layer_forward(c.x, weight, bias, c.A, c.B, core, S, strategy)
            assert relative(y, flat_y.view(y.shape)) < 1e-6
            assert torch.equal(u, flat_u)
            few, _ = ops.layer_forward_few_tokens(x, weight, bias, c.A, c.B, core, S, strategy)
            assert relative(few, flat_y.view(y.shape)) < 1e-5
            tail = (c.B, core, S, strategy, None, None, True, True)
            expected = ops.layer_backward_(c.g, weight, c.x, u, c.A, F, *tail)
            for gradients in (
                ops.layer_backward_(g, weight, x, u, c.A, F, *tail),
                ops.layer_backward_few_tokens_(g, weight, x, u, c.A, *tail),
            ):
                assert gradients[0].shape == x.shape
                assert relative(gradients[0].reshape(m, c.k), expected[0]) < 1e-5
                assert worst(gradients[1:], expected[1:]) < 1e-5


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    c = Case((7, 24, 17, 4), torch.float32, torch.float32)
    weight = c.make(c.n, c.k)
    core = c.cores[0]
    for run, folded in ((ops.layer_backward_, (c.F,)), (ops.layer_backward_few_tokens_, ())):
        tail = (c.u, c.A, *folded, c.B, core, S, 0, None, None)
        full = run(c.g, weight, c.x, *tail, True, True)
        for need in itertools.product((False, True), repeat=4):
            need_x, need_A, need_B, need_core = need
            weight_or_none = weight if need_x else None
            part = run(c.g, weight_or_none, c.x if need_A else None, *tail, need_B, need_core)
            assert tuple(gradient is not None for gradient in part) == need
            for gradient, expected in zip(part, full):
                assert gradient is None or torch.equal(gradient, expected)


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
    filled = partial(torch.full, dtype=torch.float16)
    x = filled((5, 7), 1.0)
    A = filled((7, 3), 1 / 7)
    core = filled((3, 3), 8.0 * sign)
    B = filled((9, 3), 0.001)
    weight = filled((9, 7), 0.5)
    g = filled((5, 9), 0.001)
    y, u = ops.layer_forward_few_tokens(x, weight, None, A, B, core, scaling, BETA)
    gradients = ops.layer_backward_few_tokens_(
        g, weight, x, u, A, B, core, scaling, BETA, None, None, True, True
    )
    wide = [t.double() for t in (x, weight, A, B, core)]
    truth = reference.forward(wide[0], wide[1], None, *wide[2:], scaling)
    expected = reference.backward(g.double(), *wide, scaling)
    assert relative(y, truth) < 5e-3
    assert worst(gradients, (expected.dx, expected.dA, expected.dB, expected.dcore)) < 5e-3


def test_permuted_tokens_of_one_core() -> None:
    """The first and the last row are in their places, the others are not."""
    u = torch.randn(9, 3)
    cores = torch.randn(1, 3, 4)
    index = torch.zeros(9, dtype=torch.int64)
    tokens = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3, 8])
    h = ops.row_core(u, cores, index, None, tokens, S)
    assert relative(h, S * u[tokens].double() @ cores[0].double()) < 1e-6
    dh = torch.randn(9, 4)
    du, dcores = ops.row_core_backward(dh, u, cores, index, None, tokens, S, True, True)
    du_rows = S * dh.double() @ cores[0].double().T
    assert relative(du, torch.zeros(9, 3).double().index_add_(0, tokens, du_rows)) < 1e-6
    assert relative(dcores[0], S * u[tokens].double().T @ dh.double()) < 1e-6


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
    factors = {"A": c.A, "B": c.B, "core": c.cores[0]}
    factors[wide] = factors[wide].float()
    t = Layer(c)
    tail = (*factors.values(), S, 0, None, None, True, True)
    few = ops.layer_backward_few_tokens_(t.g, t.weight, t.x, c.u, *tail)
    tail = (factors["A"], c.F, factors["B"], factors["core"], S, 0, None, None, True, True)
    folded = ops.layer_backward_(t.g, t.weight, t.x, c.u, *tail)
    for gradients in (few, folded):
        assert [gradient.dtype for gradient in gradients[1:]] == [torch.float32] * 3
        for gradient in gradients[1:]:
            assert relative(gradient.bfloat16(), gradient) > 0
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, (t.g, t.weight, t.x, c.u, *tail))
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


def test_a_gpu_on_which_the_first_layer_is_wrong_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers then run the PyTorch fallback. That must not happen in silence."""
    build = {"cuda": {"built": True, "archs": ["90a"]}}
    monkeypatch.setattr(kernel_support, "build_info", lambda: build)
    monkeypatch.setattr(kernel_support, "trial_obstacle", lambda device: "got 135.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_device = kernel_support.cuda_obstacle.__wrapped__  # without its cache
    with pytest.warns(UserWarning, match=r"fallback.*got 135\.0"):
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
    for gradient, truth in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, truth, atol=1e-12)


def test_philox_known_answers() -> None:
    """Random123's published vector for philox4x32-10 of zeros."""
    words = reference.philox_4x32_10(torch.tensor([0]), 0)
    assert [hex(w) for w in words[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


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
