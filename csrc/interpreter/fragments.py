"""Matrix fragments in registers: which element of a matrix each register of each thread holds, and the values of its bits.

The index formulas come from the PTX ISA manual, sections "Matrix Fragments for mma.m16n8k4", "... mma.m16n8k8" and "...
mma.m16n8k16 with floating point type". The sections "Matrix Fragments for wgmma.mma_async.m64nNk16" and "... m64nNk8" give only
figures; CuTe's layouts for wgmma show the same distribution in each warp of the warpgroup, and warp w holds the rows
16 w to 16 w + 15.

A register of many threads is a uint32 array [threads]. Positions are arrays [threads, elements] in the manual's order a0, a1,
...: the lower half of a 16-bit pair comes first.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

ELEMENT_BITS = {"bf16": 16, "f16": 16, "tf32": 32, "f32": 32}
TF32_BITS = np.uint32(0xFFFFE000)  # sign, 8 bits of exponent, 10 of mantissa: the lower 13 bits are not read


def f32_of_half(bits: npt.NDArray[np.uint16], type_name: str) -> npt.NDArray[np.float32]:
    """The float32 of f16 or bf16 bits, which holds each of them."""
    if type_name == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widen(type_name: str, bits: npt.NDArray[np.uint16] | Words) -> Values:
    """The exact float64 values of elements that are given as uint16 (bf16, f16) or uint32 (tf32, f32) bits."""
    if type_name in ("f16", "bf16"):
        return f32_of_half(bits, type_name).astype(np.float64)
    words = bits & TF32_BITS if type_name == "tf32" else bits
    return words.view(np.float32).astype(np.float64)


def narrow(type_name: str, values: Values) -> npt.NDArray[np.uint16] | Words:
    """The bits of float64 values rounded once, to the nearest even f32 or f16."""
    if type_name == "f16":
        return values.astype(np.float16).view(np.uint16)
    return values.astype(np.float32).view(np.uint32)


def read(registers: list[Words], type_name: str) -> Values:
    """The values in registers, flat: one register after the other, in each one thread after the other, the lower half first."""
    words = np.concatenate(registers)
    return widen(type_name, words.view(np.uint16) if ELEMENT_BITS[type_name] == 16 else words)


def multiply(a: Values, b: Values, c: list[Words] | None, accumulator: str, threads: int) -> list[Words]:
    """The registers of a @ b + c for matrices a [threads / 2, k] and b [k, n] and registers c of the accumulator's type.

    The sum is computed in float64, where products of bf16, f16 and tf32 are exact, and rounded once. The manual leaves the
    order and the rounding of the accumulation unspecified ("at least single precision"), so a GPU's last bits can differ.
    """
    order = d_order(ELEMENT_BITS[accumulator], threads, b.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        sums = (a @ b).ravel()[order]
        if c is not None:
            sums += read(c, accumulator)
        return list(narrow(accumulator, sums).view(np.uint32).reshape(-1, threads))


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


def _flat(bits: int, threads: int, elements: int) -> Indices:
    """Where read puts element i of a thread, [threads, elements]."""
    held = 32 // bits  # elements in a register
    i = np.arange(elements)[None, :]
    return (i // held * threads + np.arange(threads)[:, None]) * held + i % held


@cache
def a_order(bits: int, threads: int, k: int) -> Indices:
    """The index, in what read returns, of each element of A [threads / 2, k]."""
    order = np.empty((threads // 2, k), np.intp)
    order[a_positions(bits, threads, k // 2)] = _flat(bits, threads, k // 2)
    return order


@cache
def b_order(bits: int, k: int) -> Indices:
    """The index, in what read returns, of each element of B [k, 8]."""
    order = np.empty((k, 8), np.intp)
    order[b_positions(bits, k // 4)] = _flat(bits, 32, k // 4)
    return order


@cache
def d_order(bits: int, threads: int, n: int) -> Indices:
    """The index in D [threads / 2, n], flat, of each element in the order of read."""
    rows, columns = d_positions(threads, n // 2)
    order = np.empty(threads * n // 2, np.intp)
    order[_flat(bits, threads, n // 2)] = rows * n + columns
    return order
