"""One training run of the frontier: the demo's encoder, texts and split, one way at one rank, learning rate and seed."""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ..measure.store import ROOT
from .ways import HEAD_LR, WAYS

MODEL, TEXTS = ROOT / "data" / "all-minilm-l6-v2", ROOT / "data" / "movie_snippets.tsv"
HELD_OUT, VALIDATION = 1500, 500  # the demo's held-out texts, and those of its training texts that choose learning rates


class Run(NamedTuple):
    """What a run is known by. model: the name of its folder."""

    way: str
    rank: int
    lr: float | None
    seed: int
    steps: int
    batch: int
    model: str

    def name(self) -> str:
        rank = f", r = {self.rank}" if self.rank else ""
        return f"{WAYS[self.way].label}{rank}, learning rate {self.lr:g}, seed {self.seed}"


class Texts(NamedTuple):
    """Token ids and classes."""

    ids: list[list[int]]
    classes: list[int]


@functools.cache
def load_texts(model: Path, path: Path) -> tuple[Texts, Texts, Texts]:
    """(training, validation, held out), the same for every run."""
    from examples import text_model as tm

    _, tokenize = tm.load_encoder(model)
    examples, _ = tm.movie_snippets(path)
    rest, held_out = tm.split(examples, min(HELD_OUT, len(examples) // 6))
    training, validation = tm.split(rest, min(VALIDATION, len(rest) // 6))
    parts = (training, validation, held_out)
    return tuple(Texts(tokenize([text for text, _ in part]), [c for _, c in part]) for part in parts)


def train(run: Run, model: Path, path: Path) -> dict:
    """Trains and measures, in a process of its own: with one thread, and it ends when its parent does.

    Returns: the adapter's trained numbers (the head's are not counted), the accuracy on validation and on held-out texts, the
    mean loss of the last 20 steps (None where it is not finite: JSON has no NaN), wall seconds.
    """
    import torch
    import torch.nn.functional as F

    from examples import text_model as tm

    start, parent = time.perf_counter(), os.getppid()
    torch.set_num_threads(1)
    training, validation, held_out = load_texts(model, path)
    way = WAYS[run.way]
    encoder, _ = tm.load_encoder(model)
    classifier = tm.build(encoder, 2, run.seed)
    head = sum(p.numel() for p in classifier.head.parameters())
    adapted = way.adapt(classifier, run.rank)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad) - head
    recipe = tm.Recipe(way.label, run.lr, 0.0, head_lr=HEAD_LR if trained else run.lr)
    batches = tm.Batches(training.ids, training.classes, run.batch, run.seed)
    steps = run.steps
    if way.from_gradient:
        steps -= tm.start_from_gradient(adapted, batches, recipe.head_lr, steps // 10)
    optimizer, schedule = tm.optimizer_for(adapted, recipe, steps)
    losses = []
    for _ in range(steps):
        ids, target = batches.next()
        loss = F.cross_entropy(adapted(ids), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule()
        losses.append(loss.item())
        if os.getppid() != parent:  # the parent was ended from outside, so this run's result would be lost
            sys.exit(1)

    def accuracy(part: Texts) -> float:
        right = tm.predict(adapted, part.ids).argmax(1) == torch.tensor(part.classes)
        return right.double().mean().item()

    last = statistics.fmean(losses[-20:])
    return {
        "parameters": trained,
        "validation": accuracy(validation),
        "accuracy": accuracy(held_out),
        "loss": last if last < float("inf") else None,
        "seconds": time.perf_counter() - start,
    }
