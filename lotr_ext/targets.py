"""Selects the layers that `apply_lotr` adapts, and checks them before anything is changed."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .bypasses import why_not_called
from .config import HEADED_TASKS, GroupBy, LoTRConfig, place_of
from .layers import LoTRLayer, features, is_conv1d
from .sharded_tensors import is_dtensor, is_fsdp
from .transformers_experts import CHILD, expert_sizes, why_not
from .wrapped import LoTRWrapped, has_plain_weight, layer_class

__all__ = [
    "Selection",
    "Target",
    "group_of",
    "heads",
    "name_ends_with",
    "saved_modules",
    "select",
    "tied_names",
]

# The heads of transformers' models, by the last part of their names.
_HEADS = (
    *("score", "classifier", "pre_classifier", "qa_outputs", "classification_head", "logits_proj"),
    *("cls_classifier", "distillation_classifier"),
)


@dataclass(frozen=True)
class Target:
    """A layer to be adapted. names: all its names in the model; the first one is used. sizes: (in_features, out_features).
    parameter: the 3-D parameter of module whose experts are adapted; names has the name of their adapter then."""

    names: tuple[str, ...]
    module: nn.Module
    sizes: tuple[int, int]
    group: str
    parameter: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Selection:
    """targets: in the model's order. saved: modules to be trained whole, by name. left_out: the names of layers that
    target_modules matches and that are not adapted, by reason."""

    targets: list[Target]
    saved: dict[str, nn.Module]
    left_out: dict[str, list[str]]

    @property
    def groups(self) -> dict[str, list[Target]]:
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(target.group, []).append(target)
        return groups


def name_ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the name's last dotted part or parts: "query" matches "layer.0.query", not "layer.0.my_query"."""
    return f".{name}".endswith(f".{ending}")


def _matches(name: str, pattern: Sequence[str] | str | None) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name_ends_with(name, ending) for ending in pattern or ())


def _has_class(value: object, *names: str) -> bool:
    """Whether value has a class of one of these names, which may be of a package that is not imported."""
    return any(cls.__name__ in names for cls in type(value).__mro__)


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means it: also a quantised layer that is no nn.Linear, such as HQQ's."""
    known = isinstance(module, nn.Linear) or is_conv1d(module)
    return known or (features(module) is not None and callable(getattr(module, "dequantize", None)))


def select(model: nn.Module, config: LoTRConfig) -> Selection:
    """The layers that config adapts in a plain model. Raises as `apply_lotr`."""
    if not isinstance(config, LoTRConfig):
        raise TypeError(f"config: expected a LoTRConfig, got {type(config).__name__}")
    _check_model(model)
    places: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            places.setdefault(id(module), (module, []))[1].append(name)
    _check_patterns(model, config, [name for _, names in places.values() for name in names])
    saved = saved_modules(model, config)
    inside = {id(m) for top in saved.values() for m in top.modules()}
    tied, outputs = tied_names(model), output_layers(model) if config.everything else {}
    targets, left_out = [], {}
    for module, names in places.values():
        if config.everything and any(why_not(module, own) is None for own in module._parameters):
            left_out.setdefault(
                "3-D parameters of experts: name them in target_parameters", []
            ).append(names[0])
        wanted = (
            _is_linear(module)
            if config.everything
            else any(_matches(n, config.target_modules) for n in names)
        )
        sizes = features(module)
        if not wanted or (sizes is None and isinstance(config.target_modules, str)):
            continue  # a regular expression is a filter over the layers that can be adapted
        reason = why_not_adapted(model, module, names, tied)
        left = (reason or outputs.get(id(module))) if config.everything else None
        if id(module) in inside:
            left = "trained whole: modules_to_save"
        elif any(_matches(name, config.exclude_modules) for name in names):
            left = "exclude_modules"
        if left:
            left_out.setdefault(left, []).append(names[0])
            continue
        check_layer(names[0], module, sizes, reason)
        targets.append(
            Target(tuple(names), module, sizes, group_of(names[0], module, sizes, config.group_by))
        )
    targets += _expert_targets(model, config, inside)
    check_targets(targets, config)
    return Selection(targets, saved, left_out)


# ---- what cannot be adapted ------------------------------------------------------------------------------------------


def why_not_adapted(
    model: nn.Module, module: nn.Module, names: Sequence[str], tied: Mapping[int, list[str]]
) -> str | None:
    """Why an adapter in this layer would be wrong, or have no effect; None if neither is known."""
    for name in names:
        parent, _, child = name.rpartition(".")
        reason = why_not_called(model.get_submodule(parent), child)
        if reason is not None:
            return reason
    if id(module) in tied:
        return f"its weight is tied to {tied[id(module)][0]}"
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if own_forward and has_plain_weight(module) and not _returns_rows(module):
        return "its forward returns something else than x W^T"
    return None


