"""Asynchronous copies: cp.async, and bulk copies of tensors (PTX manual, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from . import tensor_map
from .barriers import complete_bytes
from .errors import PtxError
from .memory import GLOBAL, RANK_SHIFT, expect_waited, shared_of
from .parse import Address, Constant, Instruction
from .program import LANES, Lanes, Mask, Program, Run, Signal, operation
from .warp import Warp

_DESCRIPTOR = 128  # bytes of a tensor map


@operation("cp")
def _copy(program: Program, i: Instruction) -> Run:
    if i.words[1] != "async":
        raise PtxError(f"{i.text}: expected cp.async")
    if "bulk" in i.words:
        return _bulk(program, i)
    if i.words[2] == "commit_group":
        return _commit
    if i.words[2] in ("wait_group", "wait_all"):
        return _wait(program, i)
    return _copy_16(program, i)


def _copy_16(program: Program, i: Instruction) -> Run:
    """cp.async of 4, 8 or 16 bytes a thread; src-size bytes are read and the rest are zeros."""
    into, source = program.address(i.operands[0]), program.address(i.operands[1])
    size = i.operands[2]
    if not isinstance(size, Constant) or size.bits not in (4, 8, 16):
        raise PtxError(f"{i.text}: expected 4, 8 or 16 bytes")
    bytes_, read = size.bits, program.slot(i.operands[3], 4) if len(i.operands) > 3 else None
    words = bytes_ // 4

    def run(w: Warp, m: Mask) -> None:
        lanes = np.arange(LANES) if m is None else np.flatnonzero(m)
        to, at = into(w)[lanes], source(w)[lanes]
        expect_waited(w)
        count = np.full(len(lanes), bytes_) if read is None else w.registers[read][lanes].astype(np.int64)
        if (at % bytes_).any() or (count > bytes_).any():
            raise PtxError(f"{i.text}: expected addresses at multiples of {bytes_} and at most as many bytes")

        def copy() -> None:
            values = np.zeros((len(lanes), words), np.uint32)
            whole, part = np.flatnonzero(count == bytes_), np.flatnonzero((count > 0) & (count < bytes_))
            if len(whole):
                values[whole] = GLOBAL.read(at[whole], 4, words) if words == 1 else _words(at[whole], words)
            for lane in part:
                some = GLOBAL.read(at[lane] + np.arange(count[lane]), 1)[:, 0]
                values[lane].view(np.uint8)[: count[lane]] = some
            for memory, place, some in shared_of(w, to):
                if (place % bytes_).any():
                    raise PtxError(f"{i.text}: expected shared addresses at multiples of {bytes_}")
                memory.write(place, values[some].view(np.uint64) if words > 1 else values[some], w.index)

        if w.block.grid.late():
            w.copies.append(copy)
        else:
            copy()

    return run


def _words(at: Lanes, words: int) -> np.ndarray:
    return np.ascontiguousarray(GLOBAL.read(at, 8, words // 2)).view(np.uint32)


def _commit(w: Warp, m: Mask) -> None:
    w.copy_groups.append(w.copies)
    w.copies = []


def _wait(program: Program, i: Instruction) -> Run:
    """For all but the last groups. Threads of a warp that have diverged share their groups here."""
    everything = i.words[2] == "wait_all"
    number = i.operands[0] if i.operands else Constant(0, "0")
    assert isinstance(number, Constant)
    left = number.bits

    def run(w: Warp, m: Mask) -> None:
        if everything:
            _commit(w, m)
        while len(w.copy_groups) > left:
            for copy in w.copy_groups.popleft():
                copy()

    return run


def _map_at(address: int) -> tensor_map.TensorMap:
    return tensor_map.decode(ctypes.string_at(address, _DESCRIPTOR))


def _read(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _bulk(program: Program, i: Instruction) -> Run:
    if "tensor" not in i.words:
        raise PtxError(f"{i.text}: expected a bulk copy of a tensor")
    if any(word.startswith("im2col") for word in i.words):
        raise PtxError(f"{i.text}: expected the tile mode")
    return _load_box(program, i)


def _one(values: Lanes, lanes: np.ndarray) -> list[int]:
    return [int(v) for v in values[lanes]]


def _load_box(program: Program, i: Instruction) -> Run:
    """Global to shared memory of one block, or of each in the mask of .multicast; bytes are counted at the mbarrier."""
    into, source, barrier = i.operands[0], i.operands[1], i.operands[2]
    assert isinstance(source, Address) and source.coordinates is not None
    to, place, at = program.address(into), program.address(source), program.address(barrier)
    coordinates = program.slots(source.coordinates, 4)
    blocks = program.slot(i.operands[3], 2) if i.has("multicast::cluster") else None

    def run(w: Warp, m: Mask) -> Signal:
        expect_waited(w)
        for lane in range(LANES) if m is None else np.flatnonzero(m):
            r = w.registers
            index = [int(r[slot][lane].view(np.int32)) for slot in coordinates]
            mask = int(r[blocks][lane]) if blocks is not None else None
            copy = _box_copy(w, int(to(w)[lane]), int(place(w)[lane]), index, int(at(w)[lane]), mask)
            if w.block.grid.late():
                w.block.grid.pending.append(copy)
            else:
                copy()
        return None

    return run


def _box_copy(w: Warp, to: int, map_at: int, index: list[int], barrier: int, mask: int | None) -> Callable[[], None]:
    """The map is read at the issue, the tensor when the copy runs."""
    described, all_blocks = _map_at(map_at), w.block.cluster.blocks
    offset, barrier_offset = to & (1 << RANK_SHIFT) - 1, barrier & (1 << RANK_SHIFT) - 1
    if mask is None:
        rank, barrier_rank = to >> RANK_SHIFT, barrier >> RANK_SHIFT
        targets = [(all_blocks[rank - 1] if rank else w.block, all_blocks[barrier_rank - 1] if barrier_rank else w.block)]
    else:
        if mask >> len(all_blocks):
            raise PtxError(f"multicast: expected blocks of a cluster of {len(all_blocks)}, got the mask {mask:#x}")
        targets = [(b, b) for n, b in enumerate(all_blocks) if mask >> n & 1]

    def copy() -> None:
        box = tensor_map.load(described, index, _read)
        for block, signalled in targets:
            block.expect_alive(w.block)
            tensor_map.place(block.shared.data, offset, box, described)
            assert block.shared.unfenced is not None
            tensor_map.place(block.shared.unfenced.data, offset, np.zeros_like(box), described)
            complete_bytes(signalled, barrier_offset, tensor_map.box_bytes(described))

    return copy
