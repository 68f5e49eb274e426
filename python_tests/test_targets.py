"""Which layers an adapter has, in which groups, and why the others have none (targets.py).

A network and a configuration in, the names of the adapted layers out.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import zoo
from helpers import ERRORS
from models import same, started, state, trained_parameters, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lotr_ext import (
    LoTRConfig,
    LoTRWrapped,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    merge,
    save_adapter,
    trainable_summary,
    unload,
)
from lotr_ext.config import place_of
from lotr_ext.cores import FORMS
from lotr_ext.model import adapted_layers
from lotr_ext.targets import saved_modules

# ---- networks ------------------------------------------------------------------------------------


def timm(*heads: str) -> nn.Module:
    """A model that names its classifier as timm's do. DeiT has a second one, for distillation."""
    model = zoo.Children(features=nn.Linear(8, 8), **{head: nn.Linear(8, 3) for head in heads})
    classifiers = tuple(getattr(model, head) for head in heads)
    model.get_classifier = lambda: classifiers if len(heads) > 1 else classifiers[0]
    return model


def two_heads() -> nn.Module:
    """A model with the names of DistilBERT's heads."""
    return zoo.Children(
        query=nn.Linear(8, 8),
        pre_classifier=nn.Linear(8, 8),
        classifier=nn.Linear(8, 3),
        get_output_embeddings=lambda: None,
    )


def shared_memory() -> nn.Module:
    model = zoo.Children(**{name: nn.Linear(8, 8) for name in "abc"})
    model.b.weight = nn.Parameter(model.a.weight.data)
    return model


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def mostly_left_out() -> nn.Module:
    """Layers that "all-linear" leaves out for what they are, and one that it wraps."""
    normed = Normed(8, 8)
    normed.norm = nn.LayerNorm(8)
    tied = nn.Linear(8, 8)
    return zoo.Children(
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        router=Router(8, 8),
        normed=normed,
        tied=tied,
        embed=nn.Embedding(8, 8, _weight=tied.weight),
    )


def fused() -> nn.Module:
    model = nn.ModuleDict({"attention": zoo.FusibleAttention()})
    model["attention"].fuse_projections()
    return model


