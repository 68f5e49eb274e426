"""`python -m lotr_ext.info` as a person and as a program reads it."""

from __future__ import annotations

import json
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


def test_json_is_the_same_facts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--json"])
    assert json.loads(capsys.readouterr().out) == collect()
    monkeypatch.setenv("LOTR_STRATEGY", "composite")
    paths = collect()["runs"]["cpu"]["paths"]
    assert {p["strategy"] for p in paths.values()} == {"composite"} and "LOTR_STRATEGY" in paths["float32"]["why"]
