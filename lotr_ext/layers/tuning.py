"""`tune`: times the strategies of a model's layers on this machine, and keeps the fastest one of each problem for `plan_call`.
On a GPU it first times the best few plans of each kernel that the layers launch (`ops.cuda_plans`), and keeps the fastest.

It times the operators of a layer in its dtype, at its sizes, forward alone and forward with backward. The strategies take
turns, and their medians are compared. Siblings on one x share u = x A. So the strategies that use u are timed without its
cost, and `fused`, which computes u again in each layer, must be faster than that.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .. import ops
from ..autograd.call import Call, compute_dtype, plan_call, problem_of
from ..compat import is_compiling
from ..ops import cuda_plans, planner, tuned
from ..ops.tuned import Answer, Problem
from .layer import LoTRLayer
from .progress import progress_bar
from .wrapped import LoTRWrapped

ROUNDS, LEAST, SECONDS, SAMPLE = 15, 5, 1.0, 1e-3  # of a problem: rounds, at least; about how long; least time of a sample
_lock = threading.Lock()
_refused: set[Problem] = set()  # in this process: out of memory


def tune(model: nn.Module, tokens: int | Iterable[int], *, again: bool = False) -> dict[Problem, Answer]:
    """Times the strategies of model's adapted layers for this many tokens, and keeps the answers for this and later processes.

    tokens: rows of a layer's x, batch times sequence; several numbers for several sizes. A layer is timed as it
    would run now (device, dtype, autocast, training or not), with gradients and without. Known problems are timed again only if
    again is set. In a terminal, standard error shows a progress bar. Returns all answers; the model and the random number
    generators stay as they are.

    A strategy other than the default is used only if it was 2 % faster; `explain` then shows it, and the file
    (`lotr_ext.ops.tuned.file()`). On a GPU the three best plans of each kernel are timed first, by the same rules. A plan
    determines the order of sums: with the same answers, a GPU computes the same bits. Raises TypeError or ValueError for bad
    arguments, RuntimeError under a compiler or while a CUDA graph is captured, OSError if the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if _untimeable(torch.device("cuda")) is not None:
        raise RuntimeError(f"tune: expected a plain call, got one {_untimeable(torch.device('cuda'))}")
    if planner.LOTR_STRATEGY:
        raise ValueError(f"LOTR_STRATEGY: expected none, which leaves nothing to tune, got {planner.LOTR_STRATEGY!r}")
    sizes = [tokens] if isinstance(tokens, int) else list(tokens)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"tokens: expected whole numbers, got {type(size).__name__} {size!r}")
        if size < 1:
            raise ValueError(f"tokens: expected 1 or more, got {size}")
    layers = [layer for layer in model.modules() if isinstance(layer, LoTRLayer) and not isinstance(layer, LoTRWrapped)]
    if not layers:
        raise ValueError(f"model: expected adapted layers with their own base, got none in {type(model).__name__}")
    problems = dict.fromkeys(problem for layer in layers for size in sizes for problem in problems_of(layer, size))
    return _answers(list(problems), again)


def problems_of(layer: LoTRLayer, tokens: int) -> Iterator[Problem]:
    """The problems of a layer with this many tokens, with gradients and without; none if there is no choice of
    strategy."""
    weight = layer._matrix()
    call = Call(layer.core, layer.scaling, layer.dropout if layer.training else 0.0, layer.factors._group)
    x = weight.new_empty(1).expand(tokens, layer.in_features)  # its values are not read
    call.compute = compute_dtype(x) or x.dtype
    found: list[Problem] = []

    def look(A: Tensor, B: Tensor) -> Tensor:
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                plan = plan_call(x, A, call, weight, purpose="tune")
                if plan.nodes and x.device.type in ("cpu", "cuda"):
                    found.append(problem_of(plan, x, A, call, weight))
        return x

    layer.factors(look)
    yield from found


PLANS = 3  # of a launch: how many plans are timed, the best by estimate


def launches_of(problem: Problem) -> list[Problem]:
    """The launches with plans of a layer's call on a GPU, as problems; none where cuda_plans has none."""
    if problem.device.type != "cuda" or problem.launch is not None or cuda_plans.obstacle() is not None:
        return []
    plan = planner.Plan.of("two_pass", "")._replace(unfolded=problem.form == "unfolded")
    sizes = (problem.tokens, problem.k, problem.n, problem.r_in, problem.r_out)
    called = cuda_plans.launches(plan, *sizes, problem.step)
    found = dict.fromkeys(launch for launch in called if launch.kernel in cuda_plans.KERNELS)
    usual = (cuda_plans.plans(launch, problem.dtype, problem.device)[0].plan for launch in found)
    return [Problem.of_launch(problem.device, problem.dtype, *one) for one in zip(found, usual)]


def _answers(problems: list[Problem], again: bool) -> dict[Problem, Answer]:
    problems = [*dict.fromkeys(launch for p in problems for launch in launches_of(p)), *problems]
    found = {p: a for p in problems if (a := tuned.known(p)) is not None and not again}
    todo = [p for p in problems if p not in found]
    fresh: dict[Problem, Answer] = {}
    try:
        with progress_bar("tunes", len(todo), bool(todo)) as report:
            for i, problem in enumerate(todo):
                report(i, str(problem))
                fresh[problem] = measure(problem)
    finally:  # keeps the results from before an interrupt
        if fresh:
            tuned.keep(fresh)
    return {p: found.get(p) or fresh[p] for p in problems}


