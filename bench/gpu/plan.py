"""The parts of a run, in three calls of about nine minutes each, and the time for each part."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys

from .machine import HOPPER, NEEDED, sanitizer, tool

TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
PLANNED = ("--kernels", "shrink,expand_add,factor_grad,shrink_grad", "--shapes")
FLOOR, CLOSE = ("--autotune", *PLANNED, "8192x4096x16"), ("--plans", *PLANNED, "8192x4096x16,8192x4096x64,2048x4096x16")
CALLS = {1: "right or wrong, and how fast", 2: "where the time goes", 3: "sanitizer, profiler, searched floors"}
WITH_ALL = "with-all"  # the folder of kernel results without a switch, for comparison


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of the plan, in which {minutes} or {seconds} is replaced by its time. weight: its share of the time that is
    left; needs: required names of `look`; calls: those of CALLS to which it belongs; without: a feature that is switched
    off (LOTR_CUDA_WITHOUT)."""

    name: str
    weight: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    about: str = ""
    calls: tuple[int, ...] = (1,)
    without: str = ""


ALWAYS = tuple(CALLS)


def plan(options: argparse.Namespace) -> list[Part]:
    """All parts in order: first those that others need, then the most important."""
    python, module = sys.executable, (sys.executable, "-m")
    compiled = ("nvcc", "c++", "cmake") if options.wheel is None else ()
    build = (python, "setup.py", "build_ext", "--inplace") if options.wheel is None else ()
    smoke = (*module, "bench.gpu.smoke", "--seconds", "{seconds}", "--out", "bench/results/smoke/smoke.json")
    return [
        Part("build", 4.0, build, (*NEEDED, *compiled), "for this machine's card", ALWAYS),
        Part("info", 0.5, (*module, "lotr_ext.info"), (), "which path runs, and why", ALWAYS),
        Part("smoke", 3.5, smoke, ("pytest",), "each kernel, type and rank in a process of its own, against float64"),
        Part("tests", 4.0, tests(), ("pytest",), "graphs, streams, sizes, whole models"),
        *_speed(module, ("--quick", "--keep") if options.quick else ()),
        *_thorough(module),
    ]


def tests() -> tuple[str, ...]:
    """pytest on the GPU tests; in parallel and with time limits if the plugins for that are installed."""
    command = (sys.executable, "-m", "pytest", "python_tests/cuda", "-m", "cuda and not full", "-v", "--maxfail=20")
    plugins = {"xdist": ("-n", "4", "--dist", "worksteal"), "pytest_timeout": ("--timeout", "300")}
    return (*command, *(word for name, words in plugins.items() if importlib.util.find_spec(name) for word in words))


def _speed(module: tuple[str, ...], quick: tuple[str, ...]) -> list[Part]:
    """The measurements."""
    layer = (*module, "bench.layer", "--dtypes", "bf16", *(quick or ("--minutes", "{minutes}")))
    experts = (*module, "bench.experts", "--dtypes", "bf16", *quick)
    shared = (*module, "bench.shared", "--dtypes", "bf16")
    return [
        Part("kernels", 4.0, (*module, "bench.kernels", *quick), (), "each kernel against the library's product"),
        Part("fused", 1.5, (*module, "bench.fused"), (HOPPER,), "the adapter inside the base product, on Hopper"),
        Part("layer", 5.0, layer, (), "a layer against its rivals"),
        Part("block", 2.0, (*module, "bench.block", *quick), (), "the layers of a transformer's block together", (2,)),
        Part("shared", 1.0, shared, (), "the shared gradient against autograd's sums", (2,)),
        Part("model", 2.0, (*module, "bench.model", *quick), ("transformers", "peft"), "a whole model with each method", (2,)),
        Part("experts", 1.0, experts, ("transformers", "peft"), "a mixture's experts against PEFT's LoRA", (2,)),
        Part("host", 1.0, (*module, "bench.host"), (), "host time of a layer", (2,)),
        Part("plans", 1.5, (*module, "bench.kernels", *CLOSE), (), "each plan that the estimate calls close", (2,)),
        *switched(module),
    ]


def _thorough(module: tuple[str, ...]) -> list[Part]:
    """Parts that find rarer faults, and measurements for comparison."""
    ncu = (tool("ncu") or "ncu", "--clock-control", "none", "--kernel-name-base", "demangled", "-k", "regex:lotr::kernels")
    floor_layer = (*module, "bench.layer", "--quick", "--keep", "--autotune", "--dtypes", "bf16")
    return [
        *(Part(f"sanitize-{tool}", 1.5, sanitize(tool), ("compute-sanitizer",), "every kernel, small", (3,)) for tool in TOOLS),
        Part("ncu", 1.0, (*ncu, *module, "bench.gpu.each"), ("ncu",), "counters of the hardware, six kernels twice", (3,)),
        Part("floor-kernels", 1.5, (*module, "bench.kernels", *FLOOR), (), "the library's products after a search", (3,)),
        Part("floor-layer", 1.5, floor_layer, (), "the same, a layer", (3,)),
    ]


def switched(module: tuple[str, ...]) -> list[Part]:
    """The kernels unchanged, and with one hardware feature switched off at a time, to measure the feature's benefit."""
    quick = (*module, "bench.kernels", "--quick", "--results")
    pairs = [
        Part(
            WITH_ALL, 0.7, (*quick, f"bench/results/{WITH_ALL}"), (), "the kernels that the next parts are compared with", (2,)
        )
    ]
    for switch in ("wgmma", "early", "cluster", "together"):  # fused: bench.fused has its own comparison
        name = f"without-{switch}"
        pairs.append(Part(name, 0.7, (*quick, f"bench/results/{name}"), (), f"the same without {switch}", (2,), switch))
    return pairs


def sanitize(tool: str) -> tuple[str, ...]:
    """initcheck runs only in make test-full: it also reports stale data in blocks that torch's allocator reuses."""
    found = sanitizer() or "compute-sanitizer"
    checked = (sys.executable, "python_tests/cuda/sanitize.py", "--small")
    return (found, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=lotr", *checked)


def seconds_of(parts: list[Part], left: float) -> list[float]:
    """The time limit of each part if all earlier parts use theirs fully. Unused time goes to later parts."""
    total = sum(part.weight for part in parts)
    return [left * part.weight / total for part in parts]


def missing(part: Part, found: dict[str, str | None]) -> list[str]:
    return [name for name in part.needs if found[name] is None]
