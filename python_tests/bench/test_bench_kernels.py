"""The benchmark of single kernels: both sides are checked, the bounds are the work's, and without a GPU it says so."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from bench import kernels
from bench.measure.session import start
from bench.measure.store import Store
from bench.rivals import operators

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1", "--dtypes", "fp32"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", operators.KERNELS)
def test_both_sides_compute_the_same(kernel, dtype):
    case = operators.KernelCase(kernel, 10, 24, 3, dtype, 1)
    errors = operators.errors(operators.make(case, CPU))
    assert max(errors.values()) < {"fp32": 1e-6, "bf16": 2e-2}[dtype]


@pytest.mark.parametrize(
    ("kernel", "flops", "elements", "sums"),
    [
        ("shrink", 2 * 10 * 24 * 3, 10 * 24 + 24 * 3 + 10 * 3, 0),
        ("expand_add", 2 * 10 * 24 * 3, 2 * 10 * 24 + 24 * 3 + 10 * 3, 0),
        ("factor_grad", 2 * 10 * 24 * 3, 10 * 24 + 10 * 3, 2 * 24 * 3),
        ("shrink_grad", 4 * 10 * 24 * 3, 10 * 24 + 24 * 3 + 2 * 10 * 3, 2 * 24 * 3),
    ],
)
def test_least_work(kernel, flops, elements, sums):
    work = operators.make(operators.KernelCase(kernel, 10, 24, 3, "bf16", 1), CPU).work
    assert work == (flops, 2 * elements + 4 * sums)


def test_it_measures_keeps_resumes_and_names_what_fails(tmp_path, monkeypatch, capsys):
    arguments = [*QUICK, "--shapes", "8x16x2", "--kernels", "shrink,fold", "--results", str(tmp_path)]
    assert kernels.main(arguments) == 0
    cells = Store(tmp_path / "kernels.jsonl").read()
    assert [(cell["case"]["kernel"], cell["rival"]) for cell in cells] == [
        (kernel, rival) for kernel in ("shrink", "fold") for rival in ("library", "lotr_ext")
    ]
    assert all(cell["step"]["of_bound"] > 0 for cell in cells)
    capsys.readouterr()
    assert kernels.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 of 2 cases are in" in out and re.search(r"^ *shrink +8 x 16, 2", out, re.MULTILINE)  # and shown
    monkeypatch.setattr(operators, "errors", lambda operator: {"ours": 1.0, "library": 0.0})
    assert kernels.main([*arguments, "--fresh"]) == 1
    out = capsys.readouterr().out
    for kernel in ("shrink", "fold"):
        assert f"not measured: {kernel} 8x16 r2 fp32 t1: ArithmeticError: relative error expected" in out
    assert len(Store(tmp_path / "kernels.jsonl").read()) == len(cells)


def test_default_cases_are_where_each_kernel_runs():
    cases = kernels.cases_of(kernels.arguments(QUICK))
    assert {case.kernel for case in cases} == set(operators.KERNELS)
    for case in cases:
        assert (case.m == kernels.LAYERS) == case.kernel.startswith("fold")


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SystemExit, match=r"^bench.kernels: device: expected a GPU for the CUDA kernels, found none; --device cpu"
    ):
        start("bench.kernels", lambda: kernels.main([]))


def test_plans_that_the_estimate_calls_close_are_measured_beside_the_chosen_one(tmp_path, monkeypatch, capsys):
    """On a CPU, with plans as a GPU would have them: which are close, that each runs and is checked under its own rule."""
    rules, made = [], [("a=1", 10.0), ("a=2", 10.5), ("a=3", 11.0), ("a=4", 10.9), ("a=5", 12.0)]
    plans = [kernels.cuda_plans.CudaPlan(plan, 1, us) for plan, us in made]
    monkeypatch.setattr(kernels.cuda_plans, "plans", lambda launch, dtype, device: plans)

    @contextlib.contextmanager
    def forced(rule):
        rules.append(rule)
        yield

    monkeypatch.setattr(kernels.cuda_plans, "forced", forced)
    given = ["--shapes", "8x16x2", "--kernels", "shrink,fold", "--results", str(tmp_path)]
    with pytest.raises(ValueError, match="plans: only the CUDA kernels have plans"):
        kernels.main([*QUICK, *given, "--plans"])
    options = kernels.arguments([*QUICK, *given])
    options.plans = True
    monkeypatch.setattr(kernels, "arguments", lambda argv: options)
    assert kernels.main([]) == 0
    cells = Store(tmp_path / "kernels.jsonl").read()
    assert [c["rival"] for c in cells] == ["library", "lotr_ext", "shrink a=2", "shrink a=3", "library", "lotr_ext"]
    assert set(rules) == {"shrink a=2", "shrink a=3"} and "shrink" in capsys.readouterr().out
