"""LAYERS: kind of layer x form of its node x context, against float64 autograd of the formula (`layers.py`).

A context takes a Side and returns tensors: outputs and gradients. It runs on the layers and on the truth; the two must agree.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from helpers import CLOSE, HALVES, relative, worst
from layers import (
    KINDS,
    SCALING,
    Found,
    K,
    Net,
    R,
    Side,
    again,
    check_masks,
    inputs,
    linear_with_dropout,
    loss,
    no_grad_first,
    once,
    sides,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as nnf
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped, lotr_linear

# ---- contexts --------------------------------------------------------------------------------------------------------


def into_grad(s: Side) -> Found:
    """Backward three times: twice through one graph, once through another."""
    for t in s.wanted:
        t.grad = None
    y = s()
    loss(y).backward(retain_graph=True), loss(y).backward(), loss(s(2 * s.x)).backward()
    found = [None if t.grad is None else t.grad.clone() for t in s.wanted]
    for t in s.wanted:
        t.grad = None
    return found


def partial_then_whole(s: Side) -> Found:
    y = s()
    parts = [g for t in s.wanted for g in s.grad(y.sum(), [t], retain_graph=True)]
    return [*parts, *s.grad(loss(y))]


def failed_then_again(s: Side) -> Found:
    """A hook raises in the middle of a backward; the sums of that backward must not count in the next."""

    def fail(_: Tensor) -> None:
        raise ValueError("stop")

    y, leaf = s(), [t for n, t in s.leaves.items() if "core" in n][-1]
    hook = leaf.register_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        s.grad(loss(y), retain_graph=True)
    hook.remove()
    return s.grad(loss(y))


def interleaved(s: Side) -> Found:
    a = s()
    b = s(2 * s.x)
    first = s.grad(loss(a))
    c = s()
    return [*first, *s.grad(loss(b) + loss(c))]


def twice_on_one_x(s: Side) -> Found:
    """The second forward may share u with a layer of the first, and then needs its graph: as of siblings."""
    a, b = s(), s()
    return [*s.grad(loss(a), retain_graph=s.net.wire is again), *s.grad(loss(b))]


def double(s: Side) -> Found:
    first = s.grad(loss(s()), create_graph=True)
    return [*first, *s.grad(sum(loss(t) for t in first if t is not None))]


def double_of_some(s: Side) -> Found:
    """Each gradient alone is differentiated: a gradient of u must not follow u back into the cores."""
    found, y = [], s()
    for t in s.wanted:
        (d,) = s.grad(loss(y), [t], create_graph=True)
        found += [
            d,
            *(s.grad(loss(d), retain_graph=True) if d is not None and d.requires_grad else []),
        ]
    return found


def penalty_plus_loss(s: Side) -> Found:
    first = s.grad(s().sum(), create_graph=True)
    return s.grad(sum(loss(t) for t in first if t is not None) + loss(s()))


def batched(s: Side) -> Found:
    y = s()
    generator = torch.Generator().manual_seed(5)
    return s.grad(
        y,
        grad_outputs=torch.randn(3, *y.shape, generator=generator).to(y.dtype),
        is_grads_batched=True,
    )


def strides_of_gradients(s: Side) -> Found:
    y, w = s(), torch.linspace(-1, 1, s().numel(), dtype=s.x.dtype)
    losses = ((y.mT * w.view(y.mT.shape)).sum(), y.sum(), y[..., 3].sum(), loss(y[::2]))
    return [g for one in losses for g in s.grad(one, retain_graph=True)]


def without_graph(s: Side) -> Found:
    with torch.no_grad():
        a = s()
    with torch.inference_mode():
        x = s.x * 1
        b = s(x)
        x.mul_(2)
        c = s(x)
    return [a, b.clone(), c.clone()]


def checkpointed(s: Side, **settings: object) -> Found:
    y = checkpoint(s, torch.tanh(s.x), **settings) * s()
    return [y, *s.grad(loss(y))] if settings["use_reentrant"] is False else backward_of(s, y)


def backward_of(s: Side, y: Tensor) -> Found:
    """Reentrant checkpoints refuse autograd.grad."""
    for t in s.wanted:
        t.grad = None
    loss(y).backward()
    found = [y, *(t.grad for t in s.wanted)]
    for t in s.wanted:
        t.grad = None
    return found


def save_all(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def save_nothing(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Callable[..., CheckpointPolicy]) -> Callable[[Side], Found]:
    """A checkpoint that keeps the results that a policy names."""
    context = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpointed, use_reentrant=False, context_fn=context)


def save_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    names = ("mm", "addmm", "bmm", "lotr::", "linear")
    return (
        CheckpointPolicy.MUST_SAVE
        if any(n in str(op) for n in names)
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


def nested_checkpoints(s: Side) -> Found:
    """The inner recomputation runs without the outer checkpoint's dispatch mode."""
    selective = partial(create_selective_checkpoint_contexts, save_products)

    def inner(x: Tensor) -> Tensor:
        return checkpoint(s, x, use_reentrant=False)

    y = checkpoint(inner, torch.tanh(s.x), use_reentrant=False, context_fn=selective)
    return [y, *s.grad(loss(y))]


