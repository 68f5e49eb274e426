"""Plans of the CUDA kernels as Python has them: listed for a card, printed by explain, forced, refused in one line. No GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear, explain
from lotr_ext.layers.mixture import Mixture
from lotr_ext.ops import cuda_plans, planner
from lotr_ext.ops.cuda_plans import Launch

pytestmark = pytest.mark.skipif(cuda_plans.obstacle() is not None, reason="built without CUDA kernels (no nvcc)")
LAUNCH = Launch("factor_grad", 8192, 14336, 64)


def layer(rank: int = 16, **keywords: object) -> LoTRLinear:
    factors = LoTRFactors(4096, 14336, rank, device="meta")
    return LoTRLinear(4096, 14336, factors=factors, device="meta", dtype=torch.bfloat16, **keywords)


def kernels(told: planner.Plan) -> list[str]:
    return [line.split(" ")[0] for line in told.launches]


@pytest.mark.parametrize("card", cuda_plans.CARDS)
@pytest.mark.parametrize("kernel", cuda_plans.KERNELS)
def test_plans_are_those_of_the_card(card: str, kernel: str) -> None:
    found = cuda_plans.plans(Launch(kernel, 8192, 4096, 16), torch.bfloat16, card=card)
    assert len(found) >= 3 and len({plan.plan for plan in found}) == len(found)
    assert all(cuda_plans.is_plan(plan.plan) and plan.microseconds > 0 for plan in found)
    wgmma = any("wgmma=1" in plan.plan for plan in found)
    assert wgmma == (card == "h100" and kernel != "expand_add")
    least = {"h100": 18, "a100": 30, "b200": 7}[card]  # the matrix once, at the card's bandwidth
    assert least < found[0].microseconds < 5 * least, found[0]


def test_forced_rules_hold_for_a_block_of_code() -> None:
    usual = cuda_plans.plans(LAUNCH, torch.bfloat16)
    other = usual[2].plan
    with cuda_plans.forced(f"factor_grad {other}"):
        assert cuda_plans.plans(LAUNCH, torch.bfloat16)[0].plan == other
        with cuda_plans.forced("factor_grad wgmma=0"):
            assert "wgmma=0" in cuda_plans.plans(LAUNCH, torch.bfloat16)[0].plan
        assert cuda_plans.plans(LAUNCH, torch.bfloat16)[0].plan == other
    assert cuda_plans.plans(LAUNCH, torch.bfloat16) == usual


def test_bad_rules_are_one_line() -> None:
    with (
        pytest.raises(ValueError, match=r"LOTR_CUDA_PLAN: expected one of shrink, .*, got fold") as error,
        cuda_plans.forced("fold rows=1"),
    ):
        pass
    assert "\n" not in str(error.value)
    with cuda_plans.forced("factor_grad m_blocks=99999"):
        with pytest.raises(
            ValueError, match=r"expected a plan of factor_grad for M=8192 .*, got factor_grad m_blocks=99999"
        ) as error:
            cuda_plans.plans(LAUNCH, torch.bfloat16)
        assert "\n" not in str(error.value)
        assert cuda_plans.plans(LAUNCH._replace(kernel="shrink"), torch.bfloat16)
    with pytest.raises(ValueError, match="card: expected one of h100, a100, b200, got 'v100'"):
        cuda_plans.plans(LAUNCH, torch.bfloat16, card="v100")


def test_the_environment_holds_rules() -> None:
    code = (
        "import torch; from lotr_ext.ops import cuda_plans as c;"
        "print(c.plans(c.Launch('factor_grad', 8192, 14336, 64), torch.bfloat16)[0].plan)"
    )

    def run(rules: str) -> subprocess.CompletedProcess:
        place = {"PYTHONPATH": str(Path(lotr_ext.__file__).parents[1]), "LOTR_CUDA_PLAN": rules}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **place})

    assert run("factor_grad wgmma=1").stdout.startswith("wgmma=1")
    assert run("factor_grad wgmma=0").stdout.startswith("wgmma=0")
    assert "ValueError: LOTR_CUDA_PLAN: expected NAME=NUMBER" in run("factor_grad fast").stderr


def test_explain_prints_the_plans_of_a_step() -> None:
    x = torch.empty(8192, 4096, device="meta", dtype=torch.bfloat16)
    told = explain(layer(), x, device="cuda", plans="h100")
    assert kernels(told) == ["shrink", "shrink_grad", "fold_grad", "factor_grad"]  # beta: the library expands
    assert told.launches[2] == "fold_grad [1, 14336], r 16 x 16 on h100: splits=56"
    assert "[8192, 14336], r 16 on h100: wgmma=" in told.launches[1] and "us by estimate" in told.launches[1]
    assert str(told).endswith("\n  ".join(told.launches)) and explain(layer(), x, device="cuda").launches == ()
    with torch.no_grad():
        few = explain(layer(), x[:100], device="cuda", plans="a100")
    assert kernels(few) == ["shrink", "expand_add"]
    with cuda_plans.forced("shrink_grad wgmma=0"):
        assert "wgmma=0" in explain(layer(), x, device="cuda", plans=True).launches[1]
    above_64 = ["shrink", "shrink", "factor_grad", "fold_grad", "factor_grad"]
    assert kernels(explain(layer(100), x, device="cuda", plans=True)) == above_64


def test_explain_prints_the_plans_of_magnitudes_and_of_mixed_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(4, 2048, 4096, device="meta", dtype=torch.bfloat16)
    told = explain(layer(magnitude=True), x, device="cuda", plans="h100")
    assert kernels(told) == ["shrink", "expand_add", "scale_backward", "shrink_grad", "fold_grad", "factor_grad"]
    assert told.launches[2].startswith("scale_backward [8192, 14336] on h100: splits=")
    mixture = Mixture(torch.empty(3, 16, 16, device="meta"), 1.0, torch.tensor([0, 2, 1, 1]))
    monkeypatch.setattr(LoTRLinear, "mixture", mixture)
    told = explain(layer(), x, device="cuda", plans="h100")
    assert kernels(told) == ["shrink", "shrink_grad", "row_core_grad", "factor_grad"]
    assert told.launches[2].startswith("row_core_grad [8192, 3], r 16 x 16 on h100: splits=")


@pytest.mark.parametrize("rank", [16, 64])
def test_explain_prints_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Forward and backward; above rank 16, Q takes a launch of its own."""
    monkeypatch.setattr(planner, "obstacle_to_kernels", lambda *arguments: None)
    monkeypatch.setattr(planner, "fused_obstacle", lambda *arguments: None)
    planner.plan_of.cache_clear()
    x = torch.empty(8192, 4096, device="meta", dtype=torch.bfloat16)
    adapted = layer(rank)
    adapted.strategy = "fused"
    told = explain(adapted, x, device="cuda", plans="h100")
    planner.plan_of.cache_clear()
    assert kernels(told) == ["gemm_lotr", *["factor_grad"] * (rank > 16), "gemm_lotr", "fold_grad", "factor_grad"]
    assert told.launches[0] == f"gemm_lotr [8192, 14336], r {rank} on h100: cluster=2 scouts=16 band_group=4"
    with torch.no_grad(), cuda_plans.forced("gemm_lotr cluster=1 scouts=7"):
        line = cuda_plans.described(Launch("gemm_lotr", 8192, 4096, rank), torch.bfloat16, None, "h100")
    assert line.endswith("on h100: cluster=1 scouts=7 band_group=8")


