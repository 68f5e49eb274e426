"""Programs that lotr_ext once got wrong, found by the generator and cut down: bodies of `program(w)`, by what they show."""

from __future__ import annotations

from textwrap import indent

import torch
from programs.builder import HEAD
from programs.operands import OPERATORS, argument_names

NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0, self.l1, self.l2, self.l3 = (nn.Linear(6, 6) for _ in range(4))
    def forward(self, x, w):
        h = {forward}
        return torch.tanh(self.l3(torch.tanh(h))),
groups = {{"l0": "g0", "l1": "g1", "l2": "g0", "l3": "g1"}}
net = w.apply(Net(), groups, (3, 2), seed=1, dtype=torch.{dtype}, adapter_dtype=torch.float32)
x = w.tensor({tokens}, 6, seed=2, dtype=torch.{dtype})
"""
PAIR = """
f = w.factors(6, 6, (3, 2), seed=1, dtype=torch.{dtype}, train="{train}")
l0, l1 = (w.layer(f, seed=10 * i, dtype=torch.{dtype}{settings}) for i in (1, 2))
x = w.tensor({tokens}, 6, seed=2, dtype=torch.{dtype}, grad={grad}, kind="{kind}"{scale})
"""
RUN_NET = "y, = net(x, w)\nw.see('y', y)\nw.backward('b', w.loss(3, y))\n"


def net(after: str, *, forward: str = "self.l0(x) + self.l1(x) + self.l2(x)", dtype: str = "float32", tokens: int = 130) -> str:
    return NET.format(forward=forward, dtype=dtype, tokens=tokens) + after


def pair(
    after: str,
    *,
    train: str = "AB",
    settings: str = "",
    tokens: str = "130",
    grad: bool = True,
    kind: str = "plain",
    dtype: str = "float32",
    scale: str = "",
) -> str:
    words = {"train": train, "settings": settings, "tokens": tokens, "grad": grad, "kind": kind, "dtype": dtype, "scale": scale}
    return PAIR.format(**words) + after


def bare(rows: bool = False, **kinds: str) -> str:
    """lotr_linear with tensors of these layouts; rows: with a core for each of two rows."""
    shapes = {"x": "2, 5, 6", "W": "4, 6", "v": "4", "A": "6, 3", "B": "4, 2", "G": "2, 3, 2" if rows else "3, 2"}
    lines = [
        f"{name} = w.tensor({shape}, seed={i}, dtype=torch.float32, grad={name not in 'Wv'}, kind={kinds.get(name, 'plain')!r})"
        for i, (name, shape) in enumerate(shapes.items())
    ]
    call = f"y = w.linear(x, W, v, A, B, G, 0.5{', [1, 0]' if rows else ''})"
    return "\n".join([*lines, call, "w.see('y', y)", "w.backward('b', w.loss(9, y))\n"])


def parametrized(part: str, *, how: str = "nn.Tanh()", dtype: str = "float32", after: str = RUN_NET, tokens: int = 130) -> str:
    owners = "net.lotr_factors.values()" if part != "core" else "[net.l0, net.l1]"
    register = f"for owner in {owners}: parametrize.register_parametrization(owner, '{part}', {how})\n"
    return net(register + after, dtype=dtype, tokens=tokens)


CHECKPOINTED = (
    "y = w.checkpoint(lambda t: torch.tanh(l0(t)) * l1(t), x, policy='{}')\nw.see('y', y)\nw.backward('b', w.loss(3, y))\n"
)
SAVED = "with w.saved(net):\n    with torch.no_grad(): [p.mul_(0.5) for p in net.parameters() if p.requires_grad]\n" + RUN_NET
MERGED = "w.may_refuse(lambda: w.merge(l0))\n"
UNMERGED = "if l0.merged: w.unmerge(l0)\n"
DX = "w.grad('p', w.loss(3, y), [x])\n"
WRAPPED = ", wrapped=True"
LENGTHS = ", magnitude='trained'"
MIXED = """
l2 = w.layer(f, seed=30, dtype=torch.float32)
h = l0(x)
w.grad('p', w.loss(3, h, l0(h), l2(h)), [f.A])
"""
SHOWN = "w.see('y', l0(x))\n"
SMALL_LOSS = "y = l0(x)\nw.see('y', y)\nw.backward('b', w.loss(3, y, scale=0.01))\n"
SEPARATE = "y0, y1 = l0(x), l1(x)\nw.backward('b1', w.loss(3, y1))\nw.backward('b0', w.loss(4, y0))\n"
UNSEEN = "with torch.no_grad():\n    y, = net(x, w)\nw.see('y', y)\n"
PARTIAL = "y = l0(x)\nwith torch.no_grad(): {}.mul_(0.5)\nw.grad('p', w.loss(3, y), [{}])\n"
DOUBLE = "y = l0(x)\nd = w.grad('d', w.loss(3, y), [f.B, l0.core], create=True)\nw.backward('b', w.loss(4, *d))\n"
CHANGED_A = "y = l0(x)\nwith torch.no_grad(): f.A.mul_({})\n"
OTHER_CORE = "net.requires_grad_(False)\nnet.l0.core.requires_grad_(True)\n"
OF_A = "w.grad('p', w.loss(3, y), [f.A])\n"
TWICE = "d = w.grad('d', w.loss(3, y, scale=0.01), [{}], create=True)\nw.grad('p', w.loss(4, *d), [{}])\n"
REENTRANT = "w.checkpoint({}, x, reentrant=True)"
TWICE_AFTER = (
    "d = w.grad('d', w.loss(3, y), [f.B], create=True)\n"
    "if d:\n    w.grad('p', w.loss(4, *d), [l0.core], retain=True)\n    w.grad('q', w.loss(4, *d), [x], retain=True)\n"
)
LARGE = {"dtype": "float16", "settings": ", scaling=1000.0, core_scale=200.0", "scale": ", scale=1e-3"}

TASKS = "w.bank(net, 2)\nfor i in range(2): net.lotr_tasks.add(w.task(net, 50 + i, torch.float32))\n"
MIXED_TASKS = "w.mixed(net, torch.tensor({}))"
OUTER, INNER = MIXED_TASKS.format([0, 1, -1, 0]), MIXED_TASKS.format([1, 1, 0, -1])
THREADS = """
def work(context):
    with context:
        w.meet()
        y, = net(x, w)
        w.meet()
    return [y, *gradients(w.loss(3, y), [x, net.l0.factors.A])]
