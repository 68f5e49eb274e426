"""A launch: its blocks in clusters, what they share, and the order in which their warps run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .barriers import Mbarrier, NamedBarrier
from .errors import PtxError
from .memory import Bytes
from .parse import Variable
from .program import LANES, Program
from .warp import Warp

Three = tuple[int, int, int]
QUANTUM = 400  # instructions that a warp runs before another may
PATIENCE = 20_000  # turns without any event in which warps wait or spin; after them nothing can end the wait
LONGEST_SPIN = 100  # instructions; a warp that runs more of them in a turn computes
ENDLESS = 30_000_000  # instructions without any event
SHARED_START = 1024  # where a block's shared memory begins: below it the hardware keeps its own on sm_90


@dataclass
class Launch:
    """One kernel launch. addresses: in the host's memory, of each parameter's copy and each variable of the module, by name."""

    program: Program
    grid: Three
    block: Three
    cluster: Three
    shared: int
    cooperative: bool
    early: bool  # may begin before the launch ahead has ended
    addresses: dict[str, int] = field(default_factory=dict)
    statics: list[Variable] = field(default_factory=list)  # shared variables of the module
    dynamic: Variable | None = None  # the array of dynamic shared memory


class WarpGroup:
    """Four warps and the wgmma that they have issued; see products.py."""

    def __init__(self, warps: list[Warp]) -> None:
        self.warps = warps
        self.queue: list[Callable[[], None]] = []  # one a product, in order
        self.issued: list[tuple[str, int | None, int, bool]] = []  # the text and the operands of each
        self.arrived: list[int] = []  # warps that have issued it
        self.done = 0

    def advance(self, until: int) -> bool:
        """Runs products in order up to `until`. Whether all of them have run."""
        while self.done < until and self.done < len(self.queue) and self.arrived[self.done] == len(self.warps):
            self.queue[self.done]()
            self.done += 1
        return self.done >= until


class Block:
    """A block of threads and its shared memory, of unknown content (here 0xFF)."""

    def __init__(self, grid: Grid, cluster: Cluster, index: Three, rank: int) -> None:
        launch = grid.launch
        self.grid, self.cluster, self.index, self.rank = grid, cluster, index, rank
        self.offsets, size = self._layout(launch)
        self.shared = Bytes(np.full(size, 0xFF, np.uint8), "shared memory", first=SHARED_START)
        self.shared.unfenced = Bytes(np.zeros(size, np.uint8), "shared memory")
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        if threads % LANES:
            raise PtxError(f"block: expected a multiple of {LANES} threads, got {threads}")
        self.threads = threads
        self.waited = not launch.early  # a thread has waited for the launch ahead
        self.warps = [Warp(self, i, launch.program) for i in range(threads // LANES)]
        self.groups = [WarpGroup(self.warps[i : i + 4]) for i in range(0, len(self.warps), 4)]
        self.barriers: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[int, Mbarrier] = {}  # by address
        for warp in self.warps:
            self._special(warp)

    @property
    def name(self) -> str:
        return f"{self.grid.launch.program.entry.name} block {self.index}"

    @property
    def done(self) -> bool:
        return all(w.done for w in self.warps)

    def threads_ended(self) -> None:
        """Barriers do not wait for threads that have ended."""
        for barrier in self.barriers.values():
            barrier.complete(self)
        self.cluster.complete()

    def _layout(self, launch: Launch) -> tuple[dict[str, int], int]:
        """Static arrays first, then the dynamic one, aligned to no more than its declaration asks for."""
        at, offsets = SHARED_START, {}
        read = {name for name, _ in launch.program.symbols}
        for v in [*launch.program.entry.shared, *(v for v in launch.statics if v.name in read)]:
            at = -(-at // v.align) * v.align
            offsets[v.name] = at
            at += v.size
        align = max(launch.dynamic.align if launch.dynamic else 1, 16)
        start = -(-at // align) * align
        if start // align % 2 == 0 and align < SHARED_START:
            start += align  # an odd multiple: no more aligned than declared
        if launch.dynamic is None:
            return offsets, at
        offsets[launch.dynamic.name] = start
        return offsets, start + launch.shared

    def _special(self, warp: Warp) -> None:
        """Fills the special registers and symbols that the program reads."""
        launch, (bx, by, _) = self.grid.launch, self.grid.launch.block
        thread = np.arange(LANES, dtype=np.uint32) + LANES * warp.index
        values: dict[str, np.ndarray | int] = {
            "%tid.x": thread % bx,
            "%tid.y": thread // bx % by,
            "%tid.z": thread // (bx * by),
            "%laneid": thread % LANES,
            "%cluster_ctarank": self.rank,
        }
        for n, axis in enumerate("xyz"):
            values[f"%ntid.{axis}"], values[f"%ctaid.{axis}"] = launch.block[n], self.index[n]
            values[f"%nctaid.{axis}"] = launch.grid[n]
            values[f"%cluster_ctaid.{axis}"] = self.index[n] % launch.cluster[n]
        for name, slot in launch.program.specials.items():
            if name not in values:
                raise PtxError(f"register: expected one that the interpreter knows, got {name}")
            warp.registers[slot] = np.broadcast_to(np.asarray(values[name], np.uint32), LANES).copy()
        for (name, _), slot in launch.program.symbols.items():
            address = self.offsets.get(name, launch.addresses.get(name))
            if address is None:
                raise PtxError(f"symbol: expected a parameter or variable, got {name}")
            warp.registers[slot] = np.full(LANES, address, warp.registers[slot].dtype)


class Cluster:
    """Blocks that run at the same time and read each other's shared memory."""

    def __init__(self, grid: Grid, index: Three) -> None:
        cx, cy, cz = grid.launch.cluster
        self.grid = grid
        self.blocks: list[Block] = []
        self.phase = 0  # how often barrier.cluster has completed
        for rank in range(cx * cy * cz):
            x, y, z = rank % cx, rank // cx % cy, rank // (cx * cy)
            self.blocks.append(Block(grid, self, (index[0] * cx + x, index[1] * cy + y, index[2] * cz + z), rank))

    def complete(self) -> None:
        """Ends the phase of barrier.cluster if all threads that have not ended have arrived."""
        warps = [w for b in self.blocks for w in b.warps if not w.done]
        if warps and all((w.cluster_arrivals[w.live] > self.phase).all() for w in warps):
            self.phase += 1
            self.grid.events += 1

    def block(self, rank: int, other: Block) -> Block:
        """The block of a rank, whose shared memory `other` accesses.

        Raises:
            PtxError: if there is none; before the first barrier of the cluster, which shows that all its blocks run; or after
                the block's end (CUDA guide, "Distributed Shared Memory").
        """
        if rank >= len(self.blocks):
            raise PtxError(f"{other.name}: expected shared memory of {len(self.blocks)} blocks, got that of block {rank}")
        block = self.blocks[rank]
        if block is not other and self.phase == 0:
            raise PtxError(f"{other.name}: expected a barrier of the cluster before shared memory of {block.name} is accessed")
        if block is not other and block.done:
            raise PtxError(f"{other.name}: expected {block.name} to run while its shared memory is accessed")
        return block


