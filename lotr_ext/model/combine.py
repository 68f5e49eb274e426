"""Weighted sums of the named adapters of a model, as a new adapter.

With the same factors, the sum of the adapters is the sum of their cores, at the same rank:

    sum_i w_i s_i B G_i^T A^T = s B (sum_i w_i (s_i / s) G_i)^T A^T

With different factors it concatenates them and has a block-diagonal core, [A_1 A_2], [B_1 B_2], diag(G_1, G_2), of rank
r_1 + r_2. Tucker-2 compresses that to a given rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.checks import check_rank
from ..layers.factors import same_values
from ..layers.sums import Rule, check_weights
from ..layers.tucker import tucker2
from .adapted import adapted_layers
from .adapters import add_adapter
from .config import LoTRConfig
from .parked import ParkedAdapter, ParkedAdapters, find_name, parked_of
from .saved import saved_modules, saved_tensors
from .shared_factors import Owner, factors_by_part

__all__ = ["combine"]


class _Adapter(NamedTuple):
    """An adapter's values. cores, settings: per layer; settings are (scaling, dropout). saved: its modules_to_save."""

    config: LoTRConfig
    factors: dict[str, Owner]
    cores: list[Tensor]
    settings: list[tuple[float, float]]
    saved: list[Tensor]


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Mapping[str, float],
    *,
    name: str,
    method: str = "linear",
    density: float | None = None,
    seed: int = 0,
    rank: int | tuple[int, int] | None = None,
) -> dict[str, float]:
    """Adds the parked adapter `name`, the weighted sum of others. The model's output does not change.

    If the adapters share their factors, the new one shares them too and has only cores. Otherwise it has its own factors, the
    others' concatenated, and is exact at the sum of their ranks. Its scaling and dropout are the first adapter's, its cores
    dense; other scalings are multiplied into the cores. Sums are computed in float64 and cast once.

    Args:
        model: from `apply_lotr`.
        adapters: weights by name.
        name: a new name, without dots.
        method: "linear", the sum of the adapters; or for adapters that share their factors "ties", "dare", "dare_ties" or
            "magnitude_prune" of each core, as in `TaskBank.combine`.
        density: the fraction of a core's elements that these methods keep, in (0, 1].
        seed: of the elements that "dare" and "dare_ties" drop.
        rank: r, or (r_in, r_out): compresses a linear sum to this rank, with its own factors, by Tucker-2 (least squares over
            the layers of a group).

    Returns:
        |D - D'| / |D| by layer, D the sum of the adapters and D' the new one; 0 without rank.

    Raises:
        TypeError, ValueError: as `add_adapter`; no such adapter; no or no finite weights; an unknown method or density; another
            method than "linear" for adapters with different factors or with rank; a rank above that of the exact sum, or with
            group_by="width"; modules_to_save that differ; magnitudes. RuntimeError: as `add_adapter`. Nothing is changed then.
    """
    parked = parked_of(model, "combine")
    rule, weights = Rule(method, density, seed), check_weights("adapters", adapters)
    found = {one: _adapter(model, parked, find_name(parked, one, "adapters")) for one in weights}
    _check_sum(found)
    sets = _by_factors(found, method, rank is not None)
    first, names = next(iter(found.values())), list(adapted_layers(model))
    scalings = [scaling or 1.0 for scaling, _ in first.settings]
    summed = [_summed(rule, [found[one] for one in own], [weights[one] for one in own], scalings) for own in sets]
    config = replace(first.config, core="dense", alpha=None, rslora=False, scaling=scalings[0], init="orthonormal")
    errors = dict.fromkeys(names, 0.0)
    if len(sets) == 1 and rank is None:
        factors, cores, shared = {}, summed[0], sets[0][0]
        config = replace(config, core_init="zero", train=("core",))
    else:
        factors, cores, shared = _side_by_side([found[own[0]].factors for own in sets]), _blocks(summed), None
        if rank is not None:
            factors, cores, losses = _compressed(model, config, factors, cores, scalings, rank)
            errors = dict(zip(names, losses, strict=True))
        r_in, r_out = cores[0].shape[-2:]
        dtype = max((one.config.adapter_dtype for one in found.values()), key=lambda dtype: torch.finfo(dtype).bits)
        config = replace(config, rank=r_in if r_in == r_out else (r_in, r_out), adapter_dtype=dtype)
    add_adapter(model, name, config, share_factors=shared)
    _write(model.lotr_parked[name], factors, cores, scalings, first)
    return errors


def _adapter(model: nn.Module, parked: ParkedAdapters, name: str) -> _Adapter:
    if name != parked.active:
        one = parked[name]
        return _Adapter(one.config, one.factors, one.values, one.settings, list(one.saved))
    layers, saved = adapted_layers(model).values(), saved_tensors(saved_modules(model)).values()
    settings = [(layer.scaling, layer.dropout) for layer in layers]
    return _Adapter(model.lotr_config, dict(model.lotr_factors.items()), [x.core for x in layers], settings, list(saved))


