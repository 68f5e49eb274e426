"""shrink and factor_grad by wgmma (csrc/cuda/kernels/one_product_wgmma.cuh): where they run, and what they move.

Their numbers, bits, races and left-out barriers are tested with those of all kernels (cases.py), their compiled code in
test_compiled.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_kernels import bits, in_turn

from bench.projection import counts
from csrc.simt.checks.arrays import ALIGNED, ODD, PACKED
from csrc.simt.checks.cases import factor_grad, filled, shrink, shrink_core, shrink_grad
from csrc.simt.checks.shapes import Shape

THREADS = 160
SCHEDULES = [
    {"order": "reverse"},
    {"order": "in_turn", "resident": 5},
    {"order": "random", "seed": 3, "resident": 3, "preempt": 8},
]


def launched(lib, shape: Shape, kind: str = "bf16", make=shrink) -> tuple[int, int, int]:
    """Blocks, cluster and threads of the one launch, whose numbers are right."""
    lib.set_options()
    lib.reset_counters()
    problem = make(shape, kind)
    problem.check(problem.run(lib))
    (launch,) = [one for one in lib.counters()["launches"] if one["name"] != "pack"]
    return launch["grid"][0], launch["cluster"][0], launch["block"][0]


GRIDS = [  # m, k, r, blocks, cluster
    (64, 500, 64, 4, 4),  # three blocks of the cluster have no token
    (300, 500, 64, 8, 4),
    (257, 1100, 33, 8, 4),
    (700, 65, 1, 12, 4),
    (129, 900, 16, 4, 4),
    (190, 31, 24, 4, 4),
    (200, 70, 48, 4, 4),
    (64, 300, 128, 2, 2),
    (300, 1300, 128, 6, 2),
    (321, 129, 65, 6, 2),
    (128, 200, 100, 2, 2),
]
LAYOUTS = {"aligned": ALIGNED, "packed": PACKED, "odd": ODD}
VALUES = [("bf16", "aligned"), ("fp16", "packed"), ("bf16", "odd"), ("fp16", "aligned"), ("bf16", "packed"), ("fp16", "odd")]


@pytest.mark.parametrize("m, k, r, blocks, cluster, kind, layout", in_turn(GRIDS, VALUES, 3))
def test_clusters(lib, m: int, k: int, r: int, blocks: int, cluster: int, kind: str, layout: str) -> None:
    """Whole clusters, and the same bits whichever blocks run together."""
    own = LAYOUTS[layout]
    across = Shape(max(k, 500), m, r, own, sms=filled(m), wgmma=True)  # as many columns as shrink has tokens
    for make, out, shape in ((shrink, "u", Shape(m, k, r, own, sms=filled(m), wgmma=True)), (factor_grad, "D", across)):
        assert launched(lib, shape, kind, make) == (blocks, cluster, THREADS)
        problem, first = make(shape, kind), b""
        for schedule in SCHEDULES:
            lib.set_options(**schedule)
            found = bits(problem.run(lib)[out])
            first = first or found
            assert found == first, (out, schedule)


@pytest.mark.parametrize("r", range(1, 129, 9))
def test_ranks(lib, r: int) -> None:
    assert launched(lib, Shape(130, 200, r, sms=4, wgmma=True))[2] == THREADS
    if r > 16:  # else of so few columns it is a matter of chance
        assert launched(lib, Shape(200, 130, r, sms=4, wgmma=True), make=factor_grad)[2] == THREADS


def test_where_it_does_not_run(lib) -> None:
    shape = Shape(600, 500, 64, sms=12, wgmma=True)
    assert launched(lib, shape)[2] == THREADS
    assert launched(lib, Shape(600, 500, 64, sms=12))[2] == 256
    assert launched(lib, shape, "fp32")[2] == 256
    assert launched(lib, shape, make=shrink_core)[2] == 256
    assert launched(lib, Shape(600, 500, 64, p=0.5, sms=12, wgmma=True))[2] == 256
    assert launched(lib, Shape(600, 500, 129, sms=12, wgmma=True))[2] == 256
    assert launched(lib, Shape(63, 500, 64, sms=12, wgmma=True))[2] == 256
    assert launched(lib, Shape(600, 2000, 16, wgmma=True))[2] == 256  # few tokens for 132 multiprocessors
    for shape in (
        Shape(500, 600, 64, sms=12),
        Shape(500, 600, 64, p=0.5, sms=12, wgmma=True),
        Shape(63, 600, 64, sms=12, wgmma=True),
    ):
        assert launched(lib, shape, make=factor_grad)[2] == 256
    assert launched(lib, Shape(2000, 600, 16, wgmma=True), make=factor_grad)[2] == 256  # few columns


def test_a_scaling_and_rows_with_a_stride(lib) -> None:
    """Rows of x and u that are parts of longer ones; what lies beside u stays."""
    rng = np.random.default_rng(0)
    x, A = rng.normal(size=(300, 400)).astype(np.float16), rng.normal(size=(201, 24)).astype(np.float16)
    u = np.full((300, 40), 7, np.float16)
    lib.set_device(multiprocessors=8, wgmma=True)
    lib.set_options()
    lib.reset_counters()
    lib.shrink(x[:, 64:265], A[:, 8:21], u[:, 16:29], scale=0.25)
    assert lib.counters()["launches"][-1]["block"][0] == THREADS
    truth = 0.25 * x[:, 64:265].astype(np.float64) @ A[:, 8:21].astype(np.float64)
    assert np.abs(u[:, 16:29] - truth).max() < 2e-3 * np.abs(truth).max()
    assert (u[:, :16] == 7).all() and (u[:, 29:] == 7).all()


def test_D_of_any_strides(lib) -> None:
    """x and v with a stride; D is added to, and whatever lies beside it stays."""
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(301, 400)).astype(np.float16), rng.normal(size=(301, 40)).astype(np.float16)
    truth = 7 + x[:, 64:265].astype(np.float64).T @ v[:, 8:21].astype(np.float64)
    lib.set_device(multiprocessors=4, wgmma=True)
    lib.set_options()
    for whole in (np.full((201, 40), 7, np.float32), np.full((40, 201), 7, np.float32).T):
        lib.reset_counters()
        lib.factor_grad_(whole[:, 16:29], x[:, 64:265], v[:, 8:21])
        assert lib.counters()["launches"][-1]["block"][0] == THREADS
        assert np.abs(whole[:, 16:29] - truth).max() < 1e-5 * np.abs(truth).max()
        assert (whole[:, :16] == 7).all() and (whole[:, 29:] == 7).all()


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["Q is written", "Q is added to"])
def test_shrink_grad_beyond_its_ranks_is_both(lib, p: float) -> None:
    lib.set_options()
    lib.reset_counters()
    problem = shrink_grad(Shape(200, 220, 100, p=p, sms=4, wgmma=True), "bf16")
    problem.check(problem.run(lib))
    launches = [(one["name"], one["block"][0]) for one in lib.counters()["launches"]]
    assert launches[-2:] == [("shrink", THREADS), ("factor_grad", THREADS)]


def test_rows_that_bulk_copies_cannot_read(lib) -> None:
    """More than 2^30 elements apart, or all the same one, as in a gradient that is expanded."""
    far = lib.sparse_array((128, (1 << 30) + 8), np.dtype(np.uint16))[:, :64]
    same = np.broadcast_to(np.zeros(64, np.uint16), (128, 64))
    A, u, F, Q = *(np.zeros((rows, 64), np.uint16) for rows in (64, 128, 64)), np.zeros((64, 64), np.float32)
    kernels = (
        lambda x: lib.shrink(x, A, u),
        lambda x: lib.shrink_grad(x, F, u, u.copy(), Q),
        lambda x: lib.factor_grad_(Q, x, u),
    )
    lib.set_options()
    lib.set_device(multiprocessors=4, wgmma=True)
    plain = np.zeros((128, 64), np.uint16)
    for x, bulk in ((plain, True), (far, False), (same, False)):
        for run in kernels:
            lib.reset_counters()
            run(x)
            assert lib.counters()["launches"] and (lib.counters()["bulk_bytes"] > 0) == bulk


def test_an_expanded_gradient_after_a_dense_one_has_the_workspace_of_its_own_kernels(lib) -> None:
    """Beyond shrink_grad's ranks: of the dense one wgmma makes both products, without sums; of the other neither."""
    m, n, r = 256, 512, 100
    F, u = np.zeros((n, r), np.float16), np.zeros((m, r), np.float16)
    dense = np.zeros((m, n), np.float16)
    lib.set_options()
    lib.set_device(multiprocessors=64, wgmma=True)
    lib.forget()
    blocks = []
    for g in (dense, np.broadcast_to(dense[:1], dense.shape), dense):
        lib.reset_counters()
        lib.shrink_grad(g, F, u, np.zeros((m, r), np.float16), np.zeros((n, r), np.float32))  # looks behind the workspace
        blocks.append([one["block"][0] == THREADS for one in lib.counters()["launches"] if one["name"] != "pack"])
    assert blocks == [[True, True], [False, False], [True, True]]


