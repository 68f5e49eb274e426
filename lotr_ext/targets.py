"""Selects the layers that `apply_lotr` adapts, and checks them before anything is changed.

    named_modules  ->  targets (in groups that share A and B), modules_to_save, what is left out

The sections below come in the order in which `select` calls them.

Not here: how the layers are adapted (model.py).
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .bypasses import call_obstacle
from .config import HEADED_TASKS, GroupBy, LoTRConfig, place_of
from .layers import LoTRLayer, features, is_conv1d
from .sharded_tensors import imported_class, is_dtensor, is_fsdp
from .transformers_experts import CHILD, expert_obstacle, expert_sizes
from .wrapped import has_plain_weight

# The heads of transformers' models, by the last part of their names.
_HEADS = (
    "score",
    "classifier",
    "pre_classifier",
    "qa_outputs",
    "classification_head",
    "logits_proj",
    "cls_classifier",
    "distillation_classifier",
)
# The reasons for which "all-linear" leaves out experts and output layers.
_UNNAMED_EXPERTS = "3-D parameters of experts: name them in target_parameters"
_OUTPUT_LAYER = (
    "the output layer or a head: adapt it with target_modules, or train it with modules_to_save"
)


@dataclass(frozen=True)
class Target:
    """A layer to be adapted.

    Attributes:
        names: All its names in the model. The first one identifies it (`name`).
        module: The layer, or a mixture's experts module.
        sizes: (in_features, out_features).
        group: The layers of one group share A and B.
        parameter: For experts, the adapted 3-D parameter of module. names then has the name of
            their adapter.
    """

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
    """What a configuration selects in a model.

    Attributes:
        config: The configuration, with the model's heads in modules_to_save if its task_type needs
            a head.
        targets: The layers to be adapted, in the model's order.
        saved: The modules that are fully trained, by name.
        groups: The targets by group.
        left_out: The names of the layers that target_modules matches and that are not adapted, by
            reason.
    """

    config: LoTRConfig
    targets: list[Target]
    saved: dict[str, nn.Module]
    groups: dict[str, list[Target]]
    left_out: dict[str, list[str]]


def select(model: nn.Module, config: LoTRConfig) -> Selection:
    """Returns the layers that config adapts in a plain model. Errors as for `apply_lotr`."""
    if not isinstance(config, LoTRConfig):
        raise TypeError(
            f"config: expected a LoTRConfig, got {type(config).__name__}. A configuration of PEFT "
            f"is for get_peft_model."
        )
    _check_model(model)
    config = _with_heads(model, config)
    _check_patterns(model, config)
    saved = saved_modules(model, config)
    # These train fully, so an adapter inside them would have no purpose.
    inside_saved = {child for module in saved.values() for child in module.modules()}
    targets, left_out = _linear_targets(model, config, inside_saved)
    targets += _expert_targets(model, config, inside_saved)
    # "all-linear" selects no parameters, but whoever adapts a mixture should learn of its experts.
    if config.adapts_all_linear and not config.target_parameters:
        left_out |= _unnamed_experts(model)
    if not targets:
        reasons = [f"{names[0]!r}: {reason}" for reason, names in left_out.items()]
        raise ValueError(
            f"target_modules: expected linear layers that can be adapted (nn.Linear, transformers' "
            f"Conv1D, or modules with in_features and out_features), got none for "
            f"{config.target_modules or 'all-linear'!r} in {type(model).__name__}. Left out: "
            f"{'; '.join(reasons) or 'none'}."
        )
    return Selection(config, targets, saved, in_groups(targets), left_out)


# ---- checks --------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    """Checks that a model is plain: not wrapped, compiled, sharded or adapted."""
    # DDP reduces the gradients of those parameters that the model had when it was wrapped.
    # `_orig_mod` is torch.compile's.
    if isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model: expected the plain model, before it is wrapped or compiled, got "
            f"{type(model).__name__}"
        )
    for name, module in model.named_modules():
        class_name = type(module).__name__
        # Adapting freezes the model, and would silently freeze the adapter that it has.
        if isinstance(module, LoTRLayer):
            raise RuntimeError(
                f"model: expected one with no adapter, got a LoTR one at {name!r}. Call "
                f"unload(model) first."
            )
        # FSDP shards what it finds when it wraps a module, and moves the weights.
        if is_fsdp(module):
            raise TypeError(
                f"model: expected full tensors, got {name or class_name!r} sharded by FSDP. Call "
                f"apply_lotr before it."
            )
        if isinstance(module, imported_class("peft.tuners.tuners_utils", "BaseTunerLayer")):
            raise RuntimeError(
                f"model: expected one without PEFT's adapters, got {class_name} at {name!r}, which "
                f"would be frozen. Merge it first (merge_and_unload), or use LoTR as a PEFT method "
                f"(lotr_ext.peft)."
            )


def _check_patterns(model: nn.Module, config: LoTRConfig) -> None:
    """Checks that each name of a configuration matches something."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    # What the names in each field may match.
    names_by_field = {
        "target_modules": modules,
        "exclude_modules": modules,
        "modules_to_save": modules,
        "target_parameters": [name for name, _ in model.named_parameters()],
    }
    for field, names in names_by_field.items():
        value = getattr(config, field)
        if field == "target_modules" and config.adapts_all_linear:
            continue
        # A string is one pattern. Each ending of a list is a pattern by itself, so that a
        # misspelled name among others is noticed.
        patterns = [value] if isinstance(value, str) else [[ending] for ending in value or ()]
        for pattern in patterns:
            if not any(name_matches(name, pattern) for name in names):
                raise ValueError(
                    f"{field}: expected names in the model, got {pattern!r}, which matches none. A "
                    f"list has name endings in full dotted parts, a string is a regular expression "
                    f"for the full name, and experts are named in target_parameters."
                )


