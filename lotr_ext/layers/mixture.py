"""One forward for rows of different adapters over the same factors: y_i = x_i W^T + bias + s ((x_i A) G_c(i)) B^T.

The products with A and B are computed for the whole batch by the same nodes as in any other call, so that siblings share x A
and factors have their shared gradients. Only the small product with each row's core is added, unfolded.

`mixed` makes a Mixture for each layer, of named adapters (`model/adapters.py`) or of a TaskBank's tasks (`model/tasks.py`),
and `per_example` one in which each row has the layer's own core (`model/per_example.py`). The request holds it
(`request.py`), and the layer reads its cores by `cores_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.bank import open_scope
from ..autograd.call import Call, add_rows, linear_rows
from ..autograd.tensor_parallel import call_cut, is_dtensor
from ..compat import is_compiling


class Mixture(NamedTuple):
    """cores: [c, r_in, r_out], of experts [c, e, r_in, r_out], times scaling; or their parts, a core and a
    factor of scaling for each adapter; or a function that returns b of them from the layer's core. index (int64): which of them
    row i of the batch takes [b], or the token at position j of row i [b, t], -1 for none; None: row i takes the i-th, for any
    b. flat: whether a layer may get the tokens of all rows in one list [m, k], as in a mixture beside its experts. adapter: one
    with the factors of all, in a layer that has several."""

    cores: Tensor | tuple[tuple[Tensor, float], ...] | Callable[[Tensor, int], Tensor]
    scaling: float
    index: Tensor | None
    flat: bool = False
    adapter: str | None = None


def mixture_of(parts: Sequence[tuple[Tensor, float]], index: Tensor, adapter: str | None = None) -> Mixture:
    """The Mixture of several adapters' (core, scaling). The largest scaling is applied last: s G could overflow in float16."""
    most = max(abs(scaling) for _, scaling in parts) or 1.0
    return Mixture(tuple((core, scaling / most) for core, scaling in parts), most, index, adapter=adapter)


def cores_of(mixture: Mixture, core: Tensor, b: int) -> Tensor:
    """[c, r_in, r_out], of experts [c, e, r_in, r_out], on the device of the layer's core. b: rows of the batch."""
    if isinstance(mixture.cores, Tensor):
        return mixture.cores
    if callable(mixture.cores):
        return mixture.cores(core, b)
    return torch.stack([part.to(core.device) * scaling for part, scaling in mixture.cores])


def tasks_of_tokens(mixture: Mixture, tokens: Tensor, m: int) -> Tensor:
    """The adapter of each of tokens [rows], from the index. The m tokens of the batch lie row after row.

    Raises ValueError unless all rows have the same number of tokens.
    """
    index = mixture.index
    if index is None:
        raise ValueError(
            "batch: expected the number of examples of a batch, which the experts of a mixture do not see, got None; "
            "per_example(model, batch=...)"
        )
    b = index.shape[0]
    if m % b if b else m:
        raise ValueError(f"x: expected the tokens of a batch of {b} rows of equal length, got {m}")
    each = max(1, m // b)
    if index.dim() == 1:
        return index.to(tokens.device)[tokens // each]
    return _of_this_forward(index, each).to(tokens.device).reshape(-1)[tokens]


def _of_this_forward(index: Tensor, count: int) -> Tensor:
    """The columns [b, count] of an index [b, t] for a layer's `count` tokens per row: those after the cached tokens, which the
    model's forward was given. All tokens after the index use its last column.

    Raises ValueError if a layer has another number of tokens than the model's forward, or without a cache than the index.
    """
    scope, t = None if is_compiling() else open_scope(), index.shape[1]
    if scope is None or scope.cached is None:
        if count != t:
            raise ValueError(
                f"x: expected {t} tokens per row, as in the index of tasks, got {count}; give an index [b, {count}], or [b] "
                "for one task per row. Steps after the index need a cache in the model's own forward"
            )
        return index
    past, own = scope.cached
    if count != own:
        raise ValueError(
            f"x: expected the {own} tokens per row that the model was called with, got {count}: an index per token does not "
            "say which these are; give an index [b] of one task per row, or do not adapt this layer"
        )
    if isinstance(past, Tensor):
        return index[:, (torch.arange(count, device=past.device) + past).clamp(max=t - 1).to(index.device)]
    known = index[:, past : past + count]
    after = index[:, -1:].expand(-1, count - known.shape[1])
    return known if known.shape[1] == count else torch.cat((known, after), 1)


def index_for(mixture: Mixture, x: Tensor) -> Tensor:
    """An index for x's first dimension, [b], or its first two, [b, t]; for a flat x [m, k] that of each token, [m]."""
    index = mixture.index
    if index is None:
        return torch.arange(len(x), device=x.device)
    if mixture.flat and x.dim() == 2:
        return tasks_of_tokens(mixture, torch.arange(len(x), device=x.device), len(x))
    if index.dim() == 1:
        return index
    if x.dim() != 3 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f"x: expected shape [{index.shape[0]}, tokens, k] for an index [{index.shape[0]}, {index.shape[1]}] of a task per "
            f"token, got {tuple(x.shape)}; give an index [b] of one task per row, or do not adapt this layer"
        )
    return _of_this_forward(index, x.shape[1])


def cores_of_rows(tasks: Tensor, experts: Tensor, e: int) -> Tensor:
    """For each row, the index of (task, expert) among the cores [c e, r_in, r_out]. -1 without a task, or for an expert
    of another process (e and above). tasks and experts [rows]: the rows' own, -1 for no task."""
    return torch.where((tasks == -1) | (experts >= e), -1, tasks * e + experts)


def call_mixed(
    x: Tensor, base: Callable[[Tensor], Tensor] | tuple[Tensor, Tensor | None], A: Tensor, B: Tensor, cores: Tensor,
    index: Tensor, call: Call,
) -> Tensor:  # fmt: skip
    """base(x) + s ((drop(x) A) cores[index[i]]) B^T for row i of x [b, ..., k], s the call's scaling. index [b], or [b, t] of
    an x [b, t, ..., k]. base: a function, or weight and bias of a linear layer.

    Raises ValueError if x's first dimension is not b, or if a process has fewer rows; TypeError for a nested x.
    """
    if x.dim() < 2 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f"x: expected a batch of {index.shape[0]} rows, one per adapter name, got shape {tuple(x.shape)}; if these are the "
            "tokens of all rows, row after row, give mixed(..., flat=True), or per_example a batch"
        )
    if x.is_nested:
        raise TypeError("x: expected a dense batch where each row has its own core, got a nested tensor; pad it")
    if is_dtensor(x):
        return _call_in_part(x, *base, A, B, cores, index, call)
    if isinstance(base, tuple):
        return linear_rows(x, *base, A, B, cores, index, call)
    return add_rows(x, base(x), A, B, cores, index, call)


def _call_in_part(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, cores: Tensor, index: Tensor, call: Call
) -> Tensor:
    """`call_mixed` of a tensor parallel layer. The cores replace the core in the call, so their gradients are summed."""

    def rows(x: Tensor) -> None:
        if len(x) != len(index):
            raise ValueError(f"x: expected all {len(index)} rows of the batch in each process, got {len(x)} here")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, call: Call) -> Tensor:
        rows(x)
        return linear_rows(x, weight, bias, A, B, call.core, index, call)

    def add(x: Tensor, y: Tensor, A: Tensor, B: Tensor, call: Call) -> Tensor:
        rows(x)
        return add_rows(x, y, A, B, call.core, index, call)

    call.core = cores
    return call_cut(run, add, x, weight, bias, A, B, call)
