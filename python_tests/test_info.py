"""`python -m lotr_ext.info` as a person reads it."""

import os
import re

import pytest
import torch
from helpers import run_python
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import lotr_ext
from lotr_ext.core.kernel_support import build_info
from lotr_ext.core.strategy import (
    BETA_TOKENS,
    STRATEGIES,
    choose_strategy,
    strategy_from_environment,
    strategy_note,
)
from lotr_ext.info import main


def on_cuda() -> FakeTensor:
    """Returns a tensor [4, 8] that claims to be on a GPU."""
    return FakeTensor(FakeTensorMode(), torch.empty(4, 8, device="meta"), torch.device("cuda", 0))


def test_first_line_says_which_kernels_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    build = build_info()
    first_line = text.splitlines()[0]
    assert first_line.startswith("CPU kernels: yes; CUDA kernels: ")
    if not build["cuda"]["built"]:
        assert first_line.endswith("not built")
    elif not torch.cuda.is_available():
        assert "built for 80," in first_line
        assert first_line.endswith("no GPU here")
    for word in (lotr_ext.__version__, torch.__version__, build["cpu"]["isa"], "cpu ", "bfloat16"):
        assert word in text, word
    assert all(len(line) < 200 for line in text.splitlines())


def test_plans_are_one_line_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    if build_info()["cuda"]["built"]:
        main(["--plans", "4096", "768", "768", "16"])
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert names == ["shrink", "expand_add", "shrink_grad", "factor_grad", "fold_grad"]
    with pytest.raises(SystemExit, match=r"lotr_ext: .*expected"):
        main(["--plans", "4096", "768", "768", "0"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("LOTR_CPU_ISA", r"one of generic.*\(what this CPU runs\)"),
        ("LOTR_STRATEGY", "one of two_pass, beta, fused,"),
    ],
)
def test_a_wrong_variable_is_one_line_that_names_it(name: str, expected: str) -> None:
    process = run_python("-m", "lotr_ext.info", env=os.environ | {name: "wrong"})
    assert process.returncode == 1
    assert not process.stdout
    (line,) = process.stderr.splitlines()
    assert re.search(f"lotr_ext: {name}: expected {expected}.*got wrong", line)


@pytest.mark.parametrize("name", ["two_pass", "beta", "fused"])
def test_strategy_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets what layers run on CUDA. Layers that gemm_lotr refuses run as beta."""
    monkeypatch.setenv("LOTR_STRATEGY", name)
    assert f"strategy   {name} on CUDA" in run_python("-m", "lotr_ext.info").stdout
    not_cached = strategy_from_environment.__wrapped__
    monkeypatch.setattr("lotr_ext.core.strategy.strategy_from_environment", not_cached)
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
