"""Adapters in whole models: apply_lotr, merge, unload, and what an adapted model trains and runs.

After `apply_lotr(model, config)` every targeted layer is a `LoTRLayer` in its old place, with its old state_dict keys and
`core`. Each factor A or B is registered once, as `model.lotr_factors[i]`; the layers hold plain references. Parameters from
which several cores are computed (LoTRConfig.core) are registered once, as `model.lotr_cores`.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import autograd, ops
from .config import LoTRConfig, place_of
from .cores import FORMS, Cores
from .experts import adapt_parameter, release
from .functional import check_number
from .init import START, directions_of_gradients, fill_core_, tucker2
from .linear import OFF, LoTRFactor, LoTRFactors, LoTRLayer
from .targets import Selection, Target, heads, select, tied_names, with_head
from .wrapped import LoTRWrapped, adapt

__all__ = [
    "LoTRConfig",
    "TrainableSummary",
    "adapted_layers",
    "apply_lotr",
    "disabled",
    "explain",
    "init_from_gradient",
    "lotr_parameters",
    "merge",
    "parameter_groups",
    "trainable_summary",
    "unload",
    "unmerge",
]

Model = TypeVar("Model", bound=nn.Module)


class SharedFactors(nn.ModuleList):
    """The distinct factors of a model. Its forward returns the input, because nn.Sequential calls all its children."""

    def forward(self, x: Tensor) -> Tensor:
        return x


# ---- apply -----------------------------------------------------------------------------------------------------------


def apply_lotr(model: Model, config: LoTRConfig) -> Model:
    """Adapts a model in place: y = x W^T + bias + s ((x A) G_l) B^T for each targeted layer l (arXiv 2402.01376), and with
    target_parameters for each expert of a transformers mixture.

    All other parameters are frozen, except modules_to_save. Each group gets one pair A [K, r_in], B [N, r_out] and each layer
    a core [r_in, r_out], in config.adapter_dtype. The model's output does not change at first (with init "svd" except for one
    rounding of each weight). Learning rate: the one that you would use for LoRA.

    model: any nn.Module with nn.Linear layers, transformers' Conv1D, or named modules that have in_features and out_features.
    Quantised layers, and layers with hooks, parametrizations or a forward of their own, are wrapped: their forward is called.
    A layer that is registered in several places stays one layer. Returns the same model.

    Raises TypeError, ValueError or RuntimeError, with the model unchanged: one that is adapted already, wrapped, compiled,
    sharded, or has PEFT's adapters; names that match nothing; a target that is not linear, shares its weight with another
    module, is read without being called (nn.MultiheadAttention.out_proj) or is a DTensor; experts of an unknown format; groups
    of mixed shapes; "svd" on weights that cannot be read.
    """
    if isinstance(config, LoTRConfig) and (saved := with_head(model, config)) != config.modules_to_save:
        config = replace(config, modules_to_save=saved)
    selection = select(model, config)
    starts = {group: _svd_start(targets, config) for group, targets in selection.groups.items()} if config.init == "svd" else {}
    cores = cores_for(config, selection)
    with unchanged_on_error(model):
        install(model, config, selection, cores, starts)
    frozen = [name for name, head in heads(model).items() if not any(p.requires_grad for p in head.parameters())]
    if frozen:
        warnings.warn(
            f"lotr_ext: {', '.join(frozen)} stays frozen, so a new head keeps its random values. Train it with "
            f"modules_to_save={frozen}.",
            stacklevel=2,
        )
    return model


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Takes off an adapter that an exception inside has left half made."""
    plain, before = not layers_in(model), [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        if plain:
            without_adapters(model, layers_in(model))
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)
        raise


