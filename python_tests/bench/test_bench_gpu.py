"""make gpu without a GPU: the plan, the budget, what is missing, parts stopped in time, results kept as each part ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import __main__ as program
from bench.gpu import each, machine, work
from bench.gpu import plan as plans
from bench.gpu import summary as gpu_summary
from bench.measure.store import Store
from bench.rivals import operators
from lotr_ext import info

ALL = {
    name: f"/{name}"
    for name in (
        *("gpu", "nvcc", "c++", "cmake", "ninja", "compute-sanitizer", "ncu", "pytest"),
        *(machine.HOPPER, *machine.NEEDED, *machine.OPTIONAL),
    )
}
PYTHON = sys.executable
ROOT = Path(__file__).resolve().parents[2]


def options(tmp_path: Path, *more: str):
    return program.arguments(["--folder", str(tmp_path / "work"), *more])


def python(*lines: str) -> tuple[str, ...]:
    return PYTHON, "-c", "\n".join(lines)


def made(name: str = "lotr_ext/_C.abi3.so") -> tuple[str, ...]:
    return python("from pathlib import Path", f"Path({name!r}).write_text('built')")


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_dry_run_prints_all_and_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "look", lambda: ALL)
    assert program.main(["--dry-run", "--folder", str(tmp_path / "work"), "--budget", "245"]) == 0
    out = capsys.readouterr().out
    for part in plans.plan(options(tmp_path)):
        assert f"\n  {part.name} " in out, part.name
    assert "at most 245 s" in out and "setup.py build_ext --inplace" in out and "left out" not in out
    assert not (tmp_path / "work").exists()


def test_the_commands_exist():
    """A plan of programs that are not there, or that do not take what they are given, would be noticed on a GPU only."""
    for part in plans.plan(program.arguments([])):
        if "-m" in part.command and (name := part.command[part.command.index("-m") + 1]) != "pytest":
            path = ROOT / Path(*name.split("."))
            assert part.needs or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    from bench import block, experts, kernels, layer, model, shared

    programs = {"kernels": kernels, "layer": layer, "block": block, "shared": shared, "experts": experts, "model": model}
    for quick in ([], ["--quick"]):
        for part in plans.plan(program.arguments(quick)):
            if part.name in programs:
                given = [word.replace("{minutes}", "1.5") for word in part.command[3:]]
                options = programs[part.name].arguments([*given, "--device", "cpu"])
                assert options.results is None  # that of the card, which summary and report read
            if part.name.startswith("floor-"):
                with contextlib.suppress(ValueError):  # that there is no GPU here, which argparse did not say
                    programs[part.name.removeprefix("floor-")].arguments(list(part.command[3:]))


@pytest.mark.parametrize(
    ("gone", "parts", "words"),
    [
        ("compute-sanitizer", ["sanitize-memcheck", "sanitize-racecheck"], "needs compute-sanitizer"),
        ("pytest", ["smoke", "tests"], "needs pytest"),
        ("nvcc", ["build"], "needs nvcc"),
        ("safetensors", ["build"], "needs safetensors"),
        ("matplotlib", [], ""),
        ("ninja", [], ""),
    ],
)
def test_what_is_missing_is_named_and_left_out(tmp_path, monkeypatch, capsys, gone, parts, words):
    monkeypatch.setattr(program, "look", lambda: ALL | {gone: None})
    program.main(["--dry-run", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.split()[0] for line in lines if "left out" in line)) == parts
    assert all(words in line for line in lines if "left out" in line)
    assert any(line.split()[:2] == [gone, "missing" + ("," if gone in machine.OPTIONAL else "")] for line in lines)


def test_times_fill_the_budget():
    parts = plans.plan(program.arguments([]))
    assert sum(plans.seconds_of(parts, 540)) == pytest.approx(540)
    assert plans.seconds_of(parts[-1:], 30) == [30]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = subprocess.run(
        [PYTHON, "-m", "bench.gpu", "--folder", str(tmp_path / "work")],
        cwd=ROOT,
        env={"PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bench.gpu: gpu: expected an NVIDIA GPU here") and not (tmp_path / "work").exists()


# ---- the work --------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """parts([Part, ...]) is the plan."""

    def use(*made: plans.Part) -> None:
        monkeypatch.setattr(program, "plan", lambda options: list(made))

    return use


def test_each_part_is_kept_as_it_ends(tmp_path, parts, capsys):
    cell = {"case": {"kernel": "shrink", "m": 1}, "rival": "lotr_ext"}
    writes = python(
        "from pathlib import Path",
        "folder = Path('bench/results/card'); folder.mkdir(parents=True, exist_ok=True)",
        f"open(folder / 'kernels.jsonl', 'a').write({json.dumps(cell)!r} + '\\n')",
        "print('measured')",
    )
    kept = tmp_path / "work" / "results" / "card" / "kernels.jsonl"
    looks = python("from pathlib import Path", f"assert Path({str(kept)!r}).exists()")
    parts(plans.Part("build", 1, made()), plans.Part("kernels", 1, writes), plans.Part("after", 1, looks))
    assert work.work(options(tmp_path), ALL) == 0
    assert len(Store(kept).read()) == 1
    summary = json.loads((tmp_path / "work" / "results" / "summary.json").read_text())
    assert {name: part["status"] for name, part in summary["parts"].items()} == dict.fromkeys(
        ("build", "kernels", "after"), "done"
    )
    assert (tmp_path / "work" / "results" / "kernels.log").read_text() == "measured\n"
    assert "kernels            done" in capsys.readouterr().out
    assert work.work(options(tmp_path), ALL) == 0  # the same command finds what it has and goes on
    assert len(Store(kept).read()) == 2


def test_it_works_on_a_copy(tmp_path, parts):
    here = python("import os, pathlib", "print(os.getcwd(), os.environ['PYTHONPATH'])", "pathlib.Path('lotr_ext/x').touch()")
    parts(plans.Part("build", 1, made()), plans.Part("here", 1, here))
    work.work(options(tmp_path), ALL)
    tree = tmp_path / "work" / "tree"
    assert (tmp_path / "work" / "results" / "here.log").read_text().split() == [str(tree), str(tree)]
    assert (tree / "lotr_ext" / "x").exists() and not (ROOT / "lotr_ext" / "x").exists()
    assert (tree / "setup.py").read_text() == (ROOT / "setup.py").read_text()
    assert (tree / "csrc" / "torch" / "cuda_probe.cpp").stat().st_mtime == (
        ROOT / "csrc" / "torch" / "cuda_probe.cpp"
    ).stat().st_mtime  # a second build compiles what changed
    assert sorted(path.name for path in (tree / "bench" / "results").iterdir()) == ["simt-executor"]


def shell(text: str) -> tuple[str, ...]:
    """Which starts at once, also on a busy machine."""
    return "sh", "-c", text


@pytest.mark.parametrize("heard", [signal.default_int_handler, signal.SIG_IGN], ids=["Ctrl-C heard", "in the background"])
def test_a_part_is_stopped_in_time_and_the_others_run(tmp_path, parts, heard):
    before = signal.signal(signal.SIGINT, heard)
    try:
        _stopped_in_time(tmp_path, parts)
    finally:
        signal.signal(signal.SIGINT, before)


def _stopped_in_time(tmp_path, parts):
    build = plans.Part("build", 1, shell("echo built > lotr_ext/_C.abi3.so"))
    long = plans.Part("long", 1, shell("trap 'echo kept; exit 3' INT; echo begun; sleep 600 & wait"))
    parts(build, long, plans.Part("next", 20, shell("echo here")))  # which a busy machine leaves time for, too
    assert work.work(options(tmp_path, "--budget", "120"), ALL) == 0
    results = tmp_path / "work" / "results"
    found = json.loads((results / "summary.json").read_text())["parts"]
    assert found["long"]["status"] == "stopped" and found["next"]["status"] == "done"
    assert (results / "long.log").read_text().split() == ["begun", "kept"]


def test_a_part_that_hears_nothing_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "GRACE_S", 0.3)
    (tmp_path / "tree").mkdir()
    deaf = plans.Part("deaf", 1, shell("trap '' INT; echo begun; sleep 600; echo slept"))
    status, _ = work.run_part(deaf, tmp_path / "tree", tmp_path / "log", 1.0)
    assert status == "stopped" and (tmp_path / "log").read_text().split() == ["begun"]


def test_a_part_that_fails_is_shown_and_the_others_run(tmp_path, parts, capsys):
    broken = python("import sys", "print('the reason')", "sys.exit(7)")
    parts(plans.Part("build", 1, made()), plans.Part("bad", 1, broken), plans.Part("next", 1, python("print()")))
    assert work.work(options(tmp_path), ALL) == 1
    out = capsys.readouterr().out
    assert "bad: failed (7)" in out and "    the reason" in out and "next: done" in out


def test_without_a_build_nothing_else_runs(tmp_path, parts, capsys):
    parts(plans.Part("build", 1, python("import sys", "sys.exit(2)")), plans.Part("next", 1, python("print()")))
    assert work.work(options(tmp_path), ALL) == 1
    out = capsys.readouterr().out
    assert "without a build" in out and "next:" not in out
    with pytest.raises(ValueError, match="parts: expected build among them"):
        work.work(options(tmp_path, "--parts", "next"), ALL)


def test_kernels_that_cannot_run_are_not_measured(tmp_path, parts, capsys):
    facts = {"runtime": 13000, "driver": 12080, "obstacle": "the driver serves CUDA 12.8 at most"}
    said = info._cuda_line({"built": True, "archs": ["80"]}, facts)
    parts(
        plans.Part("build", 1, made()),
        plans.Part("info", 1, python(f"print({said!r})")),
        plans.Part("next", 1, python("print()")),
    )
    assert work.work(options(tmp_path), ALL) == 1
    out = capsys.readouterr().out
    assert "the kernels cannot run here" in out and "serves CUDA 12.8 at most" in out and "next:" not in out


def test_no_time_left_is_said(tmp_path, parts, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    asked = []

    def run(part, tree, log, limit, without):
        asked.append((part.name, limit))
        (tree / work.MODULE).touch()
        now[0] += 45.0
        return "done", 45.0

    parts(plans.Part("build", 1, shell("")), plans.Part("one", 1, shell("")), plans.Part("two", 3, shell("")))
    assert work.work(options(tmp_path, "--budget", "100"), ALL, run) == 0
    assert asked == [("build", 90.0), ("one", 11.25)]  # what is kept for those that must be told to stop comes off first
    assert "two: left out: no time left" in capsys.readouterr().out


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "from the wheel")
    return path


def test_kernels_from_a_wheel(tmp_path, parts):
    name = f"lotr_ext-0.1.0-cp310-abi3-manylinux_2_34_{platform.machine()}.whl"
    chosen = options(tmp_path, "--wheel", str(wheel(tmp_path / name, work.MODULE)))
    assert plans.plan(chosen)[0].command == () and "nvcc" not in plans.plan(chosen)[0].needs
    parts(plans.Part("build", 1, ()), plans.Part("look", 1, python(f"print(open({work.MODULE!r}).read())")))
    chosen.plan, chosen.parts = program.plan(chosen), ["build", "look"]
    assert work.work(chosen, ALL) == 0
    assert (tmp_path / "work" / "results" / "look.log").read_text() == "from the wheel\n"


@pytest.mark.parametrize(
    ("name", "inside", "message"),
    [
        ("lotr_ext-0.1.0-cp310-abi3-manylinux_2_34_riscv64.whl", work.MODULE, "for this platform .* got lotr_ext-0.1.0-cp310"),
        (f"lotr_ext-0.1.0-cp310-abi3-win_{platform.machine()}.whl", work.MODULE, "for this platform"),
        (f"lotr_ext-0.1.0-cp310-abi3-linux_{platform.machine()}.whl", "other", "expected lotr_ext/_C.abi3.so in"),
    ],
    ids=["machine", "system", "empty"],
)
def test_a_wheel_of_another_kind_is_refused(tmp_path, name, inside, message):
    with pytest.raises(ValueError, match=f"wheel: expected.*{message}" if "expected" not in message else message):
        options(tmp_path, "--wheel", str(wheel(tmp_path / name, inside)))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(OSError, match=r"folder: cannot write .*work"):
        work.work(options(tmp_path), ALL)


def test_make_gpu_is_this_program():
    command = ["make", "-C", str(ROOT), "gpu", f"PYTHON={PYTHON}", "ARGS=--dry-run --budget 100 --parts info,tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "at most 100 s" in done.stdout and "bench.kernels" not in done.stdout, done.stderr


# ---- the summary -----------------------------------------------------------------------------------------------------


def cell(rival: str, seconds: float, m: int, **more: object) -> dict:
    step = {"seconds": [seconds] * 3, "excess": [0.1] * 3, "of_bound": 0.5}
    return {"case": {"kernel": "shrink", "m": m}, "rival": rival, "step": step, "when": m, **more}


def test_the_summary_names_what_loses(tmp_path):
    (tmp_path / "card").mkdir()
    kernels, layer = Store(tmp_path / "card" / "kernels.jsonl"), Store(tmp_path / "card" / "layer.jsonl")
    for m, ours in ((1, 2.0), (16, 0.5)):
        kernels.append(cell("library", 1.0, m))
        kernels.append(cell("lotr_ext", ours, m))
        for rival, seconds in (("frozen", 0.9), ("lora-eager", 1.0), ("lotr_ext", ours)):
            layer.append(cell(rival, seconds, m))
    (tmp_path / "tests.log").write_text("...\n42 passed, 3 skipped in 2.1s\n")
    (tmp_path / "sanitize-memcheck.log").write_text("========= ERROR SUMMARY: 0 errors\n")
    outcome = {name: {"status": "done", "seconds": 1.0} for name in ("tests", "sanitize-memcheck", "kernels", "layer")}
    text = "\n".join(gpu_summary.summary(tmp_path, outcome))
    for piece in (
        "42 passed, 3 skipped in 2.1s",
        "0 errors",
        "shrink: 50% of the machine's bound (median); 1 of 2 cells slower than the library: shrink 1 (2.00 x)",
        "ours / lora-eager: 1.250 (median); 1 of 2 cells slower than lora-eager: shrink 1 (2.00 x)",
        "over the frozen layer: 10.0%",
    ):
        assert piece in text, text


def test_the_summary_says_what_each_feature_is_worth(tmp_path):
    for folder, times in (("with-all", (1.0, 2.0, 4.0)), ("without-wgmma", (1.5, 3.0, 4.0)), ("without-early", ())):
        store = Store(tmp_path / folder / "kernels.jsonl").prepare()
        for m, seconds in enumerate(times):
            store.append(cell("lotr_ext", seconds, m))
    lines = gpu_summary.worth_of_switches(tmp_path)
    assert lines == ["  without-wgmma, over with all features (medians): shrink 1.50 x"]


def test_a_part_is_told_the_seconds_it_has_and_smoke_at_most_its_90(tmp_path):
    (tmp_path / "tree").mkdir()
    part = plans.Part("x", 1, ("echo", "{seconds}", "{minutes}"))
    for limit, told in ((50.0, "45 0.67"), (1000.0, "90 13.33")):
        work.run_part(part, tmp_path / "tree", tmp_path / "log", limit)
        assert (tmp_path / "log").read_text() == told + "\n"


def test_a_profiler_sees_each_of_the_six_kernels_twice(monkeypatch):
    called = []

    def counted(case, device):
        called.append(case.kernel)
        operator = operators.make(case, device)
        return dataclasses.replace(operator, ours=lambda: (called.append(case.kernel), operator.ours()))

    monkeypatch.setattr(each, "make", counted)
    assert each.main("cpu") == 0
    assert called == [kernel for kernel in each.KERNELS for _ in range(1 + each.TIMES)] and len(each.KERNELS) == 6


def test_the_summary_names_a_plan_that_is_faster_than_the_chosen_one():
    cells = [
        cell("lotr_ext", 1.0, 1),
        cell("shrink m_blocks=8", 0.9, 1),
        cell("shrink m_blocks=4", 0.99, 1),
        cell("library", 0.5, 1),
    ]
    lines = gpu_summary.better_plans([*cells, cell("shrink m_blocks=8", 0.1, 2)])
    assert lines == ["a better plan: shrink 1: shrink m_blocks=8, 0.90 x the chosen one's time"]
