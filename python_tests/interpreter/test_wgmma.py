"""The interpreter's wgmma against plain products, with operands laid out by the manual's canonical layouts and tables."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_layouts import encode, write

from csrc.interpreter import wgmma
from csrc.interpreter.errors import PtxError

MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # swizzled span -> the descriptor's swizzling mode
K = {"bf16": 16, "f16": 16, "tf32": 8}
BIG = 1 << 16


def descriptor(start: int, lbo: int, sbo: int, span: int, base_offset: int = 0) -> int:
    """The 64-bit value, fields as in the table of "Matrix Descriptor Format"."""
    return start >> 4 | lbo >> 4 << 16 | sbo >> 4 << 32 | base_offset << 49 | MODES[span] << 62


def canonical(major: str, span: int, size: int, lbo: int, sbo: int) -> tuple:
    """The table of "Canonical Layouts", row by row; lbo and sbo in bytes, size bytes an element."""
    t, l, s = 16 // size, lbo // size, sbo // size
    return {
        ("mn", 0): (((t, 1, BIG), (8, BIG)), ((1, t, s), (t, l))),
        ("mn", 32): (((t, 2, BIG), (8, BIG)), ((1, t, l), (2 * t, s))),
        ("mn", 64): (((t, 4, BIG), (8, BIG)), ((1, t, l), (4 * t, s))),
        ("mn", 128): (((t, 8, BIG), (8, BIG)), ((1, t, l), (8 * t, s))),
        ("k", 0): (((8, BIG), (t, BIG)), ((t, s), (1, l))),
        ("k", 32): (((8, BIG), (t, BIG)), ((2 * t, s), (1, t))),
        ("k", 64): (((8, BIG), (t, BIG)), ((4 * t, s), (1, t))),
        ("k", 128): (((8, BIG), (t, BIG)), ((8 * t, s), (1, t))),
    }[major, span]


def d_position(thread: int, i: int) -> tuple[int, int]:
    """Row and column of d_i: the figure of the accumulator, one warp for each 16 rows."""
    lane = thread % 32
    return thread // 32 * 16 + (lane >> 2) + (8 if i % 4 >= 2 else 0), i // 4 * 8 + (lane % 4) * 2 + i % 2


def d_elements(type_name: str, matrix: np.ndarray) -> list[np.ndarray]:
    """The bits of d_0, d_1, ... of all threads."""
    bits = encode(type_name, matrix)
    return [np.array([bits[d_position(t, i)] for t in range(128)], np.uint32) for i in range(matrix.shape[1] // 2)]


def pairs(halves: list[np.ndarray]) -> list[np.ndarray]:
    """Registers of f16x2: d_0 and d_1, d_2 and d_3, ..."""
    return [halves[i] | halves[i + 1] << 16 for i in range(0, len(halves), 2)]


def d_matrix(registers: list[np.ndarray]) -> np.ndarray:
    d = np.zeros((64, 2 * len(registers)))
    for i, register in enumerate(registers):
        for thread, value in enumerate(register.view(np.float32)):
            d[d_position(thread, i)] = value
    return d


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-16, 17, shape).astype(np.float64)


def multiply(shared: np.ndarray, n: int, type_name: str, a: int, b: int, transposes: tuple[int, int]) -> np.ndarray:
    zero = [np.zeros(128, np.uint32)] * (n // 2)
    return d_matrix(wgmma.product(n, type_name, shared, a, b, zero, False, 1, 1, *transposes))


def offsets(major: str, span: int, rows: int, along_k_first: bool) -> tuple[int, int]:
    """LBO and SBO of atoms that lie next to each other along k or along the rows."""
    if major == "k":
        return (16, 8 * span if along_k_first else 2048) if span else ((128, 256) if along_k_first else (16 * rows, 128))
    atom = 8 * (span or 16)
    along_rows, along_k = (2 * atom, atom) if along_k_first else (atom, atom * -(-2 * rows // (span or 16)))
    return (along_rows, along_k) if span else (along_k, along_rows)


LAYOUTS = [(m, s, t) for m in ("k", "mn") for s in (0, 32, 64, 128) for t in ("bf16", "f16", "tf32")]
LAYOUTS = [case for case in LAYOUTS if case[0] == "k" or case[2] != "tf32"]


@pytest.mark.parametrize("major,span,type_name", LAYOUTS)
@pytest.mark.parametrize("n", [8, 24, 64, 128])
def test_every_canonical_layout_of_both_operands(major: str, span: int, type_name: str, n: int) -> None:
    a, b = integers(1, 64, K[type_name]), integers(2, n, K[type_name])
    shared = np.random.default_rng(3).integers(0, 256, 64 * 1024, dtype=np.uint8)
    (a_lbo, a_sbo), (b_lbo, b_sbo) = offsets(major, span, 64, True), offsets(major, span, n, False)
    a_start, b_start = 1024, 1024 * 20
    write(shared, a_start, type_name, a, canonical(major, span, 4 if type_name == "tf32" else 2, a_lbo, a_sbo), span)
    write(shared, b_start, type_name, b, canonical(major, span, 4 if type_name == "tf32" else 2, b_lbo, b_sbo), span)
    transposes = (1, 1) if major == "mn" else (0, 0)
    a_bits, b_bits = descriptor(a_start, a_lbo, a_sbo, span), descriptor(b_start, b_lbo, b_sbo, span)
    np.testing.assert_array_equal(multiply(shared, n, type_name, a_bits, b_bits, transposes), a @ b.T)


# "Canonical Layouts", figures 166 to 170: type, major, span, exact layout of elements, LBO and SBO in elements.
MANUAL_EXAMPLES = [
    ("tf32", "k", 0, (((8, 2), (4, 4)), ((4, 32), (1, 64))), 64, 32),
    ("tf32", "k", 32, (((8, 2), (4, 4)), ((8, 64), (1, 4))), 4, 64),
    ("bf16", "mn", 0, (((8, 1, 2), (8, 2)), ((1, 8, 64), (8, 128))), 128, 64),
    ("bf16", "mn", 32, (((8, 2, 2), (8, 2)), ((1, 8, 128), (16, 256))), 128, 256),
    ("bf16", "mn", 64, (((8, 4, 2), (8, 2)), ((1, 8, 256), (32, 512))), 256, 512),
]


@pytest.mark.parametrize("type_name,major,span,layout,lbo,sbo", MANUAL_EXAMPLES)
def test_the_manuals_examples(type_name: str, major: str, span: int, layout: tuple, lbo: int, sbo: int) -> None:
    size = 4 if type_name == "tf32" else 2
    rows = int(np.prod(layout[0][0]))
    matrix = integers(4, rows, K[type_name])
    shared = np.zeros(8192, np.uint8)
    write(shared, 2048, type_name, matrix, layout, span)
    bits = descriptor(2048, lbo * size, sbo * size, span)
    np.testing.assert_array_equal(wgmma.operand(shared, bits, rows, type_name, int(major == "mn")), matrix)


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("type_name", ["bf16", "tf32"])
def test_k_major_advances_by_32_bytes_within_a_span(span: int, type_name: str) -> None:
    """As CuTe does: one atom holds span / 32 steps along k, and the start address alone moves."""
    size, k = 4 if type_name == "tf32" else 2, span // (4 if type_name == "tf32" else 2)
    a, b = integers(5, 64, k), integers(6, 40, k)
    shared = np.zeros(32 * 1024, np.uint8)
    layout = canonical("k", span, size, 16, 8 * span)
    write(shared, 1024, type_name, a, layout, span)
    write(shared, 16384, type_name, b, layout, span)
    d = [np.zeros(128, np.uint32)] * 20
    for step in range(span // 32):
        a_bits = descriptor(1024, 16, 8 * span, span) + 2 * step
        b_bits = descriptor(16384, 4096, 8 * span, span) + 2 * step  # the leading dimension byte offset is not used
        d = wgmma.product(40, type_name, shared, a_bits, b_bits, d, step > 0)
    np.testing.assert_array_equal(d_matrix(d), a @ b.T)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("rows_first", [True, False])
def test_mn_major_advances_by_two_atoms_along_k(span: int, rows_first: bool) -> None:
    """Tiles of 128 x 64 (A) and 128 x 64 (B) from atoms in either order; A's second 64 rows are a second descriptor."""
    a, b = integers(7, 128, 64), integers(8, 128, 64)
    width = span or 16  # bytes of an atom along the rows; an atom has 8 of them along k
    atoms_rows, atoms_k = 128 * 2 // width, 64 // 8
    along_rows, along_k = (8 * width, 8 * width * atoms_rows) if rows_first else (8 * width * atoms_k, 8 * width)
    lbo, sbo = (along_rows, along_k) if span else (along_k, along_rows)
    shared = np.zeros(48 * 1024, np.uint8)
    layout = canonical("mn", span, 2, lbo, sbo)
    write(shared, 0, "bf16", a, layout, span)
    write(shared, 16384, "bf16", b, layout, span)
    for half in range(2):
        d = [np.zeros(128, np.uint32)] * 64
        for step in range(4):
            moved = 2 * step * along_k
            a_start = half * (64 * 2 // width) * along_rows + moved
            a_bits, b_bits = descriptor(a_start, lbo, sbo, span), descriptor(16384 + moved, lbo, sbo, span)
            d = wgmma.product(128, "bf16", shared, a_bits, b_bits, d, step > 0, 1, 1, 1, 1)
        np.testing.assert_array_equal(d_matrix(d), a[64 * half : 64 * half + 64] @ b.T)


def test_majors_mix() -> None:
    a, b = integers(9, 64, 16), integers(10, 64, 16)
    shared = np.zeros(16 * 1024, np.uint8)
    write(shared, 0, "bf16", a, canonical("k", 32, 2, 16, 256), 32)
    write(shared, 8192, "bf16", b, canonical("mn", 128, 2, 4096, 1024), 128)
    bits = descriptor(0, 16, 256, 32), descriptor(8192, 4096, 1024, 128)
    np.testing.assert_array_equal(multiply(shared, 64, "bf16", *bits, (0, 1)), a @ b.T)


@pytest.mark.parametrize("type_name", ["bf16", "f16", "tf32"])
def test_a_in_registers(type_name: str) -> None:
    k = K[type_name]
    a, b = integers(11, 64, k), integers(12, 16, k)
    bits = encode(type_name, a)
    registers = [np.zeros(128, np.uint32) for _ in range(4)]
    for thread in range(128):
        row, quarter = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for i in range(4):  # register 0: rows 0-7, 1: rows 8-15, 2 and 3: the second half of k
            r, first = row + 8 * (i % 2), k // 2 * (i // 2)
            if type_name == "tf32":
                registers[i][thread] = bits[r, first + quarter]
            else:
                pair = bits[r, first + 2 * quarter : first + 2 * quarter + 2]
                registers[i][thread] = pair[0] | pair[1] << 16
    shared = np.zeros(8192, np.uint8)
    write(shared, 0, type_name, b, canonical("k", 0, 4 if type_name == "tf32" else 2, 256, 128), 0)
    d = wgmma.product(16, type_name, shared, registers, descriptor(0, 256, 128, 0), [np.zeros(128, np.uint32)] * 8, True)
    np.testing.assert_array_equal(d_matrix(d), a @ b.T)


def simple(n: int = 16, type_name: str = "f16") -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """A, B and shared memory that holds them K-major without a swizzle, with their descriptors."""
    a, b = integers(13, 64, K[type_name]), integers(14, n, K[type_name])
    size = 4 if type_name == "tf32" else 2
    shared = np.zeros(16 * 1024, np.uint8)
    write(shared, 0, type_name, a, canonical("k", 0, size, 128, 256), 0)
    write(shared, 4096, type_name, b, canonical("k", 0, size, 128, 256), 0)
    return a, b, shared, descriptor(0, 128, 256, 0), descriptor(4096, 128, 256, 0)


def test_scales() -> None:
    a, b, shared, a_bits, b_bits = simple()
    c = integers(15, 64, 16)
    for scale_a, scale_b in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
        d = wgmma.product(16, "f16", shared, a_bits, b_bits, d_elements("f32", c), True, scale_a, scale_b)
        np.testing.assert_array_equal(d_matrix(d), scale_a * scale_b * (a @ b.T) + c)
    nans = [np.full(128, 0x7FC00000, np.uint32)] * 8
    np.testing.assert_array_equal(d_matrix(wgmma.product(16, "f16", shared, a_bits, b_bits, nans, False)), a @ b.T)
    assert np.isnan(d_matrix(wgmma.product(16, "f16", shared, a_bits, b_bits, nans, True))).all()


def test_f16_accumulators() -> None:
    a, b, shared, a_bits, b_bits = simple(24)
    c = integers(16, 64, 24)
    d = wgmma.product(24, "f16", shared, a_bits, b_bits, pairs(d_elements("f16", c)), True, accumulator="f16")
    np.testing.assert_array_equal(d, pairs(d_elements("f16", a @ b.T + c)))


def test_tf32_is_truncated() -> None:
    a, b, shared, a_bits, b_bits = simple(16, "tf32")
    shared.view(np.uint32)[:] |= np.uint32(0x1FFF)
    np.testing.assert_array_equal(multiply(shared, 16, "tf32", a_bits, b_bits, (0, 0)), a @ b.T)


def test_sums_are_rounded_once() -> None:
    a, b = np.zeros((64, 16)), np.zeros((8, 16))
    a[0, :3] = b[0, :3] = [1.0, 2.0**-12, 2.0**-12]
    shared = np.zeros(8192, np.uint8)
    write(shared, 0, "bf16", a, canonical("k", 0, 2, 128, 256), 0)
    write(shared, 4096, "bf16", b, canonical("k", 0, 2, 128, 256), 0)
    bits = descriptor(0, 128, 256, 0), descriptor(4096, 128, 256, 0)
    assert multiply(shared, 8, "bf16", *bits, (0, 0))[0, 0] == 1 + 2.0**-23


@pytest.mark.parametrize("span", [32, 64, 128])
def test_base_offset_is_the_line_at_which_the_pattern_begins(span: int) -> None:
    a = integers(17, 64, 16)
    shared = np.zeros(16 * 1024, np.uint8)
    start = 1024 + 3 * 128
    write(shared, start, "bf16", a, canonical("k", span, 2, 16, 1024), span, first_line=3)
    bits = descriptor(start, 16, 1024, span, base_offset=start >> 7 & 7)
    np.testing.assert_array_equal(wgmma.operand(shared, bits, 64, "bf16", 0), a)


def test_undefined_descriptors_are_refused() -> None:
    shared = np.zeros(16 * 1024, np.uint8)
    for bit in (14, 15, 30, 31, 46, 48, 52, 61):
        with pytest.raises(PtxError, match="which the format leaves out"):
            wgmma.operand(shared, descriptor(0, 128, 256, 0) | 1 << bit, 64, "bf16", 0)
    with pytest.raises(PtxError, match="base offset"):
        wgmma.operand(shared, descriptor(0, 128, 256, 0, base_offset=1), 64, "bf16", 0)
    with pytest.raises(PtxError, match="leaves the 16384 bytes"):
        wgmma.operand(shared, descriptor(8192, 16, 2048, 128), 64, "bf16", 0)
    with pytest.raises(PtxError, match="leaves the 16384 bytes"):
        wgmma.operand(shared, descriptor(16384 - 240, 128, 0, 0), 8, "bf16", 0)
    assert wgmma.operand(shared, descriptor(16384 - 256, 128, 0, 0), 8, "bf16", 0).shape == (8, 16)
    with pytest.raises(PtxError, match="crosses the end of a 64-byte swizzled span"):
        wgmma.operand(shared, descriptor(48, 16, 512, 64), 64, "bf16", 0)
    with pytest.raises(PtxError, match="crosses the end of a 128-byte swizzled span"):
        wgmma.operand(shared, descriptor(64, 1024, 2048, 128), 64, "bf16", 1)
    assert wgmma.operand(shared, descriptor(64, 1024, 2048, 128), 32, "bf16", 1).shape == (32, 16)


def test_undefined_operands_are_refused() -> None:
    _, _, shared, a, b = simple()
    d, words = [np.zeros(128, np.uint32)] * 8, [np.zeros(128, np.uint32)] * 4
    for arguments, message in [
        ((12, "f16", shared, a, b, d, True), "multiple of 8"),
        ((264, "f16", shared, a, b, d, True), "multiple of 8"),
        ((16, "f32", shared, a, b, d, True), "expected a type"),
        ((16, "bf16", shared, a, b, d[:4], True, 1, 1, 0, 0, "f16"), "f16 accumulators"),
        ((16, "f16", shared, a, b, d[:4], True), "expected 8 registers"),
        ((16, "f16", shared, words[:3], b, d, True), "4 registers of A"),
        ((16, "f16", shared, a, b, d, True, 2), "scales"),
        ((16, "f16", shared, a, b, d, True, 1, 1, 0, 2), "transposes"),
        ((16, "f16", shared, words, b, d, True, 1, 1, 1), "in registers cannot be transposed"),
        ((16, "tf32", shared, a, b, d, True, 1, 1, 0, 1), "tf32 operands cannot"),
    ]:
        with pytest.raises(PtxError, match=message):
            wgmma.product(*arguments)
