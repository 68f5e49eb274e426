"""Encodings, swizzles and layouts as the PTX ISA manual prints them, as tables, for the tests of csrc/interpreter."""

from __future__ import annotations

import numpy as np

# "Swizzling Modes": the 16-byte cells of each 128-byte line; cell p of a line holds the data of cell LINES[span][line][p].
LINES = {
    0: ["01234567"],
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
}


def encode(type_name: str, values: np.ndarray) -> np.ndarray:
    """The bits, as uint32, of values that the type represents exactly."""
    if type_name == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = values.astype(np.float32).view(np.uint32)
    return bits >> 16 if type_name == "bf16" else bits


def element_bytes(type_name: str) -> int:
    return 4 if type_name in ("tf32", "f32") else 2


def swizzled(address: int, span: int, first_line: int = 0) -> int:
    """Where the byte of an unswizzled address lies; the pattern begins at line first_line of shared memory."""
    lines = LINES[span]
    line = lines[(address // 128 - first_line) % len(lines)]
    return address // 128 * 128 + 16 * line.index(str(address % 128 // 16)) + address % 16


def offset(index: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """The offset of one index of a CuTe layout's mode, first part fastest."""
    total = 0
    for size, step in zip(shape, stride):
        total += index % size * step
        index //= size
    return total


def write(
    shared: np.ndarray, start: int, type_name: str, matrix: np.ndarray, layout: tuple, span: int, first_line: int = 0
) -> None:
    """Writes matrix [rows, k] to shared memory (uint8) by a CuTe layout ((shapes), (strides)), in elements."""
    (shape_0, shape_1), (stride_0, stride_1) = layout
    size = element_bytes(type_name)
    bits = encode(type_name, matrix)
    for row in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            address = start + size * (offset(row, shape_0, stride_0) + offset(k, shape_1, stride_1))
            place = swizzled(address, span, first_line)
            shared[place : place + size] = np.frombuffer(int(bits[row, k]).to_bytes(size, "little"), np.uint8)
