"""A fingerprint of the weights that an adapter was trained on. Its file contains it, and loading onto other weights warns."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..layers.layer import LoTRLayer
from ..layers.linear import LoTRConv1D
from ..layers.quantized import has_plain_weight, is_conv1d
from ..layers.sharded import in_parts
from ..layers.wrapped import LoTRWrapped

__all__ = ["fingerprint", "warn_of_another_base"]

LAYERS, NUMBERS = 4, 1024  # how many layers are hashed, and how many elements of each


@torch.no_grad()
def _of_weight(module: nn.Module) -> str | None:
    """The dtype and a hash of elements of a layer's base weight, "float32:1f0c..."; None if the weight is quantised, in parts,
    trained, computed, on the meta device, or changed by init "svd"."""
    backup, base = None, module
    if isinstance(module, LoTRLayer):
        if module.start_core is not None or (module.merged and (backup := module.weight_backup) is None):
            return None
        base = module.base_layer if isinstance(module, LoTRWrapped) else module
    if not (isinstance(base, nn.Linear | LoTRLayer) or is_conv1d(base)) or not has_plain_weight(base):
        return None
    weight = base.weight
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or in_parts(weight) or weight.is_meta or weight.dim() != 2:
        return None
    if backup is not None:  # [out_features, in_features], whatever the layer stores
        weight = backup.t() if isinstance(base, LoTRConv1D) else backup
    if weight.numel() == 0:
        return None
    at = torch.arange(min(NUMBERS, weight.numel()), device=weight.device) * (weight.numel() // min(NUMBERS, weight.numel()))
    numbers = weight.detach()[at // weight.shape[1], at % weight.shape[1]].cpu().contiguous()
    digest = hashlib.sha256(bytes(numbers.view(torch.uint8).tolist())).hexdigest()[:16]
    return f"{str(weight.dtype).removeprefix('torch.')}:{digest}"


def fingerprint(layers: Mapping[str, LoTRLayer]) -> dict[str, str]:
    """Hashes of the base weights of a few of the layers, by name; empty if they cannot be read."""
    named = list(layers.items())
    chosen = {i * (len(named) - 1) // max(LAYERS - 1, 1) for i in range(LAYERS) if named}
    found = {named[i][0]: _of_weight(named[i][1]) for i in sorted(chosen)}
    return {name: value for name, value in found.items() if value is not None}


def warn_of_another_base(model: nn.Module, saved: Mapping[str, str]) -> None:
    """Warns once if the model's weights differ from a saved fingerprint. Weights of another dtype are not compared."""
    modules = dict(model.named_modules())
    for name, want in saved.items():
        got = None if name not in modules else _of_weight(modules[name])
        if got is not None and got.partition(":")[0] == want.partition(":")[0] and got != want:
            warnings.warn(
                f"lotr_ext: the adapter was trained on other base weights than those of {name!r} in this model, so its results "
                "will differ; load the base model that it was trained on",
                stacklevel=5,
            )
            return
