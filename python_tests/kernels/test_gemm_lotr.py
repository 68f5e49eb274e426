"""The base product with the adapter inside (csrc/cuda/kernels/gemm_lotr.cuh), under the executor with several blocks at a time:
numbers, bits, the order of its tickets, launches one after another on one workspace, counted bytes, what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gemm_lotr_cases as gemm
import numpy as np
import pytest
from gemm_lotr_cases import Case, Inputs, new_workspace

from csrc.simt.checks.problem import schedule
from lotr_ext.ops import planner

SCHEDULES = ["forward/1", "reverse/3", "103/4"]


def run(lib, case: Case, order: str, launches: int = 2) -> list[bytes]:
    lib.set_options(**schedule(order))
    try:
        return gemm.run(lib, case, launches)
    finally:
        lib.set_options()


@pytest.mark.parametrize("case", gemm.QUICK, ids=str)
def test_numbers_and_bits(lib, case: Case) -> None:
    """Right against float64, the same bits whoever does which tile, however many blocks run at a time, with clusters or not."""
    first = run(lib, case, SCHEDULES[0])
    for order in SCHEDULES[1:]:
        assert run(lib, case, order) == first, order
    first = gemm.without_Q(case, first)
    if case.factor:
        assert run(lib, replace(case, factor=""), SCHEDULES[1]) == first
    if case.cluster == 2:
        other = replace(case, cluster=1, scouts=1, band_group=3, sms=2)
        assert gemm.without_Q(other, run(lib, other, "2/2")) == first


@pytest.mark.full
@pytest.mark.parametrize("case", gemm.ALL, ids=str)
def test_numbers_and_bits_of_all(lib, case: Case) -> None:
    bits = {
        tuple(gemm.without_Q(case, run(lib, replace(case, cluster=cluster, sms=sms, scouts=scouts), f"{seed}/{resident}")))
        for seed, (cluster, sms, scouts, resident) in enumerate(
            [(1, 1, 1, 1), (1, 2, 1, 2), (1, 5, None, 3), (1, 132, 2, 4), (2, 2, 1, 1), (2, 4, None, 2), (2, 132, 3, 3)], 2
        )
    }
    assert len(bits) == 1


def test_nan_stays_in_its_row(lib) -> None:
    case = Case(140, 40, 72, 5)
    inputs = Inputs(case)
    inputs.x[7, 3] = 0x7FC0
    out = inputs.launch(lib_options(lib), new_workspace(lib, case.m))
    bad = np.isnan(gemm.wide(out["y"])).any(1)
    assert bad.tolist() == [i == 7 for i in range(case.m)]
    assert not out["u"][:, 5:].any()


def lib_options(lib):
    lib.set_options(**schedule("forward/1"))
    return lib


def test_order_of_tickets(lib) -> None:
    """Why it cannot deadlock: every tile once, and the scout of its band once, in an earlier ticket; the sums of Q, which wait
    for all scouts, last; a scout waits for nobody. So of all tickets that are not finished, the lowest can go on."""
    for bands in range(1, 15):
        for columns in range(1, 6):
            tiles = {(band, column) for band in range(bands) for column in range(columns)}
            for scouts in range(1, bands + 1):
                for group, sums in ((1, 0), (2, 1), (3, 5), (8, 2)):
                    work = lib.gemm_lotr_tickets(bands, columns, scouts, group, sums)
                    assert sorted({ticket for ticket, _, _ in work}) == list(range(scouts + len(tiles) + sums))
                    scout = {band: ticket for ticket, band, column in work if column == -1}
                    assert len(work) == bands + len(tiles) + sums and set(scout) == set(range(bands))
                    assert {(band, column) for _, band, column in work if column >= 0} == tiles
                    assert all(scout[band] < ticket for ticket, band, column in work if column >= 0)
                    last = [(ticket, number) for ticket, number, column in work if column == -2]
                    assert last == [(scouts + len(tiles) + i, i) for i in range(sums)]


def test_bands_of_a_group_are_walked_together(lib) -> None:
    """So that W's tile is fetched from memory once for the group and found in L2 by the others."""
    work = lib.gemm_lotr_tickets(5, 3, 2, 2)
    assert [(band, column) for _, band, column in work[5:]] == [
        *[(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)],
        *[(2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2)],
        *[(4, 0), (4, 1), (4, 2)],
    ]
    assert [(ticket, band) for ticket, band, _ in work[:5]] == [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3)]


