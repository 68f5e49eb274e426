"""Imports and includes keep their order: each check finds planted violations, and csrc has none."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / ".ci" / "check_includes.py"


def check(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(CHECK), str(folder)], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_the_headers_are_in_order():
    assert check(ROOT / "csrc") == (0, "")


PLANTED_INCLUDES = [  # file, line, what names it
    (
        "cuda/problem.h",
        '#include "ptx/base.cuh"',
        "cuda/problem.h includes cuda/ptx/base.cuh: cuda/problem.h may include nothing else",
    ),
    (
        "cuda/params.h",
        '#include "plan/plan.h"',
        "cuda/params.h includes cuda/plan/plan.h: cuda/params.h may include cuda/problem.h",
    ),
    ("cuda/ptx/base.cuh", '#  include "../ptx/sm80.cuh"', "cuda/ptx/sm80.cuh -> cuda/ptx/base.cuh"),
    ("cuda/tile/load.cuh", '#include "../kernels/traits.h"', "cuda/tile/load.cuh includes cuda/kernels/traits.h"),
    ("cuda/small.cu", '#include "torch/check.h"', "cuda/small.cu includes torch/check.h"),
    ("cpu/dispatch.cpp", '#include "cuda/params.h"', "cpu/dispatch.cpp includes cuda/params.h"),
    ("other/new.h", '#include "cuda/params.h"', "other/new.h: in none of the layers"),
]
PLANTED_IMPORTS = [  # file, line
    ("lotr_ext/ops/planner.py", "from ..layers import init"),
    ("lotr_ext/layers/init.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import model"),
    ("bench/measure/store.py", "def late():\n    from ..projection import counts"),
    ("bench/rivals/base.py", "from .. import layer"),
    ("lotr_ext/stray.py", ""),
]


def plant(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")


def test_every_wrong_include_is_named(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for file, line, _ in PLANTED_INCLUDES:
        plant(tmp_path / "csrc" / file, line)
    code, errors = check(tmp_path / "csrc")
    assert code == 1 and "a circle: " in errors
    assert [words for _, _, words in PLANTED_INCLUDES if words not in errors] == [], errors


def lint(folder: Path) -> tuple[int, str]:
    """import-linter's exit code, and what it says is broken."""
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, "".join(done.stdout.partition("Broken contracts")[1:])


def test_every_wrong_import_is_named(tmp_path):
    for name in ("lotr_ext", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    for file, line in PLANTED_IMPORTS:
        plant(tmp_path / file, line)
    code, broken = lint(tmp_path)
    modules = [file.removesuffix(".py").replace("/", ".") for file, _ in PLANTED_IMPORTS]
    assert code != 0 and [module for module in modules if module not in broken] == [], broken
    assert not any(module in lint(ROOT)[1] for module in modules)


def test_python_in_csrc_imports_neither_bench_nor_lotr_ext():
    """import-linter reads packages alone, and csrc is none."""
    statement = re.compile(r"^\s*(?:from|import) (?:bench|lotr_ext)\b.*", re.MULTILINE)
    assert statement.search("def late():\n    from bench.projection.compiled import tool\n")
    found = {path.relative_to(ROOT): statement.findall(path.read_text()) for path in (ROOT / "csrc").rglob("*.py")}
    assert found and {path: lines for path, lines in found.items() if lines} == {}
