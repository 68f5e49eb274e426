"""The plans of the CUDA kernels (csrc/cuda/plan, plans.h): every candidate gives the right numbers, rules name one of them, a
remembered choice is the one that would be made anew, and the estimate keeps the choices of the model that it replaced."""

from __future__ import annotations

import numpy as np
import pytest

from csrc.simt.checks.arrays import ALIGNED, ODD
from csrc.simt.checks.cases import KERNELS
from csrc.simt.checks.shapes import Shape
from lotr_ext.ops import cuda_plans, planner

LISTED = ("shrink", "expand_add", "factor_grad", "shrink_grad")
# What the model before this one chose on an H100 in bfloat16: kernel, M, N, r: wgmma, rows, cols, m_blocks, n_blocks, of_row.
BEFORE = """
shrink 512 768 16 0 64 128 8 6 1
shrink 512 768 64 1 64 64 8 1 1
shrink 512 4096 16 0 64 128 8 16 1
shrink 512 4096 64 0 64 128 8 16 1
shrink 512 14336 16 0 64 128 8 16 1
shrink 512 14336 64 0 64 128 8 16 1
shrink 2048 768 16 1 64 64 32 1 1
shrink 2048 768 64 1 64 64 32 1 1
shrink 2048 4096 16 0 64 128 32 4 1
shrink 2048 4096 64 0 64 128 32 4 1
shrink 2048 14336 16 0 64 128 32 4 1
shrink 2048 14336 64 0 128 64 16 8 1
shrink 8192 768 16 1 64 64 128 1 1
shrink 8192 768 64 1 64 64 128 1 1
shrink 8192 4096 16 1 64 64 128 1 1
shrink 8192 4096 64 1 64 64 128 1 1
shrink 8192 14336 16 1 64 64 128 1 1
shrink 8192 14336 64 1 64 64 128 1 1
expand_add 512 768 16 0 128 64 4 12 1
expand_add 512 768 64 0 128 64 4 12 1
expand_add 512 4096 16 0 128 64 4 32 1
expand_add 512 4096 64 0 128 64 4 32 1
expand_add 512 14336 16 0 128 64 4 32 1
expand_add 512 14336 64 0 128 64 2 112 1
expand_add 2048 768 16 0 128 64 16 12 1
expand_add 2048 768 64 0 128 64 16 12 1
expand_add 2048 4096 16 0 128 64 8 16 1
expand_add 2048 4096 64 0 128 64 8 16 1
expand_add 2048 14336 16 0 128 64 4 32 1
expand_add 2048 14336 64 0 128 64 4 56 1
expand_add 8192 768 16 0 128 64 32 4 1
expand_add 8192 768 64 0 128 64 32 4 1
expand_add 8192 4096 16 0 128 64 16 8 1
expand_add 8192 4096 64 0 128 64 16 16 1
expand_add 8192 14336 16 0 128 64 8 28 1
expand_add 8192 14336 64 0 128 64 4 56 1
factor_grad 512 768 16 1 64 64 1 12 1
factor_grad 512 768 64 1 64 64 1 12 1
factor_grad 512 4096 16 1 64 64 1 64 1
factor_grad 512 4096 64 1 64 64 1 64 1
factor_grad 512 14336 16 1 64 64 1 224 1
factor_grad 512 14336 64 1 64 64 1 224 1
factor_grad 2048 768 16 0 256 32 8 24 1
factor_grad 2048 768 64 0 64 64 11 12 1
factor_grad 2048 4096 16 1 64 64 1 64 1
factor_grad 2048 4096 64 1 64 64 1 64 1
factor_grad 2048 14336 16 1 64 64 1 224 1
factor_grad 2048 14336 64 1 64 64 1 224 1
factor_grad 8192 768 16 0 256 32 8 24 1
factor_grad 8192 768 64 0 64 64 10 12 1
factor_grad 8192 4096 16 1 64 64 1 64 1
factor_grad 8192 4096 64 1 64 64 1 64 1
factor_grad 8192 14336 16 1 64 64 1 224 1
factor_grad 8192 14336 64 1 64 64 1 224 1
shrink_grad 512 768 16 1 128 128 4 6 2
shrink_grad 512 768 64 1 128 128 4 6 1
shrink_grad 512 4096 16 1 128 128 2 32 8
shrink_grad 512 4096 64 1 128 128 2 32 8
shrink_grad 512 14336 16 1 128 128 1 112 8
shrink_grad 512 14336 64 1 128 128 1 112 8
shrink_grad 2048 768 16 1 128 128 16 3 1
shrink_grad 2048 768 64 1 128 128 16 3 1
shrink_grad 2048 4096 16 1 128 128 3 32 8
shrink_grad 2048 4096 64 1 128 128 3 32 8
shrink_grad 2048 14336 16 1 128 128 2 56 8
shrink_grad 2048 14336 64 1 128 128 2 56 8
shrink_grad 8192 768 16 1 128 128 32 2 2
shrink_grad 8192 768 64 1 128 128 32 2 2
shrink_grad 8192 4096 16 1 128 128 7 16 8
shrink_grad 8192 4096 64 1 128 128 7 16 8
shrink_grad 8192 14336 16 1 128 128 2 56 8
shrink_grad 8192 14336 64 1 128 128 2 56 8
"""


