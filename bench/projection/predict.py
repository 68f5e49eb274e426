"""Estimates of many kernels, kept in bench/results/simt-executor/static.jsonl and reused while all that they are made
from is unchanged: the kernels' sources, the executor and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from lotr_ext.ops.planner import FUSED_MAX_RANK

from ..measure.store import Store, of_build
from . import block, counts, fused
from .assumptions import LEVELS, Assumed, Spread
from .cards import CARDS
from .compiled import compile_kernels, tools
from .counts import KERNELS, Row
from .layer import BETA, FUSED, LEAST, fused_key
from .layer_time import KernelTime, Levels, Times, excess
from .model import Estimate, estimate, in_turns
from .predictions import Prediction
from .sources import python_id

CASE = ("kernel", "m", "n", "r", "dtype", "gpu")
Key = tuple[str, int, int, int, str, str]  # of these
FILE, COUNTS = "static.jsonl", "traffic.jsonl"


MODEL = ("cards", "compiled", "hot", "issue", "model", "row_model", "sass")  # modules of the model


def model_id() -> str:
    """An id of the model's code. Assumptions are not part of it: `Estimate.at` adds them."""
    return python_id(MODEL, counts.sources_id())


def kept(store: Store, build: str | None = None) -> dict[Key, Estimate]:
    """The estimates of a build; None: of the last kept one."""
    own = of_build(store.read(), build)
    return {tuple(cell["case"][name] for name in CASE): Estimate(**cell["estimate"]) for cell in own}


def all_keys(
    shapes: Iterable[tuple[int, int]],
    ranks: Iterable[int],
    dtypes: Iterable[str],
    gpus: Iterable[str],
    kernels: Iterable[str] = KERNELS,
) -> list[Key]:
    """Every kernel at every size on every GPU; shapes are M x N of the large matrix."""
    return [(k, m, n, r, d, g) for g in gpus for d in dtypes for m, n in shapes for r in ranks for k in kernels]


def layer_keys(shapes: Iterable[tuple[int, int, int, int]], gpus: Iterable[str]) -> list[Key]:
    """The large kernels of whole layers (m, k, n, r) in bf16."""
    found = []
    for gpu in gpus:
        needed = counts.needed(list(shapes), [CARDS[gpu].multiprocessors])
        found += [(k, m, n, r, "bf16", gpu) for k, m, n, r, _ in needed if k in KERNELS]
    return found


def predict(keys: list[Key], folder: Path, begin: Callable[[str], None], again: bool = False) -> dict[Key, Estimate]:
    """The estimates of keys. Missing counts and estimates are made and kept in folder.

    Raises FileNotFoundError if a kernel must be compiled and nvcc or nvdisasm is missing."""
    store, rows_store = Store(folder / FILE).prepare(), Store(folder / COUNTS).prepare()
    build = model_id()
    found = {} if again else kept(store, build)
    missing = [key for key in keys if key not in found]
    if missing:
        tools()
    for key in keys:
        kernel, m, n, r, dtype, gpu = key
        begin(f"{kernel} {m}x{n} r{r} {dtype}, {CARDS[gpu].name}")
        if key not in found:
            found[key] = _estimate(key, rows_store, again)
            case = dict(zip(CASE, key))
            store.append({"case": case, "rival": "lotr_ext", "build": build, "estimate": asdict(found[key])})
    if missing:
        store.keep_only(build)
    return {key: found[key] for key in keys}


def _row(key: Key, store: Store, again: bool) -> Row:
    kernel, m, n, r, dtype, gpu = key
    counted = (kernel, m, n, r, CARDS[gpu].multiprocessors)
    return counts.count_all([counted], store, lambda _: None, again, dtype)[counted]


def _estimate(key: Key, store: Store, again: bool) -> Estimate:
    """The estimate of an operator: of its launch, or of several (above its ranks shrink_grad is shrink and factor_grad)."""
    _, m, n, r, dtype, gpu = key
    row = _row(key, store, again)
    names = row.machine["names"]
    compiled = compile_kernels(dtype, CARDS[gpu].architecture)
    if len(names) == 1:
        return estimate(row, compiled, gpu)
    return in_turns([estimate(_row((name, m, n, r, dtype, gpu), store, again), compiled, gpu) for name in names])


