"""What the kernels move, counted: every large matrix exactly once, the rest near the least that any split could have."""

from __future__ import annotations

import numpy as np
import pytest

from bench.projection import counts as traffic
from csrc.simt.checks.arrays import ODD
from csrc.simt.checks.cases import KERNELS
from csrc.simt.checks.shapes import Shape

BLOCKS = 120  # of 132 multiprocessors


@pytest.mark.parametrize("m, n, r", [(1024, 1024, 64), (1024, 2048, 64), (2048, 1024, 16), (4096, 512, 32)])
@pytest.mark.parametrize("kernel", traffic.KERNELS)
def test_bytes(lib, kernel: str, m: int, n: int, r: int) -> None:
    row = traffic.count(lib, kernel, m, n, r, wgmma=False)  # with it: test_shrink_grad_wgmma.py
    assert row.once <= 1.02, f"the large matrix moves {row.once:.3f} times"
    assert row.blocks >= BLOCKS
    assert row.over_least <= 1.25
    assert row.sector_efficiency >= 0.95
    assert row.bank_conflicts <= 1.05


@pytest.mark.full
@pytest.mark.parametrize("kernel, most", [("shrink", 0.3), ("factor_grad", 0.55), ("expand_add", 0.15), ("shrink_grad", 0.35)])
def test_bytes_of_a_large_layer(lib, kernel: str, most: float) -> None:
    row = traffic.count(lib, kernel, 8192, 4096, 16)
    assert row.once <= 1.02 and row.blocks >= BLOCKS
    assert row.extra < most
    assert row.sector_efficiency >= 0.95 and row.bank_conflicts <= 1.05


@pytest.mark.parametrize("kernel, most", [("shrink", 0.3), ("factor_grad", 0.55), ("expand_add", 0.15), ("shrink_grad", 0.35)])
def test_plan_of_a_large_layer(lib, kernel: str, most: float) -> None:
    """The same from the plan alone, which test_bytes ties to what is counted."""
    plan = lib.plan(kernel, 8192, 4096, 16)
    assert plan["m_blocks"] * plan["n_blocks"] >= BLOCKS
    assert plan["extra_bytes"] < most * 8192 * 4096 * 2 * (2 if kernel == "expand_add" else 1)


@pytest.mark.parametrize("kernel", traffic.KERNELS)
def test_plan_is_what_is_counted(lib, kernel: str) -> None:
    row = traffic.count(lib, kernel, 1024, 512, 32, wgmma=False)
    plan = lib.plan(kernel, 1024, 512, 32)
    assert plan["m_blocks"] * plan["n_blocks"] == row.blocks
    assert plan["extra_bytes"] == pytest.approx(row.factors + row.partials, rel=0.01)  # and the counters of arrival


@pytest.mark.parametrize("kernel", traffic.KERNELS)
def test_what_the_model_of_the_machine_code_is_told(lib, kernel: str) -> None:
    """The instance that ran, its instructions, and that a kernel without sums clears and reads nothing late."""
    machine = traffic.count(lib, kernel, 1024, 512, 16, wgmma=False).machine
    assert machine["names"] == [kernel] and f"{len(kernel)}{kernel}" in machine["symbol"] and "Li16E" in machine["symbol"]
    assert machine["copies"] >= 1024 * 512 * 2 / 512 and machine["matrix"] > 0 and machine["waits"] > 0
    if kernel == "expand_add":
        assert (machine["memsets"], machine["late_loads"], machine["late_bytes"]) == (0, 0, 0)
    elif machine["late_loads"]:  # 16 bytes a thread at most
        assert 0 < machine["late_bytes"] <= 16 * 32 * machine["warps"] * machine["late_loads"]


@pytest.mark.parametrize("kernel", ["factor_grad", "shrink_grad"])
def test_what_is_counted_without_clusters(lib, kernel: str) -> None:
    """All blocks of an A100's launch at the same time: each reads its share of every split, no byte twice; of shrink_grad late
    only the last tiles."""
    sms = 108
    row = traffic.count(lib, kernel, 2048, 1024, 16, sms)
    lib.set_device(multiprocessors=sms, **traffic.DEVICES[sms]._asdict())
    plan = lib.plan(kernel, 2048, 1024, 16, 2, sms)
    assert plan["together"] and row.machine["together"] and plan["m_blocks"] * plan["n_blocks"] == row.blocks <= 2 * sms
    assert plan["extra_bytes"] == pytest.approx(row.factors + row.partials, rel=0.01)
    grad = kernel == "shrink_grad"
    own = 4 * 16 * plan["m_blocks"] * (128 * plan["n_blocks"] if grad else 1024)
    k = 4 * 16 * 64 * plan["m_blocks"] * plan["n_blocks"] if grad else 0
    D = 4 * 1024 * 16 if kernel == "factor_grad" else 0  # in and out
    assert row.machine["late_total"] == own + k + D
    assert row.machine["late_bytes"] <= 1.3 * row.machine["late_total"] / row.blocks + 4 * 16 * 64 * plan["n_blocks"]


