"""DistributedDataParallel and FSDP2 in two processes equal one process.

Training, saving and loading, see distributed.py.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import CHECKS
from torch import nn

from lotr_ext.sharded import full_tensor

NAMES = [name for name in CHECKS if not name.startswith(("zero", "collectives"))]


def run_in_two_processes(names: list[str], path: Path) -> dict[str, Any]:
    """Returns the results of checks of distributed.py by name, which are written to path."""
    program = Path(__file__).with_name("distributed.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [sys.executable, *launch, str(program), str(path), *names],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert path.exists(), process.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("distributed") / "results.json"
    return run_in_two_processes([*NAMES, "collectives"], path)


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(results: dict[str, Any], name: str) -> None:
    assert isinstance(results[name], float), results[name]
    assert results[name] < 1e-10


def test_fsdp2_reduces_each_factor_once(results: dict[str, Any]) -> None:
    assert results["collectives"] == [5, 5]  # two blocks, the root, A and B


def test_a_parameter_of_zero3_is_read_while_it_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for DeepSpeed. test_frameworks.py runs the real one."""
    full = torch.randn(3, 2)

    @contextlib.contextmanager
    def gathered(parameters: list[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
        parameters[0].data = full
        yield
        parameters[0].data = torch.empty(0)

    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id = 0
    assert torch.equal(full_tensor(parameter), full)
