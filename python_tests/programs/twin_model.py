"""Whole models in plain torch: adapters by name, tasks, and contexts. As `twin.py`, it shares no code with the package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from programs.given import Product
from programs.twin import OPEN, LoTRFactors, LoTRLinear, Mixing, Ranks
from torch import Tensor, nn

Parts = tuple[LoTRFactors, Tensor, float, Tensor | None]  # a layer's factors, core, scaling and magnitudes


def layers_of(model: nn.Module) -> Iterator[LoTRLinear]:
    return (module for module in model.modules() if isinstance(module, LoTRLinear))


class ProductCores(Product):
    """Makes the cores of all layers of a model."""

    def __init__(self, places: int, rank: Ranks, noisy: bool):
        super().__init__()
        self.set_up(places, rank, noisy)


def apply_lotr(
    model: nn.Module,
    groups: dict[str, str],
    rank: Ranks,
    *,
    dtype: torch.dtype,
    scaling: float,
    dropout: float,
    train: Sequence[str],
    form: str | None,
    magnitude: bool,
) -> None:
    """Adapts the layers that `groups` names, in place, with one pair of factors a group; all else is frozen.

    A layer with hooks or parametrizations is wrapped: its weight is no plain tensor of its own. form: "product" or "noisy", for
    cores that one module makes.
    """
    model.requires_grad_(False)
    shared, of_group = nn.ModuleDict(), {}
    cores = None if form is None else ProductCores(len(groups), rank, form == "noisy").to(dtype)
    for i, (name, group) in enumerate(groups.items()):
        linear = model.get_submodule(name)
        if group not in shared:
            shared[group] = LoTRFactors(linear.in_features, linear.out_features, rank, dtype=dtype)
        wrapped = type(linear) is not nn.Linear
        layer = LoTRLinear(linear, shared[group], scaling=scaling, dropout=dropout, wrapped=wrapped, magnitude=magnitude)
        layer.__dict__["factors"] = layer._modules.pop("factors")
        layer.core.requires_grad_("core" in train)
        if magnitude:
            layer.magnitude.requires_grad_("magnitude" in train)
        of_group.setdefault(group, []).append(layer)
        layer.__dict__["siblings"] = of_group[group]
        if cores is not None:
            del layer._parameters["core"]
            layer.__dict__["cores"], layer.place = cores, i
            layer.make_core = made_core
        setattr(model, name, layer)
    for factors in shared.values():
        factors.A.requires_grad_("A" in train)
        factors.B.requires_grad_("B" in train)
    model.lotr_factors = shared
    if cores is not None:
        model.lotr_cores = cores.requires_grad_("core" in train)
    model.adapters = Adapters(model, "default", train, scaling)


def made_core(layer: LoTRLinear) -> Tensor:
    return layer.cores.product(layer.place)


class Adapters:
    """A model's adapters by name, of which one is active: what is trained, and each layer's factors, core, scaling and
    magnitudes."""

    def __init__(self, model: nn.Module, name: str, train: Sequence[str], scaling: float):
        self.scaling = scaling  # as configured; a layer's may be set to another
        self.active, self.parked = name, {name: (tuple(train), [])}

    @staticmethod
    def _present(model: nn.Module) -> list[Parts]:
        return [(layer.factors, layer.core, layer.scaling, layer.magnitude) for layer in layers_of(model)]

    def parts(self, model: nn.Module, name: str) -> list[Parts]:
        """What the layers have of an adapter now."""
        return self._present(model) if name == self.active else self.parked[name][1]

    def add(self, model: nn.Module, name: str, *, shared: bool) -> None:
        """As the active one, with cores at zero and magnitudes at the lengths that rows have then; shared: over its factors,
        which the new one does not train."""
        train, layers = self.parked[self.active][0], self._present(model)
        new = {id(factors): factors if shared else copy.deepcopy(factors) for factors, *_ in layers}
        parts = []
        for layer, (f, core, _, m) in zip(layers_of(model), layers):
            weight = (layer.base_layer if layer.wrapped else layer).weight.detach()
            m = None if m is None else nn.Parameter(weight.double().norm(dim=1).to(m.dtype), requires_grad=False)
            parts.append((new[id(f)], nn.Parameter(torch.zeros_like(core), requires_grad=False), self.scaling, m))
        self.parked[name] = tuple(t for t in ("core", "magnitude") if t in train or t == "core") if shared else train, parts

    def use(self, model: nn.Module, name: str) -> None:
        """Makes an adapter the active one, trained as it says; what it replaces is parked, frozen and without gradients."""
        if name == self.active:
            return
        self.parked[self.active] = self.parked[self.active][0], self._present(model)
        groups = {id(factors): group for group, factors in model.lotr_factors.items()}
        for factors, core, _, magnitude in self.parked[self.active][1]:
            for parameter in (factors.A, factors.B, core, *([] if magnitude is None else [magnitude])):
                parameter.requires_grad_(False).grad = None
        train, layers = self.parked[name]
        for layer, (factors, core, scaling, magnitude) in zip(list(layers_of(model)), layers):
            if id(layer.factors) in groups:
                model.lotr_factors[groups[id(layer.factors)]] = factors
            layer.__dict__["factors"], layer.core, layer.scaling, layer.magnitude = factors, core, scaling, magnitude
            factors.A.requires_grad_("A" in train)
            factors.B.requires_grad_("B" in train)
            core.requires_grad_("core" in train)
            if magnitude is not None:
                magnitude.requires_grad_("magnitude" in train)
        self.active = name


class TaskBank(nn.Module):
    """Cores of several tasks over a model's factors, with the scaling that each layer has now. taken: which places hold one."""

    def __init__(self, model: nn.Module, tasks: int):
        super().__init__()
        self.names = [name for name, module in model.named_modules() if isinstance(module, LoTRLinear)]
        cores = [layer.core.detach().new_zeros(tasks, *layer.core.shape) for layer in layers_of(model)]
        self.cores = nn.ParameterList(nn.Parameter(core, requires_grad=False) for core in cores)
        self.scalings = [layer.scaling for layer in layers_of(model)]
        self.register_buffer("taken", torch.zeros(tasks, dtype=torch.bool))
        model.lotr_tasks = self

    def add(self, source: Mapping[str, Tensor]) -> int:
        """Into the first free slot, which it returns."""
        place = self.taken.tolist().index(False)
        self.taken[place] = True
        self.replace(place, source)
        return place

    @torch.no_grad()
    def replace(self, place: int, source: Mapping[str, Tensor]) -> None:
        for name, core in zip(self.names, self.cores):
            core[place] = source[f"{name}.core"]

    @torch.no_grad()
    def drop(self, place: int) -> None:
        self.taken[place] = False
        for core in self.cores:
            core[place] = 0

    def cores_of(self, place: int) -> dict[str, Tensor]:
        return {f"{name}.core": core.detach()[place] for name, core in zip(self.names, self.cores)}


