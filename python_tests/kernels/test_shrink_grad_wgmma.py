"""shrink_grad by wgmma (csrc/cuda/kernels/shrink_grad_wgmma.cuh): where it runs, and what it moves.

Its numbers, bits, races and left-out barriers are tested with those of all kernels (cases.py), its compiled code in
test_compiled.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_kernels import bits, in_turn

from bench.projection import counts
from csrc.simt.checks.cases import shrink_grad
from csrc.simt.checks.shapes import Shape

SCHEDULES = [
    {"order": "reverse"},
    {"order": "in_turn", "resident": 5},
    {"order": "random", "seed": 3, "resident": 3, "preempt": 8},
    {"order": "reverse", "room": 0},  # no room for all blocks at the same time
]


def launched(lib, shape: Shape, kind: str = "bf16") -> dict:
    """The one launch, whose numbers are right."""
    lib.set_options()
    lib.reset_counters()
    problem = shrink_grad(shape, kind)
    problem.check(problem.run(lib))
    (launch,) = [one for one in lib.counters()["launches"] if one["name"] != "pack"]
    return launch | {"bulk": lib.counters()["bulk_bytes"] > 0}


GRIDS = [  # m, n, r, sms, grid, cluster
    (300, 500, 64, 132, (4, 3), 1),
    (1100, 700, 33, 132, (6, 9), 2),
    (257, 500, 40, 18, (4, 3), 4),
    (700, 1000, 16, 132, (8, 6), 8),
    (513, 2000, 64, 36, (16, 2), 8),
    (128, 1300, 16, 18, (6, 1), 2),
    (700, 300, 9, 18, (2, 6), 2),
    (900, 1300, 48, 2, (3, 1), 1),
    (1500, 90, 50, 132, (1, 12), 1),
]


@pytest.mark.parametrize(
    "m, n, r, sms, grid, cluster, kind, p", in_turn(GRIDS, [("bf16", 0.0), ("fp16", 0.5), ("fp16", 0.0), ("bf16", 0.5)], 2)
)
def test_clusters(
    lib, plan, m: int, n: int, r: int, sms: int, grid: tuple[int, int], cluster: int, kind: str, p: float
) -> None:
    """Clusters along N, and all blocks at the same time where M has several pieces; the numbers and bits are the same whichever
    blocks run together, adding or not."""
    shape = Shape(m, n, r, p=p, sms=sms, wgmma=True)
    plan(f"shrink_grad wgmma=1 n_blocks={grid[0]} m_blocks={grid[1]} of_row={cluster}")
    launch = launched(lib, shape, kind)
    assert (launch["grid"][:2], launch["cluster"][0], launch["bulk"]) == (grid, cluster, True)
    assert launch["cooperative"] == (grid[1] > 1) and launch["early"] == (grid[1] == 1)
    problem, first = shrink_grad(shape, kind), {}
    for schedule in SCHEDULES:
        lib.set_options(**schedule)
        found = {name: bits(a) for name, a in problem.run(lib).items()}
        first = first or found
        assert found == first, schedule


def test_where_it_does_not_run(lib) -> None:
    shape = Shape(600, 500, 64, wgmma=True)
    assert launched(lib, shape)["bulk"]
    assert not launched(lib, Shape(600, 500, 64))["bulk"]
    assert not launched(lib, shape, "fp32")["bulk"]
    assert not launched(lib, Shape(127, 500, 64, wgmma=True))["bulk"]
    g, F, u, k, Q = (np.zeros(size, np.uint16) for size in ((600, 500), (500, 65), (600, 65), (600, 65), (500, 65)))
    lib.set_device(wgmma=True)
    lib.reset_counters()
    lib.shrink_grad(g, F, u, k, Q.astype(np.float32))
    assert {one["name"] for one in lib.counters()["launches"]} >= {"shrink", "factor_grad"}


@pytest.mark.parametrize("m, n", [(1024, 1024), (2048, 1024)])
def test_bytes(lib, m: int, n: int) -> None:
    row, other = (counts.count(lib, "shrink_grad", m, n, 64, wgmma=wgmma) for wgmma in (True, False))
    assert row.machine["multiply"] == 8 and row.machine["bulk_bytes"] > 2 * m * n
    assert row.once <= 1.02
    assert row.over_least <= 1.25 and row.factors + row.partials < other.factors + other.partials
    assert row.sector_efficiency >= 0.95 and row.bank_conflicts <= 1.05
    last = 4 * 64 * 128  # after the last products: Q's partial sums of a column tile; and results
    assert last <= row.machine["late_stored"] <= 1.5 * last
    assert row.machine["cluster_total"] == 4 * 64 * m * row.machine["grid"][0]  # k's sums, each read once
    assert last <= row.machine["cluster_bytes"] <= 2 * last  # of the last row tile, and what waits for it


def test_plan_of_a_large_layer(lib) -> None:
    """Clusters that any H100 holds side by side, and half of the other kernel's partial sums."""
    lib.set_device(wgmma=True)
    plan = lib.plan("shrink_grad", 8192, 4096, 64)
    lib.set_device()
    other = lib.plan("shrink_grad", 8192, 4096, 64)
    assert (plan["m_blocks"], plan["n_blocks"], plan["of_row"], plan["together"]) == (7, 16, 8, True)
    assert plan["extra_bytes"] < 0.65 * other["extra_bytes"] and plan["microseconds"] < other["microseconds"]
