"""Lists and forces the plans of the CUDA kernels: how a kernel divides its problem into blocks.

csrc/cuda/plans.h chooses a plan, unless a rule names another: for KERNELS by an estimate of time among candidates, for the
other kernels by a formula. A rule is an operator and words NAME=NUMBER: "factor_grad wgmma=0", "shrink M=8192 r=16
m_blocks=64", "fold_grad splits=4". LOTR_CUDA_PLAN in the environment holds rules, separated by semicolons; `forced` does the
same for a block of code; `lotr_ext.tune` measures the best few plans of KERNELS and makes rules of the answers.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .planner import Plan

KERNELS = ("shrink", "expand_add", "factor_grad", "shrink_grad")  # those with candidates
MOST_FUSED_Q = 16  # ranks; beyond them gemm_lotr's backward leaves Q to factor_grad: csrc/cuda/gemm_lotr.h
MOST_SHRINK_GRAD = 64  # ranks; beyond them shrink_grad is shrink and factor_grad: csrc/cuda/launchers.h
# GPUs whose plans can be listed without one: SMs, bytes of shared memory per SM, MHz, MB/s of memory, whether launches may be
# early, whether wgmma runs.
CARDS = {
    "h100": (132, 233472, 1755, 3352320, 1, 1),
    "a100": (108, 167936, 1410, 2039040, 0, 0),
    "b200": (148, 233472, 1965, 8000000, 1, 0),
}


class Launch(NamedTuple):
    """A kernel on a large matrix [m, n] at rank r. gemm_lotr: its output; scale_backward: no rank, r 0. fold_grad: m cores
    [r, r_out] and B [n, r_out]; row_core_grad: m rows and n cores [r, r_out]."""

    kernel: str
    m: int
    n: int
    r: int
    r_out: int = 0


class CudaPlan(NamedTuple):
    """plan: in the words of a rule; microseconds: the estimate that it was chosen by, 0 where there are no candidates."""

    plan: str
    blocks: int
    microseconds: float


def launches(
    plan: Plan, tokens: int, k: int, n: int, r_in: int, r_out: int, step: bool, cores: int = 0, scaled: bool = False
) -> list[Launch]:
    """The launches with plans of one layer's call; step: with its backward.

    cores: the number of cores from which each row takes one; 0: all rows have the same. scaled: whether y's columns have
    magnitudes.
    """
    m, onto = tokens, plan.strategy == "two_pass"
    if plan.strategy == "fused":
        return _fused_launches(m, k, n, r_in, r_out, step)
    scale = [Launch("scale_backward", m, n, 0)] * scaled
    if plan.unfolded and not cores:
        found = [Launch("shrink", m, k, r_in), Launch("expand_add", m, n, r_out)]
        if step:
            found += [*scale, Launch("shrink", m, n, r_out), Launch("expand_add", m, k, r_in), Launch("shrink", m, r_in, r_out)]
            found += [Launch("factor_grad", m, *sizes) for sizes in ((k, r_in), (n, r_out), (r_in, r_out))]
        return found
    inner = r_out if cores else r_in  # of the product with B, or with the folded factor
    found = [Launch("shrink", m, k, r_in)] + [Launch("expand_add", m, n, inner)] * (onto or scaled)
    if step:
        both = ("shrink_grad",) if inner <= MOST_SHRINK_GRAD else ("shrink", "factor_grad")
        core = Launch("row_core_grad", m, cores, r_in, r_out) if cores else Launch("fold_grad", 1, n, r_in, r_out)
        found += [*scale, *(Launch(kernel, m, n, inner) for kernel in both), core, Launch("factor_grad", m, k, r_in)]
        found += [Launch("expand_add", m, k, r_in)] * onto
    return found


def _fused_launches(m: int, k: int, n: int, r_in: int, r_out: int, step: bool) -> list[Launch]:
    found = [Launch("gemm_lotr", m, n, r_in)]
    if step:
        found += [Launch("factor_grad", m, n, r_in)] * (r_in > MOST_FUSED_Q)
        found += [Launch("gemm_lotr", m, k, r_in), Launch("fold_grad", 1, n, r_in, r_out), Launch("factor_grad", m, k, r_in)]
    return found


def is_plan(text: str) -> bool:
    """Whether text can be the words of a plan."""
    word = r"(wgmma|rows|cols|m_blocks|n_blocks|of_row|cluster)=\d{1,9}"
    return re.fullmatch(rf"{word}( {word})*", text) is not None


def obstacle() -> str | None:
    """Why this build has no plans; None if it has."""
    return None if hasattr(torch.ops.lotr, "cuda_plans") else "lotr_ext was built without CUDA kernels"


def plans(launch: Launch, dtype: torch.dtype, device: torch.device | None = None, card: str = "h100") -> list[CudaPlan]:
    """The plan that a launch takes, then the others in the order of their estimated times.

    device: a GPU of this machine. None: plans for `card`, one of CARDS. Raises ValueError for a forced rule that no plan fits.
    """
    if card not in CARDS:
        raise ValueError(f"card: expected one of {', '.join(CARDS)}, got {card!r}")
    index = -1 if device is None else device.index if device.index is not None else torch.cuda.current_device()
    found = _checked(torch.ops.lotr.cuda_plans, *launch, dtype, index, CARDS[card])
    return [CudaPlan(**one) for one in json.loads(found)]


def described(launch: Launch, dtype: torch.dtype, device: torch.device | None, card: str) -> str:
    """The plan that a launch takes, in one line."""
    plan = plans(launch, dtype, device, card)[0]
    rank = f", r {launch.r}" + f" x {launch.r_out}" * bool(launch.r_out) if launch.r else ""
    where = "" if device is not None else f" on {card}"
    time = f", {plan.microseconds:.1f} us by estimate" if plan.microseconds else ""
    return f"{launch.kernel} [{launch.m}, {launch.n}]{rank}{where}: {plan.plan}{time}"


@contextlib.contextmanager
def forced(rules: str) -> Iterator[None]:
    """Forces plans of CUDA kernels by rules, in all threads of this process, while the block lasts. For benchmarks.

    Raises ValueError for text that is no rule. If no plan of a problem fits a rule, the operator's call raises.
    """
    before = _checked(torch.ops.lotr.cuda_plan_rules, rules, True)
    try:
        yield
    finally:
        torch.ops.lotr.cuda_plan_rules(before, True)


def measured(rules: str) -> None:
    """Sets the rules that measured times gave. Forced rules come before them. Rules that no plan fits are ignored."""
    _checked(torch.ops.lotr.cuda_plan_rules, rules, False)


def _checked(operator, *arguments):
    """The operator's result. Raises its error as a ValueError of one line."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        raise ValueError(str(error).partition("\n")[0]) from None