class Pack:
    """A pack hook to which no weak reference can be made."""

    __slots__ = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


X_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "joins a graph": Tensor.requires_grad_,
    "leaves its graph": Tensor.detach_,
    "becomes a leaf": lambda x: x.detach_().requires_grad_(),
    "changes in place": lambda x: x.mul_(2),
    "gets other data": lambda x: setattr(x, "data", 2 * x.data),
}


def x_changes(s: Side, change: str) -> Found:
    """Between the calls of two layers on one x, x changes."""
    x = s.x.detach().clone() if change == "joins a graph" else 2 * s.x
    a = s.layer(0, x)
    X_CHANGES[change](x)
    b = s.layer(1, x)
    wanted = [*s.wanted, x] if x.requires_grad else s.wanted
    return [a, b, *s.grad(loss(a * b), wanted)]


def hooked(s: Side, context: Callable[[], contextlib.AbstractContextManager]) -> Found:
    with context():
        y = s()
    return [y, *s.grad(loss(y))]


def vmapped(s: Side) -> Found:
    xs = torch.stack([s.x.detach(), 2 * s.x.detach()])
    return [torch.vmap(s)(xs)]


def functional_gradients(s: Side) -> Found:
    """torch.func: gradients, per-example gradients, jvp and jacrev of the leaves."""
    leaves = {n: t.detach() for n, t in s.leaves.items()}
    x = s.x.detach()
    grads = torch.func.grad(lambda leaves: loss(s(x, leaves)))(leaves)
    each = torch.vmap(
        torch.func.grad(lambda leaves, one: loss(s(one.unsqueeze(0), leaves))), (None, 0)
    )
    rows = each(leaves, x[:1].expand(3, -1)) if x.dim() == 2 and not s.net.rows else {}
    tangent = torch.func.jvp(s, (x,), (torch.cos(x),))[1]
    jacobian = torch.func.jacrev(lambda x: s(x).sum(-1))(x)
    return [*grads.values(), *rows.values(), tangent, jacobian]


def dual_numbers(s: Side) -> Found:
    x = s.x.detach()
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(s(forward_ad.make_dual(x, torch.cos(x)))).tangent]


def gradient_with_a_tangent(s: Side) -> Found:
    """Backward is linear in its gradient."""
    y = s()
    with forward_ad.dual_level():
        found = s.grad(
            y, grad_outputs=forward_ad.make_dual(torch.ones_like(y), torch.cos(y.detach()))
        )
        return [None if t is None else forward_ad.unpack_dual(t).tangent for t in found]


