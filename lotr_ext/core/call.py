"""The arguments of a layer's call, which dispatch.py, nodes.py and fallback.py pass on.

y = x W^T + bias + s ((drop(x) A) G) B^T          one core for all rows
y_i = base_i + s ((drop(x)_t(i) A) G_c(i)) B^T    with a RowChoice
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowChoice(NamedTuple):
    """Which core each row uses: by `index`, or by `offs` if the rows are sorted by core.

    Six rows and three cores. The last row has no core:

        index [0, 0, 1, 1, 2, -1]   or   offs [2, 4, 5]

    Attributes:
        index: The core of each row [rows], -1 for none.
        offs: Where the rows of each core end [c].
        reads: t(i), the row of x that each row reads [rows] (`tokens` in the operators' schemas).
            None if row i reads x_i.
    """

    index: Tensor | None
    offs: Tensor | None = None
    reads: Tensor | None = None

    @staticmethod
    def of_index(index: Tensor, x: Tensor) -> "RowChoice":
        """Returns the choice that an index [b], [b, tokens] or [rows] makes for x [.., k]."""
        lead = x.shape[:-1]
        # Repeats the index along the dimensions of x that it lacks.
        ones = (1,) * (len(lead) - index.dim())
        return RowChoice(index.view(*index.shape, *ones).expand(lead).reshape(-1))


def index_from_offs(offs: Tensor, rows: int, count: int) -> Tensor:
    """Returns the `index` [rows] that chooses the same as `offs`, -1 for rows past the last end.

    Args:
        offs: Where the rows of each core end [count].
        rows: The number of rows.
        count: The number of cores.
    """
    # "right" skips a core without rows, whose end equals the end before it.
    index = torch.searchsorted(offs.long(), torch.arange(rows, device=offs.device), right=True)
    return torch.where(index < count, index, -1)


class LayerCall(NamedTuple):
    """The arguments of one call of an adapted layer.

    Attributes:
        x: [.., k].
        weight: W [n, k]. None with a base_output.
        bias: [n].
        A: [k, r_in].
        B: [n, r_out].
        core: G [r_in, r_out], or [c, r_in, r_out] with a choice.
        scaling: s.
        p: The probability of dropping an element of the adapter's x.
        base_output: The output of another base layer [.., n]. It replaces x W^T + bias.
        choice: Which core each row of the output uses. None if all rows use one core.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    core: Tensor
    scaling: float
    p: float = 0.0
    base_output: Tensor | None = None
    choice: RowChoice | None = None
