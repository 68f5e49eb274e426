"""A warning at the first optimizer step of an adapted model, if layers have no part in it.

torch calls the hook below for every optimizer of the process.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .adapted import layers_in

__all__ = ["watch"]

# Adapted models that no optimizer has stepped yet.
_waiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch(model: nn.Module) -> None:
    """Warns at the first optimizer step of an adapted model about layers that it does not train."""
    _waiting.add(model)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook on all optimizers. Warns at a model's first step about adapted layers that no forward has called: their cores
    have no gradient, and those of others have one."""
    if torch.compiler.is_compiling() or not _waiting:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_waiting):
        called = {}
        for name, layer in layers_in(model).items():
            if own := [p for p in layer.core_parameters() if p.requires_grad and id(p) in held]:
                called[name] = any(p.grad is not None for p in own)
        if not any(called.values()):
            continue  # an optimizer of something else, or a step without a backward
        _waiting.discard(model)
        if idle := [name for name, was_called in called.items() if not was_called]:
            more = f" and {len(idle) - 1} more layers" if len(idle) > 1 else ""
            warnings.warn(
                f"lotr_ext: {idle[0]}{more} had no part in the first optimizer step: no forward has called them, so their "
                f"adapters have no effect. Leave them out with exclude_modules.",
                stacklevel=3,
            )


register_optimizer_step_post_hook(_after_step)
