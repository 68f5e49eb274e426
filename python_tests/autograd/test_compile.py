"""torch.compile and torch.export of adapted models: one graph, the gradients of the definition, no recompilation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from stacks import D, Stack, definition, make, trained_grads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr, disabled, merge, unmerge
from nets import relative

LENGTHS = (7, 16, 33, 64, 5, 130, 12, 40, 100, 9)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def data(tokens: int) -> Tensor:
    return torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(tokens))


def loss(y: Tensor) -> Tensor:
    return y.float().square().mean()


def errors(model: Stack, call, x: Tensor, autocast: bool = False) -> float:
    """The worst error of call's gradients, x's too, against the definition: relative to its own in autocast."""
    want, truth_x = definition(model), x.double().requires_grad_()
    want(truth_x).square().mean().backward()
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call(x)
    loss(y).backward()
    got, want_grads = trained_grads(model), trained_grads(want)
    assert got.keys() == want_grads.keys() and all(g is not None for g in got.values())
    return max(*(relative(got[n], want_grads[n]) for n in got), relative(x.grad, truth_x.grad))


CASES = [
    ("aot_eager", True, False, False),
    ("aot_eager", None, False, False),
    ("aot_eager", True, True, True),
    pytest.param("inductor", True, False, False, marks=pytest.mark.full),  # C++ by the dozen: half a minute
    pytest.param("aot_eager", True, True, False, marks=pytest.mark.full),
    pytest.param("inductor", True, True, True, marks=pytest.mark.full),
    pytest.param("inductor", None, False, True, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("backend", "dynamic", "checkpointing", "autocast"), CASES)
def test_ten_lengths_in_one_graph_with_the_gradients_of_the_definition(backend, dynamic, checkpointing, autocast) -> None:
    model = make(1, reentrant=False if checkpointing else None)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    eager = errors(model, model, data(LENGTHS[0]), autocast)
    bound = 2.5 * eager if autocast else 2e-6
    for i, tokens in enumerate(LENGTHS):
        settled = i >= (1 if dynamic else 2)  # without dynamic=True the second length makes the graph a dynamic one
        stance = torch.compiler.set_stance("fail_on_recompile") if settled else contextlib.nullcontext()
        with stance:
            assert errors(model, compiled, data(tokens), autocast) < bound


@pytest.mark.slow  # a C++ compiler for each graph
def test_one_layer_by_inductor_at_ten_lengths() -> None:
    layer = LoTRLinear(D, D, factors=LoTRFactors(D, D, 4))
    nn.init.normal_(layer.core)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor", dynamic=True)
    for i, tokens in enumerate(LENGTHS):
        layer.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            y = compiled(data(tokens))
        y.sum().backward()
        x, core, A, B = (t.detach().double() for t in (data(tokens), layer.core, layer.factors.A, layer.factors.B))
        base = nn.functional.linear(x, layer.weight.double(), layer.bias.double())
        assert relative(y, base + x @ A @ core @ B.mT) < 2e-6
        u, ones = (x @ A).sum((0, 1)), torch.ones(D, dtype=torch.float64)
        assert relative(layer.core.grad, torch.outer(u, B.mT @ ones)) < 2e-6
        assert relative(layer.factors.A.grad, torch.outer(x.sum((0, 1)), core @ (B.mT @ ones))) < 2e-6
        assert relative(layer.factors.B.grad, torch.outer(ones, u @ core)) < 2e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_blocks_under_an_eager_checkpoint(reentrant: bool) -> None:
    model = make(2)
    blocks = [torch.compile(block, fullgraph=True, backend="aot_eager") for block in model.blocks]

    def call(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(x)

    assert errors(model, call, data(9)) < 2e-6


def test_one_block_compiled_beside_an_eager_one() -> None:
    model = make(2)
    block = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    assert errors(model, lambda x: model.head(model.blocks[1](block(x))), data(9)) < 2e-6


def test_what_is_trained_may_change_after_compilation() -> None:
    model = make(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for train_A, train_B in ((True, True), (False, True), (True, False), (True, True)):
        for factors in model.lotr_factors.values():
            factors.A.requires_grad_(train_A)
            factors.B.requires_grad_(train_B)
        assert errors(model, compiled, data(9)) < 2e-6
        assert all((f.A.grad is not None) == train_A for f in model.lotr_factors.values())


def test_optimizer_steps_reach_the_compiled_graph() -> None:
    models = [make(2), make(2)]
    calls = [torch.compile(models[0], fullgraph=True, backend="aot_eager"), models[1]]
    losses: list[list[float]] = []
    for model, call in zip(models, calls):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            value = loss(call(data(9)))
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][3] < losses[0][0]


def test_evaluation_merged_disabled_and_back() -> None:
    model = make(2).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = data(9)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(compiled(x), want)
        merge(model)
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
        unmerge(model)
        with disabled(model):
            torch.testing.assert_close(compiled(x), model(x))
            assert (compiled(x) - want).abs().max() > 0.1
        torch.testing.assert_close(compiled(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), want)


@pytest.mark.parametrize("recomputed", [False, True])
def test_dropout_drops_at_its_rate_and_in_backward_alike(recomputed: bool) -> None:
    layer = LoTRLinear(D, D, factors=LoTRFactors(D, D, D), dropout=0.25, bias=False)
    nn.init.eye_(layer.factors.A), nn.init.eye_(layer.factors.B), nn.init.eye_(layer.core), nn.init.zeros_(layer.weight)
    run = (lambda x: checkpoint(layer, x, use_reentrant=False)) if recomputed else layer
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.ones(4000, D, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    torch.testing.assert_close(x.grad, y.detach())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_a_float32_adapter(half: torch.dtype) -> None:
    layer = LoTRLinear(D, D, factors=LoTRFactors(D, D, 4), dtype=half)
    nn.init.normal_(layer.core)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(data(9).to(half))
        loss(y).backward()
        assert y.dtype == half and layer.core.grad.dtype == torch.float32
        grads.append([y.detach(), layer.factors.A.grad, layer.factors.B.grad, layer.core.grad])
    for got, want in zip(grads[1], grads[0]):
        assert relative(got, want.double()) < 0.03


def test_export_of_the_evaluated_model_at_any_length() -> None:
    model = make(2).eval()
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(model, (data(5),), dynamic_shapes=({1: length},)).module()
    with torch.no_grad():
        for tokens in (2, 9, 500):
            torch.testing.assert_close(exported(data(tokens)), model(data(tokens)))
    names = {name for name, _ in exported.named_parameters()}
    assert {"lotr_factors.16x16.A", "lotr_factors.16x16.B", "blocks.0.q.core"} <= names


def test_a_compiled_transformer_trains() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(**size, vocab_size=67, num_key_value_heads=2, attn_implementation="sdpa")
    model = apply_lotr(transformers.LlamaForCausalLM(config), LoTRConfig(rank=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    for layer in (m for m in model.modules() if isinstance(m, LoTRLinear)):
        nn.init.normal_(layer.core, std=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    ids = torch.randint(0, 67, (2, 11), generator=torch.Generator().manual_seed(0))
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, want in grads[0].items():
        assert relative(grads[1][name], want.double()) < 1e-4, name
