"""What the kernels are to reach by the model, what they do, and which of its terms takes the difference."""

from __future__ import annotations

from .assumptions import CARDS, REACHED
from .model import Estimate
from .predict import Key

_ONE_READ = {"h100": 0.88, "a100": 0.90, "h200": 0.75}
_TWO_SUMS = {"h100": 0.82, "a100": 0.85, "h200": 0.65}
# shares of the data sheet's bandwidth, begin and end included, bf16: by kernel, m, n, r
WANTED: dict[tuple[str, int, int, int], dict[str, float]] = {
    **{(kernel, 8192, 4096, 16): _ONE_READ for kernel in ("shrink", "expand_add", "factor_grad")},
    ("shrink_grad", 8192, 4096, 16): _TWO_SUMS,
    **{(kernel, 8192, 14336, 16): _TWO_SUMS for kernel in ("shrink", "expand_add", "factor_grad", "shrink_grad")},
    ("shrink", 8192, 4096, 64): {"h100": 0.85},
    ("expand_add", 8192, 4096, 64): {"h100": 0.85},
    ("factor_grad", 8192, 4096, 64): {"h100": 0.80},
    ("shrink_grad", 8192, 4096, 64): {"h100": 0.70},
}
HEADS = ("kernel", "M x N, r", "GPU", "wanted", "reached", "at most", "begin", "bandwidth", "beyond it", "sum at the end")
CAPTION = (
    "at most: of a kernel that had begin and bandwidth alone. The rest is us beyond its bytes at the data sheet's bandwidth: "
    f"until the first of them come; since {REACHED:.0%} of it is reached and some bytes come twice; by the limit named; for "
    "the sum over the blocks after the last arrival"
)


def lost(e: Estimate) -> dict[str, float]:
    """Seconds beyond its bytes at the data sheet's bandwidth, by term; they add up to the difference."""
    memory = e.bound["memory bandwidth"]
    return {
        "begin": e.parts["begin"],
        "bandwidth": memory - e.least_seconds,
        "beyond": e.parts["waves"] - memory,
        "after": e.parts["after"],
    }


def most_reachable(e: Estimate) -> float:
    """The share that begin and the bandwidth that is reached leave."""
    return e.least_seconds / (e.parts["begin"] + e.least_seconds / REACHED)


def wanted_rows(found: dict[Key, Estimate]) -> list[list[str]]:
    """A row for each kernel, size and GPU that something is wanted of and that has been estimated."""
    rows = []
    for (kernel, m, n, r), shares in WANTED.items():
        for gpu, share in shares.items():
            e = found.get((kernel, m, n, r, "bf16", gpu))
            if e is None:
                continue
            terms = {name: f"{1e6 * seconds:.1f}" for name, seconds in lost(e).items()}
            others = {name: seconds for name, seconds in e.bound.items() if name != "memory bandwidth"}
            terms["beyond"] += f" ({max(others, key=others.__getitem__)})"
            met = e.share >= share
            reached = f"{e.share:.0%}" if met else f"**{e.share:.0%}**"
            size = f"{m} x {n}, {r}"
            rows.append([kernel, size, CARDS[gpu].name, f"{share:.0%}", reached, f"{most_reachable(e):.0%}", *terms.values()])
    return rows
