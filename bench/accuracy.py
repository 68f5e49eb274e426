"""Held-out loss against trained numbers: LoTR, its forms, LoRA, DoRA, VeRA and full fine-tuning, with paired intervals.

    python -m bench.accuracy                        all tasks and methods: days on two cores; it goes on from what is kept
    python -m bench.accuracy --tasks minilm-movies --methods lotr:16,lora:4 --seeds 5
    python -m bench.accuracy --tasks none           the tables of the kept runs, without a run

Every method has the same search for its learning rate, on validation items with the first seed: three neighbouring rates, and
the next one while the best is at an end. The other seeds run at the best rate. Rates are 1, 2, 5 times powers of ten, LoTR's
are 0.4 times these. Data: python examples/data.py minilm snippets smollm2 kjv wycliffe verilog.

A row of bench/results/accuracy.jsonl is a run: task, method, rank, parameters (without a new head), lr, seed, scaling ("": the
default), steps, batch; validation and loss (means over the validation and the held-out items; none: diverged), accuracy, items
(the held-out losses as means of up to 250 groups, half precision in base64), falling (the part of the training loss's fall in
the last tenth of the run), seconds, machine, commit. Runs of commits before the default scaling had the constant 0.4 have
lr_run, the rate that they were run with, and lr = 0.4 lr_run: under AdamW the path is the same. docs/choosing.md says why.
"""

from __future__ import annotations

import argparse
import base64
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from .common import QUICK, RESULTS, commit, listed, machine, read, show, write
from .problems import KINDS, MAIN, METHODS, TASKS, Task, adapt, fit, missing, problem_of

LOTR_RATE, MOST_RATES, GROUPS, DIVERGED = (
    0.4,
    9,
    250,
    2.0,
)  # DIVERGED: times the unadapted validation loss


class Run(NamedTuple):
    task: str
    method: str
    rank: int
    lr: float
    seed: int
    steps: int
    batch: int

    def name(self) -> str:
        return f"{self.task}: {name_of(self.method, self.rank)}, rate {self.lr:g}, seed {self.seed}"


def name_of(method: str, rank: int) -> str:
    return f"{method}, r {rank}" if rank else method


# ---- one run ---------------------------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """Trains and measures with one thread. Returns the run's row."""
    start, task = time.perf_counter(), TASKS[run.task]._replace(steps=run.steps, batch=run.batch)
    torch.set_num_threads(1)
    problem = problem_of(task)
    torch.manual_seed(run.seed)
    model = adapt(problem.model(run.seed), task, run.method, run.rank)
    kept = [
        p.numel()
        for n, p in model.named_parameters()
        if p.requires_grad and not (problem.head and "head." in n)
    ]
    row: dict[str, Any] = {**run._asdict(), "scaling": "", "parameters": sum(kept)}
    losses = fit(model, run.method, run.lr, run.seed, problem) if run.method != "base" else []
    if not losses or np.isfinite(losses[-1]):
        validation, _ = problem.measure(model.eval(), "validation")
        held_out, right = problem.measure(model, "held_out")
        if torch.isfinite(validation).all() and torch.isfinite(held_out.half()).all():
            row |= {"validation": validation.mean().item(), "loss": held_out.mean().item()}
            row |= {"accuracy": None if right is None else right.mean().item()}
            row |= {"items": packed(held_out.numpy()), "falling": falling(losses)}
    return row | {
        "seconds": time.perf_counter() - start,
        "machine": machine("cpu"),
        "commit": commit(),
    }


def packed(losses: np.ndarray) -> str:
    groups = np.array_split(losses, min(GROUPS, len(losses)))
    return base64.b64encode(
        np.array([group.mean() for group in groups], np.float16).tobytes()
    ).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64)


def falling(losses: list[float]) -> float:
    tenths = [part.mean() for part in np.array_split(losses, 10)] if len(losses) >= 10 else []
    return (
        float((tenths[-2] - tenths[-1]) / (tenths[0] - tenths[-1]))
        if tenths and tenths[0] > tenths[-1]
        else 0.0
    )


# ---- which runs come next --------------------------------------------------------------------------------------------


def rung(index: int, method: str) -> float:
    """.., 0.1, 0.2, 0.5, 1, 2, 5, ..; LoTR's are 0.4 times these."""
    rate = float(f"{(1, 2, 5)[index % 3]}e{index // 3}")
    return float(f"{rate * (LOTR_RATE if METHODS[method].family == 'lotr' else 1.0):.6g}")


