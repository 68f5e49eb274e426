"""Several named adapters on one model: add_adapter, set_adapter, delete_adapter, adapter_names, active_adapter, mixed.

One adapter is active: its factors are `model.lotr_factors`, its cores the layers' `core`. The others are parked as
`model.lotr_parked.<name>` with all their tensors, so that .to() and state_dict include them. All adapt the same layers in the
same groups. An adapter has its own factors, or shares another adapter's and has only cores (r_in r_out numbers per layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from ..autograd.magnitude import row_lengths
from ..autograd.tensor_parallel import is_dtensor
from ..layers.core import made
from ..layers.experts import LoTRExperts
from ..layers.init import fill_core_
from ..layers.layer import LoTRLayer
from ..layers.magnitude import no_magnitude
from ..layers.mixture import Mixture, mixture_of
from ..layers.request import in_force
from ..layers.settings import Settings
from ..layers.sharded import agree_over
from ..layers.uninterrupted import uninterrupted
from .adapted import adapted_layers, expect_count, expect_merged, refuse_magnitudes, refuse_starts
from .config import LoTRConfig
from .core_forms import form_at, make_cores
from .parked import DEFAULT, ParkedAdapter, ParkedAdapters, find_name, parked_of
from .saved import CORES, module_prefixes, saved_modules, saved_tensors
from .scope import attach_scope
from .shared_factors import Owner, SharedFactors, counterpart, factors_by_part
from .targets import can_be_child
from .tasks import bank_of

__all__ = ["DEFAULT", "active_adapter", "adapter_names", "add_adapter", "delete_adapter", "mixed", "set_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter in use; "default" is the one that `apply_lotr` made.

    Raises:
        TypeError, RuntimeError: no nn.Module, no adapter, or layers built by hand.
    """
    return parked_of(model, "active_adapter").active


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, the active one first.

    Raises:
        TypeError, RuntimeError: as `active_adapter`.
    """
    parked = parked_of(model, "adapter_names")
    return [parked.active, *parked]


def add_adapter(model: Model, name: str, config: LoTRConfig | None = None, *, share_factors: str | None = None) -> Model:
    """Adds a parked adapter on the same layers and in the same groups as the active one. The model's output does not change.

    Args:
        model: from `apply_lotr`.
        name: a new name, without dots.
        config: its rank, scaling, dropout, init, train, adapter_dtype and core_init. Its targets, groups and modules_to_save
            must equal those of the active adapter or be left out. None: the active adapter's config.
        share_factors: the adapter whose A and B it uses. It then has only cores of its own, and only these are trained
            unless config.train says otherwise. None: its own factors.

    Its modules_to_save are copies of the current ones.

    Raises:
        TypeError, ValueError: a name that is taken, an adapter that does not exist, a config that does not fit, or one with
            init "gradient".
        RuntimeError: no adapter, layers built by hand, a merged adapter, init "svd" (whose start is part of the weights), a
            parametrized core or factor, a copy of an adapted block.
    """
    parked = parked_of(model, "add_adapter")
    layers = adapted_layers(model)
    _check_new_name(parked, name)
    expect_merged(layers, False, "add_adapter")
    _check_movable(model, layers, "add_adapter")
    owner = None if share_factors is None else find_name(parked, share_factors, "share_factors")
    config = _fitting_config(model, config, shared=owner is not None)
    if config.init == "svd" or any(layer.start_core is not None for layer in layers.values()):
        raise RuntimeError('add_adapter: expected an init other than "svd", whose start is part of the base weights, got "svd"')
    if config.init == "gradient":
        raise ValueError(
            'add_adapter: expected an init without batches, got "gradient"; give another one, and call init_from_gradient when '
            "the adapter is active"
        )
    factors = _new_factors(model, config) if owner is None else _factors_of(model, parked, owner, config)
    dtype = next(getattr(module, part).dtype for _, module, part in factors_by_part(factors))  # shared ones may have another
    cores = make_cores(config, list(layers), next(iter(layers.values())).core.device, dtype)
    held = [form_at(cores, at) for at in layers] if cores is not None else _new_cores(model, config, factors)
    made = (*(t for owner in factors.values() for t in owner.parameters()), *(held if cores is None else cores.parameters()))
    agree_over(next(filter(is_dtensor, (layer._parameters.get("weight") for layer in layers.values())), None), made)
    magnitudes = _new_magnitudes(model, config, factors, held) if config.magnitude else None
    settings = (Settings.of(config).scale(config.rank), config.dropout)
    saved = [t.detach().clone() for t in saved_tensors(saved_modules(model)).values()]
    new = ParkedAdapter(config, factors, held, magnitudes, cores, [settings] * len(held), saved)
    with uninterrupted():
        parked[name], model.lotr_parked = new, parked
        _register_once(model)
    return model


def _new_factors(model: nn.Module, config: LoTRConfig) -> dict[str, Owner]:
    """New factors for the groups of a model."""
    factors = SharedFactors()
    for layer in adapted_layers(model).values():
        group = next((group for group, old in model.lotr_factors.items() if old is layer.factors), "")
        sizes = layer.in_features, layer.out_features
        factors.pair(group, sizes, config, layer.factors.A.device, config.adapter_dtype)
    return dict(factors.items())


def _factors_of(model: nn.Module, parked: ParkedAdapters, owner: str, config: LoTRConfig) -> dict[str, Owner]:
    """The factors of the adapter `owner`. Raises ValueError unless they have config's ranks."""
    factors = dict(model.lotr_factors.items() if owner == parked.active else parked[owner].factors.items())
    ranks = {part: getattr(module, attribute).shape[1] for part, module, attribute in factors_by_part(factors)}
    if (got := (ranks["A"], ranks["B"])) != config.ranks:
        raise ValueError(f"config: expected rank {got} as in the shared factors of {owner!r}, got {config.ranks}")
    return factors


