"""Held-out loss of a new task whose pair of factors was fixed before, and of other small tasks.

    python -m bench.transfer --targets smollm2-kjv --forms donors/layer/16/dense --seeds 5
    python -m bench.transfer --targets none    the tables and the picture of the recorded runs
    python -m bench.transfer --collection      ten LoRAs of ten texts, and banks of their changes

SmolLM2-135M with all linear layers, as in bench.accuracy, whose recorded runs are compared. The
program continues from what is recorded. Data: python examples/data.py smollm2 snippets kjv wycliffe
verilog. The donors and their pairs are in donors.py.

A form says what a task trains, as PAIR/GROUP/RANK/CORE, and further words:

    PAIR      A fixed pair: random; svd, of the weights; donors, the leading directions of the
              donors' gradients; own, of the target's gradient; known, of all these gradients;
              loras, of the donors' LoRAs by loras_to_bank; mixed, trained on the donors. A pair
              that is trained with the cores: trained, from a random start; trained-own and so on,
              from a fixed pair. peft/all/4/lora is LoRA
    GROUP     layer, block, shape, width: which layers share A, and B
    RANK      of A and B; 4x18: of A, of B
    CORE      dense, diagonal
    only:v,o  only layers of these kinds
    b:o,down  a vector b per layer of these kinds, as VeRA: y += ((x A) * d) B^T * b
    norm:20   the norm of a row of B in the layers with b. Elsewhere, and by default, it is 2

A row of bench/results/transfer.jsonl is a run: target, form, lr, seed, steps, parameters
(trained), captured (the share of the target's squared gradient that a fixed pair captures),
validation, loss, items (these three as in bench.accuracy), seconds, commit. A row of
transfer_collection.jsonl is a text under its LoRA, or as a task of a bank. The time of a step:
python -m bench.model.
"""

import argparse
import itertools
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor, nn

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, load_adapter, use_tasks
from lotr_ext.convert import loras_to_bank
from lotr_ext.init import INIT_GAIN

from . import accuracy
from .accuracy import at_best_rate, complete, lacking_runs, record, runs_in
from .common import RESULTS, commit, parser_of, read, show, some_of
from .donors import CACHE, MODEL, TEXTS, Form, captured, fixed_pairs, layers_named, lora_of, problem
from .problems import TASKS, adapt, fit

STEPS = TASKS[MODEL].steps
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
SHORT_RUN_COLUMNS = [
    "target",
    "form",
    "lr",
    "steps",
    "parameters",
    "captured",
    "validation",
    "gain",
]
USUAL_NORM = 2.0  # of a row of B, about as in VeRA
COLLECTION_RANKS = (16, 32, 64)
COLLECTION_ROWS = 16  # held-out rows of each text
PAIR_MARKS = {  # of the picture's last panel
    "random": "o",
    "svd": "s",
    "donors": "^",
    "known": "v",
    "own": "D",
    "loras": "P",
    "mixed": "X",
}
FAMILIES = {  # of the picture: which rows, as a regular expression; mark; color
    "cores and a vector b": (r".*/b:.*", "s", "tab:cyan"),
    "LoTR, a trained pair": (r"trained.*|lotr(-width|-block|-diagonal)?,.*", "^", "tab:green"),
    "cores on a fixed pair": (
        r"(?!trained|peft)[^:]+/[^:]+|lotr-(core|few).*|lora-xs.*",
        "o",
        "tab:blue",
    ),
    "LoRA": (r"lora, .*|peft/.*/lora", "D", "tab:red"),
    "VeRA": (r"vera.*|peft/.*/vera", "v", "tab:orange"),
}


class Run(NamedTuple):
    """One training run of a form, which is its text."""

    target: str
    form: str
    lr: float
    seed: int
    steps: int


COLUMNS = (*Run._fields, "parameters", "captured", "validation", "loss", "items")


# ---- models --------------------------------------------------------------------------------------


