"""A training step of many tasks at once: 1,000 tasks in a bank, 64 of them in a batch; its cost over one adapter.

    python -m bench.tasks                        16 tokens a row, 64 rows, 1,000 tasks, width 512, 4 blocks, r = 16
    python -m bench.tasks --shapes 64x64x1000x512x4x16 --threads 1

A shape is tokens per row x rows x tasks x width x blocks x rank. The model is a small Llama of random weights, whose q, k, v
and o are adapted; the cores are trained, A and B are frozen. All ways train the same model; each round draws the rows'
tasks again. They differ in the index for `mixed` (none, a task per row, a task per token) and in the optimizer: torch's AdamW
over the whole bank, which moves all tasks, or `bank.optimizer`, which moves those of the batch. Every task has been trained
before, so that it has a state. Times are medians over interleaved rounds; the excess is over one adapter in the same round.
Results go to bench/results/<machine>/tasks.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lotr_ext import mixed

from .measure.forms import stages as stages_against
from .measure.names import sizes
from .measure.session import ROUNDS, Session, Table, add_options, check_options, start
from .measure.shapes import DTYPES
from .measure.timing import Timed, interleave
from .pictures import draw_measured
from .rivals.tasks import (
    HEADS,
    LABELS,
    SHAPES,
    STAGES,
    WAYS,
    Way,
    index_of,
    optimizer_of,
    row_of,
    state_bytes,
    task_of_row,
    with_tasks,
)


class TasksCase(NamedTuple):
    """A batch of rows of tokens, each row of another task of a bank, over a model of width hidden."""

    tokens: int
    rows: int
    tasks: int
    hidden: int
    blocks: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        sizes = f"width {self.hidden}, {self.blocks} blocks r{self.r} {self.dtype} t{self.threads}"
        return f"{self.rows} rows of {self.tokens} tokens, {self.tasks} tasks, {sizes}"


class Batch:
    """The tasks of the rows, drawn by `deal` for each round, and the tokens."""

    def __init__(self, case: TasksCase, device: torch.device):
        self.case = case
        self.ids = torch.randint(0, 2048, (case.rows, case.tokens), generator=torch.Generator().manual_seed(0)).to(device)
        self.deal(random.Random(0))

    def deal(self, draw: random.Random) -> None:
        self.tasks = task_of_row(self.case.rows, min(self.case.rows, self.case.tasks), self.case.tasks, draw.getrandbits(32))


def stages(way: Way, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Timed:
    """The three parts of a training step."""

    def forward(_: object) -> Tensor:
        index = None if way.index is None else index_of(way, batch.tasks, batch.case.tokens)
        with contextlib.nullcontext() if index is None else mixed(model, index):
            return model(input_ids=batch.ids, use_cache=False).logits.square().mean()

    return Timed((forward, lambda loss: loss.backward(), lambda _: optimizer.step()), optimizer.zero_grad)


def check(way: Way, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Raises ArithmeticError unless a step changes the right parameters: one adapter, all tasks, or those of the batch."""
    bank, timed = model.lotr_tasks, stages(way, model, optimizer, batch)
    before = [core.detach().clone() for core in bank.cores]
    timed.prepare()
    timed.run()
    moved = torch.stack([(core != old).flatten(1).any(1) for core, old in zip(bank.cores, before)]).any(0)
    want = torch.zeros_like(moved)
    if way.index is not None:
        want[batch.tasks] = True
    if not torch.equal(moved, want) and not (way.index and not way.per_task and bool((moved | ~want).all())):
        raise ArithmeticError(f"{way.label}: expected a step to move {int(want.sum())} tasks, got {int(moved.sum())}")


def measure(case: TasksCase, session: Session) -> list[dict]:
    """One result per way."""
    batch, results, calls = Batch(case, session.device), [], []
    for name, way in WAYS.items():
        model, bank = with_tasks(case.hidden, case.blocks, case.r, case.tasks)
        model = model.to(session.device, DTYPES[case.dtype])
        optimizer = optimizer_of(way, model, bank)
        check(way, model, optimizer, batch)
        results.append({"rival": name, "label": LABELS[name], "state_bytes": state_bytes(optimizer)})
        calls.append(stages(way, model, optimizer, batch))
    times = interleave(calls, session.clock, session.options.rounds, 0.0, deal=batch.deal)
    for result, own in zip(results, times):
        result |= stages_against(own, times[0], (*STAGES, "step"))
    return results


def show(case: TasksCase, results: list[dict], session: Session) -> None:
    table = Table(case.name(), *HEADS)
    for result in results:
        table.add_row(*row_of(result))
    print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="fp32")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--shapes", help=f"comma-separated TOKENSxROWSxTASKSxWIDTHxBLOCKSxRANK ({SHAPES['cpu']})")
    options = parser.parse_args(argv)
    check_options(options, rounds=3 if options.quick else ROUNDS["tasks"], dtypes="fp32")
    text = SHAPES[options.device] if options.shapes is None else options.shapes
    options.shapes = sizes("shapes", text, "TOKENSxROWSxTASKSxWIDTHxBLOCKSxRANK")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "tasks.jsonl")
    session.introduce()
    cases = [TasksCase(*shape, d, t) for t in options.threads for d in options.dtypes for shape in options.shapes]
    session.run(cases, lambda case: LABELS, lambda case: measure(case, session), show)
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.tasks", main)
