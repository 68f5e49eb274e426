"""python -m bench.static: estimates each kernel's speed on known GPUs from its machine code: a model, not a measurement."""

from __future__ import annotations

import argparse
from pathlib import Path

from .measure.names import chosen, numbers, sizes
from .measure.session import progress, start
from .measure.store import Store
from .projection import assumptions, fused, row_model
from .projection import row_counts as row_traffic
from .projection.cards import CARDS
from .projection.counts import DTYPES, FOLDER, KERNELS
from .projection.predict import FILE, all_keys, kept, model_id, predict
from .projection.table import fused_table, ranges_table, table

SHAPES, RANKS = [(8192, 4096), (8192, 14336)], [16, 64, 128]
ABOUT = """How fast each CUDA kernel would be on known GPUs, from its machine code and the executor's counts. No GPU is needed,
nvcc is. Times are a model's, no measurement. Counts and estimates are
kept and not made again while the sources stay as they are."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=ABOUT)
    parser.add_argument("--gpus", default=",".join(CARDS), help=f"some of {', '.join(CARDS)} (all)")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"some of {', '.join(KERNELS)} (all)")
    parser.add_argument("--dtypes", default="bf16", help=f"some of {', '.join(DTYPES)} (bf16)")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="ranks, comma-separated (16,64,128)")
    parser.add_argument(
        "--shapes", default=",".join(f"{m}x{n}" for m, n in SHAPES), help="MxN of the large matrix, comma-separated"
    )
    parser.add_argument(
        "--rows", default=row_traffic.CASES, help=f"TOKENSxTOPxCORESxRANK of row_core, comma-separated ({row_traffic.CASES})"
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for the results (bench/results/simt-executor)")
    parser.add_argument("--fresh", action="store_true", help="count and estimate again, although results exist")
    options = parser.parse_args(argv)
    for name, known in (("gpus", CARDS), ("kernels", KERNELS), ("dtypes", DTYPES)):
        setattr(options, name, chosen(name, getattr(options, name), known))
    options.ranks = numbers("ranks", options.ranks, RANKS)
    if max(options.ranks) > 256:
        raise ValueError(f"ranks: expected at most 256, what the CUDA kernels take, got {max(options.ranks)}")
    options.shapes = sizes("shapes", options.shapes, "MxN")
    options.rows = row_traffic.parse(options.rows) if options.rows else []
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    keys = all_keys(options.shapes, options.ranks, options.dtypes, options.gpus, options.kernels)
    row_keys = row_model.all_keys(options.rows, options.gpus)
    with progress(len(keys) + len(row_keys)) as begin:
        found = predict(keys, options.results, begin, options.fresh)
        of_rows = row_model.predict(row_keys, options.results, model_id(), begin, options.fresh)
    for gpu in options.gpus:
        for dtype in options.dtypes:
            print(table(gpu, dtype, found))
        if row_keys:
            print(row_model.table_of(gpu, of_rows))
    for gpu in set(options.gpus) & set(fused.hopper()):
        print(fused_table(gpu))
    print(ranges_table())
    print("Assumed, with its source:", *assumptions.lines(), sep="\n  ")
    from .pictures.static import draw_static

    everything = kept(Store(options.results / FILE), model_id())
    for path in draw_static(everything, options.results):
        print(f"picture in {path}")
    print(f"estimates in {options.results / FILE}")
    return 0


if __name__ == "__main__":
    start("bench.static", main)
