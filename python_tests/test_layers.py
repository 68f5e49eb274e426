"""Tests of layers: kind of layer x form of its node x context.

A context takes a `Side` of `layers.py` and returns tensors: outputs and gradients. It runs on the
layers and on their truth, float64 autograd of the formula, and the two results must agree.
"""

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
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import CLOSE, HALVES, relative, worst
from layers import (
    KINDS,
    SCALING,
    K,
    Net,
    R,
    Results,
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

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped, lotr_grouped_linear, lotr_linear

Context = Callable[[Side], Results]

# ---- parts of contexts ---------------------------------------------------------------------------


def take_gradients(side: Side) -> Results:
    """Returns what `backward` accumulated, and clears it."""
    gradients = [tensor.grad for tensor in side.targets]
    for tensor in side.targets:
        tensor.grad = None
    return gradients


def copy_leaves(side: Side) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in side.leaves.items()}


def restore_leaves(side: Side, values: dict[str, Tensor]) -> None:
    for name, leaf in side.leaves.items():
        leaf.data = values[name]


def penalty(gradients: Results) -> Tensor:
    """Returns the sum of the losses of all gradients that exist."""
    return sum(loss(gradient) for gradient in gradients if gradient is not None)


def backward_of(side: Side, y: Tensor) -> Results:
    """Differentiates by `backward`, because reentrant checkpoints refuse `autograd.grad`."""
    loss(y).backward()
    return [y, *take_gradients(side)]


# ---- contexts: backwards -------------------------------------------------------------------------


def into_grad(side: Side) -> Results:
    """Calls backward three times: twice through one graph, once through another."""
    y = side()
    loss(y).backward(retain_graph=True)
    loss(y).backward()
    loss(side(2 * side.x)).backward()
    return take_gradients(side)


def partial_then_full(side: Side) -> Results:
    """Takes each gradient in a backward for it, then all gradients in one backward."""
    y = side()
    results = []
    for tensor in side.targets:
        results += side.grad(y.sum(), [tensor], retain_graph=True)
    return [*results, *side.grad(loss(y))]


def failed_then_again(side: Side) -> Results:
    """Raises in a hook in the middle of a backward.

    The sums of the failed backward must not count in the next one.
    """
    y = side()
    last_core = [leaf for name, leaf in side.leaves.items() if "core" in name][-1]
    hook = last_core.register_hook(lambda _: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        side.grad(loss(y), retain_graph=True)
    hook.remove()
    return side.grad(loss(y))


def interleaved(side: Side) -> Results:
    """Starts a third forward between the backwards of the first and the second."""
    first = side()
    second = side(2 * side.x)
    first_gradients = side.grad(loss(first))
    third = side()
    return [*first_gradients, *side.grad(loss(second) + loss(third))]


def twice_on_one_x(side: Side) -> Results:
    """Runs two forwards on one x, then both backwards.

    The second forward may share u with a layer of the first one, as siblings do, and then needs
    its graph.
    """
    first = side()
    second = side()
    first_gradients = side.grad(loss(first), retain_graph=side.net.wire is again)
    return [*first_gradients, *side.grad(loss(second))]


def double(side: Side) -> Results:
    """Differentiates all gradients again."""
    gradients = side.grad(loss(side()), create_graph=True)
    return [*gradients, *side.grad(penalty(gradients))]


def double_of_some(side: Side) -> Results:
    """Differentiates each gradient separately: du must not follow u back into the cores."""
    results = []
    y = side()
    for tensor in side.targets:
        (gradient,) = side.grad(loss(y), [tensor], create_graph=True)
        results.append(gradient)
        if gradient is not None and gradient.requires_grad:
            results += side.grad(loss(gradient), retain_graph=True)
    return results


def penalty_plus_loss(side: Side) -> Results:
    gradients = side.grad(side().sum(), create_graph=True)
    return side.grad(penalty(gradients) + loss(side()))


def batched(side: Side) -> Results:
    """Differentiates by a batch of three gradients of the output."""
    y = side()
    dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return side.grad(y, grad_outputs=dy, is_grads_batched=True)


def strides_of_gradients(side: Side) -> Results:
    """Gives backward a transposed, an expanded, a narrow and a strided gradient."""
    y = side()
    weights = torch.linspace(-1, 1, side().numel(), dtype=side.x.dtype)
    transposed = (y.mT * weights.view(y.mT.shape)).sum()
    results = []
    for each_loss in (transposed, y.sum(), y[..., 3].sum(), loss(y[::2])):
        results += side.grad(each_loss, retain_graph=True)
    return results


def without_graph(side: Side) -> Results:
    """Runs forwards under no_grad and inference_mode, where x also changes between two calls."""
    with torch.no_grad():
        y = side()
    with torch.inference_mode():
        x = side.x * 1
        before = side(x)
        x.mul_(2)
        after = side(x)
    return [y, before.clone(), after.clone()]


# ---- contexts: checkpoints and hooks -------------------------------------------------------------


def checkpointed(side: Side, **settings: object) -> Results:
    """Multiplies a checkpointed output with one that is not checkpointed."""
    y = checkpoint(side, torch.tanh(side.x), **settings) * side()
    if settings["use_reentrant"]:
        return backward_of(side, y)
    return [y, *side.grad(loss(y))]


def save_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    is_product = any(name in str(op) for name in ("mm", "lotr::", "linear"))
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Callable[..., CheckpointPolicy]) -> Context:
    """Returns a checkpoint that keeps the results that a policy names."""
    context = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpointed, use_reentrant=False, context_fn=context)


