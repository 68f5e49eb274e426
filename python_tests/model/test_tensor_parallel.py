"""Tensor parallel models in gloo processes, against one process (`gloo_tensor_parallel`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo import values_of
from gloo_tensor_parallel import LAYOUTS
from gloo_tp_plan import KINDS

CHECKS = ("layouts", "checkpoints", "sums", "told", "shared_u", "dropout", "files", "by_hand", "rows_apart")
PLANS = ("plans", "plans_told")
TWO = ("compiled", "refusals", "factors_in_parts")
MORE = ("more_processes_than_rows",)
MESHES = ("sequences", "batch_in_parts", "saves_alone")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROUNDING = 1e-13  # of float64


def named(checks: tuple[str, ...], module: str = "gloo_tensor_parallel") -> list[str]:
    return [f"{module}:{check}" for check in checks]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each check returned in both processes."""
    checks = named(CHECKS) + named(PLANS, "gloo_tp_plan") + named(TWO, "gloo_tp_meshes")
    return {name.partition(":")[2]: own for name, own in values_of(checks, tmp_path_factory.mktemp("two")).items()}


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    found = values_of(named(MORE) + named(MESHES, "gloo_tp_meshes"), tmp_path_factory.mktemp("four"), world=4)
    return {name.partition(":")[2]: own for name, own in found.items()}


@pytest.mark.parametrize("layout", [*LAYOUTS, "two nodes", "one node", "one folded node"])
def test_a_cut_model_is_one_process(found: dict, layout: str) -> None:
    for by_rank in found["layouts"]:
        assert max(by_rank[layout].values()) < ROUNDING, by_rank[layout]


@pytest.mark.parametrize("way", ["reentrant False", "reentrant True", "accumulated"])
def test_checkpointed_and_accumulated_steps(found: dict, way: str) -> None:
    for by_rank in found["checkpoints"]:
        assert max(by_rank[way].values()) < ROUNDING, by_rank[way]


def test_layers_without_a_forward_scope(found: dict) -> None:
    for by_rank in found["by_hand"]:
        assert max(by_rank.values()) < ROUNDING


def test_factors_in_parts_over_the_same_mesh(found: dict) -> None:
    for by_rank in found["factors_in_parts"]:
        assert max(by_rank.values()) < ROUNDING, by_rank


def test_a_step_has_one_more_collective_at_any_number_of_layers(found: dict) -> None:
    """And fewer of the base's: siblings send their gradients of x together."""
    for by_rank in found["sums"]:
        assert by_rank["base 4"] == 5 * 4
        for blocks in (4, 40):
            assert by_rank[f"adapted {blocks}"] == 4 * blocks + 1


def test_explain_says_that_kernels_run_on_local_tensors(found: dict) -> None:
    for by_rank in found["told"]:
        assert "(20, 12) here (10, 12)" in by_rank["up"] and "(12, 20) here (12, 10)" in by_rank["down"]
        assert all("composite" not in plan for plan in by_rank.values())
        assert "here" not in by_rank["whole"]
        assert "2 x W (20, 12) here (10, 12), 2 x W (12, 20) here (12, 10)" in by_rank["summary"]


def test_siblings_share_u_on_local_tensors(found: dict) -> None:
    """Of the 6 layers of a block two read one x."""
    for by_rank in found["shared_u"]:
        for counts in by_rank.values():
            assert counts["shrink"] == counts["factor_grad_"] == 5 and counts["fold"] == 6, counts


def test_processes_draw_one_dropout_mask(found: dict) -> None:
    for by_rank in found["dropout"]:
        assert by_rank["alike"] and by_rank["drawn again"]
        for of in ("", " later"):
            assert 0 < by_rank[f"off{of}"] < 6 * by_rank[f"spread{of}"] / 400**0.5


def test_files_and_merging(found: dict) -> None:
    for by_rank in found["files"]:
        assert by_rank.pop("bits")
        assert max(by_rank.values()) < ROUNDING, by_rank


