"""Bytes of a whole layer: our kernels as counted, and the operators that torch runs for the rivals, counted by a dispatch mode.

A library operator is assumed to move each operand once, which is the minimum. Our kernels are shown twice: with the large
matrices as counted and everything else once (like for like: what is read again, and partial sums, fit in L2 and stay there),
and with every counted byte from DRAM (the worst case).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..measure.bounds import DIRECTIONS, Work, kernel_work, work
from ..measure.names import NAMES
from ..measure.shapes import Case, Shape
from ..rivals.base import Rival, Tensors
from .counts import ELEMENT, SMALL, Key, Row, constants

RIVALS = ("frozen", "lotr-eager", "lora-eager", "lora-in-place", "lora-in-place-beta")
IN_DRAM = "lotr_ext beta, nothing from L2"
FUSED = "lotr_ext fused"
BETA = "lotr_ext beta"
OURS = ("lotr_ext two_pass", BETA, IN_DRAM, FUSED)
LEAST = "least possible"
ROW = 8  # elements of 16 bytes


@dataclass(frozen=True)
class Step:
    """One operator or kernel."""

    name: str
    work: Work
    kernel: Key | None = None  # a kernel of ours: the model of its machine code gives its time (model.py)
    layers: int = 1  # that one launch serves
    inner: int = 0  # what a product sums over; 0: no product of the library
    added: int = 0  # bytes that a product adds onto


Steps = dict[str, list[Step]]  # by direction: forward, backward
_PRODUCTS = {"mm", "addmm", "addmm_"}


class CountedOperators(TorchDispatchMode):
    """The operators that move data, each with its bytes: operands read, results written; views and empty tensors are free."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.split("::")[1]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if is_view or name.startswith("empty") or name in ("detach", "alias"):
            return out
        flat = (a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,)))  # cat takes a list
        inputs = [a for a in flat if isinstance(a, Tensor)]
        results = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        flops = inner = added = 0
        if name in _PRODUCTS:
            left, right = inputs[-2:]
            inner = left.shape[1]
            flops = 2 * left.shape[0] * inner * right.shape[1]
            added = _bytes(inputs[0]) if len(inputs) > 2 and inputs[0].dim() == 2 else 0
        work = Work(flops, sum(map(_bytes, inputs)) + sum(map(_bytes, results)))
        self.steps.append(Step(name, work, inner=inner, added=added))
        return out


def _bytes(t: Tensor) -> int:
    """The bytes of a tensor's storage: an expanded tensor reads it once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def library_steps(rival: str, case: Case) -> Steps:
    """torch's operators for a rival, recorded on tensors without data."""
    from ..rivals.registry import RIVALS as MAKE

    meta = torch.device("meta")
    tensors = Tensors.random(case, meta)
    made: Rival = MAKE[rival](tensors, case)
    x = torch.empty(case.m, case.k, dtype=tensors.A.dtype, device=meta, requires_grad=True)
    with CountedOperators() as forward:
        y = made.layer(x)
    g = torch.empty_like(y)
    with CountedOperators() as backward:
        y.backward(g)
    return {"forward": forward.steps, "backward": backward.steps}


def base_step(m: int, k: int, n: int, accumulate: bool = False) -> Step:
    """The base product y = x W^T (+ y, with beta = 1)."""
    added = ELEMENT * m * n if accumulate else 0
    return Step("base product", Work(2 * m * k * n, ELEMENT * (m * k + n * k + m * n) + added), inner=k, added=added)


def makes_Q(backward: bool, r: int) -> bool:
    """Whether gemm_lotr's launch gives Q = g^T u as well."""
    return backward and r <= constants()["GEMM_LOTR_FACTOR_RANK"]


def fused_key(m: int, inner: int, outer: int, r: int, multiprocessors: int, backward: bool) -> Key:
    """The key of gemm_lotr's time: m rows, inner summed over, outer columns."""
    return (f"gemm_lotr over {inner}" + " with Q" * makes_Q(backward, r), m, outer, r, multiprocessors)


def fused_step(m: int, inner: int, outer: int, r: int, multiprocessors: int, backward: bool) -> Step:
    """The base product with the adapter inside, each operand once; u is written and read."""
    elements = m * inner + inner * outer + m * outer + r * (inner + outer + 2 * m)
    flops = 2 * m * (inner * outer + r * (inner + outer))
    made = Work(2 * m * inner * r, ELEMENT * m * r + 4 * inner * r) if makes_Q(backward, r) else Work(0, 0)
    moved = Work(flops + made.flops, ELEMENT * elements + made.bytes)
    return Step("gemm_lotr", moved, fused_key(m, inner, outer, r, multiprocessors, backward))


def kernel_step(key: Key, rows: dict[Key, Row], all_bytes: bool = False, layers: int = 1) -> Step:
    """A kernel of ours as counted: what it reads again from L2 counts only with all_bytes. layers: that one launch of fold or
    fold_grad serves."""
    name, row, least = key[0], rows[key], kernel_work(*key[:4], ELEMENT)
    work_of = Work(least.flops, row.total if all_bytes else least.bytes + row.moved - row.large)
    return Step(name, work_of, None, layers) if name in SMALL else Step(name, work_of, key)


