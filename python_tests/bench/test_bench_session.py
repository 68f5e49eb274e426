"""What the measuring programs share: a run goes on after a failure and from where it stopped; options are taken as given."""

from __future__ import annotations

import json

import pytest
import torch

from bench import layer
from bench.measure import session, shapes, store, timing
from bench.measure.session import Session
from bench.pictures import layer as layer_pictures

SMALL = ["--shapes", "8x16x16x2", "--dtypes", "fp32", "--rivals", "lotr_ext"]
QUICK = ["--threads", "1", "--rounds", "2", "--slice", "0.0005", "--device", "cpu", "--allocator", "system"]
CASE = {"m": 8, "k": 16, "n": 16, "r": 2, "dtype": "fp32", "threads": 1}


def opened(folder, *more: str) -> Session:
    options = layer.arguments([*SMALL, *QUICK, "--results", str(folder), *more])
    return Session(options, "layer.jsonl", slice=options.slice)


def test_an_attempt_is_one_line_and_the_run_goes_on(tmp_path, capsys):
    run = opened(tmp_path)
    for error in (RuntimeError("first\nsecond"), ArithmeticError(), MemoryError("x" * 999)):
        with run.attempt("a case"):
            raise error
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "not measured: a case: RuntimeError: first",
        "not measured: a case: ArithmeticError: no message",
        f"not measured: a case: MemoryError: {'x' * 200}",
    ]
    assert run.finish() == 1
    with pytest.raises(ValueError, match="shapes: no"), run.attempt("a case"):
        raise ValueError("shapes: no")
    with pytest.raises(OSError, match="no disk"), run.attempt("a case"):
        raise OSError("no disk")
    with pytest.raises(KeyboardInterrupt), run.attempt("a case"):
        raise KeyboardInterrupt
    with run.attempt("a rival", ends=()):
        raise ValueError("a package's own")
    assert len(run.failures) == 4


def test_a_case_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    right = layer.measure

    def fails(case, names, session):
        if case.m == 8:
            raise RuntimeError("no more memory")
        return right(case, names, session)

    monkeypatch.setattr(layer, "measure", fails)
    arguments = [*SMALL, *QUICK, "--results", str(tmp_path)]
    arguments[1] = "8x16x16x2,9x16x16x2"
    assert layer.main(arguments) == 1
    assert "not measured: 8x16x16 r2 fp32 t1: RuntimeError: no more memory" in capsys.readouterr().out
    assert {cell["case"]["m"] for cell in store.Store(tmp_path / "layer.jsonl").read()} == {9}


@pytest.mark.parametrize("name", ["torch", "peft", "transformers", "name"])
def test_another_version_is_measured_anew(name, tmp_path, monkeypatch):
    arguments = [*SMALL, *QUICK, "--results", str(tmp_path)]
    facts = timing.machine(torch.device("cpu")) | {"clock": "1 MHz"}
    assert layer.main(arguments) == 0
    monkeypatch.setattr(session, "machine", lambda device: facts)  # the present clock is no setting
    assert layer.main(arguments) == 0
    assert len(store.Store(tmp_path / "layer.jsonl").read()) == 2
    monkeypatch.setattr(session, "machine", lambda device: facts | {name: "another"})
    assert layer.main(arguments) == 0
    assert len(store.Store(tmp_path / "layer.jsonl").read()) == 4


def test_a_case_is_done_when_one_run_has_all_its_rivals(tmp_path, capsys):
    arguments = [*SMALL[:-1], "lora-eager", *QUICK, "--results", str(tmp_path)]
    assert layer.main(arguments) == layer.main([*SMALL, *QUICK, "--results", str(tmp_path)]) == 0
    both = [*SMALL[:-1], "lora-eager,lotr_ext", *QUICK, "--results", str(tmp_path)]
    capsys.readouterr()
    assert layer.main(both) == 0  # the two rivals were measured, but not side by side
    assert "cases are in" not in capsys.readouterr().out
    assert layer.main(arguments) == layer.main(both) == 0
    assert len(store.Store(tmp_path / "layer.jsonl").read()) == 2 + 2 + 3
    out = capsys.readouterr().out
    assert out.count("1 of 1 cases are in") == 2 and out.count("extra FLOPs") == 2  # and shown


def test_a_run_that_goes_on_chooses_by_the_kept_ceilings(tmp_path, monkeypatch):
    kept, now = ({"flops_per_s": 1e9 * speed, "bytes_per_s": 1e9} for speed in (3, 5))
    monkeypatch.setattr(session, "ceilings", lambda *_: now)
    run = opened(tmp_path)
    assert run.first_ceilings("fp32", 1) == now
    for build, ceilings in (("another", now), (run.settings["build"], kept), (run.settings["build"], now)):
        cell = {"case": CASE, "rival": "frozen", "machine": run.facts, "ceilings": ceilings}
        run.store.append(cell | run.settings | {"build": build})
    run = opened(tmp_path)
    assert run.first_ceilings("fp32", 1) == kept and run.ceilings("fp32", 1) == now
    assert run.first_ceilings("bf16", 1) == now and run.first_ceilings("fp32", 2) == now
    seen = []
    monkeypatch.setattr(layer, "cost_seconds", lambda case, options, ceilings: seen.append(ceilings) or 0.0)
    run.options.shapes = None
    layer.choose(run.options, run)
    assert seen and all(ceilings == kept for ceilings in seen)


