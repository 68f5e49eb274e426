"""The operators of `csrc/torch` that compute one product each, as typed functions with their shapes and gradients.

Schemas, argument checks and kernels are C++ (one schema for CPU and CUDA). This module registers what LibTorch's stable ABI
cannot: shapes for FakeTensor (torch.compile, torch.export), gradients, and (`library.py`) version counters.

x and the results have one dtype: float32, bfloat16, float16 or float64. Sums are float32 (float64 for float64). Factors may be
float32 beside a half-precision x; they are rounded to x's dtype first, as under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import accumulate_dtype, bump_versions, check_tensors, refuse_gradients, shapes
from .library import lotr as _lotr


def rank_rows(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output whose last dimension is a rank: contiguous, but on CUDA a row starts at a multiple of 16 bytes."""
    dtype = dtype or like.dtype
    if like.device.type != "cuda":
        return like.new_empty(size, dtype=dtype)
    chunk = 16 // dtype.itemsize
    strides = [1]
    for i in range(len(size) - 1, 0, -1):
        step = -(-size[i] // chunk) * chunk if i == len(size) - 1 else size[i]
        strides.insert(0, strides[0] * step)
    return like.new_empty_strided(size, strides, dtype=dtype)


def shrink(x: Tensor, A: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """u = drop(x) A: [m, k] and [k, r] -> [m, r] in x's dtype. Differentiable.

    p, seed: dropout by Philox from a seed tensor (int64, one element, on x's device); see `reference.dropout_mask`.
    """
    return _lotr.shrink.default(x, A, p, seed)


@shapes("shrink")
def _(x: Tensor, A: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    torch._check(x.dim() == 2 and A.dim() == 2, lambda: f"shrink: expected x and A of 2 dimensions, got {x.dim()}, {A.dim()}")
    torch._check(x.shape[1] == A.shape[0], lambda: f"shrink: A: expected {x.shape[1]} rows, got {A.shape[0]}")
    return rank_rows(x, x.shape[0], A.shape[1])


def _shrink_backward(ctx, k: Tensor):
    x, A, seed = ctx.saved_tensors
    mask = dropout_mask(x.shape[0], x.shape[1], ctx.p, seed, x.dtype) if ctx.p > 0.0 else None
    dx = dA = None
    if ctx.needs_input_grad[0]:
        dx = k @ A.to(k.dtype).mT
        dx = dx if mask is None else dx * mask
    if ctx.needs_input_grad[1]:
        dA = ((x if mask is None else x * mask).mT @ k).to(A.dtype)
    return dx, dA, None, None


def _setup_shrink(ctx, inputs, output) -> None:
    x, A, ctx.p, seed = inputs
    ctx.save_for_backward(x, A, seed)


torch.library.register_autograd("lotr::shrink", _shrink_backward, setup_context=_setup_shrink)


def expand_add_(y: Tensor, u: Tensor, F: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> None:
    """y [m, n] += drop(u [m, r] F [n, r]^T), in place."""
    _lotr.expand_add_.default(y, u, F, p, seed)


@shapes("expand_add_")
def _(y: Tensor, u: Tensor, F: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    torch._check(y.shape[0] == u.shape[0], lambda: f"expand_add_: u: expected {y.shape[0]} rows, got {u.shape[0]}")


def expand(y: Tensor, u: Tensor, F: Tensor) -> Tensor:
    """y [..., n] + u [m, r] F [n, r]^T as a new tensor."""
    return _lotr.expand.default(y, u, F)


@shapes("expand")
def _(y: Tensor, u: Tensor, F: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def factor_grad_(acc: Tensor, x: Tensor, k: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> None:
    """acc [k, r] += drop(x) [m, k]^T k [m, r], in place, in a fixed order; acc is float32 (float64 for float64)."""
    _lotr.factor_grad_.default(acc, x, k, p, seed)


@shapes("factor_grad_")
def _(acc: Tensor, x: Tensor, k: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    torch._check(x.shape[0] == k.shape[0], lambda: f"factor_grad_: k: expected {x.shape[0]} rows, got {k.shape[0]}")


def shrink_grad_(Q: Tensor, g: Tensor, F: Tensor, u: Tensor) -> Tensor:
    """Q [n, r_in] += g^T u in place, in float32 (float64); returns k = g F [m, r_in] in g's dtype. g is read once."""
    return _lotr.shrink_grad_.default(Q, g, F, u)


@shapes("shrink_grad_")
def _(Q: Tensor, g: Tensor, F: Tensor, u: Tensor) -> Tensor:
    torch._check(g.shape[1] == F.shape[0], lambda: f"shrink_grad_: F: expected {g.shape[1]} rows, got {F.shape[0]}")
    torch._check(g.shape[0] == u.shape[0], lambda: f"shrink_grad_: u: expected {g.shape[0]} rows, got {u.shape[0]}")
    return rank_rows(g, g.shape[0], F.shape[1])


def fold(B: Tensor, cores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """F_l = s B G_l^T: [n, r_out] and [l, r_in, r_out] -> [l, n, r_in] in dtype, rounded once. Differentiable."""
    return _lotr.fold.default(B, cores, scaling, dtype)


@shapes("fold")
def _(B: Tensor, cores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    torch._check(B.shape[1] == cores.shape[2], lambda: f"fold: cores: expected r_out {B.shape[1]}, got {cores.shape[2]}")
    return rank_rows(B, cores.shape[0], B.shape[0], cores.shape[1], dtype=dtype)


def _fold_backward(ctx, dF: Tensor):
    B, cores = ctx.saved_tensors
    wide, scaling = accumulate_dtype(B.dtype), ctx.scaling
    dF = dF.to(wide)
    dB = dcores = None
    if ctx.needs_input_grad[0]:
        dB = (scaling * (dF @ cores.to(wide)).sum(0)).to(B.dtype)
    if ctx.needs_input_grad[1]:
        dcores = (scaling * (dF.mT @ B.to(wide))).to(cores.dtype)
    return dB, dcores, None, None


def _setup_fold(ctx, inputs, output) -> None:
    B, cores, ctx.scaling, _ = inputs
    ctx.save_for_backward(B, cores)


torch.library.register_autograd("lotr::fold", _fold_backward, setup_context=_setup_fold)


def fold_grad(Q: Tensor, B: Tensor, cores: Tensor, scaling: float, dB: Tensor | None = None) -> Tensor:
    """dB [n, r_out] += s sum_l Q_l G_l, in place where given; returns dG_l = s Q_l^T B [l, r_in, r_out]. Q [l, n, r_in]."""
    return _lotr.fold_grad.default(Q, B, cores, scaling, dB)


@shapes("fold_grad")
def _(Q: Tensor, B: Tensor, cores: Tensor, scaling: float, dB: Tensor | None) -> Tensor:
    return Q.new_empty(cores.shape)


def row_norms(
    weight: Tensor, square: Tensor, WA: Tensor | None, A: Tensor, B: Tensor, core: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(c, W A): the lengths c_n = |W_n + F_n A^T| [n] of a weight W [n, k], with F = s B G^T, and W A [n, r_in]. On CPUs only.

    square [n]: |W_n|^2; WA: W A, if it is known. They and the results are float32 (float64 for float64). A [k, r_in] is rounded
    to W's dtype in W A, as in the layer's products. The length of a row of zeros is the root of the smallest normal number.
    """
    if torch.is_grad_enabled():
        refuse_gradients("row_norms", weight, square, WA, A, B, core)
    norm, made = _lotr.row_norms.default(weight, square, WA, A, B, core, scaling)
    return norm, made if WA is None else WA


@shapes("row_norms")
def _(weight, square, WA, A, B, core, scaling):
    torch._check(weight.shape[1] == A.shape[0], lambda: f"row_norms: A: expected {weight.shape[1]} rows, got {A.shape[0]}")
    return square.new_empty(square.shape), square.new_empty(weight.shape[0], A.shape[1]) if WA is None else None


@torch.library.custom_op("lotr::dropout_mask", mutates_args=())
def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [rows, cols] that shrink, expand_add_ and factor_grad_ draw from (p, seed): 0, or 1 / (1 - p) where kept.

    It is one operator for autograd and dispatch modes. If selective checkpointing saw the allocation and the in-place write
    apart and saved only our operators, it would allocate again in the recomputation and not repeat the write.
    """
    check_tensors("dropout_mask", (rows, cols, p, seed, dtype), values=True)
    mask = torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    one = torch.ones(1, 1, dtype=dtype, device=seed.device)
    expand_add_(mask, one.expand(rows, 1), one.expand(cols, 1), p=p, seed=seed)
    return mask


@shapes("dropout_mask")
def _(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, cols, dtype=dtype, device=seed.device)


for _name in ("expand_add_", "factor_grad_", "shrink_grad_", "fold_grad"):
    bump_versions(_name)
