"""A thousand tasks over one pretrained model: every row of a batch uses its own task, in one forward.

    python examples/data.py minilm snippets
    python examples/many_tasks.py                     about two minutes on two cores

Four tasks of MiniLM are trained together, each batch with rows of all: is a film review, a tweet, a product review, a sentence
of an editorial positive? Then batches of 64 rows with 1 to 64 of 1,000 tasks are timed beside the model without an adapter. A
task is one core for each of 36 linear layers. Writes demo_results/many_tasks.png.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from common import (
    RESULTS,
    arguments,
    bar,
    batches,
    minilm_classifier,
    predict,
    rated_texts,
    text_loss,
    train,
)
from data import SNIPPETS
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, disabled, use_tasks


def using(model: nn.Module, task: int) -> Callable[[list[list[int]]], torch.Tensor]:
    """The model's forward with one task for all rows."""

    def forward(ids: list[list[int]]) -> torch.Tensor:
        with use_tasks(model, torch.full((len(ids),), task)):
            return model(ids)

    return forward


def train_tasks(model: nn.Module, bank: TaskBank, tokenize, steps: int, held_out: int) -> None:
    """Trains a task for each collection of texts, all in the same batches, and prints their accuracies."""
    tasks = [bank.add() for _ in SNIPPETS]
    texts = [rated_texts(file, held_out) for file in SNIPPETS]
    data = [
        batches(tokenize([t for t, _ in own]), [c for _, c in own], 8, seed=0) for own, _ in texts
    ]
    index = torch.tensor(tasks).repeat_interleave(8)

    def loss() -> torch.Tensor:
        parts = [next(own) for own in data]
        with use_tasks(model, index):
            return text_loss(
                model,
                (
                    [row for ids, _ in parts for row in ids],
                    torch.cat([labels for _, labels in parts]),
                ),
            )

    trained = [*bank.parameters(), *model.lotr_factors.parameters(), *model.head.parameters()]
    train("four tasks", steps, torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0), loss)
    print(
        f"{'held-out accuracy with the cores of':36}",
        *(f"{file.split('.')[0]:>18}" for file in SNIPPETS),
    )
    for of, (_, rest) in zip(SNIPPETS, texts):
        ids, labels = tokenize([t for t, _ in rest]), torch.tensor([c for _, c in rest])
        right = [
            (predict(using(model, task), ids).argmax(1) == labels).double().mean().item()
            for task in tasks
        ]
        print(f"{of:36}", *(f"{100 * r:16.1f} %" for r in right))


@torch.no_grad()
def times(model: nn.Module, tasks: int, rounds: int) -> dict[int, float]:
    """{tasks in the batch, 0 for no adapter: median milliseconds of 64 rows of 16 tokens}; each round runs every way once."""
    ids = torch.randint(1000, 20000, (64, 16)).tolist()
    found: dict[int, list[float]] = {n: [] for n in (0, 1, 2, 4, 8, 16, 32, 64) if n <= tasks}
    for _ in bar("timing", rounds):
        for n, own in found.items():
            begun = time.perf_counter()
            with use_tasks(model, torch.arange(64) % n) if n else disabled(model):
                model(ids)
            own.append(1000 * (time.perf_counter() - begun))
    return {n: statistics.median(own) for n, own in found.items()}


def main(words: list[str] | None = None) -> None:
    options = arguments(__doc__, words, tasks=1000, rank=16, steps=80, held_out=300, rounds=15)
    model, tokenize = minilm_classifier()
    apply_lotr(
        model,
        LoTRConfig(rank=options.rank, exclude_modules=["pooler.dense"], modules_to_save=["head"]),
    )
    bank = TaskBank(model, options.tasks).requires_grad_()
    train_tasks(model, bank, tokenize, options.steps, options.held_out)
    while len(bank) < options.tasks:  # copies of the trained ones fill the other slots
        bank.add(bank.cores_of(len(bank) % len(SNIPPETS)))
    size = sum(core[0].numel() * core.element_size() for core in bank.cores)
    shared = sum(p.numel() * p.element_size() for p in model.lotr_factors.parameters())
    print(
        f"{options.tasks:,} tasks of {size / 1024:.0f} KiB each, over shared factors of {shared / 1024:.0f} KiB"
    )
    plain, *rest = times(model, options.tasks, options.rounds).items()
    for n, milliseconds in (plain, *rest):
        what = f"{n} task{'s' * (n > 1)} in the batch" if n else "no adapter"
        print(f"{what:24} {milliseconds:8.1f} ms {milliseconds / plain[1]:6.2f} x")

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(
        [n for n, _ in rest],
        [milliseconds / plain[1] for _, milliseconds in rest],
        "o-",
        label="a task a row",
    )
    axes.axhline(1, color="0.5", label="no adapter")
    axes.set(
        xscale="log",
        xlabel="different tasks in a batch of 64 rows",
        ylabel="time over the model alone",
        ylim=0,
    )
    axes.legend()
    figure.savefig(RESULTS / "many_tasks.png", dpi=120)


if __name__ == "__main__":
    main()
