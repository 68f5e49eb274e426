"""Loads, stores and atomics on global memory, which is the process's own, parameters, and shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PtxError
from .parse import WIDTHS, Instruction, Vector
from .program import SIGNED, STORED, Lanes, Mask, Program, Run, Signal, operation, put, view_of
from .warp import Warp

SHARED_WINDOW = 1 << 60  # generic addresses from here on are shared memory
RANK_SHIFT = 24  # a shared::cluster address names block rank n as n + 1 above this bit; 0 is the own block
_FIRST = 1 << 16  # no array begins below


class Bytes:
    """Memory as arrays of each width. base: the address of its first byte.

    Attributes:
        unfenced: of shared memory, for each byte that a thread has written since its warp's last fence.proxy.async, the warp's
            number + 1. TMA and wgmma read by another proxy, which need not see such a byte.
    """

    unfenced: Bytes | None = None

    def __init__(self, data: np.ndarray, name: str, base: int = 0) -> None:
        self.data, self.name, self.base, self.end = data, name, base, base + len(data)
        whole = len(data) // 8 * 8
        self._views = {
            width: data[: whole if width == 8 else len(data) // width * width].view(STORED[width]) for width in (1, 2, 4, 8)
        }

    def _index(self, addresses: Lanes, width: int, count: int) -> Lanes:
        size = width * count
        if (addresses % size).any():
            raise PtxError(
                f"address: expected a multiple of {size}, got {hex(int(addresses[np.argmax(addresses % size != 0)]))}"
            )
        least, most = int(addresses.min()), int(addresses.max()) + size
        if least < self.base or most > self.end:
            raise PtxError(f"address: expected {self.name}, {self.base:#x} to {self.end:#x}, got {least:#x} to {most:#x}")
        return (addresses - self.base) // width

    def read(self, addresses: Lanes, width: int, count: int = 1) -> np.ndarray:
        """[lanes, count] numbers of `width` bytes."""
        index = self._index(addresses, width, count)
        return self._views[width][index[:, None] + np.arange(count)]

    def write(self, addresses: Lanes, values: np.ndarray, warp: int = 0) -> None:
        """values: [lanes, count]. If lanes write to one address, the last remains."""
        width = values.dtype.itemsize
        index = self._index(addresses, width, values.shape[1])[:, None] + np.arange(values.shape[1])
        self._views[width][index] = values
        if self.unfenced is not None:
            self.unfenced._views[width][index] = (warp + 1) * (0x0101010101010101 & 256**width - 1)


def _process() -> Bytes:
    size = (1 << 47) - _FIRST
    return Bytes(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(_FIRST)), "an array", _FIRST)


GLOBAL = _process()
Access = Callable[[Warp, Lanes], list[tuple[Bytes, Lanes, np.ndarray]]]


def shared_of(warp: Warp, addresses: Lanes) -> list[tuple[Bytes, Lanes, np.ndarray]]:
    """The memory of the block that each address names: (memory, addresses in it, which lanes)."""
    addresses = addresses & 0xFFFFFFFF
    ranks = addresses >> RANK_SHIFT
    found = []
    for rank in np.unique(ranks):
        lanes = np.flatnonzero(ranks == rank)
        blocks = warp.block.cluster.blocks
        if rank > len(blocks):
            raise PtxError(f"address: expected shared memory of {len(blocks)} blocks, got {hex(int(addresses[lanes[0]]))}")
        block = warp.block if rank == 0 else blocks[int(rank) - 1]
        block.expect_alive(warp.block)
        found.append((block.shared, addresses[lanes] & (1 << RANK_SHIFT) - 1, lanes))
    return found


def _own_shared(warp: Warp, addresses: Lanes) -> list[tuple[Bytes, Lanes, np.ndarray]]:
    return [(warp.block.shared, addresses & 0xFFFFFFFF, np.arange(len(addresses)))]


def _parameters(warp: Warp, addresses: Lanes) -> list[tuple[Bytes, Lanes, np.ndarray]]:
    return [(GLOBAL, addresses, np.arange(len(addresses)))]


def _global(warp: Warp, addresses: Lanes) -> list[tuple[Bytes, Lanes, np.ndarray]]:
    expect_waited(warp)
    return _parameters(warp, addresses)


def expect_waited(warp: Warp) -> None:
    """Raises if an early launch accesses global memory before griddepcontrol.wait: the launch ahead may still write to it."""
    if not warp.waited:
        raise PtxError("expected griddepcontrol.wait before an early launch accesses global memory")


def _generic(warp: Warp, addresses: Lanes) -> list[tuple[Bytes, Lanes, np.ndarray]]:
    if (addresses < SHARED_WINDOW).all():
        return _global(warp, addresses)
    if (addresses >= SHARED_WINDOW).all():
        return shared_of(warp, addresses)
    raise PtxError("address: expected one state space for the warp, got global and shared")


def access_of(i: Instruction) -> Access:
    """Where the addresses of a load, store or atomic lie. shared::cta and shared are the own block's memory."""
    if "param" in i.words or "const" in i.words:
        return _parameters
    if "global" in i.words:
        return _global
    if "shared::cluster" in i.words:
        return shared_of
    return _own_shared if "shared" in i.words or "shared::cta" in i.words else _generic


def _active(addresses: Lanes, m: Mask) -> tuple[Lanes, np.ndarray | None]:
    if m is None:
        return addresses, None
    lanes = np.flatnonzero(m)
    return addresses[lanes], lanes


def _scatter(w: Warp, slot: int, value: Lanes, lanes: np.ndarray | None) -> None:
    if lanes is None:
        w.registers[slot] = value
    else:
        changed = w.registers[slot].copy()
        changed[lanes] = value
        w.registers[slot] = changed


