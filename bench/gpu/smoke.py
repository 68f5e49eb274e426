"""Checks each kernel's numbers on this GPU. Every variant runs in its own process, under a watchdog.

    python -m bench.gpu.smoke                    all variants, at most 90 s
    python -m bench.gpu.smoke --one shrink-bf16-16

A variant is an operator, an element type and a rank. It runs twice, must give the same bits, and is compared with float64. CUDA
errors are sticky: after one, no result of that process can be trusted, so no process runs two variants. A failed one is run
again with one hardware feature switched off at a time (LOTR_CUDA_WITHOUT). The feature without which it passes is
switched off for the next variants, and `python -m bench.gpu` keeps it off for all later parts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lotr_ext.ops.planner import CUDA_SWITCHES

from .machine import ROOT, write

if TYPE_CHECKING:
    from .torch_library import TorchLibrary

OPERATORS = ("shrink", "expand_add", "factor_grad", "shrink_grad", "fold", "fold_grad", "small", "rows", "scale_backward")
TYPES = ("bf16", "fp16", "fp32", "tf32")
RANKS = (16, 32, 64, 128, 256)  # the compiled rank classes; of float32, 256 is two launches
WATCHDOG_S = 20
SECONDS = 90
JOBS = min(16, os.cpu_count() or 1)  # concurrent processes: each spends most of its time in start-up


class Variant(NamedTuple):
    operator: str
    kind: str
    rank: int

    def __str__(self) -> str:
        return f"{self.operator}-{self.kind}-{self.rank}"


class Result(NamedTuple):
    """outcome: passed, wrong, crashed, hung or not run. detail: the worst error and its place, or the exception."""

    variant: Variant
    without: tuple[str, ...]
    outcome: str
    detail: str
    seconds: float


def variants() -> list[Variant]:
    """All variants; first the types and ranks that run by default on Hopper, last the largest rank."""
    plain = [Variant(name, kind, rank) for kind in TYPES for rank in RANKS for name in OPERATORS]
    fused = [Variant("fused", kind, rank) for kind in TYPES[:2] for rank in RANKS[:-1]]
    return sorted([*plain, *fused], key=lambda variant: variant.rank == RANKS[-1])


# ---- one variant, in this process ------------------------------------------------------------------------------------


def check(variant: Variant, device: str) -> None:
    """Raises AssertionError if a number is wrong."""
    if variant.operator == "fused":
        return check_fused(variant, device)
    from csrc.simt.checks.arrays import ODD, PACKED
    from csrc.simt.checks.cases import KERNELS
    from csrc.simt.checks.shapes import Shape

    library = library_of(device, variant)
    shapes = [Shape(333, 200, variant.rank - 3, ODD, layers=2), Shape(300, 264, variant.rank, PACKED, layers=3)]
    if device == "cuda":  # few tokens; enough tiles for every SM, so that wgmma, clusters and a cooperative launch are used
        shapes += [Shape(17, 4104, variant.rank), Shape(8448, 1032, variant.rank), Shape(1032, 8448, variant.rank)]
    for shape in shapes:
        problem = KERNELS[variant.operator](shape, variant.kind)
        first, again = problem.run(library), problem.run(library)
        problem.check(first)
        for name, values in again.items():
            assert values.tobytes() == first[name].tobytes(), f"{variant} {shape}: {name} has other bits in a second run"


def library_of(device: str, variant: Variant) -> TorchLibrary:
    """The operators on a device, or of MODULE:CLASS, which takes the variant's name."""
    from .torch_library import TorchLibrary

    module, _, name = device.partition(":")
    return getattr(importlib.import_module(module), name)(str(variant)) if name else TorchLibrary(device)


def check_fused(variant: Variant, device: str) -> None:
    """Checks the fused base product with the adapter, through a layer."""
    import torch

    from .fused_checks import adapted, far, step, truth

    strategy = "fused" if device == "cuda" else "beta"
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        return
    for m, k, n in ((300, 136, 264), (2048, 1032, 1024)):
        layer, x, g = adapted(m, k, n, variant.rank, "cuda" if device == "cuda" else "cpu", strategy)
        if variant.kind == "fp16":
            layer, x, g = layer.half(), x.detach().half().requires_grad_(), g.half()
        errors = far(step(layer, x, g), truth(layer, x, g))
        assert max(errors) < 3e-2, (
            f"{variant} {m}x{k}x{n}: relative errors of y, dx, dA, dB, dcore {[f'{e:.1e}' for e in errors]}"
        )


def run_one(text: str, device: str) -> int:
    """Prints one line of JSON. Returns 1 if a number is wrong; other exceptions end the process."""
    operator, kind, rank = text.rsplit("-", 2)
    try:
        check(Variant(operator, kind, int(rank)), device)
    except AssertionError as error:
        print(json.dumps({"outcome": "wrong", "detail": str(error).splitlines()[0][:300]}))
        return 1
    print(json.dumps({"outcome": "passed", "detail": ""}))
    return 0


# ---- a process per variant--------------------------------------------------------------------------------------------


def run(variant: Variant, device: str, without: Sequence[str], limit: float) -> Result:
    """The outcome of one variant in its process."""
    begin = time.monotonic()
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": places, "LOTR_CUDA_WITHOUT": ",".join(without)}
    if not without:
        del environment["LOTR_CUDA_WITHOUT"]
    command = [sys.executable, "-m", "bench.gpu.smoke", "--one", str(variant), "--device", device]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        outcome, detail = "hung", f"ended after {limit:.0f} s"
    else:
        outcome, detail = outcome_of(process.returncode, out, err)
    return Result(variant, tuple(without), outcome, detail, time.monotonic() - begin)


