"""Tables and sentences from the digests: for the terminal, for docs/evidence.md, docs/choosing.md and README."""

from __future__ import annotations

from ..measure.terminal import Table
from . import sweep
from .digest import FALLING, Advice, Digest, Point, advice, at_the_end, changed, compared
from .intervals import too_few
from .methods import METHODS
from .plan import SEEDS
from .tasks import TASKS

HEADS = ("", "rank", "trained numbers", "held-out loss", "share of full's gain", "accuracy", "rate")
COMMAND = "make frontier"


def _accuracy(point: Point) -> str:
    if point.accuracy is None:
        return "-"
    mean, half = point.accuracy
    return f"{mean:.1%}" if half is None else f"{mean:.1%} ± {half:.1%}"


def _rate(point: Point) -> str:
    if point.method == "base":
        return "-"
    return f"{point.lr:g}{' (end of those tried)' if point.end else ''}"


def rows(one: Digest) -> list[list[str]]:
    """A row a point, under HEADS."""
    return [
        [
            p.label,
            str(p.rank or "-"),
            f"{p.parameters:,}",
            p.loss.text(),
            "-" if p.share is None else p.share.text(".0%"),
            _accuracy(p),
            _rate(p),
        ]
        for p in one.points
    ]


def setting_text(one: Digest) -> str:
    setting = one.cells[-1]["setting"]
    return "{steps} steps of {batch}, {held_out:,} held-out items".format(**setting) + f", {one.seeds} seeds"


def measure(one: Digest) -> str:
    return f"{setting_text(one)}; loss in {one.task.unit}"


def title(one: Digest) -> str:
    return f"{one.task.title}: {measure(one)}"


def sentences(one: Digest) -> list[str]:
    """What follows from the numbers: LoTR against LoRA and VeRA at each of their sizes, one change of a method at the same
    rank, then what is to be known of the runs."""
    lines = [f"{comparison.words}." for comparison in compared(one)] if not too_few(one.seeds) else []
    lines += [f"{line}." for line in changed(one)]
    if lacking := too_few(one.seeds):
        lines.append(f"No intervals: {lacking}.")
    lines += [f"{line}." for line in at_the_end(one)]
    if one.gain is not None and not one.shares:
        lines.append(f"No shares of full fine-tuning's gain, whose interval contains 0: {one.gain.text()}.")
    if falling := [p.name for p in one.points if p.falling > FALLING]:
        lines.append(f"Not at a plateau, the last tenth of the steps had over {FALLING:.0%} of the fall: {'; '.join(falling)}.")
    if one.given_up:
        lines.append(f"Rates given up, because runs diverged: {'; '.join(one.given_up)}.")
    if one.unfinished:
        lines.append(f"Not finished: {'; '.join(one.unfinished)}.")
    machines = dict.fromkeys(cell["machine"]["name"] for cell in one.cells)
    builds = dict.fromkeys(str(cell["commit"]) for cell in one.cells)
    lines.append(f"Machines: {'; '.join(machines)}. Commits: {', '.join(builds)}.")
    return lines


def terminal_table(one: Digest) -> Table:
    table = Table(title(one), *HEADS)
    for row in rows(one):
        table.add_row(*row)
    table.caption = "\n".join(sentences(one))
    return table


ADVICE_HEADS = ("trained numbers", "LoTR's loss is lower", "no difference", "LoTR's loss is higher", "take")


def _advice_row(row: Advice) -> list[str]:
    counts = ("-",) * 3 if not row.lower + row.none + row.higher else (str(row.lower), str(row.none), str(row.higher))
    return [row.size, *counts, row.take]


def advice_table(found: list[Digest]) -> Table | None:
    """None where no task has intervals."""
    table = Table("What to take, by the number of comparisons on all tasks", *ADVICE_HEADS)
    for row in advice(found):
        table.add_row(*_advice_row(row))
    return table if table.rows else None


def _markdown(heads: tuple[str, ...], lines: list[list[str]]) -> list[str]:
    rule = "|" + "".join("---|" if not i else "---:|" for i in range(len(heads)))
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]


def page_advice(found: list[Digest]) -> str:
    """What to take, in Markdown; "" where no task has intervals."""
    rows = advice(found)
    tasks = [one.task.name for one in found if not too_few(one.seeds)]
    lines = [f"`{COMMAND}`, {len(tasks)} tasks ({', '.join(tasks)}). {DIFFERENCE}", ""]
    return "\n".join([*lines, *_markdown(ADVICE_HEADS, [_advice_row(row) for row in rows])]) if rows else ""


def page_tables(found: list[Digest], pictures: dict[str, str]) -> str:
    """All tasks in Markdown: a table, a picture and the sentences each."""
    lines = []
    for one in found:
        lines += [
            f"### {one.task.title[0].upper()}{one.task.title[1:]}",
            "",
            f"{measure(one)}.",
            "",
            *_markdown(HEADS, rows(one)),
            "",
        ]
        if one.task.name in pictures:
            drawn = "share of full fine-tuning's gain" if one.shares else "held-out loss"
            lines += [f"![{drawn} against trained numbers]({pictures[one.task.name]})", ""]
        lines += [*(f"- {line}" for line in sentences(one)), ""]
    return "\n".join(lines).strip()


def page_sweeps(sweeps: dict[str, list[sweep.Transfer]]) -> str:
    """All sweeps in Markdown."""
    lines = []
    for task, found in sweeps.items():
        transfers = [one for one in found if one.tried >= sweep.LEAST_RATES]
        lines += [f'**{TASKS[task].title}** (`{COMMAND} ARGS="--sweep --task {task}"`)', ""]
        lines += [*_markdown(sweep.HEADS, sweep.rows(transfers, labels())), ""]
        lines += [*(f"- {line}" for line in sweep.words(transfers, labels())), ""]
    return "\n".join(lines).strip()


DIFFERENCE = (
    f"Means over seeds ({SEEDS} by default) and held-out items with paired 95 % bootstrap intervals. A difference is none if "
    "its interval contains 0. LoTR is the one with the lowest validation loss among those with at most as many numbers."
)


def short_text(found: list[Digest], pictures: dict[str, str]) -> str:
    """README's; "" where no main task has intervals."""
    if not any(one.task.main and not too_few(one.seeds) for one in found):
        return ""
    picture = ["", f"![share of full fine-tuning's gain against trained numbers]({pictures['evidence']})"]
    return "\n".join([page_advice(found), *(picture if "evidence" in pictures else [])])


def sweep_table(task: str, found: list[sweep.Transfer]) -> Table:
    table = Table(f"One learning rate for all ranks: {task}", *sweep.HEADS)
    for row in sweep.rows(found, labels()):
        table.add_row(*row)
    table.caption = "\n".join(sweep.words(found, labels()))
    return table


def labels() -> dict[str, str]:
    return {name: method.label for name, method in METHODS.items()}
