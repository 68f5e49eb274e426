"""The state that layers of a group share in a step: one u = x A for all layers called on the same x; and the record of a call.

    x, A --> LoTRShrink (u, route) --+--> LoTRExpand (route, u, B, G_q, W_q -> y_q)
                                     +--> LoTRExpand (route, u, B, G_k, W_k -> y_k)
                                     +--> LoTRExpand (route, u, B, G_v, W_v -> y_v)

Such layers are siblings, also with different B. Four objects hold the state:

    Group          of one LoTRFactors: the SharedFactor of A and that of B
    SharedFactor   of one factor: its gradient (`shared_gradient.py`), and each thread's newest SharedInput
    SharedInput    of one x: u, route, and the siblings whose backward has not run yet
    _pending       the pending gradients (k, dx) of u and x, one pair for each SharedInput and running backward

`route` represents x in the graph. In backward each sibling adds its k = g F and dx = g W to the pending gradients
(`SharedInput.pending`) and returns None for them. The last sibling computes dA in one pass over x, and adds k A^T before its
own g W. If the last sibling cannot be determined (retain_graph, a sibling that is not in the loss), LoTRShrink's backward
takes the pending gradients (`SharedInput.take`) and does both. Autograd runs it after the siblings.

A call reuses u only for the same x object, unchanged, in the same grad mode, dtype, autocast state, dropout, checkpoint
region and CUDA stream, with no optimizer step between, and only once for each layer: a second call of a layer starts a new
round. One kind of change is not detected: a write to x or A between two siblings' calls through `.data` or a NumPy view, which
does not change version counters. No activation is kept alive.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..compat import (
    BackwardCFunction,
    graph_task,
    is_compiling,
    keeps_graph,
    running_function,
    same_storage,
    saved_tensor_hook,
    stream_of,
    wraps_inputs,
)
from ..ops import planner
from ..ops.composite import to
from .shared_gradient import SharedGradient, TaskSum, TaskSums

if TYPE_CHECKING:
    from torch import nn

    from ..ops.planner import Plan

_pending = TaskSums()  # (k, dx) of each SharedInput in a running backward
_REGIONS = (types.FunctionType, BackwardCFunction, types.NoneType)  # checkpoint regions that a weak reference can identify


class SharedInput:
    """u = x A of one x, for the siblings called on it, and the pending gradients of both.

    Only the siblings' autograd nodes hold a strong reference: u's graph references x, so a strong reference from the factor
    would leak the activation. u is cleared when x is freed, because under checkpointing x is freed before the nodes are.
    """

    u: Tensor | None = None
    route: Tensor | None = None
    seed: Tensor | None = None
    kept: tuple | None = None
    node: weakref.ref | None = None  # LoTRShrink's, once u is in a graph

    def __init__(self, x: Tensor, A: Tensor, key: tuple | None, region: object | None):
        own = weakref.ref(self)

        def forget(_) -> None:
            if (alive := own()) is not None:
                alive.u = alive.route = alive.seed = None  # no more siblings

        self.x, self.key, self.region = weakref.ref(x, forget), key, None if region is None else weakref.ref(region)
        self.A = None if key is None else (A, A.untyped_storage())
        self.users: set[int] = set()
        self.waiting: set[weakref.ref] = set()  # the siblings' nodes whose backward has not run

    def drawn(self, device: torch.device) -> Tensor:
        """The seed of all siblings' dropout mask (int64, one element), drawn at the first call."""
        if self.seed is None:
            self.seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
        return self.seed

    def serves(self, A: Tensor, key: tuple, region: object | None, user: object) -> bool:
        """Whether user, called on this x, may use u, or the seed if u is not computed yet."""
        if (self.u is None and self.seed is None) or self.key != key or id(user) in self.users:
            return False
        if self.A[0] is not A or not same_storage(self.A[1], A.untyped_storage()):
            return False
        return self.region is None if region is None else self.region is not None and self.region() is region

    # ---- backward ----------------------------------------------------------------------------------------------------

    def pending(self, node: weakref.ref, device: torch.device) -> tuple[TaskSum, object | None]:
        """The running backward's pending gradients (k, dx), to which a sibling's node adds; their value is None when new. Also
        LoTRShrink's node if this sibling is the last.

        Later calls do not reuse u: an optimizer step may follow, and a fused optimizer does not change version counters.
        """
        self.u = self.route = self.seed = None
        if not keeps_graph():
            self.waiting.discard(node)
        last = None if self.waiting or self.node is None else self.node()
        return _pending.of_task(self, device), last

    def take(self, device: torch.device, k: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The running backward's pending gradients plus k and dx from autograd. Afterwards nothing is pending."""
        total = _pending.sums.get((graph_task(), self))
        if total is None or total.value is None:
            return k, dx
        if device.type == "cuda":
            total.follow_stream(device)
        found, total.value = total.value, None
        if k is None and dx is None:
            return found
        return tuple(b if a is None else a if b is None else a + b for a, b in zip((k, dx), found))

    def keep(self, *saved: Tensor | None) -> None:
        """Keeps LoTRShrink's saved tensors while a sibling's backward has not run: autograd frees them after the first."""
        self.kept = tuple((t, None if t is None else t._version) for t in saved) if self.waiting else None

    def kept_if(self, *wanted: bool) -> list[Tensor | None]:
        """The kept tensors, None for unwanted ones. If nothing was kept, raises the error that is being handled; if a wanted
        tensor has changed, raises autograd's error for that."""
        if self.kept is None:
            raise
        kept = [item if want else (None, None) for item, want in zip(self.kept, wanted)]
        for t, version in kept:
            if t is not None and t._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(t.shape)} is at version {t._version}; expected version {version}"
                ) from None
        if not self.waiting:
            self.kept = None
        return [t for t, _ in kept]


