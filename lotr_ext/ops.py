"""Loads the compiled operators, describes them to PyTorch, and holds the formulas of a layer in PyTorch's own products.

The operators are `torch.ops.lotr.<name>`; csrc/torch/schema.cpp lists them with their equations. One schema serves CPU and
CUDA, and the argument checks are C++. This file adds what LibTorch's stable ABI cannot register: shapes for tensors without
values (torch.compile), and version counters of what an operator writes. An operator raises RuntimeError, `lotr::<operator>:
<argument>: expected .., got ..`, before it writes anything. The operators have no gradients of their own: `autograd.py`
combines them into differentiable layers.

x and the results have one dtype, float32, bfloat16, float16 or float64. Sums are float32 (float64 for float64). Factors may be
float32 beside a half-precision x; they are rounded to x's dtype first, as under autocast.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_MAX_RANK = 256
TWO_PASS, BETA, UNFOLDED = 0, 1, 4  # the operators' `strategy`: csrc/torch/check.h says what each is
BETA_TOKENS = 1024  # on CUDA; derived from bytes moved: from here on the read of y that beta saves outweighs its slower start


# ---- the library -----------------------------------------------------------------------------------------------------


def _load() -> None:
    library = Path(__file__).with_name("_C.abi3.so")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # with a name: python -m lotr_ext.info prints one line on it, and no traceback
        raise ImportError(
            f"lotr_ext: expected a compiled extension that loads in {library}, got {error.__cause__ or error}. Build it with "
            f"`pip install --no-build-isolation -e .` (or `make test`) in the project's folder. If it is installed elsewhere, "
            f"this source folder hides it: start Python in another folder, or as `python -P`.",
            name="lotr_ext",
        ) from None


_load()
lotr = torch.ops.lotr


# ---- where kernels run -----------------------------------------------------------------------------------------------


@functools.cache
def build_info() -> dict:
    """How the extension was compiled: `torch.ops.lotr.info()`, parsed."""
    found = json.loads(lotr.info())
    found["cuda"]["archs"] = found["cuda"]["archs"].split(",") if found["cuda"]["built"] else []
    return found


def cuda_version(number: int) -> str:
    """ "12.8" of 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_obstacle() -> str | None:
    """Why the machine's driver runs no kernel of this build: no driver, or one for an older major version of CUDA."""
    runtime, driver = lotr.cuda_versions()
    if not driver:
        return "the machine has no NVIDIA driver, or a broken one (does nvidia-smi run?)"
    if driver // 1000 < runtime // 1000:
        return (
            f"lotr_ext was built by CUDA {cuda_version(runtime)}, the driver serves CUDA {cuda_version(driver)} at most: "
            f"update the driver, or build with a CUDA {driver // 1000} toolkit (CUDA_HOME)"
        )
    return None


@functools.cache
def cuda_obstacle(index: int) -> str | None:
    """Why our CUDA kernels cannot run on device `index`; None if they can. A small layer runs once, at the first use."""
    built = build_info()["cuda"]
    if not built["built"]:
        return "lotr_ext was built without CUDA kernels (no nvcc at build time, or LOTR_CUDA=OFF)"
    if (obstacle := driver_obstacle()) is not None:
        return obstacle
    if index >= torch.cuda.device_count():
        return f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here, none of index {index}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"expected compute capability 8.0 or later, got {major}.{minor}"
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("lotr_ext: expected a call before a graph's capture, got the first one inside of it. Warm up first.")
    if (error := failed_call(torch.device("cuda", index))) is None:
        return None
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"  # wgmma is in 90a alone
    archs = ", ".join(built["archs"])
    return (
        f"kernels built for {archs} do not run on compute capability {major}.{minor} ({error}): update the driver, or build "
        f"with LOTR_ARCHS={arch}"
    )


def failed_call(device: torch.device) -> str | None:
    """What goes wrong in a small layer on `device`; None if its numbers are right.

    It runs our kernels and the products of torch's library, which are called by names that are no part of a stable interface.
    """

    def call() -> str | None:
        try:
            two = torch.full((2, 2), 2.0, dtype=torch.float32, device=device)
            for order in (TWO_PASS, BETA):
                got = lotr.layer_forward(two, two, None, two, two, two, 1.0, order)[0].flatten().tolist()
                if got != [136.0] * 4:
                    return f"lotr::layer_forward, strategy {order}: expected 136 in each element, got {got}"
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None

    with ThreadPoolExecutor(1) as thread:  # the caller may trace: its FakeTensorMode does not reach another thread
        return thread.submit(call).result()


