"""One adapted layer, forward and forward + backward, against its rivals: what does the adapter cost over the frozen layer?

    python -m bench.layer                     the default shapes, fp32 and bf16, one thread and all of them
    python -m bench.layer --quick             two shapes, about two minutes
    python -m bench.layer --shapes 512x768x768x16,roberta-large:2048:64 --dtypes fp32 --threads 1
    python -m bench.layer --rivals lora-eager,lora-compiled,lotr_ext

Every rival is checked against float64 before it is timed. All rivals of a case are interleaved; a time is the median over
rounds, an excess is the median of per-round ratios to the frozen layer. Results are appended to
bench/results/<machine>/layer.jsonl; cells measured before with the same build and settings are not measured again
(--fresh does). The adapters are kept in the layer's own dtype for every rival, so that all do the same arithmetic.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import rivals as rv
from .shapes import DEFAULT, DTYPES, GPU_TOKENS, QUICK, Case, parse_shapes
from .store import RESULTS, Store, build_id, latest
from .timing import Clock, ceilings, interleave, machine, quartiles, slug


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--shapes", help="MxKxNxR or MODEL:TOKENS:RANK, comma-separated")
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32, bf16, fp16 (fp32,bf16)")
    parser.add_argument("--threads", help="CPU thread counts, comma-separated (1 and all)")
    parser.add_argument("--rivals", help=f"some of {', '.join(rv.RIVALS)}")
    parser.add_argument("--rounds", type=int, help="rounds a case (21, quick 9)")
    parser.add_argument("--slice", type=float, default=0.03, help="seconds a measurement of one rival takes (0.03)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds, for one thread only")
    parser.add_argument("--results", help="folder for the results (bench/results/<machine>)")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured with this build")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, found none (torch.cuda.is_available() is False)")
    if options.device not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cpu or cuda, got {options.device!r}")
    options.dtypes = options.dtypes.split(",")
    for dtype in options.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes: expected some of {', '.join(DTYPES)}, got {dtype!r}")
    count = os.cpu_count() or 1
    text = options.threads or ("1" if options.device == "cuda" else f"1,{count}")
    if not all(part.isdigit() and 1 <= int(part) <= count for part in text.split(",")):
        raise ValueError(f"threads: expected numbers from 1 to {count}, got {text!r}")
    options.threads = sorted({int(part) for part in text.split(",")})
    if options.clock == "cpu" and (options.threads != [1] or options.device == "cuda"):
        raise ValueError("clock: cpu seconds mean something on one CPU thread only; add --threads 1 --device cpu")
    options.rounds = (9 if options.quick else 21) if options.rounds is None else options.rounds
    if options.rounds < 1 or options.slice <= 0:
        raise ValueError(f"rounds, slice: expected positive numbers, got {options.rounds}, {options.slice}")
    options.rivals = rv.available(options.rivals.split(",") if options.rivals else rv.DEFAULT)
    if rv.FLOOR not in options.rivals:
        options.rivals.insert(0, rv.FLOOR)
    if options.shapes:
        options.shapes = parse_shapes(options.shapes)
    elif options.device == "cuda":
        tokens = (8192,) if options.quick else GPU_TOKENS
        options.shapes = [(m, 4096, 4096, r) for m in tokens for r in ((16,) if options.quick else (4, 16, 64, 256))]
    else:
        options.shapes = QUICK if options.quick else DEFAULT
    return options


def calls_of(rival: rv.Rival, x: torch.Tensor, g: torch.Tensor) -> dict[str, Callable[[], None]]:
    """What is timed. x requires grad, as inside a model; gradients of parameters are dropped between steps."""
    parameters = [p for p, _ in rival.parameters.values()]

    def forward() -> None:
        rival.forward(x)

    def step() -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        rival.forward(x).backward(g)

    return {"forward": forward, "step": step}


def measure(case: Case, names: list[str], options: argparse.Namespace, clock: Clock) -> list[dict]:
    """One result a rival."""
    device, dtype = torch.device(options.device), DTYPES[case.dtype]
    tensors = rv.Tensors.random(case, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.m, case.k, generator=generator).to(device, dtype)
    g = torch.randn(case.m, case.n, generator=generator).to(device, dtype)
    group = [rv.RIVALS[name](tensors, case) for name in names]
    results = []
    for name, rival in zip(names, group):
        result = {"rival": name, "label": rival.name, "error": rv.check(rival, tensors, case, x, g)}
        result["saved_bytes"] = rv.saved_bytes(rival, tensors, x)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls_of(rival, x.clone().requires_grad_(), g)["step"]()
            result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        results.append(result)
    calls = [calls_of(rival, x.clone().requires_grad_(), g) for rival in group]
    for direction in ("forward", "step"):
        times = interleave([c[direction] for c in calls], clock, options.rounds, options.slice)
        floor = times[names.index(rv.FLOOR)]
        for result, own in zip(results, times):
            ratios = [t / f - 1 for t, f in zip(own, floor)]
            result[direction] = {"seconds": quartiles(own), "excess": quartiles(ratios)}
    return results


def show(case: Case, results: list[dict], ceiling: dict[str, float], console) -> None:
    """A table of one case."""
    from rich.table import Table

    eager = next((r for r in results if r["rival"] == rv.LORA_EAGER), None)
    table = Table(title=f"{case.name()}   FLOP floor {case.flop_floor():.1%}")
    columns = [
        "",
        "forward",
        "excess",
        "fwd + bwd",
        "excess (quartiles)",
        "x eager LoRA",
        "x floor",
        "of peak",
        "saved",
        "error",
    ]
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for result in results:
        low, excess, high = result["step"]["excess"]
        seconds = result["step"]["seconds"][1]
        flops = case.base_flops() * (1 if result["rival"] == rv.FLOOR else 1 + case.flop_floor())
        is_floor = result["rival"] == rv.FLOOR
        versus = f"{excess / eager['step']['excess'][1]:.2f}" if eager and not is_floor else ""
        table.add_row(
            result["label"],
            _time(result["forward"]["seconds"][1]),
            "" if is_floor else f"{result['forward']['excess'][1]:.1%}",
            _time(seconds),
            "" if is_floor else f"{excess:.1%} ({low:.1%} to {high:.1%})",
            versus,
            "" if is_floor else f"{excess / case.flop_floor():.2f}",
            f"{flops / seconds / ceiling['flops_per_s']:.0%}",
            f"{result['saved_bytes'] / 2**20:.2f} MiB",
            f"{result['error']:.0e}",
        )
    console.print(table)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 0.01 else f"{seconds * 1e3:.2f} ms"


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    options = arguments(argv)
    device = torch.device(options.device)
    facts = machine(device)
    folder = Path(options.results) if options.results else RESULTS / slug(facts["name"])
    store, build, clock = Store(folder / "layer.jsonl"), build_id(), Clock(device, options.clock)
    settings = {"build": build, "rounds": options.rounds, "slice": options.slice, "clock": options.clock}
    cases = [Case(*shape, dtype, t) for t in options.threads for dtype in options.dtypes for shape in options.shapes]
    known = {tuple(c["case"].values()): set() for c in store.read()}
    for cell in store.read():
        if all(cell[key] == value for key, value in settings.items()):
            known[tuple(cell["case"].values())].add(cell["rival"])
    todo = [case for case in cases if options.fresh or not set(options.rivals) <= known.get(tuple(case), set())]

    wide = None if sys.stdout.isatty() else 140
    console, threads = Console(width=wide), torch.get_num_threads()
    console.print(", ".join(f"{k} {v}" for k, v in facts.items()) + f", build {build}", highlight=False)
    if len(todo) < len(cases):
        console.print(
            f"{len(cases) - len(todo)} of {len(cases)} cases are in {store.path} already (--fresh measures them again)"
        )
    peaks: dict[tuple, dict[str, float]] = {}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(todo))
            for case in todo:
                progress.update(task, description=case.name())
                torch.set_num_threads(case.threads)
                key = (case.dtype, case.threads)
                if key not in peaks:
                    peaks[key] = ceilings(device, DTYPES[case.dtype], clock)
                results = measure(case, options.rivals, options, clock)
                shared = {"case": case._asdict(), **settings, "machine": facts, "ceilings": peaks[key], "when": time.time()}
                shared["load"] = os.getloadavg()[0]  # above the thread count, other programs ran too
                for result in results:
                    store.append(shared | result)
                show(case, results, peaks[key], console)
                progress.advance(task)
    finally:
        torch.set_num_threads(threads)
    from .plots import draw

    pictures = draw(latest(store.read()), folder)
    console.print(f"results in {store.path}, pictures: {', '.join(p.name for p in pictures)}", highlight=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bench.layer: {error}")
    except KeyboardInterrupt:
        sys.exit("bench.layer: interrupted; what was measured is kept, the same command goes on from there")
