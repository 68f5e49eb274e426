"""The interpreter's tensor maps: boxes against slices of numpy arrays, and through shared memory into wgmma."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ptx_layouts import swizzled

from csrc.interpreter import tensor_map, wgmma
from csrc.interpreter.errors import PtxError

U8, U32, S32, U64, F16, F32, BF16, TF32 = 0, 2, 3, 4, 6, 7, 9, 11  # CUtensorMapDataType
NUMPY = {U8: np.uint8, U32: np.uint32, S32: np.int32, U64: np.uint64, F16: np.float16, F32: np.float32, BF16: np.uint16}
BASE = 0x7F0000000000
MODES = {0: 0, 32: 1, 64: 2, 128: 3}  # swizzled span -> CUtensorMapSwizzle
DESCRIPTOR_MODES = {0: 0, 128: 1, 64: 2, 32: 3}


class Memory:
    """Global memory that refuses an access outside of it."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)

    def read(self, address: int, size: int) -> bytes:
        assert size > 0 and address >= BASE and address + size <= BASE + self.data.size
        return self.data[address - BASE : address - BASE + size].tobytes()


def describe(
    kind: int,
    sizes: list[int],
    strides: list[int],
    box: list[int],
    steps: list[int] | None = None,
    swizzle: int = 0,
    fill: int = 0,
) -> tensor_map.TensorMap:
    steps = steps or [1] * len(sizes)
    data = tensor_map.encode(kind, len(sizes), BASE, sizes, strides, box, steps, 0, swizzle, 2, fill)
    assert len(data) == 128
    return tensor_map.decode(data)


def tensor_of(memory: Memory, kind: int, sizes: list[int], strides: list[int]) -> np.ndarray:
    """A view of global memory as [..., dimension 1, dimension 0]."""
    element = NUMPY[kind]
    steps = [np.dtype(element).itemsize, *strides]
    return np.lib.stride_tricks.as_strided(memory.data.view(element), sizes[::-1], steps[::-1])


# Kind, sizes, strides, box, element strides; strides leave gaps, and the last case has them in falling order.
SHAPES = [
    (F32, [37], [], [16], [1]),
    (BF16, [50, 9], [112], [16, 4], [1, 1]),
    (F16, [24, 7, 5], [64, 512], [8, 3, 2], [1, 1, 1]),
    (U8, [33, 6, 4, 3], [48, 304, 1232], [32, 4, 3, 2], [1, 1, 1, 1]),
    (U32, [10, 3, 4, 3, 2], [48, 160, 640, 2048], [8, 2, 3, 2, 2], [1, 1, 1, 1, 1]),
    (F32, [20, 17], [80], [12, 10], [1, 3]),
    (U64, [9, 8, 6], [80, 640], [4, 5, 6], [8, 2, 4]),
    (F16, [16, 5, 6], [1024, 160], [8, 4, 3], [1, 1, 1]),
]


