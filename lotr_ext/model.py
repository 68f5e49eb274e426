"""Adapters in whole models: apply_lotr, merge, unload, and what an adapted model trains and runs.

After `apply_lotr(model, config)` every targeted layer is a `LoTRLayer` in its old place, with its old state_dict keys and
`core`. Each factor A or B is registered once, as `model.lotr_factors[i]`; the layers hold plain references. Parameters from
which several cores are computed (LoTRConfig.core) are registered once, as `model.lotr_cores`.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import LoTRConfig, place_of
from .core import dispatch, fallback
from .core.request import ADAPTER_OFF, open_request, state_of
from .cores import FORMS, Cores
from .experts import adapt_parameter, release
from .factors import LoTRFactor, LoTRFactors
from .init import START, directions_of_gradients, fill_core_, tucker2
from .layers import LoTRLayer, plus
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
    config = with_head(model, config)
    selection = select(model, config)
    with unchanged_on_error(model):
        install(model, config, selection)
    frozen = [
        name
        for name, head in heads(model).items()
        if not any(p.requires_grad for p in head.parameters())
    ]
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


def install(model: nn.Module, config: LoTRConfig, selection: Selection) -> None:
    """Adapts the layers of a selection."""
    starts = (
        {group: _svd_start(targets, config) for group, targets in selection.groups.items()}
        if config.init == "svd"
        else {}
    )
    first = selection.targets[0]
    cores = cores_of(
        config,
        [t.name for t in selection.targets],
        device=_home(first.module),
        dtype=config.adapter_dtype,
    )
    model.requires_grad_(False)
    for module in selection.saved.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    owned: dict[str, LoTRFactor] = {}
    for group, targets in selection.groups.items():
        where = {"device": _home(targets[0].module), "dtype": config.adapter_dtype}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lotr_ext: rank")  # one warning for the model, below
            factors = pair_of(owned, group, targets[0].sizes, config, **where)
        layers = [_replace(model, target, factors, config) for target in targets]
        for target, layer in zip(targets, layers) if cores is not None else ():
            layer.use_core(cores.at(place_of(target.name), owned=False))
        if starts:
            set_start(layers, starts[group])
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
    if callable(
        config.group_by
    ):  # a callable cannot be pickled or saved; the groups that it returned can
        config = replace(config, group_by={t.name: t.group for t in selection.targets})
    model.lotr_config, model.lotr_left_out = config, selection.left_out
    fast_paths(model, on=False)
    _waiting.add(model)


def pair_of(
    owned: MutableMapping[str, LoTRFactor] | nn.ModuleDict,
    group: str,
    sizes: tuple[int, int],
    config: LoTRConfig,
    **where: Any,
) -> LoTRFactors:
    """The factors of a group of layers of sizes (in_features, out_features), on the device and of the dtype in where.

    owned: all factors so far, by part and group, or with group_by="width" by part and width; new ones are added.
    """
    found, init = [], "kaiming" if config.init == "svd" else config.init
    for part, features, rank in zip("AB", sizes, config.ranks):
        name = f"{part}_{features if config.group_by == 'width' else group}"
        if name not in owned:
            owned[name] = LoTRFactor(features, rank, init=init, **where)
            if part == "B" and config.core_init == "identity":
                nn.init.zeros_(owned[name].value)  # the model starts unchanged, as with LoRA
        found.append(owned[name])
    return LoTRFactors.of(*found)


def _home(module: nn.Module) -> torch.device:
    """Where a module computes. accelerate keeps offloaded weights on the meta device between two forwards."""
    tensor = next(iter((*module.parameters(), *module.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    hook = getattr(module, "_hf_hook", None)
    return (
        torch.device(hook.execution_device)
        if device.type == "meta" and hook is not None
        else device
    )


def _replace(
    model: nn.Module, target: Target, factors: LoTRFactors, config: LoTRConfig
) -> LoTRLayer:
    if target.parameter is not None:
        layer = adapt_parameter(
            target.module, target.parameter, factors, scaling=config.s, dropout=config.dropout
        )
    else:
        layer = adapt(target.module, factors, scaling=config.s, dropout=config.dropout)
    layer.leave_factors_to_owner()
    if layer.core.device != (home := _home(target.module)):
        layer.core = nn.Parameter(
            torch.empty(layer.core.shape, device=home, dtype=layer.core.dtype)
        )
    fill_core_(layer.core, config.core_init)
    for name in target.names if target.parameter is None else ():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layer


def cores_of(config: LoTRConfig, names: Sequence[str], **where: Any) -> Cores | None:
    """The Cores of the layers of these names, on the device and of the dtype in where; None for dense ones.

    Raises TypeError or ValueError for what a form cannot be.
    """
    if config.core == "dense":
        return None
    if config.core == "custom":
        raise ValueError(
            'core: expected a name or a callable, got "custom" from a saved adapter. Pass the original callable.'
        )
    places = [place_of(name) for name in names]
    form = FORMS[config.core] if isinstance(config.core, str) else config.core
    with torch.device("cpu"):  # not the caller's default device, which may be meta
        cores = form(places, config.rank)
    if not isinstance(cores, Cores):
        raise TypeError(
            f"core: expected a callable that returns lotr_ext.cores.Cores, got {type(cores).__name__}"
        )
    if config.core_init == "identity":
        cores.begin_as_identity()
    return cores.to(**where)


@torch.no_grad()
def _svd_start(targets: list[Target], config: LoTRConfig) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and cores of init "svd" of one group: the weights' own Tucker-2 factorisation, at START times orthonormal
    factors."""
    weights = [
        t.module.weight if isinstance(t.module, nn.Linear) else t.module.weight.T for t in targets
    ]
    A, B, cores = tucker2(weights, config.ranks)
    return START * A, START * B, cores / (START**2 * config.s)


