"""The shared gradient: one sum for what many layers use, one gradient for autograd to see.

    A --> [LoTRShared: identity, one a forward] --> layer 1 .. layer L
    backward: layer L .. layer 1 add into one sum (float32; float64 for float64) and return None for A;
    autograd runs LoTRShared's backward once all its users have run; it returns what `flush` makes of the sum.

So autograd, hooks, DDP's buckets and optimizers see one ordinary gradient per backward, and a backward makes one temporary of
A's size, however many layers there are. A layer whose factors no other layer has does without. For a factor flush is a cast;
the folded factors of a whole group have another one (`bank.py`).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..compat import at_end_of_backward, graph_task
from ..ops import accumulate_dtype


class TaskSum:
    """What a backward has summed up on a device so far, and the CUDA stream that wrote it last."""

    __slots__ = ("__weakref__", "stream", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.stream: torch.cuda.Stream | None = None

    def keep(self) -> None:
        """Queued with the engine, which so holds the only strong reference: until the backward ends or fails."""

    def follow_stream(self, device: torch.device) -> None:
        """Orders this use after the last one: autograd's own stream synchronisation does not see these writes."""
        stream = torch.cuda.current_stream(device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
            for t in self.value if isinstance(self.value, tuple) else (self.value,):
                if t is not None:
                    t.record_stream(stream)
        self.stream = stream


class SharedGradient:
    """The gradient of one tensor, summed over all that use it.

    Sums are keyed by the id of the running backward and by device, so that nested (reentrant checkpointing), partial, failed
    and concurrent backwards never meet, and each device's autograd thread adds to a sum of its own.
    """

    def __init__(self) -> None:
        self._sums: weakref.WeakValueDictionary[tuple[int, torch.device], TaskSum] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self.renew()

    def renew(self) -> None:
        """The next use starts a new node."""
        self._view: weakref.ref[Tensor] | None = None
        self._param: Tensor | None = None
        self._data = 0
        self._users: set[int] = set()

    def view(self, param: Tensor, user: object) -> Tensor:
        """param as user takes it: behind the node if it gets a gradient.

        All users of a round share one node. A user that comes again begins a new forward and a new round: an older node would
        flush after the last reduction of a sharded forward. Only graphs keep a node alive, so nothing of it outlives them.
        """
        if not (param.requires_grad and torch.is_grad_enabled()):
            return param
        self.join(param, user)
        view = None if self._view is None else self._view()
        if view is None:
            view = LoTRShared.apply(self, None, param)
            self._view = weakref.ref(view)
        return view

    def join(self, param: Tensor, user: object) -> None:
        """Records that user takes param, by itself or through a sibling's u."""
        if self._param is not param or id(user) in self._users or self._data != param.data_ptr():
            # param itself is held strongly, for torch.utils.swap_tensors refuses tensors with weak references
            self._view, self._param, self._data, self._users = None, param, param.data_ptr(), {id(user)}
        else:
            self._users.add(id(user))

    def of_task(self, device: torch.device) -> TaskSum:
        """The running backward's sum on device; a new one is None."""
        key = (graph_task(), device)
        with self._lock:
            total = self._sums.get(key)
            if total is None:
                total = self._sums[key] = TaskSum()
                at_end_of_backward(total.keep)
        if device.type == "cuda":
            total.follow_stream(device)
        return total

    def accumulator(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The running backward's sum on device as a tensor, zero when new: to be added to in place at once."""
        total = self.of_task(device)
        if total.value is None:
            total.value = torch.zeros(shape, dtype=dtype, device=device)
        return total.value

    def take(self, device: torch.device) -> Tensor | None:
        """The running backward's whole sum on device, which is forgotten here; None if nothing was added to it."""
        task, parts = graph_task(), []
        with self._lock:
            for key in sorted((key for key in self._sums if key[0] == task), key=lambda key: str(key[1])):
                part = self._sums.pop(key, None)
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
        """The gradient of param, of the sum and of what came by autograd's own way (in a recorded backward)."""
        self.renew()
        if total is not None:
            total = total.to(param.dtype)
            grad = total if grad is None else grad + total
        return (grad,)

    def pending(self) -> int:
        """How many sums are alive: 0 whenever no backward is running."""
        return len(self._sums)


class LoTRShared(Function):
    """The node of a shared gradient: value, or params' only one, stands for params in the graph.

    backward: `SharedGradient.flush` of the sum.
    """

    @staticmethod
    def forward(ctx, shared: SharedGradient, value: Tensor | None, *params: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        # not save_for_backward: a checkpoint around the first user would miss them in its recomputation; a change of params is
        # noticed all the same, since each user saves what it reads
        ctx.shared, ctx.params = shared, params
        return (
            params[0] if value is None else value
        ).detach()  # shares the version counter, yet is no view, whose graph an optimizer step would void

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        total = ctx.shared.take(ctx.params[0].device)
        return None, None, *ctx.shared.flush(total, grad, *ctx.params)


def shared_sum(shared: SharedGradient | None, like: Tensor) -> Tensor | None:
    """Where to add the gradient of a factor like this; None where it goes back to autograd: without a shared gradient, or
    outside of a backward."""
    if shared is None or graph_task() < 0:
        return None
    return shared.accumulator(like.shape, accumulate_dtype(like.dtype), like.device)
