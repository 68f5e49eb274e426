"""Loads, stores and atomics on global memory, which is the process's own, parameters, and shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from .errors import PtxError
from .parse import WIDTHS, Instruction
from .program import LANES, SIGNED, STORED, Lanes, Mask, Program, Run, Signal, operation, put
from .warp import Warp

SHARED_WINDOW = 1 << 60  # generic addresses from here on are shared memory
RANK_SHIFT = 24  # a shared::cluster address names block rank n as n + 1 above this bit; 0 is the own block
_FIRST = 1 << 16  # no array begins below
_WORDS = "acquire|release|acq_rel|relaxed|volatile|cta|cluster|gpu|sys|global|shared|shared::cta|shared::cluster|param"
_WORDS = rf"(({_WORDS}|ca|cg|cs|cv|wb|wt|nc|L2::(64|128|256)B)\.)*"  # without effect here, but for the state space
_TYPES = "[bsu](8|16|32|64)|f32"


class Bytes:
    """Memory as arrays of each width. base: the address of its first byte; first: that of the first byte that may be accessed.

    Attributes:
        unfenced: of shared memory, for each byte that a thread has written since its warp's last fence.proxy.async, the warp's
            number + 1. TMA and wgmma read by another proxy, which need not see such a byte.
    """

    unfenced: Bytes | None = None

    def __init__(self, data: np.ndarray, name: str, base: int = 0, first: int = 0) -> None:
        self.data, self.name, self.base, self.first, self.end = data, name, base, max(base, first), base + len(data)
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
        if least < self.first or most > self.end:
            raise PtxError(f"address: expected {self.name}, {self.first:#x} to {self.end:#x}, got {least:#x} to {most:#x}")
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
Places = list[tuple[Bytes, Lanes, "np.ndarray | slice"]]  # (memory, addresses in it, of which lanes)
Access = Callable[[Warp, Lanes], Places]
_ALL = slice(None)


def shared_of(warp: Warp, addresses: Lanes) -> Places:
    """The memory of the block that each address names."""
    ranks = (addresses & 0xFFFFFFFF) >> RANK_SHIFT
    found: Places = []
    for rank in np.unique(ranks):
        lanes = np.flatnonzero(ranks == rank)
        block = warp.block if rank == 0 else warp.block.cluster.block(int(rank) - 1, warp.block)
        found.append((block.shared, addresses[lanes] & (1 << RANK_SHIFT) - 1, lanes))
    return found


def _own_shared(warp: Warp, addresses: Lanes) -> Places:
    return [(warp.block.shared, addresses & 0xFFFFFFFF, _ALL)]


def _parameters(warp: Warp, addresses: Lanes) -> Places:
    return [(GLOBAL, addresses, _ALL)]


def _global(warp: Warp, addresses: Lanes) -> Places:
    expect_waited(warp)
    return _parameters(warp, addresses)


def expect_waited(warp: Warp) -> None:
    """Raises if an early launch accesses global memory before griddepcontrol.wait: the launch ahead may still write to it.

    One thread's wait makes the memory visible to the grid, and CUTLASS' warps rely on the wait of the warp that gives them
    their tiles. A warp that nothing orders after a wait is found in an order where it runs first.
    """
    if not warp.block.waited:
        raise PtxError("expected griddepcontrol.wait before an early launch accesses global memory")


def _generic(warp: Warp, addresses: Lanes) -> Places:
    if (addresses < SHARED_WINDOW).all():
        return _global(warp, addresses)
    if (addresses >= SHARED_WINDOW).all():
        return shared_of(warp, addresses)
    raise PtxError("address: expected one state space for the warp, got global and shared")


def access_of(i: Instruction) -> Access:
    """Where the addresses of a load, store or atomic lie. shared::cta and shared are the own block's memory."""
    if i.has("param"):
        return _parameters
    if i.has("global"):
        return _global
    if "shared::cluster" in i.words:
        return shared_of
    return _own_shared if i.has("shared") or i.has("shared::cta") else _generic


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


@operation("ld", forms=rf"{_WORDS}(v[24]\.)?({_TYPES})")
def _load(program: Program, i: Instruction) -> Run:
    width, access, address = WIDTHS[i.type_name], access_of(i), program.address(i.operands[1])
    targets = program.targets(i.operands[0], width, at_least=True)
    _check_count(i, len(targets), width)
    signed, waits = i.type_name[0] == "s", i.has("acquire") or i.has("volatile") or i.has("relaxed")

    def widened(value: Lanes, slot: int) -> Lanes:
        held = program.entry.widths[slot]
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


def _check_count(i: Instruction, count: int, width: int) -> None:
    """Of the registers: 1, or that of .v2 or .v4; 16 bytes at most."""
    expected = next((int(word[1]) for word in i.words if word in ("v2", "v4")), 1)
    if count != expected or count * width > 16:
        raise PtxError(f"expected {expected} registers and at most 16 bytes, got {count} registers of {width} bytes")


