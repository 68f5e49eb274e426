"""The operators of `csrc/torch/cpu_operators.cpp` and `csrc/torch/cpu_layer.cpp` for Python, as typed functions.

Schemas, argument checks and kernels are C++ (one schema for CPU and CUDA); `registrations.py` adds what has to be Python.

T is float32, bfloat16, float16 or float64, the dtype of x and of what comes back; sums are float32 (float64 for float64).
Factors may be float32 beside a half-precision x: they are rounded to T first, as autocast would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


def _load() -> None:
    library = Path(__file__).parent.with_name("_C.abi3.so")
    if not library.is_file():
        inside = library.relative_to(library.parents[1])
        for folder in sys.path:  # a checkout's folder comes before the packages where Python is started in it
            if (Path(folder) / inside).is_file():
                raise ImportError(
                    f"lotr_ext: expected the compiled extension {library}, got none; this source folder hides the package "
                    f"installed in {folder}: start Python in another folder, or as `python -P`"
                )
        raise ImportError(
            f"lotr_ext: expected the compiled extension {library}, got none; build it with "
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


class Gradients(NamedTuple):
    """What a backward returns: None where it was not asked for, or was added to a sum that was given. k [m, r_in]."""

    dx: Tensor | None = None
    k: Tensor | None = None
    dA: Tensor | None = None
    dB: Tensor | None = None
    dcore: Tensor | None = None


def refuse_gradients(name: str, *arguments, why: str = "") -> None:
    """Of operators that autograd has no formula for."""
    if any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise RuntimeError(
            f"lotr::{name}: expected tensors that need no gradient{why}, got one that requires grad; call it under "
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
        refuse_gradients("layer_forward", x, weight, bias, A, B, core, u, F)
    return _lotr.layer_forward.default(x, weight, bias, A, B, core, scaling, beta, u, F, p, seed)


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
    sums = (k, dx, Q, dA, dB, need_B, need_core, p, seed)
    return _layer_backward(_lotr.layer_backward_.default, g, weight, x, u, A, F, B, core, scaling, beta, *sums)


def _layer_backward(
    operator, g, weight, x, u, A, F, B, core, scaling, beta, k, dx, Q, dA, dB, need_B, need_core, p=0.0, seed=None
) -> Gradients:
    found_dx, found_k, found_dA, found_dB, dcore = operator(
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
        refuse_gradients("small_layer_forward", x, weight, bias, A, B, core)
    return _lotr.small_layer_forward.default(x, weight, bias, A, B, core, scaling, beta)


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
    sums = (dA, dB, need_B, need_core)
    return _small_layer_backward(_lotr.small_layer_backward_.default, g, weight, x, u, A, B, core, scaling, beta, *sums)


def _small_layer_backward(
    operator, g, weight, x, u, A, B, core, scaling, beta, dA, dB, need_B, need_core
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dx, found_dA, found_dB, dcore = operator(g, weight, x, u, A, B, core, scaling, beta, dA, dB, need_B, need_core)
    return (
        None if weight is None else dx,
        found_dA if x is not None and dA is None else None,
        found_dB if need_B and dB is None else None,
        dcore if need_core else None,
    )


# ---- the whole-layer operators once more, where nothing is recorded and no one else holds what is written --------------------
#
# They run once or twice a layer and step, right after a base product, when little that the dispatcher needs is in cache. So
# these go straight to the CPU kernels, past what it keeps in front of them for autograd: with no dispatch mode on, and on plain
# CPU tensors (their checks turn down others).

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _kernel(operator: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, ...]]:
    return partial(operator._handle.redispatch_boxed, _CPU)


layer_forward_unrecorded = _kernel(_lotr.layer_forward.default)
layer_backward_unrecorded = partial(_layer_backward, _kernel(_lotr.layer_backward_.default))
small_layer_forward_unrecorded = _kernel(_lotr.small_layer_forward.default)
small_layer_backward_unrecorded = partial(_small_layer_backward, _kernel(_lotr.small_layer_backward_.default))


def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [rows, cols] that shrink, expand_add_ and factor_grad_ draw from (p, seed): 0, or 1 / (1 - p) where kept."""
    mask = torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    one = torch.ones(1, 1, dtype=dtype, device=seed.device)
    expand_add_(mask, one.expand(rows, 1), one.expand(cols, 1), p=p, seed=seed)
    return mask
