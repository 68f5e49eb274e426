"""Programs of CUTLASS, CuTe and CUDA C++ that are right on hardware give right results under the interpreter.

The matrices hold small integers, so every sum is exact in float32 in any order, and a wrong element cannot hide in a tolerance.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from csrc.interpreter import copies, fragments, matrix, tensor_map, wgmma
from csrc.interpreter.calibrate import build
from csrc.interpreter.errors import PtxError
from csrc.interpreter.launch import Library
from csrc.simt.build import BuildError, tool

try:
    build.cutlass()
    MISSING = "" if tool("nvcc") else "no nvcc: nothing makes PTX of the programs"
except BuildError as error:
    MISSING = str(error)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

BITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": lambda x: (x.view(np.uint32) >> 16).astype(np.uint16),
    "f16": lambda x: x.astype(np.float16),
    "tf32": lambda x: x,
}
_LIBRARIES: dict[str, Library] = {}
_ORDER = [0]


@pytest.fixture(autouse=True, params=(0, 1))
def order(request: pytest.FixtureRequest) -> None:
    """The order of warps, blocks and asynchronous operations in this test."""
    _ORDER[0] = request.param


def library(program: str) -> Library:
    if program not in _LIBRARIES:
        _LIBRARIES[program] = Library(build.library(program), build.PROGRAMS[program])
        _LIBRARIES[program].dynamic_align = 1024  # CUTLASS' Hopper kernels rely on where the hardware begins
    return _LIBRARIES[program]


def call(program: str, function: str, *arguments: int | bool | np.ndarray, resident: int = 2) -> None:
    """Calls a function of a program, which must return 0. resident: clusters at a time; more where blocks wait for others."""
    on = library(program)
    on.seed, on.resident = _ORDER[0], resident
    given = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
    status = on.functions[function](*given)
    on.raise_error()
    assert status == 0


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 128 bytes, as cudaMalloc's memory does, with 128 zeros behind it."""
    memory = np.zeros(x.nbytes + 256, np.uint8)
    copy = memory[-memory.ctypes.data % 128 :][: x.nbytes].view(x.dtype).reshape(x.shape)
    copy[:] = x
    return copy


def integers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def stored(x: np.ndarray, kind: str, transposed: bool) -> np.ndarray:
    return aligned(BITS[kind](np.ascontiguousarray(x.T if transposed else x)))


def check_gemm(
    program: str, function: str, kind: str, layouts: str, size: tuple[int, int, int], *more: int | bool | np.ndarray, **how: int
) -> None:
    """layouts, as BLAS names them: a is stored as [m, k] for t and as [k, m] for n, b as [n, k] for n and as [k, n] for t."""
    m, n, k = size
    a, b = integers(m, k, seed=1), integers(n, k, seed=2)
    d = aligned(np.full((m, n), np.nan, np.float32))
    call(program, function, m, n, k, stored(a, kind, layouts[0] == "n"), stored(b, kind, layouts[1] == "t"), d, *more, **how)
    np.testing.assert_array_equal(d, a @ b.T)


@pytest.mark.parametrize(
    ("function", "kind", "layouts", "size"),
    [
        ("sm80_bf16_tn", "bf16", "tn", (72, 100, 88)),
        ("sm80_bf16_nt", "bf16", "nt", (72, 104, 88)),
        ("sm80_tf32_tn", "tf32", "tn", (72, 100, 52)),
        ("sm80_tf32_nt", "tf32", "nt", (72, 100, 52)),
    ],
)
def test_sm80_gemm(function: str, kind: str, layouts: str, size: tuple[int, int, int]) -> None:
    check_gemm("sm80_gemm", function, kind, layouts, size, 1, np.zeros(1))


def test_sm80_split_k_in_order() -> None:
    semaphores = np.zeros(64, np.int32)
    check_gemm("sm80_gemm", "sm80_f16_tt_split_k", "f16", "tt", (72, 72, 200), 3, semaphores, resident=12)


