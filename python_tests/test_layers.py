"""Tests of layers: kind of layer x form of its node x context.

A context takes a `Side` of `layers.py` and returns tensors: outputs and gradients. It runs on the
layers and on their truth, float64 autograd of the formula, and the two results must agree.
"""

import contextlib
import copy
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

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
    agree,
    inputs,
    loss,
    no_grad_first,
    once,
    sides,
    single,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped

Context = Callable[[Side], Results]

# ---- parts of contexts ---------------------------------------------------------------------------


def take_gradients(side: Side) -> Results:
    """Returns what `backward` accumulated, and clears it."""
    gradients = [tensor.grad for tensor in side.targets]
    for tensor in side.targets:
        tensor.grad = None
    return gradients


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
    # pytest.fail as an exception that nothing else raises. It is expected below.
    hook = last_core.register_hook(lambda _: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        side.grad(loss(y), retain_graph=True)
    hook.remove()
    return side.grad(loss(y))


def interleaved(side: Side) -> Results:
    """Runs two forwards on one x, and starts a third one between their backwards.

    The second forward may share u with a layer of the first one, as siblings do, and then needs
    its graph.
    """
    first = side()
    second = side()
    first_gradients = side.grad(loss(first), retain_graph=side.net.wire is again)
    return [*first_gradients, *side.grad(loss(second) + loss(side()))]


def double(side: Side) -> Results:
    """Differentiates all gradients again."""
    gradients = side.grad(loss(side()), create_graph=True)
    penalty = sum(loss(gradient) for gradient in gradients if gradient is not None)
    return [*gradients, *side.grad(penalty)]


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


def batched(side: Side) -> Results:
    """Differentiates by a batch of three gradients of the output."""
    y = side()
    dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return side.grad(y, grad_outputs=dy, is_grads_batched=True)


def strides_of_gradients(side: Side) -> Results:
    """Gives backward a transposed, an expanded, a strided gradient, and a part of a wider one."""
    y = side()
    weights = torch.linspace(-1, 1, y.numel(), dtype=side.x.dtype)
    transposed = (y.mT * weights.view(y.mT.shape)).sum()
    results = []
    wider = torch.cat([y, torch.ones_like(y)], -1)
    for each_loss in (transposed, y.sum(), y[..., 3].sum(), loss(y[::2]), loss(wider)):
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
    y = checkpoint(side, torch.tanh(side.x), use_reentrant=False)
    with torch.no_grad():
        for leaf in side.leaves.values():
            leaf.mul_(0.9)
    return side.grad(loss(y))


def hooked(side: Side, context: Callable[[], contextlib.AbstractContextManager]) -> Results:
    """Runs the forward inside of a context manager, the backward after it."""
    with context():
        y = side()
    return [y, *side.grad(loss(y))]


# ---- contexts: torch.func and forward mode -------------------------------------------------------


def functional_gradients(side: Side) -> Results:
    """Takes a batch, gradients, per-example gradients, jvp and jacrev with torch.func."""
    leaves = {name: leaf.detach() for name, leaf in side.leaves.items()}
    x = side.x.detach()
    gradient = torch.func.grad(lambda leaves, x: loss(side(x, leaves)))
    _, tangent = torch.func.jvp(side, (x,), (torch.cos(x),))
    jacobian = torch.func.jacrev(lambda x: side(x).sum(-1))(x)
    batch = torch.vmap(side)(torch.stack([x, 2 * x]))
    results = [batch, tangent, jacobian, *gradient(leaves, x).values()]
    if not side.net.kind.has_tasks:
        examples = x[:1].expand(3, 1, -1)
        results += torch.vmap(gradient, (None, 0))(leaves, examples).values()
    return results


def tangents(side: Side) -> Results:
    """Returns the tangents of the output and, for a gradient with a tangent, of the gradients."""
    x = side.x.detach()
    y = side()
    with forward_ad.dual_level():
        dual_y = side(forward_ad.make_dual(x, torch.cos(x)))
        dy = forward_ad.make_dual(torch.ones_like(y), torch.cos(y.detach()))
        duals = [dual_y, *side.grad(y, grad_outputs=dy)]
        return [None if dual is None else forward_ad.unpack_dual(dual).tangent for dual in duals]


# ---- contexts: threads and changes of values -----------------------------------------------------


def in_threads(side: Side) -> Results:
    """Trains one model in four threads at once."""
    barrier = threading.Barrier(4)

    def run(factor: int) -> None:
        barrier.wait()
        for _ in range(6):
            loss(side(side.x * factor)).backward()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, (1, 2, 3, 4)))
    sys.setswitchinterval(interval)
    return take_gradients(side)