def nested_checkpoints(side: Side) -> Results:
    """Recomputes a checkpoint in a checkpoint.

    The inner recomputation runs without the outer checkpoint's dispatch mode.
    """
    keep_products = partial(create_selective_checkpoint_contexts, save_products)
    inner = partial(checkpoint, side, use_reentrant=False)
    y = checkpoint(inner, torch.tanh(side.x), use_reentrant=False, context_fn=keep_products)
    return [y, *side.grad(loss(y))]


def recomputed_with_new_values(side: Side) -> Results:
    """Takes an optimizer step before the recomputation, which then uses the new values."""
    start = copy_leaves(side)
    y = checkpoint(side, torch.tanh(side.x), use_reentrant=False)
    with torch.no_grad():
        for leaf in side.leaves.values():
            leaf.mul_(0.9)
    gradients = side.grad(loss(y))
    restore_leaves(side, start)
    return gradients


def hooked(side: Side, context: Callable[[], contextlib.AbstractContextManager]) -> Results:
    """Runs the forward inside of a context manager, the backward after it."""
    with context():
        y = side()
    return [y, *side.grad(loss(y))]


# ---- contexts: torch.func and forward mode -------------------------------------------------------


def vmapped(side: Side) -> Results:
    return [torch.vmap(side)(torch.stack([side.x.detach(), 2 * side.x.detach()]))]


def functional_gradients(side: Side) -> Results:
    """Takes gradients, per-example gradients, jvp and jacrev with torch.func."""
    leaves = {name: leaf.detach() for name, leaf in side.leaves.items()}
    x = side.x.detach()
    gradient = torch.func.grad(lambda leaves, x: loss(side(x, leaves)))
    _, tangent = torch.func.jvp(side, (x,), (torch.cos(x),))
    jacobian = torch.func.jacrev(lambda x: side(x).sum(-1))(x)
    results = [tangent, jacobian, *gradient(leaves, x).values()]
    if not side.net.rows:
        examples = x[:1].expand(3, 1, -1)
        results += torch.vmap(gradient, (None, 0))(leaves, examples).values()
    return results


def dual_numbers(side: Side) -> Results:
    """Returns the tangent of the output for a tangent of x."""
    x = side.x.detach()
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(side(forward_ad.make_dual(x, torch.cos(x)))).tangent]


def gradient_with_a_tangent(side: Side) -> Results:
    """Returns the tangents of the gradients. Backward is linear in the gradient of the output."""
    y = side()
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.cos(y.detach()))
        duals = side.grad(y, grad_outputs=dy)
        return [None if dual is None else forward_ad.unpack_dual(dual).tangent for dual in duals]


# ---- contexts: threads and changes of values -----------------------------------------------------


def in_threads(side: Side) -> Results:
    """Trains one model in four threads at once."""
    barrier = threading.Barrier(4)

    def run(factor: int) -> None:
        barrier.wait()
        with side.net.request():
            for _ in range(6):
                loss(side(side.x * factor)).backward()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, (1, 2, 3, 4)))
    sys.setswitchinterval(interval)
    return take_gradients(side)


def changed_between(side: Side) -> Results:
    """Changes leaves in place, then by `.data`, then x, while an older graph lives."""
    start = copy_leaves(side)
    y = side()
    first = side.grad(loss(y), retain_graph=True)
    with torch.no_grad():
        for leaf in side.leaves.values():
            leaf.mul_(1.1)
    second = side.grad(loss(side()))
    changed_output = side()
    for leaf in side.leaves.values():
        leaf.data = leaf.data * 0.9
    third = side.grad(loss(side()))

    x = (side.x * 1).detach()
    constant = side(x).detach()
    x.mul_(2)
    fourth = side.grad(loss(constant + side(x)), list(side.leaves.values()))
    restore_leaves(side, start)
    return [changed_output, *first, *second, *third, *fourth]


def fused_steps(side: Side) -> Results:
    """Changes leaves as a fused optimizer does: version counters do not see it."""
    start = copy_leaves(side)
    results = []
    for _ in range(3):
        gradients = side.grad(loss(side()))
        results += gradients
        for tensor, gradient in zip(side.targets, gradients, strict=True):
            if tensor is not side.x and gradient is not None:
                tensor.detach().numpy()[...] -= 1e-3 * gradient.numpy()
    restore_leaves(side, start)
    return results


def outputs_written_and_backwards_of_some(side: Side) -> Results:
    """Writes into outputs, keeps gradients in hooks, and calls backward of some layers."""
    if side.net.kind in ("rows", "function"):  # called by themselves, the layers have no tasks
        return once(side)
    hook_gradients = []
    x = 2 * side.x
    x.register_hook(hook_gradients.append)
    net_output = side.net.wire(lambda i, h: side.layer(i, h).mul_(2), x)
    layer_output = side.layer(0, x)
    net_gradients = side.grad(loss(net_output), retain_graph=True)
    layer_gradients = side.grad(loss(layer_output))
    return [*net_gradients, *layer_gradients, *hook_gradients]


