"""The answers of `lotr_ext.tune`: the fastest strategy for a call, and on a GPU the fastest plan of each kernel.

One JSON file keeps them for later processes: $XDG_CACHE_HOME/lotr_ext/tuned.json (~/.cache without that variable). The key of
an answer is the card or CPU, driver, threads, versions, dtypes, sizes, and the kind of call (`Key`). The file is read when the
first answer is looked up, not when this module is imported. An unreadable file, or one of another kind, counts as empty and is
written anew; invalid answers in it are ignored. Both give one warning.

`planner` decides without the file, and `apply` replaces its choice by an answer. lotr_ext/layers/tuning.py measures; it sets
`ask`. LOTR_TUNE=0 in the environment disables the file. LOTR_TUNE=1 measures each shape at its first call.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import platform
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..files import parse_json, put_file, read_bytes, together
from . import cuda_plans, planner
from .cuda_plans import KERNELS, Launch, is_plan
from .planner import Plan

FORMAT = 1
STRATEGIES = ("two_pass", "beta", "fused")  # which `tune` measures
GAIN = 0.02  # by how much a strategy must be faster than the one that it replaces


class Problem(NamedTuple):
    """A layer's call as `tune` measures it: tokens rounded (`rounded`), x [tokens, k], W [n, k], core [r_in, r_out].

    form: "alone" (one node, folded), "siblings" (two nodes; u exists) or "unfolded" (one node, few tokens or float16). step:
    forward and backward; otherwise forward alone. usual: the strategy that the planner chooses.

    A launch of a CUDA kernel is a problem too: form is the kernel, its large matrix is [tokens, k] and its rank r_in; usual is
    the plan that its estimate chooses (`cuda_plans`).
    """

    device: torch.device
    dtype: torch.dtype
    factors: torch.dtype
    tokens: int
    k: int
    n: int
    r_in: int
    r_out: int
    form: str
    step: bool
    usual: str

    @classmethod
    def of_launch(cls, device: torch.device, dtype: torch.dtype, launch: Launch, usual: str) -> Problem:
        return cls(device, dtype, dtype, rounded(launch.m), launch.n, 0, launch.r, launch.r, launch.kernel, False, usual)

    @property
    def launch(self) -> Launch | None:
        """The launch that this is; None for a layer's call."""
        return Launch(self.form, self.tokens, self.k, self.r_in) if self.form in KERNELS else None

    def __str__(self) -> str:
        if self.launch is not None:
            return f"{self.form} [{self.tokens}, {self.k}], r {self.r_in}, {str(self.dtype).removeprefix('torch.')}"
        what = "forward and backward" if self.step else "forward"
        sizes = f"{self.tokens} x {self.k} x {self.n}, r {max(self.r_in, self.r_out)}"
        return f"{sizes}, {str(self.dtype).removeprefix('torch.')}, {self.form}, {what}"


class Key(NamedTuple):
    """A problem on a machine, as the file keeps it. setting: see `setting_of`."""

    machine: str
    driver: str
    setting: str
    versions: str
    dtype: str
    factors: str
    tokens: int
    k: int
    n: int
    r_in: int
    r_out: int
    form: str
    step: bool


_TYPES = (str, str, str, str, str, str, int, int, int, int, int, str, bool)


class Answer(NamedTuple):
    """The strategy to take (for a launch: the plan), and the median seconds of all that were measured."""

    strategy: str
    seconds: dict[str, float]


on = os.environ.get("LOTR_TUNE") != "0"  # whether `apply` can change a plan; the only check on the path of a call
ask: Callable[[Problem], None] | None = None  # measures a problem without an answer and calls `keep`
plans: dict[tuple, Plan] = {}  # results of `apply` by all that a plan depends on: one lookup per call
_MOST_PLANS = 4096  # the cache is cleared then: batches may have ever new lengths
_kept: dict[Key, Answer] = {}
_unread = True  # whether the file is still to be read
_warned: set[str] = set()
_lock = threading.RLock()


