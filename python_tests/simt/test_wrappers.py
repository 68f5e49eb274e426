"""csrc/cuda/ptx by its two compilers: nvcc makes of each wrapper the one instruction meant, a host compiler refuses what
would silently mean something else there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

PROGRAMS = Path(__file__).parent / "programs"
NVCC = build.tool("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")

MEMORY = ("ld.global", "ld.global.nc", "ld.global.cg", "ld.shared")
MEMORY += ("st.global", "st.shared")
WORDS = ("u16", "u32", "v2.u32", "v4.u32")
SM80 = {
    **{f"{op}.{word}": 1 for op in MEMORY for word in WORDS},
    "@there ld.global.cg.v4.f32": 1,
    "cp.async.cg.shared.global [%r], [%rd], 16": 2,
    "cp.async.cg.shared.global [%r], [%rd], 16, %r": 1,
    "cp.async.commit_group": 1,
    "cp.async.wait_group 1": 1,
    "bar.sync": 2,  # __syncthreads is barrier 0
    "bar.arrive": 1,
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": 1,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": 1,
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16": 1,
    "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16": 1,
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 1,
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 1,
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": 1,
    "movmatrix.sync.aligned.m8n8.trans.b16": 1,
    "cvt.rna.tf32.f32": 1,
    "shfl.sync.bfly.b32": 1,
    "shfl.sync.idx.b32": 1,
    "fence.acq_rel.gpu": 1,
    "atom.relaxed.gpu.global.add.s32": 1,
    "atom.relaxed.gpu.global.add.f32": 1,
    "atom.acq_rel.gpu.global.add.s32": 1,
    "atom.relaxed.gpu.global.inc.u32": 1,
    "st.release.gpu.global.s32": 1,
    "ld.acquire.gpu.global.s32": 1,
}
EARLY = {"griddepcontrol.wait": 1, "griddepcontrol.launch_dependents": 1}
SM90 = EARLY | {
    "mbarrier.init.shared::cta.b64": 1,
    "fence.mbarrier_init.release.cluster": 1,
    "barrier.cluster.arrive.aligned": 1,
    "barrier.cluster.arrive.relaxed.aligned": 1,
    "barrier.cluster.wait.aligned": 2,
    "prefetch.tensormap": 1,
    "mbarrier.arrive.shared::cta.b64": 1,
    "mbarrier.arrive.expect_tx.shared::cta.b64": 1,
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes": 1,
    "mbarrier.try_wait.parity.shared::cta.b64": 1,
    "wgmma.fence.sync.aligned": 1,
    # shared and register operands; the last words of a product say whether a and b are MN-major
    **{f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t}": 4 for n in (16, 32, 64, 128, 256) for t in ("bf16", "f16")},
    "wgmma.commit_group.sync.aligned": 10,
    "wgmma.wait_group.sync.aligned 0": 10,
    "wgmma.wait_group.sync.aligned 1": 10,
    "mapa.u64": 1,
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster": 1,
    "mapa.shared::cluster.u32": 3,
    "@there mapa.shared::cluster.u32": 1,
    "mbarrier.arrive.shared::cluster.b64": 1,
    "mbarrier.arrive.release.cluster.shared::cluster.b64": 1,
    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64": 1,
    "st.shared::cluster.u32": 1,
    "@there ld.shared::cluster.v4.f32": 1,
    "setmaxnreg.dec.sync.aligned.u32 40": 1,
    "setmaxnreg.inc.sync.aligned.u32 232": 1,
}


def compile_ptx(text: str, target: str, folder: Path) -> str:
    source, ptx = folder / "kernel.cu", folder / "kernel.ptx"
    source.write_text(text)
    command = [NVCC, "-std=c++17", f"-arch={target}", f"-I{build.CSRC}", f"-I{PROGRAMS}", "-ptx", str(source), "-o", str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ptx.read_text()


def instructions(ptx: str) -> list[str]:
    """Opcodes and operands, registers without their numbers, one an entry."""
    found = []
    for line in ptx.splitlines():
        line = re.sub(r"%(r|rd|f|h|p|rs)\d+", r"%\1", line.strip())
        if line and not line.startswith((".", "//", "{", "}", "$")):
            found.append(re.sub(r"\s+", " ", line.rstrip(";")))
    return found


def missing(expected: dict[str, int], ptx: str) -> dict[str, int]:
    """How often those were found that were found too seldom. An entry with operands may go on after them."""
    lines = instructions(ptx)

    def count(op: str) -> int:
        return sum(line.startswith(op) if " " in op else line.split(" ")[0] == op for line in lines)

    return {op: count(op) for op, least in expected.items() if count(op) < least}


@needs_nvcc
def test_every_wrapper_is_its_instruction(tmp_path: Path) -> None:
    ptx = compile_ptx('#include "every_wrapper.cuh"\n', "sm_80", tmp_path)
    assert missing(SM80, ptx) == {}
    assert missing(EARLY, ptx) == dict.fromkeys(EARLY, 0)  # what is not there does nothing


@needs_nvcc
def test_every_wrapper_of_hopper_is_its_instruction(tmp_path: Path) -> None:
    ptx = compile_ptx('#define LOTR_EVERY_SM90 1\n#include "every_wrapper.cuh"\n', "sm_90a", tmp_path)
    assert missing(SM80 | SM90, ptx) == {}
    products = [line.split("}, ", 1)[1] for line in instructions(ptx) if line.startswith("wgmma.mma_async")]
    assert sorted(set(products)) == [
        "%rd, %rd, p, 1, 1, 0, 0",
        "%rd, %rd, p, 1, 1, 0, 1",
        "%rd, %rd, p, 1, 1, 1, 1",
        "{%r,%r,%r,%r}, %rd, p, 1, 1, 0",
    ]
    assert len(products) == 40


@needs_nvcc
@pytest.mark.parametrize(
    "kernel, target",
    [
        ("gemm_sm80", "sm_80"),
        ("sum", "sm_80"),
        ("handoff", "sm_80"),
        ("together", "sm_80"),
        ("gemm_sm90", "sm_90a"),
        ("pair_sm90", "sm_90a"),
    ],
)
def test_nvcc_compiles_the_executors_kernels(kernel: str, target: str, tmp_path: Path) -> None:
    assert ".entry" in compile_ptx(f'#include "{kernel}.cuh"\n', target, tmp_path)


def host_compiler(text: str, folder: Path) -> subprocess.CompletedProcess:
    source = folder / "kernel.cpp"
    source.write_text(text)
    command = [build.compiler(), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{build.CSRC}", f"-I{PROGRAMS}", "-isystem", str(build.cuda_include()), str(source)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_wrapper_compiles_on_the_host_without_warnings(tmp_path: Path) -> None:
    done = host_compiler('#define LOTR_EVERY_SM90 1\n#include "every_wrapper.cuh"\n', tmp_path)
    assert done.returncode == 0, done.stderr


def test_static_shared_memory_does_not_compile(tmp_path: Path) -> None:
    """On the host each thread would silently have its own copy."""
    text = '#include "cuda/ptx/sm80.cuh"\n__global__ void k() { __shared__ float f[32]; f[threadIdx.x] = 0; }\n'
    done = host_compiler(text, tmp_path)
    assert done.returncode != 0 and "no_static_shared_memory_use_lotr_ptx_shared_storage" in done.stderr


def wrappers() -> set[str]:
    """The functions of csrc/cuda/ptx that callers use: conversions of values aside."""
    names: set[str] = set()
    for path in sorted((build.CSRC / "cuda" / "ptx").glob("*.cuh")):
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"^ *(?:LOTR_DEVICE|inline|bool|TensorMap|T\*) [^\n(=;]*?\b(\w+)\(", text, re.MULTILINE))
    return names - {"bit_cast", "as_bits", "as_float", "to_float", "from_float", "to_floats", "from_floats", "advance"}


def test_every_wrapper_has_a_line_of_the_page_of_sources() -> None:
    """docs/instructions.md: which rule a wrapper relies on, and what other code does the same."""
    page = (build.ROOT / "docs" / "instructions.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted(wrappers())
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)


def test_what_is_only_here_names_a_switch() -> None:
    page = (build.ROOT / "docs" / "instructions.md").read_text(encoding="utf-8")
    known = set(re.findall(r'word == "(\w+)"', (build.CSRC / "cuda" / "switches.h").read_text(encoding="utf-8")))
    marked = [line for line in page.splitlines() if line.startswith("| `") and "**only here**" in line]
    assert len(marked) >= 4
    for line in marked:
        named = re.search(r"\*\*only here\*\*.*: `(\w+)` *\|$", line)
        assert named and named[1] in known, line
