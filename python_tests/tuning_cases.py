"""Of the tests of tune: layers, and processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear

TOKENS = 160


def layers() -> nn.Sequential:
    factors = LoTRFactors(24, 24, 3)
    return nn.Sequential(LoTRLinear(24, 24, factors=factors), LoTRLinear(24, 24, factors=factors), LoTRLinear(24, 40, 5))


def other_process(code: str, **environment: str) -> str:
    """What code prints in a process of its own, where no work is little."""
    start = "import torch; torch.set_num_threads(1); import lotr_ext; lotr_ext.ops.planner.LITTLE_WORK = 0"
    command = [sys.executable, "-c", f"{start}; {code}"]
    place = {"PYTHONPATH": str(Path(lotr_ext.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **place, **environment})
    return done.stdout
