"""python -m bench [--quick]: every measuring program that this machine can run (make bench).

Each program is a process, so that one that fails does not stop the others. At the end the pictures
are drawn.
"""

import subprocess
import sys

import torch

PROGRAMS = ["layer", "model", "host", "experts", "tasks"]


def main(words: list[str]) -> int:
    programs = [*PROGRAMS, "kernels"] if torch.cuda.is_available() else PROGRAMS
    failed = []
    for name in programs:
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *words]).returncode:
            failed.append(name)
    folders = ["demo_results/bench"] if "--quick" in words else []
    subprocess.run([sys.executable, "-m", "bench.plot", *folders])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