@pytest.mark.parametrize(
    ("function", "kind", "layouts", "size"),
    [
        ("sm90_bf16_tn", "bf16", "tn", (72, 100, 216)),
        ("sm90_f16_nt", "f16", "nt", (72, 40, 136)),
        ("sm90_f16_tn_n256", "f16", "tn", (72, 264, 72)),
        ("sm90_bf16_nn_pingpong", "bf16", "nn", (200, 264, 136)),
        ("sm90_bf16_tt_cooperative", "bf16", "tt", (264, 136, 216)),
    ],
)
def test_sm90_gemm(function: str, kind: str, layouts: str, size: tuple[int, int, int]) -> None:
    check_gemm("sm90_gemm", function, kind, layouts, size, 2, True)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize(
    ("n", "layouts", "registers"),
    [(n, layouts, False) for n in (16, 32, 64, 128) for layouts in ("tn", "tt", "nt")]
    + [(256, "tn", False), (256, "tt", False), (64, "tt", True), (128, "tn", True), (256, "tn", True)],
)
def test_wgmma_through_cute(kind: str, n: int, layouts: str, registers: bool) -> None:
    m, k = 128, 128
    a, b = integers(m, k, seed=3), integers(n, k, seed=4)
    d = aligned(np.full((m, n), np.nan, np.float32))
    mn_a, mn_b = layouts[0] == "n", layouts[1] == "t"
    call("cute_sm90", f"cute_{kind}", m, n, k, mn_a, mn_b, registers, stored(a, kind, mn_a), stored(b, kind, mn_b), d)
    np.testing.assert_array_equal(d, a @ b.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_mma_through_cute(transposed: bool) -> None:
    a, b = integers(16, 16, seed=5), integers(8, 16, seed=6)
    d = np.full((16, 8), np.nan, np.float32)
    call("cuda_sm90", "cute_mma", transposed, stored(a, "bf16", transposed), stored(b, "bf16", transposed), d)
    np.testing.assert_array_equal(d, a @ b.T)


def test_shared_memory_of_a_cluster() -> None:
    sums, out = integers(2, 4, 128, seed=7), np.full((2, 4, 2), np.nan, np.float32)
    call("cuda_sm90", "cuda_cluster_sums", 2, sums, out)
    blocks = sums.sum(axis=2)
    np.testing.assert_array_equal(out[:, :, 0], np.repeat(blocks.sum(axis=1, keepdims=True), 4, axis=1))
    np.testing.assert_array_equal(out[:, :, 1], np.roll(blocks, 1, axis=1))


def test_last_block_adds_all() -> None:
    numbers, partial, count, out = (
        integers(6, 128, seed=8),
        np.zeros(6, np.float32),
        np.zeros(1, np.uint32),
        np.zeros(1, np.float32),
    )
    call("cuda_sm90", "cuda_last_block_sums", 6, numbers, partial, count, out)
    assert out[0] == numbers.sum() and count[0] == 0


def test_blocks_in_order() -> None:
    numbers, turn, arrived, out = (
        integers(6, 128, seed=9),
        np.zeros(1, np.int32),
        np.zeros(1, np.int32),
        np.zeros(6, np.float32),
    )
    call("cuda_sm90", "cuda_ordered_sums", 6, numbers, turn, arrived, out, resident=6)
    np.testing.assert_array_equal(out, np.cumsum(numbers.sum(axis=1)))
    assert turn[0] == arrived[0] == 6


def _without_swizzle(span: int) -> Callable[[Any], Any]:
    return lambda right: lambda addresses, of, line=0: addresses if of == span else right(addresses, of, line)


def _exchanged(right: Any) -> Any:
    return lambda d, rows: right(replace(d, leading=d.stride, stride=d.leading), rows)


def _into_the_next_row(right: Any) -> Any:
    return lambda d, at, read: right(replace(d, sizes=(d.sizes[0] + 56, *d.sizes[1:])), at, read)


BF16_TT, F16_NT = ("sm90_bf16_tt_cooperative", "bf16", "tt", (136, 136, 72)), ("sm90_f16_nt", "f16", "nt", (72, 40, 40))
F16_N256, BF16_TN = ("sm90_f16_tn_n256", "f16", "tn", (72, 264, 40)), ("sm90_bf16_tn", "bf16", "tn", (72, 100, 72))
WRONG_READINGS = {  # what is misread: the function, what stands in for it, a program that shows it
    "the two offsets of an MN-major descriptor": (wgmma, "_mn_major", _exchanged, F16_NT),
    "the stride of a K-major descriptor": (
        wgmma,
        "_k_major",
        lambda right: lambda d, n: right(replace(d, stride=0), n),
        BF16_TN,
    ),
    "the 32-byte swizzle, by wgmma alone": (wgmma, "swizzle", _without_swizzle(32), F16_N256),
    "the 64-byte swizzle, by wgmma alone": (wgmma, "swizzle", _without_swizzle(64), F16_NT),
    "the 128-byte swizzle, by wgmma alone": (wgmma, "swizzle", _without_swizzle(128), BF16_TN),
    "the transpose bits": (wgmma, "operand", lambda right: lambda *a: right(*a[:4], 0), BF16_TT),
    "the columns of a thread's sums": (
        fragments,
        "d_positions",
        lambda right: lambda *a: (right(*a)[0], right(*a)[1] ^ 1),
        BF16_TN,
    ),
    "the bytes that a bulk copy completes": (
        copies,
        "complete_bytes",
        lambda right: lambda b, at, n: right(b, at, n // 2),
        BF16_TN,
    ),
    "the blocks of a multicast": (copies, "_box_copy", lambda right: lambda *a: right(*a[:5], None), BF16_TT),
    "what lies outside of a tensor": (tensor_map, "load", _into_the_next_row, BF16_TN),
}


def _forget() -> None:
    for cached in [f for module in (fragments, matrix, wgmma) for f in vars(module).values() if hasattr(f, "cache_clear")]:
        cached.cache_clear()


@pytest.mark.parametrize("reading", WRONG_READINGS)
def test_a_wrong_reading_of_the_manual_shows(reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, wrong, gemm = WRONG_READINGS[reading]
    _forget()
    monkeypatch.setattr(module, function, wrong(getattr(module, function)))
    with pytest.raises((AssertionError, PtxError)):
        check_gemm("sm90_gemm", *gemm, 2, True)
    monkeypatch.undo()
    _forget()
