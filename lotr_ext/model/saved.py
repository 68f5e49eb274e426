"""The tensors of a saved adapter besides A, B and cores: modules_to_save, and tensors from which cores are computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.bank import core_form_of
from ..layers.cores import FORMS, CoreAt, Cores
from ..layers.factors import LoTRFactor, LoTRFactors, same_values
from ..layers.layer import LoTRLayer
from ..layers.parametrized import state_for, state_of, value_with
from ..layers.sharded import Slot, holds_parts, in_parts, named_modules
from .adapter_files import Manifest
from .config import LoTRConfig
from .core_forms import CORES
from .names import name_ends_with

__all__ = [
    "adapter_slots",
    "computed_parts",
    "computed_tensors",
    "factor_prefix",
    "fitted_to_parametrizations",
    "module_prefixes",
    "of_adapted_part",
    "of_part",
    "saved_modules",
    "saved_tensors",
    "ties",
    "ties_of",
    "with_ties",
    "without_ties",
]

Layers = Mapping[str, LoTRLayer]
Prefixes = Mapping[int, str]  # of LoTRFactors, LoTRFactor and Cores in the model's state_dict, by id


BESIDE = ("lotr_factors", "lotr_parked", "lotr_tasks", CORES)  # what an adapted model has beside its layers


def configured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, or its parts, that `apply_lotr` has adapted, by name."""
    return ((at, m) for at, m in named_modules(model) if isinstance(m.__dict__.get("lotr_config"), LoTRConfig))


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules_to_save, by name; of a model in which `apply_lotr` has adapted parts, those of the parts."""
    found = {}
    for at, owner in configured(model):
        config = owner.lotr_config
        for name, m in named_modules(owner) if config.modules_to_save else ():
            if name and not name.startswith(BESIDE) and any(name_ends_with(name, e) for e in config.modules_to_save):
                found[f"{at}.{name}" if at else name] = m
    return found


def saved_tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers by full name; tied ones only under their first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        for key, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"modules_to_save: expected tensors in state_dict, got {name}.{key} ({type(value).__name__})")
            if id(value) not in seen:
                seen.add(id(value))
                tensors[f"{name}.{key}"] = value
    return tensors


# ---- ties: tensors that a model has under several names, and a file under one -----------------------------------------


def ties_of(model: nn.Module) -> dict[str, str | None]:
    """`ties` of a model's modules_to_save, before a model in parts is gathered: gathered tensors are tied to nothing."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, top in saved_modules(model).items():
        for at, module in named_modules(top):  # not by state_dict, which FSDP1 would gather
            own = module._parameters | {k: t for k, t in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for key, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensors[".".join(part for part in (name, at, key) if part)] = tensor
    return ties(model, tensors)


def ties(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str | None]:
    """The tensors, by full name, of modules that share one with modules_to_save: the name in `tensors` of the same tensor, or
    None for another one of such a module, which `tensors` lacks. tensors: as from `saved_tensors`."""
    first, found = {id(t): name for name, t in tensors.items()}, {}
    for at, module in named_modules(model) if tensors else ():
        held = (*module._parameters.items(), *module._buffers.items())
        own = {f"{at}.{key}" if at else key: t for key, t in held if t is not None}
        if any(first.get(id(t), name) != name for name, t in own.items()):
            found |= {name: first.get(id(t)) for name, t in own.items() if name not in tensors}
    return found


def without_ties(
    tensors: Mapping[str, Tensor], tied: Mapping[str, str | None], model: nn.Module | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """modules_to_save for PEFT, in which each module has tensors of its own: the tensors under all of their names, and the
    modules to add. model: has the values of those that are not in tensors.

    Raises:
        ValueError: a module of which tensors are missing, or a parameter of the whole model.
    """
    rest = {} if model is None else {**dict(model.named_buffers()), **dict(model.named_parameters())}
    found = dict(tensors)
    for name, of in tied.items():
        value = rest.get(name) if of is None else tensors.get(of)
        if value is None or in_parts(value) or "." not in name:
            raise ValueError(
                f"modules_to_save: expected modules that share all of their tensors or none, got one that shares its tensors "
                f"with that of {name!r}, whose value is not in the file; name this module in modules_to_save too"
            )
        found[name] = value
    return found, list(dict.fromkeys(name.rpartition(".")[0] for name in tied))


def with_ties(
    model: nn.Module, saved: dict[str, nn.Module], manifest: Manifest, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors under the names that the model's modules_to_save have.

    Raises:
        ValueError: a tensor that the model ties to another one and the adapter does not, or the reverse: one of the two would
            get a wrong value.
    """
    tied = {name: of for name, of in ties(model, saved_tensors(saved)).items() if of is not None}
    known, found = manifest.tied, dict(tensors)
    for name, of in tied.items():
        own = found.pop(name, None)
        same = known is None or known.get(name) is not None if own is None else of in found and same_values(own, found[of])
        if not same:
            raise ValueError(
                f"{name}: expected a tensor tied to {of}, as in the model, got one of its own in the adapter; before loading, "
                "give the module a copy: module.weight = nn.Parameter(module.weight.detach().clone())"
            )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, of in () if known is None or holds_parts(model) else known.items():  # gathered tensors are tied to nothing
        if of is not None and name in names and name not in tied:
            raise ValueError(
                f"{name}: expected a tensor of its own, as in the model, got one tied to {of} in the adapter; tie it"
            )
    return found


# ---- parts of a model -------------------------------------------------------------------------------------------------


def of_part(manifest: Manifest, tensors: Mapping[str, Tensor], prefix: str) -> tuple[Manifest, dict[str, Tensor]]:
    """A file's contents for the part of the model whose names begin with prefix, by the names in the part: its layers, their
    factors, which may be outside of it, and its modules_to_save."""

    def inside(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    def named(factors: str | tuple[str, str]) -> str | tuple[str, str]:
        return factors.removeprefix(prefix) if isinstance(factors, str) else tuple(one.removeprefix(prefix) for one in factors)

    layers = {name: replace(entry, factors=named(entry.factors)) for name, entry in inside(manifest.layers).items()}
    owners = {
        f"{entry.tensor(part).rpartition('.')[0]}."
        for name, entry in manifest.layers.items()
        for part in "AB"
        if name.startswith(prefix)
    }
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith((prefix, *owners))}
    saved = tuple(inside(dict.fromkeys(manifest.modules_to_save)))
    tied = None if manifest.tied is None else {k: of and of.removeprefix(prefix) for k, of in inside(manifest.tied).items()}
    return Manifest(manifest.config, layers, saved, inside(manifest.base), tied), found


def of_adapted_part(manifest: Manifest, tensors: dict[str, Tensor]) -> tuple[str, Manifest, dict[str, Tensor]]:
    """The name of the part of the model that `apply_lotr` adapted, "" for the whole, and the file's contents by the names in
    this part."""
    owners = {entry.tensor(part).rpartition("lotr_factors.")[0] for entry in manifest.layers.values() for part in "AB"}
    if manifest.config is None or len(owners) != 1 or not (prefix := owners.pop()):
        return "", manifest, tensors
    return prefix.rstrip("."), *of_part(manifest, tensors, prefix)


def adapter_slots(model: nn.Module) -> list[Slot]:
    """The places of all tensors in an adapted model that the file of its active adapter contains."""
    own: set[nn.Module] = set()
    for _, module in named_modules(model):
        if isinstance(module, LoTRFactors | LoTRFactor | Cores):
            own.update(module.modules())
        elif isinstance(module, LoTRLayer):
            for child in ("core_form", "parametrizations"):
                own.update(module._modules[child].modules() if child in module._modules else ())
    for module in saved_modules(model).values():
        own.update(module.modules())
    slots = []
    for at, module in named_modules(model):
        if module in own:
            names = (*module._parameters, *module._buffers)
        else:  # an adapted layer's weight and bias do not belong to the adapter
            kept = (*module._parameters, *module._buffers)
            own_parts = ("core", "start_core", "magnitude") if isinstance(module, LoTRLayer) else ()
            names = tuple(n for n in own_parts if n in kept)
        slots += [Slot(f"{at}.{name}", module, name) for name in names]
    return slots


# ---- parametrized cores and factors ----------------------------------------------------------------------------------


def parts(layers: Layers, prefixes: Prefixes) -> Iterator[tuple[nn.Module, str, str]]:
    """Each A, B, core and magnitude once: its module, the module's name and the part's."""
    seen: set[int | tuple[int, str]] = set()
    for name, layer in layers.items():
        if id(layer.factors) not in seen:
            seen.add(id(layer.factors))
            for module, part in layer.factors.owners:
                if (id(module), part) not in seen:
                    seen.add((id(module), part))
                    yield module, prefixes[id(module)], part
        yield layer, name, "core"
        if layer.norms is not None:
            yield layer, name, "magnitude"


def cores_of(layer: nn.Module) -> nn.Module | None:
    """The module that makes the layer's core, or the cores of several layers; None if the core is a parameter or
    parametrized."""
    form = core_form_of(layer)
    return form.cores if isinstance(form, CoreAt) else form


def module_prefixes(model: nn.Module, layers: dict[str, LoTRLayer]) -> dict[int, str]:
    """The names of the modules that have a factor or make cores, by id(module)."""
    found = {id(m): name for name, m in named_modules(model) if isinstance(m, LoTRFactors | LoTRFactor | Cores)}
    for name, layer in layers.items():
        if isinstance(cores_of(layer), Cores) and id(cores_of(layer)) not in found:
            raise RuntimeError(f"model: expected it to register the Cores of {name!r}, got one that no module owns")
        if any(id(module) not in found for module, _ in layer.factors.owners):
            raise RuntimeError(f"model: expected it to register the factors of {name!r}, got factors that no module owns")
    return found


def factor_prefix(prefixes: dict[int, str], factors: LoTRFactors) -> str | tuple[str, str]:
    """The names of a layer's factors, as in LayerEntry.factors."""
    A, B = (prefixes[id(module)] for module, _ in factors.owners)
    return A if A == B else (A, B)


def computed_parts(layers: Layers, prefixes: Prefixes) -> dict[str, dict[str, str]]:
    """For each computed part, by full name: the full names of the tensors that it is computed from, by `state_of`'s keys.

    A tensor that several parts share has the same name in all of them: its name in their Cores, else its first name.
    """
    first: dict[int, str] = {}
    for cores in {id(c): c for layer in layers.values() if isinstance(c := cores_of(layer), Cores)}.values():
        first |= {id(t): f"{prefixes[id(cores)]}.{key}" for key, t in cores.state_dict(keep_vars=True).items()}
    return {
        f"{name}.{part}": {key: first.setdefault(id(t), f"{name}.{key}") for key, t in state.items()}
        for module, name, part in parts(layers, prefixes)
        if (state := state_of(module, part))
    }


def computed_tensors(layers: Layers, prefixes: Prefixes) -> dict[str, Tensor]:
    """The tensors that computed cores and factors are computed from, by the names of `computed_parts`."""
    names, found = computed_parts(layers, prefixes), {}
    for module, name, part in parts(layers, prefixes):
        found |= {names[f"{name}.{part}"][key]: t for key, t in state_of(module, part).items()}
    return found


def fitted_to_parametrizations(
    layers: Layers, prefixes: Prefixes, manifest: Manifest, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A saved adapter's tensors in the form that a model needs.

    If a part is computed in this model but was not in the saved one, derives the tensors that it is computed from. Leaves out
    tensors from which only the saved model computed a part.

    layers: empty for a plain model, which will get the cores that the adapter's configuration names.

    Raises:
        ValueError: a part that cannot have the file's value. The caller checks everything else.
    """
    names = computed_parts(layers, prefixes)
    found = _without_foreign(names, bool(layers), manifest, tensors)
    if len(found) < len(tensors):
        warnings.warn(
            "lotr_ext: the saved model had parametrizations, or cores made of fewer numbers, that this model does not have; "
            "their current values are loaded. To continue training with them, register the parametrizations, or call "
            "apply_lotr with the same core, before loading",
            stacklevel=4,
        )
    computed = [one for one in parts(layers, prefixes) if f"{one[1]}.{one[2]}" in names]
    for module, name, part in computed:
        own, value = names[f"{name}.{part}"], tensors.get(f"{name}.{part}")
        if value is not None and value.shape == getattr(module, part).shape and not any(key in tensors for key in own.values()):
            try:
                found |= {own[key]: t for key, t in state_for(module, part, value).items()}
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
    for module, name, part in computed:
        own, value = names[f"{name}.{part}"], tensors.get(f"{name}.{part}")
        state = {key: found.get(at) for key, at in own.items()}
        have = state_of(module, part)
        if value is not None and all(t is not None and t.shape == have[key].shape for key, t in state.items()):
            _check_value(f"{name}.{part}", value_with(module, part, state), value)
    return found


def _without_foreign(
    names: Mapping[str, Mapping[str, str]], adapted: bool, manifest: Manifest, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors without those from which only the saved model computed a part. names: as from `computed_parts`. adapted:
    whether the model has adapted layers already."""
    own = {key for keys in names.values() for key in keys.values()}
    will_be = not adapted and manifest.config is not None and manifest.config.core in FORMS  # by load_adapter
    kept = will_be or any(key.startswith(f"{CORES}.") for key in own)
    foreign = () if kept else (f"{CORES}.",)
    factors = {entry.tensor(part) for entry in manifest.layers.values() for part in "AB"}
    for full in (*factors, *(f"{name}.{part}" for name in manifest.layers for part in ("core", "magnitude"))):
        if full not in names:
            owner, _, part = full.rpartition(".")
            foreign += (f"{owner}.parametrizations.{part}.", f"{owner}.core_form.")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(foreign)}


def _check_value(name: str, got: Tensor, want: Tensor) -> None:
    eps = max(torch.finfo(t.dtype).eps for t in (got, want))  # the file may be in a coarser dtype, for cast=True
    want = want.to(got.device, got.dtype)
    bound = eps**0.5 * float(want.nan_to_num(0, 0, 0).abs().max())
    if got.shape == want.shape:
        same = (got == want) | (got.isnan() & want.isnan())  # also of a diverged run
        differ = float((got - want).abs().masked_fill(same, 0).max())
        if not differ <= bound:
            raise ValueError(
                f"{name}: expected values that the model's parametrization can represent, got values that differ from it by "
                f"{differ:.2g}"
            )
