"""python -m bench.frontier (make frontier): accuracy against trained parameters on the demo's task."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from ..measure.names import chosen
from ..measure.session import start
from ..measure.store import RESULTS, ROOT, Store, build_id
from ..measure.terminal import bar
from ..measure.timing import machine, slug
from .table import BATCH, FILE, SEEDS, STEPS, chosen_rate, of_setting, points, rates, terminal_table
from .training import MODEL, TEXTS, Run, load_texts, train
from .ways import WAYS

QUICK_STEPS = 30
ABOUT = """Accuracy against trained parameters on the demo's task: LoTR, its relatives, LoRA, VeRA and the head alone. Every way
and rank is tried at three learning rates with the first seed; the one that is best on validation texts is run with the other
seeds. Each finished run is kept, and the same command goes on from there."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.frontier", description=ABOUT)
    parser.add_argument("--quick", action="store_true", help="few ways, ranks and steps, one seed and rate: two minutes")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)} (all)")
    parser.add_argument("--seeds", type=int, help=f"how many ({SEEDS})")
    parser.add_argument("--steps", type=int, help=f"of a run ({STEPS})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"texts a step ({BATCH})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each (one a core)")
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face encoder's folder (MiniLM)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="lines of a rating and a text (the movie snippets)")
    parser.add_argument("--results", type=Path, help="folder (bench/results/<machine>; with --quick demo_results/frontier)")
    options = parser.parse_args(argv)
    options.ways = chosen("ways", options.ways, WAYS)
    options.seeds = options.seeds if options.seeds is not None else 1 if options.quick else SEEDS
    options.steps = options.steps if options.steps is not None else QUICK_STEPS if options.quick else STEPS
    for name in ("seeds", "steps", "batch", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    return options


def passes(options: argparse.Namespace, store: Store) -> Iterator[list[Run]]:
    """Lists of runs that may go side by side. One list comes after another, so that what an unfinished command has kept is fair
    to all: every way and rank at its own learning rate, at each other one, then with each further seed at the best of them."""
    setting = (options.steps, options.batch, options.model.resolve().name)
    ranks = {name: WAYS[name].quick if options.quick else WAYS[name].ranks for name in options.ways}
    places = [(name, rank) for name, own in ranks.items() for rank in own]
    tries = zip(*(rates(WAYS[name]) for name, _ in places))
    for tried in list(tries)[: 1 if options.quick else None]:
        yield [Run(*place, lr, 0, *setting) for place, lr in zip(places, tried)]
    for seed in range(1, options.seeds):
        cells = of_setting(store.read(), setting)
        yield [Run(*place, chosen_rate(cells, *place), seed, *setting) for place in places]


def todo(runs: list[Run], store: Store) -> list[Run]:
    """Those that are not kept yet."""
    kept = {tuple(cell["case"].values()) for cell in store.read()}
    return [run for run in runs if tuple(run) not in kept]


def make_runs(options: argparse.Namespace, store: Store, facts: dict[str, str]) -> None:
    """Makes what is not kept yet. This process alone appends to the store, a run as soon as it is finished."""
    shared, seconds = {"machine": facts, "build": build_id()}, []
    total = sum(len(todo(runs, store)) for runs in passes(options, store))
    workers = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        with bar(total) as begin:
            begin("accuracy against trained parameters")
            for runs in passes(options, store):
                waiting = {workers.submit(train, run, options.model, options.texts): run for run in todo(runs, store)}
                for future in as_completed(waiting):
                    run, found = waiting[future], future.result()
                    about = {"case": run._asdict(), "rival": run.way, "label": WAYS[run.way].label}
                    store.append(about | shared | found | {"when": time.time(), "load": os.getloadavg()[0]})
                    seconds.append(found["seconds"])
                    minutes = (total - len(seconds)) * statistics.fmean(seconds) / options.jobs / 60
                    begin(f"about {minutes:.0f} minutes left")
                    line = (
                        f"[{len(seconds)}/{total}] {run.name()}: {found['accuracy']:.1%} with {found['parameters']:,} numbers"
                    )
                    print(f"{line} in {found['seconds']:.0f} s; about {minutes:.0f} minutes left", flush=True)
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # the runs inherit them
    facts = machine(torch.device("cpu"))
    usual = ROOT / "demo_results" / "frontier" if options.quick else RESULTS / slug(facts["name"])
    folder = options.results or usual
    store = Store(folder / FILE).prepare()
    load_texts(options.model, options.texts)  # what is wrong with them is said once, before any run
    make_runs(options, store, facts)
    cells = of_setting(store.read())
    print(terminal_table(points(cells), cells))
    from ..report.plots_frontier import draw_frontier

    for path in draw_frontier(cells, folder):
        print(f"picture in {path}")
    print(f"results in {store.path}")
    return 0


if __name__ == "__main__":
    start("bench.frontier", main)
