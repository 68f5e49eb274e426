"""The sweep: which scaling makes one learning rate right for every rank. docs/choosing.md derives the candidates.

Scalings are s(r) = 4 (8 / r)^p, equal at rank 8, where s is the demo's, so that p alone is compared. Some change one more thing
of the training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .intervals import Draws, Interval, too_few, verdict
from .packing import unpacked

RANKS = (2, 4, 8, 16, 32, 64)
AROUND = range(-3, 4)  # rates, counted from where the search of the method begins
METHODS = ("lotr", "lotr-width")
EQUAL_AT, AT_EQUAL = 8, 4.0  # the rank at which all scalings are equal, and s there
WIDTH = 384  # the out_features at which a scaling by width is like the others
LEAST_RATES = 2  # of what a page shows: with one rate alone nothing is lost
WITHIN = 0.10  # what one rate may lose at any rank
WARM = 0.06  # the part of every run's steps in which rates rise


@dataclass(frozen=True)
class Scaling:
    """power: p; factors: the rate of A and B over that of the cores; by_width: s also grows with sqrt(out_features); warm: the
    part of the steps in which rates rise; decay: the weight decay of AdamW; retract: A and B keep orthonormal columns."""

    label: str
    power: float
    factors: float = 1.0
    by_width: bool = False
    warm: float = WARM
    decay: float = 0.0
    retract: bool = False

    def s(self, rank: int, out_features: int) -> float:
        wide = (out_features / WIDTH) ** 0.5 if self.by_width else 1.0
        return AT_EQUAL * (EQUAL_AT / rank) ** self.power * wide


CONSTANT = "constant"  # what the others are compared with
SCALINGS = {
    CONSTANT: Scaling("s constant", 0.0),
    "root": Scaling("s as 1 / sqrt(r)", 0.5),
    "rank": Scaling("s as 1 / r", 1.0),
    "steep": Scaling("s as r^-1.5", 1.5),
    "rank-width": Scaling("s as sqrt(N) / r", 1.0, by_width=True),
    "rank-slow": Scaling("s as 1 / r, factors at a third", 1.0, 1 / 3),
    "rank-fast": Scaling("s as 1 / r, factors at three times", 1.0, 3.0),
    "steep-retract": Scaling("s as r^-1.5, A and B orthonormal after each step", 1.5, retract=True),
    "steep-decay": Scaling("s as r^-1.5, weight decay 0.1", 1.5, decay=0.1),
    "steep-warm": Scaling("s as r^-1.5, warm-up of a third", 1.5, warm=1 / 3),
}


def scale(model: nn.Module, scaling: str) -> None:
    """Gives every adapted layer its s."""
    from lotr_ext.model.adapted import adapted_layers

    for layer in adapted_layers(model).values():
        layer.scaling = SCALINGS[scaling].s(layer.factors.A.shape[1], layer.out_features)


def groups(model: nn.Module, scaling: str, lr: float, head_lr: float) -> list[dict[str, Any]]:
    """An optimizer's groups: cores at lr, factors as the scaling says, a new head at its own rate."""
    from lotr_ext import parameter_groups

    own = SCALINGS[scaling]
    return parameter_groups(model, lr, factor_lr=lr * own.factors, other_lr=head_lr, weight_decay=own.decay)


@torch.no_grad()
def retract(model: nn.Module) -> None:
    """Gives A and B orthonormal columns, A = Q R. The cores take R_A G R_B^T, so the model computes what it did."""
    from lotr_ext.model.adapted import adapted_layers

    layers = adapted_layers(model).values()
    factors = {id(t): t for layer in layers for t in (layer.factors.A, layer.factors.B)}
    upper = {}
    for key, factor in factors.items():
        Q, R = torch.linalg.qr(factor)
        signs = R.diagonal().sign()  # columns that turned round would not fit Adam's means
        factor.copy_(Q * signs)
        upper[key] = signs[:, None] * R
    for layer in layers:
        of_a, of_b = (upper[id(t)] for t in (layer.factors.A, layer.factors.B))
        layer.core.copy_(of_a @ layer.core @ of_b.T)