# ---- the product of kinds, forms and contexts ----------------------------------------------------

CONTEXT_FUNCTIONS = (
    once,
    into_grad,
    partial_then_full,
    failed_then_again,
    interleaved,
    twice_on_one_x,
    double,
    double_of_some,
    penalty_plus_loss,
    batched,
    strides_of_gradients,
    without_graph,
    no_grad_first,
    vmapped,
    functional_gradients,
    dual_numbers,
    gradient_with_a_tangent,
    in_threads,
    changed_between,
    fused_steps,
    outputs_written_and_backwards_of_some,
    recomputed_with_new_values,
)
CONTEXTS: dict[str, Context] = {
    **{function.__name__: function for function in CONTEXT_FUNCTIONS},
    "checkpoint": partial(checkpointed, use_reentrant=False),
    "reentrant checkpoint": partial(checkpointed, use_reentrant=True),
    "selective checkpoint": selective(save_products),
    "selective checkpoint of all": selective(lambda *_, **__: CheckpointPolicy.MUST_SAVE),
    "selective checkpoint of nothing": selective(
        lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    ),
    "checkpoint in a selective one": nested_checkpoints,
    "save_on_cpu": partial(hooked, context=save_on_cpu),
    "saved-tensor hooks": partial(
        hooked, context=lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    ),
    "hooks without weak references": partial(
        hooked, context=lambda: saved_tensors_hooks(Tensor.clone, Tensor.clone)
    ),
}


def agree(
    net: Net,
    context: Context,
    x: Tensor,
    close: float = CLOSE[torch.float64],
    trains_x: bool = True,
) -> None:
    """Checks that a context returns the same for the net and for its truth.

    Args:
        net: the network.
        context: what runs on both sides.
        x: the input of the network.
        close: the bound of the relative error of each result.
        trains_x: whether x requires a gradient.
    """
    results = []
    for side in sides(net, x, trains_x):
        torch.manual_seed(0)
        with net.request():
            results.append(context(side))
    error = worst(*results)
    assert error < close, f"{error:.1e}"


# These kinds run the same nodes in every form.
ALWAYS_SHARED = {
    "wrapped",
    "trained base",
    "trained bias",
    "rows",
    "rows of siblings",
    "rows, wrapped",
}
FORMS = [
    (kind, form)
    for kind, form in itertools.product(KINDS, ("few tokens", "folded", "shared"))
    if form == "shared" or kind not in ALWAYS_SHARED
]
each_form = pytest.mark.parametrize("kind, form", FORMS, indirect=["form"])


@pytest.mark.parametrize("context", CONTEXTS)
@each_form
def test_contexts(kind: str, context: str, form: str) -> None:
    close = 1e-6 if context == "in_threads" else CLOSE[torch.float64]
    agree(Net(kind), CONTEXTS[context], inputs(6), close)


# ---- trained parts, shapes -----------------------------------------------------------------------

# The ends of the names of a part's parameters.
PARTS = {"A": ("A.value",), "B": ("B.value",), "core": ("core",), "base": ("weight", "bias")}
SUBSETS = [set(parts) for size in range(5) for parts in itertools.combinations(PARTS, size)]
PARTLY_TRAINED = [row for row in FORMS if row[0] in ("linear", "siblings", "wrapped")]


@pytest.mark.parametrize("trains_x", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize("trained", SUBSETS, ids=lambda parts: " ".join(sorted(parts)) or "nothing")
@pytest.mark.parametrize("kind, form", PARTLY_TRAINED, indirect=["form"])
def test_trained_parts(kind: str, form: str, trained: set[str], trains_x: bool) -> None:
    if not trained and not trains_x:
        return
    net = Net(kind)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(any(name.endswith(PARTS[part]) for part in trained))
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
    for context in (once, double) if x.dim() < 2 else (once, double, strides_of_gradients):
        agree(Net(kind), context, x)


# ---- dtypes --------------------------------------------------------------------------------------

DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, *HALVES)),
    *((dtype, torch.float32) for dtype in (*HALVES, torch.float64)),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype, factors", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@each_form
def test_dtypes(kind: str, dtype: torch.dtype, factors: torch.dtype, form: str) -> None:
    """Runs an x of one dtype with an adapter of another. Gradients have their parameter's dtype."""
    net = Net(kind, dtype, factors)
    x = inputs(60, dtype=dtype)
    close = max(CLOSE[dtype], CLOSE[factors])
    agree(net, once, x, close)
    agree(net, into_grad, x, close)
    agree(net, double, x, 4 * close)
    with net.request():
        loss(net(x)).backward()
    for parameter in net.parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("kind", ["siblings", "wrapped", "rows of siblings", "trained base"])