def in_threads(s: Side) -> Found:
    """Four threads train one model at once."""
    for t in s.wanted:
        t.grad = None
    barrier, request = threading.Barrier(4), s.net.request

    def run(i: int) -> None:
        barrier.wait()
        with request():
            for _ in range(6):
                loss(s(s.x * i)).backward()

    threads = [threading.Thread(target=run, args=(i,)) for i in (1, 2, 3, 4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        [t.start() for t in threads], [t.join() for t in threads]
    finally:
        sys.setswitchinterval(before)
    found = [t.grad for t in s.wanted]
    for t in s.wanted:
        t.grad = None
    return found


def changed_between(s: Side) -> Found:
    """A step of an optimizer, in place or by `.data`, and a new x, while an older graph lives."""
    keep = {n: t.detach().clone() for n, t in s.leaves.items()}
    y = s()
    first = s.grad(loss(y), retain_graph=True)
    with torch.no_grad():
        [t.mul_(1.1) for t in s.leaves.values()]
    second, older = s.grad(loss(s())), s()
    for t in s.leaves.values():
        t.data = t.data * 0.9
    third = s.grad(loss(s()))
    x = (s.x * 1).detach()
    a = s(x).detach()
    x.mul_(2)
    fourth = s.grad(loss(a + s(x)), list(s.leaves.values()))
    for n, t in s.leaves.items():
        t.data = keep[n]
    return [older, *first, *second, *third, *fourth]


def fused_steps(s: Side) -> Found:
    """A fused optimizer changes parameters without a new version."""
    keep = {n: t.detach().clone() for n, t in s.leaves.items()}
    found = []
    for _ in range(3):
        found += s.grad(loss(s()))
        for t, g in zip(s.wanted, found[-len(s.wanted) :], strict=True):
            if t is not s.x and g is not None:
                t.detach().numpy()[...] -= 1e-3 * g.numpy()  # unseen by version counters
    for n, t in s.leaves.items():
        t.data = keep[n]
    return found


def outputs_written_and_backwards_of_some(s: Side) -> Found:
    """Users write into outputs, keep gradients in hooks, and call backward of some layers."""
    if s.net.kind in ("rows", "function"):  # the layers by themselves are other functions
        return once(s)
    kept = []
    h = 2 * s.x
    if h.requires_grad:
        h.register_hook(lambda g: kept.append(g))
    a = s.net.wire(lambda i, x: s.layer(i, x).mul_(2), h)
    b = s.layer(0, h)
    found = [*s.grad(loss(a), retain_graph=True), *s.grad(loss(b))]
    return [*found, *kept]


def recomputed_with_new_values(s: Side) -> Found:
    """A step of an optimizer before the recomputation, which then has the new values."""
    before = {name: leaf.detach().clone() for name, leaf in s.leaves.items()}
    y = checkpoint(s, torch.tanh(s.x), use_reentrant=False)
    with torch.no_grad():
        for leaf in s.leaves.values():
            leaf.mul_(0.9)
    found = s.grad(loss(y))
    for name, leaf in s.leaves.items():
        leaf.data = before[name]
    return found


CONTEXTS: dict[str, Callable[[Side], Found]] = {
    f.__name__: f
    for f in (
        *(
            once,
            into_grad,
            partial_then_whole,
            failed_then_again,
            interleaved,
            twice_on_one_x,
            double,
            double_of_some,
        ),
        *(
            penalty_plus_loss,
            batched,
            strides_of_gradients,
            without_graph,
            no_grad_first,
            vmapped,
            functional_gradients,
        ),
        *(dual_numbers, gradient_with_a_tangent, in_threads, changed_between, fused_steps),
        *(outputs_written_and_backwards_of_some, recomputed_with_new_values),
    )
} | {
    "checkpoint": partial(checkpointed, use_reentrant=False),
    "reentrant checkpoint": partial(checkpointed, use_reentrant=True),
    "selective checkpoint": selective(save_products),
    "selective checkpoint of all": selective(save_all),
    "selective checkpoint of nothing": selective(save_nothing),
    "checkpoint in a selective one": nested_checkpoints,
    "save_on_cpu": partial(hooked, context=save_on_cpu),
    "saved-tensor hooks": partial(
        hooked, context=lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    ),
    "hooks without weak references": partial(
        hooked, context=lambda: saved_tensors_hooks(Pack(), lambda t: t)
    ),
}


def agree(
    net: Net,
    context: Callable[[Side], Found],
    x: Tensor,
    close: float = CLOSE[torch.float64],
    **settings: bool,
) -> None:
    found = []
    for side in sides(net, x, **settings):
        torch.manual_seed(0)
        with net.request():
            found.append(context(side))
    ours, truth = found
    error = worst(ours, truth)
    assert error < close, f"{error:.1e}"


ONE_FORM = {
    "wrapped",
    "trained base",
    "trained bias",
    "rows",
    "rows of siblings",
    "rows, wrapped",
}  # these always run Shrink
FORMS = [
    (kind, form)
    for kind in KINDS
    for form in ("alone", "folded", "shared")
    if form == "shared" or kind not in ONE_FORM
]
each_form = pytest.mark.parametrize("kind, form", FORMS, indirect=["form"])


@pytest.mark.parametrize("context", CONTEXTS)
@each_form
def test_contexts(kind: str, context: str, form: str) -> None:
    agree(
        Net(kind),
        CONTEXTS[context],
        inputs(6),
        1e-6 if context == "in_threads" else CLOSE[torch.float64],
    )


SETS = [set(c) for n in range(5) for c in itertools.combinations(("A", "B", "core", "base"), n)]


@pytest.mark.parametrize("trains_x", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize("trained", SETS, ids=lambda s: " ".join(sorted(s)) or "nothing")
def test_trained_parts(trained: set[str], trains_x: bool, form: str) -> None:
    """Every combination of trained A, B, cores, base weights and x: each gradient alone, then twice."""
    if not trained and not trains_x:
        return
    for kind in ("linear", "siblings", "wrapped")[: 3 if form == "shared" else 2]:
        net = Net(kind)
        for name, p in net.named_parameters():
            part = (
                name.split(".")[-2]
                if "factors" in name
                else "core"
                if name.endswith("core")
                else "base"
            )
            p.requires_grad_(part in trained)
        for context in (once, into_grad, double):
            agree(net, context, inputs(6), trains_x=trains_x)


SHAPES: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: inputs(1),
    "one dimension": lambda: inputs(),
    "three dimensions": lambda: inputs(6, 5),
    "four dimensions": lambda: inputs(2, 3, 2),
    "no tokens": lambda: inputs(0),
    "no tokens in rows": lambda: inputs(2, 0),
    "transposed": lambda: inputs(5, 6).transpose(0, 1),
    "permuted": lambda: torch.randn(K, 6, 2, dtype=torch.float64).permute(1, 2, 0),
    "every other": lambda: torch.randn(12, 2 * K, dtype=torch.float64)[::2, ::2],
    "expanded": lambda: inputs(1).expand(6, K),
    "many rows": lambda: inputs(400),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["linear", "siblings", "wrapped", "rows", "rows of siblings"])
def test_shapes(kind: str, shape: str, form: str) -> None:
    x = SHAPES[shape]()
    if "rows" in kind and (x.dim() < 2 or x.dim() > 3 or form != "shared"):
        return
    contexts = (once, double) if x.dim() < 2 else (once, double, strides_of_gradients)
    for context in contexts:
        agree(Net(kind), context, x)


DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, *HALVES)),
    *((dtype, torch.float32) for dtype in (*HALVES, torch.float64)),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype, factors", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@each_form
