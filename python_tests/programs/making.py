"""The first lines of a program: its layers, by hand or as a whole model under apply_lotr."""

from __future__ import annotations

from programs.builder import Builder, Layer, Value

TRAIN = ("AB", "AB", "AB", "A", "B", "")


def settings(b: Builder) -> str:
    """scaling, dropout and the cores' size, as arguments."""
    scaling = 1000.0 if b.large else b.one_of(1.0, 0.5, -1.5)
    text = f"scaling={scaling}"
    if b.dropout:
        text += f", dropout={b.dropout}"
    if b.large:
        text += ", core_scale=30.0"
    return text


def rank(b: Builder) -> tuple[int, int]:
    r = b.small(1, 9)
    return (r, r) if b.chance(0.5) else (r, b.small(1, 9))


def make_layers(b: Builder) -> None:
    """One to three groups with one to three layers each, built by hand."""
    if b.frozen:
        b.line("with torch.inference_mode():")
        b.indent += 1
    for _ in range(b.one_of(1, 1, 2, 3)):
        k, n = b.one_of(*b.widths), b.one_of(*b.widths)
        factors, train = b.name("f"), "" if b.frozen else b.one_of(*TRAIN)
        adapter = b.dtype(b.adapter)
        b.line(f'{factors} = w.factors({k}, {n}, {rank(b)}, seed={b.seed()}, dtype={adapter}, train="{train}")')
        for _ in range(b.one_of(1, 2, 3)):
            layer = Layer(b.name("l"), factors, k, n, b.chance(0.2))
            extra = ", wrapped=True" if layer.wrapped else ""
            extra += "" if b.chance(0.7) else ", bias=False"
            extra += ", train=False" if b.frozen or b.chance(0.15) else ""
            if b.magnitude and b.chance(0.8):
                layer = layer._replace(magnitude=True)
                extra += f', magnitude="{"frozen" if b.frozen or b.chance(0.2) else "trained"}"'
            kind = b.kind(0.1)
            extra += "" if kind in ("plain", "expanded") else f', weight_kind="{kind}"'
            b.line(f"{layer.name} = w.layer({factors}, seed={b.seed()}, dtype={b.dtype()}, {settings(b)}{extra})")
            b.layers.append(layer)
    b.indent = 1


def make_net(b: Builder) -> None:
    """A model whose forward is a few lines, adapted as a whole: a forward scope is open while it runs."""
    sizes = [(b.one_of(*b.widths), b.one_of(*b.widths)) for _ in range(b.number(1, 5))]
    sizes[0] = (b.widths[0], sizes[0][1])
    names = [f"l{i}" for i in range(len(sizes))]
    wrapped: list[str] = []
    b.line("class Net(nn.Module):")
    b.indent += 1
    b.line("def __init__(self):")
    b.line("    super().__init__()")
    for name, (k, n) in zip(names, sizes):
        linear = f"nn.Linear({k}, {n}{'' if b.chance(0.7) else ', bias=False'})"
        if k > 1 and b.chance(0.1):  # no plain weight: apply_lotr wraps it
            linear = f"parametrizations.weight_norm({linear})"
            wrapped.append(name)
        b.line(f"    self.{name} = {linear}")
    b.line("def forward(self, x, w):")
    b.indent += 1
    layers = [Layer(f"self.{name}", "", k, n) for name, (k, n) in zip(names, sizes)]
    b.made_cores = b.chance(0.2)
    outputs = forward_lines(b, layers)
    b.line(f"return {', '.join(outputs)},")
    b.indent -= 2
    splits = b.chance(0.3)  # two groups of one shape
    groups = {name: f"g{k}x{n}" + (f"_{i % 2}" if splits else "") for i, (name, (k, n)) in enumerate(zip(names, sizes))}
    train = b.one_of("A B core", "A B core", "A B core", "core", "A core", "B core", *(() if b.made_cores else ("A B", "B")))
    if b.magnitude:
        train = b.one_of(f"{train} magnitude", f"{train} magnitude", train, "magnitude")
    r, adapter = rank(b), b.dtype(b.adapter)
    if b.frozen:
        b.line("with torch.inference_mode():")
        b.indent += 1
    b.line(f"net = w.apply(Net(), {groups}, {r}, seed={b.seed()}, dtype={b.dtype()}, adapter_dtype={adapter},")
    form = ', form="product"' if b.made_cores else ""
    form += ", magnitude=True" if b.magnitude else ""
    b.line(f'              {settings(b)}, train="{train}"{form})')
    if b.frozen:
        b.line("net.requires_grad_(False)")
        b.indent -= 1
    b.net = "net"
    b.outputs = len(outputs)
    b.layers += [Layer(f"net.{name}", groups[name], k, n, name in wrapped, b.magnitude) for name, (k, n) in zip(names, sizes)]


