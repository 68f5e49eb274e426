"""OPERATORS: every operator with numbers x dtype x shape x layout against float64, NaN beside each operand.

A check is (what, result, truth, size, rounded) as `helpers.within` takes them. Each entry of OPERATORS makes the checks of one
operator for one Case. LOTR_CPU_ISA chooses the instruction set; `test_lower_instruction_sets` runs the table with each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    BETA,
    DTYPES,
    HALVES,
    LAYOUTS,
    OPERATORS,
    UNFOLDED,
    arguments,
    copy64,
    laid_out,
    new_memory_is_nan,
    operator,
    relative,
    sums_dtype,
    untouched,
    within,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from lotr_ext import reference
from lotr_ext.core.kernel_support import failed_call

ops = torch.ops.lotr
Check = tuple[str, Tensor, Tensor, Tensor, float]
S = 0.37
SEED = -(2**61) + 12345678901
# M, K, N, r_in: whole blocks of each kernel, their remainders, panels cut short; r_out is r_in + 1, up to 256
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
    """Operands of one shape, dtype and layout, near 1 in size; w: the same in float64, factors rounded to x's dtype."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        factors: torch.dtype,
        layout: str = "contiguous",
        p: float = 0.0,
    ):
        self.m, self.k, self.n, self.r = shape
        self.r_out, self.dtype, self.factors, self.layout, self.acc = (
            self.r + 1,
            dtype,
            factors,
            layout,
            sums_dtype(dtype),
        )
        self.p, self.seed = p, torch.tensor([SEED]) if p else None
        self.generator = torch.Generator().manual_seed(sum(shape))
        self.x, self.g, self.u = (
            self.make(self.m, self.k),
            self.make(self.m, self.n),
            self.make(self.m, self.r),
        )
        self.A, self.F = self.factor(self.k, self.r), self.factor(self.n, self.r)
        self.B, self.cores = self.factor(self.n, self.r_out), self.factor(2, self.r, self.r_out)

    def make(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        values = (
            torch.randn(*size, generator=self.generator, dtype=torch.float64) / size[-1] ** 0.25
        )
        return laid_out(values.to(dtype or self.dtype), self.layout)

    def factor(self, *size: int) -> Tensor:
        return self.make(*size, dtype=self.factors)

    def sums(self, *size: int) -> Tensor:
        return self.make(*size, dtype=self.acc)

    def w(self, *tensors: Tensor) -> list[Tensor]:
        """In float64, as the products see them: factors rounded to x's dtype."""
        return [copy64(t.to(self.dtype) if t.dtype == self.factors else t) for t in tensors]

    def mask(self, columns: int) -> Tensor:
        """The dropout mask [m, columns] in float64."""
        return reference.dropout_mask(self.m, columns, self.p, SEED)

    def dense_if_bfloat16(self, *tensors: Tensor) -> list[Tensor]:
        """For the library's product: on a CPU with AMX torch 2.13 takes what lies between bfloat16 rows into it."""
        return [t.contiguous() if self.dtype == torch.bfloat16 else t for t in tensors]


# ---- the table -------------------------------------------------------------------------------------------------------


def shrink(c: Case) -> Iterator[Check]:
    x, A = c.w(c.x, c.A)
    x = x * c.mask(c.k)
    yield "u", ops.shrink(c.x, c.A, c.p, c.seed), x @ A, x.abs() @ A.abs(), 1


def expand_add_(c: Case) -> Iterator[Check]:
    y, before, (u, F) = laid_out(c.g, c.layout), copy64(c.g), c.w(c.u, c.F)
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert untouched(y)
    mask = c.mask(c.n)
    yield "y", y, before + mask * (u @ F.T), before.abs() + mask * (u.abs() @ F.abs().T), 1


def expand(c: Case) -> Iterator[Check]:
    y, u, F = c.w(c.g, c.u, c.F)
    yield "y", ops.expand(c.g, c.u, c.F), y + u @ F.T, y.abs() + u.abs() @ F.abs().T, 1


def fold(c: Case) -> Iterator[Check]:
    B, core = c.B.double(), c.cores[0].double()  # multiplied before they are rounded
    yield "F", ops.fold(c.B, c.cores[0], S, c.dtype), S * B @ core.T, S * B.abs() @ core.abs().T, 1


def rows_of(c: Case) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """(index, offs, tokens), and what they mean: each row's core and token."""
    rows = torch.arange(c.m)
    index, tokens = (rows * 5 + 1) % 4 % 3 - 1, (rows * 7 + 3) % max(c.m, 1) // 2
    yield (index, None, tokens), index, tokens
    yield (index, None, None), index, rows
    offs = torch.tensor([c.m // 3, c.m - c.m // 4], dtype=torch.int32)
    of_offs = torch.where(rows < offs[0], 0, torch.where(rows < offs[1], 1, -1))
    yield (None, offs, tokens), of_offs, tokens


def row_core(c: Case) -> Iterator[Check]:
    u, cores = c.w(c.u, c.cores)
    for which, index, tokens in rows_of(c):
        h = ops.row_core(c.u, c.cores, *which, S)
        own, chosen = (index >= 0).double()[:, None, None], cores[index.clamp(min=0)]
        rows = u[tokens].unsqueeze(1)
        yield (
            "h",
            h,
            (S * rows @ chosen * own).squeeze(1),
            (S * rows.abs() @ chosen.abs() * own).squeeze(1),
            1,
        )


def row_core_backward(c: Case) -> Iterator[Check]:
    dh = c.make(c.m, c.r_out)
    u, cores, g = c.w(c.u, c.cores, dh)
    for which, index, tokens in rows_of(c):
        du, dcores = ops.row_core_backward(dh, c.u, c.cores, *which, S, True, True)
        sums = [torch.zeros(t.shape, dtype=torch.float64) for t in (u, u, cores, cores)]
        for core in range(2):
            own = (index == core).nonzero().squeeze(1)
            rows, at = g[own], tokens[own]
            for i, (a, b, d) in enumerate(
                ((u[at], cores[core], rows), (u[at].abs(), cores[core].abs(), rows.abs()))
            ):
                sums[i].index_add_(0, at, S * d @ b.T)
                sums[2 + i][core] = S * a.T @ d
        yield "du", du, sums[0], sums[1], 1
        yield "dG", dcores, sums[2], sums[3], 1


def layer_forward(c: Case) -> Iterator[Check]:
    weight, core, bias = c.make(c.n, c.k), c.cores[0], c.make(1, c.n)[0]
    x, weight = c.dense_if_bfloat16(c.x, weight)
    wide_x, W, A, b = c.w(x, weight, c.A, bias)
    kept, B, G = wide_x * c.mask(c.k), c.B.double(), core.double()
    u_size, F, F_size = kept.abs() @ A.abs(), S * B @ G.T, S * B.abs() @ G.abs().T
    for strategy in (0, BETA) if c.p else (0, BETA, UNFOLDED, UNFOLDED + BETA):
        for given_bias in (bias, None):
            y, u, made = ops.layer_forward(
                x, weight, given_bias, c.A, c.B, core, S, strategy, None, None, c.p, c.seed
            )
            assert (made is None) == (strategy >= UNFOLDED)
            size = wide_x.abs() @ W.abs().T + u_size @ F_size.T
            truth = wide_x @ W.T + kept @ A @ F.T
            if given_bias is not None:
                truth, size = truth + b, size + b.abs()
            yield (
                f"y {strategy}",
                y,
                truth,
                size,
                5,
            )  # u, F or h, the base product, the factors and y itself are rounded
            yield f"u {strategy}", u, kept @ A, u_size, 1
            if made is not None:
                yield f"F {strategy}", made, F, F_size, 1
                again = ops.layer_forward(
                    x, weight, given_bias, None, c.B, core, S, strategy, u, made, 0.0, None
                )
                assert torch.equal(again[0], y) and again[1] is None and again[2] is None


def layer_backward_(c: Case) -> Iterator[Check]:
    weight, core = c.make(c.n, c.k), c.cores[0]
    g, x, weight = c.dense_if_bfloat16(c.g, c.x, weight)
    wide_g, wide_x, W, A, u = c.w(g, x, weight, c.A, c.u)
    B, G, mask = c.B.double(), core.double(), c.mask(c.k)
    kept, F, F_size = wide_x * mask, S * B @ G.T, S * B.abs() @ G.abs().T
    k, k_size, Q, Q_size = wide_g @ F, wide_g.abs() @ F_size, wide_g.T @ u, wide_g.abs().T @ u.abs()
    for strategy in (0, BETA) if c.p else (0, BETA, UNFOLDED, UNFOLDED + BETA):
        made = None if strategy >= UNFOLDED else F.to(c.dtype)
        head = (g, weight, x, c.u, c.A, made, c.B, core, S, strategy)
        fresh = ops.layer_backward_(*head, None, None, None, None, None, True, True, c.p, c.seed)
        assert fresh[1] is None
        sums = c.sums(c.k, c.r), c.sums(c.n, c.r_out)
        own_k = None if made is None else c.make(c.m, c.r)
        own_dx = None if made is None else c.dense_if_bfloat16(c.make(c.m, c.k))[0]
        before = [
            torch.zeros((), dtype=torch.float64) if t is None else copy64(t)
            for t in (own_k, own_dx, *sums)
        ]
        added = ops.layer_backward_(*head, own_k, own_dx, None, *sums, True, True, c.p, c.seed)
        assert [t is None for t in added] == [made is not None, True, True, True, False] and all(
            map(untouched, sums)
        )
        added_dx = added[0] if made is None else own_dx
        start = [torch.zeros((), dtype=torch.float64)] * 4
        for (k0, dx0, dA0, dB0), (dx, dA, dB) in (
            (start, (fresh[0], *fresh[2:4])),
            (before, (added_dx, *sums)),
        ):
            all_k, size = k + k0, k_size + k0.abs()
            dx_size = dx0.abs() + wide_g.abs() @ W.abs() + mask * (size @ A.abs().T)
            yield f"dx {strategy}", dx, dx0 + wide_g @ W + mask * (all_k @ A.T), dx_size, 6
            yield from rounded(
                c, f"dA {strategy}", dA, dA0 + kept.T @ all_k, dA0.abs() + kept.abs().T @ size
            )
            yield from rounded(
                c, f"dB {strategy}", dB, dB0 + S * Q @ G, dB0.abs() + S * Q_size @ G.abs()
            )
        yield from rounded(c, f"dG {strategy}", fresh[4], S * Q.T @ B, S * Q_size.T @ B.abs())


def k_and_Q(c: Case, u: Tensor, Q: Tensor, F: Tensor | None) -> Tensor | None:
    """Adds g^T u to Q; returns k = g F."""
    return ops.layer_backward_(
        c.g,
        None,
        None,
        u,
        None,
        F,
        c.B,
        c.cores[0],
        S,
        0,
        None,
        None,
        Q,
        *(None,) * 2,
        False,
        False,
    )[1]


def backward_sums(c: Case) -> Iterator[Check]:
    """layer_backward_ without the base product, with and without k."""
    g, u, F_wide = c.w(c.g, c.u, c.F)
    B, G, sums, sizes = c.B.double(), c.cores[0].double(), g.T @ u, g.abs().T @ u.abs()
    for F in (c.F, None):
        Q, dB = c.sums(c.n, c.r), c.sums(c.n, c.r_out)
        before_Q, before_dB, k = copy64(Q), copy64(dB), k_and_Q(c, c.u, Q, F)
        head, none = (c.g, None, None, c.u, None, F, c.B, c.cores[0], S, 0), (None,) * 4
        dG = ops.layer_backward_(*head, *none, dB, True, True)[4]
        assert untouched(Q) and untouched(dB) and (k is None) == (F is None)
        if k is not None:
            yield "k", k, g @ F_wide, g.abs() @ F_wide.abs(), 1
        yield "Q", Q, before_Q + sums, before_Q.abs() + sizes, 1
        yield from rounded(
            c, "dB", dB, before_dB + S * sums @ G, before_dB.abs() + S * sizes @ G.abs()
        )
        yield from rounded(c, "dG", dG, S * sums.T @ B, S * sizes.T @ B.abs())


def rounded(c: Case, what: str, got: Tensor, truth: Tensor, size: Tensor) -> Iterator[Check]:
    """A sum in got's dtype of operands that were rounded to x's dtype up to four times."""
    assert got.dtype in (c.acc, c.factors)
    exact = got.double()
    yield what, exact.to(c.dtype), truth, size, 5
    if got.dtype == torch.float32 and c.dtype in HALVES and got.numel() > 64 and bool(truth.any()):
        assert relative(exact.to(c.dtype), exact) > 0, f"{what} was rounded to {c.dtype}"


def shrink_backward_(c: Case) -> Iterator[Check]:
    k, dx, dA = c.u, c.make(c.m, c.k), c.sums(c.k, c.r)
    before_dx, before_dA, mask = copy64(dx), copy64(dA), c.mask(c.k)
    wide_k, x, A = c.w(k, c.x, c.A)
    fresh = ops.shrink_backward_(k, None, c.x, None, None, c.p, c.seed)
    ops.shrink_backward_(k, dx, c.x, c.A, dA, c.p, c.seed)
    assert untouched(dx) and untouched(dA)
    part, size = mask * (wide_k @ A.T), mask * (wide_k.abs() @ A.abs().T)
    yield "dx", dx, before_dx + part, before_dx.abs() + size, 1
    kept = x * mask
    for got, start in ((dA, before_dA), (fresh, torch.zeros_like(before_dA))):
        yield "dA", got, start + kept.T @ wide_k, start.abs() + kept.abs().T @ wide_k.abs(), 1


def dropout_mask(c: Case) -> Iterator[Check]:
    mask = c.mask(c.k)
    yield "mask", ops.dropout_mask(c.m, c.k, c.p, torch.tensor([SEED]), c.dtype), mask, mask, 1


TABLE: dict[str, Callable[[Case], Iterator[Check]]] = {
    f.__name__: f
    for f in (
        *(shrink, expand_add_, expand, fold, row_core, row_core_backward),
        *(layer_forward, layer_backward_, backward_sums, shrink_backward_),
    )
}
DROPS = ("shrink", "expand_add_", "layer_forward", "layer_backward_", "shrink_backward_")
FORMULAS = {
    "grouped_mm",
    "grouped_outer",
    "linear",
    "dropout_mask",
}  # Python formulas: test_layers.py has their numbers


def test_every_operator_is_in_the_table() -> None:
    assert set(OPERATORS) - FORMULAS == set(TABLE) - {"backward_sums"}


def check(name: str, case: Case, where: str) -> None:
    with new_memory_is_nan():
        for what, got, truth, size, roundings in TABLE[name](case):
            error = within(got, truth, size, roundings)
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


# ---- bits, NaN, dropout ----------------------------------------------------------------------------------------------


def results(name: str, case: Case) -> list[Tensor]:
    return [got for _, got, *_ in TABLE[name](case)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in TABLE if not n.startswith("layer_")])
def test_same_bits_at_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """Also odd numbers of tokens: their last pair has one row. The layer's operators contain the library's product."""
    before = torch.get_num_threads()
    for shape in ((1100, 300, 200, 16), (301, 130, 65, 40), (17000, 40, 65, 4)):
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                p = 0.4 if name in DROPS and shape[0] < 1000 else 0.0
                runs.append(results(name, Case(shape, dtype, dtype, p=p)))
            finally:
                torch.set_num_threads(before)
        assert all(
            torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)
        ), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_no_cache_holds(dtype: torch.dtype) -> None:
    """Few rows fit into a CPU's L2; a factor and its sums that are too much for it, so that g is read twice."""
    for rank in (3, 127):
        check("backward_sums", Case((150, 3, 6000, rank), dtype, dtype), str(rank))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_dropped_may_be_nan(dtype: torch.dtype) -> None:
    c = Case((13, 67, 35, 5), dtype, dtype, p=0.5)
    mask = c.mask(c.k) > 0
    x = c.x.masked_fill(~mask, 0)
    c.x.masked_fill_(~mask, float("nan"))
    sums = [torch.zeros(c.k, c.r, dtype=c.acc) for _ in range(2)]
    for acc, own in zip(sums, (c.x, x)):
        ops.shrink_backward_(c.u, None, own, None, acc, c.p, c.seed)
    assert torch.equal(*sums) and torch.equal(
        ops.shrink(c.x, c.A, c.p, c.seed), ops.shrink(x, c.A, c.p, c.seed)
    )
    y = c.g.clone()
    ops.expand_add_(y, c.u, c.F, c.p, c.seed)
    assert torch.equal(y[c.mask(c.n) == 0], c.g[c.mask(c.n) == 0])  # not even rounded again


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_column(bad: float, dtype: torch.dtype) -> None:
    """Row 37 lies in a tile that is cut short, column 65 behind the whole steps."""
    c = Case((41, 67, 130, 18), dtype, dtype)
    c.x[37, 65], c.u[37, 17], c.g[37, 129] = bad, bad, bad
    y, dA, Q = (
        torch.ones_like(c.g),
        torch.zeros(c.k, c.r, dtype=c.acc),
        torch.zeros(c.n, c.r, dtype=c.acc),
    )
    ops.expand_add_(y, c.u, c.F), ops.shrink_backward_(torch.ones_like(c.u), None, c.x, None, dA)
    k = k_and_Q(c, torch.ones_like(c.u), Q, c.F)
    for result, at in ((ops.shrink(c.x, c.A), 37), (y, 37), (k, 37), (dA, 65), (Q, 129)):
        finite = result.isfinite()
        assert not finite[at].any() and finite[:at].all() and finite[at + 1 :].all()


def test_a_number_equal_to_the_threshold_is_kept() -> None:
    number = int(reference.philox_4x32_10(torch.tensor([0]), 5)[0, 1])  # of element 1
    assert ops.shrink(torch.ones(1, 4), torch.eye(4), number / 2**32, torch.tensor([5]))[0, 1] > 0


@pytest.mark.parametrize("lead", [(4, 5), (20, 1), (2, 0)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    """x [.., k] and g [.., n] as many rows: 3-D, a view of a larger tensor, empty."""
    m = lead[0] * lead[1]
    c = Case((m, 24, 18, 4), torch.float32, torch.float32)
    weight, core, bias = c.make(c.n, c.k), c.cores[0], c.make(1, c.n)[0]
    views = [
        torch.full((*lead, 3, t.shape[1]), float("nan"))[:, :, 1].copy_(t.view(*lead, t.shape[1]))
        for t in (c.x, c.g)
    ]
    for x, g in ((c.x.view(*lead, c.k), c.g.view(*lead, c.n)), views):
        for strategy in (0, BETA, UNFOLDED):
            y, u, F = ops.layer_forward(x, weight, bias, c.A, c.B, core, S, strategy)
            flat = ops.layer_forward(c.x, weight, bias, c.A, c.B, core, S, strategy)
            assert relative(y, flat[0].view(y.shape)) < 1e-6 and torch.equal(u, flat[1])
            none = (None,) * 5
            found, want = (
                ops.layer_backward_(
                    g_, weight, x_, u, c.A, F, c.B, core, S, strategy, *none, True, True
                )
                for g_, x_ in ((g, x), (c.g, c.x))
            )
            assert found[0].shape == x.shape and relative(found[0].reshape(m, c.k), want[0]) < 1e-6
            assert all(a is b is None or relative(a, b) < 1e-6 for a, b in zip(found[2:], want[2:]))


def test_only_what_was_asked_for_is_computed() -> None:
    c = Case((7, 24, 17, 4), torch.float32, torch.float32)
    weight, core = c.make(c.n, c.k), c.cores[0]
    for strategy, F in ((0, c.F), (UNFOLDED, None)):
        whole = ops.layer_backward_(
            c.g, weight, c.x, c.u, c.A, F, c.B, core, S, strategy, *(None,) * 5, True, True
        )
        for asked in range(16):
            need_x, need_A, need_B, need_core = (bool(asked >> i & 1) for i in range(4))
            head = (
                c.g,
                weight if need_x else None,
                c.x if need_A else None,
                c.u,
                c.A,
                F,
                c.B,
                core,
                S,
                strategy,
            )
            part = ops.layer_backward_(*head, *(None,) * 5, need_B, need_core)
            assert [t is not None for t in part] == [need_x, False, need_A, need_B, need_core]
            assert all(t is None or torch.equal(t, full) for t, full in zip(part, whole))
    _, k, dA, *_ = ops.layer_backward_(
        c.g, weight, None, c.u, None, c.F, c.B, core, S, 0, *(None,) * 5, True, False
    )
    assert (
        dA is None and relative(k, c.g.double() @ c.F.double()) < 1e-6
    )  # without A a sibling returns k


def test_more_cores_and_tokens_than_int32_counts() -> None:
    many, u, cores = 2**31 + 9, torch.randn(2, 3), torch.randn(1, 3, 5)
    h = ops.row_core(u, cores.expand(many, 3, 5), torch.tensor([many - 1, 2**31]), None, None, S)
    assert torch.allclose(h, S * u @ cores[0])
    few, zeros, tokens = (
        u[:1].expand(many, 3),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([many - 1, 2**31]),
    )
    assert torch.allclose(ops.row_core(few, cores, zeros, None, tokens, S), S * u[:1] @ cores[0])


# ---- as torch sees them ----------------------------------------------------------------------------------------------


def layouts(found: object) -> list[object]:
    return [
        None if t is None else (t.shape, t.dtype, t.stride())
        for t in (found if isinstance(found, tuple) else (found,))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_without_values(name: str, dtype: torch.dtype) -> None:
    """The fake kernels, with which torch.compile works, give shapes, dtypes and strides of the real ones."""
    for given in arguments(name, dtype):
        real = operator(name)(*given)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given]
            assert layouts(real) == layouts(operator(name)(*fakes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [n for n in OPERATORS if n != "linear"]
)  # which compilers take apart
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    loose = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    )  # decompositions round in several steps
    for given in arguments(name, dtype):
        opcheck(operator(name), given, **loose)


def test_expand_add_bumps_the_version_counter() -> None:
    """Else a backward that saved y before would silently use the new values."""
    y, u, F, *_ = arguments("expand_add_")[0]
    before = y._version
    ops.expand_add_(y, u, F)
    assert y._version == before + 1


def test_the_check_of_a_device_also_while_a_caller_traces() -> None:
    with FakeTensorMode():
        assert failed_call(torch.device("cpu")) is None and "meta" in failed_call(
            torch.device("meta")
        )


# ---- the specification -----------------------------------------------------------------------------------------------


def test_reference_by_autograd() -> None:
    """The specification's own backward, derived by hand."""
    shapes = ((4, 6), (5, 6), (5,), (6, 3), (5, 2), (3, 2))
    x, W, bias, A, B, core = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    mask = reference.dropout_mask(4, 6, 0.5, 77)
    y = reference.forward(x, W, bias, A, B, core, 0.7, mask)
    g = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, A, B, core, W, bias), g)
    for got, truth in zip(reference.backward(g, x, W, A, B, core, 0.7, mask), want, strict=True):
        assert torch.allclose(got, truth, atol=1e-12)


def test_philox_known_answers() -> None:
    """Random123's published vector for philox4x32-10 of zeros."""
    words = reference.philox_4x32_10(torch.tensor([0]), 0)
    assert [hex(w) for w in words[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


# ---- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_lower_instruction_sets(isa: str) -> None:
    """The numbers with each instruction set that this CPU has below its best."""
    if json.loads(ops.info())["cpu"]["isa"] == isa or "LOTR_CPU_ISA" in os.environ:
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-k",
        "numbers",
        __file__,
    ]
    run = subprocess.run(
        command, env={**os.environ, "LOTR_CPU_ISA": isa}, capture_output=True, text=True
    )
    if "(what this CPU runs), got " in run.stdout + run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]
