"""Matrix instructions and bulk copies of the executor against the layouts of the PTX manual.

The layouts are written here independently: the row and column of each lane's register, the place to
which a swizzle moves an element.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from csrc.simt import build

SOURCE = Path(__file__).parent / "programs" / "layouts.cpp"
N = 256
K = 64


@pytest.fixture(scope="module")
def printed() -> dict:
    done = build.run_program("plain", SOURCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


# Fragments as the manual defines them: the row and column of a thread's element i. `group` and
# `thread` are the manual's groupID and threadID_in_group.
def a_m16n8k16(
    group: np.ndarray, thread: np.ndarray, i: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows group and group + 8, columns 2 thread + {0, 1}, and all of them again 8 columns on.

    The sums c and d have the first eight columns: elements 0 to 3.
    """
    return group + 8 * (i // 2 % 2), 2 * thread + i % 2 + 8 * (i // 4)


def b_m16n8k16(
    group: np.ndarray, thread: np.ndarray, i: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows 2 thread + {0, 1} and + 8, column group."""
    return 2 * thread + i % 2 + 8 * (i // 2), group


def d_wgmma(group: np.ndarray, thread: np.ndarray, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight groups of each warp have its 16 rows, in the columns of the first matrix."""
    row, col = a_m16n8k16(group % 8, thread, i)
    return 16 * (group // 8) + row, col


def gather(values: list[float], place: Callable[..., tuple], shape: tuple[int, int]) -> np.ndarray:
    """Returns the matrix of the elements that the threads hold, thread after thread."""
    per_thread = np.asarray(values).reshape(32 if place is d_wgmma else 8, 4, -1)
    matrix = np.full(shape, np.nan)
    matrix[place(*np.indices(per_thread.shape))] = per_thread
    assert not np.isnan(matrix).any(), "an element that no thread holds"
    return matrix


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mma(printed: dict, kind: str) -> None:
    registers = printed[kind]
    a = gather(registers["a"], a_m16n8k16, (16, 16))
    b = gather(registers["b"], b_m16n8k16, (16, 8))
    c = gather(registers["c"], a_m16n8k16, (16, 8))
    d = gather(registers["d"], a_m16n8k16, (16, 8))
    bound = 2.0**-22 * (np.abs(a) @ np.abs(b) + np.abs(c))
    assert (np.abs(d - (a @ b + c)) <= bound).all()


@pytest.mark.parametrize(
    "kind, tiles, trans", [(0, 4, False), (1, 4, True), (2, 2, False), (3, 2, True)]
)
def test_ldmatrix(printed: dict, kind: int, tiles: int, trans: bool) -> None:
    registers = np.asarray(printed["ldmatrix"]["r"], np.uint32).reshape(4, 32, 4)[kind]
    memory = np.arange(256).reshape(4, 8, 8)  # tile, row, column, as the program filled it
    matrices = memory.transpose(0, 2, 1) if trans else memory
    pairs = matrices.reshape(4, 32, 2)  # lane l has two neighbors of row l / 4
    expected = pairs[..., 0] | pairs[..., 1] << 16
    np.testing.assert_array_equal(registers[:, :tiles], expected[:tiles].T)


def test_half_precision_values(printed: dict) -> None:
    bits = np.asarray(printed["halves"]["bits"], np.uint16)
    assert printed["halves"]["value"] == bits.view(np.float16).astype(float).tolist()


# ---- bulk copies and wgmma ----


def swizzle(offset: np.ndarray) -> np.ndarray:
    """CuTe's Swizzle<3, 4, 3> on byte offsets."""
    return offset ^ ((offset & 0x380) >> 3)


def box_of(printed: dict) -> np.ndarray:
    """The 64 x 64 box of a at (3, 64). The map omits 4 of 136 columns, which read as zero."""
    a = np.asarray(printed["a"]).reshape(70, 136)[:, :132]
    return np.pad(a, ((0, 0), (0, 64)))[3:67, 64:128]


@pytest.mark.parametrize("major", ["k_major", "mn_major"])
def test_bulk_copies_swizzle_and_fill_with_zero(printed: dict, major: str) -> None:
    """CUTLASS's canonical layouts in bytes. MN-major: panels of 64 n, one k per row."""
    memory = np.asarray(printed[major]["shared"])
    b = np.asarray(printed[major]["b"]).reshape(N, K)
    row, col = np.indices((64, 64))
    assert (memory[: 64 * K][swizzle(row * 128 + col * 2) // 2] == box_of(printed[major])).all()
    n, k = np.indices((N, K))
    places = {"k_major": n * 128 + k * 2, "mn_major": n // 64 * 8192 + k * 128 + n % 64 * 2}
    assert (memory[64 * K :][swizzle(places[major]) // 2] == b).all()


@pytest.mark.parametrize("major", ["k_major", "mn_major"])
def test_bulk_stores_undo_the_swizzle_and_stay_inside(printed: dict, major: str) -> None:
    """The box is stored at (5, 16) of a matrix [60, 66] with a row stride of 136."""
    expected = np.zeros((70, 136))
    expected[5:60, 16:66] = box_of(printed[major])[: 60 - 5, : 66 - 16]
    assert (np.asarray(printed[major]["c"]).reshape(70, 136) == expected).all()


@pytest.mark.parametrize("major", ["k_major", "mn_major"])
def test_wgmma(printed: dict, major: str) -> None:
    """Two products are in flight: one is read while the accumulators of the other are still NaN."""
    a = box_of(printed[major])
    b = np.asarray(printed[major]["b"]).reshape(N, K)
    out = np.asarray(printed[major]["out"]).reshape(128, N + 1)
    assert out[:, N].all()
    start = gather(np.tile(np.arange(N // 2), 128), d_wgmma, (64, N))
    result = gather(out[:, : N // 2], d_wgmma, (64, N))
    other = gather(out[:, N // 2 : N], d_wgmma, (64, N))
    assert np.abs(result - (start + a @ b.T)).max() < 1e-3
    assert np.abs(other - a[:, :16] @ b[:, :16].T).max() < 1e-3