def test_dtypes(kind: str, dtype: torch.dtype, factors: torch.dtype, form: str) -> None:
    """x's dtype, and the adapter's: gradients have their parameters' dtypes."""
    net, x = Net(kind, dtype, factors), inputs(60, dtype=dtype)
    close = max(CLOSE[dtype], CLOSE[factors])
    for context in (once, into_grad, double):
        agree(net, context, x, close * (4 if context is double else 1))
    with net.request():
        loss(net(x)).backward()
    assert all(p.grad.dtype == p.dtype for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["siblings", "wrapped", "rows of siblings", "trained base"])
def test_autocast(kind: str, form: str) -> None:
    """float32 layers compute in bfloat16; float64 is not cast by autocast; siblings share the cast of x."""
    net = Net(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), net.request():
        y = net(inputs(6, dtype=torch.float32))
        assert y.dtype == torch.bfloat16
    x = inputs(60, dtype=torch.float32)
    ours, truth = sides(net, x)
    with torch.autocast("cpu", torch.bfloat16), net.request():
        y = ours()
        found = [y, *ours.grad(loss(y.float()))]
    assert worst(found, once(truth)) < CLOSE[torch.bfloat16]
    net = Net(kind)
    with net.request():
        want = net(inputs(6))
        with torch.autocast("cpu", torch.bfloat16):
            y = net(inputs(6))
    assert y.dtype == torch.float64 and torch.equal(y, want)  # which autocast does not cast


class Float32Base(nn.Linear):
    """A base layer that autocast does not cast, as bitsandbytes' layers are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_autocast_leaves_the_output_of_another_base() -> None:
    """A core that is zero changes nothing, not even the dtype."""
    layer = LoTRWrapped.from_linear(Float32Base(K, K), LoTRFactors(K, K, R))
    x = inputs(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))
    nn.init.normal_(layer.core)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), want)


def test_autocast_casts_a_changed_x_again(form: str) -> None:
    net, other = Net("siblings", torch.float32), Net("siblings", torch.float32)
    x = inputs(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.layers[0](x)
        x.mul_(2)
        assert torch.equal(net.layers[1](x), other.layers[1](x))
    assert y.requires_grad  # its graph keeps the first cast alive


def test_autocast_of_another_device_casts_nothing(form: str) -> None:
    net = Net("siblings", torch.float32)
    x = inputs(6, dtype=torch.float32)
    want = net(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(net(x), want)
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("core, B, scaling", [(1000, 50, 1e-3), (1000, 1e-2, 1000)])
def test_the_scaling_of_float16_does_not_overflow(core: float, B: float, scaling: float) -> None:
    """(u G) B^T is beyond float16 and its product with s is not; or s u G is, and y is not."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(5, K, generator=generator).half()
    A = torch.randn(K, R, generator=generator).half()
    B = B * torch.randn(K, R, generator=generator).half()
    core = core * torch.eye(R).half()
    W = torch.zeros(K, K).half()
    truth = scaling * x.double() @ A.double() @ core.double() @ B.double().T

    def call(x: Tensor) -> Tensor:
        return lotr_linear(x, W, None, A, B, core, scaling)

    assert relative(call(x), truth) < 6e-3
    assert relative(torch.vmap(call)(x.unsqueeze(1)).squeeze(1), truth) < 6e-3


def test_float16_does_not_overflow_where_the_result_does_not() -> None:
    """F = s B G^T is beyond float16, u F^T is not."""
    for tokens, kind in itertools.product((5, 200), ("linear", "wrapped", "rows")):
        net = Net(kind, torch.float16)
        with torch.no_grad():
            net.layers[0].factors.A.value.mul_(1e-3), net.layers[0].factors.B.value.mul_(3e3)
            for core in (*(layer.core for layer in net.layers), *(net.cores or ())):
                core.mul_(3e2)
            net.wire = KINDS["linear"][1]
            ours, truth = sides(net, inputs(tokens, dtype=torch.float16))
            assert relative(ours(), truth()) < 6e-3
            if kind != "rows":  # by torch's products
                assert (
                    relative(torch.vmap(net)(ours.x.detach().unsqueeze(1)).squeeze(1), truth())
                    < 6e-3
                )


