"""Arrays for the kernel tests: element types, poisoned padding, the tolerance rule.

bfloat16 arrays have the dtype uint16, as in the executor's module. Everything outside a matrix is
NaN: the columns between its rows, the rows after the last, and the elements before the first. A
kernel that reads any of it produces NaN.
"""

from dataclasses import dataclass

import numpy as np

DTYPE = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
# Half a unit in the last place of what a kernel of the type stores, relative.
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}


def narrow(a: np.ndarray, kind: str) -> np.ndarray:
    """Rounds float values to the stored type, to nearest even."""
    if kind != "bf16":
        return np.asarray(a).astype(DTYPE[kind])
    bits = np.ascontiguousarray(np.asarray(a, np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FC0), rounded)


def wide(a: np.ndarray) -> np.ndarray:
    """float64 values of a stored array."""
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


def operand(a: np.ndarray, kind: str) -> np.ndarray:
    """Returns the float64 values that a product uses: float32 factors of half types are rounded."""
    return wide(narrow(a, kind) if a.dtype == np.float32 else a)


@dataclass(frozen=True)
class Layout:
    """Where a matrix is in its poisoned buffer: elements before it, and between its rows.

    The rows start at multiples of `multiple` elements. A transposed matrix has its columns there.
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


# A NaN for each size of an element. The executor's shared memory starts as another NaN, all bits
# set, so that a copy of it outside an output is noticed.
POISON = {2: np.uint16(0xFFFE), 4: np.uint32(0xFFFFFFFE)}


def poisoned(
    shape: tuple[int, int], dtype: np.dtype, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a buffer of NaN at a multiple of 64 bytes, and the view of `shape` inside it."""
    rows, cols = shape[::-1] if layout.transposed else shape
    stride = -(-(cols + layout.pad) // layout.multiple) * layout.multiple
    size = layout.offset + rows * stride + 96
    raw = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    buffer = raw[start : start + size * np.dtype(dtype).itemsize].view(dtype)
    poison = POISON[buffer.itemsize]
    buffer.view(poison.dtype)[...] = poison
    view = buffer[layout.offset : layout.offset + rows * stride].reshape(rows, stride)[:, :cols]
    return buffer, view.T if layout.transposed else view


def place(values: np.ndarray, dtype: np.dtype, layout: Layout = ALIGNED) -> np.ndarray:
    """A copy of `values` (already of the stored type) in poisoned memory."""
    _, view = poisoned(values.shape, dtype, layout)
    view[...] = values
    return view


class Output:
    """An output in poisoned memory. Three dimensions are packed."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        layout: Layout = ALIGNED,
        values: np.ndarray | None = None,
    ):
        matrix_shape = (int(np.prod(shape[:-1])), shape[-1])
        self.buffer, matrix = poisoned(matrix_shape, dtype, PACKED if len(shape) > 2 else layout)
        self.view = matrix.reshape(shape)
        self.poison = POISON[self.buffer.itemsize]
        self.words = self.buffer.view(self.poison.dtype)
        self.view[...] = 0
        self.is_outside = self.words == self.poison  # what zeros in the matrix do not replace
        self.words[...] = self.poison
        if values is not None:
            self.view[...] = values

    def check_outside(self) -> None:
        """Asserts that nothing around the matrix was written."""
        assert (self.words[self.is_outside] == self.poison).all(), "wrote outside the output"


def check_close(
    result: np.ndarray,
    truth: np.ndarray,
    eager: np.ndarray,
    scale: np.ndarray,
    kind: str,
    what: str,
) -> None:
    """Asserts that the error against float64 is at most twice the eager formula's, plus an epsilon.

    The epsilon is a unit of the stored type at the result's magnitude (two rounded values may
    differ by one), and the effect of another order of summation in float32: a few units of the
    sum of absolute products, `scale`.
    """
    result = wide(result)
    assert result.shape == truth.shape, f"{what}: shape {result.shape}, expected {truth.shape}"
    if not truth.size:
        return
    assert np.isfinite(result).all(), (
        f"{what}: {np.count_nonzero(~np.isfinite(result))} of {result.size} values are not finite"
    )
    error = np.abs(result - truth)
    allowed = (
        2 * np.abs(wide(eager) - truth)
        + 2 * UNIT[kind] * np.abs(truth)
        + 8 * 2.0**-24 * scale
        + 1e-30
    )
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), (
        f"{what}: at {tuple(int(i) for i in worst)} expected {truth[worst]:.9g} within "
        f"{allowed[worst]:.3g}, got {result[worst]:.9g}; "
        f"{np.count_nonzero(error > allowed)} of {error.size} values are off"
    )


def philox_keep(seed: int, rows: int, cols: int, p: float) -> np.ndarray:
    """Returns the elements that dropout keeps: Philox 4x32-10, written from its definition."""
    e = (
        np.arange(rows, dtype=np.uint64)[:, None] * np.uint64(cols)
        + np.arange(cols, dtype=np.uint64)[None, :]
    )
    q = e // np.uint64(4)
    low = np.uint64(0xFFFFFFFF)
    c = [q & low, q >> np.uint64(32), np.zeros_like(q), np.zeros_like(q)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    with np.errstate(over="ignore"):
        for _ in range(10):
            a = np.uint64(0xD2511F53) * c[0]
            b = np.uint64(0xCD9E8D57) * c[2]
            c = [
                (b >> np.uint64(32)) ^ c[1] ^ k[0],
                b & low,
                (a >> np.uint64(32)) ^ c[3] ^ k[1],
                a & low,
            ]
            k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    words = np.choose((e % np.uint64(4)).astype(int), c)
    return words >= np.uint64(int(p * 2**32))
