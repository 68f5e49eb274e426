"""The file of measured answers in the user's cache folder: whole, shared, wrong or absent; and how an answer is chosen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tuning_cases import TOKENS, layers

import lotr_ext
from lotr_ext import LoTRLinear, explain, tune
from lotr_ext.layers import tuning
from lotr_ext.ops import tuned
from lotr_ext.ops.tuned import Answer

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"format": 2, "answers": []}',
        b'{"format": 1, "answers": [3]}',
        b"[" * 99999,
    ],
)
def test_a_file_that_is_not_ours(timed, cache: Path, content: bytes) -> None:
    """Counts as empty, and is written anew."""
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match="expected answers of lotr_ext.tune"):
        tuned.load()
    assert not tuned.on
    tune(layers(), TOKENS)
    assert len(timed) == 4 and len(tuned.read(cache)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "fastest"},
        {"strategy": "beta", "seconds": {"two_pass": 1e-6}},
        {"seconds": {"two_pass": -1.0}},
        {"seconds": {"two_pass": 1e-6, "magic": 1e-6}},
        {"tokens": "160"},
        {"step": 1},
    ],
)
def test_answers_that_cannot_be_true(timed, cache: Path, wrong: dict) -> None:
    tune(layers(), TOKENS)
    content = json.loads(cache.read_text())
    content["answers"][0].update(wrong)
    cache.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="got 1 that cannot be ones"):
        assert len(tuned.read(cache)) == 3


def test_written_at_once_and_beside_others(timed, cache: Path, monkeypatch) -> None:
    tune(LoTRLinear(24, 24, 3), TOKENS)
    theirs = cache.read_text()
    cache.unlink()
    tuned.load()
    tune(LoTRLinear(24, 40, 3), TOKENS)
    cache.write_text(theirs)  # another process has replaced it
    tune(LoTRLinear(24, 56, 3), TOKENS)
    assert {key.n for key in tuned.read(cache)} == {24, 56}
    before = cache.read_bytes()

    def fails(*args):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"tuned\.json"):
        tune(LoTRLinear(24, 72, 3), TOKENS)
    assert cache.read_bytes() == before and [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_answers_kept_at_the_same_time_are_all_in_the_file(cache: Path, monkeypatch) -> None:
    problems = [next(tuning.problems_of(LoTRLinear(24, n, 3), TOKENS)) for n in (24, 40)]
    read, both = tuned.read, threading.Barrier(2)

    def slowly(path: Path) -> dict:
        found = read(path)
        with contextlib.suppress(threading.BrokenBarrierError):  # with the lock, the second one cannot come
            both.wait(timeout=0.5)
        return found

    monkeypatch.setattr(tuned, "read", slowly)
    threads = [threading.Thread(target=tuned.keep, args=({p: Answer("beta", {"beta": 1e-6})},)) for p in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.n for key in read(cache)} == {24, 40}


@pytest.mark.parametrize("there", [True, False], ids=["a FIFO in the file's place", "no home"])
def test_an_import_opens_no_file_of_answers_and_needs_no_home(tmp_path: Path, there: bool) -> None:
    """The first call looks, and runs what it would run without."""
    path = tmp_path / "lotr_ext" / "tuned.json"
    path.parent.mkdir()
    os.mkfifo(path)
    code = """
import os, pwd, sys, torch

def no_entry(uid):
    raise KeyError(uid)

opened, pwd.getpwuid = [], no_entry

def hook(event, args):
    if event == "open" and str(args[0]).endswith("tuned.json"):
        opened.append(args[0])

