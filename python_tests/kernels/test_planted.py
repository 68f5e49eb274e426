"""Bugs planted into copies of the kernels, one at a time. The check that is named here finds each.

test_builds.py skips barriers and waits; these are other mistakes.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from sweep import in_process

from csrc.simt import build


class Bug(NamedTuple):
    """A bug in one file.

    Attributes:
        text: A text that occurs once in the file.
        instead: What replaces the text.
        message: A pattern of the failure. ": NAME: " matches wrong values of an output.
        kernels: The kernels that run, separated by commas. At least one must fail.
        kinds: The element types that run, separated by commas.
        shapes: Which shapes run (shapes.shapes_of).
        mode: The build of the executor.
    """

    text: str
    instead: str
    message: str
    kernels: str
    kinds: str = "bf16"
    shapes: str = "pipeline"
    mode: str = "plain"


EARLY = r"before griddepcontrol\.wait"
LATE = "after griddepcontrol.launch_dependents"
LAUNCH_BEFORE_WAIT = "  ptx::griddepcontrol_launch_dependents();\n  ptx::griddepcontrol_wait();\n"
BEYOND = "wrote outside|past its end|overlaps"
BOTH = "gemm_lotr,gemm_lotr_backward"
Y = ": y: "
RING = ": y: |deadlock: no thread can go on|more arrivals than the mbarrier expects|in flight"


def fused(
    text: str, instead: str, message: str = Y, kernels: str = BOTH, mode: str = "plain"
) -> Bug:
    """Returns a bug in gemm_lotr. Its quick cases have both element types."""
    kinds = "bf16,fp16" if mode == "plain" else "bf16"
    return Bug(text, instead, message, kernels, kinds=kinds, shapes="quick", mode=mode)


# (the .cu that is compiled, the file of csrc/cuda that it includes): the bugs by name
BUGS: dict[tuple[str, str], dict[str, Bug]] = {
    ("operators.cu", "operators.cu"): {
        "factor_of_the_first_launch_again": Bug(
            "params.A = columns(p.A, first, call.type)",
            "params.A = p.A",
            ": u: ",
            "shrink",
            kinds="fp32",
        ),
        "second_launch_does_not_add": Bug(
            "    if (first > 0) params.start = p.y;\n", "", Y, "expand_fresh", kinds="fp32"
        ),
        "workspace_of_one_part": Bug(
            "plan.n_blocks * p.M * params.parts_row",
            "p.M * params.parts_row",
            f": u: |{BEYOND}",
            "shrink",
        ),
        "sum_of_parts_does_not_add": Bug(
            "parts_sum.add = sum.add;", "parts_sum.add = false;", ": D: ", "factor_grad"
        ),
    },
    ("parts.cu", "kernels/sum_parts.cuh"): {
        "first_part_left_out": Bug(
            "for (int s = 0; s < p.splits", "for (int s = 1; s < p.splits", ": u: ", "shrink"
        ),
        "second_output_from_the_first_ones_row": Bug(
            "(blockIdx.x - (is_first ? 0 : strips_of_first)) * ROWS",
            "int64_t(blockIdx.x) * ROWS",
            ": Q: ",
            "shrink_grad",
        ),
        "columns_of_the_padding": Bug(
            "      if (col + e >= p.cols) break;\n", "", f": [uD]: |{BEYOND}", "shrink,factor_grad"
        ),
    },
    ("parts.cu", "kernels/pack.cuh"): {
        "columns_for_rows": Bug(
            "c = down ? index / ROWS : index % COLS",
            "c = index % COLS",
            ": u: ",
            "shrink",
            shapes="all",
        ),
        "padding_of_a_row": Bug(
            "col0 + c, p.cols);", "col0 + c, p.to.row);", "wrote outside", "pack", shapes="quick"
        ),
    },
    ("kernels_bf16.cu", "kernels/shrink.cuh"): {
        "one_group_too_few": Bug(
            "cp_async_wait<STAGES - 2>();",
            "cp_async_wait<STAGES - 1>();",
            "in flight|: u: ",
            "shrink",
        ),
        "A_stays": Bug(
            "    place.slot = tile::stage_after<STAGES>(place.slot);\n", "", ": u: ", "shrink"
        ),
        "parts_of_all_blocks_in_one_place": Bug(
            "(split * p.M + m0) * p.parts_row", "m0 * p.parts_row", ": u: ", "shrink"
        ),
        "mask_of_the_first_columns": Bug(
            "int64_t(k_begin + now.step) * COLS,",
            "int64_t(now.step) * COLS,",
            ": u: ",
            "shrink",
        ),
        "reads_before_the_wait": Bug("  ptx::griddepcontrol_wait();\n", "", EARLY, "shrink"),
        "next_begins_before_the_wait": Bug(
            "  ptx::griddepcontrol_wait();\n", LAUNCH_BEFORE_WAIT, EARLY, "shrink"
        ),
    },
    ("kernels_bf16.cu", "tile/philox.cuh"): {
        "mask_of_the_next_quad": Bug(
            "bits >> shift & ", "bits & ", ": [uy]: ", "shrink,expand_add", shapes="all"
        )
    },
    ("kernels_bf16.cu", "kernels/expand_add.cuh"): {
        "strips_of_other_blocks": Bug(
            "int(gridDim.y) * Traits::WARPS;", "Traits::WARPS;", Y, "expand_add"
        ),
        "u_stays": Bug("    place.u = tile::stage_after<STAGES>(place.u);\n", "", Y, "expand_add"),
        "columns_in_order": Bug("c / 2 * CHUNK + 2 * j + c % 2;", "8 * j + c;", Y, "expand_add"),
        "ragged_columns_are_full": Bug(" && place.n < full_n;", ";", f"{Y}|{BEYOND}", "expand_add"),
        "strides_of_start_for_y": Bug(
            "of<Traits>(p.y, p.M,", "of<Traits>(p.start, p.M,", f"{Y}|{BEYOND}", "expand_from"
        ),
        "bias_of_the_first_tile": Bug(
            "&sm.bias[now.n * COLS + c / 2", "&sm.bias[c / 2", Y, "expand_fresh"
        ),
    },
    ("kernels_bf16.cu", "kernels/factor_grad.cuh"): {
        "all_pieces_in_one_place": Bug(
            "D.data += m_block * p.D_part + ", "D.data += ", ": D: ", "factor_grad"
        )
    },
    ("kernels_bf16.cu", "kernels/rectangle.cuh"): {
        "columns_beyond_the_matrix": Bug(
            "left < width ? left : width;", "width;", f": D: |{BEYOND}", "factor_grad"
        ),
        "rows_of_v_stay": Bug(
            "    place.slot = tile::stage_after<STAGES>(place.slot);\n", "", ": D: ", "factor_grad"
        ),
    },
    ("kernels_bf16.cu", "kernels/shrink_grad.cuh"): {
        "first_half_of_the_rank_twice": Bug(
            "threadIdx.x) / 128 * (Traits::R / 2);", "threadIdx.x) * 0;", ": du: ", "shrink_grad"
        ),
        "u_of_the_first_rows": Bug(
            "    now.slot = tile::stage_after<STAGES>(now.slot);\n", "", ": Q: ", "shrink_grad"
        ),
        "du_of_all_columns_in_one_place": Bug(
            "p.du_parts + int64_t(blockIdx.x) * p.M * p.du_parts_row;",
            "p.du_parts;",
            ": du: ",
            "shrink_grad",
        ),
    },
    ("fold.cu", "kernels/fold.cuh"): {
        "rows_of_the_first_split": Bug(
            "n0 = split * p.n_per_split;", "n0 = 0 * p.n_per_split;", ": dcore: ", "fold_grad"
        )
    },
    ("fold.cu", "kernels/small_product.cuh"): {
        "step_beyond_the_sum": Bug(
            "k0 + k < K ? b(k0 + k, c) : 0.f",
            "b(k0 + k, c)",
            "not finite|: (F|d)",
            "fold,fold_grad",
        )
    },
    ("rows.cu", "kernels/row_core.cuh"): {
        "rows_of_the_core_before": Bug(
            "if (begin <= row && row < end", "if (row < end", ": h: ", "row_core"
        ),
        "rows_of_the_first_split_of_a_core": Bug(
            "  begin += split * share;\n", "", ": dcores: ", "row_core_backward"
        ),
        "place_of_an_equal_key": Bug(
            "(sorted + middle)) <= value)",
            "(sorted + middle)) < value)",
            ": d",
            "row_core_backward",
        ),
        "last_row_of_a_token": Bug(
            "place < end; ++place)", "place < end - 1; ++place)", ": du", "row_core_backward"
        ),
    },
    ("sm90/gemm_lotr.cu", "sm90/gemm_lotr.cuh"): {
        "no_step_of_the_rank": fused("kk < Traits::BK && k + kk < p.r; kk", "kk < 0; kk"),
        "only_the_first_16_ranks_of_a_step": fused(
            "kk < Traits::BK && k + kk < p.r; kk", "kk < 16 && k + kk < p.r; kk"
        ),
        "first_ranks_again": fused("step(U, k, m0,", "step(U, 0, m0,"),
        "ranks_of_the_other_warpgroup": fused(
            "u = ptx::swizzled_descriptor(&stage.x[Traits::GROUP_ROWS * group][0])",
            "u = ptx::swizzled_descriptor(&stage.x[Traits::GROUP_ROWS * (1 - group)][0])",
        ),
        "rows_of_the_other_warpgroup": fused(
            "x = ptx::swizzled_descriptor(&stage.x[Traits::GROUP_ROWS * group][0])",
            "x = ptx::swizzled_descriptor(&stage.x[Traits::GROUP_ROWS * (1 - group)][0])",
        ),
        "wrong_phase_of_full": fused(
            "wait(&s.full[place.stage], place.parity)",
            "wait(&s.full[place.stage], place.parity ^ 1)",
            RING,
        ),
        "wrong_phase_of_empty": fused(
            "wait(&s.empty[place.stage], place.parity ^ 1)",
            "wait(&s.empty[place.stage], place.parity)",
            RING,
        ),
        "parity_stays": fused("    parity ^= 1;\n", "", RING),
        "ring_starts_anew": fused(
            "float d[Traits::BN / 2] = {};", "float d[Traits::BN / 2] = {}; place = {};", RING
        ),
        "bytes_of_w_forgotten": fused("(full, sizeof(Stage))", "(full, sizeof(Stage::x))", RING),
        "bytes_of_a_share": fused(
            "(full, sizeof(Stage))", "(full, sizeof(Stage) - sizeof(Stage::w) / 2)", RING
        ),
        "one_reader_too_few": fused(
            "Traits::WARPS * Traits::PAIR)", "Traits::WARPS * Traits::PAIR - 1)", RING
        ),
        "given_back_to_its_own_block": fused(
            "(&s.empty[stage], lane)", "(&s.empty[stage], blockIdx.x % 2)", RING
        ),
        "given_back_early": fused(
            "if (k > 0) release(place.before());", "release(place.stage);", RING
        ),
        "both_blocks_load_one_share": fused("int(blockIdx.x) % Traits::PAIR * Traits::SHARE", "0"),
        "a_share_for_its_own_block": fused(
            "(1 << Traits::PAIR) - 1)", "1 << blockIdx.x % 2)", RING
        ),
        "columns_of_the_first_share": fused("F, k, n0 + share, full", "F, k, n0, full"),
        "K_major_for_MN_major": fused(
            "ptx::swizzled_descriptor_mn(stage.w, Traits::PANEL_BYTES)",
            "ptx::swizzled_descriptor(stage.w)",
        ),
        "wrong_panel": fused("(stage.w, Traits::PANEL_BYTES)", "(stage.w, 1024)"),
        "wrong_step_along_k": fused("Traits::BACKWARD ? Traits::PANEL * kk : kk", "kk"),
        "sum_starts_at_one": fused(
            "float d[Traits::BN / 2] = {};", "float d[Traits::BN / 2] = {1};"
        ),
        "rows_of_the_first_block": fused(
            "(tile.band * Traits::PAIR + rank) * Traits::BM",
            "tile.band * Traits::PAIR * Traits::BM",
        ),
        "tile_left_out": fused("i < p.tiles.count()", "i < p.tiles.count() - 1"),
        "column_walked_twice": fused(
            "{first + rest % together, rest / together}",
            "{first + rest % together, rest % together}",
        ),
        "not_swizzled": fused("8 * (j ^ row % 8) + pair", "8 * j + pair"),
        "panel_of_the_first_column": fused("n0 + panel * Traits::PANEL, m0, out", "n0, m0, out"),
        "rows_of_one_warpgroup": fused("m0 + Traits::GROUP_ROWS * group, n0)", "m0, n0)"),
        "buffer_written_too_early": fused("bulk_wait_read<1>()", "bulk_wait_read<2>()"),
        "one_bias_for_both": fused(
            "ptx::store_shared(&s.bias[group][thread", "ptx::store_shared(&s.bias[0][thread"
        ),
        "stores_after_the_next_may_begin": fused(
            "  ptx::griddepcontrol_wait();\n",
            "  ptx::griddepcontrol_wait();\n  ptx::griddepcontrol_launch_dependents();\n",
            LATE,
        ),
        "next_may_begin_before_the_wait": fused(
            "  ptx::griddepcontrol_wait();\n", LAUNCH_BEFORE_WAIT, EARLY
        ),
        "bias_beyond_the_matrix": fused(
            "from && n < p.N", "from", "ERROR: AddressSanitizer", mode="asan"
        ),
        "given_back_before_the_wait": fused(
            "        ptx::wgmma_wait<1>();\n        if (k > 0) release(place.before());",
            "        if (k > 0) release(place.before());\n        ptx::wgmma_wait<1>();",
            "data race .*shared memory.*wgmma.wait_group",
            mode="race",
        ),
        "two_pairs_store_one_tile": fused("i += pairs", "i += 1", "data race", mode="race"),
    },
}


CASES = [
    # The other builds of the executor take minutes to compile.
    pytest.param(
        *where, bug, id=name, marks=pytest.mark.slow if bug.mode == "plain" else pytest.mark.full
    )
    for where, bugs in BUGS.items()
    for name, bug in bugs.items()
]


@pytest.mark.parametrize(("unit", "file", "bug"), CASES)
def test_noticed(unit: str, file: str, bug: Bug, tmp_path: Path) -> None:
    module = build.planted_module(bug.mode, unit, file, bug.text, bug.instead, tmp_path)
    chosen = ("--shapes", bug.shapes, "--kinds", bug.kinds, "--kernels", bug.kernels)
    done = in_process(bug.mode, module, *chosen, "--schedules", "forward,reverse,103")
    crashed = done.returncode < 0  # far outside an array
    output = done.stderr if bug.mode == "asan" else done.stdout
    assert crashed or (done.returncode and re.search(bug.message, output)), (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
