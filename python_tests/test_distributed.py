"""DistributedDataParallel and FSDP2 in two processes: training, saving and loading equal one process. See distributed.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import CHECKS

HERE = [name for name in CHECKS if not name.startswith(("zero", "collectives"))]


def run_in_two_processes(names: list[str], results: Path) -> dict[str, Any]:
    """The results of checks of distributed.py by name."""
    program = Path(__file__).with_name("distributed.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
    ]
    done = subprocess.run(
        [*launch, str(results), *names], capture_output=True, text=True, timeout=900
    )
    assert results.exists(), done.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_in_two_processes(
        [*HERE, "collectives"], tmp_path_factory.mktemp("distributed") / "results.json"
    )


@pytest.mark.parametrize("name", HERE)
def test_equals_one_process(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], float), found[name]
    assert found[name] < 1e-10


def test_fsdp2_reduces_each_factor_once(found: dict[str, Any]) -> None:
    assert found["collectives"] == [5, 5]  # two blocks, the root, A and B
