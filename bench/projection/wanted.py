"""What kernels and layers are to reach by the model, what they do, and which of its terms takes the difference."""

from __future__ import annotations

from ..measure.shapes import Shape
from .assumptions import CARDS, REACHED
from .counts import Key as RowKey
from .counts import Row
from .layer import BETA, FUSED, all_steps
from .layer_time import Gpu, Times, excess, seconds
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
MOST_SUM = {16: 2e-6, 64: 6e-6}  # seconds after the last arrival, by rank, on an H100
HEADS = ("kernel", "M x N, r", "GPU", "wanted", "reached", "at most", "begin", "bandwidth", "beyond it", "sum at the end")
CAPTION = (
    "at most: of a kernel that had begin and bandwidth alone. The rest is us beyond its bytes at the data sheet's bandwidth: "
    f"until the first of them come; since {REACHED:.0%} of it is reached and some bytes come twice; by the limit named; for "
    "what is stored after the last products, and the sums over the blocks"
)


def marked(text: str, met: bool) -> str:
    return text if met else f"**{text}**"


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
            terms = {name: f"{1e6 * value:.1f}" for name, value in lost(e).items()}
            others = {name: value for name, value in e.bound.items() if name != "memory bandwidth"}
            terms["beyond"] += f" ({max(others, key=others.__getitem__)})"
            reached = marked(f"{e.share:.0%}", e.share >= share)
            if gpu == "h100":
                terms["after"] = marked(terms["after"], e.parts["after"] <= MOST_SUM[r])
            size = f"{m} x {n}, {r}"
            rows.append([kernel, size, CARDS[gpu].name, f"{share:.0%}", reached, f"{most_reachable(e):.0%}", *terms.values()])
    return rows


# ---- whole layers ----------------------------------------------------------------------------------------------------

# forward and backward over the frozen layer, by m, k, n, r, on an H100
WANTED_LAYERS: dict[Shape, float] = {
    (8192, 4096, 4096, 16): 0.17,
    (2048, 4096, 4096, 16): 0.24,
    (8192, 4096, 4096, 64): 0.25,
    (8192, 4096, 14336, 16): 0.12,
}
TERMS = ("bytes", "bandwidth", "begin", "beyond it", "sums at the end", "launches", "base products")
LAYER_HEADS = ("M x K x N, r", "wanted", "fused", "beta", *TERMS)
LAYER_CAPTION = (
    "by the strategy fused, which runs where tune finds it faster or it is forced, and by beta, which runs unasked; of beta "
    "all that follows, in us over the frozen layer: its bytes at the data sheet's bandwidth; "
    f"since {REACHED:.0%} of it is reached (by the library 90%), and some bytes come twice; until a kernel's first bytes come; "
    "by what limits its loop; for its sum; between kernels; what the base products take longer for accumulating"
)
Estimates = dict[RowKey, Estimate]  # of one GPU


def layer_terms(shape: Shape, gpu: Gpu, rows: dict[RowKey, Row], found: Estimates, times: Times) -> dict[str, float]:
    """Seconds of a layer over the frozen one, by term; they add up to the projection's. KeyError where a count or an estimate
    is missing."""
    steps = all_steps(shape, rows, gpu.multiprocessors)
    own, frozen = ([step for steps in steps[name].values() for step in steps] for name in (BETA, "frozen"))
    terms = dict.fromkeys(TERMS, 0.0)
    for step in own:
        if step.kernel is not None:
            e = found[step.kernel]
            for head, value in zip(("begin", "bandwidth", "beyond it", "sums at the end"), lost(e).values(), strict=True):
                terms[head] += value
            terms["bytes"] += e.least_seconds
        elif step.name != "base product":
            terms["bytes"] += step.work.bytes / gpu.bytes_per_s
            terms["bandwidth"] += gpu.seconds(step.work) - step.work.bytes / gpu.bytes_per_s
        else:
            terms["base products"] += gpu.seconds(step.work)
    terms["base products"] -= sum(gpu.seconds(step.work) for step in frozen)
    over = seconds(steps[BETA], "step", gpu, times) - seconds(steps["frozen"], "step", gpu, times)
    terms["launches"] = over - sum(terms.values())
    return terms


def wanted_layer_rows(rows: dict[RowKey, Row], found: dict[Key, Estimate], times: Times | None) -> list[list[str]]:
    """A row for each layer that something is wanted of, on an H100, and that has been counted and estimated."""
    card = CARDS["h100"]
    ours: Estimates = {(*key[:4], card.multiprocessors): e for key, e in found.items() if key[4:] == ("bf16", "h100")}
    lines = []
    for shape, share in WANTED_LAYERS.items():
        try:
            terms = layer_terms(shape, card.gpu, rows, ours, times or {})
        except KeyError:
            continue
        m, k, n, r = shape
        projected = excess(shape, rows, card.gpu, times or {})
        reached = (projected[name]["step"] if name in projected else None for name in (FUSED, BETA))
        shares = ("-" if over is None else marked(f"{over:.1%}", over <= share) for over in reached)
        lines.append([f"{m} x {k} x {n}, {r}", f"{share:.0%}", *shares, *(f"{1e6 * value:.1f}" for value in terms.values())])
    return lines
