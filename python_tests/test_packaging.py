"""The wheel, the source archive, and the messages of set-up and of setup.py: what a user meets before the package runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
OLD_PYTHON = '#!/bin/sh\ncase "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac\n'
NO_VENV = f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n'
COMPILER, OLD_COMPILER = "#!/bin/sh\nexit 0\n", "#!/bin/sh\nexit 1\n"


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **{"cwd": ROOT, **options})


# ---- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the folder of `make`, which has compiled everything already."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT]
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
    assert packed == modules | {"lotr_ext/_C.abi3.so"} and all(name.startswith("lotr_ext") for name in names)
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.10" in metadata


def test_the_module_links_to_no_one_torch_cuda_or_python(wheel, tmp_path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is missing (binutils)")
    with zipfile.ZipFile(wheel) as archive:
        module = archive.extract("lotr_ext/_C.abi3.so", tmp_path)
    dynamic = run("readelf", "-d", module).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    allowed = r"libtorch_cpu|libc10|libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux"
    assert needed and all(re.match(rf"({allowed})[.-]", name) for name in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = run("readelf", "-V", module).stdout
    # what a system with GLIBC 2.34 and gcc 11's libraries has
    for library, most in (("GLIBC", (2, 34)), ("GLIBCXX", (3, 4, 29)), ("CXXABI", (1, 3, 13)), ("GCC", (11,))):
        newest = max(tuple(map(int, v.split("."))) for v in re.findall(rf"\b{library}_(\d+(?:\.\d+)*)", symbols))
        assert newest <= most, f"expected a module that runs from {library} {most} on, got one that needs {newest}"


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
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    python = tmp_path / "venv" / "bin" / "python"
    for arguments in (["-c", program], ["-m", "lotr_ext.info"]):
        done = run(python, *arguments, cwd=tmp_path, env=environment)
        assert done.returncode == 0 and done.stdout, done.stderr[-3000:]
        assert arguments[0] == "-m" or done.stdout.splitlines()[-1] == str(site / "lotr_ext" / "__init__.py")


def test_the_source_archive_has_all_that_the_build_reads(tmp_path):
    done = run(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert needed | {name for name in sources if not name.startswith("csrc/simt/")} <= names
    assert not any(name.startswith(("build", "python_tests", "csrc/simt/")) for name in names)


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("programs", "arguments", "words"),
    [
        ({}, [], ["no Python 3.10 or later", "install"]),
        ({"python3": OLD_PYTHON, "c++": COMPILER}, [], ["no Python 3.10 or later"]),
        ({"python3": PYTHON, "old": OLD_PYTHON, "c++": COMPILER}, ["old"], ["PYTHON=old is Python 3.9.2", "3.10"]),
        ({"python3": PYTHON, "c++": COMPILER}, ["absent"], ["PYTHON=absent is not a command"]),
        ({"python3": NO_VENV, "c++": COMPILER}, [], ["no venv module", "python3-venv"]),
        ({"python3": PYTHON}, [], ["no C++ compiler", "g++"]),
        ({"python3": PYTHON, "c++": OLD_COMPILER}, [], ["does not compile C++17"]),
    ],
)
def test_a_machine_without_a_tool_gets_one_line(tmp_path, programs, arguments, words):
    """.ci/make_venv on a machine that has only these programs (and the shell's own)."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "mktemp", "rm", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    done = run("sh", ROOT / ".ci" / "make_venv", tmp_path / "venv", *arguments, env=environment)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("setup: ") and all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)", ["torch >= 2.10", "got none"]),
        ("m.version = lambda n: '2.9.1' if n == 'torch' else version(n)", ["torch >= 2.10", "got 2.9.1"]),
        (
            "u.find_spec = lambda n, *a: None if n == 'wheel' else find(n, *a)\n"
            "m.version = lambda n: '69.5' if n == 'setuptools' else version(n)",
            ["package wheel", "setuptools wheel"],
        ),
        ("s.which = lambda n, **k: None", ["C++17 compiler", "got none"]),
        ("s.which = lambda n, **k: None if n == 'cmake' else which(n, **k)", ["cmake >= 3.26", "pip install cmake ninja"]),
        ("s.which = lambda n, **k: None if n in ('ninja', 'make') else which(n, **k)", ["ninja or make", "got neither"]),
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
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"LOTR_BUILD_DIR": str(tmp_path / "build")}
    done = run(sys.executable, "-c", program, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("lotr_ext: expected ") and all(word in last for word in words), done.stderr