class _Steps(threading.local):
    """taken: the steps of all optimizers in this thread, needed because a fused optimizer does not change version counters."""

    taken = 0
    everywhere = 0  # in all threads
    hook: RemovableHandle | None = None  # of the process

    def count(self) -> None:
        """Starts to count: no hook is registered before the first factor is created."""
        if _Steps.hook is None:
            _Steps.hook = register_optimizer_step_post_hook(self._take)

    def _take(self, *_: object) -> None:
        self.taken += 1
        _Steps.everywhere += 1


_steps = _Steps()


def steps_taken() -> int:
    """The steps of all optimizers in all threads."""
    return _Steps.everywhere


class _Newest(threading.local):
    """A factor's newest SharedInput in this thread. Per thread, so that a recomputation chooses as its forward did."""

    input: Callable[[], SharedInput | None] = staticmethod(lambda: None)


class SharedFactor(SharedGradient):
    """One factor's gradient and, for an A, each thread's newest SharedInput. Copies and pickles of it start empty.

    layers: how many layers have the factor, in any pair; 0 if not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = 0
        self.parts: dict[tuple, SharedFactor] = {}
        self._newest = _Newest()
        _steps.count()

    def __reduce__(self):
        return SharedFactor, ()

    def part(self, *key: object) -> SharedFactor:
        """The SharedFactor of some of its rows, which layers with a sharded weight read (`tensor_parallel.py`)."""
        found = self.parts.get(key)
        if found is None:
            found = self.parts.setdefault(key, SharedFactor())
            found.layers = 2  # assume more than one
        return found

    def find(self, x: Tensor, A: Tensor, user: object, how: tuple) -> SharedInput:
        """The SharedInput for user's call on x: a sibling's, in which u or seed is set, or a new one.

        how: all else that u depends on, with the dropout last. For a new one the caller sets u (and route, in a graph),
        or draws the seed, and then calls `offer`.
        """
        # The innermost saved-tensor hook identifies a checkpoint's forward, its recomputation and the code around it. Forward
        # and recomputation must save the same tensors: they must choose alike, and never share with each other.
        region = (saved_tensor_hook(False) or (None,))[0]
        if how[-1]:
            # a reentrant checkpoint draws its masks again from its start; a module with backward hooks gets its own x
            if wraps_inputs(user):
                return SharedInput(x, A, None, None)
            if not torch.is_grad_enabled():
                region = running_function() or region
        if not isinstance(region, _REGIONS) or x.is_inference() or A.is_inference():
            return SharedInput(x, A, None, None)
        key = (
            *(x._version, self.address(x), x.shape, x.requires_grad, x.is_leaf),
            *(A._version, A.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            *(_steps.taken, x.is_cuda and stream_of(x), how),
        )
        found = self._newest.input()
        if found is None or found.x() is not x or not found.serves(A, key, region, user):
            found = SharedInput(x, A, key, region)
        found.users.add(id(user))
        return found

    def offer(self, shared_input: SharedInput) -> None:
        """Makes shared_input the newest, if it may be shared. Without a graph u does not hold x, so the factor may own it."""
        if shared_input.key is not None:
            in_graph = shared_input.route is not None
            self._newest.input = weakref.ref(shared_input) if in_graph else lambda: shared_input


class Group:
    """The SharedFactors of one LoTRFactors' A and B; new if not given."""

    def __init__(self, A: SharedFactor | None = None, B: SharedFactor | None = None) -> None:
        self.A, self.B = A or SharedFactor(), B or SharedFactor()

    def __reduce__(self):
        return Group, (self.A, self.B)

    def join(self) -> None:
        """Counts one more layer that has this pair."""
        self.A.layers += 1
        self.B.layers += 1


