"""LoRA adapters as LoTR: the layers' deltas s_l lora_B lora_A, stacked by group, factorised by Tucker-2 (`tucker.py`).

S adapters of rank r in a group are exact at rank S r (arXiv 2402.01376 calls LoTR a generalisation of LoRA in this sense);
at a lower rank the result is the least-squares approximation that HOOI finds. No delta is formed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers.checks import check_dtype, check_rank
from .adapter import LoTRAdapter, assembled, group_names
from .lora_files import LoRAAdapter, LoRALayer, read_lora
from .tucker import LowRankStack, Tucker2

__all__ = ["Conversion", "Report", "exact_rank", "lora_to_lotr", "low_rank_pair"]

Report = Callable[[str, float], None]  # (the current step, the fraction of the work that is done)
_MOST = 0.5  # above this relative error a layer has lost most of its adapter
_SEARCH_TOLERANCE = 5e-6  # the search rejects a rank when an iteration reduces the error by less


@dataclass(frozen=True)
class Conversion(LoTRAdapter):
    """A LoTR adapter, and its distance from the LoRA: relative errors in the Frobenius norm.

    errors: |D_l - s B G_l^T A^T| / |D_l| by layer; group_errors: the same over each group's stack; lora_parameters: the
    number in the LoRA factors.
    """

    errors: dict[str, float]
    group_errors: dict[str, float]
    lora_parameters: int

    _tied: ClassVar[Mapping[str, str | None]] = {}  # PEFT's modules_to_save are copies

    @property
    def rank(self) -> int | tuple[int, int]:
        return self.config.rank

    def doubts(self) -> list[str]:
        """Warnings about this conversion: layers that lose most of their adapter, a result larger than the LoRA."""
        found = []
        if lost := [name for name, error in self.errors.items() if error > _MOST]:
            worst = max(lost, key=self.errors.__getitem__)
            found.append(
                f"{len(lost)} of {len(self.errors)} layers lose most of their adapter at rank {self.rank} (an error above "
                f"{_MOST}; {worst} has {self.errors[worst]:.2f}): their LoRAs have little in common; give a higher rank"
            )
        if self.parameters > self.lora_parameters:
            found.append(
                f"at rank {self.rank} the LoTR adapter has {self.parameters:,} parameters, more than the "
                f"{self.lora_parameters:,} of the LoRA that it is made from"
            )
        return found


@torch.no_grad()
def lora_to_lotr(
    source: str | PathLike[str] | Mapping[str, Tensor] | LoRAAdapter,
    *,
    rank: int | tuple[int, int] | None = None,
    error: float | None = None,
    parameters: int | None = None,
    group_by: str | Mapping[str, str] = "shape",
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    report: Report = lambda what, done: None,
) -> Conversion:
    """A PEFT LoRA adapter as a LoTR adapter. Exactly one of rank, error and parameters sets its size.

    Args:
        source: a directory, a state dict (with config), or the result of `read_lora`. modules_to_save are copied.
        rank: r, or (r_in, r_out), for all groups.
        error: the smallest rank at which each group's relative error is at most this, in (0, 1).
        parameters: the largest rank at which the adapter has at most this many (A, B and cores; not modules_to_save), or the
            `exact_rank` if that is lower.
        group_by: "shape", "block", "name" or a mapping from layer names, as in LoTRConfig.
        config: see `read_lora`.
        dtype: of the result. The work is done in float64.
        report: called with the current step and the fraction of the work that is done.

    Returns:
        The adapter: `.save(directory)`, then `lotr_ext.load_adapter(model, directory)`. Scaling 1: the LoRA's own scalings are
        in the cores.

    Warns about layers that keep less than half of their adapter (an error above 0.5), and about a result with more parameters
    than the LoRA.

    Raises:
        TypeError, ValueError: a source that `read_lora` refuses; not exactly one size; an impossible rank, error or
            budget; a rank above what any group can use (the sum of its LoRA ranks, or its two widths); groups of mixed shapes.
    """
    if dtype is None:
        raise TypeError("dtype: expected that of the new adapter, got None")
    check_dtype(dtype)
    _check_size(rank, error, parameters)
    adapter = source if isinstance(source, LoRAAdapter) else read_lora(source, config)
    groups: dict[str, list[str]] = {}
    for name, group in group_names({name: layer.sizes for name, layer in adapter.layers.items()}, group_by).items():
        groups.setdefault(group, []).append(name)
    sizes = {group: adapter.layers[names[0]].sizes for group, names in groups.items()}
    bound = max(max(sum(adapter.layers[name].rank for name in names), sum(sizes[group])) for group, names in groups.items())
    if parameters is not None:
        rank = min(_rank_for(parameters, sizes, groups), exact_rank(adapter, group_by))
    if rank is not None and max(check_rank(rank)) > bound:
        raise ValueError(f"rank: expected at most {bound}, beyond which no group can use any, got {rank}")
    pairs = {group: [low_rank_pair(adapter.layers[name]) for name in names] for group, names in groups.items()}
    found, rank = _factorised(pairs, rank, error, report)
    conversion = _conversion(adapter, groups, found, rank, group_by, dtype)
    for text in conversion.doubts():
        warnings.warn(f"lotr_ext: {text}", stacklevel=2)
    return conversion


def _check_size(rank: int | tuple[int, int] | None, error: float | None, parameters: int | None) -> None:
    given = {"rank": rank, "error": error, "parameters": parameters}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"rank, error, parameters: expected exactly one of them, got {given}")
    if rank is not None:
        check_rank(rank)
    if error is not None and not 0.0 < error < 1.0:
        raise ValueError(f"error: expected a number between 0 and 1, got {error!r}")


def exact_rank(adapter: LoRAAdapter, group_by: str | Mapping[str, str]) -> int:
    """The lowest rank at which the conversion of any LoRAs of these ranks and widths is exact: for each group, the sum of its
    LoRA ranks or its larger width, whichever is lower; of these the largest."""
    sizes = {name: layer.sizes for name, layer in adapter.layers.items()}
    ranks, widths = dict[str, int](), dict[str, int]()
    for name, group in group_names(sizes, group_by).items():
        ranks[group] = ranks.get(group, 0) + adapter.layers[name].rank
        widths[group] = max(sizes[name])
    return max(min(ranks[group], widths[group]) for group in ranks)


def low_rank_pair(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """U = s lora_B and V = lora_A^T, so that U V^T is the layer's change of W."""
    return layer.scaling * layer.B.double(), layer.A.double().T


