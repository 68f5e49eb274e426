"""Adapted models: network x way of adapting x operation.

Each is compared with the same network in float64 with the adapter added to its weights. Which
layers are adapted is in test_targets.py, and what trains in test_training.py.
"""

import copy
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import zoo
from helpers import refused, relative, worst
from models import (
    CASES,
    FULL_PRECISION,
    adapter_parameters,
    config,
    moved,
    same,
    started,
    state,
    trained,
    unchanged,
    written_out,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lotr_ext import (
    LoTRConfig,
    LoTRLinear,
    TaskBank,
    apply_lotr,
    disabled,
    explain,
    load_adapter,
    lotr_parameters,
    merge,
    save_adapter,
    unload,
    unmerge,
    use_tasks,
)
from lotr_ext.model import adapted_layers
from lotr_ext.peft import LoTRPeftConfig


def truth(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Returns the model's output for x in float64, as a function of the model's parameters."""
    plain = zoo.net(name, next(model.parameters()).dtype).double()
    with torch.no_grad():  # init "svd" has changed the weights
        for layer_name, layer in adapted_layers(model).items():
            if layer.start_core is not None:
                plain.get_submodule(layer_name).weight.copy_(layer.weight)
    weights = written_out(model, plain)
    return zoo.output(
        partial(torch.func.functional_call, plain, weights),
        x.double() if x.is_floating_point() else x,
    )


def check_with_truth(model: nn.Module, name: str, bound: float) -> None:
    """Compares the output of the named model, and the gradients of its adapter, with float64."""
    x = zoo.inputs(name, dtype=next(model.parameters()).dtype)
    parameters = adapter_parameters(model)
    y = zoo.output(model, x).double()
    y64 = truth(model, name, x)
    dy = torch.randn_like(y64)
    expected = torch.autograd.grad(y64, parameters, dy)
    y.backward(dy)
    assert worst([y, *(p.grad for p in parameters)], [y64, *expected]) < bound


def bound_of(way: str) -> float:
    return 2e-2 if way == "bfloat16" else 2e-5


# ---- network x way -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), CASES)
def test_starts_as_the_plain_model(name: str, way: str) -> None:
    x = zoo.inputs(name)
    error = relative(zoo.output(started(name, way), x), zoo.output(zoo.net(name), x))
    assert error <= (1e-5 if way == "svd" else 0)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_output_and_gradients_are_those_of_the_weights_written_out(name: str, way: str) -> None:
    check_with_truth(trained(name, way), name, bound_of(way))


@pytest.mark.parametrize(("name", "way"), CASES)
def test_merge_is_exact_to_undo(name: str, way: str) -> None:
    model = trained(name, way)
    x = zoo.inputs(name)
    before = state(model)
    adapted = zoo.output(model, x)
    assert relative(zoo.output(merge(model), x), adapted) < bound_of(way)
    assert same(state(unmerge(model)), before)
    unmerge(merge(model, keep_backup=False, safe=True))
    assert relative(zoo.output(model, x), adapted) < bound_of(way)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize(("name", "way"), FULL_PRECISION)
def test_unload_gives_plain_layers_back(name: str, way: str, merges: bool) -> None:
    plain = zoo.net(name)
    model = trained(name, way)
    x = zoo.inputs(name)
    expected = zoo.output(model if merges else plain, x)
    if not merges:
        merge(model)
    assert unload(model, merge=merges) is model
    assert relative(zoo.output(model, x), expected) < 2e-5
    assert [(key, type(m)) for key, m in model.named_modules()] == [
        (key, type(m)) for key, m in plain.named_modules()
    ]
    apply_lotr(model, config(name))  # nothing that would refuse a new adapter is left


@pytest.mark.parametrize(("name", "way"), FULL_PRECISION)
def test_disabled_computes_the_plain_model(name: str, way: str) -> None:
    model = trained(name, way)
    x = zoo.inputs(name)
    with disabled(model):
        y = zoo.output(model, x)
    assert relative(y, zoo.output(zoo.net(name), x)) < (1e-5 if way == "svd" else 1e-7)
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "shape") for name in zoo.NETS), ("mlp", "svd"), ("llama", "train")]
)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_shares_nothing(name: str, way: str, copied: Callable) -> None:
    """The copy is made while a graph of the original lives."""
    model = trained(name, way)
    x = zoo.inputs(name)
    y = zoo.output(model, x)
    other = copied(model)
    assert torch.equal(zoo.output(other, x), y)
    moved(other, 8)
    assert not torch.equal(zoo.output(other, x), y)
    unload(other)
    assert torch.equal(zoo.output(model, x), y)


@pytest.mark.parametrize("name", zoo.NETS)
def test_half_precision_model_with_float32_adapter(name: str) -> None:
    model = moved(apply_lotr(zoo.net(name, torch.bfloat16), config(name)))
    # Rounding routes tokens of the mixture to other experts.
    check_with_truth(model, name, 0.6 if name == "mixture" else 0.1)
    assert {p.grad.dtype for p in lotr_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixture"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    model = trained(name).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_with_truth(model, name, bound_of("shape"))


# ---- disabled, merged, unloaded ------------------------------------------------------------------


def test_disabled_is_per_thread_and_ends_in_any_order(x: Tensor, model: nn.Module) -> None:
    adapted = model(x)
    contexts = [disabled(model), disabled(model)]
    for context in contexts:
        context.__enter__()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, x).result(), adapted)
        pool.submit(contexts[0].__exit__, None, None, None).result()
    assert not torch.equal(model(x), adapted)
    contexts[1].__exit__(None, None, None)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize(
    ("operation", "break_layer", "error"),
    [
        (partial(merge, safe=True), lambda layer: layer.core.data.fill_(float("inf")), ValueError),
        (
            partial(merge, safe=True, keep_backup=False),
            lambda layer: layer.core.data.fill_(float("inf")),
            ValueError,
        ),
        (
            merge,
            lambda layer: vars(layer).update(merge=mock.Mock(side_effect=KeyboardInterrupt)),
            KeyboardInterrupt,
        ),
        (unload, parametrizations.weight_norm, TypeError),
        (partial(unload, merge=True), parametrizations.weight_norm, TypeError),
    ],
)
def test_a_failure_in_the_last_layer_changes_none(
    operation: Callable, break_layer: Callable, error: type[BaseException]
) -> None:
    model = trained("mlp", "svd")
    break_layer(model.blocks[1]["down"])
    with unchanged(model), pytest.raises(error):
        operation(model)
    assert not any(layer.merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize(
    ("last", "break_layer", "error"),
    [
        # Without a backup of the quantized base.
        (zoo.Dense, lambda layer: None, RuntimeError),
        (
            lambda linear: linear,
            lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
            TypeError,
        ),
    ],
    ids=["replaced", "computed"],
)
def test_unmerge_changes_all_layers_or_none(
    last: Callable, break_layer: Callable, error: type[Exception], x: Tensor
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), last(nn.Linear(16, 16)))
    moved(apply_lotr(model, LoTRConfig(rank=2, scaling=1.5)))
    break_layer(merge(model, keep_backup=False, dequantize=True)[1])
    y = model(x)
    with refused("unmerge", error):
        unmerge(model)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_weight_that_was_tied_later_is_not_merged(is_wrapped: bool) -> None:
    model = zoo.net("mlp")
    layer = model.blocks[0]["up"]
    if is_wrapped:
        layer.register_forward_hook(mock.Mock(return_value=None))
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["up"]))
    model.other = zoo.Children(weight=layer.weight)
    with refused("merge", RuntimeError):
        merge(model)


def test_a_model_around_an_adapted_one_is_unloaded(model: nn.Module) -> None:
    bank = TaskBank(model, 1)
    unload(nn.ModuleDict({"inner": model, "head": nn.Linear(3, 3)}))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.state_dict().keys() == zoo.net("mlp").state_dict().keys()
    assert not any(key.startswith("lotr") for key in vars(model))
    assert len(bank) == 0  # it was alive until here


def test_a_single_layer_is_unloaded_to_its_plain_layer() -> None:
    layer = moved(LoTRLinear(4, 6, rank=2))
    weight = layer.weight.detach().clone()
    plain = unload(layer)
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, weight)


def test_explain_says_what_runs_and_why(x: Tensor, model: nn.Module) -> None:
    lines = explain(model, x).splitlines()
    what = "at rank 3: the kernels of lotr_ext (float32 on cpu)"
    assert lines == [f"2 x LoTRLinear {sizes} {what}" for sizes in ("16 -> 24", "24 -> 16")]
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in explain(model, x)
        assert "float64" in explain(
            LoTRLinear(4, 4, dtype=torch.float64), torch.zeros(2, 4).double()
        )
    with disabled(model):
        assert explain(model, x).count("disabled") == 2
    TaskBank(model, 2).add()
    with use_tasks(model, torch.tensor([0, -1, 0])):
        assert explain(model, x).splitlines() == lines
    assert explain(merge(trained("mlp")), x).count("merged") == 2
    assert explain(LoTRLinear(4, 4, rank=2), torch.randn(2, 4)).startswith(
        "1 x LoTRLinear 4 -> 4 at rank 2"
    )
    mixed = apply_lotr(zoo.net("bert", torch.bfloat16), config("bert", adapter_dtype="float16"))
    assert "the PyTorch fallback, because A is torch.float16" in explain(mixed, zoo.inputs("bert"))
    assert explain(trained("mixture"), zoo.inputs("mixture")).count("LoTRHostedExperts") == 2


# ---- state_dicts, the meta device, offloaded weights ---------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_from_the_meta_device_is_filled_from_a_state_dict(
    x: Tensor, model: nn.Module, assign: bool
) -> None:
    with torch.device("meta"):
        empty = apply_lotr(zoo.Mlp(), model.lotr_config)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty(x), model(x))
    assert len(list(lotr_parameters(empty))) == 4 + 4  # the factors are still shared


def test_a_checkpoint_of_transformers_has_the_factors_once(tmp_path: Path) -> None:
    model = trained("gpt2")
    x = zoo.inputs("gpt2")
    model.tie_weights()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum("lotr_factors" in key for key in saved) == len(model.lotr_factors)
    other = started("gpt2")
    other.load_state_dict(saved, strict=False)  # the file lacks the tied head
    assert torch.equal(zoo.output(other, x), zoo.output(model, x))


def offloaded() -> nn.Module:
    """Returns the zoo's Llama with weights that are on the meta device between forwards."""
    accelerate = pytest.importorskip("accelerate")
    model = zoo.net("llama")
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return model


def test_an_adapter_over_offloaded_layers_is_in_memory_and_trains(tmp_path: Path) -> None:
    x = zoo.inputs("llama")
    model = moved(apply_lotr(offloaded(), config("llama")))
    check_with_truth(model, "llama", bound_of("shape"))
    with refused("merge", RuntimeError):
        merge(model)
    save_adapter(model, tmp_path)
    for base in (zoo.net("llama"), offloaded()):
        loaded = load_adapter(base, tmp_path)
        assert relative(zoo.output(loaded, x), zoo.output(model, x)) < 1e-6


# ---- containers ----------------------------------------------------------------------------------


class Pipeline(nn.Sequential):
    """A container by inheritance, as sentence-transformers' models are."""


def with_our_names() -> nn.Module:
    """A model that uses the names of an adapted layer's parts."""
    names = ("core", "factors", "lotr")
    model = nn.Sequential(OrderedDict({name: nn.Linear(16, 16) for name in names}))
    model.weight = nn.Parameter(torch.ones(16))
    return model


CONTAINERS = {
    "layers": lambda: nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 16)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(16, 6)), nn.Linear(6, 16)),
    "blocks": lambda: nn.Sequential(zoo.Mlp(), nn.Linear(3, 16)),
    "subclass": lambda: Pipeline(zoo.Mlp(), nn.Linear(3, 16)),
    "names": with_our_names,
    "list": lambda: nn.ModuleList([nn.Linear(16, 16), zoo.Mlp()]),
    "dict": lambda: nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}),
}


