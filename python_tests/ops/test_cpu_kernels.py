"""The CPU operators against float64: every operator and dtype, odd sizes, strides, NaN beside the operands.

Tolerance: our error against float64 is at most twice that of the same formula in plain torch with the same rounded operands,
plus EPS times the sum of absolute products (what rounding can reach when torch happens to be exact).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lotr_ext.ops import UNFOLDED, accumulate_dtype
from lotr_ext.reference import dropout_mask, philox_4x32_10  # held to published numbers by test_ops.py

Shape = tuple[int, int, int, int]
ops = torch.ops.lotr
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of the result's dtype: half a unit in the last place of results, some of a long sum in fp32.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2e-15}
# M, K, N, r: every kernel's full blocks, their remainders, and panels cut short.
SHAPES = [
    (0, 5, 3, 2), (1, 1, 1, 1), (1, 64, 48, 16), (5, 7, 9, 3), (7, 129, 31, 8), (16, 64, 64, 16),
    (97, 77, 130, 17), (130, 200, 96, 64), (257, 65, 67, 33), (29, 31, 70, 100), (33, 300, 129, 256), (3, 600, 5, 5),
]  # fmt: skip
LAYOUTS = ["contiguous", "rows apart", "columns apart", "transposed"]
ONE_ISA = "LOTR_CPU_ISA" in os.environ  # a run for one instruction set, started by test_cpu_isa.py
# Every shape contiguous and in one other layout, in turn; a third of them for each lower instruction set.
SHAPES_AND_LAYOUTS = [(s, layout) for i, s in enumerate(SHAPES) for layout in (LAYOUTS[0], LAYOUTS[1 + i % 3])]
SHAPES_AND_LAYOUTS = [s for i, s in enumerate(SHAPES_AND_LAYOUTS) if not ONE_ISA or i % 6 in (0, 3)]
SCALING = 0.37


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values as a view with other strides, NaN in every element of the storage that is not its own."""
    *lead, rows, cols = t.shape
    if layout == "contiguous":
        return t.clone()
    if layout == "rows apart":
        view = torch.full((*lead, rows + 2, cols + 5), float("nan"), dtype=t.dtype)[..., 1 : rows + 1, 3 : cols + 3]
    elif layout == "columns apart":
        view = torch.full((*lead, rows, 3 * cols + 1), float("nan"), dtype=t.dtype)[..., 1 : 3 * cols + 1 : 3]
    else:
        view = torch.full((*lead, cols, rows + 3), float("nan"), dtype=t.dtype)[..., 1 : rows + 1].transpose(-1, -2)
    return view.copy_(t)


def untouched(view: Tensor) -> bool:
    """Whether the storage beside the view still is NaN."""
    base = view if view._base is None else view._base
    if base is view:
        return True
    beside = base.clone()
    beside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(beside.isnan().all())


def close(got: Tensor, truth: Tensor, eager: Tensor, size: Tensor) -> None:
    """`size` is the sum of absolute products of each element."""
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    error = (got.double() - truth).abs().max().item()
    allowed = 2 * (eager.double() - truth).abs().max().item() + EPS[got.dtype] * size.max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


class Case:
    """Operands of one shape, dtype and layout; factors scaled so that results are near 1."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: str, factor_dtype: torch.dtype | None = None):
        torch.manual_seed(sum(shape))
        self.m, self.k, self.n, self.r = shape
        self.r_out = self.r + 1
        self.dtype, self.layout, self.acc = dtype, layout, accumulate_dtype(dtype)
        factors = factor_dtype or dtype
        self.x, self.g = self.make(self.m, self.k), self.make(self.m, self.n)
        self.u = self.make(self.m, self.r)
        self.A, self.F = self.make(self.k, self.r, dtype=factors), self.make(self.n, self.r, dtype=factors)
        self.B = self.make(self.n, self.r_out, dtype=factors)
        self.cores = self.make(2, self.r, self.r_out, dtype=factors)

    def make(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return laid_out((torch.randn(*size) / size[-1] ** 0.25).to(dtype or self.dtype), self.layout)

    def sums(self, *size: int) -> Tensor:
        return self.make(*size, dtype=self.acc)

    def rounded(self, *factors: Tensor) -> list[Tensor]:
        """Factors as the products see them: rounded to the activations' dtype."""
        return [f.to(self.dtype) for f in factors]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def dense(*tensors: Tensor) -> list[Tensor]:
    """For torch's own products: on a CPU with AMX torch 2.13 takes what lies between bfloat16 rows into them."""
    return [t.contiguous() for t in tensors]