def index_of(lr: float, method: str) -> int:
    return min(range(-24, 7), key=lambda i: abs(np.log(rung(i, method) / lr)))


def first_rate(method: str, kind: str) -> float:
    begin = METHODS[method].rates[KINDS.index(kind)] * (
        LOTR_RATE if METHODS[method].family == "lotr" else 1.0
    )
    return rung(index_of(begin, method), method) if begin else 0.0


def rates_to_try(method: str, begin: float, tried: dict[float, float]) -> list[float]:
    """By the validation losses of those tried (infinite: diverged). Three neighbours first; while the best of them is the
    lowest or the highest, the next one beyond it; none: the search is over."""
    middle = index_of(begin, method)
    if lacking := [lr for step in (0, -1, 1) if (lr := rung(middle + step, method)) not in tried]:
        return lacking
    best = min(tried, key=lambda lr: (tried[lr], lr))
    beyond = -1 if best == min(tried) else 1 if best == max(tried) else 0
    return (
        [rung(index_of(best, method) + beyond, method)]
        if beyond and len(tried) < MOST_RATES
        else []
    )


def tried_rates(kept: pd.DataFrame) -> dict[float, float]:
    """The validation losses of one place's runs with the first seed, infinite where a run with any seed diverged."""
    bad = set(kept[kept["validation"].isna()]["lr"])
    first = kept[kept["seed"] == 0]
    return {
        lr: float("inf") if lr in bad else loss
        for lr, loss in zip(first["lr"], first["validation"])
    }


class Search:
    """What is left to do of one task: all places finish their search before any gets another seed."""

    def __init__(self, task: str, places: list[tuple[str, int]], options: argparse.Namespace):
        self.name, self.task, self.places, self.options = task, TASKS[task], places, options

    def own(self, kept: pd.DataFrame, method: str, rank: int) -> pd.DataFrame:
        same = (
            (kept["task"] == self.name)
            & (kept["method"] == method)
            & (kept["rank"] == rank)
            & (kept["scaling"] == "")
        )
        return kept[same & (kept["steps"] == self.task.steps) & (kept["batch"] == self.task.batch)]

    def next_runs(self, kept: pd.DataFrame) -> list[Run]:
        """Runs that may go side by side; none: the task is done."""
        rates, more = {}, []
        for method, rank in self.places:
            tried = tried_rates(self.own(kept, method, rank))
            begin = first_rate(method, self.task.kind)
            if method == "base" or self.options.lr or self.options.quick:
                usual = begin if method == "base" else self.options.lr or begin
                found, rates[method, rank] = [] if usual in tried else [usual], usual
            else:
                found = rates_to_try(method, begin, tried)
                rates[method, rank] = min(tried, key=lambda lr: (tried[lr], lr)) if tried else begin
            more += [
                Run(self.name, method, rank, lr, 0, self.task.steps, self.task.batch)
                for lr in found
            ]
        if more:
            return more
        for seed in range(1, self.options.seeds):
            for method, rank in [place for place in self.places if place[0] != "base"]:
                own = self.own(kept, method, rank)
                if own[(own["seed"] == seed) & (own["lr"] == rates[method, rank])].empty:
                    more.append(
                        Run(
                            self.name,
                            method,
                            rank,
                            rates[method, rank],
                            seed,
                            self.task.steps,
                            self.task.batch,
                        )
                    )
            if more:
                return more
        return []


# ---- tables ----------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A place at its rate, over the seeds that places have in common. seeds: mean losses; items: means over seeds."""

    method: str
    rank: int
    parameters: int
    lr: float
    validation: float
    seeds: np.ndarray
    items: np.ndarray
    accuracy: float


