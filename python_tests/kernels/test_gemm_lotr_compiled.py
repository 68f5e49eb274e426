"""The compiled code of gemm_lotr for sm_90a: registers, no spills, no serialised wgmma, the instructions that were meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_compiled import CUOBJDUMP, NVCC, ROOT, compile_kernels, disassembled, functions

SOURCE = ROOT / "csrc" / "cuda" / "gemm_lotr_sm90.cu"
KERNELS = 2 * 4 * 2 * 2  # types, ranks, directions, clusters
REGISTERS = 168  # a thread at the launch: 65536 / 384 in steps of 8, which setmaxnreg deals out as 40, 232, 232

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: the compiled code cannot be looked at")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return compile_kernels(SOURCE, ("compute_90a", "sm_90a"), tmp_path_factory.mktemp("sm90a"))


def traits(mangled: str) -> tuple[str, int, bool, int]:
    """Type, rank, whether backward, blocks of a cluster."""
    found = re.search(r"GemmLotrTraitsI(6__half|13__nv_bfloat16)Li(\d+)ELNS\d?_\w*?DirectionE(\d)ELi(\d)E", mangled)
    assert found, mangled
    return found[1], int(found[2]), found[3] == "1", int(found[4])


def test_registers(compiled: tuple[Path, str]) -> None:
    _, report = compiled
    kernels = functions(report)
    assert len({traits(name) for name in kernels}) == len(kernels) == KERNELS
    for name, (registers, spilled, stack) in kernels.items():
        assert (registers, spilled, stack) == (REGISTERS, 0, 0), (
            f"{traits(name)}: {registers}, {spilled} spilled, {stack} of stack"
        )
    assert not re.findall(r"C75\d\d|arning", report)  # C75xx: wgmma that ptxas had to serialise


def product_loops(body: str) -> list[str]:
    """The innermost loops that multiply; not the code at the end of the function where waits that fail go on."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)]
    backward = [
        (int(m[1], 16), at) for at, text in lines if (m := re.search(r"\bBRA 0x([0-9a-f]+)", text)) and int(m[1], 16) < at
    ]
    loops = {(start, end): "\n".join(text for at, text in lines if start <= at <= end) for start, end in backward}
    loops = {ends: text for ends, text in loops.items() if "HGMMA" in text}
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [loops[ends] for ends in inner if "SYNCS.PHASECHK" in loops[ends] and "EXIT" not in loops[ends]]


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
def test_instructions(compiled: tuple[Path, str]) -> None:
    cubin, _ = compiled
    bodies = disassembled(cubin)
    assert len(bodies) == KERNELS
    for name, body in bodies.items():
        kind, rank, backward, cluster = traits(name)
        with_Q = backward and rank == 16
        columns = 256 if rank <= 64 else 128
        products = re.findall(r"HGMMA\.(64x\d+x16)\.F32(\.BF16)?", body)
        assert all(bool(bf16) == ("bfloat16" in kind) for _, bf16 in products), name
        count = [shape for shape, _ in products]
        # four k-steps of a stage by W, four by A, and the rank by F
        expected = {f"64x{columns}x16": 4 + rank // 16} if rank != columns else {f"64x{columns}x16": 8 + rank // 16}
        if rank != columns:
            expected[f"64x{rank}x16"] = 4
        if with_Q:  # a second kind of scout: two stages by A, and 128 rows of u by one of them
            expected |= {"64x16x16": 4 + 8, "64x64x16": 8}
        assert {shape: count.count(shape) for shape in set(count)} == expected, name
        assert len(re.findall(r"\bUSETMAXREG", body)) == 2 and "UTMALDG.2D" in body, name
        assert ("MULTICAST" in body) == (cluster == 2), name
        assert len(re.findall(r"\bSTG\.E\.128", body)) == columns // 16 + 8 * with_Q, name
        loops = product_loops(body)  # of a scout and of a tile: no fence in them, nor does a wait empty L1
        assert sorted(loop.count("HGMMA") for loop in loops) == [4, 4] + [16] * with_Q, name
        assert not any(re.search(r"MEMBAR|CCTL|ERRBAR|LDS|STS", loop) for loop in loops), name
        assert [bool(re.search("LDG|STG", loop)) for loop in loops] == [loop.count("HGMMA") == 16 for loop in loops], name
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: local memory"
        assert not re.search(r"\b(ATOMG|RED|ATOM)\S*\.F(16|32|64)", body), f"{name}: float atomics"
