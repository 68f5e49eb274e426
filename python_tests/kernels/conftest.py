"""The executor's module, built once."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from csrc.simt import build


@pytest.fixture(scope="session")
def executor(pytestconfig: pytest.Config) -> ModuleType:
    """Returns csrc/simt/module, the operators of csrc/cuda on numpy arrays. May compile it."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return build.load(
            "plain",
            announce=lambda: print("compiling the executor (once, about 90 s)", file=sys.stderr),
        )


@pytest.fixture
def lib(executor: ModuleType) -> Iterator[ModuleType]:
    """Yields the module, and resets its options after the test."""
    yield executor
    executor.set_options()
    executor.set_device()
