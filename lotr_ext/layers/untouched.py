"""Runs passes over a model and restores its state."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Context for passes over model. Afterwards, also after any exception, everything except the values of its parameters
    is as it was: its buffers, the mode (train or eval) of each module, requires_grad and .grad of each parameter, and the
    states of the global generators of torch (CPU, and the GPUs in use), Python and NumPy. Inside no parameter has a .grad."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))
        for kind in ("cuda", "xpu"):
            api = getattr(torch, kind)
            if api.is_available() and api.is_initialized():
                stack.enter_context(torch.random.fork_rng(devices=range(api.device_count()), device_type=kind))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:  # if first imported inside, its generator is unused
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        _keep_modules(model, stack)
        _keep_parameters(model, stack)
        yield


def _keep_modules(model: nn.Module, stack: ExitStack) -> None:
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    tensors = {id(t): t for _, _, buffers in modules for t in buffers.values() if t is not None and _writable(t)}
    values = [(t, t.detach().clone()) for t in tensors.values()]

    def restore() -> None:
        with torch.inference_mode():  # allows writes to buffers that are inference tensors
            for t, value in values:
                t.copy_(value)
        for module, training, buffers in modules:
            module.training = training
            if list(module._buffers.items()) != list(buffers.items()):
                module._buffers.clear()
                module._buffers.update(buffers)

    stack.callback(restore)


def _writable(t: Tensor) -> bool:
    """Whether an in-place operator could have written t: its elements have distinct memory."""
    return not (t.is_meta or (t.layout == torch.strided and 0 in t.stride() and t.numel() > 1))


def _keep_parameters(model: nn.Module, stack: ExitStack) -> None:
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def restore() -> None:
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad

    stack.callback(restore)
    for p, _, _ in parameters:
        p.grad = None
