"""`python -m lotr_ext.info` as a person and as a program reads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lotr_ext
from lotr_ext.info import collect, main


def test_text_says_what_was_built_and_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text, facts = capsys.readouterr().out, collect()
    for piece in (lotr_ext.__version__, torch.__version__, facts["built"]["cpu"]["isa"], "cpu:", "two_pass", "bfloat16"):
        assert piece in text, piece
    assert ("no kernels built" in text) == (not facts["built"]["cuda"]["built"])
    assert all(len(line) < 200 for line in text.splitlines())


def test_json_is_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    assert json.loads(capsys.readouterr().out) == collect()


def test_an_extension_that_does_not_load_is_one_line(tmp_path) -> None:
    """One that is cut off, and one in a zip file, from which Python could import the modules."""
    package = tmp_path / "lotr_ext"
    shutil.copytree(Path(lotr_ext.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.abi3.so").write_bytes(b"cut off")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "lotr_ext")
    cut = ("expected a compiled extension that loads, got ", str(package / "_C.abi3.so"), "build it again with `pip ")
    zipped = ("expected a package in a folder, got ", f"{archive}/lotr_ext", "install it with pip")
    for path, pieces in {str(tmp_path): cut, archive: zipped}.items():
        command = [sys.executable, "-m", "lotr_ext.info"]
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=tmp_path.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
        assert [piece for piece in pieces if piece not in done.stderr] == [], done.stderr


def test_a_wrong_variable_is_a_line_that_names_it() -> None:
    """LOTR_CPU_ISA and LOTR_CUDA_WITHOUT end the command. A strategy that one device refuses may run on another."""

    def info(**wrong: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lotr_ext.info"]
        return subprocess.run(command, env=os.environ | wrong, capture_output=True, text=True)

    for name, expected in {"LOTR_CPU_ISA": "one of generic", "LOTR_CUDA_WITHOUT": "words of wgmma"}.items():
        done = info(**{name: "wrong"})
        assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
        assert f"lotr_ext: {name}: expected {expected}" in done.stderr and "got wrong" in done.stderr
    for word, expected in {"wrong": "one of composite", "fused": "a strategy that runs here"}.items():
        done = info(LOTR_STRATEGY=word)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert f"float32   error: LOTR_STRATEGY: expected {expected}" in done.stdout and f"got '{word}'" in done.stdout


def test_what_the_environment_switches_is_shown() -> None:
    """As it is when the package is imported."""
    both = "from lotr_ext.info import main; main([]); print('as JSON:'); main(['--json'])"
    environment = os.environ | {"LOTR_CUDA_WITHOUT": "early,wgmma", "LOTR_STRATEGY": "composite"}
    done = subprocess.run([sys.executable, "-c", both], capture_output=True, text=True, check=True, env=environment)
    text, _, facts = done.stdout.partition("as JSON:")
    assert "LOTR_CUDA_WITHOUT turns off wgmma, early" in text
    assert json.loads(facts)["cuda"]["without"] == ["wgmma", "early"]
    paths = json.loads(facts)["runs"]["cpu"]["paths"]
    assert {p["strategy"] for p in paths.values()} == {"composite"} and "LOTR_STRATEGY" in paths["float32"]["why"]
