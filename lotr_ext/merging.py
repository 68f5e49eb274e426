"""merge and unmerge: add the adapter of a model to its weights, and remove it.

    W + s B G_l^T A^T      for every adapted layer l, or for none if one of them cannot be merged

Not here: merging one layer (layers.py, wrapped.py) and taking the adapter off (`unload`, model.py).
"""

from collections.abc import Mapping

import torch
from torch import nn

from .adapted import Model, adapted_layers, unmerged_layers
from .first_step import watch
from .layers import LoTRLayer
from .targets import tied_names


def merge(
    model: Model,
    *,
    safe: bool = False,
    keep_backup: bool = True,
    dequantize: bool | torch.dtype = False,
) -> Model:
    """Adds s B G^T A^T to the weight of every adapted layer, in float32 and cast once.

    If one layer cannot be merged, none is.

    Args:
        model: An adapted model.
        safe: Whether to check that every merged weight is finite.
        keep_backup: Whether to keep a copy of each weight, so that `unmerge` restores it bit for
            bit. Without the copies, `unmerge` subtracts, which is exact up to rounding, and raises
            for a layer that was quantized.
        dequantize: Whether to replace each quantized layer (torchao, bitsandbytes) by a plain
            nn.Linear, or the floating dtype of that nn.Linear. `unmerge` restores the quantized
            layers from their backup.

    Returns:
        The same model.

    Raises:
        TypeError: If dequantize has a wrong type; if the adapter cannot be merged into a base; or
            if a weight is sharded, or not a parameter (weight_norm, parametrizations, pruning).
        ValueError: If a merged weight is not finite and safe is set.
        RuntimeError: If the model has no adapter, is merged already, or is on the meta device; or
            if a weight is tied to another module.
    """
    # Raises if a layer is merged: a second merge would add its adapter twice.
    layers = unmerged_layers(model, "merge")
    merge_layers(model, layers, safe=safe, dequantize=dequantize)
    # Only now: if a layer cannot be merged, the copies restore those before it.
    if not keep_backup:
        for layer in layers.values():
            layer.drop_backup()
    # `watch` warns of mistakes, such as an optimizer step on a merged adapter.
    watch(model)
    return model


def merge_layers(
    model: nn.Module,
    layers: Mapping[str, LoTRLayer],
    *,
    safe: bool = False,
    dequantize: bool | torch.dtype = False,
) -> None:
    """Merges layers of a model, all or none, and keeps a backup of each. Errors as for `merge`.

    Args:
        model: The model.
        layers: Unmerged layers by name.
        safe: As for `merge`.
        dequantize: As for `merge`.
    """
    is_dtype = isinstance(dequantize, torch.dtype) and dequantize.is_floating_point
    if not isinstance(dequantize, bool) and not is_dtype:
        raise TypeError(f"dequantize: expected True, False or a floating dtype, got {dequantize!r}")
    _check_weights(model, layers)
    merged: list[LoTRLayer] = []  # to be undone if a later one fails
    for name, layer in layers.items():
        try:
            layer.merge(safe, dequantize=dequantize)
        except BaseException as error:  # also an interrupt
            for other in merged:
                other.unmerge()
            if isinstance(error, (TypeError, ValueError, RuntimeError)):
                raise type(error)(f"{error} (in {name!r})") from None
            raise
        merged.append(layer)


def _check_weights(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> None:
    """Checks that each layer has values, and a weight that no other module reads."""
    tied = tied_names(model)
    for name, layer in layers.items():
        # On meta a merge would do nothing, without an error.
        if layer.core.is_meta or any(p.is_meta for p in layer.parameters()):
            raise RuntimeError(
                f"merge: expected tensors with values, got {name!r} on the meta device"
            )
        # Another module with the same weight, such as an embedding, would change as well. The
        # weight of a LoTRWrapped is its base's.
        other_names = tied.get(layer) or tied.get(getattr(layer, "base_layer", None))
        if other_names:
            raise RuntimeError(
                f"merge: expected a weight that no other module uses, got {name!r}, tied to "
                f"{', '.join(other_names)}"
            )


def unmerge(model: Model) -> Model:
    """Removes the adapter from the weights of all merged layers.

    Returns:
        The same model.

    Raises:
        RuntimeError: If the model has no adapter, or no layer is merged, or a layer was
            dequantized without a backup.
        TypeError: If a weight has become computed or sharded since the merge.
    """
    merged = {name: layer for name, layer in adapted_layers(model).items() if layer.merged}
    if not merged:
        raise RuntimeError("unmerge: expected merged layers, got none that is merged")
    # Before the first layer changes, so that all are unmerged or none.
    for name, layer in merged.items():
        if not getattr(layer, "replaced", False):
            layer._weight_to_write("unmerge")  # for its check
        # A base that was dequantized is replaced, and only the old module has its quantized values.
        elif layer.quantized_base is None:
            raise RuntimeError(
                f"unmerge: expected the quantized base of {name!r}, got a layer merged with "
                f"keep_backup=False"
            )
    for layer in merged.values():
        layer.unmerge()
    return model
