"""DistributedDataParallel and FSDP2 in two processes equal one process.

Training, saving and loading, see distributed.py.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from distributed import CHECKS, run_in_two_processes
from torch import nn

from lotr_ext.sharded import full_tensor

NAMES = [name for name in CHECKS if not name.startswith("zero")]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_in_two_processes(NAMES, tmp_path_factory.mktemp("distributed") / "results.json")


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(errors: dict[str, str], name: str) -> None:
    assert not errors[name], errors[name]


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
