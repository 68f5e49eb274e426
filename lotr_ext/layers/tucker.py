"""Tucker-2: a stack of matrices D_l [n, k] as B G_l^T A^T with common A and B, least squares over all l at once.

HOSVD gives a start (De Lathauwer et al., 2000a): the leading left singular vectors of all D_l^T side by side. HOOI, alternating
least squares, improves it (De Lathauwer et al., 2000b). Both need only products of D_l with thin matrices, so the D_l may be
dense (`tucker2`) or products of low rank (`interop/tucker.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["EXACT", "POWERS", "hooi", "leading", "padded", "tucker2"]

EXACT = 640  # up to this size a dense decomposition takes a fraction of a second
POWERS = 9  # from a random subspace; between two iterations of HOOI one power is enough
_OVERSAMPLE = 10


def leading(side: Sequence[Tensor], r: int, start: Tensor | None = None, powers: int = POWERS) -> Tensor:
    """The r leading left singular vectors [d, r] of all of `side` ([d, c_l] each, float64) side by side.

    Dense if one dimension is small. Otherwise `powers` steps of subspace iteration from start, or from a fixed random block,
    which are exact on stacks of rank <= r + 10.
    """
    d, columns = side[0].shape[0], sum(t.shape[1] for t in side)
    if r <= columns < d and columns <= EXACT:
        q, upper = torch.linalg.qr(torch.cat(list(side), 1))
        return q @ torch.linalg.svd(upper)[0][:, :r]
    if d <= EXACT or 8 * (r + _OVERSAMPLE) >= d:  # iterating on such a wide block would cost more
        gram = torch.zeros(d, d, dtype=side[0].dtype, device=side[0].device)
        for t in side:
            gram.addmm_(t, t.T)
        return torch.linalg.eigh(gram)[1].flip(1)[:, :r].contiguous()
    generator = torch.Generator().manual_seed(0)
    width = r + _OVERSAMPLE - (0 if start is None else r)
    block = torch.randn(d, width, dtype=torch.float64, device="cpu", generator=generator).to(side[0].device)
    block = block if start is None else torch.cat([start, block], 1)
    for _ in range(powers):
        block = torch.linalg.qr(sum((t @ (t.T @ block) for t in side[1:]), side[0] @ (side[0].T @ block)))[0]
    small = torch.cat([block.T @ t for t in side], 1)
    return block @ torch.linalg.eigh(small @ small.T)[1].flip(1)[:, :r]


def hooi(
    to_left: Callable[[Tensor], Sequence[Tensor]],
    to_right: Callable[[Tensor], Sequence[Tensor]],
    start: tuple[Tensor, Tensor | None],
    rank: tuple[int, int],
    total: float,
    *,
    max_iterations: int,
    tolerance: float,
    enough: float = 0.0,
    report: Callable[[float], None] = lambda done: None,
) -> tuple[Tensor, Tensor, int]:
    """A [k, r_in] and B [n, r_out] with orthonormal columns, improved alternately, and the number of iterations.

    Args:
        to_left, to_right: A -> [D_l A], B -> [D_l^T B], or other matrices with the same Gram matrices of columns.
        start: A, and B if it is known.
        rank: (r_in, r_out).
        total: the stack's squared norm.
        max_iterations: at least 1.
        tolerance: stops when the relative error falls by less.
        enough: stops when the relative error is less.
        report: called with the fraction of max_iterations that is done.
    """
    (A, B), error = start, math.inf
    for iteration in range(1, max_iterations + 1):
        B = leading(to_left(A), rank[1], B, POWERS if B is None else 1)
        halves = to_right(B)
        A = leading(halves, rank[0], A, 1)
        captured = sum(float((A.T @ half).square().sum()) for half in halves)
        before, error = error, math.sqrt(max(0.0, 1 - captured / total)) if total > 0 else 0.0
        report(iteration / max_iterations)
        if before - error <= tolerance or error < enough:
            break
    return A, B, iteration


def padded(vectors: Tensor, r: int) -> Tensor:
    """[d, r] from [d, d]: the columns beyond d are unit vectors, which can be trained (their core rows start at zero)."""
    d, have = vectors.shape
    if r <= have:
        return vectors
    unit = torch.eye(d, dtype=vectors.dtype, device=vectors.device)
    return torch.cat([vectors, unit[:, torch.arange(r - have, device=vectors.device) % d]], 1)


def tucker2(
    weights: Sequence[Tensor], rank: tuple[int, int], *, max_iterations: int = 20, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The Tucker-2 factorisation of a stack of weights: W_l ~= B G_l^T A^T, least squares over all l at once.

    A and B have orthonormal columns and G_l = A^T W_l^T B. HOSVD gives the start; `hooi` improves A and B alternately. Exact
    when the stack has that multilinear rank.

    Args:
        weights: L matrices [N, K], any floating dtype; the work is done in float64.
        rank: (r_in, r_out). Beyond K (or N) the extra columns are unit vectors with zero core rows.
        max_iterations: as for `hooi`.
        tolerance: as for `hooi`.

    Returns:
        A [K, r_in], B [N, r_out], cores [L, r_in, r_out], float64.

    Raises:
        ValueError: no weights, weights of different shapes, not 2-D, not finite or without data (meta), or a rank below 1.
    """
    if not weights:
        raise ValueError("weights: expected at least one matrix, got none")
    shape = tuple(weights[0].shape)
    for i, w in enumerate(weights):
        if w.dim() != 2 or tuple(w.shape) != shape:
            raise ValueError(f"weights[{i}]: expected shape {shape if len(shape) == 2 else '[N, K]'}, got {tuple(w.shape)}")
        if w.is_meta:
            raise ValueError(f"weights[{i}]: expected values to factorise, got a tensor on the meta device")
        if not torch.isfinite(w).all():
            raise ValueError(f"weights[{i}]: expected finite values, got NaN or infinity")
    if min(rank) < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    n, k = shape
    r_in, r_out = min(rank[0], k), min(rank[1], n)
    with torch.no_grad():
        stack = [w.detach().double() for w in weights]
        total = sum(float(w.square().sum()) for w in stack)
        A, B, _ = hooi(
            lambda A: [w @ A for w in stack],
            lambda B: [w.T @ B for w in stack],
            (leading([w.T for w in stack], r_in), None),
            (r_in, r_out),
            total,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        A, B = padded(A, rank[0]), padded(B, rank[1])
        cores = torch.zeros(len(stack), *rank, dtype=torch.float64, device=stack[0].device)
        for core, w in zip(cores, stack, strict=True):
            core[:r_in, :r_out] = A[:, :r_in].T @ w.T @ B[:, :r_out]
    return A, B, cores
