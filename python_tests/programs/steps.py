"""The steps of a program after its layers are made: forwards, backwards, and all that users do between them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from programs.builder import Builder, Layer, Value
from programs.making import make_layers, make_net, rank

POLICIES = ("save_all", "recompute_all", "save_products", "save_others")

# ---- forwards --------------------------------------------------------------------------------------------------------


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
    """Several layers on the very same x, as q, k and v."""
    layer = b.one_of(*b.layers)
    fitting = [other for other in b.layers if other.k == layer.k]
    x = b.input_for(layer.k)
    for other in b.some(fitting):
        y = b.made((*x.shape[:-1], other.n))
        run_line(b, f"{y.name} = {other.name}({x.name})")
        show(b, y)


def forward_net(b: Builder, call: str = "net({0}, w)") -> None:
    x = b.input_for(b.widths[0])
    names = [b.name("y") for _ in range(b.outputs)]
    run_line(b, f"{', '.join(names)}, = {call.format(x.name)}")
    for name in names:
        value = Value(name, (-1, -1))  # of a shape that only the model knows: for losses alone
        b.fresh.append(value)
        show(b, value)


def checkpointed(b: Builder) -> None:
    b.recomputes = True
    if b.net is not None and b.chance(0.5):
        policy = f', policy="{b.one_of(*POLICIES)}"' if b.chance(0.5) else ""
        return forward_net(b, f"w.checkpoint(net, {{0}}, w{policy})")
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    y = b.made((*x.shape[:-1], layer.n))
    kind = b.one_of("", ", reentrant=True", "policy")
    if kind == "policy":
        kind = f', policy="{b.one_of(*POLICIES)}"'
    chain = [other for other in b.layers if other.k == layer.k and other.n == layer.n]
    function = layer.name
    if b.chance(0.5):
        function = f"lambda t: torch.tanh({layer.name}(t)) * {b.one_of(*chain).name}(t)"
    run_line(b, f"{y.name} = w.checkpoint({function}, {x.name}{kind})")
    show(b, y)


def unrecorded(b: Builder) -> None:
    """A part of a forward without a graph."""
    mode = "no_grad" if b.dropout else b.one_of("no_grad", "inference_mode")
    b.line(f"with torch.{mode}():")
    b.indent += 1
    if b.net is not None and b.chance(0.5):
        x = b.input_for(b.widths[0])
        names = [b.name("y") for _ in range(b.outputs)]
        run_line(b, f"{', '.join(names)}, = net({x.name}, w)")
    else:
        layer = b.one_of(*b.layers)
        x = b.input_for(layer.k)
        names = [b.name("y")]
        run_line(b, f"{names[0]} = {layer.name}({x.name})")
        if mode == "no_grad":
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
    b.line(f"{core} = ({layer.name}.core.detach() * 0.5).requires_grad_({b.one_of(True, False)})")
    run_line(b, f'{y.name} = torch.func.functional_call({layer.name}, {{"core": {core}}}, ({x.name},))')
    show(b, y)
    b.line(f"w.known.append(({core!r}, {core}))")


def bare(b: Builder) -> None:
    """lotr_linear on tensors of any layout."""
    k, n = b.one_of(*b.widths), b.one_of(*b.widths)
    r_in, r_out = rank(b)
    x = b.input_for(k)
    parts = [("W", (n, k), b.compute), ("v", (n,), b.compute)]
    parts += [("A", (k, r_in), b.adapter), ("B", (n, r_out), b.adapter), ("G", (r_in, r_out), b.adapter)]
    names = []
    for letter, shape, dtype in parts:
        grad = b.chance(0.15) if letter in "Wv" else b.chance(0.8)
        kind = b.kind(0.2)
        sizes = ", ".join(map(str, shape))
        name = b.name(letter)
        b.line(f"{name} = w.tensor({sizes}, seed={b.seed()}, dtype={b.dtype(dtype)}, grad={grad}, kind={kind!r}, scale=0.4)")
        names.append(name)
    y = b.made((*x.shape[:-1], n))
    run_line(b, f"{y.name} = w.linear({x.name}, {', '.join(names)}, {b.one_of(1.0, -0.5)})")
    show(b, y)


def threaded(b: Builder) -> None:
    """The same layers in several threads at once, each with a graph of its own."""
    if b.dropout:
        return
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    seed = b.seed()
    wanted = f"{x.name}, {layer.name}.core, {parameter(b, layer, 'A')}"
    b.line("def work():")
    b.indent += 1
    run_line(b, f"ys = {layer.name}({x.name}), {layer.name}({x.name} * 0.5)")
    b.line(f"return w.loss({seed}, *ys)")
    b.indent -= 1
    b.line(f'for loss in w.threads(work, work): w.grad("threads", loss, [{wanted}])')


# ---- backwards -------------------------------------------------------------------------------------------------------


def parameter(b: Builder, layer: Layer, part: str) -> str:
    return f"{layer.name}.core" if part == "core" else f"{layer.name}.factors.{part}"


def inputs(b: Builder) -> str:
    """Some of what gradients can be asked for."""
    layer = b.one_of(*b.layers)
    options = [parameter(b, layer, part) for part in ("A", "B", "core")]
    options += [value.name for value in b.values if value.name.startswith("x")]
    return f"[{', '.join(b.some(options))}]"


def losses(b: Builder) -> str | None:
    if not b.fresh:
        return None
    chosen = b.some(b.fresh) if b.chance(0.5) else list(b.fresh)
    scale = ", scale=0.01" if b.large else ""
    return f"w.loss({b.seed()}, {', '.join(value.name for value in chosen)}{scale})"


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
        retain = b.chance(0.5)
        b.line(f'w.backward("{b.name("b")}", w.loss({b.seed()}, {value.name}){", retain=True" if retain else ""})')
    if chosen:
        b.forget()


def partial(b: Builder) -> None:
    loss = losses(b)
    if loss is not None:
        b.line(f'w.grad("{b.name("p")}", {loss}, {inputs(b)}, retain=True)')


def double(b: Builder) -> None:
    loss = losses(b)
    if loss is None:
        return
    grads = b.name("d")
    b.line(f'{grads} = w.grad("{grads}", {loss}, {inputs(b)}, create=True)')
    b.line(f"if {grads}:")
    if b.chance(0.5):
        b.line(f'    w.backward("{b.name("b")}", w.loss({b.seed()}, *{grads}), retain=True)')
    else:
        b.line(f'    w.grad("{b.name("p")}", w.loss({b.seed()}, *{grads}), {inputs(b)}, retain=True)')


# ---- changes ---------------------------------------------------------------------------------------------------------


def in_place(b: Builder) -> None:
    if not (b.values or b.fresh):
        return
    value = b.one_of(*b.values, *b.fresh)
    change = b.one_of("mul_(0.5)", "add_(0.25)")
    if value.name.startswith("x") or b.chance(0.3):
        b.line(f"with torch.no_grad(): {value.name}.{change}")
    else:
        b.line(f"{value.name}.{change}")
    if b.dropout or b.chance(0.7):  # else plain torch mostly raises in the backward; dropped copies would hide it there
        b.forget()


def change_parameter(b: Builder) -> None:
    layer = b.one_of(*b.layers)
    part = b.one_of("A", "B", "core")
    b.line(f"with torch.no_grad(): {parameter(b, layer, part)}.mul_({b.one_of(0.5, -1.25)})")
    if b.chance(0.7):
        b.forget()


def replace(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    if b.chance(0.5):
        b.line(f"{layer.name}.scaling = {b.one_of(0.25, -2.0)}")
    else:
        b.line(f"{layer.name}.core = nn.Parameter({layer.name}.core.detach() * -0.5)")


def freeze(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    name = parameter(b, layer, b.one_of("A", "B", "core"))
    b.line(f"{name}.requires_grad_(not {name}.requires_grad)")


def optimizer_step(b: Builder) -> None:
    layer = b.one_of(*b.layers)
    names = ", ".join(parameter(b, layer, part) for part in ("A", "B", "core"))
    b.line(f"torch.optim.SGD([p for p in ({names}) if p.requires_grad] or [torch.zeros(1)], lr=0.1).step()")
    b.line("w.zero()")
    b.forget()


def turn_off(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    b.line(f"{layer.name}.disabled = not {layer.name}.disabled")


def mode(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    b.line(f"{layer.name}.train(not {layer.name}.training)")


def merging(b: Builder) -> str | None:
    """What to merge: the model or a layer."""
    plain = [layer.name for layer in b.layers if not layer.wrapped]
    if b.net is not None and b.chance(0.5):
        return b.net
    return b.one_of(*plain) if plain else None


def is_merged(b: Builder, what: str) -> str:
    return "net.l0.merged" if what == b.net else f"{what}.merged"


def merged(b: Builder) -> None:
    """A merge, forwards without a graph, or backwards through what was before, and the way back."""
    what = merging(b)
    if what is None:
        return
    b.line(f"w.may_refuse(lambda: w.merge({what}))")
    if b.fresh and b.chance(0.5):
        backward(b)
    else:
        unrecorded(b)
    b.line(f"if {is_merged(b, what)}: w.unmerge({what})")
    b.forget()


def merged_training(b: Builder) -> None:
    """To train what is merged is no silent affair."""
    what = merging(b)
    if what is None:
        return
    x = b.input_for(b.widths[0] if what == b.net else next(layer.k for layer in b.layers if layer.name == what))
    call = f"{what}({x.name}, w)" if what == b.net else f"{what}({x.name})"
    b.line(f"w.may_refuse(lambda: w.merge({what}))")
    b.line(f"if {is_merged(b, what)} and any(p.requires_grad for p in {what}.parameters()): w.train_merged(lambda: {call})")
    b.line(f"if {is_merged(b, what)}: w.unmerge({what})")
    b.forget()


def reparametrized(b: Builder) -> None:
    """A weight that is made of others after the layer was adapted, and then a merge."""
    plain = [layer for layer in b.layers if not layer.wrapped]
    if not plain:
        return
    layer = b.one_of(*plain)
    how = b.one_of("parametrizations.weight_norm({0})", "weight_norm({0})", "prune.identity({0}, 'weight')")
    b.line(f"if 'weight' in {layer.name}._parameters: {how.format(layer.name)}")
    b.forget()
    merged(b)


def hook(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    kind = b.one_of("tensor", "forward", "backward", "parameter")
    if kind == "tensor" and b.fresh:
        b.line(f"if {b.fresh[-1].name}.requires_grad: {b.fresh[-1].name}.register_hook(lambda g: g * 2)")
    elif kind == "forward":
        b.line(f"{layer.name}.register_forward_hook(lambda m, args, y: y * 0.5)")
    elif kind == "backward":
        b.line(f"{layer.name}.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi))")
    elif kind == "parameter":
        name = parameter(b, layer, b.one_of("A", "B", "core"))
        b.line(f"if {name}.requires_grad: {name}.register_hook(lambda g: g * 3)")


def failing(b: Builder) -> None:
    """An exception in the middle of a forward or a backward."""
    layer = b.one_of(*b.layers)
    x = b.input_for(layer.k)
    name = b.name("fail")
    b.line(f"def {name}():")
    b.line("    def stop(*_): raise Planned")
    if b.autocast is not None:
        b.line(f"    with w.autocast({b.dtype(b.autocast)}):")
        b.indent += 1
    where = b.one_of("forward", "x", "A", "B", "core")
    if where == "forward":
        b.line(f"    handle = {layer.name}.register_forward_hook(stop)")
        b.line(f"    try: {layer.name}({x.name})")
    else:
        target = f"{x.name} * 1" if where == "x" else parameter(b, layer, where)
        b.line(f"    t = {target}")
        b.line("    if not t.requires_grad: return")
        b.line("    handle = t.register_hook(stop)")
        b.line(f"    try: w.loss({b.seed()}, {layer.name}({'t' if where == 'x' else x.name})).backward()")
    b.line("    finally: handle.remove()")
    b.indent = 1
    b.line(f"w.planned({name})")


def parametrized(b: Builder) -> None:
    """A, B or a core that is made of another parameter, as for orthogonal or bounded factors."""
    layer = b.one_of(*b.layers)
    b.changed()
    part = b.one_of("A", "B", "core")
    owner = layer.name if part == "core" else f"{layer.name}.factors"
    b.line(f'if not parametrize.is_parametrized({owner}, "{part}"):')
    b.line(f'    parametrize.register_parametrization({owner}, "{part}", {b.one_of("nn.Tanh()", "Doubled()")})')


def state(b: Builder) -> None:
    """state_dict, out and in."""
    what = b.net or b.one_of(*b.layers).name
    b.line(f"state = {{key: t.clone() for key, t in {what}.state_dict().items()}}")
    if b.chance(0.5):
        change_parameter(b)
    b.line(f"{what}.load_state_dict(state)")
    b.changed()


# ---- whole models ----------------------------------------------------------------------------------------------------


def saved(b: Builder) -> None:
    b.line("with w.saved(net):")
    b.indent += 1
    change_parameter(b)
    b.indent -= 1


def switched(b: Builder) -> None:
    """Another adapter is added, or made the active one."""
    name = b.one_of("default", "one", "training", "_modules")
    if name == "default":
        b.line('w.set_adapter(net, "default")')
    else:
        b.line(f'if "{name}" in w.adapters: w.set_adapter(net, "{name}")')
        b.line("else:")
        b.line(f'    w.may_refuse(lambda: w.add_adapter(net, "{name}", shared={b.one_of(True, False)}))')
        b.line(f'    if "{name}" in w.adapters:')
        b.line(f'        w.set_adapter(net, "{name}")')
        b.line(f"        w.fill(net, {b.seed()}, {b.dtype()})")
    b.forget()


def off(b: Builder) -> None:
    b.line("with w.disabled(net):")
    b.indent += 1
    forward_net(b)
    b.indent -= 1
    b.changed()


FORWARDS = (forward, forward, siblings, siblings, checkpointed, functional, bare, unrecorded)
BACKWARDS = (backward, backward, separate, partial, double)
CHANGES = (
    *(in_place, in_place, change_parameter, replace, freeze, optimizer_step, turn_off, mode, hook, failing),
    *(merged, merged_training, reparametrized, parametrized, parametrized, state, threaded),
)
WHOLE = (saved, switched, off)


@st.composite
def programs(draw) -> Builder:
    """A whole program."""
    b = Builder(draw)
    in_net = b.chance(0.4)
    make_net(b) if in_net else make_layers(b)
    for _ in range(b.number(1, 6)):
        for step in steps_of_a_round(b):
            step(b)
    return b


def steps_of_a_round(b: Builder) -> list[Callable[[Builder], None]]:
    """A few changes between forwards, and then backwards, each perhaps none."""
    changes = (*CHANGES, *WHOLE) if b.net is not None else CHANGES
    chosen = [b.one_of(*changes)] if b.chance(0.5) else []
    chosen += [b.one_of(*FORWARDS) for _ in range(b.number(1, 2))]
    chosen += [b.one_of(*changes)] if b.chance(0.3) else []
    chosen += [b.one_of(*BACKWARDS) for _ in range(b.number(0, 2))]
    return chosen
