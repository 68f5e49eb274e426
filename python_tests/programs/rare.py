"""Steps of a program that stand by themselves: a forward that is interrupted, cores with random numbers, a start from the
gradient, arguments that must be refused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from programs.builder import Builder
from programs.operands import OPERATORS, argument_names


class Call(NamedTuple):
    """A model, and an input of it: their names."""

    model: str
    x: str


KINDS = ("Planned", "PlannedInterrupt", "PlannedExit", "PlannedClose")
CALLS = ("{0}({1})", "w.checkpoint({0}, {1})", "w.checkpoint({0}, {1}, reentrant=True)")


def small_model(b: Builder, form: str | None, first: str = CALLS[0], second: str = CALLS[0], middle: str = "pass") -> Call:
    """Three layers of one or two groups. form: what makes their cores; first, second: how l0 is called, and the others; middle:
    a line between them."""
    k, r, name, x = b.one_of(6, *b.widths), b.number(1, 4), b.name("small"), b.name("x")
    b.line("class Small(nn.Module):")
    b.line("    def __init__(self):")
    b.line("        super().__init__()")
    b.line(f"        self.l0, self.l1, self.l2 = (nn.Linear({k}, {k}) for _ in range(3))")
    b.line("    def forward(self, x, w):")
    b.line(f"        x = torch.tanh({first.format('self.l0', 'x')})")
    b.line(f"        {middle}")
    b.line(f"        return {second.format('(lambda t: self.l2(torch.tanh(self.l1(t))))', 'x')},")
    groups = {"l0": "g", "l1": "g", "l2": b.one_of("g", "g2")}
    dtypes = f"dtype={b.dtype()}, adapter_dtype={b.dtype(b.adapter)}"
    kind = "" if form is None else f', form="{form}"'
    b.line(f"{name} = w.apply(Small(), {groups}, {(r, r)}, seed={b.seed()}, {dtypes}{kind})")
    b.line(f"{x} = w.tensor({b.one_of(130, 5)}, {k}, seed={b.seed()}, dtype={b.dtype()})")
    return Call(name, x)


def made_cores(b: Builder) -> None:
    """A module makes the cores: with random numbers, where regions are computed again in the backward; or of parameters that
    the forward replaces half-way."""
    call = CALLS[0]
    if b.chance(0.4):
        part = b.one_of("left", "right")
        replaced = f"self.lotr_cores.{part} = another(self.lotr_cores.{part}, -0.5)"
        model, x = small_model(b, "product", second=b.one_of(*CALLS), middle=replaced)
    else:
        model, x = small_model(b, "noisy", b.one_of(*CALLS), b.one_of(*CALLS))
        call = b.one_of(*CALLS)
    y = b.name("y")
    b.line(f"{y}, = {call.format(model, f'{x}, w')}")
    b.line(f'w.see("{y}", {y})')
    b.line(f'w.backward("{b.name("b")}", w.loss({b.seed()}, {y}))')


def interrupted(b: Builder) -> None:
    """A model's forward ends half-way, parameters change without a trace, and a layer is called by itself."""
    model, x = small_model(b, b.one_of(None, None, "product"), b.one_of(*CALLS))
    name, y = b.name("stop"), b.name("y")
    b.line(f"def {name}():")
    b.line(f"    def stop(*_): raise {b.one_of(*KINDS)}")
    b.line(f"    handle = {model}.{b.one_of('l0', 'l1', 'l2')}.register_forward_hook(stop)")
    b.line(f"    try: {model}({x}, w)")
    b.line("    finally: handle.remove()")
    b.line(f"w.planned({name})")
    layer = f"{model}.{b.one_of('l0', 'l1', 'l2')}"
    b.line(f"for p in (*{layer}.factors.parameters(), *{model}.parameters()): p.data.mul_(-1.25)")
    b.line(f"{y} = {layer}({x})")
    b.line(f'w.see("{y}", {y})')
    b.line(f'w.backward("{b.name("b")}", w.loss({b.seed()}, {y}))')


def gradient_start(b: Builder) -> None:
    """A start from the gradient, which looks at the model in train mode, with random numbers; a batch may fail."""
    dtype = b.dtype(torch.float64 if b.compute == torch.float64 else torch.float32)
    k, n = b.one_of(*b.widths), b.one_of(*b.widths)
    f, layer, norm, x = b.name("f"), b.name("l"), b.name("m"), b.name("x")
    b.line(f"{f} = w.factors({k}, {n}, (2, 1), seed={b.seed()}, dtype={dtype})")
    b.line(f"{layer} = w.layer({f}, seed={b.seed()}, dtype={dtype})")
    b.line(f"{norm} = nn.Sequential({layer}, nn.BatchNorm1d({n}, dtype=w.dtype({dtype})))")
    b.line(f"{x} = w.tensor(5, {k}, seed={b.seed()}, dtype={dtype})")
    other = b.name("x")
    b.line(f"{other} = w.tensor(5, {k}, seed={b.seed()}, dtype={dtype})")
    b.line("torch.default_generator.manual_seed(1)")
    call = b.one_of("m(t)", "w.checkpoint(m, t)", "w.checkpoint(m, t, reentrant=True)")
    b.line("def loss(m, t):")
    if b.chance(0.3):
        b.line(f"    if t is {other}: raise {b.one_of(*KINDS)}")
    b.line(f"    return w.loss({b.seed()}, {call}) * (1 + torch.rand(()))")
    b.line(f"w.begin({norm}, [{x}, {other}], loss)")
    b.line(f"for name, t in {norm}.named_buffers(): w.see(name, t)")
    b.line('w.see("drawn", torch.rand(2))')


def refused(b: Builder) -> None:
    """An argument without values, or an output in the memory of an input."""
    if b.chance(0.3):
        return refused_layer(b)
    operator = b.one_of(*OPERATORS)
    settings = f"rows={b.one_of(5, 1, 130)}, dtype={b.dtype()}"
    written = argument_names(operator, written=True)
    if written and b.chance(0.5):
        argument = b.one_of(*written)
        other = b.one_of(*(name for name in argument_names(operator) if name != argument))
        settings += f', shares="{other}", offset={b.number(0, 1)}'
    else:
        argument = b.one_of(*argument_names(operator))
    b.line(f'w.refuses_operator("{operator}", "{argument}", {settings})')


def refused_layer(b: Builder) -> None:
    """lotr_linear with one tensor on the meta device."""
    dtype = b.dtype(torch.float32)
    shapes = {"x": "4, 3", "weight": "2, 3", "bias": "2", "A": "3, 2", "B": "2, 2", "core": "2, 2"}
    missing = b.one_of(*shapes)
    parts = [f"{name} = torch.ones({shape}, dtype={dtype})" for name, shape in shapes.items()]
    b.line("; ".join(parts))
    b.line(f'{missing} = {missing}.to("meta")')
    b.line(f"w.refuses(lambda: w.linear({', '.join(shapes)}, 1.0), {', '.join(map(repr, shapes))})")