def _write(
    new: ParkedAdapter,
    factors: Mapping[tuple[str, str], Tensor],
    cores: Sequence[Tensor],
    scalings: Sequence[float],
    first: _Adapter,
) -> None:
    """The new adapter's values; its dropout and modules_to_save are those of the first."""
    new.settings = [(scaling, dropout) for scaling, (_, dropout) in zip(scalings, first.settings, strict=True)]
    values = [(getattr(new.factors[group], part), value) for (group, part), value in factors.items()]
    values += [*zip(new.cores, cores, strict=True), *zip(new.saved, first.saved, strict=True)]
    for tensor, value in values:
        tensor.copy_(value)


def _check_sum(found: Mapping[str, _Adapter]) -> None:
    for one, own in found.items():
        if own.config.magnitude:
            raise ValueError(f"adapters: expected adapters without magnitudes, which have no sum, got {one!r} with magnitudes")
    (first, one), *others = found.items()
    for name, other in others:
        for mine, its in zip(one.saved, other.saved, strict=True):
            if not same_values(mine, its.to(mine.device)):
                raise ValueError(
                    f"adapters: expected modules_to_save with the same values, since they are not summed, got different ones "
                    f"in {first!r} and {name!r}"
                )


def _by_factors(found: Mapping[str, _Adapter], method: str, compresses: bool) -> list[list[str]]:
    """The names, grouped by equal factors. Raises ValueError if a method other than "linear" gets more than one group."""
    sets: list[list[str]] = []
    for name, one in found.items():
        same = (own for own in sets if all(one.factors[group] is owner for group, owner in found[own[0]].factors.items()))
        own = next(same, None)
        if own is None:
            sets.append([name])
        else:
            own.append(name)
    if (len(sets) > 1 or compresses) and method != "linear":
        raise ValueError(
            f'method: expected "linear" for adapters with different factors or with rank, got {method!r}: elements of cores '
            "can be compared only over the same factors"
        )
    return sets


def _summed(rule: Rule, adapters: Sequence[_Adapter], weights: Sequence[float], scalings: Sequence[float]) -> list[Tensor]:
    """The sum of the cores for each layer, at the layer's scaling in scalings."""
    several = [[(core, scaling) for core, (scaling, _) in zip(one.cores, one.settings, strict=True)] for one in adapters]
    return rule.sum_of_cores(several, weights, scalings)


def _side_by_side(several: Sequence[Mapping[str, Owner]]) -> dict[tuple[str, str], Tensor]:
    """Factors [features, r_1 + r_2 + ..] of several adapters, by owner and attribute."""
    factors = {}
    for group, owner in several[0].items():
        for _, module, part in factors_by_part({group: owner}):
            device = getattr(module, part).device
            factors[group, part] = torch.cat([getattr(other[group], part).to(device, torch.float64) for other in several], 1)
    return factors


def _blocks(summed: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each layer, its cores as the diagonal blocks of one [.., r_in, r_out]."""
    found = []
    for cores in zip(*summed, strict=True):
        whole = cores[0].new_zeros(*cores[0].shape[:-2], *(sum(core.shape[d] for core in cores) for d in (-2, -1)))
        i = j = 0
        for core in cores:
            whole[..., i : i + core.shape[-2], j : j + core.shape[-1]] = core
            i, j = i + core.shape[-2], j + core.shape[-1]
        found.append(whole)
    return found


def _compressed(
    model: nn.Module,
    config: LoTRConfig,
    factors: Mapping[tuple[str, str], Tensor],
    cores: Sequence[Tensor],
    scalings: Sequence[float],
    rank: int | tuple[int, int],
) -> tuple[dict[tuple[str, str], Tensor], list[Tensor], list[float]]:
    """Factors and cores of this rank for each group's layers, and the relative error of each layer.

    With A = Q_A R_A and B = Q_B R_B, the layers' sums are Q_B (R_B G_l^T R_A^T) Q_A^T: Tucker-2 of the middle matrices.
    """
    ranks, most = check_rank(rank), tuple(cores[0].shape[-2:])
    if config.group_by == "width":
        raise ValueError('rank: expected None with group_by="width", whose factors are in several pairs, got a rank')
    if ranks[0] > most[0] or ranks[1] > most[1]:
        raise ValueError(f"rank: expected at most {most}, at which the sum is exact, got {rank}")
    layers = list(adapted_layers(model).values())
    found, errors, compressed = {}, [0.0] * len(layers), list(cores)
    for group, owner in model.lotr_factors.items():
        (Q_A, R_A), (Q_B, R_B) = (torch.linalg.qr(factors[group, part]) for part in "AB")
        own = [i for i, layer in enumerate(layers) if layer.factors is owner]
        sums = [scalings[i] * R_B @ cores[i].to(R_B.device).mT @ R_A.T for i in own]
        stack = [matrix for one in sums for matrix in (one if one.dim() == 3 else [one])]
        A, B, small = tucker2(stack, ranks)
        found[group, "A"], found[group, "B"] = Q_A @ A, Q_B @ B
        parts = small.split([one.shape[0] if one.dim() == 3 else 1 for one in sums])
        for i, one, core in zip(own, sums, parts, strict=True):
            core = core.view(*one.shape[:-2], *ranks)
            lost, norm = (one - B @ core.mT @ A.T).norm(), one.norm()
            errors[i], compressed[i] = float(lost / norm) if norm > 0 else 0.0, core / scalings[i]
    return found, compressed, errors