@pytest.mark.parametrize("change", X_CHANGES)
@pytest.mark.parametrize("kind", ["siblings", "two Bs", "wrapped"])
@pytest.mark.parametrize("autocast", [False, True])
def test_x_changes(kind: str, change: str, autocast: bool, form: str) -> None:
    """A is frozen, because torch refuses to detach an x that a trained A needs."""

    def context(s: Side) -> Found:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return x_changes(s, change)

    dtype = torch.float32 if autocast else torch.float64
    net = Net(kind, dtype)
    net.layers[0].factors.A.value.requires_grad_(False)
    close = CLOSE[torch.bfloat16] if autocast else CLOSE[dtype]
    agree(net, context, inputs(60, dtype=dtype), close)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_core_changed_under_hooks_that_do_not_copy(create_graph: bool, form: str) -> None:
    """Autograd checks no versions under hooks. The gradient is that of the forward."""

    def run(s: Side) -> Found:
        cores = [t for name, t in s.leaves.items() if name.endswith("core")]
        with contextlib.nullcontext() if s.exact else save_on_cpu():
            y = s()
        if not s.exact:
            with torch.no_grad():
                [core.mul_(3) for core in cores]
        return s.grad(loss(y), create_graph=create_graph)

    net = Net("siblings")
    ours, truth = sides(net, inputs(6))
    want = run(truth)
    assert worst(run(ours), want) < 1e-10


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_uses_one_mask_forward_and_backward(form: str) -> None:
    layer = linear_with_dropout()
    check_masks(layer, layer)
    with torch.no_grad():
        x = inputs(6)
        assert not torch.equal(layer(x), layer(x))
        want = x @ layer.weight.T + x @ layer.delta_weight().T
        assert relative(layer.eval()(x), want) < 1e-12
        parts = (
            layer.weight,
            None,
            layer.factors.A.value,
            layer.factors.B.value,
            layer.core,
            SCALING,
        )
        assert relative(lotr_linear(x, *parts, dropout_p=0.5), want) < 1e-12
        assert relative(lotr_linear(x, *parts, dropout_p=0.5, training=True), want) > 0.1


def each_in_a_checkpoint(s: Side) -> Found:
    """Each layer in a reentrant checkpoint, after one was called without a graph."""
    with torch.no_grad():
        a = s.layer(1, s.x)
    y = s.net.wire(
        lambda i, h: checkpoint(partial(s.layer, i), h, use_reentrant=True), torch.tanh(s.x)
    )
    return [a, *backward_of(s, y)]


def with_full_backward_hooks(s: Side) -> Found:
    """The recomputation gives each layer another x, because hooks wrap it."""
    hooks = [layer.register_full_backward_hook(lambda *_: None) for layer in s.net.layers]
    found = checkpointed(s, use_reentrant=True)
    [hook.remove() for hook in hooks]
    return found


DROPOUT_CONTEXTS: dict[str, Callable[[Side], Found]] = {
    name: CONTEXTS[name]
    for name in (
        *("once", "into_grad", "interleaved", "twice_on_one_x", "double", "double_of_some"),
        *("without_graph", "no_grad_first", "checkpoint", "reentrant checkpoint", "save_on_cpu"),
        *("selective checkpoint", "selective checkpoint of all", "checkpoint in a selective one"),
        *("outputs_written_and_backwards_of_some", "recomputed_with_new_values"),
    )
} | {
    "each in a checkpoint": each_in_a_checkpoint,
    "full backward hooks": with_full_backward_hooks,
}
DROPOUT_KINDS = [
    pair for pair in FORMS if pair[0] not in ("function", "rows", "linear", "trained bias")
]


@pytest.mark.parametrize("context", DROPOUT_CONTEXTS)
@pytest.mark.parametrize("kind, form", DROPOUT_KINDS, indirect=["form"])
def test_dropout(kind: str, form: str, context: str) -> None:
    """Each call of a layer draws one seed from torch's generator, as nn.Dropout draws a mask."""
    agree(Net(kind, dropout=0.4), DROPOUT_CONTEXTS[context], inputs(6))


@pytest.mark.parametrize("kind", ["siblings", "wrapped", "rows of siblings"])
@pytest.mark.parametrize("context", ["checkpoint", "reentrant checkpoint", "each in a checkpoint"])
def test_dropout_under_autocast(kind: str, context: str, form: str) -> None:
    def run(s: Side) -> Found:
        with torch.autocast("cpu", torch.bfloat16):
            return DROPOUT_CONTEXTS[context](s)

    net = Net(kind, torch.float32, dropout=0.4)
    agree(net, run, inputs(60, dtype=torch.float32), CLOSE[torch.bfloat16])


def test_dropout_of_half_types(form: str) -> None:
    for dtype in HALVES:
        for kind in ("siblings", "wrapped"):
            net = Net(kind, dtype, dropout=0.4)
            agree(net, once, inputs(60, dtype=dtype), CLOSE[dtype])


# ---- dispatch modes ---------------------------------------------------------------------------------------------------


def test_a_flop_counter_counts_the_base_product(form: str) -> None:
    """It knows only PyTorch's operators. The nodes take apart what they compute for it."""
    net, x = Net("siblings"), inputs(6).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss(net(x)).backward()
    base_product = 2 * len(x) * K * K
    assert counter.get_total_flops() >= 2 * len(net.layers) * base_product


# ---- memory, errors, copies ------------------------------------------------------------------------------------------


