"""LoTR layers as autograd nodes on the compiled operators.

    y_l = x W_l^T + bias_l + s ((drop(x) A) G_l) B^T      A, B shared by the layers of a group; folded factor F_l = s B G_l^T

A forward of q, k and v on one x, and its backward:

    x, A --> Shrink (u, route) --+--> Layer (route, u, B, G_q, W_q) --> y_q
                                 +--> Layer (route, u, B, G_k, W_k) --> y_k    each: dx += g W, k += g F on Shrink's node
                                 +--> Layer (route, u, B, G_v, W_v) --> y_v    then Shrink: dA += x^T k, dx += k A^T

Shared    the identity on A or B. Layers add to one fp32 sum and return no gradient of A or B; autograd calls it after all
          of them, and it returns the sum.
Shrink    u = drop(x) A, once for all layers on one x. `route` stands for x in the graph without holding its memory.
RowCore   h_i = s u_i G_c(i), where rows have different cores. The layer is then y = x W^T + bias + h B^T.
Layer     one layer: after Shrink; alone, with u = x A inside, where x is small; or onto the output y of any other base.
          backward: dx += g W, k += g F, Q = g^T u, B's sum += s Q G, dG = s Q^T B.

`ops.layer` is the same in PyTorch's own products. It runs where kernels cannot: another device or dtype, tensor subclasses,
functorch, dispatch modes such as selective checkpointing. A backward that autograd records (create_graph=True,
is_grads_batched) differentiates these products, too.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional as nnf

from . import ops
from .ops import UNFOLDED

lotr = torch.ops.lotr

# The private names of torch that this package uses, each with its reason.
_graph_task = torch._C._current_graph_task_id  # of the running backward: the sums of two backwards must not mix
_will_run = torch._C._will_engine_execute_node  # a sum for a node that this backward does not reach would never be returned
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # a checkpoint must not reuse a u made outside of it
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView  # skips Python kernels of version counters: 4 us an operator
_boxed = torch._C._dispatch_call_boxed  # skips the search for __torch_function__: 2 us an operator
_functorch = torch._C._are_functorch_transforms_active  # vmap, grad, jvp: kernels cannot run
_tracing = torch._C._is_tracing  # torch.jit.trace and ONNX record torch's products; torch.jit.is_tracing is slower Python
_dispatch_modes = torch._C._len_torch_dispatch_stack  # selective checkpointing must see torch's products
_autocast = torch._C._is_any_autocast_enabled  # torch.is_autocast_enabled raises for devices such as meta
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # torch.cuda.current_stream makes objects; none without CUDA
_batched = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C._dispatch_key_parse("VmapMode"))

_forward, _backward, _shrink, _shrink_backward = (
    functools.partial(_boxed, getattr(lotr, name).default._handle)
    for name in ("layer_forward", "layer_backward_", "shrink", "shrink_backward_")
)
_PLAIN = {Tensor, nn.Parameter, type(None)}
_CAST = {torch.float32, torch.bfloat16, torch.float16}  # by autocast, which leaves float64 and integers as they are
_NOTHING = type(None)  # _NOTHING() is None: a weak reference to nothing
# Multiplications of one pass over x, x.numel() (r_in + 16): reading an element takes as long as 16 of them. Below, one node a
# layer costs less than Shrink and Layer, which share u (`python -m bench.model --model smollm2 --sequence 256`: 12.1 against
# 15.4 % over the frozen model at 256 tokens, 8.4 against 7.1 % at 1,024).
LITTLE_WORK = 2**23
FEW_TOKENS = 129  # below, multiplying the tokens with the core costs less than folding it into B
VERSION = "lotr 3"  # part of the key of compiled code that torch keeps on disk: change it with this file


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _recorded(g: Tensor) -> bool:
    """Whether the running backward must be PyTorch's own products. AOTAutograd traces a backward with tensors of its own type,
    and the nodes' operators then belong into the graph."""
    tangents = forward_ad._current_level >= 0
    compiled = torch.compiler.is_compiling() and type(g) is Tensor
    return torch.is_grad_enabled() or _batched() or _functorch() or tangents or compiled


def _gradients(formula: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], g: Tensor) -> list[Tensor | None]:
    """The gradients of formula(*inputs) for g, which can be differentiated again; None for frozen inputs."""
    with torch.enable_grad():
        # Aliases: one input may depend on another (u on B, through other layers), and its gradient must not follow that path.
        inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(formula(*inputs), wanted, g, create_graph=True) if wanted else ())
    return [None if t is None or not t.requires_grad else next(found) for t in inputs]


