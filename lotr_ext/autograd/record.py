"""What one call of one adapted layer needs besides its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import planner
from ..ops.composite import to

if TYPE_CHECKING:
    from torch import nn

    from ..ops.planner import Plan
    from .shared_input import Group


class Call:
    """One record of a call: what its layer brings, and what was decided for it.

    core [r_in, r_out], scaling s; p: the dropout in force; group: None for a layer that shares nothing; owner: what has the
    core and its place in a forward scope; strategy: one of planner.STRATEGIES if it is forced; shares: whether another layer
    has one of its factors.
    dtype: autocast's, None outside of it; compute: what to compute in; plan: what runs; bank, l: what the forward scope has
    made for it, and its place there; first: weight, bias and B, where LoTRShrink may make y with u by one operator; made: y and
    F where it has, for LoTRExpand; owns_y: whether no other code has a reference to the y that it adds to; made_of: B and core
    with their versions, under a dispatch mode (`functions.versions`); factors: A, B and core as a LoTRFunction was given them;
    apart: whether these are on other devices than x.
    """

    __slots__ = (
        *("apart", "bank", "compute", "core", "dtype", "factors", "first", "group", "l", "made", "made_of", "owner", "owns_y"),
        *("p", "plan", "scaling", "shares", "strategy"),
    )

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
        self.shares = group is not None and (group.A.layers != 1 or group.B.layers != 1)
        self.dtype: torch.dtype | None = None
        self.bank: Any = None  # a Bank, whose module knows this one
        self.l: int | None = None
        self.first: tuple[Tensor, Tensor | None, Tensor] | None = None
        self.made: tuple[Tensor, Tensor] | None = None
        self.owns_y = False
        self.made_of: tuple[Tensor, int, Tensor, int] | None = None
        self.compute: torch.dtype
        self.plan: Plan
        self.factors: tuple[Tensor, Tensor, Tensor]
        self.apart: bool

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
        call.dtype, call.compute, call.plan, call.owns_y = self.dtype, self.compute, self.plan, self.owns_y
        return call

    def cast(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the base product and its gradients are made of, as autocast casts it."""
        dtype = self.dtype
        return tensors if dtype is None else tuple(None if t is None else to(t, dtype) for t in tensors)