def test_no_activation_outlives_its_graph(form: str) -> None:
    net = Net("siblings")
    h = torch.tanh(inputs(6))
    alive = weakref.ref(h)
    y = net.layers[0](h) * net.layers[1](h)
    y.sum().backward()
    del h, y
    gc.collect()
    assert alive() is None


def test_a_frozen_A_keeps_no_x(form: str) -> None:
    """dA is the only gradient that needs x; large inputs are most of a step's memory."""
    net = Net("siblings")
    net.layers[0].factors.A.value.requires_grad_(False)
    h = torch.tanh(inputs(6).requires_grad_()) * 1
    alive = weakref.ref(h)
    y = net.layers[0](h) + net.layers[1](h)
    del h
    gc.collect()
    assert alive() is None
    y.sum().backward()


def test_partial_backwards_leave_nothing(form: str) -> None:
    """A backward that asks for some gradients must not begin sums for nodes that it does not reach: nothing would end them."""

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    net, x = Net("siblings"), inputs(6).requires_grad_()
    y = net(x)
    wanted = [
        [x],
        [net.layers[0].core],
        [net.layers[0].factors.A.value],
        [net.layers[0].factors.B.value],
    ]
    counts = []
    for _ in range(3):
        for of in wanted:
            torch.autograd.grad(y.sum(), of, retain_graph=True)
        counts.append(tensors())
    assert counts[1] == counts[2]


def test_a_backward_of_float16_can_be_recorded_with_a_frozen_A(form: str) -> None:
    net = Net("siblings", torch.float16)
    net.layers[0].factors.A.value.requires_grad_(False)
    agree(net, double, inputs(60, dtype=torch.float16), 4 * CLOSE[torch.float16])


@pytest.mark.parametrize("kind", ["siblings", "trained base", "rows"])
def test_autograd_sees_one_gradient_a_factor(kind: str, form: str) -> None:
    """DistributedDataParallel reduces a parameter when its hook is called."""
    net, calls = Net(kind), []
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    loss(net(inputs(6))).backward()
    assert len(calls) == len(set(calls)) and sum("factors" in c for c in calls) == 2


@pytest.mark.parametrize("part", ["A", "B", "core"])
def test_a_backward_refuses_changed_values(part: str, form: str) -> None:
    """As torch: an error, and not a wrong gradient."""
    net = Net("siblings")
    layer = net.layers[0]
    y = net(inputs(6).requires_grad_())
    with torch.no_grad():
        (layer.core if part == "core" else getattr(layer.factors, part).value).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(y).backward()


def test_siblings_with_another_requires_grad_or_checkpoint_of_their_own(form: str) -> None:
    net = Net("siblings")

    def run(s: Side) -> Found:
        names = [n for n in s.values if n.endswith("A.value")]
        A = s.values[names[0]]
        call = [partial(s.layer, i) for i in range(4)]
        with torch.no_grad():
            call[3](s.x)
        a = call[0](s.x)
        A.requires_grad_(False)
        b = call[1](s.x)
        A.requires_grad_(True)
        c = checkpoint(call[2], s.x, use_reentrant=False)
        d, e = call[3](s.x), checkpoint(call[0], s.x, use_reentrant=False)
        return s.grad(loss(a * b * c + d * e))

    assert worst(*map(run, sides(net, inputs(6)))) < 1e-10


