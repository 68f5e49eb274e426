"""Tucker-2 of a stack of low-rank matrices, without ever forming one of them.

    D_l = U_l V_l^T [n, k], U_l [n, r_l], V_l [k, r_l]      D_l ~= B G_l^T A^T, least squares over all l at once

Every V_l lies in the span of [V_1 .. V_L], so one QR of these (and one of the U_l) leaves the same problem in R = sum r_l
dimensions instead of k and n, still in factored form: what HOSVD and HOOI (De Lathauwer et al., 2000a, 2000b) need of D_l are
its products with a thin matrix. General Tucker routines (tensorly's partial_tucker) want a dense core tensor [L, R, R], which
would have 2.9e9 elements for 224 layers of rank 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layers.init import padded

__all__ = ["LowRankStack", "Tucker2"]

_EXACT = 640  # up to this size a dense decomposition takes a fraction of a second
_OVERSAMPLE = 10
_FIRST_POWERS = 9  # of a subspace that nothing is known of; from one iteration of HOOI to the next one power is enough
_CORE, _CORE_POWERS = 4, 3  # a start for rank r is sought within the 4 r leading vectors, which need not be exact
_MAX_ITERATIONS, _TOLERANCE = 100, 1e-6


class Tucker2:
    """A [k, r_in] and B [n, r_out] with orthonormal columns (rows beyond the width), cores [L, r_in, r_out], float64.

    errors: |D_l - B G_l^T A^T| / |D_l| for each l (0 where both are 0); error: the same over the stack; iterations: of HOOI.
    """

    def __init__(self, A: Tensor, B: Tensor, cores: Tensor, residuals: Tensor, norms: Tensor, iterations: int):
        self.A, self.B, self.cores, self.iterations = A, B, cores, iterations
        self.errors = [float(r / n) if n > 0 else 0.0 for r, n in zip(residuals, norms)]
        total = norms.square().sum().sqrt()
        self.error = float(residuals.square().sum().sqrt() / total) if total > 0 else 0.0


class LowRankStack:
    """L matrices U_l V_l^T of one shape. pairs: (U_l [n, r_l], V_l [k, r_l]), any floating dtype; the work is in float64."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]):
        # [L, q, r] and [L, p, r], narrower ones filled up with zeros: one product for all layers costs less than L small ones
        self.U, self._left = _reduced([u.double() for u, _ in pairs])
        self.V, self._right = _reduced([v.double() for _, v in pairs])
        self.n, self.k = pairs[0][0].shape[0], pairs[0][1].shape[0]
        self.norms = ((self.U.mT @ self.U) * (self.V.mT @ self.V)).sum((1, 2)).clamp(min=0).sqrt()

    @property
    def full_rank(self) -> int:
        """A rank at which the factorisation is exact."""
        return max(self.U[0].shape[0], self.V[0].shape[0])

    def rank_bounds(self, error: float) -> tuple[int, int]:
        """(low, high): no rank below low reaches this relative error, and high does: the tails of the two unfoldings' singular
        values bound the error of the best factorisation from both sides."""
        total = float(self.norms.square().sum())
        tails = []
        for left, right in ((self.U, self.V), (self.V, self.U)):
            values = torch.linalg.eigvalsh(_gram(_compressed(left, right.mT))).clamp(min=0)  # ascending
            lost = torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)  # by number of vectors kept: 0, 1, ..
            tails.append(torch.cat([lost, lost.new_zeros(self.full_rank + 1 - len(lost))]))
        allowed = error**2 * total
        low = int((torch.maximum(*tails) > allowed).sum())
        high = int(((tails[0] + tails[1]) > allowed).sum())
        return max(1, low), max(1, min(high, self.full_rank))

    @torch.no_grad()
    def factorise(
        self,
        rank: tuple[int, int],
        *,
        tolerance: float = _TOLERANCE,
        enough: float = 0.0,
        report: Callable[[float], None] = lambda done: None,
    ) -> Tucker2:
        """The factorisation at rank (r_in, r_out). A and B are improved in turn until the relative error falls by less than
        tolerance, or is no more than `enough`. report: called with the fraction of the most iterations that there can be."""
        p, q = self.V[0].shape[0], self.U[0].shape[0]
        r_in, r_out = min(rank[0], p), min(rank[1], q)
        A, B, iterations = self._improved(*self._start(r_in, r_out), r_in, r_out, tolerance, enough, report)
        cores = torch.zeros(len(self.U), *rank, dtype=torch.float64, device=A.device)
        inner_u, inner_v = B.T @ self.U, A.T @ self.V
        cores[:, :r_in, :r_out] = inner_v @ inner_u.mT
        # |D - P D Q|^2 = |(1 - P) D|^2 + |P D (1 - Q)|^2: no difference of large numbers
        rest_u, rest_v = self.U - B @ inner_u, self.V - A @ inner_v
        lost = (rest_u.mT @ rest_u) * (self.V.mT @ self.V) + (inner_u.mT @ inner_u) * (rest_v.mT @ rest_v)
        A, B = _lifted(self._right, A, self.k, rank[0]), _lifted(self._left, B, self.n, rank[1])
        return Tucker2(A, B, cores, lost.sum((1, 2)).clamp(min=0).sqrt(), self.norms, iterations)

    def _start(self, r_in: int, r_out: int) -> tuple[Tensor, Tensor | None]:
        """Where HOOI begins: at low ranks with what it finds in the core of a few leading vectors of both sides, where it costs
        next to nothing; else with HOSVD's A."""
        p, q, wide = self.V[0].shape[0], self.U[0].shape[0], _CORE * max(r_in, r_out)
        right = _compressed(self.V, self.U.mT)
        if max(p, q) <= _EXACT or 2 * wide > min(p, q):
            return _leading(right, r_in, None, _FIRST_POWERS), None
        V = _leading(right, wide, None, _CORE_POWERS)
        U = _leading(_compressed(self.U, self.V.mT), wide, None, _CORE_POWERS)
        core = LowRankStack(list(zip(U.T @ self.U, V.T @ self.V)))
        A, B, _ = core._improved(*core._start(r_in, r_out), r_in, r_out, _TOLERANCE, 0.0, lambda done: None)
        return V @ _lifted(core._right, A, wide, r_in), U @ _lifted(core._left, B, wide, r_out)

    def _improved(
        self,
        A: Tensor,
        B: Tensor | None,
        r_in: int,
        r_out: int,
        tolerance: float,
        enough: float,
        report: Callable[[float], None],
    ) -> tuple[Tensor, Tensor, int]:
        """A and B by HOOI from these on, and the number of iterations."""
        total, error = float(self.norms.square().sum()), math.inf
        for iteration in range(1, _MAX_ITERATIONS + 1):
            B = _leading(_compressed(self.U, self.V.mT @ A), r_out, B, _FIRST_POWERS if B is None else 1)
            halves = _compressed(self.V, self.U.mT @ B)
            A = _leading(halves, r_in, A, 1)
            captured = float((A.T @ halves).square().sum())
            before, error = error, math.sqrt(max(0.0, 1 - captured / total)) if total > 0 else 0.0
            report(iteration / _MAX_ITERATIONS)
            if before - error <= tolerance or error < enough:
                break
        return A, B, iteration


