"""python -m bench [--quick]: every measuring program that this machine can run (make bench).

Each runs in a process, so that one that fails does not stop the others. The pictures are drawn at
the end.
"""

import subprocess
import sys

import torch

PROGRAMS = ["layer", "model", "host", "experts", "tasks"]


def main(words: list[str]) -> int:
    programs = [*PROGRAMS, "kernels"] if torch.cuda.is_available() else PROGRAMS
    python = [sys.executable, "-m"]
    failed = [
        name for name in programs if subprocess.run([*python, f"bench.{name}", *words]).returncode
    ]
    folders = ["demo_results/bench"] if "--quick" in words else []
    subprocess.run([*python, "bench.plot", *folders])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
