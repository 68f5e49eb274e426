"""Matrix instructions of one warp: mma.sync, ldmatrix, movmatrix.

A register of a warp is a uint32 array [32], one word for each lane. Registers of f32 hold the bits of their values.
Source of all rules: PTX ISA manual, chapter "Warp Level Matrix Multiply-Accumulate Instructions", section "Matrix
multiply-accumulate operation using mma instruction"; each function names its part.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import fragments
from .errors import PtxError
from .fragments import Words

Bytes = npt.NDArray[np.uint8]

ROW_BYTES = 16  # eight 16-bit elements
MMA_SHAPES = {
    "m16n8k16": ("bf16", "f16"),
    "m16n8k8": ("bf16", "f16", "tf32"),
    "m16n8k4": ("tf32",),
}


def mma(shape: str, type_name: str, a: list[Words], b: list[Words], c: list[Words], accumulator: str = "f32") -> list[Words]:
    """D = A B + C of mma.sync.aligned.<shape>.row.col, the registers of D.

    a, b and c are the registers of each operand in the instruction's order. accumulator is the type of C and D: "f32" (four
    registers) or "f16" (two registers, only where type_name is "f16"). The products are summed in float64 and rounded once;
    the manual specifies neither order nor rounding. Of tf32 operands only the upper 19 bits count: the manual says for wgmma
    that the lower 13 bits are truncated, and leaves it open for mma.

    Source: "Multiply-and-Accumulate Instruction: mma", and "Matrix Fragments" of each shape (see fragments).
    Raises PtxError for a shape, a type or a number of registers that the manual does not list or that is not supported.
    """
    if type_name not in MMA_SHAPES.get(shape, ()):
        raise PtxError(f"mma: {shape} with {type_name} is not supported")
    if accumulator != "f32" and (accumulator, type_name) != ("f16", "f16"):
        raise PtxError(f"mma: {type_name} with {accumulator} accumulators is not supported")
    k = int(shape.rpartition("k")[2])
    bits = fragments.ELEMENT_BITS[type_name]
    d_bits = fragments.ELEMENT_BITS[accumulator]
    counts = (16 * k * bits // 1024, 8 * k * bits // 1024, 16 * 8 * d_bits // 1024)
    if (len(a), len(b), len(c)) != counts:
        raise PtxError(f"mma: expected {counts} registers of A, B and C, got {(len(a), len(b), len(c))}")
    a_matrix = fragments.read(a, type_name)[fragments.a_order(bits, 32, k)]
    b_matrix = fragments.read(b, type_name)[fragments.b_order(bits, k)]
    return fragments.multiply(a_matrix, b_matrix, c, accumulator, 32)


def ldmatrix(shared: Bytes, addresses: Words, count: int, transpose: bool) -> list[Words]:
    """The destination registers of ldmatrix.sync.aligned.m8n8.x<count>{.trans}.shared.b16.

    shared is the block's shared memory as uint8 [bytes]; addresses holds a byte offset for each lane. Lane 8 m + r gives the
    address of row r of matrix m; the addresses of the other lanes are ignored. Register m holds matrix m: lane l holds the
    elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of column l / 4 with transpose.

    Source: "Warp-level matrix load instruction: ldmatrix".
    Raises PtxError for a row that is not aligned to 16 bytes or leaves shared memory, and for a count other than 1, 2 and 4.
    """
    rows = _rows("ldmatrix", shared, addresses, count)
    matrices = shared[rows].view(np.uint16).reshape(count, 8, 8)
    if transpose:
        matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
    return list(matrices.view(np.uint32).reshape(count, 32))


def movmatrix(a: Words) -> Words:
    """The transpose of the 8 x 8 matrix of 16-bit elements in a register: movmatrix.sync.aligned.m8n8.trans.b16.

    Source: "Warp-level matrix transpose instruction: movmatrix".
    """
    matrix = np.ascontiguousarray(a).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(matrix.T).view(np.uint32).reshape(32)


def _rows(instruction: str, shared: Bytes, addresses: Words, count: int) -> npt.NDArray[np.int64]:
    """The byte offsets [8 count, 16] of the rows that the first 8 count lanes address."""
    if count not in (1, 2, 4):
        raise PtxError(f"{instruction}: expected 1, 2 or 4 matrices, got {count}")
    starts = addresses[: 8 * count].astype(np.int64)
    if (starts % ROW_BYTES).any():
        lane = int(np.flatnonzero(starts % ROW_BYTES)[0])
        raise PtxError(f"{instruction}: lane {lane} addresses {int(starts[lane]):#x}, which is not aligned to 16 bytes")
    if starts.max() > shared.size - ROW_BYTES:
        lane = int(starts.argmax())
        raise PtxError(f"{instruction}: lane {lane} addresses {int(starts[lane]):#x}, past the {shared.size} shared bytes")
    return starts[:, None] + np.arange(ROW_BYTES)
