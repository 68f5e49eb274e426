"""Divergence, barriers, mbarriers and clusters of the PTX interpreter, in several orders of warps."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_programs import run

from csrc.interpreter import grid
from csrc.interpreter.errors import PtxError

orders = pytest.mark.parametrize("seed", range(4))
STORE = "st.global.u32 [%d40], %r1;"


def of_threads(body: str, block: int = 32, **options: object) -> list[int]:
    """%r1 of each thread after the body; %r0 is its number, of all blocks."""
    count = block * options.get("grid", (1,))[0]
    out = np.full(count, 0xFFFFFFFF, np.uint32)
    number = "mov.u32 %r70, %ctaid.x; mov.u32 %r71, %ntid.x; mov.u32 %r72, %tid.x; mad.lo.s32 %r0, %r70, %r71, %r72;"
    number += "mul.wide.u32 %d60, %r0, 4; add.s64 %d40, %d0, %d60; mov.u32 %r1, 0;"
    run(number + body + STORE, out, block=block, **options)
    return out.tolist()


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_lanes_leave_a_loop_at_different_times() -> None:
    """Each lane runs it its own number of times; then all meet in a shuffle."""
    body = "loop: setp.ge.u32 %p1, %r1, %r0; @%p1 bra out; add.s32 %r1, %r1, 1; bra loop; out:"
    body += "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; mad.lo.s32 %r1, %r1, 100, %r2;"
    assert of_threads(body) == [100 * n + (n ^ 1) for n in range(32)]


def test_nested_branches() -> None:
    def branch(bit: int, label: str, inner: str) -> str:
        test = f"and.b32 %r5, %r0, {bit}; setp.eq.u32 %p{bit}, %r5, 0; @%p{bit} bra else{label};"
        then = f"add.s32 %r1, %r1, {10 * bit}; {inner} bra.uni end{label};"
        return f"{test} {then} else{label}: add.s32 %r1, %r1, {bit}; end{label}:"

    body = branch(1, "a", branch(2, "b", branch(4, "c", "")))
    expected = [1 if not n & 1 else 10 + (2 if not n & 2 else 20 + (4 if not n & 4 else 40)) for n in range(32)]
    assert of_threads(body) == expected


def test_threads_end_in_a_branch() -> None:
    """The others go on, and a mask of members may still name those that have ended."""
    body = "setp.lt.u32 %p1, %r0, 8; @%p1 exit; setp.gt.u32 %p2, %r0, 29; @%p2 bra last; bra all; last: ret;"
    body += "all: shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; bar.sync 0;"
    assert of_threads(body) == [0xFFFFFFFF] * 8 + [n ^ 1 for n in range(8, 30)] + [0xFFFFFFFF] * 2


def test_members_in_two_branches() -> None:
    """Each half shuffles in its own branch, with its own mask, though the other has gone elsewhere and waits for it."""
    body = "st.shared.u32 [memory], 0; bar.warp.sync -1; setp.lt.u32 %p1, %r0, 16; @%p1 bra low;"
    body += "spin: ld.volatile.shared.u32 %r3, [memory]; setp.eq.u32 %p2, %r3, 0; @%p2 bra spin;"
    body += "shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xFFFF0000; bra.uni end;"
    body += "low: shfl.sync.idx.b32 %r1, %r0, 3, 31, 0xFFFF; st.volatile.shared.u32 [memory], 1; end:"
    assert of_threads(body, shared=8) == [3] * 16 + [20] * 16
    other = body.replace("setp.lt.u32 %p1", "setp.ge.u32 %p1").replace("20, 31, 0xFFFF0000", "3, 31, 0xFFFF")
    other = other.replace(
        "low: shfl.sync.idx.b32 %r1, %r0, 3, 31, 0xFFFF;", "low: shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xFFFF0000;"
    )
    assert of_threads(other, shared=8) == [3] * 16 + [20] * 16


@pytest.mark.parametrize("spinner", ["lt", "ge"])
def test_lane_waits_for_another_of_its_warp(spinner: str) -> None:
    """Whichever side comes first in the text, the threads that spin do not keep the others from running."""
    body = f"mov.u32 %r5, 0; st.shared.u32 [memory], %r5; bar.warp.sync -1; setp.{spinner}.u32 %p1, %r0, 3; @%p1 bra spin;"
    body += "mov.u32 %r6, 0; work: add.s32 %r6, %r6, 1; setp.lt.u32 %p3, %r6, 900; @%p3 bra work;"
    body += "st.shared.u32 [memory], %r6; bra end;"
    body += "spin: ld.volatile.shared.u32 %r6, [memory]; setp.eq.u32 %p2, %r6, 0; @%p2 bra spin; end: mov.u32 %r1, %r6;"
    assert of_threads(body, shared=4) == [900] * 32


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra other; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; bra end; other: bar.sync 0; end:",
        "setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0; @!%p1 bar.sync 1;",
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra other; bar.warp.sync 0xFFFF; other:",  # not a member
        "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xFFFF;",  # from a lane that is elsewhere
        "shfl.sync.idx.b32 %r1, %r0, 0, 31, %r0;",  # several masks
    ],
)
def test_missing_threads_are_reported(body: str) -> None:
    with pytest.raises(PtxError, match="expected"):
        of_threads(body)


def test_guarded_instruction_of_several_threads() -> None:
    """The threads for which the guard does not hold do not take part."""
    body = "setp.lt.u32 %p1, %r0, 8; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFF; @!%p1 mov.u32 %r1, 77;"
    assert of_threads(body) == [n ^ 1 for n in range(8)] + [77] * 24


# ---- barriers of a block ---------------------------------------------------------------------------------------------


@orders
def test_bar_sync_again_and_again(seed: int) -> None:
    """In each round a thread reads what its neighbour in the next warp wrote. The barrier is used again at once."""
    body = "shl.b32 %r2, %r72, 2; mov.u32 %r3, memory; add.s32 %r2, %r2, %r3; add.s32 %r4, %r72, 32; rem.u32 %r4, %r4, 128;"
    body += "shl.b32 %r4, %r4, 2; add.s32 %r4, %r4, %r3; mov.u32 %r5, 0; mov.u32 %r1, %r72;"
    body += "round: st.shared.u32 [%r2], %r1; bar.sync 3; ld.shared.u32 %r1, [%r4]; bar.sync 3, 128; add.s32 %r1, %r1, 1;"
    body += "add.s32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 6; @%p1 bra round;"
    assert of_threads(body, block=128, shared=512, seed=seed) == [(n + 6 * 32) % 128 + 6 for n in range(128)]


@orders
def test_producers_arrive_and_consumers_wait(seed: int) -> None:
    """Warp 0 makes ten numbers one after another, warp 1 reads each, by two barriers. The other warps have ended."""
    body = "setp.ge.u32 %p1, %r0, 64; @%p1 exit; mov.u32 %r5, 0; setp.ge.u32 %p2, %r0, 32; @%p2 bra consume;"
    body += (
        "produce: mul.lo.s32 %r6, %r5, %r5; st.shared.u32 [memory], %r6; bar.arrive 1, 64; bar.sync 2, 64; add.s32 %r5, %r5, 1;"
    )
    body += "setp.lt.u32 %p3, %r5, 10; @%p3 bra produce; bra end;"
    body += (
        "consume: bar.sync 1, 64; ld.shared.u32 %r6, [memory]; add.s32 %r1, %r1, %r6; bar.arrive 2, 64; add.s32 %r5, %r5, 1;"
    )
    body += "setp.lt.u32 %p3, %r5, 10; @%p3 bra consume; end:"
    found = of_threads(body, block=128, shared=4, seed=seed)
    assert found == [0] * 32 + [sum(n * n for n in range(10))] * 32 + [0xFFFFFFFF] * 64


@orders
@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"])
def test_barriers_do_not_wait_for_warps_that_have_ended(barrier: str, seed: int) -> None:
    """Neither for one that ends at once, nor for one that ends while the others wait."""
    body = "setp.ge.u32 %p1, %r0, 64; @%p1 bra go; setp.ge.u32 %p2, %r0, 32; @%p2 exit; loop: add.s32 %r1, %r1, 1;"
    body += f"setp.lt.u32 %p3, %r1, 3000; @%p3 bra loop; exit; go: {barrier} mov.u32 %r1, 1; {barrier}"
    assert of_threads(body, block=128, seed=seed) == [0xFFFFFFFF] * 64 + [1] * 64


@pytest.mark.parametrize("kind, first, expected", [("and", 0, 1), ("and", 1, 0), ("or", 128, 0), ("or", 127, 1)])
@orders
def test_bar_red(kind: str, first: int, expected: int, seed: int) -> None:
    """Of the predicate thread >= first, of the threads that have not ended; the next phase has votes of its own."""
    body = f"setp.eq.u32 %p0, %r0, 40; @%p0 exit; setp.ge.u32 %p1, %r0, {first}; bar.red.{kind}.pred %p2, 0, %p1;"
    body += f"bar.red.{kind}.pred %p3, 0, 128, !%p1; selp.b32 %r1, 1, 0, %p2; @%p3 add.s32 %r1, %r1, 2;"
    votes = [n < first for n in range(128) if n != 40]
    found = of_threads(body, block=128, seed=seed)
    del found[40]
    assert found == [expected + 2 * (all(votes) if kind == "and" else any(votes))] * 127


@pytest.mark.parametrize(
    "body, message",
    [
        ("bar.sync 0, 33;", "whole warps"),
        ("bar.sync 16;", "0 to 15"),
        ("bar.sync 0, 96;", "whole warps"),
        ("bar.sync 1, %r1;", "whole warps"),
        ("bar.arrive 1, 64; bar.sync 1, 64;", "once"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 32;", "deadlock|as the warps before"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;", "deadlock.*\n.*bar.sync [12];"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;", "deadlock.*\n.*warp 0: bar.sync 1, 64"),
        (
            "st.shared.u32 [memory], 0; bar.sync 0; spin: ld.acquire.cta.shared.u32 %r2, [memory];"
            "setp.eq.u32 %p1, %r2, 0; @%p1 bra spin;",
            "deadlock",
        ),
    ],
)
def test_misused_barriers(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message.replace(";", "")):
        of_threads(body, block=64, shared=4)


def test_slow_program_is_no_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp computes for longer than others may wait; a loop without end is found by its length."""
    monkeypatch.setattr(grid, "PATIENCE", 30)
    loop = "setp.lt.u32 %p1, %r0, 32; @!%p1 bra wait; loop: add.s32 %r1, %r1, 1;"
    loop += "setp.lt.u32 %p2, %r1, 9000; @%p2 bra loop; wait: bar.sync 0;"
    assert of_threads(loop, block=64) == [9000] * 32 + [0] * 32
    monkeypatch.setattr(grid, "ENDLESS", 10_000)
    with pytest.raises(PtxError, match="deadlock"):
        of_threads("loop: add.s32 %r1, %r1, 1; bra loop;")


