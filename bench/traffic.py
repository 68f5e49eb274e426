"""python -m bench.traffic: counts the bytes that kernels and whole layers move, and projects their time on known GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .measure.names import chosen
from .measure.session import Table, progress, start
from .measure.shapes import parse_shapes
from .measure.store import RESULTS, Store
from .projection import block as block_traffic
from .projection import layer as layer_traffic
from .projection import layer_time as projection
from .projection import predictions
from .projection import row_counts as row_traffic
from .projection.cards import CARDS
from .projection.counts import FOLDER, LAYER_SHAPES, count_all, kept, needed, sources_id
from .projection.counts import __doc__ as about
from .projection.predict import FILE, all_predictions, layer_keys, layer_levels, model_id, predict
from .projection.predict import kept as predict_kept
from .projection.table import ranges_table


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=about.split("\n")[0])
    parser.add_argument("--shapes", help="MxKxNxR or MODEL:TOKENS:RANK of layers, comma-separated")
    parser.add_argument(
        "--rows", default=row_traffic.CASES, help=f"TOKENSxTOPxCORESxRANK of row_core, comma-separated ({row_traffic.CASES})"
    )
    blocks = f"MODEL:TOKENS:RANK of transformers' blocks, comma-separated ({block_traffic.BLOCKS})"
    parser.add_argument("--blocks", default=block_traffic.BLOCKS, help=blocks)
    parser.add_argument("--gpus", default=",".join(CARDS), help=f"to project for, some of {', '.join(CARDS)} (all)")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder for the counts (bench/results/simt-executor)")
    parser.add_argument("--fresh", action="store_true", help="count again, although the sources have not changed")
    options = parser.parse_args(argv)
    options.shapes = LAYER_SHAPES if options.shapes is None else parse_shapes(options.shapes)
    for shape in options.shapes:
        if shape[3] > 256:
            raise ValueError(f"shapes: expected ranks up to 256, what the CUDA kernels take, got {shape[3]}")
    options.rows, options.blocks = row_traffic.parse(options.rows), block_traffic.parse(options.blocks)
    options.gpus = chosen("gpus", options.gpus, CARDS)
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    store = Store(options.results / "traffic.jsonl").prepare()
    multiprocessors = list(dict.fromkeys(CARDS[gpu].multiprocessors for gpu in options.gpus))
    shapes = list(dict.fromkeys([*options.shapes, *(s for block in options.blocks for s in block_traffic.shapes(block))]))
    keys = needed(shapes, multiprocessors)
    row_store = Store(options.results / row_traffic.FILE).prepare()
    row_keys = row_traffic.needed(options.rows)
    with progress(len(keys) + len(row_keys)) as begin:
        rows = count_all(keys, store, begin, options.fresh)
        mixtures = row_traffic.count_all(row_keys, row_store, begin, options.fresh)
    heads = ("kernel", "M x N", "r", "blocks", "large, x its size", "factors", "partial sums", "all, x each operand once")
    for sm in multiprocessors:
        table = Table(f"Counted bytes, bf16, planned for {sm} multiprocessors (SIMT executor, no GPU)", *heads)
        for head in ("sectors used", "bank conflicts"):
            table.add_column(head)
        for key, row in rows.items():
            if key[4] == sm:
                sizes = [f"{row.factors / 1e6:.2f} MB", f"{row.partials / 1e6:.2f} MB", f"{row.over_once:.3f}"]
                rates = [f"{row.sector_efficiency:.1%}", f"{row.bank_conflicts:.3f}"]
                numbers = [f"{row.m} x {row.n}", str(row.r), str(row.blocks), f"{row.once:.4f}"]
                table.add_row(row.kernel, *numbers, *sizes, *rates)
        print(table)
    print(row_traffic.table(mixtures))
    levels, found = {}, {}
    try:
        wanted = layer_keys(shapes, options.gpus)
        with progress(len(wanted)) as begin:
            found = predict(wanted, options.results, begin, options.fresh)
        levels = {gpu: layer_levels(shapes, gpu, found) for gpu in options.gpus}
    except FileNotFoundError as error:  # counting bytes needs no compiler
        print(f"no projection: {error}")
    for shape in options.shapes:
        print(layer_traffic.table(shape, rows, multiprocessors[0]))
        if levels:
            print(projection.table(shape, rows, levels))
    for block in options.blocks if levels else ():
        print(block_traffic.table(block, rows, levels))
    if levels:
        print(projection.assumptions())
        print(ranges_table())
    if "h100" in levels:
        shape = options.shapes[0]
        title = f"Beta's time over the frozen layer on an H100, {'x'.join(map(str, shape))}: {projection.LABEL}; us (low-high)"
        steps = Table(title, *projection.STEP_HEADS)
        for line in projection.step_rows(shape, rows, CARDS["h100"], levels["h100"]):
            steps.add_row(*line)
        print(steps)
    if options.results == FOLDER and set(options.gpus) == set(CARDS):
        estimates = predict_kept(Store(FOLDER / FILE), model_id())
        if predictions.keep(all_predictions(kept(store, sources_id()), estimates), RESULTS / predictions.FILE):
            print(f"predictions in {RESULTS / predictions.FILE}")
    print(f"counts in {store.path} and {row_store.path}")
    return 0


if __name__ == "__main__":
    start("bench.traffic", main)
