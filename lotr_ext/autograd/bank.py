"""The forward scope: the work that one forward of a model does once for all layers of a factor.

It casts A to the compute dtype, and computes F_l = s B G_l^T of all layers that have B in one product. Backward computes dB and
all dG_l in one product of the Q_l [l, n, r_in]:

    B, G_1 .. G_L --> [LoTRShared: F, one per forward] --> nodes of layers 1 .. L, which read F_l
    backward: the node of layer l adds Q_l = g^T u to the sum and returns None for F;
    the flush of this shared gradient is fold_grad: dB = s sum_l Q_l G_l, dG_l = s Q_l^T B.

No folded value outlives its scope, because writes through `.data`, sharded training and swapped parameters do not change
version counters. In the scope a layer uses F_l only if its B, core and scaling are the objects and versions that made F_l.
Otherwise it folds by itself, as outside a scope, in a recomputation, and with sharded or computed cores or
different scalings.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..compat import dispatch_modes, graph_task, private_write, stream_of
from .shared_gradient import LoTRShared, SharedGradient

if TYPE_CHECKING:
    from .sharing import Call, SharedFactor

_PLAIN = (Tensor, nn.Parameter)


class FoldedGradient(SharedGradient):
    """The gradient of F of all layers that have B. Its sum is Q [l, n, r_in]; `flush` computes the gradients of B and all cores
    from it."""

    def __init__(self, scaling: float):
        super().__init__()
        self.scaling = scaling
        # by running backward: the layers that added to the sum, with the cores that they read, under checkpointing those of
        # the recomputation. The cores of other layers get None instead of zeros.
        self.came: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)

    def flush(self, Q: Tensor | None, dF: Tensor | None, B: Tensor, *cores: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of B and the cores. dF is always None: a recorded backward does not use F."""
        came = self.came.pop(graph_task(), {})
        if Q is None:
            return None, *(None for _ in cores)
        dB = torch.zeros(B.shape, dtype=Q.dtype, device=B.device) if B.requires_grad else None
        with torch.no_grad(), private_write():
            read = torch.stack(list(map(came.get, range(len(cores)), cores)))
            dcores = ops.fold_grad(Q, B, read, self.scaling, dB)
        dcores = [d.to(core.dtype) if l in came else None for l, (d, core) in enumerate(zip(dcores, cores))]
        return None if dB is None else dB.to(B.dtype), *dcores


class Cast:
    """A in one dtype, for one forward, and the tensor and version from which it was cast."""

    def __init__(self, A: Tensor, dtype: torch.dtype):
        self.A, self.value, self.version = A, A.detach().to(dtype), 0 if A.is_inference() else A._version

    def of(self, A: Tensor) -> Tensor:
        """The cast, if A is the tensor that was cast, unchanged. Otherwise A itself, which the operators round on reading."""
        return self.value if self.A is A and (A.is_inference() or self.version == A._version) else A


