"""The wrappers of csrc/cuda as nvcc and a host compiler compile them.

nvcc compiles each wrapper to its instruction. The host compiler rejects code that would silently
mean something else on the host. test_compiled.py (python_tests/kernels) checks the output of ptxas.
"""

import re
import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

CUDA = build.CSRC / "cuda"
needs_nvcc = pytest.mark.skipif(build.tool("nvcc") is None, reason="no nvcc")

# Instructions of the kernels; with operands where these tell two forms apart.
SM80 = """
ld.global.u16
ld.global.u32
ld.global.v2.u32
ld.global.v4.u32
st.global.u16
st.global.u32
st.global.v2.u32
st.global.v4.u32
ld.shared.u16
ld.shared.v4.u32
st.shared.u16
st.shared.u32
st.shared.v4.u32
cp.async.cg.shared.global.L2::128B
cp.async.commit_group
cp.async.wait_group 0
cp.async.wait_group 1
bar.sync
ldmatrix.sync.aligned.m8n8.x4.shared.b16
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
""".strip().splitlines()
SM90 = """
griddepcontrol.wait
griddepcontrol.launch_dependents
prefetch.tensormap
barrier.cluster.arrive.aligned
barrier.cluster.wait.aligned
mapa.shared::cluster.u32
mbarrier.init.shared::cta.b64
fence.mbarrier_init.release.cluster
mbarrier.try_wait.parity.shared::cta.b64
mbarrier.arrive.expect_tx.shared::cta.b64
mbarrier.arrive.shared::cluster.b64
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group
fence.proxy.async.shared::cta
cp.async.bulk.commit_group
cp.async.bulk.wait_group.read 1
cp.async.bulk.wait_group 0
wgmma.fence.sync.aligned
wgmma.commit_group.sync.aligned
wgmma.wait_group.sync.aligned 0
wgmma.wait_group.sync.aligned 1
wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16
wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16
""".strip().splitlines()


def instructions(source: str, target: str, folder: Path) -> list[str]:
    """Returns the PTX instructions of a source, with registers without their numbers."""
    ptx = folder / "kernel.ptx"
    build.nvcc(CUDA / source, ptx, f"-arch={target}", "-ptx")
    lines = (
        re.sub(r"%(r|rd|f|h|p|rs)\d+", r"%\1", line.strip())
        for line in ptx.read_text().splitlines()
    )
    return [
        re.sub(r"\s+", " ", line.rstrip(";"))
        for line in lines
        if line and not line.startswith((".", "//", "{", "}", "$"))
    ]


def missing(expected: list[str], lines: list[str]) -> list[str]:
    """Returns the instructions that no line of the code starts with."""
    return [op for op in expected if not any(f"{line} ".startswith(f"{op} ") for line in lines)]


@needs_nvcc
@pytest.mark.slow
def test_wrappers_are_their_instructions(tmp_path: Path) -> None:
    compiled = instructions("kernels_fp16.cu", "sm_80", tmp_path)
    assert missing(SM80, compiled) == []
    # A card before Hopper has no early launches.
    assert not [line for line in compiled if "griddepcontrol" in line]


@needs_nvcc
def test_wrappers_of_hopper_are_their_instructions(tmp_path: Path) -> None:
    compiled = instructions("sm90/gemm_lotr.cu", "sm_90a", tmp_path)
    assert missing(SM90, compiled) == []
    products = {line.split("}, ", 1)[1] for line in compiled if line.startswith("wgmma.mma_async")}
    k_major = "%rd, %rd, p, 1, 1, 0, 0"
    mn_major = "%rd, %rd, p, 1, 1, 0, 1"
    assert products == {k_major, mn_major}


def test_static_shared_memory_does_not_compile_on_the_host(tmp_path: Path) -> None:
    """Each thread would silently have a copy."""
    source = tmp_path / "kernel.cpp"
    source.write_text(
        '#include "cuda/ptx/sm80.cuh"\n'
        "__global__ void k() { __shared__ float f[32]; f[threadIdx.x] = 0; }\n"
    )
    command = [
        build.compiler(),
        "-std=c++17",
        "-fsyntax-only",
        f"-I{build.CSRC}",
        "-isystem",
        build.cuda_include(),
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no_static_shared_memory_use_lotr_ptx_shared_storage" in done.stderr
