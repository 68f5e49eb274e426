"""The kernels of magnitudes beside their numbers (cases.py): empty problems, launches and bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from bench.projection.counts import aligned
from csrc.simt.checks.arrays import narrow, wide

M, N, R = 1024, 512, 16


@pytest.fixture
def counted(lib) -> Iterator[None]:
    lib.set_device(multiprocessors=16)
    lib.set_options(count_memory=True)
    lib.reset_counters()
    yield
    lib.set_options()
    lib.set_device()


def ones(*shape: int, dtype: type = np.uint16) -> np.ndarray:
    a = aligned(shape, dtype)
    a[...] = narrow(np.ones(shape), "bf16") if dtype is np.uint16 else 1
    return a


def floats(*shape: int) -> np.ndarray:
    return ones(*shape, dtype=np.float32)


def test_bytes_of_a_scaled_expand(lib, counted) -> None:
    """One launch, which reads and writes y once; the scale and the bias once for each block along the tokens."""
    y = ones(M, N)
    lib.expand_add_(y, ones(M, R), ones(N, R), scale=3 * floats(N), bias=ones(N))
    assert (wide(y) == 1 + 3 * (1 + R)).all()
    counters = lib.counters()
    (launch,), arrays = counters["launches"], counters["arrays"]
    assert launch["name"] == "expand_add"
    assert arrays["y"]["read_bytes"] == arrays["y"]["written_bytes"] == M * N * 2
    blocks = launch["grid"][1]
    assert arrays["scale"]["read_bytes"] == blocks * N * 4 and arrays["bias"]["read_bytes"] == blocks * N * 2
    assert counters["shared_wavefronts"] <= 1.05 * counters["shared_phases"]


def test_bytes_of_scale_backward(lib, counted) -> None:
    """One launch, which reads g and y once and writes g0 once, in whole sectors."""
    g0, dscale = ones(M, N), floats(N)
    lib.scale_backward(ones(M, N), ones(M, N), None, 2 * floats(N), g0, dscale)
    assert (wide(g0) == 2).all() and (dscale == M / 2).all()
    counters = lib.counters()
    (launch,), arrays = counters["launches"], counters["arrays"]
    assert launch["name"] == "scale_backward" and launch["grid"] == (N // 64, 4, 1)
    for name in ("g", "y"):
        assert arrays[name]["read_bytes"] == 32 * arrays[name]["read_sectors"] == M * N * 2
    assert arrays["g0"]["written_bytes"] == 32 * arrays["g0"]["written_sectors"] == M * N * 2
    assert arrays["workspace"]["written_bytes"] == 4 * N * 4
    assert arrays["workspace"]["read_bytes"] == 16 * N * 4  # the last block loads sixteen partial sums at a time


def test_no_tokens(lib) -> None:
    """y's gradients are empty, the scale's are 0; nothing is launched."""
    dscale = floats(N)
    lib.reset_counters()
    lib.scale_backward(ones(0, N), ones(0, N), ones(N), floats(N), ones(0, N), dscale)
    lib.expand_add_(ones(0, N), ones(0, R), ones(N, R), scale=floats(N), bias=ones(N))
    assert not dscale.any() and not lib.counters()["launches"]


def test_a_scale_with_dropout_is_refused(lib) -> None:
    with pytest.raises(ValueError, match=r"expand_add: scale: expected none with dropout, got both"):
        lib.expand_add_(ones(4, 8), ones(4, 2), ones(8, 2), p=0.5, seed=np.array([1]), scale=floats(8))
