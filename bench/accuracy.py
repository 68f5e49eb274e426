"""Held-out loss against trained parameters, with paired intervals.

    python -m bench.accuracy                        all tasks and methods: days on two cores
    python -m bench.accuracy --tasks minilm-movies --methods lotr:16,lora:4 --seeds 5
    python -m bench.accuracy --tasks none           the tables of the recorded runs, without a run

It compares LoTR and its forms with LoRA, DoRA, VeRA and full fine-tuning, and continues from the
recorded runs. Data: python examples/data.py minilm snippets smollm2 kjv wycliffe verilog.

Every method has the same search for its learning rate, on validation items with the first seed:
three neighboring rates, and the next one while the best is at an end. The other seeds run at the
best rate. Rates are 1, 2, 5 times powers of ten; LoTR's are 0.4 times these
(docs/choosing_details.md says why). For example:

    seed 0            1e-3, 2e-3, 5e-3    the usual rate of LoRA and its neighbors: 5e-3 is the best
    seed 0            1e-2                the other neighbor of 5e-3, which stays the best
    seeds 1, 2, 3, 4  5e-3

A row of bench/results/accuracy.jsonl is a run:

    task, method, rank, lr, seed, steps, batch
    parameters         the trained ones, without a new head
    scaling            "" for the default
    validation, loss   means over the validation and the held-out items; absent: diverged
    accuracy           the share of held-out items, or tokens, that were right
    items              the held-out losses as means of up to 250 groups, half precision in base64
    seconds, machine, commit
    lr_run             only of commits whose default scaling lacked the constant 0.4: the rate that
                       the run used. Today lr = 0.4 lr_run takes the same path under AdamW.

Not here: the tasks, the methods, and how a model is trained (problems.py).
"""

import argparse
import base64
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from .common import QUICK, RESULTS, commit, machine, parser_of, read, show, some_of, write
from .problems import (
    METHODS,
    TASKS,
    Problem,
    Task,
    adapt,
    fit,
    missing,
    parameters_and_head,
    problem_of,
)

LOTR_RATE = 0.4  # LoTR's rates over other methods' rates
MOST_GROUPS = 250  # of held-out items in a row
DIVERGED = 2.0  # times the validation loss of the unadapted model
RESAMPLES = 4000
# The rates of the methods other than LoTR.
LADDER = [float(f"{digit}e{exponent}") for exponent in range(-8, 2) for digit in (1, 2, 5)]
Variant = tuple[str, int]  # a method and a rank: ("lotr", 16)


class Run(NamedTuple):
    """One training run: a variant on a task, with a learning rate and a seed."""

    task: str
    method: str
    rank: int
    lr: float
    seed: int
    steps: int
    batch: int


COLUMNS = (
    *Run._fields,
    "scaling",
    "parameters",
    "validation",
    "loss",
    "accuracy",
    "items",
    "lr_run",
)


def name_of(method: str, rank: int) -> str:
    return f"{method}, r {rank}" if rank else method


# ---- one run -------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """Makes a run with one thread: trains and measures. Returns its row."""
    start = time.perf_counter()
    task = TASKS[run.task]._replace(steps=run.steps, batch=run.batch)
    torch.set_num_threads(1)
    problem = problem_of(task)
    torch.manual_seed(run.seed)  # the adapter's first values
    model = adapt(problem.model(run.seed), task, run.method, run.rank)
    parameters, _ = parameters_and_head(model)
    losses = [] if run.method == "base" else fit(model, run.method, run.lr, run.seed, problem)
    row = {**run._asdict(), "scaling": "", "parameters": sum(p.numel() for p in parameters)}
    row |= measured(model, losses, problem)
    row["seconds"] = time.perf_counter() - start
    return row | {"machine": machine("cpu"), "commit": commit()}


