"""How a call of an adapted layer runs.

    linear -- autocast: cast the inputs, and call linear again
       |
       +-- Dynamo traces ------> lotr::linear, one opaque operator. AOTAutograd traces its body:
       |                         run_nodes, or the fallback
       +-- fallback_reason ----> fallback.layer, in PyTorch operations
       |
       +-- otherwise ----------> run_nodes -- choose_plan -- the autograd nodes on our operators

    grouped_linear   the same for the rows of a mixture of experts, onto the grouped base product

Arguments are not checked here (functional.py and layers.py check them).
"""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import _torch_private as private
from . import fallback, grouped, nodes
from .factor_cache import FactorCache
from .kernel_support import kernel_obstacle
from .nodes import BaseProduct, RowChoice
from .operators import lotr
from .strategy import choose_strategy

# Part of the key of compiled code that torch keeps on disk. Change it with nodes.py and this file.
VERSION = "lotr 6"

# Below this many multiplications in one pass over x, a layer computes u itself. Reading an element
# of x takes as long as 16 of them, so a pass is x.numel() (r_in + 16). One node then costs less
# than two nodes that share u: 12.1 against 15.4 % over the frozen model at 256 tokens, 8.4 against
# 7.1 % at 1,024 (python -m bench.model --model smollm2 --sequence 256).
LITTLE_WORK = 2**23

# Below this many tokens, multiplying them with the core costs less than folding the core into B.
FEW_TOKENS = 129

_PLAIN_TYPES = {Tensor, nn.Parameter, type(None)}
_AUTOCAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


