"""Cores and factors that torch.nn.utils.parametrize computes: what is behind them, and their values from it and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

__all__ = ["parameters_of", "state_for", "state_of", "value_with"]


def _prefix(name: str) -> str:
    return f"parametrizations.{name}."


def parameters_of(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """module.<name> where it is a parameter; the parameters that a parametrization makes it of, where it is computed."""
    if parametrize.is_parametrized(module, name):
        yield from module.parametrizations[name].parameters()
    elif module._parameters.get(name) is not None:
        yield module._parameters[name]


def state_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """What module.<name> is computed from, the very tensors, by their keys in module's state_dict; empty for a parameter."""
    if not parametrize.is_parametrized(module, name):
        return {}
    return {_prefix(name) + key: t for key, t in module.parametrizations[name].state_dict(keep_vars=True).items()}


@torch.no_grad()
def value_with(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """What the parametrized module.<name> would be with these tensors, as `state_of` names them. Changes nothing."""
    made = {
        key.removeprefix(_prefix(name)): state[key].detach().to(t.device, t.dtype, copy=True)
        for key, t in state_of(module, name).items()
    }
    return functional_call(module.parametrizations[name], made, ())


@torch.no_grad()
def state_for(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors, as `state_of` names them, that make module.<name> this value. Changes nothing.

    Raises:
        ValueError: the parametrization has no right_inverse, or that refuses the value.
    """
    made = copy.deepcopy(module.parametrizations[name])
    like = getattr(module, name)
    try:
        made.right_inverse(value.to(like.device, like.dtype))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        kinds = ", ".join(type(one).__name__ for one in made)
        raise ValueError(f"{name}: expected a parametrization that can be set to a value, got {kinds} ({error})") from None
    return {_prefix(name) + key: t for key, t in made.state_dict().items()}