def test_autocast(kind: str, form: str) -> None:
    """Computes float32 layers in bfloat16, where siblings share the cast of x.

    Autocast does not cast float64.
    """
    net = Net(kind, torch.float32)
    ours, truth = sides(net, inputs(60, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16), net.request():
        y = ours()
        assert y.dtype == torch.bfloat16
        results = [y, *ours.grad(loss(y.float()))]
    assert worst(results, once(truth)) < CLOSE[torch.bfloat16]

    net = Net(kind)
    with net.request():
        expected = net(inputs(6))
        with torch.autocast("cpu", torch.bfloat16):
            y = net(inputs(6))
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


class Float32Base(nn.Linear):
    """A base layer that autocast does not cast, like the layers of bitsandbytes."""

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
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_autocast_casts_a_changed_x_again(form: str) -> None:
    net = Net("siblings", torch.float32)
    other = Net("siblings", torch.float32)
    x = inputs(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.layers[0](x)
        x.mul_(2)
        assert torch.equal(net.layers[1](x), other.layers[1](x))
    assert y.requires_grad  # its graph keeps the first cast alive


def test_siblings_share_the_cast_of_x_under_autocast() -> None:
    """Otherwise a graph would keep one copy of x per layer."""
    net = Net("siblings", torch.float32)
    x = inputs(6, dtype=torch.float32)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(save, lambda tensor: tensor):
        outputs = [layer(x) for layer in net.layers]
    assert all(y.requires_grad for y in outputs)
    casts = [t for t in saved if t.dtype == torch.bfloat16 and t.shape == x.shape]
    assert len({cast.data_ptr() for cast in casts}) == 1


def test_autocast_of_another_device_casts_nothing(form: str) -> None:
    net = Net("siblings", torch.float32)
    x = inputs(6, dtype=torch.float32)
    expected = net(x)
    torch.set_autocast_enabled("cuda", True)
    actual = net(x)
    torch.set_autocast_enabled("cuda", False)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["linear", "trained base", "rows", "experts"])
@pytest.mark.parametrize(
    "core, B, scaling", [(1000, 200, 1e-3), (1000, 1e-3, 1000), (6e4, 1, 1e-3)]
)
def test_the_scaling_of_float16_does_not_overflow(
    kind: str, core: float, B: float, scaling: float
) -> None:
    """Scales where float16 holds y, but not each product on the way.

    In the first row (u G) B^T is beyond float16, and its product with s is not. In the second row
    s u G is beyond float16, and in the third one u G.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, K, generator=generator).half()
    A = torch.randn(K, R, generator=generator).half()
    large_B = B * torch.randn(K, R, generator=generator).half()
    G = core * torch.eye(R).half()
    W = torch.zeros(K, K).half().requires_grad_(kind == "trained base")
    exact = [t.double().requires_grad_() for t in (x, A, G, large_B)]
    truth = scaling * exact[0] @ exact[1] @ exact[2] @ exact[3].T

    def call(x: Tensor, A: Tensor, G: Tensor, B: Tensor) -> Tensor:
        if kind == "rows":
            index = torch.zeros(len(x), dtype=torch.int64)
            return lotr_linear(x, W, None, A, B, G.unsqueeze(0), scaling, core_index=index)
        if kind == "experts":
            offs = torch.tensor([len(x)], dtype=torch.int32)
            cores = G.unsqueeze(0)
            return lotr_grouped_linear(x, W.unsqueeze(0), offs, A, B, cores, scaling)
        return lotr_linear(x, W, None, A, B, G, scaling)

    leaves = [t.requires_grad_() for t in (x, A, G, large_B)]
    y = call(*leaves)
    assert relative(y, truth) < 6e-3
    g = min(1, 1 / scaling) * torch.randn(y.shape, generator=generator).half()
    gradients = torch.autograd.grad(y, leaves, g)
    assert worst(gradients, torch.autograd.grad(truth, exact, g.double())) < 6e-3

    def call_of_row(row: Tensor) -> Tensor:  # the PyTorch fallback
        return call(row.unsqueeze(0), A, G, large_B)

    assert relative(torch.vmap(call_of_row)(x).squeeze(1), truth) < 6e-3


def test_float16_does_not_overflow_where_the_result_does_not() -> None:
    """F = s B G^T is beyond float16, u F^T is not."""
    for tokens, kind in itertools.product((5, 200), ("linear", "wrapped", "rows")):
        net = Net(kind, torch.float16)
        net.wire = KINDS["linear"][1]
        with torch.no_grad():
            net.layers[0].factors.A.value.mul_(1e-3)
            net.layers[0].factors.B.value.mul_(3e3)
            for core in (*(layer.core for layer in net.layers), *(net.cores or ())):
                core.mul_(3e2)
            ours, truth = sides(net, inputs(tokens, dtype=torch.float16))
            assert relative(ours(), truth()) < 6e-3
            if kind == "rows":
                continue
            y = torch.vmap(net)(ours.x.detach().unsqueeze(1)).squeeze(1)  # the PyTorch fallback
            assert relative(y, truth()) < 6e-3


# ---- changes of x and cores ----------------------------------------------------------------------

X_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "joins a graph": Tensor.requires_grad_,
    "leaves its graph": Tensor.detach_,
    "becomes a leaf": lambda x: x.detach_().requires_grad_(),
    "changes in place": lambda x: x.mul_(2),
    "gets other data": lambda x: setattr(x, "data", 2 * x.data),
}


def x_changes(side: Side, change: str, autocast: bool) -> Results:
    """Changes x between the calls of two layers on it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = side.x.detach().clone() if change == "joins a graph" else 2 * side.x
        first = side.layer(0, x)
        X_CHANGES[change](x)
        second = side.layer(1, x)
        targets = [*side.targets, x] if x.requires_grad else side.targets
        return [first, second, *side.grad(loss(first * second), targets)]


@pytest.mark.parametrize("change", X_CHANGES)
@pytest.mark.parametrize("kind", ["siblings", "two Bs", "wrapped"])
@pytest.mark.parametrize("autocast", [False, True])
def test_x_changes(kind: str, change: str, autocast: bool, form: str) -> None:
    """Freezes A, because torch refuses to detach an x that a trained A needs."""
    dtype = torch.float32 if autocast else torch.float64
    net = Net(kind, dtype)
    net.layers[0].factors.A.value.requires_grad_(False)
    context = partial(x_changes, change=change, autocast=autocast)
    agree(net, context, inputs(60, dtype=dtype), CLOSE[torch.bfloat16 if autocast else dtype])


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_core_changed_under_hooks_that_do_not_copy(create_graph: bool, form: str) -> None:
    """Autograd checks no versions under hooks. The gradient belongs to the forward's values."""
    ours, truth = sides(Net("siblings"), inputs(6))
    expected = truth.grad(loss(truth()), create_graph=create_graph)
    with save_on_cpu():
        y = ours()
    with torch.no_grad():
        for name, leaf in ours.leaves.items():
            if name.endswith("core"):
                leaf.mul_(3)
    assert worst(ours.grad(loss(y), create_graph=create_graph), expected) < 1e-10


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_uses_one_mask_forward_and_backward(form: str) -> None:
    layer = linear_with_dropout()
    check_masks(layer, layer)
    with torch.no_grad():
        x = inputs(6)
        assert not torch.equal(layer(x), layer(x))
        expected = x @ layer.weight.T + x @ layer.delta_weight().T
        assert relative(layer.eval()(x), expected) < 1e-12
        parts = (layer.factors.A.value, layer.factors.B.value, layer.core)
        call = partial(lotr_linear, x, layer.weight, None, *parts, SCALING, dropout_p=0.5)
        assert relative(call(), expected) < 1e-12
        assert relative(call(training=True), expected) > 0.1


def each_in_a_checkpoint(side: Side) -> Results:
    """Runs each layer in a reentrant checkpoint, after one layer was called without a graph."""
    with torch.no_grad():
        layer_output = side.layer(1, side.x)

    def call(i: int, x: Tensor) -> Tensor:
        return checkpoint(partial(side.layer, i), x, use_reentrant=True)

    y = side.net.wire(call, torch.tanh(side.x))
    return [layer_output, *backward_of(side, y)]


def with_full_backward_hooks(side: Side) -> Results:
    """Wraps x by hooks, so that the recomputation gives each layer another x."""
    hooks = [layer.register_full_backward_hook(lambda *_: None) for layer in side.net.layers]
    results = checkpointed(side, use_reentrant=True)
    for hook in hooks:
        hook.remove()
    return results


SAME_WITH_DROPOUT = (
    "once",
    "into_grad",
    "interleaved",
    "twice_on_one_x",
    "double",
    "double_of_some",
    "without_graph",
    "no_grad_first",
    "checkpoint",
    "reentrant checkpoint",
    "save_on_cpu",
    "selective checkpoint",
    "selective checkpoint of all",
    "checkpoint in a selective one",
    "outputs_written_and_backwards_of_some",
    "recomputed_with_new_values",
)
DROPOUT_CONTEXTS: dict[str, Context] = {
    **{name: CONTEXTS[name] for name in SAME_WITH_DROPOUT},
    "each in a checkpoint": each_in_a_checkpoint,
    "full backward hooks": with_full_backward_hooks,
}
NOT_WITH_DROPOUT = ("function", "rows", "linear", "trained bias")
DROPOUT_FORMS = [(kind, form) for kind, form in FORMS if kind not in NOT_WITH_DROPOUT]


@pytest.mark.parametrize("context", DROPOUT_CONTEXTS)
@pytest.mark.parametrize("kind, form", DROPOUT_FORMS, indirect=["form"])
def test_dropout(kind: str, form: str, context: str) -> None:
    """Each call of a layer draws one seed from torch's generator, as nn.Dropout draws a mask."""
    agree(Net(kind, dropout=0.4), DROPOUT_CONTEXTS[context], inputs(6))


@pytest.mark.parametrize("kind", ["siblings", "wrapped", "rows of siblings"])
@pytest.mark.parametrize("context", ["checkpoint", "reentrant checkpoint", "each in a checkpoint"])
def test_dropout_under_autocast(kind: str, context: str, form: str) -> None:
    def run(side: Side) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return DROPOUT_CONTEXTS[context](side)

    net = Net(kind, torch.float32, dropout=0.4)
    agree(net, run, inputs(60, dtype=torch.float32), CLOSE[torch.bfloat16])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["siblings", "wrapped"])
