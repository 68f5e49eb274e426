"""Selects the layers that `apply_lotr` adapts, and checks them before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..autograd.tensor_parallel import cut_of, experts_cut, is_dtensor
from ..layers.layer import LoTRLayer
from ..layers.magnitude import no_magnitude
from ..layers.own_forward import has_own_forward
from ..layers.packed import expert_parameters, packed
from ..layers.parallel_styles import tp_style
from ..layers.quantized import has_plain_weight, is_conv1d, is_plain
from ..layers.sharded import holds_parts, is_tensor_parallel, whole_shape
from .config import LoTRConfig
from .effect import effect_of, warn_of_doubtful, warn_of_skipped
from .experts import CHILD, adapted_in, expert_sizes, why_not
from .heads import output_layers
from .names import closest, group_name, name_ends_with, tied_names
from .readers import How

__all__ = ["Selection", "Target", "can_be_child", "checked_group", "features", "left_out", "name_ends_with", "select"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Target:
    """A layer to be adapted. names: all its names in the model; the first one is used. wrap: keep the module and call it.
    parameter: the parameter of module if experts are adapted; names are then those of the adapters."""

    names: tuple[str, ...]
    module: nn.Module
    in_features: int
    out_features: int
    group: str
    wrap: bool
    parameter: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Selection:
    """targets in the model's order; saved: modules to be trained whole, by name."""

    targets: tuple[Target, ...]
    saved: dict[str, nn.Module]

    @property
    def groups(self) -> dict[str, list[Target]]:
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(target.group, []).append(target)
        return groups


def can_be_child(name: str, of: type[nn.ModuleDict] = nn.ModuleDict) -> bool:
    """Whether a module dictionary can have a child of that name: no dots, and none of its own attributes."""
    return bool(name) and "." not in name and not hasattr(of(), name)


