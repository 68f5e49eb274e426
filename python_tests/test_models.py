"""Adapted models: network x way of adapting x operation.

Each is compared with the same network in float64 with the adapter added to its weights.
"""

import copy
import dataclasses
import itertools
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import zoo
from helpers import ERRORS, refused, relative, run_python, worst
from layers import Scaled
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
    trained_parameters,
    unchanged,
    written_out,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import lotr_ext
from lotr_ext import (
    LoTRConfig,
    LoTRLinear,
    LoTRWrapped,
    apply_lotr,
    disabled,
    explain,
    lotr_parameters,
    merge,
    parameter_groups,
    rank_for,
    trainable_summary,
    unload,
    unmerge,
)
from lotr_ext.config import place_of
from lotr_ext.cores import FORMS
from lotr_ext.model import adapted_layers
from lotr_ext.peft import LoTRPeftConfig
from lotr_ext.reports import TrainableSummary
from lotr_ext.targets import saved_modules


def truth(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Returns the model's output for x in float64, as a function of the model's parameters."""
    plain = zoo.net(name, next(model.parameters()).dtype).double()
    with torch.no_grad():  # init "svd" has changed the weights
        for layer_name, layer in adapted_layers(model).items():
            if layer.start_core is not None:
                plain.get_submodule(layer_name).weight.copy_(layer.weight)
    weights = written_out(model, plain)
    x = x.double() if x.is_floating_point() else x
    return zoo.output(partial(torch.func.functional_call, plain, weights), x)


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
    """Also while a graph of the original lives."""
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
    bound = 0.6 if name == "mixture" else 0.1  # rounding routes tokens to other experts
    check_with_truth(model, name, bound)
    assert {p.grad.dtype for p in lotr_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixture"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    model = trained(name).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_with_truth(model, name, bound_of("shape"))


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


# ---- which layers, which groups ------------------------------------------------------------------

GROUPS = [
    ("mlp", "shape", 4, 2),
    ("mlp", "width", 4, 2),  # A of 16 and of 24, B of 24 and of 16
    ("mlp", "block", 8, 4),
    ("attention", "shape", 2, 1),
    ("attention", "name", 8, 4),
    ("attention", "block", 4, 2),
    ("mlp", "layer", 8, 4),
    ("attention", "layer", 16, 8),
    (
        "attention",
        {f"blocks.{i}.{n}": "all" if n in "qk" else "rest" for i in (0, 1) for n in "qkvo"},
        4,
        2,
    ),
    ("attention", lambda name, module: name[:8], 4, 2),
    ("llama", "width", 3, 2),
]


@pytest.mark.parametrize(("name", "by", "factors", "pairs"), GROUPS)
def test_groups_share_factors(name: str, by: object, factors: int, pairs: int) -> None:
    model = started(name, group_by=by)
    layers = adapted_layers(model)
    assert {f for m in layers.values() for f in m.factors.children()} == {*model.lotr_factors}
    assert trainable_summary(model).groups == pairs
    keys = [key for key in model.state_dict() if key.endswith(".value")]
    assert keys == [f"lotr_factors.{i}.value" for i in range(factors)]
    if callable(by):  # a mapping can be saved
        assert model.lotr_config.group_by == {key: by(key, None) for key in layers}


PLACES = {
    "model.layers.3.self_attn.q_proj": ("model.layers.3", "self_attn.q_proj"),
    "blocks.0.layers.1.q": ("blocks.0", "layers.1.q"),
    "0.q": ("0", "q"),
    "blocks.12": ("blocks.12", ""),
    "head.q2": ("", "head.q2"),
    "q": ("", "q"),
}


def test_a_place_ends_at_the_first_number_of_a_name() -> None:
    assert {name: place_of(name) for name in PLACES} == PLACES


def timm() -> nn.Module:
    """A model that names its classifier as timm's do."""
    model = zoo.Children(features=nn.Linear(8, 8), fc=nn.Linear(8, 3))
    model.get_classifier = lambda: model.fc
    return model


def distilled_timm() -> nn.Module:
    """timm's DeiT, which has a second head for its teacher's labels."""
    layers = {"features": nn.Linear(8, 8), "head": nn.Linear(8, 3), "head_dist": nn.Linear(8, 3)}
    model = zoo.Children(**layers)
    model.get_classifier = lambda: (model.head, model.head_dist)
    return model


def two_heads() -> nn.Module:
    """A model with the names of DistilBERT's heads."""
    children = {"query": nn.Linear(8, 8), "pre_classifier": nn.Linear(8, 8)}
    model = zoo.Children(**children, classifier=nn.Linear(8, 3))
    model.get_output_embeddings = lambda: None
    return model


def shared_memory() -> nn.Module:
    """Two parameters in the same memory."""
    model = zoo.Children(**{name: nn.Linear(8, 8) for name in "abc"})
    model.b.weight = nn.Parameter(model.a.weight.data)
    return model


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def reads() -> nn.Module:
    """Layers that "all-linear" leaves out for what they are, and one that it wraps."""
    tied = nn.Linear(8, 8)
    return zoo.Children(
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        router=Router(8, 8),
        doubled=Scaled(8, 8),
        tied=tied,
        embed=nn.Embedding(8, 8, _weight=tied.weight),
    )


class Attention(zoo.Children):
    """Projections that can be fused, as in diffusers."""

    fused_projections = False

    def fuse_projections(self, fuse: bool = True) -> None:
        self.to_qkv = nn.Linear(8, 24, bias=False)
        weights = [part.weight for part in (self.to_q, self.to_k, self.to_v)]
        self.to_qkv.weight.data.copy_(torch.cat(weights))
        self.fused_projections = fuse

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_projections:
            return self.to_qkv(x)
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)


