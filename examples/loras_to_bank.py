"""Converts eight LoRAs of a small language model to one bank of tasks, and trains a ninth task with only cores.

    python examples/causal_data.py                     downloads SmolLM2-135M and the King James Bible, once
    python examples/loras_to_bank.py                   eight books of it, about four minutes of one core
    python examples/loras_to_bank.py --quick           three books and few steps: under a minute
    python examples/loras_to_bank.py --texts folder    each .txt in it is a task, the last one is the new task

PEFT trains a LoRA on each of eight books. `loras_to_bank` converts them to shared factors and one task per book, at several
ranks. The loss on held-out rows of each book is compared with the base model's and the LoRA's. Then a ninth book is trained as
a LoRA, and as cores over these factors. Differences are paired over the held-out rows. No network is used.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench's terminal and names of machines

from causal_data import MODEL, TEXT
from causal_lm import load, read_text, train
from finetune_text import end, results_folder

from bench.measure.paired import interval_of_many
from bench.measure.store import commit, write_whole
from bench.measure.terminal import Table, bar
from bench.measure.timing import machine
from lotr_ext import TaskBank, load_adapter, lotr_parameters, mixed, unload
from lotr_ext.interop import BankConversion, loras_to_bank

BOOKS = {  # how each begins; the last one is the new task
    "Genesis": "In the beginning God created",
    "Job": "There was a man in the land of Uz",
    "Proverbs": "The proverbs of Solomon the son of David",
    "Isaiah": "The vision of Isaiah the son of Amoz",
    "Matthew": "The book of the generation of Jesus Christ",
    "John": "In the beginning was the Word",
    "Romans": "Paul, a servant of Jesus Christ, called",
    "Revelation": "The Revelation of Jesus Christ, which God gave",
    "Acts": "The former treatise have I made",
}
CHARACTERS = 40_000  # of a book: more than the steps use
TARGETS = ["q_proj", "v_proj"]
GROUPINGS = ("layer", "shape", "block", "name")
Rows = dict[str, Tensor]


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="a Hugging Face causal language model's folder (SmolLM2-135M)"
    )
    parser.add_argument("--texts", type=Path, help="a folder of .txt files instead of the books")
    parser.add_argument("--quick", action="store_true", help="three tasks and the new one, few steps, one rank")
    parser.add_argument("--lora-rank", type=int, default=8, help="rank of the LoRAs (8)")
    parser.add_argument("--ranks", default="layer:8,layer:16,layer:32,shape:16,shape:64", help="grouping:rank, ..")
    parser.add_argument("--steps", type=int, default=16, help="steps of each training (16)")
    parser.add_argument("--batch", type=int, default=2, help="rows per step (2)")
    parser.add_argument("--length", type=int, default=64, help="tokens per row (64)")
    parser.add_argument("--held-out", type=int, default=6, help="held-out rows of each text (6)")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of the LoRAs (5e-3)")
    parser.add_argument(
        "--core-lr", type=float, default=2e-2, help="learning rate of the new task's cores at rank 8; falls as 1 / rank (2e-2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-start", action="store_true", help="all LoRAs start from the same A, as with one fixed seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="folder for the JSON and the picture (bench/results/<machine>)")
    options = parser.parse_args(words)
    if options.quick:
        options.steps, options.held_out, options.ranks = min(options.steps, 4), min(options.held_out, 2), "layer:8,shape:16"
    for name in ("lora_rank", "steps", "batch", "held_out", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    try:
        options.ways = [(by, int(rank)) for by, rank in (way.split(":") for way in options.ranks.split(","))]
    except ValueError:
        parser.error(f"--ranks: expected grouping:rank pairs such as layer:16,shape:32, got {options.ranks!r}")
    if any(by not in GROUPINGS or rank < 1 for by, rank in options.ways):
        parser.error(f"--ranks: expected groupings {', '.join(GROUPINGS)} and ranks of 1 or more, got {options.ranks!r}")
    if options.length < 2:
        parser.error(f"--length: expected at least 2 tokens, got {options.length}")
    options.quiet = True
    return options


def texts(options: argparse.Namespace) -> dict[str, str]:
    """The text of each task by name; the last one is the new task's."""
    if options.texts:
        found = {path.stem: read_text(path) for path in sorted(options.texts.glob("*.txt"))}
    else:
        bible = read_text(TEXT)
        starts = {book: bible.index(first) for book, first in BOOKS.items()}
        found = {book: bible[start : start + CHARACTERS] for book, start in starts.items()}
    if len(found) < 3:
        raise ValueError(f"texts: expected at least three, two tasks and a new one, got {len(found)}")
    return dict([*found.items()][-4:]) if options.quick else found


