"""One direction of a layer, outside of autograd: one operator on a CPU, elsewhere the operators that it is made of.

    forward    u = drop(x) A,  F = s B G^T;   y = x W^T + bias + u F^T
    backward   k = g F + k',   Q = g^T u;     dx = dx' + g W + drop(k A^T),  dA += drop(x)^T k,  dB += s Q G,  dG = s Q^T B

Why one operator: right after a base product nothing that Python and the dispatcher need is left in a CPU's caches, and every
call costs tens of microseconds. A GPU's queue hides that. Where a dispatch mode is on (selective checkpointing, a counter of
operators), it is shown the single operators too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from .. import ops
from ..ops import Gradients, accumulate_dtype
from ..ops.products import add_expand, base_linear, cast_base, private_write, rows, shaped, to


class Dropout(NamedTuple):
    """p: the probability of dropping an element of x; seed: what the mask is drawn from (int64, one element), with p > 0."""

    p: float = 0.0
    seed: Tensor | None = None


KEEP = Dropout()


def one_operator(t: Tensor) -> bool:
    """Whether a direction with t for its x or g runs as one operator.

    It is called past the dispatcher, which would resolve what t only stands for: a negative (`imag` of a conjugate), or a zero
    without memory. These take the single operators. (A look at all of t's dispatch keys costs 5 us a step there.)
    """
    return t.is_cpu and t.dim() > 1 and not (_len_torch_dispatch_stack() or t.is_neg() or t._is_zerotensor())


def as_rows(t: Tensor) -> Tensor:
    """t with leading dimensions that lie as one, t itself where they do."""
    if t.dim() == 2 or t.is_contiguous():
        return t
    size, stride = t.shape, t.stride()
    for i in range(t.dim() - 2):
        if stride[i] != stride[i + 1] * size[i + 1]:
            return t.contiguous()
    return t


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    dtype: torch.dtype | None,
    strategy: str,
    u: Tensor | None = None,
    F: Tensor | None = None,
    dropout: Dropout = KEEP,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., n], u [m, r_in] and F [n, r_in]; a u or F that is given is used, A is None beside a u.

    dtype: what to compute in under autocast, None without. strategy: `two_pass` multiplies with W first, `beta` lets that
    product accumulate onto the adapter's part.
    """
    if dtype is not None:
        x, weight, bias = cast_base(x, weight, bias, dtype)
    if one_operator(x):
        found = ops.layer_forward_unrecorded(as_rows(x), weight, bias, A, B, core, scaling, strategy == "beta", u, F, *dropout)
        return found[0], found[1] if u is None else u, found[2] if F is None else F
    with private_write():
        if u is None:
            u = ops.shrink(rows(x), A, p=dropout.p, seed=dropout.seed)
        if F is None:
            F = ops.fold(B, core.unsqueeze(0), scaling, x.dtype).squeeze(0)
    return forward_with_base(x, weight, bias, u, F, strategy), u, F


def forward_with_base(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, F: Tensor, strategy: str) -> Tensor:
    """y = x W^T + bias + u F^T by single operators."""
    private = not _len_torch_dispatch_stack()  # selective checkpointing keeps the product and forbids a write
    if strategy == "beta" and private:
        y = u @ F.mT if bias is None else torch.addmm(bias, u, F.mT)
        return y.addmm_(rows(x), weight.mT).view(*x.shape[:-1], y.shape[1])
    return add_expand(base_linear(x, weight, bias, None), u, F, private)


def backward(
    g: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor | None,
    F: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    strategy: str,
    *,
    k: Tensor | None = None,
    dx: Tensor | None = None,
    Q: Tensor | None = None,
    dA: Tensor | None = None,
    dB: Tensor | None = None,
    need_B: bool = False,
    need_core: bool = False,
    dropout: Dropout = KEEP,
) -> Gradients:
    """The gradients of g [..., n]: of x with weight, of A with x, of B and core as needed; with F but no A, k is returned.

    k [m, r_in], dx [..., k]: what siblings bring; dx is added to in place. Q [n, r_in], dA, dB: sums to add to in place; with
    Q, dB and dG are left to whoever folds it.
    """
    g, dtype = as_rows(g), g.dtype
    weight, x = None if weight is None else to(weight, dtype), None if x is None else to(x, dtype)
    if not one_operator(g):
        return _backward_by_parts(g, weight, x, u, A, F, B, core, scaling, k, dx, Q, dA, dB, need_B, need_core, dropout)
    factors = (weight, None if x is None else as_rows(x), u, A, F, B, core)
    sums = (k, dx, Q, dA, dB, need_B, need_core)
    found = ops.layer_backward_unrecorded(g, *factors, scaling, strategy == "beta", *sums, *dropout)
    return found if dx is None else found._replace(dx=dx)


def _backward_by_parts(
    g, weight, x, u, A, F, B, core, scaling, k, dx, Q, dA, dB, need_B, need_core, dropout: Dropout
) -> Gradients:
    flat = rows(g)
    if weight is not None and dx is None:
        dx = shaped(flat @ weight, g.shape[:-1] + weight.shape[-1:])
    elif weight is not None:
        rows(dx).addmm_(flat, weight)
    with private_write():
        return _gradients_by_parts(flat, weight, x, u, A, F, B, core, scaling, k, dx, Q, dA, dB, need_B, need_core, dropout)


def _gradients_by_parts(
    flat, weight, x, u, A, F, B, core, scaling, k, dx, Q, dA, dB, need_B, need_core, dropout: Dropout
) -> Gradients:
    """All but g W, which dx has in it already."""
    wide = accumulate_dtype(flat.dtype)
    new_k = new_dA = new_dB = dcore = None
    fold = u is not None and Q is None and (need_B or need_core)
    if fold:
        Q = torch.zeros(flat.shape[1], u.shape[1], dtype=wide, device=flat.device)
    if F is not None:
        new_k = ops.shrink(flat, F) if Q is None else ops.shrink_grad_(Q, flat, F, u)
        k = new_k if k is None else new_k + k
    elif Q is not None:
        ops.factor_grad_(Q, flat, u)
    if fold:
        if need_B and dB is None:
            dB = new_dB = torch.zeros(B.shape, dtype=wide, device=flat.device)
        dcore = ops.fold_grad(Q.unsqueeze(0), B, core.unsqueeze(0), scaling, dB if need_B else None).squeeze(0)
    if A is None or F is None:
        return Gradients(dx, k, None, new_dB, dcore if need_core else None)
    if weight is not None:
        ops.expand_add_(rows(dx), k, A, p=dropout.p, seed=dropout.seed)
    if x is not None:
        if dA is None:
            dA = new_dA = torch.zeros(A.shape, dtype=wide, device=flat.device)
        ops.factor_grad_(dA, rows(x), k, p=dropout.p, seed=dropout.seed)
    return Gradients(dx, None, new_dA, new_dB, dcore if need_core else None)
