"""Fine-tunes a text encoder with differential privacy: cores of LoTR, compared with LoRA of the same rank.

Opacus trains both: Poisson sampling, clipped gradients of each example, noise, and its accountant. LoTR trains only the cores
(A and B stay random) by lotr_ext.interop.opacus, which gets the gradients of each example from the ordinary backward. LoRA
uses Opacus' GradSampleModule. Both train the new head. The task is the demo's: movie-review snippets on MiniLM.

    python examples/private_text.py                 three epsilons, three seeds; about 12 minutes of one core
    python examples/private_text.py --quick         one epsilon, one seed, a few steps

Each run is a separate process, so that its peak memory can be measured. It prints a table and writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_text import end, results_folder

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = Path(sys.prefix) / "frameworks"  # where make setup puts Opacus
sys.path.insert(0, str(ROOT))

METHODS = {"lotr": "LoTR, cores", "lora": "LoRA PEFT"}
RATES = {"lotr": 1.5e-2, "lora": 1e-2}
HELD_OUT = 1000  # of the 1,500 texts that are not trained on; learning rates are chosen on the others


@dataclass(frozen=True)
class Job:
    """One training run, as it is passed to its process."""

    method: str
    epsilon: float
    seed: int
    rank: int
    steps: int
    batch: int
    lr: float
    head_lr: float
    clip: float
    delta: float
    tokens: int
    held_out: int
    validation: bool
    threads: int
    model: str


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def texts(job: Job, tokenize: Any) -> tuple[list, list]:
    """(training, held out), each a list of (token ids, class)."""
    import data
    import text_model as tm

    train, test = tm.split(tm.movie_snippets(data.SNIPPETS)[0], 1500)
    found = []
    for part in (train, test[HELD_OUT:] if job.validation else test[: job.held_out]):
        ids = tokenize([text for text, _ in part])
        found.append([(row[: job.tokens - 1] + row[-1:], label) for row, (_, label) in zip(ids, part)])
    return found[0], found[1]


def private(job: Job, model: Any, train: list) -> tuple[Any, Any, Any, Any, float]:
    """(the engine, the model, its optimizer, the loader, the noise multiplier) for job.epsilon after job.steps steps."""
    import opacus
    import torch
    from opacus.accountants.utils import get_noise_multiplier
    from torch.utils.data import DataLoader

    import text_model as tm
    from lotr_ext.interop.opacus import PrivacyEngine

    def collate(rows: list) -> tuple:
        return *tm.padded([ids for ids, _ in rows]), torch.tensor([label for _, label in rows])

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if "head." in name], "lr": job.head_lr},
        {"params": [p for name, p in trained.items() if "head." not in name], "lr": job.lr},
    ]
    draw = torch.Generator().manual_seed(job.seed)
    loader = DataLoader(train, batch_size=job.batch, collate_fn=collate, generator=draw)
    noise = get_noise_multiplier(
        target_epsilon=job.epsilon, target_delta=job.delta, sample_rate=1 / len(loader), steps=job.steps, accountant="rdp"
    )
    engine = (PrivacyEngine if job.method == "lotr" else opacus.PrivacyEngine)(accountant="rdp")
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(groups, weight_decay=0.0),
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=job.clip,
        noise_generator=torch.Generator().manual_seed(job.seed + 1000),
    )
    return engine, *made, noise


def run(job: Job) -> dict:
    """Trains and measures once. Runs in a separate process."""
    if FRAMEWORKS.is_dir():
        sys.path.append(str(FRAMEWORKS))
    import torch
    import torch.nn.functional as F

    import text_model as tm

    warnings.simplefilter("ignore")
    torch.set_num_threads(job.threads)
    encoder, tokenize = tm.load_encoder(Path(job.model))
    train, test = texts(job, tokenize)
    model = tm.build(encoder, 2, job.seed)
    if job.method == "lotr":
        from lotr_ext import LoTRConfig, apply_lotr

        config = LoTRConfig(
            rank=job.rank, scaling=4.0, target_modules=["query", "value"], modules_to_save=["head"], train=["core"]
        )
        adapted = apply_lotr(model, config)
    else:
        adapted = tm.adapt(model, "lora", job.rank, ["query", "value"], 2.0)
    numbers = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    engine, module, optimizer, loader, noise = private(job, adapted, train)
    before, seconds, rows = tm.peak_memory(), [], []
    for _, (tokens, mask, target) in zip(range(job.steps), endless(loader)):
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(tokens, mask), target).backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
        rows.append(len(target))
    peak = tm.peak_memory()
    spent = engine.get_epsilon(job.delta)
    logits = tm.predict(module.to_standard_module(), [ids for ids, _ in test])
    right = logits.argmax(1) == torch.tensor([label for _, label in test])
    return {
        "settings": asdict(job) | {"model": Path(job.model).name},
        "numbers": numbers,
        "noise": noise,
        "epsilon": spent,
        "accuracy": right.double().mean().item(),
        "seconds": seconds,
        "rows": rows,
        "peak": peak,
        "loaded": before,
    }


# ---- results ---------------------------------------------------------------------------------------------------------


def summarise(runs: list[dict]) -> dict:
    """Accuracy for each epsilon and method; differences LoTR - LoRA at equal seeds and batches, with 95 % intervals."""
    from bench.measure.paired import interval

    by = {(r["settings"]["method"], r["settings"]["epsilon"], r["settings"]["seed"]): r for r in runs}
    pairs = [(r, by["lora", e, s]) for (m, e, s), r in by.items() if m == "lotr" and ("lora", e, s) in by]
    found: dict = {"accuracy": [], "cost": {}}
    for epsilon in dict.fromkeys(e for _, e, _ in by):
        row: dict = {"epsilon": epsilon}
        for method in METHODS:
            own = [r["accuracy"] for (m, e, _), r in by.items() if (m, e) == (method, epsilon)]
            row[method] = interval(own)
        own = [a["accuracy"] - b["accuracy"] for a, b in pairs if a["settings"]["epsilon"] == epsilon]
        row["difference"] = interval(own)
        found["accuracy"].append(row)
    for method in METHODS:
        own = [r for (m, _, _), r in by.items() if m == method]
        found["cost"][method] = {
            "numbers": own[0]["numbers"],
            "milliseconds_an_example": 1000
            * statistics.median(s / n for r in own for s, n in zip(r["seconds"], r["rows"]) if n),
            "peak": statistics.median(r["peak"] for r in own),
        }
    steps = [(a, b) for one, other in pairs for a, b in zip(one["seconds"][1:], other["seconds"][1:])]
    found["step_ratio"] = statistics.median(a / b for a, b in steps)
    found["peak_ratio"] = statistics.median(a["peak"] / b["peak"] for a, b in pairs)
    return found


def percent(value: tuple[float, float | None], sign: str = "") -> str:
    mean, half = value
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def show(found: dict, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("", *(f"{name}, %" for name in METHODS.values()), "difference at equal seeds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in found["accuracy"]:
        table.add_row(f"ε = {row['epsilon']:g}", *(percent(row[m]) for m in METHODS), percent(row["difference"], "+"))
    costs = found["cost"]
    table.add_row("trained numbers", *(f"{costs[m]['numbers']:,}" for m in METHODS), "")
    milliseconds = (f"{costs[m]['milliseconds_an_example']:.2f} ms" for m in METHODS)
    table.add_row("CPU time of a step, per example", *milliseconds, f"{found['step_ratio']:.3f} x")
    table.add_row("peak memory", *(f"{costs[m]['peak'] / 2**20:,.0f} MiB" for m in METHODS), f"{found['peak_ratio']:.3f} x")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(found: dict, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    from bench.pictures.figures import save  # which draws without a screen

    figure, (left, *others) = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained", width_ratios=(2.2, 1, 1))
    colours = {"lotr": "tab:blue", "lora": "tab:orange"}
    for shift, (method, name) in zip((-0.06, 0.06), METHODS.items()):
        means = [100 * row[method][0] for row in found["accuracy"]]
        halves = [100 * (row[method][1] or 0) for row in found["accuracy"]]
        places = [i + shift for i in range(len(means))]
        left.errorbar(places, means, halves, fmt="o", capsize=4, color=colours[method], label=name)
    left.set_xticks(range(len(found["accuracy"])), [f"ε = {row['epsilon']:g}" for row in found["accuracy"]])
    left.set_ylabel("held-out accuracy, % (95 % interval)")
    left.grid(alpha=0.3)
    left.legend()
    for axis, key, label, scale in zip(
        others, ("milliseconds_an_example", "peak"), ("CPU ms of a step, per example", "peak memory, MiB"), (1, 2**-20)
    ):
        values = [scale * found["cost"][method][key] for method in METHODS]
        bars = axis.bar(list(METHODS.values()), values, color=[colours[m] for m in METHODS], width=0.6)
        axis.bar_label(bars, fmt="%.2f" if scale == 1 else "%.0f", padding=2)
        axis.set_title(label, fontsize=10)
        axis.margins(y=0.15)
    figure.suptitle(title, fontsize=10)
    save({path.stem: figure}, path.parent, dpi=120)


# ---- command line ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilons", default="1,3,8", help="privacy budgets (1,3,8)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per epsilon (3, at most 10)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (30)")
    parser.add_argument("--batch", type=int, default=64, help="examples per step on average (64)")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoTR and of LoRA (16)")
    parser.add_argument("--lr", type=float, default=RATES["lotr"], help=f"learning rate of the cores ({RATES['lotr']:g})")
    parser.add_argument("--lora-lr", type=float, default=RATES["lora"], help=f"learning rate of LoRA ({RATES['lora']:g})")
    parser.add_argument("--head-lr", type=float, default=1e-2, help="learning rate of the head (0.01)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of an example's gradient (1)")
    parser.add_argument("--delta", type=float, default=1e-5, help="delta of the budget (1e-5)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a text, at most (32)")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"held-out texts ({HELD_OUT}, and at most as many)")
    parser.add_argument("--validation", action="store_true", help="accuracy on the 500 other texts, to choose learning rates")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--model", default=str(ROOT / "data" / "all-minilm-l6-v2"), help="a BERT folder with query and value")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the picture (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="one epsilon, one seed, 3 steps, 100 texts, to demo_results")
    return parser


def jobs(options: argparse.Namespace) -> list[Job]:
    """All runs; LoTR and LoRA alternate, so that the machine's state affects both."""
    shared = {name: getattr(options, name) for name in ("rank", "steps", "batch", "head_lr", "clip", "delta", "tokens")}
    shared |= {name: getattr(options, name) for name in ("held_out", "validation", "threads", "model")}
    return [
        Job(method=method, epsilon=epsilon, seed=seed, lr=options.lr if method == "lotr" else options.lora_lr, **shared)
        for seed in range(options.seeds)
        for epsilon in options.epsilons
        for method in METHODS
    ]


