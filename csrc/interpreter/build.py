"""Builds what the interpreter runs: objects of nvcc that hold PTX alone, linked with runtime.cpp in place of the CUDA runtime.

`module(capability)` is the Python module of csrc/simt/module over these kernels: the same functions on numpy arrays as the SIMT
executor's, so that the same problems (csrc/simt/checks) run on both.
"""

from __future__ import annotations

import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from csrc.simt import build as simt

HERE = Path(__file__).resolve().parent
BUILD = simt.ROOT / "build-ptx"
CAPABILITIES = (80, 90)
_JOBS = 2


def locked() -> AbstractContextManager[None]:
    """One process at a time builds in BUILD."""
    return simt.locked("interpreter")


def compile_object(source: Path, capability: int, options: tuple[str, ...] = ()) -> Path:
    """An object whose device code is PTX for the capability (80 or 90; 90 is compute_90a). Compiled again if what it reads, or
    the command, has changed.

    Raises:
        csrc.simt.build.BuildError: the compiler's message, or that there is none.
    """
    compiler = simt.tool("nvcc")
    if compiler is None:
        raise simt.BuildError(
            "nvcc: expected in CUDA_HOME/bin, /usr/local/cuda/bin or PATH, found none; install the CUDA toolkit"
        )
    folder = BUILD / str(capability)
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{source.stem}.o"
    virtual = "compute_90a" if capability == 90 else f"compute_{capability}"
    command = [
        str(compiler),
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC",
        "-gencode",
        f"arch={virtual},code={virtual}",
        "--no-compress",
    ]
    command += [f"-I{simt.CSRC}", *options, "-MD", "-MF", str(output.with_suffix(".d")), "-c", str(source), "-o", str(output)]
    simt.make(output, command)
    return output


def _host(source: Path, includes: list[Path]) -> Path:
    """An object of the host's compiler."""
    BUILD.mkdir(parents=True, exist_ok=True)
    output = BUILD / f"{source.stem}.o"
    command = [simt.compiler(), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DLOTR_SM90A", f"-I{simt.CSRC}"]
    for folder in [simt.cuda_include(), *includes]:
        command += ["-isystem", str(folder)]
    command += ["-MMD", "-c", str(source), "-o", str(output)]
    simt.make(output, command)
    return output


def link(objects: list[Path], output: Path) -> Path:
    """A library of objects and the stand-in runtime."""
    parts = [*objects, _host(HERE / "runtime.cpp", [])]
    output.with_suffix(".d").write_text("out: " + " ".join(map(str, parts)))
    simt.make(output, [simt.compiler(), "-shared", *map(str, parts), "-o", str(output)])
    return output


def module(capability: int) -> Path:
    """The kernels of csrc/cuda as PTX for a GPU of this capability, with the functions of csrc/simt/module. Those of the SIMT
    executor that control it do nothing here."""
    import pybind11

    def compiled(source: Path) -> Path:  # files named sm90 exist for 90 alone, as in CMakeLists.txt
        return compile_object(source, 90 if "sm90" in source.stem else capability, ("-DLOTR_SM90A",))

    with locked(), ThreadPoolExecutor(_JOBS) as pool:
        objects = list(pool.map(compiled, sorted((simt.CSRC / "cuda").glob("*.cu"))))
        includes = [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
        host = [*sorted((simt.EXECUTOR / "module").glob("*.cpp")), *sorted(simt.EXECUTOR.glob("*.cpp"))]
        objects += pool.map(lambda source: _host(source, includes), host)
        return link(objects, BUILD / str(capability) / f"{simt.MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}")
