"""Held-out loss of a new task whose pair of factors was fixed before, and banks of LoRAs.

    python -m bench.transfer --targets smollm2-kjv --forms donors/layer/16/dense --seeds 5
    python -m bench.transfer --targets none    the tables and the picture of the recorded runs
    python -m bench.transfer --collection      ten LoRAs of ten texts, and banks of their changes
    python -m bench.transfer --captured        the share of a gradient that a pair captures

SmolLM2-135M with all linear layers, as in bench.accuracy, whose recorded runs are compared. The
program continues from what is recorded. Data: python examples/data.py smollm2 snippets kjv wycliffe
verilog. The donors and their pairs are in donors.py.

A form says what a task trains, as PAIR/GROUP/RANK/CORE or PAIR/GROUP/RANK/CORE/VECTORS:

    PAIR      random; svd, of the weights; donors, the leading directions of the donors' gradients;
              own, of the target's gradient; trained, with the cores. peft/all/4/lora is LoRA
    GROUP     layer, block, shape
    CORE      dense; diagonal; free, a task trains G [r, n] in place of G B^T
    VECTORS   b:o,down, a vector per layer of these kinds, as VeRA: y += s ((x A) G) B^T * b;
              with a free core v4,q1: the rank of each kind, 0 for the others

A row of bench/results/transfer.jsonl is a run: target, form, lr, seed, steps, numbers (trained),
validation, loss, items (both as in bench.accuracy, absent for fewer than its 60 steps),
step_seconds, seconds, commit. A row of transfer_collection.jsonl is a text under its LoRA, or as a
task of a bank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy import stats
from torch import Tensor, nn

from . import accuracy
from .common import RESULTS, commit, keep_memory, listed, read, show, write
from .donors import CACHE, MODEL, TEXTS, Form, captured, layers_named, pairs_for, problem
from .problems import TASKS, adapt, decay

STEPS = TASKS[MODEL].steps
TARGETS = ("smollm2-kjv", "smollm2-verilog", "smollm2-wycliffe")
FORMS = {  # what is run without --forms: the rates of a form
    "trained/shape/8/dense": (4e-3,),
    "trained/shape/10/diagonal": (4e-3, 8e-3),
    "random/layer/16/dense": (8e-3,),
    "svd/layer/16/dense": (8e-3,),
    "donors/layer/16/dense": (8e-3,),
    "own/layer/16/dense": (8e-3,),
    "random/layer/128/diagonal/b:o,down": (5e-2,),
}
START = 0.4  # lotr_ext.init: what a factor's orthonormal columns are multiplied by
LORA_STEPS = 12
LORA_RANK = 8
LORA_RATE = 5e-3
COLLECTION_ROWS = 16  # held-out rows of each text
COLLECTION_RANKS = (16, 32, 64)


class Run(NamedTuple):
    """One training run of a form, which is its text."""

    target: str
    form: str
    lr: float
    seed: int
    steps: int


# ---- models --------------------------------------------------------------------------------------


class Vectors(nn.Module):
    """y = base(x) + ((x A) * d) B^T * b with A and B fixed, in plain torch."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, with_b: bool):
        super().__init__()
        n, r = B.shape
        self.base = base
        self.register_buffer("A", A.to(base.weight.dtype))
        # About the size of VeRA's B: the norm of a row is 2.
        self.register_buffer("B", (2 * (n / r) ** 0.5 * B).to(base.weight.dtype))
        # A product of zeros would have no gradient.
        self.d = nn.Parameter(torch.full((r,), 0.1 if with_b else 0.0))
        self.b = nn.Parameter(torch.zeros(n)) if with_b else None

    def forward(self, x: Tensor) -> Tensor:
        u = x @ self.A
        y = (u * self.d.to(u.dtype)) @ self.B.T
        return self.base(x) + (y if self.b is None else y * self.b.to(y.dtype))


