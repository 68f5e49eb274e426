"""The rivals: one frozen linear layer, adapted in every way one might. Each is built from the same tensors.

A rival is made by `make(name, case, device)`: a callable x -> y, its trained parameters, and the formula of its output in
differentiable float64 torch, which it is checked against before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import DTYPES, Case

SCALING = 2.0
LORA, LOTR = ("A", "B"), ("A", "B", "core")


@dataclass
class Rival:
    """forward(x [m, k]) -> y [m, n]; parameters: the trained tensors by their name in the formula, each with whether it
    is stored transposed (LoRA's modules keep A and B as nn.Linear weights)."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: dict[str, tuple[Tensor, bool]]


@dataclass
class Tensors:
    """What every rival of a case is built from. A [k, r], B [n, r], core [r, r], weight [n, k], bias [n]."""

    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    core: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Tensors:
        g, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

        return cls(
            normal(case.n, case.k, scale=case.k**-0.5),
            normal(case.n, scale=0.1),
            normal(case.k, case.r, scale=case.k**-0.5),
            normal(case.n, case.r, scale=case.r**-0.5),
            normal(case.r, case.r, scale=case.r**-0.5),
        )


def formula(x: Tensor, t: Tensors, names: tuple[str, ...], values: dict[str, Tensor]) -> Tensor:
    """The layer in float64: x W^T + b [+ s x A [G] B^T]."""
    y = F.linear(x, t.weight.double(), t.bias.double())
    if not names:
        return y
    u = x @ values["A"]
    return y + SCALING * ((u @ values["core"] if "core" in names else u) @ values["B"].T)


def _parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.clone().contiguous())


def _frozen(t: Tensors, case: Case) -> Rival:
    return Rival("frozen", lambda x: F.linear(x, t.weight, t.bias), {})


def _lotr_eager(t: Tensors, case: Case) -> Rival:
    """As the original implementation computes it."""
    A, B, core = _parameter(t.A), _parameter(t.B), _parameter(t.core)
    return Rival(
        "LoTR eager",
        lambda x: F.linear(x, t.weight, t.bias) + SCALING * (((x @ A) @ core) @ B.T),
        {"A": (A, False), "B": (B, False), "core": (core, False)},
    )


def _lora_forward(t: Tensors, A: Tensor, B: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, t.weight, t.bias) + SCALING * F.linear(F.linear(x, A), B)


def _lora_eager(t: Tensors, case: Case) -> Rival:
    A, B = _parameter(t.A.T), _parameter(t.B)
    return Rival("LoRA eager", _lora_forward(t, A, B), {"A": (A, True), "B": (B, False)})


def _lora_compiled(t: Tensors, case: Case) -> Rival:
    A, B = _parameter(t.A.T), _parameter(t.B)
    return Rival("LoRA compiled", torch.compile(_lora_forward(t, A, B)), {"A": (A, True), "B": (B, False)})