def _matches(name: str, pattern: Sequence[str] | str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name_ends_with(name, ending) for ending in pattern)


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means it: also a quantised layer that is no nn.Linear, such as HQQ's."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return features(module) is not None and callable(getattr(module, "dequantize", None))


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features), or None for a module that cannot be adapted."""
    if is_conv1d(module):
        return tuple(whole_shape(module.weight))
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return found if all(isinstance(n, int) for n in found) else None


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise TypeError(f"model: expected the plain model, before it is wrapped or compiled, got {type(model).__name__}")
    if holds_parts(model, zero=False) and not is_tensor_parallel(model):
        raise TypeError(f"model: expected whole tensors, got {type(model).__name__} held in parts by FSDP; adapt it first")
    adapted = next((name for name, m in model.named_modules() if isinstance(m, LoTRLayer)), None)
    if adapted is not None or hasattr(model, "lotr_factors"):
        raise RuntimeError(
            f"model: expected one with no adapter, got a LoTR one at {adapted or 'lotr_factors'!r}; unload it first"
        )


def _saved(model: nn.Module, config: LoTRConfig) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for ending in config.modules_to_save or ():
        found = {name: m for name, m in model.named_modules() if name and name_ends_with(name, ending)}
        if not found:
            near = closest(ending, (name for name, _ in model.named_modules()))
            raise ValueError(f"modules_to_save: expected names of modules, got {ending!r}, which matches none{near}")
        for name, module in found.items():
            if next(module.parameters(), None) is None:
                raise ValueError(f"modules_to_save: expected modules with parameters, got {name!r} ({type(module).__name__})")
            one_byte = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
            quantised = next((n for n, p in module.named_parameters() if not is_plain(p) or p.dtype in one_byte), None)
            if quantised is not None:
                raise ValueError(f"modules_to_save: expected parameters that can be trained, got {name}.{quantised}, quantised")
        saved.update(found)
    return {name: m for name, m in model.named_modules() if name in saved}  # in the order in which `saved_modules` finds them


def select(model: nn.Module, config: LoTRConfig) -> Selection:
    """The layers of `model` that `config` adapts, with their groups, and the modules to save. Changes nothing.

    Raises TypeError, ValueError or RuntimeError as `apply_lotr` documents.
    """
    _check_model(model)
    if not isinstance(config, LoTRConfig):
        raise TypeError(f"config: expected LoTRConfig, got {type(config).__name__}")
    saved = _saved(model, config)
    inside_saved = {id(m) for top in saved.values() for m in top.modules()}
    places: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            places.setdefault(id(module), (module, []))[1].append(name)
    everything = wants_everything(config)
    _check_endings(config, places.values())

    tied, skipped, doubtful, targets = tied_names(model), {}, [], []
    outputs = output_layers(model) if everything else {}
    for module, names in places.values():
        if id(module) in inside_saved or not _is_wanted(module, names, config):
            continue
        sizes = features(module)
        if sizes is None and isinstance(config.target_modules, str):
            continue  # a regular expression is a filter over the layers that can be adapted
        _check_sizes(names[0], module, sizes)
        _check_cut(names[0], module)
        effect = effect_of(model, module, names)
        if everything and effect.none is not None:
            skipped[names[0]] = effect.none
            continue
        if everything and (id(module) in tied or id(module) in outputs):
            continue
        effect.check(names[0], module, tied.get(id(module), []))
        if (reader := effect.readers.get(How.ALSO)) is not None:
            doubtful.append((names[0], reader))
        group = _group(names[0], module, sizes, config)
        targets.append(Target(tuple(names), module, *sizes, group, needs_wrap(module)))
    warn_of_skipped(skipped)
    warn_of_doubtful(doubtful)
    targets += parameter_targets(model, config, inside_saved)
    _check_targets(targets, config)
    return Selection(tuple(targets), saved)


def _is_wanted(module: nn.Module, names: list[str], config: LoTRConfig) -> bool:
    """Whether config includes a module and does not exclude it. names: all its names in the model."""
    if config.exclude_modules and any(_matches(name, config.exclude_modules) for name in names):
        return False
    return _is_linear(module) if wants_everything(config) else any(_matches(n, config.target_modules or ()) for n in names)


def _check_sizes(name: str, module: nn.Module, sizes: tuple[int, int] | None) -> None:
    if sizes is None:
        raise TypeError(
            f"target_modules: expected nn.Linear, Conv1D or a module with in_features and out_features, got {name!r} "
            f"({type(module).__name__})"
        )
    if min(sizes) < 1:
        raise ValueError(f"target_modules: expected layers with known sizes, got {name!r} with {sizes}; run it once first")


def _check_cut(name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if not is_dtensor(weight) and tp_style(module) is None:
        return
    if not isinstance(module, nn.Linear) or needs_wrap(module) or (is_dtensor(weight) and cut_of(weight) is None):
        raise ValueError(
            f"target_modules: expected tensor parallel layers cut by rows or by columns over one axis of their mesh, got "
            f"{name!r} ({type(module).__name__}) with {tuple(getattr(weight, 'placements', ()))}; exclude it"
        )


def _check_experts_cut(full: str, module: nn.Module, own: str) -> None:
    parts = {name: t for name, t in module.named_parameters(recurse=False) if name.startswith(own) and is_dtensor(t)}
    if parts and packed(module, own, module.is_transposed) is not None:
        raise ValueError(f"target_parameters: expected dense experts in parts, got {full!r}, quantised; leave it out")
    if own in parts and experts_cut(parts[own], module.is_transposed) is None:
        raise ValueError(
            "target_parameters: expected experts cut by experts, rows or columns over one axis of their mesh, got "
            f"{full!r} with {tuple(parts[own].placements)}; leave it out"
        )


def wants_everything(config: LoTRConfig) -> bool:
    """Whether config selects all linear layers."""
    return config.target_modules == "all-linear" or (config.target_modules is None and config.target_parameters is None)


def parameter_targets(model: nn.Module, config: LoTRConfig, inside_saved: set[int]) -> list[Target]:
    """The experts' parameters that config adapts, matched as in PEFT: by the full name, or by whole dotted parts at its end."""
    targets, unused = [], set(config.target_parameters or ())
    for name, module in model.named_modules() if unused else ():
        if id(module) in inside_saved or (config.exclude_modules and _matches(name, config.exclude_modules)):
            continue
        for own in expert_parameters(module):
            full = f"{name}.{own}" if name else own
            found = [ending for ending in config.target_parameters if name_ends_with(full, ending)]
            if not found:
                continue
            unused.difference_update(found)
            if (got := why_not(module, own, name)) is not None:
                raise TypeError(
                    f"target_parameters: expected the 3-D weights of experts of a transformers mixture, got {full!r}, {got}"
                )
            _check_experts_cut(full, module, own)
            _, k, n = expert_sizes(module, own)
            at = f"{name}.{CHILD}.{own}" if name else f"{CHILD}.{own}"
            targets.append(Target((at,), module, k, n, _group(at, module, (k, n), config), False, own))
    if unused:
        near = closest(min(unused), (name for name, _ in model.named_parameters()))
        raise ValueError(f"target_parameters: expected names of parameters, got {min(unused)!r}, which matches none{near}")
    return targets


def left_out(model: nn.Module, config: LoTRConfig) -> dict[str, str]:
    """The layers of an adapted model that config's "all-linear" or regular expression matches but that have no adapter:
    {name: reason}."""
    everything = wants_everything(config)
    if not everything and not isinstance(config.target_modules, str):
        return {}  # each named layer was adapted, or caused an error
    tied, outputs, found = tied_names(model), output_layers(model) if everything else {}, {}
    saved = {id(m) for top in _saved(model, config).values() for m in top.modules()}
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, LoTRLayer))
    for name, module in model.named_modules():
        if not name or isinstance(module, LoTRLayer) or name.startswith((*inside, "lotr_factors", "lotr_parked", "lotr_tasks")):
            continue
        if not everything and not _matches(name, config.target_modules):
            continue
        if id(module) in saved:
            reason = "trained whole (modules_to_save)" if features(module) else None
        elif config.exclude_modules and _matches(name, config.exclude_modules):
            reason = "exclude_modules" if features(module) else None
        elif _is_linear(module):
            if (reason := effect_of(model, module, [name]).none) is None:
                reason = f"its weight is tied to {tied[id(module)][0]}" if id(module) in tied else outputs.get(id(module))
        else:
            reason = _why_not_linear(module, everything)
        if reason is not None:
            found[name] = reason
    return found


