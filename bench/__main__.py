"""All benchmarks of this machine, one after another: python -m bench (make bench); --quick in about two minutes.

    layer     one adapted layer against its rivals                    bench/layer.py
    block     a transformer's block, its linear layers together       bench/block.py
    shared    the shared gradient against autograd's own sums         bench/shared.py
    model     a transformer trained with each method                  bench/model.py
    host      host overhead of calling an adapted layer            bench/host.py
    experts   the experts of a mixture against PEFT's LoRA            bench/experts.py
    tasks     many tasks trained at once                              bench/tasks.py
    profile   a breakdown of the layer's time (not with --quick)          bench/profile.py
    kernels   each CUDA kernel alone (with a GPU)                     bench/kernels.py
    traffic   counted bytes and a projection (not with --quick)       bench/traffic.py

Results, tables and pictures go to bench/results/<machine>/. Those of --quick, also of a single part, go to demo_results/bench/:
few rounds of few shapes must not replace the numbers in README and docs. After an interruption the same command continues; a
part that fails is named, and the others run.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path

from . import block, experts, host, kernels, layer, model, profile, shared, targets, tasks, traffic
from .measure.names import chosen
from .measure.session import add_options, brief, check_options, choose_folder, start
from .measure.store import RESULTS

PARTS = ("layer", "block", "shared", "model", "host", "experts", "tasks", "profile", "kernels", "traffic")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds, about two minutes")
    parser.add_argument("--minutes", type=float, default=layer.MINUTES, help="minutes for the layer's shapes, about")
    parser.add_argument("--parts", help=f"some of {', '.join(PARTS)} (all that this machine can run)")
    options = parser.parse_args(argv)
    options.counted = options.results  # the folder for results that do not depend on --quick: counts of the kernels
    choose_folder(options)
    options.given = {
        n: getattr(options, n)
        for n in ("threads", "rounds", "clock", "results", "allocator", "isa")
        if getattr(options, n) is not None
    }
    options.chosen_dtypes = options.dtypes
    check_options(options, rounds=1)
    options.parts = chosen("parts", options.parts, PARTS, default_parts(options))
    return options


def default_parts(options: argparse.Namespace) -> list[str]:
    """The parts to run. With --quick: those that measure LoTR's cost; kernels only with a GPU."""
    quick = ("layer", "shared", "model", "host") if options.quick else PARTS
    return [part for part in quick if part != "kernels" or options.device == "cuda"]


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """The arguments of each part."""
    common = ["--device", options.device]
    for name, value in options.given.items():
        common += [f"--{name}", str(value)]
    common += ["--dtypes", options.chosen_dtypes] if options.chosen_dtypes is not None else []
    common += ["--fresh"] if options.fresh else []
    quick = ["--quick", *(["--keep"] if options.keep else [])] if options.quick else []
    found = {part: [*common, *quick] for part in PARTS}
    found["layer"] += [] if options.quick else ["--minutes", str(options.minutes)]
    found["profile"] = common
    found["traffic"] = ["--fresh"] if options.fresh else []
    found["traffic"] += ["--results", str(Path(options.counted) / "simt-executor")] if options.counted else []
    return {part: found[part] for part in options.parts}


def run(parts: dict[str, Callable[[], int]]) -> int:
    """Runs each part; one that fails is named, and the others run. Returns 0 if none failed."""
    worst = 0
    for name, part in parts.items():
        print(f"\n==== {name} ====", flush=True)
        try:
            worst = max(worst, part())
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"bench.{name}: {error}", flush=True)
            worst = 1
        except Exception as error:  # a bug in the part: print its traceback
            traceback.print_exc()
            print(f"bench.{name}: {brief(error)}", flush=True)
            worst = 1
    return worst


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    programs = {"layer": layer, "block": block, "shared": shared, "model": model, "host": host}
    programs |= {"experts": experts, "tasks": tasks, "profile": profile, "kernels": kernels, "traffic": traffic}
    own = commands(options)
    status = run({name: lambda name=name: programs[name].main(own[name]) for name in own})
    if options.device == "cpu" and {"layer", "model"} <= set(own):
        status = max(status, run({"targets": lambda: show_targets(options.results)}))
    print(f"\nresults under {options.results or RESULTS}", flush=True)
    if not options.results:
        print("python -m bench.report puts them into README.md and docs/benchmarks.md", flush=True)
    return status


def show_targets(results: str | None) -> int:
    """Returns 0 also if a target is missed: that is a result, not a failure of the run."""
    targets.main([results] if results else [])
    return 0


if __name__ == "__main__":
    start("bench", main)
