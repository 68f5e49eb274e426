"""What a compiled model has in its graph: our operators, one shrink for siblings, one sum a factor; and that it computes the
definition where a compiler could go wrong."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from stacks import D, make
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRFactors, LoTRLinear, lotr_linear
from lotr_ext.autograd import traced
from lotr_ext.ops import planner
from nets import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Graphs:
    """A backend that runs what AOTAutograd gives, and keeps it."""

    def __init__(self) -> None:
        self.forward: list[GraphModule] = []
        self.backward: list[GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    @staticmethod
    def _keep(where: list[GraphModule]) -> Callable:
        def compiler(graph: GraphModule, _) -> Callable:
            where.append(graph)

            def run(args: list) -> object:
                given = list(args)
                args.clear()
                return graph(*given)

            run._boxed_call = True
            return run

        return compiler


def calls(graphs: list[GraphModule]) -> Counter[str]:
    """How often each operator is called; a writing one under its own name, and shrink also where layer_forward makes u."""
    found: Counter[str] = Counter()
    for node in (node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"):
        target = node.args[0] if "auto_functionalized" in str(node.target) else node.target
        name = str(target).split(".")[1] if "." in str(target) else str(target)
        found[name] += 1
        found["shrink"] += name == "layer_forward" and node.args[3] is not None
    return found


def sums_of(graphs: list[GraphModule], sizes: set[tuple[int, ...]]) -> int:
    """Additions of tensors of these sizes."""
    nodes = (node for graph in graphs for node in graph.graph.nodes if str(node.target).startswith("aten.add"))
    return sum(str(tuple(node.meta["val"].shape)) in map(str, sizes) for node in nodes)


class Siblings(nn.Module):
    """q, k and v of one x, and o, on one pair of factors; the block comes `depth` times."""

    def __init__(self, depth: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factors = LoTRFactors(D, D, 8, device=device)
        one = {"factors": self.factors, "device": device, "dtype": dtype, "dropout": dropout}
        self.layers = nn.ModuleList(LoTRLinear(D, D, **one) for _ in range(4 * depth))
        for layer in self.layers:
            nn.init.normal_(layer.core, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        for q, k, v, o in zip(layers, layers, layers, layers):
            h = torch.tanh(x)
            x = x + o(torch.sigmoid(q(h)) * k(h) + v(h))
        return x


def truth(model: Siblings, x: Tensor) -> Tensor:
    """The definition, in x's dtype."""
    A, B = (p.to(x.dtype) for p in (model.factors.A, model.factors.B))

    def linear(layer: LoTRLinear, x: Tensor) -> Tensor:
        base = nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return base + layer.scaling * x @ A @ layer.core.to(x.dtype) @ B.mT

    layers = iter(model.layers)
    for q, k, v, o in zip(layers, layers, layers, layers):
        h = torch.tanh(x)
        x = x + linear(o, torch.sigmoid(linear(q, h)) * linear(k, h) + linear(v, h))
    return x