class Vectors(nn.Module):
    """y = base(x) + ((x A) * d) B^T * b with A and B fixed, in plain torch."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, with_b: bool, norm: float):
        super().__init__()
        n, r = B.shape
        self.base = base
        self.register_buffer("A", A.to(base.weight.dtype))
        self.register_buffer("B", (norm * (n / r) ** 0.5 * B).to(base.weight.dtype))
        # A product of zeros would have no gradient.
        self.d = nn.Parameter(torch.full((r,), 0.1 if with_b else 0.0))
        self.b = nn.Parameter(torch.zeros(n)) if with_b else None

    def forward(self, x: Tensor) -> Tensor:
        y = ((x @ self.A) * self.d.to(x.dtype)) @ self.B.T
        return self.base(x) + (y if self.b is None else y * self.b.to(y.dtype))


def build(form: Form, target: str, seed: int) -> nn.Module:
    """Returns a fresh model in which what the form trains requires grad."""
    model = problem(target).model(seed).requires_grad_(False)
    torch.manual_seed(seed)
    task = TASKS[MODEL]._replace(layers=layers_named(form.only))
    if form.pair == "peft":
        return adapt(model, task, form.core, form.rank[0])
    if not form.b:
        return with_cores(model, form, target, seed, task.layers)
    with_b = re.compile(layers_named(form.b))
    for name, (A, B) in fixed_pairs(form, target, seed).items():
        parent, _, last = name.rpartition(".")
        has_b = with_b.fullmatch(name) is not None
        # Adam moves each number by the rate, so a larger B is a higher rate of b alone.
        norm = float(form.norm) if has_b and form.norm else USUAL_NORM
        vectors = Vectors(model.get_submodule(name), A, B, has_b, norm)
        setattr(model.get_submodule(parent), last, vectors)
    return model


def with_cores(model: nn.Module, form: Form, target: str, seed: int, layers: str) -> nn.Module:
    """Returns the model with lotr_ext's layers: trained pairs, or only cores over fixed ones."""
    train = ("A", "B", "core") if form.is_trained else ("core",)
    settings = {"rank": form.rank, "group_by": form.group, "core": form.core, "train": train}
    apply_lotr(model, LoTRConfig(**settings, target_modules=layers))
    for name, (A, B) in fixed_pairs(form, target, seed).items():
        if re.fullmatch(layers, name):
            pair = {"A.value": INIT_GAIN * A, "B.value": INIT_GAIN * B}
            model.get_submodule(name).factors.load_state_dict(pair)
    return model


# ---- one run -------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """Trains and measures with one thread. Returns the run's row."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    form = Form.of(run.form)
    text = problem(run.target)
    text.task = text.task._replace(steps=run.steps)
    model = build(form, run.target, run.seed)
    row: dict[str, Any] = run._asdict()
    row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if form.source and not form.is_trained:
        row["captured"] = captured(fixed_pairs(form, run.target, run.seed), run.target)
    # "lora" stands for any method without a new head and without a start from the gradient.
    row |= accuracy.measured(model, fit(model, "lora", run.lr, run.seed, text), text)
    return row | {"seconds": time.perf_counter() - start, "commit": commit()}


def next_runs(recorded: pd.DataFrame, options: argparse.Namespace) -> list[Run]:
    """Returns the runs of all forms that come next."""
    runs = []
    for target, form in itertools.product(options.targets, options.forms):
        same = (recorded["target"] == target) & (recorded["form"] == form)
        of_form = recorded[same & (recorded["steps"] == options.steps)]
        for lr, seed in lacking_runs(of_form, options.rates, options.seeds):
            runs.append(Run(target, form, lr, seed, options.steps))
    return runs


# ---- tables --------------------------------------------------------------------------------------


def other_runs() -> pd.DataFrame:
    """Returns the runs of bench.accuracy that are compared."""
    runs = runs_in(RESULTS / "accuracy.jsonl")
    return runs[(runs["scaling"] == "") & runs["method"].str.match("base|lo|vera|full")].copy()


def results_of(
    recorded: pd.DataFrame, target: str
) -> list[tuple[accuracy.Point, accuracy.Interval]]:
    """Returns (runs, share of LoRA r 4's gain) of each form and method, by size.

    The point of the runs has the form as its method.
    """
    others = other_runs()
    others["form"] = others["method"].combine(others["rank"], accuracy.name_of)
    forms = recorded.rename(columns={"target": "task"})
    runs = pd.concat([forms, others])
    runs = runs[(runs["task"] == target) & (runs["steps"] == STEPS) & runs["items"].notna()]
    by_name = {name: at_best_rate(of_form) for name, of_form in runs.groupby("form")}
    lora = by_name["lora, r 4"]
    results = []
    for name, of_form in by_name.items():
        seeds = sorted(set(of_form.index) & set(lora.index))
        base = by_name["base"].iloc[[0] * len(seeds)]
        paired = (base, of_form.loc[seeds], lora.loc[seeds])
        points = [accuracy.point_of(name, 0, runs_of_one) for runs_of_one in paired]
        results.append((points[1], accuracy.share_of_gain(*points)))
    return sorted(results, key=lambda result: result[0].parameters)


