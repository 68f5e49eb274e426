"""Which instruction sets a build has, and which one a process uses. Their numbers: test_operators.py."""

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

ROOT = Path(__file__).resolve().parents[1]
INFO = "import torch, lotr_ext; print(torch.ops.lotr.info())"
SOURCES = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="needs the sources")
ops = torch.ops.lotr


def started(program: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "LOTR_CPU_ISA"}
    env |= {} if isa is None else {"LOTR_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


def isa_of(run: subprocess.CompletedProcess[str]) -> str:
    return json.loads(run.stdout)["cpu"]["isa"]


def test_subnormal_bfloat16_counts_as_zero_where_the_instructions_say_so() -> None:
    smallest, one = (
        torch.full((16, 32), 2.0**-133, dtype=torch.bfloat16),
        torch.ones(32, 1, dtype=torch.bfloat16),
    )
    flushed = json.loads(ops.info())["cpu"]["isa"] in ("avx512_bf16", "amx_bf16")
    assert (ops.shrink(smallest, one) == (0.0 if flushed else 32 * 2.0**-133)).all()


def test_tiles_that_the_system_refuses_are_not_used() -> None:
    """Linux gives no room for tiles to a process whose signal stack could not hold them."""
    if isa_of(started(INFO, None)) != "amx_bf16":
        pytest.skip("this CPU has no amx_bf16")
    program = (
        "import ctypes\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "memory = ctypes.create_string_buffer(4096)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0\n"
    )
    assert isa_of(started(program + INFO, None)) == "avx512_bf16"
    run = started(program + INFO, "amx_bf16")  # by name it is an error, as on a CPU without tiles
    assert run.returncode and re.search(
        r"LOTR_CPU_ISA: expected one of .+ \(what this CPU runs\), got amx_bf16", run.stderr
    )


def test_unknown_instruction_set_is_refused() -> None:
    run = started(INFO, "mmx")
    assert run.returncode and re.search(
        r"LOTR_CPU_ISA: expected one of .+ \(what this CPU runs\), got mmx", run.stderr
    )


def configured(folder: Path, isas: str) -> subprocess.CompletedProcess[str]:
    """CMake's first step for a choice of instruction sets: it compiles only what it tries."""
    own = Path(sys.executable).parent / "cmake"
    command = [
        str(own) if own.is_file() else shutil.which("cmake") or "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
    ]
    command += [
        "-DLOTR_CUDA=OFF",
        f"-DLOTR_CPU_ISAS={isas}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    return subprocess.run(command, capture_output=True, text=True)


@SOURCES
@pytest.mark.slow
def test_a_build_has_the_sets_that_were_asked_for(tmp_path: Path) -> None:
    for asked, want in (("native", isa_of(started(INFO, None))), ("generic", "generic")):
        assert configured(tmp_path / asked, asked).returncode == 0
        assert re.findall(r"LOTR_SET\((\w+)", (tmp_path / asked / "cpu_sets.def").read_text()) == [
            want
        ]
    run = configured(tmp_path / "bad", "generic,mmx")
    error = " ".join(run.stderr.split())
    assert (
        run.returncode
        and "LOTR_CPU_ISAS: expected AUTO, all, native, or names of generic" in error
        and "got generic,mmx" in error
    )


@SOURCES
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.parametrize(
    "source", ["supported.h", "table.cpp f32", "table.cpp bf16", "table.cpp f16"]
)
def test_clang_compiles_the_kernels(source: str) -> None:
    """It refuses names that g++ takes."""
    name, _, element = source.partition(" ")
    macros = ["-DLOTR_ISA=generic", "-DLOTR_VB=16", f"-DLOTR_TYPE={element}"] if element else []
    options = [
        "-x",
        "c++",
        "-std=c++17",
        "-fsyntax-only",
        "-Wno-pragma-once-outside-header",
        "-I",
        ROOT / "csrc",
        *macros,
    ]
    done = subprocess.run(
        ["clang++", *options, ROOT / "csrc" / "cpu" / name], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[:3000]
