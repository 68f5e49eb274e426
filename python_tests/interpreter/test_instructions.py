"""Each instruction of the PTX interpreter against Python's integers, fractions or struct."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_programs import compute, own, predicate, program, run

from csrc.interpreter.errors import PtxError

U = {16: np.uint16, 32: np.uint32, 64: np.uint64}
few = settings(max_examples=4, deadline=None)


def integers(bits: int) -> st.SearchStrategy[np.ndarray]:
    """32 numbers, many of them at the ends of a range."""
    ends = st.sampled_from([0, 1, 2, 3, 7, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 7, 2**bits - 1])
    numbers = st.lists(ends | st.integers(0, 2**bits - 1), min_size=32, max_size=32)
    return numbers.map(lambda values: np.array(values, U[bits]))


def as_type(value: int, type_name: str) -> int:
    """The bits as a number of the type."""
    bits = int(type_name[1:])
    value &= 2**bits - 1
    return value - 2**bits if type_name[0] == "s" and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "mul.lo": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
FORMS = [(name, t) for name in list(BINARY)[:7] for t in ("s16", "u16", "s32", "u32", "s64", "u64")]
FORMS += [(name, t) for name in list(BINARY)[7:] for t in ("b16", "b32", "b64")]


@pytest.mark.parametrize("name, type_name", FORMS, ids=lambda v: v)
@given(data=st.data())
@few
def test_integers(name: str, type_name: str, data: st.DataObject) -> None:
    bits = int(type_name[1:])
    a, b = data.draw(integers(bits)), data.draw(integers(bits))
    found = compute(f"{name}.{type_name} D, A, B;", U[bits], a, b)
    for x, y, d in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        expected = BINARY[name](as_type(x, type_name), as_type(y, type_name)) & (2**bits - 1)
        assert d == expected, (name, type_name, x, y)


@pytest.mark.parametrize("type_name", ["s16", "u16", "s32", "u32", "s64", "u64"])
@given(data=st.data())
@few
def test_products(type_name: str, data: st.DataObject) -> None:
    bits = int(type_name[1:])
    a, b, c = (data.draw(integers(bits)) for _ in range(3))
    high = compute(f"mul.hi.{type_name} D, A, B;", U[bits], a, b)
    low = compute(f"mad.lo.{type_name} D, A, B, C;", U[bits], a, b, c)
    wide = compute(f"mul.wide.{type_name} D, A, B;", U[2 * bits], a, b) if bits < 64 else None
    for lane in range(32):
        product = as_type(int(a[lane]), type_name) * as_type(int(b[lane]), type_name)
        assert int(high[lane]) == product >> bits & (2**bits - 1)
        assert int(low[lane]) == product + int(c[lane]) & (2**bits - 1)
        assert wide is None or int(wide[lane]) == product & (2 ** (2 * bits) - 1)


@pytest.mark.parametrize("name", ["shl.b", "shr.b", "shr.u", "shr.s"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(name: str, bits: int) -> None:
    """Also by the width and more, by registers and by constants."""
    a = np.array([1, 2 ** (bits - 1), 2**bits - 1, 2 ** (bits - 1) + 5] * 8, U[bits])
    by = np.repeat(np.array([0, 1, 5, bits - 1, bits, bits + 1, 255, 2**31 + 1], np.uint32), 4)
    type_name = f"{name[-1]}{bits}"

    def expected(x: int, y: int) -> int:
        x = as_type(x, type_name)
        return (x << min(y, bits) if name == "shl.b" else x >> min(y, bits)) & (2**bits - 1)

    found = compute(f"{name}{bits} D, A, B;", U[bits], a, by)
    assert found.tolist() == [expected(x, y) for x, y in zip(a.tolist(), by.tolist(), strict=True)]
    for y in set(by.tolist()):
        assert compute(f"{name}{bits} D, A, {y};", U[bits], a).tolist() == [expected(x, y) for x in a.tolist()]


@pytest.mark.parametrize("bits", [16, 32, 64])
@given(data=st.data())
@few
def test_not_and_neg(bits: int, data: st.DataObject) -> None:
    a = data.draw(integers(bits))
    assert compute(f"not.b{bits} D, A;", U[bits], a).tolist() == [2**bits - 1 - x for x in a.tolist()]
    assert compute(f"neg.s{bits} D, A;", U[bits], a).tolist() == [-x & (2**bits - 1) for x in a.tolist()]


@pytest.mark.parametrize("bits", [32, 64])
@given(data=st.data())
@few
def test_bfi(bits: int, data: st.DataObject) -> None:
    """Bit after bit, as the manual writes it."""
    a, b = data.draw(integers(bits)), data.draw(integers(bits))
    edges = st.sampled_from([0, 1, 31, 32, 33, 63, 64, 200, 256, 257])
    at, count = (np.array(data.draw(st.lists(edges | st.integers(0, 70), min_size=32, max_size=32)), np.uint32) for _ in "ab")
    body = own(a.itemsize, a.itemsize, 4, 4, a.itemsize)
    out = np.zeros_like(a)
    p = "%r" if bits == 32 else "%d"
    body += f"ld.global.u{bits} {p}20, [%d40]; ld.global.u{bits} {p}21, [%d41]; ld.global.u32 %r22, [%d42];"
    body += f"ld.global.u32 %r23, [%d43]; bfi.b{bits} {p}30, {p}20, {p}21, %r22, %r23; st.global.u{bits} [%d44], {p}30;"
    run(body, a, b, at, count, out)
    for lane in range(32):
        expected, start = int(b[lane]), int(at[lane]) & 255
        for n in range(int(count[lane]) & 255):
            if start + n < bits:
                expected = expected & ~(1 << start + n) | (int(a[lane]) >> n & 1) << start + n
        assert int(out[lane]) == expected


# ---- floating point --------------------------------------------------------------------------------------------------

FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, 3.4e38, -3.4e38, 1e-45, 1.2e-38, 7e-39, float("inf"), -float("inf"), float("nan"), 0.1]
floats = st.lists(st.sampled_from(FLOATS) | st.floats(width=32), min_size=32, max_size=32).map(
    lambda v: np.array(v, np.float32)
)


def nearest(value: Fraction, mantissa: int = 23, least: int = -149, most: int = 127, away: bool = False) -> float:
    """The closest number with so many bits after the first; ties to even, or away from zero. Infinite if it is too large."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    ulp = Fraction(2) ** max(exponent - mantissa, least)
    whole, rest = divmod(size, ulp)
    whole += rest > ulp / 2 or (rest == ulp / 2 and (away or whole % 2 == 1))
    size = whole * ulp
    return (1 if value > 0 else -1) * (float("inf") if size >= Fraction(2) ** (most + 1) else float(size))


