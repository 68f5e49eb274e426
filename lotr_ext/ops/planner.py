"""Which strategy an adapted layer runs, and why. The choice never changes a result beyond rounding.

    composite   library products only, differentiable by autograd itself: any dtype, any device
    two_pass    our shrink, the base product by the library, our expand_add_ onto it
    beta        expand first, then the base product accumulates onto it with beta = 1, hiding the second pass over y
    fused       both directions of the adapter inside a base product of our own, sm_90 alone (docs/hopper.md)

Heuristic: our kernels run wherever they exist (CPU: all four dtypes; CUDA: float16, bfloat16 and float32 from sm_80 on, rank
at most 256). On a CPU beta for float32 and float64, whose base product starts from a copy of the bias anyway; two_pass for
half types: accumulating onto them rounds once more, and their base product is slower with a bias than without, so our expand
adds the bias. On CUDA beta from 1,024 tokens on, where the read of y that it saves outweighs a less favourable start
(derived from bytes moved, DRAM-bound: 11.7 against 17.5 % of the base product on an H100). fused never: `lotr_ext.tune` may
find it faster than beta, or it is forced.
LOTR_STRATEGY, as the environment has it when lotr_ext is imported, or the argument `strategy` of `lotr_linear`, forces one;
else what `lotr_ext.tune` found to be the fastest here comes before the heuristic (`tuned`).
"""

from __future__ import annotations

import functools
import json
import os
from typing import NamedTuple

import torch
from torch import Tensor

STRATEGIES = ("composite", "two_pass", "beta", "fused")
LOTR_STRATEGY = os.environ.get("LOTR_STRATEGY")  # read once: os.environ takes 2 us a call (bench.host)
CUDA_SWITCHES = ("wgmma", "early", "cluster", "together", "fused")  # csrc/cuda/switches.h says what each is


def switched_off(words: str | None) -> tuple[str, ...]:
    """The words of LOTR_CUDA_WITHOUT, in the order of CUDA_SWITCHES. ValueError for one that is not known."""
    found = {word for word in (words or "").split(",") if word}
    if unknown := sorted(found - set(CUDA_SWITCHES)):
        raise ValueError(
            f"LOTR_CUDA_WITHOUT: expected words of {', '.join(CUDA_SWITCHES)}, separated by commas, got {', '.join(unknown)}"
        )
    return tuple(word for word in CUDA_SWITCHES if word in found)


CUDA_WITHOUT = switched_off(os.environ.get("LOTR_CUDA_WITHOUT"))  # the kernels read it once, too
ORDERS = {"composite": 0, "two_pass": 0, "beta": 1, "fused": 2}  # as the operators of a layer take a strategy
FUSED_MAX_RANK = 128
BETA_TOKENS = 1024
FEW_TOKENS = 129  # below, the unfolded form costs less than folding
# One pass over x in multiplications, x.numel() (r + READING): to read an element takes as long as 16 of them. On a CPU a
# product of less than LITTLE_WORK is bound by host overhead, and one node per sibling costs less than two that share u (Intel
# Xeon, AVX-512, fp32, one thread, SmolLM2-135M, over the frozen model: 256 tokens 12.1 % against 15.4, 512 9.9 against 11.0,
# 1024 8.4 against 7.1; `python -m bench.model --model smollm2-135m --sequence 256 --clock cpu --threads 1 --dtypes fp32`).
READING = 16
LITTLE_WORK = 2**23
CUDA_MAX_RANK = 256
HALVES = (torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, *HALVES)
# in which layers compute, and the CPU kernels; by the names that files and commands use
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, *HALVES)}
CPU_DTYPES = tuple(DTYPES.values())
_DRIVERS = {12: 525, 13: 580}  # the first driver of a major version of CUDA
_NO_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction", "cudaErrorInvalidKernelImage")


class Plan(NamedTuple):
    """What a call runs. str() describes it.

    strategy: one of STRATEGIES, or "base" if no adapter runs; reason: why. nodes: the number of our autograd nodes (0: the
    composite); why: why that many. unfolded: whether the tokens are multiplied with the core, which is then not folded into B.
    order: the strategy's number in ORDERS. launches: the plans of its CUDA kernels, one line each, from `explain(plans=True)`.
    """

    strategy: str
    reason: str
    nodes: int = 0
    why: str = ""
    unfolded: bool = False
    order: int = 0
    launches: tuple[str, ...] = ()

    @classmethod
    def of(cls, strategy: str, reason: str) -> Plan:
        return cls(strategy, reason, order=ORDERS[strategy])

    def taking(self, strategy: str, reason: str) -> Plan:
        """The same nodes with another strategy."""
        return self._replace(strategy=strategy, reason=reason, order=ORDERS[strategy])

    @property
    def kernels(self) -> bool:
        """Whether our kernels run."""
        return self.nodes > 0

    def __str__(self) -> str:
        if self.strategy == "base":
            return f"base layer only: {self.reason}"
        text = f"{_NODES[0]}: {self.why}"
        if self.kernels:
            text = f"strategy {self.strategy} ({self.reason}); {_NODES[self.nodes]} ({self.why})"
        return "\n  ".join([text, *self.launches])


