"""Finds wrong labels by influence: a tenth of the training labels is flipped, and five methods rank the texts by suspicion.

A text encoder (MiniLM on movie-review snippets, the demo's task) is fine-tuned with LoTR on labels of which 10 % are wrong.
These methods are compared by AUROC, the share of wrong labels among the most suspicious tenth, and CPU time:

    loss                the loss of each training text
    self, dot           lotr_ext.influence without damping: the squared norm of the cores' gradient
    self                lotr_ext.influence of each text on itself, by the inverted curvature of the cores
    on held-out texts   lotr_ext.influence on the loss of texts with right labels: wrong labels raise it
    kronfluence         self-influence by EK-FAC on the whole weights of the same layers, of the merged model

    python examples/influence_text.py               three seeds; about 10 minutes of one core
    python examples/influence_text.py --quick       one seed, 120 texts

It prints a table and writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = Path(sys.prefix) / "frameworks"  # where make setup puts kronfluence
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from finetune_text import end, results_folder  # noqa: E402

import data  # noqa: E402
import text_model as tm  # noqa: E402
from bench.measure.paired import interval  # noqa: E402
from bench.measure.store import commit, write_whole  # noqa: E402
from bench.measure.timing import machine  # noqa: E402
from lotr_ext import influence, unload  # noqa: E402

TARGETS = ["query", "value"]
LOSS, DOT, OWN, HELD_OUT, KRONFLUENCE = "loss alone", "self, dot product", "self", "on held-out texts", "kronfluence, self"
COLOURS = {LOSS: "0.5", DOT: "tab:cyan", OWN: "tab:blue", HELD_OUT: "tab:green", KRONFLUENCE: "tab:orange"}
Batch = tuple[list[list[int]], Tensor]


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def by_length(ids: list[list[int]], labels: list[int], size: int) -> tuple[list[Batch], list[int]]:
    """Batches of texts of similar length, and the index in ids of each of their texts."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = [order[k : k + size] for k in range(0, len(order), size)]
    return [([ids[i] for i in part], torch.tensor([labels[i] for i in part])) for part in parts], order


def in_place(scores: Tensor, order: list[int]) -> list[float]:
    found = torch.empty(len(order), dtype=torch.float64)
    found[order] = scores.double()
    return found.tolist()


def trained(model: nn.Module, ids: list[list[int]], labels: list[int], options: argparse.Namespace, seed: int) -> nn.Module:
    recipe = tm.RECIPES["lotr"]
    model = tm.adapt(model, "lotr", options.rank, TARGETS, recipe.scaling)
    steps = max(1, round(options.epochs * len(ids) / options.batch))
    optimizer, schedule = tm.optimizer_for(model, recipe, steps)
    batches = tm.Batches(ids, labels, options.batch, seed)
    for _ in range(steps):
        tm.train_step(model, batches, optimizer, schedule)
    return model.eval()


