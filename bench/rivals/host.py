"""Stacks of small layers with the rivals whose host time bench.host compares. All have the same weights and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.names import chosen, named
from ..measure.shapes import DTYPES, Case
from . import registry
from .base import SCALING, Rival, Tensors, Written, frozen_linear, parameter
from .library import missing_package, require

TOKENS, LAYERS, WIDTH, RANK = (1, 16, 160), 24, 32, 8

FLOOR, LORA, LOTR, LOTR_OWN = "frozen", "lora-eager", "lotr-eager", "lotr-eager-own"
ALONE, SHARED, IN_MODEL = "lotr_ext-own", "lotr_ext", "lotr_ext-scope"
FORMS = ("chained", "siblings")
SIBLINGS = 3  # q, k and v

Layers = list[nn.Module]


class Chain(nn.Module):
    """x_{l+1} = layer_l(x_l)"""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Siblings(Chain):
    """x_{b+1} = q_b(x_b) + k_b(x_b) + v_b(x_b)"""

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        for q, k, v in zip(layers, layers, layers):
            x = q(x) + k(x) + v(x)
        return x


def values(case: Case, count: int, device: torch.device) -> list[Tensors]:
    """The tensors of each layer; A and B are shared. Scaled so that values do not grow through many layers."""
    first, made = Tensors.random(case, device), []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(case.n, case.k, generator=generator) * (0.5 * case.k**-0.5)
        core = torch.randn(case.r, case.r, generator=generator) * (0.1 * case.r**-0.5)
        own = {"weight": weight.to(first.weight), "core": core.to(first.core)}
        made.append(replace(first, **own, bias=None if first.bias is None else first.bias.clone()))
    return made


def wide(tensors: list[Tensors]) -> list[Tensors]:
    """The tensors in float64."""
    return [Tensors(**{name: None if t is None else t.double() for name, t in vars(own).items()}) for own in tensors]


def _single(name: str) -> Callable[[list[Tensors], Case], Layers]:
    """Layers as in bench.layer, each with its own factors."""
    return lambda tensors, case: [_registered(registry.RIVALS[name](t, case)) for t in tensors]


def _registered(rival: Rival) -> nn.Module:
    """The rival's layer, with the parameters registered that a plain formula does not name."""
    if isinstance(rival.layer, Written):
        for name, (value, _) in rival.parameters.items():
            rival.layer.register_parameter(name, value)
    return rival.layer


class _ThreeLines(Written):
    """y = x W^T + bias + s ((x A) G) B^T in torch operations, registered so that its parameters are found."""

    def __init__(self, t: Tensors, A: nn.Parameter, B: nn.Parameter):
        core, weight, bias = parameter(t.core), t.weight, t.bias
        super().__init__(lambda x: F.linear(x, weight, bias) + SCALING * (((x @ A) @ core) @ B.T))
        self.A, self.B, self.core = A, B, core


def _lotr(tensors: list[Tensors], case: Case) -> Layers:
    A, B = parameter(tensors[0].A), parameter(tensors[0].B)
    return [_ThreeLines(t, A, B) for t in tensors]


def _lotr_own(tensors: list[Tensors], case: Case) -> Layers:
    return [_ThreeLines(t, parameter(t.A), parameter(t.B)) for t in tensors]


def _shared(tensors: list[Tensors], case: Case) -> Layers:
    from lotr_ext import LoTRFactors, LoTRLinear

    first = tensors[0]
    factors = LoTRFactors(case.k, case.n, case.r, dtype=first.A.dtype, device=first.A.device)
    layers = [LoTRLinear.from_linear(frozen_linear(t), factors, scaling=SCALING) for t in tensors]
    _set_values(layers, tensors)
    return layers


def _set_values(layers: Sequence[nn.Module], tensors: list[Tensors]) -> None:
    for layer, t in zip(layers, tensors):
        for name, mine in (("A", layer.factors.A), ("B", layer.factors.B), ("core", layer.core)):
            mine.data.copy_(getattr(t, name))


def _in_model(stack: nn.Module, tensors: list[Tensors], case: Case) -> nn.Module:
    """apply_lotr on a stack of plain linear layers."""
    from lotr_ext import LoTRConfig, apply_lotr

    config = LoTRConfig(rank=case.r, scaling=SCALING, target_modules=r".*layers\.\d+", adapter_dtype=DTYPES[case.dtype])
    model = apply_lotr(stack, config)
    _set_values(list(model.layers), tensors)
    return model


@dataclass(frozen=True)
class HostRival:
    """layers(tensors, case): of a stack, None if the whole model is adapted; like: the formula in three lines with as many
    factors, for comparison with ours; forms: the stacks in which it is measured."""

    label: str
    layers: Callable[[list[Tensors], Case], Layers] | None
    like: str = LOTR
    is_lotr: bool = False
    forms: tuple[str, ...] = FORMS


RIVALS = {
    FLOOR: HostRival("frozen", _single("frozen")),
    LORA: HostRival(named(LORA), _single("lora-eager")),
    "lora-peft": HostRival(named("lora-peft"), _single("lora-peft")),
    LOTR: HostRival(f"{named(LOTR)}, one pair", _lotr, is_lotr=True),
    LOTR_OWN: HostRival(f"{named(LOTR)}, a pair each", _lotr_own, LOTR_OWN, True, ("chained",)),
    ALONE: HostRival(f"{named(SHARED)}, a pair each", _single("lotr_ext"), LOTR_OWN, True, ("chained",)),
    SHARED: HostRival(f"{named(SHARED)}, one pair", _shared, is_lotr=True),
    IN_MODEL: HostRival(f"{named(SHARED)}, in a model", None, is_lotr=True),
}
NEEDED = (FLOOR, LORA, LOTR, LOTR_OWN)  # the denominators of ratios


def available(names: list[str] | None) -> list[str]:
    """The checked names (None: all that can run), plus NEEDED. Raises ValueError for one that cannot run."""
    if names is None:
        return [name for name in RIVALS if missing_package(name) is None]
    chosen("rivals", ",".join(names), RIVALS)
    require("rivals", names)
    return [name for name in RIVALS if name in (*names, *NEEDED)]


def of_form(names: list[str], form: str) -> list[str]:
    return [name for name in names if form in RIVALS[name].forms]


def stack(name: str, tensors: list[Tensors], case: Case, form: str) -> nn.Module:
    """A rival's layer for each of `tensors`, chained or as siblings."""
    kind, make = {"chained": Chain, "siblings": Siblings}[form], RIVALS[name].layers
    if make is None:
        return _in_model(kind([frozen_linear(t) for t in tensors]), tensors, case)
    return kind(make(tensors, case))