def fusible() -> Attention:
    return Attention(**{f"to_{name}": nn.Linear(8, 8, bias=False) for name in "qkv"})


def fused() -> nn.Module:
    model = nn.ModuleDict({"attention": fusible()})
    model["attention"].fuse_projections()
    return model


def inner_bert() -> nn.Module:
    return nn.ModuleDict({"inner": zoo.net("bert")})


def network(net: str | Callable[[], nn.Module]) -> nn.Module:
    return zoo.net(net) if isinstance(net, str) else net()


UPS = ["blocks.0.up", "blocks.1.up"]
DOWNS = ["blocks.0.down", "blocks.1.down"]
LLAMA_BLOCK = [
    *(f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"),
    *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")),
]
QUERIES = [f"inner.bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
EXPERTS = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
DOWN_EXPERTS = [f"{experts}.lotr.down_proj" for experts in EXPERTS]
# A network, settings, the adapted layers, and the modules that are saved.
SELECTED = [
    ("mlp", {}, [UPS[0], DOWNS[0], UPS[1], DOWNS[1], "head"], ()),
    ("mlp", {"target_modules": ["up"]}, UPS, ()),
    ("mlp", {"target_modules": ["0.up", "head"]}, [UPS[0], "head"], ()),
    (
        "mlp",
        {"target_modules": r".*\.(up|down)", "exclude_modules": ["0.up"]},
        [DOWNS[0], UPS[1], DOWNS[1]],
        (),
    ),
    ("mlp", {"exclude_modules": r"blocks\..*"}, ["head"], ()),
    ("mlp", {"modules_to_save": ["head"], "exclude_modules": ["up"]}, DOWNS, ("head",)),
    (
        "gpt2",
        {"target_modules": ["c_attn"]},
        [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)],
        (),
    ),
    ("llama", {"target_modules": r"model\.layers\.1\..*"}, LLAMA_BLOCK, ()),
    (
        "mixture",
        {"target_parameters": ["down_proj"], "modules_to_save": ["0.mlp"]},
        DOWN_EXPERTS[1:],
        ("0.mlp",),
    ),
    (
        "mixture",
        {"target_parameters": ["down_proj"], "exclude_modules": ["0.mlp.experts"]},
        DOWN_EXPERTS[1:],
        (),
    ),
    ("mixture", {"target_parameters": ["down_proj"]}, DOWN_EXPERTS, ()),
    (timm, {}, ["features"], ()),
    (distilled_timm, {}, ["features"], ()),
    (two_heads, {}, ["query"], ()),
    (two_heads, {"task_type": "SEQ_CLS"}, ["query"], ("pre_classifier", "classifier")),
    (
        two_heads,
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        ["query"],
        ("classifier", "pre_classifier"),
    ),
    (shared_memory, {}, ["c"], ()),
    (reads, {}, ["doubled"], ()),
    (fused, {}, ["attention.to_qkv"], ()),
    # A container names its children by numbers, as a model names its factors.
    (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)),
        {"modules_to_save": ["1", "2"], "train": ["core"]},
        ["0"],
        ("1", "2"),
    ),
]