@pytest.mark.parametrize("r, cluster", [(16, 4), (64, 4), (128, 2)])
def test_bytes(lib, plan, r: int, cluster: int) -> None:
    """x once, A once for each cluster, no sums and nothing waited for; what multicast brings is counted where it arrives."""
    plan("shrink wgmma=1; factor_grad wgmma=1")
    m, k = 4096, 512
    row = counts.count(lib, "shrink", m, k, r, wgmma=True)
    machine, tiles = row.machine, m // 64
    assert (row.blocks, machine["multiply"], machine["cluster"]) == (tiles, 4, cluster)
    assert row.once <= 1.02 and row.partials == 0
    assert row.factors == tiles // cluster * 2 * k * r
    assert machine["bulk_bytes"] == 2 * m * k + tiles * 2 * k * r
    assert machine["late_loads"] == machine["cluster_loads"] == machine["atomics"] == machine["memsets"] == 0
    assert machine["late_stored"] == 2 * 64 * r
    assert row.sector_efficiency >= 0.95 and row.bank_conflicts <= 1.05
    down = counts.count(lib, "factor_grad", k, m, r, wgmma=True)
    assert (down.blocks, down.once, down.partials, down.factors) == (row.blocks, 1.0, 0, row.factors)
    assert down.machine["bulk_bytes"] == machine["bulk_bytes"] and down.machine["late_stored"] == 4 * 64 * r
    assert down.machine["last_loads"] == down.machine["last_shared"] == 0  # D came while the products were made


def test_plan_of_a_large_layer(lib) -> None:
    """A block for each row tile where they fill the GPU; where they do not, splits."""
    lib.set_device(wgmma=True)
    plan, few = (lib.plan("shrink", m, 4096, 64) for m in (8192, 1024))
    lib.set_device()
    other = lib.plan("shrink", 8192, 4096, 64)
    assert (plan["m_blocks"], plan["n_blocks"]) == (128, 1) and few["n_blocks"] > 1
    assert plan["extra_bytes"] < other["extra_bytes"] and plan["microseconds"] < other["microseconds"]
