"""Steps of a program that ask for gradients: whole, one after the other, of a part, and of gradients."""

from __future__ import annotations

from programs.builder import Builder
from programs.forwards import parameter, parts


def inputs(b: Builder) -> str:
    """Some of what gradients can be asked for."""
    layer = b.one_of(*b.layers)
    options = [parameter(b, layer, part) for part in parts(layer)]
    options += [value.name for value in b.values if value.name.startswith("x")]
    return f"[{', '.join(b.some(options))}]"


def losses(b: Builder) -> str | None:
    if not b.fresh:
        return None
    chosen = b.some(b.fresh) if b.chance(0.5) else list(b.fresh)
    options = (", scale=0.01" if b.large else "") + (", linear=True" if b.chance(0.3) else "")
    return f"w.loss({b.seed()}, {', '.join(value.name for value in chosen)}{options})"


def backward(b: Builder) -> None:
    loss = losses(b)
    if loss is None:
        return
    retain = b.chance(0.6)
    text = ", retain=True" if retain else ""
    if b.chance(0.15):
        text += f", inputs={inputs(b)}"
    b.line(f'w.backward("{b.name("b")}", {loss}{text})')
    if not retain:
        b.forget()


def separate(b: Builder) -> None:
    """A backward through each of the last outputs, in any order."""
    chosen = b.some(b.fresh[-4:]) if b.fresh else []
    for value in chosen:
        retain = b.chance(0.5) or b.made_cores  # the graph of cores that a forward makes at once goes with the first backward
        b.line(f'w.backward("{b.name("b")}", w.loss({b.seed()}, {value.name}){", retain=True" if retain else ""})')
    if chosen:
        b.forget()


def partial(b: Builder) -> None:
    loss = losses(b)
    if loss is not None:
        b.line(f'w.grad("{b.name("p")}", {loss}, {inputs(b)}, retain=True)')


def double(b: Builder) -> None:
    loss = losses(b)
    if loss is None or b.flipped:  # what was frozen in the forward and is not now, plain torch sees or not as it saved it
        return
    grads = b.name("d")
    b.line(f'{grads} = w.grad("{grads}", {loss}, {inputs(b)}, create=True)')
    b.line(f"if {grads}:")
    if b.chance(0.5):
        b.line(f'    w.backward("{b.name("b")}", w.loss({b.seed()}, *{grads}), retain=True)')
    else:
        b.line(f'    w.grad("{b.name("p")}", w.loss({b.seed()}, *{grads}), {inputs(b)}, retain=True)')