def build(form: Form, target: str, seed: int) -> nn.Module:
    """Returns a fresh model in which what the form trains requires grad."""
    model = problem(target).model(seed).requires_grad_(False)
    torch.manual_seed(seed)
    task = TASKS[MODEL]._replace(layers=layers_named(form.words.get("only", "")))
    if form.pair == "peft":
        model = adapt(model, task, form.core, form.rank)
    elif "b" in form.words:
        kinds = form.words["b"].split(",")
        for name, (A, B) in pairs_for(form, target, seed).items():
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(name)
            vectors = Vectors(module, A, B, last.removesuffix("_proj") in kinds)
            setattr(model.get_submodule(parent), last, vectors)
    else:
        with_cores(model, form, target, seed, task.layers)
    if "offset" in form.words:
        for name, module in list(model.named_modules()):
            if re.fullmatch(layers_named(form.words["offset"]), name):
                add_offset(module)
    return model


def add_offset(layer: nn.Module) -> None:
    """Adds a trained vector to the layer's output."""
    layer.offset = nn.Parameter(torch.zeros(layer.out_features))
    layer.register_forward_hook(lambda layer, _, y: y + layer.offset.to(y.dtype))


def with_cores(model: nn.Module, form: Form, target: str, seed: int, layers: str) -> None:
    """Adds lotr_ext's layers: trained pairs, or only cores over fixed ones."""
    from lotr_ext import LoTRConfig, apply_lotr

    config = LoTRConfig(
        rank=form.rank,
        group_by=form.group,
        core=form.core,
        train=("A", "B", "core") if form.is_trained else ("core",),
        target_modules=layers,
    )
    apply_lotr(model, config)
    if form.source:
        adapted = dict(model.named_modules())
        with torch.no_grad():
            for name, (A, B) in pairs_for(form, target, seed).items():
                if hasattr(adapted[name], "factors"):
                    adapted[name].factors.A.value.copy_(START * A)
                    adapted[name].factors.B.value.copy_(START * B)


# ---- one run -------------------------------------------------------------------------------------


def fit(model: nn.Module, name: str, run: Run, rates: dict[str, str]) -> list[float]:
    """Trains with AdamW. Returns the time of each step, fewer than the run's if it diverged."""
    groups = []
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            times = rates.get(key.rpartition(".")[2] + "_rate", 1)
            groups.append({"params": [parameter], "lr": run.lr * float(times)})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = decay(optimizer, run.steps)
    batches = problem(name).batches(run.seed)
    times: list[float] = []
    while len(times) < run.steps:
        start = time.perf_counter()
        loss = problem(name).loss(model, next(batches))
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule()
        times.append(time.perf_counter() - start)
    return times