# ---- nodes -----------------------------------------------------------------------------------------------------------


class Shared(Function):
    """The identity on A or B. Its backward returns the sum of all layers' gradients.

    sums: by running backward, because several threads may train one model at once.
    """

    @staticmethod
    def forward(ctx, factor: Tensor, sums: dict[int, Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return factor.detach()  # not a view: autograd refuses views of a leaf that the optimizer changed

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        total = ctx.sums.pop(_graph_task(), None) if ctx.sums else None
        return _added(grad, total), None  # autograd casts it to the factor's dtype


def _sum_of(factor: Tensor | None, need: bool) -> tuple[bool, Tensor | None]:
    """(whether the running backward needs the gradient of A or B, the sum that it is added to).

    factor: an output of Shared; or a leaf that one layer alone uses, which has no sum: its gradient is returned as it is.
    """
    node = factor.grad_fn if need else None
    if node is None:
        return need, None
    if not _will_run(node):
        return False, None
    found = factor.sums.get(task := _graph_task())
    if found is None:
        found = torch.zeros(factor.shape, dtype=ops.accumulate_dtype(factor.dtype), device=factor.device)
        factor.sums[task] = found
    return True, found


class Shrink(Function):
    """u = drop(x) A [m, r_in], once for all layers on one x.

    Returns (u, route). sums: [k, dx] that the layers have added up, by running backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, p: float, seed: Tensor | None):
        ctx.set_materialize_grads(False)
        need_x, need_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_A else None, A if need_x else None, seed)
        ctx.p, ctx.shape, ctx.shared, ctx.sums = p, x.shape, A, {}
        route = torch.empty_strided(x.shape, (0,) * x.dim(), dtype=x.dtype, device=x.device)
        if not need_x:
            ctx.mark_non_differentiable(route)  # otherwise the layers would compute g W for nothing
        with _below_autograd():
            return _shrink(x.reshape(-1, x.shape[-1]), A, p, seed), route

    @staticmethod
    def backward(ctx, k: Tensor | None, dx: Tensor | None):
        own_k, own_dx = ctx.sums.pop(_graph_task(), (None, None)) if ctx.sums else (None, None)
        k, dx = _added(k, own_k), _added(None if dx is None else dx.reshape(-1, ctx.shape[-1]), own_dx)
        (need_x, need_A), dA = ctx.needs_input_grad[:2], None
        if k is not None:
            x, A, seed = ctx.saved_tensors
            if _recorded(k):
                mask = lotr.dropout_mask(k.shape[0], ctx.shape[-1], ctx.p, seed, k.dtype) if ctx.p else 1
                dx = _added(dx, (k @ A.to(k.dtype).mT) * mask if need_x else None)
                dA = ((x.reshape(-1, x.shape[-1]) * mask).mT @ k).to(ctx.shared.dtype) if need_A else None
            else:
                if need_x and dx is None:
                    dx = k.new_zeros(k.shape[0], ctx.shape[-1])
                need_A, sum_A = _sum_of(ctx.shared, need_A)
                # writes to dx, which only this node holds
                dA = _shrink_backward(k, dx, x if need_A else None, A, sum_A, ctx.p, seed)
        return None if dx is None else dx.view(ctx.shape), dA, None, None


class RowCore(Function):
    """h_i = s u_t(i) G_c(i) [rows, r_out]; c from index [rows] (-1: none) or offs [c], t from tokens [rows]: see schema.cpp."""

    @staticmethod
    def forward(
        ctx, u: Tensor, cores: Tensor, scaling: float, index: Tensor | None, offs: Tensor | None, tokens: Tensor | None
    ):
        ctx.save_for_backward(u, cores, index, offs, tokens)
        ctx.scaling = scaling
        with _below_autograd():
            return lotr.row_core.default(u, cores, index, offs, tokens, scaling)

    @staticmethod
    def backward(ctx, g: Tensor):
        u, cores, index, offs, tokens = ctx.saved_tensors
        need_u, need_cores = ctx.needs_input_grad[:2]
        if _recorded(g):
            if index is None:
                index = ops.cores_of_groups(offs, len(g), len(cores))
            du, dcores = _gradients(lambda u, cores: ops.row_core(u, cores, ctx.scaling, index, tokens), (u, cores), g)
        else:
            du, dcores = lotr.row_core_backward.default(
                g.contiguous(), u, cores, index, offs, tokens, ctx.scaling, need_u, need_cores
            )
        return du if need_u else None, dcores if need_cores else None, None, None, None, None


Base = tuple[Tensor | None, Tensor | None, Tensor | None]  # (x, W, bias); all None where y of another base is given


def _compute(
    y: Tensor | None, u: Tensor | None, base: Base, A: Tensor | None, B: Tensor, core: Tensor | None, scaling: float, order: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, u, F) of a layer. Without a core, u is h = s u G and F is B."""
    F = None
    if core is None:
        F, core = B.to(u.dtype), B.new_empty(B.shape[1], B.shape[1])  # the operators check its shape and do not read it
    if y is None:
        y, new_u, new_F = _forward(*base, A, B, core, scaling, order, u, F)
        return y, new_u if u is None else u, new_F if F is None else F
    with _below_autograd():
        F = lotr.fold.default(B, core, scaling, u.dtype) if F is None else F
        return lotr.expand.default(y, u, F), u, F


class Layer(Function):
    """One layer. x: the input itself where u is made inside, else Shrink's route, or None onto another base's y.

    A: given where u is made inside. base: where autograd does not look, because x has a gradient of its own here and W has
    none.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor | None,
        y: Tensor | None,
        u: Tensor | None,
        A: Tensor | None,
        B: Tensor,
        core: Tensor | None,
        base: Base,
        scaling: float,
        order: int,
        shrunk: Shrunk | None,
    ):
        ctx.alone = A is not None
        y, u, F = _compute(y, u, base, A, B, core, scaling, order)
        keep_x = ctx.alone and (ctx.needs_input_grad[0] or ctx.needs_input_grad[3])
        ctx.save_for_backward(x if keep_x else None, u, base[1], A, B, core, F)
        ctx.scaling, ctx.order, ctx.shared_A, ctx.shared_B = scaling, order, A, B
        ctx.shrunk = shrunk  # siblings find u while a node holds it, until a backward begins
        ctx.after = None if shrunk is None else shrunk.node
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, u, W, A, B, core, F = ctx.saved_tensors
        ctx.shrunk = None
        need_x, need_y, need_u, need_A, need_B, need_core = ctx.needs_input_grad[:6]
        shape, dy, g = g.shape, g if need_y else None, g if g.dim() == 2 else g.reshape(-1, g.shape[-1])
        if _recorded(g):
            dx, k, dA, dB, dcore = _recorded_backward(ctx, g, x, u, A, B, core)
            dx = _added(dx, (g @ W).view(*shape[:-1], W.shape[1])) if need_x else None
            return dx, dy, k, dA, dB, dcore, None, None, None, None
        sums = None
        if ctx.after is not None and _will_run(ctx.after):
            sums = ctx.after.sums.setdefault(_graph_task(), [None, None])
        adds_k = sums is not None and core is not None and need_u  # without a core, k is the gradient of h: RowCore's alone
        k, dx = sums[0] if adds_k else None, sums[1] if sums is not None and need_x else None
        need_A, sum_A = _sum_of(ctx.shared_A, need_A)
        need_B, sum_B = _sum_of(ctx.shared_B, need_B)
        Q, dB = None, None
        if core is None:  # Q = g^T h is dB
            Q = torch.zeros_like(B, dtype=ops.accumulate_dtype(B.dtype)) if need_B and sum_B is None else sum_B
            dB, need_B, sum_B, core = Q if sum_B is None else None, False, None, B.new_empty(B.shape[1], B.shape[1])
        W, x, F = W if need_x else None, x if need_A else None, F if need_u or ctx.alone else None
        new_dx, new_k, dA, new_dB, dcore = _backward(
            g, W, x, u, A, F, B, core, ctx.scaling, ctx.order, k, dx, Q, sum_A, sum_B, need_B, need_core
        )
        if adds_k:
            sums[0], new_k = new_k, None
        if need_x and sums is not None:
            sums[1], new_dx = new_dx if dx is None else dx, None
        elif need_x:
            new_dx = new_dx.view(*shape[:-1], new_dx.shape[-1])
        return new_dx, dy, new_k, dA, dB if new_dB is None else new_dB, dcore, None, None, None, None


def _recorded_backward(ctx, g: Tensor, x, u, A, B, core) -> tuple[Tensor | None, ...]:
    """(dx, k, dA, dB, dcore) of the adapter's part, which can be differentiated again."""
    scaling = ctx.scaling
    if not ctx.alone:
        k, dB, dcore = _gradients(lambda u, B, core: ops.expand(u, B, core, scaling), (u, B, core), g)
        return None, k, None, dB, dcore

    def formula(x: Tensor, A: Tensor, B: Tensor, core: Tensor) -> Tensor:
        return ops.expand(x.reshape(-1, x.shape[-1]) @ A.to(x.dtype), B, core, scaling)

    if x is None:  # only B's and the core's gradients are needed, and u is at hand
        dB, dcore = _gradients(lambda B, core: ops.expand(u, B, core, scaling), (B, core), g)
        return None, None, None, dB, dcore
    dx, dA, dB, dcore = _gradients(formula, (x, A, B, core), g)
    return dx, None, dA, dB, dcore


# Function.apply without the checks for functorch's transforms (5 us a layer and step); `_obstacle` has made them.
_run_layer, _run_shrink, _run_shared, _run_row_core = (super(Function, node).apply for node in (Layer, Shrink, Shared, RowCore))
for _node in (Layer, Shrink, Shared, RowCore):  # the engine calls backward without a method that looks for vjp: 1 us a layer
    _node._backward_cls.apply = _node.backward


# ---- what calls share ------------------------------------------------------------------------------------------------


class Shrunk:
    """u = drop(x) A of one x, the route that stands for x, and Shrink's node.

    Only the layers' nodes hold it (without a graph, `FactorState`): u's graph refers to x, so a strong reference elsewhere
    would keep x.
    """

    def __init__(self, u: Tensor, route: Tensor):
        self.u, self.route, self.node = u, route, u.grad_fn


def _storage(t: Tensor) -> int:
    """Which storage t has: `t.data = other` gives another one, without a new version. Not its address: FSDP2 frees the memory
    of a storage and fills it again elsewhere."""
    return t.untyped_storage()._cdata if type(t) in _PLAIN else 0


def _where(x: Tensor) -> tuple[object, ...]:
    """Where a call is: grad mode, checkpoint region, thread and stream. What it makes may be reused only there."""
    stream = _stream(x.get_device()) if x.is_cuda else 0
    hooks = _saved_tensor_hooks(False)
    return torch.is_grad_enabled(), hooks and weakref.ref(hooks[0]), threading.get_ident(), stream


class FactorState:
    """What calls with one A, or one B, share: the Shared node of its sum, for A the u of the newest x, and the newest cast of
    an x. layers: how many modules use the factor, 0 if that is unknown; one alone needs no Shared."""

    def __init__(self, layers: int = 0) -> None:
        self.layers = layers
        self._node: tuple = (_NOTHING, None, _NOTHING)  # (the factor, its version, storage and stream, the output of Shared)
        self._input: tuple = (_NOTHING, None, _NOTHING, None)  # (x, key, Shrunk, ids of the layers that used it)
        self._cast: tuple = (_NOTHING, None, _NOTHING)  # (x, key, x in another dtype)

    def __reduce__(self) -> tuple:
        return FactorState, (self.layers,)  # a copy shares nothing

    def shared(self, factor: Tensor) -> Tensor:
        """The output of Shared for the factor: the same one for all layers, as long as the factor is unchanged and a graph
        holds it. Each CUDA stream has its own, because autograd orders only the gradients that it sees."""
        if not (factor.requires_grad and torch.is_grad_enabled()) or (self.layers == 1 and factor.is_leaf):
            return factor
        of, key, node = self._node
        now = factor._version, _storage(factor), _stream(factor.get_device()) if factor.is_cuda else 0
        if of() is factor and key == now and (found := node()) is not None:
            return found
        found = _run_shared(factor, sums := {})
        found.sums = sums
        self._node = weakref.ref(factor), now, weakref.ref(found)
        return found

    def shrunk(self, x: Tensor, A: Tensor, p: float, user: object) -> Shrunk:
        """The Shrunk of x: a sibling's, where that was called on the same x, unchanged, in the same place. Each user gets it
        once: a fused optimizer changes A without a new version, and its next forward begins with the first user again."""
        key = None  # tensors of inference mode have no version
        if not x.is_inference():
            key = x._version, A._version, _storage(A), A.requires_grad, p, _where(x)
        of, known, shrunk, users = self._input
        if key and of() is x and known == key and id(user) not in users and (found := shrunk()) is not None:
            users.add(id(user))
            return found
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if p else None
        found = Shrunk(*_run_shrink(x, A, p, seed))
        held = weakref.ref(found) if found.node is not None else lambda: found
        self._input = weakref.ref(x), key, held, {id(user)}
        return found

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x.to(dtype), the same tensor for all siblings under autocast, because siblings know x by its identity."""
        if x.dtype == dtype or x.is_inference():
            return x.to(dtype)
        (of, known, cast), key = self._cast, (x._version, dtype, _where(x))
        if of() is not x or known != key or (found := cast()) is None:
            found = x.to(dtype)
            self._cast = weakref.ref(x), key, weakref.ref(found)
        return found


# ---- a call ----------------------------------------------------------------------------------------------------------


@functools.cache
def _obstacle_to_dtypes(x, W, A, B, core, device, shape) -> str | None:
    for name, dtype in (("A", A), ("B", B), ("core", core)):
        if dtype != x and not (dtype == torch.float32 and x.itemsize == 2):
            return f"{name} is {dtype} beside an x of {x}"
    if W != x:
        return f"the base is {W} beside an x of {x}"
    return ops.obstacle_to_kernels(max(shape[-2:]), x, device)


def obstacle(x: Tensor, W: Tensor | None, A: Tensor, B: Tensor, core: Tensor, y: Tensor | None = None) -> str | None:
    """Why this call runs PyTorch's own products; None if it runs our kernels. y: of another base, then W is None."""
    if _functorch() or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode AD is active"
    if _tracing():
        return "torch.jit.trace or torch.onnx records the call"
    if _dispatch_modes():
        return "a dispatch mode is active, such as selective checkpointing"
    if x.layout is not torch.strided:
        return f"x has layout {x.layout}"
    if not {type(x), type(W), type(A), type(B), type(core), type(y)} <= _PLAIN:
        return "a tensor is of a subclass"
    here = (x.is_cpu and A.is_cpu and B.is_cpu and core.is_cpu) or x.device == A.device == B.device == core.device
    if not here or (y is not None and y.device != x.device):
        return "the tensors are on several devices"
    return _obstacle_to_dtypes(x.dtype, (y if W is None else W).dtype, A.dtype, B.dtype, core.dtype, x.device, core.shape)


def nodes(x, W, bias, A, B, core, scaling, p, y, routing, factors, user) -> Tensor:
    """`lotr_linear` as nodes: one by itself where x is small or no other layer has A, else Layer after Shrink, which siblings
    share. There must be no obstacle. routing: (index, offs, tokens) of RowCore, whose rows are then those of y; or None."""
    if x.dim() > 2 and not x.is_contiguous():
        x = x.contiguous()  # the operators take leading dimensions that lie as one
    (of_A, of_B), half = factors, x.dtype == torch.float16
    A, B = of_A.shared(A), of_B.shared(B)
    if y is None and (W.requires_grad or (bias is not None and bias.requires_grad)):
        y = nnf.linear(x, W, bias)
    base = (x, W, bias) if y is None else (None, None, None)
    tokens = x.numel() // x.shape[-1] if x.numel() else 0  # under torch.compile a symbol, which gets no guard
    order = ops.product_order(tokens, x.dtype, x.device)
    known = isinstance(tokens, int)
    by_itself = half or of_A.layers == 1 or (known and tokens * x.shape[-1] * (core.shape[0] + 16) < LITTLE_WORK)
    keeps_x = x.requires_grad and not A.requires_grad and not half  # alone, a layer keeps x, which a frozen A does not need
    if by_itself and y is None and routing is None and not p and not keeps_x:
        u, shrunk = None, None
        if half or (known and tokens < FEW_TOKENS):
            order += UNFOLDED
    else:
        shrunk = of_A.shrunk(x, A, p, user)
        u, A, x = shrunk.u, None, shrunk.route if y is None else None
        if routing is not None:
            cores = core if core.dtype in (u.dtype, torch.float32) else core.to(u.dtype)
            u, core, scaling = _run_row_core(u, cores, scaling, *routing), None, 1.0
        elif half:  # not folded: see ops.expand
            u, core, scaling = (u @ core.to(u.dtype)) * scaling, None, 1.0
    if torch.is_grad_enabled():
        return _run_layer(x, y, u, A, B, core, base, scaling, order, shrunk)
    return _compute(y, u, base, A, B, core, scaling, order)[0]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts x; None where it leaves x as it is."""
    if not _autocast() or x.dtype not in _CAST or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def lotr_linear(
    x: Tensor,
    W: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    p: float = 0.0,
    y: Tensor | None = None,
    index: Tensor | None = None,
    factors: tuple[FactorState, FactorState] | None = None,
    user: object = None,
) -> Tensor:
    """x W^T + bias + s ((drop(x) A) G) B^T; with y, the output of any base, y + s (..). The arguments are not checked.

    x [.., k], W [n, k], bias [n], A [k, r_in], B [n, r_out], core [r_in, r_out] -> [.., n]. p: probability of dropout of the
    adapter's x. index [b], [b, tokens] or [rows] (int64): which of core [c, r_in, r_out] a row uses, -1 for none.
    factors: what calls with this A and this B share; user: the calling layer, which gets each shared u once.
    """
    if _autocast() and (dtype := autocast_dtype(x)) is not None:
        W, bias, y = (None if t is None else t.to(dtype) for t in (W, bias, y))
        x = x.to(dtype) if factors is None or torch.compiler.is_compiling() else factors[0].cast(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lotr_linear(x, W, bias, A, B, core, scaling, p, y, index, factors, user)
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            return lotr.linear.default(x, W, bias, A, B, core, scaling, p, y, index, VERSION)
    elif obstacle(x, W, A, B, core, y) is None:
        routing = None if index is None else (ops.rows_of(index, x), None, None)
        return nodes(x, W, bias, A, B, core, scaling, p, y, routing, factors or (FactorState(), FactorState()), user)
    elif type(W) in _PLAIN and y is None:
        _check_beside(x, W)
    return ops.layer(x, W, bias, A, B, core, scaling, p, y, index)


def _check_beside(x: Tensor, W: Tensor) -> None:
    """Of a call that cannot run kernels: whether torch's product can run. Autocast has cast x and W already."""
    if x.dtype != W.dtype:
        raise TypeError(f"x: expected dtype {W.dtype}, as the weight has, got {x.dtype}. Convert x or the layer.")
    if x.is_meta != W.is_meta:
        raise ValueError(f"x: expected a tensor on {W.device}, as the weight is, got one on {x.device}. Move x or the layer.")


def _linear_in_graph(x, W, bias, A, B, core, scaling, p, y, index, version) -> Tensor:
    """lotr::linear: one operator for Dynamo, which AOTAutograd takes apart into the nodes above, so that a compiled graph holds
    our operators, forward and backward."""
    dtypes = x.dtype, (y if W is None else W).dtype, A.dtype, B.dtype, core.dtype
    if type(x) in _PLAIN or _obstacle_to_dtypes(*dtypes, x.device, core.shape) is not None:
        return ops.layer(x, W, bias, A, B, core, scaling, p, y, index)
    for factor in (A, B):
        if not hasattr(factor, "_lotr_state"):
            factor._lotr_state = FactorState()  # on the tensor that is traced, which ends with the trace
    routing = None if index is None else (ops.rows_of(index, x), None, None)
    return nodes(x, W, bias, A, B, core, scaling, p, y, routing, (A._lotr_state, B._lotr_state), core)


_library = torch.library.Library("lotr", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor? W, Tensor? bias, Tensor A, Tensor B, Tensor core, float scaling, float p, Tensor? y, Tensor? "
    "index, str version) -> Tensor"
)
_library.impl("linear", _linear_in_graph, "CompositeImplicitAutograd")


# ---- state of a request ----------------------------------------------------------------------------------------------

open_requests: set[object] = set()  # the open contexts of all threads: while it is empty, a layer's call does not look further


@contextlib.contextmanager
def requesting(states: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Context in which `requests().get(layer)` is states[layer], in this thread and in the backwards that it starts.

    The state is torch's own thread-local, which autograd carries into its threads, so a checkpoint recomputes with it if
    backward is called inside the context.
    """
    before, token = requests(), object()
    torch._C._stash_obj_in_tls("lotr", {**before, **states})
    open_requests.add(token)
    try:
        yield
    finally:
        open_requests.discard(token)
        torch._C._stash_obj_in_tls("lotr", before)


def requests() -> Mapping[nn.Module, Any]:
    """The states of all layers in this request."""
    if open_requests and torch._C._is_key_in_tls("lotr"):
        return torch._C._get_obj_in_tls("lotr")
    return {}
