"""Puts adapters into whole models and takes them out: apply_lotr, disabled, merge, unmerge, unload.

After `apply_lotr(model, config)` every targeted layer is a `LoTRLayer` in its old place, with its old state_dict keys and
`core`. The factors of all groups are registered once, as `model.lotr_factors[group]`; the layers hold unregistered references.
So state_dict has `lotr_factors.<group>.A`, `lotr_factors.<group>.B` and `<layer>.core` beside the base model's keys; with
group_by="width" `lotr_factors.A_<in_features>.value` and `lotr_factors.B_<out_features>.value`. Parameters that make the cores
of several layers (LoTRConfig.core) are registered once, as `model.lotr_cores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..autograd.tensor_parallel import is_dtensor
from ..layers.cores import Cores
from ..layers.experts import LoTRExperts
from ..layers.factors import LoTRFactors
from ..layers.gradient import Loss, write_factors
from ..layers.hosted import LoTRHostedExperts
from ..layers.init import fill_core_
from ..layers.layer import LoTRLayer
from ..layers.linear import LoTRWrapped, layer_class
from ..layers.merging import MergeNotice, write_
from ..layers.placement import home
from ..layers.quantized import has_plain_weight
from ..layers.request import OFF, in_force
from ..layers.settings import Settings
from ..layers.sharded import agree_over, holds_parts, is_tensor_parallel, reshard
from ..layers.uninterrupted import uninterrupted
from .adapted import adapted_layers, expect_merged, lotr_parameters
from .batching import hook_batching, unhook_batching
from .config import LoTRConfig
from .core_forms import form_at, make_cores
from .experts import adapt_parameter, release
from .first_step import expect_training
from .heads import warn_of_frozen_heads, with_head
from .names import tied_names
from .readers import hook_fusing, unhook_fusing
from .save_hook import hook_saving, tell_holder, unhook_saving
from .scope import attach_scope, detach_scope
from .shared_factors import SharedFactors
from .sizes import check_memory
from .stages import inner_model
from .starts import Start, directions, probed_layers, set_fast_paths, set_start, svd_starts
from .targets import Selection, Target, has_hooks, select

__all__ = ["SharedFactors", "adapted_layers", "apply_lotr", "disabled", "lotr_parameters", "merge", "unload", "unmerge"]

Model = TypeVar("Model", bound=nn.Module)


def apply_lotr(
    model: Model,
    config: LoTRConfig,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> Model:
    """Adapts a model in place: y = x W^T + bias + s ((x A) G_l) B^T for each targeted layer l (arXiv 2402.01376), and with
    target_parameters for each expert of a transformers mixture.

    The layers' weights and all other parameters are frozen, except modules_to_save. Each group gets one pair A [K, r_in],
    B [N, r_out] and each layer a core [r_in, r_out], in config.adapter_dtype. The model's output does not change at first (with
    init "svd" except for one rounding of each weight).

    Args:
        model: any nn.Module with nn.Linear layers, transformers' Conv1D, or named modules that have in_features and
            out_features (those are wrapped, and their own forward is called). Layers with hooks or parametrizations are
            wrapped too. A layer that is registered in several places stays one layer. In a SentenceTransformer the
            transformers model inside is adapted, and names are relative to it.
        config: what to adapt and how.
        batches: for a start from the gradient only, as in `init_from_gradient`. If they are given and neither A nor B is
            trained, the default init becomes "gradient".
        loss: for a start from the gradient only, as in `init_from_gradient`.
        progress: whether a start from the gradient shows a progress bar.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: a model that is adapted already, wrapped or compiled; targets, exclusions or
            modules_to_save that match nothing; a target that is not linear, that shares its weight with another module, or
            whose weight is read without it being called (nn.MultiheadAttention.out_proj); experts of an unknown format, or of a
            class that takes no implementations of experts; groups of mixed shapes; "svd" on weights that cannot be read;
            "gradient" without batches and loss, or an error of `init_from_gradient`. The model is unchanged then.
    """
    if (inner := inner_model(model)) is not model:
        apply_lotr(inner, config, batches=batches, loss=loss, progress=progress)
        _adapt_around(model, inner)
        return model
    config = with_head(model, config)
    if batches is not None and config.init == "orthonormal" and not {"A", "B"} & set(config.train):
        config = replace(config, init="gradient")
    selection = select(model, config)
    probed = probed_layers(selection, config) if config.init == "gradient" else {}
    for name, given in (("batches", batches), ("loss", loss)):
        if given is not None and not probed:
            raise ValueError(f'{name}: expected None without init "gradient", got {type(given).__name__} with {config.init!r}')
    check_memory(selection.targets, config)
    cores = make_cores(config, [t.name for t in selection.targets], home(selection.targets[0].module))
    found = directions(model, probed, batches, loss, progress) if probed else {}
    starts = svd_starts(selection, config) if config.init == "svd" else None
    with uninterrupted():
        install(model, config, selection, starts, cores)
        write_factors({model.get_submodule(name): one for name, one in probed.items()}, found)
    warn_of_frozen_heads(model)
    return model


def _adapt_around(model: nn.Module, inner: nn.Module) -> None:
    """What holds `inner`, which is adapted: all of it is frozen, and its modules save and load the adapter."""
    own = {id(p) for p in inner.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
    for module in model.modules():
        tell_holder(inner, module)


def install(
    model: Model,
    config: LoTRConfig,
    selection: Selection,
    starts: dict[str, Start] | None,
    cores: Cores | None = None,
) -> Model:
    """Adapts the layers of a selection. starts: with init "svd" the adapters that are subtracted from the weights. cores: None
    for dense ones."""
    model.requires_grad_(False)
    for module in selection.saved.values():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    shared = SharedFactors()
    for group, targets in selection.groups.items():
        first = targets[0]
        sizes = first.in_features, first.out_features
        factors = shared.pair(group, sizes, config, home(first.module), config.adapter_dtype)
        layers = [_replace(model, target, factors, config) for target in targets]
        for target, layer in zip(targets, layers) if cores is not None else ():
            layer.hold_core(form_at(cores, target.name))
        if starts is not None:
            set_start(layers, starts[group])
            write_(factors.A, factors.start_A)
            write_(factors.B, factors.start_B)
            for layer in layers:
                write_(layer.core, layer.start_core)
                if config.magnitude:
                    layer.reset_magnitude()
    shared.set_trained(config.train)
    model.lotr_factors = shared
    parts = (w for t in selection.targets if is_dtensor(w := getattr(t.module, t.parameter or "weight", None)))
    agree_over(next(parts, None), (*shared.parameters(), *(() if cores is None else cores.parameters())))
    if cores is not None:
        model.lotr_cores = cores
    if callable(config.group_by):  # a callable cannot be pickled or saved; the groups that it returned can
        config = replace(config, group_by={t.name: t.group for t in selection.targets})
    model.lotr_config = config
    set_fast_paths(model, off=True)
    attach_scope(model)
    hook_saving(model)
    hook_fusing(model)
    hook_batching(model)
    expect_training(model)
    return model


def _replace(model: nn.Module, target: Target, factors: LoTRFactors, config: LoTRConfig) -> LoTRLayer:
    settings = Settings.of(config)
    if target.parameter is not None:
        layer = adapt_parameter(target.module, target.parameter, factors, settings)
    else:
        kind = LoTRWrapped if target.wrap else layer_class(target.module)
        layer = kind.adapting(target.module, factors, settings)
    layer.leave_factors_to_owner()
    fill_core_(layer.core, config.core_init)
    layer.set_trained(config.train)
    for name in target.names if target.parameter is None else ():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layer


# ---- adapted models --------------------------------------------------------------------------------------------------


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the context the model computes without the adapter (modules_to_save stay as they are now).

    The context applies to the thread or asyncio task that opened it, and to checkpoint recomputation of its forwards.

    Raises:
        TypeError, RuntimeError: no adapter, or a merged one (unmerge it first).
    """
    layers = adapted_layers(model)
    expect_merged(layers, False, "disabled")
    with in_force(dict.fromkeys(layers.values(), OFF)):
        yield model