class Caches(NamedTuple):
    """The caches of the two factors of a call."""

    A: FactorCache
    B: FactorCache


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    p: float = 0.0,
    *,
    base_output: Tensor | None = None,
    index: Tensor | None = None,
    caches: Caches | None = None,
    layer: object = None,
) -> Tensor:
    """Computes x W^T + bias + s ((drop(x) A) G) B^T [.., n] without argument checks.

    Args:
        x: [.., k].
        weight: [n, k]. None with a base_output.
        bias: [n].
        A: [k, r_in].
        B: [n, r_out].
        core: [r_in, r_out], or [c, r_in, r_out] with an index.
        scaling: s.
        p: The probability of dropping an element of the adapter's x.
        base_output: The output of another base layer [.., n]. It replaces x W^T + bias.
        index: Which core a row of x uses (int64), -1 for none: [b], [b, tokens] or [rows].
        caches: Shared by all calls with this A, and by all with this B.
        layer: Identifies the calling layer. It gets each shared u once.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        weight = _cast(weight, dtype)
        bias = _cast(bias, dtype)
        if base_output is not None:
            dtype = base_output.dtype  # the adapter must not round what its base did not
        if caches is None or torch.compiler.is_compiling():
            x = x.to(dtype)
        else:
            x = caches.A.cast(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return linear(
                x, weight, bias, A, B, core, scaling, p,
                base_output=base_output, index=index, caches=caches, layer=layer,
            )  # fmt: skip
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return fallback.layer(x, weight, bias, A, B, core, scaling, p, base_output, index)
        return lotr.linear.default(
            x, weight, bias, A, B, core, scaling, p, base_output, index, VERSION
        )
    if fallback_reason(x, weight, A, B, core, base_output) is not None:
        if base_output is None and type(weight) in _PLAIN_TYPES:
            _check_base_product(x, weight)
        return fallback.layer(x, weight, bias, A, B, core, scaling, p, base_output, index)
    if caches is None:
        caches = Caches(FactorCache(), FactorCache())
    choice = None if index is None else RowChoice(fallback.rows_of(index, x))
    return run_nodes(x, weight, bias, A, B, core, scaling, p, base_output, choice, caches, layer)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offs: Tensor,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    scaling: float,
    p: float,
    choice: RowChoice,
    *,
    caches: Caches | None = None,
    layer: object = None,
) -> Tensor:
    """Computes y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((drop(x)_t(i) A) G_i) B^T [rows, n].

    Rows past the last end are zero. There are no argument checks.

    Args:
        x: [m, k].
        weight: [e, n, k].
        bias: [e, n].
        offs: Where the rows of each expert end [e] (int32).
        A: [k, r_in].
        B: [n, r_out].
        cores: [c, r_in, r_out].
        scaling: s.
        p: The probability of dropping an element of the adapter's x.
        choice: The core G_i and the token t(i) of each row.
        caches: As for `linear`, as is layer.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        weight = weight.to(dtype)
        bias = _cast(bias, dtype)
        x = x.to(dtype) if caches is None else caches.A.cast(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return grouped_linear(
                x, weight, bias, offs, A, B, cores, scaling, p, choice, caches=caches, layer=layer
            )
    x_rows = x if choice.tokens is None else x[choice.tokens]
    y = grouped.linear(x_rows, weight, bias, offs)
    if (
        torch.compiler.is_compiling()
        or fallback_reason(x, None, A, B, cores, base_output=y) is not None
    ):
        index = choice.index
        if index is None:
            index = fallback.cores_of_groups(choice.offs, len(y), len(cores))
        return fallback.grouped_layer(x, y, A, B, cores, scaling, p, index, choice.tokens)
    if caches is None:
        caches = Caches(FactorCache(), FactorCache())
    return run_nodes(x, None, None, A, B, cores, scaling, p, y, choice, caches, layer)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast casts x, None if it does not cast x."""
    if not private.any_autocast_is_enabled() or x.dtype not in _AUTOCAST_DTYPES:
        return None
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):  # the next line would raise, as for meta
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _check_base_product(x: Tensor, weight: Tensor) -> None:
    """Checks that PyTorch can compute x W^T, which the fallback does.

    Raises:
        TypeError: If the dtypes differ. Autocast has cast both already.
        ValueError: If only one of them is on the meta device.
    """
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x: expected dtype {weight.dtype}, as the weight has, got {x.dtype}. "
            f"Convert x or the layer."
        )
    if x.is_meta != weight.is_meta:
        raise ValueError(
            f"x: expected a tensor on {weight.device}, as the weight is, got one on {x.device}. "
            f"Move x or the layer."
        )


# ---- fallback or kernels -------------------------------------------------------------------------


def fallback_reason(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    base_output: Tensor | None = None,
) -> str | None:
    """Returns why a call runs the PyTorch fallback, None if it runs our kernels.

    The arguments are as for `linear`. Either weight or base_output is given.
    """
    if private.functorch_is_active() or private.forward_ad_is_active():
        return "a transform of torch.func or forward-mode AD is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace or torch.onnx records the call"
    if x.layout is not torch.strided:
        return f"x has layout {x.layout}"
    types = {type(x), type(weight), type(A), type(B), type(core), type(base_output)}
    if not types <= _PLAIN_TYPES:
        return "a tensor is of a subclass"
    if not _share_device(x, A, B, core):
        return "the tensors are on several devices"
    base = weight
    if base is None:
        base = base_output
        if base.device != x.device:
            return "the tensors are on several devices"
    return _dtype_obstacle(x.dtype, base.dtype, A.dtype, B.dtype, core.dtype, core.shape, x.device)


def _share_device(x: Tensor, A: Tensor, B: Tensor, core: Tensor) -> bool:
    if x.is_cpu:  # faster than a comparison of devices
        return A.is_cpu and B.is_cpu and core.is_cpu
    return x.device == A.device == B.device == core.device


@functools.cache
def _dtype_obstacle(
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    A_dtype: torch.dtype,
    B_dtype: torch.dtype,
    core_dtype: torch.dtype,
    core_shape: torch.Size,
    device: torch.device,
) -> str | None:
    for name, dtype in (("A", A_dtype), ("B", B_dtype), ("core", core_dtype)):
        is_wide_factor = dtype == torch.float32 and x_dtype.itemsize == 2
        if dtype != x_dtype and not is_wide_factor:
            return f"{name} is {dtype}, but x is {x_dtype}"
    if base_dtype != x_dtype:
        return f"the base is {base_dtype}, but x is {x_dtype}"
    return kernel_obstacle(max(core_shape[-2:]), x_dtype, device)


# ---- the nodes of a call -------------------------------------------------------------------------


class Plan(enum.Enum):
    """The autograd nodes that compute a call."""

    ONE_NODE = enum.auto()  # the layer's node computes u; the core is folded into B
    ONE_NODE_FEW_TOKENS = enum.auto()  # the layer's node computes u and multiplies it with the core
    PROJECTION = enum.auto()  # another node computes u, once for all layers on this x


def choose_plan(
    x: Tensor, A: Tensor, tokens: int | torch.SymInt, layers: int, p: float, needs_projection: bool
) -> Plan:
    """Chooses the nodes of a call.

    Args:
        tokens: Rows of x. A symbol if torch.compile traces dynamic shapes; no guard is added to it.
        layers: How many layers use A, 0 if unknown.
        p: The probability of dropout. Each layer then has another u, and the operators apply the
            mask only where they fold.
        needs_projection: Whether the call has row cores or the output of another base, which one
            node does not compute.
    """
    if needs_projection:
        return Plan.PROJECTION
    if x.dtype == torch.float16:  # F could overflow where the layer's output does not
        return Plan.PROJECTION if p else Plan.ONE_NODE_FEW_TOKENS
    if x.requires_grad and not A.requires_grad:
        return Plan.PROJECTION  # one node would keep x, which a frozen A does not need
    if p:
        return Plan.ONE_NODE
    is_known = isinstance(tokens, int)
    if layers != 1:
        r_in = A.shape[1]
        if not is_known or x.numel() * (r_in + 16) >= LITTLE_WORK:
            return Plan.PROJECTION
    return Plan.ONE_NODE_FEW_TOKENS if is_known and tokens < FEW_TOKENS else Plan.ONE_NODE


def run_nodes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    p: float,
    base_output: Tensor | None,
    choice: RowChoice | None,
    caches: Caches,
    layer: object,
) -> Tensor:
    """Computes a call by our operators. `fallback_reason` must be None.

    The arguments are as for `linear`, except for `choice`: which core of `core` each row of the
    output uses, None if all rows use one core.
    """
    if x.dim() > 2 and not x.is_contiguous():
        x = x.contiguous()  # the operators flatten the leading dimensions
    A = caches.A.summed(A)
    B = caches.B.summed(B)
    if base_output is None and _is_trained(weight, bias):
        base_output = nnf.linear(x, weight, bias)  # autograd then computes the gradient of W
    tokens = x.numel() // x.shape[-1] if x.numel() else 0
    strategy = choose_strategy(tokens, x)

    needs_projection = choice is not None or base_output is not None
    plan = choose_plan(x, A, tokens, caches.A.layers, p, needs_projection)
    if plan is not Plan.PROJECTION:
        few_tokens = plan is Plan.ONE_NODE_FEW_TOKENS
        return nodes.layer_on_input(x, A, B, core, weight, bias, scaling, strategy, few_tokens, p)

    product = BaseProduct(x, weight, bias) if base_output is None else None
    projection = nodes.project_input(x, A, p) if p else caches.A.projection(x, A, layer)
    if choice is not None:
        h = nodes.row_core(projection.u, core, scaling, choice)
        return nodes.layer_on_rows(projection, base_output, h, B, product, strategy)
    if x.dtype == torch.float16:
        h = (projection.u @ core.to(x.dtype)) * scaling  # not folded, as in fallback.expand
        return nodes.layer_on_rows(projection, base_output, h, B, product, strategy)
    return nodes.layer_on_projection(projection, base_output, B, core, product, scaling, strategy)


def _is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


# ---- torch.compile -------------------------------------------------------------------------------


def _linear_in_graph(
    x, weight, bias, A, B, core, scaling, p, base_output, index, version
) -> Tensor:
    """lotr::linear: opaque to Dynamo, but AOTAutograd traces this function.

    A compiled graph therefore has our operators, forward and backward. While AOTAutograd traces,
    the tensors have its own type. Plain tensors mean that something else runs the graph.
    """
    base = base_output if weight is None else weight
    dtypes = x.dtype, base.dtype, A.dtype, B.dtype, core.dtype
    is_traced = type(x) not in _PLAIN_TYPES
    if not is_traced or _dtype_obstacle(*dtypes, core.shape, x.device) is not None:
        return fallback.layer(x, weight, bias, A, B, core, scaling, p, base_output, index)
    caches = Caches(_cache_of_traced(A), _cache_of_traced(B))
    choice = None if index is None else RowChoice(fallback.rows_of(index, x))
    return run_nodes(
        x, weight, bias, A, B, core, scaling, p, base_output, choice, caches, layer=core
    )


def _cache_of_traced(factor: Tensor) -> FactorCache:
    # On the traced tensor, which ends with the trace.
    if not hasattr(factor, "_lotr_cache"):
        factor._lotr_cache = FactorCache()
    return factor._lotr_cache


_library = torch.library.Library("lotr", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor? W, Tensor? bias, Tensor A, Tensor B, Tensor core, float scaling, "
    "float p, Tensor? y, Tensor? index, str version) -> Tensor"
)
_library.impl("linear", _linear_in_graph, "CompositeImplicitAutograd")