def test_dropout_of_half_types(kind: str, dtype: torch.dtype, form: str) -> None:
    agree(Net(kind, dtype, dropout=0.4), once, inputs(60, dtype=dtype), CLOSE[dtype])


# ---- dispatch modes ------------------------------------------------------------------------------


def test_a_flop_counter_counts_the_base_product(form: str) -> None:
    """A flop counter counts only PyTorch's operators, so the nodes decompose under it."""
    net = Net("siblings")
    with FlopCounterMode(display=False) as counter:
        loss(net(inputs(6).requires_grad_())).backward()
    base_product = 2 * 6 * K * K
    assert counter.get_total_flops() >= 2 * len(net.layers) * base_product


# ---- memory --------------------------------------------------------------------------------------


def test_no_activation_outlives_its_graph(form: str) -> None:
    net = Net("siblings")
    h = torch.tanh(inputs(6))
    h_ref = weakref.ref(h)
    y = net.layers[0](h) * net.layers[1](h)
    y.sum().backward()
    del h, y
    gc.collect()
    assert h_ref() is None


def test_a_frozen_A_keeps_no_x(form: str) -> None:
    """Only dA needs x, and large inputs are most of a step's memory."""
    net = Net("siblings")
    net.layers[0].factors.A.value.requires_grad_(False)
    h = torch.tanh(inputs(6).requires_grad_()) * 1
    h_ref = weakref.ref(h)
    y = net.layers[0](h) + net.layers[1](h)
    del h
    gc.collect()
    assert h_ref() is None
    y.sum().backward()


