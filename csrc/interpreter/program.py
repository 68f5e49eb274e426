"""A kernel ready to run: each instruction as a Python function, each operand as a slot of the warp's registers.

A register is a numpy array with one element a lane: unsigned integers of its width, bool for a predicate. An instruction never
changes an array, it puts another one into the slot, so slots may share arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PtxError
from .parse import WIDTHS, Address, Constant, Entry, Instruction, Operand, Register, Special, Symbol, Vector

if TYPE_CHECKING:
    from .warp import Warp

Lanes = np.ndarray  # of one element a lane
Mask = np.ndarray | None  # None: all 32 lanes
Signal = Callable[[], bool] | str | None  # what to wait for; "yield": let others run; nothing
Run = Callable[["Warp", Mask], Signal]
Builder = Callable[["Program", Instruction], Run]

LANES = 32
STORED: dict[int, Any] = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}
_BUILDERS: dict[str, Builder] = {}
_COLLECTIVE: set[str] = set()


def operation(*names: str, collective: bool = False) -> Callable[[Builder], Builder]:
    """Registers what makes the functions of instructions that begin with these words. collective: all threads of the warp
    execute it together (.aligned, or a mask of members)."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
            if collective:
                _COLLECTIVE.add(name)
        return builder

    return register


def view_of(type_name: str) -> Any:
    """The numpy type in which values of a PTX type are computed."""
    if type_name in FLOATS:
        return FLOATS[type_name]
    width = WIDTHS[type_name]
    return SIGNED[width] if type_name[0] == "s" else STORED[width]


def put(warp: Warp, slot: int, value: Lanes, mask: Mask) -> None:
    """Writes a register in the lanes of the mask."""
    registers = warp.registers
    registers[slot] = value if mask is None else np.where(mask, value, registers[slot])


@dataclass
class Step:
    """An instruction that runs. target: where a branch goes; kind: "branch", "exit" or "run"."""

    run: Run
    kind: str
    guard: int  # its slot, or -1
    negated: bool
    target: int
    collective: bool
    text: str


class Program:
    """Args: entry: the kernel; shared: the module's shared variables."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        instructions = entry.instructions
        self.values: list[Lanes] = [
            np.full(LANES, 0xCDCDCDCDCDCDCDCD & (256**w - 1), STORED[w]) if w else np.zeros(LANES, np.bool_)
            for w in entry.widths
        ]
        self.specials: dict[str, int] = {}
        self.symbols: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self.steps = [self._step(i) for i in instructions]

    def _step(self, i: Instruction) -> Step:
        guard, negated = (i.guard.slot, i.guard.negated) if i.guard else (-1, False)
        first = i.words[0]
        if first == "bra":
            label = i.operands[0]
            assert isinstance(label, Symbol)
            return Step(lambda w, m: None, "branch", guard, negated, i.scope.label(label.name), False, i.text)
        if first in ("ret", "exit"):
            return Step(lambda w, m: None, "exit", guard, negated, 0, False, i.text)
        name = next((n for n in (".".join(i.words[:2]), first) if n in _BUILDERS), None)
        if name is None:
            raise PtxError(f"{i.text}: expected an instruction that the interpreter knows, got {i.name} in {self.entry.name}")
        return Step(_BUILDERS[name](self, i), "run", guard, negated, 0, name in _COLLECTIVE, i.text)

    def slot(self, operand: Operand, width: int) -> int:
        """Where a source operand's value is. width: bytes, of a constant."""
        if isinstance(operand, Register):
            if operand.negated:
                raise PtxError("operand: expected a register, got a negated predicate")
            return operand.slot
        if isinstance(operand, Constant):
            key = (width, operand.bits)
            if key not in self._constants:
                self._constants[key] = self._new(
                    np.full(LANES, operand.bits & (256**width - 1), STORED[width])
                    if width
                    else np.full(LANES, operand.bits & 1, np.bool_)
                )
            return self._constants[key]
        if isinstance(operand, Special):
            if operand.name not in self.specials:
                self.specials[operand.name] = self._new(np.zeros(LANES, np.uint32))
            return self.specials[operand.name]
        if isinstance(operand, Symbol):
            key_of_symbol = (operand.name, width)
            if key_of_symbol not in self.symbols:
                self.symbols[key_of_symbol] = self._new(np.zeros(LANES, STORED[width]))
            return self.symbols[key_of_symbol]
        raise PtxError(f"operand: expected a value, got {operand}")

    def predicate(self, operand: Operand) -> Callable[[Warp], Lanes]:
        """Reads a predicate, negated or not."""
        if isinstance(operand, Register) and operand.negated:
            slot = operand.slot
            return lambda w: ~w.registers[slot]
        place = self.slot(operand, 0)
        return lambda w: w.registers[place]

    def target(self, operand: Operand) -> int:
        """The register that an operand names as a result."""
        if not isinstance(operand, Register):
            raise PtxError(f"result: expected a register, got {operand}")
        return operand.slot

    def targets(self, operand: Operand) -> list[int]:
        """Of a vector, or of one register."""
        return [self.target(o) for o in (operand.items if isinstance(operand, Vector) else (operand,))]

    def slots(self, operand: Operand, width: int) -> list[int]:
        return [self.slot(o, width) for o in (operand.items if isinstance(operand, Vector) else (operand,))]

    def address(self, operand: Operand) -> Callable[[Warp], Lanes]:
        """Reads [base + offset] as int64, one a lane; an address of shared memory in 32 bits is taken as unsigned."""
        if not isinstance(operand, Address):
            raise PtxError(f"address: expected brackets, got {operand}")
        slot, offset = self.slot(operand.base, 8), operand.offset
        return lambda w: w.registers[slot].astype(np.int64) + offset

    def _new(self, value: Lanes) -> int:
        self.values.append(value)
        return len(self.values) - 1
