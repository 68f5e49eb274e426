"""A LoTR adapter that was converted from another format: what `save_adapter` would write, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.adapter_files import LayerEntry, Manifest, write
from ..model.config import LoTRConfig
from ..model.names import group_name
from ..model.targets import checked_group
from .lora_files import modules_holding

__all__ = ["LoTRAdapter", "assembled", "group_names"]


@dataclass(frozen=True)
class LoTRAdapter:
    """config, layers and tensors as in a saved adapter. `save` it, then `lotr_ext.load_adapter(model, directory)`."""

    config: LoTRConfig
    layers: dict[str, LayerEntry]
    tensors: dict[str, Tensor]
    saved: dict[str, Tensor]

    _tied = None  # as in Manifest

    @property
    def parameters(self) -> int:
        """The adapter's own parameters, without modules_to_save."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def groups(self) -> dict[str, list[str]]:
        """Layer names by group."""
        groups: dict[str, list[str]] = {}
        for name, entry in self.layers.items():
            groups.setdefault(entry.factors.removeprefix("lotr_factors."), []).append(name)
        return groups

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes the adapter for `load_adapter`; replaces one that is already in the directory.

        Raises:
            ValueError: directory is a file. OSError: the disk.
        """
        endings = self.config.modules_to_save or ()
        modules = {name: None for key in self.saved for name in modules_holding(key, endings)}
        manifest = Manifest(self.config, self.layers, tuple(modules), tied=self._tied)
        write(Path(directory), manifest, {**self.tensors, **self.saved})


def assembled(
    groups: Mapping[str, Sequence[str]],
    sizes: Mapping[str, tuple[int, int]],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    cores: Mapping[str, Tensor],
    dtype: torch.dtype,
    **settings: Any,
) -> tuple[LoTRConfig, dict[str, LayerEntry], dict[str, Tensor]]:
    """The config, layers and tensors of a LoTRAdapter with scaling 1.

    groups: layer names by group; sizes: (in_features, out_features) by layer; factors: A and B by group; cores: by layer.
    settings: other fields of the configuration. Raises ValueError for values that dtype cannot hold.
    """
    layers, tensors = {}, {}
    config = LoTRConfig(scaling=1.0, target_modules=sorted(sizes), adapter_dtype=dtype, **settings)
    for group, names in groups.items():
        prefix = f"lotr_factors.{group}"
        tensors |= {f"{prefix}.{part}": factor.to(dtype).contiguous() for part, factor in zip("AB", factors[group])}
        for name in names:
            layers[name] = LayerEntry(prefix, *sizes[name], 1.0, config.dropout)
            tensors[f"{name}.core"] = cores[name].to(dtype)
    check_range(tensors)
    return config, layers, tensors


def check_range(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all values are finite: finite ones may have become infinite in a narrow dtype."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"dtype: expected one that can hold the values of {name}, got {tensor.dtype}; use a wider one")


def group_names(sizes: Mapping[str, tuple[int, int]], group_by: str | Mapping[str, str]) -> dict[str, str]:
    """Each layer's group, as `apply_lotr` makes them. sizes: (in_features, out_features) by layer.

    Raises:
        TypeError, ValueError: group_by is not "shape", "block", "name" or a mapping of exactly these layers to names that
            modules can have, or it puts layers of different shapes into one group.
    """
    group_by = LoTRConfig(group_by=group_by).group_by
    if callable(group_by):
        raise TypeError('group_by: expected "shape", "block", "name" or a mapping, got a callable, which needs a model')
    if group_by == "width":
        raise ValueError(
            'group_by: expected "shape", "block", "name" or a mapping, got "width": a pair is found for layers of one shape'
        )
    if isinstance(group_by, dict) and set(group_by) != set(sizes):
        missing, unknown = sorted(set(sizes) - set(group_by)), sorted(set(group_by) - set(sizes))
        raise ValueError(
            "group_by: expected a group for each adapted layer and no other, got none for "
            f"{', '.join(missing[:3]) or 'no layer'} and one for {', '.join(unknown[:3]) or 'no other'}"
        )
    groups, first = {}, {}
    for name, (k, n) in sizes.items():
        group = group_by[name] if isinstance(group_by, dict) else group_name(name, (k, n), group_by)
        groups[name] = checked_group(name, group)
        other = first.setdefault(group, name)
        if sizes[other] != (k, n):
            raise ValueError(
                f"group_by: expected layers of one shape in group {group!r}, got {other!r} {sizes[other]} and {name!r} {k, n}"
            )
    return groups
