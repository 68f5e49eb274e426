"""One call of one adapted layer: which nodes run (`decide`), and running them (`call_linear`, `call_wrapped`)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _is_any_autocast_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as nnf

from .. import ops
from ..model.scope import Slot, cast_in_scope, current_slot
from ..ops import planner
from ..ops.planner import Plan
from ..ops.products import adapter_differentiable, base_linear, fold_differentiable, here, rows, to, tokens_of
from . import direction
from .direction import KEEP, Dropout
from .function import apply_one_node, one_pass
from .nodes import Base, apply_add, apply_expand, apply_lead, apply_shrink
from .shared_input import Group, SharedInput, owned_by

if TYPE_CHECKING:
    from .shared_gradient import SharedGradient

_PLAIN = (Tensor, nn.Parameter)
_WEIGHTS = (nn.Parameter, Tensor, type(None))
_CPU = torch.device("cpu")
_UNFORCED = (None, "")
_INTEGERS_AND_COMPLEX = (t for t in vars(torch).values() if isinstance(t, torch.dtype) and not t.is_floating_point)
_NOT_CAST = frozenset((torch.float64, *_INTEGERS_AND_COMPLEX))  # by autocast


class Decision(NamedTuple):
    """nodes: 0 the differentiable composite, 1 LoTRFunction, 2 nodes that siblings share; unfolded: whether the core is
    multiplied with the tokens, being too few to fold it into B; why: for people."""

    nodes: int
    plan: Plan
    why: str
    unfolded: bool = False


class Adapter(NamedTuple):
    """What a layer brings to a call beside x, A and B.

    p: the dropout in force; group: None for a layer by itself; owner: what has the core and the group's factors, and a place
    in a forward scope.
    """

    core: Tensor
    scaling: float
    p: float = 0.0
    group: Group | None = None
    owner: nn.Module | None = None
    strategy: str | None = None

    @property
    def alone(self) -> bool:
        """Whether no other layer has its factors."""
        return self.group is None or self.group.layers == 1

    def hang(self, name: str, factor: Tensor) -> tuple[Tensor, SharedGradient | None]:
        """factor, the group's "A" or "B", as this layer takes it: on the hub, and where its gradient goes; alone, as it is."""
        return (factor, None) if self.alone else getattr(self.group, name).view(factor, self.user)

    @property
    def user(self) -> int:
        """Whom the group takes it for."""
        return id(self.owner)

    def slot(self, B: Tensor, dtype: torch.dtype) -> Slot | None:
        """Its place in the forward scope, if there is one."""
        return None if self.owner is None else current_slot(self.owner, B, dtype)

    def cast(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        """A in dtype, once a scope; A itself outside of one."""
        return A if self.owner is None else cast_in_scope(A, dtype)


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """autocast's dtype for x, None where it does not apply."""
    if not _is_any_autocast_enabled():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype not in _NOT_CAST else None


def decide(
    x: Tensor,
    A: Tensor,
    adapter: Adapter,
    dtype: torch.dtype,
    base_trained: bool,
    weight: Tensor | None,
    device: torch.device | None = None,
) -> Decision:
    """Which nodes a call takes; weight: of a base product of ours, None over a base module of any kind. `explain` prints it, so
    it cannot say anything else than what runs."""
    if is_compiling() or _get_tracing_state() is not None:
        traced = "traced: the compiler sees and fuses the composite's products"
        return Decision(0, Plan("composite", traced), traced)  # before any look at sizes, which would become guards
    tokens = tokens_of(x)
    # where A is frozen, one node would keep x for a double backward
    one = weight is not None and not adapter.p and (A.requires_grad or not x.requires_grad)
    few, alone = tokens < planner.FEW_TOKENS, one and adapter.alone
    if device is None and x.is_cpu:
        device, rank = _CPU, 0  # any rank runs there
    else:
        device, rank = device or x.device, max(adapter.core.shape)
        if few and device.type == "cuda":  # where the unfolded backward is six launches, and the folded one three
            few = not is_grad_enabled()
    many, forced = tokens >= planner.BETA_TOKENS, _UNFORCED
    if adapter.strategy is not None or planner.VARIABLE in planner.ENVIRONMENT:
        forced = planner.forced_strategy(adapter.strategy)
    if _transformed():
        why = "under a functorch transform or forward AD: the composite is differentiable by any of them"
    elif type(x) not in _PLAIN or type(A) not in _PLAIN or type(weight) not in _WEIGHTS:
        names = {"x": x, "A": A, "weight": weight}
        others = (f"{name} is a {type(t).__name__}" for name, t in names.items() if type(t) not in _WEIGHTS)
        why = f"{', '.join(others)}: only plain tensors go to kernels"
    else:
        return _decision(many, few, one, alone, base_trained, rank, A.dtype, dtype, device, *forced)
    return Decision(0, planner.plan_of(many, rank, dtype, device, *forced), why)


@functools.lru_cache(maxsize=1024)  # these few answers come again in every call
def _decision(
    many: bool,
    few: bool,
    one: bool,
    alone: bool,
    trained: bool,
    rank: int,
    A_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    forced: str | None,
    where: str,
) -> Decision:
    chosen = planner.plan_of(many, rank, dtype, device, forced, where)
    if chosen.strategy == "composite":
        return Decision(0, chosen, chosen.reason)
    if A_dtype != dtype and (A_dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16)):
        names = (str(t).removeprefix("torch.") for t in (A_dtype, dtype))
        return Decision(
            0, chosen, "factors in {} beside x in {}: kernels take x's dtype, or float32 beside half".format(*names)
        )
    if trained:
        return Decision(1, chosen, "the base weight or bias is trained: one node returns its gradient too", few)
    if few and one:
        return Decision(1, chosen, "few tokens: the unfolded form as one node costs least", True)
    if alone:
        return Decision(1, chosen, "no other layer has these factors: nothing to share")
    return Decision(2, chosen, "siblings on the same x share one u = x A")


