"""How a call of an adapted layer runs.

    linear -- autocast: cast the inputs, and call linear again
       |
       +-- Dynamo traces ------> lotr::linear, one opaque operator. AOTAutograd traces its body:
       |                         run_nodes, or the fallback
       +-- fallback_reason ----> fallback.layer, in PyTorch operations
       |
       +-- otherwise ----------> run_nodes -- choose_plan -- the autograd nodes on our operators

    grouped_linear   the same for a mixture of experts: adds the adapter to the grouped base product

Arguments are not checked here (functional.py and layers.py check them).
"""

import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _torch_private as private
from . import fallback, grouped, nodes
from .call import LayerCall, RowChoice
from .factor_cache import FactorCache
from .kernel_support import kernel_obstacle
from .operators import PLAIN_TYPES, lotr, scaling_in_range
from .strategy import choose_strategy

# Part of the key of compiled code that torch keeps on disk. Change it whenever a change of nodes.py
# or of this file changes what a compiled graph contains.
VERSION = "lotr 8"

# Layers on one x may share u = x A, but a shared node costs host time. Computing u again costs a
# pass over x: x.numel() * (r_in + READ_COST) multiplications. Below LITTLE_WORK of them, each layer
# computes u itself. An adapted model's step takes this much longer than the frozen model's
# (python -m bench.model --models smollm2-135m --sequence 256):
#
#     tokens   each layer computes u   layers share u
#        256                  12.1 %           15.4 %
#      1,024                   8.4 %            7.1 %
READ_COST = 16  # of one element of x, in multiplications
LITTLE_WORK = 2**23

# Up to this many tokens, multiplying them with the core costs less than folding the core into B.
FEW_TOKENS = 128

_AUTOCAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


class Caches(NamedTuple):
    """The caches of the two factors of a call."""

    A: FactorCache
    B: FactorCache


def linear(call: LayerCall, caches: Caches | None = None, layer: object = None) -> Tensor:
    """Computes x W^T + bias + s ((drop(x) A) G) B^T [.., n] without argument checks.

    Args:
        call: The arguments.
        caches: Shared by all calls with this A, and by all with this B.
        layer: Identifies the calling layer. It gets each shared u once.
    """
    dtype = autocast_dtype(call.x)
    if dtype is not None:
        # Disabled, because the second call would cast again, without end.
        with torch.autocast(call.x.device.type, enabled=False):
            return linear(_cast(call, dtype, caches), caches, layer)
    if torch.compiler.is_compiling():
        # An exported program has only operators of PyTorch, so that it runs without lotr_ext.
        if torch.compiler.is_exporting():
            return fallback.layer(call)
        # The operator has the fields of LayerCall, and the three of RowChoice in place of `choice`.
        return lotr.linear.default(*call[:-1], *(call.choice or RowChoice(None)), VERSION)
    if fallback_reason(call) is not None:
        if call.base_output is None and type(call.weight) in PLAIN_TYPES:
            _check_base_product(call.x, call.weight)
        return fallback.layer(call)
    return run_nodes(call, caches or Caches(FactorCache(), FactorCache()), layer)


def grouped_linear(
    call: LayerCall, offs: Tensor, caches: Caches | None = None, layer: object = None
) -> Tensor:
    """Computes y_i = x_t(i) W_c(i)^T + bias_c(i) + s ((drop(x)_t(i) A) G_i) B^T [rows, n].

    Rows past the last end are zero. There are no argument checks.

    Args:
        call: With weight [e, n, k], bias [e, n], and the core G_i and the token t(i) of each row.
        offs: Where the rows of each expert end [e] (int32).
        caches, layer: As for `linear`.
    """
    dtype = autocast_dtype(call.x)
    if dtype is not None:
        call = _cast(call, dtype, caches)
    y = grouped.linear(call.x, call.weight, call.bias, offs, call.choice.reads)
    # Under autocast, `linear` casts again: to the dtype of y, which x has already.
    return linear(call._replace(weight=None, bias=None, base_output=y), caches, layer)