def name_matches(name: str, pattern: Iterable[str] | str | None) -> bool:
    """Whether name matches a regular expression, or ends with one of a list of names.

    "query" in a list matches "layer.0.query", not "layer.0.my_query".
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(f".{name}".endswith(f".{ending}") for ending in pattern or ())


# ---- heads and modules to save -------------------------------------------------------------------


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the known heads of the transformers models in a model, by name."""
    modules = dict(model.named_modules())
    known_heads = {}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        # Other models may use these names for other layers.
        is_in_transformers_model = hasattr(modules[parent], "get_output_embeddings")
        has_parameters = next(module.parameters(), None) is not None
        if child in _HEADS and is_in_transformers_model and has_parameters:
            known_heads[name] = module
    return known_heads


def output_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the output layers and heads of transformers' and timm's models, each with a reason.

    "all-linear" leaves them out, as PEFT does.
    """
    outputs = list(heads(model).values())
    for module in model.modules():
        for getter in ("get_output_embeddings", "get_classifier"):
            if hasattr(module, getter):
                output = getattr(module, getter)()
                # None without one, and a tuple of two for timm's distilled models.
                candidates = output if isinstance(output, tuple) else (output,)
                outputs += [m for m in candidates if isinstance(m, nn.Module)]
    # A classifier may be a block of several layers.
    return {child: _OUTPUT_LAYER for output in outputs for child in output.modules()}


def _with_heads(model: nn.Module, config: LoTRConfig) -> LoTRConfig:
    """Returns config with the model's heads in modules_to_save, if its task_type needs a head.

    Raises:
        ValueError: If no head is known.
    """
    if config.task_type not in HEADED_TASKS:
        return config
    saved = config.modules_to_save or ()
    known_heads = heads(model)
    if not known_heads and not saved:
        raise ValueError(
            f"task_type: expected a model with a head for {config.task_type!r}, got "
            f"{type(model).__name__} without one of the known names ({', '.join(_HEADS)}). Name "
            f"its head in modules_to_save."
        )
    missing = [name for name in known_heads if not name_matches(name, saved)]
    return replace(config, modules_to_save=(*saved, *missing))


def saved_modules(model: nn.Module, config: LoTRConfig) -> dict[str, nn.Module]:
    """Returns the modules_to_save of a model by name.

    Raises:
        ValueError: If a parameter of one cannot be trained.
    """
    saved: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # A model that is saved is adapted, so it also has lotr_factors and the like. Their
        # children are named by numbers, which a name in modules_to_save may match.
        is_of_adapter = any(part.startswith("lotr_") for part in name.split("."))
        if is_of_adapter or not name_matches(name, config.modules_to_save):
            continue
        for inner_name, p in module.named_parameters():
            is_plain = type(p) is nn.Parameter or is_dtensor(p)
            # One byte per element: int8, uint8 and float8 are formats of quantized weights.
            if not is_plain or p.dtype.itemsize < 2:
                raise ValueError(
                    f"modules_to_save: expected parameters that can be trained, got "
                    f"{name}.{inner_name}, quantized"
                )
        saved[name] = module
    return saved


def saved_in(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules_to_save of an adapted model, none for one that was built by hand."""
    config = getattr(model, "lotr_config", None)
    return {} if config is None else saved_modules(model, config)


# ---- linear layers -------------------------------------------------------------------------------