@operation("ld", "ldu")
def _load(program: Program, i: Instruction) -> Run:
    width, access, address = WIDTHS[i.type_name], access_of(i), program.address(i.operands[1])
    targets = program.targets(i.operands[0])
    signed, waits = i.type_name[0] == "s", i.has("acquire") or i.has("volatile") or i.has("relaxed")

    def widened(value: Lanes, slot: int) -> Lanes:
        held = program.entry.widths[slot] or 1
        if held == width:
            return value
        return value.view(SIGNED[width]).astype(SIGNED[held]).view(STORED[held]) if signed else value.astype(STORED[held])

    def run(w: Warp, m: Mask) -> Signal:
        addresses, lanes = _active(address(w), m)
        found = np.empty((len(addresses), len(targets)), STORED[width])
        for memory, at, some in access(w, addresses):
            found[some] = memory.read(at, width, len(targets))
        for n, slot in enumerate(targets):
            _scatter(w, slot, widened(np.ascontiguousarray(found[:, n]), slot), lanes)
        return "yield" if waits else None

    return run


@operation("st")
def _store(program: Program, i: Instruction) -> Run:
    width, access, address = WIDTHS[i.type_name], access_of(i), program.address(i.operands[0])
    source = i.operands[1]
    slots, stored = program.slots(source, width), STORED[width]
    count = len(source.items) if isinstance(source, Vector) else 1

    def run(w: Warp, m: Mask) -> None:
        addresses, lanes = _active(address(w), m)
        values = np.empty((len(addresses), count), stored)
        for n, slot in enumerate(slots):
            value = w.registers[slot]
            values[:, n] = value if lanes is None else value[lanes]
        for memory, at, some in access(w, addresses):
            memory.write(at, values[some], w.index)
        w.block.grid.events += 1

    return run


def _updated(operation_name: str, old: Any, new: Any, compared: Any) -> Any:
    """What an atomic leaves in memory."""
    if operation_name == "inc":
        return old.dtype.type(0) if old >= new else old + old.dtype.type(1)
    if operation_name == "cas":
        return compared if old == new else old
    table = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    return new if operation_name == "exch" else table[operation_name](old, new)


_ATOMICS = ("add", "inc", "cas", "exch", "min", "max", "and", "or", "xor")


@operation("atom", "red")
def _atomic(program: Program, i: Instruction) -> Run:
    """Lane after lane: the manual leaves the order open."""
    width, view, access = WIDTHS[i.type_name], view_of(i.type_name), access_of(i)
    name = next((word for word in i.words[1:] if word in _ATOMICS), None)
    vector = any(word in i.words for word in ("v2", "v4", "noftz"))
    if name is None or vector:
        raise PtxError(f"{i.text}: expected one of {', '.join(_ATOMICS)} of one number")
    returns = i.words[0] == "atom"
    operands = i.operands if returns else [None, *i.operands]
    d = program.target(i.operands[0]) if returns else 0
    assert operands[1] is not None and operands[2] is not None
    address, b = program.address(operands[1]), program.slot(operands[2], width)
    c = program.slot(operands[3], width) if len(operands) > 3 and operands[3] is not None else b

    def run(w: Warp, m: Mask) -> Signal:
        addresses, r = address(w), w.registers
        before = np.zeros(len(addresses), STORED[width])
        for lane in range(len(addresses)) if m is None else np.flatnonzero(m):
            for memory, at, _ in access(w, addresses[lane : lane + 1]):
                old = memory.read(at, width)[0].view(view)[0]
                before[lane] = old.view(STORED[width])
                new = _updated(name, old, r[b][lane : lane + 1].view(view)[0], r[c][lane : lane + 1].view(view)[0])
                memory.write(at, np.array([[new]], view).view(STORED[width]), w.index)
        if returns:
            put(w, d, before, m)
        w.block.grid.events += 1
        return "yield"

    return run


@operation("griddepcontrol")
def _wait_for_launch(program: Program, i: Instruction) -> Run:
    """Launches follow each other here, so nothing is waited for; `expect_waited` checks."""

    def run(w: Warp, m: Mask) -> None:
        w.waited |= i.words[1] == "wait"

    return run


@operation("fence", "membar", "prefetch", "prefetchu", "setmaxnreg", "applypriority", "discard")
def _nothing(program: Program, i: Instruction) -> Run:
    """Memory is one here, and launches follow each other. fence.proxy.async shows the warp's stores to TMA and wgmma."""
    return _show_to_async if i.words[1:3] == ("proxy", "async") else lambda w, m: None


def _show_to_async(w: Warp, m: Mask) -> None:
    for block in w.block.cluster.blocks:
        unfenced = block.shared.unfenced
        assert unfenced is not None
        unfenced.data[unfenced.data == w.index + 1] = 0


@operation("nanosleep")
def _sleep(program: Program, i: Instruction) -> Run:
    return lambda w, m: "yield"


@operation("mapa")
def _map_address(program: Program, i: Instruction) -> Run:
    """The address of the same place in another block of the cluster."""
    width = WIDTHS[i.type_name]
    d, a, rank = program.target(i.operands[0]), program.slot(i.operands[1], width), program.slot(i.operands[2], 4)
    window = 0 if i.has("shared::cluster") else SHARED_WINDOW

    def run(w: Warp, m: Mask) -> None:
        place = w.registers[a].astype(np.int64) & (1 << RANK_SHIFT) - 1
        ranks = w.registers[rank].astype(np.int64)
        if m is None and (ranks >= len(w.block.cluster.blocks)).any():
            raise PtxError(f"rank: expected below {len(w.block.cluster.blocks)}, got {ranks.max()}")
        put(w, d, (ranks + 1 << RANK_SHIFT | place | window).astype(STORED[width]), m)

    return run