def outcome_of(status: int, out: str, err: str) -> tuple[str, str]:
    """The outcome by the exit status and the last lines of a process."""
    if status < 0:
        return "crashed", f"signal {signal.Signals(-status).name}"
    try:
        said = json.loads(out.strip().splitlines()[-1])
        return said["outcome"], said["detail"]
    except (IndexError, ValueError, KeyError, TypeError):
        lines = err.strip().splitlines() or [f"exit status {status}"]
        return "crashed", lines[-1][:300]


class Smoke:
    """The whole run: results so far, and the features that are switched off."""

    def __init__(self, device: str, seconds: float, jobs: int = JOBS, watchdog: float = WATCHDOG_S):
        self.device, self.jobs, self.watchdog = device, jobs, watchdog
        self.end = time.monotonic() + seconds
        self.without: list[str] = [name for name in os.environ.get("LOTR_CUDA_WITHOUT", "").split(",") if name]
        self.results: list[Result] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def try_one(self, variant: Variant, without: Sequence[str]) -> Result:
        if self.left() < 1:
            return Result(variant, tuple(without), "not run", "no time left", 0.0)
        result = run(variant, self.device, without, min(self.watchdog, self.left()))
        if result.outcome == "hung" and result.seconds < self.watchdog - 1:  # the whole run's time was over, not the watchdog's
            return result._replace(outcome="not run", detail="no time left")
        return result

    def go(self, chosen: Iterable[Variant]) -> None:
        """Runs all variants in parallel; then finds, for those that failed, the feature at fault."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for result in pool.map(lambda variant: self.try_one(variant, self.without), chosen):
                self.results.append(result)
                if sys.stderr.isatty():
                    print(f"\rsmoke: {len(self.results)} variants, {self.left():.0f} s left ", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        for failed in [result for result in self.results if result.outcome not in ("passed", "not run")]:
            self.find_fault(failed.variant)

    def find_fault(self, variant: Variant) -> None:
        """Adds to `without` the feature without which the variant passes, or all features if no single one suffices."""
        attempts = self.attempts()
        with ThreadPoolExecutor(self.jobs) as pool:  # in parallel: a kernel that hangs uses the watchdog's whole time
            results = list(pool.map(lambda more: self.try_one(variant, [*self.without, *more]), attempts))
        for more, result in zip(attempts, results, strict=True):
            if result.outcome == "passed":
                self.results.append(result)
                self.without += more
                return

    def attempts(self) -> list[list[str]]:
        """Sets of features to switch off: those already off, then each one in addition, then all."""
        others = [name for name in CUDA_SWITCHES if name not in self.without]
        return [[], *([name] for name in others), *([others] if len(others) > 1 else [])]

    def unmended(self) -> list[Result]:
        """Variants that failed and do not pass with the switched-off features."""
        passed = {result.variant for result in self.results if result.outcome == "passed"}
        return [r for r in self.results if r.outcome not in ("passed", "not run") and r.variant not in passed]

    def report(self) -> list[str]:
        """A table with a row per operator and type and a column per rank; below it a line per failure."""
        first = {result.variant: result for result in reversed(self.results)}
        lines = [f"{'':18}" + "".join(f"{f'r = {rank}':>10}" for rank in RANKS)]
        for operator, kind in dict.fromkeys((v.operator, v.kind) for v in first):
            cells = (first.get(Variant(operator, kind, rank)) for rank in RANKS)
            lines.append(f"{operator + ' ' + kind:18}" + "".join(f"{cell.outcome if cell else '-':>10}" for cell in cells))
        for result in self.results:
            if result.outcome not in ("passed", "not run"):
                lines.append(f"{result.outcome}: {result.variant}: {result.detail}")
        counts = Counter(result.outcome for result in first.values())
        lines.append("; ".join(f"{count} {outcome}" for outcome, count in counts.items()))
        if self.without:
            lines.append(f"passes with LOTR_CUDA_WITHOUT={','.join(self.without)}, which stays set for what follows")
        lines += [f"no switch helps: {result.variant}" for result in self.unmended()]
        return lines


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="the backend of the operators: cuda, cpu, or MODULE:CLASS (cuda)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"that all of it may take ({SECONDS})")
    parser.add_argument("--only", help="variants, comma-separated, as shrink-bf16-16 (all)")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--watchdog", type=float, default=WATCHDOG_S, help=f"seconds of one variant ({WATCHDOG_S})")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"processes at a time ({JOBS})")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device not in ("cuda", "cpu") and ":" not in options.device:
        raise ValueError(f"device: expected cuda, cpu or MODULE:CLASS, got {options.device!r}")
    names = {str(variant): variant for variant in variants()}
    for name in (options.one, *(options.only or "").split(",")):
        if name and name not in names:
            raise ValueError(f"only: expected variants as shrink-bf16-16, got {name!r}")
    options.variants = [names[name] for name in options.only.split(",")] if options.only else variants()
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a variant fails with every switch."""
    options = arguments(argv)
    if options.one:
        return run_one(options.one, options.device)
    smoke = Smoke(options.device, options.seconds, options.jobs, options.watchdog)
    smoke.go(options.variants)
    print("\n".join(smoke.report()))
    if options.out:
        rows = [{**result._asdict(), "variant": str(result.variant)} for result in smoke.results]
        write(options.out, {"without": smoke.without, "results": rows})
    return int(bool(smoke.unmended()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"bench.gpu.smoke: {error}")