def _check_mergeable(
    model: nn.Module, layers: dict[str, LoTRLayer], safe: bool, dequantize: bool | torch.dtype = False
) -> None:
    if not isinstance(dequantize, bool) and not (isinstance(dequantize, torch.dtype) and dequantize.is_floating_point):
        raise TypeError(f"dequantize: expected True, False or a floating dtype, got {dequantize!r}")
    _check_whole(model, layers, "merge")
    tied = tied_names(model)
    for name, layer in layers.items():
        if isinstance(layer, LoTRWrapped):
            why = None if layer.merged else layer.why_not_mergeable(dequantize, repr(name))
            if why is not None:
                raise TypeError(why)
            if safe and not layer.merged:
                dtype = None if isinstance(dequantize, bool) else dequantize
                _check_finite(name, layer.merged_linear(dtype).weight)
            continue
        layer.check_parameter("weight", "merge", name)
        if others := tied.get(id(layer.holder)):
            raise RuntimeError(f"merge: expected a weight of its own, got {name!r}, tied to {', '.join(others)}")
        if layer.weight.is_meta or layer.core.is_meta:
            raise RuntimeError(f"merge: expected tensors with values, got {name!r} on the meta device")
        if not has_plain_weight(layer):
            kind = type(layer.weight).__name__
            raise TypeError(f"merge: expected a plain weight, got {kind} in {name!r}; quantise a model before apply_lotr")
        if safe and not layer.merged:
            _check_finite(name, layer._merged_weight())


