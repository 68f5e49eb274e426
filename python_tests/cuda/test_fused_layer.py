"""The fused strategy on a GPU: each check in a process of its own under a watchdog, so that a hang is a failed test."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bench.gpu.machine import ROOT
from lotr_ext.ops import planner

SECONDS = {"replays": 240.0}  # of a check; it takes a few


def guarded(name: str, *arguments: str, seconds: float = 120.0) -> None:
    """Runs a check; fails where it fails, and where it is not over in time, after ending it."""
    place = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.gpu.fused_checks", name, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": place}
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        pytest.fail(f"fused {name}: hangs, was ended after {seconds:.0f} s\n{said[-2000:]}")
    assert process.returncode == 0, f"fused {name}\n{said[-4000:]}"


@pytest.mark.parametrize("name", ["numbers", "gradients", "workspaces", "replays", "occupied", "tuned", "refused"])
def test_fused(name: str) -> None:
    missing = planner.fused_obstacle(16, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    if missing is not None:
        pytest.skip(missing)
    guarded(name, seconds=SECONDS.get(name, 120.0))


def test_another_architecture() -> None:
    """The operator itself says so, whatever the planner asked."""
    capability = torch.cuda.get_device_capability()
    if capability == (9, 0) or not hasattr(torch.ops.lotr, "gemm_lotr"):
        pytest.skip("expected code for 90a and a GPU that is no Hopper")
    x = torch.randn(256, 64, device="cuda").bfloat16()
    said = torch.ops.lotr.gemm_lotr_refusal(x, x[:48], 16, False)
    assert said == f"architecture: expected compute capability 9.0, got {capability[0]}.{capability[1]}"


def test_the_checks_cpu() -> None:
    """Those that need no GPU, by another strategy: that they can pass."""
    guarded("numbers", "--device", "cpu", "--strategy", "beta")
    guarded("gradients", "--device", "cpu", "--strategy", "beta")


def test_the_watchdog_cpu() -> None:
    with pytest.raises(pytest.fail.Exception, match="fused hang: hangs, was ended after 1 s"):
        guarded("hang", "--device", "cpu", seconds=1.0)
