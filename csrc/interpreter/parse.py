"""PTX text to instructions (PTX manual, "Syntax" and "State Spaces, Types, and Variables")."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

from .errors import PtxError

WIDTHS = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4}
WIDTHS |= {"f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}


@dataclass(frozen=True)
class Register:
    slot: int
    negated: bool = False


@dataclass(frozen=True)
class Constant:
    """A number. width: 4 or 8 bytes if it is written as the bits of a float, 0 of an integer."""

    bits: int
    width: int = 0


@dataclass(frozen=True)
class Special:
    """%tid.x, %laneid and the like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a variable or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset], or a tensor operand [map, {coordinates}]."""

    base: Operand
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Pair:
    """Two results, as in shfl.sync d|p."""

    first: Operand
    second: Operand


Operand = Register | Constant | Special | Symbol | Vector | Address | Pair


@dataclass
class Instruction:
    """words: the opcode's parts, `add.s32` as ("add", "s32"). guard: the predicate before it."""

    words: tuple[str, ...]
    operands: list[Operand]
    guard: Register | None
    text: str
    scope: Scope

    @property
    def name(self) -> str:
        return ".".join(self.words)

    def has(self, word: str) -> bool:
        return word in self.words

    @property
    def type_name(self) -> str:
        """The last word that names a type."""
        return next(word for word in reversed(self.words) if word in WIDTHS)


@dataclass
class Scope:
    """The names declared between two braces. widths: of all registers of the kernel, in bytes."""

    outer: Scope | None
    widths: list[int]
    registers: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # %r<100> as (width, 100)
    labels: dict[str, int] = field(default_factory=dict)

    def declare(self, name: str, width: int) -> int:
        self.widths.append(width)
        self.registers[name] = len(self.widths) - 1
        return self.registers[name]

    def register(self, name: str) -> int | None:
        """Its slot. Registers of a range get one when they first appear."""
        if name in self.registers:
            return self.registers[name]
        prefix = name.rstrip("0123456789")
        width, count = self.ranges.get(prefix, (0, 0))
        if name != prefix and int(name[len(prefix) :]) < count:
            return self.declare(name, width)
        return None if self.outer is None else self.outer.register(name)

    def label(self, name: str) -> int:
        if name in self.labels:
            return self.labels[name]
        if self.outer is None:
            raise PtxError(f"label: expected one that is declared, got {name}")
        return self.outer.label(name)


@dataclass(frozen=True)
class Variable:
    name: str
    align: int
    size: int  # bytes; 0: an array whose size the launch gives


_ENTRY = re.compile(r"\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_VARIABLE = re.compile(
    r"\.(param|shared|global|const)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d*)\])?"
)
_RANGE = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"([\w$%]+):(?!:)")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|0|[1-9]\d*))U?")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
_IGNORED = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)


def variable(text: str) -> Variable:
    """Of a declaration such as `.param .align 64 .b8 name[128]`."""
    match = _VARIABLE.search(text)
    if not match:
        raise PtxError(f"declaration: expected a variable, got {text.strip()}")
    _, align, kind, name, count = match.groups()
    width = WIDTHS[kind]
    return Variable(name, int(align or width), width if count is None else width * int(count or 0))


