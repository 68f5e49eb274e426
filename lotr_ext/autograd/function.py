"""LoTRFunction, one adapted layer as one autograd node. Equations: `reference.py`; when it runs: `layer_call.py`.

Each factor's gradient goes to the group's `SharedGradient` where there is one, else back to autograd. A backward that is
itself recorded (create_graph=True) runs differentiable torch products instead of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import Function

from .. import ops
from ..ops import planner
from ..ops.products import (
    adapter_differentiable,
    base_linear,
    cast_base,
    here,
    private_write,
    recorded,
    rows,
    shaped,
    shared_sum,
    to,
    tokens_of,
)
from . import direction
from .direction import as_rows, one_operator


def one_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    dtype: torch.dtype | None,
    strategy: str,
    unfolded: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x W^T + bias + s ((x A) G) B^T, u = x A and the folded factor, or None in the unfolded form."""
    if dtype is not None:
        x, weight, bias = cast_base(x, weight, bias, dtype)
    A, B, core = here(x.device, A, B, core)
    if not unfolded:
        return direction.forward(x, weight, bias, A, B, core, scaling, None, strategy)
    if one_operator(x):
        return *ops.small_layer_forward_unrecorded(as_rows(x), weight, bias, A, B, core, scaling, strategy == "beta"), None
    y = base_linear(x, weight, bias, None)
    if _len_torch_dispatch_stack() or not y.is_contiguous():  # a mode may hold y: selective checkpointing does
        y = y.clone(memory_format=torch.contiguous_format)
    with private_write():
        return y, ops.small_forward_(rows(y), rows(x), A, core, B, scaling), None


class LoTRFunction(Function):
    """y = x W^T + bias + s ((x A) G) B^T as one node; the form for few tokens, and for a base weight that is trained.

    apply(x [..., k], weight [n, k], bias [n] or None, A [k, r_in], B [n, r_out], core [r_in, r_out], scaling) -> [..., n].
    Differentiable, also twice, in all six tensors. dtype: what to compute in under autocast, None without; A and B may come
    with the SharedGradient that their gradients are added to; strategy: `two_pass` or `beta`, None for the planner's choice;
    unfolded: whether the core is multiplied with the tokens instead of being folded into B, None for where they are few.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        A,
        B,
        core,
        scaling,
        dtype=None,
        shared_A=None,
        shared_B=None,
        strategy: str | None = None,
        unfolded: bool | None = None,
    ):
        need_x, need_weight, need_bias, need_A, need_B, need_core = ctx.needs_input_grad[:6]
        if strategy is None:
            strategy = planner.plan(tokens_of(x), max(core.shape), dtype or x.dtype, x.device).strategy
        if unfolded is None:  # on a GPU its backward is six launches, and the folded one three
            unfolded = tokens_of(x) < planner.FEW_TOKENS and not (x.is_cuda and any(ctx.needs_input_grad))
        y, u, F = one_pass(x, weight, bias, A, B, core, scaling, dtype, strategy, unfolded)
        ctx.save_for_backward(
            x if need_x or need_weight or need_A else None,  # with x: double backward, which the layers avoid by LoTRLead
            weight if need_x or need_weight else None,
            bias if need_bias else None,
            A,
            B,
            core,
            u if need_B or need_core else None,
            F if need_x or need_A else None,
        )
        ctx.settings = scaling, dtype, shared_A, shared_B, strategy, unfolded
        ctx.hubs = A, B  # else the next layers of a checkpoint's forward, which saves no tensor, would find them gone
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, A, B, core, u, F = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, need_core = ctx.needs_input_grad[:6]
        scaling, _, shared_A, shared_B, strategy, unfolded = ctx.settings
        if recorded():
            return LoTRFunction._differentiable_backward(ctx, g, x, weight, bias, A, B, core)
        A, B, core_here = here(g.device, A, B, core)
        sum_A, sum_B = shared_sum(shared_A, A) if need_A else None, shared_sum(shared_B, B) if need_B else None
        base, frozen_x = weight if need_x else None, x if need_A else None
        if unfolded:
            dx, dA, dB, dcore = _few_backward(
                g, base, frozen_x, u, A, B, core_here, scaling, strategy, sum_A, sum_B, need_B, need_core
            )
        else:
            sums = {"dA": sum_A, "dB": sum_B, "need_B": need_B, "need_core": need_core}
            found = direction.backward(g, base, frozen_x, u, A, F, B, core_here, scaling, strategy, **sums)
            dx, dA, dB, dcore = found.dx, found.dA, found.dB, found.dcore
        dweight = rows(g).mT @ rows(to(x, g.dtype)) if need_weight else None
        dbias = rows(g).sum(0) if need_bias else None
        return dx, dweight, dbias, dA, dB, dcore, *(None,) * 6

    @staticmethod
    def _differentiable_backward(ctx, g, x, weight, bias, A, B, core):
        if x is None:
            raise RuntimeError("LoTRFunction: double backward: expected x to be saved, got a graph in which only core needs it")
        needs = ctx.needs_input_grad[:6]
        scaling, dtype, *_ = ctx.settings
        with torch.enable_grad():
            # aliases, so that autograd.grad stops at them: x itself may depend on A through earlier layers
            inputs = [t.view_as(t) if need else t for t, need in zip((x, weight, bias, A, B, core), needs)]
            wanted = [t for t, need in zip(inputs, needs) if need]
            x, weight, bias, A, B, core = inputs
            y = adapter_differentiable(x, *here(x.device, A, B, core), scaling, g.dtype)
            if weight is not None:
                y = y + base_linear(x, weight, None, dtype)
            if bias is not None:
                y = y + to(bias, y.dtype)
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
        return *(next(found) if need else None for need in needs), *(None,) * 6


def _few_backward(
    g, weight, x, u, A, B, core, scaling, strategy: str, dA, dB, need_B: bool, need_core: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`direction.backward` unfolded: (dx, dA, dB, dG)."""
    dtype = g.dtype
    if weight is not None:
        weight = to(weight, dtype)
    if x is not None:
        x = to(as_rows(x), dtype)
    g = as_rows(g)
    if one_operator(g):
        sums = (dA, dB, need_B, need_core)
        return ops.small_layer_backward_unrecorded(g, weight, x, u, A, B, core, scaling, strategy == "beta", *sums)
    flat, wide = rows(g), ops.accumulate_dtype(dtype)
    flat_dx = None if weight is None else flat @ weight
    with private_write():
        new_A = torch.zeros(A.shape, dtype=wide, device=g.device) if x is not None and dA is None else None
        new_B = torch.zeros(B.shape, dtype=wide, device=g.device) if need_B and dB is None else None
        if u is None:
            u = flat.new_empty(flat.shape[0], A.shape[1])
        sums = (new_A if dA is None else dA, new_B if dB is None else dB)
        dcore = ops.small_backward_(flat_dx, flat, None if x is None else rows(x), u, A, core, B, scaling, *sums, need_core)
        dx = None if flat_dx is None else shaped(flat_dx, g.shape[:-1] + flat_dx.shape[-1:])
        return dx, new_A, new_B, dcore if need_core else None


# Function.apply without its look for functorch's wrappers, which `layer_call.decide` has had
apply_one_node = super(Function, LoTRFunction).apply
