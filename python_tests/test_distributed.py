"""DistributedDataParallel and FSDP2: two processes train, save and load as one process does.

distributed.py has the checks. test_frameworks.py runs DeepSpeed's.
"""

import pytest
from distributed import CHECKS, run_in_two_processes

NAMES = [name for name in CHECKS if not name.startswith("zero")]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_in_two_processes(NAMES, tmp_path_factory.mktemp("distributed") / "results.json")


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(errors: dict[str, str], name: str) -> None:
    assert not errors[name], errors[name]