def measured(model: nn.Module, losses: list[float], problem: Problem) -> dict[str, Any]:
    """Returns the columns of a row that come from a trained model, none if it diverged.

    Args:
        model: The trained model. It is set to eval.
        losses: The losses of the training steps.
        problem: What it was trained on.
    """
    if losses and not np.isfinite(losses[-1]):
        return {}
    validation, _ = problem.measure(model.eval(), "validation")
    held_out, right = problem.measure(model, "held_out")
    # In half precision, in which they are recorded, a large loss is infinite.
    if not (torch.isfinite(validation).all() and torch.isfinite(held_out.half()).all()):
        return {}
    return {
        "validation": validation.mean().item(),
        "loss": held_out.mean().item(),
        "accuracy": right.mean().item(),
        "items": packed(held_out.numpy()),
    }


def packed(losses: np.ndarray) -> str:
    """Returns the losses as means of up to MOST_GROUPS groups, half precision in base64."""
    groups = np.array_split(losses, min(MOST_GROUPS, len(losses)))
    means = np.array([group.mean() for group in groups], np.float16)
    return base64.b64encode(means.tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """Returns the means that `packed` has written."""
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64)


# ---- which runs come next ------------------------------------------------------------------------


def tried_rates(runs: pd.DataFrame) -> dict[float, float]:
    """Returns the first seed's validation loss at each recorded rate of a variant.

    It is infinite if a run of any seed diverged, because such a rate must not win.
    """
    diverged = set(runs[runs["validation"].isna()]["lr"])
    first = runs[(runs["seed"] == 0) & runs["lr"].notna()].set_index("lr")["validation"]
    return {lr: float("inf") if lr in diverged else loss for lr, loss in first.items()}


def searched_rates(method: str, task: Task, runs: pd.DataFrame) -> list[float]:
    """Returns a variant's best recorded rate, with its lower and its higher neighbor.

    Before anything is recorded, the method's first rate stands for the best one. Rates that are not
    on the ladder, from runs with --lr, do not count.
    """
    factor = LOTR_RATE if METHODS[method].family == "lotr" else 1.0
    ladder = [float(f"{rate * factor:.6g}") for rate in LADDER]
    first = ladder[LADDER.index(getattr(METHODS[method].rates, task.kind))]
    tried = tried_rates(runs)
    best = ladder.index(min((lr for lr in ladder if lr in tried), key=tried.get, default=first))
    return ladder[best - 1 : best + 2]


def lacking_runs(
    recorded: pd.DataFrame, rates: Sequence[float], seeds: int
) -> list[tuple[float, int]]:
    """Returns the rate and the seed of each run that comes next, none when all are recorded.

    The first runs have all rates and the first seed, the next ones the best of these rates and the
    other seeds.
    """
    tried = tried_rates(recorded)
    lacking = [(lr, 0) for lr in rates if lr not in tried]
    if lacking:
        return lacking
    best = min(sorted(rates), key=tried.get)
    measured = set(recorded[recorded["lr"] == best]["seed"])
    return [(best, seed) for seed in range(seeds) if seed not in measured]


def next_runs(
    name: str, variants: list[Variant], options: argparse.Namespace, recorded: pd.DataFrame
) -> list[Run]:
    """Returns runs of a task that may be made in parallel, none when the task is done.

    All variants finish their search before any gets another seed.

    Args:
        name: The task.
        variants: What runs on it.
        options: The command line's seeds, lr and steps.
        recorded: The runs so far, of all tasks.
    """
    task = TASKS[name]
    steps = options.steps or task.steps
    # Only runs with the default scaling and of the same size are continued.
    same = {"task": name, "scaling": "", "steps": steps, "batch": task.batch}
    of_task = recorded[(recorded[list(same)] == pd.Series(same)).all(axis=1)]
    runs = []
    for method, rank in variants:
        of_variant = of_task[(of_task["method"] == method) & (of_task["rank"] == rank)]
        seeds = options.seeds
        if method == "base":  # without training, all seeds and rates are the same
            rates = [0.0]
            seeds = 1
        elif options.lr is None:
            rates = searched_rates(method, task, of_variant)
        else:
            rates = [options.lr]
        for lr, seed in lacking_runs(of_variant, rates, seeds):
            runs.append(Run(name, method, rank, lr, seed, steps, task.batch))
    searching = [run for run in runs if run.seed == 0]
    return searching or sorted(runs, key=lambda run: run.seed)