def train(run: Run) -> dict[str, Any]:
    """Trains and measures with one thread. Returns the run's row."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    keep_memory()
    form = Form.of(run.form)
    model = build(form, run.target, run.seed)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    times = fit(model, run.target, run, form.words)
    row: dict[str, Any] = {**run._asdict(), "numbers": numbers}
    row["step_seconds"] = float(np.median(times)) if times else None
    if len(times) == run.steps:
        validation, _ = problem(run.target).measure(model.eval(), "validation")
        row["validation"] = validation.mean().item()
        if run.steps >= STEPS:
            held_out, _ = problem(run.target).measure(model, "held_out")
            row["loss"] = held_out.mean().item()
            row["items"] = accuracy.packed(held_out.numpy())
    return row | {"seconds": time.perf_counter() - start, "commit": commit()}


def next_runs(recorded: pd.DataFrame, options: argparse.Namespace) -> list[Run]:
    """Returns the runs that are not recorded yet.

    They are all rates with the first seed, then the best rate with the other seeds.
    """
    runs = []
    for target in options.targets:
        for form in options.forms:
            same = (recorded["target"] == target) & (recorded["form"] == form)
            of_form = recorded[same & (recorded["steps"] == options.steps)]
            rates = options.rates or FORMS.get(form, (4e-3, 8e-3))
            first = of_form[of_form["seed"] == 0]
            lacking = [(lr, 0) for lr in rates if lr not in set(first["lr"])]
            if not lacking and first["validation"].notna().any():
                best = first.loc[first["validation"].idxmin(), "lr"]
                seeds = set(of_form[of_form["lr"] == best]["seed"])
                lacking = [(best, seed) for seed in range(options.seeds) if seed not in seeds]
            runs += [Run(target, form, lr, seed, options.steps) for lr, seed in lacking]
    return runs


def runs_in(path: Path) -> pd.DataFrame:
    """Returns the recorded runs, with all columns that are used here."""
    recorded = read(path)
    columns = [*recorded.columns, *Run._fields, "numbers", "validation", "loss", "items"]
    return recorded.reindex(columns=list(dict.fromkeys(columns)))


def work(options: argparse.Namespace) -> None:
    """Makes the runs that are not recorded. Only this process writes the file."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        while runs := next_runs(runs_in(options.results), options):
            for future in as_completed([pool.submit(train, run) for run in runs]):
                record(options.results, [future.result()])


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a file, and prints them."""
    write(path, pd.concat([read(path), pd.DataFrame(rows)], ignore_index=True))
    for row in rows:
        print({name: value for name, value in row.items() if name != "items"}, flush=True)


# ---- tables --------------------------------------------------------------------------------------


class Baselines(NamedTuple):
    """bench.accuracy's runs of a target by seed, at the rate of most seeds."""

    base: pd.DataFrame
    lora: pd.DataFrame  # of rank 4, whose gain is the measure
    others: dict[str, pd.DataFrame]


def baselines_of(target: str) -> Baselines:
    recorded = accuracy.runs_in(RESULTS / "accuracy.jsonl")
    recorded = recorded[(recorded["task"] == target) & recorded["items"].notna()]
    recorded = recorded[(recorded["steps"] == STEPS) & (recorded["scaling"] == "")]
    runs: dict[str, pd.DataFrame] = {}
    for (method, rank), of_method in recorded.groupby(["method", "rank"]):
        lr = of_method.groupby("lr")["seed"].nunique().idxmax()
        at_rate = of_method[of_method["lr"] == lr].drop_duplicates("seed", keep="last")
        renamed = at_rate.rename(columns={"parameters": "numbers"})
        runs[accuracy.name_of(method, int(rank))] = renamed.set_index("seed")
    return Baselines(runs["base"], runs["lora, r 4"], runs)


class Result(NamedTuple):
    """A method on a target, with the share of LoRA's gain that it keeps."""

    name: str
    numbers: int
    lr: float
    seeds: int
    loss: accuracy.Interval
    kept: accuracy.Interval


def result_of(name: str, runs: pd.DataFrame, baselines: Baselines) -> Result:
    """Args: runs: of one method and rate, by seed."""
    seeds = [seed for seed in sorted(runs.index) if seed in baselines.lora.index]
    base = pd.concat([baselines.base.iloc[:1]] * len(seeds))
    points = [
        accuracy.point_of(
            name,
            0,
            float(part["lr"].iloc[0]),
            part.rename(columns={"numbers": "parameters"}).assign(accuracy=0.0),
        )
        for part in (base, runs.loc[seeds], baselines.lora.loc[seeds])
    ]
    kept = accuracy.share_of_gain(*points)
    loss = accuracy.interval(lambda loss: loss, points[1])
    return Result(name, points[1].parameters, points[1].lr, len(seeds), loss, kept)


def results_of(recorded: pd.DataFrame, target: str) -> list[Result]:
    """Every form at its best rate and the methods of bench.accuracy, by size."""
    baselines = baselines_of(target)
    shown = ("lora, r 1", "lora, r 4", "lora, r 16", "vera, r 256", "full")
    named = [name for name in baselines.others if name in shown or name.startswith("lotr")]
    results = [result_of(name, baselines.others[name], baselines) for name in named]
    of_target = recorded[(recorded["target"] == target) & recorded["items"].notna()]
    for form, runs in of_target.groupby("form"):
        lr = runs.loc[runs["validation"].idxmin(), "lr"]
        at_rate = runs[runs["lr"] == lr].drop_duplicates("seed").set_index("seed")
        results.append(result_of(form, at_rate, baselines))
    return sorted(results, key=lambda result: result.numbers)


