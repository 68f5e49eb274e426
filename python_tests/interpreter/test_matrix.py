"""The interpreter's mma, ldmatrix and movmatrix against plain products, with fragments from the manual's formulas.

The formulas below are written out as the PTX ISA manual prints them, case by case, and not as csrc/interpreter/fragments.py
computes them. POSITIONS holds a few positions worked out by hand, one near each boundary of each formula.
"""

from __future__ import annotations

import numpy as np
import pytest
from ptx_layouts import encode

from csrc.interpreter import fragments, matrix
from csrc.interpreter.errors import PtxError

SIXTEEN = ["m16n8k16", "m16n8k8"]
CASES = [(s, t) for s in SIXTEEN for t in ("bf16", "f16")] + [("m16n8k8", "tf32"), ("m16n8k4", "tf32")]

# Operand, k, 16-bit elements?, lane, element i -> row, column.
POSITIONS = [
    ("a", 16, True, 0, 0, 0, 0),
    ("a", 16, True, 0, 2, 8, 0),
    ("a", 16, True, 0, 4, 0, 8),
    ("a", 16, True, 31, 7, 15, 15),
    ("a", 16, True, 5, 5, 1, 11),
    ("a", 8, True, 3, 1, 0, 7),
    ("a", 8, True, 28, 2, 15, 0),
    ("a", 8, False, 0, 1, 8, 0),
    ("a", 8, False, 0, 2, 0, 4),
    ("a", 8, False, 31, 3, 15, 7),
    ("a", 4, False, 6, 1, 9, 2),
    ("b", 16, True, 1, 2, 10, 0),
    ("b", 16, True, 4, 1, 1, 1),
    ("b", 16, True, 31, 3, 15, 7),
    ("b", 8, True, 29, 1, 3, 7),
    ("b", 8, False, 2, 1, 6, 0),
    ("b", 4, False, 13, 0, 1, 3),
    ("d", 16, True, 0, 2, 8, 0),
    ("d", 16, True, 31, 1, 7, 7),
    ("d", 16, True, 9, 3, 10, 3),
]


def a_position(k: int, sixteen: bool, lane: int, i: int) -> tuple[int, int]:
    """Row and column of a_i, as the manual's three sections on A print them."""
    group_id, thread_in_group = lane >> 2, lane % 4
    if sixteen and k == 16:
        row = group_id if 0 <= i < 2 or 4 <= i < 6 else group_id + 8
        col = (thread_in_group * 2) + (i & 1) if i < 4 else (thread_in_group * 2) + (i & 1) + 8
    elif sixteen:
        row = group_id if i in (0, 1) else group_id + 8
        col = thread_in_group * 2 + (i & 1)
    else:
        row = group_id if i in (0, 2) else group_id + 8
        col = thread_in_group if i in (0, 1) else thread_in_group + 4
    return row, col


def b_position(k: int, sixteen: bool, lane: int, i: int) -> tuple[int, int]:
    """Row and column of b_i, as the manual prints them."""
    group_id, thread_in_group = lane >> 2, lane % 4
    if sixteen:
        row = (thread_in_group * 2) + (i & 1) + (0 if i < 2 else 8)
    else:
        row = thread_in_group if i == 0 else thread_in_group + 4
    return row, group_id


