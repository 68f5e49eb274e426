"""Bugs planted into copies of csrc/cuda/kernels/shrink_grad_wgmma.cuh, one at a time: each is noticed by the means named here.
What is merely left out, a barrier or a wait, is the business of mutate_kernels.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import run_planted

FILE = "kernels/shrink_grad_wgmma.cuh"

# name: text, what stands there instead, what a failure must say
BUGS: dict[str, tuple[str, str, str]] = {
    "wrong_rows": ("own.g[16 * c], 0), true)", "own.g[8 * c], 0), true)", ": Q: "),
    "both_take_the_first_stage": ("s_.stage[first + group_]", "s_.stage[first]", ": Q: "),
    "the_first_block_sums_for_all": ("int(ptx::cluster_rank()) * share", "0", ": k: "),
    "sums_of_clusters_in_one_place": ("int(blockIdx.x) / p_.cluster", "0", ": k: "),
    "the_rows_of_the_other_group": ("s_.k[4 * group_ + warp_]", "s_.k[4 * (1 - group_) + warp_]", ": k: "),
    "a_block_of_the_cluster_forgotten": ("first * tile::FRAGMENT, splits,", "first * tile::FRAGMENT, splits - 1,", ": Q: "),
    "bytes_of_F_forgotten": ("with_F * uint32_t(sizeof(Smem::F[0]))", "0", "in flight|deadlock"),
    "released_before_the_wait": (
        "release(LAST ? first : last)",
        "release(first)",
        "more arrivals|deadlock|: [kQ]: ",
    ),
    "another_column_tile_stored": ("if constexpr (LAST) store_Q(Q[n], n)", "if constexpr (LAST) store_Q(Q[n], 0)", ": Q: "),
    "rows_of_F_as_long_as_a_panel": (
        "swizzled_descriptor_mn<R>(F + c * R, 0)",
        "swizzled_descriptor_mn<R>(F + c * 64, 0)",
        ": k: ",
    ),
    "the_swizzle_of_a_whole_panel": ("swizzled_descriptor_mn<R>(", "swizzled_descriptor_mn<64>(", "no canonical layout"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BUGS)
def test_noticed(name: str, tmp_path: Path) -> None:
    text, instead, message = BUGS[name]
    sweep = ["sweep.py", "--shapes", "pipeline", "--kinds", "bf16", "--kernels", "shrink_grad_wgmma"]
    status, found, output = run_planted("shrink_grad_sm90.cu", FILE, text, instead, message, sweep, tmp_path)
    assert status == 1 and found, output
    print(found[0])
