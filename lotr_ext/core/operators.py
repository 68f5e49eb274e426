"""Loads the compiled operators and describes them to PyTorch.

The operators are `torch.ops.lotr.<name>`. csrc/torch/schema.cpp lists them with their equations and
checks their arguments. An operator raises RuntimeError, `lotr::<operator>: <argument>: expected ..,
got ..`, before it writes anything. One schema serves CPU and CUDA.

This file adds what LibTorch's stable ABI cannot register:

- fake kernels: the shapes of results for tensors without values (torch.compile, meta tensors);
- the version counter of the tensor that `expand_add_` writes;
- `lotr::dropout_mask`.

It also holds the Python functions through which the autograd nodes call the operators.

dtypes: x and the results have one dtype: float32, bfloat16, float16 or float64. Sums over tokens
and layers are float32 (float64 for float64). Factors may be float32 if x has a half-precision
dtype. They are then rounded to x's dtype first, as under autocast.

Not here: gradients (nodes.py), the same formulas in PyTorch (fallback.py), and the question whether
the kernels can run on a device (kernel_support.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import _torch_private as private

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# The order of the products, an argument of `layer_forward` and `layer_backward_`.
TWO_PASS = 0  # the base product, then the adapter is added to it
BETA = 1  # the adapter, then the base product accumulates onto it
UNFOLDED = 4  # added to either: multiply the tokens with the core, do not fold the core into B

_PLAIN_TYPES = {Tensor, nn.Parameter}

LayerGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _load_library() -> None:
    library = Path(__file__).parents[1] / "_C.abi3.so"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"lotr_ext: expected a compiled extension that loads in {library}, got "
            f"{error.__cause__ or error}. Build it with `pip install --no-build-isolation -e .` "
            f"(or `make test`) in the project's folder. If it is installed elsewhere, this source "
            f"folder hides it: start Python in another folder, or as `python -P`.",
            name="lotr_ext",  # `python -m lotr_ext.info` prints one line for it and no traceback
        ) from None


_load_library()
lotr = torch.ops.lotr


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over tokens and layers: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- calls from the autograd nodes ---------------------------------------------------------------

_call_layer_forward = private.direct_call(lotr.layer_forward.default)
_call_layer_backward = private.direct_call(lotr.layer_backward_.default)
project = private.direct_call(lotr.shrink.default)
project_backward = private.direct_call(lotr.shrink_backward_.default)


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    order: int,
    *,
    A: Tensor | None = None,
    u: Tensor | None = None,
    F: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes y = x W^T + bias + u F^T.

    Args:
        A: Given if the operator computes u = drop(x) A. Otherwise `u` is given.
        F: The folded factor s B G^T. The operator computes it from B and core if it is None.
        p: The probability of dropping an element, with the seed of the mask. 0 in the order
            UNFOLDED.

    Returns:
        (y, u, F). u and F are None if they were given; F is None in the order UNFOLDED as well.
    """
    if private.dispatch_mode_count() and type(x) in _PLAIN_TYPES:
        return _layer_forward_in_steps(
            x, weight, bias, B, core, scaling, order, A=A, u=u, F=F, p=p, seed=seed
        )
    return _call_layer_forward(x, weight, bias, A, B, core, scaling, order, u, F, p, seed)