@torch.no_grad()
def _returns_rows(module: nn.Linear) -> bool:
    """Whether a forward of its own returns [.., out_features]; routers return tuples (Llama 4). Runs it without values."""
    own = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        tensors = vars(module)[kind].items()
        vars(own)[kind] = {
            name: None if tensor is None else tensor.to("meta") for name, tensor in tensors
        }
    try:
        y = own.forward(own.weight.new_empty(1, module.in_features))
    except Exception:  # of any kind: the forward is not ours
        return False
    return isinstance(y, Tensor) and y.shape == (1, module.out_features)


def check_layer(
    name: str, module: nn.Module, sizes: tuple[int, int] | None, reason: str | None
) -> None:
    if sizes is None:
        raise TypeError(
            f"target_modules: expected nn.Linear, Conv1D or a module with in_features and out_features, got {name!r} "
            f"({type(module).__name__})"
        )
    if reason is not None:
        raise ValueError(
            f"target_modules: expected layers in which an adapter has an effect, got {name!r}: {reason}"
        )
    if is_dtensor(getattr(module, "weight", None)):
        raise TypeError(
            f"target_modules: expected plain weights, got a DTensor in {name!r}. Tensor parallel layers are not supported: "
            f"adapt the whole model, or leave this layer out."
        )


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """For each module that shares a parameter's memory with another one, by id(module): the other owners' parameter names."""
    owners: dict[object, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            plain = type(p) is nn.Parameter and not p.is_meta and p.numel() > 0
            key = (p.device, p.data_ptr()) if plain else id(p)
            owners.setdefault(key, []).append((module, f"{name}.{own}" if name else own))
    tied: dict[int, list[str]] = {}
    for shared in owners.values():
        for module, _ in shared:
            if others := [name for other, name in shared if other is not module]:
                tied.setdefault(id(module), []).extend(others)
    return tied


# ---- heads and modules to save ---------------------------------------------------------------------------------------


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The known heads of the transformers models in a model, by name."""
    modules, found = dict(model.named_modules()), {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if (
            own in _HEADS
            and hasattr(modules[parent], "get_output_embeddings")
            and next(module.parameters(), None) is not None
        ):
            found[name] = module
    return found


def output_layers(model: nn.Module) -> dict[int, str]:
    """The layers that "all-linear" leaves out, as in PEFT, by id(module), each with a description: transformers' and timm's."""
    getters = ("get_output_embeddings", "get_classifier")
    outputs = [getattr(m, get)() for m in model.modules() for get in getters if hasattr(m, get)]
    tops = {
        top: "the output layer: name it to adapt it"
        for top in outputs
        if isinstance(top, nn.Module)
    }
    tops |= dict.fromkeys(
        heads(model).values(), "a head: name it to adapt it, or train it whole (modules_to_save)"
    )
    return {id(m): what for top, what in tops.items() for m in top.modules()}


def with_head(model: nn.Module, config: LoTRConfig) -> LoTRConfig:
    """config with the model's heads in modules_to_save, if its task_type has one. Raises ValueError if no head is known."""
    if getattr(config, "task_type", None) not in HEADED_TASKS or not isinstance(model, nn.Module):
        return config
    saved, found = config.modules_to_save or (), heads(model)
    if not found and not saved:
        raise ValueError(
            f"task_type: expected a model with a head for {config.task_type!r}, got {type(model).__name__} without one of the "
            f"known names ({', '.join(_HEADS)}). Name its head in modules_to_save."
        )
    new = [name for name in found if not _matches(name, saved)]
    return replace(config, modules_to_save=(*saved, *new)) if new else config


def saved_modules(model: nn.Module, config: LoTRConfig) -> dict[str, nn.Module]:
    """The modules_to_save of a model by name. Raises ValueError for parameters that cannot be trained."""
    saved: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # An adapted model registers lotr_factors and the like (adapted.py), which have numbers as names.
        if any(part.startswith("lotr_") for part in name.split(".")):
            continue
        if not _matches(name, config.modules_to_save):
            continue
        for own, p in module.named_parameters():
            if not (type(p) is nn.Parameter or is_dtensor(p)) or p.dtype.itemsize < 2:
                raise ValueError(
                    f"modules_to_save: expected parameters that can be trained, got {name}.{own}, quantised"
                )
        saved[name] = module
    return saved


# ---- experts ---------------------------------------------------------------------------------------------------------


def _expert_targets(model: nn.Module, config: LoTRConfig, inside_saved: set[int]) -> list[Target]:
    """The experts' parameters that config adapts, matched as in PEFT: by whole dotted parts at the name's end."""
    targets = []
    for name, module in model.named_modules():
        if id(module) in inside_saved or _matches(name, config.exclude_modules):
            continue
        for own in module._parameters:
            full = f"{name}.{own}" if name else own
            if not _matches(full, config.target_parameters):
                continue
            if (got := why_not(module, own)) is not None:
                raise TypeError(
                    f"target_parameters: expected the 3-D weights of a mixture's experts, got {full!r}, {got}"
                )
            _, k, n = expert_sizes(module, own)
            at = f"{name}.{CHILD}.{own}" if name else f"{CHILD}.{own}"
            targets.append(
                Target((at,), module, (k, n), group_of(at, module, (k, n), config.group_by), own)
            )
    return targets


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise TypeError(
            f"model: expected a model with linear layers inside, got one {type(model).__name__}. Adapt it with "
            f"LoTRLinear.from_linear(linear, LoTRFactors(in_features, out_features, rank))."
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, LoTRLayer):
            raise RuntimeError(
                f"model: expected one with no adapter, got a LoTR one at {name!r}. Call unload(model) first."
            )
        if not name and _has_class(
            module, "ScriptModule", "DistributedDataParallel", "OptimizedModule"
        ):
            raise TypeError(
                f"model: expected the plain model, before it is wrapped or compiled, got {kind}"
            )
        if is_fsdp(module):
            raise TypeError(
                f"model: expected whole tensors, got {name or kind!r} sharded by FSDP. Call apply_lotr before it."
            )
        if _has_class(module, "BaseTunerLayer"):
            raise RuntimeError(
                f"model: expected one without PEFT's adapters, got {kind} at {name!r}, which would be frozen. Merge it first "
                f"(merge_and_unload), or use LoTR as a PEFT method (lotr_ext.peft)."
            )


def _check_patterns(model: nn.Module, config: LoTRConfig, modules: Sequence[str]) -> None:
    """Raises ValueError for a name that matches nothing, such as a misspelt one. modules: the names of the model's modules."""
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        pattern = getattr(config, field)
        if field == "target_modules" and pattern == "all-linear":
            continue
        names = (
            [name for name, _ in model.named_parameters()]
            if field == "target_parameters"
            else modules
        )
        for one in (pattern,) if isinstance(pattern, str) else pattern or ():
            if any(_matches(name, one if isinstance(pattern, str) else (one,)) for name in names):
                continue
            hint = _hint(model, one, names)
            if isinstance(pattern, str) and any(name_ends_with(name, one) for name in names):
                hint = f". A string is a regular expression for the full name: to match name endings pass [{one!r}]."
            raise ValueError(
                f"{field}: expected names in the model, got {one!r}, which matches none{hint}"
            )


def _hint(model: nn.Module, wanted: str, names: Sequence[str]) -> str:
    """For a name that matches none of names: what may be meant, as the end of a sentence."""
    deep = [
        name
        for name, p in model.named_parameters()
        if p.dim() == 3 and name_ends_with(name, wanted)
    ]
    if deep:
        return f". {deep[0]!r} is a 3-D parameter: name it in target_parameters."
    parts = wanted.count(".") + 1
    endings = {".".join(name.split(".")[-parts:]) for name in names}
    if near := difflib.get_close_matches(wanted, sorted(endings)):
        return f". The closest: {', '.join(map(repr, near))}."
    linear = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    )
    return f". The linear layers' names end with {', '.join(linear[:20])}." if linear else ""