def by_kronfluence(model: nn.Module, ids: list[list[int]], labels: list[int], size: int) -> list[float]:
    """Self-influence by EK-FAC on the weights of TARGETS of a model without an adapter."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Classify(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0], batch[1])
            if not sample:
                return F.cross_entropy(logits, batch[2], reduction="sum")
            drawn = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.split(".")[-1] in TARGETS]

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch[1]

    def collate(rows: list) -> tuple[Tensor, Tensor, Tensor]:
        return *tm.padded([row for row, _ in rows]), torch.tensor([label for _, label in rows])

    logging.disable(logging.WARNING)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [(ids[i], labels[i]) for i in order]
    task = Classify()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "texts", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder, disable_model_save=True
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        analyzer.fit_all_factors("factors", texts, per_device_batch_size=size)
        analyzer.compute_self_scores("scores", "factors", texts, per_device_train_batch_size=size)
        scores = analyzer.load_self_scores("scores")["all_modules"]
    logging.disable(logging.NOTSET)
    return in_place(scores.flatten(), order)


def run(options: argparse.Namespace, seed: int, report: Callable[[str], None]) -> dict:
    """The suspicion of each training text by each method, and CPU seconds, for one seed."""
    examples = tm.movie_snippets(data.SNIPPETS)[0]
    training, held_out = tm.split(examples, 1500)
    for name, wanted, there in (("texts", options.texts, training), ("held-out", options.held_out, held_out)):
        if wanted > len(there):
            raise ValueError(f"{name}: expected at most {len(there)}, got {wanted}")
    draw = random.Random(seed)
    training, held_out = draw.sample(training, options.texts), draw.sample(held_out, options.held_out)
    wrong = set(draw.sample(range(options.texts), round(options.flipped * options.texts)))
    encoder, tokenize = tm.load_encoder(Path(options.model))
    ids = tokenize([text for text, _ in training])
    labels = [1 - label if i in wrong else label for i, (_, label) in enumerate(training)]
    report("training")
    model = trained(tm.build(encoder, 2, seed), ids, labels, options, seed)
    batches, order = by_length(ids, labels, options.batch)
    query, _ = by_length(tokenize([text for text, _ in held_out]), [label for _, label in held_out], options.batch)

    @torch.no_grad()
    def loss_alone() -> list[float]:
        losses = [F.cross_entropy(model(rows), target, reduction="none") for rows, target in batches]
        return in_place(torch.cat(losses), order)

    def on_itself(damping: float | None) -> list[float]:
        return in_place(influence(model, batches, loss=loss_sum, damping=damping, progress=False), order)

    def on_held_out() -> list[float]:
        return in_place(-influence(model, batches, query, loss=loss_sum, progress=False).sum(0), order)

    ways = {LOSS: loss_alone, DOT: lambda: on_itself(None), OWN: lambda: on_itself(0.1), HELD_OUT: on_held_out}
    if not options.without_kronfluence:
        plain: list[nn.Module] = []  # unload removes the adapter, so this method is the last
        ways[KRONFLUENCE] = lambda: by_kronfluence(plain.pop(), ids, labels, options.batch)
    found: dict = {"seed": seed, "wrong": sorted(wrong), "ways": {}}
    for name, way in ways.items():
        report(name)
        if name == KRONFLUENCE:
            plain.append(unload(model, merge=True))
        start = time.process_time()
        scores = way()
        found["ways"][name] = {"seconds": time.process_time() - start, "scores": scores}
    return found


# ---- results ---------------------------------------------------------------------------------------------------------


def auroc(scores: list[float], wrong: set[int]) -> float:
    """The probability that a wrong label is more suspicious than a right one (Mann-Whitney), ties counted half."""
    values = torch.tensor(scores, dtype=torch.float64)
    chosen = torch.tensor([i in wrong for i in range(len(scores))])
    above = values[chosen][:, None] - values[~chosen][None, :]
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())


def found_curve(scores: list[float], wrong: set[int]) -> list[float]:
    """The share of the wrong labels that is found among the most suspicious 1, 2 .. 100 % of the texts."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [sum(i in wrong for i in order[: round(n * len(order) / 100)]) / len(wrong) for n in range(1, 101)]


def measured(found: dict) -> dict:
    """The results of one seed: AUROC, the curve and CPU seconds of each method."""
    wrong = set(found["wrong"])
    ways = {}
    for name, way in found["ways"].items():
        ways[name] = {
            "auroc": auroc(way["scores"], wrong),
            "curve": found_curve(way["scores"], wrong),
            "seconds": way["seconds"],
        }
    return {"seed": found["seed"], "ways": ways}


def summarise(runs: list[dict]) -> dict[str, dict]:
    """By method: AUROC and its difference to the loss alone at equal seeds, with 95 % intervals over seeds."""
    rows: dict[str, dict] = {}
    for name in runs[0]["ways"]:
        own, alone = [one["ways"][name] for one in runs], [one["ways"][LOSS] for one in runs]
        rows[name] = {
            "auroc": interval([way["auroc"] for way in own]),
            "over_loss": interval([way["auroc"] - other["auroc"] for way, other in zip(own, alone)]),
            "curve": [statistics.fmean(shares) for shares in zip(*(way["curve"] for way in own))],
            "seconds": statistics.median(way["seconds"] for way in own),
        }
    return rows


def text_of(value: tuple[float, float | None], sign: str = "") -> str:
    mean, half = value
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if half is not None else "")


