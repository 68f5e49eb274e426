"""Warns at an optimizer step that trains an adapted model in a way that cannot be intended.

    watch(model)      checks each optimizer step, until one has trained the adapter or was reported

torch calls a hook after the steps of all optimizers of the process. The hook is registered with the
first model that is watched, so importing lotr_ext changes nothing.
"""

import warnings
import weakref
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .adapted import attached_parameters, layers_in

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch(model: nn.Module) -> None:
    """Checks the next optimizer steps of an adapted model, and warns of a mistake once."""
    _watched.add(model)
    _register_hook()


@cache
def _register_hook() -> None:
    # For good: torch iterates over its hooks, so a hook cannot remove itself.
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # First, because every step of every optimizer of the process pays for this hook.
    if torch.compiler.is_compiling() or not _watched:
        return
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    # A copy, because models are removed in the loop.
    for model in list(_watched):
        mistake = _mistake(model, optimized)
        if mistake is not None or _has_trained(model, optimized):
            _watched.discard(model)
        if mistake is not None:
            warnings.warn(f"lotr_ext: {mistake}", stacklevel=3)


def _mistake(model: nn.Module, optimized: set[nn.Parameter]) -> str | None:
    """Returns what is wrong with a step, None if nothing is.

    There are four mistakes: an optimizer from before `apply_lotr`, a merged adapter, tasks that no
    forward has used, and layers that no forward has called.

    Args:
        model: An adapted model.
        optimized: The parameters of the optimizer. The gradients that it used are still in place.
    """
    layers = layers_in(model)
    adapter = {p for layer in layers.values() for p in layer.adapter_parameters()}
    tasks = {p for p in attached_parameters(model) if p.requires_grad}
    if optimized.isdisjoint(adapter | tasks):
        # It may be for another model, or for a head, whose parameters are not frozen.
        if all(p.requires_grad for p in optimized.intersection(model.parameters())):
            return None
        return (
            "none of the adapter's parameters is in this optimizer, which has parameters that "
            "apply_lotr has frozen. Make the optimizer after apply_lotr: "
            "torch.optim.AdamW(lotr_parameters(model))."
        )
    trained = {p for p in adapter & optimized if p.requires_grad}
    for name, layer in layers.items():
        # The forward of a merged layer reads only its weight.
        if layer.merged and not trained.isdisjoint(layer.adapter_parameters()):
            return (
                f"the adapter is merged into the weights, so it gets no gradient, such as in "
                f"{name!r}. Call unmerge(model) before training."
            )
    with_gradient = {p for p in adapter | tasks if p.grad is not None}
    if not with_gradient:
        return None  # a step without a backward
    optimized_tasks = tasks & optimized
    if optimized_tasks and optimized_tasks.isdisjoint(with_gradient):
        return (
            "the optimizer has the tasks of the bank, but no forward has used them, so only the "
            "model's adapter has a gradient. Call the model inside use_tasks(model, index)."
        )
    cores = {name: trained.intersection(layer.core_parameters()) for name, layer in layers.items()}
    # A core has a gradient if the forward and backward reached its layer. If no core has one, a
    # bank's tasks may have taken the place of all cores.
    called = [name for name in cores if cores[name] & with_gradient]
    idle = [name for name in cores if cores[name] and name not in called]
    if called and idle:
        return (
            f"no forward has called {len(idle)} of {len(called) + len(idle)} adapted layers, such "
            f"as {idle[0]!r}, before an optimizer step, so their adapters have no effect. Leave "
            f"them out with exclude_modules."
        )
    return None


def _has_trained(model: nn.Module, optimized: set[nn.Parameter]) -> bool:
    """Whether a step has trained the adapter.

    Looks for a gradient of the tasks. If no tasks are trained, of the cores, and if no cores are,
    of A and B. Without one, the step was of another optimizer, and the next step is checked, too.
    """
    tasks = {p for p in attached_parameters(model) if p.requires_grad}
    parts = {
        parameter: part
        for layer in layers_in(model).values()
        for part, parameter in layer.parts()
        if parameter.requires_grad
    }
    cores = {parameter for parameter, part in parts.items() if part == "core"}
    return any(p.grad is not None for p in (tasks or cores or parts.keys()) & optimized)