@pytest.fixture(autouse=True)
def as_before(lib):
    yield
    lib.set_rules()
    lib.set_device()


def chosen_before() -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    rows = (line.split() for line in BEFORE.strip().splitlines())
    return [(name, tuple(map(int, numbers[:3])), tuple(map(int, numbers[3:]))) for name, *numbers in rows]


def test_the_best_three_have_what_was_chosen_before(lib) -> None:
    """Or it takes as long as the third: many plans of expand_add do."""
    lib.set_device(wgmma=True)
    for kernel, (m, n, r), before in chosen_before():
        plans = lib.plans(kernel, m, n, r)
        keys = [tuple(int(p[name]) for name in ("wgmma", "rows", "cols", "m_blocks", "n_blocks", "of_row")) for p in plans]
        assert before in keys, (kernel, m, n, r, before)
        took, third = plans[keys.index(before)]["microseconds"], sorted(p["microseconds"] for p in plans)[2]
        assert keys.index(before) < 3 or took <= 1.01 * third, (kernel, m, n, r, before, keys[:3])


def test_ranks_that_the_package_repeats_are_the_launchers(lib) -> None:
    assert cuda_plans.MOST_SHRINK_GRAD == lib.constants()["SHRINK_GRAD_MAX_RANK"]
    assert cuda_plans.MOST_FUSED_Q == lib.constants()["GEMM_LOTR_FACTOR_RANK"]
    x, A = np.zeros((1, 8), np.float32), np.zeros((8, planner.CUDA_MAX_RANK + 1), np.float32)
    with pytest.raises(ValueError, match=f"A: expected a rank from 1 to {planner.CUDA_MAX_RANK}, got"):
        lib.shrink(x, A, np.zeros((1, planner.CUDA_MAX_RANK + 1), np.float32))


def test_near_ties_take_more_blocks(lib) -> None:
    """factor_grad at rank 16: 64 blocks by wgmma are faster by less than the estimate's error than 128 blocks by mma."""
    lib.set_device(wgmma=True)
    first, second = lib.plans("factor_grad", 8192, 4096, 16)[:2]
    assert first["m_blocks"] * first["n_blocks"] == 128 and second["m_blocks"] * second["n_blocks"] == 64
    assert second["microseconds"] < first["microseconds"] < 1.03 * second["microseconds"]


@pytest.mark.parametrize(
    "shape", [Shape(330, 600, 16, ALIGNED, sms=36, wgmma=True), Shape(200, 264, 40, ODD, sms=12, early=False)], ids=str
)
@pytest.mark.parametrize("kernel", LISTED)
def test_every_candidate_gives_the_right_numbers(lib, kernel: str, shape: Shape) -> None:
    """The launch is the plan's."""
    lib.set_device(multiprocessors=shape.sms, wgmma=shape.wgmma, early=shape.early)
    problem, plans = KERNELS[kernel](shape, "bf16"), lib.plans(kernel, shape.m, shape.k, shape.r, 2, shape.sms)
    assert len(plans) >= 3
    try:
        for plan in plans:
            lib.set_rules(forced=f"{kernel} {plan['text']}")
            lib.set_options()
            lib.reset_counters()
            problem.check(problem.run(lib))
            x, y, _ = lib.counters()["launches"][-1]["grid"]
            assert x * y == plan["m_blocks"] * plan["n_blocks"], plan["text"]
    finally:
        lib.set_rules()


