"""Loads the compiled operators and describes them to PyTorch.

The operators are `torch.ops.lotr.<name>`. csrc/torch/schema.cpp lists them with their equations and
checks their arguments. An operator raises RuntimeError, `lotr::<operator>: <argument>: expected ..,
got ..`, before it writes anything. One schema serves CPU and CUDA.

This file adds what LibTorch's stable ABI cannot register:

- fake kernels: the shapes of results for tensors without values (torch.compile, meta tensors);
- the version counter of the tensor that `expand_add_` writes;
- `lotr::dropout_mask`.

It also holds the Python functions through which the autograd nodes call the operators.

dtypes: x, u, F, h, y and their gradients have one dtype: float32, bfloat16, float16 or float64.
Sums over tokens and layers are float32 (float64 for float64). Factors may be float32 if x has a
half-precision dtype. Products with x, u and h then round them to x's dtype, as under autocast.
Products of the core with B do not.

Not here: gradients (nodes.py), the same formulas in PyTorch (fallback.py), and the question whether
the kernels can run on a device (kernel_support.py).
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import _torch_private as private

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# When the adapter's product is computed: the `strategy` of the layers' operators.
TWO_PASS = 0  # the base product, then the adapter's product is added to it
BETA = 1  # the adapter's product, then the base product accumulates onto it
FUSED = 2  # both in one kernel on Hopper GPUs. Shapes that it refuses run as BETA

# The types that the kernels accept. Tensors of other types run the PyTorch fallback. NoneType is
# the type of an absent argument.
PLAIN_TYPES = {Tensor, nn.Parameter, type(None)}


_LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
try:
    torch.ops.load_library(str(_LIBRARY))
except OSError as error:
    raise ImportError(
        f"lotr_ext: expected a compiled extension at {_LIBRARY} that loads, got "
        f"{error.__cause__ or error}. Build it with `pip install --no-build-isolation -e .` "
        f"(or `make test`) in the project's folder. If it is installed elsewhere, this source "
        f"folder hides it: start Python in another folder, or as `python -P`.",
        name="lotr_ext",  # `python -m lotr_ext.info` prints one line for it and no traceback
    ) from None

lotr = torch.ops.lotr


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over tokens and layers: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaling_in_range(B: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Returns (B', s') with s' (u G) B'^T = s (u G) B^T.

    In float16, s u G overflows for a large s where the layer's output does not. Such an s is moved
    into B', so s' = 1. A small s stays, because u G without it could overflow.

    Args:
        B: [n, r_out].
        scaling: s.
        dtype: The dtype of u.
    """
    if dtype == torch.float16 and abs(scaling) > 1:
        return B * scaling, 1.0
    return B, scaling


# ---- calls from the autograd nodes ---------------------------------------------------------------
# Equations and arguments: csrc/torch/schema.cpp. `direct_call` makes the calls faster, but accepts
# positional arguments only.

project = private.direct_call(lotr.shrink.default)
project_backward = private.direct_call(lotr.shrink_backward_.default)
layer_backward = private.direct_call(lotr.layer_backward_.default)
layer_backward_few_tokens = private.direct_call(lotr.layer_backward_few_tokens_.default)
layer_backward_projected = private.direct_call(lotr.layer_backward_projected_.default)
layer_backward_rows = private.direct_call(lotr.layer_backward_rows_.default)


def as_matrix(x: Tensor) -> Tensor:
    """Returns x [.., k] as [rows, k]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def fake_kernel(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the fake kernel of an operator.

    The dispatcher calls the fake kernel if any argument is a meta tensor. A call that mixes meta
    tensors and real ones would return memory that was never written, so it is rejected here.
    """

    def register(function: Callable) -> Callable:
        def checked(*args):
            devices = [str(tensor.device) for tensor in args if isinstance(tensor, Tensor)]
            if len(set(devices)) > 1:
                raise RuntimeError(
                    f"lotr::{name}: expected tensors on one device, got {', '.join(devices)}"
                )
            return function(*args)

        torch.library.register_fake(f"lotr::{name}", checked)
        return function

    return register


