"""A transformer's block with all its linear layers adapted: the time of all adapters together, and what sharing u saves.

    python -m bench.block                                     Llama-3-8B's and Qwen3-8B's block; on a CPU SmolLM2-135M's
    python -m bench.block --models qwen3-0.6b --tokens 512,2048 --ranks 8,16 --dtypes bf16

A block has siblings: k and v, and gate and up, read one input and have one A, so that u = x A is computed once.
Rivals: the frozen block (q, k, v apart and stacked), LoRA a layer (eager, in place, PEFT), LoRA with q, k, v and gate, up
stacked, LoTR in three lines, and lotr_ext with its siblings on and off. Each is checked against float64 first: it may have at
most twice the error of the plain formula in the same dtype. On a GPU: the device's own time, eager, and as CUDA graphs, with a
cold L2. Results are kept in bench/results/<machine>/block.jsonl.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from .measure.bounds import DIRECTIONS
from .measure.counted import peak_bytes
from .measure.forms import FORMS, more_forms, stages
from .measure.names import chosen, numbers
from .measure.session import ROUNDS, Session, Table, add_options, bytes_text, check_options, start, time_text
from .measure.shapes import DTYPES
from .measure.timing import Timed, check_error, interleave, training
from .rivals import block as rb
from .rivals.library import missing_package, require

MODELS = {"cuda": ("llama-3-8b", "qwen3-8b"), "cpu": ("smollm2-135m",)}
TOKENS = {"cuda": (2048, 8192, 512, 16), "cpu": (512,)}
RANKS = {"cuda": (16, 64, 8, 128), "cpu": (16,)}
CHECKED = 2048  # tokens of the check, since float64 is slow; every kernel path runs with fewer tokens
SLICE = 0.03


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.block", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="bf16")
    parser.add_argument("--quick", action="store_true", help="one model, one token count, one rank, few rounds")
    parser.add_argument("--models", help=f"some of {', '.join(rb.MODELS)}")
    parser.add_argument("--tokens", help=f"comma-separated; above {rb.SEQUENCE} a multiple of it")
    parser.add_argument("--ranks", help=f"comma-separated ({','.join(map(str, RANKS['cuda']))}; on a CPU 16)")
    parser.add_argument("--rivals", help=f"some of {', '.join(rb.RIVALS)}")
    options = parser.parse_args(argv)
    check_options(options, rounds=5 if options.quick else ROUNDS["layer"], dtypes="bf16")
    models = MODELS[options.device][: 1 if options.quick else None]
    options.models = chosen("models", options.models, rb.MODELS, models)
    few = 1 if options.quick else None
    options.tokens = numbers("tokens", options.tokens, TOKENS[options.device][:few])
    for m in options.tokens:
        if m > rb.SEQUENCE and m % rb.SEQUENCE:
            raise ValueError(f"tokens: expected a multiple of {rb.SEQUENCE} above it, got {m}")
    options.ranks = numbers("ranks", options.ranks, RANKS[options.device][:few])
    names = chosen("rivals", options.rivals, rb.RIVALS)
    if options.rivals is not None:
        require("rivals", names)
    options.rivals = [r for r in rb.RIVALS if (r in names or r == rb.FLOOR) and missing_package(r) is None]
    return options


def timed(block: rb.Block, x: Tensor, g: Tensor) -> Timed:
    leaf = x.clone().requires_grad_()
    return training(lambda: block(leaf), g, (leaf, *block.trained.values()))


def measure(case: rb.BlockCase, session: Session) -> list[dict]:
    """One result for each rival that passes its check."""
    device, options = session.device, session.options
    generator = torch.Generator().manual_seed(1)
    shape = (case.m, case.sizes.hidden)
    x, g = (torch.randn(*shape, generator=generator).to(device, DTYPES[case.dtype]) for _ in range(2))
    values, results, calls = rb.Values(case, device), [], []
    for rival in options.rivals:
        label, make = rb.RIVALS[rival]
        with session.attempt(f"{rival}, {case.name()}", ends=()):  # a ValueError from a rival's package is no bad option
            error, plain = rb.errors(rival, case._replace(m=min(case.m, CHECKED)), device)
            check_error("", error, 2 * plain + torch.finfo(DTYPES[case.dtype]).eps)
            block = make(case, values)
            call = timed(block, x, g)
            call.prepare()
            peak = peak_bytes(call.run, device)
            trained = sum(p.numel() for p in block.trained.values())
            results.append({"rival": rival, "label": label, "error": error, "peak_bytes": peak, "parameters": trained})
            calls.append(call)
    names = [result["rival"] for result in results]
    if rb.FLOOR not in names:
        return []
    with session.watched(case.name()) as state:
        times = interleave(calls, session.clock, options.rounds, SLICE, True)
        forms = more_forms(session, names, calls, rb.FLOOR, SLICE)
    floor = times[names.index(rb.FLOOR)]
    for result, own in zip(results, times):
        result |= {"gpu": state, **stages(own, floor), **forms[result["rival"]]}
    return results


def show(case: rb.BlockCase, results: list[dict], session: Session) -> None:
    forms = [form for form in FORMS if any(form in result for result in results)]
    heads = [head for direction in DIRECTIONS for head in (direction if direction != "step" else "both", "excess")]
    heads += ["(quartiles)", *(head for form in forms for head in (form, "excess"))]
    table = Table(case.name(), "", *heads, "parameters", "peak", "error")
    for result in results:
        row = []
        for stage in (result[direction] for direction in DIRECTIONS):
            row += [time_text(stage["seconds"][1]), f"{stage['excess'][1]:.1%}"]
        row.append("{0:.1%}, {2:.1%}".format(*result["step"]["excess"]))
        for form in forms:
            stage = result.get(form, {}).get("step")
            row += ["-", "-"] if stage is None else [time_text(stage["seconds"][1]), f"{stage['excess'][1]:.1%}"]
        last = [f"{result['parameters']:,}", bytes_text(result["peak_bytes"]), f"{result['error']:.0e}"]
        table.add_row(result["label"], *row, *last)
    print(table)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "block.jsonl")
    session.introduce()
    cases = [
        rb.BlockCase(model, m, r, dtype, threads)
        for threads in options.threads
        for dtype in options.dtypes
        for model in options.models
        for r in options.ranks
        for m in options.tokens
    ]
    session.run(cases, lambda case: options.rivals, lambda case: measure(case, session), show)
    return session.finish()


if __name__ == "__main__":
    start("bench.block", main)
