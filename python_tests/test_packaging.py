"""The wheel, and the last line of setup.py on a machine without torch or wheel: what a user meets before the package runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, **{"cwd": ROOT, **options}
    )


# ---- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the folder of `make`, which has compiled everything already."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    built = run(*pip)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_serves_every_python_and_has_the_package_alone(wheel):
    assert re.fullmatch(r"lotr_ext-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lotr_ext").rglob("*.py")}
    packed = {name for name in names if name.startswith("lotr_ext/")}
    assert packed == modules | {"lotr_ext/_C.abi3.so"} and all(
        name.startswith("lotr_ext") for name in names
    )
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.10" in metadata


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """Of this environment's packages only those that the wheel requires can be found: torch, numpy, safetensors."""
    assert run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv").returncode == 0
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    here = Path(sysconfig.get_paths()["purelib"])
    required = "torch torchgen numpy numpy.libs safetensors sympy mpmath networkx jinja2 markupsafe filelock fsspec functorch"
    for name in (*required.split(), "typing_extensions.py"):
        if (here / name).exists():
            (site / name).symlink_to(here / name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    readme = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    program = "\n".join([*blocks, "import lotr_ext; print(lotr_ext.__file__)"])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    python = tmp_path / "venv" / "bin" / "python"
    for arguments in (["-c", program], ["-m", "lotr_ext.info"]):
        done = run(python, *arguments, cwd=tmp_path, env=environment)
        assert done.returncode == 0 and done.stdout, done.stderr[-3000:]
        assert arguments[0] == "-m" or done.stdout.splitlines()[-1] == str(
            site / "lotr_ext" / "__init__.py"
        )


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (
            "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)",
            ["torch >= 2.10", "got none"],
        ),
        (
            "m.version = lambda n: '2.9.1' if n == 'torch' else version(n)",
            ["torch >= 2.10", "got 2.9.1"],
        ),
        (
            "u.find_spec = lambda n, *a: None if n == 'wheel' else find(n, *a)\n"
            "m.version = lambda n: '69.5' if n == 'setuptools' else version(n)",
            ["package wheel", "setuptools wheel"],
        ),
    ],
)
def test_setup_ends_with_one_line_that_says_what_to_do(tmp_path, patch, words):
    program = f"""
import importlib.metadata as m, importlib.util as u, runpy, shutil as s, sys
find, version, which = u.find_spec, m.version, s.which
{patch}
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", {str(tmp_path)!r}, "--build-temp", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {
        "LOTR_BUILD_DIR": str(tmp_path / "build")
    }
    done = run(sys.executable, "-c", program, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("lotr_ext: expected ") and all(word in last for word in words), (
        done.stderr
    )
