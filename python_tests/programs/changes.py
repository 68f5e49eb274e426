"""Steps of a program between forwards and backwards: all that users do to layers, parameters and tensors."""

from __future__ import annotations

from programs.backwards import backward, losses
from programs.builder import Builder, Layer
from programs.forwards import forward_net, parameter, parts, unrecorded


def in_place(b: Builder) -> None:
    fitting = [value for value in (*b.values, *b.fresh) if value.name not in b.cached]
    if not fitting:
        return
    value = b.one_of(*fitting)
    change = b.one_of("mul_(0.5)", "add_(0.25)")
    if value.name.startswith("x") or b.chance(0.3):
        b.line(f"with torch.no_grad(): {value.name}.{change}")
    else:
        b.line(f"{value.name}.{change}")
    b.changed_in_place()
    if b.dropout or b.chance(0.7):  # else plain torch mostly raises in the backward; dropped copies would hide it there
        b.forget()


def change_parameter(b: Builder) -> None:
    layer = b.one_of(*b.layers)
    part = b.one_of(*parts(layer))
    if layer.magnitude and b.chance(0.1):
        b.line(f"{layer.name}.reset_magnitude()")
        b.forget()
        return
    # lengths c that were kept would be wrong, as the documentation says
    if not b.magnitude and b.chance(
        0.25
    ):  # without a trace: plain torch goes wrong in a backward through what was before, and so may we
        b.line(f"{parameter(b, layer, part)}.data.mul_({b.one_of(0.5, -1.25)})")
        b.forget()
        b.values.clear()
        return
    b.line(f"with torch.no_grad(): {parameter(b, layer, part)}.mul_({b.one_of(0.5, -1.25)})")
    b.changed_in_place()
    # a region whose products are kept would be made anew of old and new values, which torch forbids and does not notice
    kept = any(value.name in b.cached for value in (*b.values, *b.fresh))
    if kept or b.chance(0.7):
        b.forget()


