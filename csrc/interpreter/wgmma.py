"""wgmma.mma_async: a product of a warpgroup whose operands lie in shared memory, described by 64-bit matrix descriptors.

A register of a warpgroup is a uint32 array [128], one word for each thread; registers of f32 hold the bits of their values.
Source of all rules: PTX ISA manual, section "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation using
wgmma.mma_async instruction"; each function names its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from . import fragments
from .errors import PtxError
from .fragments import Indices, Values, Words
from .swizzle import CHUNK, swizzle

Bytes = npt.NDArray[np.uint8]

M = 64
THREADS = 128
K_BYTES = 32  # of both operands: 16 elements of 16 bits, or 8 of 32 bits
TYPES = ("bf16", "f16", "tf32")
SPANS = (0, 128, 64, 32)  # bytes, by the descriptor's swizzling mode
RESERVED = ((14, 15), (30, 31), (46, 48), (52, 61))  # bits that no field of the descriptor covers


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory: byte addresses and offsets, the swizzled span in bytes, and the line its pattern begins at."""

    start: int
    leading: int
    stride: int
    base_offset: int
    span: int

    @classmethod
    def decode(cls, bits: int) -> Descriptor:
        """The fields of a 64-bit descriptor.

        Source: "Matrix Descriptor Format": matrix-descriptor-encode(x) = (x & 0x3FFFF) >> 4 in the bits 0-13 (start address),
        16-29 (leading dimension byte offset) and 32-45 (stride dimension byte offset); 49-51 hold the base offset, 62-63 the
        swizzling mode. Raises PtxError for a bit that the format leaves out, and for a base offset without a swizzle.
        """
        for first, last in RESERVED:
            if bits >> first & ((1 << (last - first + 1)) - 1):
                raise PtxError(f"wgmma: descriptor {bits:#018x} sets a bit of {first} to {last}, which the format leaves out")
        fields = [(bits >> first & 0x3FFF) << 4 for first in (0, 16, 32)]
        descriptor = cls(*fields, base_offset=bits >> 49 & 7, span=SPANS[bits >> 62])
        if descriptor.base_offset and not descriptor.span:
            raise PtxError(f"wgmma: descriptor {bits:#018x} has a base offset, which is not valid without a swizzle")
        return descriptor


