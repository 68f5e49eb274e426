"""The fused kernel of base product and adapter (docs/hopper.md) on a Hopper GPU, compared with the library's product.

    python -m bench.fused                     the four shapes of the model and their dx; needs a GPU of compute capability 9.0
    python -m bench.fused --shapes 4096x4096x4096x16 --dtypes bf16
    python -m bench.fused --dry-run           the cases, with the times that the model predicts; needs no GPU

A shape is tokens x in x out x rank. Of each, y = x W^T and dx = g W: the library's product; the kernel at rank 1, which is its
bare product (the rank's k-step and the scouts are a hundredth of it); the kernel at the rank; and the beta strategy's launches.
Each is checked against float64 on a slice of its rows. "must reach" is the share of the library's speed that the kernel needs
to take beta's time, by the model of bench.static. Results go to bench/results/<machine>/fused.jsonl.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lotr_ext.ops import planner

from .measure.bounds import Work
from .measure.session import ROUNDS, Session, Table, add_options, check_options, start, time_text
from .measure.shapes import DTYPES, Shape, parse_shapes
from .measure.timing import Timed, against, check_error, interleave
from .projection import fused as static
from .projection.cards import CARDS

FLOOR, BARE, FUSED, BETA = "library", "gemm_lotr, rank 1", "gemm_lotr", "beta"
HEADS = ("M x K x N, r", "direction", FLOOR, BARE, "of the library's speed", "must reach", FUSED, BETA, "fused over beta")
CHECKED = 256  # rows of the slice


class FusedCase(NamedTuple):
    """direction "y": m x k x n; "dx": the same layer's backward. Kept with its results."""

    m: int
    k: int
    n: int
    r: int
    direction: str
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.direction} {self.m}x{self.k}x{self.n} r{self.r} {self.dtype}"

    def extents(self) -> tuple[int, int]:
        """(summed over, columns)."""
        return (self.k, self.n) if self.direction == "y" else (self.n, self.k)


class Problem:
    """x [m, inner], W as it lies, factors of the rank and of rank 1."""

    def __init__(self, case: FusedCase, device: torch.device):
        inner, outer = case.extents()
        generator = torch.Generator(device).manual_seed(3)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.empty(shape, device=device).normal_(0.0, scale, generator=generator)
            return values.to(DTYPES[case.dtype])

        self.backward = case.direction == "dx"
        self.x = normal(case.m, inner)
        self.weight = normal(case.n, case.k, scale=inner**-0.5)
        self.W = self.weight if self.backward else self.weight.T  # [inner, outer]
        self.A, self.F = normal(inner, case.r, scale=inner**-0.5), normal(outer, case.r, scale=case.r**-0.5)
        self.operands = {r: (self.A[:, :r].T.contiguous(), rows_of(self.F[:, :r])) for r in (1, case.r)}

    def library(self) -> Tensor:
        return self.x @ self.W

    def own(self, r: int) -> Tensor:
        return torch.ops.lotr.gemm_lotr(self.x, self.weight, None, *self.operands[r], self.backward)[0]

    def beta(self) -> Tensor:
        y = torch.ops.lotr.shrink(self.x, self.A) @ self.F.T
        return y.addmm_(self.x, self.W)

    def error(self, y: Tensor, r: int) -> float:
        """Relative, of the last rows."""
        x = self.x[-CHECKED:].double()
        want = x @ self.W.double()
        if r:
            want += (x @ self.A[:, :r].double()).to(y.dtype).double() @ self.F[:, :r].double().T
        return ((y[-CHECKED:].double() - want).norm() / want.norm()).item()


