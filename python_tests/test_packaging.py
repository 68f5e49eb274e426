"""The wheel, and the messages of setup.py where a package, a tool or Python is not usable."""

import os
import re
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, run_python
from test_docs import blocks

# ---- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a wheel in the build folder of `make`, which has compiled everything."""
    folder = tmp_path_factory.mktemp("wheel")
    process = run_python(
        *("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"),
        *("--wheel-dir", folder, ROOT),
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_serves_every_python_and_contains_only_the_package(wheel: Path) -> None:
    assert re.fullmatch(r"lotr_ext-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = [name for name in names if name.endswith("METADATA")]
        metadata = archive.read(metadata_name).decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lotr_ext").rglob("*.py")}
    assert {name for name in names if name.startswith("lotr_ext/")} == modules | {
        "lotr_ext/_C.abi3.so"
    }
    assert all(name.startswith("lotr_ext") for name in names)
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch>=2.10" in metadata


# The names in site-packages of what the wheel requires, and of what these packages require.
REQUIRED = (
    "torch torchgen numpy numpy.libs safetensors sympy mpmath networkx jinja2 markupsafe filelock "
    "fsspec functorch typing_extensions.py"
)


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The environment has only the packages that the wheel requires: torch, numpy, safetensors."""
    venv = tmp_path / "venv"
    assert run_python("-m", "venv", "--without-pip", venv).returncode == 0
    (site,) = venv.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_paths()["purelib"])
    for name in REQUIRED.split():
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ending = "import lotr_ext.info; lotr_ext.info.main([]); print(lotr_ext.__file__)"
    program = "\n".join([*blocks(ROOT / "docs" / "index.md", "python"), ending])
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    process = subprocess.run(
        [venv / "bin" / "python", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == str(site / "lotr_ext" / "__init__.py")


# ---- messages ------------------------------------------------------------------------------------

# Each patch makes a package, cmake or Python look missing, old or broken. In it, u is
# importlib.util, and m is importlib.metadata. find and version are the original u.find_spec and
# m.version.


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
        (
            # A cmake that fails and prints no version.
            "import subprocess as s\ns.run = lambda *a, **k: s.CompletedProcess(a, 1, '')",
            ["cmake >= 3.26", "no version"],
        ),
        (
            # Python 3.9 fails at `str | None`, as here at any class that follows the check.
            "import setuptools.command.build_ext as b\n"
            "b.build_ext = None\nsys.version_info = (3, 9)",
            ["Python >= 3.10"],
        ),
    ],
)
def test_setup_ends_with_one_line_that_says_what_to_do(
    tmp_path: Path, patch: str, words: list[str]
) -> None:
    build = ["build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    program = f"""
import importlib.metadata as m, importlib.util as u, runpy, sys
find = u.find_spec
version = m.version
{patch}
sys.argv = ["setup.py", "--quiet", *{build}]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = os.environ | {"LOTR_BUILD_DIR": str(tmp_path / "build")}
    process = run_python("-c", program, cwd=ROOT, env=environment)
    assert process.returncode != 0
    last_line = process.stderr.splitlines()[-1]
    assert last_line.startswith("lotr_ext: expected "), process.stderr
    assert all(word in last_line for word in words), process.stderr


@pytest.mark.parametrize("name", ["CXXFLAGS", "CUDAFLAGS"])
def test_cmake_starts_afresh_if_a_variable_that_it_reads_once_changes(
    tmp_path: Path, name: str
) -> None:
    # It fails at the end, because the cmake that it calls prints its arguments and builds nothing.
    program = f"""
import runpy, subprocess, sys
def print_command(command, **options):
    print(command)
    return subprocess.CompletedProcess(command, 0, "cmake version 3.26")
subprocess.run = print_command
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    outputs = [
        run_python(
            *("-c", program),
            cwd=ROOT,
            env=os.environ | {"LOTR_BUILD_DIR": str(tmp_path / "build"), name: value},
        ).stdout
        for value in ("-O1", "-O1", "-O2")
    ]
    assert ["--fresh" in output for output in outputs] == [True, False, True]