# ---- points and intervals ------------------------------------------------------------------------


class Point(NamedTuple):
    """What a variant reaches at its best rate, over the seeds that all points of a task have.

    Attributes:
        parameters: How many are trained.
        validation: The validation loss, a mean over seeds.
        seeds: The mean held-out loss of each seed.
        items: The held-out loss of each group of items, a mean over seeds.
        accuracy: The share of held-out items that were right, NaN where none can be.
    """

    method: str
    rank: int
    parameters: int
    lr: float
    validation: float
    seeds: np.ndarray
    items: np.ndarray
    accuracy: float


def points_of(recorded: pd.DataFrame, task: str) -> list[Point]:
    """Returns a task's points in the order of their sizes.

    A run that ended far above the unadapted model counts as diverged. A variant with fewer seeds
    than the others has no point.
    """
    runs = recorded[(recorded["task"] == task) & (recorded["scaling"] == "")]
    for column in ("steps", "batch"):  # runs of another size, as --steps makes, cannot be compared
        runs = runs[runs[column].isin(runs[column].mode()[:1])]
    # Some rows of old commits have only the rate of the run.
    runs = runs.assign(lr=runs["lr"].fillna(runs["lr_run"]))
    unadapted = runs[runs["method"].isin(("base", "head"))]["validation"].min()
    runs = runs[runs["items"].notna() & ~(runs["validation"] > DIVERGED * unadapted)]
    by_variant = {
        variant: at_best_rate(of_variant)
        for variant, of_variant in runs.groupby(["method", "rank"], sort=False)
    }
    count = max(map(len, by_variant.values()), default=0)
    points = []
    for (method, rank), of_variant in by_variant.items():
        # Without training, all seeds are the same.
        of_seeds = of_variant.iloc[[0] * count] if method == "base" else of_variant
        if len(of_seeds) == count:
            points.append(point_of(method, int(rank), of_seeds))
    return sorted(points, key=lambda point: point.parameters)


def at_best_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of a variant at its best rate, by seed.

    That is the rate with the most seeds, and of several the one of the lowest validation loss.
    """
    seeds = runs.groupby("lr")["seed"].nunique()
    of_most = runs[runs["lr"].map(seeds) == seeds.max()]
    lr = of_most.loc[of_most["validation"].idxmin(), "lr"]
    latest = runs[runs["lr"] == lr].drop_duplicates("seed", keep="last")
    return latest.set_index("seed").sort_index()


def point_of(method: str, rank: int, runs: pd.DataFrame) -> Point:
    """Returns the point of runs at one rate, each with another seed."""
    return Point(
        method=method,
        rank=rank,
        parameters=int(runs["parameters"].iloc[0]),
        lr=runs["lr"].iloc[0],
        validation=runs["validation"].mean(),
        seeds=runs["loss"].to_numpy(),
        items=np.mean([unpacked(text) for text in runs["items"]], 0),
        accuracy=runs["accuracy"].mean(),
    )


class Interval(NamedTuple):
    """A value and its 95 % interval, which is NaN for fewer than three seeds."""

    value: float
    low: float
    high: float

    def text(self, form: str = "{:.4f}") -> str:
        if np.isnan(self.low):
            return form.format(self.value)
        return f"{form.format(self.value)} ({form.format(self.low)} to {form.format(self.high)})"


def interval(value: Callable[..., np.ndarray], *points: Point) -> Interval:
    """Returns value(the mean loss of each point), and its 95 % interval.

    The interval is a paired bootstrap: it draws held-out items and seeds, the same for all points.
    """
    middle = float(value(*(point.seeds.mean() for point in points)))
    n = len(points[0].seeds)
    if n < 3:
        return Interval(middle, float("nan"), float("nan"))
    # The means of few drawn seeds spread too little: they have (n - 1) / n of the variance, and the
    # tails of a normal distribution. With this factor the interval is Student's where only seeds
    # matter.
    student = stats.t.ppf(0.975, n - 1) / 1.96 * (n / (n - 1)) ** 0.5
    spread = deviations(value, [point.items for point in points])
    spread += student * deviations(value, [point.seeds for point in points])
    low, high = np.quantile(spread, (0.025, 0.975))
    return Interval(middle, middle + low, middle + high)


def deviations(value: Callable[..., np.ndarray], samples: list[np.ndarray]) -> np.ndarray:
    """Returns value(means of drawn samples) - value(means of the samples), RESAMPLES times."""

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return value(*(sample.mean(axis) for sample in drawn))

    drawn = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=0,
    )
    return drawn.bootstrap_distribution - statistic(*samples)


# ---- tables --------------------------------------------------------------------------------------


def tables(recorded: pd.DataFrame, tasks: list[str]) -> None:
    """Prints each task's points, and each LoRA and VeRA against the best of our forms."""
    for task in tasks:
        points = points_of(recorded, task)
        if not points:
            continue
        show(f"{task}, {len(points[0].seeds)} seeds", losses_table(points))
        rows = list(filter(None, (comparison(point, points) for point in points)))
        if rows:
            title = f"{task}: our best form of at most as many parameters, by validation"
            show(title, pd.DataFrame(rows))