def _count(r: int, sizes: Mapping[str, tuple[int, int]], groups: Mapping[str, list[str]]) -> int:
    return sum(sum(sizes[group]) * r + len(names) * r * r for group, names in groups.items())


def _rank_for(budget: int, sizes: Mapping[str, tuple[int, int]], groups: Mapping[str, list[str]]) -> int:
    """The largest r with sum over groups of (K + N) r + L r^2 <= budget: the root of a quadratic."""
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"parameters: expected an int, got {budget!r}")
    linear, square = sum(map(sum, sizes.values())), sum(map(len, groups.values()))
    r = (math.isqrt(linear * linear + 4 * square * max(budget, 0)) - linear) // (2 * square)
    if r < 1:
        raise ValueError(f"parameters: expected at least {_count(1, sizes, groups)}, what rank 1 needs, got {budget}")
    return r


def _smallest_rank(stack: LowRankStack, error: float, at_least: int, report: Callable[[int], None]) -> int:
    """The smallest rank with this error, by bisection between `rank_bounds`. at_least: a rank that another group needs."""
    low, high = stack.rank_bounds(error)
    while max(low, at_least) < high:
        middle = (max(low, at_least) + high) // 2
        report(middle)
        if stack.factorise((middle, middle), tolerance=_SEARCH_TOLERANCE, enough=error).error <= error:
            high = middle
        else:
            low = middle + 1
    return max(high, at_least)


def _factorised(
    pairs: Mapping[str, list[tuple[Tensor, Tensor]]],
    rank: int | tuple[int, int] | None,
    error: float | None,
    report: Report,
) -> tuple[dict[str, Tucker2], int | tuple[int, int]]:
    """The factorisation of each group, and the rank: as given, or the smallest with at most this error in each group."""
    stacks, found = {}, {}
    share = 0.4 / len(pairs)
    for i, (group, several) in enumerate(pairs.items()):
        report(f"QR of {group}", 0.1 * i / len(pairs))
        stacks[group] = LowRankStack(several)
    if error is not None:
        rank = 1
        for i, (group, stack) in enumerate(stacks.items()):
            rank = _smallest_rank(stack, error, rank, lambda r, i=i, g=group: report(f"rank of {g}: {r}?", 0.1 + i * share))
    for i, (group, stack) in enumerate(stacks.items()):
        tell = lambda done, i=i, g=group: report(f"HOOI of {g}", 0.6 + (i + done) * share)  # noqa: E731
        found[group] = stack.factorise(check_rank(rank), report=tell)
    report("done", 1.0)
    return found, rank


def _conversion(
    adapter: LoRAAdapter,
    groups: dict[str, list[str]],
    found: dict[str, Tucker2],
    rank: int | tuple[int, int],
    group_by: str | Mapping[str, str],
    dtype: torch.dtype,
) -> Conversion:
    cores, errors = {}, {}
    for group, names in groups.items():
        cores |= dict(zip(names, found[group].cores, strict=True))
        errors |= dict(zip(names, found[group].errors, strict=True))
    config, layers, tensors = assembled(
        groups,
        {name: layer.sizes for name, layer in adapter.layers.items()},
        {group: (result.A, result.B) for group, result in found.items()},
        cores,
        dtype,
        rank=rank,
        dropout=adapter.dropout,
        modules_to_save=adapter.modules_to_save or None,
        group_by=group_by,
    )
    count = sum(layer.A.numel() + layer.B.numel() for layer in adapter.layers.values())
    overall = {group: result.error for group, result in found.items()}
    return Conversion(config, layers, tensors, adapter.saved, errors, overall, count)