def test_partial_backwards_leave_no_tensors(form: str) -> None:
    """A backward for some gradients starts no sums for nodes that it does not reach.

    Nothing would end these sums.
    """

    def count_tensors() -> int:
        gc.collect()
        return sum(isinstance(item, Tensor) for item in gc.get_objects())

    net = Net("siblings")
    x = inputs(6).requires_grad_()
    y = net(x)
    layer = net.layers[0]
    targets = [x, layer.core, layer.factors.A.value, layer.factors.B.value]
    counts = []
    for _ in range(3):
        for target in targets:
            torch.autograd.grad(y.sum(), [target], retain_graph=True)
        counts.append(count_tensors())
    assert counts[1] == counts[2]


# ---- gradients of shared factors -----------------------------------------------------------------


def test_a_backward_of_float16_can_be_recorded_with_a_frozen_A(form: str) -> None:
    net = Net("siblings", torch.float16)
    net.layers[0].factors.A.value.requires_grad_(False)
    agree(net, double, inputs(60, dtype=torch.float16), 4 * CLOSE[torch.float16])


@pytest.mark.parametrize("kind", ["siblings", "trained base", "rows"])
def test_autograd_sees_one_gradient_per_factor(kind: str, form: str) -> None:
    """DistributedDataParallel reduces a parameter when its hook is called."""
    net = Net(kind)
    calls = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    loss(net(inputs(6))).backward()
    assert len(calls) == len(set(calls))
    assert sum("factors" in name for name in calls) == 2


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_many_small_gradients_of_half_precision_factors(
    is_checkpointed: bool, shared: None
) -> None:
    """A sum of equal bfloat16 numbers would stop growing at 256 of them.

    The tensors that a checkpoint recomputes have another graph, but there is still one sum.
    """
    net = Net("siblings", torch.bfloat16)
    factors = net.layers[0].factors
    x = inputs(6, dtype=torch.bfloat16)

    def output() -> Tensor:
        if is_checkpointed:
            return checkpoint(net.layers[0], x * 1, use_reentrant=False)
        return net.layers[0](x * 1)

    def gradients(calls: int) -> tuple[Tensor, ...]:
        total = torch.stack([output().double().sum() for _ in range(calls)]).sum()
        return torch.autograd.grad(total, [factors.A.value, factors.B.value])

    for total, single in zip(gradients(1000), gradients(1), strict=True):
        assert relative(total.double(), 1000 * single.double()) < 1e-2


# ---- changes between forward and backward, and between siblings ----------------------------------


def name_of_A(side: Side) -> str:
    """Returns the name of the A that all layers share."""
    (name,) = (name for name in side.values if name.endswith("A.value"))
    return name


@pytest.mark.parametrize("part", ["A", "B", "core"])
def test_a_backward_refuses_changed_values(part: str, form: str) -> None:
    """A backward raises an error, as in torch, instead of returning a wrong gradient."""
    net = Net("siblings")
    layer = net.layers[0]
    y = net(inputs(6).requires_grad_())
    changed = layer.core if part == "core" else getattr(layer.factors, part).value
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(y).backward()


