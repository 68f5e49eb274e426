"""Merges the adapters of a model into its weights, and takes them out: merge, unmerge, unload."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..autograd.tensor_parallel import is_dtensor
from ..layers.experts import LoTRExperts
from ..layers.hosted import LoTRHostedExperts
from ..layers.layer import LoTRLayer
from ..layers.merging import MergeNotice
from ..layers.quantized import has_plain_weight
from ..layers.sharded import holds_parts, is_tensor_parallel, reshard
from ..layers.uninterrupted import uninterrupted
from ..layers.wrapped import LoTRWrapped
from .adapted import adapted_layers, expect_merged
from .batching import unhook_batching
from .experts import release
from .names import tied_names
from .readers import unhook_fusing
from .save_hook import unhook_saving
from .scope import detach_scope
from .shared_factors import SharedFactors
from .stages import inner_model
from .starts import set_fast_paths
from .targets import has_hooks

__all__ = ["merge", "unload", "unmerge"]

Model = TypeVar("Model", bound=nn.Module)


def _check_mergeable(
    model: nn.Module, layers: dict[str, LoTRLayer], safe: bool, dequantize: bool | torch.dtype = False
) -> None:
    if not isinstance(dequantize, bool) and not (isinstance(dequantize, torch.dtype) and dequantize.is_floating_point):
        raise TypeError(f"dequantize: expected True, False or a floating dtype, got {dequantize!r}")
    _check_whole(model, layers, "merge")
    tied = tied_names(model)
    for name, layer in layers.items():
        wrapped = isinstance(layer, LoTRWrapped)
        if wrapped and not layer.in_place:
            _check_wrapped(name, layer, dequantize)
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
        if wrapped:
            _check_wrapped(name, layer, dequantize)
        if safe and not layer.merged:
            _check_finite(name, layer._merged_weight())


def _check_wrapped(name: str, layer: LoTRWrapped, dequantize: bool | torch.dtype) -> None:
    if not layer.merged and (why := layer.why_not_mergeable(dequantize, repr(name))) is not None:
        raise TypeError(why)


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
        in_place = not isinstance(layer, LoTRWrapped) or layer.in_place
        if layer.merged and in_place:
            layer.check_parameter("weight", "unmerge", name)
        kept, what = (layer.weight_backup, "a copy of the base") if in_place else (layer.quantized_base, "the quantised base")
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
        TypeError: no nn.Module, a base that cannot be merged into, or that does not return x W^T + bias, by a hook or its own
            forward, or a weight that is no longer a parameter (weight_norm, spectral_norm, parametrizations, pruning).
        ValueError: safe, and a result is not finite.
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
