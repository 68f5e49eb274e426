"""Cores and factors that are computed by torch.nn.utils.parametrize or by a layer's core_form: the tensors that compute them,
the value for given tensors, and the tensors for a given value."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ..autograd.bank import core_form_of
from .cores import CoreAt

__all__ = ["parameters_of", "state_for", "state_of", "value_with"]


class _Maker(NamedTuple):
    """module(*args) computes a part. prefix: of the module's tensors in the state_dict of the layer."""

    prefix: str
    module: nn.Module
    args: tuple[int, ...] = ()


def _maker(module: nn.Module, name: str) -> _Maker | None:
    if parametrize.is_parametrized(module, name):
        return _Maker(f"parametrizations.{name}.", module.parametrizations[name])
    form = core_form_of(module) if name == "core" else None
    if isinstance(form, CoreAt):
        return _Maker("core_form.cores.", form.cores, (form.index,))
    return None if form is None else _Maker("core_form.", form)


def parameters_of(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """module.<name> if it is a parameter, otherwise the parameters that compute it."""
    if (maker := _maker(module, name)) is not None:
        yield from maker.module.parameters()
    elif module._parameters.get(name) is not None:
        yield module._parameters[name]


def state_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors (not copies) that compute module.<name>, by their keys in module's state_dict; empty for a parameter."""
    if (maker := _maker(module, name)) is None:
        return {}
    return {maker.prefix + key: t for key, t in maker.module.state_dict(keep_vars=True).items()}


@torch.no_grad()
def value_with(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """The value of the computed module.<name> for these tensors, named as by `state_of`. Changes nothing."""
    maker = _maker(module, name)
    made = {
        key.removeprefix(maker.prefix): state[key].detach().to(t.device, t.dtype, copy=True)
        for key, t in state_of(module, name).items()
    }
    return functional_call(maker.module, made, maker.args)


@torch.no_grad()
def state_for(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors, named as by `state_of`, for which module.<name> has this value. Changes nothing.

    Raises:
        ValueError: the parametrization has no right_inverse, or it refuses the value.
    """
    maker = _maker(module, name)
    made = copy.deepcopy(maker.module)
    like = getattr(module, name)
    try:
        made.right_inverse(value.to(like.device, like.dtype))
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        kinds = ", ".join(type(one).__name__ for one in (made if isinstance(made, parametrize.ParametrizationList) else [made]))
        raise ValueError(f"{name}: expected a parametrization that can be set to a value, got {kinds} ({error})") from None
    return {maker.prefix + key: t for key, t in made.state_dict().items()}
