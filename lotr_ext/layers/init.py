"""How factors and cores start.

    factors   orthonormal   A^T A = I (or A A^T = I when r > d): the core's gradient does not grow with the width
              normal        N(0, 1), what the paper's own code draws
              kaiming       U(-1/sqrt(d), 1/sqrt(d)), as LoRA draws its A
              svd           from the weights themselves (`tucker2`); subtracted from them by `apply_lotr`
              gradient      from the weights' gradients on a few batches (`lotr_ext.init_from_gradient`)
    cores     zero          delta W = 0, so the model starts unchanged
              identity      G = I, and B starts at zero so that the model still starts unchanged (as LoRA does)

Source of the factorisation: Tucker-2 by HOSVD (De Lathauwer et al., 2000a) improved by alternating least squares, "HOOI"
(De Lathauwer et al., 2000b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["CORE_INITS", "FACTOR_INITS", "fill_core_", "fill_factor_", "tucker2"]

CORE_INITS = ("zero", "identity")
FOUND_INITS = ("svd", "gradient")  # of factors that apply_lotr finds in the model


def _orthonormal(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A random [d, r] with orthonormal columns, or rows when r > d; uniform over all of them (the sign of R's diagonal)."""
    if r > d:
        return _orthonormal(r, d, dtype, device, generator).T
    q, upper = torch.linalg.qr(torch.randn(d, r, dtype=dtype, device=device, generator=generator))
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(dtype)


def _normal(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(d, r, dtype=dtype, device=device, generator=generator)


def _kaiming(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(d, r, dtype=dtype, device=device, generator=generator) - 1) / math.sqrt(d)


_FILLS: dict[str, Callable[..., Tensor]] = {"orthonormal": _orthonormal, "normal": _normal, "kaiming": _kaiming}
FACTOR_INITS = tuple(_FILLS)


def fill_factor_(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fills a factor in place.

    Args:
        tensor: [d, r], any floating dtype (values are drawn in fp32, or fp64 for fp64, and cast once). On the meta device
            nothing is drawn.
        init: "orthonormal", "normal" or "kaiming".
        generator: of the tensor's device; None for torch's global one.

    Returns:
        tensor.

    Raises:
        ValueError: an unknown init, or a tensor that is not 2-D.
        TypeError: a dtype that is not floating.
    """
    if init not in _FILLS:
        raise ValueError(f"init: expected one of {', '.join(FACTOR_INITS)}, got {init!r}")
    if tensor.dim() != 2:
        raise ValueError(f"tensor: expected 2 dimensions [d, r], got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating dtype, got {tensor.dtype}")
    if tensor.is_meta:
        return tensor
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    d, r = tensor.shape
    with torch.no_grad():
        return tensor.copy_(_FILLS[init](d, r, wide, tensor.device, generator))


def fill_core_(tensor: Tensor, init: str) -> Tensor:
    """Fills a core [r_in, r_out], or experts' [e, r_in, r_out], in place: "zero", or "identity" (ones on the diagonal, also of
    a rectangular core).

    Raises:
        ValueError: an unknown init, or a tensor that is not 2-D or 3-D.
    """
    if init not in CORE_INITS:
        raise ValueError(f"core_init: expected one of {', '.join(CORE_INITS)}, got {init!r}")
    if tensor.dim() not in (2, 3):
        raise ValueError(f"tensor: expected 2 dimensions [r_in, r_out], or 3 with experts, got shape {tuple(tensor.shape)}")
    with torch.no_grad():
        tensor.zero_()
        if init == "identity":
            tensor.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return tensor


_EXACT = 512  # up to this size a dense decomposition takes a fraction of a second
_OVERSAMPLE, _POWERS = 10, 8


def leading(side: Sequence[Tensor], r: int) -> Tensor:
    """The r leading left singular vectors [d, r] of all of `side` ([d, c_l] each, float64) next to each other.

    Dense where the smaller side is small, else subspace iteration from a fixed start (exact on stacks of rank <= r + 10).
    """
    d, columns = side[0].shape[0], sum(t.shape[1] for t in side)
    if r <= columns < d and columns <= _EXACT:
        q, upper = torch.linalg.qr(torch.cat(list(side), 1))
        return q @ torch.linalg.svd(upper)[0][:, :r]
    if d <= _EXACT or r + _OVERSAMPLE >= d:
        gram = torch.zeros(d, d, dtype=side[0].dtype, device=side[0].device)
        for t in side:
            gram.addmm_(t, t.T)
        return torch.linalg.eigh(gram)[1].flip(1)[:, :r].contiguous()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(d, r + _OVERSAMPLE, dtype=torch.float64, device="cpu", generator=generator).to(side[0].device)
    for _ in range(_POWERS):
        block = sum((t @ (t.T @ block) for t in side[1:]), side[0] @ (side[0].T @ block))
        block = torch.linalg.qr(block)[0]
    small = torch.cat([block.T @ t for t in side], 1)
    return block @ torch.linalg.eigh(small @ small.T)[1].flip(1)[:, :r]


def padded(vectors: Tensor, r: int) -> Tensor:
    """[d, r] from [d, d]: the columns beyond d are unit vectors, so that they can learn (their core rows start at zero)."""
    d, have = vectors.shape
    if r <= have:
        return vectors
    unit = torch.eye(d, dtype=vectors.dtype, device=vectors.device)
    return torch.cat([vectors, unit[:, torch.arange(r - have, device=vectors.device) % d]], 1)


def tucker2(
    weights: Sequence[Tensor], rank: tuple[int, int], *, max_iterations: int = 20, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The Tucker-2 factorisation of a stack of weights: W_l ~= B G_l^T A^T, least squares over all l at once.

    A and B have orthonormal columns and G_l = A^T W_l^T B; HOSVD gives the start, then A and B are improved in turn until the
    captured share of the squared norm grows by less than `tolerance`. Exact when the stack has that multilinear rank.

    Args:
        weights: L matrices [N, K], any floating dtype; the work is done in float64.
        rank: (r_in, r_out). Beyond K (or N) the extra columns are unit vectors with zero core rows.

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
        A = leading([w.T for w in stack], r_in)
        captured = -math.inf
        for _ in range(max_iterations):
            B = leading([w @ A for w in stack], r_out)
            halves = [w.T @ B for w in stack]
            A = leading(halves, r_in)
            now = sum(float((A.T @ h).square().sum()) for h in halves)
            if now - captured <= tolerance * total:
                break
            captured = now
        A, B = padded(A, rank[0]), padded(B, rank[1])
        cores = torch.zeros(len(stack), *rank, dtype=torch.float64, device=stack[0].device)
        for core, w in zip(cores, stack, strict=True):
            core[:r_in, :r_out] = A[:, :r_in].T @ w.T @ B[:, :r_out]
    return A, B, cores
