"""What LibTorch's stable ABI has no call for, registered for the operators of `ops.py` when the package is imported.

Shapes for FakeTensor (torch.compile, torch.export), gradients, and the version bump of mutated arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import accumulate_dtype, dropout_mask, refuse_gradients

_lotr = torch.ops.lotr

# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _rank_rows(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output whose last dimension is a rank: contiguous, but on CUDA a row starts at a multiple of 16 bytes."""
    dtype = dtype or like.dtype
    if like.device.type != "cuda":
        return like.new_empty(size, dtype=dtype)
    chunk = 16 // dtype.itemsize
    strides = [1]
    for i in range(len(size) - 1, 0, -1):
        step = -(-size[i] // chunk) * chunk if i == len(size) - 1 else size[i]
        strides.insert(0, strides[0] * step)
    return like.new_empty_strided(size, strides, dtype=dtype)


@torch.library.register_fake("lotr::shrink")
def _(x: Tensor, A: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    torch._check(x.dim() == 2 and A.dim() == 2, lambda: f"shrink: expected x and A of 2 dimensions, got {x.dim()}, {A.dim()}")
    torch._check(x.shape[1] == A.shape[0], lambda: f"shrink: A: expected {x.shape[1]} rows, got {A.shape[0]}")
    return _rank_rows(x, x.shape[0], A.shape[1])


@torch.library.register_fake("lotr::shrink_grad")
def _(g: Tensor, F: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(g.shape[1] == F.shape[0], lambda: f"shrink_grad: F: expected {g.shape[1]} rows, got {F.shape[0]}")
    torch._check(g.shape[0] == u.shape[0], lambda: f"shrink_grad: u: expected {g.shape[0]} rows, got {u.shape[0]}")
    k = _rank_rows(g, g.shape[0], F.shape[1])
    return k, g.new_empty(g.shape[1], u.shape[1], dtype=accumulate_dtype(g.dtype))


@torch.library.register_fake("lotr::shrink_grad_")
def _(Q: Tensor, g: Tensor, F: Tensor, u: Tensor) -> Tensor:
    torch._check(g.shape[1] == F.shape[0], lambda: f"shrink_grad_: F: expected {g.shape[1]} rows, got {F.shape[0]}")
    return _rank_rows(g, g.shape[0], F.shape[1])


@torch.library.register_fake("lotr::fold")
def _(B: Tensor, cores: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    torch._check(B.shape[1] == cores.shape[2], lambda: f"fold: cores: expected r_out {B.shape[1]}, got {cores.shape[2]}")
    return _rank_rows(B, cores.shape[0], B.shape[0], cores.shape[1], dtype=dtype)


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
    return _rank_rows(x, x.shape[0], A.shape[1])


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
            labels = ", ".join(label for label, _ in values)
            refuse_gradients(name, *args, *kwargs.values(), why=f" (it writes {labels} in place)")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        for _, value in values:
            torch.autograd.graph.increment_version(value)
        return result

    _registrations.impl(name, in_place, "ADInplaceOrView", with_keyset=True)


_PARTS = ("expand_add_", "factor_grad_", "shrink_grad_", "fold_grad", "small_forward_", "small_backward_")
for _name in (*_PARTS, "layer_backward_", "small_layer_backward_"):
    _bump_versions(_name)