def file() -> Path:
    """Where the answers are kept. OSError without XDG_CACHE_HOME and a home directory."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache and not os.path.isabs(home := os.path.expanduser("~")):
        raise OSError(errno.ENOENT, "expected a home directory or XDG_CACHE_HOME, got neither")
    return (Path(cache) if cache else Path(home, ".cache")) / "lotr_ext" / "tuned.json"


def where() -> str:
    """`file()`, for messages."""
    try:
        return str(file())
    except OSError:
        return "this process alone"


def _warn_once(text: str, kind: str = "") -> None:
    if (kind or text) not in _warned:
        _warned.add(kind or text)
        warnings.warn(f"lotr_ext: {text}", stacklevel=3)


def read(path: Path) -> dict[Key, Answer]:
    """The answers in a file; none if it is not there or not ours. Those that cannot be true are left out, with a warning."""
    try:
        content = parse_json(read_bytes(path))
        if content["format"] != FORMAT:
            raise ValueError(f"format {FORMAT}, got {content['format']!r:.80}")
        rows = list(content["answers"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        _warn_once(f"{path}: expected answers of lotr_ext.tune, got a file without ({reason:.200}); it counts as empty")
        return {}
    found = [_row(row) for row in rows]
    if bad := found.count(None):
        _warn_once(f"{path}: expected answers of lotr_ext.tune, got {bad} that cannot be ones; they are ignored")
    return dict(answer for answer in found if answer is not None)


def _row(row: object) -> tuple[Key, Answer] | None:
    """One answer of the file; None if it is invalid."""
    try:
        key, strategy = Key(*(row[name] for name in Key._fields)), row["strategy"]
        seconds = {name: float(t) for name, t in row["seconds"].items() if not isinstance(t, bool | str)}
        right = all(type(value) is want for value, want in zip(key, _TYPES, strict=True)) and strategy in seconds
        right = right and seconds.keys() == row["seconds"].keys()
        right = right and (key.form not in KERNELS or all(0 < size < 10**9 for size in (key.tokens, key.k, key.r_in)))
        right = right and all(is_plan(name) if key.form in KERNELS else name in STRATEGIES for name in seconds)
        right = right and all(0 < t < math.inf for t in seconds.values())
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return None
    return (key, Answer(strategy, seconds)) if right else None


def keep(found: Mapping[Problem, Answer]) -> None:
    """Keeps answers in this process, and merges them into the file, where other processes may have written meanwhile.

    Raises OSError if the folder cannot be written; the process keeps the answers all the same.
    """
    global on
    own = {key_of(problem): answer for problem, answer in found.items()}
    with _lock:
        _kept.update(own)
        plans.clear()
        on = bool(_kept) or ask is not None
        _take_measured_plans()
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with together(path.parent):  # what another process writes after the read would be lost
        rows = [{**k._asdict(), **a._asdict()} for k, a in {**read(path), **own}.items()]
        put_file(path.parent, path.name, json.dumps({"format": FORMAT, "answers": rows}, indent=1).encode())


def load() -> None:
    """Reads the file, unless LOTR_TUNE=0, and forgets all other answers."""
    global _unread
    with _lock:
        _kept.clear()
        _unread = True
        _read_once()


def _read_once() -> None:
    """Adds the file's answers to those kept meanwhile; once per process."""
    global on, _unread
    with _lock:
        if not _unread:
            return
        wish = os.environ.get("LOTR_TUNE") or None
        if wish not in (None, "0", "1"):
            warnings.warn(f"lotr_ext: LOTR_TUNE: expected 0 or 1, got {wish!r}, which does nothing", stacklevel=2)
        try:
            found = {} if wish == "0" else read(file())
        except OSError:  # no home
            found = {}
        _kept.update({**found, **_kept})
        plans.clear()
        on, _unread = bool(_kept) or ask is not None, False
        _take_measured_plans()


def read_once() -> None:
    """Reads the file if this process has not; a call on a GPU needs the plans before its first launch."""
    if _unread:
        _read_once()