def install(
    model: nn.Module,
    config: LoTRConfig,
    selection: Selection,
    cores: Cores | None = None,
    starts: Mapping[str, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> None:
    """Adapts the layers of a selection. cores: the Cores of all layers, or None for dense ones. starts: A, B and the cores [l,
    r_in, r_out] by group that are subtracted from the weights."""
    model.requires_grad_(False)
    for module in selection.saved.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    owned: dict[tuple[str, object], LoTRFactor] = {}
    for group, targets in selection.groups.items():
        factors = _pair(config, group, targets[0], owned)
        layers = [_replace(model, target, factors, config) for target in targets]
        for target, layer in zip(targets, layers) if cores is not None else ():
            layer.use_core(cores.at(place_of(target.name), owned=False))
        if starts:
            set_start(layers, starts[group])
            factors.A.value.data.copy_(factors.A.start), factors.B.value.data.copy_(factors.B.start)
            for layer in layers:
                layer.core.data.copy_(layer.start_core)
    if wide := [factor.features for factor in owned.values() if factor.rank > factor.features]:
        warnings.warn(
            f"lotr_ext: rank {config.rank} exceeds the width of {len(wide)} of {len(owned)} factors, the least is {min(wide)}. "
            f"A lower rank gives the same functions.",
            stacklevel=3,
        )
    model.lotr_factors = SharedFactors(owned.values())
    if cores is not None:
        model.lotr_cores = cores.requires_grad_("core" in config.train)
    for layer in adapted_layers(model).values():
        layer.set_trained(config.train)
    if callable(config.group_by):  # a callable cannot be pickled or saved; the groups that it returned can
        config = replace(config, group_by={t.name: t.group for t in selection.targets})
    model.lotr_config, model.lotr_left_out = config, selection.left_out
    fast_paths(model, on=False)
    _waiting.add(model)


def _pair(config: LoTRConfig, group: str, target: Target, owned: dict[tuple[str, object], LoTRFactor]) -> LoTRFactors:
    """The factors of a group, one A and one B a width with group_by="width". target: its first layer. owned: all factors so
    far."""
    found, sizes = [], (target.in_features, target.out_features)
    for part, features, rank in zip("AB", sizes, config.ranks):
        key = (part, features if config.group_by == "width" else group)
        if key not in owned:
            init = "kaiming" if config.init == "svd" else config.init
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "lotr_ext: rank")  # `install` warns once for the model
                owned[key] = LoTRFactor(features, rank, init=init, device=_home(target.module), dtype=config.adapter_dtype)
            if part == "B" and config.core_init == "identity":
                nn.init.zeros_(owned[key].value)  # the model starts unchanged, as with LoRA
        found.append(owned[key])
    return LoTRFactors.of(*found)


def _home(module: nn.Module) -> torch.device:
    """Where a module computes. accelerate keeps offloaded weights on the meta device between two forwards."""
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def _replace(model: nn.Module, target: Target, factors: LoTRFactors, config: LoTRConfig) -> LoTRLayer:
    if target.parameter is not None:
        layer = adapt_parameter(target.module, target.parameter, factors, scaling=config.s, dropout=config.dropout)
    else:
        layer = adapt(target.module, factors, scaling=config.s, dropout=config.dropout)
    layer.leave_factors_to_owner()
    if layer.core.device != (home := _home(target.module)):
        layer.core = nn.Parameter(torch.empty(layer.core.shape, device=home, dtype=layer.core.dtype))
    fill_core_(layer.core, config.core_init)
    for name in target.names if target.parameter is None else ():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layer


def cores_for(config: LoTRConfig, selection: Selection, device: torch.device | str | None = None) -> Cores | None:
    """The Cores of the selected layers; None for dense ones. Raises TypeError or ValueError for what a form cannot be."""
    if config.core == "dense":
        return None
    if config.core == "custom":
        raise ValueError('core: expected a name or a callable, got "custom" from a saved adapter. Pass the original callable.')
    places = [place_of(t.name) for t in selection.targets]
    cores = (FORMS[config.core] if isinstance(config.core, str) else config.core)(places, config.rank)
    if not isinstance(cores, Cores):
        raise TypeError(f"core: expected a callable that returns lotr_ext.cores.Cores, got {type(cores).__name__}")
    if config.core_init == "identity":
        cores.begin_as_identity()
    with torch.no_grad():
        for place in places:
            if (got := tuple(cores.at(place)().shape)) != config.ranks:
                raise ValueError(f"core: expected cores of rank {config.ranks}, got {got} from {type(cores).__name__}")
    return cores.to(_home(selection.targets[0].module) if device is None else device, config.adapter_dtype)


@torch.no_grad()
def _svd_start(targets: list[Target], config: LoTRConfig) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and cores of init "svd" of one group: the weights' own Tucker-2 factorisation, at START times orthonormal
    factors."""
    if config.s == 0:
        raise ValueError('init: expected a scaling other than 0 with "svd", got 0')
    weights = [t.module.weight if isinstance(t.module, nn.Linear) else t.module.weight.T for t in targets]
    for target, weight in zip(targets, weights):
        if weight.is_meta or not bool(torch.isfinite(weight).all()):
            what = "a weight on the meta device" if weight.is_meta else "NaN or infinite elements"
            raise ValueError(f'init: expected finite weights with values for "svd", got {what} in {target.name!r}')
    A, B, cores = tucker2(weights, config.ranks)
    return START * A, START * B, cores / (START**2 * config.s)


@torch.no_grad()
def set_start(layers: list[LoTRLayer], start: tuple[Tensor, Tensor, Tensor] | None) -> None:
    """Sets the adapter that the layers of one group begin with: it is subtracted from their weights, in float32, and a former
    start is added back. layers: all of the group. start: A, B, cores [l, r_in, r_out]."""
    for layer in layers:
        layer.give_start_back()
    for factor, value in zip((layers[0].factors.A, layers[0].factors.B), (None, None) if start is None else start):
        factor.start = None if value is None else value.to(factor.value)
    for layer, core in zip(layers, ()) if start is None else zip(layers, start[2]):
        A, B, layer.start_core = layer.factors.A.start, layer.factors.B.start, core.to(layer.core)
        weight, delta = layer._weight_to_write("init"), ops.delta_weight(A, B, layer.start_core, layer.scaling)
        weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) - delta)


def fast_paths(model: nn.Module, *, on: bool, adapted: type[nn.Module] = LoTRLayer) -> None:
    """Turns fast paths off, or on again, in modules with adapted layers. nn.TransformerEncoderLayer's reads the weights of its
    linear layers without calling them, and nn.TransformerEncoder makes nested tensors for it. Both depend on attributes that
    nothing else reads."""
    names = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for module in model.modules():
        name = next((name for cls, name in names.items() if isinstance(module, cls) and hasattr(module, name)), None)
        if name is None:
            continue
        if on and "lotr_fast_path" in vars(module):
            setattr(module, name, vars(module).pop("lotr_fast_path"))
        elif not on and any(isinstance(m, adapted) for m in module.modules()):
            module.lotr_fast_path = getattr(module, name)
            setattr(module, name, False)


_waiting: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # adapted models that no optimizer has stepped yet


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook on all optimizers. Warns at a model's first step about adapted layers that no forward has called: their cores
    have no gradient, and those of others have one."""
    if torch.compiler.is_compiling() or not _waiting:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_waiting):
        grads = {}
        for name, layer in layers_in(model).items():
            if own := [p for p in layer.core_parameters() if p.requires_grad and id(p) in held]:
                grads[name] = any(p.grad is not None for p in own)
        if not any(grads.values()):
            continue  # an optimizer of something else, or a step without a backward
        _waiting.discard(model)
        if idle := [name for name, found in grads.items() if not found]:
            more = f" and {len(idle) - 1} more layers" if len(idle) > 1 else ""
            warnings.warn(
                f"lotr_ext: {idle[0]}{more} had no part in the first optimizer step: no forward has called them, so their "
                f"adapters have no effect. Leave them out with exclude_modules.",
                stacklevel=3,
            )