def run(container: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*container.children())(x)


@pytest.mark.parametrize("core", ["dense", "diagonal"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_the_children_of_a_container_stay_its_only_children(
    x: Tensor, name: str, core: str
) -> None:
    plain = zoo.fill(CONTAINERS[name]())
    settings = LoTRConfig(rank=2, scaling=1.5, core=core)
    model = moved(apply_lotr(copy.deepcopy(plain), settings))
    TaskBank(model, 1).add()
    assert [n for n, _ in model.named_children()] == [n for n, _ in plain.named_children()]
    y = run(model, x)
    plain_output = run(plain, x)
    assert relative(y, plain_output) > 1e-6
    with disabled(model):
        assert relative(run(model, x), plain_output) < 1e-6

    other = apply_lotr(copy.deepcopy(plain), settings)
    TaskBank(other, 1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(copy.deepcopy(model), x), y)
    assert torch.equal(run(other, x), y)

    unload(model)
    assert same(state(model), state(plain))
    attributes = itertools.chain.from_iterable(map(vars, model.modules()))
    assert not any(name.startswith("lotr") for name in attributes)


def with_registered_factors(container: nn.Module) -> nn.Module:
    """Returns a model with the same children.

    It also registers its factors, as containers did in 0.1.0.
    """
    return zoo.Children(**dict(container.named_children()))


@pytest.mark.parametrize("core", ["dense", "diagonal"])
@pytest.mark.parametrize(
    "saved_as", [lambda model: model, with_registered_factors], ids=["as today", "as in 0.1.0"]
)
@pytest.mark.parametrize("name", CONTAINERS)
def test_files_of_containers(name: str, saved_as: Callable, core: str, tmp_path: Path) -> None:
    plain = zoo.fill(CONTAINERS[name]())
    settings = LoTRConfig(rank=2, scaling=1.5, core=core)
    model = moved(apply_lotr(saved_as(copy.deepcopy(plain)), settings))
    save_adapter(model, tmp_path)
    assert worst(*map(adapter_parameters, (load_adapter(plain, tmp_path), model))) == 0


# ---- code of torch and transformers that reads or replaces adapted layers ------------------------


def adapt_for_unload(model: nn.Module, by_peft: bool, **settings: object) -> Callable:
    """Adapts a model, by PEFT or by `apply_lotr`. Returns the function that unloads it."""
    if by_peft:
        return peft.get_peft_model(model, LoTRPeftConfig(rank=2, **settings)).unload
    return partial(unload, apply_lotr(model, LoTRConfig(rank=2, **settings)))


@pytest.mark.parametrize("by_peft", [False, True])
def test_encoder_layers_run_their_adapters_also_without_gradients(by_peft: bool) -> None:
    """torch's fast path would read the linear layers' weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    plain = nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(plain)
    inputs = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": torch.eye(2, 3).bool()}
    unload_adapter = adapt_for_unload(model, by_peft, target_modules=["linear1", "linear2"])
    zoo.fill(model, only=lambda name: "core" in name)
    expected = model(**inputs)
    assert relative(expected, plain(**inputs)) > 1e-3
    with torch.inference_mode():
        assert relative(model(**inputs), expected) < 1e-6
        unload_adapter()
        assert torch.equal(model(**inputs), plain(**inputs))


def test_projections_are_fused_only_without_an_adapter() -> None:
    model = nn.ModuleDict({name: zoo.FusibleAttention() for name in ("adapted", "plain")})
    moved(apply_lotr(model, LoTRConfig(rank=2, exclude_modules=r"plain\..*")))
    x = torch.randn(2, 3, 8)
    y = model["adapted"](x)
    model["plain"].fuse_projections()
    for adapted in (model, pickle.loads(pickle.dumps(model))):
        with refused("fuse_projections", RuntimeError):
            adapted["adapted"].fuse_projections(fuse=True)
    unload(model, merge=True)
    model["adapted"].fuse_projections()
    assert relative(model["adapted"](x), y) < 1e-5


@pytest.mark.parametrize("by_peft", [False, True])
def test_an_adapted_output_layer_is_not_resized(by_peft: bool) -> None:
    """transformers would put a new layer without an adapter in its place."""
    model = zoo.net("llama")
    unload_adapter = adapt_for_unload(model, by_peft, target_modules=["q_proj", "lm_head"])
    for adapted in (model, pickle.loads(pickle.dumps(model))):
        with refused("resize_token_embeddings", RuntimeError):
            adapted.resize_token_embeddings(80)
        assert len(adapted.get_input_embeddings().weight) == zoo.VOCABULARY
    unload_adapter().resize_token_embeddings(80)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["q_proj"])).resize_token_embeddings(90)
    assert len(model.lm_head.weight) == 90
