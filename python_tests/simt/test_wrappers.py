"""The wrappers of csrc/cuda by their two compilers: nvcc makes of each one the instruction meant, a host compiler refuses what
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

EARLY = {"griddepcontrol.wait": 1, "griddepcontrol.launch_dependents": 1}
WORDS = ("u16", "u32", "v2.u32", "v4.u32")
SM80 = {
    **{f"{op}.{word}": 1 for op in ("ld.global", "ld.shared", "st.global", "st.shared") for word in WORDS},
    "cp.async.cg.shared.global.L2::128B": 2,
    "cp.async.commit_group": 1,
    "cp.async.wait_group 1": 1,
    "bar.sync": 2,  # __syncthreads is barrier 0
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": 1,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": 1,
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16": 1,
    "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16": 1,
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 1,
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 1,
}
BULK = "cp.async.bulk.tensor.2d"
SM90 = EARLY | {
    "mbarrier.init.shared::cta.b64": 1,
    "fence.mbarrier_init.release.cluster": 1,
    "barrier.cluster.arrive.aligned": 1,
    "barrier.cluster.wait.aligned": 1,
    "prefetch.tensormap": 1,
    "mbarrier.arrive.expect_tx.shared::cta.b64": 1,
    "mbarrier.try_wait.parity.shared::cta.b64": 1,
    "mapa.shared::cluster.u32": 1,
    "mbarrier.arrive.shared::cluster.b64": 1,
    f"{BULK}.shared::cluster.global.mbarrier::complete_tx::bytes": 1,
    f"{BULK}.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster": 1,
    f"{BULK}.global.shared::cta.bulk_group": 1,
    "fence.proxy.async.shared::cta": 1,
    "cp.async.bulk.commit_group": 1,
    "cp.async.bulk.wait_group.read 1": 1,
    "cp.async.bulk.wait_group 0": 1,
    "wgmma.fence.sync.aligned": 2,
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16": 2,
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16": 2,
    "wgmma.commit_group.sync.aligned": 2,
    "wgmma.wait_group.sync.aligned 0": 2,
    "wgmma.wait_group.sync.aligned 1": 2,
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
    assert missing(EARLY, ptx) == dict.fromkeys(EARLY, 0)  # a card without early launches: they do nothing


@needs_nvcc
def test_every_wrapper_of_hopper_is_its_instruction(tmp_path: Path) -> None:
    ptx = compile_ptx('#define LOTR_EVERY_SM90 1\n#include "every_wrapper.cuh"\n', "sm_90a", tmp_path)
    assert missing(SM80 | SM90, ptx) == {}
    products = [line.split("}, ", 1)[1] for line in instructions(ptx) if line.startswith("wgmma.mma_async")]
    assert sorted(products) == ["%rd, %rd, p, 1, 1, 0, 0"] * 2 + ["%rd, %rd, p, 1, 1, 0, 1"] * 2  # the last: b is MN-major


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


def test_no_wrapper_is_missing_here() -> None:
    """Each function of csrc/cuda/ptx and csrc/cuda/sm90 that has a site is an instruction. every_wrapper.cuh calls it."""
    called = (PROGRAMS / "every_wrapper.cuh").read_text(encoding="utf-8")
    files = [*(build.CSRC / "cuda" / "ptx").glob("*.cuh"), *(build.CSRC / "cuda" / "sm90").glob("*.cuh")]
    pattern = r"LOTR_DEVICE [^\n;{]*?\b(\w+)\((?:[^;{]*?[ (])?LOTR_SITE(?:_ONLY)?\)"
    names = {name for path in files for name in re.findall(pattern, path.read_text(encoding="utf-8"))}
    assert len(names) >= 30 and not [name for name in sorted(names) if f"ptx::{name}" not in called]