@torch.no_grad()
def set_start(layers: list[LoTRLayer], start: tuple[Tensor, Tensor, Tensor] | None) -> None:
    """Starts the layers of one group at A, B and cores [l, r_in, r_out], which are subtracted from their weights in float32. A
    former start is added back first. layers: all of the group. start: None to have none."""
    A, B = layers[0].factors.A, layers[0].factors.B
    for layer in layers:
        layer.give_start_back()
    A.start = B.start = None
    if start is None:
        return
    for factor, value in zip((A, B), start):
        factor.start = value.to(factor.value)
        factor.value.copy_(factor.start)
    for layer, core in zip(layers, start[2]):
        layer.start_core = core.to(layer.core)
        layer.core.copy_(layer.start_core)
        weight = layer._weight_to_write("init")
        weight.copy_(
            plus(weight, -fallback.delta_weight(A.start, B.start, layer.start_core, layer.scaling))
        )


def fast_paths(model: nn.Module, *, on: bool, adapted: type[nn.Module] = LoTRLayer) -> None:
    """Turns fast paths off, or on again, in modules with adapted layers. nn.TransformerEncoderLayer's reads the weights of its
    linear layers without calling them, and nn.TransformerEncoder makes nested tensors for it. Both depend on attributes that
    nothing else reads."""
    names = {
        nn.TransformerEncoderLayer: "activation_relu_or_gelu",
        nn.TransformerEncoder: "use_nested_tensor",
    }
    for module in model.modules():
        name = next(
            (
                name
                for cls, name in names.items()
                if isinstance(module, cls) and hasattr(module, name)
            ),
            None,
        )
        if name is None:
            continue
        if on and "lotr_fast_path" in vars(module):
            setattr(module, name, vars(module).pop("lotr_fast_path"))
        elif not on and any(isinstance(m, adapted) for m in module.modules()):
            module.lotr_fast_path = getattr(module, name)
            setattr(module, name, False)


_waiting: weakref.WeakSet[nn.Module] = (
    weakref.WeakSet()
)  # adapted models that no optimizer has stepped yet


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook on all optimizers. Warns at a model's first step about adapted layers that no forward has called: their cores
    have no gradient, and those of others have one."""
    if torch.compiler.is_compiling() or not _waiting:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_waiting):
        called = {}
        for name, layer in layers_in(model).items():
            if own := [p for p in layer.core_parameters() if p.requires_grad and id(p) in held]:
                called[name] = any(p.grad is not None for p in own)
        if not any(called.values()):
            continue  # an optimizer of something else, or a step without a backward
        _waiting.discard(model)
        if idle := [name for name, was_called in called.items() if not was_called]:
            more = f" and {len(idle) - 1} more layers" if len(idle) > 1 else ""
            warnings.warn(
                f"lotr_ext: {idle[0]}{more} had no part in the first optimizer step: no forward has called them, so their "
                f"adapters have no effect. Leave them out with exclude_modules.",
                stacklevel=3,
            )


register_optimizer_step_post_hook(
    _after_step
)  # torch iterates over its hooks, so a hook cannot remove itself


# ---- an adapted model ------------------------------------------------------------------------------------------------


def layers_in(model: nn.Module) -> dict[str, LoTRLayer]:
    """The adapted layers of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoTRLayer)}


