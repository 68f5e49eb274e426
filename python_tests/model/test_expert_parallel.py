"""Mixtures whose experts are in several gloo processes, against one process (`gloo_expert_parallel`)."""

from __future__ import annotations

import pytest
from gloo import values_of

CHECKS = ("models",)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROUNDING = 1e-11  # of float64, through AdamW


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each check returned in all processes."""
    names = [f"gloo_expert_parallel:{check}" for check in CHECKS]
    values = values_of(names, tmp_path_factory.mktemp("parts"), world=request.param)
    return {name.partition(":")[2]: own for name, own in values.items()}


def test_experts_in_parts_are_one_process(found: dict) -> None:
    world = len(found["models"])
    for by_rank in found["models"]:
        whole, own, weights = by_rank.pop("sizes")
        assert whole == [4, 4, 4] and own == [4 // world, 4, 4] and weights == 4 // world
        for name, values in by_rank.items():
            assert max(values.values()) < ROUNDING, (name, values)
