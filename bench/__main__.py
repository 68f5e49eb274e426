"""python -m bench [--quick] [--markdown]: every program that this machine can run, then the pictures (make bench)."""

import subprocess
import sys

import torch

PROGRAMS = [
    "layer",
    "model",
    "host",
    "shared",
    "experts",
    "tasks",
    *(["kernels"] if torch.cuda.is_available() else []),
]

if __name__ == "__main__":
    failed = [
        name
        for name in PROGRAMS
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *sys.argv[1:]]).returncode
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.plot",
            *(["demo_results/bench"] if "--quick" in sys.argv else []),
        ]
    )
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