def _in_one_call(name: str) -> Callable[[Callable], Callable]:
    """Replaces a function that computes an operator's steps with a call of that operator.

    The function itself still runs in two cases:

    - as the fake kernel of the operator;
    - under a dispatch mode, which must see the base product as an operator of PyTorch: selective
      checkpointing chooses by name which results it keeps, and a FLOP counter counts only PyTorch's
      operators. Steps and operator return the same tensors, so a checkpoint may be recomputed
      without the mode.
    """
    call_operator = private.direct_call(getattr(lotr, name).default)

    def decorate(steps: Callable) -> Callable:
        fake_kernel(name)(steps)

        @functools.wraps(steps)
        def run(*args):
            if private.dispatch_mode_count() and type(args[0]) in PLAIN_TYPES:
                return steps(*args)
            return call_operator(*args)

        return run

    return decorate


@_in_one_call("layer_forward")
def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    strategy: int,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, u, F): y = x W^T + bias + u F^T, u = drop(x) A, F = s B G^T.

    Args:
        x: [.., k]. csrc/torch/schema.cpp describes the other arguments.
    """
    base_output = nn.functional.linear(x, weight, bias)
    u = lotr.shrink.default(as_matrix(x), A, p, seed)
    F = lotr.fold.default(B, core, scaling, x.dtype)
    return lotr.expand.default(base_output, u, F), u, F


@_in_one_call("layer_forward_few_tokens")
def layer_forward_few_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    strategy: int,
) -> tuple[Tensor, Tensor]:
    """Returns (y, u): y = x W^T + bias + s (u G) B^T, u = x A.

    Args:
        core: G [r_in, r_out], which is not folded. The others are as for `layer_forward`.
    """
    u = lotr.shrink.default(as_matrix(x), A)
    scaled_B, h_scaling = scaling_in_range(B, scaling, u.dtype)
    h = u @ (core * h_scaling).to(u.dtype)
    return lotr.expand.default(nn.functional.linear(x, weight, bias), h, scaled_B.to(u.dtype)), u


@_in_one_call("layer_forward_projected")
def layer_forward_projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    strategy: int,
) -> tuple[Tensor, Tensor]:
    """Returns (y, F): y = x W^T + bias + u F^T, F = s B G^T.

    Args:
        u: x A [rows, r_in]. The others are as for `layer_forward`.
    """
    F = lotr.fold.default(B, core, scaling, x.dtype)
    return lotr.expand.default(nn.functional.linear(x, weight, bias), u, F), F


@_in_one_call("layer_forward_rows")
def layer_forward_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, strategy: int
) -> Tensor:
    """Returns y = x W^T + bias + h B^T.

    Args:
        h: s u G [rows, r_out]. The others are as for `layer_forward`.
    """
    return lotr.expand.default(nn.functional.linear(x, weight, bias), h, B)


# ---- fake kernels --------------------------------------------------------------------------------


def _empty_rows(like: Tensor, rows: int, rank: int, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor [rows, rank]. On CUDA each row starts at a multiple of 16 bytes."""
    dtype = dtype or like.dtype
    elements_per_chunk = 16 // dtype.itemsize if like.device.type == "cuda" else 1
    row_stride = -(-rank // elements_per_chunk) * elements_per_chunk
    # Not a slice of a wider tensor: a fake CUDA tensor can be sliced only by a CUDA build of torch.
    return like.new_empty_strided((rows, rank), (row_stride, 1), dtype=dtype)


def _new_factor_dtype(*factors: Tensor) -> torch.dtype:
    """The dtype of new gradients of factors: theirs if they share one, else the dtype of sums."""
    dtypes = {factor.dtype for factor in factors}
    return dtypes.pop() if len(dtypes) == 1 else accumulate_dtype(factors[0].dtype)


@fake_kernel("shrink")
def _(x, A, p=0.0, seed=None):
    torch._check(
        x.shape[1] == A.shape[0],
        lambda: f"shrink: A: expected {x.shape[1]} rows, got {A.shape[0]}",
    )
    return _empty_rows(x, x.shape[0], A.shape[1])


@fake_kernel("expand_add_")
def _(y, u, F, p=0.0, seed=None):
    return None


@fake_kernel("expand")
def _(y, u, F):
    return y.new_empty(y.shape)


@fake_kernel("fold")
def _(B, core, scaling, dtype):
    torch._check(
        B.shape[1] == core.shape[1],
        lambda: f"fold: core: expected r_out {B.shape[1]}, got {core.shape[1]}",
    )
    return _empty_rows(B, B.shape[0], core.shape[0], dtype)


@fake_kernel("layer_backward_few_tokens_")
def _(g, weight, x, u, A, B, core, scaling, strategy, dA, dB, need_B, need_core):
    # The same results as the next one, which also has an F.
    return _fake_layer_backward(
        g, weight, x, u, A, None, B, core, scaling, strategy, dA, dB, need_B, need_core
    )


@fake_kernel("layer_backward_")
def _fake_layer_backward(
    g, weight, x, u, A, F, B, core, scaling, strategy, dA, dB, need_B, need_core, p=0.0, seed=None
):
    dtype = _new_factor_dtype(B, core, A)
    return (
        _empty_dx(g, weight),
        _empty_gradient(A, dtype, x is not None and dA is None),
        _empty_gradient(B, dtype, need_B and dB is None),
        _empty_gradient(core, dtype, need_core),
    )


def _empty_dx(g: Tensor, weight: Tensor | None, dx: Tensor | None = None) -> Tensor | None:
    """A new dx. None without a weight, or if the operator adds to the dx that it was given."""
    if weight is None or dx is not None:
        return None
    return g.new_empty(*g.shape[:-1], weight.shape[1])


def _empty_gradient(factor: Tensor, dtype: torch.dtype, is_returned: bool) -> Tensor | None:
    return factor.new_empty(factor.shape, dtype=dtype) if is_returned else None


@fake_kernel("layer_backward_projected_")
def _(g, weight, u, F, B, core, scaling, du, dx, dB, need_B, need_core):
    dtype = _new_factor_dtype(B, core)
    new_du = None
    if F is not None and du is None:
        new_du = _empty_rows(g, u.shape[0], u.shape[1])
    elif F is not None:
        new_du = g.new_empty(u.shape)  # torch adds the given du, and makes dense rows
    return (
        _empty_dx(g, weight, dx),
        new_du,
        _empty_gradient(B, dtype, need_B and dB is None),
        _empty_gradient(core, dtype, need_core),
    )


@fake_kernel("layer_backward_rows_")
def _(g, weight, h, B, dx, dB, need_h, need_B):
    dh = _empty_rows(g, h.shape[0], h.shape[1]) if need_h else None
    dB_dtype = accumulate_dtype(g.dtype)
    return _empty_dx(g, weight, dx), dh, _empty_gradient(B, dB_dtype, need_B and dB is None)


@fake_kernel("shrink_backward_")
def _(du, dx, x, A, dA, p=0.0, seed=None):
    if x is None or dA is not None:
        return None
    return du.new_empty(x.shape[-1], du.shape[1], dtype=accumulate_dtype(du.dtype))


@fake_kernel("row_core")
def _(u, cores, index, offs, reads, scaling):
    rows = u.shape[0] if reads is None else reads.shape[0]
    return _empty_rows(u, rows, cores.shape[2])


@fake_kernel("row_core_backward")
def _(g, u, cores, index, offs, reads, scaling, need_u, need_cores):
    du = _empty_rows(u, *u.shape) if need_u else None
    return du, _empty_gradient(cores, accumulate_dtype(u.dtype), need_cores)


# ---- dropout_mask --------------------------------------------------------------------------------


@torch.library.custom_op("lotr::dropout_mask", mutates_args=())
def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask [rows, cols] that the operators' dropout draws from (p, seed).

    An element is 0 where x is dropped and 1 / (1 - p) where it is kept.

    Args:
        rows: The rows of x.
        cols: The columns of x.
        p: The probability of dropping an element.
        seed: One int64.
        dtype: The dtype of the mask, which is on the seed's device.
    """
    # The kernel of expand_add_ multiplies its product by the mask. Here the product is 1.
    mask = torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    ones = torch.ones(1, 1, dtype=dtype, device=seed.device)
    lotr.expand_add_(mask, ones.expand(rows, 1), ones.expand(cols, 1), p, seed)
    return mask


@fake_kernel("dropout_mask")
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
