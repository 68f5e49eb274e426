"""The benchmark of the shared gradient counts what one sum saves, and its ways of summing agree."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import shared
from bench.measure.session import time_text
from bench.measure.store import ROOT, Store

QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1"]


def test_it_counts_what_one_sum_saves(tmp_path, capsys):
    arguments = [*QUICK, "--layers", "2,6", "--shape", "128x96x4", "--results", str(tmp_path)]
    assert shared.main(arguments) == 0
    cells = {(c["rival"], c["case"]["layers"]): c for c in Store(tmp_path / "shared.jsonl").read()}
    assert set(cells) == {(rival, layers) for rival in shared.LABELS for layers in (2, 6)}

    def more(rival: str, field: str) -> int:
        return cells[rival, 6][field] - cells[rival, 2][field]

    assert more("autograd", "tensors") >= 4 * 3  # a dA, a dB and their sums a layer
    assert more("lotr_ext", "tensors") <= 4  # Q alone
    assert more("lotr_ext-scope", "tensors") == 0  # Q goes into the bank
    assert more("lotr_ext", "launches") < more("autograd", "launches")
    for rival in ("lotr_ext", "lotr_ext-scope"):
        assert more(rival, "allocated_bytes") < more("autograd", "allocated_bytes")
    for cell in cells.values():
        assert cell["error"] < 1e-5
        assert cell["forward"]["seconds"][1] + cell["backward"]["seconds"][1] == pytest.approx(cell["step"]["seconds"][1])
    capsys.readouterr()
    assert shared.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 of 2 cases are in" in out
    for layers in (2, 6):
        low, _, high = map(time_text, cells["lotr_ext", layers]["step"]["seconds"])
        assert f"{layers} layers 128x96x96 r4 fp32 t1" in out and f"{low}, {high}" in out


def test_a_wrong_gradient_loses_its_case_alone(tmp_path, monkeypatch, capsys):
    right = shared.Stack.forward

    def wrong(self, x):
        if len(self.layers) == 2 and not self.plain:
            self.factors.A.register_hook(lambda grad: 1.01 * grad)
        return right(self, x)

    monkeypatch.setattr(shared.Stack, "forward", wrong)
    assert shared.main([*QUICK, "--layers", "2,3", "--shape", "32x16x4", "--results", str(tmp_path)]) == 1
    line = "ArithmeticError: lotr_ext: dA: relative error expected <= 2e-05, got 1.0e-02"
    assert f"not measured: 2 layers 32x16x16 r4 fp32 t1: {line}" in capsys.readouterr().out
    assert {cell["case"]["layers"] for cell in Store(tmp_path / "shared.jsonl").read()} == {3}


PROGRAM = """
import resource, torch
from bench.measure.session import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12 << 20)  # 48 MiB: more than what malloc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
faults(); first = faults()
kept = keep_memory()
faults(); print(kept, first, faults())
"""


def test_the_allocator_keeps_memory_between_calls():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library's malloc is not glibc's")
    assert int(after) < int(before) / 4 and int(before) > 100
