"""Checkpoints of the original LoTR implementation (github.com/daskol/lotr) as adapters of this package.

An adapted layer there has its frozen layer as `linear` and, repeated in every layer, the transposed factors:

    <layer>.linear.weight, .linear.bias     the base layer: not part of an adapter
    <layer>.lotr.rhs [in_features, r]       A, one tensor for all layers made from one container
    <layer>.lotr.mid [r, r]                 the layer's core
    <layer>.lotr.lhs [r, out_features]      B^T, shared like rhs

    y = linear(x) + (scale / r) x rhs mid lhs        scale is an argument of the layers, not in the checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..layers.checks import check_number, check_values
from ..model.adapter_files import LayerEntry
from ..model.config import LoTRConfig
from .adapter import LoTRAdapter
from .lora_files import modules_holding, read_tensors

__all__ = ["original_to_lotr"]

_KEY = re.compile(r"(?P<name>.+)\.lotr\.(?P<part>lhs|mid|rhs)")


@torch.no_grad()
def original_to_lotr(
    source: str | PathLike[str] | Mapping[str, Tensor],
    *,
    scale: float = 1.0,
    modules_to_save: Sequence[str] | None = None,
) -> LoTRAdapter:
    """The adapter in a state dict of a model with layers of the original implementation.

    Args:
        source: a file of torch.save or safetensors, or the state dict.
        scale: the argument of its LoTRLinear; their default is 1. The adapter's scaling is scale / r.
        modules_to_save: endings of names of modules that were trained whole (a head): copied.

    Returns:
        The adapter: `.save(directory)`, then `lotr_ext.load_adapter(model, directory)`.

    Raises:
        ValueError: no such layers; parts missing or of shapes that do not fit; layers of several ranks; no such
            modules_to_save; a scale that is not finite. TypeError: a scale that is not a number.
    """
    check_number("scale", scale)
    state = dict(source) if isinstance(source, Mapping) else read_tensors(Path(source))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if (found := _KEY.fullmatch(key)) is not None:
            parts.setdefault(found["name"], {})[found["part"]] = tensor
    if not parts:
        raise ValueError(f"source: expected tensors <layer>.lotr.lhs, .mid and .rhs, got {len(state)} others")
    for name, layer in parts.items():
        _check(name, layer)
    ranks = {tuple(layer["mid"].shape) for layer in parts.values()}
    if len(ranks) > 1:
        raise ValueError(f"source: expected layers of one rank, got {sorted(r for r, _ in ranks)}")
    dtypes = {t.dtype for layer in parts.values() for t in layer.values()}
    if len(dtypes) > 1:
        raise ValueError(f"source: expected adapter tensors of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    (rank, _), (dtype,) = ranks.pop(), dtypes
    groups = _groups(parts)
    layers, tensors = {}, {}
    for name, layer in parts.items():
        prefix = f"lotr_factors.{groups[name]}"
        layers[name] = LayerEntry(prefix, layer["rhs"].shape[0], layer["lhs"].shape[1], scale / rank, 0.0)
        tensors |= {f"{prefix}.A": layer["rhs"], f"{prefix}.B": layer["lhs"].T.contiguous(), f"{name}.core": layer["mid"]}
    config = LoTRConfig(
        rank=rank,
        scaling=scale / rank,
        target_modules=sorted(layers),
        modules_to_save=modules_to_save,
        group_by=groups,
        init="normal",
        adapter_dtype=dtype,
    )
    return LoTRAdapter(config, layers, tensors, _saved(state, tuple(config.modules_to_save or ())))


def _check(name: str, layer: Mapping[str, Tensor]) -> None:
    missing = {"lhs", "mid", "rhs"} - set(layer)
    if missing:
        raise ValueError(f"{name}: expected lotr.lhs, .mid and .rhs, got none of {', '.join(sorted(missing))}")
    lhs, mid, rhs = (layer[part] for part in ("lhs", "mid", "rhs"))
    if any(t.dim() != 2 for t in layer.values()) or mid.shape != (rhs.shape[1], lhs.shape[0]) or mid.shape[0] != mid.shape[1]:
        shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in sorted(layer.items()))
        raise ValueError(f"{name}: expected lhs [r, out], mid [r, r], rhs [in, r], got {shapes}")
    for part, t in sorted(layer.items()):
        check_values(name, f"lotr.{part}", t)


def _groups(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Groups of layers with equal factors: named by shape, and numbered if several groups have the same shape."""
    groups: dict[str, str] = {}
    firsts: dict[str, Mapping[str, Tensor]] = {}
    for name, layer in parts.items():
        shape = f"{layer['rhs'].shape[0]}x{layer['lhs'].shape[1]}"
        group, number = shape, 1
        while group in firsts and not all(torch.equal(firsts[group][part], layer[part]) for part in ("lhs", "rhs")):
            number += 1
            group = f"{shape}_{number}"
        firsts.setdefault(group, layer)
        groups[name] = group
    return groups


def _saved(state: Mapping[str, Tensor], endings: tuple[str, ...]) -> dict[str, Tensor]:
    saved = {}
    for ending in endings:
        found = {key: tensor for key, tensor in state.items() if modules_holding(key, (ending,))}
        if not found:
            raise ValueError(
                f"modules_to_save: expected names of modules in the checkpoint, got {ending!r}, which matches none"
            )
        saved |= found
    return saved
