"""Of the tests of tune: a cache folder of their own, and what stands for a clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from lotr_ext.layers import tuning
from lotr_ext.ops import tuned
from lotr_ext.ops.tuned import Answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache folder of its own for each test, whose answers count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOTR_TUNE")
    tuned.load()
    yield tmp_path / "lotr_ext" / "tuned.json"
    monkeypatch.undo()
    tuned.ask = None
    tuned.load()
    assert not tuned.on


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuned.Problem]:
    """Instead of a clock: two_pass always wins. The problems that were timed."""
    seen = []

    def measure(problem: tuned.Problem) -> Answer:
        seen.append(problem)
        return Answer("two_pass", {"two_pass": 1e-6, "beta": 2e-6})

    monkeypatch.setattr(tuning, "measure", measure)
    return seen
