"""What one call of one adapted layer needs besides its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import planner
from ..ops.composite import to
from .shared_gradient import shared_sum

if TYPE_CHECKING:
    from torch import nn

    from ..ops.planner import Plan
    from .bank import Bank
    from .shared_input import Group


class Call:
    """One record of a call: what its layer brings, and what was decided for it.

    core [r_in, r_out], scaling s; p: the dropout in force; group: None for a layer that shares nothing; owner: what has the
    core and its place in a forward scope; strategy: one of planner.STRATEGIES if it is forced.
    dtype: autocast's, None outside of it; compute: what to compute in; plan: what runs; bank, l: what the forward scope has
    made for it, and its place there.
    """

    __slots__ = ("bank", "compute", "core", "dtype", "group", "l", "owner", "p", "plan", "scaling", "strategy")

    def __init__(
        self,
        core: Tensor,
        scaling: float,
        p: float = 0.0,
        group: Group | None = None,
        owner: nn.Module | None = None,
        strategy: str | None = None,
    ):
        self.core, self.scaling, self.p, self.group, self.owner, self.strategy = core, scaling, p, group, owner, strategy
        self.dtype: torch.dtype | None = None
        self.bank: Bank | None = None
        self.l: int | None = None
        self.compute: torch.dtype
        self.plan: Plan

    @classmethod
    def of_function(cls, x: Tensor, core: Tensor, scaling: float, graph: bool) -> Call:
        """The call of a LoTRFunction that is applied without a layer."""
        call = cls(core, float(scaling))
        call.compute = x.dtype
        call.plan = planner.plan_function(x, core, graph)
        return call

    def with_core(self, core: Tensor, scaling: float) -> Call:
        """The same call with another core, which no bank knows."""
        call = Call(core, scaling, self.p, self.group, self.owner, self.strategy)
        call.dtype, call.compute, call.plan = self.dtype, self.compute, self.plan
        return call

    @property
    def beta(self) -> bool:
        return self.plan.strategy == "beta"

    @property
    def unfolded(self) -> bool:
        return self.plan.unfolded

    @property
    def alone(self) -> bool:
        """Whether no other layer has its factors."""
        return self.group is None or self.group.layers == 1

    def view(self, name: str, factor: Tensor) -> Tensor:
        """factor, the group's "A" or "B", as this layer takes it: behind the shared gradient's node, where there is one."""
        return factor if self.alone else getattr(self.group, name).view(factor, self.owner)

    def sum(self, name: str, factor: Tensor) -> Tensor | None:
        """Where the running backward adds the factor's gradient; None where it goes back to autograd."""
        return None if self.alone else shared_sum(getattr(self.group, name), factor)

    def cast(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The base product's operands as autocast casts them."""
        dtype = self.dtype
        return (
            (x, weight, bias) if dtype is None else (to(x, dtype), to(weight, dtype), None if bias is None else to(bias, dtype))
        )