class Transfer(NamedTuple):
    """One method with one scaling: the one rate of those tried that loses least at its worst rank, chosen on validation.

    excess: the held-out loss there over the best that any scaling and rate has at this rank, less one. lost: the part of the
    best one's gain over the unadapted model that the one rate loses, at the rank where that is most; None without the
    unadapted model's loss. best: the best rate at each rank. losses: the mean held-out loss over ranks at the one rate,
    [seeds, items].
    """

    method: str
    scaling: str
    lr: float
    tried: int
    rank: int
    excess: Interval
    lost: Interval | None
    best: dict[int, float]
    losses: Tensor
    seeds: int


Key = tuple[str, int, float]  # scaling, rank, rate


def _by_key(cells: Iterable[dict]) -> dict[Key, dict[int, dict]]:
    """The cells of one method, by seed for each scaling, rank and rate."""
    found: dict[Key, dict[int, dict]] = {}
    for cell in cells:
        case = cell["case"]
        found.setdefault((case["scaling"], case["rank"], case["lr"]), {})[case["seed"]] = cell
    return found


def _seeds_of_all(runs: Iterable[dict[int, dict]]) -> list[int]:
    return sorted(set.intersection(*map(set, runs)))


def _validation(runs: dict[int, dict], seeds: list[int]) -> float:
    """The mean over seeds, infinite if one of them diverged."""
    found = [runs[seed]["validation"] for seed in seeds]
    return float("inf") if None in found else sum(found) / len(found)


def _held_out(runs: dict[int, dict], seeds: list[int], items: int) -> Tensor:
    """[seeds, items], infinite if a seed diverged."""
    found = [runs[seed]["losses"] for seed in seeds]
    if None in found:
        return torch.full((len(seeds), items), torch.inf).double()
    return torch.stack([unpacked(losses) for losses in found])


def _lost(loss: Tensor, least: Tensor, unadapted: Tensor) -> Tensor:
    """The part of the gain from unadapted to least that a loss does not have."""
    return (loss - least) / (unadapted - least)


class _Chosen(NamedTuple):
    """Of one scaling: the one rate, how many were tried at every rank, the rank where it loses most, the best by rank."""

    lr: float
    tried: int
    rank: int
    best: dict[int, float]


def _choose(score: Mapping[Key, float], best: Mapping[int, Key], scaling: str) -> _Chosen | None:
    """By validation losses. best: of all scalings and rates, by rank. None if no rate was tried at every rank."""
    here = {(rank, lr): loss for (name, rank, lr), loss in score.items() if name == scaling}
    rates = [lr for lr in sorted({lr for _, lr in here}) if all((rank, lr) in here for rank in best)]
    if not rates:
        return None

    def over(lr: float, rank: int) -> float:
        return here[rank, lr] / score[best[rank]] - 1

    lr = min(rates, key=lambda lr: (max(over(lr, rank) for rank in best), lr))
    by_rank = {rank: min(rates, key=lambda lr: here[rank, lr]) for rank in best}
    return _Chosen(lr, len(rates), max(best, key=lambda rank: over(lr, rank)), by_rank)


def transfers(cells: list[dict], unadapted: Mapping[int, Tensor] | None = None) -> list[Transfer]:
    """By method and scaling. Rates are chosen by the seeds that all runs of the method have; the losses are of the seeds that
    the chosen runs and the best ones have.

    unadapted: by seed, the held-out losses [items] of the model without an adapter, or with only its new head trained.
    """
    found: list[Transfer] = []
    for method in dict.fromkeys(cell["case"]["method"] for cell in cells):
        runs = _by_key(cell for cell in cells if cell["case"]["method"] == method)
        if not (common := _seeds_of_all(runs.values())):
            continue
        score = {key: _validation(own, common) for key, own in runs.items()}
        best = {rank: min((k for k in score if k[1] == rank), key=score.__getitem__) for rank in sorted({k[1] for k in score})}
        made = {scaling: _choose(score, best, scaling) for scaling in dict.fromkeys(name for name, _, _ in runs)}
        chosen = {scaling: own for scaling, own in made.items() if own is not None}
        at_rates = {scaling: {rank: (scaling, rank, own.lr) for rank in best} for scaling, own in chosen.items()}
        shown = {*best.values(), *(key for keys in at_rates.values() for key in keys.values())}
        seeds = _seeds_of_all(runs[key] for key in shown)
        items = max((len(unpacked(one["losses"])) for key in shown for one in runs[key].values() if one["losses"]), default=1)
        losses = {key: _held_out(runs[key], seeds, items) for key in shown}
        known = unadapted and set(seeds) <= set(unadapted) and {len(unadapted[seed]) for seed in seeds} == {items}
        without = torch.stack([unadapted[seed] for seed in seeds]) if known else None
        for scaling, own in chosen.items():
            pairs = {rank: (losses[key], losses[best[rank]]) for rank, key in at_rates[scaling].items()}
            excess, lost = _what_is_lost(pairs, own.rank, without)
            mean = torch.stack([at_rate for at_rate, _ in pairs.values()]).mean(0)
            found.append(Transfer(method, scaling, own.lr, own.tried, own.rank, excess, lost, own.best, mean, len(seeds)))
    return found


