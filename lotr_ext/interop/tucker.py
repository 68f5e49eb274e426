"""Tucker-2 of a stack of low-rank matrices, without forming any of them.

    D_l = U_l V_l^T [n, k], U_l [n, r_l], V_l [k, r_l]      D_l ~= B G_l^T A^T, least squares over all l at once

Every V_l lies in the span of [V_1 .. V_L], so one QR of these (and one of the U_l) reduces the problem to R = sum r_l
dimensions instead of k and n, still in factored form: HOSVD and HOOI (`layers/tucker.py`) need only products of D_l
and a thin matrix. General Tucker routines (tensorly's partial_tucker) want a dense core tensor [L, R, R], which
would have 2.9e9 elements for 224 layers of rank 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layers.tucker import EXACT, hooi, leading, padded

__all__ = ["LowRankStack", "Tucker2", "compressed", "fitted", "norms", "stacked"]

_CORE, _CORE_POWERS = 4, 3  # a start for rank r is searched within the 4 r leading vectors, which may be approximate
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
        # [L, q, r] and [L, p, r]
        self.U, self._left = _reduced([u.double() for u, _ in pairs])
        self.V, self._right = _reduced([v.double() for _, v in pairs])
        self.n, self.k = pairs[0][0].shape[0], pairs[0][1].shape[0]
        self.norms = norms(self.U, self.V)

    @property
    def full_rank(self) -> int:
        """A rank at which the factorisation is exact."""
        return max(self.U[0].shape[0], self.V[0].shape[0])

    def rank_bounds(self, error: float) -> tuple[int, int]:
        """(low, high): no rank below low reaches this relative error, and high does: the tails of the two unfoldings' singular
        values give a lower and an upper bound of the best factorisation's error."""
        total = float(self.norms.square().sum())
        tails = []
        for left, right in ((self.U, self.V), (self.V, self.U)):
            side = compressed(left, right.mT)
            values = torch.linalg.eigvalsh(side @ side.T).clamp(min=0)  # ascending
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
        """The factorisation at rank (r_in, r_out). Improves A and B alternately until the relative error falls by less than
        tolerance, or is at most `enough`. report: called with the iterations done as a fraction of the maximum."""
        p, q = self.V[0].shape[0], self.U[0].shape[0]
        r_in, r_out = min(rank[0], p), min(rank[1], q)
        A, B, iterations = self._improved(*self._start(r_in, r_out), (r_in, r_out), tolerance, enough, report)
        cores = torch.zeros(len(self.U), *rank, dtype=torch.float64, device=A.device)
        cores[:, :r_in, :r_out], residuals = fitted(self.U, self.V, A, B)
        A, B = _lifted(self._right, A, self.k, rank[0]), _lifted(self._left, B, self.n, rank[1])
        return Tucker2(A, B, cores, residuals, self.norms, iterations)

    def _start(self, r_in: int, r_out: int) -> tuple[Tensor, Tensor | None]:
        """The start (A, B) of HOOI: at low ranks, the result of HOOI within a few leading vectors of both sides, which takes
        little time; otherwise (A of HOSVD, None)."""
        p, q, wide = self.V[0].shape[0], self.U[0].shape[0], _CORE * max(r_in, r_out)
        right = [compressed(self.V, self.U.mT)]
        if max(p, q) <= EXACT or 2 * wide > min(p, q):
            return leading(right, r_in), None
        V = leading(right, wide, powers=_CORE_POWERS)
        U = leading([compressed(self.U, self.V.mT)], wide, powers=_CORE_POWERS)
        core = LowRankStack(list(zip(U.T @ self.U, V.T @ self.V)))
        A, B, _ = core._improved(*core._start(r_in, r_out), (r_in, r_out))
        return V @ _lifted(core._right, A, wide, r_in), U @ _lifted(core._left, B, wide, r_out)

    def _improved(
        self,
        A: Tensor,
        B: Tensor | None,
        rank: tuple[int, int],
        tolerance: float = _TOLERANCE,
        enough: float = 0.0,
        report: Callable[[float], None] = lambda done: None,
    ) -> tuple[Tensor, Tensor, int]:
        """`hooi` of the stack from A and B."""
        return hooi(
            lambda A: [compressed(self.U, self.V.mT @ A)],
            lambda B: [compressed(self.V, self.U.mT @ B)],
            (A, B),
            rank,
            float(self.norms.square().sum()),
            max_iterations=_MAX_ITERATIONS,
            tolerance=tolerance,
            enough=enough,
            report=report,
        )


def norms(U: Tensor, V: Tensor) -> Tensor:
    """|U_l V_l^T| [L] of stacks [L, n, r] and [L, k, r]."""
    return ((U.mT @ U) * (V.mT @ V)).sum((1, 2)).clamp(min=0).sqrt()


def fitted(U: Tensor, V: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The cores G_l = A^T D_l^T B [L, r_in, r_out] and |D_l - B G_l^T A^T| [L] of D_l = U_l V_l^T, A and B with orthonormal
    columns."""
    inner_u, inner_v = B.T @ U, A.T @ V
    # |D - P D Q|^2 = |(1 - P) D|^2 + |P D (1 - Q)|^2: avoids the difference of large numbers
    rest_u, rest_v = U - B @ inner_u, V - A @ inner_v
    lost = (rest_u.mT @ rest_u) * (V.mT @ V) + (inner_u.mT @ inner_u) * (rest_v.mT @ rest_v)
    return inner_v @ inner_u.mT, lost.sum((1, 2)).clamp(min=0).sqrt()


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [d, r_l] as one [L, d, r], padded with zeros: one product for all takes less time than L small ones."""
    widest = max(t.shape[1] for t in parts)
    return torch.stack([pad(t, (0, widest - t.shape[1])) for t in parts])


def _reduced(parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The parts [d, r_l], stacked, in an orthonormal basis of all their columns, and the basis; the parts themselves and None
    if the basis has d columns or more."""
    widths, basis = [t.shape[1] for t in parts], None
    if sum(widths) < parts[0].shape[0]:
        basis, upper = torch.linalg.qr(torch.cat(parts, 1))
        parts = list(upper.split(widths, 1))
    return stacked(parts), basis


def compressed(a: Tensor, b: Tensor) -> Tensor:
    """The products a_l b_l of a [L, d, r] and b [L, r, c] side by side, [d, L min(r, c)]. If c > r, b_l is replaced by the
    triangle of its LQ, which leaves a_l b_l (a_l b_l)^T unchanged."""
    product = a @ (b if b.shape[2] <= b.shape[1] else torch.linalg.qr(b.mT, mode="r")[1].mT)
    return product.transpose(0, 1).reshape(product.shape[1], -1)


def _lifted(basis: Tensor | None, vectors: Tensor, d: int, r: int) -> Tensor:
    """The vectors in the full space, [d, r]. Columns beyond the stack's rank are orthonormal to the rest (their core rows
    are zero, and can learn); beyond d they are unit vectors."""
    full = vectors if basis is None else basis @ vectors
    have = full.shape[1]
    if have < min(r, d):
        generator = torch.Generator().manual_seed(0)
        fresh = torch.randn(d, min(r, d) - have, dtype=full.dtype, device="cpu", generator=generator).to(full.device)
        fresh -= full @ (full.T @ fresh)
        full = torch.cat([full, torch.linalg.qr(fresh)[0]], 1)
    return padded(full, r)
