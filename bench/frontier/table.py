"""What the kept runs say: a point a way and rank, chosen learning rates, and the table in Markdown."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from ..measure.store import Store, latest
from ..measure.terminal import Table
from .ways import TRIED, WAYS, Way

FILE = "frontier.jsonl"
STEPS, BATCH, SEEDS = 100, 32, 3  # of a run, and of what is shown, by default


class Point(NamedTuple):
    """One way at one rank: the adapter's trained numbers, the learning rate chosen of so many tried, and what each seed with
    it reached on the held-out texts."""

    way: str
    rank: int
    parameters: int
    lr: float
    tried: int
    accuracies: tuple[float, ...]

    @property
    def label(self) -> str:
        return WAYS[self.way].label

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)


def rates(way: Way) -> list[float]:
    """The learning rates that are tried, the way's own first."""
    return [float(f"{way.lr * multiple:.3g}") for multiple in TRIED]


def setting_of(cell: dict) -> tuple[object, ...]:
    """Equal for runs that belong in one table."""
    return tuple(cell["case"].get(name) for name in ("steps", "batch", "model"))


def of_setting(cells: list[dict], setting: tuple[object, ...] | None = None) -> list[dict]:
    """The last run of each case of one setting (None: the last run's), of the ways that are known."""
    cells = [cell for cell in cells if cell["rival"] in WAYS]
    if cells and setting is None:
        setting = setting_of(cells[-1])
    return latest([cell for cell in cells if setting_of(cell) == setting])


def kept(folder: Path) -> list[dict]:
    """What is shown of a folder's runs."""
    return of_setting(Store(folder / FILE).read())


def chosen_rate(cells: list[dict], way: str, rank: int) -> float | None:
    """Of the learning rates tried with the first seed the one that was best on the validation texts; none tried: None."""
    tried = [cell for cell in cells if (cell["rival"], cell["case"]["rank"], cell["case"]["seed"]) == (way, rank, 0)]
    return max(tried, key=lambda cell: cell["validation"], default={"case": {"lr": None}})["case"]["lr"]


def points(cells: list[dict]) -> list[Point]:
    """Of one setting's runs, in the order of WAYS and by rank."""
    found = []
    for name in WAYS:
        for rank in sorted({cell["case"]["rank"] for cell in cells if cell["rival"] == name}):
            own = [cell for cell in cells if (cell["rival"], cell["case"]["rank"]) == (name, rank)]
            lr = chosen_rate(own, name, rank)
            with_it = sorted((cell for cell in own if cell["case"]["lr"] == lr), key=lambda cell: cell["case"]["seed"])
            if with_it:
                tried = len({cell["case"]["lr"] for cell in own if cell["case"]["seed"] == 0})
                accuracies = tuple(cell["accuracy"] for cell in with_it)
                found.append(Point(name, rank, with_it[0]["parameters"], lr, tried, accuracies))
    return found


def title(cells: list[dict]) -> str:
    """What all runs have in common."""
    case = cells[-1]["case"]
    return f"{case['model']} on movie snippets, {case['steps']} steps of {case['batch']}"


def accuracy_text(point: Point) -> str:
    """The mean over seeds and their range."""
    spread = f" ({min(point.accuracies):.1%} to {max(point.accuracies):.1%})" if len(point.accuracies) > 1 else ""
    return f"{point.mean:.2%}{spread}"


HEADS = ("", "rank", "trained numbers", "held-out accuracy", "seeds", "learning rate")


def rows(found: list[Point]) -> list[list[str]]:
    """A row a point, under HEADS."""
    return [
        [p.label, str(p.rank or "-"), f"{p.parameters:,}", accuracy_text(p), str(len(p.accuracies)), f"{p.lr:g} of {p.tried}"]
        for p in found
    ]


def verdict(found: list[Point]) -> list[str]:
    """LoTR and LoRA in words: the least of each, then LoRA where it is furthest ahead and where it is largest, each beside the
    best LoTR that is no larger."""
    lotr, lora, head = ([p for p in found if p.way == way] for way in ("lotr", "lora", "head"))
    if not (lotr and lora and head):
        return []

    def no_larger(p: Point) -> Point | None:
        fitting = [q for q in found if q.way.startswith("lotr") and q.parameters <= p.parameters]
        return max(fitting, key=lambda q: q.mean, default=None)

    def lead(p: Point) -> float:
        return p.mean - (best.mean if (best := no_larger(p)) else 0.0)

    def reached(p: Point) -> str:
        return f"{p.parameters:,} numbers: {accuracy_text(p)}."

    lines = [
        f"The smallest LoTR trains {reached(lotr[0])} The smallest LoRA trains {reached(lora[0])} "
        f"The classification head alone: {accuracy_text(head[0])}."
    ]
    for p, where in {lora[-1]: "the largest", max(lora, key=lead): "where it is furthest ahead"}.items():
        best = no_larger(p)
        other = f"{best.label}, rank {best.rank}, {reached(best)}" if best else "none is as small."
        lines.append(f"LoRA of rank {p.rank}, {where}, trains {reached(p)} The best LoTR that is no larger: {other}")
    return lines


def command(cells: list[dict]) -> str:
    """What makes the runs; those of another machine, model or length say so."""
    case = cells[-1]["case"]
    flags = [f"--{name} {case[name]}" for name, usual in (("steps", STEPS), ("batch", BATCH)) if case[name] != usual]
    return f"`make frontier{' ARGS=' + chr(34) + ' '.join(flags) + chr(34) if flags else ''}`"


def missing(found: list[Point], seeds: int = SEEDS) -> str:
    """A remark on runs that are still to be made; none: ''."""
    short = [p for p in found if len(p.accuracies) < seeds or p.tried < len(TRIED)]
    absent = sum(len(way.ranks) for way in WAYS.values()) - len(found)
    if not short and not absent:
        return ""
    return (
        f" Not finished: {len(short)} points have fewer than {seeds} seeds or {len(TRIED)} learning rates, {absent} have none."
    )


def page_table(cells: list[dict], pictures: dict[str, str]) -> str:
    """The whole table in Markdown, and the picture."""
    found = points(cells)
    lines = [f"{command(cells)}: {title(cells)}; {cells[-1]['machine']['name']}.{missing(found)}", ""]
    lines += ["| way | rank | trained numbers | held-out accuracy | seeds | learning rate |", "|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(found)]
    return "\n".join([*lines, *_picture(pictures)])


def short_text(cells: list[dict]) -> str:
    """README's: how LoTR compares with LoRA, in a few lines."""
    found = points(cells)
    says = f"{command(cells)}, {title(cells)}. Held-out accuracy, mean and range over {SEEDS} seeds:{missing(found)}"
    return "\n".join([says, "", *(f"- {line}" for line in verdict(found))])


def _picture(pictures: dict[str, str]) -> list[str]:
    return ["", f"![held-out accuracy against trained numbers]({pictures['frontier']})"] if "frontier" in pictures else []


def terminal_table(found: list[Point], cells: list[dict]) -> Table:
    table = Table(title(cells), *HEADS)
    for row in rows(found):
        table.add_row(*row)
    return table