found = w.threads(lambda: work({}), lambda: work({}), lambda: work(nullcontext()))
for t in (t for one in found for t in one): w.see("y", t)
"""
EXPERTS = """
f = w.factors(6, 4, (3, 2), seed=1, dtype=torch.float32)
e = w.experts(f, 3, seed=10, dtype=torch.float32)
x = w.padded(8, 6, seed=2, dtype=torch.float32, rows={rows}, holding=float("nan"))
y = e(x, torch.tensor([2, 2, {end}], dtype=torch.int32){tokens})[:{end}]
"""
TOKENS = ", tokens=torch.tensor([1, 2, 1, 6, 7])"
BACKWARD = "w.backward('b', w.loss(3, y))\n"
START = """
f = w.factors(6, 4, (3, 2), seed=1, dtype=torch.float32)
l = w.layer(f, seed=10, dtype=torch.float32)
m = nn.Sequential(l, nn.BatchNorm1d(4, dtype=w.dtype(torch.float32)))
x0, x1 = (w.tensor(5, 6, seed=i, dtype=torch.float32) for i in (2, 3))
torch.default_generator.manual_seed(1)
def loss(m, t):
    if t is {failing}: raise PlannedInterrupt
    return w.loss(4, {call}) * (1 + torch.rand(()))
