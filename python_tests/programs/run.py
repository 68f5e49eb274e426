"""Runs random programs on lotr_ext and on plain torch and compares them.

python python_tests/programs/run.py --programs 20000 --processes 2 --seed 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from programs import running  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", type=int, default=3, help="how many different faults to shrink")
    parser.add_argument("--scripts", type=Path, default=Path("build/programs"), help="where the scripts of faults go")
    args = parser.parse_args()
    start, done, faults = time.time(), 0, []
    jobs = running.batches(args.programs, args.seed)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for result in pool.imap_unordered(running.run_batch, jobs):
            done += result.programs
            faults += result.faults
            width = 40 * done // args.programs
            bar = "#" * width + "." * (40 - width)
            print(
                f"\r[{bar}] {done}/{args.programs} programs, {len(faults)} wrong, {time.time() - start:.0f} s",
                end="",
                file=sys.stderr,
            )
    print(file=sys.stderr)
    kinds = Counter(found.fault.kind for found in faults)
    for kind, count in kinds.most_common():
        print(f"{count:6d}  {kind}")
    args.scripts.mkdir(parents=True, exist_ok=True)
    for i, kind in enumerate(list(kinds)[: args.shrink]):
        found = running.shrunk(min((f for f in faults if f.fault.kind == kind), key=lambda f: len(f.source)))
        path = args.scripts / f"fault{i}.py"
        path.write_text(found.script())
        print(f"\n==== {path}: {found.fault.text}\n{found.source}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