# ---- mbarriers -------------------------------------------------------------------------------------------------------

INIT = "mov.u32 %r2, memory; setp.eq.u32 %p0, %r72, 0;"


def wait(parity: str, label: str) -> str:
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [memory], {parity}; @!%p1 bra {label};"


@orders
def test_phases_of_an_mbarrier(seed: int) -> None:
    """Seven phases of 128 arrivals. Each thread waits for each phase by its parity and reads what another warp has written."""
    body = INIT + "@%p0 mbarrier.init.shared::cta.b64 [memory], 128; bar.sync 0; mov.u32 %r5, 0; shl.b32 %r6, %r0, 2;"
    body += "add.s32 %r6, %r6, %r2; xor.b32 %r7, %r0, 64; shl.b32 %r7, %r7, 2; add.s32 %r7, %r7, %r2; mov.u32 %r1, %r0;"
    body += "round: st.shared.u32 [%r6+8], %r1; mbarrier.arrive.shared::cta.b64 _, [memory]; and.b32 %r8, %r5, 1;" + wait(
        "%r8", "w"
    )
    body += "ld.shared.u32 %r1, [%r7+8]; add.s32 %r1, %r1, 1000; bar.sync 0; add.s32 %r5, %r5, 1;"
    body += "setp.lt.u32 %p2, %r5, 7; @%p2 bra round;"
    assert of_threads(body, block=128, shared=520, seed=seed) == [(n ^ 64) + 7000 for n in range(128)]