def check_product(got: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, plus: Tensor | None = None) -> None:
    """got = scale * a b (+ plus)."""
    start = torch.zeros((), dtype=torch.float64) if plus is None else plus.double()
    plain_a, plain_b = dense(a, b)
    eager = (scale * (plain_a @ plain_b)).to(got.dtype) + (0 if plus is None else plus)
    close(
        got, start + scale * (a.double() @ b.double()), eager, start.abs() + abs(scale) * (a.double().abs() @ b.double().abs())
    )


@pytest.fixture(params=DTYPES, ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES_AND_LAYOUTS, ids=lambda s: "x".join(map(str, s[0])) + " " + s[1])
def case(request: pytest.FixtureRequest, dtype: torch.dtype) -> Case:
    shape, layout = request.param
    return Case(shape, dtype, layout)


def test_shrink(case: Case) -> None:
    check_product(ops.shrink(case.x, case.A), case.x, case.A)


def test_expand_add(case: Case) -> None:
    y = laid_out(case.g, case.layout)
    ops.expand_add_(y, case.u, case.F)
    check_product(y, case.u, case.F.t(), plus=case.g)
    assert untouched(y)


def test_factor_grad(case: Case) -> None:
    acc = case.sums(case.k, case.r)
    before = acc.clone()
    ops.factor_grad_(acc, case.x, case.u)
    check_product(acc, case.x.t().to(case.acc), case.u.to(case.acc), plus=before)
    assert untouched(acc)


def test_shrink_grad(case: Case) -> None:
    acc = case.sums(case.n, case.r)
    before = acc.clone()
    check_product(ops.shrink_grad_(acc, case.g, case.F, case.u), case.g, case.F)
    check_product(acc, case.g.t().to(case.acc), case.u.to(case.acc), plus=before)
    assert untouched(acc)


@pytest.mark.parametrize("shape", [(150, 3, 6000, 3), (150, 3, 6000, 128)], ids=str)
def test_shrink_grad_of_what_no_cache_holds(shape: Shape, dtype: torch.dtype) -> None:
    """Rows of which few fit into a CPU's L2; and a factor and sums that are too much for it, so that g is read twice."""
    case, threads, found = Case(shape, dtype, "contiguous"), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            acc = torch.ones(case.n, case.r, dtype=case.acc)
            found.append((ops.shrink_grad_(acc, case.g, case.F, case.u), acc))
    finally:
        torch.set_num_threads(threads)
    k, Q = found[0]
    check_product(k, case.g, case.F)
    check_product(Q, case.g.t().to(case.acc), case.u.to(case.acc), plus=torch.ones_like(Q))
    assert all(torch.equal(k, other_k) and torch.equal(Q, other_Q) for other_k, other_Q in found[1:])


def test_fold(case: Case) -> None:
    F = ops.fold(case.B, case.cores, SCALING, case.dtype)
    assert F.dtype == case.dtype
    for l in range(2):
        check_product(F[l], case.B.to(case.acc), case.cores[l].t().to(case.acc), SCALING)
    one = ops.fold(case.B, case.cores[:1], SCALING, case.dtype)
    assert torch.equal(one[0], F[0])


@pytest.mark.parametrize("layers", [1, 2])
def test_fold_grad(case: Case, layers: int) -> None:
    Q, dB, cores = case.sums(layers, case.n, case.r), case.sums(case.n, case.r_out), case.cores[:layers]
    before = dB.clone()
    dcores = ops.fold_grad(Q, case.B, cores, SCALING, dB)
    for l in range(layers):
        check_product(dcores[l], Q[l].t(), case.B.to(case.acc), SCALING)
    stacked = cores.reshape(layers * case.r, case.r_out).to(case.acc)
    check_product(dB, Q.transpose(0, 1).reshape(case.n, layers * case.r), stacked, SCALING, plus=before)
    assert untouched(dB)
    assert torch.equal(ops.fold_grad(Q, case.B, cores, SCALING, None), dcores)


