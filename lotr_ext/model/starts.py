"""Starts of adapters from the SVD of the weights (`svd_starts`, `set_start`), or from the leading directions of their gradients
(`probed_layers`, `directions`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.gradient import Key, Loss, Probed, expect_whole, leading_directions
from ..layers.init import tucker2
from ..layers.layer import LoTRLayer
from ..layers.merging import plus, write_
from ..layers.settings import Settings
from ..layers.sharded import holds_parts, in_parts
from ..ops.composite import delta_weight
from .config import LoTRConfig
from .targets import Selection

Start = tuple[Tensor, Tensor, Tensor]  # A, B, cores


@torch.no_grad()
def set_start(layers: Sequence[LoTRLayer], start: Start | None, scalings: Sequence[float] | None = None) -> None:
    """Sets the start adapter of the layers of one group: subtracts its delta from their weights and adds the delta of their
    former start, in fp32, cast once. layers: all of the group, since they share start_A and start_B.

    scalings: the layers' new scalings if they change; the caller sets them.
    """
    factors, weights, new = layers[0].factors, [], None
    scalings = scalings or [layer.scaling for layer in layers]
    if start is not None:  # in the parameters' dtype and device, so that a reload subtracts exactly the same numbers
        A, B = start[0].to(factors.A), start[1].to(factors.B)
        new = [core.to(layer.core) for core, layer in zip(start[2], layers, strict=True)]
    for i, layer in enumerate(layers):
        change = 0.0
        if layer.start_core is not None:
            change = change + delta_weight(factors.start_A, factors.start_B, layer.start_core, layer.scaling)
        if new is not None:
            change = change - delta_weight(A, B, new[i], scalings[i])
        matrix = layer._matrix()
        weights.append(matrix if isinstance(change, float) else plus(matrix, change))
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        write_(layer._weight_to_write("load_adapter"), weight)
        layer.start_core = None if new is None else new[i]
    factors.start_A, factors.start_B = (None, None) if new is None else (A, B)


def check_start(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> None:
    """Raises unless `load_adapter` may change the weights of these layers of a model, by name."""
    for name, layer in layers.items():
        layer.check_parameter("weight", "load_adapter", name)
        if holds_parts(layer.holder):
            raise RuntimeError(
                f'load_adapter: expected whole weights, since init "svd" changes them, got {name!r} held in parts; '
                "load the adapter first, then shard the model"
            )
    others = [*getattr(model, "lotr_parked", ()), *(["a TaskBank"] if hasattr(model, "lotr_tasks") else [])]
    if others:
        raise RuntimeError(
            'load_adapter: expected an init other than "svd", which changes the base weights, in a model with '
            f'{", ".join(others)} over the same weights, got "svd"; load it into a model of its own'
        )


def svd_starts(selection: Selection, config: LoTRConfig) -> dict[str, Start]:
    """The starts of init "svd" by group. Raises ValueError for a scaling of 0 and weights that are not finite."""
    scaling = Settings.of(config).scale(config.rank)
    if scaling == 0.0:
        raise ValueError('init: expected a scaling other than 0 with "svd", got 0')
    starts = {}
    for group, targets in selection.groups.items():
        weights = [t.module.weight if isinstance(t.module, nn.Linear) else t.module.weight.T for t in targets]
        for target, weight in zip(targets, weights, strict=True):
            if in_parts(target.module.weight):
                raise ValueError(f'init: expected whole weights for "svd", got {target.name!r} held in parts; adapt it first')
            if not torch.isfinite(weight).all():
                raise ValueError(f'init: expected finite weights for "svd", got NaN or infinity in {target.name!r}')
        A, B, cores = tucker2(weights, config.ranks)
        starts[group] = (A, B, cores / scaling)
    return starts


def probed_layers(selection: Selection, config: LoTRConfig) -> dict[str, Probed]:
    """The selected layers by name, with the keys of the factors that each will have."""
    by_width, found = config.group_by == "width", {}
    for t in selection.targets:
        A, B = (t.in_features, t.out_features) if by_width else (t.group, t.group)
        found[t.name] = Probed(t.module, t.in_features, t.out_features, A, B, config.ranks)
    return found


def directions(
    model: nn.Module, probed: dict[str, Probed], batches: Iterable[Any] | None, loss: Loss | None, progress: bool
) -> dict[Key, Tensor]:
    """`leading_directions` of a model that is not adapted yet."""
    expect_whole(model)
    set_fast_paths(model, off=True, adapted=nn.Module)  # a fast path would not call the layers
    try:
        return leading_directions(model, probed, batches, loss, progress)
    finally:
        set_fast_paths(model, off=False)


def set_fast_paths(model: nn.Module, *, off: bool, adapted: type[nn.Module] = LoTRLayer) -> None:
    """Turns fast paths off or on again in modules with adapted layers. nn.TransformerEncoderLayer's reads the weights of its
    linear layers without calling them, and nn.TransformerEncoder makes nested tensors for it. Both depend on attributes that
    nothing else reads.
    """
    for module in model.modules():
        attribute = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
        for cls, name in attribute.items():
            if not isinstance(module, cls) or not hasattr(module, name):
                continue
            if off and any(isinstance(m, adapted) for m in module.modules()):
                module._lotr_fast_path = getattr(module, "_lotr_fast_path", getattr(module, name))
                setattr(module, name, 0 if cls is nn.TransformerEncoderLayer else False)
            elif not off and hasattr(module, "_lotr_fast_path"):
                setattr(module, name, module._lotr_fast_path)
                del module._lotr_fast_path