def numbered() -> nn.Module:
    """A container that names its children by numbers, as a model names its factors."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def inner_bert() -> nn.Module:
    return nn.ModuleDict({"inner": zoo.net("bert")})


def network(net: str | Callable[[], nn.Module]) -> nn.Module:
    return zoo.net(net) if isinstance(net, str) else net()


# ---- which layers --------------------------------------------------------------------------------

# The names of layers, in the order of the model.
UPS = ["blocks.0.up", "blocks.1.up"]
DOWNS = ["blocks.0.down", "blocks.1.down"]
BLOCKS = [UPS[0], DOWNS[0], UPS[1], DOWNS[1]]
GPT2_LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
LLAMA_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LLAMA_LAYERS = [*LLAMA_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
BERT_LAYERS = [
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *(f"{name}.dense" for name in ("attention.output", "intermediate", "output")),
]
QUERIES = [f"inner.bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
EXPERTS = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
DOWN_EXPERTS = [f"{experts}.lotr.down_proj" for experts in EXPERTS]


def in_both(prefix: str, names: list[str]) -> list[str]:
    """Returns the names of layers in the two blocks of a network."""
    return [f"{prefix}.{i}.{name}" for i in (0, 1) for name in names]


NOTHING: dict[str, str] = {}


class Choice(NamedTuple):
    """What a configuration selects in a network."""

    net: str | Callable[[], nn.Module]  # a name of `zoo`, or what returns the network
    settings: dict[str, object]
    adapted: list[str]
    left_out: dict[str, str] = NOTHING  # by the layer's name, a part of the reason
    saved: tuple[str, ...] = ()  # modules_to_save


CHOICES = [
    Choice("mlp", {}, [*BLOCKS, "head"]),
    Choice("mlp", {"target_modules": ["up"]}, UPS),
    Choice("mlp", {"target_modules": ["0.up", "head"]}, [UPS[0], "head"]),
    Choice(
        "mlp",
        {"target_modules": r".*\.(up|down)", "exclude_modules": ["0.up"]},
        BLOCKS[1:],
        left_out={UPS[0]: "exclude_modules"},
    ),
    Choice(
        "mlp",
        {"exclude_modules": r"blocks\..*"},
        ["head"],
        left_out=dict.fromkeys(BLOCKS, "exclude_modules"),
    ),
    Choice(
        "mlp",
        {"modules_to_save": ["head"], "exclude_modules": ["up"]},
        DOWNS,
        left_out={"head": "modules_to_save", **dict.fromkeys(UPS, "exclude_modules")},
        saved=("head",),
    ),
    Choice("gpt2", {"target_modules": ["c_attn"]}, in_both("transformer.h", ["attn.c_attn"])),
    Choice("gpt2", {}, in_both("transformer.h", GPT2_LAYERS), left_out={"lm_head": "tied"}),
    Choice(
        "llama",
        {"target_modules": r"model\.layers\.1\..*"},
        [f"model.layers.1.{name}" for name in LLAMA_LAYERS],
    ),
    Choice(
        "llama",
        {},
        in_both("model.layers", LLAMA_LAYERS),
        left_out={"lm_head": "the output layer"},
    ),
    Choice(
        "mixture",
        {},
        in_both("model.layers", LLAMA_ATTENTION),
        left_out={"lm_head": "the output layer", **dict.fromkeys(EXPERTS, "3-D")},
    ),
    Choice(
        "mixture",
        {"target_parameters": ["down_proj"], "modules_to_save": ["0.mlp"]},
        DOWN_EXPERTS[1:],
        saved=("0.mlp",),
    ),
    Choice(
        "mixture",
        {"target_parameters": ["down_proj"], "exclude_modules": ["0.mlp.experts"]},
        DOWN_EXPERTS[1:],
    ),
    Choice("mixture", {"target_parameters": ["down_proj"]}, DOWN_EXPERTS),
    Choice(
        "mixture",
        {"target_modules": "all-linear", "target_parameters": ["down_proj"]},
        in_both("model.layers", [*LLAMA_ATTENTION, "mlp.experts.lotr.down_proj"]),
        left_out={"lm_head": "the output layer"},
    ),
    Choice(
        inner_bert,
        {},
        [*in_both("inner.bert.encoder.layer", BERT_LAYERS), "inner.bert.pooler.dense"],
        left_out={"inner.classifier": "a head"},
    ),
    Choice(
        inner_bert,
        {"target_modules": ["classifier", "query"]},
        [*QUERIES, "inner.classifier"],
    ),
    Choice(
        inner_bert,
        {
            "target_modules": r".*\.(query|classifier)",
            "exclude_modules": ["1.attention.self.query"],
        },
        [QUERIES[0], "inner.classifier"],
        left_out={QUERIES[1]: "exclude_modules"},
    ),
    Choice(
        inner_bert,
        {"target_modules": ["query"], "modules_to_save": ["layer.0"]},
        QUERIES[1:],
        left_out={QUERIES[0]: "modules_to_save"},
        saved=("layer.0",),
    ),
    Choice(partial(timm, "fc"), {}, ["features"], left_out={"fc": "a head"}),
    Choice(
        partial(timm, "head", "head_dist"),
        {},
        ["features"],
        left_out={"head": "a head", "head_dist": "a head"},
    ),
    Choice(
        two_heads,
        {},
        ["query"],
        left_out={"pre_classifier": "a head", "classifier": "a head"},
    ),
    Choice(
        two_heads,
        {"task_type": "SEQ_CLS"},
        ["query"],
        left_out=dict.fromkeys(("pre_classifier", "classifier"), "modules_to_save"),
        saved=("pre_classifier", "classifier"),
    ),
    Choice(
        two_heads,
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        ["query"],
        left_out=dict.fromkeys(("pre_classifier", "classifier"), "modules_to_save"),
        saved=("classifier", "pre_classifier"),
    ),
    Choice(shared_memory, {}, ["c"], left_out={"a": "tied", "b": "tied"}),
    # A method like one of transformers, in a class that lacks its others.
    Choice(lambda: zoo.Children(a=nn.Linear(8, 8), resize_token_embeddings=len), {}, ["a"]),
    Choice(
        mostly_left_out,
        {},
        ["normed"],
        left_out={
            "attention.out_proj": "MultiheadAttention",
            "router": "its forward",
            "tied": "tied",
        },
    ),
    Choice(
        fused,
        {},
        ["attention.to_qkv"],
        left_out=dict.fromkeys([f"attention.to_{name}" for name in "qkv"], "to_qkv"),
    ),
    Choice(
        numbered,
        {"modules_to_save": ["1", "2"], "train": ["core"]},
        ["0"],
        left_out={"1": "modules_to_save"},
        saved=("1", "2"),
    ),
]
each_choice = pytest.mark.parametrize("choice", CHOICES)


@pytest.mark.filterwarnings("ignore")  # a head stays frozen
@each_choice
def test_selects_layers(choice: Choice) -> None:
    plain = network(choice.net)
    endings = tuple(f".{ending}" for ending in choice.saved)
    saved_names = [name for name, _ in plain.named_modules() if f".{name}".endswith(endings)]
    model = apply_lotr(plain, LoTRConfig(rank=2, **choice.settings))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert list(adapted_layers(model)) == choice.adapted
    assert (model.lotr_config.modules_to_save or ()) == choice.saved
    assert list(saved_modules(model, model.lotr_config)) == saved_names
    saved_parameters = {p for name in saved_names for p in model.get_submodule(name).parameters()}
    assert set(trained_parameters(model)) - set(lotr_parameters(model)) == saved_parameters


@pytest.mark.filterwarnings("ignore")
@each_choice
def test_the_summary_says_what_was_left_out_and_why(choice: Choice, tmp_path: Path) -> None:
    model = apply_lotr(network(choice.net), LoTRConfig(rank=2, **choice.settings))
    save_adapter(model, tmp_path)
    for summary in map(trainable_summary, (model, load_adapter(network(choice.net), tmp_path))):
        reasons = {name: reason for reason, names in summary.left_out.items() for name in names}
        assert reasons.keys() == choice.left_out.keys()
        assert all(choice.left_out[name] in reason for name, reason in reasons.items())
        assert str(summary).count("left out:") == len(summary.left_out)
        assert summary.layers == len(choice.adapted)


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.Tanh())})
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["a"]))
    assert model["a"] is model["b"][0]
    assert list(adapted_layers(model)) == ["a"]
    unload(model)
    assert model["a"] is model["b"][0] is layer


def test_wraps_hooked_and_parametrized_layers(x: Tensor) -> None:
    plain = zoo.net("mlp")
    plain.blocks[0]["down"].register_forward_hook(mock.Mock(return_value=None))
    parametrizations.weight_norm(plain.blocks[1]["up"])
    model = apply_lotr(copy.deepcopy(plain), LoTRConfig(rank=2))
    wrapped = [
        name for name, layer in adapted_layers(model).items() if isinstance(layer, LoTRWrapped)
    ]
    assert wrapped == ["blocks.0.down", "blocks.1.up"]
    with unchanged(model), pytest.raises(TypeError, match="blocks"):  # of the weight norm
        merge(model)
    unload(model)
    assert same(state(model), state(plain))
    assert torch.equal(model(x), plain(x))


# ---- which groups --------------------------------------------------------------------------------

# (net, group_by, the number of factors, the number of pairs of them)
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
    assert [key for key in model.state_dict() if key.endswith(".value")] == [
        f"lotr_factors.{i}.value" for i in range(factors)
    ]
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


# ---- settings ------------------------------------------------------------------------------------


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


def test_a_rank_above_the_width_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="rank 20 exceeds"):
        apply_lotr(zoo.net("mlp"), LoTRConfig(rank=20))


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
    assert len(messages) == count and all("frozen heads: classifier." in m for m in messages)


# (the network, the settings, the start of the error)
WRONG_SETTINGS = [
    ("mlp", {"target_modules": ["blocks"]}, "target_modules: expected"),
    ("mlp", {"modules_to_save": ["nothing"]}, "modules_to_save: expected"),
    ("mlp", {"group_by": lambda name, module: "one"}, "group_by: expected"),
    ("mlp", {"group_by": lambda name, module: 3}, "group_by: expected"),
    ("mlp", {"core": lambda places, rank: nn.Linear(2, 2)}, "core: expected"),
    ("mlp", {"core": lambda places, rank: FORMS["diagonal"](places, rank + 1)}, "core: expected"),
    *(
        (mostly_left_out, {"target_modules": [name]}, "target_modules: expected")
        for name in ("out_proj", "router", "tied")
    ),
    (fused, {"target_modules": ["to_q"]}, "target_modules: expected"),
]


@pytest.mark.parametrize(("net", "settings", "message"), WRONG_SETTINGS)
def test_a_refused_model_is_unchanged(
    net: str | Callable[[], nn.Module], settings: dict, message: str
) -> None:
    model = network(net)
    with unchanged(model), pytest.raises(ERRORS, match=message):
        apply_lotr(model, LoTRConfig(rank=2, **settings))
