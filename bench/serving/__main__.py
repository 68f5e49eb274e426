"""python -m bench.serving: measures the cost of adapters in a server, on this machine's CPU."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from ..measure.names import chosen
from ..measure.store import QUICK, RESULTS, ROOT, build_id, write_whole
from ..measure.terminal import bar
from ..measure.timing import machine, slug
from .table import FILE, LABELS, retention, terminal
from .work import Shape

MODEL = ROOT / "data" / "smollm2-135m"
ROUNDS = {"off": 3, "native": 3, "own": 2, "lora": 1, "peft": 1}  # the slow ways run once
IN_VLLM = ("off", "native", "lora")
ABOUT = """Throughput of a batch whose rows have adapters, over the same batch without (retention), prefill and decode apart:
vLLM with this package's plugin, vLLM with LoRA adapters of the same rank, lotr_ext's own `mixed`, PEFT's `adapter_names`. All
processes stay alive and take turns. Also the memory of a task, and the time in which a running engine takes a new version of a
task. About 7 minutes on two cores and 10 GB of memory."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=ABOUT)
    parser.add_argument("--ways", default=",".join(ROUNDS), help=f"some of {', '.join(ROUNDS)} (all)")
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="a causal model's folder (SmolLM2; make causal-lm downloads it)"
    )
    parser.add_argument("--vllm", type=Path, help="a Python with vLLM (.venv/vllm, by make serve-test; or LOTR_VLLM_PYTHON)")
    parser.add_argument("--tasks", default="1,8,64,1000", help="numbers of tasks in a batch (1,8,64,1000)")
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch (64)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (16)")
    parser.add_argument("--new", type=int, default=12, help="new tokens per row (12)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, help="of each way (3 of vLLM without and with the plugin, 2, and 1 of the slow)")
    parser.add_argument("--pushes", type=int, default=200, help="new versions into an engine that decodes (200)")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="seconds of the process, or that pass (cpu)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="folder (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="8 rows, one round, two minutes, results in demo_results/bench")
    options = parser.parse_args(argv)
    options.ways = chosen("ways", options.ways, ROUNDS)
    options.tasks = [int(n) for n in options.tasks.split(",")]
    if options.quick:
        options.tasks, options.rows, options.rounds, options.pushes = [1, 8, 100], 8, 1, 20
        options.results = options.results or QUICK
    for name in ("rows", "prompt", "new", "rank", "threads", "pushes"):
        if getattr(options, name) < (2 if name == "new" else 1):
            raise ValueError(f"{name}: expected at least {2 if name == 'new' else 1}, got {getattr(options, name)}")
    if min(options.tasks) < 1:
        raise ValueError(f"tasks: expected numbers from 1, got {min(options.tasks)}")
    options.vllm = options.vllm or Path(os.environ.get("LOTR_VLLM_PYTHON", ROOT / ".venv" / "vllm" / "bin" / "python"))
    return options


def check_there(options: argparse.Namespace) -> None:
    """Raises ValueError if the model or vLLM is missing."""
    if not (options.model / "config.json").exists():
        raise ValueError(f"model: expected a causal model's folder, got {options.model}; make causal-lm fetches SmolLM2")
    if {*options.ways} & {*IN_VLLM} and not options.vllm.exists():
        raise ValueError(f"vllm: expected a Python with vLLM, got {options.vllm}; make serve-test installs one in .venv/vllm")


class Process:
    """One process of `bench.serving.work`."""

    def __init__(self, way: str, shape: Shape, python: Path, log: Path):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LOTR_")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(shape.threads)}
        command = [str(python), "-m", "bench.serving.work", way, json.dumps(asdict(shape))]
        self.way, self.log = way, log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        self.facts = self._answer()

    def ask(self, **request: int) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.way}: expected an answer, got the end of the process: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def cases(way: str, options: argparse.Namespace) -> Iterable[int]:
    """The numbers of tasks for a way; 0: without adapters. More LoRA adapters than rows would take
    gigabytes."""
    if way == "off":
        return [0]
    most = options.rows if way in ("lora", "peft") else max(options.tasks)
    return [0] * (way in ("own", "peft")) + [n for n in options.tasks if n <= most]


def measure(options: argparse.Namespace, shape: Shape, folder: Path) -> dict:
    """{way: bytes per task, and a list of rounds for each number of tasks}."""
    rounds = {way: options.rounds or ROUNDS[way] for way in options.ways}
    work = [(turn, way, n) for turn in range(max(rounds.values())) for way in options.ways for n in cases(way, options)]
    work = [one for one in work if one[0] < rounds[one[1]]]
    pushing = [way for way in options.ways if way in ("native", "lora")]
    processes: dict[str, Process] = {}
    found: dict = {way: {"rounds": {}} for way in options.ways}
    try:
        with bar(len(options.ways) + len(work) + len(pushing)) as begin:
            for way in options.ways:
                begin(f"{LABELS[way]}: start")
                python = options.vllm if way in IN_VLLM else Path(sys.executable)
                processes[way] = Process(way, shape, python, folder / f"{way}.log")
                found[way] |= processes[way].facts
                processes[way].ask(tasks=max(cases(way, options)), turn=0)  # warm-up
            for turn, way, n in work:
                begin(f"round {turn + 1}: {LABELS[way]}, {n} tasks")
                found[way]["rounds"].setdefault(str(n), []).append(processes[way].ask(tasks=n, turn=turn))
            for way in pushing:
                begin(f"{LABELS[way]}: {options.pushes} versions while it decodes")
                found[way]["push"] = processes[way].ask(pushes=options.pushes)
    finally:
        for process in processes.values():
            process.end()
    return found


def same_texts(found: dict, n: int) -> float | None:
    """The share of rows for which vLLM with the plugin generated the same tokens as `mixed`."""
    if not all(str(n) in found.get(way, {}).get("rounds", {}) for way in ("native", "own")):
        return None
    ours, theirs = (found[way]["rounds"][str(n)][0]["tokens"] for way in ("native", "own"))
    return statistics.mean(a == b for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    check_there(options)
    began, load = time.monotonic(), os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        most = max(options.tasks)
        sizes = (options.rows, options.prompt, options.new, options.rank, most, options.threads)
        shape = Shape(str(options.model.resolve()), scratch, *sizes)
        found = measure(options, shape, Path(scratch))
    results = {
        "shape": {**asdict(shape), "model": options.model.name, "clock": options.clock} | {"counts": options.tasks},
        "machine": machine(torch.device("cpu")) | {"vllm": "0.32.0"},
        "build": build_id(),
        "load": max(load, os.getloadavg()[0]),
        "minutes": (time.monotonic() - began) / 60,
        "same_texts": same_texts(found, min(options.rows, most)),
        "retention": retention(found, shape, options.clock),
        "bytes_a_task": {way: own["bytes_a_task"] for way, own in found.items() if way != "off"},
        "push": {way: own["push"] for way, own in found.items() if "push" in own},
    }
    del results["shape"]["folder"]
    print(terminal(results))
    folder = options.results or RESULTS / slug(results["machine"]["name"])
    path = write_whole(folder / FILE, json.dumps(results, indent=1) + "\n")
    from .pictures import draw_serving  # needs matplotlib

    draw_serving(results, folder)
    print(f"kept in {path} and .png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"serving: {error}")
