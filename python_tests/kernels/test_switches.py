"""LOTR_CUDA_WITHOUT (csrc/cuda/switches.h) under the executor: each combination gives the numbers of the others, and runs
without what it names; with all of them off a Hopper GPU runs what an A100 does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest

from csrc.simt.checks.arrays import ALIGNED, ODD
from csrc.simt.checks.cases import KERNELS, filled
from csrc.simt.checks.shapes import Shape
from lotr_ext.ops import planner

WORDS = ("wgmma", "early", "cluster", "together")
COMBINATIONS = [",".join(words) for n in range(len(WORDS) + 1) for words in combinations(WORDS, n)]
SHAPES = [
    Shape(330, 600, 16, ALIGNED, sms=36, wgmma=True),  # shrink_grad by wgmma, whose launch is a cooperative one
    Shape(200, 300, 40, ODD, sms=filled(300), wgmma=True),  # shrink and factor_grad by wgmma
    Shape(1700, 40, 16, ALIGNED, sms=4),  # clusters of factor_grad
    Shape(1700, 40, 16, ALIGNED, sms=4, early=False),  # on an A100 a cooperative launch
]


def launches(lib, shape: Shape) -> list[dict]:
    """What runs, checked against float64."""
    found = []
    for kernel in ("shrink", "expand_add", "factor_grad", "shrink_grad", "fold"):
        problem = KERNELS[kernel](shape, "bf16")
        lib.set_options()
        lib.reset_counters()
        problem.check(problem.run(lib))
        counted = lib.counters()
        found += [one | {"wgmma": counted["wgmma"] > 0} for one in counted["launches"]]
    return found


SOME = ("", *WORDS, ",".join(WORDS))  # `make test` turns off each alone and all together


@pytest.mark.parametrize(
    "without",
    [w if w in SOME else pytest.param(w, marks=pytest.mark.full) for w in COMBINATIONS],
    ids=lambda words: words.replace(",", "-") or "none",
)
def test_each_combination_gives_the_numbers_of_the_others(lib, without: str) -> None:
    found = [one for shape in SHAPES for one in launches(lib, replace(shape, without=without))]
    clusters = any(max(one["cluster"]) > 1 for one in found)
    assert clusters == ("cluster" not in without)
    assert any(one["early"] for one in found) == ("early" not in without)
    assert any(one["cooperative"] for one in found) == ("together" not in without)
    assert any(one["wgmma"] for one in found) == ("wgmma" not in without and "cluster" not in without)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_all_off_hopper_runs_the_kernels_of_an_a100(lib, shape: Shape) -> None:
    hopper = launches(lib, replace(shape, without=",".join(WORDS)))
    older = launches(lib, replace(shape, wgmma=False, early=False, without="together"))
    assert hopper == older


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_no_cluster_is_larger_than_the_device_has_room_for(lib, most: int) -> None:
    """As on a slice of a GPU.  There the wgmma kernels do not run, and no launch is a cooperative one."""
    found = launches(lib, Shape(1010, 256, 16, sms=16, most_of_cluster=most))
    assert max(max(one["cluster"]) for one in found) == most
    assert not any(one["cooperative"] for one in found)


@pytest.mark.parametrize("words", ["wgmma,tma", "all", "wgmma early", "Wgmma"])
def test_an_unknown_word_is_an_error_that_lists_the_known(lib, words: str) -> None:
    with pytest.raises(ValueError, match="LOTR_CUDA_WITHOUT: expected words of wgmma, early, cluster, together, fused"):
        lib.set_device(without=words)
    with pytest.raises(ValueError, match="LOTR_CUDA_WITHOUT: expected words of wgmma, early, cluster, together, fused"):
        planner.switched_off(words)
    done = subprocess.run(
        [sys.executable, "-m", "lotr_ext.info"], capture_output=True, text=True, env={"LOTR_CUDA_WITHOUT": words}
    )
    assert done.returncode == 1 and "LOTR_CUDA_WITHOUT: expected words of wgmma" in done.stderr


def test_both_readers_know_the_same_words(lib) -> None:
    for word in planner.CUDA_SWITCHES:
        lib.set_device(without=word)
    lib.set_device()
    assert planner.switched_off("fused,,early") == ("early", "fused") and planner.switched_off(None) == ()
