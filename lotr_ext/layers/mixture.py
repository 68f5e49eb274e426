"""One forward for rows of several adapters that share their factors: y_i = x_i W^T + bias + s_i ((x_i A) G_c(i)) B^T.

The products with A and B are taken for the whole batch at once, by the nodes of any other call, so that siblings share x A and
the factors' gradients go to their hubs. Only the small product with a row's core is made here, unfolded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.call import Adapter, compute_dtype, decide, dropped_input, shared_shrink
from ..autograd.nodes import apply_add
from ..ops.products import to


class Mixture(NamedTuple):
    """parts: a core [r_in, r_out] and a scaling for each adapter, None for none; rows: which part row i of x takes [b]."""

    parts: tuple[tuple[Tensor | None, float], ...]
    rows: Tensor


def cores_of(mixture: Mixture, like: Tensor) -> Tensor:
    """s_c(i) G_c(i) for each row i: [b, r_in, r_out] on like's device, in the cores' dtype. like: a core."""
    zero = torch.zeros_like(like)
    cores = torch.stack([zero if core is None else core.to(like.device) * scaling for core, scaling in mixture.parts])
    return cores[mixture.rows.to(like.device)]


def call_mixed(x: Tensor, base: Callable[[Tensor], Tensor], A: Tensor, B: Tensor, cores: Tensor, adapter: Adapter) -> Tensor:
    """base(x) + ((drop(x) A) cores[i]) B^T for row i of x [b, ..., k]; cores [b, r_in, r_out] have their scalings in them.

    Raises ValueError for an x whose first dimension is not b.
    """
    if x.dim() < 2 or x.shape[0] != cores.shape[0]:
        raise ValueError(f"x: expected a batch of {cores.shape[0]} rows, one an adapter name, got shape {tuple(x.shape)}")
    y, dtype = base(x), compute_dtype(x)
    if dtype is None:
        return _mixed(x, y, A, B, cores, adapter, None)
    with torch.autocast(x.device.type, enabled=False):
        return _mixed(x, y, A, B, cores, adapter, dtype)


def _mixed(x: Tensor, y: Tensor, A: Tensor, B: Tensor, cores: Tensor, adapter: Adapter, dtype: torch.dtype | None) -> Tensor:
    compute = dtype or x.dtype
    b, tokens = x.shape[0], x.shape[1:-1].numel()  # a row's tokens, which lie side by side and all take its core
    r_in, r_out = cores.shape[1:]
    if decide(x, A, adapter, compute, False, None).nodes == 0:
        dropped = dropped_input(x, A, adapter, compute, dtype is not None)
        u = to(dropped, compute) @ to(A, compute).to(x.device)
        h = u.reshape(b, tokens, r_in) @ to(cores, compute).to(x.device)
        delta = h @ to(B, compute).to(x.device).t()
        return y + to(delta.view(y.shape), y.dtype)
    shared_input = shared_shrink(x, A, adapter, compute, dtype is not None)
    h = (shared_input.u.reshape(b, tokens, r_in) @ to(cores, compute).to(x.device)).view(b * tokens, r_out)
    hub_B, shared_B = adapter.hang("B", B)
    identity = torch.eye(r_out, dtype=B.dtype, device=B.device)
    return apply_add(y, h, hub_B, identity, None, 1.0, shared_B, shared_input, None)