def _new_cores(model: nn.Module, config: LoTRConfig, factors: dict[str, Owner]) -> list[nn.Parameter]:
    """A dense core for each layer, in the dtype of its factors."""
    cores = []
    for layer in adapted_layers(model).values():
        dtype, old = counterpart(layer.factors, model.lotr_factors, factors).A.dtype, layer.core
        cores.append(nn.Parameter(torch.empty(*old.shape[:-2], *config.ranks, device=old.device, dtype=dtype)))
        fill_core_(cores[-1], config.core_init)
    return cores


def _new_magnitudes(
    model: nn.Module, config: LoTRConfig, factors: dict[str, Owner], held: Sequence[nn.Parameter | nn.Module]
) -> list[nn.Parameter]:
    """For each layer, the lengths of its rows with the new adapter."""
    scaling, magnitudes = Settings.of(config).scale(config.rank), []
    for (name, layer), own in zip(adapted_layers(model).items(), held, strict=True):
        if (why := no_magnitude(getattr(layer, "base_layer", layer))) is not None:
            raise ValueError(f"magnitude: expected layers whose rows can be measured, got {name!r}, {why}")
        pair, core = counterpart(layer.factors, model.lotr_factors, factors), own if isinstance(own, Tensor) else made(own)
        with torch.no_grad():
            lengths = row_lengths(layer.stored()[1](), pair.A, pair.B, core, scaling)
        magnitudes.append(nn.Parameter(lengths.to(core)))
    return magnitudes


def set_adapter(model: Model, name: str) -> Model:
    """Makes the adapter `name` active, trained as its config says. The previous one is parked, and its gradients are dropped.

    Create the optimizer afterwards, since the layers now have other parameters.

    Raises:
        TypeError, ValueError: no such adapter. RuntimeError: as `active_adapter`, a merged adapter, or where another adapter
            becomes the active one a parametrized core or factor, or an adapted block that was copied or removed.
    """
    parked = parked_of(model, "set_adapter")
    name = find_name(parked, name, "name")
    expect_merged(adapted_layers(model), False, "set_adapter")
    if name != parked.active:
        layers = adapted_layers(model)
        _check_movable(model, layers, "set_adapter")
        expect_count(layers, len(parked[name].settings), "set_adapter")
        _swap(model, parked, name)
    return model


def delete_adapter(model: Model, name: str) -> Model:
    """Removes a parked adapter. Factors that other adapters share stay.

    Raises:
        TypeError, ValueError: no such adapter. RuntimeError: as `active_adapter`; the active adapter, merged or not (activate
            another one first, or call `unload`); the last one with the factors of a TaskBank's tasks.
    """
    parked = parked_of(model, "delete_adapter")
    name = find_name(parked, name, "name")
    if name == parked.active:
        merged = any(layer.merged for layer in adapted_layers(model).values())
        state = "merged into the weights" if merged else "active"
        advice = "unmerge it" if merged else "set_adapter another one first, or unload the model"
        raise RuntimeError(f"delete_adapter: expected a parked adapter, got {name!r}, which is {state}; {advice}")
    bank, old = getattr(model, "lotr_tasks", None), parked[name].factors
    others = [dict(model.lotr_factors.items()), *(one.factors for other, one in parked.items() if other != name)]
    if bank is not None and bank.uses(old) and not any(bank.uses(factors) for factors in others):
        raise RuntimeError(
            f"delete_adapter: expected an adapter whose factors no TaskBank uses, got {name!r}; del model.lotr_tasks"
        )
    with uninterrupted():
        del parked[name]
        _register_once(model)
    return model


