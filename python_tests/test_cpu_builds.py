"""Which instruction sets a build contains, and which one a process uses.

test_operators.py compares their results.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python


def run_info(preparation: str = "", isa: str = "") -> subprocess.CompletedProcess[str]:
    """Prints `info` in a new process, after other statements.

    Args:
        preparation: The statements.
        isa: LOTR_CPU_ISA. "" is as if it were not set.
    """
    program = f"{preparation}\nimport torch, lotr_ext; print(torch.ops.lotr.info())"
    return run_python("-c", program, env=os.environ | {"LOTR_CPU_ISA": isa})


def isa_in(info: str) -> str:
    return json.loads(info)["cpu"]["isa"]


def test_bfloat16_instructions_flush_subnormal_numbers() -> None:
    subnormal = torch.full((16, 32), 2.0**-133, dtype=torch.bfloat16)
    ones = torch.ones(32, 1, dtype=torch.bfloat16)
    is_flushed = isa_in(torch.ops.lotr.info()) in ("avx512_bf16", "amx_bf16")
    expected = 0.0 if is_flushed else 32 * 2.0**-133
    assert (torch.ops.lotr.shrink(subnormal, ones) == expected).all()


def test_tiles_that_the_system_refuses_are_not_used() -> None:
    """Linux refuses tiles to a process with a signal stack that is too small for them."""
    if isa_in(run_info().stdout) != "amx_bf16":
        pytest.skip("this CPU has no amx_bf16")
    small_signal_stack = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
"""
    assert isa_in(run_info(small_signal_stack).stdout) == "avx512_bf16"
    # If it is set by name, it is an error, as on a CPU without tiles.
    process = run_info(small_signal_stack, isa="amx_bf16")
    assert process.returncode != 0
    assert re.search(
        r"LOTR_CPU_ISA: expected one of .+ \(what this CPU runs\), got amx_bf16", process.stderr
    )


def configured(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configures a build with CMake, which compiles only small programs that test the compiler."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [cmake, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_build_contains_the_requested_sets(tmp_path: Path) -> None:
    for isas, expected in (("native", isa_in(run_info().stdout)), ("generic", "generic")):
        options = ("-DLOTR_CUDA=OFF", f"-DLOTR_CPU_ISAS={isas}")
        assert configured(tmp_path / isas, *options).returncode == 0
        sets = (tmp_path / isas / "cpu_sets.def").read_text()
        assert re.findall(r"LOTR_SET\((\w+)", sets) == [expected]
    process = configured(tmp_path / "bad", "-DLOTR_CUDA=OFF", "-DLOTR_CPU_ISAS=generic,mmx")
    assert process.returncode != 0
    assert re.search(
        "LOTR_CPU_ISAS: expected AUTO, .* or names of generic.* got generic,mmx",
        " ".join(process.stderr.split()),
    )


@pytest.mark.slow
def test_a_toolkit_is_found_before_a_wrapper_on_path(tmp_path: Path) -> None:
    # Without CUDA_HOME, nvcc of /usr/local/cuda comes before /bin/nvcc, here in another root.
    for folder in ("bin", "usr/local/cuda/bin"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy2("/bin/false", tmp_path / folder / "nvcc")
    configured(tmp_path / "build", f"-DCMAKE_FIND_ROOT_PATH={tmp_path}")
    entry = f"LOTR_NVCC:FILEPATH={tmp_path}/usr/local/cuda/bin/nvcc\n"
    assert entry in (tmp_path / "build" / "CMakeCache.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.parametrize(
    "source", ["supported.h", "table.cpp f32", "table.cpp bf16", "table.cpp f16"]
)
def test_clang_compiles_the_kernels(source: str) -> None:
    """clang++ rejects names that g++ accepts."""
    name, _, element = source.partition(" ")
    macros = ["-DLOTR_ISA=generic", "-DLOTR_VB=16", f"-DLOTR_TYPE={element}"] if element else []
    options = ["-std=c++17", "-fsyntax-only", "-Wno-pragma-once-outside-header"]
    command = ["clang++", "-x", "c++", *options, "-I", ROOT / "csrc", *macros]
    process = subprocess.run(
        [*command, ROOT / "csrc" / "cpu" / name], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr[:3000]) == (0, "")
