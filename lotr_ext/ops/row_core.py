"""A core a row: h_i = s u_t(i) G_c(i), the small product between the shrink and the expand of a mixture.

Rows are those of tokens that were sent to experts, or of a batch whose rows belong to different tasks. A and B stay dense
products for all of them; only this one picks a core by row.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..compat import functorch_active
from . import composite


def row_core(
    u: Tensor,
    cores: Tensor,
    *,
    index: Tensor | None = None,
    offs: Tensor | None = None,
    tokens: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """h_i = scaling u_t(i) G_c(i): u [m, r_in] and cores [c, r_in, r_out] -> h [rows, r_out] in u's dtype.

    Exactly one of index and offs says which core a row takes. index [rows] (int64): its core, or -1 for none: then h is zero.
    offs [c] (int32): where the rows of each core end, as torch's grouped_mm takes them: core j has the rows from offs[j - 1]
    (0) to offs[j]; rows from offs[-1] on have none, and h is zero. tokens [rows] (int64): row i reads u[tokens[i]]; None: u[i].
    cores are of u's dtype, or float32 beside a half-precision u (rounded to it).

    Differentiable in u and cores: du_t = s sum over a token's rows of dh_i G_c(i)^T and dG_c = s sum over the rows of c of
    u_t(i)^T dh_i, summed in float32 (float64 for float64) in the order of the rows, rounded once.
    Raises TypeError or ValueError that says name, expected and got.
    """
    _check(u, cores, index, offs, tokens)
    if offs is not None:
        rows = u.shape[0] if tokens is None else tokens.shape[0]
        index = torch.searchsorted(offs, torch.arange(rows, device=u.device, dtype=offs.dtype), right=True)
        index = torch.where(index < cores.shape[0], index, -1)
    return composite.row_core(u, cores, index, tokens, scaling)


def _check(u: Tensor, cores: Tensor, index: Tensor | None, offs: Tensor | None, tokens: Tensor | None) -> None:
    if (index is None) == (offs is None):
        raise TypeError(f"index, offs: expected exactly one of them, got {'none' if index is None else 'both'}")
    if u.dim() != 2:
        raise ValueError(f"u: expected shape [m, r_in], got {tuple(u.shape)}")
    if cores.dim() != 3 or cores.shape[1] != u.shape[1] or 0 in cores.shape:
        raise ValueError(f"cores: expected shape (c, {u.shape[1]}, r_out) with c, r_out >= 1, got {tuple(cores.shape)}")
    integers = (("index", index, torch.int64), ("offs", offs, torch.int32), ("tokens", tokens, torch.int64))
    for name, tensor, dtype in integers:
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")
    rows = u.shape[0] if tokens is None else tokens.shape[0]
    if index is not None and index.shape[0] != rows:
        raise ValueError(f"index: expected {rows} rows, as {'u' if tokens is None else 'tokens'} has, got {index.shape[0]}")
    if offs is not None and offs.shape[0] != cores.shape[0]:
        raise ValueError(f"offs: expected one end a core, {cores.shape[0]}, got {offs.shape[0]}")
    if rows == 0 or u.device.type != "cpu" or is_compiling() or functorch_active() or type(u) not in (Tensor, nn.Parameter):
        return  # no values to look at, or none without a synchronisation
    if index is not None and not (int(index.min()) >= -1 and int(index.max()) < cores.shape[0]):
        raise ValueError(f"index: expected cores in [-1, {cores.shape[0]}), got {int(index.min())} to {int(index.max())}")
    if tokens is not None and not (int(tokens.min()) >= 0 and int(tokens.max()) < u.shape[0]):
        raise ValueError(f"tokens: expected rows of u in [0, {u.shape[0]}), got {int(tokens.min())} to {int(tokens.max())}")
    if offs is not None:
        ends = offs.tolist()
        if ends[0] < 0 or any(a > b for a, b in pairwise(ends)) or ends[-1] > rows:
            raise ValueError(f"offs: expected ascending ends in [0, {rows}], got {ends}")