def test_siblings_with_different_requires_grad_or_checkpoints(form: str) -> None:
    def run(side: Side) -> Results:
        A = side.values[name_of_A(side)]
        q, k, v, o = (partial(side.layer, i) for i in range(4))
        with torch.no_grad():
            o(side.x)
        trained_A = q(side.x)
        A.requires_grad_(False)
        frozen_A = k(side.x)
        A.requires_grad_(True)
        in_checkpoint = checkpoint(v, side.x, use_reentrant=False)
        plain = o(side.x)
        in_other_checkpoint = checkpoint(q, side.x, use_reentrant=False)
        y = trained_A * frozen_A * in_checkpoint + plain * in_other_checkpoint
        return side.grad(loss(y))

    agree(Net("siblings"), run, inputs(6))


@pytest.mark.parametrize("changed", ["x", "A", "A.data", "A after a backward"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_siblings_around_a_change(changed: str, graph: bool, shared: None) -> None:
    """Changes x or A between two siblings: the second must not reuse u.

    A is frozen where torch would refuse the change.
    """

    def change(side: Side, x: Tensor, A: Tensor, y: Tensor) -> None:
        if changed == "A.data":
            A.data = A.data * 2
        elif changed == "A after a backward":
            if graph:
                side.grad(loss(y), list(side.leaves.values()), retain_graph=True)
                A.detach().numpy()[...] *= 2  # as a fused optimizer, unseen by version counters
        else:
            tensor = x if changed == "x" else A
            with torch.no_grad():
                tensor.mul_(2)

    def run(side: Side) -> Results:
        x = side.x.detach().clone()
        A = side.values[name_of_A(side)]
        start = A.detach().clone()
        with torch.set_grad_enabled(graph):
            first = side.layer(0, x)
            change(side, x, A, first)
            second = side.layer(1, x)
        results = [first, second]
        if graph:
            results += side.grad(loss(first * second), list(side.leaves.values()))
        A.data = start
        return results

    net = Net("siblings")
    net.layers[0].factors.A.value.requires_grad_(changed == "A after a backward")
    agree(net, run, inputs(6), trains_x=False)


@pytest.mark.parametrize("change", ["core", "A", "B", "scaling", "core of one call"])
def test_new_values_between_siblings(change: str, form: str) -> None:
    """A model's forward may replace parameters, or the scaling, of a layer."""
    net = Net("siblings")
    layer = net.layers[1]
    x = inputs(6).requires_grad_()

    def formula(i: int, core: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        base = net.layers[i]
        return nnf.linear(x, base.weight, base.bias) + scaling * x @ A @ core @ B.T

    A = layer.factors.A.value
    B = layer.factors.B.value
    values = {"core": layer.core, "A": A, "B": B, "scaling": SCALING}
    first = net.layers[0](x)
    expected_first = formula(0, net.layers[0].core, A, B, SCALING)

    part = change.removesuffix(" of one call")
    values[part] = 2.0 if part == "scaling" else nn.Parameter(2 * values[part].detach())
    if part in ("A", "B"):
        getattr(layer.factors, part).value = values[part]
    elif part == change:
        setattr(layer, part, values[part])
    replaced = {} if part == change else {part: values[part]}
    second = torch.func.functional_call(layer, replaced, (x,))
    expected_second = formula(1, **values)

    targets = [x, A, B, values["A"], values["B"], values["core"]]
    ours = torch.autograd.grad(loss(first * second), targets)
    expected = torch.autograd.grad(loss(expected_first * expected_second), targets)
    assert worst(ours, expected) < 1e-10


def test_a_computed_factor_changes_in_place_between_siblings(shared: None) -> None:
    """The layers after the change have another graph that leads to A."""

    def run(side: Side) -> Results:
        name = name_of_A(side)
        leaf = side.values[name]
        A = 2 * leaf
        if side.exact:
            side.values[name] = A
        else:
            factor = side.net.layers[0].factors.A
            del factor.value
            factor.value = A
        first = side.layer(0, side.x)
        A.mul_(3)
        second = side.layer(1, side.x)
        return side.grad(loss(first + second), [leaf])

    ours, truth = sides(Net("siblings"), inputs(6), trains_x=False)
    expected = run(truth)
    assert worst(run(ours), expected) < 1e-10


@pytest.mark.parametrize("kind", ["linear", "siblings"])
def test_parametrized_factors_and_cores(kind: str, form: str) -> None:
    """torch.nn.utils.parametrize computes the value in each forward."""
    net = Net(kind)
    layer = net.layers[0]
    factor = layer.factors.A
    torch.nn.utils.parametrize.register_parametrization(layer, "core", nn.Tanh())
    torch.nn.utils.parametrize.register_parametrization(factor, "value", nn.Tanh())
    core = layer.parametrizations.core.original
    A = factor.parametrizations.value.original
    x = inputs(6)
    y = layer(x)
    ours = [y, *torch.autograd.grad(loss(y), [core, A])]
    delta = SCALING * x @ A.tanh() @ core.tanh() @ layer.factors.B.value.T
    truth = nnf.linear(x, layer.weight, layer.bias) + delta
    expected = [truth, *torch.autograd.grad(loss(truth), [core, A])]
    assert worst(ours, expected) < 1e-10


def test_the_output_for_one_dimension_may_be_written(form: str) -> None:
    def run(side: Side) -> Results:
        y = side.layer(0, side.x[0])
        y.mul_(0.5)
        return [y, *side.grad(loss(y))]

    agree(Net("siblings"), run, inputs(6))


# ---- copies, threads, repeated runs --------------------------------------------------------------


def saved_and_loaded(net: Net) -> Net:
    file = io.BytesIO()
    torch.save(net, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def loaded_from_state_dict(net: Net) -> Net:
    other = Net("siblings")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(net.state_dict())
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved_and_loaded,
    "state_dict": loaded_from_state_dict,
}


def present_gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("way", COPIES)
def test_copies(way: str, form: str) -> None:
    """A copy computes the same and shares nothing, also while a graph of the original lives."""
    net = Net("siblings")
    x = inputs(6)
    y = net(x)
    other = COPIES[way](net)
    loss(y).backward()
    expected = present_gradients(net)
    net.zero_grad()
    loss(other(x)).backward()
    assert relative(other(x), y) == 0
    assert not present_gradients(net)
    assert worst(present_gradients(other), expected) < 1e-12


def test_siblings_on_one_x_in_two_threads(shared: None) -> None:
    """Each thread runs the backward of its layer, which frees what the layer's graph saved."""

    def run(side: Side) -> Results:
        first = side.layer(0, side.x)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(side.layer, 1, side.x).result()
        return [*side.grad(loss(first)), *side.grad(loss(second))]

    agree(Net("siblings"), run, inputs(6))


def test_two_threads_with_a_model_each() -> None:
    """The results have the same bits as in one thread."""
    nets = [Net("siblings") for _ in range(2)]
    x = inputs(6)

    def train(net: Net) -> None:
        for _ in range(10):
            loss(net(x)).backward()

    reference_net = Net("siblings")
    train(reference_net)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, nets))
    for net in nets:
        assert worst(present_gradients(net), present_gradients(reference_net)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_has_the_same_bits(dtype: torch.dtype, form: str) -> None:
    first, second = (
        once(Side(Net("siblings", dtype), inputs(300, dtype=dtype), False)) for _ in "12"
    )
    assert worst(first, second) == 0


@pytest.fixture
def swap_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("trained_x", [False, True])
def test_parameters_can_be_swapped(trained_x: bool, form: str, swap_parameters: None) -> None:
    """Module.to and load_state_dict swap tensors, which no weak reference may point to."""
    net = Net("siblings")
    x = inputs(6)
    if trained_x:
        x = nn.Parameter(x)
        net.x = x
    loss(net.layers[0](x) * net.layers[1](x)).backward()
    net.zero_grad()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.to(torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    net.to(torch.float64)
    net.load_state_dict(state)
    agree(net, once, inputs(6))


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


# ---- unusual tensors -----------------------------------------------------------------------------


class DoublesWeights(Tensor):
    """A weight that counts twice in a linear product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nnf.linear:
            return func(args[0], 2 * args[1].as_subclass(Tensor), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


class DoublesSums(Tensor):
    """A tensor that doubles each sum it takes part in."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func.__name__ in ("add", "__add__") else result


class BaseThatDoublesSums(nn.Linear):
    """A base layer that returns a subclass of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).as_subclass(DoublesSums)


def test_marked_sparse_nested_and_subclassed_tensors(form: str) -> None:
    """Runs tensors with values that are not the ones in their memory."""
    net = Net("siblings", torch.float32)
    layer = net.layers[0]
    dense = inputs(6, dtype=torch.float32)

    A = layer.factors.A.value
    B = layer.factors.B.value

    def formula(x: Tensor) -> Tensor:
        return nnf.linear(x, layer.weight, layer.bias) + SCALING * x @ A @ layer.core @ B.T

    negated = torch.complex(dense, dense).conj().imag
    assert negated.is_neg()
    assert relative(layer(negated), formula(-dense)) < 1e-6
    assert relative(layer(dense.relu().to_sparse()), formula(dense.relu())) < 1e-6
    nested = layer(torch.nested.nested_tensor([dense[:1], dense[1:]], layout=torch.jagged))
    assert relative(nested.values(), formula(dense)) < 1e-6

    for dy in (torch._neg_view(dense), torch._efficientzerotensor((6, K))):
        ours = torch.autograd.grad(layer(dense), (A, B, layer.core), dy)
        expected = torch.autograd.grad(formula(dense), (A, B, layer.core), dy)
        assert worst(ours, expected) < 1e-5

    wrapped = LoTRWrapped.from_linear(BaseThatDoublesSums(K, K), LoTRFactors(K, K, R))
    y = wrapped(dense)  # the type of the base's output decides what a sum is
    assert type(y) is DoublesSums
    assert relative(y.as_subclass(Tensor), 2 * wrapped.base_layer(dense).as_subclass(Tensor)) == 0

    # A product with the weight follows the weight's class.
    expected = formula(dense) + nnf.linear(dense, layer.weight)
    doubled = layer.weight.detach().as_subclass(DoublesWeights)
    layer.weight = nn.Parameter(doubled, requires_grad=False)
    assert relative(layer(dense).as_subclass(Tensor), expected) < 1e-6


def test_meta_runs_without_values() -> None:
    layer = LoTRLinear(K, 5, 3, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 4, K, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 5), torch.bfloat16, "meta")
