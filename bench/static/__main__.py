"""python -m bench.static: how fast each kernel would be on known GPUs, by its machine code: a model, no measurement."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..measure.session import new_table, progress, start, wide_console
from ..measure.store import Store
from ..traffic.counts import DTYPES, FOLDER, KERNELS, count_all
from . import __doc__ as about
from .assumptions import CARDS
from .compiled import compile_kernels, tools
from .model import estimate

SHAPES = [(8192, 4096)]
RANKS = (16, 64, 128)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=about)
    parser.add_argument("--gpus", default=",".join(CARDS), help=f"some of {', '.join(CARDS)} (all)")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"some of {', '.join(KERNELS)} (all)")
    parser.add_argument("--dtypes", default="bf16", help=f"some of {', '.join(DTYPES)} (bf16)")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="comma-separated (16,64,128)")
    parser.add_argument("--shapes", default="8192x4096", help="MxN of the large matrix, comma-separated (8192x4096)")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="folder for counts and results (bench/results/simt-executor)"
    )
    parser.add_argument("--fresh", action="store_true", help="count again what was counted of these sources")
    options = parser.parse_args(argv)
    for name, known in (("gpus", CARDS), ("kernels", KERNELS), ("dtypes", DTYPES)):
        chosen = getattr(options, name).split(",")
        for one in chosen:
            if one not in known:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {one!r}")
        setattr(options, name, chosen)
    ranks = options.ranks.split(",")
    if not all(r.isdigit() and 1 <= int(r) <= 256 for r in ranks):
        raise ValueError(f"ranks: expected numbers from 1 to 256, got {options.ranks!r}")
    options.ranks = [int(r) for r in ranks]
    shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in options.shapes.split(",")]
    if not all(shapes):
        raise ValueError(f"shapes: expected MxN, comma-separated, got {options.shapes!r}")
    options.shapes = [tuple(int(n) for n in match.groups()) for match in shapes]
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    tools()
    store = Store(options.results / "traffic.jsonl").prepare()
    cards = {gpu: CARDS[gpu] for gpu in options.gpus}
    console = wide_console()
    multiprocessors = list(dict.fromkeys(card.multiprocessors for card in cards.values()))
    keys = [
        (k, m, n, r, sm) for sm in multiprocessors for m, n in options.shapes for r in options.ranks for k in options.kernels
    ]
    for dtype in options.dtypes:
        with progress(len(keys)) as begin:
            rows = count_all(keys, store, begin, options.fresh, dtype)
        for gpu, card in cards.items():
            compiled = compile_kernels(dtype, card.architecture)
            heads = ("kernel", "M x N, r", "registers", "shared", "blocks a SM", "grid", "idle", "instr", "a 16 B")
            heads += ("address", "in flight", "issue", "memory", "flight", "L2", "after", "total", "of bandwidth", "limiter")
            table = new_table(f"{card.name}, {dtype}: model, not measured", *heads)
            for key in keys:
                if key[4] != card.multiprocessors:
                    continue
                e = estimate(rows[key], compiled, card, dtype)
                b = [f"{1e6 * s:.1f}" for s in e.bound.values()]
                table.add_row(
                    key[0], f"{key[1]} x {key[2]}, {key[3]}", f"{e.registers}", f"{e.shared / 1024:.0f} K",
                    f"{e.resident} ({e.resident_by})", f"{e.blocks}, {e.waves:.2f}", f"{e.idle:.0%}", f"{e.iteration:.0f}",
                    f"{e.per_16_bytes:.0f}", f"{e.kinds['address']:.0f}", f"{e.in_flight / 1024:.0f} of {e.needed_in_flight / 1024:.0f} K",
                    *b, f"{1e6 * e.parts['after']:.1f} ({e.late_rounds})", f"{1e6 * e.seconds:.1f} us", f"{e.share:.0%}", e.limiter,
                )  # fmt: skip
            console.print(table)
    return 0


if __name__ == "__main__":
    start("bench.static", main)