@pytest.mark.parametrize("kernel, m, n", [("shrink", 1024, 512), ("factor_grad", 512, 512)])
def test_at_rank_16_a_block_owns_its_output(lib, kernel: str, m: int, n: int) -> None:
    """No sums over the blocks; its warps' sums go through shared memory once, and what D was has come long before."""
    row = traffic.count(lib, kernel, m, n, 16, 16, wgmma=False)
    assert row.once == 1 and row.blocks == 16 and row.partials == 0
    machine, fragment = row.machine, 16 * 8 * 4
    assert (machine["cluster"], machine["atomics"], machine["late_loads"], machine["last_loads"]) == (1, 0, 0, 0)
    tile, parts, out = {"shrink": (4 * 2, 2, 64 * 16 * 2), "factor_grad": (2 * 2, 4, 32 * 16 * 4)}[kernel]  # of fragments
    assert machine["late_stored"] == out
    assert machine["last_shared"] == 2 * parts * tile * fragment + (2 * out if kernel == "shrink" else 0)  # in and out


@pytest.mark.parametrize("r", [16, 12])
def test_plans_of_rank_16_split_only_what_does_not_fill_the_gpu(lib, r: int) -> None:
    for sms in (132, 108):  # mma.sync's plans, also of a card that has wgmma
        lib.set_device(multiprocessors=sms, **traffic.DEVICES[sms]._replace(wgmma=False)._asdict())
        for m, n in ((8192, 4096), (8192, 14336)):
            shrink, grad = (lib.plan(kernel, m, n, r, 2, sms) for kernel in ("shrink", "factor_grad"))
            assert shrink["n_blocks"] == 1 and grad["m_blocks"] == 1, (sms, m, n)
        assert lib.plan("shrink", 512, 4096, r, 2, sms)["n_blocks"] > 1
        assert lib.plan("factor_grad", 8192, 512, r, 2, sms)["m_blocks"] > 1


def test_a_decoding_step_splits_the_columns(lib) -> None:
    """Over 32 blocks at least; over all multiprocessors the last block's sum would take longer than x."""
    for m in (1, 16):
        for r in (16, 64, 256):
            plan = lib.plan("shrink", m, 8192, r)
            assert plan["m_blocks"] == 1 and 32 <= plan["n_blocks"] <= 132, (m, r, plan)


def bf16(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint16)


def fp32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_launches(lib) -> None:
    """Of a layer, besides the base product: forward 2, backward 3; fold and fold_grad one for a whole group."""
    m, k, n, r, layers = 96, 64, 80, 16, 5

    def launches(call) -> list[str]:
        lib.set_device(multiprocessors=132)
        lib.reset_counters()
        call()
        return [launch["name"] for launch in lib.counters()["launches"]]

    def forward() -> None:
        lib.shrink(bf16(m, k), bf16(k, r), bf16(m, r))
        lib.expand_add_(bf16(m, n), bf16(m, r), bf16(n, r))

    def backward() -> None:
        lib.shrink_grad(bf16(m, n), bf16(n, r), bf16(m, r), bf16(m, r), fp32(n, r))
        lib.expand_add_(bf16(m, k), bf16(m, r), bf16(k, r))
        lib.factor_grad_(fp32(k, r), bf16(m, k), bf16(m, r))

    assert launches(forward) == ["shrink", "expand_add"]
    assert launches(backward) == ["shrink_grad", "expand_add", "factor_grad"]
    cores = bf16(layers, r, r)
    assert launches(lambda: lib.fold(bf16(n, r), cores, 1.0, bf16(layers, n, r))) == ["fold"]
    assert launches(lambda: lib.fold_grad(fp32(layers, n, r), bf16(n, r), cores, 1.0, fp32(n, r), fp32(layers, r, r))) == [
        "fold_grad"
    ]
    assert launches(
        lambda: lib.small_forward_(bf16(4, n), bf16(4, k), bf16(k, r), bf16(r, r), bf16(n, r), 1.0, bf16(4, r))
    ) == ["shrink", "expand_add"]
    transposed = bf16(n, r), bf16(r, n), bf16(r, k)
    assert launches(lambda: lib.fold_transposed(bf16(n, r), bf16(r, r), bf16(k, r), 1.0, *transposed)) == ["fold"]
    assert not launches(lambda: lib.shrink(bf16(0, k), bf16(k, r), bf16(0, r)))


def test_every_launch_is_early_and_lets_the_next_begin(lib) -> None:
    """All kernels but gemm_lotr, in every block, with a sum at the end and without one; but no cooperative launch is early."""
    seen = set()
    for make in KERNELS.values():
        for shape in (Shape(700, 260, 16, ODD, sms=5, layers=2), Shape(90, 130, 40, p=0.25, sms=1)):
            lib.reset_counters()
            make(shape, "bf16").run(lib)
            for launch in lib.counters()["launches"]:
                seen.add(launch["name"])
                assert launch["early"] != launch["cooperative"], (shape, launch)  # with all blocks at the same time
                assert launch["let_next"] == np.prod(launch["grid"]), (shape, launch)
    large = {"shrink", "expand_add", "factor_grad", "shrink_grad", "pack"}
    assert seen == large | {"fold", "fold_grad", "row_core", "row_core_grad", "row_ends", "sum_rows", "scale_backward"}


def test_bad_ranks_are_named(lib) -> None:
    with pytest.raises(ValueError, match=r"shrink: A: expected a rank from 1 to 256, got 257"):
        lib.shrink(bf16(2, 8), bf16(8, 257), bf16(2, 257))
    with pytest.raises(ValueError, match=r"expand_add: F: expected a rank from 1 to 256, got 300"):
        lib.expand_add_(bf16(2, 8), bf16(2, 300), bf16(8, 300))
    with pytest.raises(ValueError, match=r"fold: B: expected a rank from 1 to 256, got 257"):
        lib.fold(bf16(8, 257), bf16(1, 4, 257), 1.0, bf16(1, 8, 4))