def changed_between(side: Side) -> Results:
    """Changes leaves in place, then by `.data`, while an older graph lives."""
    y = side()
    first = side.grad(loss(y), retain_graph=True)
    with torch.no_grad():
        for leaf in side.leaves.values():
            leaf.mul_(1.1)
    second = side.grad(loss(side()))
    changed_output = side()
    for leaf in side.leaves.values():
        leaf.data = leaf.data * 0.9
    return [changed_output, *first, *second, *side.grad(loss(side()))]


def fused_steps(side: Side) -> Results:
    """Changes leaves as a fused optimizer does: version counters do not see it."""
    results = []
    for _ in range(3):
        gradients = side.grad(loss(side()))
        results += gradients
        for tensor, gradient in zip(side.targets, gradients, strict=True):
            if tensor is not side.x and gradient is not None:
                tensor.detach().numpy()[...] -= 1e-3 * gradient.numpy()
    return results


def outputs_written_and_backwards_of_some(side: Side) -> Results:
    """Writes into outputs, keeps gradients in hooks, and calls backward of some layers."""
    hook_gradients = []
    x = 2 * side.x
    x.register_hook(hook_gradients.append)
    net_output = side.net.wire(lambda i, h: side.net.call(i, h).mul_(2), x)
    layer_output = side.net.call(0, x)
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
    double,
    double_of_some,
    batched,
    strides_of_gradients,
    without_graph,
    no_grad_first,
    functional_gradients,
    tangents,
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


# These kinds run the same nodes in every form.
ALWAYS_SHARED = {
    "wrapped",
    "trained base",
    "trained bias",
    "rows",
    "rows of siblings",
    "rows, wrapped",
}
KINDS_AND_FORMS = [
    (kind, form)
    for kind, form in itertools.product(KINDS, ("few tokens", "folded", "shared"))
    if form == "shared" or kind not in ALWAYS_SHARED
]
each_form = pytest.mark.parametrize("kind, form", KINDS_AND_FORMS, indirect=["form"])


@pytest.mark.parametrize("context", CONTEXTS)
@each_form
def test_contexts(kind: str, context: str, form: str) -> None:
    close = 1e-6 if context == "in_threads" else CLOSE[torch.float64]
    agree(Net(kind), CONTEXTS[context], inputs(6), close)


# ---- trained parts, shapes -----------------------------------------------------------------------

# The ends of the names of a part's parameters.
PARTS = {"A": ("A.value",), "B": ("B.value",), "core": ("core",), "base": ("weight", "bias")}
TRAINED = [
    (parts, trains_x)
    for size in range(5)
    for parts in itertools.combinations(PARTS, size)
    for trains_x in (True, False)
    if parts or trains_x
]
PARTLY_TRAINED = [row for row in KINDS_AND_FORMS if row[0] in ("linear", "siblings", "wrapped")]


@pytest.mark.parametrize("trained, trains_x", TRAINED, ids=str)
@pytest.mark.parametrize("kind, form", PARTLY_TRAINED, indirect=["form"])
def test_trained_parts(kind: str, form: str, trained: tuple[str, ...], trains_x: bool) -> None:
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
NOT_OF_ROWS = ("one dimension", "four dimensions")  # tasks of rows need two or three
SHAPED = [
    (kind, form, shape)
    for kind, form in KINDS_AND_FORMS
    for shape in SHAPES
    if kind in ("linear", "siblings", "wrapped")
    or (kind in ("rows", "rows of siblings") and shape not in NOT_OF_ROWS)
]


@pytest.mark.parametrize("kind, form, shape", SHAPED, indirect=["form"])
def test_shapes(kind: str, shape: str, form: str) -> None:
    x = SHAPES[shape]()
    for context in (double, outputs_written_and_backwards_of_some):
        agree(Net(kind), context, x)
    if x.dim() > 1:
        agree(Net(kind), strides_of_gradients, x)