@pytest.mark.parametrize("way", ["names", "tasks", "tokens", "examples", "another"])
def test_a_core_a_row_and_several_adapters(found: dict, way: str) -> None:
    for by_rank in found["rows_apart"]:
        own = {name: value for name, value in by_rank["off"].items() if name.startswith(way)}
        assert len(own) >= 6 and max(own.values()) < ROUNDING, own
        assert by_rank["off"]["agreed"] == 0


def test_a_bank_of_tasks_adds_one_collective(found: dict) -> None:
    for by_rank in found["rows_apart"]:
        assert by_rank["sums"]["tasks False"] == by_rank["sums"]["tokens False"] == 4 * 2 + 1
        assert by_rank["sums"]["names False"] == 4 * 2 + 10  # the cores of the other 9 cut layers by themselves


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_cut_by_tp_plan_is_one_process(found: dict, kind: str) -> None:
    """Mixtral's router rounds to float32."""
    for by_rank in found["plans"]:
        assert max(by_rank[kind].values()) < (1e-6 if kind == "Mixtral" else 1e-11), by_rank[kind]


@pytest.mark.full
def test_more_models_cut_by_tp_plan_are_one_process(tmp_path: Path) -> None:
    """DeepseekV2's rotary embedding rounds to float32."""
    for by_rank in values_of(named(("more_plans",), "gloo_tp_plan"), tmp_path)["gloo_tp_plan:more_plans"]:
        assert max(by_rank["Phi3"].values()) < 1e-11 and max(by_rank["DeepseekV2"].values()) < 1e-6, by_rank


def test_explain_gives_the_local_shapes_under_tp_plan(found: dict) -> None:
    for by_rank in found["plans_told"]:
        assert "(24, 16) here (12, 16)" in by_rank["up"] and "(16, 16) here (16, 8)" in by_rank["o"]
        assert all("composite" not in plan for plan in by_rank.values())


@pytest.mark.parametrize("size", [9, 3])
def test_processes_without_rows_take_part_in_the_sums(of_four: dict, size: int) -> None:
    for by_rank in of_four["more_processes_than_rows"]:
        assert max(value for name, value in by_rank.items() if name.startswith(str(size))) < ROUNDING


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2, parallelize_module first"])
def test_a_batch_in_parts_over_another_dimension_of_the_mesh(of_four: dict, way: str) -> None:
    for by_rank in of_four["batch_in_parts"]:
        assert max(by_rank[way].values()) < ROUNDING, by_rank[way]


@pytest.mark.parametrize("way", ["before", "after", "uneven"])
def test_sequence_parallel_is_one_process(of_four: dict, way: str) -> None:
    for by_rank in of_four["sequences"]:
        assert max(by_rank[way].values()) < ROUNDING, by_rank[way]


def test_a_save_by_one_process_ends_with_an_error(of_four: dict) -> None:
    said = of_four["saves_alone"]
    assert said[0]["said"].startswith("RuntimeError: save_adapter: expected all processes to call it together")
    assert not any(by_rank["left"] for by_rank in said)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
def test_compiled_in_one_graph(found: dict, tmp_path: Path, backend: str) -> None:
    if backend != "eager":
        found = {
            "compiled": values_of(named(("compiled_by_aot",), "gloo_tp_meshes"), tmp_path)["gloo_tp_meshes:compiled_by_aot"]
        }
    for by_rank in found["compiled"]:
        assert by_rank["off"] < ROUNDING
        assert "dropout: expected 0 for a tensor parallel layer inside torch.compile" in by_rank["dropout"]


def test_refusals(found: dict) -> None:
    for by_rank in found["refusals"]:
        assert by_rank["mesh"].startswith("RuntimeError: Mesh should not be bigger")  # torch's own
        for name in ("plain x", "another mesh", "a sum, later"):
            assert by_rank[name].startswith("TypeError: x, weight: expected DTensors over one mesh"), name
        for name in ("cut twice", "a sum", "in two pieces"):
            assert by_rank[name].startswith("ValueError: target_modules: expected tensor parallel layers cut by rows or"), name
            assert by_rank[name].endswith("exclude it"), name
        assert by_rank["recorded"].startswith("RuntimeError: tensor parallelism: expected a backward that is not itself")
