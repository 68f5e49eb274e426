"""Bugs planted into copies of kernels, one at a time: each is noticed by the means named here.

mutate_kernels.py leaves out barriers and waits; these are the mistakes that it cannot make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
WRONG = r": [uyQ]: "  # the numbers
STUCK = "deadlock: no thread can go on"

# name: file, text, what stands there instead, build, what a failure must say
MAIN, ROWS, TRAITS, FACTOR = (f"kernels/gemm_lotr{part}.cuh" for part in ("", "_rows", "_traits", "_factor"))
RING = "ptx/pipeline.cuh"
GEMM_LOTR: dict[str, tuple[str, str, str, str, str]] = {
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
    "ring_starts_anew": (MAIN, "    float d[Traits::BN / 2];", "    at_ = {}; float d[Traits::BN / 2];", "plain", STUCK),
    "released_early": (
        MAIN,
        "      if (k > 0) release(before);\n      before = at_.stage;",
        "      release(at_.stage);\n      before = at_.stage;",
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
        RING,
        "lane % CLUSTER LOTR_PASS_SITE",
        "cluster_rank() LOTR_PASS_SITE",
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
    "u_of_the_wrong_rows": (FACTOR, "row + 16 * c + tile / 2 * 8", "row + 16 * c + tile % 2 * 8", "plain", r": Q: "),
    "u_not_transposed": (FACTOR, "word = ptx::movmatrix_trans(word);", "(void)word;", "plain", r": Q: "),
    "a_ragged_row_of_u_at_once": (FACTOR, "p_.Q.u_vector && rank + 8 <= p_.r", "rank + 8 <= p_.r", "plain", "aligned"),
    "ranks_beyond_r": (ROWS, "rank + 1 < p_.r ? sum[j + 1] : 0.f", "sum[j]", "plain", "ranks beyond r are not zero|" + WRONG),
}

# name: text, what stands there instead, what a failure must say
ONE_PRODUCT: dict[str, tuple[str, str, str]] = {
    "wrong_panel": ("sizeof(stage.factor[0])),", "1024),", ": u: "),
    "the_swizzle_of_a_whole_panel": (
        "swizzled_descriptor_mn<Traits::PANEL>(",
        "swizzled_descriptor_mn<64>(",
        "no canonical layout",
    ),
    "each_block_fetches_the_first_share": ("int(ptx::cluster_rank()) * Traits::SHARE", "0", ": u: |NaN"),
    "rows_of_another_share": ("i * ROWS + share, full,", "i * ROWS, full,", ": u: "),
    "a_share_for_this_block_alone": ("(1 << CLUSTER) - 1)", "1 << ptx::cluster_rank())", "deadlock|in flight"),
    "given_back_before_the_wait": (
        "      ptx::wgmma_wait<1>();\n      if (i > 0) s_.ring.template release<TOGETHER, CLUSTER>(last);",
        "      s_.ring.template release<TOGETHER, CLUSTER>(at.stage);\n      ptx::wgmma_wait<1>();",
        "more arrivals|deadlock|: u: ",
    ),
    "stored_before_the_last_product": ("    ptx::wgmma_wait<0>();\n", "", "wgmma in flight"),
    "the_first_step_adds_to_nothing": ("float d[Traits::R / 2] = {};", "float d[Traits::R / 2] = {1};", ": [uD]: "),
    "what_D_was_forgotten": ("if (p.accumulate) each(", "if (false) each(", ": D: "),
    "columns_of_the_next_block": ("Traits::DOWN ? first() : i * COLS", "Traits::DOWN ? first() + COLS : i * COLS", ": D: "),
    "a_step_too_few": ("(length + TOGETHER * ROWS - 1) /", "length /", ": [uD]: |deadlock"),
}
# Of the ring, in the same kernels.
PIPELINE: dict[str, tuple[str, str, str]] = {
    "given_back_to_this_block_alone": ("lane % CLUSTER LOTR", "cluster_rank() LOTR", "more arrivals|deadlock"),
    "one_stage_given_back_of_two": ("if (lane >= COUNT * CLUSTER) return;", "if (lane >= CLUSTER) return;", "deadlock"),
    "the_parity_stays": ("stage = 0, parity ^= 1", "stage = 0", "more arrivals"),
    "one_reader_too_few": (
        "mbarrier_init(&empty[i], readers",
        "mbarrier_init(&empty[i], readers - 1",
        "more arrivals|: [uD]: ",
    ),
    "left_with_a_stage_out": ("i < STAGES; ++i, at.advance()", "i < STAGES - 1; ++i, at.advance()", "has exited"),
}
SHRINK_GRAD: dict[str, tuple[str, str, str]] = {
    "wrong_rows": ("own.g[16 * c], 0)", "own.g[8 * c], 0)", ": Q: "),
    "both_take_the_first_stage": ("s_.stage[first + group_]", "s_.stage[first]", ": Q: "),
    "the_first_block_sums_for_all": ("int(ptx::cluster_rank()) * share", "0", ": k: "),
    "sums_of_clusters_in_one_place": ("int(blockIdx.x) / p_.cluster", "0", ": k: "),
    "the_rows_of_the_other_group": ("+ 4 * group_ + warp_]", "+ 4 * (1 - group_) + warp_]", ": k: "),
    "a_piece_of_M_forgotten": ("Q_partial(0), splits, own", "Q_partial(0), splits - 1, own", ": Q: "),
    "bytes_of_F_forgotten": ("with_F * uint32_t(sizeof(Smem::F[0]))", "0", "in flight|deadlock"),
    "released_before_the_wait": (
        "release<GROUPS>(LAST ? first : last)",
        "release<GROUPS>(first)",
        "more arrivals|deadlock|: [kQ]: ",
    ),
    "another_column_tile_stored": ("if constexpr (LAST) store_Q(Q[n], n)", "if constexpr (LAST) store_Q(Q[n], 0)", ": Q: "),
    "rows_of_F_as_long_as_a_panel": (
        "swizzled_descriptor_mn<R>(F + c * R, 0)",
        "swizzled_descriptor_mn<R>(F + c * 64, 0)",
        ": k: ",
    ),
    "the_sums_of_the_row_tile_before": ("put_k(k, i % K_SLOTS)", "put_k(k, (i + 1) % K_SLOTS)", ": k: "),
    "a_slot_taken_too_early": ("(i / K_SLOTS & 1) ^ 1);\n    put_k", "i / K_SLOTS & 1);\n    put_k", "deadlock|: k: "),
    "the_swizzle_of_a_whole_panel": ("swizzled_descriptor_mn<R>(", "swizzled_descriptor_mn<64>(", "no canonical layout"),
}
# Of magnitudes. Unit and file of kernels, text, what stands there instead, what a failure must say
BACKWARD, EXPAND = ("scale_backward.cu", "kernels/scale_backward.cuh"), ("kernels_bf16.cu", "kernels/expand_add.cuh")
MAGNITUDES: dict[str, tuple[tuple[str, str], str, str, str]] = {
    "bias_not_subtracted": (BACKWARD, "sum[e] += g_e * (y_e - bias[e])", "sum[e] += g_e * y_e", ": dc: "),
    "rows_ahead_forgotten": (BACKWARD, "    walk(std::integral_constant<int, 1>{});\n", "", ": g0 is not|: dc: "),
    "last_row_forgotten": (BACKWARD, "? begin + rows : p.M;", "? begin + rows : p.M - 1;", ": g0 is not|: dc: "),
    "a_zero_divides": (BACKWARD, "c == 0.f ? 0.f : total / c", "total / c", "not finite"),
    "a_partial_sum_twice": (BACKWARD, "      if (s + i < splits) sum += in[i];", "      sum += in[i];", ": dc: "),
    "all_partials_in_one_place": (BACKWARD, "partial + int64_t(blockIdx.y) * COLS", "partial", ": dc: "),
    "columns_beyond_n": (BACKWARD, "own < COLS && tile_col + own < p.N", "own < COLS", "wrote outside"),
    "a_tile_takes_the_first_ones_scale": (EXPAND, "here.n * COLS + c / 2 * GROUP", "c / 2 * GROUP", ": y: "),
    "scaled_before_the_sum": (EXPAND, "scale[e / 4].v[e % 4] * y0,", "y0,", ": y: "),
    "both_rows_of_the_first_group": (EXPAND, "if (c % 2 == 0) {", "if (c == 0) {", ": y: "),
}


def sweep_planted(unit: str, file: str, text: str, instead: str, folder: Path, mode: str, *sweep: str) -> str:
    """The output of a sweep over the module with a bug in it; the first arguments are build.planted_module's."""
    from csrc.simt import build

    module = build.planted_module(mode, unit, file, text, instead, folder)
    script = [sys.executable, str(HERE / "sweep.py"), "--mode", mode, "--module", str(module), *sweep]
    done = subprocess.run(script, capture_output=True, text=True, env=build.python_environment(mode), timeout=900)
    assert done.returncode, "nothing failed"
    return done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize("name", GEMM_LOTR)
