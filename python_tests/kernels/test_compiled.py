"""The compiled code of every architecture: no spills, no stack, few enough registers, the instructions that were meant."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bench.projection.compiled import Compiled
from bench.projection.compiled import compile_kernels as kept_code
from bench.projection.sass import blocks_of

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(s for s in (ROOT / "csrc" / "cuda").glob("*.cu") if "sm90" not in s.stem)  # those: test_gemm_lotr_compiled.py
QUICK = ("kernels_bf16", "operators", "rows", "small")  # make test-full compiles all of them
MATRIX = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32", "fp32": "FFMA"}
KERNELS = ("shrink", "expand_add", "factor_grad", "shrink_grad")


def tool(name: str) -> str | None:
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ] + [
        Path("/usr/local/cuda/bin")
    ]
    for base in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        folders += sorted(Path(base).glob("nvidia/cu*/bin"), reverse=True) if base else []
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return str(found) if found else shutil.which(name)


NVCC, CUOBJDUMP = tool("nvcc"), tool("cuobjdump")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: the compiled code cannot be looked at")


def architecture_pairs() -> list[tuple[str, str]]:
    return [("compute_80", "sm_80"), ("compute_90a", "sm_90a")]


def more_architectures() -> list[tuple[str, str]]:
    return [("compute_89", "sm_89"), ("compute_100a", "sm_100a"), ("compute_120", "sm_120")]


def compile_kernels(source: Path, pair: tuple[str, str], folder: Path) -> tuple[Path, str]:
    """The cubin, and what ptxas says of it."""
    cubin = folder / f"{source.stem}.{pair[1]}.cubin"
    command = [
        NVCC,
        "-std=c++17",
        "-cubin",
        f"-gencode=arch={pair[0]},code={pair[1]}",
        "-Xptxas",
        "-v",
        str(source),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def functions(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and stack bytes of each kernel, from ptxas."""
    found = {}
    for name, rest in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", report, re.S):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", rest).groups()
        )
        found[name] = (int(re.search(r"Used (\d+) registers", rest).group(1)), stores + loads, stack)
    return found


def disassembled(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel, as text."""
    sass = subprocess.run([CUOBJDUMP, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S))


def kernel_of(mangled: str) -> str:
    names = ("shrink_grad", "factor_grad", "expand_add", "fold_grad", "shrink", "fold", "pack")
    return next(k for k in names if f"{len(k)}{k}" in mangled)


def check(source: Path, pair: tuple[str, str], folder: Path) -> None:
    cubin, report = compile_kernels(source, pair, folder)
    kernels = functions(report)
    if source.stem in ("small", "counters"):
        assert not kernels
        return
    assert kernels, f"{source.name}: ptxas reported no kernel"
    for name, (registers, spilled, stack) in kernels.items():
        assert spilled == 0 and stack == 0, f"{source.stem} {pair[1]} {name}: {spilled} bytes spilled, {stack} bytes of stack"
        assert registers <= 255, name
    kind = source.stem.removeprefix("kernels_")
    if CUOBJDUMP is None or kind not in MATRIX:
        return
    bodies = disassembled(cubin)
    assert {kernel_of(name) for name in bodies} == {*KERNELS, "pack"}
    bodies = {name: body for name, body in bodies.items() if kernel_of(name) != "pack"}  # a copy: it multiplies nothing
    for name, body in bodies.items():
        where = f"{source.stem} {pair[1]} {name}"
        assert MATRIX[kind] in body, f"{where}: no {MATRIX[kind]}"
        assert "LDGSTS.E.BYPASS.128" in body, f"{where}: no 16-byte asynchronous copies"
        assert ("HMMA" in body) == (kind != "fp32"), where
        if kind != "fp32":
            assert "LDSM.16" in body or (kind == "tf32" and kernel_of(name) == "factor_grad"), f"{where}: no ldmatrix"
        if kind in ("bf16", "fp16") and kernel_of(name) != "expand_add":
            assert "LDSM.16.MT88" in body, f"{where}: no transposing ldmatrix"
        assert not re.search(r"\b(LDL|STL)\b", body), f"{where}: local memory"
        assert not re.search(r"\b(ATOMG|RED|ATOM)\S*\.F(16|32|64)", body), f"{where}: float atomics"


@pytest.mark.parametrize("source", [s for s in SOURCES if s.stem in QUICK], ids=lambda s: s.stem)
def test_compiled_code_of_an_a100(source: Path, tmp_path: Path) -> None:
    check(source, ("compute_80", "sm_80"), tmp_path)


GLOBAL = ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED")


def too_early(kernel: Compiled) -> list[str]:
    """What a thread can come to from the kernel's entry without griddepcontrol.wait: global memory, its end, the trigger."""
    blocks, found = blocks_of(kernel.code), []
    seen, todo = set(), [min(blocks)]
    while todo:
        start = todo.pop()
        if start in seen:
            continue
        seen.add(start)
        for i in blocks[start].code:
            if i.name == "ACQBULK":
                break
            if i.name in (*GLOBAL, "EXIT", "PREEXIT"):
                found.append(f"{i.opcode} at {i.address:#x}")
        else:
            todo += blocks[start].next
    return found


@pytest.mark.skipif(tool("nvdisasm") is None, reason="no nvdisasm")
@pytest.mark.parametrize("source", ["bf16", "rows"])
def test_hopper_kernels_wait_first_and_let_the_next_begin(source: str) -> None:
    for kernel in kept_code(source, "90a").values():
        assert too_early(kernel) == [], kernel.symbol
        names = [i.name for i in kernel.code]
        assert names.count("ACQBULK") == 1 and "PREEXIT" in names, kernel.symbol


@pytest.mark.full
@pytest.mark.parametrize("pair", architecture_pairs() + more_architectures(), ids=lambda p: p[1])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiled_code(source: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    check(source, pair, tmp_path)
