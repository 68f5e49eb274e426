"""The operators of a whole layer, one a direction: the base product by the library, the rest by our kernels.

    forward    u = drop(x) A,  F = s B G^T;   y = x W^T + bias + u F^T
    backward   k = g F + k',   Q = g^T u;     dx = dx' + g W + drop(k A^T),  dA += drop(x)^T k,  dB += s Q G,  dG = s Q^T B

Unfolded, for few tokens: h = s u G, y = x W^T + bias + h B^T; backward h = s g B, k = h G^T, dB += s g^T (u G), dG = u^T h.

Where a dispatch mode is on (selective checkpointing, a counter of operators), it is shown the products that an operator is made
of: `OpOverload.decompose` runs them, in C++ as all else. Compiled graphs have `layer_forward`, `layer_backward_` and
`shrink_backward_` whole, so that their shapes are here and their products an overload: C++ reads sizes as numbers, which would
make a graph for any length one for its first. On a CPU they have the overload `graph` of the last two, which enters no Python.
"""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from ..compat import dispatch_modes, private_write, straight
from .library import accumulate_dtype, bump_versions, refuse_gradients, refuse_negative, shapes, without_shapes
from .library import lotr as _lotr
from .operators import rank_rows

_FORWARD, _SMALL_FORWARD = straight(_lotr.layer_forward.default), straight(_lotr.small_layer_forward.default)
_FORWARD_PRODUCTS, _SMALL_FORWARD_PRODUCTS = _lotr.layer_forward.products.decompose, _lotr.small_layer_forward.default.decompose


class _Writes:
    """An operator that writes into tensors which its caller alone has: no version counter moves.

    owned: on a CPU; gives None for what was not asked for.
    """

    def __init__(self, name: str):
        operator, owned = getattr(_lotr, f"{name}_"), getattr(_lotr, f"{name}_owned_")
        self.owned, self._default = straight(owned.default), straight(operator.default)
        self._products = getattr(operator, "products", operator.default).decompose
        self._graph = straight(getattr(operator, "graph", operator.default))

    def elsewhere(self, arguments: tuple):
        """On CUDA, where it calls others of its kind, in compiled graphs, and by its products where a dispatch mode is on."""
        if is_compiling():
            operator = self._graph if arguments[0].is_cpu else self._default
        else:
            operator = self._products if dispatch_modes() else self._default
        with private_write():
            return operator(*arguments)


_BACKWARD, _SMALL_BACKWARD = _Writes("layer_backward"), _Writes("small_layer_backward")
_SHRINK_BACKWARD = _Writes("shrink_backward")