@pytest.mark.filterwarnings("ignore")  # a head stays frozen
@pytest.mark.parametrize(("net", "settings", "selected", "saved"), SELECTED)
def test_selects_layers(
    net: str | Callable[[], nn.Module],
    settings: dict,
    selected: list[str],
    saved: tuple[str, ...],
) -> None:
    plain = network(net)
    endings = tuple(f".{ending}" for ending in saved)
    saved_names = [name for name, _ in plain.named_modules() if f".{name}".endswith(endings)]
    model = apply_lotr(plain, LoTRConfig(rank=2, **settings))
    assert list(adapted_layers(model)) == selected
    assert (model.lotr_config.modules_to_save or ()) == saved
    assert list(saved_modules(model, model.lotr_config)) == saved_names
    saved_parameters = {p for name in saved_names for p in model.get_submodule(name).parameters()}
    assert set(trained_parameters(model)) - set(lotr_parameters(model)) == saved_parameters


# A model, settings, a part of the reason for each layer that is left out, and how many are adapted.
LEFT_OUT = [
    ("llama", {}, {"lm_head": "the output layer"}, 14),
    ("gpt2", {}, {"lm_head": "tied"}, 8),
    ("mixture", {}, {"lm_head": "the output layer", **dict.fromkeys(EXPERTS, "3-D")}, 8),
    (inner_bert, {}, {"inner.classifier": "a head"}, 13),
    (inner_bert, {"target_modules": ["classifier", "query"]}, {}, 3),
    (
        inner_bert,
        {
            "target_modules": r".*\.(query|classifier)",
            "exclude_modules": ["1.attention.self.query"],
        },
        {QUERIES[1]: "exclude_modules"},
        2,
    ),
    (
        inner_bert,
        {"target_modules": ["query"], "modules_to_save": ["layer.0"]},
        {QUERIES[0]: "modules_to_save"},
        1,
    ),
    (
        reads,
        {},
        {"attention.out_proj": "MultiheadAttention", "router": "its forward", "tied": "tied"},
        1,
    ),
    (fused, {}, dict.fromkeys([f"attention.to_{name}" for name in "qkv"], "to_qkv"), 1),
]


@pytest.mark.filterwarnings("ignore")  # the head stays frozen
@pytest.mark.parametrize(("net", "settings", "left_out", "count"), LEFT_OUT)
def test_the_summary_says_what_was_left_out_and_why(
    net: str | Callable[[], nn.Module], settings: dict, left_out: dict[str, str], count: int
) -> None:
    summary = trainable_summary(apply_lotr(network(net), LoTRConfig(rank=2, **settings)))
    reasons = {name: reason for reason, names in summary.left_out.items() for name in names}
    assert reasons.keys() == left_out.keys()
    assert all(left_out[name] in reason for name, reason in reasons.items()), reasons
    assert str(summary).count("left out:") == len(summary.left_out)
    assert summary.layers == count