def rows_of(tokenizer, text: str, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training rows [n, length], and held-out rows from the end of the text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // options.length * options.length]).view(-1, options.length)
    if len(rows) < options.held_out + options.batch:
        raise ValueError(f"texts: expected {options.held_out + options.batch} rows of {options.length} tokens, got {len(rows)}")
    return rows[: -options.held_out], rows[-options.held_out :]


@torch.no_grad()
def row_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean cross entropy of each row's tokens after its first: [n]."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    return (
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1).mean(1)
    )


def losses(model: nn.Module, rows: Tensor, batch: int = 4) -> Tensor:
    return torch.cat([row_losses(model, part) for part in rows.split(batch)])


def train_lora(
    model: nn.Module, rows: Tensor, held_out: Tensor, options: argparse.Namespace, seed: int, folder: Path
) -> Tensor:
    """Trains a LoRA by PEFT, saves it in folder and removes it. Returns its losses on the held-out rows."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules=TARGETS)
    adapted = get_peft_model(model, config)
    train(adapted, rows, options, [p for p in adapted.parameters() if p.requires_grad])
    found = losses(adapted, held_out)
    adapted.save_pretrained(folder)
    adapted.unload()
    return found


def task_losses(model: nn.Module, folder: Path, held_out: Rows) -> tuple[Rows, nn.Module]:
    """The losses of each task of a bank on its own rows, and the model with the adapter in folder. A batch has a row of each
    task."""
    load_adapter(model, folder)
    bank = TaskBank(model, len(held_out))
    index = torch.tensor([bank.add(folder / f"{name}.task.safetensors") for name in held_out])
    with mixed(model, index):
        parts = [row_losses(model, rows) for rows in torch.stack([*held_out.values()], 1)]
    del model.lotr_tasks
    return dict(zip(held_out, torch.stack(parts, 1), strict=True)), model


def train_cores(model: nn.Module, rows: Tensor, held_out: Tensor, options: argparse.Namespace) -> tuple[Tensor, int]:
    """Trains a new task over the model's factors. Returns its losses on the held-out rows, and its number of parameters."""
    cores = [p for p in lotr_parameters(model) if p.requires_grad]
    lr = options.core_lr * 8 / max(cores[0].shape)
    train(model, rows, argparse.Namespace(**{**vars(options), "lr": lr}), cores)
    return losses(model, held_out), sum(p.numel() for p in cores)


