"""The frameworks that people train with. `make setup` puts them into a folder of their own, which only the processes that these
tests start can import: transformers behaves differently wherever it finds them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gloo
import pytest

FOLDER = Path(sys.prefix) / "frameworks"


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test by name where make setup could not install the package."""
    return pytest.mark.skipif(not (FOLDER / package).is_dir(), reason=f"{package} is missing: run make setup")


def values_of(checks: Sequence[str], folder: Path, *, world: int = 1, timeout: float = 1500) -> dict[str, list[Any]]:
    """What each check, "module:function", returned in each of `world` processes, which gloo joins if there are several.

    A check is called with the rank and the folder.
    """
    return gloo.values_of(checks, folder, timeout, world=world, packages=FOLDER)