def test_parity_of_an_mbarrier() -> None:
    """Of the phase before the first: it has ended. Of the current one: it has not. Arrivals with a count, by one thread."""
    ask = "mbarrier.try_wait.parity.shared::cta.b64 %p{0}, [memory], {0}; @%p{0} add.s32 %r1, %r1, {1};"
    body = INIT + "@%p0 mbarrier.init.shared::cta.b64 [memory], 5; bar.warp.sync -1; setp.eq.u32 %p5, %r0, 7;"
    arrive = "bar.warp.sync -1; @%p5 mbarrier.arrive.shared::cta.b64 _, [memory], {}; bar.warp.sync -1;"
    for count, step in [(None, 1), (4, 2), (1, 4), (2, 8), (3, 16)]:
        body += (arrive.format(count) if count else "") + ask.format(0, step) + ask.format(1, 100 * step)
    body = body.replace("@%p0 mbarrier.init", "@%p6 mbarrier.init").replace("setp.eq.u32 %p0", "setp.eq.u32 %p6")
    # the current phase is 0, 0, 1, 1, 2: the parity 1 has ended before the first and after the second phase
    assert of_threads(body, shared=8) == [100 + 200 + 4 + 8 + 1600] * 32


@pytest.mark.parametrize(
    "body, message",
    [
        ("mbarrier.init.shared::cta.b64 [memory+4], 1;", "multiple of 8"),
        ("mbarrier.init.shared::cta.b64 [memory+64], 1;", "multiple of 8"),
        ("mbarrier.init.shared::cta.b64 [memory], 0;", "arrivals"),
        ("mbarrier.init.shared::cta.b64 [memory], 0x100000;", "arrivals"),
        ("mbarrier.arrive.shared::cta.b64 _, [memory];", "initialised"),
        ("mbarrier.init.shared::cta.b64 [memory], 33; mbarrier.arrive.shared::cta.b64 _, [memory], 2;", "arrivals"),
        ("mbarrier.init.shared::cta.b64 [memory], 1; mbarrier.try_wait.parity.shared::cta.b64 %p1, [memory], 2;", "parity"),
        (
            "mbarrier.init.shared::cta.b64 [memory], 40; mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory], 100000;",
            "tx-count",
        ),
        (
            "mbarrier.init.shared::cta.b64 [memory], 33; bar.warp.sync -1; mbarrier.arrive.shared::cta.b64 _, [memory];"
            + wait("0", "w"),
            "deadlock",
        ),
    ],
)
def test_misused_mbarriers(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        of_threads(body, shared=64)


# ---- clusters --------------------------------------------------------------------------------------------------------

BETWEEN = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
PAIR = {"grid": (4, 1, 1), "cluster": (2, 1, 1), "block": 64}


@orders
def test_blocks_of_a_cluster_exchange(seed: int) -> None:
    """In three rounds each writes to the other's shared memory, at addresses of both forms, and reads what the other wrote."""
    body = "mov.u32 %r2, memory; mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1; shl.b32 %r3, %r72, 2;"
    body += "add.s32 %r3, %r3, %r2;"
    body += (
        "mapa.shared::cluster.u32 %r4, %r3, %r11; cvt.u64.u32 %d10, %r3; cvta.shared.u64 %d11, %d10; mapa.u64 %d12, %d11, %r11;"
    )
    body += f"{BETWEEN} mov.u32 %r1, %r0; mov.u32 %r6, 0; round: st.shared::cluster.u32 [%r4], %r1;"
    body += f"{BETWEEN} ld.shared.u32 %r7, [%r3];"
    body += "ld.shared::cluster.u32 %r8, [%r4]; ld.u32 %r9, [%d12]; setp.ne.u32 %p2, %r8, %r9; @%p2 exit;"
    body += f"add.s32 %r1, %r7, 1000; {BETWEEN}"
    body += f"add.s32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, 3; @%p1 bra round; {BETWEEN}"
    assert of_threads(body, shared=256, seed=seed, **PAIR) == [(n ^ 64) + 3000 for n in range(256)]


@orders
def test_arrival_at_an_mbarrier_of_another_block(seed: int) -> None:
    """Both blocks arrive at the mbarrier of block 0, whose threads wait for 128 arrivals."""
    body = INIT + "@%p0 mbarrier.init.shared::cta.b64 [memory], 128; fence.mbarrier_init.release.cluster;"
    body += f"{BETWEEN} mov.u32 %r10, 0; mapa.shared::cluster.u32 %r4, %r2, %r10;"
    body += "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4]; mov.u32 %r11, %cluster_ctarank;"
    body += "setp.eq.u32 %p3, %r11, 1;"
    body += f"@%p3 bra end; {wait('0', 'w')} mov.u32 %r1, 5; end: {BETWEEN}"
    assert of_threads(body, shared=8, seed=seed, **PAIR) == ([5] * 64 + [0] * 64) * 2


@orders
def test_cluster_barrier_of_diverged_threads(seed: int) -> None:
    """Without .aligned each thread arrives for itself, and those that have ended are not waited for."""
    body = "setp.lt.u32 %p1, %r72, 5; @%p1 exit; setp.lt.u32 %p2, %r72, 40; @%p2 bra other; barrier.cluster.arrive;"
    body += "add.s32 %r1, %r1, 1;"
    body += "barrier.cluster.wait; bra end; other: barrier.cluster.arrive.release; barrier.cluster.wait.acquire; end:"
    assert of_threads(body, seed=seed, **PAIR) == ([0xFFFFFFFF] * 5 + [0] * 35 + [1] * 24) * 4


@pytest.mark.parametrize(
    "body, message",
    [
        ("barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;", "between two arrivals"),
        (
            f"{INIT} @%p0 mbarrier.init.shared::cta.b64 [memory], 128; {BETWEEN} mapa.shared::cluster.u32 %r4, %r2, 0;"
            f"mbarrier.arrive.shared::cluster.b64 _, [%r4]; {BETWEEN}",
            "fence.mbarrier_init",
        ),
        ("barrier.cluster.wait.aligned;", "before the wait"),
        ("setp.lt.u32 %p1, %r72, 5; @%p1 barrier.cluster.arrive.aligned;", "the same in all threads"),
        (
            "mov.u32 %r2, memory; mapa.shared::cluster.u32 %r4, %r2, 1; ld.shared::cluster.u32 %r1, [%r4];",
            "barrier of the cluster",
        ),
        (
            BETWEEN + "mov.u32 %r2, memory; mov.u32 %r3, %cluster_ctarank; xor.b32 %r3, %r3, 1;"
            "mapa.shared::cluster.u32 %r4, %r2, %r3; ld.shared::cluster.u32 %r1, [%r4];",
            "to run",
        ),
        (
            "mov.u32 %r3, %cluster_ctarank; setp.eq.u32 %p1, %r3, 0; @%p1 bra end; barrier.cluster.arrive;"
            "barrier.cluster.wait; loop: bra loop;"
            "end: barrier.cluster.arrive; barrier.cluster.wait; barrier.cluster.arrive; barrier.cluster.wait;",
            "deadlock",
        ),
    ],
)
def test_misused_clusters(monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setattr(grid, "ENDLESS", 200_000)
    failures = 0
    for seed in range(6):
        try:
            of_threads(body, shared=8, seed=seed, **PAIR)
        except PtxError as error:
            failures += 1
            assert re.search(message, str(error)), error
    assert failures


def test_grid_is_whole_clusters() -> None:
    with pytest.raises(PtxError, match="multiple of the cluster"):
        of_threads("", grid=(3, 1, 1), cluster=(2, 1, 1))
    with pytest.raises(PtxError, match="multiple of 32"):
        of_threads("", block=48)