def adapted_layers(model: nn.Module) -> dict[str, LoTRLayer]:
    """As `layers_in`, of a model from `apply_lotr` or built by hand. Raises RuntimeError if it has no adapter."""
    layers = layers_in(model)
    if not layers:
        raise RuntimeError(
            f"model: expected one with a LoTR adapter, got {type(model).__name__} without. apply_lotr adds one."
        )
    return layers


def expect_unmerged(layers: Mapping[str, LoTRLayer], where: str) -> None:
    """Raises RuntimeError if a layer is merged."""
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(
            f"{where}: expected unmerged layers, got {merged[0]!r}, which is merged. Call unmerge(model) first."
        )


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the context the model computes without the adapter (modules_to_save stay as they are now).

    The context is in force for the thread that opened it, and for the backwards that it starts.
    Raises RuntimeError: no adapter, or a merged one (unmerge it first).
    """
    layers = adapted_layers(model)
    expect_unmerged(layers, "disabled")
    with open_request(dict.fromkeys(layers.values(), ADAPTER_OFF)):
        yield model


def init_from_gradient(
    model: Model, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> Model:
    """Starts A and B of an adapted model from the gradients of its weights. The cores stay zero, so its output does not change.

    A and B span the leading directions of the gradients of all layers that share them. The gradients are never formed: three
    passes over the batches compute two thin products per layer. Buffers, .grad, requires_grad and torch's random state are as
    before afterwards. With torch.distributed, every process calls this with its own batches, and all get the same A and B.

    batches: a few, each used three times. loss: (model, batch) -> a scalar.
    Raises TypeError, ValueError or RuntimeError, with the model unchanged: no adapter, or one of experts; a merged model; a
    core that is not zero; no batches; a loss that is no scalar or depends on no adapted layer; gradients that are not finite,
    or all zero.
    """
    layers = adapted_layers(model)
    expect_unmerged(layers, "init_from_gradient")
    for name, layer in layers.items():
        if hasattr(layer, "num_experts"):
            raise TypeError(
                f"model: expected linear layers for a start from the gradient, got experts in {name!r}"
            )
        if bool(layer.core.any()):
            raise ValueError(
                f"core: expected zero for a start from the gradient, got other values in {name!r}"
            )
    with open_request(dict.fromkeys(layers.values(), ADAPTER_OFF)):
        found = directions_of_gradients(model, layers.values(), batches, loss)
    with torch.no_grad():
        for factor, value in found:
            factor.copy_(value)
    return model


def lotr_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapter's trained parameters, for an optimizer: each A, B and core (or what it is computed from) that requires grad.

    Does not contain modules_to_save: `[p for p in model.parameters() if p.requires_grad]` contains both.
    Raises RuntimeError as `adapted_layers`.
    """
    found = {
        id(p): p
        for layer in adapted_layers(model).values()
        for p in layer.adapter_parameters()
        if p.requires_grad
    }
    return iter(found.values())


