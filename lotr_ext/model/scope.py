"""The forward scope of an adapted model: what is done once for all layers of a group while one forward runs.

Within it, A is cast to the compute dtype once, F_l = s B G_l^T of all layers of a group is one product, and in backward dB and
all dG_l are one product of the bank of Q_l [l, n, r_in]:

    B, G_1 .. G_L --> [LoTRFold: one token, one a forward] --> nodes of layers 1 .. L (`nodes.py`), which read F_l
    backward: that of layer l adds Q_l = g^T u to the bank and returns None for B, G_l and the token;
    autograd runs LoTRFold's backward once all its users have run: dB = s sum_l Q_l G_l, dG_l = s Q_l^T B.

The scope is opened by a hook before the model's forward and closed by one that always runs after it. No folded value outlives
it: writes through `.data`, sharded training and swapped parameters leave no version number to check. Where a scope cannot
serve (a layer called by itself, a recomputation, sharded cores, different scalings) each layer folds for itself.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .. import ops
from ..autograd.shared_gradient import SharedGradient
from ..layers.placement import check_not_offloaded

if TYPE_CHECKING:
    from ..layers.layer import LoTRLayer

_PLAIN = (Tensor, nn.Parameter)


class Bank:
    """F of all layers of a group in one dtype, for one forward, and their Q in its backward."""

    def __init__(self, B: Tensor, cores: list[Tensor], scaling: float, dtype: torch.dtype):
        self.scaling, self.versions = scaling, [t._version for t in (B, *cores)]
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            self.F = ops.fold(B.detach(), torch.stack([core.detach() for core in cores]), scaling, dtype)
        self.sums = SharedGradient()
        self.token: Tensor | None = None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (B, *cores)):
            self.token = LoTRFold.apply(self, B, *cores)

    def accumulator(self, index: int) -> Tensor:
        """The running backward's Q of layer index [n, r_in], zero when new, to be added to."""
        device = self.F.device
        return self.sums.accumulator(self.F.shape, ops.accumulate_dtype(self.F.dtype), device)[index]


class Slot(NamedTuple):
    """A layer's place in a bank."""

    bank: Bank
    index: int

    @property
    def F(self) -> Tensor:
        return self.bank.F[self.index]


class LoTRFold(Function):
    """The node of a bank: its token has no value, and stands for all F_l in the graph."""

    @staticmethod
    def forward(ctx, bank: Bank, B: Tensor, *cores: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.scaling = bank.sums, bank.scaling
        # not save_for_backward: a checkpoint around the first layer would miss them in its recomputation, which makes no bank;
        # a change before backward is noticed all the same, since each LoTRExpand saves B and its core
        ctx.B, ctx.cores = B, cores
        return B.new_empty(())

    @staticmethod
    def backward(ctx, _):
        B, cores = ctx.B, ctx.cores
        Q = ctx.sums.take(B.device)
        if Q is None:  # no layer added to it: a recorded backward returned the gradients itself
            return None, None, *(None for _ in cores)
        need_B, *need_cores = ctx.needs_input_grad[1:]
        dB = torch.zeros(B.shape, dtype=Q.dtype, device=B.device) if need_B else None
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            dcores = ops.fold_grad(Q, B, torch.stack(cores), ctx.scaling, dB)
        grads = (d.to(core.dtype) if need else None for d, core, need in zip(dcores, cores, need_cores))
        return None, None if dB is None else dB.to(B.dtype), *grads


class Scope:
    """One forward of a model."""

    def __init__(self, model: nn.Module, layers: dict[int, list[LoTRLayer]]):
        self.model, self.layers = weakref.ref(model), layers
        self.banks: dict[tuple[int, torch.dtype], Bank | None] = {}
        self.casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}

    def slot(self, layer: LoTRLayer, B: Tensor, dtype: torch.dtype) -> Slot | None:
        """layer's place in its group's bank in dtype, made at the first call; None where there can be none."""
        members = self.layers.get(id(layer.factors), ())
        index = next((i for i, member in enumerate(members) if member is layer), None)
        if index is None:
            return None
        key = (id(layer.factors), dtype)
        if key not in self.banks:
            self.banks[key] = self._bank(members, B, dtype)
        bank = self.banks[key]
        if bank is None or bank.versions != [t._version for t in (B, *(member.core for member in members))]:
            return None
        if torch.is_grad_enabled() and bank.token is None and (B.requires_grad or layer.core.requires_grad):
            return None  # the bank was made under no_grad
        return Slot(bank, index)

    def cast(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        """A in dtype, cast once a forward."""
        found = self.casts.get((id(A), dtype))
        if found is None or found[0] != A._version:
            found = self.casts[id(A), dtype] = (A._version, A.detach().to(dtype))
        return found[1]

    @staticmethod
    def _bank(members: list[LoTRLayer], B: Tensor, dtype: torch.dtype) -> Bank | None:
        cores, first = [member.core for member in members], members[0]
        alike = all(
            type(core) in _PLAIN
            and core.device == B.device
            and core.dtype == first.core.dtype
            and member.scaling == first.scaling
            for core, member in zip(cores, members)
        )
        return Bank(B, cores, first.scaling, dtype) if alike and type(B) in _PLAIN and len(members) > 1 else None


class _Layers:
    """The adapted layers of a model by group, found at its first forward. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self.by_factors: dict[int, list[LoTRLayer]] | None = None

    def __reduce__(self):
        return _Layers, ()

    def of(self, model: nn.Module) -> dict[int, list[LoTRLayer]]:
        if self.by_factors is None:
            self.by_factors = {}
            for module in model.modules():
                if hasattr(module, "start_core"):  # an adapted layer, whose module imports this one
                    self.by_factors.setdefault(id(module.factors), []).append(module)
        if torch.is_grad_enabled():
            for layers in self.by_factors.values():
                check_not_offloaded(layers[0].factors, layers)
        return self.by_factors


class _Open(threading.local):
    """The scopes that are open in a thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []


_open = _Open()


def current_slot(layer: LoTRLayer, B: Tensor, dtype: torch.dtype) -> Slot | None:
    """layer's slot in the innermost open scope."""
    return _open.stack[-1].slot(layer, B, dtype) if _open.stack else None


def cast_in_scope(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A in dtype, once a forward where a scope is open; else A itself, which the operators round as they read it."""
    if A.dtype == dtype or not _open.stack or type(A) not in _PLAIN:
        return A
    return _open.stack[-1].cast(A, dtype)


def _enter(model: nn.Module, args) -> None:
    if not torch.compiler.is_compiling():
        _leave(model, args, None)  # of a forward that was killed before its last hook
        _open.stack.append(Scope(model, model._lotr_layers.of(model)))


def _leave(model: nn.Module, args, output) -> None:
    if not torch.compiler.is_compiling():
        for i, scope in enumerate(_open.stack):
            if scope.model() is model:
                del _open.stack[i:]
                return


def attach_scope(model: nn.Module) -> None:
    """Opens a scope around each forward of model; again after layers were added or removed, to find them anew."""
    detach_scope(model)
    model._lotr_layers = _Layers()
    model._lotr_hooks = (
        model.register_forward_pre_hook(_enter),
        model.register_forward_hook(_leave, always_call=True),
    )


def detach_scope(model: nn.Module) -> None:
    """Undoes attach_scope."""
    for handle in model.__dict__.pop("_lotr_hooks", ()):
        handle.remove()
    model.__dict__.pop("_lotr_layers", None)