def _as_rows(t: Tensor) -> Tensor:
    """t with leading dimensions that lie as one, t itself where they do."""
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x W^T + bias + u F^T [..., n] with u = drop(x) A [m, r_in] and F = s B G^T [n, r_in], each new unless given.

    x [..., k]; A is None where u is given. order (`planner.ORDERS`): 0 the base product first; 1 bias + u F^T first, onto which
    the base product accumulates; 2 all in one launch, on CUDA alone, with neither u, F nor dropout. unfolded: y = x W^T + bias
    + s (u G) B^T; neither u, F nor dropout then. Returns (y, u, F); F is None unfolded.
    """
    if is_grad_enabled():
        refuse_gradients("layer_forward", x, weight, bias, A, B, core, u, F)
    if x.dim() > 2 and not x.is_contiguous():
        x = _as_rows(x)
    shown = dispatch_modes() and not is_compiling()
    if unfolded:
        operator = _SMALL_FORWARD_PRODUCTS if shown else _SMALL_FORWARD
        y, u = operator(x, weight, bias, A, B, core, scaling, order == 1)
        return y, u, None
    operator = _FORWARD_PRODUCTS if shown else _FORWARD
    y, new_u, new_F = operator(x, weight, bias, A, B, core, scaling, order, u, F, p, seed)
    return y, new_u if u is None else u, new_F if F is None else F


@shapes("layer_forward")
def _(x, weight, bias, A, B, core, scaling, order, u=None, F=None, p=0.0, seed=None):
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"layer_forward: x: expected {weight.shape[1]} columns, got {x.shape}")
    r_in = core.shape[0]
    new_u = rank_rows(x, x.numel() // x.shape[-1], r_in) if u is None else None
    return x.new_empty(*x.shape[:-1], B.shape[0]), new_u, rank_rows(x, B.shape[0], r_in) if F is None else None


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
    """Backward of `layer_forward` for g [..., n]: (dx, k, dA, dB, dG), each new and only where it is asked for.

    weight and x in g's dtype. dx with weight; dA with x; k [m, r_in] with F but no A; dB and dG as needed. k, dx: what siblings
    bring; dx [..., k], Q [n, r_in], dA, dB are added to in place where given, by their only owner: no version counter moves.
    With Q, dB and dG are left to whoever folds it. New dA, dB and dG are in the factors' dtype if they have one in common, else
    in float32 (float64).
    """
    if g.dim() > 2 and not g.is_contiguous():
        g = _as_rows(g)
    if x is not None and x.dim() > 2 and not x.is_contiguous():
        x = _as_rows(x)
    owned, new_k, fold = g.is_cpu and not dispatch_modes(), None, True
    if unfolded:
        arguments = g, weight, x, u, A, B, core, scaling, order == 1, dA, dB, need_B, need_core
        if owned:
            dx, dA, dB, dcore = _SMALL_BACKWARD.owned(*arguments)
            return dx, None, dA, dB, dcore
        new_dx, new_dA, new_dB, dcore = _SMALL_BACKWARD.elsewhere(arguments)
    else:
        arguments = g, weight, x, u, A, F, B, core, scaling, order, k, dx, Q, dA, dB, need_B, need_core, p, seed
        if owned:
            dx, k, dA, dB, dcore = _BACKWARD.owned(*arguments)
            return dx, k if A is None else None, dA, dB, dcore
        new_dx, new_k, new_dA, new_dB, dcore = _BACKWARD.elsewhere(arguments)
        fold = u is not None and Q is None
    return (
        None if weight is None or dx is not None else new_dx,
        new_k if A is None and F is not None else None,
        None if x is None or dA is not None else new_dA,
        new_dB if fold and need_B and dB is None else None,
        dcore if fold and need_core else None,
    )


@shapes("layer_backward_")
@shapes("layer_backward_.graph")
def _(g, weight, x, u, A, F, B, core, scaling, order, k, dx, Q, dA, dB, need_B, need_core, p=0.0, seed=None):
    own = B.dtype == core.dtype and (A is None or A.dtype == B.dtype)
    narrow = B.dtype if own else accumulate_dtype(B.dtype)
    fold = u is not None and Q is None
    new_k = g.new_empty(0) if F is None else rank_rows(g, g.numel() // g.shape[-1], core.shape[0])

    def new(like: Tensor | None, made: bool) -> Tensor:
        return g.new_empty(like.shape if like is not None and made else (0,), dtype=narrow)

    return (
        g.new_empty(0 if weight is None or dx is not None else (*g.shape[:-1], weight.shape[1])),
        new_k if k is None or F is None else new_k + k,
        new(A, x is not None and dA is None),
        new(B, fold and need_B and dB is None),
        new(core, fold and need_core),
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
    """Backward of u = drop(x) A for k [m, r_in]: dx + drop(k A^T) [..., k] with A, and a new dA = drop(x)^T k with x, or None.

    dx and dA are added to in place where given, by their only owner. shape: x's.
    """
    if A is not None and dx is None:
        dx = k.new_zeros(shape)
    if x is not None and x.dim() > 2 and not x.is_contiguous():
        x = _as_rows(x)
    arguments = k, dx if A is not None else None, x, A, dA, p, seed
    if k.is_cpu and not dispatch_modes():
        return dx, _SHRINK_BACKWARD.owned(*arguments)
    new_dA = _SHRINK_BACKWARD.elsewhere(arguments)
    return dx, new_dA if x is not None and dA is None else None


@shapes("shrink_backward_")
@shapes("shrink_backward_.graph")
def _(k, dx, x, A, dA, p=0.0, seed=None):
    made = (x.shape[-1], k.shape[1]) if x is not None and dA is None else (0,)
    return k.new_empty(made, dtype=accumulate_dtype(k.dtype))


for _name in ("layer_backward_", "small_layer_backward_", "shrink_backward_"):
    bump_versions(_name)
for _name in ("layer_backward_owned_", "small_layer_backward_owned_", "shrink_backward_owned_"):
    refuse_negative(_name), without_shapes(_name)
for _name in ("layer_backward_.graph", "shrink_backward_.graph"):
    refuse_negative(_name)
for _name in ("gemm_lotr", "fold_transposed", "gemm_lotr_refusal"):  # which builds with CUDA have
    if hasattr(_lotr, _name):
        without_shapes(_name)
if hasattr(_lotr, "gemm_lotr"):
    refuse_negative("gemm_lotr")