def d_position(lane: int, i: int) -> tuple[int, int]:
    """Row and column of c_i and d_i, as the manual prints them."""
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def pack(bits: np.ndarray, position, elements: int, sixteen: bool) -> list[np.ndarray]:
    """The registers of 32 lanes that hold a matrix of bits, element by element."""
    registers = [np.zeros(32, np.uint32) for _ in range(elements // 2 if sixteen else elements)]
    for lane in range(32):
        for i in range(elements):
            row, col = position(lane, i)
            register, shift = (i // 2, 16 * (i % 2)) if sixteen else (i, 0)
            registers[register][lane] |= np.uint32(int(bits[row, col]) << shift)
    return registers


def operands(shape: str, type_name: str, a: np.ndarray, b: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    k, sixteen = int(shape[6:]), type_name != "tf32"
    a_registers = pack(encode(type_name, a), lambda lane, i: a_position(k, sixteen, lane, i), 16 * k // 32, sixteen)
    b_registers = pack(encode(type_name, b), lambda lane, i: b_position(k, sixteen, lane, i), 8 * k // 32, sixteen)
    return a_registers, b_registers


def unpack_f32(registers: list[np.ndarray]) -> np.ndarray:
    d = np.zeros((16, 8))
    for lane in range(32):
        for i in range(4):
            d[d_position(lane, i)] = registers[i][lane : lane + 1].view(np.float32)[0]
    return d


@pytest.mark.parametrize("operand,k,sixteen,lane,i,row,col", POSITIONS)
def test_positions_are_those_of_the_manual(operand: str, k: int, sixteen: bool, lane: int, i: int, row: int, col: int) -> None:
    bits = 16 if sixteen else 32
    if operand == "a":
        rows, cols = fragments.a_positions(bits, 32, 16 * k // 32)
    elif operand == "b":
        rows, cols = fragments.b_positions(bits, 8 * k // 32)
    else:
        rows, cols = fragments.d_positions(32, 4)
    assert (rows[lane, i], cols[lane, i]) == (row, col)


@pytest.mark.parametrize("shape,type_name", CASES)
def test_mma_multiplies_whole_numbers_exactly(shape: str, type_name: str) -> None:
    rng = np.random.default_rng(0)
    k = int(shape[6:])
    a, b, c = rng.integers(-64, 65, (16, k)), rng.integers(-64, 65, (k, 8)), rng.integers(-9999, 9999, (16, 8))
    a_registers, b_registers = operands(shape, type_name, a, b)
    c_registers = pack(encode("f32", c), d_position, 4, False)
    d = matrix.mma(shape, type_name, a_registers, b_registers, c_registers)
    np.testing.assert_array_equal(unpack_f32(d), a @ b + c)


@pytest.mark.parametrize("shape", SIXTEEN)
def test_mma_with_f16_accumulators(shape: str) -> None:
    rng = np.random.default_rng(1)
    k = int(shape[6:])
    a, b, c = rng.integers(-8, 9, (16, k)), rng.integers(-8, 9, (k, 8)), rng.integers(-500, 500, (16, 8))
    a_registers, b_registers = operands(shape, "f16", a, b)
    d = matrix.mma(shape, "f16", a_registers, b_registers, pack(encode("f16", c), d_position, 4, True), accumulator="f16")
    expected = pack(encode("f16", a @ b + c), d_position, 4, True)
    np.testing.assert_array_equal(d, expected)


def test_mma_rounds_once_to_the_nearest_f32() -> None:
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[0, :3], b[:3, 0] = [1.0, 2.0**-12, 2.0**-12], [1.0, 2.0**-12, 2.0**-12]  # 1 + 2^-24 + 2^-24: lost if rounded in between
    a_registers, b_registers = operands("m16n8k16", "bf16", a, b)
    d = matrix.mma("m16n8k16", "bf16", a_registers, b_registers, [np.zeros(32, np.uint32)] * 4)
    assert unpack_f32(d)[0, 0] == 1 + 2.0**-23


def test_mma_ignores_the_lower_13_bits_of_tf32() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-64, 65, (16, 8)), rng.integers(-64, 65, (8, 8))
    a_registers, b_registers = operands("m16n8k8", "tf32", a, b)
    dirty = [r | np.uint32(0x1FFF) for r in a_registers]
    d = matrix.mma("m16n8k8", "tf32", dirty, b_registers, [np.zeros(32, np.uint32)] * 4)
    np.testing.assert_array_equal(unpack_f32(d), a @ b)


def test_mma_passes_infinities_and_nans_on() -> None:
    a, b = np.zeros((16, 16)), np.ones((16, 8))
    a[3, 5], a[4, 6] = np.inf, np.nan
    d = unpack_f32(matrix.mma("m16n8k16", "f16", *operands("m16n8k16", "f16", a, b), [np.zeros(32, np.uint32)] * 4))
    assert (d[3] == np.inf).all() and np.isnan(d[4]).all() and (d[5] == 0).all()


def test_mma_refuses_what_the_manual_does_not_list() -> None:
    words = [np.zeros(32, np.uint32)] * 4
    with pytest.raises(PtxError, match="m16n8k4 with bf16"):
        matrix.mma("m16n8k4", "bf16", words[:1], words[:1], words)
    with pytest.raises(PtxError, match="bf16 with f16 accumulators"):
        matrix.mma("m16n8k16", "bf16", words, words[:2], words[:2], accumulator="f16")
    with pytest.raises(PtxError, match=r"expected \(4, 2, 4\) registers"):
        matrix.mma("m16n8k16", "bf16", words, words, words)


def scattered_rows(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shared memory of 8192 random bytes, an address for each lane, and the matrices [count, 8, 8] that the addresses give."""
    shared = rng.integers(0, 256, 8192, dtype=np.uint8)
    addresses = (16 * rng.permutation(512)[:32]).astype(np.uint32)
    matrices = np.zeros((count, 8, 8), np.uint16)
    for m in range(count):
        for row in range(8):
            start = int(addresses[8 * m + row])
            matrices[m, row] = np.frombuffer(shared[start : start + 16].tobytes(), "<u2")
    addresses[8 * count :] = 0xFFFFFFFF  # these lanes' addresses are not used
    return shared, addresses, matrices


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix_gives_four_lanes_a_row(count: int, transpose: bool) -> None:
    shared, addresses, matrices = scattered_rows(np.random.default_rng(count), count)
    registers = matrix.ldmatrix(shared, addresses, count, transpose)
    assert len(registers) == count
    for m in range(count):
        for lane in range(32):
            row = matrices[m][:, lane // 4] if transpose else matrices[m][lane // 4]
            low, high = int(row[lane % 4 * 2]), int(row[lane % 4 * 2 + 1])
            assert registers[m][lane] == low | high << 16


def test_matrix_loads_refuse_bad_rows() -> None:
    shared = np.zeros(1024, np.uint8)
    addresses = np.arange(32, dtype=np.uint32) * 16
    addresses[9] = 24
    assert len(matrix.ldmatrix(shared, addresses, 1, False)) == 1
    with pytest.raises(PtxError, match="lane 9 addresses 0x18, which is not aligned"):
        matrix.ldmatrix(shared, addresses, 2, False)
    addresses[9] = 1024
    with pytest.raises(PtxError, match="past the 1024 shared bytes"):
        matrix.ldmatrix(shared, addresses, 2, False)
    with pytest.raises(PtxError, match="1, 2 or 4"):
        matrix.ldmatrix(shared, addresses, 3, False)


def test_movmatrix_transposes() -> None:
    m = np.arange(64, dtype=np.uint32).reshape(8, 8)
    a = (m[:, ::2] | m[:, 1::2] << 16).reshape(32)
    expected = (m.T[:, ::2] | m.T[:, 1::2] << 16).reshape(32)
    np.testing.assert_array_equal(matrix.movmatrix(a), expected)


def test_ldmatrix_feeds_mma() -> None:
    """Row-major A and B^T (.col) in shared memory, loaded as the common kernels do: x4 for A, x2 for B."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(-64, 65, (16, 16)), rng.integers(-64, 65, (16, 8))
    shared = np.concatenate([a.astype(np.float16).ravel(), b.T.astype(np.float16).ravel()]).view(np.uint8)
    lane = np.arange(32)
    a_addresses = (32 * (lane % 16) + 16 * (lane // 16)).astype(np.uint32)
    b_addresses = (512 + 32 * (lane % 8) + 16 * (lane // 8 % 2)).astype(np.uint32)
    a_registers = matrix.ldmatrix(shared, a_addresses, 4, False)
    b_registers = matrix.ldmatrix(shared, b_addresses, 2, False)
    d = matrix.mma("m16n8k16", "f16", a_registers, b_registers, [np.zeros(32, np.uint32)] * 4)
    np.testing.assert_array_equal(unpack_f32(d), a @ b)