def of_bits(values: np.ndarray) -> list[float]:
    return values.view(np.float32).tolist()


ARITHMETIC = {
    "add.f32 D, A, B;": lambda a, b: a + b,
    "sub.rn.f32 D, A, B;": lambda a, b: a - b,
    "mul.f32 D, A, B;": lambda a, b: a * b,
    "div.rn.f32 D, A, B;": lambda a, b: a / b,
    "fma.rn.f32 D, A, B, C;": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("text", ARITHMETIC)
@given(a=floats, b=floats, c=floats)
@settings(max_examples=10, deadline=None)
def test_float_arithmetic(text: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    """Finite results against fractions; the others against the C library's float64."""
    function, operands = ARITHMETIC[text], (a, b, c) if "C" in text else (a, b)
    text = text.replace("f32 D", "f32 %f30").replace("A", "%f20").replace("B", "%f21").replace("C", "%f22")
    moves = "mov.b32 %f20, A; mov.b32 %f21, B;" + ("mov.b32 %f22, C;" if "f22" in text else "")
    found = of_bits(compute(f"{moves} {text} mov.b32 D, %f30;", np.uint32, *(x.view(np.uint32) for x in operands)))
    for lane in range(32):
        numbers = [float(x[lane]) for x in operands]
        if all(np.isfinite(numbers)) and not ("div" in text and numbers[1] == 0):
            assert found[lane] == nearest(function(*map(Fraction, numbers))), (text, numbers)
        else:
            with np.errstate(all="ignore"):
                assert np.array_equal(found[lane], function(*map(np.float64, numbers)), equal_nan=True), (text, numbers)


def test_fma_rounds_once() -> None:
    """(1 + 2^-12)^2 + 2^-80 is above a tie of float32 by less than float64 holds."""
    a = np.full(32, 1 + 2.0**-12, np.float32)
    c = np.array([2.0**-80, -(2.0**-80), 0, 2.0**-140] * 8, np.float32)
    text = "mov.b32 %f1, A; mov.b32 %f2, B; fma.rn.f32 %f3, %f1, %f1, %f2; mov.b32 D, %f3;"
    found = of_bits(compute(text, np.uint32, a.view(np.uint32), c.view(np.uint32)))
    up = 1 + 2.0**-11 + 2.0**-23
    assert found[:4] == [up, 1 + 2.0**-11, 1 + 2.0**-11, up]


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_setp_of_integers(name: str) -> None:
    compare = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}[name]
    for type_name in ["s16", "u16", "s32", "u32", "s64", "u64"] + (["b16", "b32", "b64"] if name in ("eq", "ne") else []):
        bits = int(type_name[1:])
        ends = [0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
        a, b = (np.array(x, U[bits]) for x in zip(*[(x, y) for x in ends for y in ends + ends[:1]], strict=True))
        found = predicate(f"setp.{name}.{type_name} D, A, B;", *(np.resize(x, 32) for x in (a, b)))
        for x, y, d in zip(a.tolist(), b.tolist(), found[:30].tolist(), strict=True):
            assert d == getattr(as_type(x, type_name), compare)(as_type(y, type_name)), (name, type_name, x, y)


@pytest.mark.parametrize("name", ["eq", "lt", "le", "gt", "ge", "neu", "ltu", "leu", "gtu", "geu"])
def test_setp_of_floats(name: str) -> None:
    """A NaN makes a comparison false, and one that ends in u true."""
    values = [0.0, -0.0, 1.0, -2.0, float("nan")]
    pairs = [(x, y) for x in values for y in values]
    a, b = (np.resize(np.array(x, np.float32), 32).view(np.uint32) for x in zip(*pairs, strict=True))
    found = predicate(f"mov.b32 %f1, A; mov.b32 %f2, B; setp.{name}.f32 D, %f1, %f2;", a, b)
    for (x, y), d in zip(pairs, found[:25].tolist(), strict=True):
        ordered = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name[:2]]
        assert d == ((x != x or y != y or ordered) if len(name) == 3 else ordered), (name, x, y)


# ---- conversions and moves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_cvt_of_integers(into: str, source: str) -> None:
    """The source is cut to its type and extended as it says; a wider register is extended as the result's type says."""
    held, out = (max(16, int(t[1:])) for t in (source, into))
    a = np.array([0, 1, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF] + [2**held - 1 - n * n for n in range(23)], np.uint64)
    a = (a & np.uint64(2**held - 1)).astype(U[held])
    found = compute(f"cvt.{into}.{source} D, A;", U[out], a)
    assert found.tolist() == [as_type(as_type(x, source), into) & (2**out - 1) for x in a.tolist()]


def half_of(bits: int, name: str) -> float:
    """The value of 16 bits."""
    return (
        struct.unpack("<e", struct.pack("<H", bits))[0]
        if name == "f16"
        else struct.unpack("<f", struct.pack("<HH", 0, bits))[0]
    )


@pytest.mark.parametrize("name, limits", [("f16", (10, -24, 15)), ("bf16", (7, -133, 127))], ids=["f16", "bf16"])
@given(a=floats, b=floats)
@settings(max_examples=10, deadline=None)
def test_cvt_of_halves(name: str, limits: tuple[int, int, int], a: np.ndarray, b: np.ndarray) -> None:
    ties = np.array([1 + 2.0 ** -(limits[0] + 1), 1 + 3 * 2.0 ** -(limits[0] + 1), 65519.9, 65520], np.float32)
    a = np.concatenate([ties, a[4:]])
    text = f"mov.b32 %f1, A; mov.b32 %f2, B; cvt.rn.{name}x2.f32 D, %f1, %f2;"
    packed = compute(text, np.uint32, a.view(np.uint32), b.view(np.uint32))
    single = compute(f"mov.b32 %f1, A; cvt.rn.{name}.f32 D, %f1;", np.uint16, a.view(np.uint32))
    assert single.tolist() == [p >> 16 for p in packed.tolist()], "the first operand is the upper half"
    back = of_bits(compute(f"cvt.f32.{name} %f1, A; mov.b32 D, %f1;", np.uint32, single))
    for x, p, again in zip([*a, *b], [*(packed >> 16), *(packed & 0xFFFF)], [*back, *[None] * 32], strict=True):
        x, found = float(x), half_of(int(p), name)
        if x != x:
            assert int(p) == 0x7FFF
            continue
        assert found == (nearest(Fraction(x), *limits) if np.isfinite(x) else x) and (found < 0) <= (x < 0)
        assert again is None or again == found


@given(a=floats)
@settings(max_examples=10, deadline=None)
def test_cvt_to_tf32_rounds_ties_away(a: np.ndarray) -> None:
    a[:3] = 1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11
    found = of_bits(compute("mov.b32 %f1, A; cvt.rna.tf32.f32 D, %f1;", np.uint32, a.view(np.uint32)))
    for x, y in zip(a.tolist(), found, strict=True):
        expected = nearest(Fraction(x), 10, -136, away=True) if np.isfinite(x) else x
        assert np.array_equal(y, expected, equal_nan=True), x


def test_mov_packs_and_unpacks() -> None:
    a = np.arange(32, dtype=np.uint64) * 0x0123456789ABCDEF
    low, high = (a & 0xFFFFFFFF).astype(np.uint32), (a >> 32).astype(np.uint32)
    assert np.array_equal(compute("mov.b64 D, {A, B};", np.uint64, low, high), a)
    assert np.array_equal(compute("mov.b64 {%r1, D}, A;", np.uint32, a), high)
    assert np.array_equal(compute("mov.b64 {D, _}, A;", np.uint32, a), low)
    assert np.array_equal(compute("mov.b32 {_, D}, A;", np.uint16, low), (low >> 16).astype(np.uint16))
    assert np.array_equal(compute("mov.b32 %f1, {0, A}; mov.b32 D, %f1;", np.uint32, low.astype(np.uint16)), low << 16)


def test_predicates() -> None:
    """Logic, selp, a constant, and instructions that they guard."""
    a = np.arange(32, dtype=np.uint32)
    set_both = "setp.lt.u32 %p1, A, 20; setp.gt.u32 %p2, A, 10; not.pred %p3, %p1;"
    for name, expected in {"and": (a < 20) & (a > 10), "or": (a < 20) | (a > 10), "xor": (a < 20) ^ (a > 10)}.items():
        assert np.array_equal(predicate(f"{set_both} {name}.pred D, %p1, %p2;", a), expected)
    assert np.array_equal(predicate(f"{set_both} and.pred D, %p3, %p2;", a), a >= 20)
    assert np.array_equal(compute(f"{set_both} selp.b32 D, A, 7, %p1;", np.uint32, a), np.where(a < 20, a, 7))
    assert np.array_equal(
        compute(f"{set_both} mov.u32 D, 1; @%p1 mov.u32 D, 2; @!%p2 add.s32 D, D, 4;", np.uint32, a),
        np.where(a < 20, 2, 1) + np.where(a > 10, 0, 4),
    )
    assert predicate("mov.pred D, 1;", a).all() and not predicate("mov.pred D, 0;", a).any()


# ---- shuffles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@given(
    by=st.lists(st.integers(0, 40), min_size=32, max_size=32),
    c=st.sampled_from([0, 31, 0x1F1F, 0x181F, 0x1000, 0x1C03, 0x1807]),
)
@settings(max_examples=12, deadline=None)
def test_shfl(mode: str, by: list[int], c: int) -> None:
    """Lane, value and predicate, as the manual writes them."""
    a, b = np.arange(32, dtype=np.uint32) + 100, np.array(by, np.uint32)
    found = compute(
        f"shfl.sync.{mode}.b32 %r40|%p1, A, B, {c}, -1; @%p1 add.s32 %r40, %r40, 1000; mov.b32 D, %r40;", np.uint32, a, b
    )
    for lane in range(32):
        value, mask = by[lane] & 31, c >> 8 & 31
        most, least = lane & mask | c & 31 & ~mask, lane & mask
        j = {"up": lane - value, "down": lane + value, "bfly": lane ^ value, "idx": least | value & ~mask}[mode]
        valid = j >= most if mode == "up" else j <= most
        assert found[lane] == 100 + (j + 1000 if valid else lane), (mode, lane, by[lane], hex(c))