def forward_lines(b: Builder, layers: list[Layer]) -> list[str]:
    """Lines of a model's forward over x; names of what it returns. Each layer is called once or more, on what fits."""
    at_hand = [Value("x", (-1, layers[0].k))]
    made: list[str] = []
    called: list[Layer] = []
    waiting = list(layers) + ([b.one_of(*layers)] if b.chance(0.2) else [])
    for layer in waiting:
        fitting = [v for v in at_hand if v.width == layer.k]
        if not fitting:
            continue
        source = fitting[-1] if b.chance(0.5) else b.one_of(*fitting)
        value = Value(b.name("h"), (-1, layer.n))
        call = f"{layer.name}({source.name})"
        kind = b.one_of(*(["plain"] * 6), "checkpoint", "selective", "core", "scaling", "replaced", "no_grad")
        if b.made_cores and called and b.chance(0.25):
            kind = b.one_of("left", "right")
        before = layer in called if kind in ("scaling", "replaced") else b.net_recomputes and kind in ("left", "right")
        if before:  # a recomputation of what was before would be another one
            kind = "plain"
        called.append(layer)
        b.net_recomputes = b.recomputes = b.recomputes or kind in ("checkpoint", "selective")
        if kind == "checkpoint":
            call = f"w.checkpoint({layer.name}, {source.name})"
        elif kind == "selective":
            policy = b.one_of("save_all", "recompute_all", "save_products", "save_others")
            call = f'w.checkpoint({layer.name}, {source.name}, policy="{policy}")'
        elif kind == "core":  # another core for this call alone, as hypernetworks do
            b.net_swaps = True
            b.line(f'cores = {{"core": another({layer.name}.core, 0.5)}} if "core" in {layer.name}._parameters else {{}}')
            call = f"torch.func.functional_call({layer.name}, cores, ({source.name},))"
        elif kind == "scaling":
            b.net_sets = True
            b.line(f"{layer.name}.scaling = {b.one_of(0.25, 2.0)}")
        elif kind == "replaced":
            b.net_replaces = b.net_sets = True
            b.line(f"if 'core' in {layer.name}._parameters: {layer.name}.core = another({layer.name}.core, -0.5)")
        elif kind in ("left", "right"):  # of the numbers that all cores are made of
            b.net_replaces = b.net_sets = True
            b.line(f"if hasattr(self, 'lotr_cores'): self.lotr_cores.{kind} = another(self.lotr_cores.{kind}, -0.5)")
        if kind == "no_grad":
            unrecorded = "no_grad" if b.dropout else b.one_of("no_grad", "inference_mode")
            b.line(f"with torch.{unrecorded}():")
            b.line(f"    {value.name} = {call}")
        else:
            b.line(f"{value.name} = {call}")
        activation = b.one_of("torch.tanh({0})", "torch.sigmoid({0})", "{0} * 0.5", "")
        out = value
        if activation:
            out = Value(b.name("h"), (-1, layer.n))
            b.line(f"{out.name} = {activation.format(value.name)}")
        same = [v for v in at_hand if v.width == out.width]
        if same and b.chance(0.3):
            b.line(f"{out.name} = {out.name} + {b.one_of(*same).name}")
        at_hand.append(out)
        made.append(out.name)
    return made[-3:]