register_optimizer_step_post_hook(_after_step)  # torch iterates over its hooks, so a hook cannot remove itself


# ---- an adapted model ------------------------------------------------------------------------------------------------


def layers_in(model: nn.Module) -> dict[str, LoTRLayer]:
    """The adapted layers of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoTRLayer)}


def adapted_layers(model: nn.Module) -> dict[str, LoTRLayer]:
    """As `layers_in`, of a model from `apply_lotr` or built by hand. TypeError: no nn.Module; RuntimeError: no adapter."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = layers_in(model)
    if not layers:
        raise RuntimeError(f"model: expected one with a LoTR adapter, got {type(model).__name__} without. apply_lotr adds one.")
    return layers


def expect_merged(layers: Mapping[str, LoTRLayer], merged: bool, where: str) -> None:
    """Raises RuntimeError unless the `merged` of every layer is as given."""
    for name, layer in layers.items():
        if layer.merged != merged:
            states = ("unmerged", "merged")
            raise RuntimeError(f"{where}: expected {states[merged]} layers, got {name!r}, which is {states[layer.merged]}")


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the context the model computes without the adapter (modules_to_save stay as they are now).

    The context is in force for the thread that opened it, and for the backwards that it starts.
    Raises TypeError or RuntimeError: no adapter, or a merged one (unmerge it first).
    """
    layers = adapted_layers(model)
    expect_merged(layers, False, "disabled")
    with autograd.requesting(dict.fromkeys(layers.values(), OFF)):
        yield model


def init_from_gradient(
    model: Model, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], *, progress: bool = False
) -> Model:
    """Starts A and B of an adapted model from the gradients of its weights. The cores stay zero, so its output does not change.

    A and B span the leading directions of the gradients of all layers that share them. The gradients are never formed: three
    passes over the batches compute two thin products per layer. Buffers, .grad, requires_grad and torch's random state are as
    before afterwards. With torch.distributed, every process calls this with its own batches, and all get the same A and B.

    batches: a few, each used three times. loss: (model, batch) -> a scalar. progress: prints a line a pass.
    Raises TypeError, ValueError or RuntimeError, with the model unchanged: no adapter, or one of experts; a merged model; a
    core that is not zero; no batches; a loss that is no scalar or depends on no adapted layer; gradients that are not finite,
    or all zero.
    """
    layers = adapted_layers(model)
    expect_merged(layers, False, "init_from_gradient")
    for name, layer in layers.items():
        if hasattr(layer, "num_experts"):
            raise TypeError(f"model: expected linear layers for a start from the gradient, got experts in {name!r}")
        if bool(layer.core.any()):
            raise ValueError(f"core: expected zero for a start from the gradient, got other values in {name!r}")
    with autograd.requesting(dict.fromkeys(layers.values(), OFF)):
        found = directions_of_gradients(model, layers, batches, loss, progress)
    with torch.no_grad():
        for factor, value in found:
            factor.copy_(value)
    return model


def lotr_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapter's trained parameters, for an optimizer: each A, B and core (or what it is computed from) that requires grad.

    Does not contain modules_to_save: `[p for p in model.parameters() if p.requires_grad]` contains both.
    Raises TypeError or RuntimeError as `adapted_layers`.
    """
    found = {id(p): p for layer in adapted_layers(model).values() for p in layer.adapter_parameters() if p.requires_grad}
    return iter(found.values())


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    *,
    core_lr: float | None = None,
    factor_lr: float | None = None,
    other_lr: float | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """All trained parameters of an adapted model in up to three groups for an optimizer, by "name": "cores", "factors" (A and
    B), and "other" (modules_to_save, such as a new head, and all else that requires grad).

    lr: the rate of each group without its own; weight_decay: of all; None: the optimizer's. For transformers' Trainer and TRL:
    `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3)), None))`.
    Raises TypeError or ValueError for a rate that is no number or negative, or as `adapted_layers`.
    """
    rates = {"core_lr": core_lr, "factor_lr": factor_lr, "other_lr": other_lr}
    for name, value in {"lr": lr, **rates, "weight_decay": weight_decay}.items():
        if value is not None:
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    kinds: dict[int, str] = {}
    for layer in adapted_layers(model).values():
        kinds |= {id(p): "factor_lr" for p in layer.adapter_parameters()} | {id(p): "core_lr" for p in layer.core_parameters()}
    groups = []
    for kind, name in (("core_lr", "cores"), ("factor_lr", "factors"), ("other_lr", "other")):
        parameters = [p for p in model.parameters() if p.requires_grad and kinds.get(id(p), "other_lr") == kind]
        settings = {"lr": lr if rates[kind] is None else rates[kind], "weight_decay": weight_decay}
        if parameters:
            groups.append({"params": parameters, "name": name} | {k: v for k, v in settings.items() if v is not None})
    return groups


