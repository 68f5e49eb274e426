"""What runs between its issue and the wait for it: cp.async, bulk copies of tensors and wgmma, in several orders."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import own, run

from csrc.interpreter import tensor_map
from csrc.interpreter.errors import PtxError


def copied(groups: int, wait: str, seed: int) -> np.ndarray:
    """Groups of cp.async, 16 bytes a thread, then a wait: whether each thread's copy of each group has landed, [groups, 32]."""
    a, out = np.arange(1, 32 * 4 * groups + 1, dtype=np.uint32), np.full((groups, 32), 9, np.uint32)
    body = "mov.u32 %r0, %tid.x; mov.u32 %r2, memory; shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, %r2;"
    body += "mul.wide.u32 %d50, %r0, 16; add.s64 %d51, %d0, %d50; mul.wide.u32 %d52, %r0, 4; add.s64 %d53, %d1, %d52;"
    body += "".join(f"st.shared.u32 [%r1+{512 * g}], 0;" for g in range(groups))
    for g in range(groups):
        body += f"cp.async.cg.shared.global [%r1+{512 * g}], [%d51+{512 * g}], 16; cp.async.commit_group;"
    body += wait
    for g in range(groups):
        body += f"ld.shared.u32 %r3, [%r1+{512 * g}]; st.global.u32 [%d53+{128 * g}], %r3;"
    run(body, a, out, shared=512 * groups, seed=seed)
    assert all(v in (0, 4 * n + 1) for n, v in enumerate(out.ravel().tolist()))
    return out != 0


def test_wait_group_waits_for_all_but_the_last() -> None:
    for left in range(4):
        found = [copied(3, f"cp.async.wait_group {left};", seed) for seed in range(12)]
        for g in range(3):
            arrived = {bool(f[g].all()) for f in found}
            assert arrived == ({True} if g < 3 - left else {True, False}), (left, g, arrived)
    assert all(copied(3, "cp.async.wait_all;", seed).all() for seed in range(6))


def test_cp_async_fills_with_zeros() -> None:
    """Of as many bytes as the last operand says."""
    a, out = np.full(32 * 16, 0xAB, np.uint8), np.zeros(32 * 16, np.uint8)
    body = own(16, 16) + "mov.u32 %r2, memory; shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, %r2; min.u32 %r3, %r0, 16;"
    body += "cp.async.cg.shared.global [%r1], [%d40], 16, %r3; cp.async.wait_all;"
    run(body + "ld.shared.v2.u64 {%d20, %d21}, [%r1]; st.global.v2.u64 [%d41], {%d20, %d21};", a, out, shared=512)
    for lane, row in enumerate(out.reshape(32, 16)):
        size = min(lane, 16)
        assert row.tolist() == [0xAB] * size + [0] * (16 - size)


def box_of(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A tensor map over a matrix of float32, at a multiple of 64."""
    encoded = tensor_map.encode(
        7, 2, values.ctypes.data, [values.shape[1], values.shape[0]], [4 * values.shape[1]], [columns, rows], [1, 1], 0, 0, 0, 0
    )
    space = np.zeros(128 + 64, np.uint8)
    start = -space.ctypes.data % 64
    space[start : start + 128] = np.frombuffer(encoded, np.uint8)
    return space[start : start + 128]


WAIT = "wait: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra wait;"
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


@pytest.mark.parametrize("first", ["expect", "copy"])
@pytest.mark.parametrize("seed", range(3))
def test_bulk_copy_counts_its_bytes(first: str, seed: int) -> None:
    """The bytes may come before they are expected: the tx-count is below zero then, and the phase goes on."""
    values, out = np.arange(16 * 8, dtype=np.float32).reshape(16, 8), np.zeros(32, np.float32)
    expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;"
    copy = f"{COPY} [memory], [%d0, {{4, 2}}], [bar];"
    body = ".shared .b64 bar; mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [bar], 1;"
    body += "fence.mbarrier_init.release.cluster;" + "".join(
        f"@%p0 {text}" for text in ((expect, copy) if first == "expect" else (copy, expect))
    )
    body += f"{WAIT} mul.wide.u32 %d50, %r0, 4; add.s64 %d51, %d1, %d50; shl.b32 %r1, %r0, 2; mov.u32 %r2, memory;"
    body += "add.s32 %r1, %r1, %r2;"
    run(body + "ld.shared.u32 %r3, [%r1]; st.global.u32 [%d51], %r3;", box_of(values, 8, 4), out, shared=128, seed=seed)
    assert np.array_equal(out.reshape(8, 4), values[2:10, 4:8])


# ---- wgmma: operands of ones, so that each product adds 16 -----------------------------------------------------------

FILL = "shl.b32 %r1, %r0, 4; mov.u32 %r2, memory; add.s32 %r1, %r1, %r2; mov.u32 %r3, 0x3F803F80;"
FILL += "st.shared.v4.u32 [%r1], {%r3, %r3, %r3, %r3}; st.shared.v4.u32 [%r1+2048], {%r3, %r3, %r3, %r3};"
SHOW = "fence.proxy.async; bar.sync 0;"
FENCE = "mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1; wgmma.fence.sync.aligned;"
ISSUE = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %d10, %d10, 1, 1, 1, 0, 0;"
ISSUE = f"mov.u64 %d10, {1024 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32}; {ISSUE} wgmma.commit_group.sync.aligned;"
WAIT_0 = "wgmma.wait_group.sync.aligned 0;"


def sums(body: str, seed: int) -> list[float]:
    """%f4 of 128 threads."""
    out = np.full(128, -1, np.float32)
    run(own(4) + body + "mov.b32 %r9, %f4; st.global.u32 [%d40], %r9;", out, block=128, shared=4096, seed=seed)
    return out.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_products_run_when_they_are_waited_for(seed: int) -> None:
    assert sums(FILL + SHOW + FENCE + ISSUE + WAIT_0, seed) == [16] * 128
    assert sums(FILL + SHOW + FENCE + ISSUE + ISSUE + ISSUE + WAIT_0, seed) == [48] * 128


def test_wait_group_of_products() -> None:
    """The last N may not have run yet."""
    for left, least in [(0, 48), (1, 32), (2, 16), (3, 0)]:
        found = {
            v
            for seed in range(16)
            for v in sums(FILL + SHOW + FENCE + 3 * ISSUE + f"wgmma.wait_group.sync.aligned {left};", seed)
        }
        assert min(found) == least and max(found) == 48, (left, found)


@pytest.mark.parametrize(
    "body, message",
    [
        (FILL + "bar.sync 0;" + FENCE + ISSUE + WAIT_0, "fence.proxy.async"),
        (FILL + SHOW + FENCE + "mov.f32 %f3, 0f3F800000;" + ISSUE + WAIT_0, "wgmma.fence"),
        (FILL + SHOW + FENCE + ISSUE + WAIT_0 + "st.shared.u32 [%r1], 0;" + ISSUE + WAIT_0, "fence.proxy.async"),
        (
            FILL
            + SHOW
            + FENCE
            + ISSUE.replace("%d10, %d10", "%d10, %d11").replace(
                "wgmma.mma", "cvt.u64.u32 %d11, %r0; shr.u64 %d11, %d11, 5;add.s64 %d11, %d10, %d11; wgmma.mma"
            )
            + WAIT_0,
            "same product in all warps",
        ),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra end;" + FENCE + ISSUE + WAIT_0 + "end:", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 8; @%p1 exit;" + FENCE + ISSUE, "32 threads"),
    ],
)
def test_misused_products(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        sums(body, 0)
