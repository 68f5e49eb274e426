"""Warnings at an optimizer step that trains an adapted model in a way that cannot be intended.

    watch(model, check)       check runs after each step of any optimizer, until it has an answer

torch calls a hook for the steps of all optimizers of the process. It is registered with the first
model that is watched, so importing lotr_ext changes nothing.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .adapted import layers_in

# Receives a model and the parameters of an optimizer that has made a step, with the gradients that
# it used still in place. Returns the warnings, or None if this step shows nothing yet.
Check = Callable[[nn.Module, set[nn.Parameter]], list[str] | None]

_checks: weakref.WeakKeyDictionary[nn.Module, list[Check]] = weakref.WeakKeyDictionary()
_hook_is_registered = False


def watch(model: nn.Module, check: Check) -> None:
    """Runs a check after the next optimizer steps, until it returns a list of warnings.

    Args:
        model: An adapted model. The check ends with it.
        check: It must not refer to the model.
    """
    global _hook_is_registered
    checks = _checks.setdefault(model, [])
    if check not in checks:
        checks.append(check)
    if not _hook_is_registered:
        # For good: torch iterates over its hooks, so a hook cannot remove itself.
        register_optimizer_step_post_hook(_after_step)
        _hook_is_registered = True


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _checks:
        return
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    # Copies, because a check that has its answer is removed.
    for model, checks in list(_checks.items()):
        for check in list(checks):
            messages = check(model, optimized)
            if messages is None:
                continue
            checks.remove(check)
            for message in messages:
                warnings.warn(f"lotr_ext: {message}", stacklevel=3)
        if not checks:
            del _checks[model]


# ---- checks of every adapted model ---------------------------------------------------------------


def check_optimizer(model: nn.Module, optimized: set[nn.Parameter]) -> list[str] | None:
    """Warns of an optimizer that was made before the adapter, so that it has only frozen weights.

    An optimizer of other trained parameters, such as a head, is right.
    """
    adapter = {p for layer in layers_in(model).values() for p in layer.adapter_parameters()}
    if adapter & optimized:
        return []
    # It may be for another model, or for a head.
    if all(p.requires_grad for p in optimized.intersection(model.parameters())):
        return None
    return [
        "none of the adapter's parameters is in this optimizer, which has parameters that "
        "apply_lotr has frozen. Make the optimizer after apply_lotr: "
        "torch.optim.AdamW(lotr_parameters(model))."
    ]


def check_layers_are_called(model: nn.Module, optimized: set[nn.Parameter]) -> list[str] | None:
    """Warns of layers that no forward has called: their cores have no gradient, others have one."""
    is_called: dict[str, bool] = {}
    for name, layer in layers_in(model).items():
        cores = [p for p in layer.core_parameters() if p.requires_grad and p in optimized]
        # A core has a gradient as soon as a forward and a backward have passed its layer.
        if cores:
            is_called[name] = any(p.grad is not None for p in cores)
    if not any(is_called.values()):
        return None  # an optimizer of other parameters, or a step without a backward
    idle = [name for name, called in is_called.items() if not called]
    if not idle:
        return []
    more = f" and {len(idle) - 1} more layers" if len(idle) > 1 else ""
    return [
        f"{idle[0]}{more} had no part in the first optimizer step: no forward has called them, so "
        f"their adapters have no effect. Leave them out with exclude_modules."
    ]


def check_unmerged(model: nn.Module, optimized: set[nn.Parameter]) -> list[str] | None:
    """Warns of training after `merge`: a merged layer runs without its adapter."""
    merged = {name: layer for name, layer in layers_in(model).items() if layer.merged}
    if not merged:
        return []
    for name, layer in merged.items():
        trained = {p for p in layer.adapter_parameters() if p.requires_grad}
        if trained & optimized:
            return [
                f"the adapter is merged into the weights, so that it gets no gradient, such as in "
                f"{name!r}. Call unmerge(model) before training."
            ]
    return None