def test_row_core(case: Case) -> None:
    """Rows by core in any order, their tokens in any order; test_row_core.py has the rest."""
    rows = torch.arange(case.m)
    index, tokens = (rows * 5 + 1) % 3 % 2, (rows * 7 + 3) % max(case.m, 1)
    given = (case.u, case.cores, index, None, tokens, SCALING)
    g = case.make(case.m, case.r_out)
    h = ops.row_core(*given)
    du, dcores = ops.row_core_backward(g, *given, True, True)
    size = torch.zeros(case.m, case.r, dtype=torch.float64)
    want_du, eager_du = torch.zeros_like(size), torch.zeros(case.m, case.r, dtype=case.acc)
    for c in range(2):
        own = index == c
        u, core = case.u[tokens[own]], case.cores[c]
        check_product(h[own], u, core, SCALING)
        check_product(dcores[c], u.t().to(case.acc), g[own].to(case.acc), SCALING)
        want_du.index_add_(0, tokens[own], SCALING * g[own].double() @ core.double().t())
        eager_du.index_add_(0, tokens[own], SCALING * (g[own] @ core.t()).to(case.acc))
        size.index_add_(0, tokens[own], SCALING * g[own].double().abs() @ core.double().abs().t())
    close(du, want_du, eager_du.to(case.dtype), size)


