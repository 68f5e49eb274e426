"""One training run: a task, a method at one rank, a learning rate, a seed."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from . import sweep
from .methods import BASE, HEAD_LR, METHODS, adapt
from .packing import packed
from .problems import Problem, Setting, example
from .tasks import TASKS, problem_of

LOOKED_AT = 8  # batches, by a start from the gradient
POINTS = 10  # of a run's curve


class Run(NamedTuple):
    """What a run is known by. scaling: of the sweep; "": the method's own."""

    task: str
    method: str
    rank: int
    lr: float
    seed: int
    scaling: str = ""

    def name(self) -> str:
        rank = f", r = {self.rank}" if self.rank else ""
        scaling = f", {self.scaling}" if self.scaling else ""
        return f"{self.task}: {METHODS[self.method].label}{rank}{scaling}, rate {self.lr:g}, seed {self.seed}"


def optimizer_for(model: nn.Module, run: Run, problem: Problem) -> torch.optim.Optimizer:
    """AdamW without weight decay: a new head has its own rate, everything else the run's. In the sweep cores and factors have
    what the scaling says."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if problem.head and "head." in name]
    rest = [p for name, p in trained.items() if not (problem.head and "head." in name)]
    head_lr = run.lr if METHODS[run.method].family == "head" else HEAD_LR
    groups = [{"params": head, "lr": head_lr}, {"params": rest, "lr": run.lr}]
    if run.scaling:
        groups = sweep.groups(model, run.scaling, run.lr, head_lr)
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def start_from_gradient(model: nn.Module, problem: Problem, batches: Any, steps: int) -> int:
    """A and B from the gradients of a few batches, after a tenth of the steps for a new head; returns these steps."""
    from lotr_ext import init_from_gradient

    if problem.head:
        return example("text_model").start_from_gradient(model, batches, HEAD_LR, steps // 10, LOOKED_AT)
    init_from_gradient(model, [batches.next() for _ in range(LOOKED_AT)], problem.loss, progress=False)
    return 0


def fit(model: nn.Module, run: Run, problem: Problem, setting: Setting) -> list[float]:
    """Trains the model. Returns the losses by step, the last of which is not finite if the run diverged."""
    if run.method == BASE:
        return []
    parent, batches, steps = os.getppid(), problem.batches(run.seed, setting.batch), setting.steps
    if METHODS[run.method].from_gradient:
        steps -= start_from_gradient(model, problem, batches, steps)
    optimizer, scaling = optimizer_for(model, run, problem), sweep.SCALINGS.get(run.scaling)
    warm = round((scaling.warm if scaling else sweep.WARM) * steps)
    schedule = example("text_model").linear_decay(optimizer, steps, max(1, warm))
    losses: list[float] = []
    for _ in range(steps):
        loss = problem.loss(model, batches.next())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scaling and scaling.retract:
            sweep.retract(model)
        schedule()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if os.getppid() != parent:  # the parent was ended from outside, so this run's result would be lost
            sys.exit(1)
    return losses


def curve(losses: list[float]) -> list[float]:
    """The mean training losses of POINTS parts of a run, or fewer of a short one."""
    size = max(1, -(-len(losses) // POINTS))
    return [round(statistics.fmean(losses[i : i + size]), 5) for i in range(0, len(losses), size)]


def numbers(model: nn.Module, problem: Problem) -> int:
    """What is trained, without a new head."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not (problem.head and "head." in n))


def train(run: Run, setting: Setting) -> dict[str, Any]:
    """Trains and measures with one thread.

    Returns: the trained numbers, the mean validation loss that chooses rates, the mean held-out loss, that of each held-out
    item (`packed`), the held-out accuracy, the curve, wall seconds. A diverged run, also one with a loss that half precision
    cannot hold, has None for these.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    task, problem = TASKS[run.task], problem_of(run.task, setting)
    torch.manual_seed(run.seed)
    model = problem.model(run.seed)
    model = adapt(model, task, run.method, run.rank)
    if run.scaling:
        sweep.scale(model, run.scaling)
    found: dict[str, Any] = {"parameters": numbers(model, problem)}
    losses = fit(model, run, problem, setting)
    found["curve"] = curve([loss for loss in losses if math.isfinite(loss)])
    found |= dict.fromkeys(("validation", "loss", "losses", "accuracy"))
    model.eval()
    if not losses or math.isfinite(losses[-1]):
        validation = problem.measure(model, "validation")[0]
        held_out, accuracy = problem.measure(model, "held_out")
        if torch.isfinite(validation).all() and torch.isfinite(held_out.half()).all():  # as it is kept
            found |= {"validation": validation.mean().item(), "loss": held_out.mean().item()}
            found |= {"losses": packed(held_out), "accuracy": accuracy}
    return found | {"seconds": time.perf_counter() - start}