def check_targets(targets: list[Target], config: LoTRConfig) -> None:
    if not targets:
        raise ValueError(
            f"target_modules: expected to match a linear layer, got {config.target_modules!r}, which matches none outside of "
            f"exclude_modules and modules_to_save"
        )
    first: dict[str, Target] = {}
    for t in targets:
        want = first.setdefault(t.group, t)
        if t.sizes != want.sizes:
            raise ValueError(
                f"group_by: expected layers of one shape in group {t.group!r}, got {want.name!r} {want.sizes} and {t.name!r} "
                f"{t.sizes}"
            )
        if config.init == "svd" and layer_class(t.module) is LoTRWrapped:
            kind = type(t.module).__name__
            raise ValueError(
                f'init: expected weights that "svd" can read and write, got {t.name!r} ({kind})'
            )


def group_of(name: str, module: nn.Module, sizes: tuple[int, int], by: GroupBy) -> str:
    """The group of a layer of sizes (in_features, out_features)."""
    shape = f"{sizes[0]}x{sizes[1]}"
    if by == "layer":
        return name.replace(".", "_")
    if isinstance(by, str):
        part = {"name": name.rpartition(".")[2], "block": place_of(name)[0].replace(".", "_")}.get(
            by, ""
        )
        return f"{part}_{shape}" if part else shape
    if isinstance(by, dict) and name not in by:
        raise ValueError(
            f"group_by: expected a group for each adapted layer, got none for {name!r}"
        )
    group = by[name] if isinstance(by, dict) else by(name, module)
    if not isinstance(group, str):
        raise TypeError(
            f"group_by: expected a string for {name!r}, got {type(group).__name__} {group!r}"
        )
    return group
