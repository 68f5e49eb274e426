"""One forward for rows of many adapters that share their factors: y_i = x_i W^T + bias + s ((x_i A) G_c(i)) B^T.

The products with A and B are computed for the whole batch by the nodes of any other call, so that siblings share x A and the
factors have their shared gradients. Only the small product with each row's core is added, unfolded.

`mixed` makes a Mixture for each layer, of named adapters (`model/adapters.py`) or of a TaskBank's tasks (`model/tasks.py`),
and `per_example` one that gives each row the layer's own core (`model/per_example.py`). The request holds it
(`request.py`), and the layer reads its cores by `cores_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.call import Call, add_rows


class Mixture(NamedTuple):
    """cores: [c, r_in, r_out], of experts [c, e, r_in, r_out], times scaling; or the parts that they are made of, a core and a
    factor of scaling for each adapter; or a function that makes b of them from the layer's core. index [b] (int64): which of
    them row i of the batch takes, -1 for none; None: row i takes the i-th, for any b. flat: whether a layer may get the tokens
    of all rows in one list [m, k], as in a mixture beside its experts."""

    cores: Tensor | tuple[tuple[Tensor, float], ...] | Callable[[Tensor, int], Tensor]
    scaling: float
    index: Tensor | None
    flat: bool = False


def cores_of(mixture: Mixture, core: Tensor, b: int) -> Tensor:
    """[c, r_in, r_out], of experts [c, e, r_in, r_out], on the device of core, the layer's own. b: rows of the batch."""
    if isinstance(mixture.cores, Tensor):
        return mixture.cores
    if callable(mixture.cores):
        return mixture.cores(core, b)
    return torch.stack([part.to(core.device) * scaling for part, scaling in mixture.cores])


def places_in_batch(mixture: Mixture, tokens: Tensor, m: int) -> Tensor:
    """For each of tokens [rows], the row of the batch that it is in. The m tokens of the batch lie row after row.

    Raises ValueError unless all rows have the same number of tokens.
    """
    if mixture.index is None:
        raise ValueError(
            "batch: expected the number of examples of a batch, which the experts of a mixture do not see, got None; "
            "per_example(model, batch=...)"
        )
    b = mixture.index.shape[0]
    if m % b:
        raise ValueError(f"x: expected the tokens of a batch of {b} rows, as many in each, got {m}")
    return tokens // max(1, m // b)


def index_for(mixture: Mixture, x: Tensor) -> Tensor:
    """An index for x's first dimension: that of the batch, or, for a flat x, the one of each token's row."""
    if mixture.index is None:
        return torch.arange(len(x), device=x.device)
    if not mixture.flat or x.dim() != 2:
        return mixture.index
    return mixture.index.to(x.device)[places_in_batch(mixture, torch.arange(len(x), device=x.device), len(x))]


def cores_of_rows(mixture: Mixture, places: Tensor, experts: Tensor, e: int) -> Tensor:
    """For each row, its index among the cores [c e, r_in, r_out]: that of (adapter, expert). -1 without an adapter, or for an
    expert of another process (e and above). places: the rows' places in the batch; experts: theirs, of e."""
    adapter = mixture.index.to(places.device)[places]
    return torch.where((adapter == -1) | (experts >= e), -1, adapter * e + experts)


def call_mixed(
    x: Tensor, base: Callable[[Tensor], Tensor], A: Tensor, B: Tensor, cores: Tensor, index: Tensor, call: Call
) -> Tensor:
    """base(x) + s ((drop(x) A) cores[index[i]]) B^T for row i of x [b, ..., k], s the call's scaling.

    Raises ValueError for an x whose first dimension is not b.
    """
    if x.dim() < 2 or x.shape[0] != index.shape[0]:
        raise ValueError(f"x: expected a batch of {index.shape[0]} rows, one an adapter name, got shape {tuple(x.shape)}")
    return add_rows(x, base(x), A, B, cores, index, call)
