"""DDP and FSDP in two gloo processes, against one process with the whole batch (`gloo_checks`); each form
of core in parts (`gloo_parts`); gradients of each example (`gloo_per_example`); errors in one process (`gloo_failures`)."""

from __future__ import annotations

from pathlib import Path

import gloo_checks
import pytest
import torch
import torch.distributed.checkpoint as dcp
from gloo import values_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lotr_ext import LoTRConfig, apply_lotr, init_from_gradient, load_adapter, save_adapter

CHECKS = (
    *("gloo_ddp:ddp", "gloo_ddp:ddp_reductions", "gloo_ddp:ddp_saves_once"),
    *("fsdp", "fsdp_mixed_precision", "fsdp_shares", "fsdp_reductions", "fsdp_saves", "fsdp_resumes", "fsdp_refuses"),
    "fsdp_tied_head",
    *("gloo_experts:experts", "gradient_start", "gloo_magnitudes:magnitudes"),
    *("gloo_parts:fsdp1", "gloo_parts:fsdp2", "gloo_parts:fsdp1_resumes", "gloo_parts:fsdp1_ways", "gloo_parts:fsdp1_refuses"),
    *("gloo_context_parallel:sequences", "gloo_per_example:under_ddp", "gloo_failures:gradient", "gloo_failures:saving"),
)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TRAINED = StateDictOptions(ignore_frozen_params=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gloo")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[float] | float]:
    """A run in this process: three steps, saved in both ways, and two more."""
    model = gloo_checks.make()
    optimizer = gloo_checks.adam(model)
    found = {"before": gloo_checks.train(model, optimizer, range(3), 0, 1)}
    state, moments = get_state_dict(model, optimizer, options=TRAINED)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder / "single", no_dist=True)
    bare = gloo_checks.make(saved=None)
    save_adapter(bare, folder / "bare-adapter")
    with torch.no_grad():
        found["adapter"] = bare(gloo_checks.batch(0)).sum().item()
    found["after"] = gloo_checks.train(model, optimizer, range(3, 5), 0, 1)
    settings = {"target_modules": ["q", "k", "v", "up"], "modules_to_save": ["head"]}
    save_adapter(apply_lotr(gloo_checks.base(), LoTRConfig(rank=4, init="svd", **settings)), folder / "svd-adapter")
    save_adapter(apply_lotr(gloo_checks.base(), LoTRConfig(rank=2, **settings)), folder / "rank-2-adapter")
    return found


@pytest.fixture(scope="module")
def found(folder: Path, alone: dict) -> dict[str, list]:
    """What each check returned in both processes."""
    return values_of(CHECKS, folder)


def test_gradients_under_ddp_are_those_of_one_process(found: dict) -> None:
    for by_rank in found["gloo_ddp:ddp"]:
        assert len(by_rank) == 14
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2e-6, (case, errors)


def test_gradients_under_fsdp2_are_those_of_one_process(found: dict) -> None:
    for by_rank in found["fsdp"]:
        assert len(by_rank) == 26
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2e-6, (case, errors)


def test_magnitudes_under_ddp_and_fsdp2(found: dict) -> None:
    for by_rank in found["gloo_magnitudes:magnitudes"]:
        for name in ("cut later", "cut before"):
            assert "magnitude: expected" in by_rank.pop(name)
        assert len(by_rank) == 3 and max(by_rank.values()) < 1e-10, by_rank


def test_fsdp2_with_mixed_precision(found: dict) -> None:
    for by_rank in found["fsdp_mixed_precision"]:
        eager = by_rank.pop("eager bfloat16")["one process"]
        assert len(by_rank) == 4 and eager < 0.05
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2 * eager, (case, errors)


def test_a_and_b_are_reduced_once_a_step_however_many_layers(found: dict) -> None:
    for by_rank in found["gloo_ddp:ddp_reductions"]:
        assert len(by_rank) == 4
        assert all(counts == [1, 1, 0, True] for counts in by_rank.values()), by_rank
    for by_rank in found["fsdp_reductions"]:
        assert len(by_rank) == 4 and set(by_rank.values()) == {1}, by_rank


def test_siblings_share_one_shrink_under_fsdp2(found: dict) -> None:
    for by_rank in found["fsdp_shares"]:
        for calls in by_rank.values():
            assert calls["shrink"] == 2 * 3 and calls["expand_add_"] >= 4 * 3  # a block: one of q, k, v and one of up


def test_experts_under_ddp_and_fsdp2(found: dict) -> None:
    for by_rank in found["gloo_experts:experts"]:
        assert len(by_rank["errors"]) == 3 and max(by_rank["errors"].values()) < 5e-6, by_rank["errors"]
        assert by_rank["saved"] and "lotr.gate_up_proj' held in parts" in by_rank["refusal"]


def test_only_process_0_saves_for_ddp(found: dict) -> None:
    assert found["gloo_ddp:ddp_saves_once"] == [True, False]


