"""Whether an adapter in a layer has an effect: whether the layer is called, has a weight of its own, and returns x W^T."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from ..layers.own_forward import other_result
from .readers import How, how_read

__all__ = ["check_effect", "no_effect", "readers_of", "warn_of_doubtful", "warn_of_skipped"]


def readers_of(model: nn.Module, names: Iterable[str]) -> dict[How, str]:
    """The classes of a layer's parents that read its weight without calling it, by how certain that is. names: the layer's."""
    places = [name.rpartition(".") for name in names]
    found = (how_read(model.get_submodule(parent), child) for parent, _, child in places)
    return {one[1]: one[0] for one in found if one is not None}


def no_effect(model: nn.Module, module: nn.Module, names: Iterable[str]) -> str | None:
    """Why "all-linear" leaves a layer out with a warning; None if it does not. names: of the layer in the model."""
    reader, other = readers_of(model, names).get(How.ONLY), other_result(module)
    if reader is not None:
        return f"{reader} reads its weight without calling it"
    return None if other is None else other.what


def check_effect(model: nn.Module, module: nn.Module, names: list[str], tied: list[str]) -> None:
    """Raises ValueError for a named layer whose adapter would have no effect, or that does not return x W^T. tied: names of the
    modules that have its weight too."""
    reader, other = readers_of(model, names).get(How.ONLY), other_result(module)
    if reader is not None:
        raise ValueError(
            f"target_modules: expected layers that are called, got {names[0]!r}, whose weight {reader} reads without calling "
            "it, which would ignore the adapter"
        )
    if tied:
        raise ValueError(
            f"target_modules: expected layers with a weight of their own, got {names[0]!r}, tied to {', '.join(tied)}"
        )
    if other is not None and other.certain:
        got = f"{names[0]!r} ({type(module).__name__}): {other.what}"
        raise ValueError(f"target_modules: expected layers that return x W^T, got {got}")


def warn_of_skipped(skipped: Mapping[str, str], stacklevel: int = 4) -> None:
    """Warns about layers that "all-linear" left out, once a reason. skipped: their reasons (`no_effect`), by name."""
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