_NODES = (
    "composite, torch's own products",
    "one autograd node (LoTRFunction)",
    "two autograd nodes (LoTRShrink, LoTRExpand)",
)


@functools.cache
def build_info() -> dict:
    """How the extension was compiled: `torch.ops.lotr.info()`, parsed."""
    return json.loads(torch.ops.lotr.info())


def cuda_probe(device: int) -> dict:
    """What the CUDA runtime in the extension finds, without a launch. Needs an extension built with CUDA kernels.

    "runtime", "driver": versions as CUDA counts them (12080 is 12.8; driver 0: none). "float32", "float32_from": how float32
    products are rounded now, and how that was read (csrc/torch/float32.h). "error": the name of the driver's error if it cannot
    load a kernel of ours on device, else ""; device < 0: "".
    """
    return json.loads(torch.ops.lotr.cuda_probe(device))


@functools.cache
def cuda_obstacle(index: int) -> str | None:
    """Why our CUDA kernels cannot run on device index; None if they can. The driver is queried once, at the first use."""
    built = build_info()["cuda"]
    if not built["built"]:
        return "lotr_ext was built without CUDA kernels (no nvcc at build time, or LOTR_CUDA=OFF)"
    if (obstacle := driver_obstacle()) is not None:
        return obstacle
    if index >= torch.cuda.device_count():
        return f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here, none of index {index}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"expected compute capability 8.0 or later, got {major}.{minor}"
    error = cuda_probe(index)["error"]
    if not error:
        return None
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"  # wgmma is 90a's alone
    mend = f"build it with LOTR_ARCHS={arch}, or AUTO on this machine"
    if error in _NO_CODE:
        archs = ", ".join(map(str, built["archs"]))
        return f"lotr_ext has no code for compute capability {major}.{minor}, only for {archs} ({error}): {mend}"
    return f"the driver cannot load the kernels of lotr_ext ({error}): update the driver, or {mend}"