def interval(differences: Tensor | Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over the rows."""
    return interval_of_many([float(v) for v in differences])


def compared(found: Rows, lora: Rows, base: Rows) -> dict:
    """Mean loss, its paired difference to the LoRAs' with an interval, and the share of their gain that is kept."""
    of, to, start = (torch.cat([*rows.values()]) for rows in (found, lora, base))
    difference, half = interval(of - to)
    gain = float((start - to).mean())
    kept = {"kept": 1 - difference / gain, "kept_half": half / abs(gain)} if gain else {}
    by_task = {name: float(rows.mean()) for name, rows in found.items()}
    return {"loss": float(of.mean()), "over_lora": difference, "half": half, "by_task": by_task, **kept}


def run(options: argparse.Namespace, scratch: Path) -> dict:
    model, tokenizer = load(options.model, "float32")
    named = {name: rows_of(tokenizer, text, options) for name, text in texts(options).items()}
    *tasks, new = named
    held = {name: named[name][1] for name in tasks}
    seeds = {name: options.seed + (0 if options.one_start else i) for i, name in enumerate(named)}
    results: dict = {"tasks": tasks, "new": new, "ways": {}, "new_task": {}}
    with bar(len(named) + 1 + 2 * len(options.ways)) as begin:
        begin("base model")
        base, base_new = {name: losses(model, rows) for name, rows in held.items()}, losses(model, named[new][1])
        lora = {}
        for name in named:
            begin(f"LoRA on {name}")
            lora[name] = train_lora(model, *named[name], options, seeds[name], scratch / "loras" / name)
        lora_new = lora.pop(new)
        for by, rank in options.ways:
            begin(f"bank, factors by {by}, rank {rank}")
            found: BankConversion = loras_to_bank({n: scratch / "loras" / n for n in tasks}, rank=rank, group_by=by)
            folder = scratch / f"{by}-{rank}"
            found.save(folder)
            own, adapted = task_losses(model, folder, held)
            row = {"group_by": by, "rank": rank, "numbers": found.parameters, "error": _error(found)}
            results["ways"][f"{by}, rank {rank}"] = row | compared(own, lora, base)
            begin(f"{new} as cores over them")
            own_new, numbers = train_cores(adapted, *named[new], options)
            results["new_task"][f"{by}, rank {rank}"] = {"numbers": numbers} | compared(
                {new: own_new}, {new: lora_new}, {new: base_new}
            )
            model = unload(adapted, merge=False)
            results["lora_numbers"] = found.lora_parameters
            gc.collect()
    results["base"], results["lora"] = compared(base, lora, base), compared(lora, lora, base)
    size = found.lora_parameters // len(tasks)
    results["new_base"], results["new_lora"] = (
        {"numbers": numbers} | compared({new: rows}, {new: lora_new}, {new: base_new})
        for numbers, rows in ((0, base_new), (size, lora_new))
    )
    return results


def _error(found: BankConversion) -> float:
    """The mean over tasks of the relative error over all their layers."""
    return statistics.fmean(found.task_errors.values())


def show(results: dict) -> None:
    """The two tables."""
    options, tasks = results["options"], results["tasks"]
    title = f"{len(tasks)} tasks, LoRA of rank {options['lora_rank']}, {options['steps']} steps; loss on held-out rows"
    table = Table(title, "", "numbers", "error", "loss", "over the LoRAs", "gain kept")
    rows = {"base model": results["base"] | {"numbers": 0}, "LoRAs": results["lora"] | {"numbers": results["lora_numbers"]}}
    for name, row in (rows | {f"bank, by {way}": row for way, row in results["ways"].items()}).items():
        error = f"{row['error']:.1%}" if "error" in row else ""
        over = f"{row['over_lora']:+.3f} ± {row['half']:.3f}"
        table.add_row(name, f"{row['numbers']:,}", error, f"{row['loss']:.3f}", over, f"{row['kept']:.0%}")
    print(table)
    table = Table(f"a new task: {results['new']}", "", "trained", "loss", "over the LoRA")
    rows = {"base model": results["new_base"], "LoRA": results["new_lora"]}
    for name, row in (rows | {f"cores, by {way}": row for way, row in results["new_task"].items()}).items():
        table.add_row(name, f"{row['numbers']:,}", f"{row['loss']:.3f}", f"{row['over_lora']:+.3f} ± {row['half']:.3f}")
    print(table)


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(options.threads)
    found = machine(torch.device("cpu"))
    folder = results_folder(options, found["name"])
    start, seconds = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        results = run(options, Path(scratch))
    results["seconds"] = {"wall": time.perf_counter() - start, "cpu": time.process_time() - seconds}
    kept = ("lora_rank", "steps", "batch", "length", "held_out", "lr", "core_lr", "seed", "one_start", "threads")
    results["options"] = {name: getattr(options, name) for name in kept}
    results |= {"machine": found, "commit": commit()}
    show(results)
    write_whole(folder / "loras-to-bank.json", json.dumps(results, indent=1) + "\n")
    from bench.pictures.combining import draw_loras  # needs matplotlib

    draw_loras(results, folder)
    print(f"{results['seconds']['cpu']:.0f} s of CPU time; results in {folder / 'loras-to-bank'}.json and .png")
    return 0


if __name__ == "__main__":
    end(main, "loras_to_bank")
