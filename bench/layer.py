"""One adapted layer, forward and backward, against its rivals: the adapter's time over the frozen layer's.

    python -m bench.layer                     shapes of known models, as many as fit --minutes; fp32 and bf16; 1 and all threads
    python -m bench.layer --quick             two shapes, under a minute
    python -m bench.layer --all               every model, token count and rank (hours)
    python -m bench.layer --shapes 512x768x768x16,roberta-large:2048:64 --dtypes fp32 --threads 1
    python -m bench.layer --rivals lora-eager,lora-compiled,lotr_ext

The machine's ceilings (a large product, a large addition) are measured first. Every rival is checked against float64 before
it is timed; one that fails is named and left out. All rivals of a case are interleaved; a time is the median over rounds, an
excess is the median of per-round ratios to the frozen layer. On a GPU each case is measured by the device's own clock,
eagerly from idle to idle, and as CUDA graphs, always with a cold L2; clocks and throttling before and after are kept. Results
are appended to bench/results/<machine>/layer.jsonl (--quick: to demo_results/bench/layer.jsonl); cells measured before with the
same build and settings are shown and not measured again (--fresh does). The adapters are kept in the layer's own dtype for
every rival, so that all do the same arithmetic.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
from functools import partial
from pathlib import Path

import torch

from .measure.bounds import DIRECTIONS, work
from .measure.counted import peak_bytes
from .measure.forms import FORMS, more_forms, stages
from .measure.names import named
from .measure.session import ROUNDS, Session, Table, add_options, bytes_text, check_options, start, time_text
from .measure.shapes import DTYPES, QUICK, TARGETS, Case, candidates, layer_name, parse_shapes, within
from .measure.timing import Timed, interleave
from .pictures import draw_measured
from .rivals import registry as rv
from .rivals.base import Rival, Tensors
from .rivals.library import obstacle
from .rivals.truth import Truth, check, saved_bytes

MINUTES, SLICE = 12.0, 0.03
COMPILE_S = 6.0  # of torch.compile, a case
AUTOTUNE_S = 40.0  # of its search for the fastest product, a case and rival
AROUND_S = 0.005  # of a call that is timed by events: the queue ahead of it, the flush of L2


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    which.add_argument("--shapes", help="MxKxNxR or MODEL:TOKENS:RANK, comma-separated")
    which.add_argument("--all", action="store_true", help="every model, token count and rank")
    add_options(parser)
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"about how long the default shapes may take ({MINUTES})"
    )
    parser.add_argument("--rivals", help=f"some of {', '.join(rv.RIVALS)}")
    parser.add_argument(
        "--autotune", action="store_true", help="on a GPU two more rivals, after a search for the fastest product"
    )
    parser.add_argument("--slice", type=float, default=SLICE, help=f"seconds a measurement of one rival takes ({SLICE})")
    options = parser.parse_args(argv)
    check_options(options, rounds=7 if options.quick else ROUNDS["layer"])
    if options.autotune and options.device != "cuda":
        raise ValueError("autotune: expected --device cuda; only there a search for the fastest product exists")
    if not (math.isfinite(options.slice) and options.slice > 0 and math.isfinite(options.minutes) and options.minutes > 0):
        raise ValueError(f"slice, minutes: expected positive numbers, got {options.slice}, {options.minutes}")
    options.chosen = options.rivals is not None
    options.rivals = rv.available(options.rivals.split(",")) if options.chosen else list(rv.DEFAULT)
    if rv.FLOOR not in options.rivals:
        options.rivals.insert(0, rv.FLOOR)
    options.shapes = parse_shapes(options.shapes) if options.shapes is not None else None
    return options


def rivals_of(case: Case, options: argparse.Namespace) -> list[str]:
    """The rivals of a case: the chosen ones, or the default ones; at the targets (on a GPU everywhere) all that can run."""
    names = list(options.rivals)
    if not options.chosen and not options.quick and (options.device == "cuda" or case[:4] in TARGETS):
        names += rv.EXTRA
    names += rv.AUTOTUNED if options.autotune else ()
    names = [name for name in rv.RIVALS if name in names]
    return [name for name in rv.installed(names)[0] if obstacle(name, case, torch.device(options.device)) is None]


def refused(cases: list[Case], options: argparse.Namespace) -> list[str]:
    """A line for each rival that was chosen by name and cannot run a case, once per reason."""
    device, names = torch.device(options.device), options.rivals if options.chosen else ()
    found = [(name, obstacle(name, case, device)) for case in cases for name in names]
    return list(dict.fromkeys(f"{name}: {reason}" for name, reason in found if reason is not None))


def cost_seconds(case: Case, options: argparse.Namespace, ceilings: dict[str, float]) -> float:
    """About how long measuring a case takes: the rounds, the checks, and torch.compile if it is a rival."""
    step = max(work(case, "step", True).least_seconds(ceilings), 50e-6)
    names = rivals_of(case, options)
    once = 1.3 * step + (AROUND_S if options.clock == "events" else 0.0)
    rounds = (options.rounds + 4) * len(names) * (once + max(options.slice, once))
    forms = 1 + (len(FORMS) if options.clock == "events" else 0)
    compiled = COMPILE_S * ("lora-compiled" in names) + AUTOTUNE_S * len(set(names) & set(rv.AUTOTUNED))
    return forms * rounds + (4 * len(names) + 8) * step + compiled


def needed_bytes(case: Case) -> int:
    """About the memory of a case and its float64 check."""
    m, k, n, r, element = *case[:4], DTYPES[case.dtype].itemsize
    return m * (k + n) * (4 * 8 + 4 * element) + n * k * (8 + 2 * element) + 20 * r * (k + n) * 8


def free_bytes(device: torch.device) -> int:
    """The memory that a new program could use, as the operating system estimates it; all memory if there is no estimate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return 1024 * int(found[1]) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose(options: argparse.Namespace, session: Session) -> list[Case]:
    """The cases to measure: the chosen shapes, or in the order of `candidates` those that fit the time and the memory."""
    groups = [(dtype, threads) for threads in options.threads for dtype in options.dtypes]
    given = options.shapes or (QUICK[options.device] if options.quick else None)
    shapes = given or candidates(options.device)
    chosen: list[Case] = []
    for dtype, threads in groups:
        ceilings = session.first_ceilings(dtype, threads)
        cases, free = [Case(*shape, dtype, threads) for shape in shapes], free_bytes(session.device)
        for case in cases if given else ():
            if needed_bytes(case) > free:
                session.fail(
                    f"{case.name()}: needs about {needed_bytes(case) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                )
        cases = [case for case in cases if needed_bytes(case) <= (free if given else free / 2)]
        if given is None and not options.all:
            budget = 60 * options.minutes / len(groups)
            cases = list(within(cases, budget, lambda case, c=ceilings: cost_seconds(case, options, c)))
        chosen += cases
    if given is None and len(chosen) < len(shapes) * len(groups):
        session.say(
            f"{len(chosen)} of {len(shapes) * len(groups)} cases, as many as fit {options.minutes:g} minutes and the memory"
        )
    return chosen


class Inputs:
    """Copies of x, one per rival, shuffled each round: on a CPU the address of x changes a layer's time by up to 2 %."""

    def __init__(self, x: torch.Tensor, count: int):
        self.copies = [x.clone().requires_grad_() for _ in range(count)]

    def deal(self, draw: random.Random) -> None:
        for x in self.copies:
            x.grad = None
        draw.shuffle(self.copies)


def timed(rivals: list[Rival], x: torch.Tensor, g: torch.Tensor) -> tuple[list[Timed], Inputs]:
    inputs = Inputs(x, len(rivals))

    def drop_gradients(i: int, parameters: list[torch.Tensor]) -> None:
        for leaf in (inputs.copies[i], *parameters):
            leaf.grad = None

    def call(i: int, rival: Rival) -> Timed:
        stages = (lambda _: rival.layer(inputs.copies[i]), lambda y: y.backward(g))
        return Timed(stages, partial(drop_gradients, i, [p for p, _ in rival.parameters.values()]))

    return [call(i, rival) for i, rival in enumerate(rivals)], inputs


def build(case: Case, names: list[str], session: Session, x: torch.Tensor, g: torch.Tensor) -> list[tuple[dict, Rival]]:
    """The rivals that pass their check, each with its first results; prints a line for each other one."""
    tensors = Tensors.random(case, session.device)
    truth = Truth(tensors, case, x, g)
    found = []
    for name in names:
        with session.attempt(f"{name}, {case.name()}", ends=()):  # a ValueError from a rival's package is no bad option
            rival = rv.RIVALS[name](tensors, case)
            result = {"rival": name, "label": rival.name, "error": check(rival, truth)}
            result["saved_bytes"] = saved_bytes(rival, tensors, x)
            found.append((result, rival))
    return found


def measure(case: Case, names: list[str], session: Session) -> list[dict]:
    """One result per rival: forward, backward, and both ("step")."""
    options, device, dtype = session.options, session.device, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.m, case.k, generator=generator).to(device, dtype)
    g = torch.randn(case.m, case.n, generator=generator).to(device, dtype)
    group = build(case, names, session, x, g)
    if not any(result["rival"] == rv.FLOOR for result, _ in group):
        return []
    calls, inputs = timed([rival for _, rival in group], x, g)
    for (result, _), call in zip(group, calls):
        call.prepare()
        result["peak_bytes"] = peak_bytes(call.run, device)
    kept = [result["rival"] for result, _ in group]
    with session.watched(case.name()) as state:
        times = interleave(calls, session.clock, options.rounds, options.slice, True, inputs.deal)
        forms = more_forms(session, kept, calls, rv.FLOOR, options.slice, inputs.deal)
    floor = times[kept.index(rv.FLOOR)]
    ceilings = session.ceilings(case.dtype, case.threads)
    for (result, rival), own in zip(group, times):
        result |= {"ceilings": ceilings, "gpu": state, **forms[result["rival"]]}
        for direction, stage in stages(own, floor).items():
            least = work(case, direction, adapted=bool(rival.parameters), trained="A" in rival.parameters)
            seconds = stage["seconds"][1]
            rates = {"flops_per_s": least.flops / seconds, "bytes_per_s": least.bytes / seconds}
            result[direction] = stage | rates | {"of_bound": least.least_seconds(ceilings) / seconds}
    return [result for result, _ in group]