class Call:
    """One call of one layer: the layer's inputs, and the choices for it.

    core: [r_in, r_out]; scaling: s; p: the dropout; group: None for a layer that shares nothing; owner: the module
        with the core, known to a forward scope; strategy: the forced one of STRATEGIES, or None; shares: whether another
        layer has one of its factors
    dtype: autocast's, or None; compute: the dtype to compute in; plan: of the call
    bank, l: the forward scope's Bank and the layer's index in it (`bank.py`)
    scale: m / c [n], if the product with the base must be scaled; the nodes do it if they compute that product
    dense: returns the weight of the base product, which is then not saved; None if the weight itself is given
    first: weight, bias and B, if LoTRShrink may compute y and u in one operator; made: that y and its F, for LoTRExpand
    owns_y: whether no other code has a reference to the y to which the adapter is added
    factors: A, B and core as passed to LoTRFunction; apart: whether they are on another device than x
    read: tensors and their versions at the forward, under a dispatch mode (`note_versions`)
    """

    __slots__ = (
        *("apart", "bank", "compute", "core", "dense", "dtype", "factors", "first", "group", "l", "made", "owner", "owns_y"),
        *("p", "plan", "read", "scale", "scaling", "shares", "strategy"),
    )

    def __init__(
        self,
        core: Tensor,
        scaling: float,
        p: float = 0.0,
        group: Group | None = None,
        owner: nn.Module | None = None,
        strategy: str | None = None,
    ):
        self.core, self.scaling, self.p, self.group, self.owner, self.strategy = core, scaling, p, group, owner, strategy
        self.shares = group is not None and (group.A.layers != 1 or group.B.layers != 1)
        self.dtype: torch.dtype | None = None
        self.bank: Any = None  # a Bank, whose module imports this one
        self.l: int | None = None
        self.scale: Tensor | None = None
        self.dense: Callable[[], Tensor] | None = None
        self.first: tuple[Tensor, Tensor | None, Tensor] | None = None
        self.made: tuple[Tensor, Tensor] | None = None
        self.owns_y = False
        self.read: dict[str, tuple[Tensor, int]] | None = None
        self.compute: torch.dtype
        self.plan: Plan
        self.factors: tuple[Tensor, Tensor, Tensor]
        self.apart: bool

    @classmethod
    def of_function(cls, x: Tensor, core: Tensor, scaling: float, graph: bool) -> Call:
        """The call of a LoTRFunction without a layer."""
        call = cls(core, float(scaling))
        call.compute = x.dtype
        call.plan = planner.plan_function(x, core, graph)
        return call

    def cast(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The operands of the base product and of its gradients, as autocast casts them."""
        dtype = self.dtype
        return tensors if dtype is None else tuple(None if t is None else to(t, dtype) for t in tensors)

    def note_versions(self, **tensors: Tensor) -> None:
        """Notes the version counters of tensors under a dispatch mode: selective checkpointing keeps results of them, and
        autograd then does not check whether they were changed in place."""
        if not (is_compiling() or any(t.is_inference() for t in tensors.values())):
            self.read = {name: (t, t._version) for name, t in tensors.items()}

    def refuse_changed(self, **wanted: bool) -> None:
        """Raises RuntimeError if a tensor of `note_versions` was changed since, and a wanted gradient depends on it."""
        for name, (t, before) in self.read.items():
            if wanted[name] and t._version != before:
                raise RuntimeError(
                    f"lotr_ext: {name}: expected version {before}, got {t._version}: it was changed in place between forward "
                    "and backward of a layer under a dispatch mode (selective checkpointing, allow_mutation_on_saved_tensors), "
                    "which keeps what was made of it; change it after the backward"
                )
