"""The least work of a layer, and the least time it could take at a machine's own measured ceilings."""

from __future__ import annotations

from typing import NamedTuple

from .shapes import DTYPES, Case

DIRECTIONS = ("forward", "backward", "step")


class Work(NamedTuple):
    """Floating-point operations, and bytes with every operand moved once."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def least_seconds(self, ceilings: dict[str, float]) -> float:
        """At the measured flops_per_s and bytes_per_s, whichever binds."""
        return max(self.flops / ceilings["flops_per_s"], self.bytes / ceilings["bytes_per_s"])


def work(case: Case, direction: str, adapted: bool) -> Work:
    """Least work of the frozen layer, or of the adapted one, in "forward", "backward" or both ("step").

    forward   read x, W (and A, B), write y                     2 m k n  (+ 2 m r (k + n)) operations
    backward  read g, W (and x, A, B), write dx (and dA, dB)    2 m k n  (+ 4 m r (k + n))
    """
    if direction == "step":
        return work(case, "forward", adapted) + work(case, "backward", adapted)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    m, k, n, r = case[:4]
    element = DTYPES[case.dtype].itemsize
    backward = direction == "backward"
    flops, elements = 2 * m * k * n, m * k + n * k + m * n
    if adapted:
        flops += (4 if backward else 2) * m * r * (k + n)
        elements += (2 * r * (k + n) + m * k) if backward else r * (k + n)
    return Work(flops, element * elements)
