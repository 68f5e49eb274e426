"""Fine-tune a pretrained text encoder with LoTR, with LoRA at the same rank, and with only a new head, and compare them.

    python examples/finetune_text.py                          MiniLM on movie-review snippets, as `make demo` runs it
    python examples/finetune_text.py --seeds 3                three seeds per method, means and ranges
    python examples/finetune_text.py --text mine.tsv --model folder --targets q_proj,v_proj --rank 8

Each method trains in a separate process, so that its peak memory can be measured. Results are written to demo_results/:
curves.png, table.json, and one adapter folder per method. No network is used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("head", "lotr", "lora")
INITS = ("orthonormal", "gradient")  # of LoTR's A and B; gradient: after a tenth of the steps, which train only the head


@dataclass(frozen=True)
class Job:
    """One training run, as it is passed to its process."""

    method: str
    rank: int
    targets: tuple[str, ...]
    steps: int
    batch: int
    lr: float | None
    scaling: float | None
    init: str
    seed: int
    threads: int
    model: str
    text: str | None
    held_out: int
    out: str
    show: bool


def labelled(options: Job | argparse.Namespace) -> tuple[list, list[str], int]:
    """(examples, names of the labels, how many examples to hold out)"""
    import data
    import text_model as tm

    examples, names = tm.read_labelled(Path(options.text)) if options.text else tm.movie_snippets(data.SNIPPETS)
    return examples, names, min(options.held_out, len(examples) // 5) if options.text else options.held_out


def load_text(job: Job) -> tuple[list, list, list[str]]:
    """(training, held out, class names)"""
    import text_model as tm

    examples, names, wanted = labelled(job)
    return *tm.split(examples, wanted), names


def run(job: Job) -> dict:
    """Trains and measures one method. Runs in a separate process."""
    import torch

    import text_model as tm

    torch.set_num_threads(job.threads)
    train, test, names = load_text(job)
    encoder, tokenize = tm.load_encoder(Path(job.model))
    train_ids, test_ids = tokenize([t for t, _ in train]), tokenize([t for t, _ in test])
    labels = torch.tensor([c for _, c in test])

    recipe = tm.RECIPES[job.method]
    if job.lr is not None and job.method != "head":
        recipe = tm.Recipe(recipe.name, job.lr, recipe.scaling)
    scaling = recipe.scaling if job.scaling is None else job.scaling
    model = tm.build(encoder, len(names), job.seed)
    model = tm.adapt(model, job.method, job.rank, list(job.targets), scaling)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batches = tm.Batches(train_ids, [c for _, c in train], job.batch, job.seed)
    steps = job.steps
    if job.method == "lotr" and job.init == "gradient":
        steps -= tm.start_from_gradient(model, batches, recipe.head_lr, steps // 10)
    losses, seconds = train_steps(model, recipe, batches, steps, job.show)
    peak = tm.peak_memory()

    with Bar(f"{recipe.name}, held out", len(test_ids), job.show) as bar:
        logits = tm.predict(model, test_ids, done=bar.reach)
    folder = Path(job.out) / f"{job.method}-r{job.rank}"
    result = {
        "method": recipe.name,
        "rank": job.rank if job.method != "head" else None,
        "trained_parameters": trained,
        "adapter_bytes": tm.save(model, job.method, folder),
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "seconds_per_step": statistics.median(seconds),
        "peak_memory_bytes": peak,
        "losses": losses,
        "settings": asdict(job) | {"lr": recipe.lr, "scaling": scaling, "head_lr": recipe.head_lr},
    }
    if job.method == "lotr":
        result["reload"] = check_reload(job, len(names), test_ids, logits, folder)
    return result


def train_steps(model, recipe, batches, steps: int, show: bool) -> tuple[list[float], list[float]]:
    """(losses, seconds) by step"""
    import text_model as tm

    optimizer, schedule = tm.optimizer_for(model, recipe, steps)
    losses, seconds, parent = [], [], os.getppid()
    with Bar(recipe.name, steps, show) as bar:
        for _ in range(steps):
            start = time.perf_counter()
            loss = tm.train_step(model, batches, optimizer, schedule)
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            if not losses[-1] < float("inf"):
                raise ValueError(f"{recipe.name}: loss is {losses[-1]} at step {len(losses)}; lower --lr or --scaling")
            bar.step(losses)
            if os.getppid() != parent:  # the parent was ended from outside, so this run's result would be lost
                sys.exit(1)
    return losses, seconds


def check_reload(job: Job, classes: int, test_ids: list, logits, folder: Path) -> dict:
    """Loads the saved adapter into a fresh model, merges it there, and compares predictions at both points."""
    import text_model as tm
    from lotr_ext import load_adapter, merge

    encoder, _ = tm.load_encoder(Path(job.model))
    fresh = tm.build(encoder, classes, job.seed + 1)  # another seed, so that equal start values cannot hide an error
    load_adapter(fresh, folder)
    report = {}
    for stage in ("loaded", "merged"):
        if stage == "merged":
            merge(fresh)
        with Bar(f"LoTR, {stage}", len(test_ids), job.show) as bar:
            got = tm.predict(fresh, test_ids, done=bar.reach)
        changed = int((got.argmax(1) != logits.argmax(1)).sum())
        if changed:
            raise RuntimeError(f"{stage} adapter: expected the trained model's predictions, got {changed} others")
        report[f"{stage}_max_difference"] = (got - logits).abs().max().item()
    return report


class Bar:
    """A progress bar: `step` for training, with the loss, or `reach` for an evaluation. If the output is no terminal, training
    prints a line every 50 steps."""

    def __init__(self, name: str, steps: int, show: bool):
        self.name, self.steps, self.done = name, steps, 0
        self.bar = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description:16}"), BarColumn(30), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn()]
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(name, total=steps, note=" " * 10)
        self.lines = show and self.bar is None

    def __enter__(self) -> Bar:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, losses: list[float]) -> None:
        self.done += 1
        recent = statistics.fmean(losses[-20:])
        if self.bar:
            self.bar.update(self.task, advance=1, note=f"loss {recent:.3f}")
        elif self.lines and (self.done % 50 == 0 or self.done == self.steps):
            print(f"{self.name:12} step {self.done:4}/{self.steps}  loss {recent:.3f}", file=sys.stderr, flush=True)

    def reach(self, done: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done)


# ---- results ---------------------------------------------------------------------------------------------------------


def machine(threads: int) -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {threads} thread(s)"


def summarise(results: list[dict]) -> list[dict]:
    """One row per method: means over seeds, and the range of the accuracy."""
    rows = []
    for name in dict.fromkeys(r["method"] for r in results):
        runs = [r for r in results if r["method"] == name]
        accuracy = [r["accuracy"] for r in runs]
        rows.append(
            {
                "method": name,
                "rank": runs[0]["rank"],
                "trained_parameters": runs[0]["trained_parameters"],
                "adapter_bytes": runs[0]["adapter_bytes"],
                "accuracy": statistics.fmean(accuracy),
                "accuracy_range": [min(accuracy), max(accuracy)],
                "seconds_per_step": statistics.median(r["seconds_per_step"] for r in runs),
                "peak_memory_bytes": max(r["peak_memory_bytes"] for r in runs),
                "runs": len(runs),
            }
        )
    return rows


def print_table(rows: list[dict], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("method", "rank", "trained parameters", "adapter on disk", "accuracy", "s/step", "peak memory"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        accuracy = f"{row['accuracy']:.2%}"
        if row["runs"] > 1:
            accuracy += " ({:.2%} to {:.2%})".format(*row["accuracy_range"])
        table.add_row(
            row["method"],
            str(row["rank"] or "-"),
            f"{row['trained_parameters']:,}",
            f"{row['adapter_bytes'] / 1024:,.1f} KiB",
            accuracy,
            f"{row['seconds_per_step']:.3f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plot(results: list[dict], rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {"head only": "0.55", "LoTR": "tab:blue", "LoRA PEFT": "tab:orange"}
    for i, result in enumerate(results):
        losses, window = result["losses"], 15
        smooth = [statistics.fmean(losses[max(0, j - window) : j + 1]) for j in range(len(losses))]
        first = all(r["method"] != result["method"] for r in results[:i])
        label = result["method"] if first else None
        left.plot(range(1, len(losses) + 1), losses, color=colours[result["method"]], alpha=0.15, linewidth=0.8)
        left.plot(range(1, len(losses) + 1), smooth, color=colours[result["method"]], label=label)
    left.set(xlabel="step", ylabel="training loss (mean of 15 steps)")
    left.grid(alpha=0.3)
    left.legend()
    for row in rows:
        low, high = row["accuracy_range"]
        errors = [[100 * (row["accuracy"] - low)], [100 * (high - row["accuracy"])]]
        colour = colours[row["method"]]
        right.errorbar(row["trained_parameters"], 100 * row["accuracy"], errors, fmt="o", color=colour, capsize=3, markersize=8)
        text = f"{row['method']}\n{row['accuracy']:.1%}, {row['trained_parameters']:,}"
        right.annotate(
            text, (row["trained_parameters"], 100 * row["accuracy"]), (0, -34), textcoords="offset points", ha="center"
        )
    right.set(xscale="log", xlabel="trained parameters", ylabel="held-out accuracy, %")
    right.margins(x=0.25, y=0.35)
    right.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


# ---- command line ----------------------------------------------------------------------------------------------------


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that a random generator does not accept."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {seed}")


def check_folder(path: str | Path, option: str = "out") -> Path:
    """Returns path; raises ValueError, before minutes of work, if no folder for the results can be made or written there."""
    path = Path(path)
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise ValueError(f"{option}: expected a folder or a new path, got {path}, where {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: expected a folder that can be written, got {path}; name another one with --{option}")
    return path


def results_folder(options: argparse.Namespace, machine: str) -> Path:
    """--results, or demo_results/bench with --quick, or bench/results/<machine>. Needs this project's folder in sys.path."""
    from bench.measure.store import QUICK, RESULTS
    from bench.measure.timing import slug

    quick = getattr(options, "quick", False)
    return check_folder(options.results or (QUICK if quick else RESULTS / slug(machine)), "results")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16, help="rank of LoTR and of LoRA (16)")
    parser.add_argument("--targets", default="query,value", help="names of the adapted layers (query,value)")
    parser.add_argument("--methods", default=",".join(METHODS), help="what to train (head,lotr,lora)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (200)")
    parser.add_argument("--batch", type=int, default=32, help="examples per step (32)")
    parser.add_argument("--lr", type=float, help="learning rate of the adapters (LoTR 5e-3, LoRA 3e-3)")
    parser.add_argument("--scaling", type=float, help="scaling of the adapters (LoTR 4, LoRA 2)")
    parser.add_argument("--init", default="orthonormal", choices=INITS, help="how LoTR's A and B start (orthonormal)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (0)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds per method (1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all)")
    parser.add_argument("--model", default=str(ROOT / "data" / "all-minilm-l6-v2"), help="a Hugging Face model folder")
    parser.add_argument("--text", help="a .tsv or .csv file of label and text, instead of the movie snippets")
    parser.add_argument("--held-out", type=int, default=1500, help="held-out examples (1500, with --text a fifth at most)")
    parser.add_argument("--out", default=str(ROOT / "demo_results"), help="folder for the results")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    for name in ("rank", "steps", "batch", "seeds", "threads", "held_out"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    for name in ("lr", "scaling"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value}")
    check_seed(options.seed)
    check_folder(options.out)
    options.methods = tuple(options.methods.split(","))
    unknown = [m for m in options.methods if m not in METHODS]
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    options.targets = tuple(t for t in options.targets.split(",") if t)
    if not options.targets:
        raise ValueError("targets: expected names of layers, got none")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    shared = {k: v for k, v in vars(options).items() if k not in ("methods", "seed", "seeds", "quiet")}
    jobs = [
        Job(method=method, seed=options.seed + i, show=not options.quiet, **shared)
        for i in range(options.seeds)
        for method in options.methods
    ]
    train, test, names = load_text(jobs[0])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(
        f"{len(train):,} training and {len(test):,} held-out texts, {len(names)} classes; {machine(options.threads)}",
        flush=True,
    )
    start, results = time.perf_counter(), []
    for job in jobs:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(run, job).result())
        rows = summarise(results)
        title = f"{Path(options.text).name if options.text else 'movie snippets'}, {options.steps} steps of {options.batch}"
        load = os.getloadavg()[0]  # if it exceeds the thread count, other programs ran too, and the times are not valid
        table = {"machine": machine(options.threads), "load": load, "data": title, "rows": rows, "runs": results}
        write_json(out / "table.json", table)
    print_table(rows, title)
    for result in results:
        if "reload" in result:
            print(
                f"adapter saved, loaded into a fresh model and merged: the same {len(test):,} predictions "
                "(logits differ by at most {loaded_max_difference:.1e} loaded, {merged_max_difference:.1e} merged)".format(
                    **result["reload"]
                )
            )
    plot(results, rows, out / "curves.png")
    print(f"{time.perf_counter() - start:.0f} s; wrote curves.png, table.json and the adapters to {out}")
    return 0


def end(main: Callable[[], int], program: str, interrupted: str = "nothing was saved") -> None:
    """Runs main and ends the process, with one line on an error, which only the first of several processes prints."""
    try:
        sys.exit(main())
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{program}: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; {interrupted}")


if __name__ == "__main__":
    end(main, "finetune_text", "finished methods are in table.json")
