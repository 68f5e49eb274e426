"""The kernels' machine code: compiled by nvcc for one architecture, disassembled, kept by the hash of the sources.

Resources are what ptxas reports: registers, spilled bytes, static shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from csrc.simt.build import tool

from ..measure.store import ROOT
from .sass import LISTED, Instruction, parse
from .sources import closure, cpp_id

CSRC = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "static"
WGMMA = [CSRC / "one_product_sm90.cu", CSRC / "shrink_grad_sm90.cu"]  # of bf16 and fp16 for sm_90a, besides the others
SOURCES = {name: CSRC / f"kernels_{name}.cu" for name in ("bf16", "fp16", "tf32", "fp32")} | {
    name: CSRC / f"{name}.cu" for name in ("rows", "scale_backward")
}


@dataclass(frozen=True)
class Compiled:
    """One compiled instance of a kernel."""

    symbol: str
    registers: int  # a thread
    spilled: int  # bytes
    static_shared: int  # bytes a block, besides what the launch asks for
    code: list[Instruction]

    @property
    def kernel(self) -> str:
        found = re.match(r"_ZN4lotr7kernels(\d+)(\w+)", self.symbol)
        return found[2][: int(found[1])] if found else self.symbol

    @property
    def numbers(self) -> tuple[int, ...]:
        """The template's integers: the rank class first."""
        return tuple(int(n) for n in re.findall(r"Li(\d+)E", self.symbol))


def tools() -> tuple[Path, Path]:
    """nvcc and nvdisasm. Raises FileNotFoundError with one line: which is missing and how to get it."""
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    if nvcc is None:
        raise FileNotFoundError(
            "nvcc: expected in CUDA_HOME/bin, /usr/local/cuda/bin or PATH, found none; "
            "the model reads compiled code: install the CUDA toolkit or set CUDA_HOME"
        )
    if nvdisasm is None:
        raise FileNotFoundError(f"nvdisasm: expected beside {nvcc} or as a wheel, found none; pip install nvidia-cuda-nvdisasm")
    return nvcc, nvdisasm


def sources_of(dtype: str, architecture: str) -> list[Path]:
    return [SOURCES[dtype], *WGMMA * (architecture == "90a" and dtype in ("bf16", "fp16"))]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise OSError(f"{Path(command[0]).name}: failed with {done.returncode}: {first.strip()}")
    return done


def _make(dtype: str, architecture: str, target: Path) -> None:
    nvcc, nvdisasm = tools()
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-cubin", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
    report = code = ""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        for source in sources_of(dtype, architecture):
            report += _run([str(nvcc), *flags, str(source), "-o", str(cubin)]).stderr
            code += _run([str(nvdisasm), "--print-instruction-encoding", str(cubin)]).stdout
    lines = [line for line in code.splitlines() if LISTED.match(line)]
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(report + "\n=== SASS\n" + re.sub(r"[ \t]+", " ", "\n".join(lines)) + "\n")
    os.replace(temporary, target)


def _resources(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes, static shared bytes of each kernel, from ptxas -v."""
    found = {}
    for name, rest in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", report, re.S):
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", rest)
        shared = re.search(r"(\d+) bytes smem", rest)
        registers = re.search(r"Used (\d+) registers", rest)
        if spills and registers:
            spilled = int(spills[1]) + int(spills[2])
            found[name] = (int(registers[1]), spilled, int(shared[1]) if shared else 0)
    return found


def compile_kernels(dtype: str, architecture: str, cache: Path = CACHE) -> dict[str, Compiled]:
    """Every kernel of an element type, or of a file of all types ("rows", "scale_backward"), by symbol, compiled for "80",
    "90a" ... unless the same sources were before."""
    if dtype not in SOURCES:
        raise ValueError(f"dtype: expected one of {', '.join(SOURCES)}, got {dtype!r}")
    target = cache / f"{dtype}-sm{architecture}-{cpp_id(closure(sources_of(dtype, architecture), [CSRC.parent]))}.sass"
    if not target.exists():
        _make(dtype, architecture, target)
        for old in cache.glob(f"{dtype}-sm{architecture}-*.sass"):
            if old != target:
                old.unlink(missing_ok=True)
    report, _, listing = target.read_text(encoding="utf-8").partition("\n=== SASS\n")
    resources = _resources(report)
    bodies = parse(listing)
    missing = sorted(set(resources) ^ set(bodies))
    if missing or not resources:
        raise OSError(f"{target.name}: expected ptxas and nvdisasm to list the same kernels, got a difference: {missing[:1]}")
    return {name: Compiled(name, *resources[name], bodies[name]) for name in resources}
