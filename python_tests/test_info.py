"""`python -m lotr_ext.info` as a person reads it, and the strategies that layers run."""

import os
import re
from unittest import mock

import pytest
import torch
from helpers import run_python
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import lotr_ext
from lotr_ext import info
from lotr_ext.core.kernel_support import build_info
from lotr_ext.core.strategy import (
    BETA_TOKENS,
    STRATEGIES,
    choose_strategy,
    strategy_from_environment,
    strategy_note,
)


def on_cuda() -> FakeTensor:
    """Returns a tensor [4, 8] that claims to be on a GPU."""
    return FakeTensor(FakeTensorMode(), torch.empty(4, 8, device="meta"), torch.device("cuda", 0))


def test_first_line_says_which_kernels_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    text = capsys.readouterr().out
    build = build_info()
    first_line = text.splitlines()[0]
    assert first_line.startswith("CPU kernels: yes; CUDA kernels: ")
    if not build["cuda"]["built"]:
        assert first_line.endswith("not built")
    elif not torch.cuda.is_available():
        assert re.search(r"built for \d+.*, no GPU here$", first_line)
    for word in (lotr_ext.__version__, torch.__version__, build["cpu"]["isa"], "cpu ", "bfloat16"):
        assert word in text, word
    assert all(len(line) < 200 for line in text.splitlines())


def test_first_line_counts_the_gpus_that_run_the_kernels() -> None:
    with (
        mock.patch.object(info, "build_info", lambda: {"cuda": {"built": True, "archs": "90a"}}),
        mock.patch.object(info, "cuda_obstacle", [None, "it is too old"].__getitem__),
        mock.patch("torch.cuda.device_count", lambda: 2),
    ):
        assert info._cuda_summary() == "built for 90a, they run on 1 of 2 GPUs here"


def test_plans_are_one_line_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    if build_info()["cuda"]["built"]:
        info.main(["--plans", "4096", "768", "768", "16"])
        assert re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE) == [
            "shrink",
            "expand_add",
            "shrink_grad",
            "factor_grad",
            "fold_grad",
        ]
    with pytest.raises(SystemExit, match=r"lotr_ext: .*expected"):
        info.main(["--plans", "4096", "768", "768", "0"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("LOTR_CPU_ISA", r"one of generic.*\(what this CPU runs\)"),
        ("LOTR_STRATEGY", "one of two_pass, beta, fused,"),
    ],
)
def test_a_wrong_variable_is_one_line_that_names_it(name: str, expected: str) -> None:
    process = run_python("-m", "lotr_ext.info", env=os.environ | {name: "wrong"})
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = process.stderr.splitlines()
    assert re.search(f"lotr_ext: {name}: expected {expected}.*got wrong", line)


@pytest.mark.parametrize("name", ["two_pass", "beta", "fused"])
def test_strategy_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets what layers run on CUDA. Layers that gemm_lotr refuses run as beta."""
    monkeypatch.setenv("LOTR_STRATEGY", name)
    assert f"strategy   {name} on CUDA" in run_python("-m", "lotr_ext.info").stdout
    monkeypatch.setattr(
        "lotr_ext.core.strategy.strategy_from_environment",
        strategy_from_environment.__wrapped__,  # not cached
    )
    has_fused = "90a" in build_info()["cuda"]["archs"]
    expected = name if name != "fused" or has_fused else "beta"
    assert choose_strategy(4, on_cuda()) == STRATEGIES[expected]
    assert choose_strategy(4, torch.empty(4, 8)) == STRATEGIES["beta"]
    assert strategy_note(8, 8, 4, torch.bfloat16, torch.device("cpu")) == ""
    if not has_fused:  # else the driver would be called
        note = strategy_note(8, 8, 4, torch.bfloat16, torch.device("cuda", 0))
        assert note.startswith(f"strategy {expected}")
        assert ("gemm_lotr" in note) == (name == "fused")


def test_default_strategy_on_cuda() -> None:
    assert choose_strategy(BETA_TOKENS, on_cuda()) == STRATEGIES["beta"]
    assert choose_strategy(BETA_TOKENS - 1, on_cuda()) == STRATEGIES["two_pass"]