@contextmanager
def mixed(model: Model, names: Sequence[str | None] | Tensor, *, flat: bool = False) -> Iterator[Model]:
    """Inside the context, row i of a batch uses the adapter names[i]; None: the base model.

    names may instead be an index [b] (int64) of tasks in the model's `TaskBank`, -1 for none. The time then does not depend on
    the number of tasks in the batch. Do not change the index inside the context.

    An index [b, t] has a task per token: column j is for position j of a row. All adapted layers must get as many tokens as the
    model, [b, t, k]. With a cache (`generate`), columns count from the row's first token in the cache, and tokens after the
    last column use the last column. `activated` makes such an index.

    The context applies to the thread or asyncio task that opened it, and to checkpoint recomputation of its forwards.

    One forward computes the whole batch: x A and the product with B are one product each, and only the core is chosen per row,
    y_i = x_i W^T + bias + s_i ((x_i A) G_names[i]) B^T. The adapters must share the active one's factors. Each input of an
    adapted layer must have the batch as its first dimension. With flat, and in a model with adapted experts, a 2-D input has
    the tokens of all rows, row after row, equally many of each, as OPT and shared experts get them in transformers. Experts
    choose a core by row and expert. Differentiable; cores that require grad get gradients, parked ones by default do not.

    Raises:
        TypeError, ValueError: no names, an unknown adapter or task, one with other factors, with magnitudes, or of init
            "svd". RuntimeError: as `set_adapter`, or an index where the model has no TaskBank. In a layer, ValueError: an input
            whose first dimension is not len(names), or with flat or in experts no multiple of it; for an index [b, t] one with
            another number of tokens.
    """
    parked = parked_of(model, "mixed", in_parts_too=isinstance(names, Tensor))
    layers = adapted_layers(model)
    expect_merged(layers, False, "mixed")
    _check_parameters(layers, "mixed")
    if isinstance(names, Tensor):
        bank = bank_of(model, "mixed")
        expect_count(layers, len(bank.cores), "mixed")
        mixtures = bank.mixtures(model, names)
    else:
        mixtures = _mixtures(model, layers, parked, names)
    refuse_magnitudes(layers, "mixed")
    refuse_starts(layers, "mixed")
    flat = flat or any(isinstance(layer, LoTRExperts) for layer in layers.values())  # a shared expert gets 2-D inputs too
    at_device: dict[torch.device, Tensor] = {}  # the index, copied once to each device that layers are on
    said: dict[nn.Module, Mixture] = {}
    for layer, own in zip(layers.values(), mixtures, strict=True):
        device = layer.factors.A.device
        if device not in at_device:  # offloaded parameters are on the meta device until their forward
            at_device[device] = own.index if device.type == "meta" else own.index.to(device)
        said[layer] = own._replace(index=at_device[device], flat=flat)
    with in_force(said):
        yield model


def _mixtures(
    model: nn.Module, layers: dict[str, LoTRLayer], parked: ParkedAdapters, names: Sequence[str | None]
) -> list[Mixture]:
    """A Mixture of named adapters for each layer, in the model's order."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise TypeError(f"names: expected a sequence of adapter names, one per row, or an index of tasks, got {names!r}")
    kinds = list(dict.fromkeys(name for name in names if name is not None)) or [parked.active]
    for name in kinds:
        if find_name(parked, name, "names") != parked.active:
            expect_count(layers, len(parked[name].settings), "mixed")
            if parked[name].magnitudes is not None:
                raise ValueError(f"names: expected adapters without magnitudes, got {name!r} with; call set_adapter for it")
            for group, factors in parked[name].factors.items():
                if factors is not model.lotr_factors[group]:
                    raise ValueError(
                        f"names: expected adapters that share the factors of {parked.active!r}, got {name!r}, which has others"
                    )
    index = torch.tensor([-1 if name is None else kinds.index(name) for name in names], device="cpu")
    mixtures, values = [], {name: parked[name].values for name in kinds if name in parked}
    for i, layer in enumerate(layers.values()):
        parts = [
            (layer.core, layer.scaling) if name == parked.active else (values[name][i], parked[name].settings[i][0])
            for name in kinds
        ]
        mixtures.append(mixture_of(parts, index))
    return mixtures


@contextmanager
def in_use(model: Model, name: str) -> Iterator[Model]:
    """Inside the context the adapter `name` is the active one. Afterwards the parameters of the one before have their gradients
    and their requires_grad again. Raises as `set_adapter`."""
    before, layers = active_adapter(model), adapted_layers(model).values()
    kept = {p: (p.requires_grad, p.grad) for layer in layers for p in layer.adapter_parameters()} if name != before else {}
    try:
        set_adapter(model, name)
        yield model
    finally:
        set_adapter(model, before)
        for parameter, (requires_grad, grad) in kept.items():
            parameter.requires_grad_(requires_grad).grad = grad


def rename_active(model: nn.Module, name: str) -> None:
    """Another name for the active adapter."""
    parked = parked_of(model, "name")
    if name != parked.active:
        _check_new_name(parked, name)
    parked.active, model.lotr_parked = name, parked


# ---- details ---------------------------------------------------------------------------------------------------------


def check_name(name: object) -> None:
    """Raises TypeError or ValueError for a name that no adapter can have."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__} {name!r}")
    if not can_be_child(name, ParkedAdapters):
        raise ValueError(f"name: expected a name without dots that nn.ModuleDict does not use itself, got {name!r}")