@pytest.mark.parametrize("order", SCHEDULES)
def test_other_shapes_on_the_same_workspace(lib, order: str) -> None:
    """Nobody clears it: the flags of an earlier launch, of more rows or fewer, forward or backward, are of another epoch."""
    cases = [
        Case(300, 264, 72, 16, sms=3),
        Case(20, 264, 72, 16, sms=3),
        Case(390, 136, 40, 33, backward=True, cluster=2),
        Case(390, 264, 72, 16, sms=2),
        Case(130, 40, 40, 100, "fp16", cluster=2),
        Case(300, 264, 72, 16, sms=3),
    ]
    lib.set_options(**schedule(order))
    workspace = new_workspace(lib, 390)
    for launch, case in enumerate(cases):
        inputs = Inputs(case, launch)
        inputs.check(inputs.launch(lib, workspace))
        assert workspace[0] == 0 and workspace[1] == launch + 1
    lib.set_options()


@pytest.mark.parametrize("before, epochs", [(-1, (1, 2)), (-2, (-1, 1, 2))])
def test_the_epoch_after_the_last(lib, before: int, epochs: tuple[int, ...]) -> None:
    """0 is what flags hold that were never set, so no launch has that number."""
    lib.set_options(**schedule("103/3"))
    case = Case(260, 40, 40, 5, sms=3)
    workspace = new_workspace(lib, case.m)
    workspace[1] = before
    for epoch in epochs:
        inputs = Inputs(case, epoch)
        inputs.check(inputs.launch(lib, workspace))
        assert workspace[1] == epoch
    lib.set_options()


def test_workspaces_of_streams(lib) -> None:
    """A stream has one of its own, always the same; none where there are no more, or none so large."""
    bytes_ = lib.gemm_lotr_workspace(1 << 18)
    places = [lib.gemm_lotr_workspace_of(stream, bytes_ if stream % 2 else 8) for stream in range(1, 200)]
    assert [lib.gemm_lotr_workspace_of(stream, 8) for stream in range(1, 200)] == places
    own = [place for place in places if place]
    assert len(own) == 128 and own == places[:128] and lib.gemm_lotr_workspace_of(1, lib.gemm_lotr_workspace(1 << 19)) == 0
    assert all(b - a >= bytes_ for a, b in itertools.pairwise(own))


def moved_by(lib, case: Case) -> tuple[dict[str, tuple[int, int]], dict]:
    """(bytes read, bytes written) of each array in one launch, and all counters."""
    lib.set_options(**{**schedule("forward/3"), "count_memory": True})
    lib.reset_counters()
    Inputs(case).launch(lib, new_workspace(lib, case.m), packed=True)
    counters = lib.counters()
    lib.set_options()
    return {name: (a["read_bytes"], a["written_bytes"]) for name, a in counters["arrays"].items()}, counters


