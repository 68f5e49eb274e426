"""The executor's module, built once, and the folders its tests import from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "simt")]


@pytest.fixture(scope="session")
def lib():
    """python_tests/simt/executor/module.cpp: the launchers of csrc/cuda/launch.h on numpy arrays."""
    import build

    return build.load("plain")