def _linear_targets(
    model: nn.Module, config: LoTRConfig, inside_saved: set[nn.Module]
) -> tuple[list[Target], dict[str, list[str]]]:
    """Returns the linear layers that config adapts, and those that it leaves out.

    Args:
        model: The model.
        config: The configuration.
        inside_saved: The modules in modules_to_save.

    Returns:
        The targets, and the names of the other layers by reason, as `Selection.left_out`.
    """
    tied = tied_names(model)
    outputs = output_layers(model) if config.adapts_all_linear else {}
    targets = []
    left_out: dict[str, list[str]] = {}
    for module, names in names_of_modules(model).items():
        if not _is_selected(module, names, config):
            continue
        obstacle = linear_obstacle(model, module, names, tied)
        reason = None
        if module in inside_saved:
            reason = "fully trained: modules_to_save"
        elif any(name_matches(name, config.exclude_modules) for name in names):
            reason = "exclude_modules"
        elif config.adapts_all_linear:
            # If the user names a layer with an obstacle, `linear_target` raises instead.
            reason = obstacle or outputs.get(module)
        if reason is None:
            targets.append(linear_target(names, module, obstacle, config.group_by))
        else:
            left_out.setdefault(reason, []).append(names[0])
    return targets, left_out


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Returns all names of each module inside the model."""
    names_of: dict[nn.Module, list[str]] = {}
    # A layer in several places has to be replaced in all of them.
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names_of.setdefault(module, []).append(name)
    return names_of


def _is_selected(module: nn.Module, names: Sequence[str], config: LoTRConfig) -> bool:
    """Whether target_modules selects a module."""
    has_sizes = features(module) is not None
    if config.adapts_all_linear:
        # Also quantized layers that are not an nn.Linear, such as HQQ's.
        is_quantized = has_sizes and callable(getattr(module, "dequantize", None))
        return isinstance(module, nn.Linear) or is_conv1d(module) or is_quantized
    # A regular expression selects only layers that can be adapted. A list selects what it names,
    # and `linear_target` refuses a module without sizes.
    is_candidate = has_sizes or not isinstance(config.target_modules, str)
    return is_candidate and any(name_matches(name, config.target_modules) for name in names)


def linear_obstacle(
    model: nn.Module, module: nn.Module, names: Sequence[str], tied: Mapping[nn.Module, list[str]]
) -> str | None:
    """Returns why an adapter of a layer would be wrong or without effect, None if it is neither.

    Args:
        model: The model.
        module: The layer.
        names: All its names in the model.
        tied: From `tied_names`.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        obstacle = call_obstacle(model.get_submodule(parent), child)
        if obstacle is not None:
            return obstacle
    if module in tied:
        return f"its weight is tied to {tied[module][0]}"
    # A subclass of nn.Linear may compute something else, to which no adapter can be added.
    overrides_forward = (
        isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    )
    if overrides_forward and has_plain_weight(module) and not _returns_rows(module):
        return "its forward does not return a tensor [.., out_features]"
    return None


@torch.no_grad()
def _returns_rows(module: nn.Linear) -> bool:
    """Whether a subclass's forward returns [.., out_features]. Runs it on the meta device.

    Routers of mixtures return tuples (Llama 4).
    """
    try:
        # Shallow copies of the module and its children, with dictionaries that `.to` may change.
        copies = {original: copy.copy(original) for original in module.modules()}
        for original, copied in copies.items():
            vars(copied).update(
                _parameters=dict(original._parameters),
                _buffers=dict(original._buffers),
                _modules={name: copies.get(child) for name, child in original._modules.items()},
            )
        on_meta = copies[module].to("meta")
        y = on_meta.forward(on_meta.weight.new_empty(1, module.in_features))
    except Exception:  # of any kind: it is not our forward
        return False
    return isinstance(y, Tensor) and y.shape == (1, module.out_features)


def linear_target(
    names: Sequence[str], module: nn.Module, obstacle: str | None, group_by: GroupBy
) -> Target:
    """Returns the target for a linear layer.

    Args:
        names: All its names in the model.
        module: The layer.
        obstacle: From `linear_obstacle`.
        group_by: As in the configuration.

    Raises:
        TypeError, ValueError: If the layer cannot be adapted.
    """
    name = names[0]
    sizes = features(module)
    if sizes is None:
        raise TypeError(
            f"target_modules: expected nn.Linear, Conv1D or a module with in_features and "
            f"out_features, got {name!r} ({type(module).__name__})"
        )
    if obstacle is not None:
        raise ValueError(
            f"target_modules: expected layers in which an adapter has an effect, got {name!r}: "
            f"{obstacle}"
        )
    if is_dtensor(getattr(module, "weight", None)):
        raise TypeError(
            f"target_modules: expected full (unsharded) weights, got a DTensor in {name!r}. Tensor "
            f"parallel layers are not supported: adapt the full model, or leave this layer out."
        )
    return Target(tuple(names), module, sizes, group_of(name, module, sizes, group_by))


