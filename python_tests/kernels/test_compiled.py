"""The compiled code: no spills, no stack, and the intended instructions."""

import re
import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

CUOBJDUMP = build.tool("cuobjdump")
pytestmark = pytest.mark.skipif(
    build.tool("nvcc") is None or CUOBJDUMP is None, reason="no nvcc or no cuobjdump"
)

GEMM_LOTR = "gemm_lotr"
SOURCES = {path.stem: path for path in sorted((build.CSRC / "cuda").rglob("*.cu"))}
MMA = {
    "kernels_bf16": "HMMA.16816.F32.BF16",
    "kernels_fp16": "HMMA.16816.F32",
    "kernels_fp32": "FFMA",
}
BULK = ("UTMALDG.2D ", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "UTMACMDFLUSH", "UCGABAR_ARV")
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
COMMON = ("sm_80", "sm_90a")


def compiled(name: str, target: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Returns the report of ptxas on a source file, and the machine code of each kernel."""
    cubin = folder / "code.cubin"
    code = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    report = build.nvcc(SOURCES[name], cubin, "-O3", "-cubin", code, "-Xptxas", "-v")
    command = [CUOBJDUMP, "--dump-sass", cubin]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return report, dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S))


def check_fused(report: str, kernels: dict[str, str]) -> None:
    """gemm_lotr: products run while others are issued, and 3 warps fit on a quarter of an SM."""
    assert "erialized" not in report, report  # ptxas's warning C7510 and those like it
    assert "C75" not in report, report
    assert len(kernels) == 4  # two dtypes, forward and backward
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 168, report
    product = re.compile(r"HGMMA\.64x256x16\.F32(\.BF16)? R\d+, gdesc\[UR\d+\](\.tnspB)?")
    for symbol, code in kernels.items():
        products = product.findall(code)
        assert len(products) >= 8, symbol  # four for a step of k, and four for one of the rank
        assert {kind == ".BF16" for kind, _ in products} == {"bfloat16" in symbol}
        is_backward = "Lb1E" in symbol  # its W is MN-major, its F K-major
        assert {major == ".tnspB" for _, major in products} == {False, is_backward}
        assert [instruction for instruction in BULK if instruction not in code] == [], symbol
        assert not re.search(r"\b(HMMA|STG)\b", code), symbol


OTHERS = {"operators", "plans", "few_tokens", GEMM_LOTR}  # the first three have no kernel


def case(name: str, target: str) -> object:
    is_long = name in MMA or target not in COMMON
    return pytest.param(name, target, marks=pytest.mark.full if is_long else pytest.mark.slow)


CASES = [case(name, target) for name in sorted(SOURCES.keys() - OTHERS) for target in TARGETS]
CASES.append(case(GEMM_LOTR, "sm_90a"))


@pytest.mark.parametrize(("name", "target"), CASES)
def test_compiled(name: str, target: str, tmp_path: Path) -> None:
    report, kernels = compiled(name, target, tmp_path)
    usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    used = re.findall(usage, report)
    assert len(used) == len(kernels) >= 1, report
    assert set(used) == {("0", "0", "0")}, report
    for symbol, code in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{symbol}: local memory"
        assert not re.search(r"(?<!\.)\b(ATOMG|RED|ATOM)\b", code), f"{symbol}: atomics"
        if name in MMA:
            assert MMA[name] in code, f"{symbol}: no matrix product"
            assert "LDGSTS.E.BYPASS" in code, f"{symbol}: no asynchronous copy"
            assert ("LDSM" in code) == (name != "kernels_fp32"), f"{symbol}: ldmatrix"
        if target == "sm_90a":
            # An early launch waits before it accesses global memory, and lets the next one begin.
            before, _, after = code.partition("ACQBULK")
            assert not re.search(r"\b(LDG|STG|LDGSTS|UTMALDG|EXIT|PREEXIT)\b", before), symbol
            assert "PREEXIT" in after, symbol
            assert ".CONSTANT" not in code, symbol
    if name == GEMM_LOTR:
        check_fused(report, kernels)
