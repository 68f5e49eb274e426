"""One u = x A for all layers that have A and are called on the same x, as q, k and v of a block are, whatever their B.

    x, A --> LoTRShrink (u, route) --+--> LoTRExpand (route, u, B, G_q, W_q -> y_q)
                                     +--> LoTRExpand (route, u, B, G_k, W_k -> y_k)
                                     +--> LoTRExpand (route, u, B, G_v, W_v -> y_v)

`route` is x's place in the graph. The siblings' gradients of x and u are summed here, as a factor's are in its shared gradient.
The last sibling to go backward makes dA in one pass over x, and k A^T before its g W; where none can know that it is the last
(retain_graph, a sibling that is not in the loss), LoTRShrink's backward does, which autograd runs after theirs.

A u is shared only by calls on the very same x object, unchanged, in the same grad mode, dtype, autocast state, dropout and
checkpoint region, with no optimizer step between, and only once by each layer: a layer that comes again starts a new round. So
of all changes only one is missed that leaves no trace and falls between two siblings' calls on one x: `.data` and NumPy's views
of x or A. Nothing here keeps an activation alive.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..compat import BackwardCFunction, graph_task, keeps_graph, running_function, same_storage, saved_tensor_hook, wraps_inputs
from .shared_gradient import SharedGradient, TaskSum, TaskSums

_gradients = TaskSums()  # (k, dx) of each SharedInput in a running backward


def keeps_all_by_itself() -> bool:
    """Whether autograd itself keeps what is saved, or a checkpoint makes it anew: no hook of another kind packs it."""
    hooks = saved_tensor_hook(False)
    return hooks is None or getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


class SharedInput:
    """One x of the layers that have an A, and its u, for the siblings that will be called on it.

    u must neither be stale nor keep x alive. u's graph can hold x, so in a graph only the siblings' nodes own this object and
    the factor only sees it; and it empties itself when x dies, which inside a checkpoint is long before its nodes do.
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
        self.waiting: set[weakref.ref] = set()  # the siblings' nodes whose backward is to come

    def drawn(self, device: torch.device) -> Tensor:
        """What the dropout mask of all siblings is drawn from (int64, one element)."""
        if self.seed is None:
            self.seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
        return self.seed

    def serves(self, A: Tensor, key: tuple, region: object | None, user: object) -> bool:
        """Whether user, called on this x, may take u, or the seed that is there before it."""
        if (self.u is None and self.seed is None) or self.key != key or id(user) in self.users:
            return False
        if self.A[0] is not A or not same_storage(self.A[1], A.untyped_storage()):
            return False
        return self.region is None if region is None else self.region is not None and self.region() is region

    # ---- backward ----------------------------------------------------------------------------------------------------

    def sum(self, node: weakref.ref, device: torch.device) -> tuple[TaskSum, object | None]:
        """The running backward's sum of (k, dx), for a sibling's node to add to, None in it when new; and LoTRShrink's node if
        this sibling is the last.

        No more siblings from now on, for an optimizer may follow, which a fused one does without a trace.
        """
        self.u = self.route = self.seed = None
        if not keeps_graph():
            self.waiting.discard(node)
        last = None if self.waiting or self.node is None else self.node()
        return _gradients.of_task(self, device), last

    def total(self, device: torch.device, k: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The running backward's whole sum, which is forgotten here, with what came by autograd's own way."""
        total = _gradients.sums.get((graph_task(), self))
        if total is None or total.value is None:
            return k, dx
        if device.type == "cuda":
            total.follow_stream(device)
        found, total.value = total.value, None
        if k is None and dx is None:
            return found
        return tuple(b if a is None else a if b is None else a + b for a, b in zip((k, dx), found))

    def keep(self, *saved: Tensor | None) -> None:
        """What LoTRShrink saved, as long as a sibling's backward is still to come: autograd frees it after the first."""
        self.kept = tuple((t, None if t is None else t._version) for t in saved) if self.waiting else None

    def kept_if(self, *wanted: bool) -> list[Tensor | None]:
        """What was kept, as far as it is wanted. Raises in the words of the error that is being handled, or of autograd, where
        it is not as it was."""
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
    """taken: by all optimizers, per thread, so that what a model trained in one shares does not depend on others. A fused
    optimizer changes A without a trace."""

    taken = 0

    def take(self, *_: object) -> None:
        self.taken += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps.take)


class _Newest(threading.local):
    """A factor's newest input, per thread, so that a recomputation decides as its forward did whatever other threads run."""

    input: Callable[[], SharedInput | None] = staticmethod(lambda: None)


class SharedFactor(SharedGradient):
    """What the layers that have one factor share while they run, whatever pairs it is in: its gradient, and where it is the A
    of several layers on one x, the newest x and u. Copies and pickles of it start empty.

    layers: how many were made over the factor; 0 where they were not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = 0
        self._newest = _Newest()

    def __reduce__(self):
        return SharedFactor, ()

    def find(self, x: Tensor, A: Tensor, user: object, how: tuple) -> SharedInput:
        """The SharedInput for user's call on x: a sibling's, in which u or seed is set, or a new one.

        how: what else u depends on, the dropout in force last. With a new one the caller sets u (and route, in a graph),
        or draws the seed, and then calls `offer`.
        """
        # the innermost saved-tensor hook tells a checkpoint's forward, its recomputation and the code around apart: they must
        # save the same tensors, so they must decide alike and never share with each other
        region = (saved_tensor_hook(False) or (None,))[0]
        if how[-1]:
            # a reentrant checkpoint draws its masks again, from its start on; and then a hooked layer's x is one of its own
            if wraps_inputs(user):
                return SharedInput(x, A, None, None)
            if not torch.is_grad_enabled():
                region = running_function() or region
        if not isinstance(region, _REGIONS) or x.is_inference() or A.is_inference():
            return SharedInput(x, A, None, None)
        key = (
            *(x._version, self.address(x), x.shape, x.requires_grad, x.is_leaf),
            *(A._version, A.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            *(_steps.taken, how),
        )
        found = self._newest.input()
        if found is None or found.x() is not x or not found.serves(A, key, region, user):
            found = SharedInput(x, A, key, region)
        found.users.add(id(user))
        return found

    def offer(self, shared_input: SharedInput) -> None:
        """Makes shared_input the newest, if it may be shared. Without a graph u cannot hold x, so the factor may own it."""
        if shared_input.key is not None:
            in_graph = shared_input.route is not None
            self._newest.input = weakref.ref(shared_input) if in_graph else lambda: shared_input


class Group:
    """What the layers of one LoTRFactors share while they run, factor by factor; new if not given."""

    def __init__(self, A: SharedFactor | None = None, B: SharedFactor | None = None) -> None:
        self.A, self.B = A or SharedFactor(), B or SharedFactor()

    def __reduce__(self):
        return Group, (self.A, self.B)

    def join(self) -> None:
        """One more layer has this pair."""
        self.A.layers += 1
        self.B.layers += 1


_REGIONS = (types.FunctionType, BackwardCFunction, types.NoneType)  # what a weak reference can tell apart