def constant(text: str) -> Constant | None:
    """The bits of a number, integers in two's complement of 64 bits. None if it is none.

    Raises:
        PtxError: for a form that nvcc does not write (octal, binary, a decimal fraction).
    """
    if integer := _INTEGER.fullmatch(text):
        return Constant(int(integer.group(1), 0) & 0xFFFFFFFFFFFFFFFF, 0)
    if number := _FLOAT.fullmatch(text):
        digits = number.group(1) or number.group(2)
        return Constant(int(digits, 16), len(digits) // 2)
    if text[0].isdigit() or text[0] == "-":
        raise PtxError(f"number: expected an integer, 0f and 8 or 0d and 16 hexadecimal digits, got {text}")
    return None


def split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class Entry:
    """A kernel. Its body is parsed when `instructions` is first read."""

    def __init__(self, name: str, parameters: list[Variable], body: str) -> None:
        self.name, self.parameters, self._body = name, parameters, body
        self.widths: list[int] = [8]  # of each register, in bytes; 0: a predicate; slot 0: results named _
        self.shared: list[Variable] = []

    @cached_property
    def instructions(self) -> list[Instruction]:
        found: list[Instruction] = []
        scope = Scope(None, self.widths)
        text, at = self._body, 0
        while True:
            while at < len(text) and text[at].isspace():
                at += 1
            if at >= len(text):
                return found
            if text[at] in "{}":
                scope = Scope(scope, self.widths) if text[at] == "{" else scope.outer or scope
                at += 1
            elif label := _LABEL.match(text, at):
                scope.labels[label.group(1)] = len(found)
                at = label.end()
            else:
                end = text.index(";", at)
                self._statement(text[at:end].strip(), scope, found)
                at = end + 1

    def _statement(self, text: str, scope: Scope, found: list[Instruction]) -> None:
        if text.startswith(".reg"):
            _declare(text, scope)
        elif text.startswith(".shared"):
            self.shared.append(variable(text))
        elif not text.startswith(".pragma") and text:
            found.append(self._instruction(text, scope))

    def _instruction(self, text: str, scope: Scope) -> Instruction:
        guard = None
        if text.startswith("@"):
            before, text = text[1:].split(None, 1)
            name = before.lstrip("!")
            slot = scope.register(name)
            if slot is None or self.widths[slot]:
                raise PtxError(f"predicate: expected a predicate register, got {name}")
            guard = Register(slot, before.startswith("!"))
        opcode, *rest = text.split(None, 1)
        operands = [self._operand(part, scope) for part in split(rest[0])] if rest else []
        return Instruction(tuple(opcode.split(".")), operands, guard, text, scope)

    def _operand(self, text: str, scope: Scope) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, scope) for part in split(text[1:-1])))
        if text.startswith("["):
            base, *more = split(text[1:-1])
            place = re.fullmatch(r"(.+?)\s*\+\s*(-?\s*\w+)", base)
            where = self._operand(place.group(1) if place else base, scope)
            vector = self._operand(more[0], scope) if more else None
            assert vector is None or isinstance(vector, Vector)
            return Address(where, int(place.group(2), 0) if place else 0, vector)
        if "|" in text:
            first, second = (self._operand(part.strip(), scope) for part in text.split("|"))
            return Pair(first, second)
        if text == "_":
            return Register(0)
        name = text.lstrip("!")
        slot = scope.register(name)
        if slot is not None:
            return Register(slot, text.startswith("!"))
        number = constant(text)
        if number is not None:
            return number
        return Special(text) if text.startswith("%") or text == "WARP_SZ" else Symbol(text)


def _declare(text: str, scope: Scope) -> None:
    """.reg .b32 %r<100>, a;"""
    match = _RANGE.match(text)
    if match is None or match.group(1) not in WIDTHS:
        raise PtxError(f"declaration: expected registers of a type that the interpreter knows, got {text}")
    width = WIDTHS[match.group(1)]
    for name in split(match.group(2)):
        prefix, _, count = name.partition("<")
        if count:
            scope.ranges[prefix] = (width, int(count.rstrip(">")))
        else:
            scope.declare(name, width)


class Module:
    """One PTX text: its kernels and its variables. Functions that are called are left out: `call` is no known instruction.

    Args:
        text: as nvcc writes it; a NUL ends it.
    """

    def __init__(self, text: str) -> None:
        text = _IGNORED.sub("", text.split("\0", 1)[0])
        target = re.search(r"\.target\s+sm_(\d+)", text)
        self.capability = int(target.group(1)) if target else 0
        self.entries: dict[str, Entry] = {}
        outside, at = [], 0
        for match in _ENTRY.finditer(text):
            outside.append(text[at : match.start()])
            end = _closing(text, match.end())
            kind, name, parameters, _ = match.groups()
            if kind == "entry":
                self.entries[name] = Entry(name, [variable(part) for part in split(parameters)], text[match.end() : end])
            at = end + 1
        outside.append(text[at:])
        declared = [part for part in "".join(outside).split(";") if _VARIABLE.search(part)]
        self.shared = [variable(part) for part in declared if ".shared" in part]
        # No memory holds the value of a constant or of a variable with an initial value. They are left out, so that a kernel
        # which reads one is refused.
        self.globals = [variable(part) for part in declared if ".global" in part and "=" not in part]


def _closing(text: str, at: int) -> int:
    """Where the brace that was opened before `at` closes."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("text: expected a closing brace, got its end")
