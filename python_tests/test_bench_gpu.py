"""The run on a GPU, bench.gpu: nothing is lost when a part of it hangs, crashes or is wrong.

bench.smoke runs every operator in every form. bench.gpu runs it and the other parts, each a program
with a log, and bench.summary writes what came out on one page, summary.md.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from bench import common, gpu, smoke, summary

# ---- smoke ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", smoke.DTYPES)
def test_forms_pass_on_the_cpu(dtype: str) -> None:
    forms = smoke.forms()
    assert len(forms) > len(smoke.operator_tests().test_operators.TABLE)
    for form in forms:
        outcome = smoke.outcome_of(form, dtype, "cpu", 1)
        expected = "skipped: " if form.endswith(" fused") else "passed"
        assert outcome.startswith(expected), f"{form}: {outcome}"


def test_wrong_form_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = smoke.operator_tests().test_operators.TABLE
    fold = table["fold"]

    def fold_with_an_error(case):
        for what, result, *rest in fold(case):
            result.view(-1)[3] += 0.5  # one number
            yield what, result, *rest

    monkeypatch.setitem(table, "fold", fold_with_an_error)
    assert smoke.outcome_of("fold", "bf16", "cpu", 1).startswith("wrong: fold")


# A child process of smoke in which a form hangs. Its watchdog waits 0.1 s.
HANG = """
from bench import smoke

def outcome_of(form, dtype, device, shapes, before):
    before("3 x 4")
    time.sleep(100)

smoke.WATCHDOG_S = 0.1
smoke.outcome_of = outcome_of
smoke.child([("fold", "bf16")], "cpu", None)
"""
# What a process does for the second of three forms, and the outcome that is reported.
FAULTY_FORMS = {
    "hang": (HANG, "hung: 3 x 4"),
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
    """The forms before and after it pass, even if its process has ended."""
    jobs = [("shrink", "bf16"), ("fold", "bf16"), ("shrink", "fp16")]

    def command(jobs: list[smoke.Job]) -> list[str]:
        # A process that passes each job, except for fold.
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
    outcomes = common.read(tmp_path / "smoke.jsonl").set_index("form")["outcome"]
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
        # It leaves a child, which must be ended before it writes a file.
        python_part(
            "leaves",
            "import os; os.spawnlp(os.P_NOWAIT, 'sh', 'sh', '-c', "
            f"'sleep 0.5; touch {tmp_path / 'late'}')",
        ),
        python_part(
            "last",
            "import os, tarfile, time; print(os.environ['PYTHONPATH'], os.environ['COLOR']);"
            f"time.sleep(1); print('late:', os.path.exists({str(tmp_path / 'late')!r}));"
            f"print(tarfile.open({str(tmp_path / 'out' / 'results.tar.gz')!r}).getnames())",
            environment={"COLOR": "green"},
        ),
    ]
    assert gpu.run_parts(parts, options_of(tmp_path)) == 1
    outcomes = summary.outcomes_in(tmp_path / "results")
    assert {name: part["outcome"] for name, part in outcomes.items()} == {
        "good": "done",
        "raises": "failed (1)",
        "crashes": "failed (-11)",
        "lacking": "skipped, needs no-such-program",
        "leaves": "done",
        "last": "done",
    }
    log = (tmp_path / "results" / "last.log").read_text()
    assert "green" in log and os.environ["PYTHONPATH"] in log and "late: False" in log
    # The archive is written after each part.
    assert "results/good.log" in log and "results/summary.md" in log
    assert "unspecified launch failure" in capsys.readouterr().out
    assert "unspecified launch failure" in (tmp_path / "out" / "summary.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.tar.gz", "summary.md"}


def test_part_that_hangs_is_stopped_and_counts_as_a_failure(tmp_path: Path) -> None:
    hangs = python_part(
        "hangs", "import time\nprint('begun', flush=True)\nwhile True: time.sleep(9)"
    )
    assert gpu.run_parts([hangs], options_of(tmp_path, budget=gpu.GRACE_S + 2)) == 1
    assert (tmp_path / "results" / "hangs.log").read_text().startswith("begun")
    assert "--parts hangs" in (tmp_path / "out" / "summary.md").read_text()


# A benchmark of five cases. The second one crashes, the fourth one loses the GPU.
CRASHES = """
import os, signal, sys
first = int(sys.argv[2]) if len(sys.argv) > 1 else 1  # --from N
for case in range(first, 6):
    print(f"[{case}/5] a case", flush=True)
    if case == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == 4:
        sys.exit(3)
    print(f"measured {case}", flush=True)