sys.addaudithook(hook)
import lotr_ext
assert not opened
lotr_ext.LoTRLinear(24, 40, 5)(torch.randn(160, 24))
assert bool(opened) == ("XDG_CACHE_HOME" in os.environ)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(Path(lotr_ext.__file__).parents[1])} | (
        {"XDG_CACHE_HOME": str(tmp_path)} if there else {}
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("expected answers of lotr_ext.tune") == there


def test_without_a_home_answers_are_kept_for_the_process_alone(timed, monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd
    tuned.load()
    layer = LoTRLinear(24, 40, 5)
    with pytest.raises(OSError, match="expected a home directory or XDG_CACHE_HOME"):
        tune(layer, TOKENS)
    assert "kept in this process alone" in explain(layer, torch.randn(TOKENS, 24)).reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "fused", "seconds": {"fused": 1e-6, "beta": 2e-6}},
        {"strategy": "composite", "seconds": {"composite": 1e-6}},
        {"seconds": {"two_pass": 10**400}},
        {"seconds": {"two_pass": float("inf")}},
        {"seconds": {"two_pass": True}},
        {"seconds": {"two_pass": [1e-6]}},
        {"seconds": ["two_pass"]},
        {"strategy": ["two_pass"]},
        {"strategy": None, "seconds": None},
    ],
    ids=str,
)
def test_an_answer_that_cannot_be_true_is_ignored_with_one_warning(timed, cache: Path, wrong: dict) -> None:
    layers = [LoTRLinear(24, 40, 5), LoTRLinear(24, 48, 5)]
    x = torch.randn(TOKENS, 24)
    want = [layer(x) for layer in layers]
    for layer in layers:
        tune(layer, TOKENS)
    content = json.loads(cache.read_text())
    for answer in content["answers"]:
        answer.update(wrong)
    cache.write_text(json.dumps(content))
    tuned._warned.clear()
    with pytest.warns(UserWarning, match="expected an") as warned:
        tuned.load()
        for layer, y in zip(layers, want):
            for _ in range(2):
                assert torch.equal(layer(x), y) and "tuned" not in explain(layer, x).reason
    assert len(warned) == 1


def test_interrupted(timed, monkeypatch, cache: Path) -> None:
    """What was timed so far is kept."""
    measure, count = tuning.measure, iter(range(9))

    def stops(problem):
        if next(count) == 2:
            raise KeyboardInterrupt
        return measure(problem)

    monkeypatch.setattr(tuning, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        tune(layers(), TOKENS)
    assert len(tuned.read(cache)) == 2


def test_choose() -> None:
    """The usual strategy, unless another is 2 % faster; the fused one, than beta too."""
    assert tuned.choose({"two_pass": 0.99, "beta": 1.0}, "beta") == "beta"
    assert tuned.choose({"two_pass": 0.97, "beta": 1.0}, "beta") == "two_pass"
    assert tuned.choose({"two_pass": 1.0, "beta": 0.5}, "two_pass") == "beta"
    assert tuned.choose({"two_pass": 2.0, "beta": 1.0, "fused": 0.99}, "beta") == "beta"
    assert tuned.choose({"two_pass": 2.0, "beta": 1.0, "fused": 0.97}, "beta") == "fused"
    assert tuned.choose({"two_pass": 2.0, "beta": 1.0, "fused": 0.99}, "two_pass") == "two_pass"


def test_rounded() -> None:
    sizes = [tuned.rounded(m) for m in range(1, 5000)]
    assert sizes == sorted(sizes) and all(m <= size < 1.25 * m + 1 for m, size in enumerate(sizes, 1))
    assert all(tuned.rounded(1 << i) == 1 << i for i in range(20)) and len({s for s in sizes if 1024 <= s < 2048}) == 4
    assert tuned.rounded(0) == 0


def test_interleaved_medians(monkeypatch) -> None:
    """A sample that was disturbed does not decide."""
    clock = {"two_pass": iter([1.0, *[1.0, 9.0, 1.0, 9.0, 1.0]]), "beta": iter([1.0, *[2.0] * 5])}
    monkeypatch.setattr(tuning, "run_of", lambda problem, name: lambda name=name: name)
    monkeypatch.setattr(tuning, "_seconds", lambda device, run, repeats: next(clock[run()]))
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    problem = tuned.Problem(torch.device("cpu"), torch.float32, torch.float32, 8, 8, 8, 2, 2, "alone", True, "beta")
    assert tuning.measure(problem) == Answer("two_pass", {"two_pass": 1.0, "beta": 2.0})