def _cast(call: LayerCall, dtype: torch.dtype, caches: Caches | None) -> LayerCall:
    """Returns the call as autocast casts it. The operators accept A, B and the core in float32."""
    if call.base_output is not None:
        dtype = call.base_output.dtype  # the adapter must not round what its base did not
    if caches is None or torch.compiler.is_compiling():
        x = call.x.to(dtype)
    else:
        x = caches.A.cast(call.x, dtype)
    weight = call.weight if call.weight is None else call.weight.to(dtype)
    bias = call.bias if call.bias is None else call.bias.to(dtype)
    return call._replace(x=x, weight=weight, bias=bias)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast casts x, None if it does not cast x."""
    if not private.any_autocast_is_enabled() or x.dtype not in _AUTOCAST_DTYPES:
        return None
    device_type = x.device.type
    # is_autocast_enabled raises for a device type without autocast, such as meta.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _check_base_product(x: Tensor, weight: Tensor) -> None:
    """Checks that PyTorch can compute x W^T, which the fallback does.

    PyTorch itself would return memory that was never written if only one of them is on the meta
    device.

    Raises:
        TypeError: If the dtypes differ (autocast has cast both already), or if only one of them is
            on the meta device.
    """
    if x.dtype != weight.dtype or x.is_meta != weight.is_meta:
        raise TypeError(
            f"x: expected {weight.dtype} on {weight.device}, as the weight is, got {x.dtype} on "
            f"{x.device}. Convert x or the layer."
        )


# ---- fallback or kernels -------------------------------------------------------------------------


def fallback_reason(call: LayerCall) -> str | None:
    """Returns why a call runs the PyTorch fallback, None if it runs our kernels."""
    if private.functorch_is_active() or private.forward_ad_is_active():
        return "a transform of torch.func or forward-mode AD is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace or torch.onnx records the call"
    # LayerCall's fields in order. One unpacking is faster than six attribute reads.
    x, weight, _, A, B, core, _, _, base_output, _ = call
    # Sparse and mkldnn tensors have the plain type, but no strides.
    if x.layout is not torch.strided:
        return f"x has layout {x.layout}"
    if not {type(x), type(weight), type(A), type(B), type(core), type(base_output)} <= PLAIN_TYPES:
        return "a tensor is of a subclass"
    base = weight if base_output is None else base_output
    # `is_cpu` is faster than a comparison of devices.
    on_cpu = x.is_cpu and base.is_cpu and A.is_cpu and B.is_cpu and core.is_cpu
    if not on_cpu and not x.device == base.device == A.device == B.device == core.device:
        return "the tensors are on several devices"
    # A CPU's kernels accept any rank, and the hash of a shape takes 0.3 us.
    core_shape = (0, 0) if on_cpu else core.shape
    return _dtype_obstacle(x.dtype, base.dtype, A.dtype, B.dtype, core.dtype, core_shape, x.device)


# Cached, because these arguments are the same in all calls of a layer.
@functools.cache
def _dtype_obstacle(
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    A_dtype: torch.dtype,
    B_dtype: torch.dtype,
    core_dtype: torch.dtype,
    core_shape: tuple[int, ...],
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
    # The layer's node computes u and multiplies it with the core: for few tokens, and in float16
    # for any number, because F could overflow.
    ONE_NODE_FEW_TOKENS = enum.auto()
    PROJECTION = enum.auto()  # another node computes u, once for all layers on this x


# As names of this module, because a read such as `Plan.PROJECTION` takes 0.1 us.
ONE_NODE, ONE_NODE_FEW_TOKENS, PROJECTION = Plan


def choose_plan(
    x: Tensor, A: Tensor, tokens: int | torch.SymInt, layers: int, p: float, needs_projection: bool
) -> Plan:
    """Chooses the nodes of a call.

    Args:
        x, A: As in the call.
        tokens: Rows of x. A symbol if torch.compile traces dynamic shapes; no guard is added to it.
        layers: How many layers use A, 0 if unknown.
        p: The probability of dropout. If it is not 0, each layer draws a mask, so layers cannot
            share u, and the few-token form, which has no mask, cannot run.
        needs_projection: Whether the call has a choice or a base_output, which one node does not
            support.
    """
    if needs_projection or (p and x.dtype == torch.float16):
        return PROJECTION
    if x.dtype == torch.float16:
        return ONE_NODE_FEW_TOKENS
    if x.requires_grad and not A.requires_grad:
        return PROJECTION  # one node would keep x, which a frozen A does not need
    if p:
        return ONE_NODE
    # torch.compile would turn a comparison with a symbol into a guard, and compile each form.
    is_known = isinstance(tokens, int)
    if layers != 1 and (not is_known or x.numel() * (A.shape[1] + READ_COST) >= LITTLE_WORK):
        return PROJECTION
    return ONE_NODE_FEW_TOKENS if is_known and tokens <= FEW_TOKENS else ONE_NODE


def run_nodes(call: LayerCall, caches: Caches, layer: object) -> Tensor:
    """Computes a call with our operators.

    An x that cannot be flattened is copied first. If weight or bias is trained, PyTorch computes
    the base product, as a base_output. Then one node computes the call, or a projection and a node
    that starts from u or h = s u G.

    Args:
        call: Arguments for which `fallback_reason` is None.
        caches, layer: As for `linear`.
    """
    x, weight, bias, A, B, core, scaling, p, base_output, choice = call
    if x.dim() > 2 and not x.is_contiguous():  # the operators flatten the leading dimensions
        return run_nodes(call._replace(x=x.contiguous()), caches, layer)
    trains_weight = weight is not None and weight.requires_grad
    trains_bias = bias is not None and bias.requires_grad
    if trains_weight or trains_bias:
        # PyTorch computes the base product, because our nodes have no gradients of weight and bias.
        y = nn.functional.linear(x, weight, bias)
        return run_nodes(call._replace(weight=None, bias=None, base_output=y), caches, layer)
    A = caches.A.summed(A)
    B = caches.B.summed(B)
    tokens = x.numel() // (x.shape[-1] or 1)  # max(.., 1) takes 0.2 us more
    strategy = choose_strategy(tokens, x)

    needs_projection = choice is not None or base_output is not None
    plan = choose_plan(x, A, tokens, caches.A.layers, p, needs_projection)
    seed = None
    if p:
        # Each call draws one seed, as nn.Dropout draws one mask. A checkpoint restores torch's
        # generator, so its recomputation draws the same seeds, whether or not layers share u again.
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    if choice is None and private.saved_tensor_hooks():
        # Hooks may save the tensor itself, and autograd then does not compare its version. The copy
        # keeps dB = s Q G right if only the core is written before backward. A, B and the cores of
        # rows have no copy: like a weight in PyTorch, they must not change before backward.
        core = core.clone()
    if plan is not PROJECTION:
        few_tokens = plan is ONE_NODE_FEW_TOKENS
        return nodes.layer_on_input(x, A, B, core, call, strategy, few_tokens, seed)

    if seed is None:
        projection = caches.A.projection(x, A, layer)
    else:
        projection = nodes.project_input(x, A, p, seed)
    if choice is None and x.dtype != torch.float16:
        return nodes.layer_on_projection(
            projection.route, base_output, projection.u, B, core, call, projection, strategy
        )
    # Rows have different cores, or float16 cannot fold: the layer's node starts from h.
    scaled_B, scaling = scaling_in_range(B, scaling, x.dtype)
    if choice is not None:
        h = nodes.row_core(projection.u, core, scaling, choice)
    else:
        h = projection.u @ (core * scaling).to(x.dtype)
    return nodes.layer_on_rows(
        projection.route, base_output, h, scaled_B, call, projection, strategy
    )


# ---- torch.compile -------------------------------------------------------------------------------


def _linear_in_graph(
    x, weight, bias, A, B, core, scaling, p, base_output, index, offs, reads, version
) -> Tensor:
    """lotr::linear: opaque to Dynamo, but AOTAutograd traces this function.

    A compiled graph therefore has our operators, forward and backward. While AOTAutograd traces,
    the tensors are of a subclass. If they are plain, Dynamo's graph runs without AOTAutograd, for
    example with backend="eager", and the fallback computes the call.
    """
    has_choice = index is not None or offs is not None
    choice = RowChoice(index, offs, reads) if has_choice else None
    call = LayerCall(x, weight, bias, A, B, core, scaling, p, base_output, choice)
    base = base_output if weight is None else weight
    ranks = (int(core.shape[-2]), int(core.shape[-1]))  # the symbols of Dynamo have no hash
    obstacle = _dtype_obstacle(x.dtype, base.dtype, A.dtype, B.dtype, core.dtype, ranks, x.device)
    if type(x) in PLAIN_TYPES or obstacle is not None:
        return fallback.layer(call)
    # As attributes of the traced tensors, the caches end with the trace.
    A_cache = A.__dict__.setdefault("_lotr_cache", FactorCache())
    B_cache = B.__dict__.setdefault("_lotr_cache", FactorCache())
    return run_nodes(call, Caches(A_cache, B_cache), layer=core)


_library = torch.library.Library("lotr", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor core, "
    "float scaling, float p, Tensor? base_output, Tensor? index, Tensor? offs, Tensor? reads, "
    "str version) -> Tensor"
)
_library.impl("linear", _linear_in_graph, "CompositeImplicitAutograd")
