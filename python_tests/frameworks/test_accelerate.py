"""FSDP1 through accelerate, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from beside import values_of

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.slow


def test_fsdp1_trains_and_saves_as_one_process_does(tmp_path: Path) -> None:
    (found,) = values_of(["accelerate_checks:fsdp1"], tmp_path, world=2).values()
    for entry in found:
        assert entry["wrapped"] and entry["kept"] and entry["saved"] < 1e-6
        assert entry["losses"] == pytest.approx(entry["alone"], rel=1e-5)


def test_adapter_checkpoint_of_trainer_saves_and_loads_under_fsdp1(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    (found,) = values_of(["trainer_checks:fsdp1"], tmp_path, world=2).values()
    for entry in found:
        assert entry["wrapped"] and entry["moved"] > 1e-2 and max(entry["saved"], entry["loaded"]) < 1e-6
