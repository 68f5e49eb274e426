"""The formulas of a layer as PyTorch operations.

The `composite` strategy runs them, and so does a backward that autograd records (create_graph=True).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..compat import is_compiling
from . import planner
from .library import accumulate_dtype


def rows(t: Tensor) -> Tensor:
    """t as [m, last], a view where possible."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype; t itself if it has that dtype."""
    return t if t.dtype == dtype else t.to(dtype)


def here(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on `device`. If a group's layers lie on several devices, its factors are copied."""
    for t in tensors:
        if t.device != device:
            return tuple(t.to(device) for t in tensors)
    return tensors


def fold(B: Tensor, core: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """F = s B G^T [.., n, r_in] of cores [.., r_in, r_out], cast once."""
    wide = accumulate_dtype(B.dtype)
    return to((to(B, wide) @ to(core, wide).transpose(-2, -1)) * scaling, dtype)


def delta_weight(A: Tensor, B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """s B G^T A^T [.., n, k] in float32 (float64 for float64 factors)."""
    wide = accumulate_dtype(A.dtype)
    return fold(B, core, scaling, wide) @ to(A, wide).t()


def row_norms(
    square: Tensor,
    WA: Tensor,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    matrix: Callable[[], Tensor] | None = None,
) -> Tensor:
    """c_n = |W_n + F_n A^T| [n] in WA's dtype, from |W_n|^2 [n] and W A [n, r_in]. Rows of zeros have the smallest number.

    matrix: returns W [n, k]. With it, rows whose two parts nearly cancel are computed from W itself, because the difference of
    squares loses their digits; this reads values on the host. Without it, c_n is at least |W_n| sqrt(eps).
    """
    A, F = A.to(WA.device, WA.dtype), fold(B, core, scaling, WA.dtype).to(WA.device)
    squares = square + (torch.addmm(WA, F, A.t() @ A, beta=2) * F).sum(-1)
    if matrix is None:
        squares = torch.maximum(squares, square * torch.finfo(WA.dtype).eps)
    elif (low := (squares < square / 16).nonzero().squeeze(1)).numel():
        squares[low] = (to(matrix()[low], WA.dtype) + F[low] @ A.t()).square().sum(1)
    return squares.clamp(min=torch.finfo(WA.dtype).tiny).sqrt()


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """x W^T + bias, cast to dtype under autocast. Without (None) nothing is cast, so a mismatch fails as in nn.Linear."""
    if dtype is not None:
        x, weight, bias = to(x, dtype), to(weight, dtype), None if bias is None else to(bias, dtype)
    return nnf.linear(x, weight, bias)


def adapter(x: Tensor, A: Tensor, B: Tensor, core: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s ((x A) G) B^T in dtype. x has been through dropout."""
    A, B, core = here(x.device, A, B, core)
    if x.is_nested:  # its rows cannot be reshaped
        return expand(to(x, dtype) @ to(A, dtype), B, core, scaling)
    return expand(rows(to(x, dtype)) @ to(A, dtype), B, core, scaling).reshape(*x.shape[:-1], B.shape[0])


def expand(u: Tensor, B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """s (u G) B^T [m, n] in u's dtype."""
    if _is_unfolded(u):
        return ((u @ to(core, u.dtype)) @ to(B, u.dtype).t()) * scaling
    return u @ fold(B, core, scaling, u.dtype).t()


def expand_backward(
    g: Tensor,
    u: Tensor | None,
    B: Tensor | None,
    core: Tensor | None,
    scaling: float,
    need_k: bool,
    need_B: bool,
    need_core: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of `expand` for g [m, n]: (k [m, r_in], dB, dG), each only if it is needed.

    k needs B and core, dB needs u and core, dG needs u and B. Other inputs may be None.
    """
    B, core = (None if t is None else t.to(g.device) for t in (B, core))
    if _is_unfolded(g):
        g = g * scaling
        h = g @ to(B, g.dtype) if need_k or need_core else None
        return (
            h @ to(core, g.dtype).t() if need_k else None,
            g.t() @ (u @ to(core, g.dtype)) if need_B else None,
            u.t() @ h if need_core else None,
        )
    wide = accumulate_dtype(g.dtype)
    Q = to(g.t() @ u, wide) * scaling if need_B or need_core else None
    return (
        g @ fold(B, core, scaling, g.dtype) if need_k else None,
        Q @ to(core, wide) if need_B else None,
        Q.t() @ to(B, wide) if need_core else None,
    )


def _is_unfolded(t: Tensor) -> bool:
    """Whether t (u or g, [m, ..]) is multiplied with the core, which is then not folded into B: for few tokens, and for
    float16, where F may overflow."""
    # comparing a traced size would add a guard to the compiled graph
    known = not is_compiling() and isinstance(t.shape[0], int)
    return t.dtype == torch.float16 or (known and t.shape[0] < planner.FEW_TOKENS)


ROW_CORE_ELEMENTS = 2**20  # of cores that `row_core` gathers at a time


def row_core(u: Tensor, cores: Tensor, index: Tensor, tokens: Tensor | None, scaling: float) -> Tensor:
    """h_i = s u_t(i) G_c(i) [rows, r_out] in u's dtype, summed wide; rows whose index is -1 are zero.

    Cores are gathered for some rows at a time, never for all of them.
    """
    wide, (_, r_in, r_out) = accumulate_dtype(u.dtype), cores.shape
    if cores.dtype == wide:  # rounds the value to u's dtype, but not its gradient; the difference of two close numbers is exact
        cores = cores + (to(to(cores.detach(), u.dtype), wide) - cores.detach())
    cores = to(cores, wide)
    parts = []
    step = max(1, ROW_CORE_ELEMENTS // (r_in * r_out))
    for first in range(0, index.shape[0], step):
        core = index[first : first + step]
        rows_of_u = u[first : first + step] if tokens is None else u[tokens[first : first + step]]
        h = (to(rows_of_u, wide).unsqueeze(1) @ cores[core.clamp(min=0)]).squeeze(1) * scaling
        parts.append(to(h.masked_fill((core < 0).unsqueeze(1), 0), u.dtype))
    return torch.cat(parts) if parts else to(u[:0] @ cores[0].to(u.dtype), u.dtype)
