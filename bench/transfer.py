"""The share of LoRA's gain that a small task keeps, for example only cores on a fixed pair.

    python -m bench.transfer --targets smollm2-kjv --forms donors/layer/16/dense --seeds 5
    python -m bench.transfer --targets none    the tables and the picture of the recorded runs
    python -m bench.transfer --collection      ten LoRAs of ten texts, and banks of their changes

A target is a text on which SmolLM2-135M is trained, with all linear layers adapted, in one of
several forms (forms.py). Some forms have a pair of factors that was fixed before (donors.py).
Tasks, training and losses are bench.accuracy's, and the tables also show its recorded runs. The
program continues from what is recorded. bench.model measures the time of a step. Data:
python examples/data.py smollm2 snippets kjv wycliffe verilog.

A row of bench/results/transfer.jsonl is a run:

    target, form, lr, seed, steps
    parameters               the trained ones
    captured                 the share of the target's squared gradient that a fixed pair captures
    validation, loss, items  as in bench.accuracy
    seconds, commit

A row of transfer_collection.jsonl is a text under its LoRA, or as a task of a bank.
"""

import argparse
import itertools
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats
from torch import nn

from lotr_ext import TaskBank, load_adapter, use_tasks
from lotr_ext.convert import loras_to_bank

from . import accuracy
from .accuracy import at_best_rate, complete, lacking_runs, record, runs_in
from .common import RESULTS, commit, parser_of, read, show, some_of
from .donors import BASE_TASK, CACHE, TEXTS, captured, lora_of, problem
from .forms import Form, build
from .problems import TASKS, fit

STEPS = TASKS[BASE_TASK].steps
TARGETS = ("smollm2-kjv", "smollm2-verilog", "smollm2-wycliffe")
FORMS = (  # what is run without --forms
    "trained/shape/8/dense",
    "trained/width/10/dense",
    "random/layer/16/dense",
    "svd/layer/16/dense",
    "donors/layer/16/dense",
    "own/layer/16/dense",
)
RATES = [2e-3, 4e-3, 8e-3]  # a pair from gradients needs a lower rate than a random one
COLLECTION_RANKS = (16, 32, 64)
COLLECTION_ROWS = 16  # held-out rows of each text
COLLECTION_BATCH = 8  # of these rows, measured at once
PER_KIB = 256  # float32 parameters


class Run(NamedTuple):
    """One training run. The form is the text that `Form.parse` parses."""

    target: str
    form: str
    lr: float
    seed: int
    steps: int


COLUMNS = (*Run._fields, "parameters", "captured", "validation", "loss", "items")


# ---- one run -------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """Makes a run with one thread: trains and measures. Returns its row."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    form = Form.parse(run.form)
    text = problem(run.target)
    text.task = text.task._replace(steps=run.steps)  # `fit` reads it
    model = build(form, run.target, run.seed)
    row: dict[str, Any] = run._asdict()
    row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pairs = form.pairs(run.target, run.seed)
    if pairs and not form.is_trained:
        row["captured"] = captured(pairs, run.target)
    # Of a method, `fit` reads only its name, for "head", and from_gradient. "lora" stands for every
    # form here: no head, and no start from the gradient.
    row |= accuracy.measured(model, fit(model, "lora", run.lr, run.seed, text), text)
    return row | {"seconds": time.perf_counter() - start, "commit": commit()}


def next_runs(recorded: pd.DataFrame, options: argparse.Namespace) -> list[Run]:
    """Returns the runs of all forms that come next."""
    runs = []
    for target, form in itertools.product(options.targets, options.forms):
        of_form = recorded[
            (recorded["target"] == target)
            & (recorded["form"] == form)
            & (recorded["steps"] == options.steps)
        ]
        for lr, seed in lacking_runs(of_form, options.rates, options.seeds):
            runs.append(Run(target, form, lr, seed, options.steps))
    return runs


# ---- tables --------------------------------------------------------------------------------------


def other_runs() -> pd.DataFrame:
    """Returns the runs of bench.accuracy that are compared: of the base, LoTR, LoRA, VeRA, full."""
    runs = runs_in(RESULTS / "accuracy.jsonl")
    return runs[
        (runs["scaling"] == "") & runs["method"].str.match("base|lotr|lora|vera|full")
    ].copy()


class Result(NamedTuple):
    """What a form or a method reaches on a target.

    Attributes:
        point: Its runs at the best rate. Its `method` is the form, or the name of the method.
        kept: The share of LoRA r 4's gain that it keeps.
    """

    point: accuracy.Point
    kept: accuracy.Interval