def of_library(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, g, and a weight whose products with them are exact, because it is one on the diagonal, else zero."""
    x, g = dense(case.x, case.g) if case.dtype == torch.bfloat16 else (case.x, case.g)
    return x, g, torch.eye(case.n, case.k, dtype=case.dtype)


def test_unfolded_forward(case: Case) -> None:
    """The base product first, which the adapter's part is added to; and after it."""
    x, _, weight = of_library(case)
    core, start = case.cores[0], x @ weight.t()
    for order in (0, 1):
        y, u, F = ops.layer_forward(x, weight, None, case.A, case.B, core, SCALING, UNFOLDED + order)
        assert F is None
        check_product(u, case.x, case.A)
        uw, corew, Bw, y0 = wide(u, core, case.B, start)
        plain_u, plain_core, plain_B = dense(u, core, case.B)
        eager = start + (SCALING * (plain_u @ plain_core)) @ plain_B.t()
        close(y, y0 + (SCALING * uw @ corew) @ Bw.t(), eager, y0.abs() + SCALING * (uw.abs() @ corew.abs()) @ Bw.t().abs())


@pytest.mark.parametrize("form", ["two_pass", "beta", "no dx"])
def test_unfolded_backward(case: Case, form: str) -> None:
    """Of two_pass, the core is in the dtype of sums, so the core's gradient is not rounded. Without dx: x and g as they lie."""
    core = case.cores[0].to(case.acc) if form == "two_pass" else case.cores[0]
    x, g, weight = (case.x, case.g, None) if form == "no dx" else of_library(case)
    dA, dB = case.sums(case.k, case.r), case.sums(case.n, case.r_out)
    dA0, dB0 = dA.clone(), dB.clone()
    operands = (g, weight, x, case.u, case.A, None, case.B, core, SCALING, UNFOLDED + (form == "beta"))
    dx, _, new_dA, new_dB, dcore = ops.layer_backward_(*operands, None, None, None, dA, dB, True, True)
    assert new_dA is None and new_dB is None and untouched(dA) and untouched(dB)
    assert dcore.dtype == (case.acc if form == "two_pass" else case.dtype)
    # The eager form rounds h and k to T between the products.
    plain_g, plain_u, plain_A, plain_B, plain_core = dense(case.g, case.u, case.A, case.B, case.cores[0])
    h_t = SCALING * (plain_g @ plain_B)
    k_t, uc_t = h_t @ plain_core.t(), SCALING * (plain_u @ plain_core)
    x, g, u, A, corew, B = wide(case.x, case.g, case.u, case.A, core, case.B)
    h = SCALING * g @ B
    k, uc = h @ corew.t(), SCALING * u @ corew
    size_h = SCALING * g.abs() @ B.abs()
    size_k, size_uc = size_h @ corew.abs().t(), SCALING * u.abs() @ corew.abs()
    close_to_rounded_operand(dA, dA0, x.t(), k, k_t, size_k)
    close_to_rounded_operand(dB, dB0, g.t(), uc, uc_t, size_uc)
    close_to_rounded_operand(dcore, None, u.t(), h, h_t, size_h)
    if weight is None:
        assert dx is None
    else:
        start = plain_g @ weight
        dx0 = start.double()
        close(dx, dx0 + k @ A.t(), start + k_t @ plain_A.t(), dx0.abs() + size_k @ A.abs().t())


def close_to_rounded_operand(got: Tensor, before: Tensor | None, a: Tensor, b: Tensor, b_rounded: Tensor, size: Tensor) -> None:
    """got = before + a b, where the right operand was rounded to T on the way, here as in the eager form."""
    start = torch.zeros((), dtype=torch.float64) if before is None else before.double()
    allowed = 2 * (a @ (b_rounded.double() - b)).abs() + (EPS[got.dtype] + EPS[b_rounded.dtype]) * (
        start.abs() + a.abs() @ size
    )
    assert ((got.double() - start - a @ b).abs() <= allowed.max() if allowed.numel() else torch.tensor(True)).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float32_factors_beside_half_activations_are_rounded(half: torch.dtype) -> None:
    c = Case((37, 70, 41, 19), half, "rows apart", factor_dtype=torch.float32)
    A, F, B, core = c.rounded(c.A, c.F, c.B, c.cores[0])
    assert torch.equal(ops.shrink(c.x, c.A), ops.shrink(c.x, A))
    ys = [laid_out(c.g, c.layout) for _ in range(2)]
    ops.expand_add_(ys[0], c.u, c.F), ops.expand_add_(ys[1], c.u, F)
    assert torch.equal(ys[0], ys[1])
    Qs = [torch.zeros(c.n, c.r) for _ in range(2)]
    assert torch.equal(*(ops.shrink_grad_(Q, c.g, factor, c.u) for Q, factor in zip(Qs, (c.F, F)))) and torch.equal(*Qs)
    x, _, weight = of_library(c)
    y, *_ = ops.layer_forward(x, weight, None, c.A, c.B, c.cores[0], SCALING, UNFOLDED)
    assert torch.equal(y, ops.layer_forward(x, weight, None, A, B, core, SCALING, UNFOLDED)[0])
    # fold multiplies before it rounds.
    check_product(ops.fold(c.B, c.cores, SCALING, half)[1], c.B, c.cores[1].t(), SCALING)


def every_operator(c: Case) -> Iterator[Tensor]:
    """All results of one case, with and without dropout."""
    seed = torch.tensor([77])
    for p in (0.0, 0.4):
        y, acc = c.g.clone(), c.sums(c.k, c.r)
        yield ops.shrink(c.x, c.A, p, seed)
        ops.expand_add_(y, c.u, c.F, p, seed), ops.factor_grad_(acc, c.x, c.u, p, seed)
        yield from (y, acc)
    Q = c.sums(c.n, c.r)
    yield from (ops.shrink_grad_(Q, c.g, c.F, c.u), Q)
    yield ops.fold(c.B, c.cores, SCALING, c.dtype)
    dB = c.sums(c.n, c.r_out)
    yield from (ops.fold_grad(c.sums(2, c.n, c.r), c.B, c.cores, SCALING, dB), dB)
    zeros, bias = torch.zeros(c.n, c.k, dtype=c.dtype), c.make(1, c.n)[0]  # the library's product has its own bits
    y, u, _ = ops.layer_forward(c.x, zeros, None, c.A, c.B, c.cores[0], SCALING, UNFOLDED)
    dA, dB = c.sums(c.k, c.r), c.sums(c.n, c.r_out)
    operands = (c.g, zeros, c.x, u, c.A, None, c.B, c.cores[0], SCALING, UNFOLDED)
    dx, _, _, _, dcore = ops.layer_backward_(*operands, None, None, None, dA, dB, True, True)
    yield from (y, u, dcore, dx, dA, dB)
    yield ops.layer_forward(c.x, zeros, bias, None, c.B, c.cores[0], SCALING, 0, c.u, c.F, 0.0, None)[0]


# Also odd numbers of tokens: their last pair has one row, and is summed with the tile that it ends.
@pytest.mark.parametrize(
    "shape", [(1100, 300, 200, 16), (300, 700, 130, 40), (17000, 40, 65, 34), (301, 130, 65, 4), (703, 30, 65, 40)], ids=str
)
def test_same_bits_at_any_thread_count(shape: Shape, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(list(every_operator(Case(shape, dtype, "contiguous"))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for first, again in zip(runs[0], run):
            assert torch.equal(first, again)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (13, 67, 35, 5), (120, 130, 131, 16)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "columns apart"])
def test_dropout(shape: Shape, p: float, layout: str, dtype: torch.dtype) -> None:
    c, seed = Case(shape, dtype, layout), -(2**61) + 12345678901
    mask_x, mask_y = (dropout_mask(c.m, cols, p, seed) > 0 for cols in (c.k, c.n))
    # What is dropped is 0 even where it is NaN; scaling comes after the sum, so kept values are not rounded again.
    x = c.x.masked_fill(~mask_x, 0)
    c.x.masked_fill_(~mask_x, float("nan"))
    seed_tensor = torch.tensor([seed])
    check_product(ops.shrink(c.x, c.A, p, seed_tensor), x, c.A, 1 / (1 - p))
    acc = torch.zeros(c.k, c.r, dtype=c.acc)
    ops.factor_grad_(acc, c.x, c.u, p, seed_tensor)
    check_product(acc, x.t().to(c.acc), c.u.to(c.acc), 1 / (1 - p))
    y = laid_out(c.g, layout)
    ops.expand_add_(y, c.u, c.F, p, seed_tensor)
    full = c.u.double() @ c.F.double().t() / (1 - p)
    size = c.g.double().abs() + c.u.double().abs() @ c.F.double().abs().t() / (1 - p)
    close(y, c.g + full * mask_y, c.g + ((c.u @ c.F.t()) / (1 - p)) * mask_y, size)
    assert torch.equal(y[~mask_y], c.g[~mask_y])


def test_a_number_equal_to_the_threshold_is_kept() -> None:
    number = int(philox_4x32_10(torch.tensor([0]), 5)[0, 1])  # of element 1
    u = ops.shrink(torch.ones(1, 4), torch.eye(4), number / 2**32, torch.tensor([5]))
    assert u[0, 1] > 0


def test_bfloat16_infinity_and_nan_survive() -> None:
    x = torch.tensor([[float("inf"), 1.0, 2.0], [float("nan"), 1.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    u = ops.shrink(x, torch.ones(3, 2, dtype=torch.bfloat16))
    assert u[0].isinf().all() and u[1].isnan().all() and torch.equal(u[2], torch.tensor([6.0, 6.0]).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_column(bad: float, dtype: torch.dtype) -> None:
    """Beside others in one tile or vector: row 37 is in a tile cut short, column 65 behind the whole steps."""
    c = Case((41, 67, 130, 18), dtype, "contiguous")
    c.x[37, 65], c.u[37, 17], c.g[37, 129] = bad, bad, bad
    y, dA, Q = torch.ones_like(c.g), torch.zeros(c.k, c.r, dtype=c.acc), torch.zeros(c.n, c.r, dtype=c.acc)
    ops.expand_add_(y, c.u, c.F), ops.factor_grad_(dA, c.x, torch.ones_like(c.u))
    k = ops.shrink_grad_(Q, c.g, c.F, torch.ones_like(c.u))
    for result, at in ((ops.shrink(c.x, c.A), 37), (y, 37), (k, 37), (dA, 65), (Q, 129)):
        finite = result.isfinite()
        assert not finite[at].any() and finite[:at].all() and finite[at + 1 :].all()
