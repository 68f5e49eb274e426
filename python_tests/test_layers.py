"""Layers in all their forms, against float64 autograd of the formula.

The first test has most of them: kind of net (layers.KINDS) x form of its nodes (conftest.form) x
context (contexts.CONTEXTS). The tests after it vary one more thing each: what is trained, shapes,
dtypes, autocast, values that change, dropout, siblings on one x, unusual tensors.
"""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from contexts import (
    CONTEXTS,
    DROPOUT_CONTEXTS,
    SIBLING_CONTEXTS,
    Context,
    a_computed_factor_changes,
    double,
    into_grad,
    once,
    outputs_written_and_backwards_of_some,
    strides_of_gradients,
    without_graph,
)
from helpers import CLOSE, HALVES, relative, worst
from layers import KINDS, SCALING, K, Net, R, Results, Side, agree, inputs, loss, sides, single
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped

# ---- kinds x forms x contexts --------------------------------------------------------------------

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
    agree(Net(kind), CONTEXTS[context], inputs(6))


# ---- what is trained -----------------------------------------------------------------------------

# By part, the ends of the names of its parameters.
PARTS = {"A": ("A.value",), "B": ("B.value",), "core": ("core",), "base": ("weight", "bias")}
# (the trained parts, whether x requires a gradient): all combinations in which something does.
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


# ---- shapes --------------------------------------------------------------------------------------

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
NOT_OF_ROWS = ("one dimension", "four dimensions")  # tasks of rows need an x of two or three
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


# ---- dtypes and autocast -------------------------------------------------------------------------

# (of x and the base, of the adapter)
NET_DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, *HALVES)),
    *((dtype, torch.float32) for dtype in (*HALVES, torch.float64)),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype, factors", NET_DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@each_form
def test_dtypes(kind: str, dtype: torch.dtype, factors: torch.dtype, form: str) -> None:
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
    try:
        assert torch.equal(net(x), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)


# ---- the range of float16 ------------------------------------------------------------------------

# In each row only the product in the key exceeds 65,504, the largest float16. A, B and core: what
# the layer's random parts are multiplied by. dy: the size of the output's gradient.
BEYOND_FLOAT16 = {
    "(u G) B^T": {"A": 1, "B": 200, "core": 1000, "scaling": 1e-3, "dy": 1},
    "s u G": {"A": 1, "B": 1e-3, "core": 1000, "scaling": 1000, "dy": 1e-3},
    "u G": {"A": 8, "B": 1, "core": 1e4, "scaling": 1e-3, "dy": 1},
    "s B G^T": {"A": 1e-3, "B": 3e3, "core": 300, "scaling": SCALING, "dy": 1e-3},
}


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("kind", ["linear", "wrapped", "trained base", "rows"])
@pytest.mark.parametrize("sizes", BEYOND_FLOAT16.values(), ids=BEYOND_FLOAT16)
def test_float16_does_not_overflow_where_the_result_does_not(
    sizes: dict[str, float], kind: str, tokens: int
) -> None:
    """The PyTorch fallback is checked, too, and an operator's steps under a dispatch mode."""
    net = Net(kind, torch.float16)
    net.wire = single
    net.layers[0].scaling = sizes["scaling"]
    for part in ("A", "B", "core"):
        net.parts(0)[part].data.mul_(sizes[part])
    x = inputs(tokens, dtype=torch.float16)
    results = []
    for side in sides(net, x):
        outputs = [side(), torch.vmap(side)(side.x.detach().unsqueeze(1))]
        with FlopCounterMode(display=False):
            outputs.append(side())
        dy = sizes["dy"] * x.cos().to(outputs[0].dtype)
        results.append([*outputs, *side.grad(outputs[0], grad_outputs=dy)])
    assert worst(*results) < 6e-3


