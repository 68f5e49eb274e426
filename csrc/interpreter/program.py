"""A kernel ready to run: each instruction as a Python function, each operand as a slot of the warp's registers.

A register is a numpy array with one element a lane: unsigned integers of its width, bool for a predicate. An instruction never
changes an array, it puts another one into the slot, so slots may share arrays.
"""

from __future__ import annotations

import re
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
FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32}
ALONE, WARP, MEMBERS = -2, -1, 0  # the threads that execute an instruction together: any, all of the warp, a mask of members
_BUILDERS: dict[str, list[tuple[re.Pattern[str], int, Builder]]] = {}


def operation(*names: str, forms: str, together: int = ALONE) -> Callable[[Builder], Builder]:
    """Registers what makes the functions of instructions that begin with one of these words.

    forms: a regular expression of the words that follow; a form that none matches is refused. together: ALONE; WARP, .aligned;
    MEMBERS, those that the last operand names.
    """

    def register(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS.setdefault(name, []).append((re.compile(forms), together, builder))
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
    """An instruction that runs. target: where a branch goes; kind: "branch", "exit" or "run"; together: ALONE, WARP or the slot
    of a mask of members."""

    run: Run
    kind: str
    guard: int  # its slot, or -1
    negated: bool
    target: int
    together: int
    text: str


class Program:
    """The kernel `entry`.

    Raises:
        PtxError: for an instruction, a form or an operand that the interpreter does not know.
    """

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
        form = ".".join(i.words[1:])
        if i.words[0] == "bra" and form in ("", "uni"):
            label = i.operands[0]
            assert isinstance(label, Symbol)
            return Step(_nothing, "branch", guard, negated, i.scope.label(label.name), ALONE, i.text)
        if i.name in ("ret", "exit"):
            return Step(_nothing, "exit", guard, negated, 0, ALONE, i.text)
        for forms, together, builder in _BUILDERS.get(i.words[0], ()):
            if forms.fullmatch(form):
                try:
                    run = builder(self, i)
                    members = self.slot(i.operands[-1], 4) if together == MEMBERS else together
                except PtxError as error:
                    raise PtxError(f"{i.text}: {error}") from error
                return Step(run, "run", guard, negated, 0, members, i.text)
        raise PtxError(f"{i.text}: expected an instruction that the interpreter knows, got {i.name} in {self.entry.name}")

    def slot(self, operand: Operand, width: int, at_least: bool = False) -> int:
        """Where a source operand's value is. width: bytes; at_least: a register may be wider (PTX manual, "Operand Size
        Exceeding Instruction-Type Size")."""
        if isinstance(operand, Register):
            held = self.entry.widths[operand.slot]
            if operand.negated or operand.slot == 0 or (held != width and not (at_least and held > width > 0)):
                raise PtxError(f"operand: expected a value of {width} bytes (0: a predicate), got a register of {held}")
            return operand.slot
        if isinstance(operand, Constant):
            if operand.width not in (0, width):
                raise PtxError(f"number: expected one of {width} bytes, got one of {operand.width}")
            key = (width, operand.bits)
            if key not in self._constants:
                self._constants[key] = self._new(
                    np.full(LANES, operand.bits & (256**width - 1), STORED[width])
                    if width
                    else np.full(LANES, operand.bits & 1, np.bool_)
                )
            return self._constants[key]
        if isinstance(operand, Special) and width == 4:
            if operand.name not in self.specials:
                self.specials[operand.name] = self._new(np.zeros(LANES, np.uint32))
            return self.specials[operand.name]
        if isinstance(operand, Symbol) and width in (4, 8):
            key_of_symbol = (operand.name, width)
            if key_of_symbol not in self.symbols:
                self.symbols[key_of_symbol] = self._new(np.zeros(LANES, STORED[width]))
            return self.symbols[key_of_symbol]
        raise PtxError(f"operand: expected a value of {width} bytes, got {operand}")

    def predicate(self, operand: Operand) -> Callable[[Warp], Lanes]:
        """Reads a predicate, negated or not."""
        if isinstance(operand, Register) and operand.negated:
            slot = operand.slot
            return lambda w: ~w.registers[slot]
        place = self.slot(operand, 0)
        return lambda w: w.registers[place]

    def target(self, operand: Operand, width: int, at_least: bool = False) -> int:
        """The register that an operand names as a result; slot 0 for _."""
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError(f"result: expected a register, got {operand}")
        held = self.entry.widths[operand.slot]
        if operand.slot and held != width and not (at_least and held > width > 0):
            raise PtxError(f"result: expected a register of {width} bytes (0: a predicate), got one of {held}")
        return operand.slot

    def targets(self, operand: Operand, width: int, at_least: bool = False) -> list[int]:
        """Of a vector, or of one register."""
        return [self.target(o, width, at_least) for o in items(operand)]

    def slots(self, operand: Operand, width: int, at_least: bool = False) -> list[int]:
        return [self.slot(o, width, at_least) for o in items(operand)]

    def address(self, operand: Operand) -> Callable[[Warp], Lanes]:
        """Reads [base + offset] as int64, one a lane; an address of shared memory in 32 bits is taken as unsigned."""
        if not isinstance(operand, Address):
            raise PtxError(f"address: expected brackets, got {operand}")
        slot, offset = self.slot(operand.base, 4 if isinstance(operand.base, Register) else 8, True), operand.offset
        return lambda w: w.registers[slot].astype(np.int64) + offset

    def _new(self, value: Lanes) -> int:
        self.values.append(value)
        return len(self.values) - 1


def items(operand: Operand) -> tuple[Operand, ...]:
    """Of a vector; another operand alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def _nothing(w: Warp, m: Mask) -> None:
    """A branch and an end are the warp's."""