def layer_levels(shapes: Sequence[tuple[int, int, int, int]], gpu: str, found: dict[Key, Estimate]) -> Levels | None:
    """Seconds of the kernels of layers in bf16 with their memsets, under each set of assumptions; None where one is missing."""
    keys = layer_keys(shapes, [gpu])
    if not all(key in found for key in keys):
        return None
    return {level: _times(shapes, gpu, {key: found[key] for key in keys}, assumed) for level, assumed in LEVELS.items()}


def _times(shapes: Sequence[tuple[int, int, int, int]], gpu: str, found: dict[Key, Estimate], assumed: Assumed) -> Times:
    sm, times = CARDS[gpu].multiprocessors, {}
    for key, e in found.items():
        own = e.at(assumed)
        times[(*key[:4], sm)] = KernelTime(own.seconds + assumed.launch * e.memsets, own.parts["after"])
    for m, k, n, r in shapes if gpu in fused.hopper() else ():
        if r <= FUSED_MAX_RANK:
            for i, o, backward in ((k, n, False), (n, k, True)):
                seconds = fused.model(m, i, o, r, gpu, backward, assumed=assumed).seconds
                times[fused_key(m, i, o, r, sm, backward)] = KernelTime(seconds)
    return times


# ---- predictions ----------------------------------------------------------------------------------------------------------

NAMED = {  # the benchmarks' names, if they differ
    BETA: "lotr_ext",
    FUSED: "lotr_ext-fused",
    "lotr_ext two_pass": "lotr_ext-two_pass",
    block.UNSHARED: "lotr_ext-unshared",
}


def projections(shapes: list, rows: dict[counts.Key, Row], found: dict[Key, Estimate]) -> dict[str, Levels]:
    """Times of our kernels in layers of these shapes by GPU, for GPUs with all counts and estimates."""
    levels = {gpu: layer_levels(shapes, gpu, found) for gpu in CARDS}
    return {
        gpu: own
        for gpu, own in levels.items()
        if own is not None and all(key in rows for key in counts.needed(shapes, [CARDS[gpu].multiprocessors]))
    }


def all_predictions(rows: dict[counts.Key, Row], found: dict[Key, Estimate]) -> list[Prediction]:
    """All predictions from these counts and estimates."""
    made = [
        Prediction("kernels", k[5], "lotr_ext", dict(zip(("kernel", "m", "n", "r", "dtype"), k)), e.spread)
        for k, e in found.items()
    ]
    for shape in counts.LAYER_SHAPES:
        case = dict(zip("mknr", shape)) | {"dtype": "bf16"}
        for gpu, levels in projections([shape], rows, found).items():
            made += _of("layer", gpu, case, excess(shape, rows, CARDS[gpu], levels))
    for one in block.parse(block.BLOCKS):
        case = dict(zip(("model", "m", "r"), one)) | {"dtype": "bf16"}
        for gpu, levels in projections(block.shapes(one), rows, found).items():
            made += _of("block", gpu, case, block.excess(one, rows, CARDS[gpu], levels))
    for gpu in fused.hopper() if made else ():
        for m, k, n, r in fused.SHAPES:
            for direction, inner, outer in (("y", k, n), ("dx", n, k)):
                case = dict(zip("mknr", (m, k, n, r))) | {"direction": direction, "dtype": "bf16"}
                every = [fused.model(m, inner, outer, r, gpu, direction == "dx", assumed=a) for a in LEVELS.values()]
                made.append(Prediction("fused", gpu, "gemm_lotr", case, Spread(*(one.adds for one in every))))
                made.append(Prediction("fused", gpu, "beta", case, Spread(*(one.beta for one in every))))
    return made


def _of(program: str, gpu: str, case: dict, over: dict[str, dict[str, Spread]]) -> list[Prediction]:
    own = {NAMED.get(name, name): spreads["step"] for name, spreads in over.items() if name != LEAST}
    return [Prediction(program, gpu, rival, case, spread) for rival, spread in own.items()]