def test_gemm_lotr(name: str, tmp_path: Path) -> None:
    file, text, instead, mode, message = GEMM_LOTR[name]
    sweep = ("--shapes", "gemm_lotr_small", "--schedules", "forward/1" if mode == "asan" else "forward/1,2/3,103/2,4/4")
    output = sweep_planted("gemm_lotr_sm90.cu", file, text, instead, tmp_path, mode, *sweep)
    assert any(re.search(message, line) for line in output.splitlines()), output


@pytest.mark.full
@pytest.mark.parametrize(
    "unit, file, kernels, bug",
    [("one_product", "kernels/one_product_wgmma.cuh", "shrink_wgmma,factor_grad_wgmma", bug) for bug in ONE_PRODUCT.values()]
    + [("one_product", RING, "shrink_wgmma,factor_grad_wgmma", bug) for bug in PIPELINE.values()]
    + [("shrink_grad", "kernels/shrink_grad_wgmma.cuh", "shrink_grad_wgmma", bug) for bug in SHRINK_GRAD.values()],
    ids=[*ONE_PRODUCT, *PIPELINE, *SHRINK_GRAD],
)
def test_products_by_wgmma(unit: str, file: str, kernels: str, bug: tuple[str, str, str], tmp_path: Path) -> None:
    text, instead, message = bug
    sweep = ("--shapes", "pipeline", "--kinds", "bf16", "--kernels", kernels)
    output = sweep_planted(f"{unit}_sm90.cu", file, text, instead, tmp_path, "plain", *sweep)
    assert any(re.search(message, line) for line in output.splitlines()), output


@pytest.mark.full
@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitudes(name: str, tmp_path: Path) -> None:
    (unit, file), text, instead, message = MAGNITUDES[name]
    kernel = "scale_backward" if unit == BACKWARD[0] else "expand_scaled"
    sweep = ("--shapes", "all", "--kinds", "bf16", "--kernels", kernel, "--schedules", "forward")
    output = sweep_planted(unit, file, text, instead, tmp_path, "plain", *sweep)
    assert any(re.search(message, line) for line in output.splitlines()), output
