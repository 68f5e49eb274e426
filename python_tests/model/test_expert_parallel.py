"""Mixtures whose experts are in several gloo processes, against one process (`gloo_expert_parallel`)."""

from __future__ import annotations

import pytest
import torch
from gloo import values_of

from lotr_ext.model.experts import with_tasks, without_tasks

CHECKS = ("models", "tensors", "both", "routes", "checkpoints", "sums", "files", "tasks", "refusals")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROUNDING = 1e-11  # of float64, through AdamW
FLOAT32 = 2e-6  # where sums in another order reach transformers' norms and routers, which are float32


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
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


def test_masked_and_exchanged_tokens_experts_and_processes_without_tokens(found: dict) -> None:
    for by_rank in found["routes"]:
        assert by_rank.pop("idle") == [True, True, False, False]
        assert len(by_rank) == 4 and max(by_rank.values()) < ROUNDING, by_rank


def test_checkpointed_and_accumulated_steps(found: dict) -> None:
    for by_rank in found["checkpoints"]:
        assert max(by_rank.values()) < ROUNDING, by_rank


def test_a_step_sends_one_sum_and_no_more_with_the_tokens(found: dict) -> None:
    for by_rank in found["sums"]:
        for layers in (1, 3):
            (counts, numbers), (own, own_numbers) = by_rank[f"base {layers}"], by_rank[f"adapted {layers}"]
            assert counts["gloo:all_to_all"] == 5 * layers and numbers > 0
            assert own == counts | {"gloo:all_reduce": counts["gloo:all_reduce"] + 1}
            assert own_numbers == numbers


def test_files_and_merging(found: dict) -> None:
    for by_rank in (*found["files"], *found["tensors"], *found["both"]):
        by_rank = {what: value for what, value in by_rank.items() if what not in ("models", "counts")}
        same = [what for what in by_rank if what.endswith(("bits", "peft", "vllm-shared"))]
        assert len(same) == 3 and all(by_rank.pop(what) for what in same)
        assert max(by_rank.values()) < FLOAT32, by_rank


@pytest.mark.parametrize("way", ["tensors", "both"])
def test_a_part_of_each_expert_and_attention_in_parts_beside_experts(found: dict, way: str) -> None:
    for by_rank in found[way]:
        for name, values in by_rank["models"].items():
            assert max(values.values()) < FLOAT32, (name, values)


def test_tensor_and_expert_parallelism_have_one_sum_together(found: dict) -> None:
    """A step of two blocks sends no more than the base's and one sum: q and k send their gradient of x together."""
    for by_rank in found["both"]:
        base, own = by_rank["counts"]
        assert own == base | {"gloo:all_reduce": base["gloo:all_reduce"] - 2 + 1}


def test_a_task_of_each_row_and_of_each_token(found: dict) -> None:
    for by_rank in found["tasks"]:
        assert len(by_rank) == 10 and max(by_rank.values()) < FLOAT32, by_rank


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tasks_travel_with_tokens_in_any_dtype(dtype: torch.dtype) -> None:
    tasks, x = torch.tensor([-1, 0, 126, 127, 128, 20_000, 2_000_000]), torch.randn(7, 5).to(dtype)
    again, found = without_tasks(with_tasks(x, tasks))
    assert torch.equal(again, x) and torch.equal(found, tasks)


def test_refusals_in_all_processes(found: dict) -> None:
    for by_rank in found["refusals"]:
        assert by_rank["uneven"].startswith("ValueError: Cannot evenly shard 5 experts")  # transformers' own
        assert "gate_up_proj: expected 4 experts as in the model, got 8 in the adapter" in by_rank["others, in parts"]
        assert "expected (experts, in_features, out_features) (8, 32, 48) as in the adapter" in by_rank["others, onto parts"]
        assert by_rank["unchanged"]
        assert by_rank["named"].startswith("RuntimeError: add_adapter: expected whole tensors")
        assert by_rank["per_example"].startswith("TypeError: per_example: expected whole experts in each process")
        assert by_rank["optimizer"].startswith("TypeError: optimizer: expected whole cores in each process")
        assert by_rank["cut twice"].startswith(
            "ValueError: target_parameters: expected experts cut by experts, rows or columns over one axis"
        )


def test_a_process_that_saves_alone_ends_with_an_error(found: dict) -> None:
    assert found["refusals"][0]["alone"].startswith("RuntimeError: save_adapter: expected all processes to call it together")
