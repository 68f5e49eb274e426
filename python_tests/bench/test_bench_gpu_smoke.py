"""The smoke run without a GPU: a fake card fails in each way a card can, and every failure is named; then results come home."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from pathlib import Path

import pytest

from bench.gpu import plan as plans
from bench.gpu import results, smoke, work
from bench.measure.store import Store
from bench.measure.timing import slug
from lotr_ext import __version__
from lotr_ext.ops.planner import CUDA_SWITCHES

SHRINK, EXPAND = smoke.Variant("shrink", "bf16", 16), smoke.Variant("expand_add", "bf16", 16)
FAKE = "fake_gpu:FakeGpu"
PATIENCE = 400.0  # seconds for a process to start on a loaded machine


@pytest.fixture(autouse=True)
def _processes_find_the_fake_gpu(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def faults(monkeypatch, **found: tuple[str, str | None]) -> None:
    monkeypatch.setenv("LOTR_FAKE_FAULTS", json.dumps({name.replace("__", "-"): fault for name, fault in found.items()}))


# ---- real processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "outcome", "words"),
    [
        (None, "passed", ""),
        ("wrong", "wrong", "shrink bf16 333x200-r13-odd-sm132: u: at (0, 0) got"),
        ("unstable", "wrong", "u has other bits in a second run"),
        ("sticky", "crashed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("assert", "crashed", "signal SIGABRT"),
        ("segfault", "crashed", "signal SIGSEGV"),
    ],
)
def test_what_a_process_comes_to(monkeypatch, kind, outcome, words):
    faults(monkeypatch, shrink__bf16__16=(kind, "wgmma"))
    found = smoke.run(SHRINK, FAKE, (), PATIENCE)
    assert found.outcome == outcome and words in found.detail, found


def test_a_feature_that_is_off_takes_its_fault_along(monkeypatch):
    faults(monkeypatch, shrink__bf16__16=("wrong", "wgmma"))
    assert smoke.run(SHRINK, FAKE, ("early", "wgmma"), PATIENCE).outcome == "passed"


def test_a_hang_is_ended_with_all_that_it_started(monkeypatch):
    faults(monkeypatch, shrink__bf16__16=("hang", None))
    found = smoke.run(SHRINK, FAKE, (), 3.0)
    assert found.outcome == "hung" and found.detail == "ended after 3 s"


# ---- which feature is at fault ---------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """card({variant: features at fault}): fails while any of these is on; "*" always. Returns the calls that were made."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def use(bad: dict[smoke.Variant, set[str]], outcome: str = "wrong") -> list[tuple[str, tuple[str, ...]]]:
        def run(variant, device, without, limit):
            calls.append((str(variant), tuple(without)))
            fails = bad.get(variant, set()) - set(without)
            return smoke.Result(variant, tuple(without), outcome if fails else "passed", "off by 3" if fails else "", 30.0)

        monkeypatch.setattr(smoke, "run", run)
        return calls

    monkeypatch.delenv("LOTR_CUDA_WITHOUT", raising=False)
    return use


def test_a_good_card_runs_each_variant_once_with_everything_on(card):
    calls = card({})
    found = smoke.Smoke(FAKE, 1000)
    found.go(smoke.variants())
    assert sorted(calls) == sorted((str(variant), ()) for variant in smoke.variants())
    assert found.without == [] and not found.unmended() and "188 passed" in found.report()[-1]


def test_the_feature_at_fault_is_switched_off_and_the_others_stay_on(card):
    card({SHRINK: {"wgmma"}, EXPAND: {"wgmma"}})
    found = smoke.Smoke(FAKE, 1000)
    found.go([SHRINK, EXPAND, smoke.Variant("fold", "bf16", 16)])
    assert found.without == ["wgmma"] and not found.unmended()
    text = "\n".join(found.report())
    assert "wrong: shrink-bf16-16: off by 3" in text and "LOTR_CUDA_WITHOUT=wgmma" in text
    assert "2 wrong; 1 passed" in text  # the table shows what the card does with everything on


def test_two_features_at_fault_are_both_switched_off(card):
    card({SHRINK: {"wgmma"}, EXPAND: {"cluster"}})
    found = smoke.Smoke(FAKE, 1000)
    found.go([SHRINK, EXPAND])
    assert sorted(found.without) == ["cluster", "wgmma"] and not found.unmended()


def test_where_only_all_switches_together_help_all_are_switched_off(card):
    card({SHRINK: {"early", "together"}})
    found = smoke.Smoke(FAKE, 1000)
    found.go([SHRINK])
    assert sorted(found.without) == sorted(CUDA_SWITCHES) and not found.unmended()


def test_what_no_switch_helps_is_named_and_switches_nothing_off(card):
    card({SHRINK: {"*"}}, "hung")
    found = smoke.Smoke(FAKE, 1000)
    found.go([SHRINK, EXPAND])
    assert found.without == [] and [result.variant for result in found.unmended()] == [SHRINK]
    assert "no switch helps: shrink-bf16-16" in found.report()


def test_what_the_user_has_switched_off_stays_off(card, monkeypatch):
    monkeypatch.setenv("LOTR_CUDA_WITHOUT", "early")
    calls = card({SHRINK: {"wgmma"}})
    found = smoke.Smoke(FAKE, 1000)
    found.go([SHRINK])
    assert found.without == ["early", "wgmma"] and all("early" in without for _, without in calls)


def test_no_time_left_is_neither_passed_nor_failed(card):
    card({SHRINK: {"wgmma"}})
    found = smoke.Smoke(FAKE, 0.5)
    found.go([SHRINK, EXPAND])
    assert [result.outcome for result in found.results] == ["not run", "not run"] and not found.unmended()
    assert "2 not run" in found.report()