def _what_is_lost(
    pairs: Mapping[int, tuple[Tensor, Tensor]], rank: int, without: Tensor | None
) -> tuple[Interval, Interval | None]:
    """Of the losses [seeds, items] at the one rate and the best ones, by rank: the excess at the worst rank, and the largest
    part of the gain. without: the unadapted model's losses."""
    draws, never = Draws(*pairs[rank][0].shape), Interval(float("inf"))
    excess = draws.interval(lambda a, b: a / b - 1, *pairs[rank]) if torch.isfinite(pairs[rank][0]).all() else never
    if without is None:
        return excess, None
    if not all(torch.isfinite(at_rate).all() for at_rate, _ in pairs.values()):
        return excess, never
    parts = [draws.interval(_lost, *pair, without) for pair in pairs.values()]
    return excess, max(parts, key=lambda part: part.value)


def rows(found: list[Transfer], label: dict[str, str]) -> list[list[str]]:
    """A row a method and scaling: the one rate, the worst rank there, what that loses of the loss and of the gain, the best
    rate at each rank."""
    return [
        [
            f"{label[one.method]}, {SCALINGS[one.scaling].label}",
            f"{one.lr:g} of {one.tried}",
            str(one.rank),
            one.excess.text(".1%"),
            "-" if one.lost is None else one.lost.text(".1%"),
            ", ".join(f"{rank}: {lr:g}" for rank, lr in one.best.items()),
        ]
        for one in found
    ]


HEADS = ("", "one rate", "worst rank", "loss over the best there", "gain lost at most", "best rate by rank")


def _loses_little(part: Interval | None) -> bool:
    """Whether at most WITHIN is lost, by the whole interval where there is one."""
    return part is not None and (part.value if part.high is None else part.high) <= WITHIN


def words(found: list[Transfer], label: dict[str, str]) -> list[str]:
    """For each method: whether a scaling keeps within WITHIN at every rank, and how each compares with a constant s."""
    lines = []
    for method in dict.fromkeys(one.method for one in found):
        own = {one.scaling: one for one in found if one.method == method}
        good = [SCALINGS[name].label for name, one in own.items() if _loses_little(one.excess)]
        reach = f"within {WITHIN:.0%} of the best loss at every rank with one rate: {'; '.join(good) or 'no scaling'}"
        lines.append(f"{label[method]}: {reach}.")
        if any(one.lost is not None for one in own.values()):
            kept = [SCALINGS[name].label for name, one in own.items() if _loses_little(one.lost)]
            lines.append(f"{label[method]}: at most {WITHIN:.0%} of the gain lost: {'; '.join(kept) or 'no scaling'}.")
        if lacking := too_few(next(iter(own.values())).seeds):  # those of all scalings
            lines.append(f"{label[method]}: no intervals, {lacking}.")
        if lacking or (usual := own.get(CONSTANT)) is None or not torch.isfinite(usual.losses).all():
            continue
        draws, means, even = Draws(*usual.losses.shape), f"{label[method]}, mean loss over ranks, each at its one rate", []
        for name, one in own.items():
            if name != CONSTANT and torch.isfinite(one.losses).all():
                difference, own_label = draws.difference(one.losses, usual.losses), SCALINGS[name].label
                if difference.sign:
                    lines.append(f"{means}: {verdict(difference, own_label, SCALINGS[CONSTANT].label, one.seeds)}.")
                else:
                    even.append(f"{own_label} ({difference.text()})")
        if even:
            lines.append(f"{means}: no difference to {SCALINGS[CONSTANT].label}: {'; '.join(even)}.")
    return lines
