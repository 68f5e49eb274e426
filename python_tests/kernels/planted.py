"""A sweep over kernels with a bug planted into a copy of their source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_planted(
    unit: str, file: str, text: str, instead: str, message: str, sweep: list[str], folder: Path, mode: str = "plain"
) -> tuple[int, list[str], str]:
    """Status of the sweep, a script here and its arguments, the lines of its output that match message, and all of it.

    The other arguments are build.planted_module's."""
    from csrc.simt import build

    module = build.planted_module(mode, unit, file, text, instead, folder)
    script = [sys.executable, str(HERE / sweep[0]), "--module", str(module), *sweep[1:]]
    done = subprocess.run(script, capture_output=True, text=True, env=build.python_environment(mode), timeout=900)
    output = done.stdout + done.stderr
    return done.returncode, [line for line in output.splitlines() if re.search(message, line)], output
