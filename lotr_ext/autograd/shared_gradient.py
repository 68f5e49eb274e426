"""The shared gradient: many layers add into one sum, and autograd gets one gradient.

    A --> [LoTRShared: identity, one per forward] --> layer 1 .. layer L
    backward: layer L .. layer 1 add into one sum (float32; float64 for float64) and return None for A;
    autograd runs LoTRShared's backward once all its users have run; it returns `flush` of the sum.

So autograd, hooks, DDP's buckets and optimizers see one ordinary gradient per backward, and a backward needs one temporary of
A's size for any number of layers. Layers that share their factors with no other layer do not use it. For a factor, flush is
a cast; for the folded factors of a group it is `fold_grad` (`bank.py`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled

from ..compat import Node, at_end_of_backward, graph_task
from ..ops import accumulate_dtype


def _nothing() -> None:
    """A weak reference to nothing."""


class TaskSum:
    """The sum of one running backward, and the last CUDA stream that wrote it. key: the backward's id, and the summed object;
    cuda: whether it is on a GPU."""

    key: tuple[int, Any]
    cuda: bool
    value: Any = None
    stream: torch.cuda.Stream | None = None

    def follow_stream(self, device: torch.device) -> None:
        """Orders this use after the last one: autograd's own stream synchronisation does not see these writes."""
        stream = torch.cuda.current_stream(device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
            for t in self.value if isinstance(self.value, tuple) else (self.value,):
                if t is not None:
                    t.record_stream(stream)
        self.stream = stream


class TaskSums:
    """Sums by the id of the running backward and by summed object, so that nested (reentrant checkpointing), partial, failed
    and concurrent backwards have separate sums."""

    def __init__(self) -> None:
        self.sums: weakref.WeakValueDictionary[tuple[int, Any], TaskSum] = weakref.WeakValueDictionary()
        # the sum that was looked up last, since the next look-up is often the same: the lock and the dictionary would cost 2
        # us per layer and step (bench.host, one token)
        self._last: Callable[[], TaskSum | None] = _nothing
        self._lock = threading.Lock()

    def of_task(self, of: Any, device: torch.device) -> TaskSum | None:
        """The running backward's sum; its value is None when new. None outside a backward. device: of the sum."""
        key, total = (graph_task(), of), self._last()
        if total is None or total.key != key:
            if key[0] < 0:
                return None
            with self._lock:
                total = self.sums.get(key)
                if total is None:
                    total = self.sums[key] = TaskSum()
                    total.key, total.cuda = key, device.type == "cuda"
                    # The callback does nothing. Through it the engine holds the only strong reference to the sum, until the
                    # backward ends or fails.
                    at_end_of_backward(partial(id, total))
                self._last = weakref.ref(total)
        if total.cuda:
            total.follow_stream(device)
        return total

    def pending(self) -> int:
        """How many sums are alive: 0 if no backward is running."""
        return len(self.sums)


class _Round(NamedTuple):
    """The users of one node, by id, and its output. param is a strong reference, because torch.utils.swap_tensors refuses
    tensors with weak references; address: of its memory."""

    param: Tensor | None
    address: int
    users: set[int]
    view: Callable[[], Tensor | None]


class SharedGradient(TaskSums):
    """The gradient of one tensor, summed over its users: one sum for each device, since each device has an autograd thread."""

    address = staticmethod(Tensor.data_ptr)

    def __init__(self) -> None:
        super().__init__()
        self.renew()

    def renew(self) -> None:
        """The next use starts a new node."""
        self._round = _Round(None, 0, set(), _nothing)

    def view(self, param: Tensor, user: object) -> Tensor:
        """param for a user: the output of a LoTRShared node if it gets a gradient.

        All users of a round share one node. A second call by a user starts a new round, which is a new forward: the older node
        would flush after the last reduction of a sharded forward. Only graphs hold a strong reference to a node.
        """
        if not (param.requires_grad and is_grad_enabled()):
            return param
        # read and replaced as a whole: replicas in other threads (nn.DataParallel) have another param
        now, user_id, address = self._round, id(user), self.address(param)
        if now.param is not param or user_id in now.users or now.address != address:
            now = _Round(param, address, set(), _nothing)
        now.users.add(user_id)
        view = now.view()
        if view is None:
            view = LoTRShared.run(self, None, param)
            self._round = now._replace(view=weakref.ref(view))
        return view

    def accumulator(self, like: Tensor) -> Tensor | None:
        """The running backward's sum on like's device, zero when new, for the caller to add to in place. None outside a
        backward."""
        device = like.device
        total = self.of_task(device, device)
        if total is None:
            return None
        if total.value is None:
            total.value = torch.zeros(like.shape, dtype=accumulate_dtype(like.dtype), device=device)
        return total.value

    def take(self, device: torch.device) -> Tensor | None:
        """Removes and returns the running backward's whole sum, as one tensor on device; None if nothing was added."""
        task, parts = graph_task(), []
        with self._lock:
            self._last = _nothing
            for key in sorted((key for key in self.sums if key[0] == task), key=lambda key: str(key[1])):
                part = self.sums.pop(key, None)
                if part is not None and part.value is not None:
                    if key[1].type == "cuda":
                        part.follow_stream(key[1])
                    parts.append(part.value)
        if not parts:
            return None
        total = parts[0].to(device)
        for part in parts[1:]:
            total = total + part.to(device)
        return total

    def flush(self, total: Tensor | None, grad: Tensor | None, param: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of param: the sum, cast, plus grad, which autograd passes in a recorded backward."""
        self.renew()
        if total is not None:
            total = total.to(param.dtype)
            grad = total if grad is None else grad + total
        return (grad,)


class LoTRShared(Node):
    """The node of a shared gradient: value, or the only one of params, represents params in the graph.

    backward: `SharedGradient.flush` of the sum.
    """

    @staticmethod
    def forward(ctx, shared: SharedGradient, value: Tensor | None, *params: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        # not save_for_backward: a checkpoint around the first user would miss them in its recomputation; a change of params is
        # still detected, because each user saves the tensors that it reads
        ctx.shared, ctx.params = shared, params
        # shares the version counter, but is not a view, whose graph an optimizer step would invalidate
        return (params[0] if value is None else value).detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        total = ctx.shared.take(ctx.params[0].device)
        return None, None, *ctx.shared.flush(total, grad, *ctx.params)