class TrainableSummary(NamedTuple):
    """Counts of parameters. adapter: A, B and cores; trained: all that require grad; total: the model with its adapter.

    layers: adapted layers. groups: (in_features, out_features, rank) of each pair of factors. parts: which of A, B and core are
    trained. other: the modules beside the adapter that have trained parameters. frozen_heads: known heads that are frozen.
    left_out: (name, reason) of each layer that "all-linear" or a regular expression matched but that has no adapter. str()
    gives a readable report.
    """

    adapter: int
    trained: int
    total: int
    layers: int
    groups: tuple[tuple[int, int, int | tuple[int, int]], ...]
    parts: tuple[str, ...]
    other: tuple[str, ...]
    frozen_heads: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        pairs = Counter(f"{k}x{n} at rank {rank}" for k, n, rank in self.groups)
        shown = ", ".join(pair if count == 1 else f"{count} x {pair}" for pair, count in pairs.items())
        lines = [
            f"LoTR: {self.layers} layers, {len(self.groups)} pair{'s' * (len(self.groups) != 1)} of factors ({shown}), "
            f"{self.adapter:,} adapter parameters; trained {self.trained:,} of {self.total:,} "
            f"({self.trained / self.total:.4%})",
            f"trained: {', '.join((*self.parts, *_shortened(self.other))) or 'nothing'}",
        ]
        if self.frozen_heads:
            lines.append(f"frozen: {', '.join(self.frozen_heads)} (a new head must be trained: modules_to_save)")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        return "\n".join((*lines, *(f"left out: {', '.join(_shortened(names))} ({why})" for why, names in reasons.items())))


