"""DeepSpeed's ZeRO, stages 0 to 3, in one process and in two."""

from __future__ import annotations

import pytest
from beside import needs, values_of

pytestmark = [needs("deepspeed"), pytest.mark.slow]
CHECKS = ("stages", "through_peft", "resumes", "partitioned_first", "refusals")


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.full), 2])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, list]]:
    """The number of processes, and what each check returned in them. Trainer's is the last: it needs two."""
    checks = [f"zero_checks:{check}" for check in CHECKS] + ["trainer_checks:zero"] * (request.param == 2)
    return request.param, values_of(checks, tmp_path_factory.mktemp("zero"), world=request.param)


def test_zero_trains_saves_loads_and_goes_on(started: tuple[int, dict[str, list]]) -> None:
    world, found = started
    for by_rank in found["zero_checks:stages"]:
        assert len(by_rank) == (8 if world == 1 else 4)
        for name, entry in by_rank.items():
            assert entry["losses"] == pytest.approx(entry["alone"], rel=1e-5) and entry["trained"] < 1e-5, name
            assert entry["other"] > 1e-3 and max(entry["saved"], entry["loaded"]) < 1e-6 and entry["whole"], name
            assert entry["goes on"][0] == pytest.approx(entry["goes on"][1], rel=1e-5), name
    for by_stage in found["zero_checks:through_peft"]:
        assert {name[0] for name in by_stage} == set("0123")
        for name, entry in by_stage.items():
            assert entry["losses"] == pytest.approx(entry["alone"], rel=1e-5) and entry["left"] == [], name
            assert entry["saved"] < 1e-6 and entry["goes on"][0] == pytest.approx(entry["goes on"][1], rel=1e-5), name
    for by_stage in found["zero_checks:resumes"]:
        assert len(by_stage) == (8 if world == 1 else 5)
        for name, entry in by_stage.items():
            assert entry["goes on"][0] == pytest.approx(entry["goes on"][1], rel=1e-6) and entry["resumed"] < 1e-6, name
    for entry in found["zero_checks:partitioned_first"]:
        assert entry["losses"] == pytest.approx(entry["alone"], rel=1e-5) and entry["loaded"] < 1e-6
    for refused in found["zero_checks:refusals"]:
        assert "RuntimeError: merge: expected whole tensors" in refused["merge"]
        assert refused["state_dict"].startswith("ValueError") and refused["left"] == []


def test_adapter_checkpoint_of_trainer_resumes_under_zero(started: tuple[int, dict[str, list]]) -> None:
    world, found = started
    if world == 1:
        pytest.skip("Trainer's check is of two processes")
    for by_stage in found["trainer_checks:zero"]:
        assert by_stage.keys() == {"2", "3"}
        for stage, entry in by_stage.items():
            assert entry["moved"] > 1e-2, stage
            assert max(entry["saved"], entry["resumed"], entry["loaded"]) < 1e-6, stage