@pytest.mark.parametrize("by_peft", [False, True])
def test_encoder_layers_run_their_adapters_also_without_gradients(by_peft: bool) -> None:
    """torch's fast path would read the linear layers' weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    plain = nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(plain)
    inputs = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": torch.eye(2, 3).bool()}
    settings = {"rank": 2, "target_modules": ["linear1", "linear2"]}
    if by_peft:
        unloaded = peft.get_peft_model(model, LoTRPeftConfig(**settings)).unload
    else:
        unloaded = partial(unload, apply_lotr(model, LoTRConfig(**settings)))
    zoo.fill(model, only=lambda name: "core" in name)
    expected = model(**inputs)
    assert relative(expected, plain(**inputs)) > 1e-3
    with torch.inference_mode():
        assert relative(model(**inputs), expected) < 1e-6
        unloaded()
        assert torch.equal(model(**inputs), plain(**inputs))


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.Tanh())})
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["a"]))
    assert model["a"] is model["b"][0]
    assert list(adapted_layers(model)) == ["a"]
    unload(model)
    assert model["a"] is model["b"][0] is layer


class Pipeline(nn.Sequential):
    """A container by inheritance, as sentence-transformers' models are."""


def names_of_a_layer() -> nn.Module:
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
    "names": names_of_a_layer,
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
    lotr_ext.TaskBank(model, 1).add()
    assert [n for n, _ in model.named_children()] == [n for n, _ in plain.named_children()]
    y = run(model, x)
    plain_output = run(plain, x)
    assert relative(y, plain_output) > 1e-6
    with disabled(model):
        assert relative(run(model, x), plain_output) < 1e-6

    other = apply_lotr(copy.deepcopy(plain), settings)
    lotr_ext.TaskBank(other, 1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(copy.deepcopy(model), x), y)
    assert torch.equal(run(other, x), y)

    unload(model)
    assert same(state(model), state(plain))
    attributes = itertools.chain.from_iterable(map(vars, model.modules()))
    assert not any(name.startswith("lotr") for name in attributes)


def registers_its_factors(container: nn.Module) -> nn.Module:
    """Returns a model of the same children that lists its factors among them.

    Containers did so in 0.1.0.
    """
    return zoo.Children(**dict(container.named_children()))


@pytest.mark.parametrize("core", ["dense", "diagonal"])
@pytest.mark.parametrize(
    "saved_as", [lambda model: model, registers_its_factors], ids=["as today", "as in 0.1.0"]
)
@pytest.mark.parametrize("name", CONTAINERS)
def test_files_of_containers(name: str, saved_as: Callable, core: str, tmp_path: Path) -> None:
    plain = zoo.fill(CONTAINERS[name]())
    settings = LoTRConfig(rank=2, scaling=1.5, core=core)
    model = moved(apply_lotr(saved_as(copy.deepcopy(plain)), settings))
    lotr_ext.save_adapter(model, tmp_path)
    loaded = lotr_ext.load_adapter(plain, tmp_path)
    assert worst(adapter_parameters(loaded), adapter_parameters(model)) == 0


def test_wraps_hooked_and_parametrized_layers(x: Tensor) -> None:
    plain = zoo.net("mlp")
    plain.blocks[0]["down"].register_forward_hook(mock.Mock(return_value=None))
    parametrizations.weight_norm(plain.blocks[1]["up"])
    model = apply_lotr(copy.deepcopy(plain), LoTRConfig(rank=2))
    layers = adapted_layers(model).items()
    wrapped = [name for name, layer in layers if isinstance(layer, LoTRWrapped)]
    assert wrapped == ["blocks.0.down", "blocks.1.up"]
    with unchanged(model), pytest.raises(TypeError, match="blocks"):  # of the weight norm
        merge(model)
    unload(model)
    assert same(state(model), state(plain))
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"safe": True}, ValueError),
        ({"safe": True, "keep_backup": False}, ValueError),
        ({}, KeyboardInterrupt),
    ],
)
def test_merge_changes_all_layers_or_none(
    model: nn.Module, options: dict, error: type[BaseException]
) -> None:
    last = model.blocks[1]["down"]
    if error is KeyboardInterrupt:
        last.merge = mock.Mock(side_effect=KeyboardInterrupt)
    else:
        last.core.data[0, 0] = float("inf")
    with unchanged(model), pytest.raises(error):
        merge(model, **options)
    assert not any(layer.merged for layer in adapted_layers(model).values())


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