def test_a_backward_of_float16_can_be_recorded_with_a_frozen_A(form: str) -> None:
    net = Net("siblings", torch.float16)
    net.layers[0].factors.A.value.requires_grad_(False)
    agree(net, double, inputs(60, dtype=torch.float16), 4 * CLOSE[torch.float16])


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


# How the two layers are called. test_changes_between_layers trains A only in the last mode.
MODES: dict[str, dict[str, bool]] = {
    "graph": {},
    "no graph": {"grad": False},
    "autocast": {"autocast": True},
    "autocast of a trained A": {"autocast": True},
}


def changes_between_layers(
    side: Side, change: str, grad: bool = True, autocast: bool = False
) -> Results:
    """Changes x or A between the calls of two layers on x.

    With a trained A there is no backward: torch refuses to detach an x that the backward needs, and
    the backward refuses a changed A.
    """
    A = side.net.parts(0)["A"]
    is_constant = change == "x joins a graph" or change.startswith("A")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
        x = side.x.detach().clone() if is_constant else 2 * side.x
        first = side.net.call(0, x)
        CHANGES[change](x, A)
        results = [first, side.net.call(1, x)]
        if grad and not A.requires_grad:
            targets = [*side.targets, x] if x.requires_grad else side.targets
            results += side.grad(loss(first * results[1]), targets)
        return results


# In the two forms with one node per layer, the node saves A and its backward refuses a changed one.
CHANGED = [
    (kind, form, change)
    for kind, form in KINDS_AND_FORMS
    for change in CHANGES
    if kind in ("siblings", "two Bs", "wrapped") and (form == "shared" or change.startswith("x"))
]


@pytest.mark.parametrize("kind, form, change", CHANGED, indirect=["form"])
@pytest.mark.parametrize("mode", MODES)
def test_changes_between_layers(kind: str, change: str, mode: str, form: str) -> None:
    is_cast = "autocast" in MODES[mode]
    dtype = torch.float32 if is_cast else torch.float64
    net = Net(kind, dtype)
    net.layers[0].factors.A.value.requires_grad_(mode == "autocast of a trained A")
    close = CLOSE[torch.bfloat16 if is_cast else dtype]
    context = partial(changes_between_layers, change=change, **MODES[mode])
    agree(net, context, inputs(60, dtype=dtype), close)


@pytest.mark.parametrize("part", ["A", "B", "core"])
def test_a_backward_refuses_changed_values(part: str, form: str) -> None:
    """A backward raises an error, as in torch, instead of returning a wrong gradient."""
    side = Side(Net("siblings"), inputs(6))
    y = side()
    with torch.no_grad():
        side.net.parts(0)[part].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        side.grad(loss(y))


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


# ---- gradients of shared factors -----------------------------------------------------------------


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


# ---- siblings on one x ---------------------------------------------------------------------------


@pytest.mark.parametrize("context", SIBLING_CONTEXTS, ids=lambda context: context.__name__)
def test_siblings(context: Context, form: str) -> None:
    agree(Net("siblings"), context, inputs(6))


@pytest.mark.parametrize("form", ["shared"], indirect=True)
def test_a_computed_factor_changes_in_place_between_siblings(form: str) -> None:
    """In the other forms a backward refuses a changed A."""
    agree(Net("siblings"), a_computed_factor_changes, inputs(6))


# ---- memory and flops ----------------------------------------------------------------------------


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


def test_a_flop_counter_counts_the_base_product(form: str) -> None:
    """A flop counter counts only PyTorch's operators, so the nodes decompose under it."""
    net = Net("siblings")
    with FlopCounterMode(display=False) as counter:
        loss(net(inputs(6).requires_grad_())).backward()
    base_product = 2 * 6 * K * K
    assert counter.get_total_flops() >= 2 * len(net.layers) * base_product


# ---- replaced and computed parameters ------------------------------------------------------------


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


def test_lazily_negated_sparse_and_nested_tensors(form: str) -> None:
    """The memory of these tensors does not hold their values as a dense matrix."""
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
