"""row_core's kernels beside their numbers (cases.py): indices that do not exist, empty problems, launches and bytes."""

from __future__ import annotations

import numpy as np

from bench.projection.counts import aligned

C, R = 4, 16
NAN = np.float32("nan")


def case(rows: int, tokens: int, cores: int = C, r: int = R) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    index, token = rng.integers(0, cores, rows), rng.integers(0, tokens, rows)
    return {"u": draw(tokens, r), "cores": draw(cores, r, r), "g": draw(rows, r), "index": index, "token": token}


def forward(lib, given: dict, **keywords: object) -> np.ndarray:
    h = np.full(given["g"].shape, NAN)
    lib.row_core(given["u"], given["cores"], given["index"], None, given["token"], 1.0, h, **keywords)
    return h


def backward(lib, given: dict, **keywords: object) -> tuple[np.ndarray, np.ndarray]:
    du, dcores = np.full(given["u"].shape, NAN), np.full(given["cores"].shape, NAN)
    rows = (given["index"], None, given["token"])
    lib.row_core_backward(given["g"], given["u"], given["cores"], *rows, 1.0, du, dcores, **keywords)
    return du, dcores


def test_rows_whose_core_or_token_does_not_exist(lib) -> None:
    """NaN, and no gradient: what the others have is as if these rows were not there."""
    for seed in (1, 2):
        lib.set_options(order="random", seed=seed)
        given = case(50, 9)
        given["index"][[3, 20, 30]] = -2, C, 2**40
        given["token"][[7, 21, 40]] = -1, 9, -(2**40)
        given["index"][11] = -1
        bad = np.isin(np.arange(50), [3, 20, 30, 7, 21, 40])
        h = forward(lib, given)
        assert np.isnan(h[bad]).all() and not np.isnan(h[~bad]).any() and not h[11].any()
        kept = given | {name: given[name][~bad] for name in ("g", "index", "token")}
        np.testing.assert_array_equal(h[~bad], forward(lib, kept))
        for got, want in zip(backward(lib, given), backward(lib, kept), strict=True):
            np.testing.assert_array_equal(got, want)
    lib.set_options()


def test_no_row_and_no_token(lib) -> None:
    for rows, tokens in ((0, 3), (0, 0)):
        given = case(rows, max(tokens, 1))
        given["u"] = given["u"][:tokens]
        assert forward(lib, given).shape == (rows, R)
        du, dcores = backward(lib, given)
        assert not du.any() and not dcores.any()


def test_many_cores_of_which_few_have_rows(lib) -> None:
    given = case(40, 10, 3000, 4)
    h, (du, dcores) = forward(lib, given), backward(lib, given)
    for i, (core, token) in enumerate(zip(given["index"], given["token"], strict=True)):
        np.testing.assert_allclose(h[i], given["u"][token] @ given["cores"][core], rtol=1e-5, atol=1e-5)
    assert not np.delete(dcores, given["index"], 0).any() and dcores[given["index"]].any((1, 2)).all()
    assert np.isfinite(du).all()


def test_launches_and_bytes(lib) -> None:
    """Sorted rows read a and write h once, and a core once a block of 32 rows, an index once: nothing a row but its own."""
    rows, cores = 4096, 8
    given = case(rows, rows, cores)
    given["index"], given["token"] = np.sort(given["index"]), None
    lib.set_options(count_memory=True)
    lib.reset_counters()
    forward(lib, given, multiprocessors=16)
    counts = lib.counters()
    (launch,) = counts["launches"]
    assert launch["name"] == "row_core" and launch["grid"] == (rows // 32, 1, 1)
    arrays = counts["arrays"]
    assert arrays["u"]["read_bytes"] == arrays["h"]["written_bytes"] == rows * R * 4
    assert arrays["index"]["read_bytes"] == rows * 8
    assert arrays["cores"]["read_bytes"] <= (rows // 32 + cores - 1) * R * R * 4  # a run of a core in each block, or two
    lib.reset_counters()
    backward(lib, given, multiprocessors=16)
    counts = lib.counters()
    assert [launch["name"] for launch in counts["launches"]] == ["row_core", "row_ends", "row_core_grad"]
    assert counts["arrays"]["dcores"]["written_bytes"] == cores * R * R * 4 and counts["arrays"]["dcores"]["read_bytes"] == 0
    assert counts["arrays"]["u"]["read_bytes"] == rows * R * 4
    lib.set_options()


def test_neighbours_of_a_core_are_read_together(lib) -> None:
    """Forward and backward, of cores in either layout: whole sectors, where a core read across takes one a number."""
    given = case(640, 640)
    rows, columns = aligned((C, R, R), np.float32), aligned((C, R, R), np.float32).mT  # as torch's allocator gives them
    lib.set_options(count_memory=True)
    for cores in (rows, columns):
        cores[...] = given["cores"]
        for run in (forward, backward):
            lib.reset_counters()
            run(lib, given | {"cores": cores}, multiprocessors=16)
            counted = lib.counters()["arrays"]["cores"]
            assert 0 < 32 * counted["read_sectors"] <= 1.01 * counted["read_bytes"], (run.__name__, cores.strides)
    lib.reset_counters()
    lib.fold(given["u"], rows, 1.0, np.full((C, 640, R), NAN))  # which reads G^T as the backward does
    counted = lib.counters()["arrays"]["cores"]
    assert 0 < 32 * counted["read_sectors"] <= 1.01 * counted["read_bytes"]
    lib.set_options()