def test_unmerge_changes_all_layers_or_none(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(16, 16), zoo.Dense(nn.Linear(16, 16)))
    moved(apply_lotr(model, LoTRConfig(rank=2, scaling=1.5)))
    merge(model, keep_backup=False, dequantize=True)
    y = model(x)
    with refused("unmerge", RuntimeError):
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
    bank = lotr_ext.TaskBank(model, 1)
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


# ---- what trains ---------------------------------------------------------------------------------


def test_the_summary_counts_what_is_adapted_and_trained() -> None:
    model = started("bert", modules_to_save=["classifier"])
    r = 3
    adapter = 8 * r * r + r * (16 + 16) + r * (24 + 16)
    assert trainable_summary(model) == TrainableSummary(
        adapter=adapter,
        trained=adapter + 16 * 3 + 3,
        total=sum(p.numel() for p in model.parameters()),
        layers=8,
        groups=2,
        parts=("A", "B", "core", "classifier"),
        left_out={},
    )
    assert sum(p.numel() for p in lotr_parameters(model)) == adapter


# Rates for parameter_groups, and the rate of each group.
RATES = [
    ({}, [None, None, None]),
    ({"lr": 1e-3}, [1e-3, 1e-3, 1e-3]),
    ({"lr": 1e-3, "other_lr": 1e-2}, [1e-3, 1e-3, 1e-2]),
]


@pytest.mark.parametrize(("rates", "expected"), RATES)
def test_groups_have_the_given_rates(rates: dict, expected: list[float | None]) -> None:
    groups = parameter_groups(started("mlp", modules_to_save=["head"]), **rates)
    assert [group["name"] for group in groups] == ["cores", "factors", "other"]
    assert [group.get("lr") for group in groups] == expected


def test_a_bank_that_trains_is_among_the_parameters() -> None:
    model = started("mlp", modules_to_save=["head"])
    bank = lotr_ext.TaskBank(model, 2)
    without_bank = list(lotr_parameters(model))
    assert len(without_bank) == 4 + 4
    bank.requires_grad_()
    assert set(lotr_parameters(model)) == {*without_bank, *bank.parameters()}
    cores, _, other = (set(group["params"]) for group in parameter_groups(model))
    assert set(bank.parameters()) < cores
    assert other == set(model.head.parameters())


# The sizes that docs/choosing.md measures: (size, rank, core, group_by).
SMOLLM2 = {
    "vocab_size": 64,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}
RECIPES = [
    ({"like": "lora:1"}, 48, "diagonal", "shape"),
    ({"like": "lora:4"}, 6, "dense", "block"),
    ({"numbers": 27_936}, 4, "dense", "shape"),
    ({"numbers": 27_935}, 3, "dense", "shape"),
]


