"""Every kernel of csrc/cuda as nvcc compiles it, against float64, in two orders of warps, blocks and copies: the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import gemm_lotr_cases as gemm
import numpy as np
import pytest
from conftest import Kernels

from csrc.interpreter.errors import PtxError
from csrc.simt.checks.arrays import ODD, PACKED
from csrc.simt.checks.cases import KERNELS
from csrc.simt.checks.shapes import Shape

pytestmark = pytest.mark.slow  # nvcc takes a minute

OF = Callable[[int], Kernels]
# Ragged and whole tiles, an odd layout with dropout, several blocks that share a sum.
SHAPES = [
    Shape(33, 31, 16, layers=2, sms=4),
    Shape(64, 64, 64, PACKED, sms=1, r2=24),
    Shape(65, 63, 5, ODD, 0.3, sms=7),
    Shape(130, 264, 16, sms=10, wgmma=True),
]
GPUS = [(90, "bf16"), (90, "fp16"), (80, "bf16"), (80, "fp32"), (80, "tf32")]


def cases() -> list:
    """Kernels of wgmma exist for 90 and for half types; 80 runs what an A100 would."""
    every = [(gpu, kind, k) for gpu, kind in GPUS for k in KERNELS if gpu == 90 or not k.endswith("_wgmma")]
    return [pytest.param(*case, id=f"{case[2]}-{case[1]}-sm{case[0]}") for case in every]


@pytest.mark.parametrize("gpu, kind, kernel", cases())
def test_kernel(kernels: OF, gpu: int, kind: str, kernel: str) -> None:
    of_gpu = kernels(gpu)
    largest = gpu == 90 and kernel not in ("rows", "small")  # which are made of many launches
    for shape in SHAPES if largest else SHAPES[:3]:
        problem = KERNELS[kernel](replace(shape, early=gpu == 90), kind)
        first, second = (of_gpu.bits(problem.checked, seed) for seed in (1, 2))
        assert first == second, f"{kernel} {kind} {shape}: the bits depend on the order"


def launch(case: gemm.Case) -> Callable[[ModuleType], list[bytes]]:
    def run(lib: ModuleType) -> list[bytes]:
        inputs = gemm.Inputs(case)
        out = inputs.launch(lib, gemm.new_workspace(lib, case.m))
        inputs.check(out)
        return [np.ascontiguousarray(a).tobytes() for a in out.values()]

    return run


@pytest.mark.parametrize("case", gemm.QUICK, ids=str)
def test_gemm_lotr(kernels: OF, case: gemm.Case) -> None:
    first, second = (kernels(90).bits(launch(case), seed) for seed in (1, 2))
    assert first == second, f"{case}: the bits depend on the order"


def one(name: str, **changes: object) -> Callable[[ModuleType], list[bytes]]:
    return KERNELS[name](Shape(**{"m": 130, "k": 264, "r": 16, "sms": 10, "wgmma": True} | changes), "bf16").checked


FUSED = gemm.Case(m=200, n=200, k=72, r=16, backward=True, cluster=2)
# What a GPU would punish: (the run, a pattern in the PTX of the kernels, what stands there instead).
MUTATIONS = {
    "wgmma without waiting": (launch(FUSED), r"wgmma\.wait_group\.sync\.aligned \d+;", ""),
    "wgmma without its fence": (launch(FUSED), r"wgmma\.fence\.sync\.aligned;", ""),
    "no barrier of the cluster": (launch(FUSED), r"barrier\.cluster\.\w+(\.relaxed)?\.aligned;", ""),
    "no wait for the launch ahead": (one("shrink", wgmma=False), r"griddepcontrol\.wait;", ""),
    "mbarriers without their fence": (launch(FUSED), r"fence\.mbarrier_init\.release\.cluster;", ""),
    "B as K-major": (launch(FUSED), r"(wgmma\.mma_async[^;]*), 0, 1;", r"\1, 0, 0;"),
    "another descriptor": (launch(FUSED), r"46116862933\d+", "0"),
    "fewer bytes expected": (launch(FUSED), r"(arrive\.expect_tx[^;]*), %r\d+;", r"\1, 128;"),
    "no wait for a copy": (launch(FUSED), r"mbarrier\.try_wait\.parity(\S*) done,", r"setp.eq.u32 done, 0, 0; // "),
    "one multicast block less": (one("shrink_wgmma"), r"(multicast::cluster[^;]*), %rs\d+;", r"\1, 1;"),
    "mma without transposing": (one("factor_grad", wgmma=False), r"(ldmatrix\S*)\.trans", r"\1"),
    "operands exchanged": (one("shrink", wgmma=False), r"(mma\.sync\S*\s+\{[^}]*\}, )\{([^,]*),([^,]*),", r"\1{\3,\2,"),
    "cp.async without waiting": (one("shrink", wgmma=False), r"cp\.async\.wait_group \d+;", ""),
    "no barrier": (one("factor_grad", wgmma=False), r"bar\.sync\s+0;", ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(kernels: OF, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same check, with the kernels' text changed, fails in at least one of a few orders."""
    run, pattern, instead = MUTATIONS[name]
    library = kernels(90).library
    assert any(re.search(pattern, text) for text in library.texts()), f"{name}: the pattern is in no kernel"
    monkeypatch.setattr(library, "edit", lambda text: re.sub(pattern, instead, text))
    library.forget()
    failures = 0
    for seed in range(4):
        try:
            kernels(90).bits(run, seed)
        except (PtxError, AssertionError):
            failures += 1
    monkeypatch.undo()
    library.forget()
    assert failures, f"{name}: every order passed"