def worst(model: nn.Module, call: Callable[[Tensor], Tensor], want: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest error of call's output and of all gradients against want's in float64."""
    found = []
    for run, at in ((call, x), (want, x.double())):
        model.zero_grad()
        at = at.detach().requires_grad_()
        y = run(at)
        y.double().square().mean().backward()
        found.append([y.detach(), at.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    return max(relative(got, want.double()) for got, want in zip(*found))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_graph_has_one_shrink_for_siblings_and_one_sum_a_factor(depth: int, dynamic: bool) -> None:
    model, graphs = Siblings(depth), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    assert worst(model, compiled, lambda x: truth(model, x), torch.randn(2, 70, D)) < 2e-6
    forward, backward = calls(graphs.forward), calls(graphs.backward)
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert (forward["shrink"], forward["fold"], forward["layer_forward"]) == (2 * depth, 0, 4 * depth)
    assert backward["layer_backward_"] == 4 * depth  # of which the last on each x makes its k A^T and x^T k too
    assert backward["factor_grad_"] == backward["expand_add_"] == forward["mm"] == forward["addmm"] == backward["mm"] == 0
    assert sums_of(graphs.backward, {(D, 8), (8, 8)}) == 0
    zeros = [n for n in graphs.backward[0].graph.nodes if str(n.target).startswith(("aten.full", "aten.zeros"))]
    assert len(zeros) <= 2


@pytest.mark.parametrize("depth", [1, 3])
def test_half_precision_parameters_are_summed_in_float32(depth: int) -> None:
    model, graphs = Siblings(depth).to(torch.bfloat16), Graphs()
    torch.compile(model, fullgraph=True, backend=graphs.backend)(torch.randn(2, 70, D, dtype=torch.bfloat16)).sum().backward()
    given = [node for node in graphs.backward[0].graph.nodes if "auto_functionalized" in str(node.target)]
    written = [t.meta["val"].dtype for node in given for t in node.kwargs["_all_bases"] if tuple(t.meta["val"].shape) == (D, 8)]
    assert written and set(written) == {torch.float32}
    assert model.factors.A.grad.dtype == model.factors.B.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("need", ["x", "A", "B", "core", "A B core", "x A", "x B core"])
def test_what_needs_no_gradient_is_not_computed(need: str) -> None:
    model, graphs = Siblings(), Graphs()
    model.factors.A.requires_grad_("A" in need)
    model.factors.B.requires_grad_("B" in need)
    for layer in model.layers:
        layer.core.requires_grad_("core" in need)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(3, 50, D, requires_grad="x" in need)
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    wanted = [*trained, *([x] if "x" in need else [])]
    got = torch.autograd.grad(compiled(x).square().mean(), wanted)
    for g, w in zip(got, torch.autograd.grad(truth(model, x.double()).square().mean(), wanted)):
        assert relative(g, w.double()) < 2e-6
    if need == "core" or need == "B":  # the last layers' need no x, and the first layers' no k
        assert calls(graphs.backward)["factor_grad_"] == 0


def test_an_x_changed_in_place_between_siblings_is_another_x() -> None:
    model = Siblings()
    q, k, *_ = model.layers

    def both(x: Tensor, q: Callable, k: Callable) -> Tensor:
        h = torch.tanh(x)
        a = q(h).detach()  # whose backward would, rightly, raise
        h.mul_(2.0)
        return a + k(h)

    def linear(layer: LoTRLinear) -> Callable[[Tensor], Tensor]:
        A, B = (p.double() for p in (model.factors.A, model.factors.B))
        base = lambda x: nn.functional.linear(x, layer.weight.double(), layer.bias.double())  # noqa: E731
        return lambda x: base(x) + x @ A @ layer.core.double() @ B.mT

    x = torch.randn(130, D)
    compiled = torch.compile(lambda x: both(x, q, k), fullgraph=True, backend="aot_eager")
    want = both(x.double(), linear(q), linear(k))
    assert relative(compiled(x), want) < 2e-6
    with torch.no_grad():
        assert relative(compiled(x), want) < 2e-6


def test_a_factor_changed_in_place_between_two_calls_is_read_anew() -> None:
    model = Siblings()
    q = model.layers[0]

    def twice(x: Tensor) -> Tensor:
        y = q(x)
        with torch.no_grad():
            model.factors.A.mul_(2.0)
        return y.detach() + q(x)  # the first call's backward would, rightly, raise

    x = torch.randn(130, D)
    A, B, core, W, b = (p.detach().double().clone() for p in (model.factors.A, model.factors.B, q.core, q.weight, q.bias))
    want = sum(nn.functional.linear(x.double(), W, b) + c * x.double() @ A @ core @ B.mT for c in (1, 2))
    assert relative(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), want) < 2e-6


def test_a_layer_called_twice_and_one_whose_output_nobody_uses() -> None:
    model = Siblings()
    q, k, v, _ = model.layers

    def run(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        v(h)  # dead: siblings' sums must not wait for it
        return q(h) + q(q(h)) * k(h)

    def want(x: Tensor) -> Tensor:
        A, B = (p.double() for p in (model.factors.A, model.factors.B))
        one, other = (
            lambda x, layer=layer: (
                nn.functional.linear(x, layer.weight.double(), layer.bias.double()) + x @ A @ layer.core.double() @ B.mT
            )
            for layer in (q, k)
        )
        h = torch.tanh(x)
        return one(h) + one(one(h)) * other(h)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    v.core.requires_grad_(False)
    assert worst(nn.ModuleList([q, k]), compiled, want, torch.randn(2, 70, D)) < 2e-6


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpointed_blocks_recompute_their_own_shrink(preserve: bool) -> None:
    model, graphs = Siblings(2), Graphs()
    first, second = nn.ModuleList(model.layers[:4]), nn.ModuleList(model.layers[4:])

    def block(layers: nn.ModuleList, x: Tensor) -> Tensor:
        q, k, v, o = layers
        h = torch.tanh(x)
        return x + o(torch.sigmoid(q(h)) * k(h) + v(h))

    def run(x: Tensor) -> Tensor:
        for layers in (first, second):
            x = checkpoint(block, layers, x, use_reentrant=False, preserve_rng_state=preserve)
        return x

    compiled = torch.compile(run, fullgraph=True, backend=graphs.backend)
    assert worst(model, compiled, lambda x: truth(model, x), torch.randn(2, 70, D)) < 2e-6
    assert calls(graphs.forward)["shrink"] == 4 and sums_of(graphs.backward, {(D, 8)}) == 0


def test_siblings_drop_the_same_elements_of_their_x() -> None:
    model = Siblings(dropout=0.5).train()
    for layer in model.layers:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias), nn.init.eye_(layer.core)
    q, k, v, _ = model.layers
    graphs = Graphs()
    compiled = torch.compile(lambda x: (q(x), k(x), v(x)), fullgraph=True, backend=graphs.backend)
    x = torch.randn(130, D, requires_grad=True)
    a, b, c = compiled(x)
    torch.testing.assert_close(a, b), torch.testing.assert_close(a, c)
    assert calls(graphs.forward)["shrink"] == 1
    (a + b + c).sum().backward()
    # by the mask that the forward drew: y = 3 (x * mask) M, so dx = mask * (3 M 1), zero where dropped and twice where kept
    with torch.no_grad():
        full = 3 * (model.factors.A @ model.factors.B.mT).sum(1)
    ratio = x.grad / full
    assert ((ratio.abs() < 1e-4) | ((ratio - 2).abs() < 1e-3)).all() and 0.4 < (ratio > 1).float().mean() < 0.6


def test_float16_is_not_folded_and_keeps_its_gradients() -> None:
    model = Siblings(dtype=torch.float16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 70, D).half()
    for layer in model.layers:  # a fold beyond float16, an output within
        layer.core.data.mul_(1e-3)
        layer.scaling = 1e3
    assert worst(model, compiled, lambda x: truth(model, x), x) < 0.02


def test_a_scaling_comes_last_in_float16() -> None:
    """s u G leaves the range, y does not."""
    torch.manual_seed(0)
    layer = LoTRLinear(D, 24, 4, scaling=4000.0, dtype=torch.float16)
    nn.init.normal_(layer.core, 0, 30)
    nn.init.normal_(layer.factors.B, 0, 1e-4)
    x = torch.randn(300, D).half()
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        A, core, B, W, bias = (t.double() for t in (layer.factors.A, layer.core, layer.factors.B, layer.weight, layer.bias))
        h = 4000 * x.double() @ A @ core
    assert h.abs().max() > torch.finfo(torch.float16).max
    assert relative(y, x.double() @ W.T + bias + h @ B.T) < 0.01


def test_a_base_that_is_trained_or_wrapped_gets_the_adapter_added() -> None:
    model, graphs = Siblings(), Graphs()
    for layer in model.layers:
        layer.weight.requires_grad_(True)
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    assert worst(model, compiled, lambda x: truth(model, x), torch.randn(2, 70, D)) < 2e-6
    found = calls(graphs.forward)
    assert (found["shrink"], found["expand"], found["layer_forward"]) == (2, 4, 0)


def test_the_functional_form_and_its_strategy() -> None:
    x, weight, bias, A, B, core = (torch.randn(s) for s in ((9, D), (5, D), (5,), (D, 3), (5, 2), (3, 2)))
    want = x @ weight.mT + bias + 0.5 * x @ A @ core @ B.mT
    for strategy, ours in (("beta", True), ("two_pass", True), ("composite", False)):
        torch.compiler.reset()
        graphs = Graphs()
        run = torch.compile(lambda *t, s=strategy: lotr_linear(*t, 0.5, strategy=s), fullgraph=True, backend=graphs.backend)
        torch.testing.assert_close(run(x, weight, bias, A, B, core), want, rtol=1e-4, atol=1e-4)
        assert (calls(graphs.forward)["layer_forward"] == 1) == ours


def test_few_tokens_on_a_cpu_take_the_composite_unless_their_number_is_open() -> None:
    """As measured: there the fold, which more tokens share, costs more than what a kernel saves."""
    for dynamic, ours in ((False, 0), (True, 2)):
        torch.compiler.reset()
        model, graphs = Siblings(), Graphs()
        compiled = torch.compile(model, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
        assert worst(model, compiled, lambda x, model=model: truth(model, x), torch.randn(2, 9, D)) < 2e-6
        assert calls(graphs.forward)["shrink"] == ours


@pytest.mark.parametrize("tokens", [3, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_tensors_of_a_fake_gpu_get_our_operators(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int) -> None:
    """Forward alone: without a GPU torch's autograd takes no CUDA tensor."""
    planner.plan_of.cache_clear()
    monkeypatch.setattr(planner, "cuda_obstacle", lambda index: None)
    model, graphs = Siblings(dtype=dtype), Graphs()
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"), requires_grad=False)
        compiled = torch.compile(model, fullgraph=True, backend=graphs.backend, dynamic=False)
        y = compiled(torch.empty(tokens, D, dtype=dtype, device="cuda"))
    planner.plan_of.cache_clear()
    assert y.device.type == "cuda" and y.shape == (tokens, D)
    found = calls(graphs.forward)
    assert (found["shrink"], found["layer_forward"], found["mm"], found["addmm"]) == (2, 4, 0, 0)
    beta = {node.args[7] for node in graphs.forward[0].graph.nodes if "layer_forward" in str(node.target)}
    assert beta == {tokens >= planner.BETA_TOKENS}


def test_no_trace_keeps_its_tensors() -> None:
    model = Siblings()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 70, D)).sum().backward()
    with torch.no_grad():
        compiled(torch.randn(2, 70, D))
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy attributes that a look at all objects wakes
        assert not [t for t in gc.get_objects() if isinstance(t, FunctionalTensor)]


