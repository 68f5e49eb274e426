"""The shared gradient: one accumulator for a factor that many layers use, one gradient for autograd to see.

    A --> [hub: identity, one a forward] --> layer 1 .. layer L
    backward: layer L .. layer 1 add into one accumulator (float32; float64 for float64) and return None for A;
    autograd runs the hub's backward once all its users have run; it returns the sum, cast once.

So autograd, hooks, DDP's buckets and optimizers see one ordinary gradient per backward, and a backward makes one temporary of
A's size, however many layers there are. A layer whose factors no other layer has does without.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor
from torch.autograd import Function, Variable


class _Sum:
    """An accumulator, and the CUDA stream that wrote it last."""

    __slots__ = ("__weakref__", "stream", "value")

    def __init__(self, value: Tensor):
        self.value, self.stream = value, None

    def keep(self) -> None:
        """Queued with the engine, which so holds the only strong reference: until the backward ends or fails."""

    def follow_stream(self) -> None:
        """Orders this use after the last one: autograd's own stream synchronisation does not see these writes."""
        if self.value.is_cuda:
            stream = torch.cuda.current_stream(self.value.device)
            if self.stream is not None and self.stream != stream:
                stream.wait_stream(self.stream)
                self.value.record_stream(stream)
            self.stream = stream


class SharedGradient:
    """The gradient of one factor, summed over all its layers.

    Sums are keyed by the id of the running backward and by device, so that nested (reentrant checkpointing), partial, failed
    and concurrent backwards never meet, and each device's autograd thread adds to a sum of its own.
    """

    def __init__(self) -> None:
        self._sums: weakref.WeakValueDictionary[tuple[int, torch.device], _Sum] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self.renew()

    def renew(self) -> None:
        """The next use starts a new hub."""
        self._hub: weakref.ref[Tensor] | None = None
        self._param: Tensor | None = None
        self._data = 0
        self._users: set[int] = set()

    def view(self, param: Tensor, user: int) -> tuple[Tensor, SharedGradient | None]:
        """param for a layer, and where its gradient goes: with self, param hangs on the hub and the sum is here; with None,
        param is itself and the gradient goes back to autograd.

        All users of a round share one hub. A user that comes again begins a new forward and a new round: an older hub would
        flush after the last reduction of a sharded forward. Only graphs keep a hub alive, so nothing of it outlives them.
        """
        if not self.join(param, user):
            return param, None
        view = None if self._hub is None else self._hub()
        if view is None:
            view = _Hub.apply(param, self)
            self._hub = weakref.ref(view)
        return view, self

    def join(self, param: Tensor, user: int) -> bool:
        """Records that a layer uses param, by itself or through a sibling's u; whether param gets a gradient."""
        if not (param.requires_grad and torch.is_grad_enabled()):
            return False
        if self._param is not param or user in self._users or self._data != param.data_ptr():
            # param itself is held strongly, for torch.utils.swap_tensors refuses tensors with weak references
            self._hub, self._param, self._data, self._users = None, param, param.data_ptr(), {user}
        else:
            self._users.add(user)
        return True

    def accumulator(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The running backward's sum on device, zero when new: to be added to in place at once."""
        key = (torch._C._current_graph_task_id(), device)
        with self._lock:
            total = self._sums.get(key)
            if total is None:
                total = _Sum(torch.zeros(shape, dtype=dtype, device=device))
                self._sums[key] = total
                Variable._execution_engine.queue_callback(total.keep)
        total.follow_stream()
        return total.value

    def take(self, device: torch.device) -> Tensor | None:
        """The running backward's whole sum on device, which is forgotten here; None if no layer added to it."""
        task, parts = torch._C._current_graph_task_id(), []
        with self._lock:
            for key in sorted((key for key in self._sums if key[0] == task), key=lambda key: str(key[1])):
                if (part := self._sums.pop(key, None)) is not None:
                    part.follow_stream()
                    parts.append(part.value)
        if not parts:
            return None
        total = parts[0].to(device)
        for part in parts[1:]:
            total = total + part.to(device)
        return total

    def pending(self) -> int:
        """How many sums are alive: 0 whenever no backward is running."""
        return len(self._sums)


class _Hub(Function):
    @staticmethod
    def forward(ctx, param: Tensor, shared: SharedGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.dtype, ctx.device = shared, param.dtype, param.device
        return param.detach()  # shares the version counter, yet is no view, whose graph an optimizer step would void

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        ctx.shared.renew()
        total = ctx.shared.take(ctx.device)
        if total is not None:
            total = total.to(ctx.dtype)
            grad = total if grad is None else grad + total
        return grad, None
