"""Checks that an adapter fits into memory, before it is created."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import torch

from ..layers.cores import FORMS
from ..layers.placement import home
from .config import LoTRConfig
from .core_forms import make_cores
from .experts import expert_sizes
from .targets import Target

__all__ = ["check_memory"]


def check_memory(targets: Sequence[Target], config: LoTRConfig) -> None:
    """Checks that an adapter takes no more memory than the devices of its layers have.

    Raises:
        ValueError: the rank is too large; the message has both sizes. TypeError, ValueError: as `make_cores`.
    """
    r_in, r_out = config.ranks
    numbers: Counter[torch.device] = Counter()
    seen: set[object] = set()
    for target in targets:
        device, width = home(target.module), config.group_by == "width"
        for part, features, rank in (("A", target.in_features, r_in), ("B", target.out_features, r_out)):
            owner = (part, features if width else target.group)
            numbers[device] += 0 if owner in seen else features * rank
            seen.add(owner)
        experts = expert_sizes(target.module, target.parameter)[0] if target.parameter is not None else 1
        numbers[device] += target.out_features * config.magnitude
        numbers[device] += experts * r_in * r_out  # also for a core made of fewer numbers, since the forward makes it
    for device, count in numbers.items():
        _check(device, count, config)
    if config.core in FORMS:
        cores = make_cores(config, [target.name for target in targets], "meta")
        _check(home(targets[0].module), sum(t.numel() for t in cores.state_dict().values()), config)


def _check(device: torch.device, numbers: int, config: LoTRConfig) -> None:
    needed, there = numbers * config.adapter_dtype.itemsize, _memory(device)
    if needed > there:
        raise ValueError(
            f"rank: expected one whose adapter fits into the {there / 2**30:.3g} GiB of {device}, got {config.rank}, which "
            f"takes {needed / 2**30:.3g} GiB; use a smaller rank"
        )


def _memory(device: torch.device) -> int:
    """The bytes of memory of a device; for a device without memory (meta), the largest size of a tensor."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**63 - 1