w.begin(m, [x0, x1], loss)
for name, t in m.named_buffers(): w.see(name, t)
w.see("drawn", torch.rand(2))
"""
MADE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0, self.l1 = nn.Linear(6, 6), nn.Linear(6, 6)
    def forward(self, x, w):
        x = torch.tanh({first})
        {middle}
        return {last},
net = w.apply(Net(), {{"l0": "g", "l1": "g"}}, (3, 2), seed=1, dtype=torch.float32, adapter_dtype=torch.float32, form="{form}")
x = w.tensor(130, 6, seed=2, dtype=torch.float32)
"""
LONG = """
f = w.factors(8, 8, (16, 16), seed={seed}, dtype=torch.float32)
e = w.experts(f, 3, seed=10, dtype=torch.float32)
x = w.tensor(2572, 8, seed=2, dtype=torch.float32, grad=False)
w.same_bits(torch.no_grad()(lambda: [e(x, torch.tensor([811, 1761, 2572], dtype=torch.int32))]))
"""
INTERRUPTED = """
def stop(*_): raise {}
def fail():
    handle = net.l2.register_forward_hook(stop)
    try: net(x, w)
    finally: handle.remove()
w.planned(fail)
net.l0.factors.B.data.mul_(-1.25)
y = net.l0(x)
w.see('y', y)
"""
REFUSED = "w.refuses_operator('{}', '{}', rows=5, dtype=torch.float32)"