def tied_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Returns, by module, the names of other modules' parameters that share its memory."""
    owners: dict[object, list[tuple[nn.Module, str]]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        key: object = id(p)
        if type(p) is nn.Parameter and not p.is_meta and p.numel() > 0:
            # Two parameters over one memory are tied as well. Without memory, the address is 0.
            key = (p.device, p.data_ptr())
        module = model.get_submodule(name.rpartition(".")[0])
        owners.setdefault(key, []).append((module, name))
    tied: dict[nn.Module, list[str]] = {}
    for sharing in owners.values():
        for module, _ in sharing:
            others = [name for other, name in sharing if other is not module]
            if others:
                tied.setdefault(module, []).extend(others)
    return tied


# ---- experts -------------------------------------------------------------------------------------


def _expert_targets(
    model: nn.Module, config: LoTRConfig, inside_saved: set[nn.Module]
) -> list[Target]:
    """Returns the parameters of experts that config adapts.

    Their names are matched as in PEFT, by full dotted parts at the end.
    """
    targets = []
    for name, module in model.named_modules():
        if module in inside_saved or name_matches(name, config.exclude_modules):
            continue
        for full_name, _ in module.named_parameters(name, recurse=False):
            if not name_matches(full_name, config.target_parameters):
                continue
            parameter = full_name.rpartition(".")[2]
            obstacle = expert_obstacle(module, parameter)
            if obstacle is not None:
                raise TypeError(
                    f"target_parameters: expected the 3-D weights of a mixture's experts, got "
                    f"{full_name!r}, {obstacle}"
                )
            # (in_features, out_features), without the number of experts.
            sizes = expert_sizes(module, parameter)[1:]
            # Where `adapt_parameter` will put the adapter.
            layer_name = f"{full_name.removesuffix(parameter)}{CHILD}.{parameter}"
            group = group_of(layer_name, module, sizes, config.group_by)
            targets.append(Target((layer_name,), module, sizes, group, parameter))
    return targets


def _unnamed_experts(model: nn.Module) -> dict[str, list[str]]:
    """Returns the modules with experts that could be adapted, as `Selection.left_out`."""
    names = [
        name
        for name, module in model.named_modules()
        if any(expert_obstacle(module, parameter) is None for parameter in module._parameters)
    ]
    return {_UNNAMED_EXPERTS: names} if names else {}


def parameter_name(layer_name: str) -> str:
    """Returns the name of the parameter that a layer of experts adapts, from the layer's name."""
    module, _, parameter = layer_name.rpartition(".")
    return f"{module.removesuffix(CHILD)}{parameter}"


# ---- groups --------------------------------------------------------------------------------------


def in_groups(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Returns targets by group.

    Raises:
        ValueError: If the layers of a group have several shapes.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
        # A mapping or a callable may join any layers.
        first = groups[target.group][0]
        if target.sizes != first.sizes:
            raise ValueError(
                f"group_by: expected layers of one shape in group {target.group!r}, got "
                f"{first.name!r} {first.sizes} and {target.name!r} {target.sizes}"
            )
    return groups


def group_of(name: str, module: nn.Module | None, sizes: tuple[int, int], group_by: GroupBy) -> str:
    """Returns the group of a layer. The layers of a group share A and B.

    Args:
        name: The layer's name.
        module: The layer, which only a callable group_by reads. None for a layer in a file.
        sizes: (in_features, out_features).
        group_by: As in the configuration.

    Raises:
        TypeError: If the group is not a string, or a mapping lacks the layer.
    """
    if callable(group_by):
        group = group_by(name, module)
    elif isinstance(group_by, dict):
        group = group_by.get(name)
    else:
        shape = f"{sizes[0]}x{sizes[1]}"
        # Groups are names of modules in PEFT's files, so they have no dots.
        block = place_of(name)[0].replace(".", "_")
        group = {
            "shape": shape,
            "width": shape,  # `factor_names` then shares A and B by width
            "block": "_".join(filter(None, (block, shape))),
            "name": f"{name.rpartition('.')[2]}_{shape}",
            "layer": name.replace(".", "_"),
        }[group_by]
    if not isinstance(group, str):
        raise TypeError(
            f"group_by: expected a string for each adapted layer, got {group!r} for {name!r}"
        )
    return group
