"""Integer, logic and floating-point instructions, comparisons, moves and shuffles (PTX manual, "Instructions").

NaNs that float instructions make have numpy's bits; the manual's are 0x7FFFFFFF. Subnormal numbers are kept, as without .ftz.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PtxError
from .parse import WIDTHS, Constant, Instruction, Pair, Register, Special, Vector
from .program import LANES, MEMBERS, SIGNED, STORED, Lanes, Mask, Program, Run, operation, put, view_of
from .warp import Warp

_LANE = np.arange(LANES, dtype=np.int64)


def _elementwise(program: Program, i: Instruction, function: Callable[..., Lanes]) -> Run:
    """d = function(a, b, ...) in the instruction's type."""
    width, view = WIDTHS[i.type_name], view_of(i.type_name)
    stored, d = STORED[width], program.target(i.operands[0], width)
    slots = [program.slot(operand, width) for operand in i.operands[1:]]
    if len(slots) == 2:
        a, b = slots

        def run2(w: Warp, m: Mask) -> None:
            r = w.registers
            put(w, d, function(r[a].view(view), r[b].view(view)).view(stored), m)

        return run2

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        put(w, d, function(*(r[s].view(view) for s in slots)).view(stored), m)

    return run


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    """Integers: towards zero; division by zero, which the manual leaves open, gives all ones. Floats: to nearest."""
    if a.dtype.kind == "f":
        return a / b
    by = np.where(b == 0, 1, b).astype(a.dtype)
    whole = (a - np.fmod(a, by)) // by
    return np.where(b == 0, np.invert(np.zeros_like(a)), whole)


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    """With the sign of a. By zero it is a."""
    return a - _quotient(a, b) * b


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Rounded once. In float64 the product is exact; the sum is rounded to odd, so that the rounding to float32 is right."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    other = total - product
    lost = (product - (total - other)) + (addend - other)
    if lost.any():
        bits = total.view(np.int64)
        inexact = (lost != 0) & np.isfinite(lost) & (bits & 1 == 0)
        total = np.where(inexact, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64)
    return total.astype(np.float32)


_INTEGER, _BITS = "[su](16|32|64)", "b(16|32|64)"


@operation("add", "sub", "mul", forms=r"(rn\.)?f32")
@operation("add", "sub", "min", "max", "div", "rem", forms=_INTEGER)
@operation("mul", forms=rf"lo\.{_INTEGER}")
@operation("div", forms=r"rn\.f32")
@operation("and", "or", "xor", forms=rf"pred|{_BITS}")
@operation("not", forms=rf"pred|{_BITS}")
@operation("neg", forms=r"s(16|32|64)|f32")
@operation("mad", forms=rf"lo\.{_INTEGER}")
@operation("fma", forms=r"rn\.f32")
def _arithmetic(program: Program, i: Instruction) -> Run:
    return (_logic if i.type_name == "pred" else _elementwise)(program, i, _FUNCTIONS[i.words[0]])


_FUNCTIONS: dict[str, Callable[..., Lanes]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fma,
    "min": np.minimum,
    "max": np.maximum,
    "div": _quotient,
    "rem": _remainder,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
}


def _logic(program: Program, i: Instruction, function: Callable[..., Lanes]) -> Run:
    """Of predicates."""
    d, sources = program.target(i.operands[0], 0), [program.predicate(o) for o in i.operands[1:]]
    return lambda w, m: put(w, d, function(*(read(w) for read in sources)), m)


@operation("mul", forms=r"hi\.[su](16|32|64)|wide\.[su](16|32)")
def _multiply(program: Program, i: Instruction) -> Run:
    """.hi: the upper half of the product; .wide: all of it, in a register of twice the width."""
    name, high, view = i.type_name, i.has("hi"), view_of(i.type_name)
    width = WIDTHS[name]
    out = width if high else 2 * width
    d, a, b = program.target(i.operands[0], out), program.slot(i.operands[1], width), program.slot(i.operands[2], width)
    wide: Any = object if width == 8 else (SIGNED[2 * width] if name[0] == "s" else STORED[2 * width])

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        product = r[a].view(view).astype(wide) * r[b].view(view).astype(wide)
        if high:
            product = product >> 8 * width
        if wide is object:
            product = product & 256**width - 1
        put(w, d, product.astype(STORED[out]), m)

    return run


@operation("shl", forms=_BITS)
@operation("shr", forms=r"[bsu](16|32|64)")
def _shift(program: Program, i: Instruction) -> Run:
    """Amounts above the width act as the width: nothing is left but the sign, of a signed type."""
    width, view = WIDTHS[i.type_name], view_of(i.type_name)
    function = np.left_shift if i.words[0] == "shl" else np.right_shift
    d, a = program.target(i.operands[0], width), program.slot(i.operands[1], width)
    bits, stored, amount, b = 8 * width, STORED[width], i.operands[2], program.slot(i.operands[2], 4)
    if isinstance(amount, Constant) and amount.bits < bits:
        by = view(amount.bits)
        return lambda w, m: put(w, d, function(w.registers[a].view(view), by).view(stored), m)

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        shifted = function(r[a].view(view), np.minimum(r[b], bits - 1).astype(view)).view(stored)
        put(w, d, np.where(r[b] >= bits, stored(0), shifted) if view is stored else shifted, m)

    return run