class _InPlaceLoRA(torch.autograd.Function):
    """LoRA from library products alone, as few passes as they allow. A [r, k], B [n, r]."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, expand_first):
        u = F.linear(x, A)
        if expand_first:  # the base product accumulates onto the adapter's output (beta = 1)
            y = torch.addmm(bias, u, B.T, alpha=SCALING)
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


def _lora_in_place(name: str, expand_first: bool) -> Callable[[Tensors, Case], Rival]:
    def make(t: Tensors, case: Case) -> Rival:
        A, B = _parameter(t.A.T), _parameter(t.B)
        return Rival(
            name,
            lambda x: _InPlaceLoRA.apply(x, t.weight, t.bias, A, B, expand_first),
            {"A": (A, True), "B": (B, False)},
        )

    return make


def _linear(t: Tensors) -> nn.Linear:
    linear = nn.Linear(t.weight.shape[1], t.weight.shape[0], device="meta")
    linear.weight = nn.Parameter(t.weight, requires_grad=False)
    linear.bias = nn.Parameter(t.bias, requires_grad=False)
    return linear


def _peft(t: Tensors, case: Case) -> Rival:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential()
    model.add_module("layer", _linear(t))
    inject_adapter_in_model(LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=["layer"]), model)
    layer = model.layer
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = t.A.T.contiguous().clone(), t.B.clone()
    return Rival("LoRA PEFT", layer, {"A": (A, True), "B": (B, False)})


def _ours(strategy: str | None) -> Callable[[Tensors, Case], Rival]:
    def make(t: Tensors, case: Case) -> Rival:
        from lotr_ext import LoTRFactors, LoTRLinear

        factors = LoTRFactors(case.k, case.n, case.r, dtype=t.A.dtype, device=t.A.device)
        layer = LoTRLinear.from_linear(_linear(t), factors, scaling=SCALING)
        layer.strategy = strategy
        parameters = {"core": layer.core}
        factors(lambda A, B: None)
        parameters |= {name: dict(factors.named_parameters())[name] for name in ("A", "B")}
        for name, parameter in parameters.items():
            parameter.data = getattr(t, name).clone()
        name = f"lotr_ext {strategy}" if strategy else "lotr_ext"
        return Rival(name, layer, {n: (p, False) for n, p in parameters.items()})

    return make


FLOOR, LORA_EAGER, OURS = "frozen", "lora-eager", "lotr_ext"
RIVALS: dict[str, Callable[[Tensors, Case], Rival]] = {
    FLOOR: _frozen,
    "lotr-eager": _lotr_eager,
    LORA_EAGER: _lora_eager,
    "lora-in-place": _lora_in_place("LoRA in-place", False),
    "lora-in-place-beta": _lora_in_place("LoRA in-place, beta", True),
    "lora-peft": _peft,
    "lora-compiled": _lora_compiled,
    OURS: _ours(None),
    "lotr_ext-two_pass": _ours("two_pass"),
    "lotr_ext-beta": _ours("beta"),
    "lotr_ext-composite": _ours("composite"),
}
DEFAULT = [name for name in RIVALS if name != "lora-compiled"]  # compiling takes minutes a case: --rivals adds it


def available(names: list[str]) -> list[str]:
    """names, checked. Raises ValueError for an unknown rival or one that is not installed."""
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"rivals: expected some of {', '.join(RIVALS)}, got {name!r}")
        if name == "lora-peft" and importlib.util.find_spec("peft") is None:
            raise ValueError("rivals: lora-peft needs the package peft, which is not installed (pip install peft)")
    return names


# Relative error (Frobenius) a rival may have against float64, per dtype; the factors and products round at each step.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-2, "fp16": 2e-3}


def check(rival: Rival, t: Tensors, case: Case, x: Tensor, g: Tensor) -> float:
    """The largest relative error of y, dx and the parameters' gradients against float64. Raises ValueError above TOLERANCE."""
    leaf = x.detach().clone().requires_grad_()
    for parameter, _ in rival.parameters.values():
        parameter.grad = None
    y = rival.forward(leaf)
    y.backward(g)
    x64 = x.double().requires_grad_()
    values = {
        n: (p.T if transposed else p).detach().double().requires_grad_() for n, (p, transposed) in rival.parameters.items()
    }
    y64 = formula(x64, t, tuple(values), values)
    y64.backward(g.double())
    pairs = {"y": (y, y64), "dx": (leaf.grad, x64.grad)}
    for name, (parameter, transposed) in rival.parameters.items():
        pairs[f"d{name}"] = (parameter.grad.T if transposed else parameter.grad, values[name].grad)
    worst = 0.0
    for name, (got, expected) in pairs.items():
        error = ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[case.dtype]:
            limit = TOLERANCE[case.dtype]
            raise ValueError(f"{rival.name}, {case.name()}: {name}: relative error expected <= {limit}, got {error:.2e}")
        worst = max(worst, error)
    return worst


def saved_bytes(rival: Rival, t: Tensors, x: Tensor) -> int:
    """Bytes that a forward keeps alive for backward: storages saved in the graph, parameters and base weights left out."""
    own = {p.untyped_storage().data_ptr() for p, _ in rival.parameters.values()}
    own |= {v.untyped_storage().data_ptr() for v in vars(t).values()}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = rival.forward(x.detach().requires_grad_())
    del y
    return sum(kept.values())
