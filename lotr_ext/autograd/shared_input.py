"""One u = x A for all layers of a group that are called on the same x, as q, k and v of a block are.

    x, A --> LoTRLead (the first layer: G_q, W_q -> y_q; u, route) --+--> LoTRExpand (route, u, B, G_k, W_k -> y_k)
                                                                     +--> LoTRExpand (route, u, B, G_v, W_v -> y_v)

`route` is x's place in the graph without its data: the siblings' gradients of x meet there, already summed, and LoTRLead's
backward, which autograd runs after theirs, adds its own and k A^T to them and makes one pass over x for dA.

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

from .shared_gradient import SharedGradient


class SharedInput:
    """One x of a group, and its u, for the siblings that will be called on it.

    u must neither be stale nor keep x alive. u's graph can hold x, so in a graph only nodes that come after LoTRLead own this
    object (`owned_by`; LoTRLead itself would be a cycle) and their group only sees it; and it empties itself when x dies, which
    inside a checkpoint is long before its nodes do.
    """

    __slots__ = ("__weakref__", "key", "region", "route", "seed", "spent", "u", "users", "x")

    def __init__(self, x: Tensor, key: tuple | None, region: Callable | None):
        own = weakref.ref(self)

        def forget(_) -> None:
            if (alive := own()) is not None:
                alive.forget()

        self.x, self.key, self.region = weakref.ref(x, forget), key, None if region is None else weakref.ref(region)
        self.users: set[int] = set()
        self.spent = False
        self.forget()

    def forget(self) -> None:
        """Drops u, route and seed: no more siblings."""
        self.u: Tensor | None = None
        self.route: Tensor | None = None
        self.seed: Tensor | None = None

    def drawn(self, device: torch.device) -> Tensor:
        """What the dropout mask of all siblings is drawn from (int64, one element)."""
        if self.seed is None:
            self.seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
        return self.seed

    def spend(self) -> None:
        """Its backward has begun: no more siblings, for an optimizer may follow, and a fused one changes A without a trace."""
        self.spent = True
        self.forget()

    def serves(self, x: Tensor, key: tuple, region: Callable | None, user: int) -> bool:
        """Whether user, called on x, may take u, or the seed that is there before it."""
        if (self.u is None and self.seed is None) or self.x() is not x or self.key != key or self.spent or user in self.users:
            return False
        return self.region is None if region is None else self.region is not None and self.region() is region

    def recalls(self, A: Tensor) -> bool:
        """Whether x and A are still those of a first backward, for a second one through another sibling."""
        x = self.x()
        return self.spent and x is not None and self.key is not None and (x._version, A._version) == self.key[:2]


def owned_by(y: Tensor, shared_input: SharedInput) -> Tensor:
    """y, through a node of its own that owns shared_input until y's graph goes. Not a view: users may write into it."""
    y = torch.ops.aten._unsafe_view.default(y, y.shape)
    y.grad_fn.metadata[SharedInput] = shared_input
    return y


class _Steps(threading.local):
    """taken: by all optimizers, per thread, so that what a model trained in one shares does not depend on others. A fused
    optimizer changes A without a trace."""

    taken = 0

    def take(self, *_: object) -> None:
        self.taken += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps.take)


class _Newest(threading.local):
    """A group's newest input, per thread, so that a recomputation decides as its forward did whatever other threads run."""

    input: Callable[[], SharedInput | None] = staticmethod(lambda: None)


class Group:
    """What the layers of one LoTRFactors share while they run. Copies and pickles of it start empty.

    layers: how many were made over the factors; 0 where nobody counted.
    """

    def __init__(self) -> None:
        self.A, self.B = SharedGradient(), SharedGradient()
        self.layers = 0
        self._newest = _Newest()

    def __reduce__(self):
        return Group, ()

    def find(self, x: Tensor, A: Tensor, user: int, settings: tuple) -> tuple[SharedInput, bool]:
        """The SharedInput for user's call on x, and whether this group may offer a new one to siblings.

        Where one is found u or seed is set; else the caller sets u (and route, in a graph), or draws the seed, and then calls
        `offer`.
        """
        # the innermost saved-tensor hook tells a checkpoint's forward, its recomputation and the code around apart: they must
        # save the same tensors, so they must decide alike and never share with each other
        region = (torch._C._autograd._top_saved_tensors_default_hooks(False) or (None,))[0]
        share = isinstance(region, _HOOKS) and not (x.is_inference() or A.is_inference())
        if not share:
            return SharedInput(x, None, None), False
        key = (
            *(x._version, A._version, x.data_ptr(), x.shape, x.requires_grad, x.is_leaf),
            *(torch.is_grad_enabled(), A.requires_grad),
            A.untyped_storage()._cdata,  # sharded training moves A's memory, not its storage
            *(_steps.taken, settings),
        )
        found = self._newest.input()
        if found is None or not found.serves(x, key, region, user):
            found = SharedInput(x, key, region)
        found.users.add(user)
        return found, True

    def offer(self, shared_input: SharedInput, in_graph: bool) -> None:
        """Makes shared_input the newest. Without a graph u cannot hold x, so the group may own it."""
        self._newest.input = weakref.ref(shared_input) if in_graph else lambda: shared_input


_HOOKS = (types.FunctionType, types.NoneType)  # what a weak reference can tell apart