# ---- dtypes --------------------------------------------------------------------------------------

DTYPE_PAIRS = [
    *((dtype, dtype) for dtype in (torch.float32, *HALVES)),
    *((dtype, torch.float32) for dtype in (*HALVES, torch.float64)),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype, factors", DTYPE_PAIRS, ids=lambda t: str(t).removeprefix("torch."))
@each_form
def test_dtypes(kind: str, dtype: torch.dtype, factors: torch.dtype, form: str) -> None:
    """Runs an x of one dtype with an adapter of another."""
    net = Net(kind, dtype, factors)
    x = inputs(60, dtype=dtype)
    close = max(CLOSE[dtype], CLOSE[factors])
    agree(net, once, x, close)
    agree(net, into_grad, x, close)
    agree(net, double, x, 4 * close)


@pytest.mark.parametrize(
    "dtype, computed", [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str
)
@pytest.mark.parametrize("kind", ["siblings", "wrapped", "rows of siblings", "trained base"])
def test_autocast(kind: str, dtype: torch.dtype, computed: torch.dtype, form: str) -> None:
    """Computes float32 layers in bfloat16, where siblings share the cast of x.

    Autocast does not cast float64.
    """
    ours, truth = sides(Net(kind, dtype), inputs(60, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = once(ours)
    assert y.dtype == computed
    assert worst([y, *gradients], once(truth)) < CLOSE[computed]


class Float32Base(nn.Linear):
    """A base layer that autocast does not cast, like the layers of bitsandbytes."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_autocast_leaves_the_output_of_another_base() -> None:
    layer = LoTRWrapped.from_linear(Float32Base(K, K), LoTRFactors(K, K, R))
    nn.init.normal_(layer.core)
    x = inputs(6, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_siblings_share_the_cast_of_x_under_autocast() -> None:
    """Otherwise a graph would keep one copy of x per layer."""
    net = Net("siblings", torch.float32)
    x = inputs(6, dtype=torch.float32)
    save = mock.Mock(side_effect=lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(save, lambda tensor: tensor):
        outputs = [layer(x) for layer in net.layers]
    assert all(y.requires_grad for y in outputs)
    saved = [call.args[0] for call in save.call_args_list]
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


# What A, B and the cores are multiplied by, the scaling, and the gradient of the output.
FLOAT16 = {
    "(u G) B^T": (1, 200, 1000, 1e-3, 1),
    "s u G": (1, 1e-3, 1000, 1000, 1e-3),
    "u G": (8, 1, 1e4, 1e-3, 1),
    "s B G^T": (1e-3, 3e3, 300, SCALING, 1e-3),
}


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("kind", ["linear", "wrapped", "trained base", "rows"])
@pytest.mark.parametrize("product", FLOAT16)
def test_float16_does_not_overflow_where_the_result_does_not(
    product: str, kind: str, tokens: int
) -> None:
    """A product on the way to the output is beyond float16, also in the PyTorch fallback."""
    A, B, core, scaling, dy = FLOAT16[product]
    net = Net(kind, torch.float16)
    net.wire = single
    net.layers[0].scaling = scaling
    for part, factor in (("A", A), ("B", B), ("core", core)):
        net.parts(0)[part].data.mul_(factor)
    x = inputs(tokens, dtype=torch.float16)
    results = []
    for side in sides(net, x):
        y = side()
        y_of_fallback = torch.vmap(side)(side.x.detach().unsqueeze(1))
        gradients = side.grad(y, grad_outputs=dy * x.cos().to(y.dtype))
        results.append([y, y_of_fallback, *gradients])
    assert worst(*results) < 6e-3


# ---- changes of x, A and cores -------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "x joins a graph": lambda x, A: x.requires_grad_(),
    "x leaves its graph": lambda x, A: x.detach_(),
    "x becomes a leaf": lambda x, A: x.detach_().requires_grad_(),
    "x changes in place": lambda x, A: x.mul_(2),
    "x gets other data": lambda x, A: setattr(x, "data", 2 * x.data),
    "A changes in place": lambda x, A: A.detach().mul_(2),
    "A gets other data": lambda x, A: setattr(A, "data", 2 * A.data),
}


def changes_between_layers(side: Side, change: str, mode: str) -> Results:
    """Changes x or A between the calls of two layers on x."""
    grad_mode = torch.set_grad_enabled(mode != "no graph")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode.startswith("autocast")), grad_mode:
        is_constant = change == "x joins a graph" or change.startswith("A")
        x = side.x.detach().clone() if is_constant else 2 * side.x
        first = side.net.call(0, x)
        CHANGES[change](x, side.net.parts(0)["A"])
        results = [first, side.net.call(1, x)]
        if mode in ("graph", "autocast"):
            targets = [*side.targets, x] if x.requires_grad else side.targets
            results += side.grad(loss(first * results[1]), targets)
        return results


# The node of a single layer saves A, and its backward refuses a changed one.
CHANGED = [
    (kind, form, change)
    for kind, form in KINDS_AND_FORMS
    for change in CHANGES
    if kind in ("siblings", "two Bs", "wrapped") and (form == "shared" or change.startswith("x"))
]


@pytest.mark.parametrize("kind, form, change", CHANGED, indirect=["form"])
@pytest.mark.parametrize("mode", ["graph", "no graph", "autocast", "autocast of a trained A"])
def test_changes_between_layers(kind: str, change: str, mode: str, form: str) -> None:
    """Freezes A, because torch refuses to detach an x that a trained A needs in a backward."""
    is_cast = mode.startswith("autocast")
    dtype = torch.float32 if is_cast else torch.float64
    net = Net(kind, dtype)
    net.layers[0].factors.A.value.requires_grad_(mode == "autocast of a trained A")
    close = CLOSE[torch.bfloat16 if is_cast else dtype]
    context = partial(changes_between_layers, change=change, mode=mode)
    agree(net, context, inputs(60, dtype=dtype), close)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_core_changed_under_hooks_that_do_not_copy(create_graph: bool, form: str) -> None:
    """Autograd checks no versions under hooks. The gradient belongs to the forward's values."""
    ours, truth = sides(Net("siblings"), inputs(6))
    expected = truth.grad(loss(truth()), create_graph=create_graph)
    with save_on_cpu():
        y = ours()
    for i in range(len(ours.net.layers)):
        ours.net.parts(i)["core"].detach().mul_(3)
    assert worst(ours.grad(loss(y), create_graph=create_graph), expected) < 1e-10


# ---- dropout -------------------------------------------------------------------------------------


def in_eval_mode(side: Side) -> Results:
    side.net.eval()
    return once(side)


def each_in_a_checkpoint(side: Side) -> Results:
    """Runs each layer in a reentrant checkpoint, after one layer was called without a graph."""
    with torch.no_grad():
        layer_output = side.net.call(-1, side.x)

    def call(i: int, x: Tensor) -> Tensor:
        return checkpoint(partial(side.net.call, i), x, use_reentrant=True)

    return [layer_output, *backward_of(side, side.net.wire(call, torch.tanh(side.x)))]


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
    "in eval mode": in_eval_mode,
    "each in a checkpoint": each_in_a_checkpoint,
    "full backward hooks": with_full_backward_hooks,
}


@pytest.mark.parametrize("context", DROPOUT_CONTEXTS)
@each_form
def test_dropout(kind: str, form: str, context: str) -> None:
    """Each call of a layer draws one seed from torch's generator, as nn.Dropout draws a mask."""
    agree(Net(kind, dropout=0.4), DROPOUT_CONTEXTS[context], inputs(6))


@pytest.mark.parametrize("kind", ["siblings", "wrapped", "rows of siblings"])
@pytest.mark.parametrize("context", ["checkpoint", "reentrant checkpoint", "each in a checkpoint"])
def test_dropout_under_autocast(kind: str, context: str, form: str) -> None:
    net = Net(kind, torch.float32, dropout=0.4)
    x = inputs(60, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        agree(net, DROPOUT_CONTEXTS[context], x, CLOSE[torch.bfloat16])


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


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained A", "frozen A"])
def test_an_input_is_kept_for_its_backward_only(is_frozen: bool, form: str) -> None:
    """Only dA needs x, and large inputs are most of a step's memory."""
    net = Net("siblings")
    net.layers[0].factors.A.value.requires_grad_(not is_frozen)
    h = torch.tanh(inputs(6).requires_grad_(is_frozen)) * 1
    h_ref = weakref.ref(h)
    y = net.layers[0](h) * net.layers[1](h)
    if not is_frozen:
        y.sum().backward()
    del h
    gc.collect()
    assert h_ref() is None


def test_partial_backwards_leave_no_tensors(form: str) -> None:
    """A backward for some gradients starts no sums for nodes that it does not reach.

    Nothing would end these sums.
    """
    side = Side(Net("siblings"), inputs(6))
    y = side()
    counts = []
    for _ in range(3):
        for target in side.targets:
            side.grad(y.sum(), [target], retain_graph=True)
        gc.collect()
        counts.append(sum(isinstance(item, Tensor) for item in gc.get_objects()))
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
    hooks = {name: mock.Mock(return_value=None) for name in Side(net, inputs(6)).leaves}
    for name, hook in hooks.items():
        net.get_parameter(name).register_post_accumulate_grad_hook(hook)
    loss(net(inputs(6))).backward()
    assert max(hook.call_count for hook in hooks.values()) == 1
    assert all(hook.called for name, hook in hooks.items() if "factors" in name)


@pytest.mark.parametrize("form", ["shared"], indirect=True)
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_many_small_gradients_of_half_precision_factors(is_checkpointed: bool, form: str) -> None:
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

    expected = [1000 * gradient.double() for gradient in gradients(1)]
    assert worst(gradients(1000), expected) < 1e-2


# ---- changes between forward and backward, and between siblings ----------------------------------


@pytest.mark.parametrize("part", ["A", "B", "core"])
def test_a_backward_refuses_changed_values(part: str, form: str) -> None:
    """A backward raises an error, as in torch, instead of returning a wrong gradient."""
    side = Side(Net("siblings"), inputs(6))
    y = side()
    with torch.no_grad():
        side.net.parts(0)[part].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        side.grad(loss(y))


def different_requires_grad_and_checkpoints(side: Side) -> Results:
    """Calls siblings with A trained, frozen and trained again, in checkpoints and outside of them.

    A sibling must not get the u of a call that was made in another way.
    """
    A = side.net.parts(0)["A"]
    q, k, v, o = (partial(side.net.call, i) for i in range(4))
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


def a_fused_step_between(side: Side) -> Results:
    """Changes A after a backward as a fused optimizer does: version counters do not see it."""
    x = side.x.detach()
    first = side.net.call(0, x)
    side.grad(loss(first), list(side.leaves.values()), retain_graph=True)
    side.net.parts(0)["A"].detach().numpy()[...] *= 2
    second = side.net.call(1, x)
    return [second, *side.grad(loss(first * second), list(side.leaves.values()))]


def a_fused_step_between_evaluations(side: Side) -> Results:
    """The second evaluation starts with the x with which the first one ends."""
    with torch.no_grad():
        first = [side.net.call(i, x) for i, x in ((0, side.x), (0, 2 * side.x), (1, side.x))]
        side.net.parts(0)["A"].detach().numpy()[...] *= 2
        return [*first, side.net.call(0, side.x)]


def a_computed_factor_changes(side: Side) -> Results:
    """The layers after the change have another graph that leads to A."""
    leaf = side.net.parts(0)["A"]
    A = 2 * leaf
    side.replace(0, "A", A)
    x = side.x.detach()
    first = side.net.call(0, x)
    A.mul_(3)
    return side.grad(loss(first + side.net.call(1, x)), [leaf])


def one_x_in_two_threads(side: Side) -> Results:
    """Each thread runs the backward of its layer, which frees what the layer's graph saved."""
    first = side.net.call(0, side.x)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(side.net.call, 1, side.x).result()
    return [*side.grad(loss(first)), *side.grad(loss(second))]


SIBLINGS = (
    different_requires_grad_and_checkpoints,
    a_fused_step_between,
    a_fused_step_between_evaluations,
    one_x_in_two_threads,
)


@pytest.mark.parametrize("context", SIBLINGS, ids=lambda context: context.__name__)
def test_siblings(context: Context, form: str) -> None:
    agree(Net("siblings"), context, inputs(6))


@pytest.mark.parametrize("form", ["shared"], indirect=True)
def test_a_computed_factor_changes_in_place_between_siblings(form: str) -> None:
    agree(Net("siblings"), a_computed_factor_changes, inputs(6))


@pytest.mark.parametrize("part", ["core", "A", "B"])
def test_new_parameters_between_siblings(part: str, form: str) -> None:
    """A model's forward may replace parameters of a layer."""

    def run(side: Side) -> Results:
        first = side.net.call(0, side.x)
        new = nn.Parameter(2 * side.net.parts(1)[part].detach())
        targets = [*side.targets, new]
        side.replace(1, part, new)
        return side.grad(loss(first * side.net.call(1, side.x)), targets)

    agree(Net("siblings"), run, inputs(6))


@pytest.mark.parametrize("kind", ["linear", "siblings"])
def test_parametrized_factors_and_cores(kind: str, form: str) -> None:
    """torch.nn.utils.parametrize computes the value in each forward."""
    results = []
    for side in sides(Net(kind), inputs(6)):
        layer = side.net.layers[0]
        torch.nn.utils.parametrize.register_parametrization(layer, "core", nn.Tanh())
        torch.nn.utils.parametrize.register_parametrization(layer.factors.A, "value", nn.Tanh())
        results.append([*without_graph(side), *once(side)])
    assert worst(*results) < 1e-10


# ---- conversions ---------------------------------------------------------------------------------


@pytest.fixture
def swap_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("trained_x", [False, True])
def test_parameters_can_be_swapped(trained_x: bool, form: str, swap_parameters: None) -> None:
    """Module.to and load_state_dict swap tensors, which no weak reference may point to."""
    net = Net("siblings")
    net.x = nn.Parameter(inputs(6))
    x = net.x if trained_x else inputs(6)
    loss(net.layers[0](x) * net.layers[1](x)).backward()
    net.zero_grad()
    state = copy.deepcopy(net.state_dict())
    net.to(torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    net.to(torch.float64)
    net.load_state_dict(state)
    agree(net, once, inputs(6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_made_in_inference_mode(dtype: torch.dtype, form: str) -> None:
    with torch.inference_mode():
        net = Net("siblings", dtype)
    agree(net, without_graph, inputs(6, dtype=dtype), CLOSE[dtype], trains_x=False)


# ---- unusual tensors -----------------------------------------------------------------------------


class Doubled(Tensor):
    """A tensor that doubles each linear product and each sum that it takes part in."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func.__name__ in ("linear", "add", "__add__") else result


@pytest.mark.parametrize("kind", ["linear", "wrapped"])
def test_subclassed_weights(kind: str, form: str) -> None:
    """The class of the weight, or of the base's output, decides what a product and a sum are."""
    ours, truth = sides(Net(kind), inputs(6), trains_x=False)
    for side in (ours, truth):
        doubled = side.net.parts(0)["weight"].detach().as_subclass(Doubled)
        side.replace(0, "weight", nn.Parameter(doubled, requires_grad=False))
    y = ours()
    assert type(y) is Doubled
    assert relative(y, truth()) < 1e-10


def test_marked_sparse_and_nested_tensors(form: str) -> None:
    """Runs tensors with values that are not the ones in their memory."""
    x = inputs(6)
    ours, truth = sides(Net("siblings"), x, trains_x=False)
    layer = ours.net.layers[0]
    formula = partial(truth.net.call, 0)
    negated = torch.complex(x, x).conj().imag
    nested = torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged)
    assert relative(layer(negated), formula(-x)) < 1e-10
    assert relative(layer(x.relu().to_sparse()), formula(x.relu())) < 1e-10
    assert relative(layer(nested).values(), formula(x)) < 1e-10
    for dy in (torch._neg_view(x), torch._efficientzerotensor(x.shape, dtype=x.dtype)):
        gradients = ours.grad(layer(x), grad_outputs=dy)
        assert worst(gradients, truth.grad(formula(x), grad_outputs=dy)) < 1e-10


def test_meta_runs_without_values() -> None:
    layer = LoTRLinear(K, 5, 3, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 4, K, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 5), torch.bfloat16, "meta")