@pytest.mark.parametrize(
    "launch, rule, most",
    [
        (Launch("fold_grad", 2, 14336, 16, 8), "splits=448", "splits from 1 to 448"),
        (Launch("scale_backward", 8192, 14336, 0), "splits=5", "splits from 1 to"),
        (Launch("row_core_grad", 8192, 3, 16, 8), "splits=256", "splits from 1 to 256"),
        (Launch("gemm_lotr", 8192, 14336, 16), "cluster=2 scouts=32 band_group=1", "scouts from 1 to 32"),
    ],
)
def test_plans_without_candidates_are_forced_number_by_number(launch: Launch, rule: str, most: str) -> None:
    (usual,) = cuda_plans.plans(launch, torch.bfloat16)
    with cuda_plans.forced(f"{launch.kernel} M={launch.m} N={launch.n} r={launch.r} {rule}"):
        (one,) = cuda_plans.plans(launch, torch.bfloat16)
    assert one.plan == rule != usual.plan and one.microseconds == usual.microseconds == 0
    number = most.split(" ")[0]
    with cuda_plans.forced(f"{launch.kernel} {number}=99999"):
        with pytest.raises(ValueError, match=rf"expected a plan of {launch.kernel} for M=.* with {most}.*=99999") as error:
            cuda_plans.plans(launch, torch.bfloat16)
        assert "\n" not in str(error.value)
    assert cuda_plans.plans(launch, torch.bfloat16) == [usual]


def test_explain_refuses_plans_without_a_gpu_in_mind() -> None:
    with pytest.raises(ValueError, match=r"plans: expected a GPU, got device cpu\. Pass device='cuda'"):
        explain(LoTRLinear(24, 40, 5), torch.randn(160, 24), plans=True)
    with pytest.raises(ValueError, match="card: expected one of h100, a100, b200, got 'v100'"):
        explain(LoTRLinear(24, 40, 5), torch.randn(160, 24), device="cuda", plans="v100")