# ---- contexts ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(parts: Callable[[], dict[nn.Module, Mixing | None]]) -> Iterator[None]:
    """A context that is open until it is closed, whichever others were opened or closed meanwhile."""
    own = parts()
    OPEN.append(own)
    try:
        yield
    finally:
        OPEN[:] = [context for context in OPEN if context is not own]


def disabled(model: nn.Module):
    return opened(lambda: dict.fromkeys(layers_of(model)))


def mixed(model: nn.Module, names: Sequence[str | None] | Tensor):
    """Row i of a batch takes the core of the adapter, or of the task, names[i]; None, or -1, takes none. All share their
    factors."""

    def by_name() -> dict[nn.Module, Mixing | None]:
        parts = {name: None if name is None else model.adapters.parts(model, name) for name in names}
        return {
            layer: [None if parts[name] is None else parts[name][i][1:3] for name in names]
            for i, layer in enumerate(layers_of(model))
        }

    def by_task() -> dict[nn.Module, Mixing | None]:
        bank = model.lotr_tasks
        return {
            layer: [None if i < 0 else (core[i], scaling) for i in names.tolist()]
            for layer, core, scaling in zip(layers_of(model), bank.cores, bank.scalings)
        }

    return opened(by_task if isinstance(names, Tensor) else by_name)
