"""The base product of a mixture of experts, whose rows are sorted by expert.

    y_i = x_i W_c(i)^T      expert c computes the rows from offs[c - 1] to offs[c]

It is one matrix product per expert, or PyTorch's grouped product if that accepts the tensors. Rows
past the last end belong to no expert: x is not read there, and y is zero.

The products are operators, so that a compiled graph contains no loop over experts.

Not here: the adapter (dispatch.py) and who sorts the rows (experts.py).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from . import _torch_private as private
from .call import index_from_offs
from .operators import fake_kernel


@torch.library.custom_op("lotr::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Returns y_i = x_i W_c(i)^T [rows, n], zero in rows past the last end.

    Args:
        x: [rows, k].
        weight: [e, n, k] of x's dtype.
        offs: Where the rows of each expert end [e] (int32).
    """
    if _torch_can_run(x, weight):
        y = nn.functional.grouped_mm(x, weight.mT, offs=offs)
        # torch leaves the rows past the end unwritten. Reading offs here would wait for the GPU.
        is_past_end = torch.arange(len(x), device=x.device) >= offs[-1]
        return y.masked_fill_(is_past_end.unsqueeze(1), 0)
    y = x.new_empty(x.shape[0], weight.shape[1])
    *expert_rows, past_end = _rows_of_experts(offs, x.shape[0])
    # With few tokens, most experts have no rows.
    for expert, rows in enumerate(expert_rows):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight[expert].t(), out=y[rows])
    y[past_end].zero_()
    return y


@torch.library.custom_op("lotr::grouped_outer", mutates_args=())
def grouped_outer(g: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """Returns dW_c [e, n, k], the sum of g_i^T x_i over the rows i of expert c.

    Args:
        g: [rows, n].
        x: [rows, k].
        offs: Where the rows of each expert end [e] (int32).
    """
    dW = g.new_zeros(offs.shape[0], g.shape[1], x.shape[1])
    for expert, rows in enumerate(_rows_of_experts(offs, g.shape[0])[:-1]):
        if rows.stop > rows.start:
            torch.mm(g[rows].t(), x[rows], out=dW[expert])
    return dW


def _torch_can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product accepts these tensors.

    It accepts bfloat16 on a GPU from sm_80 on, if these are aligned to 16 bytes: the addresses, the
    rows of x, and the rows or the columns of each expert's weight.
    """
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and x.dtype == torch.bfloat16
        and x.shape[0] > 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and x.stride(1) == 1
        and 1 in (weight.stride(1), weight.stride(2))
        and x.stride(0) % 8 == 0
        and max(weight.stride(1), weight.stride(2)) % 8 == 0
    )


def _rows_of_experts(offs: Tensor, rows: int) -> list[slice]:
    """Returns the rows of each expert, and then the rows past the last end.

    Raises:
        ValueError: If offs does not ascend in [0, rows].
    """
    ends = offs.tolist()
    spans = [slice(start, end) for start, end in pairwise([0, *ends, rows])]
    if any(span.start > span.stop for span in spans):
        raise ValueError(f"offs: expected ascending ends in [0, {rows}], got {ends}")
    return spans


@fake_kernel("grouped_mm")
def _(x, weight, offs):
    return x.new_empty(x.shape[0], weight.shape[1])


@fake_kernel("grouped_outer")
def _(g, x, offs):
    return g.new_empty(offs.shape[0], g.shape[1], x.shape[1])


# ---- gradients -----------------------------------------------------------------------------------


def _save_operands(ctx, inputs, output) -> None:
    """Saves the operands of a product: (x, weight), or (g, x).

    The first one is needed only for the gradient of the second one. Experts' weights are usually
    frozen, and x would take memory.
    """
    first, second, offs = inputs
    ctx.save_for_backward(first if ctx.needs_input_grad[1] else None, second, offs)


def _grouped_mm_backward(ctx, g: Tensor):
    x, weight, offs = ctx.saved_tensors
    g = g.contiguous()  # the gradient of a sum is one element, expanded
    dW = None if x is None else grouped_outer(g, x, offs)
    return grouped_mm(g, weight.mT, offs), dW, None


def _grouped_outer_backward(ctx, dW: Tensor):
    # dW_c = sum g_i^T x_i, so dg_i = x_i dW_c^T (returned first) and dx_i = g_i dW_c.
    g, x, offs = ctx.saved_tensors
    dx = None if g is None else grouped_mm(g, dW.mT, offs)
    return grouped_mm(x, dW, offs), dx, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_operands)
grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save_operands)


# ---- with a bias ---------------------------------------------------------------------------------


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, offs: Tensor, reads: Tensor | None = None
) -> Tensor:
    """Returns y_i = x_t(i) W_c(i)^T + bias_c(i) [rows, n], zero in rows past the last end.

    Args:
        x: [m, k].
        weight: [e, n, k].
        bias: [e, n].
        offs: Where the rows of each expert end [e] (int32).
        reads: t(i) [rows]. None if row i reads x_i.
    """
    x_rows = x if reads is None else x[reads]
    if private.functorch_is_active() or private.forward_ad_is_active():
        y = _differentiable_product(x_rows, weight, offs)
    else:
        y = grouped_mm(x_rows.contiguous(), weight, offs)
    if bias is None:
        return y
    expert = index_from_offs(offs, len(y), len(bias))
    return y + torch.where((expert >= 0).unsqueeze(1), bias[expert.clamp(min=0)], 0)


def _differentiable_product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`grouped_mm` in PyTorch operations, for torch.func, which custom operators do not support."""
    *expert_rows, past_end = _rows_of_experts(offs, len(x))
    products = [x[rows] @ weight[expert].T for expert, rows in enumerate(expert_rows)]
    zeros = x.new_zeros(past_end.stop - past_end.start, weight.shape[1])
    return torch.cat([*products, zeros])