def _why_not_linear(module: nn.Module, everything: bool) -> str | None:
    """Why a module with weights that is no linear layer was not adapted; None if no reason needs to be given."""
    if isinstance(module, _ConvNd):
        return None
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 2 and not own.startswith(tuple(adapted_in(module))):  # packed experts have several tensors
            return f"{own} is a {parameter.dim()}-D parameter, not a linear layer; target_parameters takes experts"
    return f"a {type(module).__name__}: name it to adapt it" if everything and features(module) is not None else None


def _check_endings(config: LoTRConfig, places: Iterable[tuple[nn.Module, list[str]]]) -> None:
    """Raises ValueError for an ending that matches nothing, such as a misspelt one."""
    names = [name for _, several in places for name in several]
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if field == "target_modules" and pattern == "all-linear":
            continue
        for one in (pattern,) if isinstance(pattern, str) else pattern or ():
            if not any(_matches(name, one if isinstance(pattern, str) else (one,)) for name in names):
                hint = closest(one, names)
                if isinstance(pattern, str) and any(name_ends_with(name, one) for name in names):
                    hint = f"; a string is a regular expression for the full name: to match name endings pass [{one!r}]"
                raise ValueError(f"{field}: expected names of modules, got {one!r}, which matches none{hint}")


def _check_targets(targets: list[Target], config: LoTRConfig) -> None:
    if not targets:
        raise ValueError(
            f"target_modules: expected to match a linear layer, got {config.target_modules!r}, which matches none outside of "
            "exclude_modules and modules_to_save"
        )
    if isinstance(config.group_by, dict):
        unknown = sorted(set(config.group_by) - {t.name for t in targets})
        if unknown:
            raise ValueError(f"group_by: expected names of adapted layers, got {', '.join(unknown)}")
    first: dict[str, Target] = {}
    for t in targets:
        want = first.setdefault(t.group, t)
        if (t.in_features, t.out_features) != (want.in_features, want.out_features):
            raise ValueError(
                f"group_by: expected layers of one shape in group {t.group!r}, got {want.name!r} "
                f"({want.in_features}, {want.out_features}) and {t.name!r} ({t.in_features}, {t.out_features})"
            )
    if config.init == "svd":
        for t in targets:
            if t.wrap or t.parameter or not _is_linear(t.module) or not t.module.weight.is_floating_point():
                kind = type(t.module).__name__
                raise ValueError(f'init: expected weights that "svd" can read and write, got {t.name!r} ({kind})')
            if t.module.weight.is_meta:
                raise ValueError(f'init: expected weights with values for "svd", got {t.name!r} on the meta device')
    for t in targets if config.magnitude else ():
        if (why := no_magnitude(t.module)) is not None:
            raise ValueError(f"magnitude: expected layers whose rows can be measured, got {t.name!r}, {why}; exclude it")


def _group(name: str, module: nn.Module, sizes: tuple[int, int], config: LoTRConfig) -> str:
    if isinstance(config.group_by, str):
        return group_name(name, sizes, config.group_by)
    if isinstance(config.group_by, dict):
        if name not in config.group_by:
            raise ValueError(f"group_by: expected a group for each adapted layer, got none for {name!r}")
        group = config.group_by[name]
    else:
        group = config.group_by(name, module)
    return checked_group(name, group)


def checked_group(name: str, group: object) -> str:
    """Returns the group of the layer `name`. Raises TypeError or ValueError unless it can be the name of a module."""
    if not isinstance(group, str):
        raise TypeError(f"group_by: expected a string for {name!r}, got {type(group).__name__} {group!r}")
    if not can_be_child(group):
        raise ValueError(f"group_by: expected a name that can be a module's, without dots, for {name!r}, got {group!r}")
    return group


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, which a replacement would not have."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def needs_wrap(module: nn.Module) -> bool:
    """Whether replacing the module would lose hooks, parametrizations, a forward of its own or a quantised weight."""
    quantized = _is_linear(module) and not has_plain_weight(module)
    hooked = has_hooks(module) and not is_dtensor(getattr(module, "weight", None))  # tensor parallelism's hooks are kept
    replaced = "forward" in vars(module) and tp_style(module) is None
    return hooked or has_own_forward(module) or quantized or replaced or parametrize.is_parametrized(module)
