"""A benchmark told to use a lower instruction set does, libraries and all, and its results say so."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench import host, layer
from bench.measure import isa, session
from bench.measure.store import ROOT, Store
from bench.report import tables

QUICK = ["--device", "cpu", "--threads", "1", "--rounds", "1", "--slice", "0.001", "--rivals", "frozen,lotr_ext"]


def test_it_is_held_to_what_it_is_told(tmp_path):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    command = [sys.executable, "-m", "bench.layer", "--isa", "avx2", *QUICK, "--shapes", "8x16x16x2", "--dtypes", "fp32"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = Store(tmp_path / "layer.jsonl").read()
    assert {cell["rival"] for cell in cells} == {"frozen", "lotr_ext"}
    for cell in cells:
        assert cell["isa"] == "avx2" and cell["machine"]["isa"] == "AVX2" and "held to AVX2" in cell["machine"]["name"]
    assert "--isa avx2" in tables.layer_command(cells)
    del cells[-1]["isa"]  # as results were before
    assert "isa" not in tables.layer_command(cells)


def test_the_program_starts_again_once(monkeypatch):
    started = []
    monkeypatch.setattr(isa.os, "execve", lambda path, argv, environment: started.append((argv, environment)))
    for name in isa.ISAS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    isa.restart_if_asked(["--threads", "1"])
    isa.restart_if_asked(["--isa", "mmx"])
    isa.restart_if_asked(["--isa"])
    assert not started and isa.held_to() is None
    isa.restart_if_asked(["--threads", "1", "--isa=avx2"])
    ((argv, environment),) = started
    assert argv == [sys.executable, *sys.orig_argv[1:]] and isa.ISAS["avx2"].items() <= environment.items()
    for name, value in isa.ISAS["avx2"].items():
        monkeypatch.setenv(name, value)
    isa.restart_if_asked(["--isa", "avx2"])
    assert len(started) == 1 and isa.held_to() == "avx2"


def test_it_refuses(monkeypatch):
    with pytest.raises(ValueError, match="isa: expected one of avx2, avx512, got 'mmx'"):
        layer.arguments(["--device", "cpu", "--isa", "mmx"])
    monkeypatch.delenv("LOTR_CPU_ISA", raising=False)
    with pytest.raises(ValueError, match=r"isa: expected a process started with LOTR_CPU_ISA=avx2 .*, got one in which"):
        host.arguments(["--device", "cpu", "--isa", "avx2"])
    with pytest.raises(ValueError, match="isa: expected --device cpu beside it, got cuda"):
        isa.check_isa("avx2", "cuda")


def test_what_was_kept_before_the_option_is_of_the_machine_itself(tmp_path, monkeypatch):
    options = layer.arguments([*QUICK, "--results", str(tmp_path)])
    kept = session.Session(options, "layer.jsonl", slice=options.slice)
    case = layer.Case(8, 16, 16, 2, "fp32", 1)
    kept.keep(case, [{"rival": "frozen"}])
    text = kept.store.path.read_text().replace('"isa": null, ', "")
    assert '"isa"' in text  # the machine's
    kept.store.path.write_text(text)
    again = session.Session(options, "layer.jsonl", slice=options.slice)
    assert [cell["rival"] for cell in again.kept(case, ["frozen"])] == ["frozen"]
