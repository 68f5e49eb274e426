"""With little more than torch and pytest: the tests for a GPU are collected, the benchmarks measure and print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("rich", "psutil", "hypothesis", "yaml", "matplotlib", "transformers", "peft", "pybind11", "onnx", "mkdocs")
BLOCKER = f"""
import sys
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """An environment for programs that find none of OPTIONAL."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    return os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_gpu_tests_are_collected(without):
    done = run(without, "pytest", "-m", "cuda", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "python_tests/cuda/test_device.py::" in done.stdout and "python_tests/cuda/test_operators.py::" in done.stdout
    assert "test_kernels.py: the package hypothesis is not installed" in done.stdout


def test_a_missing_package_is_an_error_in_an_ordinary_run(without):
    done = run(without, "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "python_tests/kernels/test_kernels.py")
    assert done.returncode != 0 and "No module named 'hypothesis'" in done.stdout


def test_a_benchmark_prints_a_plain_table(without, tmp_path):
    common = ["--device", "cpu", "--threads", "1", "--rounds", "1", "--dtypes", "fp32", "--allocator", "system"]
    arguments = [*common, "--shapes", "8x16x16x2", "--rivals", "lora-eager,lotr_ext", "--results", str(tmp_path / "results")]
    done = run(without, "bench.layer", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ ?lotr_ext +\d+ us ", done.stdout, re.MULTILINE), done.stdout
    assert "[1/1]" in done.stderr and "no pictures: matplotlib is not installed" in done.stdout
    assert list((tmp_path / "results").glob("*.jsonl"))


def test_a_plain_table_is_aligned():
    from bench.measure.terminal import Table

    table = Table("title", "name", "a")
    table.add_column("long head")
    table.caption = "a caption"
    table.add_row("x", "1")
    table.add_row("longer", "22", "3")
    assert str(table).splitlines() == [
        "",
        "title",
        "name     a  long head",
        "---------------------",
        "x        1",
        "longer  22          3",
        "a caption",
    ]