def driver_obstacle() -> str | None:
    """Why the machine's driver runs no kernel of this build: no driver, or one for an older major version of CUDA."""
    found = cuda_probe(-1)
    runtime, driver = found["runtime"], found["driver"]
    if not driver:
        return "the machine has no NVIDIA driver, or a broken one (does nvidia-smi run?)"
    if driver // 1000 < runtime // 1000:
        needed = _DRIVERS.get(runtime // 1000)
        newer = f" to {needed} or later" if needed else ""
        return (
            f"lotr_ext was built by CUDA {cuda_version(runtime)}, the driver serves CUDA {cuda_version(driver)} at most: "
            f"update the driver{newer}, or build with a CUDA {driver // 1000} toolkit (CUDA_HOME)"
        )
    return None


def cuda_version(number: int) -> str:
    """ "12.8" of 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def check_strategy(strategy: str, where: str) -> str:
    """strategy. Raises ValueError unless it is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"{where}: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    return strategy


def plan(tokens: int, rank: int, dtype: torch.dtype, device: torch.device, strategy: str | None = None) -> Plan:
    """The Plan for a call on tokens rows in dtype on device, rank the larger of (r_in, r_out).

    Raises ValueError for an unknown strategy or one that cannot run, forced by argument or by LOTR_STRATEGY.
    """
    return plan_of(tokens >= BETA_TOKENS, rank, dtype, device, strategy, LOTR_STRATEGY)


def forced_strategy(strategy: str | None, environment: str | None) -> tuple[str | None, str]:
    """(the strategy that is forced, or None; what forces it): an argument, else by LOTR_STRATEGY."""
    return (strategy, "strategy") if strategy is not None else (environment or None, "LOTR_STRATEGY")


def plan_function(x: Tensor, core: Tensor, graph: bool) -> Plan:
    """The Plan of a LoTRFunction by itself; graph: whether its backward will run."""
    tokens = x.numel() // x.shape[-1]
    return plan(tokens, max(core.shape), x.dtype, x.device)._replace(
        nodes=1, unfolded=is_unfolded(tokens, x.dtype, x.device, graph)
    )


def is_unfolded(tokens: int, dtype: torch.dtype, device: torch.device, graph: bool) -> bool:
    """Whether the tokens are multiplied with the core. With few tokens that costs less than folding it into B. On a GPU,
    however, its backward takes six launches instead of three. In float16, F may overflow where the layer's output does not."""
    return dtype == torch.float16 or (tokens < FEW_TOKENS and not (graph and device.type == "cuda"))


@functools.lru_cache(maxsize=1024)
def plan_of(
    many: bool, rank: int, dtype: torch.dtype, device: torch.device, strategy: str | None, environment: str | None
) -> Plan:
    """`plan`, cached: calls have few different arguments."""
    forced, where = forced_strategy(strategy, environment)
    obstacle = obstacle_to_kernels(rank, dtype, device)
    if forced is not None:
        check_strategy(forced, where)
        if forced != "composite" and obstacle is not None:
            raise ValueError(f"{where}: expected composite, the only strategy here ({obstacle}), got {forced!r}")
        if forced == "fused" and (missing := fused_obstacle(rank, dtype, device)) is not None:
            raise ValueError(f"{where}: expected a strategy that runs here, got 'fused': {missing}")
        return Plan.of(
            forced, f"forced by {where}" + (without_text() if device.type == "cuda" and forced != "composite" else "")
        )
    if obstacle is not None:
        return Plan.of("composite", obstacle)
    if device.type == "cuda" and many:
        why = f"at least {BETA_TOKENS} tokens on CUDA: the base product's epilogue hides the read of y"
        return Plan.of("beta", why + without_text())
    ours = f"our kernels for {device.type} and {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        ours += without_text()
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        return Plan.of("beta", f"{ours}; the base product accumulates onto what they wrote, as it would onto the bias")
    return Plan.of("two_pass", ours)


def without_text() -> str:
    """LOTR_CUDA_WITHOUT for `explain`; "" if it is not set."""
    return f"; LOTR_CUDA_WITHOUT={','.join(CUDA_WITHOUT)}" if CUDA_WITHOUT else ""


def fused_obstacle(rank: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused strategy runs for no size on a device that runs our kernels; None if it may."""
    if "fused" in CUDA_WITHOUT or "wgmma" in CUDA_WITHOUT:
        return f"LOTR_CUDA_WITHOUT: expected fused and wgmma to be left on, got {','.join(CUDA_WITHOUT)}"
    if device.type != "cuda":
        return f"device: expected CUDA of compute capability 9.0, got {device.type}"
    if not hasattr(torch.ops.lotr, "gemm_lotr"):
        return f"build: expected code for 90a, got code for {', '.join(map(str, build_info()['cuda']['archs'])) or 'no GPU'}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"device: expected compute capability 9.0, got {major}.{minor}"
    if dtype not in HALVES:
        return f"dtype: expected float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if rank > FUSED_MAX_RANK:
        return f"rank: expected at most {FUSED_MAX_RANK}, got {rank}"
    return None


def fused_refusal(x: Tensor, weight: Tensor, rank: int, dtype: torch.dtype) -> str | None:
    """Why the fused strategy cannot take x [.., k] and weight [n, k] in dtype: their strides, the room on the device, the
    workspace of the current stream; None if it can. Callers check `fused_obstacle` first."""
    like = [t if t.dtype == dtype else t.new_empty(t.shape, dtype=dtype) for t in (x, weight)]  # a cast one is new
    text = torch.ops.lotr.gemm_lotr_refusal(like[0].reshape(-1, x.shape[-1]), like[1], rank, False)
    n = weight.shape[0]
    return text or (f"g: expected rows of a multiple of 8 elements, got {n} (out_features)" if n % 8 else None)


def obstacle_to_kernels(rank: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why none of our kernels runs for these; None if they do."""
    if device.type == "cpu":
        return None if dtype in CPU_DTYPES else f"no CPU kernels for {dtype}"
    if device.type != "cuda":
        return f"no kernels for device type {device.type}"
    if dtype not in CUDA_DTYPES:
        return f"no CUDA kernels for {dtype}"
    if rank > CUDA_MAX_RANK:
        return f"rank {rank} is above {CUDA_MAX_RANK}, the largest of our CUDA kernels"
    if device.index is not None:
        return cuda_obstacle(device.index)
    return cuda_obstacle(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
