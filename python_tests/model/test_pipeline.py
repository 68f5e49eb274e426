"""Pipelines of torch.distributed.pipelining in gloo processes, against one process (`gloo_pipeline`)."""

from __future__ import annotations

from pathlib import Path

import gloo_pipeline as pipelines
import pytest
import torch
from gloo import values_of

from lotr_ext import PipelineStages, load_adapter, lotr_parameters, parameter_groups, save_adapter
from nets import relative

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CHECKS = ("ways", "refusals", "alone")  # `alone` is the last: it breaks the connection
OF_FOUR = ("of_four", "meshes")
ROUNDING = 1e-12  # of float64


def values(checks: tuple[str, ...], folder: Path, world: int) -> dict[str, list]:
    named = values_of([f"gloo_pipeline:{check}" for check in checks], folder, world=world)
    return {name.partition(":")[2]: own for name, own in named.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each check returned in both processes."""
    return values(CHECKS, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    return values(OF_FOUR, tmp_path_factory.mktemp("four"), 4)


def check_way(entry: dict, sums: int) -> None:
    assert entry.pop("sums") == sums and entry.pop("clipped")
    assert entry.keys() == {"gradients", "norm", "trained", "saved", "loaded"}
    assert max(entry.values()) < ROUNDING, entry


@pytest.mark.parametrize("way", pipelines.WAYS)
def test_a_pipeline_is_one_process_and_sums_once_a_step(found: dict, way: str) -> None:
    for by_rank in found["ways"]:
        check_way(by_rank[way], sums=0 if "frozen" in way or "without layers" in way else 1)


@pytest.mark.full
def test_a_pipeline_of_four_processes_is_one_process(of_four: dict) -> None:
    for by_rank in of_four["of_four"]:
        assert len(by_rank) == 3
        for entry in by_rank.values():
            check_way(entry, sums=1)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor parallel"])
def test_stages_that_are_shared_over_another_dimension_of_a_mesh(of_four: dict, kind: str) -> None:
    for by_rank in of_four["meshes"]:
        assert max(by_rank[kind].values()) < ROUNDING, by_rank[kind]


def test_stages_that_do_not_fit_are_refused_in_all_processes(found: dict) -> None:
    first, second = found["refusals"]
    for refused in (first, second):
        assert refused["none"].startswith("TypeError: stages: expected at least one module")
        assert refused["other rank"].startswith("ValueError: stages: expected lotr_factors.12x12.A to be float64 [12, 4]")
        assert "got float32 [12, 4], trained in process 1" in refused["other dtype"]
        assert "got other values in process 1" in refused["other values"]
        assert "got 'blocks.0.up' in processes 0 and 1" in refused["one stage twice"]
        assert "lotr_cores to make the cores of all 12 layers, got one for 6 layers" in refused["cores of each stage"]
    assert second["no module"].startswith("TypeError: stages: expected modules, got str")
    assert "in process 1: TypeError: stages: expected modules, got str" in first["no module"]
    assert second["without values"].startswith("RuntimeError: stages: expected whole tensors with values, got blocks.2.up.core")
    assert "in process 1: RuntimeError: stages: expected whole tensors" in first["without values"]


def test_files_of_stages_that_do_not_fit_are_refused_in_all_processes(found: dict) -> None:
    first, second = found["refusals"]
    for refused in (first, second):
        assert "got a stage of a pipeline; pass the PipelineStages" in refused["a stage saved"]
        assert "got a stage of a pipeline; pass the PipelineStages" in refused["a stage loaded"]
        assert refused["other layers"].startswith("ValueError: layers: expected the adapter's 4 layers")
        assert refused["apart"].startswith("ValueError: save_adapter: expected the same lotr_factors.12x12.A in all stages")
        assert refused["unchanged"] and refused["left"] == []
    assert second["a path"].startswith("TypeError: directory") and "in process 1: TypeError: directory" in first["a path"]
    assert second["other file in process 1"].startswith("ValueError: lotr_factors.12x20.A: expected float64 [12, 4]")
    assert "in process 1: ValueError: lotr_factors.12x20.A" in first["other file in process 1"]


def test_a_process_that_saves_alone_and_the_others_end_with_an_error(found: dict) -> None:
    waiting, saving = found["alone"]
    assert saving["save"].startswith("RuntimeError: save_adapter: expected all processes to call it together")
    assert waiting["sum"].startswith("RuntimeError") and waiting["left"] == "False"


def test_all_stages_in_one_process_without_a_process_group(tmp_path: Path) -> None:
    parts = [pipelines.cut(pipelines.whole(), i, 2) for i in range(2)]
    stages, alone = PipelineStages(*parts), pipelines.whole()
    x, target = pipelines.batch()
    for net in (alone, lambda x: parts[1](parts[0](x))):
        pipelines.loss(net(x), target).backward()
    stages.reduce_gradients()
    want = {name: p.grad for name, p in alone.named_parameters()}
    got = pipelines.trained(stages)
    assert max(relative(p.grad, want[name]) for name, p in got.items()) < ROUNDING
    heads = sum("head" in name for name in got)
    copies = 2  # A and B of the group of which both stages have layers
    assert len(list(lotr_parameters(stages))) == len(got) - heads + copies
    assert [group["name"] for group in parameter_groups(stages)] == ["cores", "factors", "other"]
    save_adapter(stages, tmp_path)
    loaded = load_adapter(pipelines.base(), tmp_path)
    torch.testing.assert_close(loaded(x), alone(x), rtol=ROUNDING, atol=ROUNDING)