@pytest.mark.parametrize("kind,sizes,strides,box,steps", SHAPES)
def test_a_box_is_a_padded_slice(kind: int, sizes: list[int], strides: list[int], box: list[int], steps: list[int]) -> None:
    memory = Memory(8192)
    tensor = tensor_of(memory, kind, sizes, strides)
    described = describe(kind, sizes, strides, box, steps)
    counts = [box[0], *[-(-b // s) for b, s in zip(box[1:], steps[1:])]]
    rng = np.random.default_rng(1)
    starts = [[0] * len(sizes), [-1] * len(sizes), [s - 1 for s in sizes], [-b for b in box], sizes]
    starts += [list(rng.integers(-np.array(box) - 1, np.array(sizes) + 2)) for _ in range(20)]
    for start in starts:
        expected = np.zeros(counts[::-1], NUMPY[kind])
        for at in itertools.product(*map(range, counts)):
            place = [int(start[d]) + at[d] * (steps[d] if d else 1) for d in range(len(sizes))]
            if all(0 <= p < s for p, s in zip(place, sizes)):
                expected[at[::-1]] = tensor[tuple(place[::-1])]
        loaded = tensor_map.load(described, [int(s) for s in start], memory.read)
        np.testing.assert_array_equal(loaded.view(NUMPY[kind]).reshape(counts[::-1]).view(np.uint8), expected.view(np.uint8))
        assert tensor_map.box_bytes(described) == expected.nbytes == loaded.nbytes


def test_encode_and_decode_keep_every_number() -> None:
    data = tensor_map.encode(9, 3, BASE, [2**32, 2, 3], [2**40 - 16, 32], [64, 256, 1], [1, 8, 2], 0, 3, 1, 1)
    expected = (9, BASE, (2**32, 2, 3), (2**40 - 16, 32), (64, 256, 1), (1, 8, 2), 3, 1)
    assert tensor_map.decode(data) == tensor_map.TensorMap(*expected)
    with pytest.raises(PtxError, match="not written by cuTensorMapEncodeTiled"):
        tensor_map.decode(bytes(128))


VALID = {
    "kind": BF16, "rank": 2, "address": BASE, "sizes": [64, 64], "strides": [128], "box": [64, 64], "element_strides": [1, 1],
    "interleave": 0, "swizzle_mode": 3, "l2_promotion": 0, "fill": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": 16}, "data type: expected 0 to 15"),
        ({"kind": 13}, "data type 13 is not supported"),
        ({"rank": 0, "sizes": [], "strides": []}, "rank: expected 1 to 5"),
        ({"rank": 6}, "rank"),
        ({"rank": 3}, "lengths: expected 3"),
        ({"address": BASE + 8}, "address: expected a multiple of 16"),
        ({"sizes": [64, 0]}, "sizes: expected 1 to 2"),
        ({"sizes": [2**32 + 1, 64]}, "sizes"),
        ({"strides": [136]}, "strides: expected multiples of 16"),
        ({"strides": [2**40]}, "strides"),
        ({"box": [0, 64]}, "box: expected 1 to 256"),
        ({"box": [64, 257]}, "box: expected 1 to 256"),
        ({"box": [12, 64]}, "rows of a multiple of 16 bytes"),
        ({"box": [128, 64]}, "rows of up to 128 bytes"),
        ({"box": [64, 64], "swizzle_mode": 2}, "rows of up to 64 bytes"),
        ({"box": [32, 64], "swizzle_mode": 1}, "rows of up to 32 bytes"),
        ({"element_strides": [1, 0]}, "element strides: expected 1 to 8"),
        ({"element_strides": [1, 9]}, "element strides"),
        ({"interleave": 3}, "interleave: expected 0 to 2"),
        ({"interleave": 1}, "interleaved layouts are not supported"),
        ({"swizzle_mode": 4}, "swizzle 4 is not supported"),
        ({"l2_promotion": 4}, "L2 promotion"),
        ({"fill": 2}, "fill: expected 0 or 1"),
        ({"fill": 1, "kind": 1}, "fill: expected 0 for integers"),
    ],
)
def test_encode_refuses_what_the_driver_documents_as_invalid(change: dict, message: str) -> None:
    assert len(tensor_map.encode(**VALID)) == 128
    with pytest.raises(PtxError, match=message):
        tensor_map.encode(**{**VALID, **change})


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("offset", [0, 1024, 384])
def test_place_follows_the_manuals_tables_by_address(span: int, offset: int) -> None:
    described = describe(BF16, [256, 64], [512], [(span or 96) // 2, 20], swizzle=MODES[span])
    box = np.random.default_rng(2).integers(0, 256, (20, span or 96), dtype=np.uint8)
    shared = np.zeros(6000, np.uint8)
    tensor_map.place(shared, offset, box, described)
    expected = np.zeros_like(shared)
    for i, byte in enumerate(box.ravel()):
        expected[swizzled(offset + i, span)] = byte
    np.testing.assert_array_equal(shared, expected)


def test_place_refuses_what_is_not_documented() -> None:
    described = describe(BF16, [256, 64], [512], [64, 8], swizzle=3)
    box, shared = np.zeros((8, 128), np.uint8), np.zeros(2048, np.uint8)
    tensor_map.place(shared, 1024, box, described)
    with pytest.raises(PtxError, match="multiple of 128, got 0x40"):
        tensor_map.place(shared, 64, box, described)
    with pytest.raises(PtxError, match="leaves the 2048 bytes"):
        tensor_map.place(shared, 1152, box, described)
    with pytest.raises(PtxError, match="leaves the 2048 bytes"):
        tensor_map.place(shared, 2048, box[0, :16], describe(BF16, [8], [], [8]))
    short = describe(BF16, [256, 64], [512], [32, 8], swizzle=3)
    with pytest.raises(PtxError, match="shorter than the swizzled span"):
        tensor_map.place(shared, 0, box[:, :64], short)


def test_out_of_bounds_nans() -> None:
    memory = Memory(1024)
    for kind, view in ((F16, np.float16), (F32, np.float32), (8, np.float64)):
        described = describe(kind, [8], [], [8], fill=1)
        loaded = tensor_map.load(described, [3], memory.read).view(view)[0]
        assert np.isnan(loaded[5:]).all()
        np.testing.assert_array_equal(loaded[:5].view(np.uint8), memory.data.view(view)[3:8].view(np.uint8))


def test_tf32_maps_round_to_the_nearest_even() -> None:
    memory = Memory(1024)
    bits = [0x3F801000, 0x3F803000, 0x3F801001, 0x3F7FFFFF, 0xBF800FFF, 0x7F800000, 0x7FC00001, 0x00001800]
    rounded = [0x3F800000, 0x3F804000, 0x3F802000, 0x3F800000, 0xBF800000, 0x7F800000, 0x7FC00001, 0x00002000]
    memory.data[:32] = np.array(bits, np.uint32).view(np.uint8)
    loaded = tensor_map.load(describe(TF32, [8], [], [8]), [0], memory.read)
    assert loaded.view(np.uint32)[0].tolist() == rounded
    kept = tensor_map.load(describe(F32, [8], [], [8]), [0], memory.read)
    assert kept.view(np.uint32)[0].tolist() == bits


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def global_operand(matrix: np.ndarray, major: str) -> tuple[Memory, list[int], list[int]]:
    """Global memory with matrix [rows, k] in bf16, k contiguous ("k") or the rows ("mn"): memory, sizes and strides."""
    stored = bf16_bits(matrix if major == "k" else matrix.T)
    pitch = -(-stored.shape[1] // 8) * 8
    padded = np.full((stored.shape[0], pitch), 0x7FC0, np.uint16)  # NaN where no element is
    padded[:, : stored.shape[1]] = stored
    memory = Memory(0)
    memory.data = padded.view(np.uint8).ravel()
    return memory, [stored.shape[1], stored.shape[0]], [2 * pitch]


K_TILE = 64


def load_tile(
    matrix: np.ndarray, major: str, span: int, shared: np.ndarray, start: int, rows: int, first: tuple[int, int]
) -> list[int]:
    """Loads the tile [rows, 64] at (row, k) first, box beside box. Returns the descriptors of its four parts [rows, 16]."""
    memory, sizes, strides = global_operand(matrix, major)
    inner, outer = (K_TILE, rows) if major == "k" else (rows, K_TILE)
    width = (span or 16) // 2
    described = describe(BF16, sizes, strides, [width, outer], swizzle=MODES[span])
    box_bytes = tensor_map.box_bytes(described)
    inner_first, outer_first = first[::-1] if major == "k" else first
    for n in range(inner // width):
        box = tensor_map.load(described, [inner_first + n * width, outer_first], memory.read)
        tensor_map.place(shared, start + n * box_bytes, box, described)
    if major == "k":
        lbo, sbo = (16, 8 * span) if span else (box_bytes, 128)
        offsets = [16 * part // width * box_bytes + 32 * part % (2 * width) for part in range(4)]
    else:
        lbo, sbo = (box_bytes, 8 * span) if span else (128, box_bytes)
        offsets = [16 * part * (span or 16) for part in range(4)]
    return [(start + offset) >> 4 | lbo >> 4 << 16 | sbo >> 4 << 32 | DESCRIPTOR_MODES[span] << 62 for offset in offsets]


@pytest.mark.parametrize("a_span", [0, 32, 64, 128])
@pytest.mark.parametrize("b_span", [0, 32, 64, 128])
@pytest.mark.parametrize("majors", [("k", "k"), ("k", "mn"), ("mn", "k"), ("mn", "mn")])
@pytest.mark.parametrize("first", [(0, 0, 0), (64, 64, 64)])
def test_tiles_through_shared_memory_into_wgmma(
    a_span: int, b_span: int, majors: tuple[str, str], first: tuple[int, int, int]
) -> None:
    """64 x 128 x 64 of A [83, 81] and B [150, 81]: the second tile crosses the end of both operands in both dimensions."""
    rng = np.random.default_rng(4)
    a, b = rng.integers(-16, 17, (83, 81)), rng.integers(-16, 17, (150, 81))
    m0, n0, k0 = first
    shared = np.full(64 * 1024, 0x7F, np.uint8)
    a_parts = load_tile(a, majors[0], a_span, shared, 0, 64, (m0, k0))
    b_parts = load_tile(b, majors[1], b_span, shared, 32 * 1024, 128, (n0, k0))
    d = [np.zeros(128, np.uint32)] * 64
    transposes = (int(majors[0] == "mn"), int(majors[1] == "mn"))
    for a_bits, b_bits in zip(a_parts, b_parts):
        d = wgmma.product(128, "bf16", shared, a_bits, b_bits, d, True, 1, 1, *transposes)
    padded_a, padded_b = np.zeros((128, 128)), np.zeros((192, 128))
    padded_a[:83, :81], padded_b[:150, :81] = a, b
    expected = padded_a[m0 : m0 + 64, k0 : k0 + K_TILE] @ padded_b[n0 : n0 + 128, k0 : k0 + K_TILE].T
    thread, i = np.arange(128)[None, :], np.arange(64)[:, None]
    rows = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    columns = i // 4 * 8 + thread % 4 * 2 + i % 2
    np.testing.assert_array_equal(np.stack(d).view(np.float32), expected[rows, columns])
