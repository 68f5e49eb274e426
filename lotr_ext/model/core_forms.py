"""The cores of a whole model that are computed from fewer numbers (LoTRConfig.core), and the place of each layer among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..layers.cores import FORMS, CoreAt, Cores
from .config import LoTRConfig

__all__ = ["CORES", "Place", "form_at", "make_cores", "place_of"]


CORES = "lotr_cores"  # what a model has its Cores by


class Place(NamedTuple):
    """Where a layer is: "model.layers.3" and "self_attn.q_proj", say."""

    layer: str
    kind: str


def place_of(name: str) -> Place:
    """What comes up to the first number in a layer's name, and what comes after it; without a number the kind alone."""
    found = re.fullmatch(r"((?:.*?\.)??\d+)(?:\.(.*))?", name)
    return Place("", name) if found is None else Place(found[1], found[2] or "")


def make_cores(
    config: LoTRConfig, names: Sequence[str], device: torch.device | str, dtype: torch.dtype | None = None
) -> Cores | None:
    """The cores of the layers of these names, as config says; None for dense ones. dtype: config's if None. On "meta" those of
    FORMS take no memory.

    Raises:
        TypeError, ValueError: a form that has not this rank or core_init, or whose tensors cannot be that large; a callable
            that makes something else, or cores of another rank, or none for one of the layers.
    """
    if config.core == "dense":
        return None
    if config.core == "custom":
        raise ValueError('core: expected a name or a callable, got "custom": what a callable made elsewhere; give that one')
    places = [place_of(name) for name in names]
    form, own = (FORMS[config.core], True) if isinstance(config.core, str) else (config.core, False)
    try:
        # whatever device is the default here: the values are drawn as on a CPU, then moved
        with torch.device("meta" if own and torch.device(device).type == "meta" else "cpu"):
            cores = form(places, config.rank)
    except RuntimeError as error:
        if not own:
            raise
        raise ValueError(f"rank: expected one at which cores can be made, got {config.rank} ({error})") from None
    if not isinstance(cores, Cores):
        raise TypeError(f"core: expected a callable that makes lotr_ext.cores.Cores, got one that makes {type(cores).__name__}")
    if config.core_init == "identity":
        cores.begin_as_identity()
    with torch.no_grad():
        for one in (cores.at(place) for place in places):
            if (got := tuple(one.cores(one.index).shape)) != config.ranks:
                raise ValueError(f"core: expected cores of rank {config.ranks}, got {got} from {type(cores).__name__}")
    return cores.to(device, config.adapter_dtype if dtype is None else dtype).requires_grad_("core" in config.train)


def form_at(cores: Cores, name: str) -> CoreAt:
    """The module that makes the core of the layer of this name. `cores` is registered by another module."""
    form = cores.at(place_of(name))
    form.leave_cores_to_owner()
    return form