def _check_whole(model: nn.Module, layers: dict[str, LoTRLayer], where: str) -> None:
    """Raises RuntimeError if FSDP or ZeRO-3 holds a layer in parts. where: the caller, for the message."""
    reshard(model)  # FSDP2 keeps its root whole after a forward without gradients, and writes to that copy would be lost
    if is_tensor_parallel(model):
        return
    for name, layer in layers.items():
        if holds_parts(layer.holder) or holds_parts(layer):
            raise RuntimeError(
                f"{where}: expected whole tensors, got {name!r} held in parts; save_adapter, then load it in one process"
            )


def _check_finite(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError(f"merge: expected finite weights (safe=True), got NaN or infinity in {name!r}")


def _check_unmergeable(layers: dict[str, LoTRLayer]) -> None:
    for name, layer in layers.items():
        if layer.merged and not isinstance(layer, LoTRWrapped):
            layer.check_parameter("weight", "unmerge", name)
        wrapped = isinstance(layer, LoTRWrapped)
        kept, what = (layer.quantized_base, "the quantised base") if wrapped else (layer.weight_backup, "a copy of the base")
        if layer.merged and layer.unmerges_by_backup and kept is None:
            raise RuntimeError(f"unmerge: expected {what} of {name!r}, got a layer merged with keep_backup=False")


def _merge_layer(layer: LoTRLayer, safe: bool, keep_backup: bool, dequantize: bool | torch.dtype) -> None:
    if isinstance(layer, LoTRWrapped):
        layer.merge(safe=safe, keep_backup=keep_backup, dequantize=dequantize)
    else:
        layer.merge(safe=safe, keep_backup=keep_backup)


def merge(model: Model, *, safe: bool = False, keep_backup: bool = True, dequantize: bool | torch.dtype = False) -> Model:
    """Adds every layer's s B G^T A^T to its weight, and with magnitudes scales each row to its length (in fp32, cast once). On
    an error, also Ctrl-C, no layer is merged; without keep_backup the weights are then as before up to rounding.

    safe: raise if a result is not finite. keep_backup: keep the weights, so that `unmerge` restores the same bits. Without
    them it subtracts, which is exact only up to rounding, and raises with magnitudes. dequantize: replace each quantised layer
    (torchao, bitsandbytes) by a plain nn.Linear, of this dtype if one is given; without it they raise. `unmerge` restores the
    quantised layers from the backup.

    Raises:
        TypeError: no nn.Module, a base that cannot be merged into, or a weight that is no longer a parameter (weight_norm,
            spectral_norm, parametrizations, pruning). ValueError: safe, and a result is not finite.
        RuntimeError: no adapter, one that is merged already, on the meta device, in parts, or a weight tied to another module.
    """
    layers = adapted_layers(model)
    expect_merged(layers, False, "merge")
    _check_mergeable(model, layers, safe, dequantize)
    _merge_all(layers.values(), safe, keep_backup, dequantize)
    return model


def _merge_all(layers: Iterable[LoTRLayer], safe: bool, keep_backup: bool, dequantize: bool | torch.dtype) -> None:
    """Merges all layers; if one fails, unmerges those before it."""
    done: list[LoTRLayer] = []
    try:
        for layer in layers:
            with uninterrupted():
                _merge_layer(layer, safe, keep_backup or layer.unmerges_by_backup, dequantize)
                done.append(layer)
    except BaseException:
        with uninterrupted():
            for layer in done:
                layer.unmerge()
        raise
    notice = MergeNotice()
    for layer in done:
        layer.notice = notice
        if not keep_backup:  # some layers needed it until here, for an unmerge after an error
            layer.weight_backup = None
            if isinstance(layer, LoTRWrapped):
                layer.quantized_base = None


def unmerge(model: Model) -> Model:
    """Removes the adapter from the weights of all merged layers. After an interruption, call it again for the rest.

    Raises:
        TypeError, RuntimeError: no adapter, one that is not merged or in parts, or a dequantised one without a backup.
    """
    layers = adapted_layers(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    if not merged:
        expect_merged(layers, True, "unmerge")
    _check_whole(model, merged, "unmerge")
    _check_unmergeable(merged)
    for layer in merged.values():
        layer.unmerge()
    return model


def unload(model: Model, *, merge: bool, dequantize: bool | torch.dtype = False) -> Model:
    """Removes all adapters: plain layers in their old places, no factors, no cores. Frozen parameters stay frozen.

    merge: True merges the active adapter into the weights, False restores the base weights (with "svd" up to one rounding).
    modules_to_save stay as they are now. dequantize: as in `merge`. Returns the same model; if the model is itself an adapted
    layer, returns the plain layer with the same weight and bias.

    Raises:
        TypeError, ValueError, RuntimeError: as `merge` and `unmerge`, and for a bias that is no parameter, adapted layers
            with hooks, or a model in parts. The model is unchanged then; if a merge of some layers was undone (no memory,
            Ctrl-C), up to rounding.
    """
    if not isinstance(merge, bool):
        raise TypeError(f"merge: expected True or False, got {merge!r}")
    layers = adapted_layers(model)
    if (inner := inner_model(model)) is not model:
        unload(inner, merge=merge, dequantize=dequantize)
        return model
    _check_unloadable(model, layers, merge, dequantize)
    if merge:
        _merge_all([layer for layer in layers.values() if not layer.merged], False, False, dequantize)
    else:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
    return _without_adapters(model, layers)


@uninterrupted()
def _without_adapters(model: Model, layers: dict[str, LoTRLayer]) -> Model:
    """`unload` once nothing more can be refused."""
    for host in {id(layer.holder): layer.holder for layer in layers.values() if isinstance(layer, LoTRHostedExperts)}.values():
        release(host)
    bases = {id(layer): layer.to_base() for layer in layers.values() if not isinstance(layer, LoTRHostedExperts)}
    set_fast_paths(model, off=False)
    unhook_saving(model)
    unhook_fusing(model)
    unhook_batching(model)
    if isinstance(model, LoTRLayer):  # there is no place to put the plain one
        return bases[id(model)]
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoTRLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, bases[id(layer)])
    for owner in [m for m in model.modules() if isinstance(m._modules.get("lotr_factors"), SharedFactors)]:  # a part, maybe
        del owner.lotr_factors, owner.lotr_config
        for beside in ("lotr_parked", "lotr_tasks", "lotr_cores"):
            if hasattr(owner, beside):
                delattr(owner, beside)
        detach_scope(owner)
    return model


def _check_unloadable(model: nn.Module, layers: dict[str, LoTRLayer], merge: bool, dequantize: bool | torch.dtype) -> None:
    _check_whole(model, layers, "unload")  # the wrapper would go on gathering the parameters for the removed layers
    for name, layer in layers.items():
        if isinstance(layer, LoTRExperts) and not isinstance(layer, LoTRHostedExperts):
            raise TypeError(
                f"unload: expected layers with a plain form, got {name!r}, a LoTRExperts; merge it and take its weight"
            )
    if merge:
        _check_mergeable(model, layers, False, dequantize)
    else:
        _check_unmergeable(layers)
    if not merge and any(layer.start_core is not None for layer in layers.values()):
        _check_mergeable(model, layers, safe=False)  # the start is added back to the weight
    for name, layer in layers.items():
        for part in () if isinstance(layer, LoTRWrapped) else ("weight", "bias"):
            layer.check_parameter(part, "unload", name)
        if has_hooks(layer) and not is_dtensor(getattr(layer, "weight", None)):
            raise RuntimeError(
                f"unload: expected layers without hooks, which would be lost, got some on {name!r}; remove them first"
            )
