"""Every operator in every form against float64, in processes that may crash.

    python -m bench.smoke                           on the GPU
    python -m bench.smoke --forms "shrink;fold" --dtypes bf16 --device cpu
    python -m bench.smoke --in-process --shapes 2   without processes, for compute-sanitizer

A form is an operator with one choice of its options: strategy, dropout, fresh or given sums, few
tokens, rows. Each form runs in its own process: bf16, fp16, fp32, then bf16 with float32 factors.
An outcome is printed as soon as it is known:

    passed     all numbers are right, and a second run has the same bits
    skipped    the device cannot run the form; the reason follows
    wrong      a number differs from float64, or the second run from the first
    failed     an error was raised, for example a CUDA error
    crashed    the process ended
    hung       the process printed nothing for 20 s and was ended

After the last three a new process runs the remaining dtypes, because a CUDA error is sticky. Only
torch and lotr_ext are imported, so that a process starts quickly.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .strategies import FUSED_MAX_RANK, STRATEGIES, fused_obstacle

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("bf16", "fp16", "fp32", "bf16+fp32")
START_S = 90  # for the imports of many processes at once
WATCHDOG_S = 20
SCALING = 0.5
DROPPED = 0.3
SEED = 12345678901
# The largest error of an element, relative to the root mean square of the result.
TOLERANCE = {"bf16": 8e-2, "fp16": 1e-2, "fp32": 5e-5, "bf16+fp32": 8e-2}
# tokens, in, out, r_in. No size is a multiple of a tile. Each rank class of the kernels occurs.
SHAPES = (
    (333, 200, 136, 13),
    (300, 264, 520, 16),
    (17, 1032, 72, 61),
    (520, 264, 136, 64),
    (257, 136, 264, 128),
    (130, 72, 136, 200),
)


class Check(NamedTuple):
    """A result, what it should be in float64, and its name."""

    what: str
    result: Tensor
    truth: Tensor


def torch_dtypes(dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of x and of the factors."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    of_x, _, of_factors = dtype.partition("+")
    return names[of_x], names[of_factors or of_x]


class Operands:
    """Random operands of one shape on a device. r_out is r_in + 3, at most 256."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, device: str):
        self.dtype, self.factor_dtype = torch_dtypes(dtype)
        self.device = device
        self.generator = torch.Generator().manual_seed(7)
        self.m, self.k, self.n, self.r = shape
        r_out = min(self.r + 3, 256)
        self.x = self.normal(self.m, self.k)
        self.g = self.normal(self.m, self.n)
        self.weight = self.normal(self.n, self.k, scale=self.k**-0.5)
        self.bias = self.normal(self.n)
        self.A = self.normal(self.k, self.r, scale=self.k**-0.5, dtype=self.factor_dtype)
        self.B = self.normal(self.n, r_out, scale=r_out**-0.5, dtype=self.factor_dtype)
        self.core = self.normal(self.r, r_out, scale=self.r**-0.5, dtype=self.factor_dtype)
        self.cores = self.normal(4, self.r, r_out, scale=self.r**-0.5, dtype=self.factor_dtype)
        self.u = self.normal(self.m, self.r)
        self.F = self.normal(self.n, self.r, scale=self.r**-0.5)
        self.seed = torch.tensor([SEED], device=device)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*size, generator=self.generator) * scale
        return values.to(self.device, dtype or self.dtype)

    def sums(self, *size: int) -> Tensor:
        """A float32 sum that already has values."""
        return self.normal(*size, dtype=torch.float32)

    def wide(self, *names: str) -> list[Tensor]:
        """The operands of these names in float64 on the CPU."""
        return [getattr(self, name).double().cpu() for name in names]

    def mask(self, columns: int, p: float) -> Tensor:
        from lotr_ext import reference

        return reference.dropout_mask(self.m, columns, p, SEED)


def operators() -> object:
    """torch.ops.lotr, loaded."""
    import lotr_ext.core.operators  # noqa: F401

    return torch.ops.lotr


