"""Tensor maps and the copies of boxes that they describe: cuTensorMapEncodeTiled and cp.async.bulk.tensor in tile mode.

Sources: CUDA driver API, "Tensor Map Object Management", for what a map may contain; PTX ISA manual, "Tensors" (tiled mode,
swizzling modes) and "cp.async.bulk.tensor" for the copies; CUDA C++ programming guide, "Alignment requirements for
multi-dimensional bulk tensor asynchronous copy operations".

Dimension 0 is the innermost one. A box is a uint8 array [rows, bytes of a row]; dimension 1 is the fastest of the rows.
Not supported: interleaved layouts, im2col, packed and flushing types, and the swizzles of newer GPUs (128 bytes
in atoms of 32 or 64).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from . import fragments
from .errors import PtxError
from .swizzle import CHUNK, swizzle

Bytes = npt.NDArray[np.uint8]
Read = Callable[[int, int], bytes]  # address, size

MAP_BYTES = 128  # sizeof(CUtensorMap)
SHARED_ALIGNMENT = 128
MAGIC = b"tilemap1"
LAYOUT = struct.Struct("<8sQ5Q4Q5H5B4B")

# CUtensorMapDataType by number: name and bytes. 10 and 12 (flushing types) and 13 to 15 (packed types) are not supported.
TYPES = {
    0: ("u8", 1),
    1: ("u16", 2),
    2: ("u32", 4),
    3: ("s32", 4),
    4: ("u64", 8),
    5: ("s64", 8),
    6: ("f16", 2),
    7: ("f32", 4),
    8: ("f64", 8),
    9: ("bf16", 2),
    11: ("tf32", 4),
}
FLOATS = ("f16", "f32", "f64", "bf16", "tf32")
SPANS = (0, 32, 64, 128)  # bytes, by CUtensorMapSwizzle
FILL_ZERO, FILL_NAN = 0, 1
# The value of the OOB-NaN is not documented. This one is a NaN of each type.
NAN_BYTES = bytes((0xF7, 0x7F))


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that a copy moves.

    kind is a CUtensorMapDataType, swizzle a CUtensorMapSwizzle and fill a CUtensorMapFloatOOBfill. sizes and box are in
    elements; strides are in bytes, of the dimensions 1, 2, ...
    """

    kind: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: int
    fill: int

    @property
    def type_name(self) -> str:
        return TYPES[self.kind][0]

    @property
    def element_bytes(self) -> int:
        return TYPES[self.kind][1]

    @property
    def span(self) -> int:
        """The swizzled span in bytes, 0 without a swizzle."""
        return SPANS[self.swizzle]

    @property
    def counts(self) -> tuple[int, ...]:
        """The elements that a copy moves along each dimension: ceil(box / element stride); dimension 0 has no stride."""
        return (self.box[0], *(-(-n // step) for n, step in zip(self.box[1:], self.element_strides[1:])))

    @property
    def row_bytes(self) -> int:
        return self.box[0] * self.element_bytes


def encode(
    kind: int,
    rank: int,
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int],
    interleave: int,
    swizzle_mode: int,
    l2_promotion: int,
    fill: int,
) -> bytes:
    """A map as 128 bytes, with the arguments of cuTensorMapEncodeTiled in their order.

    The bytes have a layout of their own, not that of a GPU. strides has rank - 1 elements. The L2 promotion is checked and
    dropped. The driver's requirement that the map itself is aligned to 64 bytes is left to the caller.

    Raises PtxError for what cuTensorMapEncodeTiled documents as invalid, and for what this module does not support.
    """
    if kind not in TYPES:
        _expect(kind in range(16), "data type", "0 to 15", kind)
        raise PtxError(f"tensor map: data type {kind} is not supported; expected one of {sorted(TYPES)}")
    _expect(1 <= rank <= 5, "rank", "1 to 5", rank)
    lengths = (len(sizes), len(strides) + 1, len(box), len(element_strides))
    _expect(set(lengths) == {rank}, "lengths", f"{rank} dimensions", lengths)
    if interleave:
        _expect(interleave in (1, 2), "interleave", "0 to 2", interleave)
        raise PtxError("tensor map: interleaved layouts are not supported")
    if not 0 <= swizzle_mode < len(SPANS):
        raise PtxError(f"tensor map: swizzle {swizzle_mode} is not supported; expected 0 to {len(SPANS) - 1}")
    _expect(0 <= l2_promotion <= 3, "L2 promotion", "0 to 3", l2_promotion)
    _expect(fill in (FILL_ZERO, FILL_NAN), "fill", "0 or 1", fill)
    described = TensorMap(kind, address, tuple(sizes), tuple(strides), tuple(box), tuple(element_strides), swizzle_mode, fill)
    _check_numbers(described)
    lists = (*_pad(sizes, 5), *_pad(strides, 4), *_pad(box, 5), *_pad(element_strides, 5))
    packed = LAYOUT.pack(MAGIC, address, *lists, rank, kind, swizzle_mode, fill)
    return packed.ljust(MAP_BYTES, b"\0")


def decode(data: bytes) -> TensorMap:
    """The map that encode packed. Raises PtxError for other bytes."""
    if len(data) != MAP_BYTES or data[: len(MAGIC)] != MAGIC:
        raise PtxError("tensor map: the 128 bytes were not written by cuTensorMapEncodeTiled")
    address, *numbers = LAYOUT.unpack(data[: LAYOUT.size])[1:]
    rank, kind, swizzle_mode, fill = numbers[19:]
    return TensorMap(
        kind,
        address,
        sizes=tuple(numbers[:rank]),
        strides=tuple(numbers[5 : 4 + rank]),
        box=tuple(numbers[9 : 9 + rank]),
        element_strides=tuple(numbers[14 : 14 + rank]),
        swizzle=swizzle_mode,
        fill=fill,
    )


def box_bytes(described: TensorMap) -> int:
    """The bytes that a copy moves and that complete-tx counts, those out of bounds included."""
    return prod(described.counts) * described.element_bytes


def load(described: TensorMap, coordinates: Sequence[int], read: Read) -> Bytes:
    """The box at coordinates (of its first element, they may be negative) from global memory, as [rows, bytes of a row].

    Elements outside the tensor are filled with zeros or NaNs. A tf32 map rounds what it reads to 10 bits of mantissa, to the
    nearest even: the manual does not say this. CUTLASS states that TMA converts to tf32, and Triton's interpreter was
    compared with a GPU for the rounding.
    """
    rows = prod(described.counts[1:])
    box = np.zeros((rows, described.row_bytes), np.uint8)
    if described.fill == FILL_NAN:
        box[:] = np.frombuffer(NAN_BYTES * (described.row_bytes // 2), np.uint8)
    for row, first, last, address in _segments(described, coordinates):
        data = np.frombuffer(read(address, last - first), np.uint8)
        box[row, first:last] = _rounded_to_tf32(data) if described.type_name == "tf32" else data
    return box


def place(shared: Bytes, offset: int, box: Bytes, described: TensorMap) -> None:
    """Writes a box to shared memory (uint8 [bytes], in place) at an offset in bytes, with the map's swizzle.

    Raises PtxError for an offset that is not aligned to 128 bytes, a box that leaves shared memory, and a row that is shorter
    than the swizzled span, whose place is not documented.
    """
    chunks = _chunks(shared, offset, described)
    shared[: shared.size // CHUNK * CHUNK].reshape(-1, CHUNK)[chunks] = box.reshape(-1, CHUNK)


def _expect(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        raise PtxError(f"tensor map: {what}: expected {expected}, got {got}")


def _pad(values: Sequence[int], length: int) -> list[int]:
    return [*values, *[0] * (length - len(values))]


def _check_numbers(described: TensorMap) -> None:
    """The requirements on address, sizes, strides, box and fill, in the order of the driver API's page.

    The page's example computes growing strides, but code that runs on GPUs passes strides in any order: not checked.
    """
    _expect(described.address % 16 == 0, "address", "a multiple of 16", hex(described.address))
    for size in described.sizes:
        _expect(1 <= size <= 2**32, "sizes", "1 to 2^32", described.sizes)
    for stride in described.strides:
        _expect(stride % 16 == 0 and 0 <= stride < 2**40, "strides", "multiples of 16 below 2^40", described.strides)
    for extent in described.box:
        _expect(1 <= extent <= 256, "box", "1 to 256", described.box)
    _expect(described.row_bytes % 16 == 0, "box", "rows of a multiple of 16 bytes", f"{described.row_bytes} bytes")
    for step in described.element_strides:
        _expect(1 <= step <= 8, "element strides", "1 to 8", described.element_strides)
    if described.span:
        _expect(described.row_bytes <= described.span, "box", f"rows of up to {described.span} bytes", described.row_bytes)
    _expect(described.fill == FILL_ZERO or described.type_name in FLOATS, "fill", "0 for integers", described.fill)


def _segments(described: TensorMap, coordinates: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The part of each row of the box that lies inside the tensor: row, first and last byte in the row, global address."""
    _expect(len(coordinates) == len(described.sizes), "coordinates", f"{len(described.sizes)}", tuple(coordinates))
    size = described.element_bytes
    first = max(0, -coordinates[0])
    last = min(described.box[0], described.sizes[0] - coordinates[0])
    if last <= first:
        return []
    addresses = np.full(1, described.address + (coordinates[0] + first) * size, np.int64)
    inside = np.ones(1, bool)
    for d in range(1, len(coordinates)):
        index = coordinates[d] + described.element_strides[d] * np.arange(described.counts[d])
        within = (index >= 0) & (index < described.sizes[d])
        addresses = (addresses[None, :] + described.strides[d - 1] * index[:, None]).ravel()
        inside = (inside[None, :] & within[:, None]).ravel()
    rows = np.flatnonzero(inside)
    return [(int(row), first * size, last * size, int(addresses[row])) for row in rows]


def _chunks(shared: Bytes, offset: int, described: TensorMap) -> npt.NDArray[np.int64]:
    """The index in shared memory of each 16-byte chunk of a box at an offset."""
    if offset % SHARED_ALIGNMENT:
        raise PtxError(f"tensor map: expected a shared address that is a multiple of 128, got {offset:#x}")
    if described.span and described.row_bytes < described.span:
        raise PtxError(
            f"tensor map: rows of {described.row_bytes} bytes are shorter than the swizzled span of {described.span}; "
            "the place of such rows is not documented"
        )
    chunks = swizzle(offset + CHUNK * np.arange(box_bytes(described) // CHUNK), described.span) // CHUNK
    if chunks.max() >= shared.size // CHUNK:
        raise PtxError(f"tensor map: the box at {offset:#x} leaves the {shared.size} bytes of shared memory")
    return chunks


def _rounded_to_tf32(data: Bytes) -> Bytes:
    """f32 as bytes, rounded to the nearest even tf32; infinities and NaNs are kept."""
    bits = data.view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & fragments.TF32_BITS
    finite = bits & np.uint32(0x7F800000) != np.uint32(0x7F800000)
    return np.where(finite, rounded, bits).view(np.uint8)
