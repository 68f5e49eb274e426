"""`python -m lotr_ext.info` as a person reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lotr_ext
from lotr_ext.core.kernel_support import build_info
from lotr_ext.info import main


def test_first_line_says_which_kernels_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text, built = capsys.readouterr().out, build_info()
    first = text.splitlines()[0]
    assert first.startswith("CPU kernels: yes; CUDA kernels: ")
    if not built["cuda"]["built"]:
        assert first.endswith("not built")
    elif not torch.cuda.is_available():
        assert "built for 80," in first and first.endswith("no GPU here")
    for piece in (lotr_ext.__version__, torch.__version__, built["cpu"]["isa"], "cpu ", "bfloat16"):
        assert piece in text, piece
    assert all(len(line) < 200 for line in text.splitlines())


def test_plans_are_a_line_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    if build_info()["cuda"]["built"]:
        main(["--plans", "4096", "768", "768", "16"])
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert names == ["shrink", "expand_add", "shrink_grad", "factor_grad", "fold_grad"]
    with pytest.raises(SystemExit, match=r"lotr_ext: .*expected"):
        main(["--plans", "4096", "768", "768", "0"])


def test_a_wrong_variable_is_one_line_that_names_it() -> None:
    command, env = [sys.executable, "-m", "lotr_ext.info"], os.environ | {"LOTR_CPU_ISA": "wrong"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    assert (
        "lotr_ext: LOTR_CPU_ISA: expected one of generic" in done.stderr
        and "got wrong" in done.stderr
    )
