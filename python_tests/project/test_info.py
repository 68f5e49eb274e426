"""`python -m lotr_ext.info` as a person and as a program reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import lotr_ext
from lotr_ext.info import collect, main


def test_text_says_what_was_built_and_what_runs() -> None:
    text = subprocess.run([sys.executable, "-m", "lotr_ext.info"], capture_output=True, text=True, check=True).stdout
    facts = collect()
    for piece in (lotr_ext.__version__, torch.__version__, facts["built"]["cpu"]["isa"], "cpu:", "two_pass", "bfloat16"):
        assert piece in text, piece
    assert ("no kernels built" in text) == (not facts["built"]["cuda"]["built"])
    assert all(len(line) < 200 for line in text.splitlines())


def test_json_is_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    assert json.loads(capsys.readouterr().out) == collect()


def test_the_environment_forces_a_strategy() -> None:
    """As it is when the package is imported."""
    command = [sys.executable, "-m", "lotr_ext.info", "--json"]
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"LOTR_STRATEGY": "composite"}
    ).stdout
    paths = json.loads(text)["runs"]["cpu"]["paths"]
    assert {p["strategy"] for p in paths.values()} == {"composite"} and "LOTR_STRATEGY" in paths["float32"]["why"]
