"""Adapters in whole models: apply_lotr and unload.

After `apply_lotr(model, config)` every targeted layer is a `LoTRLayer` in its old place, with its old state_dict keys and
`core`. Each factor A or B is registered once, as `model.lotr_factors[i]`; the layers hold plain references. Parameters from
which several cores are computed (LoTRConfig.core) are registered once, as `model.lotr_cores`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapted import (
    adapted_layers,
    attach,
    compute_device,
    detach,
    expect_unmerged,
    layers_in,
)
from .bypasses import block_bypasses, restore_bypasses
from .config import LoTRConfig, place_of
from .core import fallback
from .core.request import ADAPTER_OFF, open_request
from .cores import FORMS, Cores
from .factors import LoTRFactor, LoTRFactors
from .first_step import check_layers_are_called, check_optimizer, watch
from .init import START, CapturedGradient, fill_core_, start_from_gradients, tucker2
from .layers import LoTRLayer, plus
from .merging import merge_layers, unmerge
from .targets import Selection, Target, heads, select, with_head
from .transformers_experts import adapt_parameter
from .wrapped import adapt

__all__ = [
    "LoTRConfig",
    "adapted_layers",
    "apply_lotr",
    "disabled",
    "init_from_gradient",
    "unload",
]

Model = TypeVar("Model", bound=nn.Module)


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
        device=compute_device(first.module),
        dtype=config.adapter_dtype,
    )
    model.requires_grad_(False)
    for module in selection.saved.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    owned: dict[str, LoTRFactor] = {}
    for group, targets in selection.groups.items():
        where = {"device": compute_device(targets[0].module), "dtype": config.adapter_dtype}
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
    attach(model, "lotr_factors", nn.ModuleList(owned.values()))
    if cores is not None:
        attach(model, "lotr_cores", cores.requires_grad_("core" in config.train))
    for layer in adapted_layers(model).values():
        layer.set_trained(config.train)
    if callable(
        config.group_by
    ):  # a callable cannot be pickled or saved; the groups that it returned can
        config = replace(config, group_by={t.name: t.group for t in selection.targets})
    model.lotr_config, model.lotr_left_out = config, selection.left_out
    block_bypasses(model)
    watch(model, check_optimizer)
    watch(model, check_layers_are_called)


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
    if layer.core.device != (home := compute_device(target.module)):
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
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> CapturedGradient:
    """Starts A and B of an adapted model from the gradients of its weights.

    A and B span the leading directions of the gradients of all layers that share them. The cores
    stay zero, so the model's output does not change. The gradients are never formed: four passes
    over the batches compute two thin products per layer. Buffers, .grad, requires_grad and torch's
    random state are as before afterwards. With torch.distributed, every process calls this with its
    batches, and all get the same A and B.

    Args:
        model: An adapted model.
        batches: A few, each used four times.
        loss: (model, batch) -> a scalar.

    Returns:
        The share of the gradients' squared norm that the new A and B capture, in all and per layer.
        It tells which rank is enough.

    Raises:
        TypeError, ValueError, RuntimeError: With the model unchanged, if it has no adapter, or one
            of experts; if it is merged, or a core is not zero; if there are no batches; if the loss
            is not a scalar or depends on no adapted layer; or if gradients are not finite, or all
            zero.
    """
    layers = adapted_layers(model)
    expect_unmerged(layers, "init_from_gradient")
    for name, layer in layers.items():
        if layer.num_experts:
            raise TypeError(
                f"model: expected linear layers for a start from the gradient, got experts in {name!r}"
            )
        if bool(layer.core.any()):
            raise ValueError(
                f"core: expected zero for a start from the gradient, got other values in {name!r}"
            )
    with open_request(dict.fromkeys(layers.values(), ADAPTER_OFF)):
        start = start_from_gradients(model, layers, batches, loss)
    with torch.no_grad():
        for factor, value in start.values:
            factor.copy_(value)
    return start.captured


# ---- unload ------------------------------------------------------------------------------------------------


def unload(model: Model, *, merge: bool = False, dequantize: bool | torch.dtype = False) -> Model:
    """Removes the adapter: plain layers in their old places, no factors, no cores. Frozen parameters stay frozen.

    merge: False restores the base weights (with "svd" up to one rounding); True merges the adapter into them. modules_to_save
    stay as they are now; hooks on adapted layers go with them. dequantize: as in `merge`. Returns the same model; if it is
    itself an adapted layer, the plain one. Raises, with the model unchanged, as `merge` and `unmerge`.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if type(layer).to_base is LoTRLayer.to_base:
            raise TypeError(
                f"unload: expected layers with a plain form, got {name!r}, a {type(layer).__name__}"
            )
    if merge:
        unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
        merge_layers(model, unmerged, dequantize=dequantize)
    elif any(layer.merged for layer in layers.values()):
        unmerge(model)
    return without_adapters(model, layers)


def without_adapters(model: Model, layers: Mapping[str, LoTRLayer]) -> Model:
    """`unload` once nothing more can be refused."""
    if hasattr(model, "lotr_tasks"):
        model.lotr_tasks.remove_hooks()
    bases = {id(layer): layer.to_base() for layer in layers.values()}
    restore_bypasses(model)
    if isinstance(model, LoTRLayer):  # there is no place to put the plain one
        return bases[id(model)]
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoTRLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, bases[id(layer)])
    for name in ("lotr_factors", "lotr_cores", "lotr_tasks", "lotr_config", "lotr_left_out"):
        detach(model, name)
    return model
