"""An adapted layer in torch.compile: one operator for Dynamo, the usual nodes for AOTAutograd, kernels in the graph.

    Dynamo         y = lotr::adapted(x, y or W and bias, A, B, G, ..), which it does not trace into
    AOTAutograd    calls `_adapted`, that operator's only implementation, above autograd, on its tracing tensors;
                   the nodes created here run backward once, by autograd's engine, during tracing
    the graph      layer_forward; layer_backward_

So plain Python decides at compile time what is shared, without cost in a step. The shared state of a trace is stored on the
tracing tensors, which no step uses. A and B have one sum each, in float32, to which the operator of every
layer adds in place: the graph has this in functional form, and the compiler removes the copies.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_exporting
from torch.nn import functional as nnf

from ..compat import constant_while_compiled, jit_tracing, transformed
from ..ops import composite, planner
from ..ops.composite import base_linear, to
from ..ops.library import check_tensors, lotr
from ..ops.planner import Plan
from .sharing import Call, Group, SharedFactor
from .two_nodes import expand, shared_u

PLAN = Plan("composite", "traced by torch.compile", why="torch.compile: lotr::adapted decides what runs as it is traced")
_COMPOSITE = Plan("composite", "exported, or a subclass under torch.compile", why="torch's own products, for any backend")
_PLAIN = (Tensor, torch.nn.Parameter)


def plan(x: Tensor, A: Tensor, weight: Tensor | None) -> Plan:
    """PLAN for a call traced by torch.compile, the composite's for an exported call or one with a tensor subclass."""
    exported = is_exporting() or jit_tracing() is not None
    plain = type(x) in _PLAIN and type(A) in _PLAIN and (weight is None or type(weight) in _PLAIN)
    return PLAN if plain and not exported else _COMPOSITE


class TracedFactor(SharedFactor):
    """A factor in one trace."""

    @staticmethod
    def address(t: Tensor) -> int:
        """0: there is no memory yet."""
        return 0

    @classmethod
    def of(cls, t: Tensor) -> TracedFactor:
        """The TracedFactor of a tracing tensor, created at its first call. Stored on t, so that it ends with the trace."""
        if not hasattr(t, "_lotr_factor"):
            t._lotr_factor = cls()
        return t._lotr_factor


def _plan(x: Tensor, A: Tensor, B: Tensor, core: Tensor, compute: torch.dtype, strategy: str | None) -> Plan:
    tokens = x.numel() // x.shape[-1]
    known = isinstance(tokens, int)  # otherwise symbolic: no guard on the number
    many, forced = not known or tokens >= planner.BETA_TOKENS, (strategy, planner.LOTR_STRATEGY)
    found = planner.plan_of(many, max(core.shape), compute, x.device, *forced)
    if found.strategy == "composite" or type(x) in _PLAIN or transformed():
        return _COMPOSITE
    if known and tokens < planner.FEW_TOKENS and x.device.type == "cpu" and not any(forced):  # the fold takes longer than x A
        return _COMPOSITE
    if compute == torch.float16:  # F, and s u G, could overflow
        return _COMPOSITE
    if not all(t.dtype == compute or (compute == torch.bfloat16 and t.dtype == torch.float32) for t in (A, B, core)):
        return _COMPOSITE
    return found.taking("beta", "traced") if found.strategy == "fused" else found  # it would compute u again for each sibling


def _adapted(x, y, weight, bias, A, B, core, scaling, dtype, p, strategy, decided_by) -> Tensor:
    check_tensors("adapted", (x, y, weight, bias, A, B, core), values=True, apart=True)
    call = Call(core, scaling, p, Group(TracedFactor.of(A), TracedFactor.of(B)), core)
    call.dtype, call.compute = dtype, dtype or x.dtype
    call.plan = _plan(x, A, B, core, call.compute, strategy)
    if call.plan is _COMPOSITE:
        y = base_linear(x, weight, bias, dtype) if y is None else y
        delta = composite.adapter(nnf.dropout(x, p) if p else x, A, B, core, scaling, call.compute)
        return y + to(delta.to(y.device), y.dtype)
    call.first = None if y is not None else (weight, bias, B)
    found = shared_u(x, A, B, call)
    in_graph = is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, x, A, B, core))
    return expand(found, y, (x, weight, bias), B, call, in_graph)


_operators = torch.library.Library("lotr", "FRAGMENT")
_operators.define(
    "adapted(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor core, float scaling, "
    "ScalarType? dtype, float p, str? strategy, str decided_by) -> Tensor"
)
_operators.impl("adapted", _adapted, "CompositeImplicitAutograd")


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for package in ("autograd", "ops"):
        for file in sorted(Path(__file__).parents[1].joinpath(package).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@constant_while_compiled
def decided_by() -> str:
    """What a trace's choices depend on besides arguments: this code, the environment and the driver. As a constant of Dynamo's
    graph it is in the key of AOTAutograd's cache on disk, so that no graph of another version or strategy is used."""
    built = planner.build_info()["cuda"]["built"] and planner.driver_obstacle() is None
    return f"lotr_ext {_code()}, LOTR_STRATEGY={planner.LOTR_STRATEGY}, CUDA kernels: {built}"


def adapted(
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, call: Call
) -> Tensor:
    """The operator that Dynamo records: y + s ((drop(x) A) G) B^T, with y = x W^T + bias if y is None."""
    values = (call.core, call.scaling, call.dtype, call.p, call.strategy, decided_by())
    return lotr.adapted.default(x, y, weight, bias, A, B, *values)
