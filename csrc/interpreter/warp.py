"""A warp: 32 threads, their registers, and the paths on which they have diverged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .program import ALONE, LANES, WARP

if TYPE_CHECKING:
    from .grid import Block
    from .program import Lanes, Mask, Program, Signal, Step

_ALL = np.ones(LANES, np.bool_)
_FAR = 1 << 60


class Path:
    """Threads at the same instruction."""

    __slots__ = ("blocked", "count", "mask", "pc", "ready", "spun")

    def __init__(self, pc: int, mask: Lanes) -> None:
        self.pc, self.mask, self.count = pc, mask, int(np.count_nonzero(mask))
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.blocked = False  # at an instruction that it executes together with threads that are elsewhere
        self.spun = False  # has asked in vain since the others ran


class Warp:
    """Paths meet again where they are at the same instruction: of those that can run, the one furthest behind runs."""

    def __init__(self, block: Block, index: int, program: Program) -> None:
        self.block, self.index, self.program = block, index, program
        self.registers: list[Lanes] = list(program.values)
        self.paths = [Path(0, _ALL)]
        self.live, self.live_count = _ALL, LANES  # threads that have not ended
        self.copies: list[Callable[[], None]] = []  # cp.async since the last commit, that have not run
        self.copy_groups: deque[list[Callable[[], None]]] = deque()
        self.products_issued = 0
        self.fenced: list[Lanes] = list(program.values)  # the registers at the last wgmma.fence
        self.product_groups: list[int] = []  # how many products were issued at each commit
        self.cluster_arrivals = np.zeros(LANES, np.int64)  # of each thread at barrier.cluster
        self.cluster_waits = np.zeros(LANES, np.int64)
        self.steps = 0

    @property
    def name(self) -> str:
        return f"{self.block.name} warp {self.index}"

    @property
    def done(self) -> bool:
        return not self.paths

    def uniform(self, slot: int, mask: Mask, what: str) -> int:
        """A value that must be the same in all threads."""
        values = self.registers[slot] if mask is None else self.registers[slot][mask]
        if (values != values[0]).any():
            raise PtxError(f"{what}: expected one value in the warp, got {sorted(set(values.tolist()))}")
        return int(values[0])

    def runnable(self) -> bool:
        """Whether a path waits for nothing."""
        for path in self.paths:
            if path.ready is not None and path.ready():
                path.ready = None
        return any(path.ready is None for path in self.paths)

    def _misses(self, path: Path, step: Step) -> bool:
        """Whether threads that execute the step together with those of the path are elsewhere."""
        if step.together == WARP:
            return path.count < self.live_count
        members, here = self.uniform(step.together, path.mask, f"{self.name}, at {step.text}"), _bits(path.mask)
        if here & ~members:
            raise PtxError(f"{self.name}, at {step.text}: expected threads of the members {members:#x}, got {here:#x}")
        return bool(members & _bits(self.live) & ~here)

    def _choose(self) -> Path | None:
        """Of the paths that can go on, the one furthest behind; one that has spun only after the others. None if all wait."""
        code = self.program.steps
        able = [p for p in self.paths if p.ready is None]
        free = [p for p in able if not (p.blocked and self._misses(p, code[p.pc]))]
        if not free:
            if able and len(able) == len(self.paths):
                places = "; ".join(f"{code[p.pc].text} ({_bits(p.mask):#x})" for p in able)
                raise PtxError(f"{self.name}: expected all threads that execute an instruction together, got them at {places}")
            return None
        if all(p.spun for p in free):
            for p in free:
                p.spun = False
        return min((p for p in free if not p.spun), key=lambda p: p.pc)

    def _merge(self, path: Path) -> Path:
        """With the paths that wait for nothing at the same instruction."""
        same = [p for p in self.paths if p.pc == path.pc and p.ready is None]
        if len(same) < 2:
            return path
        merged = Path(path.pc, np.logical_or.reduce([p.mask for p in same]))
        self.paths = [p for p in self.paths if p not in same]
        self.paths.append(merged)
        return merged

    def run(self, steps: int) -> None:
        """Runs about as many instructions, or until all paths wait, one spins, or the threads have ended."""
        path = self._choose()
        while path is not None and steps > 0:
            if len(self.paths) > 1:
                path = self._merge(path)
            taken, spun = self._run_path(path, steps)
            steps -= taken
            self.steps += taken
            if spun:
                path.spun = True
                return
            path = self._choose()

    def _run_path(self, path: Path, steps: int) -> tuple[int, bool]:
        """Until it diverges, waits, spins, may meet another or is no more the one furthest behind. Returns how many
        instructions ran, and whether it spins."""
        code = self.program.steps
        limit = min((p.pc for p in self.paths if p is not path and p.ready is None), default=_FAR)
        pc, taken, signal = path.pc, 0, None
        whole = None if path.count == LANES else path.mask
        path.blocked = False
        while taken < steps:
            step = code[pc]
            taken += 1
            mask, signal = whole, None
            if step.guard >= 0:
                holds, count = self._guarded(step, whole)
                if count < path.count:
                    if count and (step.kind != "run" or step.together != ALONE):
                        path.pc = pc
                        self._diverge(path, step, holds)
                        return taken, False
                    mask = holds
            if step.guard >= 0 and count == 0:
                pc += 1
            elif step.kind == "branch":
                pc = step.target
            elif step.kind == "exit":
                self.paths.remove(path)
                self._end(path.mask)
                return taken, False
            elif step.together != ALONE and self._misses(path, step):
                path.pc, path.blocked = pc, True
                return taken, False
            else:
                signal = self._execute(step, mask)
                pc += 1
            if signal is not None or pc >= limit:
                break
        path.pc = pc
        path.ready = signal if callable(signal) else None
        return taken, signal == "yield"

    def _guarded(self, step: Step, whole: Mask) -> tuple[Lanes, int]:
        """The threads of the path for which the instruction's predicate holds, and how many they are."""
        holds = self.registers[step.guard]
        if step.negated:
            holds = ~holds
        if whole is not None:
            holds = holds & whole
        return holds, int(np.count_nonzero(holds))

    def _execute(self, step: Step, mask: Mask) -> Signal:
        try:
            return step.run(self, mask)
        except (PtxError, IndexError, ValueError) as error:
            raise PtxError(f"{self.name}, at {step.text}: {error}") from error

    def _diverge(self, path: Path, step: Step, holds: Lanes) -> None:
        """Threads for which the predicate holds branch, end or stay at an instruction that its members execute together. The
        others go on."""
        if step.together == WARP:
            raise PtxError(f"{self.name}, at {step.text}: expected a predicate that is the same in all threads of the warp")
        self.paths.remove(path)
        self.paths.append(Path(path.pc + 1, path.mask & ~holds))
        if step.kind == "exit":
            self._end(holds)
        else:
            self.paths.append(Path(step.target if step.kind == "branch" else path.pc, holds))

    def _end(self, threads: Lanes) -> None:
        """Barriers do not wait for threads that have ended. After the last thread its copies land."""
        self.live = self.live & ~threads
        self.live_count = int(np.count_nonzero(self.live))
        if self.done:
            for group in [*self.copy_groups, self.copies]:
                for copy in group:
                    copy()
            self.copy_groups.clear()
            self.copies = []
        self.block.threads_ended()


def _bits(mask: Lanes) -> int:
    """Lane n as bit n."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")
