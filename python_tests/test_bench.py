"""The benchmarks: a small run of each program writes rows. Nothing that was measured is lost.

Not here: the run on a GPU (test_bench_gpu.py), and what bench.transfer computes
(test_transfer.py).
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import run_python

from bench import accuracy, common, plot, rivals
from bench.program import DEVICE_LOST, Program
from bench.timing import Group, Step

# The options of a small run of each program.
SMALL = {
    "layer": "--shapes 32x48x40x4 --dtypes fp32,bf16",
    "model": "--models tiny-lm,tiny-encoder --dtypes fp32",
    "host": "--shapes 2x6x16x4,16x3x24x4 --wirings siblings",
    "experts": "--shapes 64x32x16x4x2x4 --dtypes fp32",
    "tasks": "--shapes 4x4x6x32x1x4",
    "kernels": "--shapes 40x24x4 --dtypes fp32",
}


def program_of(name: str) -> Program:
    return importlib.import_module(f"bench.{name}").PROGRAM


def words_of(name: str, folder: Path, *more: str) -> list[str]:
    """Returns the command line of a small run of a program, with results in a folder."""
    options = ["--device", "cpu", "--rounds", "3", "--clock", "wall", "--results", str(folder)]
    return [*SMALL[name].split(), *options, *more]


def run(name: str, folder: Path, *more: str) -> int:
    return program_of(name).main(words_of(name, folder, *more))


def rows_in(folder: Path, name: str) -> list[dict]:
    """Returns the rows of a program in a results folder, which has one folder per machine."""
    text = "".join(file.read_text() for file in folder.glob(f"*/{name}.jsonl"))
    return [json.loads(line) for line in text.splitlines()]


# ---- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_program_writes_a_row_per_rival_and_stage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, tmp_path, "--require-kernels") == 0, capsys.readouterr().err
    rows = rows_in(tmp_path, name)
    assert all(row["seconds"] > 0 and row["machine"] and row["rounds"] == 3 for row in rows)
    assert any(row["rival"].startswith("lotr_ext") for row in rows)
    assert all(row.get("error", 0) <= 2e-2 for row in rows)  # of bf16, relative to float64
    assert rows == sorted(rows, key=lambda row: row["dtype"])  # bf16 is measured first
    assert "| lotr_ext" in capsys.readouterr().out
    assert run(name, tmp_path) == 0
    assert len(rows_in(tmp_path, name)) == len(rows)  # a new measurement replaces the old one


def test_strategies_and_float32_adapters_are_rivals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu_rivals = {"frozen", "lotr_ext-two_pass", "lotr_ext-beta", "lotr_ext-fp32"}
    names = ",".join([*cpu_rivals, "lotr_ext-fused"])
    assert run("layer", tmp_path, "--dtypes", "bf16", "--rivals", names) == 1
    assert "lotr_ext, fused: ValueError: fused: it needs a GPU" in capsys.readouterr().err
    assert {row["rival"] for row in rows_in(tmp_path, "layer")} == cpu_rivals


def test_require_kernels_refuses_the_fallback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotr_ext.core.dispatch.fallback_reason", lambda call: "they are asleep")
    assert run("layer", tmp_path, "--require-kernels") == 1
    assert "they are asleep" in capsys.readouterr().err
    assert rows_in(tmp_path, "layer") == []


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("layer", "--shapes 32x48", "expected mxkxnxr"),
        ("layer", "--dtypes int8", "--dtypes: expected some of bf16"),
        ("host", "--threads 0", "--threads: expected threads, numbers of at least 1"),
        ("host", "--shapes 1x2x3x0", "expected mxlayersxkxr"),
        ("host", "--rivals lora", "--rivals: expected some of frozen"),
        ("model", "--against nowhere", "against: expected a checkout"),
        ("layer", "--threads 2 --clock cpu", "clock: expected wall on cpu with these threads"),
    ],
)
def test_bad_option_is_refused(
    name: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program_of(name).main([*words.split(), "--device", "cpu"])
    assert message in capsys.readouterr().err


# An older lotr_ext: LoTR in plain torch, with the names that bench.layer uses and no more.
OLD_PACKAGE = """
import sys