class Grid:
    """Runs a launch. seed: of the order of warps, blocks and asynchronous operations. resident: clusters at a time; a
    cooperative launch has all."""

    def __init__(self, launch: Launch, seed: int = 0, resident: int = 2) -> None:
        self.launch, self.random = launch, random.Random(seed)
        self.resident = resident
        self.pending: list[Callable[[], None]] = []  # bulk copies that have not landed
        self.events = 0  # whatever may end a wait counts here

    def late(self) -> bool:
        """Whether an asynchronous operation runs when it is waited for, rather than when it is issued."""
        return self.random.random() < 0.7

    def _clusters(self) -> list[Three]:
        counts = [g // c for g, c in zip(self.launch.grid, self.launch.cluster, strict=True)]
        if any(g % c for g, c in zip(self.launch.grid, self.launch.cluster, strict=True)):
            raise PtxError(f"grid: expected a multiple of the cluster {self.launch.cluster}, got {self.launch.grid}")
        waiting = [(x, y, z) for z in range(counts[2]) for y in range(counts[1]) for x in range(counts[0])]
        self.random.shuffle(waiting)
        return waiting

    def run(self) -> int:
        """Until all threads have ended. Returns how many instructions of warps ran.

        Raises:
            PtxError: what the program may not do, or that nothing can end the wait of its warps.
        """
        with np.errstate(all="ignore"):
            return self._run()

    def _run(self) -> int:
        waiting, clusters, warps = self._clusters(), [], []
        resident = len(waiting) if self.launch.cooperative else self.resident
        steps, idle, seen, last_event = 0, 0, 0, 0
        while waiting or warps or self.pending:
            while waiting and len(clusters) < resident:
                clusters.append(Cluster(self, waiting.pop()))
                warps += [w for b in clusters[-1].blocks for w in b.warps]
            if self.pending and (not warps or self.random.random() < 0.3):
                self._land()
            taken = 0
            if warps:
                warp = self.random.choice(warps)
                taken = self._turn(warp)
                if warp.done:
                    self.events += 1
                    warps.remove(warp)
                    clusters = [c for c in clusters if not all(b.done for b in c.blocks)]
            steps += taken
            idle += 1
            if self.events != seen or self.pending:
                idle, last_event = 0, steps
            elif taken > LONGEST_SPIN:
                idle = 0
            seen = self.events
            if idle > PATIENCE or steps - last_event > ENDLESS:
                raise PtxError(self._stuck(warps))
        return steps

    def _turn(self, warp: Warp) -> int:
        """Runs a warp if it can. Returns how many instructions ran."""
        before = warp.steps
        if warp.runnable():
            warp.run(self.random.randrange(1, 2 * QUANTUM))
        return warp.steps - before

    def _land(self) -> None:
        self.pending.pop(self.random.randrange(len(self.pending)))()
        self.events += 1

    def _stuck(self, warps: list[Warp]) -> str:
        places = [f"  {w.block.name} warp {w.index}: {w.program.steps[max(p.pc - 1, 0)].text}" for w in warps for p in w.paths]
        return "\n".join(["deadlock: expected the threads to end, got all of them waiting or in a loop at", *places[:40]])
