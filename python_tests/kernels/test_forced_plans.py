"""Kernels whose plan is not chosen among candidates (csrc/cuda/plans.h): a forced number is what is printed and launched, the
results stay right, and a number out of range is refused before anything is written."""

from __future__ import annotations

from types import ModuleType

import gemm_lotr_cases as fused
import numpy as np
import pytest

from csrc.simt.checks.arrays import ALIGNED
from csrc.simt.checks.cases import KERNELS
from csrc.simt.checks.shapes import Shape

SMS = 12
SPLIT = {  # kernel: the case that launches it, and the M, N, r, r_out of its rules
    "fold_grad": ("fold_grad", (2, 300, 20, 12)),
    "scale_backward": ("scale_backward", (200, 300, 0, 0)),
    "row_core_grad": ("rows", (200, 4, 20, 12)),  # 1 + 300 % 9 cores
}
SHAPE = Shape(200, 300, 20, ALIGNED, r2=12, layers=2, sms=SMS)


@pytest.fixture(autouse=True)
def as_before(lib: ModuleType):
    lib.set_device(multiprocessors=SMS, wgmma=True)  # gemm_lotr needs the shared memory of sm_90
    lib.set_options()
    yield
    lib.set_rules()
    lib.set_device()


def launched(lib: ModuleType, kernel: str) -> tuple[int, ...]:
    """The grid of the kernel's last launch."""
    return next(one["grid"] for one in reversed(lib.counters()["launches"]) if one["name"] == kernel)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", SPLIT)
def test_forced_splits_are_launched(lib: ModuleType, kernel: str, kind: str) -> None:
    """1, a number that divides nothing, and the largest, with which some blocks may have no row."""
    name, sizes = SPLIT[kernel]
    problem, element = KERNELS[name](SHAPE, kind), 4 if kind == "fp32" else 2
    with pytest.raises(ValueError) as error:
        lib.set_rules(forced=f"{kernel} splits=99999")
        lib.printed_plan(kernel, *sizes, element, SMS)
    most = int(str(error.value).partition("with splits from 1 to ")[2].partition(",")[0])
    assert most >= 4
    grids = set()
    for splits in (1, 3, most):
        lib.set_rules(forced=f"{kernel} M={sizes[0]} N={sizes[1]} r={sizes[2]} splits={splits}")
        text, blocks = lib.printed_plan(kernel, *sizes, element, SMS)
        assert text == f"splits={splits}"
        lib.reset_counters()
        problem.check(problem.run(lib))
        grid = launched(lib, kernel)
        assert np.prod(grid) == blocks
        grids.add(grid)
    assert len(grids) == 3
    lib.set_rules(forced=f"{kernel} M=77 splits=3")  # of another problem
    other = lib.printed_plan(kernel, *sizes, element, SMS)
    lib.set_rules()
    assert lib.printed_plan(kernel, *sizes, element, SMS) == other


@pytest.mark.parametrize("backward", [False, True])
def test_forced_gemm_lotr_is_launched(lib: ModuleType, backward: bool) -> None:
    """One block for each multiprocessor, in clusters of one block or of two. The bits do not depend on the plan."""
    case = fused.Case(600, 264, 72, 16, backward=backward, cluster=None, sms=6)
    results = {}
    for rule, text in (
        ("", "cluster=2 scouts=1 band_group=4"),
        ("gemm_lotr cluster=1", "cluster=1 scouts=1 band_group=8"),
        ("gemm_lotr M=600 N=264 r=16 scouts=3 band_group=2", "cluster=2 scouts=3 band_group=2"),
        ("gemm_lotr cluster=1 scouts=5 band_group=1", "cluster=1 scouts=5 band_group=1"),
    ):
        lib.set_rules(forced=rule)
        assert lib.printed_plan("gemm_lotr", 600, 264, 16, 0, 2, 6) == (text, 6)
        lib.reset_counters()
        results[rule] = fused.run(lib, case)
        one = lib.counters()["launches"][-1]
        assert f"cluster={one['cluster'][0]} " in text and one["grid"] == (6, 1, 1)
    assert all(bits == results[""] for bits in results.values())


@pytest.mark.parametrize(
    "rule, text",
    [
        ("gemm_lotr cluster=3", "with cluster from 1 to 2, got gemm_lotr cluster=3"),
        ("gemm_lotr cluster=1 scouts=6", "with scouts from 1 to 5, got gemm_lotr cluster=1 scouts=6"),
        ("gemm_lotr band_group=0", "with band_group from 1 to 3, got gemm_lotr band_group=0"),
    ],
)
def test_what_gemm_lotr_cannot_run_is_refused(lib: ModuleType, rule: str, text: str) -> None:
    lib.set_rules(forced=rule)
    case = fused.Case(600, 264, 72, 16, cluster=None, sms=6)
    with pytest.raises(ValueError, match=rf"LOTR_CUDA_PLAN: expected a plan of gemm_lotr for M=600 .*{text}"):
        fused.run(lib, case)
    lib.set_rules(forced="gemm_lotr M=601 cluster=3")
    fused.run(lib, case, launches=1)


@pytest.mark.parametrize("kernel", SPLIT)
def test_splits_that_a_kernel_cannot_run_are_refused(lib: ModuleType, kernel: str) -> None:
    problem = KERNELS[SPLIT[kernel][0]](SHAPE, "bf16")
    for splits in (0, 4000):
        lib.set_rules(forced=f"{kernel} splits={splits}")
        with pytest.raises(ValueError, match=rf"expected a plan of {kernel} for M=.*got {kernel} splits={splits}"):
            problem.run(lib)
    lib.set_rules()
    problem.check(problem.run(lib))


@pytest.mark.parametrize("rules", ["fold_grad rows=64", "gemm_lotr splits=2", "shrink splits=2", "scale_backward cluster=1"])
def test_a_word_of_another_kernel_is_no_rule(lib: ModuleType, rules: str) -> None:
    with pytest.raises(ValueError, match=f"LOTR_CUDA_PLAN: expected NAME=NUMBER with a name of .*, got {rules.split()[1]}"):
        lib.set_rules(forced=rules)
    with pytest.raises(
        ValueError, match="operator: expected one of shrink, expand_add, factor_grad, shrink_grad, got fold_grad"
    ):
        lib.plans("fold_grad", 1, 300, 20)
