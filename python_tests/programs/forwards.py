"""Steps of a program that run layers: on shared inputs, checkpointed, without a graph, with other parameters, in threads."""

from __future__ import annotations

import math

from programs.builder import Builder, Layer, Value
from programs.making import rank

POLICIES = ("save_all", "recompute_all", "save_products", "save_others")


def show(b: Builder, value: Value) -> None:
    b.line(f'w.see("{value.name}", {value.name})')


def run_line(b: Builder, text: str) -> None:
    """A forward, in autocast where the program has it."""
    if b.autocast is not None:
        b.line(f"with w.autocast({b.dtype(b.autocast)}):")
        b.line(f"    {text}")
    else:
        b.line(text)


def forward(b: Builder) -> None:
    if b.net is not None and b.chance(0.6):
        return forward_net(b)
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    y = b.made((*x.shape[:-1], layer.n))
    run_line(b, f"{y.name} = {layer.name}({x.name})")
    show(b, y)
    after_forward(b, y)


def after_forward(b: Builder, y: Value) -> None:
    if b.autocast is not None:
        h = Value(b.name("h"), y.shape)
        b.values.append(h)
        b.line(f"{h.name} = {y.name}.to(w.dtype({b.dtype()}))")
    elif b.chance(0.3):
        h = Value(b.name("h"), y.shape)
        b.values.append(h)
        b.line(f"{h.name} = torch.tanh({y.name})")


def siblings(b: Builder) -> None:
    """Several layers on the very same x, as q, k and v, perhaps each in a checkpoint of its own."""
    layer = b.one_of(*b.layers)
    fitting = [other for other in b.layers if other.k == layer.k]
    x = b.input_for(layer.k)
    call = "{0}({1})"
    if b.chance(0.5 if b.dropout else 0.1):
        call, b.recomputes = b.one_of("w.checkpoint({0}, {1}, reentrant=True)", "w.checkpoint({0}, {1})"), True
    for other in b.some(fitting):
        y = b.made((*x.shape[:-1], other.n))
        run_line(b, f"{y.name} = {call.format(other.name, x.name)}")
        show(b, y)


def forward_net(b: Builder, call: str = "net({0}, w)", x: Value | None = None) -> None:
    if b.net_sets:
        b.changed()
    x = x or b.input_for(b.widths[0])
    names = [b.name("y") for _ in range(b.outputs)]
    run_line(b, f"{', '.join(names)}, = {call.format(x.name)}")
    for name in names:
        value = Value(name, (-1, -1))  # of a shape that only the model knows: for losses alone
        b.fresh.append(value)
        if b.net_recomputes or "policy" in call:
            b.cached.add(name)
        show(b, value)


def view(b: Builder) -> None:
    """Another tensor over the same memory, and a layer on it."""
    fitting = [value for value in b.values if len(value.shape) > 1 and -1 not in value.shape]
    if not fitting:
        return
    x = b.one_of(*fitting)
    how = b.one_of("view_as({0})", "unsqueeze(0)", "flatten(0, -2)", "expand(2, *{0}.shape)", "flip(-1)")
    rows = {"unsqueeze(0)": (1, *x.shape[:-1]), "expand(2, *{0}.shape)": (2, *x.shape[:-1])}.get(how, x.shape[:-1])
    if how == "flatten(0, -2)":
        rows = (math.prod(x.shape[:-1]),)
    v = Value(b.name("v"), (*rows, x.width))
    b.line(f"{v.name} = {x.name}.{how.format(x.name)}")
    b.values.append(v)
    if x.name in b.cached:
        b.cached.add(v.name)


def checkpointed(b: Builder) -> None:
    b.recomputes = True
    # a forward that replaces its parameters is another one when it is run again, which no checkpoint bears
    if b.net is not None and not b.net_replaces and b.chance(0.5):
        policy = f', policy="{b.one_of(*POLICIES)}"' if b.chance(0.5) else ""
        return forward_net(b, f"w.checkpoint(net, {{0}}, w{policy})")
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    y = b.made((*x.shape[:-1], layer.n))
    kind = b.one_of("", ", reentrant=True", "policy")
    if kind == "policy":
        kind = f', policy="{b.one_of(*POLICIES)}"'
        b.cached.add(y.name)
    chain = [other for other in b.layers if other.k == layer.k and other.n == layer.n]
    function = layer.name
    if b.chance(0.5):
        function = f"lambda t: torch.tanh({layer.name}(t)) * {b.one_of(*chain).name}(t)"
    run_line(b, f"{y.name} = w.checkpoint({function}, {x.name}{kind})")
    show(b, y)


