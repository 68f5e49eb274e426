"""Matrix fragments in registers: which element of a matrix each register of each thread holds, and the values of its bits.

The index formulas come from the PTX ISA manual, sections "Matrix Fragments for mma.m16n8k4", "... mma.m16n8k8" and "...
mma.m16n8k16 with floating point type". The sections "Matrix Fragments for wgmma.mma_async.m64nNk16" and "... m64nNk8" give only
figures; CuTe's layouts for wgmma show the same distribution in each warp of the warpgroup, and warp w holds the rows
16 w to 16 w + 15.

An array of registers has the shape [threads, registers]. An array of elements has the shape [threads, elements]; its columns
are in the manual's order a0, a1, ...: the lower half of a 16-bit pair comes first.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from .errors import PtxError

Words = npt.NDArray[np.uint32]
Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

ELEMENT_BITS = {"bf16": 16, "f16": 16, "tf32": 32, "f32": 32}
TF32_BITS = np.uint32(0xFFFFE000)  # sign, 8 bits of exponent, 10 of mantissa: the lower 13 bits are not read


def element_bits(type_name: str) -> int:
    """The number of bits of an element in registers and memory. Raises PtxError for a type that is not supported."""
    if type_name not in ELEMENT_BITS:
        raise PtxError(f"type: expected one of {', '.join(ELEMENT_BITS)}, got {type_name}")
    return ELEMENT_BITS[type_name]


def widen(type_name: str, bits: npt.NDArray[np.uint16] | Words) -> Values:
    """The exact float64 values of elements that are given as uint16 (bf16, f16) or uint32 (tf32, f32) bits."""
    if type_name == "f16":
        return bits.view(np.float16).astype(np.float64)
    if type_name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    words = bits & TF32_BITS if type_name == "tf32" else bits
    return words.view(np.float32).astype(np.float64)


def narrow(type_name: str, values: Values) -> npt.NDArray[np.uint16] | Words:
    """The bits of float64 values rounded once, to the nearest even f32 or f16."""
    with np.errstate(over="ignore", invalid="ignore"):
        if type_name == "f16":
            return values.astype(np.float16).view(np.uint16)
        return values.astype(np.float32).view(np.uint32)


def elements_of(registers: list[Words], bits: int) -> npt.NDArray[np.uint16] | Words:
    """The elements [threads, elements] in registers, low to high."""
    words = np.stack(registers, axis=-1)
    return words.view(np.uint16) if bits == 16 else words


def registers_of(elements: npt.NDArray[np.uint16] | Words) -> list[Words]:
    """The registers that hold elements [threads, elements]: the inverse of elements_of."""
    return list(np.ascontiguousarray(np.ascontiguousarray(elements).view(np.uint32).T))


def _threads(threads: int) -> tuple[Indices, Indices]:
    """groupID (plus the first row of the thread's warp) and threadID_in_group of each thread, as columns."""
    thread = np.arange(threads)[:, None]
    return thread % 32 // 4 + 16 * (thread // 32), thread % 4


@cache
def a_positions(bits: int, threads: int, elements: int) -> tuple[Indices, Indices]:
    """The row and the column (k) of each element of A, both [threads, elements]."""
    group, in_group = _threads(threads)
    i = np.arange(elements)[None, :]
    if bits == 16:
        return group + 8 * (i // 2 % 2), 2 * in_group + i % 2 + 8 * (i // 4)
    return group + 8 * (i % 2), in_group + 4 * (i // 2)


@cache
def b_positions(bits: int, elements: int) -> tuple[Indices, Indices]:
    """The row (k) and the column (n) of each element of B of one warp, both [32, elements]."""
    group, in_group = _threads(32)
    i = np.arange(elements)[None, :]
    if bits == 16:
        return 2 * in_group + i % 2 + 8 * (i // 2), group + 0 * i
    return in_group + 4 * i, group + 0 * i


@cache
def d_positions(threads: int, elements: int) -> tuple[Indices, Indices]:
    """The row and the column (n) of each element of C and D, both [threads, elements], for f32 and f16 accumulators alike."""
    group, in_group = _threads(threads)
    i = np.arange(elements)[None, :]
    return group + 8 * (i // 2 % 2), 2 * in_group + i % 2 + 8 * (i // 4)


def assemble(values: Values, positions: tuple[Indices, Indices], shape: tuple[int, int]) -> Values:
    """The matrix of a shape whose elements [threads, elements] lie at the positions."""
    matrix = np.empty(shape)
    matrix[positions] = values
    return matrix


def accumulate(a: Values, b: Values, c: Values | None) -> Values:
    """a @ b + c in float64. Products of bf16, f16 and tf32 are exact in float64.

    The manual leaves the order and the rounding of the accumulation unspecified ("at least single precision"), so results on a
    GPU can differ from this one in the last bits.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = a @ b
        return product if c is None else product + c
