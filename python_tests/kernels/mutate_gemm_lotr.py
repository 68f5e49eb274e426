"""mutate_kernels.py for gemm_lotr: leaves out, one at a time, every barrier, wait, arrival, commit, fence, release and acquire
of csrc/cuda/kernels/gemm_lotr*.cuh, and reports what noticed. Exit status 1: something survived.

What the helpers `wait`, `arrive` and `release` of the file do counts for the line that calls them. The plain build is tried
first, with one block at a time and with several, then the race detector.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

SCHEDULES = {"plain": ["forward/1", "reverse/2", "2/3", "3/2", "5/4"], "race": ["2/3", "3/2", "4/4"]}


def find_sites(lib) -> list[tuple[str, str, int]]:
    """(operation, file, line) of each place that the cases reach."""
    import gemm_lotr_cases as gemm

    lib.reset_counters()
    for case in gemm.SMALL:
        lib.set_options(**gemm.schedule("2/2"))
        gemm.run(lib, case, 1)
    sites = [(op, Path(file).name, line) for op, file, line, calls in lib.synchronisation_sites() if calls]
    return sorted((site for site in sites if site[1].startswith("gemm_lotr")), key=lambda site: site[1:])


def worker(mode: str, todo: list[list]) -> None:
    """Prints a JSON line for each site: its number and what noticed, or null."""
    import gemm_lotr_cases as gemm
    from sweep_gemm_lotr import failures

    from csrc.simt import build

    lib = build.load(mode)
    for number, file, line, _ in todo:
        print(json.dumps(["start", number]), flush=True)
        lib.skip_synchronisation(f"/{file}", line)
        found = failures(lib, gemm.SMALL, SCHEDULES[mode], first=True)
        print(json.dumps(["done", number, found[0] if found else None]), flush=True)


def main() -> int:
    """Entry point; 1 if a mutation survives."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.load(sys.stdin))
        return 0

    from mutate_kernels import try_sites

    from csrc.simt import build

    sites = find_sites(build.load("plain"))
    verdicts: dict[int, tuple[str, str]] = {}
    for mode in SCHEDULES:
        todo = [[n, file, line, []] for n, (_, file, line) in enumerate(sites) if n not in verdicts]
        if todo:
            build.module(mode)
        verdicts |= {n: (mode, text) for n, text in try_sites(mode, todo, script=__file__).items() if text}
    print(f"{'operation':<28}{'place':<28}{'build':<8}noticed by")
    for n, (op, file, line) in enumerate(sites):
        mode, text = verdicts.get(n, ("-", "NOTHING"))
        print(f"{op:<28}{f'{file}:{line}':<28}{mode:<8}{text[:140]}")
    survivors = len(sites) - len(verdicts)
    print(f"{len(sites)} of {len(sites)} places left out, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