def test_fsdp2_saves_and_one_process_goes_on(found: dict, alone: dict, folder: Path) -> None:
    for saved in found["fsdp_saves"]:
        assert saved["there"] and saved["before"] == pytest.approx(alone["before"], rel=1e-5)
        assert saved["after"] == pytest.approx(alone["after"], rel=1e-4)
        assert sum("lotr_factors" in name for name in saved["saved"]) == 4 and "blocks.0.q.weight" not in saved["saved"]
    model = gloo_checks.make()
    gloo_checks.randomize_parts(model)
    optimizer = gloo_checks.adam(model)
    state, moments = get_state_dict(model, optimizer, options=TRAINED)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=folder / "dcp", no_dist=True)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments, options=options)
    loaded = load_adapter(gloo_checks.base(), folder / "adapter")
    x = gloo_checks.batch(0)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert gloo_checks.train(model, optimizer, range(3, 5), 0, 1) == pytest.approx(found["fsdp_saves"][0]["after"], rel=1e-4)


def test_a_tied_head_is_saved_and_loaded_in_parts(found: dict) -> None:
    for by_way in found["fsdp_tied_head"]:
        assert max(by_way.values()) < 1e-6, by_way


def test_two_processes_go_on_from_what_one_saved(found: dict, alone: dict) -> None:
    for resumed in found["fsdp_resumes"]:
        assert resumed["dcp"] == pytest.approx(alone["after"], rel=1e-4)
        assert resumed["adapter"] == pytest.approx(alone["adapter"], rel=1e-5)


def test_what_needs_whole_tensors_is_refused(found: dict) -> None:
    first, second = found["fsdp_refuses"]
    for refused in (first, second):
        assert "RuntimeError: merge: expected whole tensors, got 'blocks.0.q' held in parts" in refused["merge"]
        assert "TypeError: model: expected whole tensors, got FSDPStack held in parts" in refused["apply"]
        assert 'RuntimeError: load_adapter: expected whole weights, since init "svd" changes them' in refused["svd"]
        for what in ("merge", "unmerge", "unload"):  # after a forward without gradients
            assert f"RuntimeError: {what}: expected whole tensors, got 'blocks.0.q'" in refused[f"{what}, gathered"]
        for what in ("merge, gathered layer", "unmerge, gathered layer", "merge, sharded layer"):
            assert f"RuntimeError: {what.partition(',')[0]}: expected whole tensors, got a LoTRLinear" in refused[what]
        assert "RuntimeError: TaskBank: expected whole tensors" in refused["bank"]
        assert "ValueError" in refused["other rank"] and "expected float32 [16, 4]" in refused["other rank"]
    assert first["a file in the way"].startswith("ValueError: directory: expected a directory")
    assert "expected all processes to succeed, got an error in process 0: ValueError: directory" in second["a file in the way"]
    assert first["an error of another kind"].startswith("RuntimeError: saving: ")
    assert "in process 1: KeyError" in first["an error of another kind"]
    assert second["an error of another kind"].startswith("KeyError")


def test_context_parallelism_needs_nothing(found: dict) -> None:
    """Each process has half of each sequence."""
    for by_rank in found["gloo_context_parallel:sequences"]:
        assert by_rank.keys() == {"y", "gradients", "saved"} and max(by_rank.values()) < 1e-13, by_rank


def test_the_start_from_the_gradient_is_that_of_one_process(found: dict, folder: Path) -> None:
    """Two processes with half of the batches each, and one with all of them."""
    assert all(by_rank["same"] for by_rank in found["gradient_start"])
    together = torch.load(folder / "gradient_start.pt")
    every = [gloo_checks.batch(rank, step) for rank in range(2) for step in range(2)]
    alone = init_from_gradient(gloo_checks.make_fresh(), every, gloo_checks.loss)
    for name, factor in alone.lotr_factors.named_parameters():
        overlap = torch.linalg.svdvals(factor.detach().double().T @ together[name].double())
        assert overlap.min() > 1 - 1e-6, name  # the cosine of the largest angle between the two spans


# ---- each form of core in parts, errors in one process -------------------------------------------------------------------


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


def test_fsdp1_goes_on_from_a_checkpoint(found: dict) -> None:
    for by_core in found["gloo_parts:fsdp1_resumes"]:
        assert by_core.keys() == {"dense", "tucker"}
        for going_on, resumed in by_core.values():
            assert resumed == pytest.approx(going_on, rel=1e-6)


def test_fsdp1_refuses_what_needs_whole_tensors(found: dict) -> None:
    for refused in found["gloo_parts:fsdp1_refuses"]:
        assert "RuntimeError: model: expected what FullyShardedDataParallel returned, got Stack" in refused["inside"]
        assert "RuntimeError: merge: expected whole tensors, got 'blocks.0.q' held in parts" in refused["merge"]
        assert "TypeError: model: expected whole tensors" in refused["apply"]
        assert "RuntimeError: unload: expected whole tensors, got 'blocks.0.q' held in parts" in refused["unload"]
        assert "RuntimeError: TaskBank: expected whole tensors" in refused["bank"]
        assert "TypeError: model: expected a plain, whole one for a start from the gradient" in refused["start"]


def test_each_process_of_ddp_has_the_gradients_of_its_own_examples(found: dict) -> None:
    both = found["gloo_per_example:under_ddp"]
    assert [len(one["rows"]) for one in both] == [5, 4] and both[0]["rows"][:4] != both[1]["rows"]
    assert all(max(one["worst"], one["ordinary"], one["scores"]) < 1e-10 for one in both), both


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
