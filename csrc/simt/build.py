"""Builds the kernels' Python module and small test programs for the SIMT executor, in three modes.

plain   the numbers and the counters
asan    AddressSanitizer and UBSan: a module needs a separate process, see `python_environment`
race    the executor's race detector: kernels with -fsanitize=thread, linked without it

Objects go to build-simt/<mode>. They are compiled again only if an included file, or the command,
has changed. Two compilers run at a time. `python csrc/simt/build.py [mode ..]` builds the module.

Tests call `module` or `load` (the Python module), `program` or `run_program` (a file with a main),
and `planted_module` (the module with a bug).
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EXECUTOR = CSRC / "simt"
BUILD = ROOT / "build-simt"
MODES = ("plain", "asan", "race")
KINDS = ("bf16", "fp16", "fp32")  # element types, each with a csrc/cuda/kernels_*.cu
JOBS = 2
MODULE = "lotr_simt"

_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class _Flags(NamedTuple):
    """Compiler flags of a mode."""

    executor: list[str]
    kernels: list[str]  # of code that contains kernels
    link: list[str]


_FLAGS = {
    "plain": _Flags(["-O2"], ["-O2"], []),
    "asan": _Flags(["-O1", *_SANITIZE], ["-O1", *_SANITIZE], _SANITIZE),
    "race": _Flags(
        ["-O2", "-DLOTR_SIMT_RACE=1"],
        ["-O1", "-DLOTR_SIMT_RACE=1", "-fsanitize=thread"],
        ["-ldl"],
    ),
    # csrc/simt/module in every mode. It has no kernels, so -O0, which compiles fastest, is enough.
    "bindings": _Flags(["-O0"], ["-O0"], []),
}
_COMMON = [
    "-std=c++17",
    "-g1",  # lines for reports; compiles in three quarters of the time of -g
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DLOTR_SM90A",  # kernels of sm_90a run here too
]


class BuildError(RuntimeError):
    """A compiler is missing or failed. The message has its command and its output."""


def compiler() -> str:
    """Returns g++ if there is one: `_library` uses gcc's names of the sanitizers' libraries."""
    return "g++" if shutil.which("g++") else os.environ.get("CXX") or "c++"


def _toolkit(name: str) -> list[Path]:
    """Returns the folders of this name (bin, include) of CUDA toolkits, and of NVIDIA's wheels."""
    folders = [
        Path(os.environ[root]) / name for root in ("CUDA_HOME", "CUDA_PATH") if root in os.environ
    ]
    folders.append(Path("/usr/local/cuda") / name)
    for base in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        if base:
            folders += sorted(Path(base).glob(f"nvidia/cu*/{name}"), reverse=True)
    return folders


def tool(name: str) -> Path | None:
    """Returns the path of one of the toolkit's programs.

    It is in CUDA_HOME/bin or /usr/local/cuda/bin, in a wheel (nvidia-cuda-nvdisasm), or in PATH.
    """
    for folder in _toolkit("bin"):
        if (folder / name).is_file():
            return folder / name
    path = shutil.which(name)
    return Path(path) if path else None


