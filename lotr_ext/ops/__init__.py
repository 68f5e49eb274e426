"""The operators of lotr_ext, the planner that chooses among them, and their formulas in torch's own products.

An operator raises RuntimeError, `lotr::<operator>: <argument>: expected .., got ..`, before it writes anything.
"""

from .layer import UNFOLDED, layer_backward, layer_forward, scale_backward, shrink_backward
from .library import accumulate_dtype
from .operators import (
    dropout_mask,
    expand,
    expand_add_,
    factor_grad_,
    fold,
    fold_grad,
    row_norms,
    shrink,
    shrink_grad_,
)
from .row_core import row_core

__all__ = [
    "UNFOLDED",
    "accumulate_dtype",
    "dropout_mask",
    "expand",
    "expand_add_",
    "factor_grad_",
    "fold",
    "fold_grad",
    "layer_backward",
    "layer_forward",
    "row_core",
    "row_norms",
    "scale_backward",
    "shrink",
    "shrink_backward",
    "shrink_grad_",
]