def losses_table(points: list[Point]) -> pd.DataFrame:
    """Returns a table with a row per point.

    It has shares of full fine-tuning's gain only if that gain is clearly above zero.
    """
    unadapted = next((point for point in points if point.method in ("base", "head")), None)
    full = next((point for point in points if point.method == "full"), None)
    gained = bool(unadapted and full and interval(np.subtract, unadapted, full).low > 0)
    rows = []
    for point in points:
        row = {
            "": name_of(point.method, point.rank),
            "parameters": f"{point.parameters:,}",
            "rate": f"{point.lr:g}",
            "held-out loss": interval(lambda loss: loss, point).text(),
        }
        if gained:
            row["of full fine-tuning's gain"] = share_of_gain(unadapted, point, full).text("{:.0%}")
        if not np.isnan(point.accuracy):
            row["accuracy"] = f"{point.accuracy:.2%}"
        rows.append(row)
    return pd.DataFrame(rows)


def share_of_gain(unadapted: Point, point: Point, full: Point) -> Interval:
    """Returns how far the loss of a point falls, divided by how far it falls with `full`."""
    return interval(lambda before, x, best: (before - x) / (before - best), unadapted, point, full)


def comparison(rival: Point, points: list[Point]) -> dict[str, str] | None:
    """Returns a row: a LoRA or VeRA against the best LoTR of at most its size, by validation loss.

    Returns None for other methods, and without such a LoTR.
    """
    ours = [
        point
        for point in points
        if METHODS[point.method].family == "lotr" and point.parameters <= rival.parameters
    ]
    if rival.method not in ("lora", "vera") or not ours:
        return None
    best = min(ours, key=lambda point: point.validation)
    difference = interval(np.subtract, best, rival)
    verdict = "no difference"
    if difference.low > 0 or difference.high < 0:
        verdict = "lower" if difference.value < 0 else "higher"
    return {
        "rival": f"{name_of(rival.method, rival.rank)} ({rival.parameters:,})",
        "ours": f"{name_of(best.method, best.rank)} ({best.parameters:,})",
        "ours less rival": difference.text(),
        "loss": verdict,
    }


# ---- the program ---------------------------------------------------------------------------------