def show(case: Case, results: list[dict], session: Session) -> None:
    eager = next((r for r in results if r["rival"] == rv.LORA_EAGER), None)
    name = layer_name(case.k, case.n)
    title = f"{case.name()}{f', {name}' if name else ''}   extra FLOPs {case.extra_flops():.1%}"
    heads = [head for direction in ("forward", "backward", "both") for head in (direction, "excess")]
    table = Table(title, "", *heads, "(quartiles)", f"x {named(rv.LORA_EAGER)}")
    forms = [form for form in FORMS if any(form in result for result in results)]
    more = [head for form in forms for head in (form, "excess")]
    for head in (*more, "GFLOP/s", "GB/s", "forward, backward", "of bound", "saved", "peak", "error"):
        table.add_column(head)
    for result in results:
        step, is_floor = result["step"], result["rival"] == rv.FLOOR
        low, excess, high = step["excess"]
        times = []
        for direction in DIRECTIONS:
            stage = result[direction]
            times += [time_text(stage["seconds"][1]), "" if is_floor else f"{stage['excess'][1]:.1%}"]
        in_forms = []
        for form in forms:
            stage = result.get(form, {}).get("step")
            in_forms += ["-", "-"] if stage is None else [time_text(stage["seconds"][1]), f"{stage['excess'][1]:.1%}"]
        rates = ", ".join(f"{result[direction]['bytes_per_s'] / 1e9:.3g}" for direction in ("forward", "backward"))
        table.add_row(
            result["label"], *times, "" if is_floor else f"{low:.1%}, {high:.1%}",
            f"{excess / eager['step']['excess'][1]:.2f}" if eager and not is_floor else "",
            *in_forms, f"{step['flops_per_s'] / 1e9:.4g}", f"{step['bytes_per_s'] / 1e9:.3g}", rates, f"{step['of_bound']:.0%}",
            bytes_text(result["saved_bytes"]), bytes_text(result["peak_bytes"]), f"{result['error']:.0e}",
        )  # fmt: skip
    print(table)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "layer.jsonl", slice=options.slice)
    session.introduce()
    if not options.chosen:
        for line in rv.installed(list(rv.RIVALS))[1]:
            session.say(line)
    chosen = choose(options, session)
    for line in refused(chosen, options):
        session.fail(line)
    session.run(
        chosen, lambda case: rivals_of(case, options), lambda case: measure(case, rivals_of(case, options), session), show
    )
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.layer", main)
