"""A thousand tasks over one pretrained model: each row of a batch uses its task, in one forward.

    python examples/data.py minilm snippets
    python examples/many_tasks.py                     about two minutes on two cores

Four tasks of MiniLM are trained together, with rows of all tasks in each batch. Each tells whether
a text is positive: a movie review, a tweet, a product review or a sentence of an editorial. Then
forwards of 64 rows are timed, with 1 to 64 of 1,000 tasks and without an adapter. A task has a core
for each of 36 linear layers. Writes demo_results/many_tasks.png.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from common import (
    RESULTS,
    Batch,
    TokenRows,
    accuracy,
    batches,
    draw,
    minilm_classifier,
    parse_options,
    progress_bar,
    rated_texts,
    text_loss,
    tokenized,
    train,
)
from data import SNIPPETS
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, disabled, use_tasks

ROWS_PER_TASK = 8  # in a training batch
TIMED_ROWS = 64
NO_ADAPTER = 0  # in place of a number of tasks
TIMED_TASKS = (NO_ADAPTER, 1, 2, 4, 8, 16, 32, 64)  # different tasks in a timed batch


def forward_of_task(ids: TokenRows, model: nn.Module, task: int) -> Tensor:
    """Runs the model with one task for all rows."""
    with use_tasks(model, torch.full((len(ids),), task)):
        return model(ids)


def train_tasks(
    model: nn.Module,
    bank: TaskBank,
    tokenize: Callable[[list[str]], TokenRows],
    steps: int,
    held_out: int,
) -> dict[str, Batch]:
    """Trains a task for each collection of texts, with rows of all tasks in each batch.

    Returns:
        The held-out texts of each task, in the order of the tasks in the bank.
    """
    tasks = [bank.add() for _ in SNIPPETS]
    streams = []
    held_out_data = {}
    for file in SNIPPETS:
        training_examples, held_out_examples = rated_texts(file, held_out)
        streams.append(batches(tokenized(training_examples, tokenize), ROWS_PER_TASK))
        held_out_data[file.split(".")[0]] = tokenized(held_out_examples, tokenize)
    index = torch.tensor(tasks).repeat_interleave(ROWS_PER_TASK)

    def mixed_loss() -> Tensor:
        parts = [next(stream) for stream in streams]
        ids = [row for part in parts for row in part.ids]
        labels = torch.cat([part.labels for part in parts])
        with use_tasks(model, index):
            return text_loss(model, Batch(ids, labels))

    trained = [*bank.parameters(), *model.lotr_factors.parameters(), *model.head.parameters()]
    train("four tasks", steps, torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0), mixed_loss)
    return held_out_data


def print_accuracies(model: nn.Module, held_out_data: dict[str, Batch]) -> None:
    """Prints a row per collection of held-out texts, with a column per task."""
    print(f"{'held-out accuracy with the cores of':36}", *(f"{name:>18}" for name in held_out_data))
    for name, data in held_out_data.items():
        shares = [
            accuracy(partial(forward_of_task, model=model, task=task), data)
            for task in range(len(held_out_data))
        ]
        print(f"{name:36}", *(f"{100 * share:16.1f} %" for share in shares))


@torch.no_grad()
def time_forwards(model: nn.Module, most_tasks: int, rounds: int) -> dict[int, float]:
    """Times forwards of 64 rows of 16 tokens. Each round runs each of them once.

    Returns:
        Median milliseconds by the number of tasks in the batch, and for NO_ADAPTER.
    """
    ids = torch.randint(1000, 20000, (TIMED_ROWS, 16)).tolist()
    milliseconds: dict[int, list[float]] = {
        count: [] for count in TIMED_TASKS if count <= most_tasks
    }
    rows = torch.arange(TIMED_ROWS)
    for _ in progress_bar("timing", rounds):
        for count, values in milliseconds.items():
            start = time.perf_counter()
            with disabled(model) if count == NO_ADAPTER else use_tasks(model, rows % count):
                model(ids)
            values.append(1000 * (time.perf_counter() - start))
    return {count: statistics.median(values) for count, values in milliseconds.items()}


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, tasks=1000, rank=16, steps=80, held_out=300, rounds=15)
    model, tokenize = minilm_classifier()
    apply_lotr(
        model,
        LoTRConfig(rank=options.rank, exclude_modules=["pooler.dense"], modules_to_save=["head"]),
    )
    bank = TaskBank(model, options.tasks).requires_grad_()
    held_out_data = train_tasks(model, bank, tokenize, options.steps, options.held_out)
    print_accuracies(model, held_out_data)
    while len(bank) < options.tasks:  # copies of the trained tasks fill the other slots
        bank.add(bank.cores_of(len(bank) % len(SNIPPETS)))
    size = sum(core[0].numel() * core.element_size() for core in bank.cores)
    shared = sum(p.numel() * p.element_size() for p in model.lotr_factors.parameters())
    print(
        f"{options.tasks:,} tasks of {size / 1024:.0f} KiB each, "
        f"over shared factors of {shared / 1024:.0f} KiB"
    )

    milliseconds = time_forwards(model, options.tasks, options.rounds)
    base = milliseconds.pop(NO_ADAPTER)
    ratios = {count: value / base for count, value in milliseconds.items()}
    print(
        f"time of a forward: {base:.1f} ms without an adapter; with different tasks in the batch:"
    )
    for count, ratio in ratios.items():
        print(f"{count:4} tasks {milliseconds[count]:8.1f} ms {ratio:6.2f} x")
    draw(
        RESULTS / "many_tasks.png",
        {"one task per row": ratios, "no adapter": dict.fromkeys(ratios, 1.0)},
        xscale="log",
        xlabel=f"different tasks in a batch of {TIMED_ROWS} rows",
        ylabel="time over the model without an adapter",
        ylim=0,
    )


if __name__ == "__main__":
    main()
