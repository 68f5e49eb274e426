"""python -m bench [--quick] [--markdown]: every program that this machine can run, one after the other (make bench)."""

from __future__ import annotations

import subprocess
import sys

import torch

PROGRAMS = ("layer", "model", "host", "shared", "experts", "tasks")


def main(argv: list[str]) -> int:
    names = [*PROGRAMS, *(["kernels"] if torch.cuda.is_available() else [])]
    failed = []
    for name in names:
        print(f"\n---- bench.{name} ----", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *argv]).returncode:
            failed.append(name)
    if not failed and "--quick" not in argv:
        subprocess.run([sys.executable, "-m", "bench.plot"])
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall programs ran")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
