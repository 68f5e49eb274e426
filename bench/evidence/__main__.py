"""python -m bench.evidence (make frontier): held-out loss against trained parameters, LoTR beside LoRA and full fine-tuning."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ..measure.names import chosen, numbers
from ..measure.session import start
from ..measure.store import ROOT, Store, build_id, commit
from ..measure.terminal import bar
from ..measure.timing import machine
from . import sweep
from .digest import FOLDER, digests, file_of, kept, swept
from .intervals import too_few
from .methods import METHODS, check, measured
from .plan import SEEDS, Place, Search, index_of, rung
from .problems import Setting
from .table import advice_table, sweep_table, terminal_table
from .tasks import TASKS, Task
from .training import Run, train

QUICK_SEEDS = 2
ABOUT = """Held-out loss against trained parameters, and the share of full fine-tuning's gain: LoTR, its relatives, LoRA, DoRA,
VeRA and full fine-tuning on ten tasks. Every method has the same search for its learning rate, on validation items and with the
first seed, and is run with the other seeds at the best one. Each finished run is kept, and the same command goes on from there.
One cell again: --task minilm-movies --method lotr --rank 8 --seed 3 --results another_folder."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.evidence", description=ABOUT)
    options.add_argument("--task", help=f"some of {', '.join(TASKS)} (all)")
    options.add_argument("--method", help=f"some of {', '.join(METHODS)} (all that suit the task)")
    options.add_argument("--rank", help="some ranks, comma-separated (the method's own)")
    options.add_argument("--seeds", type=int, help=f"how many, from 0 on ({SEEDS})")
    options.add_argument("--seed", type=int, help="use only this seed; the learning rate is still searched with seed 0")
    options.add_argument("--lr", type=float, help="use only this learning rate, without a search")
    options.add_argument("--steps", type=int, help="steps of a run (default: the task's)")
    options.add_argument("--batch", type=int, help="items per step (default: the task's)")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each (one per core)")
    options.add_argument("--sweep", action="store_true", help="learning rates x ranks x scalings of LoTR, instead of methods")
    options.add_argument("--scaling", help=f"of the sweep, some of {', '.join(sweep.SCALINGS)} (all)")
    options.add_argument(
        "--quick", action="store_true", help="few methods, steps and items, two seeds, no search: three minutes"
    )
    options.add_argument("--results", type=Path, help="folder (bench/results/evidence; with --quick demo_results/evidence)")
    return options


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser().parse_args(argv)
    options.chosen = [TASKS[name] for name in chosen("task", options.task, TASKS)]
    options.methods = chosen("method", options.method, METHODS, [])
    options.ranks = numbers("rank", options.rank, [])
    options.scalings = chosen("scaling", options.scaling, sweep.SCALINGS)
    if options.scaling is not None and not options.sweep:
        raise ValueError(f"scaling: expected --sweep beside it, got {options.scaling!r} without")
    for name in ("seeds", "steps", "batch", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if options.lr is not None and not 0 < options.lr < float("inf"):
        raise ValueError(f"lr: expected a positive number, got {options.lr}")
    if options.seed is not None and (options.seed < 0 or options.seeds is not None):
        raise ValueError(f"seed: expected a number of at least 0, and no --seeds beside it, got {options.seed}")
    usual = 1 if options.sweep else QUICK_SEEDS if options.quick else SEEDS
    count = options.seeds if options.seeds is not None else usual
    options.run_seeds = list(range(count)) if options.seed is None else [options.seed]
    options.folder = options.results or (ROOT / "demo_results" / "evidence" if options.quick else FOLDER)
    for task in options.chosen:
        for name in options.methods:
            check(name, task)
    return options


def setting_of(task: Task, options: argparse.Namespace) -> Setting:
    own = task.quick if options.quick else task.setting
    return own._replace(**{name: getattr(options, name) for name in ("steps", "batch") if getattr(options, name) is not None})


def places_of(task: Task, options: argparse.Namespace) -> list[Place]:
    """The methods and ranks that the options name, those of the task where they name none."""
    if options.quick and not options.methods:
        suited = {name for name, _ in measured(task)}
        own = [(name, m.quick) for name, m in METHODS.items() if m.quick is not None and name in suited]
    else:
        own = measured(task)
    if options.methods:
        own = [(name, rank) for name in options.methods for rank in METHODS[name].ranks[task.kind]]
        ranked = [name for name in options.methods if METHODS[name].family in ("lotr", "peft")]
        own += [(name, rank) for name in ranked for rank in options.ranks]
    if options.ranks:
        own = [place for place in own if place[1] in (0, *options.ranks)]
    found = list(dict.fromkeys(own))
    if missing := [name for name in options.methods if name not in {place[0] for place in found}]:
        raise ValueError(
            f"rank: expected --rank beside the method {missing[0]!r}, which {task.name} has no ranks for, got none"
        )
    return found


def rates_around(method: str, task: Task) -> list[float]:
    middle = index_of(METHODS[method].begins_at(task.kind))
    return [rung(middle + step) for step in sweep.AROUND]


class Sweep:
    """The runs of a sweep, in passes that are fair to all: every rank, scaling and method with one seed before the next."""

    def __init__(self, task: Task, options: argparse.Namespace):
        methods = options.methods or [name for name in sweep.METHODS if METHODS[name].ranks[task.kind]]
        ranks = options.ranks or [rank for rank in sweep.RANKS if rank <= task.most]
        if foreign := [name for name in methods if METHODS[name].family != "lotr" or name == "lora-xs"]:
            raise ValueError(f"method: expected kinds of LoTR for a sweep, got {foreign[0]!r}")
        self.passes = [
            [
                Run(task.name, method, rank, lr, seed, scaling)
                for method in methods
                for scaling in options.scalings
                for rank in ranks
                for lr in ([options.lr] if options.lr is not None else rates_around(method, task))
            ]
            for seed in options.run_seeds
        ]

    def next_runs(self, cells: list[dict]) -> list[Run]:
        known = {tuple(cell["case"].values()) for cell in cells}
        return next((left for runs in self.passes if (left := [run for run in runs if tuple(run) not in known])), [])

    def estimate(self, cells: list[dict]) -> int:
        known = {tuple(cell["case"].values()) for cell in cells}
        return sum(tuple(run) not in known for runs in self.passes for run in runs)


def definition_of(method: str, task: Task, swept: bool) -> dict[str, Any]:
    """What a kept run must have been made with. A sweep's scalings are part of its cases."""
    found = METHODS[method].definition(task)
    return {name: value for name, value in found.items() if not (swept and name == "scaling")}


def check_kept(cells: list[dict], task: Task, setting: Setting, path: Path, swept: bool = False) -> None:
    """Refuses to mix runs of different settings in one file.

    Raises:
        ValueError: which setting it is, what the file has and what was given.
    """
    for cell in cells:
        method = cell["case"]["method"]
        for name, value in (setting._asdict() | definition_of(method, task, swept)).items():
            of = f"{name} of {method}" if name not in Setting._fields else name
            held = (cell["setting"] | cell["definition"]).get(name)
            if held != value:
                raise ValueError(
                    f"{of}: expected {held!r}, with which {path} was begun, got {value!r}; go on with that, or give another "
                    "folder with --results"
                )


Finished = Iterator[tuple[Run, dict[str, Any]]]
Workers = Callable[[list[Run], Setting], Finished]


@contextlib.contextmanager
def workers_of(jobs: int) -> Iterator[Workers]:
    """What trains runs and yields each as soon as it is finished: so many processes, or this one."""
    if jobs == 1:
        yield lambda runs, setting: ((run, train(run, setting)) for run in runs)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def finished(runs: list[Run], setting: Setting) -> Finished:
        waiting = {pool.submit(train, run, setting): run for run in runs}
        return ((waiting[future], future.result()) for future in as_completed(waiting))

    try:
        yield finished
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def work(task: Task, options: argparse.Namespace, facts: dict[str, str], workers: Workers) -> None:
    """Makes what is not kept yet of one task. This process alone appends to the file, a run as soon as it is finished."""
    store = Store(options.folder / file_of(task.name, options.sweep)).prepare()
    setting, name = setting_of(task, options), task.name

    def cells() -> list[dict]:
        return kept(options.folder, name, options.sweep)

    check_kept(cells(), task, setting, store.path, options.sweep)
    plan = Sweep(task, options) if options.sweep else search(task, options)
    shared = {"setting": setting._asdict(), "machine": facts, "build": build_id(), "commit": commit()}
    done = 0
    with bar(plan.estimate(cells()) + 1) as begin:
        begin(f"{name}: {task.title}")
        while runs := plan.next_runs(cells()):
            left = plan.estimate(cells())
            for run, found in workers(runs, setting):
                about = {"case": run._asdict(), "rival": run.method, "label": METHODS[run.method].label}
                definition = {"definition": definition_of(run.method, task, options.sweep)}
                store.append(about | shared | definition | found | {"when": time.time(), "load": os.getloadavg()[0]})
                done, left = done + 1, max(0, left - 1)
                reached = "diverged" if found["loss"] is None else f"loss {found['loss']:.4f}"
                line = f"{run.name()}: {reached} with {found['parameters']:,} numbers in {found['seconds']:.0f} s"
                begin(line, total=done + left + 1)


def search(task: Task, options: argparse.Namespace) -> Search:
    return Search(task.name, places_of(task, options), options.run_seeds, options.lr, options.quick)


def report(options: argparse.Namespace) -> Iterator[str]:
    """What the folder has of the chosen tasks."""
    if options.sweep:
        for task in options.chosen:
            yield str(sweep_table(task.name, swept(options.folder, task)))
        return
    names = {task.name for task in options.chosen}
    found = [one for one in digests(options.folder) if one.task.name in names]
    for one in found:
        yield str(terminal_table(one))
    yield str(advice_table(found) or "")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # the runs inherit them
    for task in options.chosen:  # what is missing is said once, before any run
        task.check()
        places_of(task, options)
    if options.seed is None and (lacking := too_few(len(options.run_seeds))):
        print(lacking, file=sys.stderr)
    facts = machine(torch.device("cpu"))
    with workers_of(options.jobs) as workers:
        for task in options.chosen:
            work(task, options, facts, workers)
    for text in report(options):
        print(text)
    from .pictures import draw_evidence

    for path in draw_evidence(options.folder):
        print(f"picture in {path}")
    print(f"results in {options.folder}")
    return 0


if __name__ == "__main__":
    start("bench.evidence", main)