def _shortened(names: Iterable[str], most: int = 3) -> list[str]:
    names = list(names)
    return names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Counts adapted and trained parameters, and lists what is trained, frozen and left out; print it for a report.

    An adapter of S layers of width d has S r^2 + 2 r d parameters per group.
    Raises TypeError or RuntimeError as `adapted_layers`.
    """
    layers = adapted_layers(model).values()
    pairs = {(id(layer.factors.A), id(layer.factors.B)): layer.factors for layer in layers}
    adapter = {id(p): p for layer in layers for p in layer.adapter_parameters()}
    parts = {
        "A": [p for f in pairs.values() for p in f.A.parameters()],
        "B": [p for f in pairs.values() for p in f.B.parameters()],
        "core": [p for layer in layers for p in layer.core_parameters()],
    }
    other = dict.fromkeys(
        name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter
    )
    parameters = list(model.parameters())
    return TrainableSummary(
        adapter=sum(p.numel() for p in adapter.values()),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        layers=len(layers),
        groups=tuple((f.in_features, f.out_features, f.rank) for f in pairs.values()),
        parts=tuple(part for part, own in parts.items() if any(p.requires_grad for p in own)),
        other=tuple(other),
        frozen_heads=tuple(n for n, m in heads(model).items() if not any(p.requires_grad for p in m.parameters())),
        left_out=tuple(getattr(model, "lotr_left_out", {}).items()),
    )


# ---- explain ---------------------------------------------------------------------------------------------------------


def explain(model: nn.Module, x: Tensor) -> str:
    """What runs in adapted layers for an input, and why: one line for each kind of layer.

    model: an adapted layer, or a model with some. x: an input. Layers get its dtype (for token ids, the weights') and device.
    Call this in the contexts (autocast, `disabled`, torch.func) in which you call the model. Raises TypeError or RuntimeError
    as `adapted_layers`.
    """
    layers = adapted_layers(model)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected an input as a tensor, got {type(x).__name__}")
    return "\n".join(f"{n} x {line}" for line, n in Counter(_line(layer, x) for layer in layers.values()).items())


def _line(layer: LoTRLayer, x: Tensor) -> str:
    what = f"{type(layer).__name__} {layer.in_features} -> {layer.out_features} at rank {layer.factors.rank}"
    if layer.merged:
        return f"{what}: the base alone, because the adapter is merged into its weight"
    if autograd.requests().get(layer) is OFF:
        return f"{what}: the base alone, because the adapter is disabled"
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if x.is_floating_point() else layer.weight.dtype
    y = x.new_empty(0, dtype=dtype)  # stands for the input, and for the base's output
    reason = layer.factors.read(lambda A, B: autograd.obstacle(y, None, A, B, layer.core, y) or "")
    runs = f"PyTorch's own products, because {reason}" if reason else "the kernels of lotr_ext"
    return f"{what}: {runs} ({str(dtype).removeprefix('torch.')} on {x.device.type})"


# ---- merge and unload ------------------------------------------------------------------------------------------------


def merge(model: Model, *, safe: bool = False, keep_backup: bool = True, dequantize: bool | torch.dtype = False) -> Model:
    """Adds every layer's s B G^T A^T to its weight (in fp32, cast once). On an error no layer is merged.

    safe: raise if a result is not finite. keep_backup: keep the weights, so that `unmerge` restores the same bits; without,
    it subtracts, which is exact only up to rounding. dequantize: replace each quantised layer (torchao, bitsandbytes) by a
    plain nn.Linear, of this dtype if one is given. `unmerge` restores the quantised layers from the backup.

    Raises TypeError: a base that cannot be merged into, or a weight that is no parameter (weight_norm, parametrizations,
    pruning) or held in parts; ValueError: safe, and a result is not finite; RuntimeError: no adapter, one that is merged
    already, on the meta device, or a weight tied to another module.
    """
    layers = adapted_layers(model)
    expect_merged(layers, False, "merge")
    _merge_all(model, layers, safe, keep_backup, dequantize)
    return model


def _merge_all(
    model: nn.Module, layers: Mapping[str, LoTRLayer], safe: bool, keep_backup: bool, dequantize: bool | torch.dtype
) -> None:
    if not isinstance(dequantize, bool) and not (isinstance(dequantize, torch.dtype) and dequantize.is_floating_point):
        raise TypeError(f"dequantize: expected True, False or a floating dtype, got {dequantize!r}")
    tied = tied_names(model)
    for name, layer in layers.items():
        if layer.core.is_meta or any(p.is_meta for p in layer.parameters()):
            raise RuntimeError(f"merge: expected tensors with values, got {name!r} on the meta device")
        if others := tied.get(id(layer)) or tied.get(id(getattr(layer, "base_layer", None))):
            raise RuntimeError(f"merge: expected a weight of its own, got {name!r}, tied to {', '.join(others)}")
    done: list[LoTRLayer] = []
    try:
        for name, layer in layers.items():
            try:
                more = {"dequantize": dequantize} if isinstance(layer, LoTRWrapped) else {}
                layer.merge(safe=safe, keep_backup=True, **more)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"{error} (in {name!r})") from None
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    for layer in done if not keep_backup else ():
        layer.weight_backup = None
        if isinstance(layer, LoTRWrapped):
            layer.__dict__["quantized_base"] = None


def unmerge(model: Model) -> Model:
    """Removes the adapter from the weights of all merged layers. Raises TypeError or RuntimeError: no adapter, one that is not
    merged, or a dequantised one without a backup."""
    layers = adapted_layers(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    if not merged:
        expect_merged(layers, True, "unmerge")
    _check_unmergeable(merged)
    for layer in merged.values():
        layer.unmerge()
    return model


def _check_unmergeable(layers: Mapping[str, LoTRLayer]) -> None:
    for name, layer in layers.items():
        if getattr(layer, "replaced", False) and layer.quantized_base is None:
            raise RuntimeError(f"unmerge: expected the quantised base of {name!r}, got a layer merged with keep_backup=False")
        if not getattr(layer, "replaced", False):
            layer._weight_to_write("unmerge")


def unload(model: Model, *, merge: bool = False, dequantize: bool | torch.dtype = False) -> Model:
    """Removes the adapter: plain layers in their old places, no factors, no cores. Frozen parameters stay frozen.

    merge: False restores the base weights (with "svd" up to one rounding); True merges the adapter into them. modules_to_save
    stay as they are now. dequantize: as in `merge`. Returns the same model; if it is itself an adapted layer, the plain one.
    Raises, with the model unchanged, as `merge` and `unmerge`, and for adapted layers with hooks, which would be lost.
    """
    if not isinstance(merge, bool):
        raise TypeError(f"merge: expected True or False, got {merge!r}")
    layers = adapted_layers(model)
    bank = getattr(model, "lotr_tasks", None)
    for name, layer in layers.items():
        own = bank.hooks_on(layer) if bank is not None else 0
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if sum(map(len, hooks)) > own and not hasattr(layer, "host"):
            raise RuntimeError(
                f"unload: expected layers without hooks, which would be lost, got some on {name!r}. Remove them."
            )
        if layer.start_core is not None and not merge:
            layer._weight_to_write("unload")
        if type(layer).to_base is LoTRLayer.to_base and not hasattr(layer, "host"):
            raise TypeError(f"unload: expected layers with a plain form, got {name!r}, a {type(layer).__name__}")
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    _check_unmergeable({} if merge else merged)
    if merge:
        _merge_all(model, {n: m for n, m in layers.items() if not m.merged}, False, False, dequantize)
    for layer in () if merge else merged.values():
        layer.unmerge()
    return without_adapters(model, layers)


def without_adapters(model: Model, layers: Mapping[str, LoTRLayer]) -> Model:
    """`unload` once nothing more can be refused."""
    if hasattr(model, "lotr_tasks"):
        model.lotr_tasks.remove_hooks()
    for host in {id(layer.host): layer.host for layer in layers.values() if hasattr(layer, "host")}.values():
        release(host)
    bases = {id(layer): layer.to_base() for layer in layers.values() if not hasattr(layer, "host")}
    fast_paths(model, on=True)
    if isinstance(model, LoTRLayer):  # there is no place to put the plain one
        return bases[id(model)]
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoTRLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, bases[id(layer)])
    for module in list(model.modules()):
        for beside in ("lotr_factors", "lotr_cores", "lotr_tasks", "lotr_config", "lotr_left_out"):
            if beside in vars(module) or beside in module._modules:
                delattr(module, beside)
    return model
