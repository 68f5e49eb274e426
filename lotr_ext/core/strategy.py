"""In which order, and in how many kernels, a layer computes its two products.

    two_pass   the base product, then the adapter's product is added to it
    beta       the adapter's product, then the base product accumulates onto it (its beta is 1)
    fused      both in one kernel, gemm_lotr, on Hopper GPUs

On CUDA, LOTR_STRATEGY chooses one of them for all layers. It is read once. Layers that gemm_lotr
refuses run as beta, and `explain` says so.

Not here: the strategies themselves (csrc/torch/layer.h).
"""

import functools
import os

import torch
from torch import Tensor

from .kernel_support import build_info
from .operators import BETA, FUSED, TWO_PASS, lotr

STRATEGIES = {"two_pass": TWO_PASS, "beta": BETA, "fused": FUSED}

# On CUDA, from this many tokens on, BETA is expected to be faster: both write y twice and read it
# once, but BETA's read is in the base product, which computes meanwhile. An estimate, not measured.
BETA_TOKENS = 1024


@functools.cache
def strategy_from_environment() -> str | None:
    """Returns the strategy that LOTR_STRATEGY names, None if it is not set.

    Raises:
        ValueError: If there is no strategy of this name.
    """
    name = os.environ.get("LOTR_STRATEGY") or None
    if name is not None and name not in STRATEGIES:
        raise ValueError(
            f"LOTR_STRATEGY: expected one of {', '.join(STRATEGIES)}, got {name}. "
            f"Unset it for the default."
        )
    return name


def choose_strategy(tokens: int | torch.SymInt, x: Tensor) -> int:
    """Returns the strategy of a layer's call: TWO_PASS, BETA or FUSED.

    On a CPU, BETA is faster for float32 and float64, whose product starts from a copy of the bias
    anyway. For half-precision types, BETA would round y once more. Their product is also slower
    with a bias than without, so under TWO_PASS our expand kernel adds the bias.
    """
    if x.is_cpu:
        return BETA if x.dtype in (torch.float32, torch.float64) else TWO_PASS
    name = strategy_from_environment()
    # The operators raise for FUSED if the build lacks the kernel.
    if name == "fused" and not _has_fused():
        return BETA
    if name is not None:
        return STRATEGIES[name]
    # A comparison with a symbol of torch.compile would add a guard.
    are_few = isinstance(tokens, int) and tokens < BETA_TOKENS
    return TWO_PASS if are_few else BETA


@functools.cache
def _has_fused() -> bool:
    # 90a is the target with the instructions of Hopper that gemm_lotr uses.
    return "90a" in build_info()["cuda"]["archs"]


def fused_obstacle(
    k: int, n: int, rank: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why gemm_lotr cannot compute a layer [k] -> [n], None if it can.

    None does not guarantee it: gemm_lotr also refuses addresses and strides that are not multiples
    of 16 bytes.

    Args:
        k: in_features.
        n: out_features.
        rank: The columns of u, r_in. For h = s u G (few tokens, rows with different cores): r_out.
        dtype: The dtype of the activations.
        device: Their device. Without an index, the current GPU.
    """
    if device.type != "cuda":
        return "it runs only on CUDA"
    if not _has_fused():
        return "the build has no kernels for compute capability 9.0 (LOTR_ARCHS=90a-real)"
    index = torch.cuda.current_device() if device.index is None else device.index
    return lotr.gemm_lotr_refusal(k, n, rank, dtype, index) or None


def strategy_note(k: int, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> str:
    """Returns how LOTR_STRATEGY changes a layer [k] -> [n], for `explain`: "" if it does not.

    Args:
        k: in_features. The others are as for `fused_obstacle`.
    """
    name = strategy_from_environment()
    if name is None or device.type != "cuda":
        return ""
    obstacle = fused_obstacle(k, n, rank, dtype, device) if name == "fused" else None
    if obstacle is None:
        return f"strategy {name}"
    return f"strategy beta, because gemm_lotr cannot run: {obstacle}"
