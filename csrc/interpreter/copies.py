"""Asynchronous copies: cp.async, and bulk copies of tensors (PTX manual, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from . import tensor_map
from .barriers import complete_bytes
from .errors import PtxError
from .memory import GLOBAL, RANK_SHIFT, expect_waited
from .parse import Address, Constant, Instruction
from .program import LANES, Mask, Program, Run, operation
from .warp import Warp

_DESCRIPTOR = 128  # bytes of a tensor map


_SIZE = 16  # bytes that a thread copies with cp.async.cg


@operation("cp", forms=r"async\.cg\.shared(::cta)?\.global(\.L2::(64|128|256)B)?")
def _copy(program: Program, i: Instruction) -> Run:
    """cp.async of 16 bytes a thread; as many bytes as the last operand says are read, and the rest are zeros."""
    into, source, size = program.address(i.operands[0]), program.address(i.operands[1]), i.operands[2]
    if not isinstance(size, Constant) or size.bits != _SIZE:
        raise PtxError(f"expected {_SIZE} bytes")
    read = program.slot(i.operands[3], 4) if len(i.operands) > 3 else None

    def run(w: Warp, m: Mask) -> None:
        expect_waited(w)
        lanes = np.arange(LANES) if m is None else np.flatnonzero(m)
        to, at = into(w)[lanes] & 0xFFFFFFFF, source(w)[lanes]
        count = np.full(len(lanes), _SIZE) if read is None else w.registers[read][lanes].astype(np.int64)
        if (at % _SIZE).any() or (to % _SIZE).any() or (count > _SIZE).any():
            raise PtxError(f"expected addresses at multiples of {_SIZE} and at most as many bytes")

        def copy() -> None:
            values = np.zeros((len(lanes), _SIZE // 8), np.uint64)
            whole, part = np.flatnonzero(count == _SIZE), np.flatnonzero((count > 0) & (count < _SIZE))
            if len(whole):
                values[whole] = GLOBAL.read(at[whole], 8, _SIZE // 8)
            for lane in part:
                some = GLOBAL.read(at[lane] + np.arange(count[lane]), 1)[:, 0]
                values[lane].view(np.uint8)[: count[lane]] = some
            w.block.shared.write(to, values, w.index)

        if w.block.grid.late():
            w.copies.append(copy)
        else:
            copy()

    return run


@operation("cp", forms=r"async\.commit_group")
def _commit(program: Program, i: Instruction) -> Run:
    """Threads of a warp that have diverged share their groups here."""
    return _close_group


def _close_group(w: Warp, m: Mask) -> None:
    w.copy_groups.append(w.copies)
    w.copies = []


@operation("cp", forms=r"async\.(wait_group|wait_all)")
def _wait(program: Program, i: Instruction) -> Run:
    """For all groups but the last N; wait_all: for all copies."""
    everything = i.has("wait_all")
    number = Constant(0) if everything else i.operands[0]
    if not isinstance(number, Constant):
        raise PtxError("expected a number of groups")
    left = number.bits

    def run(w: Warp, m: Mask) -> None:
        if everything:
            _close_group(w, m)
        while len(w.copy_groups) > left:
            for copy in w.copy_groups.popleft():
                copy()

    return run


def _map_at(address: int) -> tensor_map.TensorMap:
    return tensor_map.decode(ctypes.string_at(address, _DESCRIPTOR))


def _read(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


@operation(
    "cp",
    forms=r"async\.bulk\.tensor\.[1-5]d\.shared::cluster\.global(\.tile)?\.mbarrier::complete_tx::bytes"
    r"(\.multicast::cluster)?(\.L2::cache_hint)?",
)
def _load_box(program: Program, i: Instruction) -> Run:
    """Global to shared memory of one block, or of each in the mask of .multicast; bytes are counted at the mbarrier."""
    into, source, barrier = i.operands[0], i.operands[1], i.operands[2]
    if not isinstance(source, Address) or source.coordinates is None or f"{len(source.coordinates.items)}d" not in i.words:
        raise PtxError("expected as many coordinates as dimensions")
    to, place, at = program.address(into), program.address(source), program.address(barrier)
    coordinates = program.slots(source.coordinates, 4)
    blocks = program.slot(i.operands[3], 2) if i.has("multicast::cluster") else None

    def run(w: Warp, m: Mask) -> None:
        expect_waited(w)
        r, into_at, maps, barriers = w.registers, to(w), place(w), at(w)
        for lane in range(LANES) if m is None else np.flatnonzero(m):
            index = [int(r[slot][lane].view(np.int32)) for slot in coordinates]
            mask = int(r[blocks][lane]) if blocks is not None else None
            copy = _box_copy(w, int(into_at[lane]), int(maps[lane]), index, int(barriers[lane]), mask)
            if w.block.grid.late():
                w.block.grid.pending.append(copy)
            else:
                copy()

    return run


def _box_copy(w: Warp, to: int, map_at: int, index: list[int], barrier: int, mask: int | None) -> Callable[[], None]:
    """The map is read at the issue, the tensor when the copy runs."""
    described, cluster = _map_at(map_at), w.block.cluster
    offset, barrier_offset = to & (1 << RANK_SHIFT) - 1, barrier & (1 << RANK_SHIFT) - 1
    if mask is None:
        rank, barrier_rank = (
            (address >> RANK_SHIFT) - 1 if address >> RANK_SHIFT else w.block.rank for address in (to, barrier)
        )
        if rank != barrier_rank:
            raise PtxError(f"expected the mbarrier in the block {rank} that the copy fills, got block {barrier_rank}")
        ranks = [rank]
    else:
        ranks = [n for n in range(mask.bit_length()) if mask >> n & 1]

    def copy() -> None:
        box = tensor_map.load(described, index, _read)
        for rank in ranks:
            block = cluster.block(rank, w.block)
            tensor_map.place(block.shared.data, offset, box, described)
            assert block.shared.unfenced is not None
            tensor_map.place(block.shared.unfenced.data, offset, np.zeros_like(box), described)
            complete_bytes(block, barrier_offset, tensor_map.box_bytes(described))

    return copy
