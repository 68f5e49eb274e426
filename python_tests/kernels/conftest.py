"""The executor's module, built once, and the folders its tests import from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]


@pytest.fixture(scope="session")
def lib():
    """csrc/simt/module/module.cpp: the launchers of csrc/cuda/launch.h on numpy arrays."""
    from csrc.simt import build

    return build.load("plain")


@pytest.fixture
def plan(lib):
    """plan(rules) forces plans (csrc/cuda/plans.h) until the test ends."""
    yield lambda rules: lib.set_rules(forced=rules)
    lib.set_rules()
