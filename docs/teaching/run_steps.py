"""Builds the five kernels of docs/teaching/shrink.md, runs them, and prints their table."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from csrc.simt import build  # noqa: E402


def table(mode: str = "plain") -> str:
    """Returns the table that the program prints.

    Args:
        mode: The build of the executor: "plain", "race" or "asan".

    Raises:
        CalledProcessError: If a step computes a wrong value, or the executor finds an error.
    """
    program = build.program(mode, HERE / "shrink_steps.cpp")
    return subprocess.run(
        [program], check=True, stdout=subprocess.PIPE, text=True, env=build.environment(mode)
    ).stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/teaching/run_steps.py", description=__doc__)
    parser.add_argument(
        "--mode", default="plain", choices=("plain", "race", "asan"), help="the executor's build"
    )
    print(table(parser.parse_args(argv).mode), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
