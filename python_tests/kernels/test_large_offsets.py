"""Matrices of more than 2^31 elements, as sparse maps: only the touched pages take memory.

The rows are far apart, so a few tiles at the end of the matrix reach offsets beyond 31 bits without running the rest.
"""

from __future__ import annotations

import numpy as np
import pytest

from csrc.simt.checks.arrays import narrow, wide

ROW = 1 << 27  # elements from row to row
M, K, R = 20, 72, 16  # the last row starts at 19 * 2^27 > 2^31


def far_rows(lib, cols: int, dtype: type = np.uint16) -> np.ndarray:
    return lib.sparse_array([M, ROW], np.dtype(dtype))[:, :cols]


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(-4, 5, shape).astype(np.float64) for name, shape in {"x": (M, K), "A": (K, R), "u": (M, R)}.items()
    }


def test_rows_beyond_31_bits(lib, values: dict[str, np.ndarray]) -> None:
    """Small integers, so that every product is exact and equality is the check."""
    lib.set_device(multiprocessors=4)
    lib.set_options()
    x, A, u = values["x"], values["A"], values["u"]
    big, narrow_A, narrow_u = far_rows(lib, K), narrow(A, "bf16"), narrow(u, "bf16")
    big[...] = narrow(x, "bf16")
    out = far_rows(lib, R)
    lib.shrink(big, narrow_A, out)
    assert (wide(out) == wide(narrow(x @ A, "bf16"))).all()

    acc = np.ones((K, R), np.float32)
    lib.factor_grad_(acc, big, narrow_u)
    assert (acc == 1 + x.T @ u).all()

    k, Q = far_rows(lib, R), np.zeros((K, R), np.float32)
    lib.shrink_grad(big, narrow_A, narrow_u, k, Q)
    assert (wide(k) == wide(narrow(x @ A, "bf16"))).all() and (Q == x.T @ u).all()

    y = far_rows(lib, K)
    lib.expand_add_(y, narrow_u, narrow_A)
    assert (wide(y) == wide(narrow(u @ A.T, "bf16"))).all()
    two = np.full(K, 2, np.float32)
    lib.expand_add_(y, narrow_u, narrow_A, scale=two)
    assert (wide(y) == 2 * wide(narrow(wide(narrow(u @ A.T, "bf16")) + u @ A.T, "bf16"))).all()

    g0, dscale = far_rows(lib, K), np.ones(K, np.float32)
    lib.scale_backward(big, big, None, two, g0, dscale)
    assert (wide(g0) == 2 * x).all() and (dscale == np.square(x).sum(0) / 2).all()


@pytest.mark.full
def test_more_columns_than_a_grid_has_in_y(lib) -> None:
    """65,535 tiles of 64; an x whose columns lie far apart is packed first, tile by tile."""
    lib.set_device(multiprocessors=4)
    lib.set_options()
    K = 65_536 * 64 + 3
    x, A = lib.sparse_array([2, 3 * K], np.dtype(np.uint16))[:, ::3], lib.sparse_array([K, 8], np.dtype(np.uint16))
    ends, out = [0, 1, K // 2, K - 2, K - 1], np.zeros((2, 8), np.uint16)
    values, factors = np.arange(10.0).reshape(2, 5) - 4, np.arange(40.0).reshape(5, 8) % 7
    x[:, ends], A[ends] = narrow(values, "bf16"), narrow(factors, "bf16")
    lib.reset_counters()
    lib.shrink(x, A, out)
    assert [one["name"] for one in lib.counters()["launches"]] == ["pack", "shrink"]
    assert (wide(out) == values @ factors).all()


@pytest.mark.full
def test_more_layers_than_a_grid_has_in_z(lib) -> None:
    """65,535; fold's layers are its grid's z."""
    lib.set_device(multiprocessors=4)
    lib.set_options()
    cores = np.arange(65_540, dtype=np.float32).reshape(-1, 1, 1)
    F = np.full_like(cores, np.nan)
    lib.fold(np.full((1, 1), 2, np.float32), cores, 0.5, F)
    assert (F == cores).all()
