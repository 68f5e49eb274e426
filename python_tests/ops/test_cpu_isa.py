"""The instruction set that CPU operators choose: each lower one computes the same; one that the system refuses is not used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lotr_ext import _C  # noqa: F401  (registers the operators)

ops = torch.ops.lotr
ROOT = Path(__file__).parents[2]
ISAS = ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"]


def test_subnormal_bfloat16_counts_as_zero_where_the_instructions_say_so() -> None:
    smallest, one = torch.full((16, 32), 2.0**-133, dtype=torch.bfloat16), torch.ones(32, 1, dtype=torch.bfloat16)
    flushed = json.loads(ops.info())["cpu"]["isa"] in ("avx512_bf16", "amx_bf16")
    assert (ops.shrink(smallest, one) == (0.0 if flushed else 32 * 2.0**-133)).all()


@pytest.mark.parametrize("isa", [ISAS[0], *(pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS[1:])])
def test_each_instruction_set(isa: str) -> None:
    """All of test_cpu_kernels.py again with each lower instruction set of this CPU."""
    if json.loads(ops.info())["cpu"]["isa"] == isa:
        return
    tests = Path(__file__).parent / "test_cpu_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, env=dict(os.environ, LOTR_CPU_ISA=isa), capture_output=True, text=True)
    if "(what this CPU runs), got " in run.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.parametrize("source", ["supported.h", "table.cpp f32", "table.cpp bf16", "table.cpp f16"])
def test_clang_compiles_the_kernels(source: str) -> None:
    """It refuses names that g++ takes: "f16c" of a CPU, _Float16, and a member of a branch that is not taken."""
    name, _, element = source.partition(" ")
    macros = ["-DLOTR_ISA=generic", "-DLOTR_VB=16", f"-DLOTR_TYPE={element}"] if element else []
    options = ["-x", "c++", "-std=c++17", "-fsyntax-only", "-Wno-pragma-once-outside-header", "-I", ROOT / "csrc", *macros]
    done = subprocess.run(["clang++", *options, ROOT / "csrc" / "cpu" / name], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[:3000]


def test_tiles_that_the_system_refuses_are_not_used() -> None:
    """Linux gives no room for tiles to a process with a signal stack that could not hold them."""
    if json.loads(ops.info())["cpu"]["isa"] != "amx_bf16":
        pytest.skip("this process runs no amx_bf16")
    program = (
        "import ctypes\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "memory = ctypes.create_string_buffer(4096)\n"
        "stack = Stack(ctypes.addressof(memory), 0, 4096)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "import torch; from lotr_ext import _C; print(torch.ops.lotr.info())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["cpu"]["isa"] == "avx512_bf16"

    # asked for by name it is an error, as on a CPU without tiles
    run = subprocess.run([sys.executable, "-c", program], env=dict(os.environ, LOTR_CPU_ISA="amx_bf16"), capture_output=True)
    assert run.returncode != 0
    assert re.search(rb"LOTR_CPU_ISA: expected one of .*avx512_bf16 \(what this CPU runs\), got amx_bf16", run.stderr)


def test_unknown_instruction_set_is_refused() -> None:
    command = [sys.executable, "-c", "import torch; from lotr_ext import _C; print(torch.ops.lotr.info())"]
    run = subprocess.run(command, env=dict(os.environ, LOTR_CPU_ISA="mmx"), capture_output=True, text=True)
    assert run.returncode != 0 and re.search(r"LOTR_CPU_ISA: expected one of .+ \(what this CPU runs\), got mmx", run.stderr)


def configured(folder: Path, isas: str) -> subprocess.CompletedProcess:
    """CMake's first step for a choice of instruction sets; nothing is compiled but what it tries."""
    root = Path(__file__).resolve().parents[2]
    cmake = Path(sys.executable).parent / "cmake"
    command = [str(cmake) if cmake.is_file() else shutil.which("cmake") or "cmake", "-S", str(root), "-B", str(folder)]
    command += ["-DLOTR_CUDA=OFF", f"-DLOTR_CPU_ISAS={isas}", f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_build_for_this_machine_has_its_best_set_alone(tmp_path: Path) -> None:
    assert configured(tmp_path, "native").returncode == 0
    environment = {name: value for name, value in os.environ.items() if name != "LOTR_CPU_ISA"}
    command = [sys.executable, "-c", "import torch; from lotr_ext import _C; print(torch.ops.lotr.info())"]
    info = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    sets = re.findall(r"LOTR_SET\((\w+)", (tmp_path / "cpu_sets.def").read_text())
    assert sets == [json.loads(info)["cpu"]["isa"]]


def test_a_build_has_the_named_sets_and_refuses_others(tmp_path: Path) -> None:
    run = configured(tmp_path, "generic,mmx")
    error = " ".join(run.stderr.split())
    assert (
        run.returncode != 0
        and "LOTR_CPU_ISAS: expected AUTO, all, native, or names of generic" in error
        and "got generic,mmx" in error
    )
    assert configured(tmp_path, "generic").returncode == 0
    assert re.findall(r"LOTR_SET\((\w+)", (tmp_path / "cpu_sets.def").read_text()) == ["generic"]
