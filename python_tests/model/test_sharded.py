"""FSDP1, and each form of core in parts, in two gloo processes (`gloo_parts`); errors in one of them (`gloo_failures`)."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist
from gloo import run_pair

if not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32":
    pytest.skip("this torch has no gloo", allow_module_level=True)

CHECKS = (
    *("gloo_parts:fsdp1", "gloo_parts:fsdp2", "gloo_parts:fsdp1_ways", "gloo_parts:fsdp1_refuses"),
    *("gloo_failures:gradient", "gloo_failures:saving"),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each check returned in both processes."""
    results = run_pair(CHECKS, tmp_path_factory.mktemp("gloo"))
    for name, ranks in results.items():
        for rank, result in enumerate(ranks):
            if "error" in result:
                pytest.fail(f"{name}, process {rank}:\n{result['error']}")
    assert all("value" in result for ranks in results.values() for result in ranks), results
    return {name: [result["value"] for result in ranks] for name, ranks in results.items()}


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_every_form_of_core_trains_saves_and_loads_in_parts(kind: str, found: dict) -> None:
    for by_rank in found[f"gloo_parts:{kind}"]:
        assert by_rank.keys() == {"dense", "tucker", "few", "train"}
        for core, entry in by_rank.items():
            assert entry["gradients"] < 2e-6, core
            assert entry["losses"] == pytest.approx(entry["alone"], rel=1e-5) and entry["trained"] < 1e-4, core
            assert entry["other"] > 0.1 and max(entry["saved"], entry["into parts"]) < 1e-6 and entry["again"], core
            assert entry["goes on"][0] == pytest.approx(entry["goes on"][1], rel=1e-5), core


def test_gradients_under_fsdp1_are_those_of_one_process(found: dict) -> None:
    for by_rank in found["gloo_parts:fsdp1_ways"]:
        assert len(by_rank) == 6
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2e-6, (case, errors)


def test_fsdp1_refuses_what_needs_whole_tensors(found: dict) -> None:
    for refused in found["gloo_parts:fsdp1_refuses"]:
        assert "RuntimeError: model: expected what FullyShardedDataParallel returned, got Stack" in refused["inside"]
        assert "RuntimeError: merge: expected whole tensors, got 'blocks.0.q' held in parts" in refused["merge"]
        assert "TypeError: model: expected whole tensors" in refused["apply"]


def test_an_error_in_one_process_ends_the_start_from_the_gradient_in_all(found: dict) -> None:
    first, second = found["gloo_failures:gradient"]
    for case, error in (
        ("loss", "ValueError: a bad batch"),
        ("interrupt", "KeyboardInterrupt: "),
        ("batches", "ValueError: batches: expected at least one"),
        ("model", "RuntimeError: model: expected one with a LoTR adapter"),
    ):
        assert second[case].startswith(error), case
        assert first[case].startswith("RuntimeError") and f"in process 1: {error}" in first[case], case
    assert first["moved"] == second["moved"] == "True"


def test_an_error_in_one_process_ends_save_adapter_in_all(found: dict) -> None:
    first, second = found["gloo_failures:saving"]
    assert second["path"].startswith("TypeError: directory") and "in process 1: TypeError: directory" in first["path"]
    assert "model: expected one with a LoTR adapter" in second["other model"] and "in process 1" in first["other model"]
    assert not first["never"] and not second["never"]


def test_a_full_disk_leaves_no_half_file_and_ends_save_adapter_in_all(found: dict) -> None:
    first, second = found["gloo_failures:saving"]
    for at in (1, 2):
        assert first[f"full {at}"].startswith("OSError: [Errno 28] ")
        assert "in process 0: OSError: [Errno 28] " in second[f"full {at}"]
        assert first[f"left {at}"] == second[f"left {at}"] == []
    assert first["full again"].startswith("OSError") and first["the old one"] and second["the old one"] and first["files"] == 2