def _untimeable(device: torch.device) -> str | None:
    """Why timing is impossible now; None if it is possible."""
    if is_compiling():
        return "under a compiler"
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "while a CUDA graph is captured"
    return None


def _at_first_use(problem: Problem) -> None:
    """tuned.ask: measures a new problem at its first call, if possible. Warns if the file cannot be written."""
    if problem.tokens == 0 or _untimeable(problem.device) is not None:
        return
    with _lock:
        if problem in _refused or tuned.known(problem) is not None:
            return
        try:
            _answers([problem], False)
        except torch.OutOfMemoryError:
            _refused.add(problem)
            warnings.warn(f"lotr_ext: LOTR_TUNE: no memory to time {problem}: {problem.usual} is taken", stacklevel=2)
        except OSError as error:
            warnings.warn(f"lotr_ext: LOTR_TUNE: the answers cannot be kept in {tuned.where()}: {error}", stacklevel=2)


# ---- timing ----------------------------------------------------------------------------------------------------------


def candidates(problem: Problem) -> list[str]:
    """The strategies that can run for a problem; fused computes u = x A for each layer, which costs memory. Of a launch: the
    best plans by estimate."""
    if problem.launch is not None:
        return [plan.plan for plan in cuda_plans.plans(problem.launch, problem.dtype, problem.device)[:PLANS]]
    found, rank = ["two_pass", "beta"], max(problem.r_in, problem.r_out)
    if problem.form == "unfolded" or planner.fused_obstacle(rank, problem.dtype, problem.device) is not None:
        return found
    x = torch.empty(problem.tokens, problem.k, device=problem.device, dtype=problem.dtype)
    refused = planner.fused_refusal(x, x.new_empty(problem.n, problem.k), problem.r_in, x.dtype)
    return found if refused is not None else [*found, "fused"]


@torch.no_grad()
def measure(problem: Problem) -> Answer:
    """Times the strategies in turns. Returns the median seconds of each, and the strategy to use."""
    with torch.autocast(problem.device.type, enabled=False):
        runs = {name: run_of(problem, name) for name in candidates(problem)}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        lengths = {}
        for name, run in runs.items():
            with _taking(problem, name):
                run()
                lengths[name] = max(1, round(SAMPLE / max(_seconds(problem.device, run, 1), 1e-7)))
        begin = time.perf_counter()
        for i in range(ROUNDS):
            for name in list(runs)[:: 1 if i % 2 else -1]:
                with _taking(problem, name):
                    if problem.launch is not None:
                        runs[name]()  # its plan is chosen again
                    samples[name].append(_seconds(problem.device, runs[name], lengths[name]))
            if i + 1 >= LEAST and time.perf_counter() - begin > SECONDS:
                break
    seconds = {name: statistics.median(found) for name, found in samples.items()}
    return Answer(tuned.choose(seconds, problem.usual), seconds)


def _taking(problem: Problem, name: str) -> AbstractContextManager[None]:
    """Context in which a launch uses the plan `name`."""
    if problem.launch is None:
        return contextlib.nullcontext()
    return cuda_plans.forced(f"{problem.form} {name}")


def _seconds(device: torch.device, run: Callable[[], None], repeats: int) -> float:
    """The seconds per run, from `repeats` runs in a row."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def run_of(problem: Problem, strategy: str) -> Callable[[], None]:
    """A function that calls the operators of a layer or a launch on random values."""
    if problem.launch is not None:
        return _run_of_launch(problem)
    device, dtype, factors, m, k, n, r_in, r_out, form, step, _ = problem
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, cols: int, like: torch.dtype) -> Tensor:
        return torch.empty(rows, cols, device=device, dtype=like).normal_(0.0, cols**-0.5, generator=generator)

    x, weight, g = normal(m, k, dtype), normal(n, k, dtype), normal(m, n, dtype)
    A, B, core = normal(k, r_in, factors), normal(n, r_out, factors), normal(r_in, r_out, factors)
    order, unfolded = planner.ORDERS[strategy], form == "unfolded"
    u = normal(m, r_in, dtype) if form == "siblings" and strategy != "fused" else None

    def run() -> None:
        own_A, own_x = (A, x) if u is None else (None, None)
        _, made_u, F = ops.layer_forward(x, weight, None, own_A, B, core, 1.0, order, unfolded, u=u)
        if step:
            read = (g, weight, own_x, made_u, own_A, F)
            ops.layer_backward(*read, B, core, 1.0, order, unfolded, need_B=True, need_core=True)

    return run


def _run_of_launch(problem: Problem) -> Callable[[], None]:
    kernel, m, n, r = problem.launch
    like = {"device": problem.device, "dtype": problem.dtype}
    large, factor, narrow = torch.zeros(m, n, **like), torch.zeros(n, r, **like), torch.zeros(m, r, **like)
    total = torch.zeros(n, r, device=problem.device)
    return {
        "shrink": lambda: torch.ops.lotr.shrink(large, factor, 0.0, None),
        "expand_add": lambda: torch.ops.lotr.expand_add_(large, narrow, factor, 0.0, None),
        "factor_grad": lambda: torch.ops.lotr.factor_grad_(total, large, narrow, 0.0, None),
        "shrink_grad": lambda: torch.ops.lotr.shrink_grad_(total, large, factor, narrow),
    }[kernel]


if os.environ.get("LOTR_TUNE") == "1":
    tuned.ask = _at_first_use