@pytest.mark.parametrize("cluster", [1, 2])
def test_bytes_of_Q(lib, cluster: int) -> None:
    """g is read no more often for it: the scouts write a sum for each ticket and block, add to it, and that is read once."""
    m, n, k, r, scouts = 1024, 256, 256, 16, 2
    case = Case(m, n, k, r, backward=True, cluster=cluster, sms=6, scouts=scouts, factor="new")
    moved, counters = moved_by(lib, case)
    bands, one = m // 128, 4 * r * k  # bytes of one Q
    assert moved["x"] == (2 * 2 * m * k, 0)
    assert moved["u_forward"] == (2 * 2 * m * r, 0)  # by each warpgroup
    assert moved["Q"] == (0, one)
    assert moved["partial"] == ((bands - scouts * cluster) * one + scouts * cluster * one, bands * one)
    assert lib.gemm_lotr_partial(m, k, r, cluster, scouts) == scouts * cluster * one
    assert [launch["name"] for launch in counters["launches"]] == ["gemm_lotr"]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_bytes(lib, backward: bool, cluster: int) -> None:
    """y is written once and never read, u written once; the rest as often as the tiles need it, no byte more."""
    m, n, k, r = 512, 512, 128, 16
    case = Case(m, n, k, r, backward=backward, cluster=cluster, sms=6)
    moved, counters = moved_by(lib, case)
    columns, bands = n // 256, m // 128
    assert moved["y"] == (0, 2 * m * n)
    assert moved["u"] == (columns * 2 * m * r, 2 * m * r)
    assert moved["x"] == ((columns + 1) * 2 * m * k, 0)
    assert moved["W"] == (bands // cluster * 2 * n * k, 0)
    assert moved["F"] == (bands // cluster * 2 * n * r, 0)
    assert moved["At"] == (bands * 2 * r * k, 0)
    assert counters["arrays"]["y"]["written_sectors"] * 32 == 2 * m * n
    assert counters["shared_wavefronts"] == counters["shared_phases"]
    assert [launch["name"] for launch in counters["launches"]] == ["gemm_lotr"]


def changed(**arguments) -> tuple[dict, dict]:
    """Arguments of a call that works, with some of them changed."""
    inputs = Inputs(Case(20, 24, 16, 5))
    y, u = np.zeros((20, 24), np.uint16), np.zeros((20, 8), np.uint16)
    call = {"y": y, "x": inputs.x, "W": inputs.weight, "At": inputs.At, "F": inputs.F, "u": u}
    return {**call, "workspace": np.zeros(6, np.int32), **arguments}


def wide_rows(rows: int, cols: int, stride: int, start: int = 0) -> np.ndarray:
    raw = np.zeros(rows * stride + 64, np.uint16)
    first = -(raw.ctypes.data // 2) % 8 + start
    return raw[first : first + rows * stride].reshape(rows, stride)[:, :cols]


REFUSED = [
    ({"x": wide_rows(20, 16, 20)}, r"x: expected a row stride that is a multiple of 8 and at least 16, got 20"),
    ({"x": wide_rows(20, 16, 24, 4)}, r"x: expected an address divisible by 16"),
    ({"x": wide_rows(16, 20, 24).T}, r"x: expected a column stride of 1, got 24"),
    ({"W": wide_rows(24, 16, 17)}, r"W: expected a row stride that is a multiple of 8 and at least 16, got 17"),
    ({"At": wide_rows(5, 16, 18)}, r"At: expected a row stride .*, got 18"),
    ({"F": wide_rows(24, 5, 5)}, r"F: expected a row stride that is a multiple of 8 and at least 5, got 5"),
    ({"u": wide_rows(20, 5, 5)}, r"u: expected a row stride that is a multiple of 8 and at least 8, got 5"),
    ({"At": wide_rows(129, 16, 16)}, f"r: expected 1 to {planner.FUSED_MAX_RANK}, got 129"),
    ({"workspace": np.zeros(5, np.int32)}, r"workspace: expected at least 24 bytes, got 20"),
    ({"cluster": 3}, r"cluster: expected 1 or 2, got 3"),
    ({"scouts": 0}, r"scouts: expected 1 or more, got 0"),
    ({"band_group": 0}, r"band_group: expected 1 or more, got 0"),
    ({"multiprocessors": 1, "cluster": 2}, r"multiprocessors: expected at least those of a cluster, got 1"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[m.split(":")[0] + str(i) for i, (_, m) in enumerate(REFUSED)])
def test_refused_before_anything_is_written(lib, arguments: dict, message: str) -> None:
    call = changed(**arguments)
    with pytest.raises(ValueError, match=rf"gemm_lotr: {message}"):
        lib.gemm_lotr(**call)
    assert not call["y"].any() and not call["u"].any() and not call["workspace"].any()
    floats = {name: np.zeros(call[name].shape, np.float32) for name in ("y", "x", "W", "At", "F", "u")}
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float16, got float32"):
        lib.gemm_lotr(**{**call, **floats})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backward": False}, "Q: expected none in the forward pass, got one"),
        ({"At": wide_rows(17, 16, 16)}, "Q: expected a rank up to 16, got 17"),
        ({"u_forward": np.zeros((5, 20), np.uint16).T}, "u of the forward pass: expected a column stride of 1, got 20"),
        ({"partial_bytes": 4095}, "partial: expected at least 4096 bytes, got 4095"),
        ({"partial_bytes": 0}, "partial: expected at least 4096 bytes, got 0"),
    ],
)
def test_Q_refused(lib, change: dict, message: str) -> None:
    call = changed(u_forward=np.zeros((20, 5), np.uint16), Q=np.zeros((16, 5), np.float32), backward=True)
    call |= {"W": wide_rows(16, 24, 24), "F": wide_rows(24, 5, 24), "u": np.zeros((20, 24), np.uint16), **change}
    if not call["backward"]:
        call["W"] = wide_rows(24, 16, 16)
    with pytest.raises(ValueError, match=f"gemm_lotr: {message}"):
        lib.gemm_lotr(**call)
    assert not any(call[name].any() for name in ("y", "u", "Q", "workspace"))
