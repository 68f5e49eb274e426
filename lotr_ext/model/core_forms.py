"""Cores of a whole model that are computed from fewer numbers (LoTRConfig.core), and each layer's place among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layers.cores import FORMS, CoreAt, Cores
from .config import LoTRConfig
from .names import place_of

__all__ = ["CORES", "form_at", "make_cores"]

CORES = "lotr_cores"  # the model's attribute that holds its Cores


def make_cores(
    config: LoTRConfig, names: Sequence[str], device: torch.device | str, dtype: torch.dtype | None = None
) -> Cores | None:
    """The cores of the named layers for config; None for dense ones. dtype: None for config's. On "meta" those of FORMS take no
    memory.

    Raises:
        TypeError, ValueError: a form that does not support the rank or core_init, or is too large; a callable that returns
            another type, cores of another rank, or no core for one of the layers.
    """
    if config.core == "dense":
        return None
    if config.core == "custom":
        raise ValueError('core: expected a name or a callable, got "custom" from a saved adapter; pass the original callable')
    places = [place_of(name) for name in names]
    form, own = (FORMS[config.core], True) if isinstance(config.core, str) else (config.core, False)
    try:
        # the same random values on every device: drawn on the CPU, then moved
        with torch.device("meta" if own and torch.device(device).type == "meta" else "cpu"):
            cores = form(places, config.rank)
    except RuntimeError as error:
        if not own:
            raise
        raise ValueError(f"rank: expected one at which cores can be made, got {config.rank} ({error})") from None
    if not isinstance(cores, Cores):
        raise TypeError(f"core: expected a callable that returns lotr_ext.cores.Cores, got {type(cores).__name__}")
    if any(parameter.is_meta for parameter in cores.parameters()):  # also by PEFT, which fills them from a file
        device = "meta"
    if config.core_init == "identity":
        cores.begin_as_identity()
    with torch.no_grad():
        for one in (cores.at(place) for place in places):
            if (got := tuple(one.cores(one.index).shape)) != config.ranks:
                raise ValueError(f"core: expected cores of rank {config.ranks}, got {got} from {type(cores).__name__}")
    return cores.to(device, config.adapter_dtype if dtype is None else dtype).requires_grad_("core" in config.train)


def form_at(cores: Cores, name: str) -> CoreAt:
    """The module that makes the core of the named layer. It holds `cores` without registering it."""
    form = cores.at(place_of(name))
    form.leave_cores_to_owner()
    return form
