"""Arrays for the kernel tests: element types, poisoned padding, the tolerance rule.

bfloat16 arrays have the dtype uint16, as in the executor's module. Everything outside a matrix is
NaN: the columns between its rows, the rows after the last, and the elements before the first. A
kernel that reads any of it produces NaN.
"""

from dataclasses import dataclass

import numpy as np

DTYPE = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
# Half a unit in the last place of what a kernel stores in this type, relative.
UNIT = {np.uint16: 2.0**-8, np.float16: 2.0**-11, np.float32: 2.0**-24}


def narrow(a: np.ndarray, dtype: type) -> np.ndarray:
    """Rounds float values to the stored type, to nearest even."""
    if dtype != np.uint16:
        return np.asarray(a).astype(dtype)
    bits = np.ascontiguousarray(np.asarray(a, np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FC0), rounded)


def wide(a: np.ndarray) -> np.ndarray:
    """Returns the float64 values of a stored array."""
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


@dataclass(frozen=True)
class Layout:
    """Where a matrix is in its poisoned buffer: elements before it, and between its rows.

    The rows start at multiples of `multiple` elements, or the columns if the matrix is transposed.
    """

    offset: int = 0
    pad: int = 0
    transposed: bool = False
    multiple: int = 1


ALIGNED = Layout(8, 8, multiple=8)
ODD = Layout(3, 5)
COLUMNS = Layout(1, 3, True)
PACKED = Layout()
ROWS_OF_16_BYTES = Layout(multiple=8)


# A NaN of each type, in words of 2 bytes. The executor's shared memory starts as another NaN, all
# bits set, so that a copy of it outside an output is noticed.
POISON = np.uint16(0xFFFE)


def poisoned(rows: int, cols: int, dtype: type, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words of a buffer of NaN at a multiple of 64 bytes, and the matrix inside it."""
    lines, length = (cols, rows) if layout.transposed else (rows, cols)
    stride = -(-(length + layout.pad) // layout.multiple) * layout.multiple
    # 96 elements lie after the last row. 32 words leave room to start at a multiple of 64 bytes.
    size = layout.offset + lines * stride + 96
    words_per_element = np.dtype(dtype).itemsize // POISON.itemsize
    raw = np.full(size * words_per_element + 32, POISON)
    start = -raw.ctypes.data % 64 // POISON.itemsize
    words = raw[start : start + size * words_per_element]
    elements = words.view(dtype)[layout.offset : layout.offset + lines * stride]
    matrix = elements.reshape(lines, stride)[:, :length]
    return words, matrix.T if layout.transposed else matrix


class Array:
    """An array in poisoned memory: a vector, a matrix, or several packed matrices.

    Args:
        shape: Its extents.
        dtype: The stored type.
        layout: The layout of a vector or a matrix.
        values: What it holds after `reset`; poison without them.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: type,
        layout: Layout = ALIGNED,
        values: np.ndarray | None = None,
    ):
        rows = int(np.prod(shape[:-1]))
        self.words, matrix = poisoned(rows, shape[-1], dtype, PACKED if len(shape) > 2 else layout)
        self.view = matrix.reshape(shape)
        self.values = values
        self.view[...] = 0
        self.is_outside = self.words == POISON  # the words around the array
        self.reset()

    def reset(self) -> None:
        self.words[...] = POISON
        if self.values is not None:
            self.view[...] = self.values

    def check_outside(self) -> None:
        """Asserts that nothing around the array was written."""
        assert (self.words[self.is_outside] == POISON).all(), "wrote outside the output"


def check_close(
    result: np.ndarray, truth: np.ndarray, eager: np.ndarray, slack: np.ndarray, what: str
) -> None:
    """Asserts that the error against float64 is at most twice the eager formula's, plus an epsilon.

    The epsilon is a unit of the stored type at the result's magnitude (two rounded values may
    differ by one), and `slack`, which the caller knows.
    """
    dtype = result.dtype.type
    values = wide(result)
    assert values.shape == truth.shape, f"{what}: shape {values.shape}, expected {truth.shape}"
    if not truth.size:
        return
    assert np.isfinite(values).all(), (
        f"{what}: {np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite"
    )
    error = np.abs(values - truth)
    allowed = (
        2 * np.abs(wide(narrow(eager, dtype)) - truth)
        + 2 * UNIT[dtype] * np.abs(truth)
        + slack
        + 1e-30
    )
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), (
        f"{what}: at {tuple(int(i) for i in worst)} expected {truth[worst]:.9g} within "
        f"{allowed[worst]:.3g}, got {values[worst]:.9g}; "
        f"{np.count_nonzero(error > allowed)} of {error.size} values are off"
    )


def philox_keep(seed: int, rows: int, cols: int, p: float) -> np.ndarray:
    """Returns the elements that dropout keeps, by Philox 4x32-10, written from its definition.

    Element e of a matrix gets word e % 4 of the block with the counter e / 4, and is kept if the
    word is at least p 2^32.
    """
    element = np.arange(rows * cols, dtype=np.uint64).reshape(rows, cols)
    block = element // np.uint64(4)
    low = np.uint64(0xFFFFFFFF)
    counter = [block & low, block >> np.uint64(32), np.zeros_like(block), np.zeros_like(block)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    with np.errstate(over="ignore"):
        for _ in range(10):
            product_0 = np.uint64(0xD2511F53) * counter[0]
            product_2 = np.uint64(0xCD9E8D57) * counter[2]
            counter = [
                (product_2 >> np.uint64(32)) ^ counter[1] ^ key[0],
                product_2 & low,
                (product_0 >> np.uint64(32)) ^ counter[3] ^ key[1],
                product_0 & low,
            ]
            key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    words = np.choose((element % np.uint64(4)).astype(int), counter)
    return words >= np.uint64(int(p * 2**32))
