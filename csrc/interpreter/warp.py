"""A warp: 32 threads, their registers, and the paths on which they have diverged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError

if TYPE_CHECKING:
    from .grid import Block
    from .parse import Instruction
    from .program import Lanes, Mask, Program, Signal, Step

LANES = 32
_ALL = np.ones(LANES, np.bool_)


class Path:
    """Threads at the same instruction."""

    __slots__ = ("blocked", "count", "mask", "pc", "ready", "spun")

    def __init__(self, pc: int, mask: Lanes) -> None:
        self.pc, self.mask, self.count = pc, mask, int(np.count_nonzero(mask))
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.blocked = False  # at a collective, for the warp's other threads
        self.spun = False  # has asked in vain since the others ran


class Warp:
    """Paths meet again where they are at the same instruction: of those that can run, the one furthest behind runs."""

    def __init__(self, block: Block, index: int, program: Program) -> None:
        self.block, self.index, self.program = block, index, program
        self.registers: list[Lanes] = list(program.values)
        self.paths = [Path(0, _ALL)]
        self.copies: list[Callable[[], None]] = []  # cp.async since the last commit, that have not run
        self.copy_groups: deque[list[Callable[[], None]]] = deque()
        self.waited = not block.grid.launch.early  # for the launch ahead
        self.products_issued = 0
        self.fenced: list[Lanes] = list(program.values)  # the registers at the last wgmma.fence
        self.product_groups: list[int] = []  # how many products were issued at each commit
        self.cluster_phase = 0
        self.steps = 0

    @property
    def done(self) -> bool:
        return not self.paths

    def first_lane(self, mask: Mask) -> int:
        return 0 if mask is None else int(mask.argmax())

    def uniform(self, slot: int, mask: Mask, what: str) -> int:
        """A value that must be the same in all threads."""
        values = self.registers[slot] if mask is None else self.registers[slot][mask]
        if (values != values[0]).any():
            raise PtxError(f"{what}: expected one value in the warp, got {sorted(set(values.tolist()))}")
        return int(values[0])

    def expect_members(self, members: Lanes, mask: Mask, at: Instruction) -> None:
        """Raises if a thread of the mask of members does not take part."""
        expected = int(members[self.first_lane(mask)])
        here = 0xFFFFFFFF if mask is None else sum(1 << n for n in range(LANES) if mask[n])
        if expected & ~here:
            raise PtxError(f"{at.text}: expected the threads {expected:#x} together, got {here:#x}")

    def runnable(self) -> bool:
        """Whether a path waits for nothing."""
        for path in self.paths:
            if path.ready is None:
                return True
            if path.ready():
                path.ready = None
                return True
        return False

    def _choose(self) -> Path | None:
        """None if all wait. A collective runs with fewer threads only if no other can come."""
        able = [p for p in self.paths if p.ready is None]
        if not able:
            return None
        free = [p for p in able if not p.blocked]
        if not free:
            if len(able) < len(self.paths):
                return None
            return min(able, key=lambda p: p.pc)
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
        """Until it diverges, waits, spins or may meet another. Returns how many instructions ran, and whether it spins."""
        code, alone = self.program.steps, len(self.paths) == 1
        pc, taken = path.pc, 0
        whole = None if path.count == LANES else path.mask
        while taken < steps:
            step = code[pc]
            taken += 1
            mask = whole
            if step.guard >= 0:
                holds, count = self._guarded(step, whole)
                if count == 0:
                    pc += 1
                    continue
                if count < path.count:
                    if step.kind != "run":
                        path.pc = pc
                        self._diverge(path, step, holds)
                        return taken, False
                    mask = holds
            if step.kind == "branch":
                pc, signal = step.target, None
                if alone:
                    continue
            elif step.kind == "exit":
                self.paths.remove(path)
                self._ended()
                return taken, False
            elif step.collective and not alone and not path.blocked:
                path.pc, path.blocked = pc, True
                return taken, False
            else:
                signal = self._execute(step, mask)
                path.blocked = False
                pc += 1
                if signal is None and alone:
                    continue
            path.pc = pc
            path.ready = signal if callable(signal) else None
            return taken, signal == "yield"
        path.pc = pc
        return taken, False

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
            raise PtxError(f"{self.block.name} warp {self.index}, at {step.text}: {error}") from error

    def _diverge(self, path: Path, step: Step, holds: Lanes) -> None:
        """Threads for which the predicate holds branch or end, the others go on."""
        self.paths.remove(path)
        self.paths.append(Path(path.pc + 1, path.mask & ~holds))
        if step.kind == "branch":
            self.paths.append(Path(step.target, holds))

    def _ended(self) -> None:
        """Of the last thread: its copies land."""
        if not self.paths:
            for group in [*self.copy_groups, self.copies]:
                for copy in group:
                    copy()
            self.copy_groups.clear()
            self.copies = []
