"""The benchmarks: a small run of each program writes rows. Nothing that was measured is lost."""

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

pytest.importorskip("pandas")
pytest.importorskip("scipy")

from bench import accuracy, common, gpu, plot, rivals, smoke, summary
from bench.program import DEVICE_LOST, Program
from bench.timing import Group, Step

SMALL = {
    "layer": "--shapes 32x48x40x4 --dtypes fp32,bf16",
    "model": "--models tiny-lm,tiny-encoder --dtypes fp32",
    "host": "--shapes 2x6x16x4,16x3x24x4 --wirings siblings",
    "experts": "--shapes 64x32x16x4x2x4 --dtypes fp32",
    "tasks": "--shapes 4x4x6x32x1x4",
    "kernels": "--shapes 40x24x4 --dtypes fp32",
}
NEEDS_TRANSFORMERS = ("model", "experts", "tasks")


def program_of(name: str) -> Program:
    return importlib.import_module(f"bench.{name}").PROGRAM


def words_of(name: str, folder: Path, *more: str) -> list[str]:
    usual = ["--device", "cpu", "--rounds", "3", "--clock", "wall", "--results", str(folder)]
    return [*SMALL[name].split(), *usual, *more]


def run(name: str, folder: Path, *more: str) -> int:
    return program_of(name).main(words_of(name, folder, *more))


def rows_in(folder: Path, name: str) -> list[dict]:
    """The rows of a program in a results folder, which has one folder per machine."""
    return [row for file in folder.glob(f"*/{name}.jsonl") for row in read_rows(file)]


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_program_writes_a_row_per_rival_and_stage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    assert run(name, tmp_path, "--require-kernels") == 0, capsys.readouterr().err
    rows = rows_in(tmp_path, name)
    assert all(row["seconds"] > 0 and row["machine"] and row["rounds"] == 3 for row in rows)
    assert any(row["rival"].startswith("lotr_ext") for row in rows)
    assert all(row.get("error", 0) <= 2e-2 for row in rows)
    assert rows == sorted(rows, key=lambda row: row["dtype"])  # bf16 is measured first
    assert "| lotr_ext" in capsys.readouterr().out
    assert run(name, tmp_path) == 0
    assert len(rows_in(tmp_path, name)) == len(rows)  # a new measurement replaces the old one


def test_strategies_and_float32_adapters_are_rivals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_cpu = {"frozen", "lotr_ext-two_pass", "lotr_ext-beta", "lotr_ext-fp32"}
    more = ["--dtypes", "bf16", "--rivals", ",".join([*on_a_cpu, "lotr_ext-fused"])]
    assert run("layer", tmp_path, *more) == 1
    assert "lotr_ext, fused: ValueError: fused: it needs a GPU" in capsys.readouterr().err
    assert {row["rival"] for row in rows_in(tmp_path, "layer")} == on_a_cpu