def test_pictures_at_the_end_show_what_tables_show(tmp_path, monkeypatch):
    drawn: list[dict] = []
    monkeypatch.setattr(layer_pictures, "draw", lambda cells, folder: drawn.extend(cells) or [])
    store.Store(tmp_path / "layer.jsonl").prepare().append(cell("of another build"))
    common = ["--threads", "1", "--rounds", "1", "--device", "cpu", "--allocator", "system", "--results", str(tmp_path)]
    assert layer.main([*SMALL, "--slice", "0.0005", *common]) == 0
    assert drawn and all(c["rival"] != "of another build" for c in drawn)


def test_rivals_asked_for_by_name_that_cannot_run_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer.rv.library, "missing_package", lambda name: None)
    arguments = [*SMALL[:-1], "lora-lorafusion,lotr_ext", *QUICK, "--results", str(tmp_path)]
    arguments[1] = "8x16x16x2,9x16x16x2"
    assert layer.main(arguments) == 1
    line = "not measured: lora-lorafusion: its kernels need a GPU\n"
    assert capsys.readouterr().out.count(line) == 1  # once a reason, not once a case
    cells = store.Store(tmp_path / "layer.jsonl").read()
    assert [cell["rival"] for cell in cells] == 2 * ["frozen", "lotr_ext"]
    cases = [shapes.Case(**CASE | {"dtype": dtype}) for dtype in ("fp32", "bf16")]
    assert layer.refused(cases, layer.arguments(["--device", "cpu"])) == []  # the default ones: those that can run


def test_a_bar_of_which_no_case_began_leaves_nothing(capsys):
    with pytest.raises(OSError, match="cannot write"), session.progress(3):
        raise OSError("results: cannot write x")
    assert capsys.readouterr() == ("", "")


# ---- the result file -------------------------------------------------------------------------------------------------


def cell(rival: str, when: float | None = None, **changes: object) -> dict:
    made = {"case": CASE, "rival": rival, "build": "b", "clock": "wall", "allocator": "keep", "rounds": 7}
    return made | {"machine": {"name": "x", "torch": "2"}} | ({} if when is None else {"when": when}) | changes


def test_lines_that_are_no_cells_are_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "layer.jsonl"
    bad = ['{"case": null, "rival": "frozen"}', '{"case": {}, "rival": null}', '{"case": {}}', "[]", "7", '{"case": {"m": 1']
    path.write_text("\n".join([json.dumps(cell("frozen")), *bad]) + "\n")
    assert store.Store(path).read() == [cell("frozen")]
    err = capsys.readouterr().err
    assert [f"line {number}: no whole result" in err for number in range(1, 8)] == [False, *6 * [True]]


@pytest.mark.parametrize(
    "change",
    [{"build": "c"}, {"clock": "cpu"}, {"allocator": "system"}]
    + [{"machine": {"name": "x", "torch": "2"} | {name: "3"}} for name in ("name", "torch", "peft", "transformers")],
)
def test_the_newest_cells_have_one_setting(change):
    old, new = cell("lotr_ext", 1, **change), cell("lotr_ext", 2)
    assert store.newest([old, cell("frozen", 1, **change), new]) == [new]
    assert store.newest([]) == []


def test_the_newest_cells_of_a_case_are_of_one_run():
    def run(when: float, rounds: int, *rivals: str) -> list[dict]:
        return [cell(rival, when, rounds=rounds) for rival in rivals]

    few, many, long = run(3, 99, "frozen"), run(1, 7, "frozen", "lotr_ext"), run(2, 9, "frozen", "lotr_ext")
    assert store.newest([*many, *few]) == many  # more rivals before more rounds and the later one
    assert store.newest([*many, *long, *few]) == long == store.newest([*long, *many, *few])
    later = run(4, 9, "lotr_ext", "frozen")
    assert store.newest([*long, *later]) == later == store.newest([*later, *long])
    assert store.newest([*long, *run(5, 9, "lotr_ext")]) == long  # never a row of two runs
    other = [cell("frozen", 9, case=CASE | {"m": 9})]
    assert store.newest([*many, *other, *long]) == [*long, *other]  # in the order of the cases' first appearance


def test_cells_without_a_time_are_one_run():
    assert store.newest([cell("frozen"), cell("lotr_ext", rounds=1), cell("lotr_ext")]) == [cell("frozen"), cell("lotr_ext")]


def test_the_cells_of_other_builds_are_dropped(tmp_path):
    kept = store.Store(tmp_path / "a.jsonl").prepare()
    for build in ("old", "new", "older", "new"):
        kept.append(cell("lotr_ext", build=build))
    kept.keep_only("new")
    assert [c["build"] for c in kept.read()] == ["new", "new"] and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_results_have_no_commit_where_git_is_not_installed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert store.commit() is None