def checked(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(words)
    if options.quick:
        options.epsilons, options.seeds, options.steps, options.held_out = "3", 1, 3, 100
    try:
        options.epsilons = [float(word) for word in options.epsilons.split(",")]
    except ValueError:
        parser.error(f"--epsilons: expected numbers with commas, got {options.epsilons!r}")
    for name in ("seeds", "steps", "batch", "rank", "tokens", "held_out", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.seeds > 10:
        parser.error(f"--seeds: expected at most 10, got {options.seeds}")
    if not all(0 < one < float("inf") for one in options.epsilons):
        parser.error(f"--epsilons: expected positive numbers, got {options.epsilons}")
    for name in ("clip", "lr", "lora_lr", "head_lr"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(options, name)}")
    if not 0 < options.delta < 1:
        parser.error(f"--delta: expected a number between 0 and 1, got {options.delta}")
    return options


def main(words: list[str] | None = None) -> None:
    parser = arguments()
    options = checked(parser, words)
    if not any((folder / "opacus").is_dir() for folder in (FRAMEWORKS, *map(Path, sys.path))):
        sys.exit("private_text: expected Opacus, found none; run make setup, or pip install opacus")
    import torch
    from rich.progress import track

    from bench.measure.store import commit, write_whole
    from bench.measure.timing import machine

    found, runs = machine(torch.device("cpu")), []
    folder = results_folder(options, found["name"])
    for job in track(jobs(options), "private training", disable=not sys.stderr.isatty()):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            runs.append(pool.submit(run, job).result())
        if not sys.stderr.isatty():
            print(f"{METHODS[job.method]}, ε = {job.epsilon:g}, seed {job.seed}: {runs[-1]['accuracy']:.1%}", file=sys.stderr)
    summary = summarise(runs)
    title = f"{options.steps} steps of about {options.batch} texts, r = {options.rank}, δ = {options.delta:g}, "
    title += f"{options.seeds} seed{'s' * (options.seeds > 1)}; {found['name']}"
    show(summary, title)
    results = {"command": "make private", "commit": commit(), "machine": found, "summary": summary, "runs": runs}
    path = write_whole(folder / "private-text.json", json.dumps(results, indent=1) + "\n")
    draw(summary, path.with_suffix(".png"), title)
    print(f"results in {path} and .png")


if __name__ == "__main__":
    end(main, "private_text")