def test_shfl_without_predicate_and_elect() -> None:
    a = np.arange(32, dtype=np.uint32)
    assert np.array_equal(compute("shfl.sync.bfly.b32 D, A, 5, 31, -1;", np.uint32, a), a ^ 5)
    assert predicate("elect.sync _|D, -1;", a).sum() == 1
    chosen = compute("elect.sync %r40|%p1, -1; selp.b32 D, %r40, 99, %p1;", np.uint32, a)
    assert all(d in (99, lane) for lane, d in enumerate(chosen.tolist())) and (chosen != 99).sum() == 1


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    "add.sat.s32 %r1, %r2, %r3;",
    "add.ftz.f32 %f1, %f2, %f3;",
    "mul.rz.f32 %f1, %f2, %f3;",
    "div.approx.f32 %f1, %f2, %f3;",
    "max.f32 %f1, %f2, %f3;",
    "add.f16 %h1, %h2, %h3;",
    "add.f16x2 %r1, %r2, %r3;",
    "cvt.sat.u8.s32 %h1, %r1;",
    "cvt.rzi.s32.f32 %r1, %f1;",
    "cvt.rn.f32.s32 %f1, %r1;",
    "cvt.rz.bf16.f32 %h1, %f1;",
    "cvt.rn.relu.f16.f32 %h1, %f1;",
    "setp.eq.and.s32 %p1, %r1, %r2, %p2;",
    "atom.global.add.f32 %f1, [%d1], %f2;",
    "atom.global.cas.b32 %r1, [%d1], %r2, %r3;",
    "ld.global.v2.u64 {%d1, %d2, %d3}, [%d1];",
    "ld.local.u32 %r1, [%d1];",
    "mbarrier.arrive.noComplete.shared::cta.b64 _, [%r1], 1;",
    "mbarrier.arrive.shared::cta.b64 %d1, [%r1];",
    "vote.sync.any.pred %p1, %p2, -1;",
    "call f;",
    "add.s32 %r1, %r2, %d3;",  # operands of another size
    "add.s32 %r1, %r2, %p1;",
    "add.s32 %r1, %r2, 0d3FF0000000000000;",
    "add.s32 %r1, %r2, 017;",  # octal
    "add.s32 %r1, %r2, 1.5;",
    "add.s32 %r99, %r2, 1;",  # not declared
    "mov.u32 %r1, %nonsense;",
    "st.global.u32 [%d1], _;",
    ".local .b32 x;",
]


@pytest.mark.parametrize("text", REFUSED)
def test_refusal(text: str) -> None:
    with pytest.raises(PtxError):
        run(text)


# ---- the text --------------------------------------------------------------------------------------------------------


def test_text() -> None:
    """Comments, lines for debuggers, scopes with names of their own, labels of the same name in two scopes."""
    out = np.zeros(32, np.uint32)
    body = """ mov.u32 %r1, 0x10; // mov.u32 %r1, 1;
    /* mov.u32 %r1, 2;
       */
    .loc 1 22 3
    add.s32 %r1, %r1, -6;
    { .reg .b32 %r<3>, x; .reg .pred %p<2>; mov.u32 %r1, 99; mov.u32 x, 5;
      setp.eq.u32 %p1, x, 5; @%p1 bra next; mov.u32 %r1, 0; next: }
    { .reg .b32 x; mov.u32 x, 3; bra.uni next; mov.u32 x, 0; next: add.s32 %r1, %r1, x; }
    """
    run(own(4) + body + "st.global.u32 [%d40], %r1;", out)
    assert out.tolist() == [13] * 32
    assert program("ld.param.u64 %d1, [p0];", 1).entry.parameters[0].size == 8