@pytest.mark.parametrize(("size", "rank", "core", "group_by"), RECIPES)
def test_the_recipe_for_a_language_model(size: dict, rank: int, core: str, group_by: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    recommended = rank_for(model, **size, dropout=0.1)
    assert recommended == LoTRConfig(rank=rank, core=core, group_by=group_by, dropout=0.1)


@pytest.mark.filterwarnings("ignore")  # the rank exceeds a width, a head stays frozen
@pytest.mark.parametrize("name", ["mlp", "attention", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("like", [1, 3])
def test_a_recommended_adapter_has_the_size_of_a_lora(name: str, like: int) -> None:
    model = zoo.net(name)
    recommended = rank_for(model, like=f"lora:{like}", target_modules=zoo.TARGETS[name])
    one_rank_more = dataclasses.replace(recommended, rank=recommended.rank + 1)

    def size(settings: LoTRConfig) -> int:
        return trainable_summary(apply_lotr(zoo.net(name), settings)).adapter

    endings = tuple(zoo.TARGETS[name])
    targets = [m for n, m in model.named_modules() if n.endswith(endings)]
    size_of_lora = like * sum(sum(m.weight.shape) for m in targets)
    assert size(recommended) <= size_of_lora < size(one_rank_more)


def test_a_recommendation_leaves_out_the_head_of_the_task() -> None:
    recommended = rank_for(
        zoo.net("bert"), numbers=1000, task_type="SEQ_CLS", target_modules=["query", "classifier"]
    )
    without_head = rank_for(zoo.net("bert"), numbers=1000, target_modules=["query"])
    assert recommended.rank == without_head.rank


@pytest.mark.parametrize("train", [("core",), ("A", "core"), ("B", "core"), ("A", "B", "core")])
def test_only_the_named_parts_are_trained(x: Tensor, train: tuple[str, ...]) -> None:
    model = trained("mlp", train=train)
    assert trainable_summary(model).parts == train
    zoo.output(model, x).sum().backward()
    for layer in adapted_layers(model).values():
        parts = {"A": layer.factors.A.value, "B": layer.factors.B.value, "core": layer.core}
        assert {part for part, p in parts.items() if p.grad is not None} == set(train)


@pytest.mark.parametrize(
    ("name", "task_type", "count"),
    [("bert", None, 1), ("bert", "SEQ_CLS", 0), ("llama", "CAUSAL_LM", 0)],
)
def test_a_head_that_stays_frozen_is_warned_of(
    name: str, task_type: str | None, count: int, recwarn: pytest.WarningsRecorder
) -> None:
    settings = LoTRConfig(rank=2, target_modules=r".*(query|q_proj)", task_type=task_type)
    apply_lotr(zoo.net(name), settings)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == count and all("classifier stays frozen" in m for m in messages)


# ---- models without memory -----------------------------------------------------------------------

ROBERTA = partial(RobertaModel, RobertaConfig(vocab_size=50265), add_pooling_layer=False)
QWEN3 = partial(
    Qwen3MoeForCausalLM,
    Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
)
# The paper, query and value of RoBERTa-base: S r^2 + 2 r d numbers.
COUNTS = {
    1: 1560,
    2: 3168,
    4: 6528,
    8: 13824,
    16: 30720,
    32: 73728,
    40: 99840,
    80: 276480,
    88: 321024,
}
COUNTED = [
    *((ROBERTA, {"rank": r, "target_modules": ["query", "value"]}, n) for r, n in COUNTS.items()),
    # Qwen3-30B-A3B: each of 128 experts has two cores per layer, each factor is there once.
    (
        QWEN3,
        {"rank": 16, "target_parameters": ["gate_up_proj", "down_proj"]},
        2 * 48 * 128 * 16**2 + 16 * (2048 + 1536 + 768 + 2048),
    ),
]


@pytest.mark.parametrize(("make", "settings", "count"), COUNTED)
def test_counts_of_models_without_memory(
    make: Callable[[], nn.Module], settings: dict, count: int
) -> None:
    with torch.device("meta"):
        model = make()
    summary = trainable_summary(apply_lotr(model, LoTRConfig(**settings)))
    assert summary.adapter == summary.trained == count
    assert all(p.is_meta for p in model.parameters())


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
    lotr_ext.save_adapter(model, tmp_path)
    for base in (zoo.net("llama"), offloaded()):
        loaded = lotr_ext.load_adapter(base, tmp_path)
        assert relative(zoo.output(loaded, x), zoo.output(model, x)) < 1e-6


# ---- the first step of an optimizer --------------------------------------------------------------


def at_first_step(model: nn.Module, parameters: Iterable[nn.Parameter], x: Tensor) -> list[str]:
    """Returns the warnings of three steps of an optimizer over these parameters."""
    optimizer = torch.optim.SGD(parameters, 1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()  # without gradients: no warning yet
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
    return [str(warning.message) for warning in caught if "lotr_ext" in str(warning.message)]


def idle() -> nn.Module:
    """A model that calls one of its four adapted layers."""
    model = started("mlp")
    model.forward = lambda x: model.blocks[0]["up"](x)
    return model


def with_head() -> nn.Module:
    return trained("mlp", modules_to_save=["head"])


def another_model() -> nn.Module:
    started("mlp")
    return zoo.Mlp()


def older_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that the model had before it was adapted."""
    adapter = set(lotr_parameters(model))
    return [parameter for parameter in model.parameters() if parameter not in adapter]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.head.parameters())


def with_frozen_adapter() -> nn.Module:
    """A model that trains only its head."""
    model = with_head().requires_grad_(False)
    model.head.requires_grad_()
    return model


NOT_OF_THE_ADAPTER = r"none of the adapter's parameters"
# The model, the parameters of its optimizer, and the warning.
FIRST_STEPS = {
    "an idle layer": (idle, trained_parameters, r"called 3 of 4 .*'blocks.0.down'"),
    "before apply_lotr": (lambda: started("mlp"), older_parameters, NOT_OF_THE_ADAPTER),
    "before apply_lotr, with a head": (with_head, older_parameters, NOT_OF_THE_ADAPTER),
    "merged": (lambda: merge(with_head()), trained_parameters, r"merged into the weights.*unmerge"),
    "merged and unmerged": (lambda: unmerge(merge(with_head())), trained_parameters, None),
    "all parameters": (with_head, trained_parameters, None),
    "a head": (with_head, head_parameters, None),
    "a head of a merged model": (lambda: merge(with_head()), head_parameters, None),
    "merged, with a frozen adapter": (
        lambda: merge(with_frozen_adapter()),
        nn.Module.parameters,
        None,
    ),
    "another model": (another_model, trained_parameters, None),
    "some parts": (lambda: started("mlp", train=["core"]), adapter_parameters, None),
}


@pytest.mark.parametrize(
    ("make", "parameters_of", "expected"), FIRST_STEPS.values(), ids=FIRST_STEPS
)
def test_the_first_step_says_once_what_does_not_train(
    make: Callable[[], nn.Module], parameters_of: Callable, expected: str | None
) -> None:
    model = make()
    messages = at_first_step(model, parameters_of(model), zoo.inputs("mlp"))
    assert len(messages) == int(expected is not None)
    assert expected is None or re.search(expected, messages[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "parts", [(head_parameters, lotr_parameters), (lotr_parameters, head_parameters)]
)
def test_an_optimizer_for_the_head_and_one_for_the_adapter_are_right(parts: tuple) -> None:
    model = with_head()
    optimizers = [torch.optim.SGD(parameters_of(model), 1e-3) for parameters_of in parts]
    for _ in range(2):
        model(zoo.inputs("mlp")).sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_training_after_a_merge_is_noticed_also_later(x: Tensor) -> None:
    model = with_head()
    for change, count in ((lambda model: model, 0), (merge, 1), (unmerge, 0)):
        assert len(at_first_step(change(model), trained_parameters(model), x)) == count


def test_importing_the_package_registers_no_hook() -> None:
    code = (
        "import lotr_ext, torch.optim.optimizer as o; assert not o._global_optimizer_post_hooks; "
        "import lotr_ext.tasks, lotr_ext.convert; assert not o._global_optimizer_post_hooks"
    )
    run_python("-c", code, check=True)


# ---- what reads weights --------------------------------------------------------------------------


def test_projections_are_fused_only_without_an_adapter() -> None:
    model = nn.ModuleDict({"adapted": fusible(), "plain": fusible()})
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
    settings = {"rank": 2, "target_modules": ["q_proj", "lm_head"]}
    if by_peft:
        unloaded = peft.get_peft_model(model, LoTRPeftConfig(**settings)).unload
    else:
        unloaded = partial(unload, apply_lotr(model, LoTRConfig(**settings)))
    for adapted in (model, pickle.loads(pickle.dumps(model))):
        with refused("resize_token_embeddings", RuntimeError):
            adapted.resize_token_embeddings(80)
        assert len(adapted.get_input_embeddings().weight) == zoo.VOCABULARY
    unloaded().resize_token_embeddings(80)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["q_proj"])).resize_token_embeddings(90)
    assert len(model.lm_head.weight) == 90


# ---- reports -------------------------------------------------------------------------------------


def test_a_rank_above_the_width_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="rank 20 exceeds"):
        apply_lotr(zoo.net("mlp"), LoTRConfig(rank=20))


def test_explain_says_what_runs_and_why(x: Tensor, model: nn.Module) -> None:
    lines = explain(model, x).splitlines()
    what = "at rank 3: the kernels of lotr_ext (float32 on cpu)"
    assert lines == [f"2 x LoTRLinear {sizes} {what}" for sizes in ("16 -> 24", "24 -> 16")]
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in explain(model, x)
    with disabled(model):
        assert explain(model, x).count("disabled") == 2
    lotr_ext.TaskBank(model, 2).add()
    with lotr_ext.use_tasks(model, torch.tensor([0, -1, 0])):
        assert explain(model, x).splitlines() == lines
    assert explain(merge(trained("mlp")), x).count("merged") == 2
    one_layer = explain(LoTRLinear(4, 4, rank=2), torch.randn(2, 4))
    assert one_layer.startswith("1 x LoTRLinear 4 -> 4 at rank 2")
    mixed = apply_lotr(zoo.net("bert", torch.bfloat16), config("bert", adapter_dtype="float16"))
    assert "the PyTorch fallback, because A is torch.float16" in explain(mixed, zoo.inputs("bert"))
    assert explain(trained("mixture"), zoo.inputs("mixture")).count("LoTRHostedExperts") == 2


# ---- LoTRConfig ----------------------------------------------------------------------------------


def test_config_survives_json() -> None:
    every = LoTRConfig(
        rank=(2, 3),
        alpha=4,
        dropout=0.1,
        target_modules={"b", "a"},
        group_by={"x": "g"},
        train=["core", "A"],
    )
    others = LoTRConfig(
        scaling=2, core="tucker", adapter_dtype=torch.float64, task_type="CAUSAL_LM"
    )
    for settings in (LoTRConfig(), every, others):
        assert LoTRConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert every.target_modules == ("a", "b") and every.train == ("A", "core")
    assert LoTRConfig(core=lambda places, rank: None).to_dict()["core"] == "custom"


# ---- refusals ------------------------------------------------------------------------------------

# What is adapted, the settings, and the error.
WRONG_SETTINGS = [
    ("mlp", {"target_modules": ["blocks"]}, "target_modules: expected"),
    ("mlp", {"modules_to_save": ["nothing"]}, "modules_to_save: expected"),
    ("mlp", {"group_by": lambda name, module: "one"}, "group_by: expected"),
    ("mlp", {"group_by": lambda name, module: 3}, "group_by: expected"),
    ("mlp", {"core": lambda places, rank: nn.Linear(2, 2)}, "core: expected"),
    ("mlp", {"core": lambda places, rank: FORMS["diagonal"](places, rank + 1)}, "core: expected"),
    *((reads, {"target_modules": [name]}, "expected") for name in ("out_proj", "router", "tied")),
    (fused, {"target_modules": ["to_q"]}, "target_modules: expected"),
]


@pytest.mark.parametrize(("net", "settings", "message"), WRONG_SETTINGS)
def test_a_refused_model_is_unchanged(
    net: str | Callable[[], nn.Module], settings: dict, message: str
) -> None:
    model = network(net)
    with unchanged(model), pytest.raises(ERRORS, match=message):
        apply_lotr(model, LoTRConfig(rank=2, **settings))
