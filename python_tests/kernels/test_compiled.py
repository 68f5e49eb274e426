"""The compiled code: no spills, no stack, and the instructions that were meant. gemm_lotr's: test_gemm_lotr.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

NVCC, CUOBJDUMP = build.tool("nvcc"), build.tool("cuobjdump")
pytestmark = pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="no nvcc or no cuobjdump")

SOURCES = {path.stem: path for path in sorted((build.CSRC / "cuda").glob("*.cu"))}
HOST = {"operators", "plans", "small"}  # no kernel
MMA = {"kernels_bf16": "HMMA.16816.F32.BF16", "kernels_fp16": "HMMA.16816.F32", "kernels_fp32": "FFMA"}
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
COMMON = ("sm_80", "sm_90a")


def compiled(name: str, target: str, folder: Path) -> tuple[str, dict[str, str]]:
    """What ptxas says of a source file, and the machine code of each kernel."""
    cubin = folder / "code.cubin"
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-cubin",
        f"-gencode=arch={target.replace('sm', 'compute')},code={target}",
        f"-I{build.CSRC}",
    ]
    done = subprocess.run([*command, "-Xptxas", "-v", SOURCES[name], "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sass = subprocess.run([CUOBJDUMP, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    return done.stderr, dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S))


def check(name: str, target: str, folder: Path) -> None:
    report, kernels = compiled(name, target, folder)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(used) == len(kernels) >= 1 and set(used) == {("0", "0", "0")}, report
    for symbol, code in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{symbol}: local memory"
        assert not re.search(r"\b(ATOMG|RED|ATOM)\b", code), f"{symbol}: atomics"
        if name in MMA:
            assert MMA[name] in code and "LDGSTS.E.BYPASS" in code, f"{symbol}: no matrix product or asynchronous copy"
            assert ("LDSM" in code) == (name != "kernels_fp32"), f"{symbol}: ldmatrix"
        if target == "sm_90a":  # an early launch waits before global memory, and lets the next one begin
            first = code.index("ACQBULK")
            assert not re.search(r"\b(LDG|STG|LDGSTS|EXIT|PREEXIT)\b", code[:first]), f"{symbol}: before the wait"
            assert "PREEXIT" in code[first:] and ".CONSTANT" not in code, symbol


@pytest.mark.parametrize("target", [t if t in COMMON else pytest.param(t, marks=pytest.mark.full) for t in TARGETS])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n in MMA else pytest.mark.slow) for n in SOURCES if n not in {*HOST, "probe"}],
)
def test_compiled(name: str, target: str, tmp_path: Path) -> None:
    check(name, target, tmp_path)
