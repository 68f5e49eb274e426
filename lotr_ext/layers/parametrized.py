"""Cores and factors that torch.nn.utils.parametrize computes: the parameters behind them, by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["parameters_of"]


def parameters_of(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """module.<name> where it is a parameter; the parameters that a parametrization makes it of, where it is computed."""
    if parametrize.is_parametrized(module, name):
        yield from module.parametrizations[name].parameters()
    elif module._parameters.get(name) is not None:
        yield module._parameters[name]
