"""Integer, logic and floating-point instructions, comparisons, moves and shuffles (PTX manual, "Instructions")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PtxError
from .parse import WIDTHS, Constant, Instruction, Pair, Register, Vector
from .program import LANES, SIGNED, STORED, Lanes, Mask, Program, Run, operation, put, view_of
from .warp import Warp

_LANE = np.arange(LANES, dtype=np.int64)


def _f32_constant(program: Program, i: Instruction, at: int, width: int) -> int:
    """A literal such as 1.0 has 64 bits; 0f literals and integers have the type's."""
    operand = i.operands[at]
    if isinstance(operand, Constant) and i.type_name == "f32" and "." in operand.text:
        value = np.array(operand.bits, np.uint64).view(np.float64).astype(np.float32)
        return program.slot(Constant(int(value.view(np.uint32)), operand.text), width)
    return program.slot(operand, width)


def _elementwise(program: Program, i: Instruction, function: Callable[..., Lanes], sources: int) -> Run:
    """d = function(a, b, ...) in the instruction's type."""
    if i.has("sat") or i.has("ftz"):
        raise PtxError(f"{i.text}: expected neither .sat nor .ftz")
    width, view = WIDTHS[i.type_name], view_of(i.type_name)
    stored, d = STORED[width], program.target(i.operands[0])
    slots = [_f32_constant(program, i, 1 + n, width) for n in range(sources)]
    if sources == 2:
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
    """Integers: towards zero; division by zero gives all ones (unspecified in the manual). Floats: to nearest."""
    if a.dtype.kind == "f":
        return a / b
    with np.errstate(all="ignore"):
        q = np.where(b == 0, -1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max, 0).astype(a.dtype)
        safe = np.where(b == 0, 1, b).astype(a.dtype)
        if a.dtype.kind == "i":
            size = (np.abs(a.astype(object)) // np.abs(safe.astype(object))).astype(a.dtype)
            whole = np.where((a < 0) != (safe < 0), -size, size)
        else:
            whole = a // safe
        return np.where(b == 0, q, whole).astype(a.dtype)


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return (a - _quotient(a, b) * b).astype(a.dtype)


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Float32: the product is exact in float64, and the sum is rounded twice, which differs from once in 1 of 2^29 sums."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    if a.dtype == np.float16:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
    return a * b + c


def _larger(a: Lanes, b: Lanes) -> Lanes:
    """A NaN loses against a number."""
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _smaller(a: Lanes, b: Lanes) -> Lanes:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


_TWO: dict[str, Callable[..., Lanes]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": _smaller,
    "max": _larger,
    "div": _quotient,
    "rem": _remainder,
}
_ONE: dict[str, Callable[..., Lanes]] = {"neg": np.negative, "not": np.invert, "abs": np.abs, "popc": np.bitwise_count}


@operation(*_TWO)
def _two(program: Program, i: Instruction) -> Run:
    if i.words[0] == "div" and (i.has("approx") or i.has("full")):
        raise PtxError(f"{i.text}: expected a rounded division")
    if i.type_name in ("f16x2", "bf16x2", "bf16"):
        raise PtxError(f"{i.text}: expected a type of one number")
    if i.type_name == "pred":
        a, b, d = program.predicate(i.operands[1]), program.predicate(i.operands[2]), program.target(i.operands[0])
        function = _TWO[i.words[0]]
        return lambda w, m: put(w, d, function(a(w), b(w)), m)
    return _elementwise(program, i, _TWO[i.words[0]], 2)


@operation(*_ONE)
def _one(program: Program, i: Instruction) -> Run:
    if i.words[0] == "popc":
        d, a = program.target(i.operands[0]), program.slot(i.operands[1], WIDTHS[i.type_name])
        return lambda w, m: put(w, d, np.bitwise_count(w.registers[a]).astype(np.uint32), m)
    if i.type_name == "pred":
        read, d = program.predicate(i.operands[1]), program.target(i.operands[0])
        return lambda w, m: put(w, d, ~read(w), m)
    return _elementwise(program, i, _ONE[i.words[0]], 1)


@operation("mul", "mad")
def _multiply(program: Program, i: Instruction) -> Run:
    """.lo, .hi and .wide; floating point without one of them."""
    name, view = i.type_name, view_of(i.type_name)
    adds = i.words[0] == "mad"
    if name in ("f32", "f64", "f16"):
        return _elementwise(program, i, _fma if adds else np.multiply, 3 if adds else 2)
    if i.has("lo"):
        return _elementwise(program, i, (lambda a, b, c: a * b + c) if adds else np.multiply, 3 if adds else 2)
    width = WIDTHS[name]
    d, a, b = program.target(i.operands[0]), program.slot(i.operands[1], width), program.slot(i.operands[2], width)
    out = width if i.has("hi") else 2 * width
    c = program.slot(i.operands[3], out) if adds else -1
    wide: Any = object if width == 8 else (SIGNED[2 * width] if name[0] == "s" else STORED[2 * width])
    shift = 8 * width if i.has("hi") else 0

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        product = r[a].view(view).astype(wide) * r[b].view(view).astype(wide) >> shift
        value = (product & (256**out - 1)).astype(STORED[out]) if wide is object else product.astype(STORED[out])
        put(w, d, value + r[c] if adds else value, m)

    return run


@operation("fma")
def _fused(program: Program, i: Instruction) -> Run:
    return _elementwise(program, i, _fma, 3)


@operation("shl", "shr")
def _shift(program: Program, i: Instruction) -> Run:
    """Amounts above the width act as the width."""
    width, view, left = WIDTHS[i.type_name], view_of(i.type_name), i.words[0] == "shl"
    d, a, b = program.target(i.operands[0]), program.slot(i.operands[1], width), program.slot(i.operands[2], 4)
    bits, stored = 8 * width, STORED[width]

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        value, by = r[a].view(view), r[b]
        least = np.minimum(by, bits - 1).astype(view)
        shifted = value << least if left else value >> least
        if view is stored:  # bits that are gone; a signed shift to the right keeps its sign
            shifted = np.where(by >= bits, 0, shifted).astype(view)
        put(w, d, shifted.view(stored), m)

    return run


_COMPARED: dict[str, Callable[..., Lanes]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
}
_COMPARED |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_COMBINED: dict[str, Callable[..., Lanes]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _unordered(a: Lanes, b: Lanes) -> Lanes:
    return np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), np.bool_)