# ---- the forms -----------------------------------------------------------------------------------


def shrink(o: Operands, p: float = 0.0) -> Iterator[Check]:
    x, A = o.wide("x", "A")
    u = operators().shrink(o.x, o.A, p, o.seed)
    yield Check("u", u, (x * o.mask(o.k, p)) @ A)


def expand_add_(o: Operands, p: float = 0.0) -> Iterator[Check]:
    y, u, F = o.wide("g", "u", "F")
    result = o.g.clone()
    operators().expand_add_(result, o.u, o.F, p, o.seed)
    yield Check("y", result, y + o.mask(o.n, p) * (u @ F.T))


def expand(o: Operands) -> Iterator[Check]:
    y, u, F = o.wide("g", "u", "F")
    yield Check("y", operators().expand(o.g, o.u, o.F), y + u @ F.T)


def fold(o: Operands) -> Iterator[Check]:
    from lotr_ext import reference

    B, core = o.wide("B", "core")
    F = operators().fold(o.B, o.core, SCALING, o.dtype)
    yield Check("F", F, reference.fold(B, core, SCALING))


def row_arguments(o: Operands, by_expert: bool) -> tuple[tuple, Tensor, Tensor]:
    """(the operator's index, offs and tokens; the core of each row, -1 for none; its token)."""
    rows = torch.arange(o.m)
    if not by_expert:
        cores = rows * 7 % 5 - 1
        return (cores.to(o.device), None, None), cores, rows
    ends = torch.tensor([o.m // 5, o.m // 5, o.m // 2, o.m - o.m // 7], dtype=torch.int32)
    cores = torch.searchsorted(ends, rows, right=True)
    cores[cores == len(ends)] = -1
    tokens = (rows * 3 + 1) % o.m
    return (None, ends.to(o.device), tokens.to(o.device)), cores, tokens


def row_core(o: Operands, by_expert: bool = False) -> Iterator[Check]:
    """h_i = s u_t(i) G_c(i), and its gradients."""
    arguments, core_of, token_of = row_arguments(o, by_expert)
    u, cores = (t.requires_grad_() for t in o.wide("u", "cores"))
    has_core = (core_of >= 0).double()[:, None]
    h = SCALING * torch.einsum("mr,mrs->ms", u[token_of], cores[core_of.clamp(min=0)]) * has_core
    yield Check("h", operators().row_core(o.u, o.cores, *arguments, SCALING), h.detach())
    dh = o.normal(*h.shape)
    h.backward(dh.double().cpu())
    du, dcores = operators().row_core_backward(dh, o.u, o.cores, *arguments, SCALING, True, True)
    yield Check("du", du, u.grad)
    yield Check("dcores", dcores, cores.grad)


def layer_forward(o: Operands, strategy: int, p: float = 0.0) -> Iterator[Check]:
    """y from x, then from u and from h."""
    from lotr_ext import reference

    names = ("x", "weight", "bias", "A", "B", "core")
    truth = reference.forward(*o.wide(*names), SCALING, o.mask(o.k, p))
    bias = o.wide("bias")[0]
    y, u, F = operators().layer_forward(
        o.x, o.weight, o.bias, o.A, o.B, o.core, SCALING, strategy, p, o.seed
    )
    yield Check("y", y, truth)
    y, F = operators().layer_forward_projected(
        o.x, o.weight, None, u, o.B, o.core, SCALING, strategy
    )
    yield Check("y of a given u, without bias", y, truth - bias)
    y = operators().layer_forward_rows(o.x, o.weight, o.bias, u, F, strategy)
    yield Check("y of given rows", y, truth)


def layer_forward_few_tokens(o: Operands, strategy: int) -> Iterator[Check]:
    from lotr_ext import reference

    names = ("x", "weight", "bias", "A", "B", "core")
    truth = reference.forward(*o.wide(*names), SCALING)
    y, _ = operators().layer_forward_few_tokens(
        o.x, o.weight, o.bias, o.A, o.B, o.core, SCALING, strategy
    )
    yield Check("y", y, truth)


def layer_backward_(o: Operands, strategy: int, p: float = 0.0) -> Iterator[Check]:
    """New gradients, then the same added to given sums."""
    from lotr_ext import reference

    x, A, B, core = o.wide("x", "A", "B", "core")
    mask = o.mask(o.k, p)
    F = reference.fold(B, core, SCALING).to(o.device, o.dtype)
    u = ((x * mask) @ A).to(o.device, o.dtype)
    head = (o.g, o.weight, o.x, u, o.A, F, o.B, o.core, SCALING, strategy)
    yield from gradients(o, operators().layer_backward_, head, (True, True, p, o.seed), mask)


def layer_backward_few_tokens_(o: Operands, strategy: int) -> Iterator[Check]:
    """New gradients, then the same added to given sums."""
    x, A = o.wide("x", "A")
    u = (x @ A).to(o.device, o.dtype)
    head = (o.g, o.weight, o.x, u, o.A, o.B, o.core, SCALING, strategy)
    run = operators().layer_backward_few_tokens_
    yield from gradients(o, run, head, (True, True), o.mask(o.k, 0.0))


def gradients(
    o: Operands, run: Callable, head: tuple, tail: tuple, mask: Tensor
) -> Iterator[Check]:
    from lotr_ext import reference

    truth = reference.backward(*o.wide("g", "x", "weight", "A", "B", "core"), SCALING, mask)
    dx, dA, dB, dcore = run(*head, None, None, *tail)
    yield Check("dx", dx, truth.dx)
    yield Check("dA", dA, truth.dA)
    yield Check("dB", dB, truth.dB)
    yield Check("dcore", dcore, truth.dcore)
    dA_sum = o.sums(o.k, o.r)
    dB_sum = o.sums(*o.B.shape)
    dA_before, dB_before = dA_sum.double().cpu(), dB_sum.double().cpu()
    dx, *_ = run(*head, dA_sum, dB_sum, *tail)
    yield Check("dx with given sums", dx, truth.dx)
    yield Check("dA added", dA_sum, dA_before + truth.dA)
    yield Check("dB added", dB_sum, dB_before + truth.dB)


def layer_backward_projected_(o: Operands) -> Iterator[Check]:
    """What a layer of q, k and v runs: it adds to the du, dx and dB of the others."""
    g, u, F, weight, B, core = o.wide("g", "u", "F", "weight", "B", "core")
    du = o.normal(o.m, o.r)
    dx = o.normal(o.m, o.k)
    dB = o.sums(*o.B.shape)
    du_before, dx_before, dB_before = (t.double().cpu() for t in (du, dx, dB))
    _, du, _, dcore = operators().layer_backward_projected_(
        o.g, o.weight, o.u, o.F, o.B, o.core, SCALING, du, dx, dB, True, True
    )
    Q = g.T @ u
    yield Check("du", du, du_before + g @ F)
    yield Check("dx added", dx, dx_before + g @ weight)
    yield Check("dB added", dB, dB_before + SCALING * Q @ core)
    yield Check("dcore", dcore, SCALING * Q.T @ B)


def layer_backward_rows_(o: Operands) -> Iterator[Check]:
    """dh = g B and dB += g^T h from one read of g, without dx."""
    g, h, B = o.wide("g", "u", "F")
    dB = o.sums(o.n, o.r)
    dB_before = dB.double().cpu()
    _, dh, _ = operators().layer_backward_rows_(o.g, None, o.u, o.F, None, dB, True, True)
    yield Check("dh", dh, g @ B)
    yield Check("dB added", dB, dB_before + g.T @ h)


def shrink_backward_(o: Operands, p: float = 0.0) -> Iterator[Check]:
    x, A, du = o.wide("x", "A", "u")
    mask = o.mask(o.k, p)
    dA = operators().shrink_backward_(o.u, None, o.x, None, None, p, o.seed)
    yield Check("dA", dA, (x * mask).T @ du)
    dA_sum = o.sums(o.k, o.r)
    dx = o.normal(o.m, o.k)
    dA_before, dx_before = dA_sum.double().cpu(), dx.double().cpu()
    operators().shrink_backward_(o.u, dx, o.x, o.A, dA_sum, p, o.seed)
    yield Check("dA added", dA_sum, dA_before + (x * mask).T @ du)
    yield Check("dx added", dx, dx_before + mask * (du @ A.T))


def dropout_mask(o: Operands) -> Iterator[Check]:
    mask = operators().dropout_mask(o.m, o.k, DROPPED, o.seed, o.dtype)
    yield Check("mask", mask, o.mask(o.k, DROPPED))


def training_step(o: Operands, siblings: int) -> Iterator[Check]:
    """Layers on one x and one pair of factors, through autograd."""
    from lotr_ext import LoTRFactors, LoTRLinear

    factors = LoTRFactors(o.k, o.n, o.r, dtype=o.factor_dtype, device=o.device)
    x = o.x.clone().requires_grad_()
    wide_x = o.wide("x")[0].requires_grad_()
    outputs = []
    truths = []
    leaves = {"dx": (x, wide_x)}
    wide = {}
    for name, parameter in factors.named_parameters():
        parameter.data = o.normal(*parameter.shape, scale=o.k**-0.5, dtype=o.factor_dtype)
        wide[name[0]] = parameter.detach().double().cpu().requires_grad_()
        leaves["d" + name[0]] = (parameter, wide[name[0]])
    for i in range(siblings):
        linear = torch.nn.Linear(o.k, o.n, device="meta")
        linear.weight = torch.nn.Parameter(o.weight, requires_grad=False)
        linear.bias = torch.nn.Parameter(o.bias, requires_grad=False)
        layer = LoTRLinear.from_linear(linear, factors, scaling=SCALING)
        layer.core.data = o.normal(o.r, o.r, scale=o.r**-0.5, dtype=o.factor_dtype)
        core = layer.core.detach().double().cpu().requires_grad_()
        leaves[f"dcore {i}"] = (layer.core, core)
        outputs.append(layer(x))
        weight, bias = o.wide("weight", "bias")
        adapter = wide_x @ wide["A"] @ core @ wide["B"].T
        truths.append(wide_x @ weight.T + bias + SCALING * adapter)
    torch.autograd.backward(outputs, [o.g] * siblings)
    torch.autograd.backward(truths, [o.g.double().cpu()] * siblings)
    for i, (y, truth) in enumerate(zip(outputs, truths)):
        yield Check(f"y {i}", y.detach(), truth.detach())
    for name, (leaf, wide_leaf) in leaves.items():
        yield Check(name, leaf.grad, wide_leaf.grad)


Form = Callable[[Operands], Iterator[Check]]


def all_forms() -> dict[str, Form]:
    """The table: every operator of `torch.ops.lotr` that computes, in each of its forms."""
    forms: dict[str, Form] = {}
    for function in (shrink, expand_add_, shrink_backward_):
        forms[function.__name__] = function
        forms[f"{function.__name__} dropout"] = partial(function, p=DROPPED)
    forms |= {"expand": expand, "fold": fold, "dropout_mask": dropout_mask}
    forms["row_core tasks"] = row_core
    forms["row_core experts"] = partial(row_core, by_expert=True)
    for name, number in STRATEGIES.items():
        for function in (layer_forward, layer_backward_):
            title = f"{function.__name__} {name}"
            forms[title] = partial(function, strategy=number)
            forms[f"{title} dropout"] = partial(function, strategy=number, p=DROPPED)
        for function in (layer_forward_few_tokens, layer_backward_few_tokens_):
            if name != "fused":
                forms[f"{function.__name__} {name}"] = partial(function, strategy=number)
    forms["layer_backward_projected_"] = layer_backward_projected_
    forms["layer_backward_rows_"] = layer_backward_rows_
    forms["training step"] = partial(training_step, siblings=1)
    forms["training step q, k, v"] = partial(training_step, siblings=3)
    return forms


FORMS = all_forms()


# ---- one process ---------------------------------------------------------------------------------


def obstacle(form: str, dtype: str, device: str) -> str | None:
    """Why the device cannot run a form, None if it can."""
    if "fused" not in form:
        return None
    if "+" in dtype:
        return "the fused strategy needs x and factors of one dtype"
    return fused_obstacle(torch_dtypes(dtype)[0], device)


def error_of(check: Check) -> float:
    """The largest error of an element, relative to the root mean square of the truth."""
    difference = check.result.double().cpu() - check.truth
    return (difference.abs().max() / check.truth.square().mean().sqrt().clamp_min(1e-30)).item()


def failure(form: str, dtype: str, device: str, shape: tuple[int, int, int, int]) -> str | None:
    """Runs a form twice on one shape. Returns what is wrong, None if nothing is.

    Raises:
        RuntimeError: if an operator raises it.
    """
    checks = list(FORMS[form](Operands(shape, dtype, device)))
    for check in checks:
        error = error_of(check)
        if not error <= TOLERANCE[dtype]:  # a NaN is not
            return f"{check.what}: error {error:.1e}, expected at most {TOLERANCE[dtype]:.0e}"
    for check, again in zip(checks, FORMS[form](Operands(shape, dtype, device))):
        if not torch.equal(check.result, again.result):
            return f"{check.what}: other bits in a second run"
    return None


def error_line(text: str) -> str:
    """The line of a message that says most: the first with "CUDA error", else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "CUDA error" in line), lines[0])[:300]


def outcome_of(
    form: str,
    dtype: str,
    device: str,
    shapes: Sequence[tuple],
    before: Callable[[str], None] = lambda shape: None,
) -> str:
    """Runs a form on all shapes in this process. `before` is called before each of them."""
    reason = obstacle(form, dtype, device)
    if reason is not None:
        return f"skipped: {reason}"
    for shape in shapes:
        if "fused" in form and shape[-1] > FUSED_MAX_RANK:
            continue
        size = "{} x {} x {}, r {}".format(*shape)
        before(size)
        try:
            wrong = failure(form, dtype, device, shape)
        except Exception as error:
            return f"failed: {size}: {type(error).__name__}: {error_line(str(error))}"
        if wrong is not None:
            return f"wrong: {size}: {wrong}"
    return "passed"


def child(form: str, dtypes: Sequence[str], device: str, shapes: Sequence[tuple]) -> None:
    """The program of a process: prints @ready, @shape and @outcome. It ends after an error."""
    operators()
    print("@ready", flush=True)
    for dtype in dtypes:
        outcome = outcome_of(
            form, dtype, device, shapes, lambda shape: print(f"@shape {shape}", flush=True)
        )
        print(f"@outcome {outcome}", flush=True)
        if outcome.startswith("failed"):
            return


# ---- all processes -------------------------------------------------------------------------------


class Process:
    """A child process whose lines are read with a time limit."""

    def __init__(self, command: Sequence[str]):
        environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1", "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.output: list[str] = []
        self.shape = "at the start"
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def next_message(self, limit_s: float) -> str | None:
        """The next @ready or @outcome, None if the process ended.

        Raises:
            queue.Empty: if no line comes for limit_s seconds.
        """
        while (line := self._lines.get(timeout=limit_s)) is not None:
            if line.startswith("@shape "):
                self.shape = line.removeprefix("@shape ")
            elif line.startswith("@"):
                return line
            else:
                self.output.append(line)
        return None

    def end(self) -> str:
        """Ends the process. Returns what its end and its output say."""
        self.process.kill()
        status = self.process.wait()
        message = error_line("\n".join(self.output))
        last = self.output[-1].strip() if self.output else ""
        text = message if message == last or not last else f"{message} .. {last[:200]}"
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"{reason}, {self.shape}: {text}"


def run_form(
    command: Callable[[Sequence[str]], Sequence[str]],
    dtypes: Sequence[str],
    report: Callable[[str, str], None],
    watchdog_s: float = WATCHDOG_S,
) -> None:
    """Runs the dtypes of one form in as many processes as it takes, and reports each outcome.

    Args:
        command: the command of a process for some dtypes.
        report: called with a dtype and its outcome.
        watchdog_s: after so many seconds without a line a process is ended.
    """
    remaining = list(dtypes)
    while remaining:
        process = Process(command(remaining))
        limit_s = START_S
        outcome = None
        try:
            while remaining:
                message = process.next_message(limit_s)
                limit_s = watchdog_s
                if message == "@ready":
                    continue
                if message is None:
                    process.process.wait()
                    outcome = f"crashed: {process.end()}"
                    break
                report(remaining.pop(0), message.removeprefix("@outcome "))
                if message.startswith("@outcome failed"):
                    break
        except queue.Empty:
            process.end()
            outcome = f"hung: {process.shape}, ended after {limit_s:.0f} s without an answer"
        if outcome is not None:
            report(remaining.pop(0), outcome)
        process.end()


def run_all(options: argparse.Namespace) -> int:
    """Runs all forms side by side. Prints and keeps each outcome as it comes.

    Returns:
        1 if a form has not passed and was not skipped.
    """
    lock = threading.Lock()
    counts: dict[str, int] = {}
    planned = len(options.forms) * len(options.dtypes)

    def report(form: str, dtype: str, outcome: str) -> None:
        with lock:
            kind = outcome.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            print(f"{form:30} {dtype:10} {outcome}", flush=True)
            if options.results is not None:
                options.results.mkdir(parents=True, exist_ok=True)
                row = {"form": form, "dtype": dtype, "outcome": outcome, "planned": planned}
                with open(options.results / "smoke.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

    def command(form: str, dtypes: Sequence[str]) -> list[str]:
        words = ["--child", "--forms", form, "--dtypes", ",".join(dtypes)]
        words += ["--device", options.device, "--shapes", str(options.shapes)]
        return [sys.executable, "-m", "bench.smoke", *words]

    if options.results is not None:
        (options.results / "smoke.jsonl").unlink(missing_ok=True)
    with ThreadPoolExecutor(min(14, os.cpu_count() or 1)) as pool:
        # the first dtype of all forms before the others
        jobs = [
            pool.submit(run_form, partial(command, form), dtypes, partial(report, form))
            for dtypes in (options.dtypes[:1], options.dtypes[1:])
            for form in options.forms
        ]
        for job in jobs:
            job.result()
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return int(bool(set(counts) - {"passed", "skipped"}))


def run_here(options: argparse.Namespace) -> int:
    """Runs all forms in this process. Returns 1 if one has not passed and was not skipped."""
    good = True
    for dtype in options.dtypes:
        for form in options.forms:
            outcome = outcome_of(form, dtype, options.device, SHAPES[: options.shapes])
            print(f"{form:30} {dtype:10} {outcome}", flush=True)
            good = good and outcome.startswith(("passed", "skipped"))
    return int(not good)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--forms", help="some forms, separated by semicolons (all)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="some of " + ", ".join(DTYPES))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many shapes")
    parser.add_argument("--results", type=Path, help="a folder for smoke.jsonl")
    parser.add_argument("--in-process", action="store_true", help="no process for each form")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.forms = options.forms.split(";") if options.forms else list(FORMS)
    options.dtypes = options.dtypes.split(",")
    for name, values, valid in (
        ("forms", options.forms, FORMS),
        ("dtypes", options.dtypes, DTYPES),
    ):
        for value in values:
            if value not in valid:
                parser.error(f"{name}: expected some of {', '.join(valid)}, got {value!r}")
    if options.child:
        child(options.forms[0], options.dtypes, options.device, SHAPES[: options.shapes])
        return 0
    return run_here(options) if options.in_process else run_all(options)


if __name__ == "__main__":
    sys.exit(main())
