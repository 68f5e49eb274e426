"""Each of our kernels alone against the library's product: time, bandwidth, share of the machine's bound.

    python -m bench.kernels                                  every kernel at the shapes of Llama-3-8B; needs a GPU
    python -m bench.kernels --kernels shrink,shrink_grad --shapes 8192x4096x16 --dtypes bf16
    python -m bench.kernels --autotune --shapes 8192x4096x16  a floor that torch.compile has searched for, too
    python -m bench.kernels --plans --shapes 8192x4096x16     beside the chosen plan those that the estimate calls close
    python -m bench.kernels --device cpu                     the CPU operators instead

A shape is tokens x width x rank (fold and fold_grad: layers x width x rank). Both sides are checked against float64 first; ours
may have at most twice the library's error, plus a rounding. A GPU's times are the device's own with a cold L2, its clocks and
throttling before and after are kept. Results go to bench/results/<machine>/kernels.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from lotr_ext.ops import cuda_plans

from .measure.names import chosen, sizes
from .measure.session import ROUNDS, Session, Table, add_options, check_options, start, time_text
from .measure.shapes import DTYPES
from .measure.timing import Timed, against, check_error, interleave
from .pictures import draw_measured
from .rivals import operators as op
from .rivals.library import autotuned

FLOOR, TUNED, OURS = "library", "autotuned", "lotr_ext"
CLOSE, MOST_PLANS = 1.1, 2  # with --plans: the largest estimate over the chosen plan's, and the most plans
SHAPES = {
    "cuda": [(m, n, r) for m in (8192, 512, 2048, 16384) for n in (4096, 1024, 14336) for r in (16, 64, 8, 128)],
    "cpu": [(m, n, r) for m in (512, 2048) for n in (768, 2048) for r in (16, 64)],
}
QUICK = {"cuda": [(8192, 4096, 16)], "cpu": [(2048, 768, 16)]}
T = TypeVar("T")
LAYERS = 32  # folded together, as in Llama-3-8B


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="bf16")
    parser.set_defaults(device="cuda")
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--kernels", help=f"some of {', '.join(op.KERNELS)}")
    parser.add_argument("--shapes", help="MxNxR, comma-separated: tokens (layers for fold), width, rank")
    parser.add_argument("--plans", action="store_true", help="on a GPU, also plans with nearly the lowest estimate")
    parser.add_argument("--autotune", action="store_true", help="on a GPU, also the fastest library product by a search")
    options = parser.parse_args(argv)
    if options.autotune and options.device != "cuda":
        raise ValueError("autotune: expected --device cuda; only there a search for the fastest product exists")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for the CUDA kernels, found none; --device cpu times the CPU operators")
    if options.plans and options.device != "cuda":
        raise ValueError("plans: only the CUDA kernels have plans; expected --device cuda")
    check_options(options, rounds=7 if options.quick else ROUNDS["kernels"], dtypes="bf16")
    options.kernels = chosen("kernels", options.kernels, op.KERNELS)
    options.given = options.shapes is not None
    usual = (QUICK if options.quick else SHAPES)[options.device]
    options.shapes = sizes("shapes", options.shapes, "MxNxR") if options.given else usual
    return options


def cases_of(options: argparse.Namespace) -> list[op.KernelCase]:
    """Each kernel at each shape; without --shapes, fold and fold_grad over LAYERS layers."""
    cases = []
    for threads in options.threads:
        for dtype in options.dtypes:
            for m, n, r in options.shapes:
                for kernel in options.kernels:
                    layers = kernel.startswith("fold") and not options.given
                    cases.append(op.KernelCase(kernel, LAYERS if layers else m, n, r, dtype, threads))
    return list(dict.fromkeys(cases))  # all kernels at the first shape first, so that each is measured if the time ends


def close_plans(case: op.KernelCase, options: argparse.Namespace) -> list[str]:
    """With --plans: the plans besides the chosen one whose estimated time is close to its own, as rules."""
    if not options.plans or case.kernel not in cuda_plans.KERNELS:
        return []
    first, *others = cuda_plans.plans(cuda_plans.Launch(*case[:4]), DTYPES[case.dtype], torch.device(options.device))
    close = [other for other in others if other.microseconds <= CLOSE * first.microseconds]
    return [f"{case.kernel} {other.plan}" for other in close[:MOST_PLANS]]


def rivals_of(case: op.KernelCase, options: argparse.Namespace) -> list[str]:
    return [FLOOR, *([TUNED] if options.autotune else []), OURS, *close_plans(case, options)]


def under(rule: str, call: Callable[[], T]) -> T:
    """The call under a forced plan."""
    with cuda_plans.forced(rule):
        return call()


def measure(case: op.KernelCase, session: Session) -> list[dict]:
    """Results of the library's product, with --autotune of the fastest one that a search finds, of our kernel, and with --plans
    of the close plans."""
    operator = op.make(case, session.device)
    errors = op.errors(operator)
    limit = 2 * errors["library"] + torch.finfo(DTYPES[case.dtype]).eps
    check_error("", errors["ours"], limit)
    sides = [(FLOOR, "library products", "library", operator.library), (OURS, "our kernel", "ours", operator.ours)]
    if session.options.autotune:
        with session.attempt(f"{case.name()}, autotuned", ends=()):
            tuned = autotuned(operator.library)
            tuned()
            sides.insert(1, (TUNED, "library products, autotuned", "library", tuned))
    for rule in close_plans(case, session.options):
        errors[rule] = under(rule, lambda: op.errors(operator))["ours"]
        check_error(f"{rule}: ", errors[rule], limit)
        sides.append((rule, f"our kernel, {rule}", rule, partial(under, rule, operator.ours)))
    calls = [Timed([lambda _, call=call: call()]) for *_, call in sides]
    with session.watched(case.name()) as state:
        times = interleave(calls, session.clock, session.options.rounds, 0.01, settle=True)
    ceilings = session.ceilings(case.dtype, case.threads)
    results = []
    for (rival, label, side, _), (own,) in zip(sides, times):
        step = against(own, times[0][0])
        seconds = step["seconds"][1]
        step |= {"flops_per_s": operator.work.flops / seconds, "bytes_per_s": operator.work.bytes / seconds}
        step["of_bound"] = operator.work.least_seconds(ceilings) / seconds
        result = {"rival": rival, "label": label, "error": errors[side], "ceilings": ceilings, "step": step, "gpu": state}
        results.append(result)
    return results


def add_row(table: Table, case: op.KernelCase, results: list[dict], session: Session) -> None:
    library, ours = results[0], next(r for r in results if r["rival"] == OURS)
    tuned = next((time_text(r["step"]["seconds"][1]) for r in results if r["rival"] == TUNED), "-")
    low, middle, high = (1 + value for value in ours["step"]["excess"])
    times = [time_text(library["step"]["seconds"][1]), tuned, time_text(ours["step"]["seconds"][1])]
    rates = [f"{ours['step']['flops_per_s'] / 1e12:.3g}", f"{ours['step']['bytes_per_s'] / 1e9:.4g}"]
    size, kind = f"{case.m} x {case.n}, {case.r}", f"{case.dtype}, {case.threads}"
    ratio = f"{middle:.2f} ({low:.2f}, {high:.2f})"
    last = [f"{ours['step']['of_bound']:.0%}", f"{ours['error']:.0e}", f"{library['error']:.0e}"]
    table.add_row(case.kernel, size, kind, *times, ratio, *rates, *last)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "kernels.jsonl")
    session.introduce()
    heads = ("kernel", "M x N, r", "dtype, threads", FLOOR, TUNED, "ours", "x library (quartiles)", "TFLOP/s", "GB/s")
    table = Table("Our kernels alone", *heads, "of bound", "error", "library's")
    session.run(
        cases_of(options), lambda case: rivals_of(case, options), lambda case: measure(case, session), partial(add_row, table)
    )
    print(table)
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.kernels", main)
