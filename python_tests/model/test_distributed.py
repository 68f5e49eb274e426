"""DDP, FSDP2 and tensor parallelism in two gloo processes, against one process with the whole batch (`gloo_checks`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import run_pair

if not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32":
    pytest.skip("this torch has no gloo", allow_module_level=True)

import gloo_checks
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lotr_ext import LoTRConfig, apply_lotr, init_from_gradient, load_adapter, save_adapter

CHECKS = (
    *("ddp", "ddp_reductions", "ddp_saves_once"),
    *("fsdp", "fsdp_mixed_precision", "fsdp_shares", "fsdp_reductions", "fsdp_saves", "fsdp_resumes", "fsdp_refuses"),
    *("tensor_parallel", "gloo_experts:experts"),
    "gradient_start",
)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TRAINED = StateDictOptions(ignore_frozen_params=True)


def train_alone(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The same steps as gloo_checks.train, with the whole batch in one process."""
    losses = []
    for i in steps:
        optimizer.zero_grad()
        loss = sum(gloo_checks.loss(model, gloo_checks.batch(rank, i)) for rank in range(2)) / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gloo")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[float] | float]:
    """A run in this process: three steps, saved in both ways, and two more."""
    model = gloo_checks.make()
    optimizer = gloo_checks.adam(model)
    found = {"before": train_alone(model, optimizer, range(3))}
    state, moments = get_state_dict(model, optimizer, options=TRAINED)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder / "single", no_dist=True)
    bare = gloo_checks.make(saved=None)
    save_adapter(bare, folder / "bare-adapter")
    with torch.no_grad():
        found["adapter"] = bare(gloo_checks.batch(0)).sum().item()
    found["after"] = train_alone(model, optimizer, range(3, 5))
    settings = {"target_modules": ["q", "k", "v", "up"], "modules_to_save": ["head"]}
    save_adapter(apply_lotr(gloo_checks.base(), LoTRConfig(rank=4, init="svd", **settings)), folder / "svd-adapter")
    save_adapter(apply_lotr(gloo_checks.base(), LoTRConfig(rank=2, **settings)), folder / "rank-2-adapter")
    return found


@pytest.fixture(scope="module")
def found(folder: Path, alone: dict) -> dict[str, list]:
    """What each check returned in both processes."""
    results = run_pair(CHECKS, folder)
    for name, ranks in results.items():
        for rank, result in enumerate(ranks):
            if "error" in result:
                pytest.fail(f"{name}, process {rank}:\n{result['error']}")
    assert all("value" in result for ranks in results.values() for result in ranks), results
    return {name: [result["value"] for result in ranks] for name, ranks in results.items()}


def test_gradients_under_ddp_are_those_of_one_process(found: dict) -> None:
    for by_rank in found["ddp"]:
        assert len(by_rank) == 14
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2e-6, (case, errors)


def test_gradients_under_fsdp2_are_those_of_one_process(found: dict) -> None:
    for by_rank in found["fsdp"]:
        assert len(by_rank) == 26
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2e-6, (case, errors)


def test_fsdp2_with_mixed_precision(found: dict) -> None:
    for by_rank in found["fsdp_mixed_precision"]:
        eager = by_rank.pop("eager bfloat16")["one process"]
        assert len(by_rank) == 4 and eager < 0.05
        for case, errors in by_rank.items():
            assert max(errors.values()) < 2 * eager, (case, errors)


def test_a_and_b_are_reduced_once_a_step_however_many_layers(found: dict) -> None:
    for by_rank in found["ddp_reductions"]:
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
    assert found["ddp_saves_once"] == [True, False]


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
    assert train_alone(model, optimizer, range(3, 5)) == pytest.approx(found["fsdp_saves"][0]["after"], rel=1e-4)


def test_two_processes_go_on_from_what_one_saved(found: dict, alone: dict) -> None:
    for resumed in found["fsdp_resumes"]:
        assert resumed["dcp"] == pytest.approx(alone["after"], rel=1e-4)
        assert resumed["adapter"] == pytest.approx(alone["adapter"], rel=1e-5)


def test_what_needs_whole_tensors_is_refused(found: dict) -> None:
    first, second = found["fsdp_refuses"]
    for refused in (first, second):
        assert "RuntimeError: merge: expected whole tensors, got 'blocks.0.q' held in parts" in refused["merge"]
        assert "TypeError: model: expected whole tensors, got FSDPStack held in parts" in refused["apply"]
        assert 'RuntimeError: load_adapter: expected whole weights, for init "svd" changes them' in refused["svd"]
        assert "ValueError" in refused["other rank"] and "expected float32 [16, 4]" in refused["other rank"]
    assert first["a file in the way"].startswith("ValueError: directory: expected a directory")
    assert "expected all processes to succeed, got an error in process 0: ValueError: directory" in second["a file in the way"]
    assert first["an error of another kind"].startswith("RuntimeError: saving: ")
    assert "in process 1: KeyError" in first["an error of another kind"]
    assert second["an error of another kind"].startswith("KeyError")


def test_tensor_parallel_replicas(found: dict) -> None:
    for by_rank in found["tensor_parallel"]:
        assert by_rank["error"] < 2e-6
        assert by_rank["parallel"] == pytest.approx(by_rank["alone"], rel=1e-5)
        assert by_rank["loaded"] == pytest.approx(by_rank["parallel"], rel=1e-6)


def test_the_start_from_the_gradient_is_that_of_one_process(found: dict, folder: Path) -> None:
    """Two processes with half of the batches each, and one with all of them."""
    assert all(by_rank["same"] for by_rank in found["gradient_start"])
    together = torch.load(folder / "gradient_start.pt")
    every = [gloo_checks.batch(rank, step) for rank in range(2) for step in range(2)]
    alone = init_from_gradient(gloo_checks.make_fresh(), every, gloo_checks.loss)
    for name, factor in alone.lotr_factors.named_parameters():
        overlap = torch.linalg.svdvals(factor.detach().double().T @ together[name].double())
        assert overlap.min() > 1 - 1e-6, name  # the cosine of the largest angle between the two spans