def points_of(kept: pd.DataFrame, task: str) -> list[Point]:
    """Of a task's kept runs. A run that ended far above the unadapted model counts as diverged, and its place is left out."""
    own = kept[(kept["task"] == task) & (kept["scaling"] == "")]
    if own.empty:
        return []
    own = own[(own["steps"] == own["steps"].mode()[0]) & (own["batch"] == own["batch"].mode()[0])]
    own = own.assign(
        lr=own["lr"].fillna(own["lr_run"])
    )  # computed cores of higher degree have no other rate
    untrained = own[own["method"].isin(("base", "head"))]["validation"].min()
    own = own[
        own["validation"].notna()
        & ~(own["validation"] > DIVERGED * untrained)
        & own["items"].notna()
    ]
    rates = own.groupby(["method", "rank", "lr"])["seed"].nunique()
    count, found = rates.max() if len(rates) else 0, []
    for (method, rank), _ in own.groupby(["method", "rank"], sort=False):
        runs = own[(own["method"] == method) & (own["rank"] == rank)]
        lr = rates[method, rank].idxmax()
        runs = runs[runs["lr"] == lr].drop_duplicates("seed", keep="last").sort_values("seed")
        if method == "base":  # the same for all seeds
            runs = pd.concat([runs.iloc[:1]] * count)
        if len(runs) == count:
            items = np.mean([unpacked(text) for text in runs["items"]], 0)
            means = runs["loss"].to_numpy(), items, runs["accuracy"].mean()
            found.append(
                Point(
                    method,
                    int(rank),
                    int(runs["parameters"].iloc[0]),
                    lr,
                    runs["validation"].mean(),
                    *means,
                )
            )
    return sorted(found, key=lambda point: point.parameters)


