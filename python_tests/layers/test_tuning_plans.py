"""tune times plans of the CUDA kernels, on a card that is told of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lotr_ext.layers import tuning
from lotr_ext.ops import cuda_plans, planner, tuned
from lotr_ext.ops.tuned import Answer

pytestmark = pytest.mark.usefixtures("cache")


CUDA = torch.device("cuda", 0)
with_kernels = pytest.mark.skipif(cuda_plans.obstacle() is not None, reason="built without CUDA kernels")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """An H100 whose clock says for each plan what the test puts here, by a part of its text; 1 us else."""
    took: dict[str, float] = {}
    listed, forced = cuda_plans.plans, []

    def seconds(device: torch.device, run, repeats: int) -> float:
        plan = listed(run(), torch.bfloat16)[0].plan
        forced.append(plan)
        return next((time for part, time in took.items() if part in plan), 1e-6)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(tuned, "machine", lambda device: ("NVIDIA H100", "580"))
    monkeypatch.setattr(cuda_plans, "plans", lambda launch, dtype, device=None, card="h100": listed(launch, dtype))
    monkeypatch.setattr(planner, "fused_obstacle", lambda *arguments: "none here")
    run_of = tuning.run_of
    monkeypatch.setattr(
        tuning, "run_of", lambda problem, name: (lambda: problem.launch) if problem.launch else run_of(problem, name)
    )
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    return took


def launch_problem(kernel: str = "factor_grad") -> tuned.Problem:
    launch = cuda_plans.Launch(kernel, 8192, 14336, 64)
    return tuned.Problem.of_launch(CUDA, torch.bfloat16, launch, cuda_plans.plans(launch, torch.bfloat16)[0].plan)


@with_kernels
def test_the_fastest_plan_is_taken_here_and_by_later_processes(card, cache: Path) -> None:
    problem = launch_problem()
    first, second, third = [plan.plan for plan in cuda_plans.plans(problem.launch, torch.bfloat16)[:3]]
    card[third] = 0.9e-6
    answer = tuning._answers([problem], False)[problem]
    assert answer == Answer(third, {first: 1e-6, second: 1e-6, third: 0.9e-6})

    def takes(m: int = 8192, kernel: str = "factor_grad") -> str:
        return cuda_plans.plans(cuda_plans.Launch(kernel, m, 14336, 64), torch.bfloat16)[0].plan

    assert takes() == third
    tuned.load()
    assert takes() == third  # from the file
    with cuda_plans.forced(f"factor_grad {second}"):
        assert takes() == second
    row = json.loads(cache.read_text())["answers"][0]
    assert (row["form"], row["tokens"], row["k"], row["r_in"], row["machine"]) == (
        "factor_grad",
        8192,
        14336,
        64,
        "NVIDIA H100",
    )
    cache.write_text(cache.read_text().replace("NVIDIA H100", "another card"))
    tuned.load()
    assert takes() == first


@with_kernels
def test_a_plan_must_be_2_percent_faster_than_the_estimate_s(card) -> None:
    problem = launch_problem("shrink")
    card[cuda_plans.plans(problem.launch, torch.bfloat16)[1].plan] = 0.99e-6
    assert tuning._answers([problem], False)[problem].strategy == problem.usual


@with_kernels
@pytest.mark.parametrize("wrong", ["fastest", "fast=1", "rows=1; shrink rows=2", "rows=-1", ""])
def test_a_plan_that_cannot_be_one_is_ignored(card, cache: Path, wrong: str) -> None:
    problem = launch_problem()
    tuning._answers([problem], False)
    content = json.loads(cache.read_text())
    content["answers"][0] |= {"strategy": wrong, "seconds": {wrong: 1e-6}} | ({} if wrong else {"tokens": -1})
    cache.write_text(json.dumps(content))
    tuned._warned.clear()
    with pytest.warns(UserWarning, match="got 1 that cannot be ones"):
        tuned.load()
    assert cuda_plans.plans(problem.launch, torch.bfloat16)[0].plan == problem.usual


@with_kernels
def test_the_launches_of_a_layer_are_timed_before_it(card, monkeypatch) -> None:
    """Those of both directions, once each; none on a CPU."""
    layer = tuned.Problem(CUDA, torch.bfloat16, torch.float32, 2048, 4096, 14336, 16, 16, "siblings", True, "beta")
    seen: list[str] = []
    monkeypatch.setattr(
        tuning, "measure", lambda problem: seen.append(problem.form) or Answer(problem.usual, {problem.usual: 1.0})
    )
    tuning._answers([layer, layer._replace(step=False)], False)
    assert seen == ["shrink", "expand_add", "shrink_grad", "factor_grad", "expand_add", "siblings", "siblings"]
    assert tuning.launches_of(layer._replace(device=torch.device("cpu"))) == []
