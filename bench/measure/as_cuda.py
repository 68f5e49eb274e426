"""Tensors that are CUDA tensors as far as Python can tell, without a GPU: which calls and operators the CUDA path makes.

They are plain tensors on the meta device whose `device` is cuda:0, so operators run their shape functions and autograd runs its
nodes. FakeTensors do not work here: kernels refuse a subclass of Tensor; a fused operator calls its single products under
their dispatch mode; and a torch without CUDA refuses them in autograd if they are on "cuda".
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from lotr_ext.ops import planner

CUDA, META = torch.device("cuda", 0), torch.device("meta")
_DEVICE, _IS_CUDA, _IS_META = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_meta"))


class _AsCuda(TorchFunctionMode):
    """Answers what is asked of a meta tensor's device; what is to be made on or moved to cuda:0 is on meta."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (_DEVICE, _IS_CUDA, _IS_META):
            on_meta = torch._C._dispatch_keys(args[0]).has(torch._C.DispatchKey.Meta)
            if func == _DEVICE:
                return CUDA if on_meta else func(*args)
            return on_meta and func == _IS_CUDA
        if func is torch.Tensor.backward:  # a mode is off in what it calls, and the nodes are to run with it on
            with self:
                y, g = args[0], kwargs["gradient"]
                return _engine_run_backward((y,), (g,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        return func(*map(_on_meta, args), **{name: _on_meta(value) for name, value in kwargs.items()})


def _on_meta(value: object) -> object:
    return META if isinstance(value, torch.device) and value.type == "cuda" else value


@contextlib.contextmanager
def as_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[torch.device]:
    """Meta tensors look like CUDA tensors of a GPU of this capability, on one stream. Yields the device to make them on."""
    answers = {
        "get_device_capability": lambda device=None: capability,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: "the one stream",
    }
    _forget()
    try:
        too_old = None if capability >= (8, 0) else "expected compute capability 8.0 or later, got {}.{}".format(*capability)
        able = mock.patch.object(planner, "cuda_obstacle", lambda index: too_old)  # whatever driver is here
        with able, mock.patch.multiple(torch.cuda, **answers), torch.autograd.set_multithreading_enabled(False):
            with _AsCuda():
                yield META
    finally:
        _forget()


def _forget() -> None:
    """Clears what lotr_ext remembers of devices."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lotr_ext":
            for function in list(vars(module).values()):  # some modules import a name when it is read
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