def rows_of(F: Tensor) -> Tensor:
    """F with rows that start at multiples of 16 bytes."""
    padded = F.new_zeros(F.shape[0], -(-F.shape[1] // 8) * 8)
    padded[:, : F.shape[1]] = F
    return padded[:, : F.shape[1]]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fused", description=__doc__.split("\n\n")[0])
    add_options(parser, dtypes="bf16")
    parser.set_defaults(device="cuda")
    parser.add_argument("--shapes", help="MxKxNxR or MODEL:TOKENS:RANK, comma-separated (those of the model)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured; needs no GPU")
    options = parser.parse_args(argv)
    options.shapes = static.SHAPES if options.shapes is None else parse_shapes(options.shapes)
    for shape in options.shapes:
        check_shape(shape)
    if options.dry_run:
        options.dtypes, options.threads = (options.dtypes or "bf16").split(","), [1]
        return options
    if options.device != "cuda" or not torch.cuda.is_available():
        raise ValueError("device: expected a GPU of compute capability 9.0, found none; --dry-run shows the plan")
    obstacle = planner.cuda_obstacle(torch.cuda.current_device()) or planner.fused_obstacle(
        1, torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    )
    if obstacle is not None:
        raise ValueError(f"the kernel cannot run here: {obstacle}")
    return check_options(options, rounds=ROUNDS["kernels"], dtypes="bf16")


def check_shape(shape: Shape) -> None:
    _, k, n, r = shape
    if k % 8 or n % 8:
        raise ValueError(f"shapes: expected widths that are multiples of 8, got {k} and {n}")
    if not 1 <= r <= planner.FUSED_MAX_RANK:
        raise ValueError(f"shapes: expected ranks from 1 to {planner.FUSED_MAX_RANK}, got {r}")


def cases_of(options: argparse.Namespace) -> list[FusedCase]:
    """Both directions of every shape and dtype."""
    shapes = [(shape, direction) for shape in options.shapes for direction in ("y", "dx")]
    return [FusedCase(*shape, direction, dtype, 1) for dtype in options.dtypes for shape, direction in shapes]


def must_reach(case: FusedCase, card: str) -> float | None:
    """By the model of a card of that name; None for one that it does not know."""
    gpu = next((gpu for gpu in static.hopper() if CARDS[gpu].is_called(card)), None)
    return None if gpu is None else static.model(case.m, *case.extents(), case.r, gpu, case.direction == "dx").may_stay


def measure(case: FusedCase, session: Session) -> list[dict]:
    problem = Problem(case, session.device)
    sides = {FLOOR: problem.library, BARE: partial(problem.own, 1), FUSED: partial(problem.own, case.r), BETA: problem.beta}
    ranks = {FLOOR: 0, BARE: 1, FUSED: case.r, BETA: case.r}
    errors = {name: problem.error(call(), ranks[name]) for name, call in sides.items()}
    for name, error in errors.items():
        check_error(f"{name}: ", error, 2 * errors[FLOOR] + torch.finfo(DTYPES[case.dtype]).eps)
    with session.watched(case.name()) as state:
        calls = [Timed([lambda _, call=call: call()]) for call in sides.values()]
        times = interleave(calls, session.clock, session.options.rounds, 0.01, settle=True)
    inner, outer = case.extents()
    work = Work(2 * case.m * inner * outer, 2 * (case.m * inner + inner * outer + case.m * outer))
    results = []
    for name, (own,) in zip(sides, times):
        step = against(own, times[0][0])
        step["flops_per_s"] = work.flops / step["seconds"][1]
        result = {"rival": name, "label": name, "error": errors[name], "step": step, "gpu": state}
        results.append(result | {"must_reach": must_reach(case, session.facts["name"])})
    return results


def add_row(table: Table, case: FusedCase, results: list[dict], session: Session) -> None:
    seconds = {result["rival"]: result["step"]["seconds"][1] for result in results}
    reach = results[0]["must_reach"]
    table.add_row(
        f"{case.m} x {case.k} x {case.n}, {case.r}",
        f"{case.direction}, {case.dtype}",
        *(time_text(seconds[name]) for name in (FLOOR, BARE)),
        f"{seconds[FLOOR] / seconds[BARE]:.1%}",
        "-" if reach is None else f"{reach:.1%}",
        *(time_text(seconds[name]) for name in (FUSED, BETA)),
        f"{seconds[FUSED] / seconds[BETA] - 1:+.1%}",
    )


def show_plan(cases: list[FusedCase]) -> None:
    """What would be measured, with the model's times for an H100."""
    table = Table("Plan; times of a model of an H100, not measured", *(h for h in HEADS if h not in (BARE, HEADS[4])))
    for case in cases:
        found = static.model(case.m, *case.extents(), case.r, "h100", case.direction == "dx")
        beta = found.base_seconds * (1 + found.beta)
        times = [time_text(s) for s in (found.seconds, beta)]
        where = [f"{case.m} x {case.k} x {case.n}, {case.r}", f"{case.direction}, {case.dtype}", time_text(found.base_seconds)]
        table.add_row(*where, f"{found.may_stay:.1%}", *times, f"{found.seconds / beta - 1:+.1%}")
    print(table)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    cases = cases_of(options)
    if options.dry_run:
        show_plan(cases)
        return 0
    session = Session(options, "fused.jsonl")
    session.introduce()
    table = Table("The base product with the adapter inside", *HEADS)
    session.run(cases, lambda case: (FLOOR, BARE, FUSED, BETA), lambda case: measure(case, session), partial(add_row, table))
    print(table)
    return session.finish()


if __name__ == "__main__":
    start("bench.fused", main)