def call_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    adapter: Adapter,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + bias + s ((drop(x) A) G) B^T. dtype: what to compute in, where autocast is not to be asked."""
    if dtype is None and _is_any_autocast_enabled() and (dtype := compute_dtype(x)) is not None:
        with torch.autocast(x.device.type, enabled=False):  # every cast from here on is explicit
            return call_linear(x, weight, bias, A, B, adapter, dtype)
    compute, recorded = dtype or x.dtype, is_grad_enabled()
    trained = recorded and (weight.requires_grad or (bias is not None and bias.requires_grad))
    nodes, chosen, _, unfolded = decide(x, A, adapter, compute, trained, weight)
    core, scaling, p, group = adapter[:4]
    if nodes == 0 or (nodes == 1 and p):
        if dtype is None and x.dtype != weight.dtype:
            raise TypeError(f"x: expected dtype {weight.dtype}, as the weight has, got {x.dtype}")
        dropped = dropped_input(x, A, adapter, compute, dtype is not None)
        y = base_linear(x, weight, bias, dtype)
        return y + adapter_differentiable(dropped, *here(y.device, A, B, core), scaling, y.dtype)
    in_graph = recorded and (x.requires_grad or A.requires_grad or B.requires_grad or core.requires_grad)
    if nodes == 1:
        if not (trained or in_graph):
            return one_pass(x, weight, bias, A, B, core, scaling, dtype, chosen.strategy, unfolded)[0]
        shared_A = shared_B = None
        if not adapter.alone:
            (A, shared_A), (B, shared_B) = group.A.view(A, adapter.user), group.B.view(B, adapter.user)
        settings = (scaling, dtype, shared_A, shared_B, chosen.strategy, unfolded)
        return apply_one_node(x, weight, bias, A, B, core, *settings)
    base, slot = Base(weight, bias, dtype, chosen.strategy), adapter.slot(B, compute)
    found, share = _find(x, A, adapter, compute, dtype is not None)
    if found.u is None and in_graph and (x.requires_grad or A.requires_grad):
        return _lead(x, A, B, adapter, base, slot, found, share)
    new, values = found.u is None, None
    if new:
        (values,) = here(x.device, adapter.cast(A, compute).detach())
    else:
        group.A.join(A, adapter.user)
    if not in_graph:
        F, dropout = None if slot is None else slot.F, _dropout(p, found, x.device) if new else KEEP
        settings = (*here(x.device, B, core), scaling, dtype, chosen.strategy, found.u, F, dropout)
        y, found.u, _ = direction.forward(x, weight, bias, values, *settings)
        if new and share:
            group.offer(found, False)
        return y
    if new:  # neither x nor A is in the graph
        found.u = ops.shrink(rows(to(x, compute)), values, p=p, seed=_dropout(p, found, x.device).seed)
        if share:
            group.offer(found, False)
    hub_B, shared_B, token = _hub_or_token(B, adapter, slot)
    return apply_expand(found.route, found.u, hub_B, core, token, (x,), base, scaling, shared_B, found, slot)


def _lead(x, A, B, adapter: Adapter, base: Base, slot: Slot | None, found: SharedInput, share: bool) -> Tensor:
    """The first layer on x, which leaves u and route to its siblings."""
    core, scaling, p, group = adapter[:4]
    hub_A, shared_A = adapter.hang("A", A)
    hub_B, shared_B, token = _hub_or_token(B, adapter, slot)
    values = adapter.cast(A, x.dtype if base.dtype is None else base.dtype)
    settings = (scaling, _dropout(p, found, x.device), shared_A, shared_B, weakref.ref(found), slot, values)
    y, u, route = apply_lead(x, hub_A, hub_B, core, token, base, *settings)
    if share:
        found.u, found.route = u, route
        y = owned_by(y, found)
        group.offer(found, True)
    return y


def _dropout(p: float, found: SharedInput, device: torch.device) -> Dropout:
    return Dropout(p, found.drawn(device)) if p else KEEP


def dropped_input(x: Tensor, A: Tensor, adapter: Adapter, compute: torch.dtype, autocast: bool) -> Tensor:
    """drop(x) in torch's products, by the mask of all siblings on x where our kernel can draw it from the seed."""
    if not adapter.p:
        return x
    eager = not (is_compiling() or _get_tracing_state() is not None or _transformed()) and type(x) in _PLAIN
    if not eager or planner.obstacle_to_kernels(0, x.dtype, x.device) is not None:
        return nnf.dropout(x, adapter.p)
    found, share = _find(x, A, adapter, compute, autocast)
    keep = ops.dropout_mask(tokens_of(x), x.shape[-1], adapter.p, found.drawn(x.device), torch.float32) > 0
    if share and found.u is None:
        adapter.group.offer(found, False)
    return torch.where(keep.view(x.shape), x * (1 / (1 - adapter.p)), 0)


