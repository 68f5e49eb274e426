"""The factors of a model, each registered once: a pair per group, or one A and one B per width."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..layers.factors import LoTRFactor, LoTRFactors
from ..layers.init import FOUND_INITS

if TYPE_CHECKING:
    from .config import LoTRConfig

__all__ = ["Owner", "SharedFactors", "add_values", "counterpart", "factors_by_part", "factors_checksum", "width_names"]

Owner = LoTRFactors | LoTRFactor  # the modules that a model registers


def width_names(in_features: int, out_features: int) -> tuple[str, str]:
    """The names of A and B of such layers with group_by="width"."""
    return f"A_{in_features}", f"B_{out_features}"


class SharedFactors(nn.ModuleDict):
    """The pairs by group name; with group_by="width" a LoTRFactor by `width_names`. Its forward returns the input, since
    nn.Sequential calls all its children."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def pair(
        self, group: str, sizes: tuple[int, int], config: LoTRConfig, device: torch.device, dtype: torch.dtype
    ) -> LoTRFactors:
        """The pair of a group of layers of these (in_features, out_features); creates what is missing."""
        init = "kaiming" if config.init in FOUND_INITS else config.init  # these inits are written later
        if config.group_by == "width":
            names, (r_in, r_out) = width_names(*sizes), config.ranks
            for name, features, rank in zip(names, sizes, (r_in, r_out), strict=True):
                if name not in self:
                    self[name] = LoTRFactor(features, rank, init=init, device=device, dtype=dtype)
                    self._begin(self[name], name, config)
            return LoTRFactors.of(self[names[0]], self[names[1]], (r_in, r_out))
        if group not in self:
            self[group] = LoTRFactors(*sizes, config.rank, init=init, device=device, dtype=dtype)
            self._begin(self[group], group, config)
        return self[group]

    @staticmethod
    def _begin(owner: Owner, name: str, config: LoTRConfig) -> None:
        if config.core_init == "identity":  # B = 0 keeps the start unchanged, as in LoRA
            for part, module, attribute in _parts(name, owner):
                if part == "B":
                    nn.init.zeros_(getattr(module, attribute))

    def set_trained(self, train: Collection[str]) -> None:
        """Sets which of "A" and "B" require gradients."""
        for part, module, name in factors_by_part(self):
            getattr(module, name).requires_grad_(part in train)


def _parts(name: str, owner: Owner) -> Iterator[tuple[str, nn.Module, str]]:
    if isinstance(owner, LoTRFactor):
        yield name[0], owner, "value"
    else:
        yield from (("A", owner, "A"), ("B", owner, "B"))


def factors_by_part(owners: Mapping[str, Owner]) -> Iterator[tuple[str, nn.Module, str]]:
    """Each factor once: "A" or "B", the module that has it, and its name there. owners: as in SharedFactors."""
    for name, owner in owners.items():
        yield from _parts(name, owner)


def add_values(digest: hashlib._Hash, name: str, factor: torch.Tensor) -> None:
    """Adds a factor's name, shape, dtype and values to a checksum."""
    values = factor.detach().cpu().contiguous()
    digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.view(torch.uint8).numpy().tobytes())


def factors_checksum(owners: Mapping[str, Owner]) -> str:
    """A checksum of the values of all factors, in the order of owners."""
    digest = hashlib.sha256()
    for part, module, name in factors_by_part(owners):
        add_values(digest, part, getattr(module, name))
    return digest.hexdigest()


def counterpart(pair: LoTRFactors, old: Mapping[str, Owner], new: Mapping[str, Owner]) -> LoTRFactors:
    """The pair in `new` with the same names as `pair` in `old`."""
    names = {id(owner): name for name, owner in old.items()}
    if id(pair) in names:
        return new[names[id(pair)]]
    A, B = (new[names[id(module)]] for module, _ in pair.owners)
    return LoTRFactors.of(A, B, (A.rank, B.rank))