import torch
from torch import nn

sys.modules["lotr_ext.core"] = None  # an editable install would find it elsewhere
LoTRConfig = apply_lotr = None


class LoTRFactors(nn.Module):
    def __init__(self, k, n, rank, dtype, device):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(k, rank, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(n, rank, dtype=dtype, device=device))


class LoTRLinear(nn.Module):
    def __init__(self, base, factors, scaling):
        super().__init__()
        self.base = base
        self.factors = factors
        self.scaling = scaling
        self.core = nn.Parameter(torch.zeros(factors.A.shape[1], factors.B.shape[1]))

    @classmethod
    def from_linear(cls, base, factors, scaling):
        return cls(base, factors, scaling)

    def forward(self, x):
        h = x @ self.factors.A @ self.core
        return self.base(x) + self.scaling * h @ self.factors.B.T
"""


def test_two_checkouts_run_in_turns(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other checkout is older, without lotr_ext.core. Its path starts in the working folder."""
    package = tmp_path / "lotr_ext"
    package.mkdir()
    (package / "__init__.py").write_text(OLD_PACKAGE)
    (package / "_C.so").touch()  # so that it counts as built
    monkeypatch.chdir(tmp_path.parent)
    assert run("layer", tmp_path, "--dtypes", "fp32", "--against", tmp_path.name) == 0
    output = capfd.readouterr()
    assert "| lotr_ext, step" in output.out and "not measured" not in output.err


# ---- nothing is lost -----------------------------------------------------------------------------


def test_rival_with_wrong_numbers_loses_only_its_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(t: rivals.Tensors) -> rivals.Rival:
        return rivals.Rival(lambda x: 1.1 * torch.nn.functional.linear(x, t.weight, t.bias), {})

    monkeypatch.setitem(rivals.LAYERS, "lora-beta", wrong)
    assert run("layer", tmp_path) == 1
    assert "expected <= 1e-05" in capsys.readouterr().err
    measured = {row["rival"] for row in rows_in(tmp_path, "layer")}
    assert "lora-beta" not in measured and {"frozen", "lora-eager", "lotr_ext"} <= measured


# Where the rival "faulty" raises, and which rivals of its case then lack rounds. An error while a
# rival is made loses only this rival, an error in a round ends the case.
FAULTS = {"make": {"faulty"}, "first run": {"faulty"}, "third round": {"faulty", "frozen"}}