def test_the_results_are_a_file_and_the_status_says_whether_anything_failed(card, tmp_path, capsys):
    card({SHRINK: {"wgmma"}})
    arguments = ["--device", FAKE, "--only", "shrink-bf16-16,expand_add-bf16-16", "--out", str(tmp_path / "a" / "smoke.json")]
    assert smoke.main(arguments) == 0
    kept = json.loads((tmp_path / "a" / "smoke.json").read_text())
    assert kept["without"] == ["wgmma"] and [row["outcome"] for row in kept["results"]] == ["wrong", "passed", "passed"]
    card({SHRINK: {"*"}})
    assert smoke.main(arguments) == 1 and "no switch helps: shrink-bf16-16" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shrink-bf16-17", "shrink", "magic-bf16-16", "shrink-bf16-16,,x"])
def test_a_variant_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="only: expected variants as shrink-bf16-16, got"):
        smoke.arguments(["--only", name])


def test_later_parts_run_without_the_feature_at_fault(tmp_path, monkeypatch):
    folder = tmp_path / "results" / "smoke"
    assert work.at_fault(tmp_path / "results") == []
    folder.mkdir(parents=True)
    (folder / "smoke.json").write_text('{"without": ["wgmma", "early"], "results": []}')
    assert work.at_fault(tmp_path / "results") == ["wgmma", "early"]
    monkeypatch.delenv("LOTR_CUDA_WITHOUT", raising=False)
    (tmp_path / "tree").mkdir()
    part = plans.Part("x", 1, ("sh", "-c", "echo without $LOTR_CUDA_WITHOUT"))
    for own, user, off in (
        ("", "", "wgmma,early"),
        ("cluster", "", "wgmma,early,cluster"),
        ("early", "fused", "fused,wgmma,early"),
    ):
        monkeypatch.setenv("LOTR_CUDA_WITHOUT", user)
        one = dataclasses.replace(part, without=own)
        status, _ = work.run_part(one, tmp_path / "tree", tmp_path / "log", 60.0, work.at_fault(tmp_path / "results"))
        assert status == "done" and (tmp_path / "log").read_text() == f"without {off}\n"


# ---- one file, and back ----------------------------------------------------------------------------------------------


def cell(card: str, m: int = 1) -> dict:
    return {"case": {"kernel": "shrink", "m": m}, "rival": "lotr_ext", "machine": {"name": card}}


@pytest.fixture
def made(tmp_path):
    """made(version, cards): a packed run."""

    def make(version: str = __version__, cards: tuple[str, ...] = ("NVIDIA H100",)) -> Path:
        folder = tmp_path / "work"
        for card in cards:
            Store(folder / "results" / slug(card) / "kernels.jsonl").prepare().append(cell(card))
            Store(folder / "results" / "without-wgmma" / "kernels.jsonl").prepare().append(cell(card, 2))
        (folder / "results" / "smoke").mkdir(parents=True, exist_ok=True)
        (folder / "results" / "smoke" / "smoke.json").write_text('{"without": []}')
        (folder / results.SUMMARY).parent.mkdir(exist_ok=True)
        (folder / "results" / results.SUMMARY).write_text(json.dumps({"gpu": "NVIDIA H100, 580", "version": version}))
        return results.pack(folder)

    return make


def test_results_come_back_under_the_name_of_the_card(made, tmp_path):
    into = tmp_path / "kept"
    packed = made()
    for _ in range(2):  # the second time adds nothing
        results.import_results(packed, into)
    folder = into / "nvidia-h100"
    assert sorted(path.name for path in folder.iterdir()) == [
        "gpu-smoke.json",
        "gpu-summary.json",
        "kernels.jsonl",
        "without-wgmma.jsonl",
    ]
    assert Store(folder / "kernels.jsonl").read() == [cell("NVIDIA H100")]
    assert Store(folder / "without-wgmma.jsonl").read() == [cell("NVIDIA H100", 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"version": "9.9"}, f"expected results of version {__version__}, got '9.9'"),
        ({"cards": ("NVIDIA H100", "NVIDIA A100")}, r"expected results of one card .* got \['NVIDIA A100', 'NVIDIA H100'\]"),
        ({"cards": ()}, "expected results of one card .* got NVIDIA H100, 580"),
    ],
    ids=["version", "cards", "none"],
)
def test_results_that_do_not_fit_are_refused(made, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=f"^import-results: {words}"):
        results.import_results(made(**arguments), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_is_no_archive_of_a_run_is_refused(tmp_path):
    (tmp_path / "text").write_text("no archive")
    with tarfile.open(tmp_path / "empty.tar.gz", "w:gz"):
        pass
    with tarfile.open(tmp_path / "outside.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "text", arcname="../outside")
    (tmp_path / "random").write_bytes(os.urandom(99_999))
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "random", arcname="results/random")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "whole.tar.gz").read_bytes()[:50_000])  # as a broken transfer leaves it
    for name, words in {
        "text": "whole results.tar.gz of a run",
        "cut.tar.gz": "whole results.tar.gz of a run",
        "empty.tar.gz": "summary.json of a run",
        "gone": "whole results.tar.gz",
    }.items():
        with pytest.raises(ValueError, match=f"^import-results: expected (the )?{words}"):
            results.import_results(tmp_path / name, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"^import-results: expected the whole results\.tar\.gz of a run"):
        results.import_results(tmp_path / "outside.tar.gz", tmp_path / "kept")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "kept").exists()
