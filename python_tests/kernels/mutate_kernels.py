"""Leaves out, one at a time, every barrier, commit and wait of the mma kernels, and reports whether a test notices.

python python_tests/kernels/mutate_kernels.py            all of them (make test-full)
python python_tests/kernels/mutate_kernels.py --every 8  each eighth of them

The executor skips the operation at one source line of csrc/cuda/kernels or csrc/cuda/tile, so nothing is compiled again. The
plain build and the race detector take turns, at first on two shapes, then on all. A line that nothing notices is either not
needed or not tested: the exit status is 1. gemm_lotr's lines: test_gemm_lotr.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

SCHEDULES = {"plain": ["forward", "reverse", "1", "101"], "race": ["forward", "1"]}
FOLDERS = ("csrc/cuda/kernels/", "csrc/cuda/tile/")
Site = tuple[str, str, int]  # operation, file, line


def reached(lib: ModuleType) -> Iterator[Site]:
    """Where threads have synchronised since the counters were reset."""
    for op, file, line, calls in lib.synchronisation_sites():
        path = Path(file).resolve().as_posix()
        short = next((path[path.index(folder) :] for folder in FOLDERS if folder in path), None)
        if short and calls and not op.startswith("griddepcontrol"):  # their absence is an error of its own: test_executor.py
            yield op, short, line


def find_sites(lib: ModuleType) -> dict[Site, list[str]]:
    """Each place that the kernels reach, and the kernels that reach it."""
    from sweep import KERNELS, PIPELINE, failures, problems

    sites: dict[Site, list[str]] = {}
    for name in KERNELS:
        lib.reset_counters()
        assert not failures(lib, problems(PIPELINE, ["bf16"], [name]), ["forward"])
        for site in reached(lib):
            sites.setdefault(site, []).append(name)
    return sites


def worker(mode: str, todo: list[list], shapes: int) -> None:
    """Prints a JSON line for each site: its number and what noticed, or null. shapes: how many are tried."""
    from sweep import PIPELINE, failures, problems

    from csrc.simt import build

    lib = build.load(mode, build.module(mode, "bf16"))
    for number, file, line, kernels in todo:
        print(json.dumps(["start", number]), flush=True)
        lib.skip_synchronisation(file.removeprefix("csrc/cuda"), line)  # compilers spell the rest of the path differently
        found = failures(lib, problems(PIPELINE[:shapes], ["bf16"], kernels), SCHEDULES[mode], first=True)
        print(json.dumps(["done", number, found[0] if found else None]), flush=True)


def try_sites(mode: str, todo: list[list], shapes: int, timeout: float = 900) -> dict[int, str | None]:
    """What noticed each site in this build, by --worker in a process. One that dies has noticed; the next goes on after it."""
    verdicts: dict[int, str | None] = {}
    while todo:
        command = [sys.executable, __file__, "--worker", mode, "--shapes", str(shapes)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, **pipes)
        process.stdin.write(json.dumps(todo))
        process.stdin.close()
        running = None
        for text in process.stdout:
            message = json.loads(text) if text.startswith('["') else [None]
            if message[0] == "start":
                running = message[1]
            elif message[0] == "done":
                verdicts[message[1]], running = message[2], None
        status = process.wait(timeout=timeout)
        if running is None and status:
            raise RuntimeError(f"the {mode} worker failed before its first site, status {status}")
        if running is not None:
            verdicts[running] = f"the process died with status {status}"
        todo = [t for t in todo if t[0] not in verdicts]
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 1 if a mutation survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every Nth place (1: all)")
    parser.add_argument("--worker", choices=SCHEDULES, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker, json.load(sys.stdin), options.shapes)
        return 0

    from csrc.simt import build

    sites = sorted(find_sites(build.load("plain")).items(), key=lambda item: item[0][1:])
    chosen = list(enumerate(sites))[:: options.every]
    verdicts: dict[int, tuple[str, str]] = {}
    for mode, shapes in (("plain", 2), ("race", 2), ("plain", 100), ("race", 100)):
        todo = [[n, file, line, kernels] for n, ((_, file, line), kernels) in chosen if n not in verdicts]
        if todo:
            build.module(mode, "bf16")
        verdicts |= {n: (mode, text) for n, text in try_sites(mode, todo, shapes).items() if text}
    print(f"{'operation':<24}{'place':<40}{'build':<8}noticed by")
    for n, ((op, file, line), _) in chosen:
        mode, text = verdicts.get(n, ("-", "NOTHING"))
        print(f"{op:<24}{file.removeprefix('csrc/cuda/') + ':' + str(line):<40}{mode:<8}{text[:110]}")
    survivors = len(chosen) - len(verdicts)
    print(f"{len(chosen)} of {len(sites)} places left out, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