def unrecorded(b: Builder) -> None:
    """A part of a forward without a graph."""
    mode = "no_grad" if b.dropout or b.net_replaces else b.one_of("no_grad", "inference_mode")
    whole = b.net is not None and b.chance(0.5)
    if whole and b.net_sets:
        b.changed()
    layer = b.one_of(*b.layers)
    x = b.input_for(b.widths[0] if whole else layer.k)
    names = [b.name("y") for _ in range(b.outputs if whole else 1)]
    b.line(f"with torch.{mode}():")
    b.indent += 1
    run_line(b, f"{', '.join(names)}, = net({x.name}, w)" if whole else f"{names[0]} = {layer.name}({x.name})")
    if mode == "no_grad" and not whole:
        b.values.append(Value(names[0], (*x.shape[:-1], layer.n)))
    b.indent -= 1
    for name in names:
        show(b, Value(name, ()))


def functional(b: Builder) -> None:
    """Other parameters for one call."""
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    y = b.made((*x.shape[:-1], layer.n))
    core = b.name("c")
    b.line(f"{core} = another({layer.name}.core, 0.5).requires_grad_({b.one_of(True, False)})")
    b.line(f"own = 'core' in {layer.name}._parameters")  # else a parametrization makes it
    run_line(b, f'{y.name} = torch.func.functional_call({layer.name}, {{"core": {core}}} if own else {{}}, ({x.name},))')
    show(b, y)
    b.line(f"w.known.append(({core!r}, {core}))")


def bare(b: Builder) -> None:
    """lotr_linear on tensors of any layout."""
    k, n = b.one_of(*b.widths), b.one_of(*b.widths)
    r_in, r_out = rank(b)
    x = b.input_for(k)
    parts = [("W", (n, k), b.compute), ("v", (n,), b.compute)]
    cores: tuple[int, ...] = ()
    rows = ""
    if len(x.shape) > 1 and 0 < x.shape[0] < 9 and b.chance(0.3):  # a core for each row
        cores = (b.number(1, 3),)
        rows = f", {[b.number(0, cores[0] - 1) for _ in range(x.shape[0])]}"
    scaled = b.magnitude and not rows and b.chance(0.7)
    parts += [("A", (k, r_in), b.adapter), ("B", (n, r_out), b.adapter), ("G", (*cores, r_in, r_out), b.adapter)]
    names = []
    for letter, shape, dtype in parts:
        frozen = not b.chance(0.15) if letter in "Wv" else b.chance(0.2)
        kind = b.kind(0.2)
        extra = (", grad=False" if frozen else "") + ("" if kind == "plain" else f', kind="{kind}"')
        name, sizes = b.name(letter), ", ".join(map(str, shape))
        b.line(f"{name} = w.tensor({sizes}, seed={b.seed()}, dtype={b.dtype(dtype)}, scale=0.4{extra})")
        names.append(name)
    if scaled:
        rows = f", magnitude={(name := b.name('m'))}"
        grad = "" if b.chance(0.8) else ", grad=False"
        b.line(f"{name} = w.tensor({n}, seed={b.seed()}, dtype={b.dtype(b.adapter)}, scale=0.5, least=0.5{grad})")
    y = b.made((*x.shape[:-1], n))
    run_line(b, f"{y.name} = w.linear({x.name}, {', '.join(names)}, {b.one_of(1.0, -0.5)}{rows})")
    show(b, y)


def parts(layer: Layer) -> tuple[str, ...]:
    return ("A", "B", "core", *(("magnitude",) if layer.magnitude else ()))


def parameter(b: Builder, layer: Layer, part: str) -> str:
    if part == "core" and b.made_cores:
        return f"net.lotr_cores.{b.one_of('left', 'right')}"
    return f"{layer.name}.factors.{part}" if part in ("A", "B") else f"{layer.name}.{part}"


def kept_elsewhere(b: Builder) -> None:
    """Saved tensors are copied away, as to save memory."""
    b.unwatched = True
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    y = b.made((*x.shape[:-1], layer.n))
    b.line("with torch.autograd.graph.save_on_cpu():")
    b.indent += 1
    run_line(b, f"{y.name} = {layer.name}({x.name})")
    b.indent -= 1
    show(b, y)
