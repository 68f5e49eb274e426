"""Steps of a program with the experts of a mixture: rows that belong to none of them, tokens that none takes."""

from __future__ import annotations

from itertools import accumulate

import torch
from programs.builder import Builder

HOLDING = ('float("nan")', 'float("inf")', "1e4")


def experts(b: Builder) -> None:
    """Experts' layers or the function, their gradients, and those of these."""
    count = b.number(1, 4)
    k, n, r = b.one_of(*b.widths), b.one_of(*b.widths), (b.small(1, 9), b.small(1, 9))
    f = factors(b, k, n, r, b.adapter)
    ends = [0] * count
    for i in range(count):
        ends[i] = (ends[i - 1] if i else 0) + b.one_of(0, 1, 3, 5, *((70,) if b.many else ()))
    rows = ends[-1] + b.one_of(0, 0, 1, 3)
    offs = f"torch.tensor({ends}, dtype=torch.int32)"
    m, unread, tokens = rows, list(range(ends[-1], rows)), ""
    if b.chance(0.5):  # a row reads a token's x
        m = b.number(1, 6)
        taken = [b.number(0, m - 1) for _ in range(rows)]
        unread = [i for i in range(m) if i not in taken[: ends[-1]]]
        tokens = f", tokens=torch.tensor({taken}, dtype=torch.int64)"
    x, y, dtype = b.name("x"), b.name("y"), b.dtype()
    grad = "" if b.chance(0.75) else ", grad=False"
    padding = f"rows={unread}, holding={b.one_of(*HOLDING)}"
    b.line(f"{x} = w.padded({m}, {k}, seed={b.seed()}, dtype={dtype}, {padding}{grad})")
    layer = module(b, f, count, b.compute)
    if b.chance(0.3):
        weight = f"w.tensor({count}, {n}, {k}, seed={b.seed()}, dtype={dtype}, grad={b.chance(0.3)})"
        parts = f"{layer}.factors.A, {layer}.factors.B, {layer}.core"
        b.line(f"{y} = w.grouped({x}, {weight}, {offs}, {parts}, 0.5{tokens})[:{ends[-1]}]")
    else:
        b.line(f"{y} = {layer}({x}, {offs}{tokens})[:{ends[-1]}]")
    b.line(f'w.see("{y}", {y})')
    if b.chance(0.3):
        options = b.some([f"{layer}.factors.A", f"{layer}.core", x])
        b.line(f'd = w.grad("d", w.loss({b.seed()}, {y}), [{", ".join(options)}], create=True)')
        b.line(f'if d: w.backward("{b.name("b")}", w.loss({b.seed()}, *d))')
    else:
        b.line(f'w.backward("{b.name("b")}", w.loss({b.seed()}, {y}))')


def factors(b: Builder, k: int, n: int, rank: tuple[int, int], dtype: torch.dtype) -> str:
    name = b.name("f")
    b.line(f"{name} = w.factors({k}, {n}, {rank}, seed={b.seed()}, dtype={b.dtype(dtype)})")
    return name


def module(b: Builder, f: str, count: int, dtype: torch.dtype) -> str:
    name = b.name("e")
    bias = "" if b.chance(0.7) else ", bias=False"
    b.line(f"{name} = w.experts({f}, {count}, seed={b.seed()}, dtype={b.dtype(dtype)}, scaling={b.one_of(1.0, -0.5)}{bias})")
    return name


def long_groups(b: Builder) -> None:
    """So many rows that they are shared out over threads, which no bit may show."""
    if b.chance(0.5):
        return
    dtype = b.one_of(*[torch.float32] * 4, torch.float64, torch.bfloat16)
    count, r = b.one_of(3, 2, 9), b.one_of((16, 16), (15, 15), (8, 16), (32, 32))
    ends = list(accumulate(b.one_of(703, 811, 950) if i < 3 else b.number(0, 90) for i in range(count)))
    e = module(b, factors(b, 8, 8, r, dtype), count, dtype)
    x = b.name("x")
    b.line(f"{x} = w.tensor({ends[-1]}, 8, seed={b.seed()}, dtype={b.dtype(dtype)}, grad=False)")
    call = f"{e}({x}, torch.tensor({ends}, dtype=torch.int32))"
    if b.chance(0.7):
        b.line("@torch.no_grad()")
        b.line(f"def work(): return [{call}]")
    else:
        b.line(f"def work(): return gradients({call}.sum(), [{e}.core, {e}.factors.A])")
    b.line("w.same_bits(work)")
