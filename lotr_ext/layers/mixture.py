"""One forward for rows of several adapters that share their factors: y_i = x_i W^T + bias + s_i ((x_i A) G_c(i)) B^T.

The products with A and B are taken for the whole batch at once, by the nodes of any other call, so that siblings share x A and
the factors have their shared gradients. Only the small product with a row's core is made here, unfolded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.call import Call, add_rows


class Mixture(NamedTuple):
    """parts: a core [r_in, r_out] and a scaling for each adapter, None for none; rows: which part row i of x takes [b]."""

    parts: tuple[tuple[Tensor | None, float], ...]
    rows: Tensor


def cores_of(mixture: Mixture, like: Tensor) -> Tensor:
    """s_c(i) G_c(i) for each row i: [b, r_in, r_out] on like's device, in the cores' dtype. like: a core."""
    zero = torch.zeros_like(like)
    cores = torch.stack([zero if core is None else core.to(like.device) * scaling for core, scaling in mixture.parts])
    return cores[mixture.rows.to(like.device)]


def call_mixed(x: Tensor, base: Callable[[Tensor], Tensor], A: Tensor, B: Tensor, cores: Tensor, call: Call) -> Tensor:
    """base(x) + ((drop(x) A) cores[i]) B^T for row i of x [b, ..., k]; cores [b, r_in, r_out] have their scalings in them.

    Raises ValueError for an x whose first dimension is not b.
    """
    if x.dim() < 2 or x.shape[0] != cores.shape[0]:
        raise ValueError(f"x: expected a batch of {cores.shape[0]} rows, one an adapter name, got shape {tuple(x.shape)}")
    return add_rows(x, base(x), A, B, cores, call)
