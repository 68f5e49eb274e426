"""Loads, stores and atomics of the PTX interpreter, in each state space."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import own, run

from csrc.interpreter.errors import PtxError

U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
REGISTER = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}


def test_loads_extend_as_their_type_says() -> None:
    a = np.array(
        [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64
    )
    a = np.resize(a, 32)
    for bits in (8, 16, 32, 64):
        for kind in "sub":
            for held in {max(16, bits), 32, 64} if bits <= 32 else {64}:
                if held < bits:
                    continue
                out = np.zeros(32, U[held])
                r = f"{REGISTER[held]}30"
                run(own(8, held // 8) + f"ld.global.{kind}{bits} {r}, [%d40]; st.global.u{held} [%d41], {r};", a, out)
                values = a.astype(U[bits])
                expected = values.view(values.dtype.str.replace("u", "i")).astype(f"i{held // 8}").view(U[held])
                assert np.array_equal(out, expected if kind == "s" else values.astype(U[held])), (bits, kind, held)


@pytest.mark.parametrize("bits, count", [(8, 4), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 2)])
@pytest.mark.parametrize("space", ["global", "shared", "generic"])
def test_vectors(bits: int, count: int, space: str) -> None:
    """Stores in another space and back again, in order, with an offset."""
    size = bits // 8 * count
    a = np.random.default_rng(0).integers(0, 256, 32 * size, np.uint8)
    out = np.zeros_like(a)
    v = f".v{count}" if count > 1 else ""
    registers = ", ".join(f"{REGISTER[bits]}{20 + n}" for n in range(count))
    registers = f"{{{registers}}}" if count > 1 else registers
    body = own(size, size) + f"ld.global{v}.b{bits} {registers}, [%d40];"
    if space != "global":
        body += f"mov.u64 %d71, memory; cvta.shared.u64 %d72, %d71; mul.wide.u32 %d73, %r0, {size}; add.s64 %d74, %d72, %d73;"
        body += "cvta.to.shared.u64 %d75, %d74; cvt.u32.u64 %r10, %d75;"
        dot, address = (".shared", "%r10") if space == "shared" else ("", "%d74")
        body += f"st{dot}{v}.b{bits} [{address}+{size}], {registers}; mov.u32 %r20, 0; mov.u64 %d20, 0;"
        body += f"ld{dot}{v}.b{bits} {registers}, [{address}+{size}];"
    run(body + f"st.global{v}.b{bits} [%d41], {registers};", a, out, shared=33 * size)
    assert np.array_equal(a, out)


def test_stores_cut_wide_registers() -> None:
    out = np.zeros(32, np.uint8)
    run(own(1) + "add.s32 %r1, %r0, 0x1FF; st.global.u8 [%d40], %r1;", out)
    assert out.tolist() == [(n + 0x1FF) & 255 for n in range(32)]


@pytest.mark.parametrize("guard", ["@%p1", ""])
def test_lanes_that_are_off_access_nothing(guard: str) -> None:
    """Their addresses may be anything, and neither memory nor register changes."""
    a, out = np.arange(32, dtype=np.uint32), np.full(32, 7, np.uint32)
    body = own(4, 4) + "setp.ge.u32 %p1, %r0, 16; selp.b64 %d71, %d40, 3, %p1; selp.b64 %d72, %d41, 3, %p1; mov.u32 %r1, 5;"
    body += f"{guard} ld.global.u32 %r1, [%d71]; {guard} st.global.u32 [%d72], %r1; @!%p1 st.global.u32 [%d41], %r1;"
    if not guard:
        with pytest.raises(PtxError, match="address"):
            run(body, a, out)
        return
    run(body, a, out)
    assert out.tolist() == [5] * 16 + list(range(16, 32))


@pytest.mark.parametrize(
    "text, message",
    [
        ("ld.global.u32 %r1, [%d0+2];", "multiple of 4"),
        ("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%d0+8];", "multiple of 16"),
        ("ld.shared.u32 %r1, [memory+64];", "shared memory"),
        ("ld.shared.u32 %r1, [memory+-4];", "shared memory"),
        ("st.shared.u32 [memory+-2048], %r1;", "shared memory"),
        ("ld.shared::cluster.u32 %r1, [0x5000400];", "block"),
        ("cvta.to.shared.u64 %d1, %d0;", "generic"),
        ("mapa.shared::cluster.u32 %r1, %r2, 1;", "rank"),
        ("mov.u64 %d1, memory; cp.async.cg.shared.global [%d1], [%d0+8], 16;", "multiples of 16"),
        ("mov.u64 %d1, memory; cp.async.cg.shared.global [%d1], [%d0], 16, 17;", "multiples of 16"),
        ("mov.u64 %d1, memory; cp.async.cg.shared.global [%d1+64], [%d0], 16; cp.async.wait_all;", "shared memory"),
        ("mov.u64 %d1, elsewhere;", "symbol"),
    ],
)
def test_addresses_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(text, np.zeros(64, np.uint64), shared=64)


def test_atomics_on_one_address() -> None:
    """Every thread of four warps sees another value; inc wraps after its operand."""
    total, old, wrapped = np.zeros(1, np.uint32), np.zeros(128, np.uint32), np.zeros(1, np.uint32)
    body = own(0, 4, 0) + "atom.relaxed.gpu.global.add.u32 %r1, [%d0], 3; st.global.u32 [%d41], %r1;"
    run(
        body + "atom.global.inc.u32 %r2, [%d2], 6; @%p0 atom.add.acq_rel.gpu.s32 %r2, [%d0], 100;",
        total,
        old,
        wrapped,
        block=128,
    )
    assert total[0] == 3 * 128 and sorted(old.tolist()) == list(range(0, 3 * 128, 3)) and wrapped[0] == 128 % 7


def test_atomic_add_wraps() -> None:
    total = np.array([2**32 - 10], np.uint32)
    run("atom.global.add.s32 %r1, [%d0], 1;", total)
    assert total[0] == 22


def test_early_launch_waits() -> None:
    """An early launch may read its parameters before griddepcontrol.wait, but not global memory."""
    out = np.zeros(32, np.uint32)
    run(own(4) + "griddepcontrol.wait; st.global.u32 [%d40], %r0;", out, early=True)
    assert out.tolist() == list(range(32))
    with pytest.raises(PtxError, match="griddepcontrol"):
        run(own(4) + "griddepcontrol.launch_dependents; st.global.u32 [%d40], %r0;", out, early=True)