def cuda_include() -> Path:
    """Returns the folder of cuda_bf16.h, in a CUDA toolkit or in NVIDIA's wheels.

    Raises:
        BuildError: If there is none.
    """
    for include in _toolkit("include"):
        if (include / "cuda_bf16.h").is_file() and (include / "crt" / "host_defines.h").is_file():
            return include
    raise BuildError(
        "no cuda_bf16.h: expected a CUDA toolkit (set CUDA_HOME), or the wheels of its headers: "
        "pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def _run(command: list[str]) -> str:
    """Runs a compiler, and returns what it prints.

    Raises:
        BuildError: If there is none, or it fails.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:  # there is no such program
        raise BuildError(
            f"no C++ compiler: expected g++, or another that CXX names, got {command[0]!r}: "
            f"{error.strerror}. Install one, on Debian by apt-get install g++"
        ) from None
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def nvcc(source: Path, output: Path, *options: str) -> str:
    """Compiles a file for a GPU, and returns what the compiler reports."""
    fixed = [str(tool("nvcc")), "-std=c++17", f"-I{CSRC}"]
    return _run([*fixed, *options, str(source), "-o", str(output)])


class _Compilation(NamedTuple):
    """An object file, its source, and the command that writes it, without `-o output`."""

    output: Path
    source: Path
    command: list[str]


def _stale(output: Path, command: list[str]) -> bool:
    """Returns whether the command changed, or a file that it read is newer than its output."""
    note = output.with_suffix(".cmd")
    depends = output.with_suffix(".d")
    if not output.exists() or not note.exists() or note.read_text() != "\n".join(command):
        return True
    built = output.stat().st_mtime
    text = depends.read_text() if depends.exists() else ":"
    inputs = map(Path, text.replace("\\\n", " ").split(":", 1)[1].split())
    return any(not path.exists() or path.stat().st_mtime > built for path in inputs)


def make(output: Path, command: list[str]) -> bool:
    """Runs `command -o output` if the command or a file that it reads has changed.

    Returns whether it ran.
    """
    if not _stale(output, command):
        return False
    output.with_suffix(".cmd").unlink(missing_ok=True)
    sys.stderr.write(_run([*command, "-o", str(output)]))
    output.with_suffix(".cmd").write_text("\n".join(command))
    return True


def _compilation(
    mode: str, source: Path, includes: list[Path], defines: list[str], *, has_kernels: bool
) -> _Compilation:
    """Returns how to compile a source. Each set of defines has a separate object."""
    flags = _FLAGS[mode]
    key = hashlib.sha1("\n".join([str(source), *defines]).encode()).hexdigest()[:8]
    output = BUILD / mode / f"{source.stem}-{key}.o"
    of_source = flags.kernels if has_kernels else flags.executor
    command = [compiler(), *_COMMON, *of_source, *defines, f"-I{CSRC}"]
    for folder in [cuda_include(), *includes]:
        command += ["-isystem", str(folder)]
    command += ["-MMD", "-x", "c++", "-c", str(source)]
    return _Compilation(output, source, command)


@contextlib.contextmanager
def locked(mode: str) -> Iterator[None]:
    """Lets one process at a time build in this folder of build-simt."""
    folder = BUILD / mode
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_all(steps: list[_Compilation]) -> list[str]:
    """Runs the compile commands, the largest source first, and returns the objects."""
    largest_first = sorted(steps, key=lambda step: -step.source.stat().st_size)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda step: make(step.output, step.command), largest_first))
    return [str(step.output) for step in steps]


def _objects(mode: str, sources: Iterable[Path], includes: list[Path]) -> list[str]:
    """Compiles sources as code that contains kernels, and returns the objects."""
    with locked(mode):
        return _make_all(
            [
                _compilation(mode, source, includes, [], has_kernels=True)
                for source in sorted(sources)
            ]
        )


def _build(
    mode: str,
    sources: list[Path],
    output: Path,
    link: list[str],
    defines: list[str],
    other_objects: tuple[str, ...] = (),
) -> Path:
    """Compiles the sources and links them with the executor.

    Args:
        mode: One of MODES.
        sources: The kernels and what calls them.
        output: The file that is written.
        link: Options of the linker.
        defines: Options of the compiler. Those that begin with LOTR_SIMT_ are the executor's too.
        other_objects: Linked last, so that inline functions come from the mode's objects.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode}")
    of_executor = [define for define in defines if define.startswith("-DLOTR_SIMT_")]
    with locked(mode):
        executor = sorted(EXECUTOR.glob("*.cpp"))
        steps = [
            _compilation(mode, source, [], of_executor, has_kernels=False) for source in executor
        ]
        steps += [_compilation(mode, source, [], defines, has_kernels=True) for source in sources]
        objects = [*_make_all(steps), *other_objects]
        output.with_suffix(".d").write_text("out: " + " ".join(objects))
        make(output, [compiler(), *link, *objects, *_FLAGS[mode].link])
    return output


def program(mode: str, source: Path, defines: tuple[str, ...] = ()) -> Path:
    """Builds a program of one source file with a main(), linked with the executor."""
    name = "-".join([source.stem, *(d.removeprefix("-D").replace("=", "") for d in defines)])
    return _build(mode, [source], BUILD / mode / name, [], list(defines))


def module(mode: str = "plain", kind: str | None = None) -> Path:
    """Builds the Python module: csrc/simt/module and the launchers of csrc/cuda.

    Args:
        mode: One of MODES.
        kind: The only element type that will run ("bf16"). The kernels of the other types are then
            from the plain build, which saves compiling them.
    """
    import pybind11

    includes = [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    other_objects = _objects("bindings", (EXECUTOR / "module").glob("*.cpp"), includes)
    sources = sorted((CSRC / "cuda").rglob("*.cu"))
    name = MODULE
    if kind is not None and mode != "plain":
        name = f"{MODULE}-{kind}"
        others = {CSRC / "cuda" / f"kernels_{other}.cu" for other in KINDS if other != kind}
        sources = [source for source in sources if source not in others]
        other_objects += _objects("plain", others, [])
    output = BUILD / mode / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return _build(mode, sources, output, ["-shared"], [], tuple(other_objects))


def planted_module(mode: str, unit: str, file: str, text: str, instead: str, folder: Path) -> Path:
    """Builds the module with a bug, and returns its path.

    Args:
        mode: One of MODES.
        unit: The .cu of csrc/cuda that includes the file.
        file: The file of csrc/cuda that has the bug.
        text: A text that occurs once in the file.
        instead: The text that replaces it in a copy.
        folder: Where the copy and the module are written.
    """
    copy = folder / "cuda"
    shutil.copytree(CSRC / "cuda", copy)
    source = (copy / file).read_text()
    assert source.count(text) == 1, f"{file} has changed: {text}"
    (copy / file).write_text(source.replace(text, instead))
    correct = module(mode)
    planted = _compilation(mode, copy / unit, [], [], has_kernels=True)
    changed = str(folder / planted.output.name)
    _run([*planted.command, "-o", changed])
    objects = correct.with_suffix(".d").read_text().split()[1:]
    others = [name for name in objects if not Path(name).name.startswith(f"{Path(unit).stem}-")]
    output = folder / correct.name
    _run([compiler(), "-shared", *others, changed, *_FLAGS[mode].link, "-o", str(output)])
    return output


def load(
    mode: str = "plain", path: Path | None = None, announce: Callable[[], None] | None = None
) -> ModuleType:
    """Builds and imports the module, or imports the one at `path`.

    One mode per process; asan only in a process started with `python_environment("asan")`.

    Args:
        mode: One of MODES.
        path: A module that is built already.
        announce: Called first if there is no module yet.
    """
    if announce and not path and not list((BUILD / mode).glob(f"{MODULE}*.so")):
        announce()
    path = path or module(mode)
    loaded = sys.modules.get(MODULE)
    if loaded is not None:
        if Path(loaded.__file__) != path:
            raise RuntimeError(
                f"{MODULE} is already loaded from {loaded.__file__}, expected {path}. "
                f"Use another process."
            )
        return loaded
    spec = importlib.util.spec_from_file_location(MODULE, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def environment(mode: str) -> dict[str, str]:
    """Returns the variables for a process that runs a program of this mode."""
    env = dict(os.environ)
    if mode == "asan":
        env["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0"
        env["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return env


def run_program(
    mode: str, source: Path, *arguments: str, defines: tuple[str, ...] = (), **schedule: object
) -> subprocess.CompletedProcess[str]:
    """Builds and runs a program of one source file.

    Args:
        mode: One of MODES.
        source: The file, with a main().
        arguments: Of the program.
        defines: For the compiler.
        schedule: `order`, `seed` and `preempt` of the executor.
    """
    variables = {f"LOTR_SIMT_{name.upper()}": str(value) for name, value in schedule.items()}
    return subprocess.run(
        [program(mode, source, defines), *arguments],
        capture_output=True,
        text=True,
        env=environment(mode) | variables,
        timeout=1000,
    )


def python_environment(mode: str) -> dict[str, str]:
    """Returns the variables for a Python process that loads the module of this mode."""
    env = environment(mode)
    if mode == "asan":
        # AddressSanitizer must be loaded before Python starts; libstdc++ too, so that it can
        # intercept exceptions.
        env["LD_PRELOAD"] = " ".join(map(_library, ("libasan.so", "libstdc++.so")))
    return env


def _library(name: str) -> str:
    """Returns the path of one of the compiler's libraries."""
    return str(Path(_run([compiler(), f"-print-file-name={name}"]).strip()).resolve())


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["plain"]:
        print(module(chosen))
