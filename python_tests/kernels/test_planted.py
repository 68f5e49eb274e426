"""Bugs planted into copies of the kernels, one at a time: each is noticed by the means named here.

test_builds.py leaves out barriers and waits; these are other mistakes. gemm_lotr's: test_gemm_lotr.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from csrc.simt import build

HERE = Path(__file__).resolve().parent
MMA = "kernels_bf16.cu"
SHRINK, EXPAND, FACTOR, GRAD = (f"kernels/{name}.cuh" for name in ("shrink", "expand_add", "factor_grad", "shrink_grad"))
FOLD, ROWS, PARTS, PACK = (f"kernels/{name}.cuh" for name in ("fold", "row_core", "sum_parts", "pack"))
EARLY, RECTANGLE, SMALL = r"before griddepcontrol\.wait", "kernels/rectangle.cuh", "kernels/small_product.cuh"


class Bug(NamedTuple):
    """In `file`, which `unit` includes, `instead` stands for `text`. `message`: what a failure of one of `kernels` says."""

    unit: str
    file: str
    text: str
    instead: str
    kernels: str
    message: str
    kind: str = "bf16"
    shapes: str = "pipeline"


def operators(text: str, instead: str, kernels: str, message: str, kind: str = "bf16") -> Bug:
    return Bug("operators.cu", "operators.cu", text, instead, kernels, message, kind)


BUGS: dict[str, Bug] = {
    # how a problem becomes launches
    "factor_of_the_first_launch_again": operators(
        "piece.A = columns(p.A, first, call.type)", "piece.A = p.A", "shrink", ": u: ", "fp32"
    ),
    "second_launch_does_not_add": operators("    if (first > 0) piece.fresh = 0;\n", "", "expand_fresh", ": y: ", "fp32"),
    "workspace_of_one_part": operators(
        "plan.n_blocks * p.M * piece.parts_row", "p.M * piece.parts_row", "shrink", "behind its end|: u: |overlaps"
    ),
    "sum_of_parts_does_not_add": operators(
        "p.K, ranks, int32_t(plan.m_blocks), p.accumulate,", "p.K, ranks, int32_t(plan.m_blocks), 0,", "factor_grad", ": D: "
    ),
    "first_part_left_out": Bug(
        "parts.cu", PARTS, "for (int s = 0; s < p.splits", "for (int s = 1; s < p.splits", "shrink", ": u: "
    ),
    "second_output_from_the_first_ones_row": Bug(
        "parts.cu", PARTS, "(blockIdx.x - (is_first ? 0 : firsts)) * ROWS", "int64_t(blockIdx.x) * ROWS", "shrink_grad", ": Q: "
    ),
    "columns_of_the_padding": Bug(
        "parts.cu", PARTS, "      if (col + e >= p.cols) break;\n", "", "shrink,factor_grad", ": [uD]: |wrote outside"
    ),
    "pack_takes_columns_for_rows": Bug(
        "parts.cu", PACK, "c = down ? index / ROWS : index % COLS", "c = index % COLS", "shrink", ": u: ", shapes="all"
    ),
    # shrink
    "one_group_too_few": Bug(
        MMA, SHRINK, "ptx::cp_async_wait<STAGES - 2>();", "ptx::cp_async_wait<STAGES - 1>();", "shrink", "in flight|: u: "
    ),
    "A_stays": Bug(
        MMA, SHRINK, "a.m = 0, ++a.step, a.slot = tile::stage_after<STAGES>(a.slot);", "a.m = 0, ++a.step;", "shrink", ": u: "
    ),
    "parts_of_all_blocks_in_one_place": Bug(
        MMA, SHRINK, "(split * p.M + m0) * p.parts_row", "m0 * p.parts_row", "shrink", ": u: "
    ),
    "mask_of_the_first_columns": Bug(
        MMA, SHRINK, "int64_t(k_begin + here.step) * COLS, p.K);", "int64_t(here.step) * COLS, p.K);", "shrink", ": u: "
    ),
    "reads_before_the_wait": Bug(MMA, SHRINK, "  ptx::griddepcontrol_wait();\n", "", "shrink", EARLY),
    "next_begins_before_the_wait": Bug(
        MMA,
        SHRINK,
        "  ptx::griddepcontrol_wait();\n",
        "  ptx::griddepcontrol_launch_dependents();\n  ptx::griddepcontrol_wait();\n",
        "shrink",
        EARLY,
    ),
    "mask_of_the_next_quad": Bug(
        MMA, "tile/philox.cuh", "return bits >> shift & ", "return bits & ", "shrink,expand_add", ": [uy]: ", shapes="all"
    ),
    # expand_add
    "strips_of_other_blocks": Bug(
        MMA, EXPAND, "strip_step = int(gridDim.y) * Traits::WARPS;", "strip_step = Traits::WARPS;", "expand_add", ": y: "
    ),
    "u_stays": Bug(MMA, EXPAND, "    a.u = a.u == STAGES - 1 ? 0 : a.u + 1;\n", "", "expand_add", ": y: "),
    "columns_in_order": Bug(
        MMA, EXPAND, "group * GROUP + c / 2 * CHUNK + 2 * j + c % 2;", "group * GROUP + 8 * j + c;", "expand_add", ": y: "
    ),
    "ragged_columns_are_whole": Bug(
        MMA,
        EXPAND,
        "return a.strip < whole_strips && a.n < whole_n; };",
        "return a.strip < whole_strips; };",
        "expand_add",
        "wrote outside|: y: ",
    ),
    "bias_of_the_first_tile": Bug(
        MMA, EXPAND, "&sm.bias[here.n * COLS + c / 2 * GROUP", "&sm.bias[c / 2 * GROUP", "expand_fresh", ": y: "
    ),
    # factor_grad and what it shares with shrink_grad
    "all_pieces_in_one_place": Bug(MMA, FACTOR, "p.D + m_block * p.D_part + ", "p.D + ", "factor_grad", ": D: "),
    "columns_beyond_the_matrix": Bug(
        MMA,
        RECTANGLE,
        "return left < owned ? left : owned;",
        "return owned;",
        "factor_grad",
        ": D: |wrote outside|behind its end",
    ),
    "rows_of_v_stay": Bug(
        MMA, RECTANGLE, "p.n = 0, ++p.m, p.slot = tile::stage_after<STAGES>(p.slot);", "p.n = 0, ++p.m;", "factor_grad", ": D: "
    ),
    # shrink_grad
    "first_half_of_the_rank_twice": Bug(
        MMA, GRAD, "threadIdx.x) / 128 * (Traits::R / 2);", "threadIdx.x) * 0;", "shrink_grad", ": k: "
    ),
    "u_of_the_first_rows": Bug(
        MMA, GRAD, "    here.slot = tile::stage_after<STAGES>(here.slot);\n", "", "shrink_grad", ": Q: "
    ),
    "k_of_all_columns_in_one_place": Bug(
        MMA, GRAD, "p.k_parts + int64_t(blockIdx.x) * p.M * p.parts_row;", "p.k_parts;", "shrink_grad", ": k: "
    ),
    # fold, row_core
    "rows_of_the_first_split": Bug(
        "fold.cu", FOLD, "n0 = split * p.n_per_split,", "n0 = 0 * p.n_per_split,", "fold_grad", ": dcore"
    ),
    "step_beyond_the_sum": Bug(
        "fold.cu", SMALL, "k0 + k < K ? b(k0 + k, c) : 0.f", "b(k0 + k, c)", "fold,fold_grad", "not finite|: (F|d)"
    ),
    "rows_of_the_core_before": Bug(
        "rows.cu",
        ROWS,
        "if (begin <= row && row < end && j0 + c < p.r_out)",
        "if (row < end && j0 + c < p.r_out)",
        "row_core",
        ": h of core",
    ),
    "rows_of_the_first_split_of_a_core": Bug(
        "rows.cu", ROWS, "  begin += split * share;\n", "", "row_core_backward", r": dcores\["
    ),
    "place_of_an_equal_key": Bug(
        "rows.cu", ROWS, "(sorted + middle)) <= value)", "(sorted + middle)) < value)", "row_core_backward", ": d"
    ),
    "last_row_of_a_token": Bug(
        "rows.cu", ROWS, "place < end; ++place)", "place < end - 1; ++place)", "row_core_backward", ": du"
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if bug.unit == MMA else pytest.mark.slow) for name, bug in BUGS.items()]
)
def test_noticed(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    module = build.planted_module("plain", bug.unit, bug.file, bug.text, bug.instead, tmp_path)
    sweep = [sys.executable, str(HERE / "sweep.py"), "--module", str(module), "--shapes", bug.shapes, "--kinds", bug.kind]
    done = subprocess.run([*sweep, "--kernels", bug.kernels], capture_output=True, text=True, timeout=900)
    died = done.returncode < 0  # far outside an array
    assert died or (done.returncode and re.search(bug.message, done.stdout)), done.stdout[-3000:] + done.stderr[-3000:]
