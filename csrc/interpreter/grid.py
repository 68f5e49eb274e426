"""A launch: its blocks in clusters, what they share, and the order in which their warps run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .barriers import NamedBarrier
from .errors import PtxError
from .memory import Bytes
from .parse import Variable
from .program import LANES, Program
from .warp import Warp

Three = tuple[int, int, int]
QUANTUM = 400  # instructions that a warp runs before another may
PATIENCE = 20_000  # turns without any event after which nothing can end a wait
SHARED_START = 1024  # where dynamic shared memory begins if it may: below it the hardware keeps its own on sm_90


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
        self.shared = Bytes(np.full(size, 0xFF, np.uint8), "shared memory")
        self.shared.unfenced = Bytes(np.zeros(size, np.uint8), "shared memory")
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        if threads % LANES:
            raise PtxError(f"block: expected a multiple of {LANES} threads, got {threads}")
        self.threads = threads
        self.warps = [Warp(self, i, launch.program) for i in range(threads // LANES)]
        self.groups = [WarpGroup(self.warps[i : i + 4]) for i in range(0, len(self.warps), 4)]
        self.barriers: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[int, list[int]] = {}  # by address: see barriers.py
        for warp in self.warps:
            self._special(warp)

    @property
    def name(self) -> str:
        return f"{self.grid.launch.program.entry.name} block {self.index}"

    def expect_alive(self, other: Block) -> None:
        """Raises unless `other`, of the same cluster, may access this block's shared memory: between the first barrier of the
        cluster, which shows that all its blocks run, and this block's end (CUDA guide, "Distributed Shared Memory")."""
        if self is other:
            return
        if self.cluster.phase == 0:
            raise PtxError(
                f"{other.name}: expected a barrier of the cluster before the shared memory of {self.name} is accessed"
            )
        if all(warp.done for warp in self.warps):
            raise PtxError(f"{other.name}: expected {self.name} to run while its shared memory is accessed")

    def _layout(self, launch: Launch) -> tuple[dict[str, int], int]:
        """Static arrays first, then the dynamic one, aligned to no more than its declaration asks for."""
        at, offsets = 0, {}
        read = {name for name, _ in launch.program.symbols}
        for v in [*launch.program.entry.shared, *(v for v in launch.statics if v.name in read)]:
            at = -(-at // v.align) * v.align
            offsets[v.name] = at
            at += v.size
        align = max(launch.dynamic.align if launch.dynamic else 1, 16)
        start = max(at, SHARED_START)
        start = -(-start // align) * align
        if start // align % 2 == 0 and align < SHARED_START:
            start += align  # an odd multiple: no more aligned than declared
        if launch.dynamic:
            offsets[launch.dynamic.name] = start
        return offsets, start + launch.shared

    def _special(self, warp: Warp) -> None:
        """Fills the special registers and symbols that the program reads."""
        launch, (bx, by, _) = self.grid.launch, self.grid.launch.block
        thread = np.arange(LANES, dtype=np.uint32) + LANES * warp.index
        cx, cy, cz = launch.cluster
        values: dict[str, np.ndarray | int] = {
            "%tid.x": thread % bx,
            "%tid.y": thread // bx % by,
            "%tid.z": thread // (bx * by),
        }
        values |= {"%laneid": thread % LANES, "%warpid": warp.index, "%cluster_ctarank": self.rank, "WARP_SZ": LANES}
        values |= {"%cluster_nctarank": cx * cy * cz, "%smid": 0, "%clock": 0, "%dynamic_smem_size": launch.shared}
        values |= {"%is_explicit_cluster": int(cx * cy * cz > 1), "%nwarpid": len(self.warps)}
        for n, axis in enumerate("xyz"):
            values[f"%ntid.{axis}"], values[f"%ctaid.{axis}"] = launch.block[n], self.index[n]
            values[f"%nctaid.{axis}"], values[f"%cluster_nctaid.{axis}"] = launch.grid[n], launch.cluster[n]
            values[f"%clusterid.{axis}"] = self.index[n] // launch.cluster[n]
            values[f"%nclusterid.{axis}"] = launch.grid[n] // launch.cluster[n]
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
        self.blocks: list[Block] = []
        self.arrived, self.phase = 0, 0  # threads at barrier.cluster, and how often it has completed
        for rank in range(cx * cy * cz):
            x, y, z = rank % cx, rank // cx % cy, rank // (cx * cy)
            self.blocks.append(Block(grid, self, (index[0] * cx + x, index[1] * cy + y, index[2] * cz + z), rank))
        self.threads = sum(b.threads for b in self.blocks)


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
        """Until all threads have ended. Returns how many instructions of warps ran."""
        waiting, clusters, warps = self._clusters(), [], []
        resident = len(waiting) if self.launch.cooperative else self.resident
        steps, idle, seen = 0, 0, 0
        while waiting or warps or self.pending:
            while waiting and len(clusters) < resident:
                clusters.append(Cluster(self, waiting.pop()))
                warps += [w for b in clusters[-1].blocks for w in b.warps]
            if self.pending and (not warps or self.random.random() < 0.3):
                self._land()
            if warps:
                warp = self.random.choice(warps)
                if warp.runnable():
                    before = warp.steps
                    warp.run(self.random.randrange(1, 2 * QUANTUM))
                    steps += warp.steps - before
                if warp.done:
                    self.events += 1
                    warps.remove(warp)
                    clusters = [c for c in clusters if any(not w.done for b in c.blocks for w in b.warps)]
            idle = 0 if self.events != seen or self.pending else idle + 1
            seen = self.events
            if idle > PATIENCE:
                raise PtxError(self._stuck(warps))
        return steps

    def _land(self) -> None:
        self.pending.pop(self.random.randrange(len(self.pending)))()
        self.events += 1

    def _stuck(self, warps: list[Warp]) -> str:
        places = [f"  {w.block.name} warp {w.index}: {w.program.steps[max(p.pc - 1, 0)].text}" for w in warps for p in w.paths]
        return "\n".join(["deadlock: expected the threads to end, got all of them waiting at", *places[:40]])