def _transformed() -> bool:
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def _hub_or_token(B: Tensor, adapter: Adapter, slot: Slot | None) -> tuple[Tensor, SharedGradient | None, Tensor | None]:
    """How a layer hangs on B in the graph: by the group's hub, or by B itself and its bank's token in a forward scope."""
    if slot is not None:
        return B, None, slot.bank.token
    return *adapter.hang("B", B), None


def call_wrapped(x: Tensor, base: Callable[[Tensor], Tensor], A: Tensor, B: Tensor, adapter: Adapter) -> Tensor:
    """base(x) + s ((drop(x) A) G) B^T for a base module of any kind, in the base's own dtype."""
    y, dtype = base(x), compute_dtype(x)
    if dtype is None:
        return _wrapped(x, y, A, B, adapter, None)
    with torch.autocast(x.device.type, enabled=False):
        return _wrapped(x, y, A, B, adapter, dtype)


def _wrapped(x, y, A, B, adapter: Adapter, dtype: torch.dtype | None) -> Tensor:
    compute = dtype or x.dtype
    core, scaling = adapter[:2]
    if decide(x, A, adapter, compute, False, None).nodes == 0:
        dropped = dropped_input(x, A, adapter, compute, dtype is not None)
        return y + to(adapter_differentiable(dropped, *here(x.device, A, B, core), scaling, compute), y.dtype)
    shared_input = shared_shrink(x, A, adapter, compute, dtype is not None)
    slot = adapter.slot(B, compute)
    hub_B, shared_B, token = _hub_or_token(B, adapter, slot)
    return apply_add(y, shared_input.u, hub_B, core, token, scaling, shared_B, shared_input, slot)


def shared_shrink(x: Tensor, A: Tensor, adapter: Adapter, compute: torch.dtype, autocast: bool) -> SharedInput:
    """u and route for a call over a base of any kind: a sibling's where one has been here with this very x, else new."""
    group, user, p = adapter.group, adapter.user, adapter.p
    found, share = _find(x, A, adapter, compute, autocast)
    if found.u is not None:
        group.A.join(A, user)
        return found
    hub, shared = adapter.hang("A", A)
    dropout, in_graph, values = _dropout(p, found, x.device), _in_graph(x, A), adapter.cast(A, compute)
    if in_graph:
        found.u, found.route = apply_shrink(x, hub, compute, dropout, shared, weakref.ref(found), values)
    else:
        found.u = ops.shrink(rows(to(x.detach(), compute)), values.detach().to(x.device), p=p, seed=dropout.seed)
    if share:
        group.offer(found, in_graph)
    return found


def _find(x: Tensor, A: Tensor, adapter: Adapter, compute: torch.dtype, autocast: bool) -> tuple[SharedInput, bool]:
    """What a sibling left for this very x (then u is set), or a new one; and whether it is to be offered to siblings."""
    if adapter.group is None:
        return SharedInput(x, None, None), False
    return adapter.group.find(x, A, adapter.user, (compute, autocast, adapter.p))


def _in_graph(*tensors: Tensor) -> bool:
    if is_grad_enabled():
        for t in tensors:  # any() would make a generator, in each call of each layer
            if t.requires_grad:
                return True
    return False


def delta_weight(A: Tensor, B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """s B G^T A^T [n, k] in float32 (float64 for float64 factors)."""
    wide = ops.accumulate_dtype(A.dtype)
    return fold_differentiable(B, core, scaling, wide) @ to(A, wide).mT
