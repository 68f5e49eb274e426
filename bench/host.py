"""Host overhead of an adapted layer, forward and backward, in us per layer, at sizes at which the products take almost no time.

    python -m bench.host                      24 layers of width 32; 1, 16, 160 tokens; chained and as q, k, v; fp32, 1 thread
    python -m bench.host --tokens 1,2048 --layers 96 --clock wall

At this width Python, the dispatcher and autograd take nearly all of the time, as in a small model or with few tokens. chained:
the x of a layer is the y of the one before. siblings: three layers on one x, as q, k and v of a block. Every rival has the same
weights; the LoTR ones are compared with the formula in float64 first. All rivals of a case are interleaved; a time is the
median over rounds, a ratio the median of per-round ratios to the formula in three lines of torch on as many factors.

The table also has counts per layer, which do not depend on the machine's load: Python calls in lotr_ext's files
(sys.setprofile), operators that Python and autograd dispatch, and the products of which a fused operator consists. The same
counts for the CUDA path use tensors that look like CUDA tensors to Python, so they need no GPU. Results go to
bench/results/<machine>/host.jsonl.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lotr_ext.ops import planner

from .measure.as_cuda import META, as_cuda
from .measure.bounds import DIRECTIONS
from .measure.host_calls import count_step, count_text
from .measure.names import chosen, named, numbers
from .measure.session import ROUNDS, Session, Table, add_options, check_options, start, time_text
from .measure.shapes import DTYPES, Case
from .measure.timing import Timed, against, check_error, interleave, quartiles, training, with_sum
from .pictures import draw_measured
from .rivals import host as rh
from .rivals.host import LAYERS, RANK, TOKENS, WIDTH

# Of y and dx against float64 through all layers, and of A's gradient.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.2, "fp16": 5e-2}


class HostCase(NamedTuple):
    """`layers` layers [width, width] at m tokens; form: chained or siblings."""

    form: str
    layers: int
    m: int
    k: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.form} {self.layers} layers {self.m}x{self.k}x{self.k} r{self.r} {self.dtype} t{self.threads}"

    def layer(self) -> Case:
        return Case(self.m, self.k, self.k, self.r, self.dtype, self.threads)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def step_of(stack: nn.Module, x: Tensor, g: Tensor) -> Timed:
    return training(lambda: stack(x), g, (x, *(p for p in stack.parameters() if p.requires_grad)))


def check(stacks: dict[str, nn.Module], truth: nn.Module, x: Tensor, g: Tensor, dtype: str) -> dict[str, float]:
    """The largest relative error of y and dx of each LoTR stack against the formula's in float64. ArithmeticError above
    TOLERANCE."""
    wide = x.detach().double().requires_grad_()
    expected = truth(wide)
    expected.backward(g.double())
    errors = {}
    for name, stack in stacks.items():
        if not rh.RIVALS[name].is_lotr:
            continue
        x.grad = None
        y = stack(x)
        y.backward(g)
        errors[name] = max(relative(y.detach(), expected.detach()), relative(x.grad, wide.grad))
        check_error(f"{name}: y, dx: ", errors[name], TOLERANCE[dtype])
    return errors


def counts_on_cuda(case: HostCase, names: list[str]) -> dict[str, dict]:
    """`count_step` of each rival on what looks like a GPU; none without our CUDA kernels in the build."""
    if not planner.build_info()["cuda"]["built"]:
        return {}
    found, layer, dtype = {}, case.layer(), DTYPES[case.dtype]
    tensors = rh.values(layer, case.layers, META)
    x, g = (torch.empty(case.m, case.k, dtype=dtype, device=META, requires_grad=needs) for needs in (True, False))
    for name in names:
        call = step_of(rh.stack(name, tensors, layer, case.form), x, g)
        with as_cuda():
            call.run()
            found[name] = count_step(call, case.layers)
    return found


def measure(case: HostCase, names: list[str], session: Session) -> list[dict]:
    """One result a rival; seconds are a layer's."""
    device, dtype = session.device, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(case.m, case.k, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    tensors, layer = rh.values(case.layer(), case.layers, device), case.layer()
    stacks = {name: rh.stack(name, tensors, layer, case.form) for name in names}
    errors = check(stacks, rh.stack(rh.LOTR, rh.wide(tensors), layer, case.form), x, g, case.dtype)
    results, calls = [], [step_of(stack, x, g) for stack in stacks.values()]
    on_cuda = counts_on_cuda(case, names)
    for name, call in zip(stacks, calls):
        result = {"rival": name, "label": rh.RIVALS[name].label, "error": errors.get(name)}
        counts = {"counts": count_step(call, case.layers), "counts_on_cuda": on_cuda.get(name)}
        results.append(result | counts)
    times = interleave(calls, session.clock, session.options.rounds, 0.0, settle=True)
    seconds = {
        name: {d: [t / case.layers for t in own] for d, own in zip(DIRECTIONS, with_sum(stages))}
        for name, stages in zip(stacks, times)
    }
    for result in results:
        own, like = seconds[result["rival"]], rh.RIVALS[result["rival"]].like
        for direction in DIRECTIONS:
            floor, lora, lotr = (seconds[n][direction] for n in (rh.FLOOR, rh.LORA, like))
            result[direction] = against(own[direction], floor)
            result[direction]["of_lotr"] = quartiles(t / f for t, f in zip(own[direction], lotr))
            extra = [(t - f) / max(o - f, 1e-9) for t, f, o in zip(own[direction], floor, lora)]
            result[direction]["of_lora_excess"] = quartiles(extra)
    return results


def show(case: HostCase, results: list[dict], session: Session) -> None:
    heads = ["", "forward", "backward", "both", "(quartiles)", "x three lines", "(quartiles)", f"x {named(rh.LORA)}'s excess"]
    table = Table(f"{case.name()}, a layer", *heads, "calls in lotr_ext", "operators", "products", "CUDA: calls", "operators")
    for r in results:
        times = [time_text(r[d]["seconds"][1]) for d in DIRECTIONS]
        low, _, high = r["step"]["seconds"]
        below, ratio, above = r["step"]["of_lotr"]
        extra = "" if r["rival"] == rh.FLOOR else f"{r['step']['of_lora_excess'][1]:.2f}"
        counts = [count_text(r["counts"], what) for what in ("own", "dispatched", "operators")]
        counts += [count_text(r["counts_on_cuda"], what) for what in ("own", "dispatched")]
        spread = f"{time_text(low)}, {time_text(high)}"
        table.add_row(r["label"], *times, spread, f"{ratio:.2f}", f"{below:.2f}, {above:.2f}", extra, *counts)
    print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="fp32")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--tokens", help=f"comma-separated ({','.join(map(str, TOKENS))})")
    parser.add_argument("--forms", help=f"some of {', '.join(rh.FORMS)}")
    for name, usual, what in (("layers", LAYERS, "in a stack"), ("width", WIDTH, "of every layer"), ("rank", RANK, "of all")):
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{what} ({usual})")
    parser.add_argument("--rivals", help=f"some of {', '.join(rh.RIVALS)}")
    options = parser.parse_args(argv)
    options.threads = options.threads or "1"
    # CPU seconds of the thread, without other programs' load; on a GPU wall time, since launches are measured here
    options.clock = options.clock or ("cpu" if (options.device, options.threads) == ("cpu", "1") else "wall")
    check_options(options, rounds=9 if options.quick else ROUNDS["host"], dtypes="fp32")
    options.tokens = numbers("tokens", options.tokens, TOKENS)
    options.forms = chosen("forms", options.forms, rh.FORMS)
    if min(options.layers, options.width, options.rank) < 1 or options.layers % rh.SIBLINGS:
        sizes = f"{options.layers}, {options.width}, {options.rank}"
        raise ValueError(f"layers, width, rank: expected positive numbers, layers a multiple of {rh.SIBLINGS}, got {sizes}")
    options.rivals = rh.available(options.rivals.split(",") if options.rivals is not None else None)
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "host.jsonl")
    session.introduce()
    sizes = (options.width, options.rank)
    cases = [
        HostCase(form, options.layers, m, *sizes, dtype, threads)
        for threads in options.threads
        for dtype in options.dtypes
        for form in options.forms
        for m in options.tokens
    ]
    session.run(
        cases,
        lambda case: rh.of_form(options.rivals, case.form),
        lambda case: measure(case, rh.of_form(options.rivals, case.form), session),
        show,
    )
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.host", main)