@pytest.mark.parametrize("changed", ["x", "A", "A.data", "A after a backward"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_siblings_around_a_change(changed: str, graph: bool, shared: None) -> None:
    """Between two siblings x or A changes: the second must not reuse u. A is frozen where torch would refuse the change."""

    def run(s: Side) -> Found:
        x = s.x.detach().clone()
        (A,) = (t for n, t in s.values.items() if n.endswith("A.value"))
        before = A.detach().clone()
        with torch.set_grad_enabled(graph):
            a = s.layer(0, x)
            if changed == "A.data":
                A.data = A.data * 2
            elif (
                changed == "A after a backward"
            ):  # by a fused optimizer, unseen by version counters
                done = s.grad(loss(a), list(s.leaves.values()), retain_graph=True) if graph else []
                A.detach().numpy()[...] *= 2 if done else 1
            else:
                with torch.no_grad():
                    (x if changed == "x" else A).mul_(2)
            b = s.layer(1, x)
        found = [a, b, *(s.grad(loss(a * b), list(s.leaves.values())) if graph else [])]
        A.data = before
        return found

    net = Net("siblings")
    net.layers[0].factors.A.value.requires_grad_(changed == "A after a backward")
    assert worst(*map(run, sides(net, inputs(6), trains_x=False))) < 1e-10


@pytest.mark.parametrize("change", ["core", "A", "B", "scaling", "core of one call"])
def test_new_values_between_siblings(change: str, form: str) -> None:
    """A model's forward may replace parameters, or the scaling, of a layer."""
    net = Net("siblings")
    layer = net.layers[1]
    x = inputs(6).requires_grad_()

    def formula(i: int, core: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        base = net.layers[i]
        return nnf.linear(x, base.weight, base.bias) + scaling * x @ A @ core @ B.T

    A, B = layer.factors.A.value, layer.factors.B.value
    values = {"core": layer.core, "A": A, "B": B, "scaling": SCALING}
    a = net.layers[0](x)
    want_a = formula(0, net.layers[0].core, A, B, SCALING)
    if change == "scaling":
        layer.scaling = values["scaling"] = 2.0
    elif change in ("A", "B"):
        factor = getattr(layer.factors, change)
        factor.value = values[change] = nn.Parameter(2 * factor.value.detach())
    else:
        values["core"] = nn.Parameter(2 * layer.core.detach())
    if change == "core of one call":
        b = torch.func.functional_call(layer, {"core": values["core"]}, (x,))
    else:
        if change == "core":
            layer.core = values["core"]
        b = layer(x)
    want_b = formula(1, **values)
    of = [x, A, B, *(value for value in values.values() if isinstance(value, Tensor))]
    ours = torch.autograd.grad(loss(a * b), of)
    assert worst(ours, torch.autograd.grad(loss(want_a * want_b), of)) < 1e-10


def test_many_small_gradients_of_half_precision_factors(shared: None) -> None:
    """A sum of equal bfloat16 numbers would stop growing at 256 of them."""
    net = Net("siblings", torch.bfloat16)
    A = net.layers[0].factors.A.value
    x = inputs(6, dtype=torch.bfloat16)

    def gradient(calls: int) -> Tensor:
        outputs = [net.layers[0](x * 1).double().sum() for _ in range(calls)]
        return torch.autograd.grad(torch.stack(outputs).sum(), A)[0].double()

    assert relative(gradient(1000), 1000 * gradient(1)) < 1e-2


def test_a_computed_factor_changes_in_place_between_siblings(shared: None) -> None:
    """Its next layers have another graph behind A."""

    def run(s: Side) -> Found:
        (name,) = (name for name in s.values if name.endswith("A.value"))
        leaf = s.values[name]
        A = 2 * leaf
        if s.exact:
            s.values[name] = A
        else:
            factor = s.net.layers[0].factors.A
            del factor.value
            factor.value = A
        a = s.layer(0, s.x)
        A.mul_(3)
        b = s.layer(1, s.x)
        return s.grad(loss(a + b), [leaf])

    ours, truth = sides(Net("siblings"), inputs(6), trains_x=False)
    want = run(truth)
    assert worst(run(ours), want) < 1e-10


@pytest.mark.parametrize("kind", ["linear", "siblings"])
def test_parametrized_factors_and_cores(kind: str, form: str) -> None:
    """torch.nn.utils.parametrize computes the value in each forward."""
    net = Net(kind)
    torch.nn.utils.parametrize.register_parametrization(net.layers[0], "core", nn.Tanh())
    torch.nn.utils.parametrize.register_parametrization(net.layers[0].factors.A, "value", nn.Tanh())
    layer, x = net.layers[0], inputs(6)
    raw = [layer.parametrizations.core.original, layer.factors.A.parametrizations.value.original]
    y = layer(x)
    want = (
        nnf.linear(x, layer.weight, layer.bias)
        + SCALING * x @ raw[1].tanh() @ raw[0].tanh() @ layer.factors.B.value.T
    )
    assert (
        worst(
            [y, *torch.autograd.grad(loss(y), raw)], [want, *torch.autograd.grad(loss(want), raw)]
        )
        < 1e-10
    )


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(way: str, form: str) -> None:
    """A copy computes the same and shares nothing, also when a graph of the original lives."""
    net, x = Net("siblings"), inputs(6)
    net.wire = KINDS["siblings"][1]
    y = net(x)
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(net))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(net, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        other = Net("siblings")
        with torch.no_grad():
            [p.zero_() for p in other.parameters()]
        other.load_state_dict(net.state_dict())
    loss(y).backward()
    mine = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    loss(other(x)).backward()
    assert relative(other(x), y) == 0 and all(p.grad is None for p in net.parameters())
    assert worst([p.grad for p in other.parameters() if p.grad is not None], mine.values()) < 1e-12


def test_siblings_on_one_x_in_two_threads(shared: None) -> None:
    """Each thread runs the backward of its layer, which frees what the layer's graph saved."""

    def run(s: Side) -> Found:
        a = s.layer(0, s.x)
        outputs = []
        thread = threading.Thread(target=lambda: outputs.append(s.layer(1, s.x)))
        thread.start()
        thread.join()
        return [*s.grad(loss(a)), *s.grad(loss(outputs[0]))]

    assert worst(*map(run, sides(Net("siblings"), inputs(6)))) < 1e-10


def test_two_threads_with_a_model_each() -> None:
    """The results have the same bits as in one thread."""
    nets, x = [Net("siblings") for _ in range(2)], inputs(6)

    def train(net: Net) -> None:
        for _ in range(10):
            loss(net(x)).backward()

    train(want := Net("siblings"))
    threads = [threading.Thread(target=train, args=(net,)) for net in nets]
    [t.start() for t in threads], [t.join() for t in threads]
    for net in nets:
        grads = zip(net.parameters(), want.parameters(), strict=True)
        assert all(a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in grads)


def test_the_output_for_one_dimension_may_be_written(form: str) -> None:
    def run(s: Side) -> Found:
        y = s.layer(0, s.x[0])
        y.mul_(0.5)
        return [y, *s.grad(loss(y))]

    assert worst(*map(run, sides(Net("siblings"), inputs(6)))) < 1e-10


def test_same_bits_again(form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for _ in range(2):
            net = Net("siblings", dtype)
            loss(net(inputs(300, dtype=dtype))).backward()
            runs.append([p.grad for p in net.parameters() if p.grad is not None])
        assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("trained_x", [False, True])
def test_parameters_can_be_swapped(trained_x: bool, form: str, swap_parameters: None) -> None:
    """Module.to and load_state_dict swap tensors, which needs parameters without weak references."""
    net, x = Net("siblings"), inputs(6)
    if trained_x:
        x = net.x = nn.Parameter(x)
    loss(net.layers[0](x) * net.layers[1](x)).backward()
    net.zero_grad()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    net.to(torch.float64)
    net.load_state_dict(state)
    agree(net, once, inputs(6))


@pytest.fixture
def swap_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_made_in_inference_mode(dtype: torch.dtype, form: str) -> None:
    with torch.inference_mode():
        net = Net("siblings", dtype)
    x = inputs(6, dtype=dtype)
    with torch.no_grad():
        ours, truth = sides(net, x, trains_x=False)
        assert relative(ours(), truth()) < CLOSE[dtype]
    net = Net("siblings", dtype)
    A = net.layers[0].factors.A
    torch.nn.utils.parametrize.register_parametrization(A, "value", nn.Tanh())
    with torch.inference_mode():
        y = net(x)
    assert torch.equal(y, net(x))


# ---- odd tensors -----------------------------------------------------------------------------------------------------


def test_marked_sparse_nested_and_subclassed_tensors(form: str) -> None:
    """Tensors that are not what their memory says."""
    net = Net("siblings", torch.float32)
    layer, dense = net.layers[0], inputs(6, dtype=torch.float32)

    def formula(x: Tensor) -> Tensor:
        A, B = layer.factors.A.value, layer.factors.B.value
        return nnf.linear(x, layer.weight, layer.bias) + SCALING * x @ A @ layer.core @ B.T

    negated = torch.complex(dense, dense).conj().imag
    assert negated.is_neg() and relative(layer(negated), formula(-dense)) < 1e-6
    assert relative(layer(dense.relu().to_sparse()), formula(dense.relu())) < 1e-6
    nested = layer(torch.nested.nested_tensor([dense[:1], dense[1:]], layout=torch.jagged))
    assert relative(nested.values(), formula(dense)) < 1e-6
    for g in (torch._neg_view(dense), torch._efficientzerotensor((6, K))):
        y, want = layer(dense), formula(dense)
        of = [layer.factors.A.value, layer.factors.B.value, layer.core]
        assert worst(torch.autograd.grad(y, of, g), torch.autograd.grad(want, of, g)) < 1e-5

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is nnf.linear:
                return func(args[0], 2 * args[1].as_subclass(Tensor), *args[2:])
            return super().__torch_function__(func, types, args, kwargs or {})

    class DoublesSums(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * result if func.__name__ in ("add", "__add__") else result

    class Base(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).as_subclass(DoublesSums)

    wrapped = LoTRWrapped.from_linear(Base(K, K), LoTRFactors(K, K, R))
    y = wrapped(dense)  # the base's output decides what a sum is
    assert type(y) is DoublesSums
    assert relative(y.as_subclass(Tensor), 2 * wrapped.base_layer(dense).as_subclass(Tensor)) == 0

    want = formula(dense) + nnf.linear(dense, layer.weight)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    assert relative(layer(dense).as_subclass(Tensor), want) < 1e-6  # the weight's own product


def test_a_weight_without_adapter_values_is_the_plain_layer() -> None:
    """Cores start at zero: the same output, and gradients of the cores that are not zero."""
    layer = LoTRLinear(K, K, 3, dtype=torch.float64)
    x = inputs(6)
    assert torch.equal(layer(x), nnf.linear(x, layer.weight, layer.bias))
    loss(layer(x)).backward()
    assert layer.core.grad.abs().max() > 0 and layer.weight.grad is None


# ---- tensors on several devices --------------------------------------------------------------------------------------


def test_meta_runs_without_values() -> None:
    """Shapes and dtypes alone; factors on meta are refused for a layer with values."""
    layer = LoTRLinear(K, 5, 3, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 4, K, device="meta", dtype=torch.bfloat16))
    assert y.shape == (2, 4, 5) and y.dtype == torch.bfloat16 and y.is_meta
    with pytest.raises(ValueError, match="expected values"):
        lotr_linear(inputs(2), torch.ones(5, K).double(), None, *(t.to("meta") for t in (torch.ones(K, 2), torch.ones(5, 2))),
                    torch.ones(2, 2), 1.0)  # fmt: skip