_COMPARED: dict[str, Callable[..., Lanes]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


@operation("setp", forms=r"(eq|ne)\.b(16|32|64)|(eq|ne|lt|le|gt|ge)\.[su](16|32|64)|(eq|lt|le|gt|ge|neu|ltu|leu|gtu|geu)\.f32")
def _compare(program: Program, i: Instruction) -> Run:
    """Of a NaN, a comparison is false, and one with u is true: it is the opposite of the other's opposite."""
    width, view, name = WIDTHS[i.type_name], view_of(i.type_name), i.words[1]
    unordered = len(name) == 3
    compare = _COMPARED[_OPPOSITE[name[:2]] if unordered else name]
    p, a, b = program.target(i.operands[0], 0), program.slot(i.operands[1], width), program.slot(i.operands[2], width)

    def run(w: Warp, m: Mask) -> None:
        holds = compare(w.registers[a].view(view), w.registers[b].view(view))
        put(w, p, ~holds if unordered else holds, m)

    return run


@operation("selp", forms=r"[bsu](16|32|64)|f32")
def _select(program: Program, i: Instruction) -> Run:
    width = WIDTHS[i.type_name]
    d, a, b = program.target(i.operands[0], width), program.slot(i.operands[1], width), program.slot(i.operands[2], width)
    condition = program.predicate(i.operands[3])
    return lambda w, m: put(w, d, np.where(condition(w), w.registers[a], w.registers[b]), m)


@operation("mov", forms=r"[bsu](16|32|64)|f32|pred")
def _move(program: Program, i: Instruction) -> Run:
    """Also packs a vector into a register, the first element into the lowest bits, and unpacks one."""
    width, (target, source) = WIDTHS[i.type_name], i.operands
    if isinstance(target, Vector):
        each = width // len(target.items)
        parts, a = program.targets(target, each), program.slot(source, width)

        def unpack(w: Warp, m: Mask) -> None:
            elements = w.registers[a].view(STORED[each]).reshape(LANES, len(parts))
            for n, part in enumerate(parts):
                put(w, part, elements[:, n].copy(), m)

        return unpack
    d, stored = program.target(target, width), STORED[width]
    if isinstance(source, Vector):
        slots = program.slots(source, width // len(source.items))
        return lambda w, m: put(w, d, np.stack([w.registers[s] for s in slots], 1).reshape(-1).view(stored), m)
    a = program.slot(source, 4 if isinstance(source, Special) else width)
    return lambda w, m: put(w, d, w.registers[a].astype(stored, copy=False), m)


@operation("bfi", forms="b(32|64)")
def _insert_bits(program: Program, i: Instruction) -> Run:
    """Bits of b, with `count` of them from `at` replaced by the lowest of a."""
    width = WIDTHS[i.type_name]
    d, a, b = program.target(i.operands[0], width), program.slot(i.operands[1], width), program.slot(i.operands[2], width)
    at, count = program.slot(i.operands[3], 4), program.slot(i.operands[4], 4)
    ones = 256**width - 1

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        field = (1 << (r[count] & 255).astype(object)) - 1
        place = (r[at] & 255).astype(object)
        mask = field << place & ones
        value = r[b].astype(object) & ~mask | r[a].astype(object) << place & mask
        put(w, d, value.astype(STORED[width]), m)

    return run


@operation("shfl", forms=r"sync\.(up|down|bfly|idx)\.b32", together=MEMBERS)
def _shuffle(program: Program, i: Instruction) -> Run:
    """From lane j of the segment, or from itself if j is outside of it."""
    target, mode = i.operands[0], i.words[2]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Register(0))
    d, p = program.target(first, 4), program.target(second, 0)
    a, b, c = (program.slot(o, 4) for o in i.operands[1:4])

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        by, clamp = (r[b] & 31).astype(np.int64), r[c].astype(np.int64)
        segment = clamp >> 8 & 31
        last, least = _LANE & segment | clamp & 31 & ~segment, _LANE & segment
        j = {"up": _LANE - by, "down": _LANE + by, "bfly": _LANE ^ by, "idx": least | by & ~segment}[mode]
        inside = j >= last if mode == "up" else j <= last
        source = np.where(inside, j, _LANE)
        if m is not None and not m[source[m]].all():
            raise PtxError(
                f"expected lanes that take part, got {sorted(set(source[m].tolist()) - set(np.flatnonzero(m).tolist()))}"
            )
        put(w, d, r[a][source], m)
        if p:
            put(w, p, inside, m)

    return run


@operation("elect", forms="sync", together=MEMBERS)
def _elect(program: Program, i: Instruction) -> Run:
    """Chooses the lowest of the threads: the manual leaves open which, but it is always the same."""
    pair = i.operands[0]
    if not isinstance(pair, Pair):
        raise PtxError("expected d|p")
    d, p = program.target(pair.first, 4), program.target(pair.second, 0)

    def run(w: Warp, m: Mask) -> None:
        chosen = 0 if m is None else int(m.argmax())
        put(w, p, _LANE == chosen, m)
        if d:
            put(w, d, np.full(LANES, chosen, np.uint32), m)

    return run
