"""The base product with the adapter's product inside (csrc/cuda/sm90): numbers, bits, bytes and refusals under the executor,
planted bugs, left-out barriers, and what nvcc makes of it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gemm_lotr_cases as gemm
import numpy as np
import pytest
from gemm_lotr_cases import Case, Inputs, set_schedule

from csrc.simt import build

KERNEL = "sm90/gemm_lotr.cuh"


@pytest.mark.parametrize("case", gemm.QUICK, ids=str)
def test_numbers_and_bits(lib, case: Case) -> None:
    """Right against float64, and the same bits in every schedule, on every number of multiprocessors, early or not."""
    assert not gemm.failures(lib, [case], ["forward", "reverse", "103"])
    assert gemm.run(lib, case) == gemm.run(lib, replace(case, sms=6, early=not case.early))


@pytest.mark.full
@pytest.mark.parametrize("case", gemm.ALL, ids=str)
def test_numbers_and_bits_of_all(lib, case: Case) -> None:
    assert not gemm.failures(lib, [case], ["forward", "reverse", "1", "2", "103", "104"])


@pytest.mark.parametrize("operand", ["x", "W", "u", "F", "bias"])
def test_nan_stays_in_its_row_or_column(lib, operand: str) -> None:
    case = Case(140, 270, 72, 5)
    inputs = Inputs(case)
    inputs.arrays[operand][(0, 7) if operand == "bias" else (7, 3)] = 0x7FC0
    set_schedule(lib, "forward")
    bad = np.isnan(gemm.wide(inputs.launch(lib)))
    expected = np.zeros_like(bad)
    expected[(7,) if operand in ("x", "u") else (slice(None), 7)] = True
    assert (bad == expected).all()


@pytest.mark.parametrize("backward", [False, True])
def test_bytes(lib, backward: bool) -> None:
    """y is written once and never read. x and u are read once for each column of tiles, W and F once for each band of 256 rows:
    one of a pair's blocks loads them for both."""
    m, n, k, r = 1024, 512, 192, 16
    case = Case(m, n, k, r, backward=backward, sms=6)
    set_schedule(lib, "forward", count_memory=True)
    lib.reset_counters()
    Inputs(case).launch(lib, packed=True)
    counters = lib.counters()
    set_schedule(lib, "forward")
    moved = {name: (a["read_bytes"], a["written_bytes"]) for name, a in counters["arrays"].items()}
    columns, bands = n // 256, m // 256
    assert moved["y"] == (0, 2 * m * n)
    assert moved["x"] == (columns * 2 * m * k, 0) and moved["u"] == (columns * 2 * m * r, 0)
    assert moved["W"] == (bands * 2 * n * k, 0) and moved["F"] == (bands * 2 * n * r, 0)
    assert moved["bias"] == (m // 64 * 2 * n, 0)  # by each warpgroup
    assert counters["arrays"]["y"]["written_sectors"] * 32 == 2 * m * n
    assert counters["shared_wavefronts"] == counters["shared_phases"]  # no bank conflicts
    assert counters["wgmma"] == m // 64 * columns * (k // 16 + 1)  # the rank costs one product of 16
    (launch,) = counters["launches"]
    assert launch["name"] == "gemm_lotr" and launch["early"] and launch["let_next"] == 6


def test_product_layouts(lib) -> None:
    """Whether b is MN-major, n, whether bfloat16."""
    set_schedule(lib, "forward")
    for backward in (False, True):
        lib.reset_counters()
        Inputs(Case(5, 8, 8, 3, backward=backward)).launch(lib)
        assert lib.product_layouts() == {(major, 256, True) for major in {False, backward}}


# ---- bad input ----


def rows(count: int, cols: int, stride: int, start: int = 0) -> np.ndarray:
    raw = np.zeros(count * stride + 64, np.uint16)
    first = -(raw.ctypes.data // 2) % 8 + start
    return raw[first : first + count * stride].reshape(count, stride)[:, :cols]


STRIDE = "expected a row stride that is a multiple of 8 and at least"
REFUSED = [
    ({"x": rows(20, 16, 20)}, f"x: {STRIDE} 16, got 20"),
    ({"x": rows(20, 16, 24, 4)}, "x: expected an address divisible by 16"),
    ({"x": rows(16, 20, 24).T}, "x: expected a column stride of 1, got 24"),
    ({"W": rows(24, 16, 17)}, f"W: {STRIDE} 16, got 17"),
    ({"u": rows(20, 5, 5)}, f"u: {STRIDE} 5, got 5"),
    ({"F": rows(24, 5, 12)}, f"F: {STRIDE} 5, got 12"),
    ({"y": rows(20, 24, 28)}, f"y: {STRIDE} 24, got 28"),
    ({"y": rows(20, 24, 24, 1)}, "y: expected an address divisible by 16"),
    ({"u": rows(20, 129, 136), "F": rows(24, 129, 136)}, "r: expected 1 to 128, got 129"),
    ({"u": rows(20, 0, 8), "F": rows(24, 0, 8)}, "r: expected 1 to 128, got 0"),
    ({"x": rows(20, 0, 8), "W": rows(24, 0, 8)}, r"K: expected 1 to 2\^30, got 0"),
]


@pytest.mark.parametrize("changed, message", REFUSED, ids=[message[:9] + str(i) for i, (_, message) in enumerate(REFUSED)])
def test_refused_before_anything_is_written(lib, changed: dict, message: str) -> None:
    arrays = {"y": rows(20, 24, 24), "x": rows(20, 16, 16), "W": rows(24, 16, 16), "u": rows(20, 5, 8), "F": rows(24, 5, 8)}
    arrays |= changed
    with pytest.raises(ValueError, match=f"gemm_lotr: {message}"):
        lib.run("gemm_lotr", arrays)
    assert not arrays["y"].any()
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float16, got float32"):
        lib.run("gemm_lotr", {name: np.zeros(a.shape, np.float32) for name, a in arrays.items()})


# ---- what the cases notice ----


def run_cases(mode: str, module: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, gemm.__file__, "--mode", mode, "--module", str(module), *options]
    return subprocess.run(command, capture_output=True, text=True, env=build.python_environment(mode), timeout=900)


@pytest.mark.full
@pytest.mark.parametrize("mode, cases", [("race", "quick"), ("asan", "quick")])
def test_builds(mode: str, cases: str) -> None:
    done = run_cases(mode, build.module(mode, "bf16"), "--cases", cases, "--schedules", "forward,reverse,1,103")
    assert not done.returncode, done.stdout + done.stderr


def synchronisation_sites(lib) -> list[tuple[str, int]]:
    """(operation, line) of each place of the kernel where threads synchronise."""
    lib.reset_counters()
    assert not gemm.failures(lib, gemm.SMALL, ["forward"])
    return sorted((op, line) for op, file, line, calls in lib.synchronisation_sites() if file.endswith(KERNEL) and calls)


def test_no_synchronisation_can_be_left_out(lib) -> None:
    sites = synchronisation_sites(lib)
    assert {op for op, _ in sites} >= {"mbarrier.try_wait", "mbarrier.arrive.cluster", "barrier.cluster", "fence.proxy.async"}
    unnoticed = []
    try:
        for op, line in sites:
            lib.skip_synchronisation(KERNEL, line)
            found = (gemm.failures(lib, [case], [name]) for name in ("forward", "reverse", "103") for case in gemm.SMALL)
            unnoticed += [] if any(found) else [(op, line)]
    finally:
        lib.skip_synchronisation("", 0)
    assert not unnoticed


WRONG, STUCK, ARRIVALS = r": y: ", "deadlock: no thread can go on", "more arrivals than the mbarrier expects"
# name: text of the kernel, what stands there instead, what a failure must say
PLANTED: dict[str, tuple[str, str, str]] = {
    "no_step_of_the_rank": ("kk < Traits::BK && k + kk < p.r; kk", "kk < 0; kk", WRONG),
    "only_the_first_16_ranks_of_a_step": ("kk < Traits::BK && k + kk < p.r; kk", "kk < 16 && k + kk < p.r; kk", WRONG),
    "first_ranks_again": ("step(U, k, m0,", "step(U, 0, m0,", WRONG),
    "ranks_of_the_other_warpgroup": ("u = ptx::swizzled_descriptor(&stage.x[64 * group][0])", "u = x_of(stage)", WRONG),
    "rows_of_the_other_warpgroup": ("x = ptx::swizzled_descriptor(&stage.x[64 * group][0])", "x = x_of(stage)", WRONG),
    "wrong_phase_of_full": (
        "wait(&s.full[at.stage], at.parity)",
        "wait(&s.full[at.stage], at.parity ^ 1)",
        f"{WRONG}|NaN|{STUCK}",
    ),
    "wrong_phase_of_empty": ("wait(&s.empty[at.stage], at.parity ^ 1)", "wait(&s.empty[at.stage], at.parity)", STUCK),
    "parity_stays": ("stage = 0, parity ^= 1", "stage = 0", f"{ARRIVALS}|{STUCK}|{WRONG}"),
    "ring_starts_anew": (
        "float d[Traits::BN / 2] = {};",
        "float d[Traits::BN / 2] = {}; at = {};",
        f"{STUCK}|{WRONG}|{ARRIVALS}",
    ),
    "bytes_of_w_forgotten": ("(full, sizeof(Stage))", "(full, sizeof(Stage::x))", f"in flight|{STUCK}|{WRONG}"),
    "bytes_of_a_share": ("(full, sizeof(Stage))", "(full, sizeof(Stage) - sizeof(Stage::w) / 2)", f"in flight|{STUCK}|{WRONG}"),
    "one_reader_too_few": ("Traits::WARPS * Traits::PAIR)", "Traits::WARPS * Traits::PAIR - 1)", f"{ARRIVALS}|{WRONG}|{STUCK}"),
    "given_back_to_the_own_block": (
        "(&s.empty[stage], lane)",
        "(&s.empty[stage], blockIdx.x % 2)",
        f"{ARRIVALS}|{STUCK}|{WRONG}",
    ),
    "given_back_early": ("if (k > 0) release(at.before());", "release(at.stage);", f"{ARRIVALS}|{STUCK}|{WRONG}"),
    "both_blocks_load_one_share": ("int(blockIdx.x) % Traits::PAIR * Traits::SHARE", "0", WRONG),
    "a_share_for_the_own_block": ("(1 << Traits::PAIR) - 1)", "1 << blockIdx.x % 2)", f"in flight|{STUCK}"),
    "columns_of_the_first_share": ("F, k, n0 + share, full", "F, k, n0, full", WRONG),
    "K_major_for_MN_major": (
        "ptx::swizzled_descriptor_mn(stage.w, sizeof(T) * Traits::BK * 64)",
        "ptx::swizzled_descriptor(stage.w)",
        WRONG,
    ),
    "wrong_panel": ("sizeof(T) * Traits::BK * 64)", "1024)", WRONG),
    "wrong_step_along_k": ("Traits::BACKWARD ? 64 * kk : kk", "kk", WRONG),
    "sum_starts_at_one": ("float d[Traits::BN / 2] = {};", "float d[Traits::BN / 2] = {1};", WRONG),
    "rows_of_the_first_block": (
        "(tile.band * Traits::PAIR + rank) * Traits::BM",
        "tile.band * Traits::PAIR * Traits::BM",
        WRONG,
    ),
    "tile_left_out": ("i < p.tiles.count()", "i < p.tiles.count() - 1", WRONG),
    "column_walked_twice": ("{first + rest % together, rest / together}", "{first + rest % together, rest % together}", WRONG),
    "not_swizzled": ("8 * (j ^ row % 8) + pair", "8 * j + pair", WRONG),
    "panel_of_the_first_column": ("n0 + panel * Traits::PANEL, m0, out", "n0, m0, out", WRONG),
    "rows_of_one_warpgroup": ("m0 + 64 * group, n0)", "m0, n0)", WRONG),
    "buffer_written_too_early": ("bulk_wait_read<1>()", "bulk_wait_read<2>()", WRONG),
    "one_bias_for_both": ("ptx::store_shared(&s.bias[group][thread", "ptx::store_shared(&s.bias[0][thread", WRONG),
    "stores_after_the_next_may_begin": (
        "  ptx::griddepcontrol_wait();\n",
        "  ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();\n",
        "after griddepcontrol.launch_dependents",
    ),
    "next_may_begin_before_the_wait": (
        "  ptx::griddepcontrol_wait();\n",
        "  ptx::griddepcontrol_launch_dependents();\n  ptx::griddepcontrol_wait();\n",
        "before griddepcontrol.wait",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug(name: str, tmp_path: Path) -> None:
    text, instead, message = PLANTED[name]
    instead = instead.replace("x_of(stage)", "ptx::swizzled_descriptor(&stage.x[64 * (1 - group)][0])")
    module = build.planted_module("plain", "sm90/gemm_lotr.cu", KERNEL, text, instead, tmp_path)
    done = run_cases("plain", module, "--cases", "quick", "--schedules", "forward,reverse,103")
    assert done.returncode == 1 and re.search(message, done.stdout), done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "text, instead, mode, message",
    [
        ("from && n < p.N", "from", "asan", "ERROR: AddressSanitizer"),
        ("i += pairs", "i += 1", "race", "data race"),  # two pairs store the same tile
    ],
)
def test_planted_bug_of_other_builds(text: str, instead: str, mode: str, message: str, tmp_path: Path) -> None:
    module = build.planted_module(mode, "sm90/gemm_lotr.cu", KERNEL, text, instead, tmp_path)
    done = run_cases(mode, module, "--cases", "quick", "--schedules", "forward")
    assert done.returncode and re.search(message, done.stdout + done.stderr), done.stdout + done.stderr


# ---- what nvcc makes of it ----

INSTANCES = 4  # bfloat16 and float16, forward and backward


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """No spills, no serialised products, and the instructions that the sources mean."""
    nvcc, nvdisasm = build.tool("nvcc"), build.tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        pytest.skip("needs nvcc and nvdisasm")
    cubin = tmp_path / "gemm_lotr.cubin"
    target = ["--generate-code=arch=compute_90a,code=sm_90a", "-cubin", "-std=c++17", "-O3", f"-I{build.CSRC}"]
    source = build.CSRC / "cuda" / "sm90" / "gemm_lotr.cu"
    done = subprocess.run([nvcc, *target, "-Xptxas", "-v", "-o", cubin, source], capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert not done.returncode, report
    assert "erialized" not in report and "C75" not in report, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == INSTANCES and {int(n) for line in spills for n in line} == {0}, report
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == INSTANCES and max(registers) <= 168, registers  # three warps a quarter of a multiprocessor
    code = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    bodies = re.split(r"\n//-+ \.text\.", code)[1:]
    assert len(bodies) == INSTANCES
    for body in bodies:
        products = re.findall(r"HGMMA\.64x256x16\.F32(\.BF16)? R\d+, gdesc\[UR\d+\](\.tnspB)?", body)
        name = body.split("\n", 1)[0]
        assert len(products) >= 8, name  # a step of k, and one of the rank
        assert {kind == ".BF16" for kind, _ in products} == {"bfloat16" in name}
        assert {major == ".tnspB" for _, major in products} == ({False, True} if "Lb1E" in name else {False})
        for instruction in (
            "UTMALDG.2D ",
            "UTMALDG.2D.MULTICAST",
            "UTMASTG.2D",
            "UTMACMDFLUSH",
            "ACQBULK",
            "PREEXIT",
            "UCGABAR_ARV",
        ):
            assert instruction in body, (name, instruction)
        assert not re.search(r"\b(HMMA|LDL|STL|STG)\b", body), name
