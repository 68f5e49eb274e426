"""Whether an adapter in a layer has an effect: whether the layer is called, has a weight of its own, and returns x W^T."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ..layers.own_forward import Other, other_result
from .readers import How, how_read

__all__ = ["Effect", "effect_of", "warn_of_doubtful", "warn_of_skipped"]


class Effect(NamedTuple):
    """readers: the classes of a layer's parents that read its weight without calling it, by how certain that is. other: what
    its forward returns, if that is not x W^T."""

    readers: dict[How, str]
    other: Other | None

    @property
    def none(self) -> str | None:
        """Why "all-linear" leaves the layer out with a warning; None if it does not."""
        if (reader := self.readers.get(How.ONLY)) is not None:
            return f"{reader} reads its weight without calling it"
        return None if self.other is None else self.other.what

    def check(self, name: str, module: nn.Module, tied: list[str]) -> None:
        """Raises ValueError for a named layer whose adapter would have no effect, or that does not return x W^T. tied: names of
        the modules that have its weight too."""
        if (reader := self.readers.get(How.ONLY)) is not None:
            raise ValueError(
                f"target_modules: expected layers that are called, got {name!r}, whose weight {reader} reads without calling "
                "it, which would ignore the adapter"
            )
        if tied:
            raise ValueError(
                f"target_modules: expected layers with a weight of their own, got {name!r}, tied to {', '.join(tied)}"
            )
        if self.other is not None and self.other.certain:
            got = f"{name!r} ({type(module).__name__}): {self.other.what}"
            raise ValueError(f"target_modules: expected layers that return x W^T, got {got}")


def effect_of(model: nn.Module, module: nn.Module, names: Iterable[str]) -> Effect:
    """names: all names of the layer in the model."""
    places = [name.rpartition(".") for name in names]
    found = (how_read(model.get_submodule(parent), child) for parent, _, child in places)
    return Effect({one[1]: one[0] for one in found if one is not None}, other_result(module))


def warn_of_skipped(skipped: Mapping[str, str], stacklevel: int = 4) -> None:
    """Warns about layers that "all-linear" left out, once a reason. skipped: their reasons (`Effect.none`), by name."""
    for why in dict.fromkeys(skipped.values()):
        names = ", ".join(name for name, reason in skipped.items() if reason == why)
        warnings.warn(f"lotr_ext: left out {names}: {why}", stacklevel=stacklevel)


def warn_of_doubtful(doubtful: list[tuple[str, str]]) -> None:
    """Warns once about layers whose weight may be read. doubtful: (layer, reading class)."""
    if doubtful:
        (first, reader), more = doubtful[0], len(doubtful) - 1
        warnings.warn(
            f"lotr_ext: {reader} reads {first}.weight{f', and so do parents of {more} other layers' if more else ''}; if it "
            "does not call the layer, the adapter is ignored",
            stacklevel=4,
        )
