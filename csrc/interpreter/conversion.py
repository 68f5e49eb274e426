"""cvt: between integers, floats, bfloat16 and tf32 (PTX manual, "cvt")."""

from __future__ import annotations

import numpy as np

from .errors import PtxError
from .parse import WIDTHS, Instruction
from .program import SIGNED, STORED, Lanes, Mask, Program, Run, operation, put, view_of
from .warp import Warp


def bf16_bits(values: Lanes) -> Lanes:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16. A NaN becomes 0x7FFF."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def f32_of_bf16(bits: Lanes) -> Lanes:
    """The float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32_bits(values: Lanes) -> Lanes:
    """float32 rounded to 10 bits of mantissa, ties away from zero (.rna), as uint32."""
    bits = values.view(np.uint32)
    return np.where(np.isfinite(values), bits + np.uint32(0x1000) & np.uint32(0xFFFFE000), bits)


def _floats(bits: Lanes, name: str) -> Lanes:
    return f32_of_bf16(bits.astype(np.uint16)) if name == "bf16" else bits.view(view_of(name))


def _narrowed(values: Lanes, name: str) -> Lanes:
    """Bits of floats rounded to nearest."""
    if name == "bf16":
        return bf16_bits(values.astype(np.float32))
    return values.astype(view_of(name)).view(STORED[WIDTHS[name]])


@operation("cvt")
def _convert(program: Program, i: Instruction) -> Run:
    types = [word for word in i.words if word in WIDTHS]
    if len(types) != 2 or any(word in i.words for word in ("sat", "ftz", "relu", "satfinite")):
        raise PtxError(f"{i.text}: expected two types, without .sat, .ftz and .relu")
    into, source = types
    d = program.target(i.operands[0])
    if into in ("bf16x2", "f16x2"):
        return _pack(program, i, into[:-2])
    a = program.slot(i.operands[1], WIDTHS[source])
    stored, width = STORED[program.entry.widths[d]], WIDTHS[source]
    if into == "tf32":
        if not i.has("rna"):
            raise PtxError(f"{i.text}: expected .rna")
        return lambda w, m: put(w, d, tf32_bits(w.registers[a].view(np.float32)), m)
    from_float, to_float = "f" in source, "f" in into
    if to_float and from_float:
        if WIDTHS[into] < width and not i.has("rn"):
            raise PtxError(f"{i.text}: expected .rn")
        return lambda w, m: put(w, d, _narrowed(_floats(w.registers[a], source), into).astype(stored), m)
    view, result = view_of(source) if not from_float else None, view_of(into)
    rounding = next((f for word, f in _ROUNDED.items() if word in i.words), None)

    def run(w: Warp, m: Mask) -> None:
        bits = w.registers[a]
        if from_float:
            assert rounding is not None, i.text
            limits = np.iinfo(result)
            value = np.clip(rounding(_floats(bits, source).astype(np.float64)), limits.min, limits.max).astype(result)
        elif to_float:
            value = _narrowed(bits.view(view), into)
        else:  # a source register may be wider than its type
            value = bits.astype(STORED[width]).view(view).astype(result)
        signed = value.dtype.kind == "i"
        put(w, d, value.astype(SIGNED[np.dtype(stored).itemsize] if signed else stored).view(stored), m)

    return run


_ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _pack(program: Program, i: Instruction, half: str) -> Run:
    """Two float32 into one register: the first operand is the upper half."""
    if not i.has("rn"):
        raise PtxError(f"{i.text}: expected .rn")
    d, a, b = program.target(i.operands[0]), program.slot(i.operands[1], 4), program.slot(i.operands[2], 4)

    def run(w: Warp, m: Mask) -> None:
        high, low = (_narrowed(w.registers[s].view(np.float32), half).astype(np.uint32) for s in (a, b))
        put(w, d, high << np.uint32(16) | low, m)

    return run