def test_require_kernels_refuses_the_fallback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kernel_support", "dispatch"):
        name = f"lotr_ext.core.{module}.kernel_obstacle"
        monkeypatch.setattr(name, lambda *arguments: "they are asleep")
    # a rank of which dispatch has not kept the answer
    assert run("layer", tmp_path, "--require-kernels", "--shapes", "32x48x40x7") == 1
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
    ],
)
def test_bad_option_is_refused(
    name: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program_of(name).main([*words.split(), "--device", "cpu"])
    assert message in capsys.readouterr().err


OLD_PACKAGE = '''"""LoTR in plain torch, with the names that bench.layer calls, without core."""
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
'''


def test_two_checkouts_run_in_turns(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is older: it has no core. It is named by a path from the working folder."""
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


# A place where a rival raises, and the rivals of its case without all rounds.
FAULTS = {"make": {"faulty"}, "first run": {"faulty"}, "third round": {"faulty", "frozen"}}


def faulty_program(fault: str, message: str) -> Program:
    """Three cases. In the second one a rival raises at the place that `fault` names."""
    error = RuntimeError(f"first line of many\n{message}\nCompile with TORCH_USE_CUDA_DSA")
    raises = mock.Mock(side_effect=error)

    # Two rounds of four calls succeed.
    raises_later = mock.Mock(side_effect=chain(repeat(None, 8), repeat(error)))
    faults = {
        "make": raises,
        "first run": lambda: Step({"step": raises}),
        "third round": lambda: Step({"step": raises_later}),
    }

    def good() -> Step:
        return Step({"step": lambda _: time.sleep(1e-4)})

    def build(case: dict, options: argparse.Namespace) -> Group:
        makers = {"frozen": good, "faulty": faults[fault] if case["r"] == 2 else good}
        return Group(makers, lambda name: makers[name]())

    shapes = {"cpu": "1,2,3"}
    return Program("faulty", "", ["frozen", "faulty"], build, "r {r}", ("r",), shapes)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_measured_is_in_the_file(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--dtypes", "fp32", "--rounds", "4", "--results", str(tmp_path)]
    assert faulty_program(fault, "no memory").main(words) == 1
    rows = rows_in(tmp_path, "faulty")
    all_rivals = {(r, rival) for r in (1, 2, 3) for rival in ("frozen", "faulty")}
    complete = {(row["r"], row["rival"]) for row in rows if row["rounds"] == 4}
    assert complete == all_rivals - {(2, rival) for rival in FAULTS[fault]}
    assert (len(rows) > len(complete)) == (fault == "third round")  # two rounds are kept
    assert "r 2" in capsys.readouterr().err


def test_cuda_error_ends_the_program_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--dtypes", "fp32", "--rounds", "2", "--results", str(tmp_path)]
    program = faulty_program("make", "CUDA error: an illegal memory access")
    assert program.main(words) == DEVICE_LOST
    assert "CUDA error: an illegal memory access" in capsys.readouterr().err
    assert {row["r"] for row in rows_in(tmp_path, "faulty")} == {1, 2}
    assert program.main([*words, "--from", "3"]) == 0
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


# ---- smoke ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", smoke.DTYPES)
def test_forms_pass_on_the_cpu(dtype: str) -> None:
    forms = smoke.forms()
    assert len(forms) > len(smoke.operator_tests().test_operators.TABLE)
    for form in forms:
        outcome = smoke.outcome_of(form, dtype, "cpu", 1)
        expected = "skipped: " if form.endswith(" fused") else "passed"
        assert outcome.startswith(expected), f"{form}: {outcome}"


@pytest.mark.parametrize(
    ("error", "expected"), [(0.0, "passed"), (0.5, "wrong: fold")], ids=["right", "wrong"]
)
def test_wrong_form_is_noticed(
    error: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = smoke.operator_tests().test_operators.TABLE
    right = table["fold"]

    def faulty(case):
        for what, result, *rest in right(case):
            result.view(-1)[3] += error
            yield what, result, *rest

    monkeypatch.setitem(table, "fold", faulty)
    assert smoke.outcome_of("fold", "bf16", "cpu", 1).startswith(expected)


# What a process does for the second of three forms, and the outcome.
FAULTY_FORMS = {
    "hang": (
        "from bench import smoke; smoke.WATCHDOG_S = 0.1; "
        "smoke.outcome_of = lambda *words: (words[-1]('3 x 4'), time.sleep(100)); "
        "smoke.child([('fold', 'bf16')], 'cpu', None)",
        "hung: 3 x 4",
    ),
    "crash": (
        "print('noise\\n@shape 3 x 4', flush=True); os.kill(os.getpid(), 11)",
        "crashed: SIGSEGV, 3 x 4: noise",
    ),
    "raise": (
        "print('@outcome failed: CUDA error: misaligned address', flush=True); sys.exit(0)",
        "failed: CUDA error",
    ),
    "wrong": ("print('@outcome wrong: 3 x 4: y', flush=True)", "wrong: 3 x 4"),
}


@pytest.mark.parametrize(("program", "outcome"), FAULTY_FORMS.values(), ids=FAULTY_FORMS)
def test_form_that_fails_keeps_the_others(program: str, outcome: str) -> None:
    """The first form passes, the second fails, the third passes, perhaps in another process."""
    jobs = [("shrink", "bf16"), ("fold", "bf16"), ("shrink", "fp16")]

    def command(jobs: list[smoke.Job]) -> list[str]:
        passed = "print('@outcome passed', flush=True)"
        lines = [program if form == "fold" else passed for form, _ in jobs]
        return [sys.executable, "-c", "\n".join(["import os, sys, time", *lines])]

    outcomes: dict[smoke.Job, str] = {}
    smoke.run_jobs(command, jobs, outcomes.__setitem__)
    assert list(outcomes) == jobs
    assert outcomes.pop(jobs[1]).startswith(outcome)
    assert set(outcomes.values()) == {"passed"}


def test_smoke_prints_and_keeps_outcomes_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--forms", "fold,layer_forward fused", "--dtypes", "bf16"]
    assert smoke.main([*words, "--shapes", "1", "--results", str(tmp_path)]) == 0
    assert "1 passed" in capsys.readouterr().out
    outcomes = {row["form"]: row["outcome"] for row in read_rows(tmp_path / "smoke.jsonl")}
    assert outcomes["fold"] == "passed" and outcomes["layer_forward fused"].startswith("skipped: ")


# ---- bench.gpu -----------------------------------------------------------------------------------


def options_of(folder: Path, budget: float = 60) -> argparse.Namespace:
    return argparse.Namespace(folder=folder, out=folder / "out", budget=budget, wheel=None)


def python_part(name: str, code: str, **fields: object) -> gpu.Part:
    return gpu.Part(name, 1.0, (sys.executable, "-c", code), **fields)


def test_parts_that_fail_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        python_part("good", "print('fine')"),
        python_part("raises", "raise RuntimeError('CUDA error: unspecified launch failure')"),
        python_part("crashes", "import os; os.kill(os.getpid(), 11)"),
        python_part("lacking", "", needs=("no-such-program",)),
        python_part(
            "last",
            "import os, tarfile; print(os.environ['PYTHONPATH'], os.environ['COLOR']);"
            f"print(tarfile.open({str(tmp_path / 'out' / 'results.tar.gz')!r}).getnames())",
            environment={"COLOR": "green"},
        ),
    ]
    assert gpu.work(parts, options_of(tmp_path)) == 1
    outcomes = summary.outcomes_in(tmp_path / "results")
    assert {name: part["outcome"] for name, part in outcomes.items()} == {
        "good": "done",
        "raises": "failed (1)",
        "crashes": "failed (-11)",
        "lacking": "skipped, needs no-such-program",
        "last": "done",
    }
    log = (tmp_path / "results" / "last.log").read_text()
    assert "green" in log and os.environ.get("PYTHONPATH", "") in log
    # The archive is written after each part.
    assert "results/good.log" in log and "results/summary.md" in log
    assert "unspecified launch failure" in capsys.readouterr().out
    assert "unspecified launch failure" in (tmp_path / "out" / "summary.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.tar.gz", "summary.md"}


def test_part_that_hangs_is_stopped_and_counts_as_a_failure(tmp_path: Path) -> None:
    hangs = python_part(
        "hangs", "import time\nprint('begun', flush=True)\nwhile True: time.sleep(9)"
    )
    assert gpu.work([hangs], options_of(tmp_path, budget=gpu.GRACE_S + 2)) == 1
    assert (tmp_path / "results" / "hangs.log").read_text().startswith("begun")
    assert "--parts hangs" in (tmp_path / "out" / "summary.md").read_text()


def test_benchmark_that_crashes_continues_with_the_next_case(tmp_path: Path) -> None:
    code = """
import os, signal, sys
first = int(sys.argv[2]) if len(sys.argv) > 1 else 1
for case in range(first, 6):
    print(f"[{case}/5] a case", flush=True)
    if case == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == 4:
        sys.exit(3)
    print(f"measured {case}", flush=True)
"""
    log = tmp_path / "log"
    part = python_part("bench", code, restarts=True)
    assert gpu.run(part, log, 60) == "failed, crashed in case 2, 4"
    measured = [line for line in log.read_text().splitlines() if line.startswith("measured")]
    assert measured == ["measured 1", "measured 3", "measured 5"]


@pytest.mark.slow
def test_quick_run_leaves_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--quick", "--parts", "info,kernels,layer", "--budget", "300"]
    assert gpu.main([*words, "--folder", str(tmp_path)]) == 0, capsys.readouterr().out
    page = " ".join((tmp_path / "summary.md").read_text().split())
    for word in ("# lotr_ext on ", "| layer | done |", "LoRA eager", "shrink 2048 x 768", "GB/s"):
        assert word in page


def test_page_of_a_gpu_says_what_to_do_next(tmp_path: Path) -> None:
    """Rows as a card would leave them."""
    folder = tmp_path / "card"
    about = {
        "machine": "A card",
        "date": "2026-12-01",
        "commit": "abc",
        "rounds": 11,
        "sm_mhz": 1700.0,
        "gpu_watts": 600.0,
        "gpu_celsius": 55.0,
        "m": 8192,
        "k": 4096,
        "n": 4096,
        "r": 16,
        "dtype": "bf16",
        "stage": "step",
    }
    times = {"frozen": 1.0, "lotr_ext-beta": 1.2, "lotr_ext-two_pass": 1.3, "lora-eager": 1.5}
    layers = [
        {**about, "rival": rival, "seconds": seconds, "over": seconds - 1}
        for rival, seconds in times.items()
    ]
    common.replace_rows(folder / "layer.jsonl", layers, ["m"])
    kernel = {"kernel": "gemm_lotr", "copy_gb_per_s": 3000.0, "gb_per_s": 900.0, "of_copy": 0.3}
    kernels = [
        {**about, **kernel, "rival": rival, "seconds": seconds}
        for rival, seconds in {"lotr_ext": 1.0, "library": 1.1, "base product": 0.9}.items()
    ]
    common.replace_rows(folder / "kernels.jsonl", kernels, ["m"])
    row = {"form": "fold", "dtype": "bf16", "outcome": "wrong: 3 x 4: F", "planned": 2}
    (tmp_path / "smoke.jsonl").write_text(json.dumps(row) + "\n")
    page = summary.page(tmp_path, {"model": {"outcome": "stopped", "seconds": 9}})
    # 50.0%: lora-eager over frozen. 30%: of a copy's bandwidth. 90%: the time of the base product
    # over gemm_lotr's. "beta in 1": the fastest strategy, and in how many layers.
    for word in ("1700 MHz", "50.0%", "30%", "90%", "remove it", "beta in 1", "--parts model"):
        assert word in page
    assert page.index("fold") < page.index("## What to do next")


# ---- the rest ------------------------------------------------------------------------------------


def test_programs_find_the_installed_package(tmp_path: Path) -> None:
    """A clone that was not built in place, and lotr_ext installed elsewhere."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    clone = tmp_path / "clone"
    for name in ("bench", "lotr_ext"):
        shutil.copytree(common.ROOT / name, clone / name, ignore=ignored)
    (tmp_path / "lotr_ext").symlink_to(common.ROOT / "lotr_ext")
    program = "import bench, lotr_ext; print(lotr_ext.__file__)"
    process = run_python("-c", program, cwd=clone, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.strip() == str(tmp_path / "lotr_ext" / "__init__.py"), process.stderr


def test_accuracy_continues_from_recorded_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    usual = "--quick --steps 12 --methods base,lotr:2,lora:1 --jobs 1".split()
    words = [*usual, "--results", str(path)]
    assert accuracy.main(words) == 0
    recorded = accuracy.runs_in(path)
    assert len(recorded) == 7 and recorded["loss"].notna().all()
    assert recorded["seed"].nunique() == 3
    accuracy.write(path, recorded.iloc[:-1])
    capsys.readouterr()
    assert accuracy.main(words) == 0
    output = capsys.readouterr()
    assert output.err.count("'seed'") == 1 and "ours less rival" in output.out
    # The same run has the same numbers.
    assert accuracy.runs_in(path)["loss"].iloc[-1] == recorded["loss"].iloc[-1]


def test_recorded_results_can_be_shown_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [path for path in common.RESULTS.rglob("*.jsonl") if path.stem in SMALL]
    assert files
    for path in files:
        assert program_of(path.stem).main(["--show", str(path), "--device", "cpu"]) == 0
    assert "lotr_ext" in capsys.readouterr().out
    shutil.copy(common.RESULTS / "accuracy.jsonl", tmp_path)
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_dry_run_lists_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    for words in ("bench.smoke", "cuda and not full", "--kernel-name kns=lotr", "--clock wall"):
        assert words in output
