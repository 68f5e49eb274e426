"""An adapted layer's time over the frozen layer by product, and the rest, for Python, autograd and memory.

    python -m bench.profile                                   the targets on a CPU; GPU: 8192 x 4096 x 4096, r = 16
    python -m bench.profile --shapes 512x768x768x16 --dtypes fp32 --threads 1

Interleaved in one process: the frozen layer and lotr_ext's layer (forward + backward, under autograd), and each product of the
layer as an operator of its own, on the same tensors. The rest is the layer's time less the frozen layer's and the products'. A
rest below zero means that products take less time inside the layer: on a CPU each direction is one operator, and the expand
writes the start of the base product instead of reading and writing its result. The unfolded form, for few tokens, has no
operator of its own: all of its time is in the rest. Results go to bench/results/<machine>/profile.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lotr_ext import explain, ops

from .layer import timed
from .measure.bounds import Work, kernel_work
from .measure.session import ROUNDS, Session, Table, add_options, check_options, start, time_text
from .measure.shapes import DTYPES, QUICK, TARGETS, Case, parse_shapes
from .measure.timing import Timed, against, interleave, with_sum
from .rivals import registry as rv
from .rivals.base import SCALING, Tensors

Part = tuple[str, Work, Callable[[], object]]


def parts(case: Case, t: Tensors, x: Tensor, g: Tensor) -> list[Part]:
    """The products that a layer by itself makes, forward and backward, each with its least work."""
    m, k, n, r = case[:4]
    element = x.element_size()

    def part(name: str, kernel: str, rows: int, width: int, call: Callable[[], object]) -> Part:
        return name, kernel_work(kernel, rows, width, r, element), call

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dA, dB, Q = (torch.zeros(rows, r, dtype=wide, device=x.device) for rows in (k, n, n))
    y, dx, cores = g.clone(), x.clone(), t.core[None]
    u, F = ops.shrink(x, t.A), ops.fold(t.B, cores, SCALING, x.dtype)[0]
    return [
        part("shrink: u = x A", "shrink", m, k, lambda: ops.shrink(x, t.A)),
        part("fold: F = s B G^T", "fold", 1, n, lambda: ops.fold(t.B, cores, SCALING, x.dtype)),
        part("expand_add_: y += u F^T", "expand_add", m, n, lambda: ops.expand_add_(y, u, F)),
        part("shrink_grad_: k = g F, Q += g^T u", "shrink_grad", m, n, lambda: ops.shrink_grad_(Q, g, F, u)),
        part("fold_grad: dB, dG", "fold_grad", 1, n, lambda: ops.fold_grad(Q[None], t.B, cores, SCALING, dB)),
        part("expand_add_: dx += k A^T", "expand_add", m, k, lambda: ops.expand_add_(dx, u, t.A)),
        part("factor_grad_: dA += x^T k", "factor_grad", m, k, lambda: ops.factor_grad_(dA, x, u)),
    ]


def measure(case: Case, session: Session) -> list[dict]:
    """One result each for the frozen layer, ours, every operator, and the rest."""
    device, dtype = session.device, DTYPES[case.dtype]
    tensors = Tensors.random(case, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.m, case.k, generator=generator).to(device, dtype)
    g = torch.randn(case.m, case.n, generator=generator).to(device, dtype)
    layers = [rv.RIVALS[name](tensors, case) for name in (rv.FLOOR, rv.OURS)]
    how = explain(layers[1].layer, x.clone().requires_grad_())
    found = [] if how.unfolded else parts(case, tensors, x, g)
    calls, inputs = timed(layers, x, g)
    calls += [Timed([lambda _, call=call: call()]) for _, _, call in found]
    times = interleave(calls, session.clock, session.options.rounds, session.options.slice, True, inputs.deal)
    floor, ours, *alone = [with_sum(stages)[-1] for stages in times]
    ceilings = session.ceilings(case.dtype, case.threads)
    results = [
        {"rival": rv.FLOOR, "label": "frozen layer", "step": against(floor, floor)},
        {"rival": rv.OURS, "label": "lotr_ext", "step": against(ours, floor)},
    ]
    for (name, work, _), own in zip(found, alone):
        step = against([f + t for f, t in zip(floor, own)], floor)
        step |= {"alone_s": sorted(own)[len(own) // 2], "flops": work.flops, "bytes": work.bytes}
        results.append({"rival": name, "label": name, "step": step | {"least_s": work.least_seconds(ceilings)}})
    rest = [o - sum(a[i] for a in alone) for i, o in enumerate(ours)]
    results.append({"rival": "rest", "label": "rest: Python, autograd, memory", "step": against(rest, floor)})
    return results


def show(case: Case, results: list[dict], session: Session) -> None:
    floor, ours = results[0]["step"]["seconds"][1], results[1]["step"]["excess"][1]
    title = f"{case.name()}: extra FLOPs {case.extra_flops():.1%}"
    table = Table(title, "", "time", "of the frozen layer", "of lotr_ext's excess", "GFLOP/s", "GB/s", "of bound")
    for result in results:
        step = result["step"]
        excess = step["excess"][1]
        if result["rival"] == rv.FLOOR:
            table.add_row(result["label"], time_text(floor), "100%", "", "", "", "")
            continue
        share = f"{excess / ours:.0%}" if ours > 0 else ""
        cells = ["", "", ""]
        seconds = excess * floor
        if "alone_s" in step:
            seconds = step["alone_s"]
            speed = [step["flops"] / seconds / 1e9, step["bytes"] / seconds / 1e9]
            cells = [f"{speed[0]:.4g}", f"{speed[1]:.3g}", f"{step['least_s'] / seconds:.0%}"]
        elif result["rival"] == rv.OURS:
            seconds = step["seconds"][1]
        table.add_row(result["label"], time_text(seconds), f"{excess:+.1%}", share, *cells)
    print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--shapes", help="MxKxNxR or MODEL:TOKENS:RANK, comma-separated (the targets)")
    parser.add_argument("--slice", type=float, default=0.02, help="seconds a measurement takes (0.02)")
    options = parser.parse_args(argv)
    check_options(options, rounds=ROUNDS["profile"])
    if not options.slice > 0:
        raise ValueError(f"slice: expected a positive number, got {options.slice}")
    given = parse_shapes(options.shapes) if options.shapes is not None else None
    options.shapes = given or (TARGETS if options.device == "cpu" else QUICK["cuda"])
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "profile.jsonl", slice=options.slice)
    session.introduce()
    cases = [Case(*shape, dtype, t) for t in options.threads for dtype in options.dtypes for shape in options.shapes]
    session.run(cases, lambda case: (rv.FLOOR, rv.OURS, "rest"), lambda case: measure(case, session), show)
    return session.finish()


if __name__ == "__main__":
    start("bench.profile", main)