"""


def test_benchmark_that_crashes_continues_with_the_next_case(tmp_path: Path) -> None:
    log = tmp_path / "log"
    part = python_part("bench", CRASHES, restarts=True)
    assert gpu.run(part, log, 60) == "failed, crashed in case 2, 4"
    measured = [line for line in log.read_text().splitlines() if line.startswith("measured")]
    assert measured == ["measured 1", "measured 3", "measured 5"]


@pytest.mark.slow
def test_quick_run_leaves_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--quick", "--parts", "info,kernels,layer", "--budget", "300"]
    assert gpu.main([*words, "--folder", str(tmp_path)]) == 0, capsys.readouterr().out
    page = " ".join((tmp_path / "summary.md").read_text().split())
    assert all(
        word in page
        for word in (
            "# lotr_ext on ",
            "| layer | done |",
            "LoRA eager",
            "shrink 2048 x 768",
            "GB/s",
        )
    ), page


def test_page_says_what_to_do_next(tmp_path: Path) -> None:
    """Rows as a GPU without a temperature sensor would leave them, of one layer and one kernel."""
    columns = {
        "machine": "A card",
        "date": "2026-12-01",
        "commit": "abc",
        "rounds": 11,
        "sm_mhz": 1700.0,
        "gpu_watts": 600.0,
        "m": 8192,
        "k": 4096,
        "n": 4096,
        "r": 16,
        "dtype": "bf16",
        "stage": "step",
    }
    times = {"frozen": 1.0, "lotr_ext-beta": 1.2, "lotr_ext-two_pass": 1.3, "lora-eager": 1.5}
    layers = [
        {**columns, "rival": rival, "seconds": seconds, "over": seconds - 1}
        for rival, seconds in times.items()
    ]
    common.replace_rows(tmp_path / "card" / "layer.jsonl", layers, ["m"])
    columns |= {"kernel": "gemm_lotr", "copy_gb_per_s": 3000.0, "gb_per_s": 900.0, "of_copy": 0.3}
    kernels = [
        {**columns, "rival": rival, "seconds": seconds}
        for rival, seconds in {"lotr_ext": 1.0, "library": 1.1, "base product": 0.9}.items()
    ]
    common.replace_rows(tmp_path / "card" / "kernels.jsonl", kernels, ["m"])
    (tmp_path / "smoke.jsonl").write_text(
        json.dumps({"form": "fold", "dtype": "bf16", "outcome": "wrong: 3 x 4: F", "planned": 2})
    )
    page = summary.page(tmp_path, {"model": {"outcome": "stopped", "seconds": 9}})
    for words in (
        "1700 MHz",  # the clock during the runs
        "50.0%",  # more time for lora-eager than for the frozen layer, 1.5 s and 1.0 s
        "30%",  # of the bandwidth of a copy: 900 of 3000 GB/s
        "90%",  # of the speed of the base product: 0.9 s, and 1.0 s for gemm_lotr
        "remove it",  # gemm_lotr, because 90 % is below the goal
        "beta in 1",  # the fastest strategy, in one layer
        "--parts model",  # how to run the part that was stopped
    ):
        assert words in page
    assert page.index("fold") < page.index("## What to do next")


def test_dry_run_lists_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    assert all(
        words in output
        for words in ("bench.smoke", "cuda and not full", "--kernel-name kns=lotr", "--clock wall")
    ), output