def results_of(recorded: pd.DataFrame, target: str) -> list[Result]:
    """Returns the results of all forms and methods on a target, in the order of their sizes.

    Each is compared with LoRA r 4 and the base model over the seeds that it and LoRA have.
    """
    others = other_runs()
    others["form"] = others["method"].combine(others["rank"], accuracy.name_of)
    runs = pd.concat([recorded.rename(columns={"target": "task"}), others])
    runs = runs[(runs["task"] == target) & (runs["steps"] == STEPS) & runs["items"].notna()]
    by_name = {name: at_best_rate(of_form) for name, of_form in runs.groupby("form")}
    lora_runs = by_name["lora, r 4"]
    results = []
    for name, of_form in by_name.items():
        seeds = sorted(set(of_form.index) & set(lora_runs.index))
        # Without training, all seeds are the same.
        base = accuracy.point_of("base", 0, by_name["base"].iloc[[0] * len(seeds)])
        lora = accuracy.point_of("lora", 4, lora_runs.loc[seeds])
        point = accuracy.point_of(name, 0, of_form.loc[seeds])
        results.append(Result(point, accuracy.share_of_gain(base, point, lora)))
    return sorted(results, key=lambda result: result.point.parameters)


def short_runs(recorded: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of fewer than the usual steps, with a column `gain`.

    It is the share of the gain in validation loss that LoRA r 4 has after as many steps.
    """
    short = recorded[recorded["steps"] < STEPS]
    base = other_runs().query("method == 'base'").groupby("task")["validation"].first()
    of_lora = short[short["form"] == "peft/all/4/lora"]
    lora = of_lora.groupby(["target", "steps"])["validation"].min().rename("lora")
    runs = short.join(lora, on=["target", "steps"])
    before = runs["target"].map(base)
    return runs.assign(gain=(before - runs["validation"]) / (before - runs["lora"]))


def tables(recorded: pd.DataFrame, collection: pd.DataFrame) -> None:
    for target in TARGETS:
        rows = [
            {
                "": point.method,
                "parameters": f"{point.parameters:,}",
                "KiB": f"{point.parameters / PER_KIB:,.0f}",
                "rate": f"{point.lr:g}",
                "seeds": len(point.seeds),
                "held-out loss": accuracy.interval(lambda loss: loss, point).text("{:.3f}"),
                "of LoRA r 4's gain": kept.text("{:.0%}"),
            }
            for point, kept in results_of(recorded, target)
        ]
        show(target, pd.DataFrame(rows))
    shorter = short_runs(recorded).sort_values(["target", "steps", "validation"])
    columns = ["target", "form", "lr", "steps", "parameters", "captured", "validation", "gain"]
    show("shorter runs", shorter[columns].round(3).astype(object).fillna(""))
    if len(collection):
        show("ten LoRAs, and banks of them", collection_table(collection))


def collection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns a table with the loss of each text: base model, its LoRA, its task in each bank.

    The last row has the mean share of the LoRAs' gain, with a 95 % t interval over the texts.
    """
    loras = rows[rows["what"] == "lora"].set_index("text")
    table = loras[["before", "loss"]].map("{:.3f}".format)
    means = ["", ""]
    for rank, of_rank in rows[rows["what"] == "bank"].groupby("rank"):
        losses = of_rank.set_index("text")["loss"]
        kept = (loras["before"] - losses) / (loras["before"] - loras["loss"])
        table[f"bank, r {rank}"] = losses.map("{:.3f}".format) + kept.map(" ({:.0%})".format)
        low, high = stats.t.interval(0.95, len(kept) - 1, kept.mean(), kept.sem())
        means.append(f"{kept.mean():.0%} ({low:.0%} to {high:.0%})")
    table.loc["mean"] = means
    return table.rename(columns={"before": "base", "loss": "LoRA"}).reset_index()


# ---- the picture ---------------------------------------------------------------------------------

# The last panel has a mark for each way to make a fixed pair.
PAIR_MARKS = {
    "random": "o",
    "svd": "s",
    "donors": "^",
    "known": "v",
    "own": "D",
    "loras": "P",
    "mixed": "X",
}
# The other panels have a mark and a color for each family: the forms and methods with a name that
# its regular expression matches. Forms with b: are only in the first family.
FAMILIES = {
    "cores and a vector b": (r".*/b:.*", "s", "tab:cyan"),
    "LoTR, a trained pair": (r"trained.*|lotr(-width|-block|-diagonal)?,.*", "^", "tab:green"),
    "cores on a fixed pair": (
        r"(?!trained|peft|.*/b:).+/.+|lotr-(core|few).*|lora-xs.*",
        "o",
        "tab:blue",
    ),
    "LoRA": (r"lora, .*|peft/.*/lora", "D", "tab:red"),
    "VeRA": (r"vera.*|peft/.*/vera", "v", "tab:orange"),
}


def picture(recorded: pd.DataFrame, path: Path) -> None:
    """Draws a panel per target, and one of the short runs of all targets."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.8), layout="constrained", sharey=True)
    *panels, last_panel = axes.flat
    for ax, target in zip(panels, TARGETS, strict=True):
        draw_results(ax, results_of(recorded, target))
        ax.set_title(target)
    draw_short_runs(last_panel, recorded)
    for ax in axes.flat:
        ax.set(xscale="log", ylim=(0.2, 1.1), ylabel="gain kept, of LoRA of rank 4")
        ax.axhline(1, color="0.8", linewidth=1)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def draw_results(ax: Axes, results: list[Result]) -> None:
    """Draws the gain that is kept against the size of a task."""
    for family, (names, mark, color) in FAMILIES.items():
        members = [result for result in results if re.fullmatch(names, result.point.method)]
        sizes = [result.point.parameters / PER_KIB for result in members]
        gains = [result.kept.value for result in members]
        ax.plot(sizes, gains, mark, color=color, label=family)
    ax.axvline(256, color="0.6", linestyle="--", linewidth=1)  # a quarter of a MiB
    ax.set_xlabel("KiB per task, float32")


def draw_short_runs(ax: Axes, recorded: pd.DataFrame) -> None:
    """Draws the gain of cores on a fixed pair in short runs against what the pair captures.

    A point is a target and a form at its best rate: the color is the target, the mark the pair.
    """
    runs = short_runs(recorded)
    fixed = runs[runs["captured"].notna() & runs["gain"].notna()]
    best = fixed.loc[fixed.groupby(["target", "form"])["gain"].idxmax()]
    colors = {target: f"C{i}" for i, target in enumerate(TARGETS)}
    for _, run in best.iterrows():
        mark = PAIR_MARKS[run["form"].split("/")[0]]
        ax.plot(run["captured"], run["gain"], mark, color=colors[run["target"]], alpha=0.7)
    for pair, mark in PAIR_MARKS.items():
        ax.plot([], [], mark, color="0.4", label=pair)
    for target in best["target"].unique():
        ax.plot([], [], "-", color=colors[target], label=target)
    ax.set(title="after 20 steps, on a fixed pair", xlabel="share of the squared gradient captured")
    ax.legend(fontsize=9, ncols=3, loc="lower left")


# ---- a collection of LoRAs -----------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: nn.Module, name: str) -> float:
    rows = problem(name).parts["held_out"][0][:COLLECTION_ROWS]
    losses = [
        problem(name).losses(model.eval(), (part,))[0] for part in rows.split(COLLECTION_BATCH)
    ]
    return torch.cat(losses).mean().item()


def collect(path: Path) -> None:
    """Measures each text without and with its LoRA, and as a task of each bank.

    It does not continue from recorded rows: the file is written anew.
    """
    from peft import PeftModel

    torch.set_num_threads(1)
    path.unlink(missing_ok=True)
    for name in TEXTS:
        model = problem(name).model(0)
        row = {"text": name, "what": "lora", "before": held_out_loss(model, name)}
        model = PeftModel.from_pretrained(model, lora_of(name))
        record(path, row | {"loss": held_out_loss(model, name)})
    for rank in COLLECTION_RANKS:
        folder = CACHE / f"bank-{rank}"
        bank = loras_to_bank([lora_of(name) for name in TEXTS], folder, rank=rank)
        model = load_adapter(problem(TEXTS[0]).model(0), folder)
        tasks = TaskBank(model, len(TEXTS))
        for name in TEXTS:
            row = {"text": name, "what": "bank", "rank": rank, "error": bank.errors[name]}
            index = torch.full((COLLECTION_BATCH,), tasks.add(bank.files[name]))
            with use_tasks(model, index):
                record(path, row | {"loss": held_out_loss(model, name)})


# ---- the program ---------------------------------------------------------------------------------


def rates(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


OPTIONS: dict[str, dict[str, Any]] = {
    "targets": {
        "type": some_of([*TARGETS, "none"]),
        "default": list(TARGETS),
        "help": f"some of {', '.join(TARGETS)}; none (all)",
    },
    "forms": {"type": str.split, "default": list(FORMS), "help": "with blanks between them"},
    "rates": {"type": rates, "default": RATES, "help": "of the search (2e-3,4e-3,8e-3)"},
    "seeds": {"type": int, "default": 1, "help": "how many, from 0 on (1)"},
    "steps": {"type": int, "default": STEPS, "help": f"of a run ({STEPS})"},
    "jobs": {"type": int, "default": 1, "help": "runs at a time, one thread each (1)"},
    "results": {"type": Path, "default": RESULTS / "transfer.jsonl", "help": "the file"},
    "collection": {"action": "store_true", "help": "ten LoRAs, and banks of them"},
}


def main(argv: list[str] | None = None) -> int:
    options = parser_of("transfer", f"{__doc__}\nA form is {Form.__doc__}", OPTIONS).parse_args(
        argv
    )
    collection = options.results.with_name("transfer_collection.jsonl")
    if options.collection:
        collect(collection)
    elif options.targets != ["none"]:
        complete(options.results, COLUMNS, partial(next_runs, options=options), train, options.jobs)
    recorded = runs_in(options.results, COLUMNS)
    tables(recorded, read(collection))
    picture(recorded, options.results.with_suffix(".png"))
    print(f"results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