@operation("st", forms=rf"{_WORDS}(v[24]\.)?({_TYPES})")
def _store(program: Program, i: Instruction) -> Run:
    width, access, address = WIDTHS[i.type_name], access_of(i), program.address(i.operands[0])
    slots, stored = program.slots(i.operands[1], width, at_least=True), STORED[width]
    _check_count(i, len(slots), width)

    def run(w: Warp, m: Mask) -> None:
        addresses, lanes = _active(address(w), m)
        values = np.empty((len(addresses), len(slots)), stored)
        for n, slot in enumerate(slots):
            value = w.registers[slot]
            values[:, n] = value if lanes is None else value[lanes]
        for memory, at, some in access(w, addresses):
            memory.write(at, values[some], w.index)
        w.block.grid.events += 1

    return run


@operation("atom", forms=rf"{_WORDS}(add\.{_WORDS}[su]32|inc\.{_WORDS}u32)")
def _atomic(program: Program, i: Instruction) -> Run:
    """Lane after lane: the manual leaves the order open."""
    access, wraps = access_of(i), i.has("inc")
    d, address, b = program.target(i.operands[0], 4), program.address(i.operands[1]), program.slot(i.operands[2], 4)

    def run(w: Warp, m: Mask) -> Signal:
        addresses, by = address(w), w.registers[b]
        before = np.zeros(LANES, np.uint32)
        for lane in range(LANES) if m is None else np.flatnonzero(m):
            [(memory, at, _)] = access(w, addresses[lane : lane + 1])
            old = int(memory.read(at, 4)[0, 0])
            new = (0 if old >= by[lane] else old + 1) if wraps else old + int(by[lane])
            memory.write(at, np.array([[new & 0xFFFFFFFF]], np.uint32), w.index)
            before[lane] = old
        put(w, d, before, m)
        w.block.grid.events += 1
        return "yield"

    return run


@operation("griddepcontrol", forms="wait|launch_dependents")
def _wait_for_launch(program: Program, i: Instruction) -> Run:
    """Launches follow each other here, so nothing is waited for; `expect_waited` checks."""

    def run(w: Warp, m: Mask) -> None:
        w.block.waited |= i.has("wait")

    return run


@operation(
    "fence", forms=r"(acq_rel|sc)\.(cta|cluster|gpu|sys)|mbarrier_init\.release\.cluster|proxy\.async(\.shared::cta|\.global)?"
)
@operation("membar", forms="cta|gl|sys")
@operation("prefetch", forms="tensormap")
def _fence(program: Program, i: Instruction) -> Run:
    """A store is visible to all at once, but for the async proxy: TMA and wgmma."""
    if i.words[1] == "mbarrier_init":
        return _show_mbarriers
    return _show_to_async if i.words[1:3] == ("proxy", "async") and not i.has("global") else lambda w, m: None


def _show_mbarriers(w: Warp, m: Mask) -> None:
    for barrier in w.block.mbarriers.values():
        barrier.shown |= barrier.by == w.index


def _show_to_async(w: Warp, m: Mask) -> None:
    _show_mbarriers(w, m)
    for block in w.block.cluster.blocks:
        unfenced = block.shared.unfenced
        assert unfenced is not None
        unfenced.data[unfenced.data == w.index + 1] = 0


@operation("cvta", forms=r"(to\.)?(shared|global|param)\.u64")
def _to_generic(program: Program, i: Instruction) -> Run:
    """Addresses of global memory and of parameters are generic; shared memory has a window."""
    d, a = program.target(i.operands[0], 8), program.slot(i.operands[1], 8)
    if not i.has("shared"):
        return lambda w, m: put(w, d, w.registers[a], m)
    if not i.has("to"):
        return lambda w, m: put(w, d, w.registers[a] + np.uint64(SHARED_WINDOW), m)

    def run(w: Warp, m: Mask) -> None:
        put(w, d, _shared_address(w.registers[a], m).astype(np.uint64), m)

    return run


def _shared_address(generic: Lanes, m: Mask) -> Lanes:
    """The shared::cluster address of generic ones."""
    active = generic if m is None else generic[m]
    if (active < SHARED_WINDOW).any():
        raise PtxError(f"address: expected generic addresses of shared memory, got {hex(int(active.min()))}")
    return generic & np.uint64(SHARED_WINDOW - 1)


@operation("mapa", forms=r"u64|shared::cluster\.u32")
def _map_address(program: Program, i: Instruction) -> Run:
    """The address of the same place in another block of the cluster."""
    width, generic = WIDTHS[i.type_name], not i.has("shared::cluster")
    d, a, rank = program.target(i.operands[0], width), program.slot(i.operands[1], width), program.slot(i.operands[2], 4)

    def run(w: Warp, m: Mask) -> None:
        place = (_shared_address(w.registers[a], m) if generic else w.registers[a]).astype(np.int64) & (1 << RANK_SHIFT) - 1
        ranks, blocks = w.registers[rank].astype(np.int64), len(w.block.cluster.blocks)
        active = ranks if m is None else ranks[m]
        if active.max() >= blocks:
            raise PtxError(f"rank: expected below {blocks}, got {active.max()}")
        put(w, d, (ranks + 1 << RANK_SHIFT | place | (SHARED_WINDOW if generic else 0)).astype(STORED[width]), m)

    return run
