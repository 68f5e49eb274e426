"""Bugs planted into copies of csrc/cuda/kernels/gemm_lotr*.cuh, one at a time: each is noticed by the means named here. What is
merely left out, a barrier or a wait, is the business of mutate_gemm_lotr.py; these are the mistakes that it cannot make."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import run_planted

MAIN, ROWS, TRAITS, FACTOR = (f"kernels/gemm_lotr{part}.cuh" for part in ("", "_rows", "_traits", "_factor"))
WRONG = r": [uyQ]: "  # the numbers
STUCK = "deadlock: no thread can go on"

# name: file, text, what stands there instead, build, what a failure must say
BUGS: dict[str, tuple[str, str, str, str, str]] = {
    "read_without_acquire": (
        ROWS,
        "ptx::wait_equal(flag_, int32_t(epoch));",
        "simt::wait_equal(flag_, int32_t(epoch), false, simt::Site::here());",
        "race",
        r"data race \(read after write\) on global memory .*gemm_lotr_rows.cuh:\d+ \(ld.global\).*of block",
    ),
    "released_before_the_stores": (
        ROWS,
        "    each([&](int step, int i, int rank, int h) {\n      const int j",
        "    if (threadIdx.x % 128 == 0) ptx::store_release(flag_, int32_t(epoch));\n"
        "    each([&](int step, int i, int rank, int h) {\n      const int j",
        "plain",
        WRONG,
    ),
    "no_rank_step": (
        MAIN,
        "for (int c = 4 * step; c < Traits::R / 16 && c < 4 * step + 4; ++c)",
        "for (int c = 4 * step; c < 0; ++c)",
        "plain",
        WRONG,
    ),
    "ring_starts_anew": (MAIN, "    float d[Traits::BN / 2];", "    ring_ = {}; float d[Traits::BN / 2];", "plain", STUCK),
    "released_early": (
        MAIN,
        "      if (k > 0) release(before);\n      before = ring_.stage;",
        "      release(ring_.stage);\n      before = ring_.stage;",
        "plain",
        "more arrivals|" + STUCK + "|" + WRONG,
    ),
    "epoch_stays": (MAIN, "ptx::store(p_.sync + 1, int32_t(s_.epoch));", "", "plain", r"\[0 0\]"),
    "relaxed_ticket": (
        MAIN,
        "ticket = ptx::atomic_add_acq_rel(p_.sync, 1);",
        "ticket = ptx::atomic_add(p_.sync, 1);",
        "race",
        r"data race \(write after read\) on global memory .*of block",
    ),
    "counter_stays": (MAIN, "      ptx::store(p_.sync, 0);\n", "", "plain", WRONG + r"|\[\d+ 1\]"),
    "tiles_before_scouts": (
        TRAITS,
        "return ticket < scouts ? ticket : ticket - scouts + bands;",
        "return ticket < bands * columns ? ticket + bands : ticket - bands * columns;",
        "plain",
        STUCK + ".*ld.acquire",
    ),
    "bytes_of_w_forgotten": (
        MAIN,
        "Stage& stage = next(uint32_t(sizeof(Stage::x) + sizeof(Stage::w)), full);",
        "Stage& stage = next(uint32_t(sizeof(Stage::x)), full);",
        "plain",
        "in flight|" + STUCK + "|" + WRONG,
    ),
    "registers_reused": (
        MAIN,
        "      ptx::wgmma_commit();\n      ptx::wgmma_wait<1>();\n      release(last);",
        "      ptx::wgmma_commit();\n      u.operand[0][0] = 0;\n      ptx::wgmma_wait<1>();\n      release(last);",
        "plain",
        WRONG,
    ),
    "rows_beyond_m": (ROWS, "      if (m >= p.M) continue;\n", "", "asan", "ERROR: AddressSanitizer: .* on address"),
    "columns_beyond_n": (ROWS, "          if (n + e < p.N)\n", "", "asan", "ERROR: AddressSanitizer: .* on address"),
    "own_producer_only": (
        MAIN,
        "give_back<Traits>(&s_.empty[stage], lane LOTR_PASS_SITE);",
        "give_back<Traits>(&s_.empty[stage], uint32_t(rank_in_cluster<Traits>()) LOTR_PASS_SITE);",
        "plain",
        "more arrivals|" + STUCK + "|" + WRONG,
    ),
    "wrong_panel": (MAIN, "Traits::BK * 64 * sizeof(T)), accumulate);", "1024), accumulate);", "plain", WRONG),
    "wait_of_the_own_block": (
        MAIN,
        "    ptx::mbarrier_wait_cluster(barrier, parity LOTR_PASS_SITE);",
        "    ptx::mbarrier_wait(barrier, parity LOTR_PASS_SITE);",
        "race",
        r"data race .* on shared memory.*of block",
    ),
    "each_band_starts_anew": (MAIN, "ticket == work.band, epoch", "true, epoch", "plain", r": Q: "),
    "both_take_the_first_stage": (MAIN, "s_.stage[group_ ? second : first].x", "s_.stage[first].x", "plain", r": Q: "),
    "sums_of_one_slot": (FACTOR, "Traits::CLUSTER * p.tickets.scouts, FLOATS", "1, FLOATS", "plain", r": Q: "),
    "u_of_the_wrong_rows": (FACTOR, "i / 2 * 8 + int(threadIdx.x % 4)", "i % 2 * 8 + int(threadIdx.x % 4)", "plain", r": Q: "),
    "ranks_beyond_r": (ROWS, "rank + 1 < p_.r ? sum[j + 1] : 0.f", "sum[j]", "plain", "ranks beyond r are not zero|" + WRONG),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BUGS)
def test_noticed(name: str, tmp_path: Path) -> None:
    file, text, instead, mode, message = BUGS[name]
    schedules = "forward/1" if mode == "asan" else "forward/1,2/3,3/2,4/4"
    sweep = ["sweep_gemm_lotr.py", "--mode", mode, "--cases", "small", "--schedules", schedules]
    _, found, output = run_planted("gemm_lotr_sm90.cu", file, text, instead, message, sweep, tmp_path, mode)
    assert found, output
    print(found[0])
