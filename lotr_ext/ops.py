"""The operators of `csrc/ops.cpp` for Python: typed wrappers, fake kernels, autograd formulas, version counters.

Schemas, argument checks and kernels are C++ (one schema for CPU and CUDA). What LibTorch's stable ABI has no call for is
registered here: shapes for FakeTensor (torch.compile, torch.export), gradients, and the version bump of mutated arguments.

T is float32, bfloat16, float16 or float64, the dtype of x and of what comes back; sums are float32 (float64 for float64).
Factors may be float32 beside a half-precision x: they are rounded to T first, as autocast would.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


def _load() -> None:
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.is_file():
        raise ImportError(
            f"lotr_ext: expected the compiled extension {library.name} beside {Path(__file__).name}, got none; build it with "
            "`pip install --no-build-isolation -e .` (or `make setup`) in the project's folder"
        )
    torch.ops.load_library(str(library))


_load()
_lotr = torch.ops.lotr


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens and layers are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- wrappers --------------------------------------------------------------------------------------------------------


def shrink(x: Tensor, A: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """u = drop(x) A: [m, k] and [k, r] -> [m, r] in x's dtype. Differentiable.

    p, seed: dropout by Philox from a seed tensor (int64, one element, on x's device); see `reference.dropout_mask`.
    """
    return _lotr.shrink.default(x, A, p, seed)


def expand_add_(y: Tensor, u: Tensor, F: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> None:
    """y [m, n] += drop(u [m, r] F [n, r]^T), in place."""
    _lotr.expand_add_.default(y, u, F, p, seed)


def factor_grad_(acc: Tensor, x: Tensor, k: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> None:
    """acc [k, r] += drop(x) [m, k]^T k [m, r], in place, in a fixed order; acc is float32 (float64 for float64)."""
    _lotr.factor_grad_.default(acc, x, k, p, seed)


def shrink_grad(g: Tensor, F: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """k = g F [m, r_in] in g's dtype and Q = g^T u [n, r_in] in float32 (float64), from one read of g. Differentiable."""
    return _lotr.shrink_grad.default(g, F, u)


def shrink_grad_(Q: Tensor, g: Tensor, F: Tensor, u: Tensor) -> Tensor:
    """`shrink_grad` that adds: Q [n, r_in] += g^T u in place; returns k = g F [m, r_in]."""
    return _lotr.shrink_grad_.default(Q, g, F, u)


def fold(B: Tensor, cores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """F_l = s B G_l^T: [n, r_out] and [l, r_in, r_out] -> [l, n, r_in] in dtype, rounded once. Differentiable."""
    return _lotr.fold.default(B, cores, scaling, dtype)


def fold_grad(Q: Tensor, B: Tensor, cores: Tensor, scaling: float, dB: Tensor | None = None) -> Tensor:
    """dB [n, r_out] += s sum_l Q_l G_l, in place where given; returns dG_l = s Q_l^T B [l, r_in, r_out]. Q [l, n, r_in]."""
    return _lotr.fold_grad.default(Q, B, cores, scaling, dB)


def small_forward_(y: Tensor, x: Tensor, A: Tensor, core: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The unfolded form, for few tokens: y [m, n] += s (x A core) B^T in place; returns u = x A [m, r_in]."""
    return _lotr.small_forward_.default(y, x, A, core, B, scaling)


def small_backward_(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor | None,
    u: Tensor,
    A: Tensor,
    core: Tensor,
    B: Tensor,
    scaling: float,
    dA: Tensor | None,
    dB: Tensor | None,
    need_core: bool,
) -> Tensor:
    """Backward of `small_forward_`: adds to dx [m, k], dA [k, r_in], dB [n, r_out] where given; returns dG or an empty tensor.

    h = s g B;  dx += (h core^T) A^T;  dA += x^T (h core^T);  dB += s g^T (u core);  dG = u^T h.
    """
    return _lotr.small_backward_.default(dx, g, x, u, A, core, B, scaling, dA, dB, need_core)


# The whole-layer operators run once or twice a layer and step, so nothing is looked up and no frame is made on the way to them.
# Those without an underscore are for callers under which nothing is recorded.
layer_forward_unrecorded, _layer_backward = _lotr.layer_forward.default._op, _lotr.layer_backward_.default._op
small_layer_forward_unrecorded, _small_layer_backward = (
    _lotr.small_layer_forward.default._op,
    _lotr.small_layer_backward_.default._op,
)


class Gradients(NamedTuple):
    """What a backward returns: None where it was not asked for, or was added to a sum that was given. k [m, r_in]."""

    dx: Tensor | None = None
    k: Tensor | None = None
    dA: Tensor | None = None
    dB: Tensor | None = None
    dcore: Tensor | None = None


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    """Of operators that return what autograd has no formula for."""
    if any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"lotr::{name}: expected tensors that need no gradient, got one that requires grad; call it under "
            "torch.no_grad() or inside an autograd Function"
        )


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    beta: bool,
    u: Tensor | None = None,
    F: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = x W^T + bias + u F^T [..., n] with u = drop(x) A [m, r_in] and F = s B G^T [n, r_in], each new unless given. CPU.

    A is None where u is given. x [..., k], its leading dimensions lying as one. beta: write bias + u F^T first and let the base
    product accumulate onto it.
    Returns (y, u or None, F or None), None for what was given.
    """
    if torch.is_grad_enabled():
        _refuse_gradients("layer_forward", x, weight, bias, A, B, core, u, F)
    return layer_forward_unrecorded(x, weight, bias, A, B, core, scaling, beta, u, F, p, seed)


def layer_backward_(
    g: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor | None,
    F: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    beta: bool,
    k: Tensor | None,
    dx: Tensor | None,
    Q: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    need_B: bool,
    need_core: bool,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Gradients:
    """Backward of `layer_forward` for g [..., n]. CPU.

    k = g F + k (with F; returned where A is None);  Q += g^T u (with u);  dB += s Q G, dG = s Q^T B, unless a Q is given;
    dx += g W + drop(k A^T) (with weight; the k A^T with A);  dA += drop(x)^T k (with x). dx, Q, dA, dB are added to in place
    where given, else new; new dA, dB and dG are in the factors' dtype if they have one in common, else in float32 (float64).
    """
    found_dx, found_k, found_dA, found_dB, dcore = _layer_backward(
        g, weight, x, u, A, F, B, core, scaling, beta, k, dx, Q, dA, dB, need_B, need_core, p, seed
    )
    fold = u is not None and Q is None
    return Gradients(
        found_dx if weight is not None and dx is None else None,
        found_k if A is None and F is not None else None,
        found_dA if x is not None and dA is None else None,
        found_dB if fold and need_B and dB is None else None,
        dcore if fold and need_core else None,
    )


def small_layer_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, core: Tensor, scaling: float, beta: bool
) -> tuple[Tensor, Tensor]:
    """`layer_forward` unfolded, for few tokens: y = x W^T + bias + s (u core) B^T [..., n] and u = x A [m, r_in]. CPU."""
    if torch.is_grad_enabled():
        _refuse_gradients("small_layer_forward", x, weight, bias, A, B, core)
    return small_layer_forward_unrecorded(x, weight, bias, A, B, core, scaling, beta)


def small_layer_backward_(
    g: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    beta: bool,
    dA: Tensor | None,
    dB: Tensor | None,
    need_B: bool,
    need_core: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Backward of `small_layer_forward`: (dx, dA, dB, dG), None for what is not asked for or is added to a sum. CPU.

    h = s g B, k = h core^T;  dx = g W + k A^T (with weight);  dA += x^T k (with x);  dB += s g^T (u core);  dG = u^T h.
    """
    dx, found_dA, found_dB, dcore = _small_layer_backward(g, weight, x, u, A, B, core, scaling, beta, dA, dB, need_B, need_core)
    return (
        None if weight is None else dx,
        found_dA if x is not None and dA is None else None,
        found_dB if need_B and dB is None else None,
        dcore if need_core else None,
    )


def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [rows, cols] that shrink, expand_add_ and factor_grad_ draw from (p, seed): 0, or 1 / (1 - p) where kept."""
    mask = torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    one = torch.ones(1, 1, dtype=dtype, device=seed.device)
    expand_add_(mask, one.expand(rows, 1), one.expand(cols, 1), p=p, seed=seed)
    return mask


# ---- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("lotr::shrink")
def _(x: Tensor, A: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    torch._check(x.dim() == 2 and A.dim() == 2, lambda: f"shrink: expected x and A of 2 dimensions, got {x.dim()}, {A.dim()}")
    torch._check(x.shape[1] == A.shape[0], lambda: f"shrink: A: expected {x.shape[1]} rows, got {A.shape[0]}")
    return x.new_empty(x.shape[0], A.shape[1])


@torch.library.register_fake("lotr::shrink_grad")
def _(g: Tensor, F: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(g.shape[1] == F.shape[0], lambda: f"shrink_grad: F: expected {g.shape[1]} rows, got {F.shape[0]}")
    torch._check(g.shape[0] == u.shape[0], lambda: f"shrink_grad: u: expected {g.shape[0]} rows, got {u.shape[0]}")
    k = g.new_empty(g.shape[0], F.shape[1])
    return k, g.new_empty(g.shape[1], u.shape[1], dtype=accumulate_dtype(g.dtype))


@torch.library.register_fake("lotr::shrink_grad_")
def _(Q: Tensor, g: Tensor, F: Tensor, u: Tensor) -> Tensor:
    torch._check(g.shape[1] == F.shape[0], lambda: f"shrink_grad_: F: expected {g.shape[1]} rows, got {F.shape[0]}")
    return g.new_empty(g.shape[0], F.shape[1])


@torch.library.register_fake("lotr::fold")
def _(B: Tensor, cores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    torch._check(B.shape[1] == cores.shape[2], lambda: f"fold: cores: expected r_out {B.shape[1]}, got {cores.shape[2]}")
    return B.new_empty(cores.shape[0], B.shape[0], cores.shape[1], dtype=dtype)


@torch.library.register_fake("lotr::fold_grad")
def _(Q: Tensor, B: Tensor, cores: Tensor, scaling: float, dB: Tensor | None) -> Tensor:
    return Q.new_empty(cores.shape)


@torch.library.register_fake("lotr::expand_add_")
def _(y: Tensor, u: Tensor, F: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    torch._check(y.shape[0] == u.shape[0], lambda: f"expand_add_: u: expected {y.shape[0]} rows, got {u.shape[0]}")


@torch.library.register_fake("lotr::factor_grad_")
def _(acc: Tensor, x: Tensor, k: Tensor, p: float = 0.0, seed: Tensor | None = None) -> None:
    torch._check(x.shape[0] == k.shape[0], lambda: f"factor_grad_: k: expected {x.shape[0]} rows, got {k.shape[0]}")


@torch.library.register_fake("lotr::small_forward_")
def _(y: Tensor, x: Tensor, A: Tensor, core: Tensor, B: Tensor, scaling: float) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[1])


@torch.library.register_fake("lotr::small_backward_")
def _(dx, g, x, u, A, core, B, scaling, dA, dB, need_core) -> Tensor:
    return g.new_empty(core.shape if need_core else (0,), dtype=accumulate_dtype(g.dtype))


@torch.library.register_fake("lotr::layer_forward")
def _(x, weight, bias, A, B, core, scaling, beta, u=None, F=None, p=0.0, seed=None):
    torch._check(
        x.shape[-1] == weight.shape[1], lambda: f"layer_forward: x: expected width {weight.shape[1]}, got {x.shape[-1]}"
    )
    new_u = x.new_empty(x.numel() // x.shape[-1], core.shape[0]) if u is None else None
    return x.new_empty(*x.shape[:-1], B.shape[0]), new_u, x.new_empty(B.shape[0], core.shape[0]) if F is None else None


def _gradient_dtype(A: Tensor | None, B: Tensor, core: Tensor) -> torch.dtype:
    one = B.dtype == core.dtype and (A is None or A.dtype == B.dtype)
    return B.dtype if one else accumulate_dtype(B.dtype)


@torch.library.register_fake("lotr::layer_backward_")
def _(g, weight, x, u, A, F, B, core, scaling, beta, k, dx, Q, dA, dB, need_B, need_core, p=0.0, seed=None):
    narrow, m, fold = _gradient_dtype(A, B, core), g.numel() // g.shape[-1], u is not None and Q is None
    return (
        g.new_empty((*g.shape[:-1], weight.shape[1]) if weight is not None and dx is None else (0,)),
        g.new_empty((m, F.shape[1]) if F is not None else (0,)),
        g.new_empty((x.shape[-1], core.shape[0]) if x is not None and dA is None else (0,), dtype=narrow),
        g.new_empty(B.shape if fold and need_B and dB is None else (0,), dtype=narrow),
        g.new_empty(core.shape if fold and need_core else (0,), dtype=narrow),
    )


@torch.library.register_fake("lotr::small_layer_forward")
def _(x, weight, bias, A, B, core, scaling, beta):
    return x.new_empty(*x.shape[:-1], B.shape[0]), x.new_empty(x.numel() // x.shape[-1], A.shape[1])


@torch.library.register_fake("lotr::small_layer_backward_")
def _(g, weight, x, u, A, B, core, scaling, beta, dA, dB, need_B, need_core):
    narrow = _gradient_dtype(A, B, core)
    return (
        g.new_empty((0,) if weight is None else (*g.shape[:-1], weight.shape[1])),
        g.new_empty(A.shape if x is not None and dA is None else (0,), dtype=narrow),
        g.new_empty(B.shape if need_B and dB is None else (0,), dtype=narrow),
        g.new_empty(core.shape if need_core else (0,), dtype=narrow),
    )


# ---- autograd of the operators that only return ------------------------------------------------------------------------


def _shrink_backward(ctx, k: Tensor):
    x, A, seed = ctx.saved_tensors
    mask = dropout_mask(x.shape[0], x.shape[1], ctx.p, seed, x.dtype) if ctx.p > 0.0 else None
    dx = dA = None
    if ctx.needs_input_grad[0]:
        dx = k @ A.to(k.dtype).mT
        dx = dx if mask is None else dx * mask
    if ctx.needs_input_grad[1]:
        dA = ((x if mask is None else x * mask).mT @ k).to(A.dtype)
    return dx, dA, None, None


def _shrink_grad_backward(ctx, dk: Tensor, dQ: Tensor):
    g, F, u = ctx.saved_tensors
    dQ = dQ.to(g.dtype)
    dg = dF = du = None
    if ctx.needs_input_grad[0]:
        dg = dk @ F.to(g.dtype).mT + u @ dQ.mT
    if ctx.needs_input_grad[1]:
        dF = (g.mT @ dk).to(F.dtype)
    if ctx.needs_input_grad[2]:
        du = g @ dQ
    return dg, dF, du


def _fold_backward(ctx, dF: Tensor):
    B, cores = ctx.saved_tensors
    wide, scaling = accumulate_dtype(B.dtype), ctx.scaling
    dF = dF.to(wide)
    dB = dcores = None
    if ctx.needs_input_grad[0]:
        dB = (scaling * (dF @ cores.to(wide)).sum(0)).to(B.dtype)
    if ctx.needs_input_grad[1]:
        dcores = (scaling * (dF.mT @ B.to(wide))).to(cores.dtype)
    return dB, dcores, None, None


def _setup_shrink(ctx, inputs, output) -> None:
    x, A, ctx.p, seed = inputs
    ctx.save_for_backward(x, A, seed)


def _setup_shrink_grad(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _setup_fold(ctx, inputs, output) -> None:
    B, cores, ctx.scaling, _ = inputs
    ctx.save_for_backward(B, cores)


torch.library.register_autograd("lotr::shrink", _shrink_backward, setup_context=_setup_shrink)
torch.library.register_autograd("lotr::shrink_grad", _shrink_grad_backward, setup_context=_setup_shrink_grad)
torch.library.register_autograd("lotr::fold", _fold_backward, setup_context=_setup_fold)


# ---- version counters of the operators that write ------------------------------------------------------------------------

_registrations = torch.library.Library("lotr", "IMPL")


def _bump_versions(name: str) -> None:
    """Registers the layer that autograd expects of an in-place operator.

    The stable ABI does not bump the version of an argument that a kernel writes; without this, a tensor saved for backward
    and then written through one of these operators would give a wrong gradient in silence.
    """
    op = getattr(_lotr, name).default
    written = [(i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def in_place(keyset, *args, **kwargs):
        values = [(label, args[i]) for i, label in written if i < len(args) and args[i] is not None]
        if torch.is_grad_enabled():
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if any(t.requires_grad for t in tensors):
                labels = ", ".join(label for label, _ in values)
                raise RuntimeError(
                    f"lotr::{name}: expected tensors that need no gradient (it writes {labels} in place), got one that "
                    "requires grad; call it under torch.no_grad() or inside an autograd Function"
                )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        for _, value in values:
            torch.autograd.graph.increment_version(value)
        return result

    _registrations.impl(name, in_place, "ADInplaceOrView", with_keyset=True)


_PARTS = ("expand_add_", "factor_grad_", "shrink_grad_", "fold_grad", "small_forward_", "small_backward_")
for _name in (*_PARTS, "layer_backward_", "small_layer_backward_"):
    _bump_versions(_name)
