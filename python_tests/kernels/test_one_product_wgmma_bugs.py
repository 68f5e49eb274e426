"""Bugs planted into copies of csrc/cuda/kernels/one_product_wgmma.cuh, one at a time: each is noticed by the means named here.
What is merely left out, a barrier or a wait, is the business of mutate_kernels.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import run_planted

FILE = "kernels/one_product_wgmma.cuh"

# name: text, what stands there instead, what a failure must say
BUGS: dict[str, tuple[str, str, str]] = {
    "wrong_panel": ("sizeof(stage.factor[0])),", "1024),", ": u: "),
    "the_swizzle_of_a_whole_panel": (
        "swizzled_descriptor_mn<Traits::PANEL>(",
        "swizzled_descriptor_mn<64>(",
        "no canonical layout",
    ),
    "each_block_fetches_the_first_share": ("int(ptx::cluster_rank()) * Traits::SHARE", "0", ": u: |NaN"),
    "rows_of_another_share": ("i * ROWS + share, full,", "i * ROWS, full,", ": u: "),
    "a_share_for_this_block_alone": ("(1 << Traits::CLUSTER) - 1)", "1 << ptx::cluster_rank())", "deadlock|in flight"),
    "given_back_to_this_block_alone": ("if (lane < TOGETHER * CLUSTER)", "if (lane == ptx::cluster_rank())", "deadlock"),
    "given_back_before_the_wait": (
        "      ptx::wgmma_wait<1>();\n      if (i > 0) release(last);",
        "      release(at.stage);\n      ptx::wgmma_wait<1>();",
        "more arrivals|deadlock|: u: ",
    ),
    "stored_before_the_last_product": ("    ptx::wgmma_wait<0>();\n", "", "wgmma in flight"),
    "the_first_step_adds_to_nothing": ("i + row > 0);", "true);", ": u: |NaN"),
    "what_D_was_forgotten": ("if (p.accumulate) each(", "if (false) each(", ": D: "),
    "columns_of_the_next_block": ("Traits::DOWN ? first() : i * COLS", "Traits::DOWN ? first() + COLS : i * COLS", ": D: "),
    "a_step_too_few": ("(length + TOGETHER * ROWS - 1) /", "length /", ": [uD]: |deadlock"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", BUGS)
def test_noticed(name: str, tmp_path: Path) -> None:
    text, instead, message = BUGS[name]
    sweep = ["sweep.py", "--shapes", "pipeline", "--kinds", "bf16", "--kernels", "shrink_wgmma,factor_grad_wgmma"]
    status, found, output = run_planted("one_product_sm90.cu", FILE, text, instead, message, sweep, tmp_path)
    assert status == 1 and found, output
    print(found[0])