def interval(value: Callable[..., np.ndarray], *points: Point) -> tuple[float, float, float]:
    """A function of mean losses and its 95 % interval by the paired bootstrap over held-out items and over seeds. A mean of few
    drawn seeds spreads too little: its deviation is widened so that the interval is Student's where seeds alone matter."""
    middle, n = float(value(*(p.seeds.mean() for p in points))), len(points[0].seeds)
    if n < 3:
        return middle, float("nan"), float("nan")
    drawn, widen = 0.0, stats.t.ppf(0.975, n - 1) / 1.96 * (n / (n - 1)) ** 0.5
    for parts, scale in (
        (tuple(p.items for p in points), 1.0),
        (tuple(p.seeds for p in points), widen),
    ):
        statistic = lambda *means, axis=-1: value(*(m.mean(axis) for m in means))  # noqa: E731
        given = {
            "paired": True,
            "vectorized": True,
            "n_resamples": 4000,
            "method": "percentile",
            "rng": 0,
        }
        found = stats.bootstrap(parts, statistic, **given).bootstrap_distribution
        drawn = drawn + scale * (found - value(*(part.mean() for part in parts)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return middle, middle + low, middle + high


def text(value: tuple[float, float, float], form: str = "{:.4f}") -> str:
    return form.format(value[0]) + (
        "" if np.isnan(value[1]) else f" ({form.format(value[1])} to {form.format(value[2])})"
    )


def tables(kept: pd.DataFrame, tasks: list[str], markdown: bool) -> None:
    """A task's points, each against the LoRA or VeRA that trains at least as many numbers and has the lowest validation loss of
    these sizes; then what a method of ours has against each LoRA and VeRA."""
    for task in tasks:
        points = {(p.method, p.rank): p for p in points_of(kept, task)}
        base = next((points[key] for key in (("base", 0), ("head", 0)) if key in points), None)
        full, rows = points.get(("full", 0)), []
        gain = interval(lambda b, f: b - f, base, full) if base and full else (0.0,) * 3
        for point in points.values():
            row = {
                "": name_of(point.method, point.rank),
                "numbers": f"{point.parameters:,}",
                "rate": f"{point.lr:g}",
            }
            row["held-out loss"] = text(interval(lambda a: a, point))
            if gain[1] > 0:  # else a share of it would say nothing
                share = interval(lambda b, m, f: (b - m) / (b - f), base, point, full)
                row["of full fine-tuning's gain"] = text(share, "{:.0%}")
            rows.append(
                row
                | ({"accuracy": f"{point.accuracy:.2%}"} if not np.isnan(point.accuracy) else {})
            )
        if rows:
            count = len(next(iter(points.values())).seeds)
            show(f"{task}, {count} seeds", pd.DataFrame(rows), markdown)
        if compared := [
            row for point in points.values() if (row := comparison(point, list(points.values())))
        ]:
            show(
                f"{task}: our best form of at most as many numbers, by validation",
                pd.DataFrame(compared),
                markdown,
            )


def comparison(rival: Point, points: list[Point]) -> dict[str, str] | None:
    """A LoRA or VeRA against the LoTR that validation prefers among those with at most as many numbers."""
    ours = [
        p for p in points if METHODS[p.method].family == "lotr" and p.parameters <= rival.parameters
    ]
    if rival.method not in ("lora", "vera") or not ours:
        return None
    best = min(ours, key=lambda p: p.validation)
    found = interval(lambda a, b: a - b, best, rival)
    says = (
        "no difference"
        if not found[1] > 0 and not found[2] < 0
        else "lower"
        if found[0] < 0
        else "higher"
    )
    row = {"rival": f"{name_of(rival.method, rival.rank)} ({rival.parameters:,})"}
    return row | {
        "ours": f"{name_of(best.method, best.rank)} ({best.parameters:,})",
        "ours less rival": text(found),
        "loss": says,
    }


# ---- the program -----------------------------------------------------------------------------------------------------


def places_of(task: Task, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Methods and ranks: those that the options name ("lotr:16", "lora"), else the task's own."""
    kind, found = KINDS.index(task.kind), []
    usual = (
        ["base:0", "lotr:8", "lora:2"]
        if options.quick
        else METHODS
        if task.all_methods
        else MAIN[task.kind]
    )
    for word in options.methods or usual:
        method, _, rank = word.partition(":")
        if method not in METHODS:
            raise SystemExit(
                f"methods: expected some of {', '.join(METHODS)}, as lotr or lotr:16, got {word!r}"
            )
        found += (
            [(method, int(rank))]
            if rank
            else [(method, own) for own in METHODS[method].ranks[kind]]
        )
    return found


def runs_in(path: Path) -> pd.DataFrame:
    """The kept runs, with the columns that are used here even where none is kept."""
    kept, used = (
        read(path),
        (
            *Run._fields,
            "scaling",
            "parameters",
            "validation",
            "loss",
            "accuracy",
            "items",
            "lr_run",
        ),
    )
    return kept.reindex(columns=list(dict.fromkeys([*kept.columns, *used])))


def work(options: argparse.Namespace) -> None:
    """Makes what is not kept yet. This process alone writes the file, a run as soon as it is finished."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for name in options.tasks:
            search = Search(name, places_of(TASKS[name], options), options)
            search.task = search.task._replace(steps=options.steps or search.task.steps)
            while runs := search.next_runs(runs_in(options.results)):
                for future in as_completed([pool.submit(train, run) for run in runs]):
                    row = future.result()
                    write(
                        options.results,
                        pd.concat([read(options.results), pd.DataFrame([row])], ignore_index=True),
                    )
                    reached = f"loss {row['loss']:.4f}" if "loss" in row else "diverged"
                    print(
                        f"{Run(**{key: row[key] for key in Run._fields}).name()}: {reached}",
                        file=sys.stderr,
                        flush=True,
                    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks", type=listed, default=list(TASKS), help=f"some of {', '.join(TASKS)}; none (all)"
    )
    parser.add_argument(
        "--methods",
        type=listed,
        help=f"some of {', '.join(METHODS)}, with a rank or without: lotr:16,lora",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on (5)")
    parser.add_argument("--lr", type=float, help="only this learning rate, without a search")
    parser.add_argument("--steps", type=int, help="of a run (the task's)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="runs at a time, one thread each (one a core)",
    )
    parser.add_argument("--results", type=Path, help="the file (bench/results/accuracy.jsonl)")
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables in Markdown, as docs have them"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a teacher, three methods, 40 steps, into demo_results/bench",
    )
    options = parser.parse_args(argv)
    options.results = options.results or ((QUICK if options.quick else RESULTS) / "accuracy.jsonl")
    if options.quick:
        options.tasks, options.steps, options.seeds = ["teacher-half"], options.steps or 40, 3
    none = options.tasks == ["none"]
    for name in [] if none else options.tasks:
        if name not in TASKS:
            parser.error(f"tasks: expected some of {', '.join(TASKS)}, got {name!r}")
        if lacking := missing(TASKS[name]):
            parser.error(
                f"tasks: expected {lacking} for {name}, found none; run python examples/data.py, see its help"
            )
    if not none:
        os.environ |= dict.fromkeys(
            ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"), "1"
        )  # the runs inherit them
        work(options)
    tables(runs_in(options.results), list(TASKS) if none else options.tasks, options.markdown)
    print(f"results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