def obstacle_to_kernels(rank: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why none of our kernels runs for these; None if they do. rank: the larger of (r_in, r_out)."""
    if device.type == "cpu":
        return None if dtype in DTYPES.values() else f"no CPU kernels for {dtype}"
    if device.type != "cuda":
        return f"no kernels for device type {device.type}"
    if dtype not in CUDA_DTYPES:
        return f"no CUDA kernels for {dtype}"
    if rank > CUDA_MAX_RANK:
        return f"rank {rank} is above {CUDA_MAX_RANK}, the largest of our CUDA kernels"
    if device.index is not None:
        return cuda_obstacle(device.index)
    return cuda_obstacle(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def product_order(tokens: int | torch.SymInt, dtype: torch.dtype, device: torch.device) -> int:
    """BETA: the adapter's part is written first and the base product accumulates onto it. TWO_PASS: the product first.

    On a CPU, BETA for float32 and float64, whose product starts from a copy of the bias anyway. Half types would be rounded
    once more, and their product is slower with a bias than without, so our expand adds the bias. On CUDA, BETA from 1,024
    tokens on.
    """
    if device.type == "cpu":
        return BETA if dtype in (torch.float32, torch.float64) else TWO_PASS
    return BETA if not isinstance(tokens, int) or tokens >= BETA_TOKENS else TWO_PASS  # a traced size adds no guard


# ---- shapes, for tensors without values ------------------------------------------------------------------------------


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens and layers: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rank_rows(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output whose last dimension is a rank: contiguous, but on CUDA a row starts at a multiple of 16 bytes."""
    dtype = dtype or like.dtype
    if like.device.type != "cuda":
        return like.new_empty(size, dtype=dtype)
    chunk = 16 // dtype.itemsize
    padded = (*size[:-1], -(-size[-1] // chunk) * chunk)
    return like.new_empty(padded, dtype=dtype)[..., : size[-1]]


def _shapes(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the operator's fake kernel. The dispatcher calls it if any tensor is on meta: beside
    one with values it would return nothing useful, or write nothing, without an error."""

    def register(function: Callable) -> Callable:
        def checked(*args):
            first = None
            for argument, t in zip(getattr(lotr, name).default._schema.arguments, args):
                first = t if first is None and isinstance(t, Tensor) else first
                if isinstance(t, Tensor) and t.device != first.device:
                    label = f"lotr::{name}: {argument.name}"
                    raise RuntimeError(f"{label}: expected the device of the first tensor ({first.device}), got {t.device}")
            return function(*args)

        torch.library.register_fake(f"lotr::{name}", checked)
        return function

    return register


@_shapes("shrink")
def _(x, A, p=0.0, seed=None):
    torch._check(x.shape[1] == A.shape[0], lambda: f"shrink: A: expected {x.shape[1]} rows, got {A.shape[0]}")
    return _rank_rows(x, x.shape[0], A.shape[1])


@_shapes("expand_add_")
def _(y, u, F, p=0.0, seed=None):
    return None


@_shapes("expand")
def _(y, u, F):
    return y.new_empty(y.shape)


@_shapes("fold")
def _(B, core, scaling, dtype):
    torch._check(B.shape[1] == core.shape[1], lambda: f"fold: core: expected r_out {B.shape[1]}, got {core.shape[1]}")
    return _rank_rows(B, B.shape[0], core.shape[0], dtype=dtype)


@_shapes("layer_forward")
def _(x, weight, bias, A, B, core, scaling, strategy, u=None, F=None, p=0.0, seed=None):
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"layer_forward: x: expected {weight.shape[1]} columns, got {x.shape}")
    r_in = core.shape[0]
    new_u = _rank_rows(x, x.numel() // x.shape[-1], r_in) if u is None else None
    new_F = _rank_rows(x, B.shape[0], r_in) if F is None and strategy < UNFOLDED else None
    return x.new_empty(*x.shape[:-1], B.shape[0]), new_u, new_F


@_shapes("layer_backward_")
def _(g, weight, x, u, A, F, B, core, scaling, strategy, k, dx, Q, dA, dB, need_B, need_core, p=0.0, seed=None):
    own = B.dtype == core.dtype and (A is None or A.dtype == B.dtype)
    narrow = B.dtype if own else accumulate_dtype(B.dtype)
    fold = u is not None and Q is None
    return (
        None if weight is None or dx is not None else g.new_empty(*g.shape[:-1], weight.shape[1]),
        None if A is not None or F is None else _rank_rows(g, g.numel() // g.shape[-1], core.shape[0]),
        None if x is None or dA is not None else g.new_empty(x.shape[-1], core.shape[0], dtype=narrow),
        g.new_empty(B.shape, dtype=narrow) if fold and need_B and dB is None else None,
        g.new_empty(core.shape, dtype=narrow) if fold and need_core else None,
    )


@_shapes("shrink_backward_")
def _(k, dx, x, A, dA, p=0.0, seed=None):
    if x is None or dA is not None:
        return None
    return k.new_empty(x.shape[-1], k.shape[1], dtype=accumulate_dtype(k.dtype))


@_shapes("row_core")
def _(u, cores, index, offs, tokens, scaling):
    return _rank_rows(u, (u if tokens is None else tokens).shape[0], cores.shape[2])


@_shapes("row_core_backward")
def _(g, u, cores, index, offs, tokens, scaling, need_u, need_cores):
    dcores = u.new_empty(cores.shape if need_cores else (0, 0, 0), dtype=accumulate_dtype(u.dtype))
    return _rank_rows(u, *u.shape) if need_u else u.new_empty(0, 0), dcores


@torch.library.custom_op("lotr::dropout_mask", mutates_args=())
def dropout_mask(rows: int, cols: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [rows, cols] that the operators' dropout draws from (p, seed): 0, or 1 / (1 - p) where kept."""
    mask = torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    one = torch.ones(1, 1, dtype=dtype, device=seed.device)
    lotr.expand_add_(mask, one.expand(rows, 1), one.expand(cols, 1), p, seed)
    return mask


@_shapes("dropout_mask")
def _(rows, cols, p, seed, dtype):
    return torch.empty(rows, cols, dtype=dtype, device=seed.device)


# ---- version counters ------------------------------------------------------------------------------------------------

_registrations = torch.library.Library("lotr", "IMPL")


def _expand_add(keyset, y: Tensor, *args) -> None:
    """Bumps y's version counter, which the stable ABI does not do: a backward that saved y before it was written would silently
    compute a wrong gradient. `autograd.py` alone calls the layers' in-place operators, on sums that no backward saves."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        lotr.expand_add_.default.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, y, *args)
    torch.autograd.graph.increment_version(y)


_registrations.impl("expand_add_", _expand_add, "ADInplaceOrView", with_keyset=True)


# ---- the formulas of a layer in PyTorch's own products ---------------------------------------------------------------


def fold(B: Tensor, core: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """F = s B G^T [.., n, r_in] of B [n, r_out] and cores [.., r_in, r_out], computed in float32 (float64) and cast once."""
    wide = accumulate_dtype(B.dtype)
    return ((B.to(wide) @ core.to(wide).transpose(-2, -1)) * scaling).to(dtype)


def delta_weight(A: Tensor, B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """s B G^T A^T [.., n, k] in float32 (float64 for float64 factors)."""
    wide = accumulate_dtype(A.dtype)
    return fold(B, core, scaling, wide) @ A.to(wide).mT


def expand(u: Tensor, B: Tensor, core: Tensor | None, scaling: float) -> Tensor:
    """s (u G) B^T; without a core s u B^T. u [.., r] -> [.., n] in u's dtype.

    float16 is not folded, because F could overflow where the layer's output does not.
    """
    if core is None or u.dtype == torch.float16:
        h = u if core is None else u @ core.to(u.dtype)
        return (h @ B.to(u.dtype).transpose(0, 1)) * scaling
    return u @ fold(B, core, scaling, u.dtype).transpose(-2, -1)  # not mT, which ONNX does not have


def cores_of_groups(offs: Tensor, rows: int, count: int) -> Tensor:
    """The core of each row [rows], from where the rows of each core end (offs [count]); -1 for rows behind the last end."""
    index = torch.searchsorted(offs.long(), torch.arange(rows, device=offs.device), right=True)
    return torch.where(index < count, index, -1)


def row_core(u: Tensor, cores: Tensor, scaling: float, index: Tensor, tokens: Tensor | None = None) -> Tensor:
    """h_i = s u_t(i) G_c(i): u [m, r_in], cores [c, r_in, r_out], index [rows] = c(i) or -1 for none -> h [rows, r_out].

    tokens [rows]: t(i), else i. h is zero in rows without a core. Summed in float32 (float64), cast once.
    """
    wide = accumulate_dtype(u.dtype)
    u_rows = (u if tokens is None else u[tokens]).to(wide)
    own = cores.to(u.dtype).to(wide)[index.clamp(min=0)]  # cores are rounded to u's dtype, as the kernels do
    h = (u_rows.unsqueeze(1) @ own).squeeze(1) * scaling
    return torch.where(index.unsqueeze(1) < 0, torch.zeros_like(h), h).to(u.dtype)


def rows_of(index: Tensor, x: Tensor) -> Tensor:
    """index [b], [b, tokens] or [rows] -> one entry for each row of x [.., k], flattened."""
    lead = x.shape[:-1]
    return index.view(*index.shape, *(1,) * (len(lead) - index.dim())).expand(lead).reshape(-1)


def layer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    p: float = 0.0,
    y: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + s ((drop(x) A) G) B^T in PyTorch's own products; with y, the output of another base, y + s (..)."""
    y = nnf.linear(x, weight, bias) if y is None else y
    A, B, core = (t if t.device == x.device else t.to(x.device) for t in (A, B, core))
    u = (nnf.dropout(x, p) if p else x) @ A.to(x.dtype)
    if index is not None:
        h = row_core(u.flatten(0, -2), core, scaling, rows_of(index, x))
        return y + expand(h.view(*x.shape[:-1], B.shape[1]), B, None, 1.0).to(y.device, y.dtype)
    return y + expand(u, B, core, scaling).to(y.device, y.dtype)
