"""Products of matrices: ldmatrix, movmatrix, mma and wgmma."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import matrix, wgmma
from .errors import PtxError
from .grid import Block, WarpGroup
from .parse import Constant, Instruction, Vector
from .program import WARP, Mask, Program, Run, Signal, operation
from .warp import Warp


def _all_threads(m: Mask, i: Instruction) -> None:
    if m is not None:
        raise PtxError(f"{i.text}: expected all 32 threads of the warp together")


@operation(
    "ldmatrix", forms=r"sync\.aligned\.(m8n8\.x[124](\.trans)?|x[124](\.trans)?\.m8n8)\.shared(::cta)?\.b16", together=WARP
)
def _load_matrix(program: Program, i: Instruction) -> Run:
    targets, address, transpose = program.targets(i.operands[0], 4), program.address(i.operands[1]), i.has("trans")
    if f"x{len(targets)}" not in i.words:
        raise PtxError(f"expected as many registers as matrices, got {len(targets)}")

    def run(w: Warp, m: Mask) -> None:
        _all_threads(m, i)
        loaded = matrix.ldmatrix(w.block.shared.data, address(w).astype(np.uint32), len(targets), transpose)
        for slot, value in zip(targets, loaded, strict=True):
            w.registers[slot] = value

    return run


@operation("movmatrix", forms=r"sync\.aligned\.m8n8\.trans\.b16", together=WARP)
def _move_matrix(program: Program, i: Instruction) -> Run:
    d, a = program.target(i.operands[0], 4), program.slot(i.operands[1], 4)

    def run(w: Warp, m: Mask) -> None:
        _all_threads(m, i)
        w.registers[d] = matrix.movmatrix(w.registers[a])

    return run


@operation("mma", forms=r"sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(bf16\.bf16|f16\.f16|tf32\.tf32)\.f32", together=WARP)
def _multiply(program: Program, i: Instruction) -> Run:
    """mma.sync.aligned.shape.row.col.d.a.b.c"""
    shape, kind = i.words[3], i.words[7]
    targets = program.targets(i.operands[0], 4)
    a, b, c = (program.slots(o, 4) for o in i.operands[1:4])

    def run(w: Warp, m: Mask) -> None:
        _all_threads(m, i)
        r = w.registers
        result = matrix.mma(shape, kind, [r[s] for s in a], [r[s] for s in b], [r[s] for s in c])
        for slot, value in zip(targets, result, strict=True):
            r[slot] = value

    return run


@operation("wgmma", forms=r"fence\.sync\.aligned", together=WARP)
def _order_registers(program: Program, i: Instruction) -> Run:
    """Registers as they are now are those that products may read."""

    def run(w: Warp, m: Mask) -> None:
        w.fenced = list(w.registers)

    return run


@operation("wgmma", forms=r"commit_group\.sync\.aligned", together=WARP)
def _commit(program: Program, i: Instruction) -> Run:
    return lambda w, m: w.product_groups.append(w.products_issued)


@operation("wgmma", forms=r"wait_group\.sync\.aligned", together=WARP)
def _wait(program: Program, i: Instruction) -> Run:
    """For all groups but the last N."""
    left = _immediate(i.operands[0])

    def wait(w: Warp, m: Mask) -> Signal:
        if len(w.product_groups) <= left:
            return None
        until, group = w.product_groups[-1 - left], w.block.groups[w.index // 4]
        return lambda: group.advance(until)

    return wait


@operation("wgmma", forms=r"mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.(bf16\.bf16|f16\.f16|tf32\.tf32)", together=WARP)
def _product(program: Program, i: Instruction) -> Run:
    """D = A B + D of a warpgroup. It runs when all four warps have issued it, at the earliest; its operands are read then."""
    n, kind = int(i.words[4].split("n")[1].split("k")[0]), i.words[6]
    d = program.targets(i.operands[0], 4)
    first = i.operands[1]
    a_registers = program.slots(first, 4) if isinstance(first, Vector) else None
    a_slot = program.slot(first, 8) if a_registers is None else -1
    b_slot, scale_d = program.slot(i.operands[2], 8), program.predicate(i.operands[3])
    numbers = [_immediate(o) for o in i.operands[4:]]
    scales, transposes = numbers[:2], numbers[2:]
    transpose_a, transpose_b = (0, *transposes) if len(transposes) == 1 else tuple(transposes) or (0, 0)

    def issue(w: Warp, m: Mask) -> None:
        _all_threads(m, i)
        group, adds = w.block.groups[w.index // 4], bool(scale_d(w)[0])
        for slot in [*(a_registers or ()), *(d if adds else ())]:
            if w.fenced[slot] is not w.registers[slot]:
                raise PtxError("expected wgmma.fence after a register of the product was written")
        number = w.products_issued
        w.products_issued += 1
        a = w.uniform(a_slot, m, i.text) if a_registers is None else None
        b = w.uniform(b_slot, m, i.text)
        same = (i.text, a, b, adds)
        if number == len(group.queue):
            group.queue.append(_run(group, n, kind, a, a_registers, b, d, adds, scales, (transpose_a, transpose_b)))
            group.issued.append(same)
            group.arrived.append(0)
        if group.issued[number] != same:
            raise PtxError(f"expected the same product in all warps of a warpgroup, got {same} and {group.issued[number]}")
        group.arrived[number] += 1
        if group.arrived[number] == len(group.warps) and not w.block.grid.late():
            group.advance(number + 1)

    return issue


def _immediate(operand: object) -> int:
    if not isinstance(operand, Constant):
        raise PtxError(f"wgmma: expected a number, got {operand}")
    return operand.bits - 2**64 if operand.bits >> 63 else operand.bits


def _check_proxy(block: Block, operands: list[tuple[int, int, int]], kind: str) -> None:
    """Raises if a thread has written an operand without fence.proxy.async since (PTX manual, "Proxies" and "wgmma.fence")."""
    unfenced = block.shared.unfenced
    assert unfenced is not None
    if unfenced.data.any():
        for descriptor, rows, transpose in operands:
            if wgmma.operand(unfenced.data, descriptor, rows, kind, transpose).any():
                raise PtxError(f"{block.name}: expected fence.proxy.async between a store and the wgmma that reads it")


def _run(
    group: WarpGroup,
    n: int,
    kind: str,
    a: int | None,
    a_registers: list[int] | None,
    b: int,
    d: list[int],
    adds: bool,
    scales: list[int],
    transposes: tuple[int, ...],
) -> Callable[[], None]:
    def gathered(slot: int) -> np.ndarray:
        return np.concatenate([w.registers[slot] for w in group.warps])

    def product() -> None:
        block = group.warps[0].block
        _check_proxy(
            block, [(x, rows, t) for x, rows, t in zip((a, b), (64, n), transposes, strict=True) if x is not None], kind
        )
        left = a if a_registers is None else [gathered(slot) for slot in a_registers]
        sums = wgmma.product(n, kind, block.shared.data, left, b, [gathered(slot) for slot in d], adds, *scales, *transposes)
        for slot, value in zip(d, sums, strict=True):
            for index, w in enumerate(group.warps):
                w.registers[slot] = w.fenced[slot] = value[32 * index : 32 * index + 32]
        block.grid.events += 1

    return product