def product(
    n: int,
    type_name: str,
    shared: Bytes,
    a: int | list[Words],
    b: int,
    d: list[Words],
    scale_d: bool,
    scale_a: int = 1,
    scale_b: int = 1,
    transpose_a: int = 0,
    transpose_b: int = 0,
    accumulator: str = "f32",
) -> list[Words]:
    """D = A B + D of wgmma.mma_async.sync.aligned.m64n<n>k<16 or 8>.<accumulator>.<type>.<type>, the registers of D.

    type_name is "bf16", "f16" or "tf32"; accumulator is "f32" (n / 2 registers in d) or, for f16 only, "f16" (n / 4 registers).
    shared is the block's shared memory as uint8 [bytes]. a is a descriptor or four registers, b a descriptor. Without scale_d
    D = A B, and the values in d are not used. scale_a and scale_b are 1 or -1. transpose_a and transpose_b are 0 (K-major) or 1
    (M- or N-major; 16-bit types in shared memory only).

    The products are summed in float64 and rounded once: the manual leaves the order and the rounding unspecified. tf32 operands
    are truncated to their upper 19 bits, as the manual says.

    Source: "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async", and "Matrix Fragments" (see fragments).
    Raises PtxError for operands that the manual does not allow, and for an operand that leaves shared memory.
    """
    _check_operands(n, type_name, a, d, (scale_a, scale_b), (transpose_a, transpose_b), accumulator)
    if isinstance(a, list):
        bits = fragments.ELEMENT_BITS[type_name]
        a_matrix = fragments.read(a, type_name)[fragments.a_order(bits, THREADS, K_BYTES * 8 // bits)]
    else:
        a_matrix = operand(shared, a, M, type_name, transpose_a)
    b_matrix = operand(shared, b, n, type_name, transpose_b).T
    return fragments.multiply(a_matrix * (scale_a * scale_b), b_matrix, d if scale_d else None, accumulator, THREADS)


def operand(shared: Bytes, descriptor: int, rows: int, type_name: str, transpose: int) -> Values:
    """The matrix that a descriptor gives, as [rows, k] for A and for the transpose of B: rows is 64 or n.

    Raises PtxError for an undefined descriptor and an operand that leaves shared memory.
    """
    bits = fragments.ELEMENT_BITS[type_name]
    descriptor = int(descriptor)
    chunks = _chunks(descriptor, rows, bool(transpose))
    limit = shared.size // CHUNK
    if chunks.max() >= limit:
        raise PtxError(f"wgmma: the operand of descriptor {descriptor:#018x} leaves the {shared.size} bytes of shared memory")
    memory = shared[: limit * CHUNK].reshape(limit, CHUNK)
    elements = memory[chunks].view(np.uint16 if bits == 16 else np.uint32)
    matrix = fragments.widen(type_name, elements.reshape(chunks.shape[0], -1))
    return matrix.T if transpose else matrix


@lru_cache(maxsize=4096)
def _chunks(bits: int, rows: int, transpose: bool) -> Indices:
    """The index in shared memory of each 16-byte chunk of an operand: [rows, 2] if K-major, [16, rows / 8] if MN-major.

    Source: "Canonical Layouts" and "Major-ness supported by Strides", in units of 16-byte chunks (T elements).
    """
    descriptor = Descriptor.decode(bits)
    layout = _mn_major if transpose else _k_major
    addresses = descriptor.start + layout(descriptor, rows)
    if descriptor.span:
        # The chunks of one span must lie within one aligned span: otherwise the start is not a position in a canonical layout.
        used = min(rows // 8, descriptor.span // CHUNK) if transpose else 2
        if descriptor.start % descriptor.span + used * CHUNK > descriptor.span:
            raise PtxError(
                f"wgmma: the operand at {descriptor.start:#x} crosses the end of a {descriptor.span}-byte swizzled span; "
                "start it at a multiple of the span, or advance along K by whole steps within the span"
            )
    return (swizzle(addresses, descriptor.span, descriptor.base_offset) // CHUNK).astype(np.intp)


def _k_major(descriptor: Descriptor, rows: int) -> npt.NDArray[np.int64]:
    """Byte offsets [rows, 2] of the chunks of a K-major operand.

    The manual's layout is ((8,m),(T,2k)):((1T,SBO),(1,LBO)) without a swizzle and ((8,m),(T,2k)):((WT,SBO),(1,T)) with a
    swizzled span of W chunks, where LBO is not used.
    """
    row, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
    row_bytes = descriptor.span or CHUNK
    chunk_bytes = CHUNK if descriptor.span else descriptor.leading
    return row % 8 * row_bytes + row // 8 * descriptor.stride + chunk * chunk_bytes


def _mn_major(descriptor: Descriptor, rows: int) -> npt.NDArray[np.int64]:
    """Byte offsets [16, rows / 8] of the chunks of an M- or N-major operand.

    The manual's layout is ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO)) without a swizzle and ((T,W,m),(8,k)):((1,T,LBO),(WT,SBO)) with
    a swizzled span of W chunks: the two offsets exchange their roles.
    """
    k, chunk = np.arange(16)[:, None], np.arange(rows // 8)[None, :]
    if not descriptor.span:
        return chunk * descriptor.stride + k % 8 * CHUNK + k // 8 * descriptor.leading
    width = descriptor.span // CHUNK
    along_rows = chunk % width * CHUNK + chunk // width * descriptor.leading
    return along_rows + k % 8 * descriptor.span + k // 8 * descriptor.stride


def _check_operands(
    n: int,
    type_name: str,
    a: int | list[Words],
    d: list[Words],
    scales: tuple[int, int],
    transposes: tuple[int, int],
    accumulator: str,
) -> None:
    """Raises PtxError for operands that the syntax of wgmma.mma_async does not have."""
    if n % 8 or not 8 <= n <= 256:
        raise PtxError(f"wgmma: expected n as a multiple of 8 up to 256, got {n}")
    if type_name not in TYPES:
        raise PtxError(f"wgmma: expected a type of {', '.join(TYPES)}, got {type_name}")
    if accumulator != "f32" and (accumulator, type_name) != ("f16", "f16"):
        raise PtxError(f"wgmma: {type_name} with {accumulator} accumulators is not supported")
    registers = n // 2 if accumulator == "f32" else n // 4
    if len(d) != registers:
        raise PtxError(f"wgmma: expected {registers} registers of D, got {len(d)}")
    if isinstance(a, list) and len(a) != 4:
        raise PtxError(f"wgmma: expected 4 registers of A, got {len(a)}")
    if any(scale not in (1, -1) for scale in scales):
        raise PtxError(f"wgmma: expected scales of 1 or -1, got {scales}")
    if any(transpose not in (0, 1) for transpose in transposes):
        raise PtxError(f"wgmma: expected transposes of 0 or 1, got {transposes}")
    if transposes[0] and isinstance(a, list):
        raise PtxError("wgmma: A in registers cannot be transposed")
    if any(transposes) and type_name == "tf32":
        raise PtxError("wgmma: tf32 operands cannot be transposed")