def test_a_rule_is_for_the_problems_that_it_names(lib) -> None:
    lib.set_device(wgmma=True)
    usual = lib.plan("factor_grad", 8192, 14336, 64)
    assert usual["wgmma"]
    try:
        for words, taken in [
            ("", False),
            ("M=8192 r=64", False),
            ("tokens=8192", False),
            ("M=8000", True),
            ("element=4", True),
        ]:
            lib.set_rules(forced=f"factor_grad wgmma=0 {words}; shrink_grad rows=64")
            assert lib.plan("factor_grad", 8192, 14336, 64)["wgmma"] == taken, words
        lib.set_rules(forced="factor_grad tokens=8192 wgmma=0")
        assert not lib.plan("factor_grad", 8000, 14336, 64)["wgmma"]  # up to the next of four sizes an octave
        assert lib.plan("factor_grad", 7000, 14336, 64)["wgmma"]
        lib.set_rules(measured="factor_grad wgmma=0", forced="factor_grad wgmma=1")
        assert lib.plan("factor_grad", 8192, 14336, 64)["wgmma"]
    finally:
        lib.set_rules()
    assert lib.plan("factor_grad", 8192, 14336, 64) == usual


def test_a_rule_that_no_plan_fits(lib) -> None:
    """Forced: the call raises before anything is written. Measured: the estimate decides, as for another size."""
    lib.set_device()
    problem, usual = KERNELS["shrink"](Shape(64, 64, 16, ALIGNED), "bf16"), lib.plan("shrink", 64, 64, 16)
    try:
        lib.set_rules(measured="shrink m_blocks=77")
        assert lib.plan("shrink", 64, 64, 16) == usual
        lib.set_rules(forced="shrink m_blocks=77")
        with pytest.raises(ValueError, match=r"LOTR_CUDA_PLAN: expected a plan of shrink for M=64 .*got shrink m_blocks=77"):
            problem.run(lib)
    finally:
        lib.set_rules()
    problem.check(problem.run(lib))


@pytest.mark.parametrize(
    "rules, text",
    [
        ("shrunk rows=64", "expected one of shrink, expand_add, factor_grad, shrink_grad, gemm_lotr, .*, got shrunk"),
        ("shrink rows", "expected NAME=NUMBER .* got rows"),
        ("shrink row=64", "expected NAME=NUMBER .* got row=64"),
        ("shrink rows=64; factor_grad cols=-1", "expected NAME=NUMBER .* got cols=-1"),
        ("shrink rows=99999999999999999999", "expected NAME=NUMBER .* got rows=99999999999999999999"),
    ],
)
def test_what_is_no_rule(lib, rules: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"LOTR_CUDA_PLAN: {text}"):
        lib.set_rules(forced=rules)


def test_a_remembered_choice_is_the_one_made_anew(lib) -> None:
    """Of operators, layouts and types with the same sizes, one after another in one process and each alone."""

    def launched(kernel: str, shape: Shape, kind: str) -> list[tuple]:
        lib.set_options()
        lib.reset_counters()
        problem = KERNELS[kernel](shape, kind)
        problem.check(problem.run(lib))
        return [(one["name"], one["grid"], one["block"], one["cluster"]) for one in lib.counters()["launches"]]

    shapes = [
        Shape(70, 70, 20, layout, float_factors=wide, sms=4, wgmma=on)
        for layout in (ALIGNED, ODD)
        for wide in (False, True)
        for on in (False, True)
    ]
    calls = [
        (kernel, shape, kind)
        for shape in shapes
        for kernel in ("shrink", "shrink_core", "expand_add", "factor_grad", "shrink_grad", "small")
        for kind in ("bf16", "fp32")
    ]
    lib.forget()
    together = [launched(*call) for call in calls]
    known = lib.remembered()
    assert known >= len(LISTED) and [launched(*call) for call in calls] == together and lib.remembered() == known
    for call, before in zip(calls, together, strict=True):
        lib.forget()
        assert launched(*call) == before, call


def test_a_choice_made_while_rules_change_is_not_remembered(lib) -> None:
    assert lib.remembered_of_a_choice_during_forget() == 0


def test_blocks_that_do_not_run_at_once_are_not_preferred_for_their_number(lib) -> None:
    """On 108 multiprocessors 128 blocks of rank 128, one each, take two turns: 64 blocks of twice the rows are faster."""
    lib.set_device(multiprocessors=108, shared=167936, clock=1410, memory=18.9e3, early=False)
    first, second = lib.plans("shrink", 8192, 4096, 128, 2, 108)[:2]
    assert (first["m_blocks"], second["m_blocks"]) == (64, 128) and first["microseconds"] < second["microseconds"]
