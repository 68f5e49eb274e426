"""The rivals: one frozen linear layer with each method of adaptation, all built from the same tensors.

A rival is made by `RIVALS[name](tensors, case)`: a callable x -> y and its trained parameters. `truth.check` compares it with
its formula in float64 before it is timed. Those that come from other packages are in `library.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.graph import increment_version

from ..measure.names import chosen, named
from ..measure.shapes import Case
from . import library
from .base import SCALING, Rival, Tensors, frozen_linear, lora_forward, lora_rival, parameter

Make = Callable[[Tensors, Case], Rival]


def _frozen(t: Tensors, case: Case) -> Rival:
    return Rival("frozen", lambda x: F.linear(x, t.weight, t.bias), {})


def _lotr_eager(t: Tensors, case: Case) -> Rival:
    """As the original implementation computes it."""
    A, B, core = parameter(t.A), parameter(t.B), parameter(t.core)
    return Rival(
        named("lotr-eager"),
        lambda x: F.linear(x, t.weight, t.bias) + SCALING * (((x @ A) @ core) @ B.T),
        {"A": (A, False), "B": (B, False), "core": (core, False)},
    )


def _lora_eager(t: Tensors, case: Case) -> Rival:
    """Two linear layers, a scaling and a sum in torch operations."""
    return lora_rival(named(LORA_EAGER), t, lambda A, B: lora_forward(t, A, B))


class InPlaceLoRA(torch.autograd.Function):
    """LoRA from library products alone, as few passes as they allow. A [r, k], B [n, r]."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, expand_first):
        u = F.linear(x, A)
        if expand_first:  # the base product accumulates onto the adapter's output (beta = 1)
            y = (u * SCALING) @ B.T if bias is None else torch.addmm(bias, u, B.T, alpha=SCALING)
            y.addmm_(x, weight.T)
        else:
            y = F.linear(x, weight, bias)
            y.addmm_(u, B.T, alpha=SCALING)
        ctx.save_for_backward(x, weight, A, B, u)
        ctx.expand_first = expand_first
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, A, B, u = ctx.saved_tensors
        k = (g @ B).mul_(SCALING)
        if ctx.expand_first:
            dx = k @ A
            dx.addmm_(g, weight)
        else:
            dx = g @ weight
            dx.addmm_(k, A)
        return dx, None, None, k.T @ x, (g.T @ u).mul_(SCALING), None


def _lora_in_place(rival: str, expand_first: bool) -> Make:
    def make(t: Tensors, case: Case) -> Rival:
        forward = InPlaceLoRA.apply
        return lora_rival(named(rival), t, lambda A, B: lambda x: forward(x, t.weight, t.bias, A, B, expand_first))

    return make


def _ours(strategy: str | None, magnitude: bool = False) -> Make:
    def make(t: Tensors, case: Case) -> Rival:
        from lotr_ext import LoTRFactors, LoTRLinear

        factors = LoTRFactors(case.k, case.n, case.r, dtype=t.A.dtype, device=t.A.device)
        layer = LoTRLinear.from_linear(frozen_linear(t), factors, scaling=SCALING, magnitude=magnitude)
        layer.strategy = strategy
        parameters = {"core": layer.core, **{name: dict(factors.named_parameters())[name] for name in ("A", "B")}}
        for name, value in parameters.items():
            value.data = getattr(t, name).clone()
        name = f"{named(OURS)} {strategy}" if strategy else named(OURS)
        if magnitude:
            # as after an optimizer's step: each call computes W A and the norms
            layer.register_forward_pre_hook(lambda *_: increment_version(factors.A))
            parameters["magnitude"], name = layer.magnitude, named(MAGNITUDE)
        return Rival(name, layer, {n: (p, False) for n, p in parameters.items()})

    return make


def _compiled(make: Make) -> Make:
    """Compiled by torch.compile for this shape."""

    def compiled(t: Tensors, case: Case) -> Rival:
        rival = make(t, case)
        torch._dynamo.reset()  # else the compiler generalises over the cases before
        rival.name, rival.layer = f"{rival.name} compiled", torch.compile(rival.layer, dynamic=False)
        return rival

    return compiled


FLOOR, LORA_EAGER, OURS, MAGNITUDE = "frozen", "lora-eager", "lotr_ext", "lotr_ext-magnitude"
RIVALS: dict[str, Make] = {
    FLOOR: _frozen,
    "frozen-autotuned": library.frozen_autotuned,
    "lotr-eager": _lotr_eager,
    LORA_EAGER: _lora_eager,
    "lora-in-place": _lora_in_place("lora-in-place", False),
    "lora-in-place-beta": _lora_in_place("lora-in-place-beta", True),
    "lora-compiled": library.lora_compiled,
    "lora-autotuned": library.lora_autotuned,
    "lora-peft": library.lora_peft,
    "dora-peft": library.dora_peft,
    "vera-peft": library.vera_peft,
    "lora-unsloth": library.lora_unsloth,
    "lora-lorafusion": library.lora_lorafusion,
    OURS: _ours(None),
    MAGNITUDE: _ours(None, magnitude=True),
    "lotr_ext-two_pass": _ours("two_pass"),
    "lotr_ext-beta": _ours("beta"),
    "lotr_ext-fused": _ours("fused"),
    "lotr_ext-composite": _ours("composite"),
    "lotr_ext-compiled": _compiled(_ours(None)),
    "lotr_ext-two_pass-compiled": _compiled(_ours("two_pass")),
    "lotr_ext-composite-compiled": _compiled(_ours("composite")),
}
# LoRA from library products, without a special kernel.
LIBRARY_ONLY = (LORA_EAGER, "lora-in-place", "lora-in-place-beta", "lora-peft", "lora-compiled")
MAGNITUDES = ("dora-peft", MAGNITUDE)
# At the targets only, see bench.layer: compiling takes seconds, three need a GPU.
EXTRA = ("lora-compiled", "lora-unsloth", "lora-lorafusion", "lotr_ext-fused", *MAGNITUDES)
AUTOTUNED = ("frozen-autotuned", "lora-autotuned")  # on request: a search of most of a minute a case
COMPILED = ("lotr_ext-compiled", "lotr_ext-two_pass-compiled", "lotr_ext-composite-compiled")  # on request as well
DEFAULT = [name for name in RIVALS if name not in (*EXTRA, *AUTOTUNED, *COMPILED)]


def available(names: list[str]) -> list[str]:
    """The checked names. Raises ValueError for an unknown rival or one whose package is not installed."""
    chosen("rivals", ",".join(names), RIVALS)
    library.require("rivals", names)
    return names


def installed(names: list[str]) -> tuple[list[str], list[str]]:
    """(the names whose packages are installed, a line about each of the others)."""
    there = [name for name in names if library.missing_package(name) is None]
    return there, [f"{n}: left out, the package {library.missing_package(n)} is not installed" for n in names if n not in there]
