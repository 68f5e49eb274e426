"""Adapters that PEFT puts in, under FSDP1 in two gloo processes (`gloo_peft`)."""

from __future__ import annotations

import pytest
from gloo import values_of

pytest.importorskip("peft", minversion="0.21", reason="expected PEFT 0.21 or later")
pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both processes found, by wrapped units and form of core."""
    (ranks,) = values_of(["gloo_peft:fsdp1"], tmp_path_factory.mktemp("gloo")).values()
    assert all(len(by_case) == 5 for by_case in ranks)
    return ranks


def test_fsdp1_trains_a_peft_adapter_as_one_process_does(found: list[dict]) -> None:
    for by_case in found:
        for case, entry in by_case.items():
            assert entry["losses"] == pytest.approx(entry["alone"], rel=1e-12) and entry["trained"] < 1e-12, case
            assert entry["moved"] > 0.01, case


def test_save_pretrained_of_a_gathered_fsdp1_model_loads_in_one_process(found: list[dict]) -> None:
    for by_case in found:
        for case, entry in by_case.items():
            ways = {"full", "summoned"} if case.startswith("peft") else {"full", "summoned", "by the first"}
            assert entry["saved"].keys() == ways and max(entry["saved"].values()) < 1e-12, case


def test_save_pretrained_of_an_fsdp1_model_in_parts_is_refused_in_every_process(found: list[dict]) -> None:
    for by_case in found:
        for case, entry in by_case.items():
            assert len(entry["refused"]) == 2, case  # both messages, and no file
            assert all(r.startswith("save_pretrained: expected whole tensors, got") for r in entry["refused"]), case
