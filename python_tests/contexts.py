"""What a test does with a net: forwards, backwards, checkpoints, threads, changes of values.

A context takes a `Side` of layers.py and returns tensors: outputs and gradients. `layers.agree`
runs it on a net and on its truth, float64 autograd of the formula, and compares what it returns:

    agree(Net("siblings"), double, inputs(6))

The tables at the end have a name for each context. test_layers.py runs them.
"""

import contextlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from layers import Results, Side, again, loss
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Context = Callable[[Side], Results]

# ---- parts of contexts ---------------------------------------------------------------------------


def take_gradients(side: Side) -> Results:
    """Returns the gradients that `backward` accumulated, and clears them."""
    gradients = [tensor.grad for tensor in side.targets]
    for tensor in side.targets:
        tensor.grad = None
    return gradients


def backward_of(side: Side, y: Tensor) -> Results:
    """Differentiates by `backward`, because reentrant checkpoints refuse `autograd.grad`."""
    loss(y).backward()
    return [y, *take_gradients(side)]


# ---- forwards and backwards ----------------------------------------------------------------------


def once(side: Side) -> Results:
    y = side()
    return [y, *side.grad(loss(y))]


def no_grad_first(side: Side) -> Results:
    with torch.no_grad():
        y = side()
    return [y, *side.grad(loss(side()))]


def in_eval_mode(side: Side) -> Results:
    side.net.eval()
    return once(side)


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
    # pytest.fail raises an exception that no other code raises.
    hook = last_core.register_hook(lambda _: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        side.grad(loss(y), retain_graph=True)
    hook.remove()
    return side.grad(loss(y))


def interleaved(side: Side) -> Results:
    """Runs two forwards on one x, and starts a third one between their backwards."""
    first = side()
    second = side()
    # In `again`, layers read x itself. The second forward may then reuse u = x A of a layer of the
    # first one, and its backward needs the graph of that u.
    first_gradients = side.grad(loss(first), retain_graph=side.net.wire is again)
    return [*first_gradients, *side.grad(loss(second) + loss(side()))]


def double(side: Side) -> Results:
    """Differentiates all gradients again."""
    gradients = side.grad(loss(side()), create_graph=True)
    penalty = sum(loss(gradient) for gradient in gradients if gradient is not None)
    return [*gradients, *side.grad(penalty)]


def double_of_some(side: Side) -> Results:
    """Takes each gradient in a backward for it, and differentiates it.

    Through x, u = x A depends on the B and cores of earlier layers. The gradient of the same B in a
    later layer must not follow that path.
    """
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
    """Makes autograd pass gradients of all kinds of strides to the layers' backward."""
    y = side()
    weights = torch.linspace(-1, 1, y.numel(), dtype=side.x.dtype)
    losses = {
        "transposed": (y.mT * weights.view(y.mT.shape)).sum(),
        "expanded": y.sum(),
        "one column": y[..., 3].sum(),
        "every other row": loss(y[::2]),
        "part of a wider one": loss(torch.cat([y, torch.ones_like(y)], -1)),
    }
    results = []
    for each_loss in losses.values():
        results += side.grad(each_loss, retain_graph=True)
    return results


# ---- checkpoints and hooks -----------------------------------------------------------------------


def checkpointed(side: Side, **settings: object) -> Results:
    """Multiplies a checkpointed output with one that is not checkpointed."""
    y = checkpoint(side, torch.tanh(side.x), **settings) * side()
    if settings["use_reentrant"]:
        return backward_of(side, y)
    return [y, *side.grad(loss(y))]


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


def save_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    is_product = any(name in str(op) for name in ("mm", "lotr::", "linear"))
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Callable[..., CheckpointPolicy]) -> Context:
    """Returns a context with a checkpoint that keeps the results that a policy names."""
    context_fn = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpointed, use_reentrant=False, context_fn=context_fn)


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


def hooked(side: Side, manager: Callable[[], contextlib.AbstractContextManager]) -> Results:
    """Runs the forward inside of a context manager, the backward after it."""
    with manager():
        y = side()
    return [y, *side.grad(loss(y))]


# ---- torch.func and forward mode -----------------------------------------------------------------


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


# ---- threads and changes of values ---------------------------------------------------------------


def in_threads(side: Side) -> Results:
    """Trains one model in four threads at once."""
    barrier = threading.Barrier(4)

    def run(factor: int) -> None:
        barrier.wait()
        for _ in range(6):
            loss(side(side.x * factor)).backward()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds; 5e-3 is the default
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, (1, 2, 3, 4)))
    finally:
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
    """Changes leaves as a fused optimizer does: their version counters stay as they are."""
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


# ---- siblings on one x ---------------------------------------------------------------------------


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
    """Changes A after a backward as a fused optimizer does: its version counter stays as it is."""
    x = side.x.detach()
    first = side.net.call(0, x)
    side.grad(loss(first), list(side.leaves.values()), retain_graph=True)
    side.net.parts(0)["A"].detach().numpy()[...] *= 2
    second = side.net.call(1, x)
    return [second, *side.grad(loss(first * second), list(side.leaves.values()))]


def a_fused_step_between_evaluations(side: Side) -> Results:
    """Changes A between two evaluations. The second starts on the x on which the first one ends."""
    with torch.no_grad():
        first = [side.net.call(i, x) for i, x in ((0, side.x), (0, 2 * side.x), (1, side.x))]
        side.net.parts(0)["A"].detach().numpy()[...] *= 2
        return [*first, side.net.call(0, side.x)]


def a_computed_factor_changes(side: Side) -> Results:
    """Changes an A that is computed. The layers after the change reach A by another graph."""
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


# ---- the tables ----------------------------------------------------------------------------------

NAMED_BY_FUNCTION = (
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
    **{function.__name__: function for function in NAMED_BY_FUNCTION},
    "checkpoint": partial(checkpointed, use_reentrant=False),
    "reentrant checkpoint": partial(checkpointed, use_reentrant=True),
    "selective checkpoint": selective(save_products),
    "selective checkpoint of all": selective(lambda *_, **__: CheckpointPolicy.MUST_SAVE),
    "selective checkpoint of nothing": selective(
        lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    ),
    "checkpoint in a selective one": nested_checkpoints,
    "save_on_cpu": partial(hooked, manager=save_on_cpu),
    "saved-tensor hooks": partial(
        hooked, manager=lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    ),
    "hooks without weak references": partial(
        hooked, manager=lambda: saved_tensors_hooks(Tensor.clone, Tensor.clone)
    ),
}
ALSO_WITH_DROPOUT = (
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
    **{name: CONTEXTS[name] for name in ALSO_WITH_DROPOUT},
    "in eval mode": in_eval_mode,
    "each in a checkpoint": each_in_a_checkpoint,
    "full backward hooks": with_full_backward_hooks,
}
# These call layers 0 to 3 of a net of siblings.
SIBLING_CONTEXTS = (
    different_requires_grad_and_checkpoints,
    a_fused_step_between,
    a_fused_step_between_evaluations,
    one_x_in_two_threads,
)