def run_faulty(fault: str, message: str, folder: Path, *more: str) -> int:
    """Runs a program of three cases, r = 1, 2, 3, with two rivals, "frozen" and "faulty".

    In the second case "faulty" raises at the place `fault`, one of FAULTS, with a message between
    two other lines. Returns the exit status.
    """
    error = RuntimeError(f"first line of many\n{message}\nCompile with TORCH_USE_CUDA_DSA")
    raises = mock.Mock(side_effect=error)
    # A step is called three times before the first round, and twice in each round.
    raises_in_third_round = mock.Mock(side_effect=chain(repeat(None, 3 + 2 * 2), repeat(error)))
    faulty_makers = {
        "make": raises,
        "first run": lambda: Step({"step": raises}),
        "third round": lambda: Step({"step": raises_in_third_round}),
    }

    def make() -> Step:
        return Step({"step": lambda _: time.sleep(1e-4)})

    def build(case: dict, options: argparse.Namespace) -> Group:
        makers = {"frozen": make, "faulty": faulty_makers[fault] if case["r"] == 2 else make}
        return Group(makers, lambda name: makers[name]())

    program = Program(
        name="faulty",
        doc="",
        rivals=["frozen", "faulty"],
        build=build,
        title_format="r {r}",
        dimensions=("r",),
        shapes={"cpu": "1,2,3"},
        options={"pattern": {"help": "has braces, as a regular expression may"}},
    )
    words = f"--device cpu --dtypes fp32 --rounds 4 --pattern x{{2}} --results {folder}"
    return program.main([*words.split(), *more])


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_measured_is_in_the_file(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_faulty(fault, "no memory", tmp_path) == 1
    rows = rows_in(tmp_path, "faulty")
    all_rivals = {(r, rival) for r in (1, 2, 3) for rival in ("frozen", "faulty")}
    complete = {(row["r"], row["rival"]) for row in rows if row["rounds"] == 4}
    assert complete == all_rivals - {(2, rival) for rival in FAULTS[fault]}
    # A case that a round has ended keeps the rows of the two rounds before.
    assert (len(rows) > len(complete)) == (fault == "third round")
    assert "r 2" in capsys.readouterr().err


def test_cuda_error_ends_the_program_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "CUDA error: an illegal memory access"
    assert run_faulty("make", message, tmp_path) == DEVICE_LOST
    assert message in capsys.readouterr().err
    assert {row["r"] for row in rows_in(tmp_path, "faulty")} == {1, 2}
    assert run_faulty("make", message, tmp_path, "--from", "3") == 0
    assert {row["r"] for row in rows_in(tmp_path, "faulty")} == {1, 2, 3}


def test_killed_program_keeps_the_rounds_that_it_measured(tmp_path: Path) -> None:
    words = words_of("layer", tmp_path, "--rounds", "1000000", "--rivals", "frozen,lotr_ext")
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.layer", *words], cwd=common.ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not rows_in(tmp_path, "layer") and time.monotonic() < deadline:
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert {row["rival"] for row in rows_in(tmp_path, "layer")} == {"frozen", "lotr_ext"}


# ---- packages and recorded runs ------------------------------------------------------------------


def test_programs_find_the_installed_package(tmp_path: Path) -> None:
    """A clone that was not built in place, and lotr_ext installed elsewhere."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    clone = tmp_path / "clone"
    for name in ("bench", "lotr_ext"):
        shutil.copytree(common.ROOT / name, clone / name, ignore=ignored)
    (tmp_path / "lotr_ext").symlink_to(common.ROOT / "lotr_ext")
    process = run_python(
        *("-c", "import bench, lotr_ext; print(lotr_ext.__file__)"),
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.strip() == str(tmp_path / "lotr_ext" / "__init__.py"), process.stderr


def test_accuracy_continues_from_recorded_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    words = (
        f"--quick --steps 12 --methods base,lotr:2,lora:1,dora:1 --jobs 1 --results {path}".split()
    )
    assert accuracy.main(words) == 0
    recorded = accuracy.runs_in(path)
    # One run of the base, which has no seeds, and three variants with three seeds.
    assert len(recorded) == 10 and recorded["loss"].notna().all()
    assert recorded["seed"].nunique() == 3
    accuracy.write(path, recorded.iloc[:-1])
    capsys.readouterr()
    assert accuracy.main(words) == 0
    output = capsys.readouterr()
    assert output.err.count("'seed'") == 1 and "ours less rival" in output.out
    # The same run has the same numbers.
    assert accuracy.runs_in(path)["loss"].iloc[-1] == recorded["loss"].iloc[-1]
    # A rate of --lr that is not on the ladder does not end a later search.
    assert accuracy.searched_rates(
        "lotr", accuracy.TASKS["teacher-half"], recorded.assign(lr=3e-3)
    ) == [8e-3, 2e-2, 4e-2]


def test_recorded_results_can_be_shown_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SMALL:
        for path in common.RESULTS.glob(f"*/{name}.jsonl"):
            assert program_of(name).main(["--show", str(path), "--device", "cpu"]) == 0
    assert "lotr_ext" in capsys.readouterr().out
    shutil.copy(common.RESULTS / "accuracy.jsonl", tmp_path)
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    # This machine has only rows of two threads.
    plot.layer(common.read(next(common.RESULTS.glob("intel*/layer.jsonl"))), tmp_path / "a.png")
    assert "threads: 2" in plot.plt.gcf().get_suptitle()
