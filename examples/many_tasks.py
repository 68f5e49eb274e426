"""A thousand tasks over one model: each row of a batch uses its own task, in one forward.

A small transformer with random weights (a Llama; nothing is downloaded) is adapted once. A TaskBank has 1,000 tasks, cores over
its factors. Batches of 64 rows with 1, 8 .. 64 tasks are compared with one adapter, with none, and with PEFT's LoRA of the same
rank by `adapter_names`, which runs one adapter after another. All run in turns on the same batch. The table has medians, and
the results are saved as JSON and as a picture.

    python examples/many_tasks.py                       prompts of 16 tokens, about three minutes
    python examples/many_tasks.py --tokens 1            a decoding step: one token per row
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench's terminal and names of machines

from finetune_text import end, results_folder

from bench.measure.names import named
from bench.measure.store import write_whole
from bench.measure.terminal import Table, bar
from bench.measure.timing import machine
from bench.rivals.tasks import TARGETS, task_of_row, transformer, with_tasks
from lotr_ext import disabled, mixed

KINDS = (1, 8, 32, 64)  # tasks in a batch
LORA = named("lora-peft")
T = TypeVar("T")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000, help="tasks in the bank")
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per row")
    parser.add_argument("--hidden", type=int, default=512, help="the model's width")
    parser.add_argument("--layers", type=int, default=4, help="the model's blocks")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="timing rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peft", type=int, default=64, help="LoRA adapters in PEFT, 0 for none")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the picture (bench/results/<machine>)")
    return parser


def with_lora(options: argparse.Namespace) -> nn.Module:
    """PEFT's model with options.peft LoRA adapters, named t0, t1, .."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=options.rank, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(transformer(options.hidden, options.layers), config, adapter_name="t0")
    for i in range(1, options.peft):
        model.add_adapter(f"t{i}", config)
    return model.eval()


def ways(options: argparse.Namespace) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, int]]:
    """The functions that run a batch, by name, and the bytes of a task."""
    model, bank = with_tasks(options.hidden, options.layers, options.rank, options.tasks)

    def base(ids: Tensor) -> Tensor:
        with disabled(model):
            return model(input_ids=ids).logits

    def batch_of(kinds: int) -> Callable[[Tensor], Tensor]:
        index = task_of_row(options.rows, kinds, options.tasks)

        def run(ids: Tensor) -> Tensor:
            with mixed(model, index):
                return model(input_ids=ids).logits

        return run

    kinds = [n for n in KINDS if n <= min(options.rows, options.tasks)]
    found = {"no adapter": base, "LoTR, one adapter": lambda ids: model(input_ids=ids).logits}
    found |= {f"LoTR, {n} task{'s' * (n > 1)} in the batch": batch_of(n) for n in kinds}
    size = {"LoTR": sum(core[0].numel() * core.element_size() for core in bank.cores)}
    if not options.peft:
        return found, size
    lora = with_lora(options)
    size["LoRA"] = sum(p.numel() * p.element_size() for name, p in lora.named_parameters() if ".t0." in name)

    def peft_batch_of(kinds: int) -> Callable[[Tensor], Tensor]:
        names = [f"t{task}" for task in task_of_row(options.rows, kinds, options.peft).tolist()]
        return lambda ids: lora(input_ids=ids, adapter_names=names).logits

    found[f"{LORA}, one adapter"] = lambda ids: lora(input_ids=ids).logits
    found |= {f"{LORA}, {n} task{'s' * (n > 1)} in the batch": peft_batch_of(n) for n in kinds if n <= options.peft}
    return found, size


@torch.no_grad()
def check(found: dict[str, Callable[[Tensor], Tensor]], ids: Tensor) -> None:
    """Raises RuntimeError unless the logits are finite and differ from those without an adapter."""
    plain = found["no adapter"](ids)
    for name, run in found.items():
        y = run(ids)
        if y.shape != plain.shape or not bool(y.isfinite().all()) or (name != "no adapter" and torch.equal(y, plain)):
            raise RuntimeError(f"{name}: expected logits other than the base model's, got the same or no numbers")


@torch.no_grad()
def measure(found: dict[str, Callable[[Tensor], Tensor]], ids: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function by round. Each round runs all of them, in a different order."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    with bar(rounds) as begin:
        for turn in range(rounds):
            begin(f"round {turn + 1}")
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                found[name](ids)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def by_kinds(ways: dict[str, T]) -> dict[str, dict[int, T]]:
    """The values of mixed batches by the number of tasks in them: {"LoTR": {1: .., 64: ..}, ..}."""
    found: dict[str, dict[int, T]] = {}
    for name, value in ways.items():
        label, _, what = name.partition(", ")
        if what.endswith("in the batch"):
            found.setdefault(label, {})[int(what.split()[0])] = value
    return found


def show(results: dict) -> None:
    """The table."""
    shape = results["shape"]
    title = "rows {rows}, tokens per row {tokens}, tasks {tasks}, width {hidden}, blocks {layers}, r {rank}, threads {threads}"
    table = Table(title.format(**shape), "", "ms", "tokens/s", "over one adapter")
    for name, row in results["ways"].items():
        tokens = shape["rows"] * shape["tokens"] / row["seconds"]
        table.add_row(name, f"{1000 * row['seconds']:.1f}", f"{tokens:,.0f}", f"{row['over_one']:.2f} x")
    print(table)
    for name, ratio in results["most_over_one_task"].items():
        print(f"{name}, most tasks in the batch over one: {ratio:.2f} x")
    for name, size in results["bytes_a_task"].items():
        print(f"a task of {name}: {size:,} bytes")


def main(words: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(words)
    for name in ("tasks", "rows", "tokens", "hidden", "layers", "rank", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.peft < 0:
        parser.error(f"--peft: expected 0 or more, got {options.peft}")
    torch.set_num_threads(options.threads)
    facts = machine(torch.device("cpu"))
    folder = results_folder(options, facts["name"])
    found, size = ways(options)
    ids = torch.randint(0, 2048, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0))
    check(found, ids)
    seconds = measure(found, ids, options.rounds)
    one = {name: seconds[f"{LORA}, one adapter" if name.startswith(LORA) else "LoTR, one adapter"] for name in found}
    shape = {k: v for k, v in vars(options).items() if k != "results"}
    results = {"shape": shape, "machine": facts, "bytes_a_task": size, "ways": {}}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, one[name], strict=True)]
        results["ways"][name] = {"seconds": statistics.median(own), "over_one": statistics.median(ratios)}
    results["most_over_one_task"] = {
        label: statistics.median(a / b for a, b in zip(own[max(own)], own[1], strict=True))
        for label, own in by_kinds(seconds).items()
    }
    show(results)
    path = write_whole(folder / f"many-tasks-{options.tokens}-tokens.json", json.dumps(results, indent=1) + "\n")
    from bench.pictures.tasks import draw_tasks  # needs matplotlib

    draw_tasks(results, folder)
    print(f"results in {path} and .png")


if __name__ == "__main__":
    end(main, "many_tasks")