def show(rows: dict[str, dict], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("suspicion by", "AUROC", "over the loss alone", "found in first 10 %", "CPU s"):
        table.add_column(column, justify="left" if column == "suspicion by" else "right", no_wrap=True)
    for name, row in rows.items():
        over = "" if name == LOSS else text_of(row["over_loss"], "+")
        table.add_row(name, text_of(row["auroc"]), over, f"{row['curve'][9]:.0%}", f"{row['seconds']:.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(rows: dict[str, dict], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    from bench.pictures.figures import save  # which draws without a screen

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=(1.4, 1, 1))
    for name in rows:
        left.plot(range(101), [0, *(100 * share for share in rows[name]["curve"])], color=COLOURS[name], label=name)
    left.set(xlabel="most suspicious texts looked at, %", ylabel="wrong labels found, %", xlim=(0, 50), ylim=(0, 101))
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    names = list(rows)[::-1]
    halves = [rows[name]["auroc"][1] or 0 for name in names]
    for place, (name, half) in enumerate(zip(names, halves)):
        middle.errorbar(rows[name]["auroc"][0], place, xerr=half, fmt="o", capsize=4, color=COLOURS[name])
    middle.set_yticks(range(len(names)), names)
    middle.set(xlabel="AUROC (95 % interval)")
    middle.grid(alpha=0.3)
    bars = right.barh(names, [rows[name]["seconds"] for name in names], color=[COLOURS[name] for name in names])
    right.bar_label(bars, fmt="%.0f", padding=2)
    right.set(xlabel="CPU seconds")
    right.set_yticks([])
    right.margins(x=0.15)
    figure.suptitle(title, fontsize=10)
    save({path.stem: figure}, path.parent, dpi=120)


# ---- command line ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=800, help="training texts (800)")
    parser.add_argument("--held-out", type=int, default=200, help="held-out texts with right labels (200, at most 1500)")
    parser.add_argument("--flipped", type=float, default=0.1, help="share of flipped training labels (0.1)")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes of training (2)")
    parser.add_argument("--batch", type=int, default=32, help="texts per batch (32)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the cores (16)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of texts, labels and training (3, at most 10)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--model", default=str(ROOT / "data" / "all-minilm-l6-v2"), help="a BERT folder with query and value")
    parser.add_argument("--without-kronfluence", action="store_true", help="leave kronfluence out")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the picture (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="one seed, 120 texts, results in demo_results")
    return parser


def checked(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(words)
    if options.quick:
        options.texts, options.held_out, options.seeds, options.epochs = 120, 20, 1, 1.0
    for name in ("held_out", "batch", "rank", "seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.texts < 10 or options.seeds > 10:
        parser.error(f"expected at least 10 texts and at most 10 seeds, got {options.texts} and {options.seeds}")
    if not 0 < options.flipped < 1:
        parser.error(f"--flipped: expected a share between 0 and 1, got {options.flipped}")
    if not 0 < options.epochs < float("inf"):
        parser.error(f"--epochs: expected a positive number, got {options.epochs}")
    return options


def main(words: list[str] | None = None) -> None:
    from rich.console import Console
    from rich.progress import Progress

    parser = arguments()
    options = checked(parser, words)
    if FRAMEWORKS.is_dir():
        sys.path.append(str(FRAMEWORKS))
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    found, runs = machine(torch.device("cpu")), []
    folder = results_folder(options, found["name"])
    stages = 5 + (not options.without_kronfluence)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        shown = progress.add_task("influence", total=options.seeds * stages)
        for seed in range(options.seeds):

            def report(name: str, seed: int = seed) -> None:
                progress.update(shown, advance=1, description=f"seed {seed}: {name}")
                if progress.disable:
                    print(f"seed {seed}: {name}", file=sys.stderr, flush=True)

            runs.append(measured(run(options, seed, report)))
    rows = summarise(runs)
    title = f"{options.texts} texts, {options.flipped:.0%} of the labels flipped, r = {options.rank}, {options.seeds} "
    title += f"seed{'s' * (options.seeds > 1)}; {found['name']}"
    show(rows, title)
    shape = {k: v for k, v in vars(options).items() if k not in ("results", "model")}
    results = {"command": "make influence", "commit": commit(), "machine": found, "shape": shape, "ways": rows, "runs": runs}
    path = write_whole(folder / "influence-text.json", json.dumps(results, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"), title)
    print(f"results in {path} and .png")


if __name__ == "__main__":
    end(main, "influence_text")