def short_runs(recorded: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs of fewer steps, with their share of LoRA r 4's gain after as many.

    The gain is that of the validation loss.
    """
    runs = recorded[recorded["steps"] < STEPS]
    others = other_runs()
    base = others[others["method"] == "base"].groupby("task")["validation"].first()
    of_lora = runs[runs["form"] == "peft/all/4/lora"]
    lora = of_lora.groupby(["target", "steps"])["validation"].min().rename("lora")
    runs = runs.join(lora, on=["target", "steps"])
    before = runs["target"].map(base)
    return runs.assign(gain=(before - runs["validation"]) / (before - runs["lora"]))


def tables(recorded: pd.DataFrame) -> None:
    for target in TARGETS:
        rows = [
            {
                "": point.method,
                "parameters": f"{point.parameters:,}",
                "KiB": f"{point.parameters / 256:,.0f}",
                "rate": f"{point.lr:g}",
                "seeds": len(point.seeds),
                "held-out loss": accuracy.interval(lambda loss: loss, point).text("{:.3f}"),
                "of LoRA r 4's gain": kept.text("{:.0%}"),
            }
            for point, kept in results_of(recorded, target)
        ]
        show(target, pd.DataFrame(rows))
    shorter = short_runs(recorded).sort_values(["target", "steps", "validation"])
    show("shorter runs", shorter[SHORT_RUN_COLUMNS].round(3).astype(object).fillna(""))
    collection = collection_table(read(RESULTS / "transfer_collection.jsonl"))
    show("ten LoRAs, and banks of them", collection)


def collection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the loss of each text: base model, its LoRA, its task in a bank of each rank.

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


def picture(recorded: pd.DataFrame, path: Path) -> None:
    """Draws the gain that is kept against the size of a task, and against the captured share."""
    figure, axes = plt.subplots(1, len(TARGETS) + 1, figsize=(16, 3.9), layout="constrained")
    for ax, target in zip(axes, TARGETS, strict=False):
        results = results_of(recorded, target)
        for family, (names, mark, color) in FAMILIES.items():
            shown = [
                (point.parameters / 256, kept.value)
                for point, kept in results
                if re.fullmatch(names, point.method)
            ]
            ax.plot(*np.array(shown).reshape(-1, 2).T, mark, color=color, label=family)
        ax.axvline(256, color="0.6", linestyle="--", linewidth=1)
        ax.axhline(1, color="0.8", linewidth=1)
        ax.set(xscale="log", title=target, xlabel="KiB per task, float32", ylim=(0.2, 1.1))
    axes[0].set_ylabel("gain kept, of LoRA of rank 4")
    draw_short_runs(axes[-1], recorded)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def draw_short_runs(ax: Axes, recorded: pd.DataFrame) -> None:
    """Draws what cores on a fixed pair gain in short runs against what the pair captures."""
    runs = short_runs(recorded)
    fixed = runs[runs["captured"].notna() & runs["gain"].notna()]
    best = fixed.loc[fixed.groupby(["target", "form"])["gain"].idxmax()]
    for _, run in best.iterrows():
        color = f"C{TARGETS.index(run['target'])}"
        mark = PAIR_MARKS[run["form"].split("/")[0]]
        ax.plot(run["captured"], run["gain"], mark, color=color, alpha=0.7)
    for pair, mark in PAIR_MARKS.items():
        ax.plot([], [], mark, color="0.4", label=pair)
    for target in best["target"].unique():
        ax.plot([], [], "-", color=f"C{TARGETS.index(target)}", label=target)
    ax.set(title="after 20 steps, on a fixed pair", xlabel="share of the squared gradient captured")
    ax.set(xscale="log", ylim=(0.2, 1.1))
    ax.legend(fontsize=6, ncols=2, loc="lower left")


# ---- a collection of LoRAs -----------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: nn.Module, name: str) -> float:
    rows = problem(name).parts["held_out"][0][:COLLECTION_ROWS]
    losses = [problem(name).losses(model.eval(), (part,))[0] for part in rows.split(8)]
    return torch.cat(losses).mean().item()


def collect(path: Path) -> None:
    """Measures each text without and with its LoRA, and as a task of each bank, all anew."""
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
            with use_tasks(model, torch.full((8,), tasks.add(bank.files[name]))):
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
    options = parser_of("transfer", __doc__, OPTIONS).parse_args(argv)
    if options.collection:
        collect(options.results.with_name("transfer_collection.jsonl"))
    elif options.targets != ["none"]:
        complete(options.results, COLUMNS, partial(next_runs, options=options), train, options.jobs)
    recorded = runs_in(options.results, COLUMNS)
    tables(recorded)
    picture(recorded, options.results.with_suffix(".png"))
    print(f"results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