def variants_of(text: str) -> list[tuple[str, str]]:
    """Converts an option: "lotr:16,lora" to [("lotr", "16"), ("lora", "")].

    The ranks of a method without one depend on the task: `with_ranks` fills them in.
    """
    variants = []
    for word in text.split(","):
        method, _, rank = word.partition(":")
        if method not in METHODS or not re.fullmatch(r"\d*", rank):
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(METHODS)}, as lotr or lotr:16, got {word!r}"
            )
        variants.append((method, rank))
    return variants


OPTIONS: dict[str, dict[str, Any]] = {
    "tasks": {
        "type": some_of([*TASKS, "none"]),
        "default": list(TASKS),
        "help": f"some of {', '.join(TASKS)}; none (all)",
    },
    "methods": {
        "type": variants_of,
        "help": f"some of {', '.join(METHODS)}, with a rank or without: lotr:16,lora",
    },
    "seeds": {"type": int, "default": 5, "help": "how many, from 0 on (5)"},
    "lr": {"type": float, "help": "only this learning rate, without a search"},
    "steps": {"type": int, "help": "of a run (the task's)"},
    "jobs": {
        "type": int,
        "default": os.cpu_count(),
        "help": "runs at a time, one thread each (one per core)",
    },
    "results": {
        "type": Path,
        "default": RESULTS / "accuracy.jsonl",
        "help": "the file (bench/results/accuracy.jsonl)",
    },
    "quick": {
        "action": "store_true",
        "help": "a teacher, three methods, 40 steps, into demo_results/bench",
    },
}


def with_ranks(methods: list[tuple[str, str]], task: Task) -> list[Variant]:
    """Returns the variants of a task: a method without a rank has its usual ranks there."""
    return [
        (method, rank)
        for method, text in methods
        for rank in ([int(text)] if text else getattr(METHODS[method].ranks, task.kind))
    ]


def runs_in(path: Path, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """Returns the recorded runs. They have these columns, empty ones where no run has values."""
    recorded = read(path)
    return recorded.reindex(columns=list(dict.fromkeys([*recorded.columns, *columns])))


def record(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file, and prints it."""
    write(path, pd.concat([read(path), pd.DataFrame([row])], ignore_index=True))
    print({**row, "items": ""}, file=sys.stderr, flush=True)


def complete(
    path: Path,
    columns: Sequence[str],
    choose: Callable[[pd.DataFrame], list],
    make: Callable[[Any], dict[str, Any]],
    jobs: int,
) -> None:
    """Makes runs until there are no next ones.

    Args:
        path: The result file. Only this process writes it, each run as soon as it is finished.
        columns: The columns of recorded runs.
        choose: Returns the runs that come next and may be made in parallel, from the recorded ones.
        make: Makes a run in another process, with one thread. Returns its row.
        jobs: How many runs are made at a time.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # the runs' processes inherit it
    # A forked process would inherit torch's thread pool without its threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        while runs := choose(runs_in(path, columns)):
            for future in as_completed([pool.submit(make, run) for run in runs]):
                record(path, future.result())


QUICK_OPTIONS = {
    "tasks": ["teacher-half"],
    "methods": variants_of("base:0,lotr:8,lora:2"),
    "seeds": 3,
    "lr": 2e-2,
    "steps": 40,
    "results": QUICK / "accuracy.jsonl",
}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("accuracy", __doc__, OPTIONS)
    options = parser.parse_args(argv)
    if options.quick:  # an option on the command line replaces one of these
        options = parser.parse_args(argv, argparse.Namespace(**QUICK_OPTIONS))
    tasks = [name for name in options.tasks if name in TASKS]  # without "none"
    for name in tasks:
        if lacking := missing(TASKS[name]):
            parser.error(
                f"tasks: expected {lacking} for {name}, got none. "
                f"Run python examples/data.py, which lists the names."
            )
    for name in tasks:
        variants = with_ranks(options.methods or variants_of(TASKS[name].methods), TASKS[name])
        choose = partial(next_runs, name, variants, options)
        complete(options.results, COLUMNS, choose, train, options.jobs)
    tables(runs_in(options.results), tasks or list(TASKS))
    print(f"results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