@operation("setp")
def _compare(program: Program, i: Instruction) -> Run:
    width, view = WIDTHS[i.type_name], view_of(i.type_name)
    name, target = i.words[1], i.operands[0]
    if name.endswith("u") and name[:-1] in _COMPARED:  # true also of NaNs
        ordered = _COMPARED[name[:-1]]
        compare = lambda a, b: ordered(a, b) | _unordered(a, b)  # noqa: E731
    else:
        compare = _COMPARED[name]
    combine = next((_COMBINED[word] for word in i.words[2:] if word in _COMBINED), None)
    a, b = _f32_constant(program, i, 1, width), _f32_constant(program, i, 2, width)
    third = program.predicate(i.operands[3]) if combine else None
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    p, q = program.target(first), program.target(second) if second else -1

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        holds = compare(r[a].view(view), r[b].view(view))
        other = third(w) if third else None
        put(w, p, combine(holds, other) if combine else holds, m)
        if q >= 0:
            put(w, q, combine(~holds, other) if combine else ~holds, m)

    return run


@operation("selp")
def _select(program: Program, i: Instruction) -> Run:
    width = WIDTHS[i.type_name]
    d, a, b = program.target(i.operands[0]), program.slot(i.operands[1], width), program.slot(i.operands[2], width)
    condition = program.predicate(i.operands[3])
    return lambda w, m: put(w, d, np.where(condition(w), w.registers[a], w.registers[b]), m)