def _take_measured_plans() -> None:
    """Makes rules of the answers for launches on the GPUs of this machine."""
    rules, answers = [], [(key, answer) for key, answer in _kept.items() if key.form in KERNELS]
    for index in range(torch.cuda.device_count()) if answers and cuda_plans.obstacle() is None else ():
        device = torch.device("cuda", index)
        here = (*machine(device), _versions())
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        for key, answer in answers:
            if (key.machine, key.driver, key.versions) == here:
                what = f"tokens={key.tokens} N={key.k} r={key.r_in} element={4 if key.dtype == 'float32' else 2}"
                rules.append(f"{key.form} {what} multiprocessors={processors} {answer.strategy}")
    if cuda_plans.obstacle() is None:
        cuda_plans.measured("; ".join(rules))


def rounded(tokens: int) -> int:
    """tokens rounded up to one of four numbers per octave: 1, 2, 3, .. 8, 10, 12, 14, 16, 20, .. They share one answer."""
    step = 1 << max(0, (tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step


@functools.cache
def machine(device: torch.device) -> tuple[str, str]:
    """(the card, its driver) or (the CPU, the instruction set that our kernels use)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), _driver()
    return _cpu(), planner.build_info()["cpu"]["isa"]


def _line(path: str, begin: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(begin)), None)


def _cpu() -> str:
    return _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _driver() -> str:
    return _line("/proc/driver/nvidia/version", "NVRM version") or str(planner.cuda_probe(-1)["driver"])


def key_of(problem: Problem) -> Key:
    """The key of a problem on this machine with these versions."""
    names = [str(t).removeprefix("torch.") for t in (problem.dtype, problem.factors)]
    return Key(*machine(problem.device), setting_of(problem), _versions(), *names, *problem[3:-1])


def _versions() -> str:
    return f"lotr_ext {planner.build_info()['version']}, torch {torch.__version__}"


def setting_of(problem: Problem) -> str:
    """On a CPU the number of threads, on CUDA how float32 products are rounded."""
    if problem.device.type == "cpu":
        return f"threads {torch.get_num_threads()}"
    return float32_setting(problem.dtype)


def float32_setting(dtype: torch.dtype) -> str:
    """How CUDA rounds the operands of float32 products; "" for another dtype."""
    return f"float32 {torch.backends.cuda.matmul.fp32_precision}" if dtype == torch.float32 else ""


def known(problem: Problem) -> Answer | None:
    """The answer that this or an earlier process found, if it can run."""
    if _unread:
        _read_once()
    answer = _kept.get(key_of(problem)) if _kept else None
    if answer is not None and (obstacle := _obstacle(problem, answer)) is not None:
        _warn_once(f"{where()}: expected an answer that can run, got fused for {problem} ({obstacle}); it is ignored", "fused")
        return None
    return answer


def _obstacle(problem: Problem, answer: Answer) -> str | None:
    """Why the answer cannot be valid for this problem; None if it can."""
    if answer.strategy != "fused":
        return None
    if problem.form == "unfolded":
        return "the unfolded form has no F to go into the base product"
    return planner.fused_obstacle(max(problem.r_in, problem.r_out), problem.dtype, problem.device)


def apply(plan: Plan, problem: Problem, may_ask: bool, key: tuple) -> Plan:
    """plan with the fastest strategy for problem, if an answer exists. may_ask: the problem may be measured now. The result is
    cached in `plans` under key, unless a later call may measure the problem."""
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        return plan  # `explain` for a GPU that this machine lacks
    answer = known(problem)
    if answer is None and ask is not None and may_ask:
        ask(problem)
        answer = known(problem)
    if answer is not None:
        plan = _taking(plan, problem, answer)
    if answer is not None or ask is None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return plan


def _taking(plan: Plan, problem: Problem, answer: Answer) -> Plan:
    times = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in answer.seconds.items())
    reason = f"tuned for {problem} on {machine(problem.device)[0]}: {times}; kept in {where()}"
    return plan.taking(answer.strategy, reason)


def choose(seconds: Mapping[str, float], usual: str) -> str:
    """The fastest strategy if it is faster than the usual one by GAIN (fused: also than beta), else the usual one."""
    best = min(seconds, key=lambda name: seconds[name])
    rivals = {usual, "beta"} if best == "fused" else {usual}
    return best if all(seconds[best] <= (1 - GAIN) * seconds[name] for name in rivals - {best}) else usual
