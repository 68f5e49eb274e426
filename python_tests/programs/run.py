"""Runs random programs on lotr_ext and on plain torch, and compares all that they show.

    python python_tests/programs/run.py --programs 20000 --processes 2 --seed 0

The same seed gives the same programs. Faults are counted by kind; the first of each kind is shrunk, printed and written as a
script of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # this checkout's package, whichever is installed

from programs import running  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=400, help="how many (400)")
    parser.add_argument("--processes", type=int, default=1, help="at the same time (1)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--shrink", type=int, default=3, help="how many kinds of faults to shrink (3)")
    parser.add_argument("--scripts", type=Path, default=Path("build/programs"), help="where their scripts go (build/programs)")
    args = parser.parse_args()
    if min(args.programs, args.processes) < 1:
        parser.error(f"expected at least one program and process, got {args.programs} and {args.processes}")
    args.scripts.mkdir(parents=True, exist_ok=True)
    found = run_all(args.programs, args.processes, args.seed, args.scripts)
    kinds = Counter(one.fault.kind for one in found)
    for kind, count in kinds.most_common():
        print(f"{count:6d}  {kind}")
    for i, kind in enumerate(list(kinds)[: args.shrink]):
        print(f"shrinking: {kind}", file=sys.stderr)
        shortest = min((one for one in found if one.fault.kind == kind), key=lambda one: len(one.source))
        one = running.shrunk(shortest)
        path = args.scripts / f"fault{i}.py"
        path.write_text(one.script())
        print(f"\n==== {path}: {one.fault.text}\n{one.source}")
    print(f"{args.programs} programs, seed {args.seed}: {len(found) or 'none'} wrong")
    return 1 if found else 0


def run_all(count: int, processes: int, seed: int, scripts: Path) -> list[running.Found]:
    """All programs, with a progress bar."""
    start, done = time.time(), 0
    found: list[running.Found] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(running.run_batch, batch, scripts) for batch in running.batches(count, seed)]
        try:
            for job in as_completed(jobs):
                result = job.result()
                done, found = done + result.programs, found + result.faults
                bar = "#" * (40 * done // count)
                seconds = time.time() - start
                left = seconds / done * (count - done)
                text = f"\r[{bar:.<40}] {done}/{count} programs, {len(found)} wrong, {seconds:.0f} s, {left:.0f} s to go "
                print(text, end="", file=sys.stderr, flush=True)
        except BrokenProcessPool:
            raise SystemExit(f"\na process died; what each was running: {scripts}/running-*.py") from None
    print(file=sys.stderr)
    for path in scripts.glob("running-*.py"):
        path.unlink()
    return found


if __name__ == "__main__":
    sys.exit(main())
