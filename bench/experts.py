"""A mixture's experts: the time and memory that an adapter adds to the frozen ones, forward and backward.

    python -m bench.experts                      2048 tokens; 32 experts H 512, I 256 and H 1024, I 512; top 4, r = 16
    python -m bench.experts --shapes 4096x2048x768x128x8x16 --dtypes bf16 --device cuda

A shape is tokens x hidden x intermediate x experts x top k x rank. Rivals share one set of frozen weights of Qwen3-MoE's
experts module, run by transformers' grouped products: PEFT's LoRA by target_parameters, LoRA an expert by grouped products, and
lotr_ext at the same rank. The routing is random and the same for all. Each adapter's gradients are compared with the same
module's in float64 first. Times are medians over interleaved rounds; the excess is over the frozen experts of the same round;
peak: the most that a step has allocated at once. Results go to bench/results/<machine>/experts.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .measure.counted import peak_bytes
from .measure.forms import stages
from .measure.names import sizes
from .measure.session import ROUNDS, Session, Table, add_options, check_options, start
from .measure.shapes import DTYPES
from .measure.timing import check_error, interleave, training
from .pictures import draw_measured
from .rivals.experts import HEADS, LABELS, OURS, SHAPES, frozen, rivals, row_of

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 2e-2}  # of the adapter's gradients against float64


class ExpertsCase(NamedTuple):
    """m tokens, each to top_k of e experts of [2 i, h] and [h, i]."""

    m: int
    h: int
    i: int
    e: int
    top_k: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.m} tokens, {self.e} experts {self.h}x{self.i} top {self.top_k} r{self.r} {self.dtype} t{self.threads}"


def routing(case: ExpertsCase, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """top_k different experts per token, and their weights."""
    gen = torch.Generator().manual_seed(1)
    scores, index = torch.rand(case.m, case.e, generator=gen).topk(case.top_k)
    return index.to(device), (scores / scores.sum(1, keepdim=True)).to(device, dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random values for parameters that start at zero, so that no gradient vanishes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(0, 0.5 if name.endswith(".core") else 0.02)


def gradient_error(model: nn.Module, case: ExpertsCase, x: Tensor, g: Tensor) -> float:
    """The largest relative error of the adapter's gradients against the same model's in float64, on few tokens."""
    few = min(case.m, 64)
    index, weights = routing(case._replace(m=few), x.device, x.dtype)
    wide = copy.deepcopy(model).double()
    found = []
    for one in (model, wide):
        dtype = torch.float64 if one is wide else x.dtype
        one(x[:few].detach().to(dtype), index, weights.to(dtype)).backward(g[:few].to(dtype))
        found.append([p.grad.double() for p in trained(one)])
        for parameter in trained(one):
            parameter.grad = None
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(*found))


def measure(case: ExpertsCase, session: Session) -> list[dict]:
    """One result per rival."""
    device, dtype = session.device, DTYPES[case.dtype]
    torch.manual_seed(0)
    made = rivals(frozen(case.h, case.i, case.e, dtype, device), case.r)
    x = torch.randn(case.m, case.h, device=device).to(dtype).requires_grad_()
    g, (index, weights) = torch.randn(case.m, case.h, device=device).to(dtype), routing(case, device, dtype)
    results, calls = [], []
    for rival, model in made.items():
        randomize(model)
        parameters = trained(model)
        timed = training(lambda model=model: model(x, index, weights), g, (x, *parameters))
        result = {"rival": rival, "label": LABELS[rival], "parameters": sum(p.numel() for p in parameters)}
        if rival == OURS:
            result["error"] = gradient_error(model, case, x, g)
            check_error(f"{rival}: gradients: ", result["error"], TOLERANCE[case.dtype])
        timed.run()
        timed.prepare()
        result["peak_bytes"] = peak_bytes(timed.run, device)
        results.append(result)
        calls.append(timed)
    times = interleave(calls, session.clock, session.options.rounds, 0.0)
    for result, own in zip(results, times):
        result |= stages(own, times[0])
    return results


def show(case: ExpertsCase, results: list[dict], session: Session) -> None:
    table = Table(case.name(), *HEADS)
    for result in results:
        table.add_row(*row_of(result, results))
    print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.experts", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="fp32")
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--shapes", help=f"comma-separated MxHxIxExKxR ({SHAPES['cpu']}; on a GPU {SHAPES['cuda']})")
    options = parser.parse_args(argv)
    check_options(options, rounds=3 if options.quick else ROUNDS["experts"], dtypes="fp32")
    usual = SHAPES[options.device].split(",")
    text = ",".join(usual[: 1 if options.quick else None]) if options.shapes is None else options.shapes
    options.shapes = sizes("shapes", text, "MxHxIxExKxR")
    for _, _, _, experts, top_k, _ in options.shapes:
        if top_k > experts:
            raise ValueError(f"shapes: expected a top k of at most the {experts} experts, got {top_k}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "experts.jsonl")
    session.introduce()
    cases = [ExpertsCase(*shape, d, t) for t in options.threads for d in options.dtypes for shape in options.shapes]
    session.run(cases, lambda case: LABELS, lambda case: measure(case, session), show)
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.experts", main)