def _check_new_name(parked: ParkedAdapters, name: object) -> None:
    check_name(name)
    if name == parked.active or name in parked:
        raise ValueError(f"name: expected a new name, got {name!r}, which exists")


def _check_parameters(layers: dict[str, LoTRLayer], where: str) -> None:
    """Raises RuntimeError for parametrized cores or factors: a parametrization stays on its module when an adapter moves."""
    for name, layer in layers.items():
        for owner, part in (*layer.factors.owners, (layer, "core"), (layer, "magnitude")):
            if parametrize.is_parametrized(owner, part):
                raise RuntimeError(
                    f"{where}: expected cores and factors that are parameters, got {name!r}, whose {part} has a "
                    "parametrization; remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
                )


def _check_movable(model: nn.Module, layers: dict[str, LoTRLayer], where: str) -> None:
    """Raises RuntimeError as `_check_parameters`, and for a copy of an adapted block, whose factors are in no group."""
    _check_parameters(layers, where)
    module_prefixes(model, layers)


def _fitting_config(model: nn.Module, config: LoTRConfig | None, *, shared: bool) -> LoTRConfig:
    """config with the active adapter's targets, groups and modules_to_save. Raises ValueError if it contradicts them."""
    active: LoTRConfig = model.lotr_config
    if config is None:
        own = ("core", "magnitude") if "magnitude" in active.train else ("core",)
        config = replace(active, train=own, core_init="zero", init="orthonormal") if shared else active
    if not isinstance(config, LoTRConfig):
        raise TypeError(f"config: expected a LoTRConfig, got {type(config).__name__}")
    default = LoTRConfig()
    kept = {}
    for field in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "group_by"):
        got, want = getattr(config, field), getattr(active, field)
        if got not in (want, getattr(default, field)):
            raise ValueError(f"config: expected {field} {want!r} as in the active adapter, got {got!r}")
        kept[field] = want
    return replace(config, **kept)


@uninterrupted()
def _swap(model: nn.Module, parked: ParkedAdapters, name: str) -> None:
    layers = adapted_layers(model)
    new = parked[name]
    live = saved_tensors(saved_modules(model))
    old = ParkedAdapter(
        model.lotr_config,
        dict(model.lotr_factors.items()),
        [layer.held_core() for layer in layers.values()],
        [layer.magnitude for layer in layers.values()] if model.lotr_config.magnitude else None,
        getattr(model, CORES, None),
        [(layer.scaling, layer.dropout) for layer in layers.values()],
        [t.data for t in live.values()],
    )
    for part in (old, *old.factors.values()):  # else the next backward after a switch back would add to old gradients
        part.requires_grad_(False).zero_grad()
    pairs = {id(layer.factors): counterpart(layer.factors, old.factors, new.factors) for layer in layers.values()}
    magnitudes = new.magnitudes or [None] * len(layers)
    for layer, held, magnitude, (scaling, dropout) in zip(layers.values(), new.held, magnitudes, new.settings, strict=True):
        layer.__dict__["factors"] = pairs[id(layer.factors)]
        layer.hold_core(held)
        layer.hold_magnitude(magnitude)
        layer.scaling, layer.dropout = scaling, dropout
        layer.set_trained(new.config.train)
    if hasattr(model, CORES):
        delattr(model, CORES)
    if new.made is not None:
        setattr(model, CORES, new.made)
    model.lotr_factors.update(new.factors)
    model.lotr_factors.set_trained(new.config.train)
    for tensor, value in zip(live.values(), new.saved, strict=True):
        tensor.data = value.data
        increment_version(tensor)  # so that a backward through the previous values raises
    del parked[name]
    parked[parked.active], parked.active = old, name
    model.lotr_config = new.config
    _register_once(model)


def _register_once(model: nn.Module) -> None:
    """Registers each factor once: in lotr_factors if it is active, else in the first adapter that has it."""
    seen = {id(factors) for factors in model.lotr_factors.values()}
    for adapter in model.lotr_parked.values():
        own = {group: f for group, f in adapter.factors.items() if id(f) not in seen}
        adapter.own_factors = SharedFactors(own).requires_grad_(False)
        seen.update(id(f) for f in own.values())
    attach_scope(model)  # the layers of each group have changed