def expand_step(m: int, width: int, r: int) -> Step:
    """u F^T or k A^T by the library, which writes what the base product adds onto."""
    return Step("expand", Work(2 * m * width * r, ELEMENT * (m * width + m * r + width * r)), inner=r)


def pack_steps(k: int, r: int) -> list[Step]:
    """Packs A: our kernels need rows in multiples of 16 bytes."""
    padded = -(-r // ROW) * ROW
    return [Step("pack", Work(0, ELEMENT * k * (r + padded)))] if padded != r else []


def our_steps(strategy: str, shape: Shape, rows: dict[Key, Row], multiprocessors: int, layers: int = 1) -> Steps:
    """A layer: its kernels as counted for a GPU of so many multiprocessors, and the base products. layers: that fold and
    fold_grad serve in one launch."""
    m, k, n, r = shape
    if strategy not in OURS:
        raise ValueError(f"strategy: expected one of {', '.join(OURS)}, got {strategy!r}")

    def kernel(name: str, rows_of: int, width: int) -> Step:
        return kernel_step((name, rows_of, width, r, multiprocessors), rows, strategy == IN_DRAM, layers)

    def expand(width: int) -> Step:
        return expand_step(m, width, r)

    if strategy == FUSED:  # F, F^T and A^T from one launch; A in x's dtype from another
        operands = Step("fold", Work(2 * n * r * r, ELEMENT * (n * r + k * r + 2 * n * r + k * r)))
        rows_of_A = Step("copy", Work(0, 2 * ELEMENT * k * r))
        return {
            "forward": [operands, fused_step(m, k, n, r, multiprocessors, backward=False)],
            "backward": [
                *([] if makes_Q(True, r) else [kernel("factor_grad", m, n)]),
                *(rows_of_A, fused_step(m, n, k, r, multiprocessors, backward=True)),
                *(kernel("fold_grad", 1, n), kernel("factor_grad", m, k)),
            ],
        }
    packed = pack_steps(k, r)
    reads_g = [kernel("shrink_grad", m, n), kernel("fold_grad", 1, n), kernel("factor_grad", m, k)]
    if strategy in (BETA, IN_DRAM):
        forward = [*packed, kernel("shrink", m, k), kernel("fold", 1, n), expand(n), base_step(m, k, n, accumulate=True)]
        return {"forward": forward, "backward": [*reads_g, expand(k), base_step(m, n, k, accumulate=True)]}
    forward = [*packed, kernel("shrink", m, k), kernel("fold", 1, n), base_step(m, k, n), kernel("expand_add", m, n)]
    return {"forward": forward, "backward": [*reads_g, base_step(m, n, k), *packed, kernel("expand_add", m, k)]}


def least_steps(case: Case) -> Steps:
    """The minimum: one pass over each operand."""
    return {direction: [Step("all", work(case, direction, adapted=True))] for direction in ("forward", "backward")}


def all_steps(shape: Shape, rows: dict[Key, Row], multiprocessors: int) -> dict[str, Steps]:
    """Every rival and every strategy of ours, by name."""
    case = Case(*shape, "bf16", 1)
    found = {rival: library_steps(rival, case) for rival in RIVALS}
    found |= {strategy: our_steps(strategy, shape, rows, multiprocessors) for strategy in OURS}
    return found | {LEAST: least_steps(case)}


def total_bytes(steps: Steps, direction: str) -> int:
    """In "forward", "backward", or both ("step")."""
    names: Iterable[str] = ("forward", "backward") if direction == "step" else (direction,)
    return sum(step.work.bytes for name in names for step in steps[name])


def table(shape: Shape, rows: dict[Key, Row], multiprocessors: int):
    """Each rival's bytes above the frozen layer's, against the minimum."""
    from ..measure.session import Table

    m, k, n, r = shape
    found = all_steps(shape, rows, multiprocessors)
    title = (
        f"Counted bytes beyond the frozen layer's, {m} x {k} x {n}, r = {r}, bf16, {multiprocessors} multiprocessors (no GPU)"
    )
    result = Table(title, "", *DIRECTIONS, "x least", f"x {NAMES['lora-eager']}")
    frozen = {direction: total_bytes(found["frozen"], direction) for direction in DIRECTIONS}

    def beyond(name: str, direction: str) -> int:
        return total_bytes(found[name], direction) - frozen[direction]

    for name in found:
        if name != "frozen":
            both = beyond(name, "step")
            ratios = [f"{both / beyond(other, 'step'):.2f}" for other in (LEAST, "lora-eager")]
            result.add_row(
                NAMES.get(name, name), *(f"{beyond(name, direction) / 1e6:.1f} MB" for direction in DIRECTIONS), *ratios
            )
    return result
