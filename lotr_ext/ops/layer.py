"""The operators of a whole layer, one per direction. The library computes the base product, our kernels the rest.

    forward    u = drop(x) A,  F = s B G^T;   y = x W^T + bias + u F^T, or bias + scale (x W^T + u F^T)
    backward   k = g F + k',   Q = g^T u;     dx = dx' + g W + drop(k A^T),  dA += drop(x)^T k,  dB += s Q G,  dG = s Q^T B

Unfolded, for few tokens: h = s u G, y = x W^T + bias + h B^T; backward h = s g B, k = h G^T, dB += s g^T (u G), dG = u^T h.

A backward operator adds to tensors that only its caller holds. So it bumps no version counter and needs no Python kernel, which
would cost a compiled graph 20 us a call, and over 100 us with cold caches.

Under a dispatch mode (selective checkpointing, an operator counter) the mode sees the products of an operator:
`OpOverload.decompose` runs them in C++. Compiled graphs contain the whole operators. Therefore the products are an overload of
their own, and the shapes are registered here: C++ code would read traced sizes as numbers and specialise the graph to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled

from ..compat import dispatch_modes, is_compiling, private_write, straight
from .library import accumulate_dtype, refuse_gradients, refuse_negative, shapes, without_shapes
from .library import lotr as _lotr
from .operators import rank_rows

_FORWARD, _FORWARD_PRODUCTS = straight(_lotr.layer_forward.default), _lotr.layer_forward.products.decompose
_BACKWARD, _BACKWARD_PRODUCTS = straight(_lotr.layer_backward_.default), _lotr.layer_backward_.products.decompose
_SCALE_BACKWARD = straight(_lotr.scale_backward.default)
_SHRINK, _SHRINK_PRODUCTS = straight(_lotr.shrink_backward_.default), _lotr.shrink_backward_.products.decompose
UNFOLDED = 4  # is added to the order in the operators' strategy; csrc/torch/check.h


def _as_rows(t: Tensor) -> Tensor:
    """t if its leading dimensions can be viewed as one, else a contiguous copy."""
    size, stride = t.shape, t.stride()
    for i in range(t.dim() - 2):
        if stride[i] != stride[i + 1] * size[i + 1]:
            return t.contiguous()
    return t


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    order: int = 0,
    unfolded: bool = False,
    *,
    u: Tensor | None = None,
    F: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x W^T + bias + u F^T [..., n] with u = drop(x) A [m, r_in] and F = s B G^T [n, r_in], each new unless given.

    x [..., k]; A is None where u is given. order (`planner.ORDERS`): 0 the base product first; 1 bias + u F^T first, onto which
    the base product accumulates; 2 all in one launch, on CUDA alone, with neither u, F nor dropout. unfolded: y = x W^T + bias
    + s (u G) B^T; neither u, F nor dropout then. Returns (y, u, F); F is None unfolded.

    scale [n], float32 (float64 for float64): y = bias + scale (x W^T + u F^T); the bias is not scaled. The base product comes
    first then, whatever the order is. `scale_backward` is the gradient.
    """
    if is_grad_enabled():
        refuse_gradients("layer_forward", x, weight, bias, A, B, core, u, F, scale)
    if x.dim() > 2 and not x.is_contiguous():
        x = _as_rows(x)
    operator = _FORWARD_PRODUCTS if dispatch_modes() and not is_compiling() else _FORWARD
    if unfolded:
        return operator(x, weight, bias, A, B, core, scaling, (order == 1) + UNFOLDED, None, None, 0.0, None, scale)
    y, new_u, new_F = operator(x, weight, bias, A, B, core, scaling, order, u, F, p, seed, scale)
    return y, new_u if u is None else u, new_F if F is None else F


