"""rank_for: the recipe of docs/choosing.md for one model.

    the adapter's parameters     form                                       measured at the size of
    fewer than LoRA of rank 0.1  dense cores, one pair per shape            LoRA of rank 0.09
    fewer than LoRA of rank 2    diagonal cores, one pair per shape         LoRA of rank 1
    more                         dense cores, one pair per shape and block  LoRA of rank 4

The rank is the largest one with at most this number of parameters.
"""

import math
import re
from typing import Any

from torch import nn

from .checks import check_dimension
from .config import LoTRConfig
from .targets import Selection, select

# The rows of the table: (rank, settings). A form is used below the size of a LoRA of that rank. The
# ranks separate the sizes that docs/choosing.md measured. 2 is the geometric mean of 1 and 4.
_RECIPE = (
    (0.1, {"group_by": "shape", "core": "dense"}),
    (2.0, {"group_by": "shape", "core": "diagonal"}),
    (math.inf, {"group_by": "block", "core": "dense"}),
)


def rank_for(
    model: nn.Module, *, like: str | None = None, numbers: int | None = None, **settings: Any
) -> LoTRConfig:
    """Returns the configuration that docs/choosing.md recommends for a size of the adapter.

    `apply_lotr(model, rank_for(model, like="lora:1"))` adapts the model with at most as many
    parameters as a LoRA of rank 1 has. The adapter's rank, form and groups depend on the model's
    layers. From LoRA of rank 16 on, the recipe is LoRA itself: no form of LoTR was better.

    Args:
        model: A plain model. It is not changed.
        like: "lora:<rank>": as many parameters as a LoRA of this rank over the same layers.
        numbers: The number of parameters in A, B and the cores, instead of like.
        settings: Other fields of `LoTRConfig`, such as target_modules or dropout.

    Raises:
        TypeError: If neither or both of like and numbers are given; if numbers is not an int; or if
            a setting is rank, core or group_by, which this function chooses, or target_parameters,
            which it does not support.
        ValueError: If like is not "lora:<rank>"; or if the size is too small for rank 1.
        TypeError, ValueError, RuntimeError: As for `LoTRConfig` and `apply_lotr`.
    """
    for name in ("rank", "core", "group_by", "target_parameters"):
        if name in settings:
            raise TypeError(
                f"{name}: expected no such setting in rank_for, got {settings[name]!r}. Make a "
                f"LoTRConfig for it."
            )
    if (like is None) == (numbers is None):
        raise TypeError(f"like: expected either like or numbers, got {like!r} and {numbers!r}")
    targets = select(model, LoTRConfig(**settings)).targets
    # A LoRA of rank 1 has one row and one column for each layer.
    lora_rank_1 = sum(sum(target.sizes) for target in targets)
    if numbers is not None:
        budget = check_dimension("numbers", numbers)
    elif match := re.fullmatch(r"lora:0*([1-9]\d*)", str(like)):
        budget = int(match[1]) * lora_rank_1
    else:
        raise ValueError(f'like: expected "lora:<rank>", such as "lora:1", got {like!r}')
    form = next(form for limit, form in _RECIPE if budget < limit * lora_rank_1)
    # Again, because this form's group_by may group the layers differently.
    selection = select(model, LoTRConfig(**settings, **form))
    rank = 0
    while _size(selection, rank + 1) <= budget:
        rank += 1
    if rank == 0:
        raise ValueError(
            f"{'like' if numbers is None else 'numbers'}: expected at least "
            f"{_size(selection, 1):,} parameters for rank 1 in {len(targets)} layers, got "
            f"{budget:,}. Choose a larger size, or adapt fewer layers."
        )
    return LoTRConfig(rank=rank, **settings, **form)


def _size(selection: Selection, rank: int) -> int:
    """Returns the number of parameters in A, B and the cores at this rank."""
    core = rank if selection.config.core == "diagonal" else rank * rank
    factors = sum(sum(targets[0].sizes) for targets in selection.groups.values())
    return rank * factors + core * len(selection.targets)