def _layer_forward_in_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    order: int,
    *,
    A: Tensor | None,
    u: Tensor | None,
    F: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`layer_forward` with PyTorch's base product, for dispatch modes.

    Selective checkpointing chooses by name which results it keeps, and a FLOP counter knows only
    PyTorch's operators. The results are as those of `layer_forward`, so that a recomputation
    without the mode has the same saved tensors.
    """
    y = nnf.linear(x, weight, bias)
    new_u = None
    new_F = None
    if u is None:
        u = new_u = lotr.shrink.default(x.reshape(-1, x.shape[-1]), A, p, seed)
    if F is None and order >= UNFOLDED:
        u = (u @ core.to(u.dtype)) * scaling
        F = B.to(u.dtype)
    elif F is None:
        F = new_F = lotr.fold.default(B, core, scaling, x.dtype)
    return lotr.expand.default(y, u, F), new_u, new_F


def layer_backward(
    g: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    order: int,
    *,
    weight: Tensor | None = None,
    x: Tensor | None = None,
    u: Tensor | None = None,
    A: Tensor | None = None,
    F: Tensor | None = None,
    du: Tensor | None = None,
    dx: Tensor | None = None,
    Q: Tensor | None = None,
    dA: Tensor | None = None,
    dB: Tensor | None = None,
    need_B: bool = False,
    need_core: bool = False,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> LayerGradients:
    """Computes the gradients of `layer_forward` for the gradient g of y.

    An argument that is None switches a gradient off:

        given       result
        weight      dx = g W, plus drop(du A^T) if A is given: added to `dx` if given, else new
        F           du = g F plus the given `du`: new, None if A is given
        x           dA = drop(x)^T du: added to `dA` if given, else new
        Q           Q += g^T u, and neither dB nor dcore
        need_B      dB = s Q G with Q = g^T u: added to `dB` if given, else new
        need_core   dcore = s Q^T B: new

    Returns:
        (dx, du, dA, dB, dcore). A gradient that was not requested, or that was added to an
        argument, is None.
    """
    return _call_layer_backward(
        g, weight, x, u, A, F, B, core, scaling, order, du, dx, Q, dA, dB, need_B, need_core,
        p, seed,
    )  # fmt: skip


# ---- fake kernels --------------------------------------------------------------------------------


def _fake_kernel(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the fake kernel of an operator.

    The dispatcher calls the fake kernel if any argument is a meta tensor. A call that mixes meta
    tensors and real ones would silently do nothing, so it is rejected here.
    """

    def register(function: Callable) -> Callable:
        names = list(inspect.signature(function).parameters)

        def checked(*args):
            device = None
            for argument, tensor in zip(names, args):
                if not isinstance(tensor, Tensor):
                    continue
                if device is None:
                    device = tensor.device
                if tensor.device != device:
                    raise RuntimeError(
                        f"lotr::{name}: {argument}: expected the device of the first tensor "
                        f"({device}), got {tensor.device}"
                    )
            return function(*args)

        torch.library.register_fake(f"lotr::{name}", checked)
        return function

    return register


