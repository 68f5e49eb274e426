"""Shapes, dtypes and torch products that the autograd Functions share, and where a factor's gradient goes."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _dispatch_key_parse
from torch._C import _dispatch_tls_is_dispatch_key_included as _in_old_vmap
from torch.compiler import is_compiling
from torch.nn import functional as nnf

from .. import ops
from ..autograd.shared_gradient import SharedGradient
from . import accumulate_dtype, planner

_VMAP = _dispatch_key_parse("VmapMode")
private_write = torch._C._AutoDispatchBelowADInplaceOrView  # for writes into tensors that no one else holds


def rows(t: Tensor) -> Tensor:
    """t as [m, last], a view where possible."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def tokens_of(x: Tensor) -> int:
    """m, the rows of x [..., k]."""
    shape = x.shape
    return shape[0] if len(shape) == 2 else x.numel() // shape[-1]


def shaped(t: Tensor, shape: torch.Size) -> Tensor:
    """t [m, last] as shape; t itself if it is."""
    return t if len(shape) == 2 else t.view(shape)


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype; t itself if it is."""
    return t if t.dtype == dtype else t.to(dtype)


def here(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """tensors on device: those of a group over several devices are copied."""
    for t in tensors:
        if t.device != device:
            return tuple(t.to(device) for t in tensors)
    return tensors


def fold_differentiable(B: Tensor, core: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """F = s B G^T [n, r_in] in torch products, cast once."""
    wide = accumulate_dtype(B.dtype)
    return to((to(B, wide) @ to(core, wide).t()) * scaling, dtype)


def cast_base(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias in dtype, as autocast casts the operands of a linear layer."""
    return to(x, dtype), to(weight, dtype), None if bias is None else to(bias, dtype)


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """x W^T + bias, cast to dtype under autocast. Without (None) nothing is cast, so a mismatch fails as in nn.Linear."""
    if dtype is not None:
        x, weight, bias = cast_base(x, weight, bias, dtype)
    return nnf.linear(x, weight, bias)


def adapter_differentiable(x: Tensor, A: Tensor, B: Tensor, core: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s ((x A) G) B^T in torch products, unfolded for few tokens: the `composite` strategy. x has been through dropout."""
    flat = rows(to(x, dtype))
    u = flat @ to(A, dtype)
    if not is_compiling() and flat.shape[0] < planner.FEW_TOKENS:
        delta = (u @ to(core, dtype)) @ (to(B, dtype) * scaling).t()
    else:
        delta = u @ fold_differentiable(B, core, scaling, dtype).t()
    return delta.view(*x.shape[:-1], B.shape[0])


def recorded() -> bool:
    """Whether the running backward takes torch's own products: it is being recorded, for double backward or by compiled
    autograd, or batched, by is_grads_batched (whose vmap is an older one) or vmap."""
    return is_grad_enabled() or is_compiling() or _in_old_vmap(_VMAP) or _are_functorch_transforms_active()


def shared_sum(shared: SharedGradient | None, factor: Tensor) -> Tensor | None:
    """Where to add factor's gradient; None where it goes back to autograd: without a hub, or outside of a backward."""
    if shared is None or torch._C._current_graph_task_id() < 0:
        return None
    return shared.accumulator(factor.shape, accumulate_dtype(factor.dtype), factor.device)


def hand_over(shared: SharedGradient | None, factor: Tensor, gradient: Tensor) -> Tensor | None:
    """A gradient made by a product: into the shared sum, or back to autograd where it must be seen."""
    total = None if recorded() else shared_sum(shared, factor)
    if total is None:
        return to(gradient, factor.dtype)
    total.add_(gradient)
    return None


def add_expand(y: Tensor, u: Tensor, F: Tensor, private: bool, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """y [..., n] + drop(u F^T): in place where no one else can hold y. Never a view: users may write into a layer's output."""
    if not (private and y.is_contiguous()):
        y = y.clone(memory_format=torch.contiguous_format)
    with private_write():
        ops.expand_add_(rows(y), u, F, p=p, seed=seed)
    return y