@shapes("layer_forward")
def _(x, weight, bias, A, B, core, scaling, strategy, u=None, F=None, p=0.0, seed=None, scale=None):
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"layer_forward: x: expected {weight.shape[1]} columns, got {x.shape}")
    r_in = core.shape[0]
    new_u = rank_rows(x, x.numel() // x.shape[-1], r_in) if u is None else None
    new_F = rank_rows(x, B.shape[0], r_in) if F is None and strategy < UNFOLDED else None
    return x.new_empty(*x.shape[:-1], B.shape[0]), new_u, new_F


def scale_backward(g: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of the scale [n] of `layer_forward` for g and its y [..., n]: (g0 [..., n] in g's dtype, dscale [n] in scale's).

    g0 = scale g is the gradient of x W^T + u F^T: `layer_backward` of g0 gives the other gradients. dscale = sum over tokens of
    g (y - bias) / scale. It is 0 where scale is 0: y equals the bias there, which does not tell the gradient.
    """
    if is_grad_enabled():
        refuse_gradients("scale_backward", g, y, bias, scale)
    if g.dim() > 2 and not g.is_contiguous():
        g = _as_rows(g)
    if y.dim() > 2 and not y.is_contiguous():
        y = _as_rows(y)
    return _SCALE_BACKWARD(g, y, bias, scale)


@shapes("scale_backward")
def _(g, y, bias, scale):
    return g.new_empty(g.shape), scale.new_empty(scale.shape)


def layer_backward(
    g: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor | None,
    F: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    order: int = 0,
    unfolded: bool = False,
    dA: Tensor | None = None,
    dB: Tensor | None = None,
    need_B: bool = False,
    need_core: bool = False,
    *,
    k: Tensor | None = None,
    dx: Tensor | None = None,
    Q: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Backward of `layer_forward` for g [..., n]: (dx, k, dA, dB, dG), each a new tensor, or None if it was not requested.

    dx needs weight, dA needs x (both in g's dtype); k [m, r_in] is returned with F but without A; need_B and need_core request
    dB and dG. k and dx: pending gradients of sibling layers. dx [..., k], Q [n, r_in], dA and dB are added to in place if
    given; only the caller may hold them, because no version counter is bumped. With Q, dB and dG are not computed: `fold_grad`
    makes them of Q later. New dA, dB and dG have the factors' dtype if the factors share one, else float32 (float64).
    """
    if is_grad_enabled():
        refuse_gradients("layer_backward", g, weight, x, u, A, F, B, core, k, dx, Q, dA, dB)
    if g.dim() > 2 and not g.is_contiguous():
        g = _as_rows(g)
    if x is not None and x.dim() > 2 and not x.is_contiguous():
        x = _as_rows(x)
    strategy = (order == 1) + UNFOLDED if unfolded else order
    arguments = g, weight, x, u, A, F, B, core, scaling, strategy, k, dx, Q, dA, dB, need_B, need_core, p, seed
    if not dispatch_modes() or is_compiling():
        return _BACKWARD(*arguments)
    with private_write():
        return _BACKWARD_PRODUCTS(*arguments)


@shapes("layer_backward_")
def _(g, weight, x, u, A, F, B, core, scaling, order, k, dx, Q, dA, dB, need_B, need_core, p=0.0, seed=None):
    own = B.dtype == core.dtype and (A is None or A.dtype == B.dtype)
    narrow = B.dtype if own else accumulate_dtype(B.dtype)
    fold = u is not None and Q is None
    return (
        None if weight is None or dx is not None else g.new_empty(*g.shape[:-1], weight.shape[1]),
        None if A is not None or F is None else rank_rows(g, g.numel() // g.shape[-1], core.shape[0]),
        None if x is None or dA is not None else g.new_empty(x.shape[-1], core.shape[0], dtype=narrow),
        g.new_empty(B.shape, dtype=narrow) if fold and need_B and dB is None else None,
        g.new_empty(core.shape, dtype=narrow) if fold and need_core else None,
    )


def shrink_backward(
    k: Tensor,
    dx: Tensor | None,
    x: Tensor | None,
    A: Tensor | None,
    dA: Tensor | None,
    shape: torch.Size,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Backward of u = drop(x) A for k [m, r_in]: (dx + drop(k A^T) [..., k] if A is given, a new dA = drop(x)^T k if x is
    given).

    dx and dA are added to in place if given; only the caller may hold them. shape: x's.
    """
    if is_grad_enabled():
        refuse_gradients("shrink_backward", k, dx, x, A, dA)
    if A is not None and dx is None:
        dx = k.new_zeros(shape)
    if x is not None and x.dim() > 2 and not x.is_contiguous():
        x = _as_rows(x)
    arguments = k, dx if A is not None else None, x, A, dA, p, seed
    if not dispatch_modes() or is_compiling():
        return dx, _SHRINK(*arguments)
    with private_write():
        return dx, _SHRINK_PRODUCTS(*arguments)


@shapes("shrink_backward_")
def _(k, dx, x, A, dA, p=0.0, seed=None):
    if x is None or dA is not None:
        return None
    return k.new_empty(x.shape[-1], k.shape[1], dtype=accumulate_dtype(k.dtype))


for _name in ("layer_backward_", "shrink_backward_"):
    refuse_negative(_name), refuse_negative(f"{_name}.products")
for _name in ("gemm_lotr", "gemm_lotr_refusal"):  # builds with CUDA alone have them
    if hasattr(_lotr, _name):
        without_shapes(_name)
if hasattr(_lotr, "gemm_lotr"):
    refuse_negative("gemm_lotr")