def replace(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    if b.chance(0.5):
        b.line(f"{layer.name}.scaling = {b.one_of(0.25, -2.0)}")
    else:
        b.line(f"if 'core' in {layer.name}._parameters: {layer.name}.core = another({layer.name}.core, -0.5)")


def freeze(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    name = parameter(b, layer, b.one_of(*parts(layer)))
    b.line(f"{name}.requires_grad_(not {name}.requires_grad)")
    b.flipped = True


def optimizer_step(b: Builder) -> None:
    layer = b.one_of(*b.layers)
    b.line(f"trained = [p for p in (*{layer.name}.parameters(), *{layer.name}.factors.parameters()) if p.requires_grad]")
    fused = b.one_of("", ", fused=True")
    b.line(f"if trained: torch.optim.SGD(list(dict.fromkeys(trained)), lr=0.1{fused}).step()")
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
    b.changed()
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
    b.line(
        f"if {is_merged(b, what)} and any(p.requires_grad for p in {what}.parameters()): w.train_merged({what}, lambda: {call})"
    )
    b.line(f"if {is_merged(b, what)}: w.unmerge({what})")
    b.forget()


def reparametrized(b: Builder) -> None:
    """A weight that is made of others after the layer was adapted, and then a merge."""
    plain = [layer for layer in b.layers if not layer.wrapped]
    if not plain:
        return
    reparametrize(b, b.one_of(*plain))
    b.forget()
    merged(b)


def reparametrize(b: Builder, layer: Layer) -> None:
    # a row of one number over its own norm has no gradient but rounding's
    norms = ("parametrizations.weight_norm({0})", "weight_norm({0})") if layer.k > 1 else ()
    how = b.one_of(*norms, "prune.identity({0}, 'weight')")
    b.line(f"if 'weight' in {layer.name}._parameters: {how.format(layer.name)}")


def hook(b: Builder) -> None:
    b.changed()
    layer = b.one_of(*b.layers)
    kind = b.one_of("tensor", "forward", "backward", "parameter")
    if kind == "tensor" and b.fresh:
        b.line(f"if {b.fresh[-1].name}.requires_grad: {b.fresh[-1].name}.register_hook(lambda g: None if g is None else g * 2)")
    elif kind == "forward":
        b.line(f"{layer.name}.register_forward_hook(lambda m, args, y: y * 0.5)")
    elif kind == "backward":
        b.line(f"{layer.name}.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi))")
    elif kind == "parameter":
        name = parameter(b, layer, b.one_of(*parts(layer)))
        b.line(f"if {name}.requires_grad: {name}.register_hook(lambda g: None if g is None else g * 3)")


def failing(b: Builder) -> None:
    """An exception in the middle of a forward or a backward."""
    layer = b.one_of(*b.layers)
    whole = b.net is not None and b.chance(0.5)
    if whole and b.net_sets:
        b.changed()
    x = b.input_for(b.widths[0] if whole else layer.k)
    name = b.name("fail")
    b.line(f"def {name}():")
    b.line("    def stop(*_): raise Planned")
    if b.autocast is not None:
        b.line(f"    with w.autocast({b.dtype(b.autocast)}):")
        b.indent += 1
    where = "forward" if whole else b.one_of("forward", "x", *parts(layer))
    if whole:
        b.line(f"    handle = {layer.name}.register_forward_hook(stop)")
        b.line(f"    try: net({x.name}, w)")
    elif where == "forward":
        b.line(f"    handle = {layer.name}.register_forward_hook(stop)")
        b.line(f"    try: {layer.name}({x.name})")
    else:
        # a copy of x: how much of what x was made of has been backward when a hook fails is autograd's affair
        target = f"{x.name}.detach().requires_grad_({x.name}.requires_grad)"
        target = f"{target} * 1" if where == "x" else parameter(b, layer, where)
        b.line(f"    t = {target}")
        b.line("    if not t.requires_grad: return")
        b.line("    handle = t.register_hook(stop)")
        b.line(f"    try: w.loss({b.seed()}, {layer.name}({'t' if where == 'x' else x.name + '.detach()'})).backward()")
    b.line("    finally: handle.remove()")
    b.indent = 1
    b.line(f"w.planned({name})")


def parametrized(b: Builder) -> None:
    """A, B, a core or magnitudes that are made of another parameter, as for orthogonal or bounded factors."""
    b.changed()
    scaled = [layer for layer in b.layers if layer.magnitude]
    options = ("A", "B", *(() if b.made_cores else ("core",)), *(("magnitude",) if scaled else ()))
    part, how = b.one_of(*options), b.one_of("nn.Tanh()", "nn.Tanh()", "Doubled()")
    if how == "Doubled()" and b.unwatched:  # it gives the parameter other memory, which views of it do not see
        b.forget()
    if b.net is not None and part in ("A", "B") and b.chance(0.5):
        b.line("for factors in net.lotr_factors.values():")
        b.line(f'    if not parametrize.is_parametrized(factors, "{part}"):')
        b.line(f'        parametrize.register_parametrization(factors, "{part}", {how})')
    else:
        layer = b.one_of(*(scaled if part == "magnitude" else b.layers))
        owner = f"{layer.name}.factors" if part in ("A", "B") else layer.name
        b.line(f'if not parametrize.is_parametrized({owner}, "{part}"):')
        b.line(f'    parametrize.register_parametrization({owner}, "{part}", {how})')
    if b.chance(0.5):
        unrecorded(b)


def state(b: Builder) -> None:
    """state_dict, out and in."""
    what = b.net or b.one_of(*b.layers).name
    b.line(f"state = {{key: t.clone() for key, t in {what}.state_dict().items()}}")
    if b.chance(0.5):
        change_parameter(b)
    b.line(f"{what}.load_state_dict(state)")
    b.changed_in_place()
    b.changed()


# ---- whole models ----------------------------------------------------------------------------------------------------


def saved(b: Builder) -> None:
    b.line("with w.saved(net):")
    b.indent += 1
    change_parameter(b)
    b.indent -= 1


def switched(b: Builder) -> None:
    """Another adapter is added, or made the active one."""
    name = b.one_of("default", "one", "one", "training", "_modules")
    shared = b.one_of(True, False)
    if name == "default" or b.made_cores:  # the twin has no second adapter over made cores, as in `share` (contexts.py)
        b.line('w.set_adapter(net, "default")')
    else:
        b.line(f'if "{name}" in w.adapters: w.set_adapter(net, "{name}")')
        b.line("else:")
        b.line(f'    w.may_refuse(lambda: w.add_adapter(net, "{name}", shared={shared}))')
        b.shared += [name] if shared and not b.shared else []
        b.line(f'    if "{name}" in w.adapters:')
        b.line(f'        w.set_adapter(net, "{name}")')
        b.line(f"        w.fill(net, {b.seed()}, {b.dtype()}, {b.dtype(b.adapter)})")
    b.forget()


def off(b: Builder) -> None:
    b.input_for(b.widths[0])
    b.line("with w.disabled(net):")
    b.indent += 1
    forward_net(b)
    b.indent -= 1
    b.changed()


def copied(b: Builder) -> None:
    names = ", ".join(layer.name for layer in b.layers) if b.net is None else b.net
    b.line(f"{names}, = w.copied({names})")
    b.forget()


def unloaded(b: Builder) -> None:
    """The adapter for good in the weights, between a forward and its backward: the last step of a program.

    Where that is refused, for a layer in the middle perhaps, the whole adapter is trained as before.
    """
    forward_net(b)
    b.changed()
    if b.chance(0.4):
        reparametrize(b, b.one_of(*b.layers))
    b.line("refused = w.may_refuse(lambda: w.unload(net))")
    inputs = [value.name for value in b.values if value.name.startswith("x")]
    if b.fresh:
        b.line(f'w.grad("{b.name("p")}", {losses(b)}, [{", ".join(inputs)}])')
    unrecorded(b)
    b.forget()
    x = b.input_for(b.widths[0])
    b.line("if refused:")
    b.indent += 1
    forward_net(b, x=x)
    backward(b)
    b.indent -= 1
    b.forget()