def test_a_model_by_apply_lotr_compiles_with_both_of_its_groups() -> None:
    model, graphs = make(2), Graphs()
    torch.compile(model, fullgraph=True, backend=graphs.backend)(torch.randn(2, 70, D)).sum().backward()
    assert calls(graphs.forward)["shrink"] == 4 and calls(graphs.backward)["layer_backward_"] == 8


def test_another_strategy_or_version_is_another_key_of_the_graphs_on_disk(monkeypatch) -> None:
    def key() -> str:
        """Dynamo's graph, of which AOTAutograd makes the name under which it keeps what it traces."""
        graphs: list[GraphModule] = []
        torch.compiler.reset()
        layer = LoTRLinear(16, 16, factors=LoTRFactors(16, 16, 4))
        torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph.forward)(torch.randn(5, 16))
        return graphs[0].code

    first = key()
    assert key() == first
    monkeypatch.setattr(planner, "LOTR_STRATEGY", "two_pass")
    assert (forced := key()) != first
    monkeypatch.setattr(traced, "_code", lambda: "of another version")
    assert key() not in (first, forced)


def test_no_operator_of_a_compiled_graph_enters_python() -> None:
    """A formula for autograd, or a version counter that Python moves, would take as long as a small product does."""
    model, graphs = Siblings(2), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    compiled(torch.randn(2, 70, D, requires_grad=True)).sum().backward()
    targets = set()
    for node in (
        node for graph in graphs.forward + graphs.backward for node in graph.graph.nodes if node.op == "call_function"
    ):
        targets.add(node.args[0] if "auto_functionalized" in str(node.target) else node.target)
    ours = {target for target in targets if str(target).startswith("lotr.")}
    assert len(ours) >= 2
    for target in ours:
        for key in ("ADInplaceOrView", "AutogradCPU", "Autograd"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key), (target, key)