@operation("mov")
def _move(program: Program, i: Instruction) -> Run:
    """Also packs a vector into a register, and unpacks one."""
    width, (target, source) = WIDTHS[i.type_name], i.operands
    if isinstance(target, Vector):
        parts, a = program.targets(target), program.slot(source, width)
        each = STORED[width // len(parts)]

        def unpack(w: Warp, m: Mask) -> None:
            elements = w.registers[a].view(each).reshape(LANES, len(parts))
            for n, part in enumerate(parts):
                put(w, part, elements[:, n].copy(), m)

        return unpack
    d, stored = program.target(target), STORED[width]
    if isinstance(source, Vector):
        slots = program.slots(source, width // len(source.items))
        return lambda w, m: put(w, d, np.stack([w.registers[s] for s in slots], 1).reshape(-1).view(stored), m)
    if width == 0:
        read = program.predicate(source)
        return lambda w, m: put(w, d, read(w), m)
    a = program.slot(source, width)
    return lambda w, m: put(w, d, w.registers[a].astype(stored, copy=False), m)


@operation("cvta")
def _to_generic(program: Program, i: Instruction) -> Run:
    """Addresses of global memory and of parameters are generic; shared memory has a window, `memory.SHARED_WINDOW`."""
    from .memory import SHARED_WINDOW

    d, a, shared = program.target(i.operands[0]), program.slot(i.operands[1], 8), i.words[-2].startswith("shared")
    if not shared:
        return lambda w, m: put(w, d, w.registers[a].astype(np.uint64), m)
    if i.has("to"):
        return lambda w, m: put(w, d, w.registers[a] - np.uint64(SHARED_WINDOW), m)
    return lambda w, m: put(w, d, w.registers[a].astype(np.uint64) + np.uint64(SHARED_WINDOW), m)


@operation("bfi")
def _insert_bits(program: Program, i: Instruction) -> Run:
    width = WIDTHS[i.type_name]
    d, a, b = program.target(i.operands[0]), program.slot(i.operands[1], width), program.slot(i.operands[2], width)
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


@operation("bfe")
def _extract_bits(program: Program, i: Instruction) -> Run:
    width, signed = WIDTHS[i.type_name], i.type_name[0] == "s"
    d, a = program.target(i.operands[0]), program.slot(i.operands[1], width)
    at, count = program.slot(i.operands[2], 4), program.slot(i.operands[3], 4)

    def one(value: int, place: int, length: int) -> int:
        bits = value & (256**width - 1)
        sign = bits >> min(place + length - 1, 8 * width - 1) & 1 if signed and length else 0
        part = bits >> place & (1 << length) - 1
        return part | (-1 << min(length, 8 * width) & 256**width - 1 if sign else 0)

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        values = [one(int(v), int(p) & 255, int(n) & 255) for v, p, n in zip(r[a], r[at], r[count], strict=True)]
        put(w, d, np.array([v & (256**width - 1) for v in values], STORED[width]), m)

    return run


@operation("prmt")
def _permute_bytes(program: Program, i: Instruction) -> Run:
    """The default mode: each nibble of the selector takes a byte of {b, a}, or its sign."""
    if i.words[-1] != "b32":
        raise PtxError(f"{i.text}: expected the default mode")
    d, slots = program.target(i.operands[0]), [program.slot(o, 4) for o in i.operands[1:]]

    def run(w: Warp, m: Mask) -> None:
        a, b, selector = (w.registers[s] for s in slots)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        value = np.zeros(LANES, np.uint64)
        for n in range(4):
            nibble = (selector >> np.uint32(4 * n) & 15).astype(np.uint64)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            value |= byte << np.uint64(8 * n)
        put(w, d, value.astype(np.uint32), m)

    return run


@operation("shfl", collective=True)
def _shuffle(program: Program, i: Instruction) -> Run:
    """shfl.sync: from lane j of the segment, or from itself if j is outside of it."""
    target, mode = i.operands[0], i.words[2]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Register(0))
    d, p = program.target(first), program.target(second)
    a, b, c, members = (program.slot(o, 4) for o in i.operands[1:])

    def run(w: Warp, m: Mask) -> None:
        r = w.registers
        w.expect_members(r[members], m, i)
        by, clamp = (r[b] & 31).astype(np.int64), r[c].astype(np.int64)
        segment = clamp >> 8 & 31
        last, least = _LANE & segment | clamp & 31 & ~segment, _LANE & segment
        j = {"up": _LANE - by, "down": _LANE + by, "bfly": _LANE ^ by, "idx": least | by & ~segment}[mode]
        inside = j >= last if mode == "up" else j <= last
        put(w, d, r[a][np.where(inside, j, _LANE)], m)
        if p:
            put(w, p, inside, m)

    return run


@operation("vote", "elect", "activemask", collective=True)
def _vote(program: Program, i: Instruction) -> Run:
    """vote.sync, and elect.sync, which chooses the lowest lane of its mask."""
    if i.words[0] == "elect":
        pair, members = i.operands[0], program.slot(i.operands[1], 4)
        assert isinstance(pair, Pair)
        d, p = program.target(pair.first), program.target(pair.second)

        def elect(w: Warp, m: Mask) -> None:
            w.expect_members(w.registers[members], m, i)
            mask = int(w.registers[members][w.first_lane(m)])
            chosen = (mask & -mask).bit_length() - 1
            put(w, p, _LANE == chosen, m)
            if d:
                put(w, d, np.full(LANES, chosen, np.uint32), m)

        return elect
    if i.words[0] == "activemask" or i.words[1] != "sync":
        raise PtxError(f"{i.text}: expected vote.sync or elect.sync")
    d, read, members = program.target(i.operands[0]), program.predicate(i.operands[1]), program.slot(i.operands[2], 4)
    mode = i.words[2]

    def run(w: Warp, m: Mask) -> None:
        w.expect_members(w.registers[members], m, i)
        holds = read(w)[np.ones(LANES, np.bool_) if m is None else m]
        if mode == "ballot":
            bits = sum(1 << n for n in range(LANES) if (m is None or m[n]) and read(w)[n])
            put(w, d, np.full(LANES, bits, np.uint32), m)
        else:
            answer = {"all": holds.all(), "any": holds.any(), "uni": holds.all() or not holds.any()}[mode]
            put(w, d, np.full(LANES, answer, np.bool_), m)

    return run
