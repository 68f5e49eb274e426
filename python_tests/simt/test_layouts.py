"""Matrix instructions of the executor against the register and memory layouts of the PTX manual, written down here
a second time: which row and column a lane's register holds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from csrc.simt import build

LANES = range(32)


@pytest.fixture(scope="module")
def printed() -> dict:
    program = build.program("plain", Path(__file__).parent / "programs" / "layouts.cpp")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


# Fragments as the manual defines them: for element i of a lane's fragment, its row and column.
def a_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group


def a_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return group + (0 if i in (0, 2) else 8), in_group + (0 if i in (0, 1) else 4)


def b_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + (0 if i == 0 else 4), lane >> 2


def c_m16n8(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def gather(values: list[float], place, shape: tuple[int, int]) -> np.ndarray:
    """The matrix whose elements the lanes hold, lane after lane."""
    per_lane = np.asarray(values).reshape(32, -1)
    matrix = np.full(shape, np.nan)
    for lane in LANES:
        for i, value in enumerate(per_lane[lane]):
            matrix[place(lane, i)] = value
    assert not np.isnan(matrix).any()  # every element is held by someone
    return matrix


def round_tf32(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(float)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32_mma"])
def test_mma(printed: dict, kind: str) -> None:
    registers = printed[kind]
    if kind == "tf32_mma":
        a = round_tf32(gather(registers["a"], a_m16n8k8, (16, 8)))
        b = round_tf32(gather(registers["b"], b_m16n8k8, (8, 8)))
    else:
        a, b = gather(registers["a"], a_m16n8k16, (16, 16)), gather(registers["b"], b_m16n8k16, (16, 8))
    c, d = gather(registers["c"], c_m16n8, (16, 8)), gather(registers["d"], c_m16n8, (16, 8))
    bound = 2.0**-22 * (np.abs(a) @ np.abs(b) + np.abs(c))
    assert (np.abs(d - (a @ b + c)) <= bound).all()


@pytest.mark.parametrize("kind, tiles, trans", [(0, 4, False), (1, 4, True), (2, 2, False), (3, 2, True), (4, 4, True)])
def test_ldmatrix(printed: dict, kind: int, tiles: int, trans: bool) -> None:
    """And movmatrix, kind 4, on what kind 0 has loaded."""
    registers = np.asarray(printed["ldmatrix"]["r"], np.uint32).reshape(5, 32, 4)[kind]
    memory = np.arange(256).reshape(4, 8, 8)  # tile, row, column, as the program filled it
    for lane in LANES:
        for tile in range(tiles):
            matrix = memory[tile].T if trans else memory[tile]
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert registers[lane, tile] == low | high << 16


def test_half_precision_values(printed: dict) -> None:
    bits = np.asarray(printed["halves"]["bits"], np.uint16)
    assert printed["halves"]["value"] == bits.view(np.float16).astype(float).tolist()


def test_tf32_rounds_to_nearest_ties_away(printed: dict) -> None:
    x = np.asarray(printed["tf32"]["x"], np.float32)
    fraction, exponent = np.frexp(x.astype(float))
    expected = np.ldexp(np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), x), exponent - 11)
    subnormal = np.abs(x) < 2.0**-126
    assert (np.asarray(printed["tf32"]["y"])[~subnormal] == expected[~subnormal]).all()
    assert (np.abs(np.asarray(printed["tf32"]["y"]) - x)[subnormal] <= 2.0**-137).all()


def swizzle(offset: int, row: int = 128) -> int:
    """CuTe's Swizzle<3, 4, 3>, <2, 4, 3> or <1, 4, 3> on byte offsets, of rows of 128, 64 or 32 bytes."""
    return offset ^ ((offset & (row // 16 - 1 << 7)) >> 3)


def d_wgmma(thread: int, i: int) -> tuple[int, int]:
    warp, lane = divmod(thread, 32)
    return 16 * warp + (lane >> 2) + 8 * ((i >> 1) & 1), (lane % 4) * 2 + 8 * (i >> 2) + (i & 1)


def test_bulk_copy_swizzles_and_fills_with_zero(printed: dict) -> None:
    a = np.asarray(printed["wgmma"]["a"]).reshape(70, 136)[:, :132]  # the map leaves out 4 columns
    box = np.zeros((64, 64))
    box[:, :64] = np.pad(a, ((0, 0), (0, 64)))[3:67, 64:128]
    memory = np.asarray(printed["wgmma"]["shared"])
    for row in range(64):
        for col in range(64):
            assert memory[swizzle(row * 128 + col * 2) // 2] == box[row, col]


def mn_major(n: int, k: int, width: int) -> int:
    """CUTLASS's canonical layout of a MN-major operand of 2 bytes, in bytes: Swizzle<B, 4, 3> o ((8, width / 8, m), (8, k)) :
    ((1, 8, LBO), (width, SBO)), here with SBO = 8 rows and LBO = 64 rows of a panel."""
    place = n % 8 + n % width // 8 * 8 + k % 8 * width + k // 8 * 8 * width + n // width * 64 * width
    return swizzle(2 * place, 2 * width)


@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
def test_mn_major_tiles_lie_in_a_canonical_layout(printed: dict, n: int) -> None:
    """A bulk copy of rows of 32, 64 or 128 bytes with a swizzle as long."""
    case = printed[f"shared{n}_mn"]
    memory, b = np.asarray(case["shared"]), np.asarray(case["b"]).reshape(-1, 64)[:n]
    found = np.array([[memory[mn_major(i, k, min(n, 64)) // 2] for k in range(64)] for i in range(n)])
    assert (found == b).all()


def test_wgmma(printed: dict) -> None:
    a = np.pad(np.asarray(printed["wgmma"]["a"]).reshape(70, 136)[:, :132], ((0, 0), (0, 64)))[3:67, 64:128]
    b = np.asarray(printed["wgmma"]["b"]).reshape(64, 64)
    d, early = np.split(np.asarray(printed["wgmma"]["d"]), [128 * 32])
    assert early.all()  # accumulators were NaN while the product ran
    d = d.reshape(128, 32)
    product = a @ b.T
    for thread in range(128):
        for i in range(32):
            assert d[thread, i] == pytest.approx(product[d_wgmma(thread, i)] + i, abs=1e-4)


@pytest.mark.parametrize(
    "first, major", [("shared", ""), ("shared", "_mn"), ("across", "_mn"), ("registers", ""), ("registers", "_mn")]
)
@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
def test_wgmma_of_every_n(printed: dict, n: int, major: str, first: str) -> None:
    """Two groups in flight, the first read while the second runs; b K-major or MN-major, a in shared memory,
    K-major or MN-major (across), or in registers."""
    case = printed[f"{first}{n}{major}"]
    b = np.asarray(case["b"]).reshape(-1, 64)[:n]
    if first != "registers":
        a = np.asarray(case["a"]).reshape(64, 64)
    else:
        elements = np.asarray(case["registers"]).reshape(4, 32, 4, 8)  # warp, lane, step of 16 k, element
        a = np.full((64, 64), np.nan)
        for warp, lane, step, i in np.ndindex(elements.shape):
            row, k = a_m16n8k16(lane, i)
            a[16 * warp + row, 16 * step + k] = elements[warp, lane, step, i]
    out = np.asarray(case["out"]).reshape(128, n + 1)
    assert out[:, n].all()  # the second group's accumulators were NaN while it ran
    whole, part = a @ b.T, a[:, :16] @ b[:, :16].T
    rows, cols = np.array([[d_wgmma(t, i) for i in range(n // 2)] for t in range(128)]).transpose(2, 0, 1)
    assert np.abs(out[:, : n // 2] - whole[rows, cols]).max() < 1e-3
    assert np.abs(out[:, n // 2 : n] - part[rows, cols]).max() < 1e-3


def test_no_narrow_product_from_a_wider_panel() -> None:
    """16 or 32 n of a MN-major operand with 128-byte swizzle are in no canonical layout: the executor refuses them."""
    source = Path(__file__).parent / "programs" / "layouts.cpp"
    done = subprocess.run([build.program("plain", source, ("-DNARROW_FROM_WIDE",))], capture_output=True, text=True)
    assert done.returncode != 0 and "no canonical layout: 16 elements" in done.stdout + done.stderr


@pytest.mark.full
def test_layouts_are_those_of_cute(tmp_path: Path) -> None:
    """programs/cute_layouts.cpp: tiles and descriptors of each width, accumulators, operands in registers."""
    cutlass = Path(os.environ.get("CUTLASS_HOME", "/nowhere")) / "include"
    if not (cutlass / "cute").is_dir():
        pytest.skip("no CUTLASS: set CUTLASS_HOME to a checkout")
    source, cuda = Path(__file__).parent / "programs" / "cute_layouts.cpp", build.cuda_include()
    command = [build.compiler(), "-std=c++17", "-w", f"-I{cutlass}", f"-I{cuda}", f"-I{cuda / 'cccl'}", source]
    built = subprocess.run([*map(str, command), "-o", str(tmp_path / "compare")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "compare"], capture_output=True, text=True)
    assert done.returncode == 0 and " 0 of " in done.stdout, done.stdout
