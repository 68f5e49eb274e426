"""cvt: between integers, and between float32 and f16, bf16 and tf32 (PTX manual, "cvt")."""

from __future__ import annotations

import numpy as np

from .errors import PtxError
from .fragments import f32_of_half
from .parse import WIDTHS, Instruction
from .program import SIGNED, STORED, Lanes, Mask, Program, Run, operation, put, view_of
from .warp import Warp

_NAN = np.uint16(0x7FFF)  # of both 16-bit types


def half_bits(values: Lanes, name: str) -> Lanes:
    """float32 rounded to the nearest f16 or bf16, ties to even, as uint16."""
    if name == "f16":
        return np.where(np.isnan(values), _NAN, values.astype(np.float16).view(np.uint16))
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), _NAN, rounded)


def tf32_bits(values: Lanes) -> Lanes:
    """float32 rounded to 10 bits of mantissa, ties away from zero (.rna), as uint32."""
    bits = values.view(np.uint32)
    return np.where(np.isfinite(values), bits + np.uint32(0x1000) & np.uint32(0xFFFFE000), bits)


@operation("cvt", forms=r"f32\.(bf16|f16)")
def _widen(program: Program, i: Instruction) -> Run:
    d, a, name = program.target(i.operands[0], 4), program.slot(i.operands[1], 2), i.words[2]
    return lambda w, m: put(w, d, f32_of_half(w.registers[a], name).view(np.uint32), m)


@operation("cvt", forms=r"rn\.(bf16|f16)\.f32")
def _narrow(program: Program, i: Instruction) -> Run:
    d, a, name = program.target(i.operands[0], 2), program.slot(i.operands[1], 4), i.words[2]
    return lambda w, m: put(w, d, half_bits(w.registers[a].view(np.float32), name), m)


@operation("cvt", forms=r"rn\.(bf16x2|f16x2)\.f32")
def _pack(program: Program, i: Instruction) -> Run:
    """The first operand is the upper half."""
    d, name = program.target(i.operands[0], 4), i.words[2][:-2]
    a, b = (program.slot(o, 4) for o in i.operands[1:])

    def run(w: Warp, m: Mask) -> None:
        high, low = (half_bits(w.registers[s].view(np.float32), name).astype(np.uint32) for s in (a, b))
        put(w, d, high << np.uint32(16) | low, m)

    return run


@operation("cvt", forms=r"rna\.tf32\.f32")
def _round(program: Program, i: Instruction) -> Run:
    d, a = program.target(i.operands[0], 4), program.slot(i.operands[1], 4)
    return lambda w, m: put(w, d, tf32_bits(w.registers[a].view(np.float32)), m)


@operation("cvt", forms=r"[su](8|16|32|64)\.[su](8|16|32|64)")
def _resize(program: Program, i: Instruction) -> Run:
    """Integers: extended as the source's type says, or cut. In a wider register they are extended as the result's type says."""
    into, source = i.words[1:]
    d = program.target(i.operands[0], WIDTHS[into], at_least=True)
    a = program.slot(i.operands[1], WIDTHS[source], at_least=True)
    held = program.entry.widths[d]
    if d == 0:
        raise PtxError("result: expected a register, got _")
    extended = (SIGNED if into[0] == "s" else STORED)[held]

    def run(w: Warp, m: Mask) -> None:
        value = w.registers[a].astype(STORED[WIDTHS[source]]).view(view_of(source)).astype(view_of(into))
        put(w, d, value.astype(extended).view(STORED[held]), m)

    return run