def parameter_groups(
    model: nn.Module, lr: float | None = None, *, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """All trained parameters of an adapted model in up to three groups for an optimizer, by "name": "cores", "factors" (A and
    B), and "other" (modules_to_save, such as a new head, and all else that requires grad).

    lr: the rate of all groups; other_lr: of "other" instead; None: the optimizer's. A group's "lr" may be changed. For
    transformers' Trainer and TRL: `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3)), None))`.
    Raises RuntimeError as `adapted_layers`.
    """
    parts = (one for layer in adapted_layers(model).values() for one in layer.parts())
    owners = {id(p): "cores" if part == "core" else "factors" for part, p in parts}
    members: dict[str, list[nn.Parameter]] = {"cores": [], "factors": [], "other": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[owners.get(id(parameter), "other")].append(parameter)
    rates = {"cores": lr, "factors": lr, "other": lr if other_lr is None else other_lr}
    return [
        {"params": own, "name": name} | ({} if rates[name] is None else {"lr": rates[name]})
        for name, own in members.items()
        if own
    ]


class TrainableSummary(NamedTuple):
    """Counts of parameters. adapter: A, B and cores; trained: all that require grad; total: the model with its adapter.

    layers: adapted layers. groups: pairs of factors. parts: what is trained: "A", "B", "core", and the names of other modules.
    left_out: the names of the layers that target_modules matches and that have no adapter, by reason. str() gives a readable
    report.
    """

    adapter: int
    trained: int
    total: int
    layers: int
    groups: int
    parts: tuple[str, ...]
    left_out: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [
            f"LoTR: {self.layers} layers, {self.groups} pair{'s' * (self.groups != 1)} of factors, {self.adapter:,} adapter "
            f"parameters; trained {self.trained:,} of {self.total:,} ({self.trained / self.total:.4%})",
            f"trained: {', '.join(_shortened(self.parts, 5)) or 'nothing'}; all else is frozen",
        ]
        lines += [
            f"left out: {', '.join(_shortened(names))} ({reason})"
            for reason, names in self.left_out.items()
        ]
        return "\n".join(lines)


def _shortened(names: Sequence[str], most: int = 3) -> list[str]:
    return [*names] if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Counts adapted and trained parameters, and lists what is trained and what was left out; print it for a report.

    An adapter of S layers of width d has S r^2 + 2 r d parameters per group.
    Raises RuntimeError as `adapted_layers`.
    """
    layers, parameters = adapted_layers(model).values(), list(model.parameters())
    adapter = {p: part for layer in layers for part, p in layer.parts()}
    beside = [
        name.rpartition(".")[0]
        for name, p in model.named_parameters()
        if p.requires_grad and p not in adapter
    ]
    return TrainableSummary(
        adapter=sum(p.numel() for p in adapter),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        layers=len(layers),
        groups=len({(layer.factors.A, layer.factors.B) for layer in layers}),
        parts=(
            *sorted({part for p, part in adapter.items() if p.requires_grad}),
            *dict.fromkeys(beside),
        ),
        left_out=getattr(model, "lotr_left_out", {}),
    )


# ---- explain ---------------------------------------------------------------------------------------------------------


def explain(model: nn.Module, x: Tensor) -> str:
    """What runs in adapted layers for an input, and why: one line for each kind of layer.

    model: an adapted layer, or a model with some. x: an input. Layers get its dtype (for token ids, the weights') and device.
    Call this in the contexts (autocast, `disabled`, torch.func) in which you call the model. Raises RuntimeError as
    `adapted_layers`.
    """
    layers = adapted_layers(model)
    return "\n".join(
        f"{n} x {line}" for line, n in Counter(_line(layer, x) for layer in layers.values()).items()
    )


def _line(layer: LoTRLayer, x: Tensor) -> str:
    what = f"{type(layer).__name__} {layer.in_features} -> {layer.out_features} at rank {layer.factors.rank}"
    if layer.merged:
        return f"{what}: the base alone, because the adapter is merged into its weight"
    if state_of(layer) is ADAPTER_OFF:
        return f"{what}: the base alone, because the adapter is disabled"
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if x.is_floating_point() else layer.weight.dtype
    y = x.new_empty(0, dtype=dtype)  # stands for the input, and for the base's output
    reason = layer.factors.read(
        lambda A, B: dispatch.fallback_reason(y, None, A, B, layer.core, y) or ""
    )
    runs = f"PyTorch's own products, because {reason}" if reason else "the kernels of lotr_ext"
    return f"{what}: {runs} ({str(dtype).removeprefix('torch.')} on {x.device.type})"


# ---- merge and unload ------------------------------------------------------------------------------------------------


def merge(
    model: Model,
    *,
    safe: bool = False,
    keep_backup: bool = True,
    dequantize: bool | torch.dtype = False,
) -> Model:
    """Adds every layer's s B G^T A^T to its weight (in fp32, cast once). On an error no layer is merged.

    safe: raise if a result is not finite. keep_backup: keep the weights, so that `unmerge` restores the same bits; without,
    it subtracts, which is exact only up to rounding. dequantize: replace each quantised layer (torchao, bitsandbytes) by a
    plain nn.Linear, of this dtype if one is given. `unmerge` restores the quantised layers from the backup.

    Raises TypeError: a base that cannot be merged into, or a weight that is no parameter (weight_norm, parametrizations,
    pruning) or held in parts; ValueError: safe, and a result is not finite; RuntimeError: no adapter, one that is merged
    already, on the meta device, or a weight tied to another module.
    """
    layers = adapted_layers(model)
    expect_unmerged(layers, "merge")
    _merge_all(model, layers, safe, dequantize)
    for layer in layers.values() if not keep_backup else ():
        layer.weight_backup = None
        if isinstance(layer, LoTRWrapped):
            layer.__dict__["quantized_base"] = None
    return model


def _merge_all(
    model: nn.Module, layers: Mapping[str, LoTRLayer], safe: bool, dequantize: bool | torch.dtype
) -> None:
    if not isinstance(dequantize, bool) and not (
        isinstance(dequantize, torch.dtype) and dequantize.is_floating_point
    ):
        raise TypeError(f"dequantize: expected True, False or a floating dtype, got {dequantize!r}")
    tied, done = tied_names(model), []
    for name, layer in layers.items():
        if layer.core.is_meta or any(p.is_meta for p in layer.parameters()):
            raise RuntimeError(
                f"merge: expected tensors with values, got {name!r} on the meta device"
            )
        if others := tied.get(id(layer)) or tied.get(id(getattr(layer, "base_layer", None))):
            raise RuntimeError(
                f"merge: expected a weight of its own, got {name!r}, tied to {', '.join(others)}"
            )
    try:
        for layer in layers.values():
            layer.merge(
                safe, **({"dequantize": dequantize} if isinstance(layer, LoTRWrapped) else {})
            )
            done.append(layer)
    except (TypeError, ValueError, RuntimeError) as error:
        for layer in done:
            layer.unmerge()
        raise type(error)(f"{error} (in {list(layers)[len(done)]!r})") from None


def unmerge(model: Model) -> Model:
    """Removes the adapter from the weights of all merged layers. Raises RuntimeError: no adapter, one that is not
    merged, or a dequantised one without a backup."""
    merged = {name: layer for name, layer in adapted_layers(model).items() if layer.merged}
    if not merged:
        raise RuntimeError("unmerge: expected merged layers, got none that is merged")
    for name, layer in merged.items():
        if getattr(layer, "replaced", False) and layer.quantized_base is None:
            raise RuntimeError(
                f"unmerge: expected the quantised base of {name!r}, got a layer merged with keep_backup=False"
            )
    for layer in merged.values():
        layer.unmerge()
    return model


def unload(model: Model, *, merge: bool = False, dequantize: bool | torch.dtype = False) -> Model:
    """Removes the adapter: plain layers in their old places, no factors, no cores. Frozen parameters stay frozen.

    merge: False restores the base weights (with "svd" up to one rounding); True merges the adapter into them. modules_to_save
    stay as they are now; hooks on adapted layers go with them. dequantize: as in `merge`. Returns the same model; if it is
    itself an adapted layer, the plain one. Raises, with the model unchanged, as `merge` and `unmerge`.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if type(layer).to_base is LoTRLayer.to_base and not hasattr(layer, "host"):
            raise TypeError(
                f"unload: expected layers with a plain form, got {name!r}, a {type(layer).__name__}"
            )
    if merge:
        _merge_all(
            model,
            {name: layer for name, layer in layers.items() if not layer.merged},
            False,
            dequantize,
        )
    elif any(layer.merged for layer in layers.values()):
        unmerge(model)
    return without_adapters(model, layers)


def without_adapters(model: Model, layers: Mapping[str, LoTRLayer]) -> Model:
    """`unload` once nothing more can be refused."""
    if hasattr(model, "lotr_tasks"):
        model.lotr_tasks.remove_hooks()
    for host in {
        id(layer.host): layer.host for layer in layers.values() if hasattr(layer, "host")
    }.values():
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
