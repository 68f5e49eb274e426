"""What is done once for all layers that have a factor while one forward of a model runs.

Within a forward scope A is cast to the compute dtype once, F_l = s B G_l^T of all layers that have B is one product, and in
backward dB and all dG_l are one product of the Q_l [l, n, r_in]:

    B, G_1 .. G_L --> [LoTRShared: F, one a forward] --> nodes of layers 1 .. L, which read F_l
    backward: that of layer l adds Q_l = g^T u to the sum and returns None for F;
    the flush of this shared gradient is fold_grad: dB = s sum_l Q_l G_l, dG_l = s Q_l^T B.

No folded value outlives its scope: writes through `.data`, sharded training and swapped parameters leave no version number to
check. Within it a layer takes F_l only for the very B, core and scaling that it was made of; else it folds for itself, as where
a scope cannot serve (a layer called by itself, a recomputation, sharded or generated cores, different scalings).
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..compat import dispatch_modes, graph_task, private_write
from .shared_gradient import LoTRShared, SharedGradient

if TYPE_CHECKING:
    from .record import Call
    from .shared_input import SharedFactor

_PLAIN = (Tensor, nn.Parameter)


class FoldedGradient(SharedGradient):
    """The gradient of F of all layers that have B: the sum is Q [l, n, r_in], and becomes those of B and of all cores."""

    def __init__(self, scaling: float):
        super().__init__()
        self.scaling = scaling
        # by the running backward the layers that have added to the sum: the cores of others get no gradient, rather than zeros
        self.came: defaultdict[int, set[int]] = defaultdict(set)

    def flush(self, Q: Tensor | None, dF: Tensor | None, B: Tensor, *cores: Tensor) -> tuple[Tensor | None, ...]:
        """dF is None: a recorded backward goes to B and the cores by itself, past F."""
        came = self.came.pop(graph_task(), ())
        if Q is None:
            return None, *(None for _ in cores)
        dB = torch.zeros(B.shape, dtype=Q.dtype, device=B.device) if B.requires_grad else None
        with torch.no_grad(), private_write():
            dcores = ops.fold_grad(Q, B, torch.stack(cores), self.scaling, dB)
        dcores = [d.to(core.dtype) if l in came else None for l, (d, core) in enumerate(zip(dcores, cores))]
        return None if dB is None else dB.to(B.dtype), *dcores


class Cast:
    """A in one dtype, for one forward. It holds what it was made of."""

    def __init__(self, A: Tensor, dtype: torch.dtype):
        self.A, self.value, self.version = A, A.detach().to(dtype), 0 if A.is_inference() else A._version

    def of(self, A: Tensor) -> Tensor:
        """A in this dtype where it is what was cast, else A, which the operators round as they read it."""
        return self.value if self.A is A and (A.is_inference() or self.version == A._version) else A


class Bank:
    """F of the layers that have B, for one forward. It holds what it was made of."""

    def __init__(self, B: Tensor):
        self.B, self.F, self.index = B, None, {}

    def fold(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """Makes F of all layers where there can be one product for them."""
        # as the layers' calls will have them; not a parametrized one, which is made anew for each
        own, forms = [layer._parameters for layer in layers], [layer._modules for layer in layers]
        cores = [
            one["core"] if "core" in one else layer.core if "core_form" in form else None
            for one, form, layer in zip(own, forms, layers)
        ]
        scaling = layers[0].scaling
        one = cores[0]
        if len(layers) < 2 or type(self.B) not in _PLAIN:
            return
        for layer, core in zip(layers, cores):
            if type(core) not in _PLAIN or core.device != self.B.device or core.dtype != one.dtype or layer.scaling != scaling:
                return
            if core.shape != one.shape:  # B may be in pairs with A of other ranks
                return
        with torch.no_grad():
            F = ops.fold(self.B, torch.stack(cores), scaling, dtype)
        self.gradient = FoldedGradient(scaling)
        if torch.is_grad_enabled() and True in [t.requires_grad for t in (self.B, *cores)]:
            F = LoTRShared.run(self.gradient, F, self.B, *cores)
        self.F, self.cores, self.scaling = F, cores, scaling
        self.index = {layer: l for l, layer in enumerate(layers)}
        self.marked = True not in [t.is_inference() for t in (self.B, *cores)]  # inference tensors have no version
        self.versions = [core._version for core in cores] if self.marked else []
        self.B_version = self.B._version if self.marked else 0

    def serves(self, call: Call, B: Tensor) -> int | None:
        """l of the F_l that a call can take; None where what it brings is not what F was made of."""
        l = self.index.get(call.owner)
        if l is None or self.cores[l] is not call.core or self.B is not B or self.scaling != call.scaling:
            return None
        if self.marked and (self.versions[l] != call.core._version or self.B_version != B._version):
            return None
        return l


class Scope:
    """One forward of a model. layers: those that have each B."""

    def __init__(self, model: nn.Module, layers: Mapping[SharedFactor, Sequence[nn.Module]]):
        self.model, self.layers = weakref.ref(model), layers
        self.banks: dict[tuple, Bank] = {}
        self.casts: dict[tuple, Cast] = {}
        self.cores: dict[tuple, tuple[tuple[int, ...], tuple[Tensor, ...]]] = {}

    def bank(self, B_shared: SharedFactor, B: Tensor, dtype: torch.dtype) -> Bank | None:
        """B's bank in dtype, made at the first call; one a mode: what was made without a graph has no place in one."""
        key = (B_shared, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        found = self.banks.get(key)
        if found is None and B_shared in self.layers:
            found = self.banks[key] = Bank(B)
            found.fold(self.layers[B_shared], dtype)
        return found

    def cast(self, A_shared: SharedFactor, A: Tensor, dtype: torch.dtype) -> Tensor:
        """A in dtype, cast at the first call, one a mode."""
        if type(A) not in _PLAIN:
            return A
        key = (A_shared, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        found = self.casts.get(key)
        if found is None:
            found = self.casts[key] = Cast(A, dtype)
        return found.of(A)

    def made(self, cores: nn.Module, make: Callable[[nn.Module], Tensor]) -> tuple[Tensor, ...]:
        """The cores [r_in, r_out] that one module makes of parameters that they share: all at once, one a mode, and again
        where the parameters have changed."""
        key = (cores, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        versions = tuple(0 if t.is_inference() else t._version for t in cores.parameters())
        found = self.cores.get(key)
        if found is None or found[0] != versions:
            found = self.cores[key] = versions, make(cores).unbind()
        return found[1]


class _Open(threading.local):
    """The scopes that are open in a thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []


_open = _Open()


def open_scope() -> Scope | None:
    """The innermost open scope. None under a dispatch mode: selective checkpointing runs a region's operators again
    outside of the scope, and they must be those that ran in it."""
    return None if not _open.stack or dispatch_modes() else _open.stack[-1]