def _reduced(parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The parts [d, r_l] in an orthonormal basis of all their columns, one after the other, and the basis; as they are where
    that is no smaller."""
    widths, basis = [t.shape[1] for t in parts], None
    if sum(widths) < parts[0].shape[0]:
        basis, upper = torch.linalg.qr(torch.cat(parts, 1))
        parts = list(upper.split(widths, 1))
    widest = max(widths)
    return torch.stack([pad(t, (0, widest - t.shape[1])) for t in parts]), basis


def _compressed(a: Tensor, b: Tensor) -> Tensor:
    """[L, d, <= min], each with the same columns' Gram matrix as a b: a [L, d, r] times the triangle of b [L, r, c]'s LQ."""
    return a @ (b if b.shape[2] <= b.shape[1] else torch.linalg.qr(b.mT, mode="r")[1].mT)


def _side_by_side(side: Tensor) -> Tensor:
    """[L, d, c] as [d, L c]."""
    return side.transpose(0, 1).reshape(side.shape[1], -1)


def _gram(side: Tensor) -> Tensor:
    stacked = _side_by_side(side)
    return stacked @ stacked.T


def _leading(side: Tensor, r: int, start: Tensor | None, powers: int) -> Tensor:
    """The r leading left singular vectors [d, r] of all of `side` [L, d, c] next to each other.

    Dense where one dimension is small, else `powers` steps of subspace iteration from start, or from a fixed random block.
    """
    stacked = _side_by_side(side)
    d, columns = stacked.shape
    if d <= _EXACT:
        return torch.linalg.eigh(stacked @ stacked.T)[1].flip(1)[:, :r].contiguous()
    if r <= columns <= _EXACT:
        basis, upper = torch.linalg.qr(stacked)
        return basis @ torch.linalg.svd(upper)[0][:, :r]
    if 8 * (r + _OVERSAMPLE) >= d:  # iterating on so wide a block would cost more
        return torch.linalg.eigh(stacked @ stacked.T)[1].flip(1)[:, :r].contiguous()
    generator = torch.Generator().manual_seed(0)
    width = r + _OVERSAMPLE - (0 if start is None else r)
    extra = torch.randn(d, width, dtype=torch.float64, device="cpu", generator=generator)
    block = extra.to(stacked.device) if start is None else torch.cat([start, extra.to(stacked.device)], 1)
    for _ in range(powers):
        block = torch.linalg.qr(stacked @ (stacked.T @ block))[0]
    small = block.T @ stacked
    return block @ torch.linalg.eigh(small @ small.T)[1].flip(1)[:, :r]


def _lifted(basis: Tensor | None, vectors: Tensor, d: int, r: int) -> Tensor:
    """The vectors in the full space, [d, r]. Columns that the stack cannot fill are orthonormal to the rest (their core rows
    are zero, and can learn); beyond d they are unit vectors."""
    full = vectors if basis is None else basis @ vectors
    have = full.shape[1]
    if have < min(r, d):
        generator = torch.Generator().manual_seed(0)
        fresh = torch.randn(d, min(r, d) - have, dtype=full.dtype, device="cpu", generator=generator).to(full.device)
        fresh -= full @ (full.T @ fresh)
        full = torch.cat([full, torch.linalg.qr(fresh)[0]], 1)
    return padded(full, r)