def tables(recorded: pd.DataFrame, markdown: bool) -> None:
    for target in TARGETS:
        rows = []
        for result in results_of(recorded, target):
            rows.append(
                {
                    "": result.name,
                    "numbers": f"{result.numbers:,}",
                    "KiB": f"{result.numbers / 256:,.0f}",
                    "rate": f"{result.lr:g}",
                    "seeds": result.seeds,
                    "held-out loss": result.loss.text("{:.3f}"),
                    "of LoRA r 4's gain": result.kept.text("{:.0%}"),
                }
            )
        show(target, pd.DataFrame(rows), markdown)
    collected = read(RESULTS / "transfer_collection.jsonl")
    if not collected.empty:
        show("ten LoRAs, and banks of them", collection_table(collected), markdown)


def collection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the loss of each text: base model, its LoRA, its task in a bank of each rank.

    The last row has the mean share of the LoRAs' gain, with a 95 % t interval over the texts.
    """
    table = []
    shares: dict[str, list[float]] = {}
    for text, of_text in rows.groupby("text", sort=False):
        lora = of_text[of_text["what"] == "lora"].iloc[0]
        row = {"text": text, "base": f"{lora['before']:.3f}", "LoRA": f"{lora['loss']:.3f}"}
        for _, task in of_text[of_text["what"] == "bank"].sort_values("rank").iterrows():
            kept = (lora["before"] - task["loss"]) / (lora["before"] - lora["loss"])
            column = f"bank, r {task['rank']}"
            shares.setdefault(column, []).append(kept)
            row[column] = f"{task['loss']:.3f} ({kept:.0%})"
        table.append(row)
    means = {"text": "mean", "base": "", "LoRA": ""}
    for column, values in shares.items():
        mean = statistics.fmean(values)
        low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        means[column] = f"{mean:.0%} ({low:.0%} to {high:.0%})"
    return pd.DataFrame([*table, means])


def picture(recorded: pd.DataFrame, path: Path) -> None:
    """Draws the gain that is kept against the size of a task."""
    families = {
        "cores on a fixed pair": ("o", "tab:blue"),
        "cores and a vector b": ("s", "tab:cyan"),
        "LoTR, its own pair": ("^", "tab:green"),
        "LoRA": ("D", "tab:red"),
        "VeRA": ("v", "tab:orange"),
    }
    figure, axes = plt.subplots(1, len(TARGETS), figsize=(13, 3.9), sharey=True)
    for ax, target in zip(axes, TARGETS, strict=True):
        for result in results_of(recorded, target):
            family = family_of(result.name)
            if family:
                mark, color = families[family]
                ax.plot(result.numbers / 256, result.kept.value, mark, color=color, label=family)
        ax.axvline(256, color="0.6", linestyle="--", linewidth=1)
        ax.axhline(1, color="0.8", linewidth=1)
        ax.set(xscale="log", title=target, xlabel="KiB per task, float32", ylim=(0.3, 1.1))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gain kept, of LoRA of rank 4")
    labels: dict[str, Any] = {}
    for ax in axes:
        labels |= {label: mark for mark, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=5, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)


def family_of(name: str) -> str | None:
    """Returns the legend's name of a form or method, None if the picture leaves it out."""
    if "/" in name:
        form = Form.of(name)
        if form.is_trained:
            return "LoTR, its own pair"
        return "cores and a vector b" if "b" in form.words else "cores on a fixed pair"
    if name.startswith("lotr"):
        fixed = "core" in name or "few" in name
        return "cores on a fixed pair" if fixed else "LoTR, its own pair"
    return {"lora": "LoRA", "vera": "VeRA"}.get(name.partition(",")[0])


