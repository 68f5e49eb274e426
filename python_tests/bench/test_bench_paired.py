"""The interval of a mean over seeds."""

from __future__ import annotations

import pytest

from bench.measure.paired import interval


def test_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(2.4841, rel=1e-3)  # R: t.test(c(1, 2, 3))
    mean, half = interval([0.1, 0.4, 0.2, 0.6, 0.2, 0.3, 0.5, 0.1, 0.7, 0.9])
    assert mean == pytest.approx(0.4) and half == pytest.approx(0.1937, rel=1e-3)
    assert interval([0.5]) == (0.5, None)


@pytest.mark.parametrize("values", [[], [0.0] * 11])
def test_interval_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"values: expected 1 to 10, got {len(values)}"):
        interval(values)