class Bank:
    """F of the layers that have B, for one forward, and the tensors and versions from which it was computed."""

    def __init__(self, B: Tensor):
        self.B, self.F, self.index = B, None, {}

    def fold(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """Computes F of all layers in one product, if their cores have one shape, dtype, device and scaling."""
        # the same tensors as in the layers' calls
        own = [layer._parameters["core"] if "core" in layer._parameters else core_of(layer) for layer in layers]
        found = [(layer, core) for layer, core in zip(layers, own) if core is not None and core.dim() == 2]  # no experts
        if len(found) < 2 or type(self.B) not in _PLAIN:
            return
        layers, cores = zip(*found)
        scaling, one = layers[0].scaling, cores[0]
        for layer, core in zip(layers, cores):
            if type(core) not in _PLAIN or core.device != self.B.device or core.dtype != one.dtype or layer.scaling != scaling:
                return
            if core.shape != one.shape:  # B may be paired with several A of different ranks
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
        """The index l of the F_l that a call can use; None if F was made from another B, core or scaling."""
        l = self.index.get(call.owner)
        if l is None or self.cores[l] is not call.core or self.B is not B or self.scaling != call.scaling:
            return None
        if self.marked and (self.versions[l] != call.core._version or self.B_version != B._version):
            return None
        return l


def core_form_of(layer: nn.Module) -> nn.Module | None:
    """The module that computes a layer's core: a child, or a plain attribute if parallelize_module must not see it."""
    return layer._modules.get("core_form") or layer.__dict__.get("core_form")


def core_of(layer: nn.Module) -> Tensor | None:
    """The core of a layer, if it is one tensor for the whole forward; None if each call computes it."""
    if "core" in layer._parameters:
        return layer._parameters["core"]
    shared = getattr(core_form_of(layer), "_lotr_shared", None)  # of a CoreAt
    return None if shared is None else shared()


class Scope:
    """One forward of a model. layers: the layers by their B. frame: of the function that runs the forward. cached: if the
    forward has a cache, the tokens per row in the cache and in the forward; read only for `mixed`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[SharedFactor, Sequence[nn.Module]],
        frame: FrameType,
        cached: tuple[int | Tensor, int] | None = None,
    ):
        self.model, self.layers, self.frame, self.cached = weakref.ref(model), layers, frame, cached
        self.banks: dict[tuple, Bank] = {}
        self.casts: dict[tuple, Cast] = {}
        self.cores: dict[tuple, Made] = {}
        self.replicas: dict[tuple, Any] = {}  # `tensor_parallel.Replicas`, by process groups and grad mode

    def bank(self, B_shared: SharedFactor, B: Tensor, dtype: torch.dtype) -> Bank | None:
        """B's bank in dtype, created at the first call. One for each grad mode, since an F without a graph cannot be used in
        one, and for each CUDA stream."""
        stream = B.is_cuda and stream_of(B)
        key = (B_shared, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), stream)
        found = self.banks.get(key)
        if found is None and B_shared in self.layers:
            found = self.banks[key] = Bank(B)
            found.fold(self.layers[B_shared], dtype)
        return found

    def cast(self, A_shared: SharedFactor, A: Tensor, dtype: torch.dtype) -> Tensor:
        """A in dtype, cast at the first call in each grad mode and on each CUDA stream."""
        if type(A) not in _PLAIN:
            return A
        stream = A.is_cuda and stream_of(A)
        key = (A_shared, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), stream)
        found = self.casts.get(key)
        if found is None:
            found = self.casts[key] = Cast(A, dtype)
        return found.of(A)

    def made(self, cores: nn.Module, make: Callable[[nn.Module], Tensor]) -> tuple[Tensor, ...] | None:
        """All cores [r_in, r_out] that a module makes, made at the first call in each grad mode and on each CUDA stream, and
        again if its tensors have changed. None if it draws random numbers: a recomputation computes the cores one by one and
        must draw the same."""
        tensors = tensors_of(cores)
        streams = {stream_of(t) for t in tensors if t.is_cuda}
        key = (cores, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *streams)
        found = self.cores.get(key)
        if found is None or not found.is_of(cores, tensors):
            found = self.cores[key] = Made(cores, tensors, make)
        return found.values


class Made:
    """All cores from a module, and the tensors and versions that made them. values is None if the module drew
    random numbers; the generators are then reset to their state before the call."""

    def __init__(self, cores: nn.Module, tensors: list[Tensor], make: Callable[[nn.Module], Tensor]):
        self.training, self.tensors = cores.training, tensors
        self.versions = versions_of(self.tensors)
        generators = _generators(self.tensors)
        before = [generator.get_state() for generator in generators or ()]
        made = None if generators is None else make(cores)
        for generator, state in zip(generators or (), before, strict=True):
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
                made = None
        self.values = None if made is None else made.unbind()

    def is_of(self, cores: nn.Module, now: list[Tensor]) -> bool:
        """Whether the module's tensors and mode are now those that made the cores."""
        same = len(now) == len(self.tensors) and all(t is own for t, own in zip(now, self.tensors))
        return same and cores.training == self.training and versions_of(now) == self.versions


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The module's parameters and buffers."""
    return [t for m in module.modules() for own in (m._parameters, m._buffers) for t in own.values() if t is not None]


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _generators(tensors: Sequence[Tensor]) -> list[torch.Generator] | None:
    """The global generators that a module with these tensors can use. None while a CUDA graph is captured, because their
    state cannot be read then."""
    indices = {t.device.index for t in tensors if t.is_cuda}
    if indices and torch.cuda.is_current_stream_capturing():
        return None
    return [torch.default_generator, *(torch.cuda.default_generators[i] for i in sorted(indices))]


class _Open(threading.local):
    """The open scopes of a thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []


_open = _Open()


def open_scope() -> Scope | None:
    """The innermost open scope. None under a dispatch mode: selective checkpointing recomputes a region's operators outside
    the scope, and must run the same ones."""
    stack = _open.stack
    while stack:
        try:
            stack[-1].frame.clear()
        except RuntimeError:  # it runs
            return None if dispatch_modes() else stack[-1]
        stack.pop()  # not closed by a hook: torch calls none after a KeyboardInterrupt or another BaseException
    return None