# ---- a collection of LoRAs -----------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: nn.Module, name: str) -> float:
    rows = problem(name).parts["held_out"][0][:COLLECTION_ROWS]
    losses = [problem(name).losses(model, (part,))[0] for part in rows.split(8)]
    return torch.cat(losses).mean().item()


def train_lora(name: str) -> dict[str, Any]:
    """Trains and saves the LoRA of a text. Returns its row."""
    torch.set_num_threads(1)
    run = Run(name, "", LORA_RATE, 0, LORA_STEPS)
    model = problem(name).model(0)
    before = held_out_loss(model, name)
    torch.manual_seed(0)
    model = adapt(model, TASKS[MODEL], "lora", LORA_RANK)
    fit(model, name, run, {})
    model.save_pretrained(CACHE / "loras" / name)
    row = {"text": name, "what": "lora", "rank": LORA_RANK, "before": before}
    return row | {"loss": held_out_loss(model.eval(), name)}


def bank_rows(rank: int) -> Iterator[dict[str, Any]]:
    """Writes a bank of all LoRAs, and measures each task."""
    from lotr_ext import TaskBank, load_adapter, use_tasks
    from lotr_ext.convert import loras_to_bank

    folder = CACHE / f"bank-{rank}"
    bank = loras_to_bank([CACHE / "loras" / name for name in TEXTS], folder, rank=rank)
    model = load_adapter(problem(TEXTS[0]).model(0), folder)
    tasks = TaskBank(model, len(TEXTS))
    for name in TEXTS:
        slots = torch.full((8,), tasks.add(bank.files[name]))
        with use_tasks(model, slots):
            loss = held_out_loss(model, name)
        row = {"text": name, "what": "bank", "rank": rank, "error": bank.errors[name]}
        yield row | {"loss": loss}


def collect(path: Path) -> None:
    """Trains the LoRAs and measures the banks that are not recorded."""
    torch.set_num_threads(1)
    for name in TEXTS:
        recorded = read(path)
        if recorded.empty or name not in set(recorded[recorded["what"] == "lora"]["text"]):
            record(path, [train_lora(name)])
    for rank in COLLECTION_RANKS:
        recorded = read(path)
        if rank not in set(recorded[recorded["what"] == "bank"]["rank"]):
            record(path, list(bank_rows(rank)))


# ---- the program ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m bench.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--targets", type=listed, default=list(TARGETS), help=f"some of {', '.join(TARGETS)}; none")
    add("--forms", type=str.split, default=list(FORMS), help="with blanks between them")
    add("--rates", type=lambda text: [float(word) for word in text.split(",")], help="4e-3,8e-3")
    add("--seeds", type=int, default=1, help="how many, from 0 on (1)")
    add("--steps", type=int, default=STEPS, help=f"of a run ({STEPS})")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each (1)")
    add("--results", type=Path, default=RESULTS / "transfer.jsonl", help="the file")
    add("--markdown", action="store_true", help="print the tables in Markdown, as docs have them")
    add("--collection", action="store_true", help="ten LoRAs, and banks of them")
    add("--captured", action="store_true", help="the share of gradients that pairs capture")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs the program."""
    options = parser().parse_args(argv)
    targets = [] if options.targets == ["none"] else options.targets
    if unknown := set(targets) - set(TARGETS):
        parser().error(f"targets: expected some of {', '.join(TARGETS)}, got {sorted(unknown)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.collection:
        collect(options.results.with_name("transfer_collection.jsonl"))
    elif options.captured:
        for target in targets:
            show(f"{target}: captured", captured(target), options.markdown)
        return 0
    elif targets:
        work(options)
    recorded = runs_in(options.results)
    tables(recorded, options.markdown)
    picture(recorded, options.results.with_suffix(".png"))
    print(f"results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