def _empty_with_rank(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output with a rank as its last dimension.

    It is contiguous, except that on CUDA each row starts at a multiple of 16 bytes.
    """
    dtype = dtype or like.dtype
    if like.device.type != "cuda":
        return like.new_empty(size, dtype=dtype)
    rank = size[-1]
    elements_per_chunk = 16 // dtype.itemsize
    chunks = -(-rank // elements_per_chunk)
    padded = like.new_empty((*size[:-1], chunks * elements_per_chunk), dtype=dtype)
    return padded[..., :rank]


def _token_count(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


@_fake_kernel("shrink")
def _(x, A, p=0.0, seed=None):
    torch._check(
        x.shape[1] == A.shape[0],
        lambda: f"shrink: A: expected {x.shape[1]} rows, got {A.shape[0]}",
    )
    return _empty_with_rank(x, x.shape[0], A.shape[1])


@_fake_kernel("expand_add_")
def _(y, u, F, p=0.0, seed=None):
    return None


@_fake_kernel("expand")
def _(y, u, F):
    return y.new_empty(y.shape)


@_fake_kernel("fold")
def _(B, core, scaling, dtype):
    torch._check(
        B.shape[1] == core.shape[1],
        lambda: f"fold: core: expected r_out {B.shape[1]}, got {core.shape[1]}",
    )
    return _empty_with_rank(B, B.shape[0], core.shape[0], dtype=dtype)


@_fake_kernel("layer_forward")
def _(x, weight, bias, A, B, core, scaling, strategy, u=None, F=None, p=0.0, seed=None):
    torch._check(
        x.shape[-1] == weight.shape[1],
        lambda: f"layer_forward: x: expected {weight.shape[1]} columns, got {x.shape}",
    )
    n = B.shape[0]
    r_in = core.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    new_u = None
    new_F = None
    if u is None:
        new_u = _empty_with_rank(x, _token_count(x), r_in)
    if F is None and strategy < UNFOLDED:
        new_F = _empty_with_rank(x, n, r_in)
    return y, new_u, new_F


@_fake_kernel("layer_backward_")
def _(
    g, weight, x, u, A, F, B, core, scaling, strategy, k, dx, Q, dA, dB, need_B, need_core,
    p=0.0, seed=None,
):  # fmt: skip
    r_in = core.shape[0]
    factors_share_dtype = B.dtype == core.dtype and (A is None or A.dtype == B.dtype)
    dtype = B.dtype if factors_share_dtype else accumulate_dtype(B.dtype)
    computes_Q = u is not None and Q is None
    new_dx = None
    new_du = None
    new_dA = None
    new_dB = None
    dcore = None
    if weight is not None and dx is None:
        new_dx = g.new_empty(*g.shape[:-1], weight.shape[1])
    if F is not None and A is None:
        new_du = _empty_with_rank(g, _token_count(g), r_in)
    if x is not None and dA is None:
        new_dA = g.new_empty(x.shape[-1], r_in, dtype=dtype)
    if computes_Q and need_B and dB is None:
        new_dB = g.new_empty(B.shape, dtype=dtype)
    if computes_Q and need_core:
        dcore = g.new_empty(core.shape, dtype=dtype)
    return new_dx, new_du, new_dA, new_dB, dcore


@_fake_kernel("shrink_backward_")
def _(k, dx, x, A, dA, p=0.0, seed=None):
    if x is None or dA is not None:
        return None
    return k.new_empty(x.shape[-1], k.shape[1], dtype=accumulate_dtype(k.dtype))


@_fake_kernel("row_core")
def _(u, cores, index, offs, tokens, scaling):
    rows = u.shape[0] if tokens is None else tokens.shape[0]
    return _empty_with_rank(u, rows, cores.shape[2])


@_fake_kernel("row_core_backward")
def _(g, u, cores, index, offs, tokens, scaling, need_u, need_cores):
    du = _empty_with_rank(u, *u.shape) if need_u else u.new_empty(0, 0)
    shape = cores.shape if need_cores else (0, 0, 0)
    return du, u.new_empty(shape, dtype=accumulate_dtype(u.dtype))


# ---- dropout_mask --------------------------------------------------------------------------------


@torch.library.custom_op("lotr::dropout_mask", mutates_args=())
def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask [rows, cols] that the operators' dropout draws from (p, seed).

    An element is 0 where x is dropped and 1 / (1 - p) where it is kept.
    """
    mask = torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    ones = torch.ones(1, 1, dtype=dtype, device=seed.device)
    lotr.expand_add_(mask, ones.expand(rows, 1), ones.expand(cols, 1), p, seed)
    return mask


@_fake_kernel("dropout_mask")
def _(rows, cols, p, seed, dtype):
    return torch.empty(rows, cols, dtype=dtype, device=seed.device)


# ---- version counters ----------------------------------------------------------------------------

_registrations = torch.library.Library("lotr", "IMPL")


def _expand_add_and_bump_version(keyset, y: Tensor, *args) -> None:
    """Bumps the version counter of y, which the stable ABI does not do.

    Otherwise a backward that saved y before this write would silently compute a wrong gradient. The
    layers' in-place operators do not need it: only nodes.py calls them, on sums that no backward
    saves.
    """
    lotr.expand_add_.default.redispatch(keyset & private.keys_after_version_counters, y, *args)
    torch.autograd.graph.increment_version(y)


_registrations.impl(
    "expand_add_", _expand_add_and_bump_version, "ADInplaceOrView", with_keyset=True
)