PROGRAMS: dict[str, str] = {
    "casts of parametrized factors kept by id": parametrized("A", dtype="bfloat16", after=UNSEEN * 8),
    "parametrized A": parametrized("A"),
    "parametrized B": parametrized("B"),
    "parametrized core": parametrized("core"),
    "parametrized A, few tokens": parametrized("A", tokens=5),
    "parametrized A, saved and loaded": parametrized("A", how="Doubled()", after=SAVED),
    "parametrized core, saved and loaded": parametrized("core", how="Doubled()", after=SAVED),
    "core for one call, in the model's forward": net(
        RUN_NET, forward="self.l0(x) + torch.func.functional_call(self.l2, {'core': another(self.l2.core, 0.5)}, (x,))"
    ),
    "scaling set in the model's forward": net(RUN_NET, forward="self.l0(x) + (setattr(self.l2, 'scaling', 2.0) or self.l2(x))"),
    "core set in the model's forward": net(
        RUN_NET, forward="self.l0(x) + (setattr(self.l2, 'core', another(self.l2.core, 2)) or self.l2(x))"
    ),
    **{
        f"{part} set in the model's forward, {dtype}": net(
            UNSEEN + RUN_NET,
            forward=f"self.l0(x) + (setattr(self.l0.factors, '{part}', another(self.l0.factors.{part}, 2)) or self.l2(x))",
            dtype=dtype,
        )
        for part in "AB"
        for dtype in ("float32", "bfloat16")
    },
    **{
        f"{part} changed in the model's forward, {dtype}": net(
            UNSEEN, forward=f"self.l0(x) + 0 * torch.no_grad()(self.l2.{part}.mul_)(2).sum() + self.l2(x)", dtype=dtype
        )
        for part in ("factors.A", "factors.B", "core")
        for dtype in ("float32", "bfloat16")
    },
    "unload that is refused half-way": net(
        "prune.identity(net.l2, 'weight')\nw.may_refuse(lambda: w.unload(net))\n" + RUN_NET
    ),
    **{f"conj().imag: {name}": bare(**{name: "conj"}) for name in "xWvABG"},
    **{f"negative bit: {name}": bare(**{name: "neg"}) for name in "xWvABG"},
    "merge before the backward": pair("y = l0(x)\n" + MERGED + DX),
    "merge and unmerge before the backward": pair("y = l0(x)\n" + MERGED + UNMERGED + DX),
    "unload before the backward": net("y, = net(x, w)\nw.may_refuse(lambda: w.unload(net))\n" + DX),
    "merge of a weight_norm": pair("weight_norm(l0)\n" + MERGED + SHOWN),
    "merge of a parametrized weight": pair("parametrizations.weight_norm(l0)\n" + MERGED + SHOWN),
    "merge of a pruned weight": pair("prune.identity(l0, 'weight')\n" + MERGED + SHOWN),
    "float16: the folded factor overflows": pair(SMALL_LOSS, **LARGE),
    "float16: the folded factor overflows, double backward": pair(
        "y = l0(x)\n" + TWICE.format("f.B, l0.core", "f.B"), train="B", grad=False, **LARGE
    ),
    "float16: s u G overflows where s (u G) B^T does not": pair(
        "with torch.no_grad(): f.B.mul_(0.01)\n" + SMALL_LOSS, **LARGE | {"scale": ", scale=1.0"}
    ),
    "unload of a layer with a hook": net(
        "net.l0.register_forward_hook(lambda m, args, y: y * 0.5)\nw.may_refuse(lambda: w.unload(net))\n" + RUN_NET
    ),
    "a second gradient of a linear loss": net(
        "y, = net(x, w)\nd = w.grad('d', w.loss(3, y, linear=True), [x], create=True)\nw.backward('b', w.loss(4, *d))\n",
        forward="self.l2(torch.tanh(self.l0(x)))",
    ).replace("torch.tanh(self.l3(torch.tanh(h)))", "h"),
    "no second gradient for a core that is not in the loss": net(
        "y, = net(x, w)\nd = w.grad('d', w.loss(3, y), [net.l0.factors.B], create=True)\nw.backward('b', w.loss(4, *d))\n",
        forward="self.l0(x) + self.l2(x).detach()",
    ),
    "no gradient for a core that is not in the loss": net(RUN_NET, forward="self.l0(x) + self.l2(x).detach()"),
    "a gradient of an adapter that was parked": net(
        RUN_NET + "w.add_adapter(net, 'one', shared=True)\nw.set_adapter(net, 'one')\nw.set_adapter(net, 'default')\n"
        "w.backward('b', w.loss(3, net.l0(x)))\n"
    ),
    "training while merged": pair(MERGED + "if l0.merged: w.train_merged(l0, lambda: l0(x))\n"),
    **{
        f"selective checkpointing, {policy}, {tokens} tokens": pair(CHECKPOINTED.format(policy), tokens=tokens)
        for policy in ("save_all", "recompute_all", "save_products", "save_others")
        for tokens in ("5", "130")
    },
    "selective checkpointing with dropout, float16": pair(
        CHECKPOINTED.format("save_products"), dtype="float16", settings=", dropout=0.5", tokens="5"
    ),
    "selective checkpointing of a wrapped layer": pair(CHECKPOINTED.format("save_products"), settings=WRAPPED, tokens="5"),
    **{
        f"{part} changed before the backward of a selective checkpoint, {policy}, {dtype}": pair(
            CHECKPOINTED.format(policy).replace("w.backward", f"with torch.no_grad(): {part}.mul_(-1.25)\nw.backward"),
            dtype=dtype,
        )
        for part in ("l0.core", "f.B")
        for policy in ("save_all", "save_products")
        for dtype in ("float32", "bfloat16")
    },
    "a second gradient of one core, with a selective checkpoint that it is no part of": net(
        "y, = net(x, w)\nd = w.grad('d', w.loss(3, y, net.l0(x)), [x], create=True)\n"
        "w.grad('p', w.loss(4, *d), [net.l3.core], retain=True)\n",
        forward="w.checkpoint(self.l2, self.l0(x), policy='save_all')",
    ),
    "selective checkpointing in a model": net(RUN_NET, forward="w.checkpoint(self.l0, x, policy='save_products') + self.l2(x)"),
    "separate backwards, the follower first": pair(SEPARATE),
    "separate backwards with dropout": pair(SEPARATE, settings=", dropout=0.5", tokens="5"),
    "a model made under inference_mode": "with torch.inference_mode():" + indent(net("net.requires_grad_(False)\n"), "    ")
    + "x = w.tensor(130, 6, seed=5, dtype=torch.float32, grad=False)\ny, = net(x, w)\nw.see('y', y)\n",
    "an inference part of a forward": net(
        RUN_NET, forward="torch.tanh(w.inference(lambda: self.l0(x))) + self.l2(x)", dtype="bfloat16"
    ),
    "in place on the output of a 1-D x": pair("y = l0(x[0])\ny.mul_(0.5)\nw.backward('b', w.loss(3, y))\n", tokens="5"),
    "double backward, A frozen, few tokens": pair(DOUBLE, train="B", tokens="5", grad=False),
    "double backward, A frozen": pair(DOUBLE, train="B", grad=False),
    "gradient of B after a change of a core that hooks keep": pair(
        "with torch.autograd.graph.save_on_cpu():\n    y = l0(x)\n"
        "with torch.no_grad(): l0.core.mul_(0.5)\nw.grad('p', w.loss(3, y), [f.B])\n",
        tokens="5",
    ),
    "partial gradient after a change of x": pair(PARTIAL.format("x", "l0.core"), tokens="5"),
    "gradient after a change of an A that is frozen": pair(PARTIAL.format("f.A", "f.B"), train="B", tokens="5", grad=False),
    "gradients after a change of A, without a bias": pair(
        CHANGED_A.format(1) + "w.backward('b', w.loss(3, y))\n", train="A", settings=", bias=False", tokens="5", grad=False
    ),
    "gradient of A after a merge": pair("y = l0(x)\n" + MERGED + OF_A, tokens="5"),
    "gradient of A after a merge, without a bias": pair("y = l0(x)\n" + MERGED + OF_A, tokens="5", settings=", bias=False"),
    "gradient of A after a merge, shared u": pair("y = l0(x)\n" + MERGED + OF_A),
    "double backward after a change of an A": pair(
        CHANGED_A.format(0.5) + TWICE.format("l0.core", "f.A"), train="A", tokens="5", grad=False
    ),
    **{
        f"recorded gradient of B after {change}, {tokens} tokens": pair(f"y = l0(x)\n{change}\n" + TWICE_AFTER, tokens=tokens)
        for change in (
            "with torch.no_grad(): f.A.mul_(0.5)",
            "with torch.no_grad(): x.mul_(0.5)",
            "parametrize.register_parametrization(f, 'A', Doubled())",
        )
        for tokens in ("5", "130")
    },
    **{
        f"dropout in a reentrant checkpoint, {name}": pair(
            before + "\nw.backward('b', w.loss(3, y))\n", settings=", dropout=0.5", tokens=tokens
        )
        for tokens in ("5", "130")
        for name, before in (
            (f"{tokens} tokens", "with torch.no_grad(): l0(x)\ny = " + REENTRANT.format("lambda t: l1(t) * l0(t)")),
            (f"another one, {tokens} tokens", f"y = {REENTRANT.format('l0')} * " + REENTRANT.format("l1")),
        )
    },
    **{
        f"dropout in a reentrant checkpoint, one layer with a hook, {tokens} tokens": pair(
            "l0.register_full_backward_hook(lambda m, gi, go: None)\n"
            f"y = {REENTRANT.format('lambda t: l0(t) * l1(t)')}\nw.backward('b', w.loss(3, y))\n",
            settings=", dropout=0.5",
            tokens=tokens,
        )
        for tokens in ("5", "130")
    },
    "a second gradient of no rows": "w.little_work(10_000)\n"
    + pair("y = l0(x)\ny.add_(0.25)\n" + TWICE.format("l0.core", "l0.core"), tokens="2, 0", train="", grad=False),
    "one trained core of several": net(OTHER_CORE + RUN_NET),
    "one trained core of several, double backward": net(OTHER_CORE + "y, = net(x, w)\n" + TWICE.format("x", "x")),
    "the active adapter is set again, of a parametrized core": parametrized(
        "core", after="w.set_adapter(net, 'default')\n" + UNSEEN
    ),
    "adapters called training and _modules": net(
        "for name in ('training', '_modules'): w.may_refuse(lambda name=name: w.add_adapter(net, name, shared=True))\n"
    ),
    "gradients of shared factors that are parked": net(
        RUN_NET + "w.add_adapter(net, 'one', shared=True)\nw.set_adapter(net, 'one')\nw.grads('after')\n"
    ),
    "an empty x whose gradient is expanded": pair(
        "y = torch.tanh(l0(x))\nw.backward('b', w.loss(3, l0(y), l1(y)))\n", tokens="2, 0", train=""
    ),
    "a core for each row": bare(rows=True),
    "a context in another one": net(
        TASKS + f"with {OUTER}:\n    with {INNER}: y0, = net(x, w)\n    y1, = net(x, w)\nw.backward('b', w.loss(3, y0, y1))\n",
        tokens=4,
    ),
    "contexts closed as they were opened": net(
        TASKS + f"a, b = {OUTER}, {INNER}\na.__enter__(), b.__enter__()\na.__exit__(None, None, None)\ny0, = net(x, w)\n"
        "b.__exit__(None, None, None)\ny1, = net(x, w)\nw.backward('b', w.loss(3, y0, y1))\n",
        tokens=4,
    ),
    **{
        f"contexts in threads, {name}": net(TASKS + THREADS.format(*contexts), tokens=4)
        for name, contexts in (("tasks", (OUTER, INNER)), ("disabled", ("w.disabled(net)", "nullcontext()")))
    },
    "a recomputation after its context": net(
        TASKS + f"with {OUTER}: y, = net(x, w)\n" + BACKWARD, forward="w.checkpoint(self.l0, x)", tokens=4
    ),
    "tasks of layers with scalings of their own": net("net.l1.scaling = 0.25\n" + TASKS + f"with {OUTER}: {RUN_NET}", tokens=4),
    "experts: rows of no expert": EXPERTS.format(rows=[5, 6, 7], end=5, tokens="") + BACKWARD,
    "experts: tokens that no expert takes": EXPERTS.format(rows=[0, 3, 4, 5, 7], end=4, tokens=TOKENS) + BACKWARD,
    "experts: rows of no expert, double backward": EXPERTS.format(rows=[5, 6, 7], end=5, tokens="")
    + TWICE.format("e.core", "x"),
    "a start from the gradient": START.format(failing="None", call="m(t)"),
    "a start from the gradient that is interrupted": START.format(failing="x1", call="m(t)"),
    "a start from the gradient of a reentrant checkpoint": START.format(
        failing="None", call="w.checkpoint(m, t, reentrant=True)"
    ),
    **{
        f"random cores in a checkpoint, reentrant {reentrant}": MADE.format(
            first="self.l0(x)", middle="pass", last=f"w.checkpoint(self.l1, x, reentrant={reentrant})", form="noisy"
        )
        + RUN_NET
        for reentrant in (False, True)
    },
    "a parameter of all cores set in the model's forward": MADE.format(
        first="self.l0(x)", middle="self.lotr_cores.left = another(self.lotr_cores.left, -2)", last="self.l1(x)", form="product"
    )
    + RUN_NET,
    **{f"a forward ended by {kind}": net(INTERRUPTED.format(kind)) for kind in ("Planned", "PlannedInterrupt", "PlannedClose")},
    **{f"other bits at two threads, {seed}": LONG.format(seed=seed) for seed in (1, 2, 3, 4)},
    **{
        f"{operator}: an argument on the meta device": "\n".join(REFUSED.format(operator, name) for name in names)
        for operator, names in ((operator, argument_names(operator)) for operator in OPERATORS)
    },
    **{
        f"{operator}: {written} in the memory of another argument": "\n".join(
            REFUSED.format(operator, written + f"', shares='{name}")
            for name in argument_names(operator)
            if name != written
        )
        for operator in OPERATORS
        for written in argument_names(operator, written=True)
    },
    "parametrized magnitudes": pair(
        "parametrize.register_parametrization(l0, 'magnitude', nn.Tanh())\n" + SHOWN + "w.backward('b', w.loss(3, l0(x)))\n",
        settings=LENGTHS,
    ),
    **{
        f"magnitudes changed before the backward, {tokens} tokens": pair(
            "y = l0(x)\nwith torch.no_grad(): l0.magnitude.mul_(0.5)\n" + TWICE.format("x, l0.magnitude", "x, f.A"),
            settings=LENGTHS,
            tokens=tokens,
        )
        for tokens in ("5", "130")
    },
    "a wrapped and a plain layer on one x": pair(MIXED, settings=WRAPPED),
    "double backward of a wrapped layer": pair(DOUBLE, settings=WRAPPED, tokens="127"),
}  # fmt: skip


def source(name: str) -> str:
    return HEAD + "def program(w):\n" + indent(PROGRAMS[name].strip(), "    ") + "\n"


def dtype(name: str) -> torch.dtype:
    """The coarsest in which it computes."""
    return next((t for t in (torch.bfloat16, torch.float16) if str(t) in PROGRAMS[name]), torch.float32)
