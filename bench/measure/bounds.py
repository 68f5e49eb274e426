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


def work(case: Case, direction: str, adapted: bool, trained: bool = True) -> Work:
    """Least work of the frozen layer, or of the adapted one, in "forward", "backward" or both ("step").

    forward   read x, W (and A, B), write y                     2 m k n  (+ 2 m r (k + n)) operations
    backward  read g, W (and x, A, B), write dx (and dA, dB)    2 m k n  (+ 4 m r (k + n))

    trained: whether A and B are. Where they are frozen, as VeRA's, backward has no dA and dB, and reads u = x A instead of x:
    2 m k n + 2 m r (k + n).
    """
    if direction == "step":
        return work(case, "forward", adapted, trained) + work(case, "backward", adapted, trained)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    m, k, n, r = case[:4]
    element = DTYPES[case.dtype].itemsize
    backward = direction == "backward"
    flops, elements = 2 * m * k * n, m * k + n * k + m * n
    if adapted:
        flops += (4 if backward and trained else 2) * m * r * (k + n)
        elements += r * (k + n)
        if backward:
            elements += r * (k + n) + m * k if trained else m * r
    return Work(flops, element * elements)


def kernel_work(kernel: str, m: int, n: int, r: int, element: int) -> Work:
    """Least work of one of our kernels: every operand moved once, sums in float32.

    m tokens (fold, fold_grad: layers), n columns of the large matrix, rank r; element: bytes of x's dtype.
    """
    narrow, factor, core, sums = element * m * r, element * n * r, element * r * r, 8 * n * r  # sums: read and written
    large = element * m * n
    works = {
        "shrink": Work(2 * m * n * r, large + factor + narrow),
        "expand_add": Work(2 * m * n * r, 2 * large + factor + narrow),
        "factor_grad": Work(2 * m * n * r, large + narrow + sums),
        "shrink_grad": Work(4 * m * n * r, large + factor + 2 * narrow + sums),
        "fold": Work(2 * m * n * r * r, factor + m * core + m * factor),
        "fold_grad": Work(4 * m * n * r * r, 4 * m * (n * r + r * r) + factor + m * core + sums),
    }
    if kernel not in works:
        raise ValueError(f"kernel: expected one of {', '.join(works)}, got {kernel!r}")
    return works[kernel]
