"""The rows of test_bad_input.py: argument x bad value, in every entry point that has it.

A row is (id, the argument that the message names, a call that must be refused before anything
changes). The arguments of operators need no rows: a walk over the schemas makes their tests.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from math import inf, nan
from unittest import mock

import numpy as np
import peft
import torch
import zoo
from helpers import OLD_FILES
from models import started, trained
from test_experts import OFFS, E, K, M, N, R
from torch import Tensor, nn

import lotr_ext
from lotr_ext import (
    LoTRConfig,
    LoTRConv1D,
    LoTRExperts,
    LoTRFactor,
    LoTRFactors,
    LoTRLinear,
    LoTRWrapped,
    TaskBank,
    adapt,
    apply_lotr,
    load_adapter,
    lotr_grouped_linear,
    lotr_linear,
    rank_for,
    save_adapter,
    use_tasks,
)
from lotr_ext.convert import export_lora, lora_to_lotr, lotr_to_lora, original_to_lotr
from lotr_ext.cores import FORMS
from lotr_ext.init import fill_core_, fill_factor_
from lotr_ext.peft import LoTRPeftConfig
from lotr_ext.vllm import export_factors

Row = tuple[str, str, Callable[[], object]]

# ---- layers, cores and calls ---------------------------------------------------------------------

PAIR = LoTRFactors(6, 4, 2)
META = LoTRFactors(6, 4, 2, device="meta")
PLACES = [("0", "q"), ("0", "v"), ("1", "q")]
GOOD_CALL = {
    "x": torch.randn(5, 6),
    "weight": torch.randn(4, 6),
    "bias": torch.randn(4),
    "A": torch.randn(6, 2),
    "B": torch.randn(4, 2),
    "core": torch.randn(2, 2),
    "scaling": 1.0,
}


def call(**changed: object) -> Callable[[], object]:
    """Returns a call of lotr_linear with some arguments replaced."""
    return partial(lotr_linear, **{**GOOD_CALL, **changed})


def rows_call(index: object) -> Callable[[], object]:
    return call(core=torch.randn(3, 2, 2), core_index=index)


def layer(**settings: object) -> Callable[[], object]:
    return partial(LoTRLinear, 6, 4, **{"rank": 2, **settings})


def call_layer(x: object, **settings: object) -> Callable[[], object]:
    """Returns a call of a float32 layer."""
    return lambda: LoTRLinear(6, 4, 2, **settings)(x)


def use_core(core: object) -> Callable[[], object]:
    return lambda: LoTRLinear(6, 6, 4).use_core(core)


def adapted_inside() -> nn.Module:
    linear = nn.Linear(6, 4)
    linear.inner = LoTRLinear(6, 4, 2)
    return linear


LAYERS: list[Row] = [
    ("rank 0", "rank", layer(rank=0)),
    ("rank negative", "rank", partial(LoTRFactors, 6, 4, -1)),
    ("rank a float", "rank", partial(LoTRFactors, 6, 4, 4.0)),
    ("rank a bool", "rank", partial(LoTRFactors, 6, 4, True)),
    ("rank of three", "rank", partial(LoTRFactors, 6, 4, (1, 2, 3))),
    ("rank of one", "rank", partial(LoTRFactors, 6, 4, (3,))),
    ("rank a string", "rank", partial(LoTRFactors, 6, 4, "4")),
    ("rank of one factor", "rank", partial(LoTRFactor, 6, 0)),
    ("another rank than the factors", "rank", layer(rank=3, factors=PAIR)),
    ("in_features 0", "in_features", partial(LoTRFactors, 0, 4, 2)),
    ("out_features a float", "out_features", partial(LoTRFactors, 6, 4.5, 2)),
    ("features a bool", "features", partial(LoTRFactor, True, 2)),
    ("factors of another shape", "factors", layer(rank=None, factors=LoTRFactors(4, 6, 2))),
    (
        "factors of another shape, from_linear",
        "factors",
        lambda: LoTRLinear.from_linear(nn.Linear(6, 4), LoTRFactors(6, 5, 2)),
    ),
    ("factors a string", "factors", layer(rank=None, factors="A")),
    (
        "factors another module",
        "factors",
        lambda: LoTRLinear.from_linear(nn.Linear(6, 4), nn.Linear(6, 2)),
    ),
    ("factors on meta", "factors", lambda: LoTRLinear.from_linear(nn.Linear(6, 4), META)),
    ("factors on meta, new layer", "factors", layer(rank=None, factors=META)),
    ("factors on meta, wrapped", "factors", lambda: LoTRWrapped.from_linear(nn.Linear(6, 4), META)),
    ("a pair of a module", "A", partial(LoTRFactors.of, nn.Linear(6, 2), PAIR.B)),
    ("a pair of one factor", "B", partial(LoTRFactors.of, PAIR.A, PAIR.A)),
    (
        "a pair of two dtypes",
        "B",
        lambda: LoTRFactors.of(PAIR.A, LoTRFactor(4, 2, dtype=torch.float64)),
    ),
    (
        "linear a conv",
        "linear",
        lambda: LoTRLinear.from_linear(nn.Conv2d(1, 1, 1), LoTRFactors(1, 1, 1)),
    ),
    ("linear adapted", "linear", lambda: LoTRLinear.from_linear(LoTRLinear(6, 4, 2), PAIR)),
    (
        "linear adapted, wrapped",
        "linear",
        lambda: LoTRWrapped.from_linear(LoTRLinear(6, 4, 2), PAIR),
    ),
    (
        "linear with an adapted one inside",
        "linear",
        lambda: LoTRLinear.from_linear(adapted_inside(), PAIR),
    ),
    ("linear a pair", "linear", partial(adapt, PAIR, PAIR)),
    ("linear a norm", "linear", partial(adapt, nn.LayerNorm(4), LoTRFactors(4, 4, 2))),
    (
        "linear as Conv1D",
        "linear",
        lambda: LoTRConv1D.from_linear(nn.Linear(6, 6), LoTRFactors(6, 6, 2)),
    ),
    ("linear without sizes", "linear", lambda: LoTRWrapped.from_linear(nn.ReLU(), PAIR)),
    ("dtype integer", "dtype", partial(LoTRFactors, 6, 4, 2, dtype=torch.int32)),
    ("dtype a string", "dtype", partial(LoTRFactors, 6, 4, 2, dtype="float32")),
    ("dtype integer, layer", "dtype", layer(dtype=torch.int64)),
    ("dtype complex", "dtype", layer(dtype=torch.complex64)),
    ("dtype float8", "dtype", layer(dtype=torch.float8_e4m3fn)),
    ("scaling NaN", "scaling", layer(scaling=nan)),
    ("scaling infinite", "scaling", layer(scaling=inf)),
    ("scaling past every float", "scaling", layer(scaling=10**400)),
    ("scaling with alpha", "scaling", layer(scaling=2, alpha=8)),
    ("scaling with rslora", "scaling", layer(scaling=2, rslora=True)),
    ("scaling a string", "scaling", layer(scaling="1")),
    ("scaling a bool", "scaling", layer(scaling=True)),
    ("alpha infinite", "alpha", layer(alpha=inf)),
    ("alpha NaN", "alpha", layer(alpha=nan)),
    ("alpha a string", "alpha", layer(alpha="8")),
    ("rslora a number", "rslora", layer(rslora=1)),
    ("dropout 1", "dropout", layer(dropout=1.0)),
    ("dropout negative", "dropout", layer(dropout=-0.1)),
    ("dropout NaN", "dropout", layer(dropout=nan)),
    ("dropout None", "dropout", layer(dropout=None)),
    ("init unknown", "init", partial(LoTRFactors, 6, 4, 2, init="ones")),
    ("train unknown", "train", lambda: LoTRLinear(6, 4, 2).set_trained(("A", "G"))),
    ("core of another rank", "core", use_core(FORMS["diagonal"](PLACES, 5).at(PLACES[0]))),
    (
        "core in float64",
        "core",
        use_core(FORMS["diagonal"](PLACES, 4).double().at(PLACES[0])),
    ),
    ("core None", "core", use_core(mock.Mock(spec=nn.Module, return_value=None))),
    # computed cores
    ("diagonal of two ranks", "rank", partial(FORMS["diagonal"], PLACES, (3, 4))),
    ("cores of no places", "places", partial(FORMS["diagonal"], [], 4)),
    ("cores of a place twice", "places", partial(FORMS["diagonal"], [("0", "q")] * 2, 4)),
    ("an unknown place", "place", lambda: FORMS["diagonal"](PLACES, 4).at("nowhere")),
    ("no slices", "slices", partial(FORMS["tucker"], PLACES, 4, slices=0)),
    ("few as identity", "core_init", lambda: FORMS["few"](PLACES, 4).begin_as_identity()),
    # starts
    ("fill a vector", "tensor", lambda: fill_factor_(torch.empty(3), "normal")),
    (
        "fill integers",
        "tensor",
        lambda: fill_factor_(torch.empty(3, 2, dtype=torch.int64), "normal"),
    ),
    ("fill a core by an unknown init", "core_init", lambda: fill_core_(torch.empty(3, 2), "ones")),
    # calls of layers and of lotr_linear
    ("x too narrow", "x", call(x=torch.randn(5, 5))),
    ("x a list", "x", call(x=[1.0] * 6)),
    ("x of integers", "x", call(x=torch.ones(5, 6, dtype=torch.int64))),
    ("x a number", "x", call(x=torch.tensor(1.0))),
    ("x too narrow, layer", "x", call_layer(torch.randn(5, 5))),
    ("x a list, layer", "x", call_layer([1.0] * 6)),
    ("x a number, layer", "x", call_layer(torch.tensor(1.0))),
    ("x of integers, layer", "x", call_layer(torch.ones(5, 6, dtype=torch.int64))),
    ("x of bools, layer", "x", call_layer(torch.ones(5, 6, dtype=torch.bool))),
    ("x in float64, layer", "x", call_layer(torch.ones(5, 6, dtype=torch.float64))),
    ("x in float64, dropout", "x", call_layer(torch.ones(5, 6, dtype=torch.float64), dropout=0.5)),
    (
        "x of integers, autocast",
        "x",
        torch.autocast("cpu", torch.bfloat16)(call_layer(torch.ones(5, 6, dtype=torch.int64))),
    ),
    ("x on meta, layer", "x", call_layer(torch.ones(3, 6, device="meta"))),
    ("x on meta, dropout", "x", call_layer(torch.ones(200, 6, device="meta"), dropout=0.5)),
    ("x with values, layer on meta", "x", call_layer(torch.ones(3, 6), device="meta")),
    ("weight a vector", "weight", call(weight=torch.randn(6))),
    ("weight in float64", "x", call(weight=torch.randn(4, 6).double())),
    ("weight None", "weight", call(weight=None)),
    ("bias of another shape", "bias", call(bias=torch.randn(3))),
    ("bias a list", "bias", call(bias=[0.0] * 4)),
    ("A of another shape", "A", call(A=torch.randn(5, 2))),
    ("A of integers", "A", call(A=torch.ones(6, 2, dtype=torch.int64))),
    ("A on meta", "A", call(A=torch.randn(6, 2, device="meta"))),
    ("A and B on meta", "A", call(A=META.A.value, B=META.B.value)),
    ("x on meta", "weight", call(x=torch.randn(5, 6, device="meta"))),
    ("B of another shape", "B", call(B=torch.randn(5, 2))),
    ("core of another shape in a call", "core", call(core=torch.randn(3, 2))),
    ("core of tasks without an index", "core", call(core=torch.randn(3, 2, 2))),
    ("one core with an index", "core", call(core_index=torch.zeros(5, dtype=torch.int64))),
    ("scaling NaN in a call", "scaling", call(scaling=nan)),
    ("scaling a tensor in a call", "scaling", call(scaling=torch.ones(2))),
    ("dropout_p 1", "dropout_p", call(dropout_p=1.0, training=True)),
    ("dropout_p None", "dropout_p", call(dropout_p=None)),
    ("core_index int32", "core_index", rows_call(torch.zeros(5, dtype=torch.int32))),
    ("core_index a list", "core_index", rows_call([0] * 5)),
    ("core_index too short", "core_index", rows_call(torch.zeros(4, dtype=torch.int64))),
    ("core_index a number", "core_index", rows_call(torch.tensor(0))),
    (
        "core_index of too many dimensions",
        "core_index",
        rows_call(torch.zeros(5, 6, dtype=torch.int64)),
    ),
    ("core_index too large", "core_index", rows_call(torch.tensor([0, 1, 2, 3, 0]))),
    ("core_index -2", "core_index", rows_call(torch.tensor([0, 1, -2, 1, 0]))),
]


# ---- experts -------------------------------------------------------------------------------------

GOOD_GROUPED_CALL = {
    "x": torch.zeros(M, K),
    "weight": torch.zeros(E, N, K),
    "offs": OFFS,
    "A": torch.zeros(K, R[0]),
    "B": torch.zeros(N, R[1]),
    "cores": torch.zeros(E, *R),
    "scaling": 0.7,
    "tokens": torch.zeros(50, dtype=torch.int64),
}


def grouped(**changed: object) -> Callable[[], object]:
    """Returns a call of lotr_grouped_linear with some arguments replaced."""
    return partial(lotr_grouped_linear, **{**GOOD_GROUPED_CALL, **changed})


row_core = partial(
    torch.ops.lotr.row_core,
    torch.ones(4, 3),
    torch.ones(2, 3, 5),
    index=None,
    offs=None,
    tokens=None,
    scaling=1.0,
)


def call_experts(offs: Tensor, *tokens: Tensor) -> Callable[[], object]:
    return lambda: LoTRExperts(E, K, N, R)(torch.zeros(M, K), offs, *tokens)


EXPERTS: list[Row] = [
    ("experts 0", "num_experts", partial(LoTRExperts, 0, K, N)),
    ("experts a float", "num_experts", partial(LoTRExperts, 2.0, K, N)),
    (
        "experts, other factors",
        "factors",
        partial(LoTRExperts, E, K, N, factors=LoTRFactors(N, K, 2)),
    ),
    ("experts, dropout 1", "dropout", partial(LoTRExperts, E, K, N, dropout=1.0)),
    ("experts, too few tokens", "tokens", call_experts(torch.zeros(E).int(), torch.tensor([M]))),
    ("experts, too many offs", "offs", call_experts(torch.zeros(E + 1).int())),
    (
        "experts, x in float64",
        "x",
        lambda: LoTRExperts(E, K, N, R)(torch.zeros(M, K).double(), torch.zeros(E).int()),
    ),
    ("grouped x in float64", "x", grouped(x=torch.zeros(M, K).double())),
    ("grouped x too wide", "x", grouped(x=torch.zeros(M, K + 1))),
    ("grouped offs int64", "offs", grouped(offs=OFFS.long())),
    ("grouped offs too short", "offs", grouped(offs=OFFS[:-1])),
    ("grouped offs descending", "offs", grouped(offs=OFFS.flip(0))),
    ("grouped bias in float64", "bias", grouped(bias=torch.zeros(E, N).double())),
    ("grouped tokens int32", "tokens", grouped(tokens=torch.zeros(50, dtype=torch.int32))),
    ("grouped tokens too large", "tokens", grouped(tokens=torch.full((50,), M))),
    ("grouped tokens -1", "tokens", grouped(tokens=torch.full((50,), -1))),
    ("grouped weight a matrix", "weight", grouped(weight=torch.zeros(E, N))),
    ("grouped bias too wide", "bias", grouped(bias=torch.zeros(E, N + 1))),
    ("grouped A too long", "A", grouped(A=torch.zeros(K + 1, R[0]))),
    ("grouped cores of another expert", "cores", grouped(cores=torch.zeros(E + 1, *R))),
    (
        "grouped core_index of floats",
        "core_index",
        grouped(cores=torch.zeros(2, E, *R), core_index=torch.zeros(M)),
    ),
    (
        "grouped core_index too long",
        "core_index",
        grouped(cores=torch.zeros(2, E, *R), core_index=torch.zeros(M + 1, dtype=torch.int64)),
    ),
    ("grouped scaling NaN", "scaling", grouped(scaling=nan)),
    # the operator that computes with a core per row
    ("row_core, index too large", "index", partial(row_core, index=torch.tensor([0, 1, 2, 0]))),
    ("row_core, index -2", "index", partial(row_core, index=torch.tensor([0, 1, -2, 0]))),
    ("row_core, index too short", "index", partial(row_core, index=torch.tensor([0, 1, 0]))),
    (
        "row_core, tokens too large",
        "tokens",
        partial(row_core, index=torch.tensor([0, 1]), tokens=torch.tensor([0, 4])),
    ),
    ("row_core, offs descending", "offs", partial(row_core, offs=torch.tensor([3, 2]).int())),
    ("row_core, offs too large", "offs", partial(row_core, offs=torch.tensor([3, 5]).int())),
    ("row_core, too many offs", "offs", partial(row_core, offs=torch.tensor([1, 2, 4]).int())),
    # With one operand on meta, torch calls the fake kernel, which returns memory without values.
    (
        "grouped_mm, weight on meta",
        "grouped_mm",
        lambda: torch.ops.lotr.grouped_mm(
            torch.ones(3, K), torch.ones(E, N, K, device="meta"), OFFS
        ),
    ),
    (
        "grouped_mm, x on meta",
        "grouped_mm",
        lambda: torch.ops.lotr.grouped_mm(
            torch.ones(3, K, device="meta"), torch.ones(E, N, K), OFFS
        ),
    ),
    (
        "grouped_outer, x on meta",
        "grouped_outer",
        lambda: torch.ops.lotr.grouped_outer(
            torch.ones(3, N), torch.ones(3, K, device="meta"), OFFS
        ),
    ),
]


# ---- models, tasks, files ------------------------------------------------------------------------

# A group_by for a row of load_adapter: as many pairs of factors as by name, but in the second block
# those of q and k are exchanged.
EXCHANGED = {f"blocks.0.{name}": name for name in "qkvo"} | {
    f"blocks.1.{name}": other for name, other in zip("qkvo", "kqvo")
}


def adapt_mlp(**settings: object) -> Callable[[], object]:
    return lambda: apply_lotr(zoo.net("mlp"), LoTRConfig(rank=2, **settings))


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "out": nn.Linear(4, 4)})
    model["out"].weight = model["embed"].weight
    return model


def with_lora() -> nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q"]), zoo.net("attention"))


def merged() -> nn.Module:
    return lotr_ext.merge(trained("mlp"))


def banked(tasks: int = 3, **settings: object) -> nn.Module:
    """A model with two tasks in a bank."""
    model = trained("mlp", **settings)
    bank = TaskBank(model, tasks)
    bank.add()
    bank.add()
    return model


def run_with_tasks(index: object, x: Tensor | None = None) -> None:
    model = banked()
    with use_tasks(model, index):
        model(zoo.inputs("mlp") if x is None else x)


def saved(model: nn.Module) -> str:
    folder = tempfile.mkdtemp()
    save_adapter(model, folder)
    return folder


SETTINGS_OF_LORA = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "use_dora",
    "magnitude",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
]
SETTINGS = [
    ("rank", [0, -1, 2.0, "8", True, (1, 2, 3), None]),
    ("alpha", ["1", True, nan]),
    ("rslora", [1, "yes"]),
    ("scaling", ["Auto", None, inf, True]),
    ("dropout", [1.0, -0.1, "0", None, nan]),
    ("target_modules", [[], [""], [1], "(", 3]),
    ("exclude_modules", [[], "(", 3]),
    ("modules_to_save", [[], "head", [""], 3]),
    ("target_parameters", [[], "down_proj", [1]]),
    ("group_by", ["layers", 3, None]),
    ("init", ["zeros", None, True]),
    ("train", ["core", [], ["A", "A"], ["C"], ["A", "B"], None]),
    ("adapter_dtype", [None, torch.int8, "float32", torch.float8_e4m3fn]),
    ("core_init", ["ones", None]),
    ("core", ["sparse", 3, None]),
    ("task_type", ["SEQ", 3]),
    *((name, [1]) for name in SETTINGS_OF_LORA),
]
MODELS: list[Row] = [
    *(
        (f"config {name}={value!r}", name, partial(LoTRConfig, **{name: value}))
        for name, values in SETTINGS
        for value in values
    ),
    ("config scaling and alpha", "scaling", partial(LoTRConfig, scaling=1.0, alpha=2.0)),
    ("config svd and an unknown part", "train", partial(LoTRConfig, init="svd", train=["X"])),
    ("config svd and width", "init", partial(LoTRConfig, init="svd", group_by="width")),
    ("config svd and identity", "init", partial(LoTRConfig, init="svd", core_init="identity")),
    ("config svd and computed cores", "core", partial(LoTRConfig, init="svd", core="diagonal")),
    (
        "config computed cores and experts",
        "core",
        partial(LoTRConfig, core="diagonal", target_parameters=["down_proj"]),
    ),
    (
        "config identity without B",
        "train",
        partial(LoTRConfig, core_init="identity", train=["core"]),
    ),
    ("config from a dtype", "adapter_dtype", lambda: LoTRConfig.from_dict({"adapter_dtype": 3})),
    # apply_lotr
    (
        "apply to a linear layer",
        "target_modules",
        lambda: apply_lotr(nn.Linear(4, 4), LoTRConfig()),
    ),
    ("apply no config", "config", lambda: apply_lotr(zoo.net("mlp"), {"rank": 2})),
    ("apply PEFT's config", "config", lambda: apply_lotr(zoo.net("mlp"), peft.LoraConfig())),
    (
        "apply to convolutions",
        "target_modules",
        lambda: apply_lotr(nn.Sequential(nn.Conv2d(3, 3, 1)), LoTRConfig()),
    ),
    ("apply where all is tied", "target_modules", lambda: apply_lotr(tied(), LoTRConfig())),
    ("apply twice", "model", lambda: apply_lotr(started("mlp"), LoTRConfig(rank=2))),
    (
        "apply to a compiled model",
        "model",
        lambda: apply_lotr(torch.compile(zoo.net("mlp")), LoTRConfig(rank=2)),
    ),
    ("apply over PEFT's LoRA", "model", lambda: apply_lotr(with_lora(), LoTRConfig(rank=2))),
    ("a misspelt layer", "target_modules", adapt_mlp(target_modules=["upp"])),
    ("a layer that is not linear", "target_modules", adapt_mlp(target_modules=["blocks.0"])),
    ("a misspelt exclusion", "exclude_modules", adapt_mlp(exclude_modules=["hed"])),
    (
        "all layers excluded",
        "target_modules",
        adapt_mlp(target_modules=["up"], exclude_modules=["up"]),
    ),
    ("a misspelt module to save", "modules_to_save", adapt_mlp(modules_to_save=["hed"])),
    ("a group of two shapes", "group_by", adapt_mlp(group_by=lambda name, module: "one")),
    ("a group that is not a string", "group_by", adapt_mlp(group_by=lambda name, module: 1)),
    ("a mapping without a layer", "group_by", adapt_mlp(group_by={"head": "a"})),
    ("a callable core", "core", adapt_mlp(core=lambda places, rank: None)),
    (
        "a tied layer",
        "target_modules",
        lambda: apply_lotr(zoo.net("gpt2"), LoTRConfig(rank=2, target_modules=["lm_head"])),
    ),
    ("a task without a head", "task_type", adapt_mlp(task_type="SEQ_CLS")),
    (
        "a parameter that is not of experts",
        "target_parameters",
        adapt_mlp(target_parameters=["up.weight"]),
    ),
    # rank_for
    *(
        (
            f"rank_for like={like!r}",
            "like",
            partial(rank_for, zoo.net("mlp"), like=like),
        )
        for like in ("lora", "lora:0", "lora:x", "vera:1", 4)
    ),
    ("rank_for nothing", "like", partial(rank_for, zoo.net("mlp"))),
    (
        "rank_for both",
        "like",
        partial(rank_for, zoo.net("mlp"), like="lora:1", numbers=100),
    ),
    *(
        (
            f"rank_for numbers={n!r}",
            "numbers",
            partial(rank_for, zoo.net("mlp"), numbers=n),
        )
        for n in (0, 20, 2.0, "9")
    ),
    (
        "rank_for with a rank",
        "rank",
        partial(rank_for, zoo.net("mlp"), like="lora:1", rank=4),
    ),
    (
        "rank_for experts",
        "target_parameters",
        partial(rank_for, zoo.net("mlp"), like="lora:1", target_parameters=["up.weight"]),
    ),
    # Layers of several shapes, where diagonal cores have more parameters than LoRA.
    (
        "rank_for too small a LoRA",
        "like",
        partial(rank_for, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), like="lora:1"),
    ),
    (
        "rank_for an adapted model",
        "model",
        partial(rank_for, started("mlp"), like="lora:1"),
    ),
    # an adapted model
    *(
        (f"{function.__name__} of a plain model", "model", partial(function, zoo.net("mlp")))
        for function in (
            lotr_ext.merge,
            lotr_ext.unmerge,
            lotr_ext.unload,
            lotr_ext.trainable_summary,
            lotr_ext.parameter_groups,
        )
    ),
    ("disabled of a merged model", "disabled", lambda: lotr_ext.disabled(merged()).__enter__()),
    ("merge twice", "merge", lambda: lotr_ext.merge(merged())),
    ("merge a merged layer", "merge", lambda: merged().blocks[0]["up"].merge()),
    ("unmerge an unmerged layer", "unmerge", lambda: trained("mlp").blocks[0]["up"].unmerge()),
    ("the state_dict of a merged layer", "state_dict", lambda: merged().state_dict()),
    ("unmerge an unmerged model", "unmerge", lambda: lotr_ext.unmerge(trained("mlp"))),
    (
        "unload experts that are not of transformers",
        "unload",
        lambda: lotr_ext.unload(
            nn.Sequential(LoTRLinear(4, 4, rank=2), LoTRExperts(2, 4, 4, rank=2)),
            merge=True,
        ),
    ),
    (
        "dequantize=int8",
        "dequantize",
        lambda: lotr_ext.merge(trained("mlp"), dequantize=torch.int8),
    ),
    ("a NumPy x", "x", lambda: trained("mlp").blocks[0]["up"](np.zeros((2, 16), np.float32))),
    (
        "the gradient of no batches",
        "batches",
        lambda: lotr_ext.init_from_gradient(started("mlp"), [], lambda m, b: m(b).sum()),
    ),
    (
        "the gradient of a loss without the adapted layers",
        "loss",
        lambda: lotr_ext.init_from_gradient(
            started("mlp", target_modules=["up"]),
            [zoo.inputs("mlp")],
            lambda m, b: m.head.requires_grad_().weight.sum(),
        ),
    ),
    (
        "the gradient at other cores",
        "core",
        lambda: lotr_ext.init_from_gradient(
            trained("mlp"), [zoo.inputs("mlp")], lambda m, b: m(b).sum()
        ),
    ),
    # tasks
    ("a bank of a plain model", "model", lambda: TaskBank(zoo.net("mlp"), 2)),
    ("a bank of no tasks", "tasks", lambda: TaskBank(trained("mlp"), 0)),
    ("a second bank", "TaskBank", lambda: TaskBank(banked(), 2)),
    ("a bank over svd", "TaskBank", lambda: TaskBank(trained("mlp", "svd"), 2)),
    ("a task too many", "add", lambda: banked(tasks=2).lotr_tasks.add()),
    ("a task that is not an int", "task", lambda: banked().lotr_tasks.remove("0")),
    ("a free task", "task", lambda: banked().lotr_tasks.cores_of(2)),
    (
        "a task of other layers",
        "source",
        lambda: banked().lotr_tasks.add({"a.core": torch.zeros(3, 3)}),
    ),
    ("a file that is not a task", "source", lambda: banked().lotr_tasks.add(__file__)),
    (
        "a task of another model",
        "source",
        lambda: banked().lotr_tasks.add(OLD_FILES / "tasks" / "task0.safetensors"),
    ),
    (
        "tasks without a bank",
        "use_tasks",
        lambda: use_tasks(trained("mlp"), torch.zeros(3, dtype=torch.long)).__enter__(),
    ),
    ("an index as a list", "index", partial(run_with_tasks, [0, 1, 0])),
    ("an index of floats", "index", partial(run_with_tasks, torch.zeros(3))),
    ("an index beyond the bank", "index", partial(run_with_tasks, torch.tensor([0, 1, 3]))),
    ("an index below -1", "index", partial(run_with_tasks, torch.tensor([0, 1, -2]))),
    ("an index of a free slot", "index", partial(run_with_tasks, torch.tensor([0, 1, 2]))),
    (
        "an index without columns",
        "index",
        partial(run_with_tasks, torch.zeros(3, 0, dtype=torch.long)),
    ),
    (
        "an index of three dimensions",
        "index",
        partial(run_with_tasks, torch.zeros(3, 5, 1, dtype=torch.long)),
    ),
    ("an index of other rows", "x", partial(run_with_tasks, torch.zeros(4, dtype=torch.long))),
    ("an index of other tokens", "x", partial(run_with_tasks, torch.zeros(3, 4, dtype=torch.long))),
    (
        "an index per token of other rows",
        "x",
        partial(run_with_tasks, torch.zeros(4, 5, dtype=torch.long)),
    ),
    (
        "an index per token of a flat x",
        "x",
        partial(run_with_tasks, torch.zeros(3, 5, dtype=torch.long), x=torch.randn(15, 16)),
    ),
    # files
    ("save a plain model", "model", lambda: save_adapter(zoo.net("mlp"), tempfile.mkdtemp())),
    (
        "load with an unknown strictness",
        "strict",
        lambda: load_adapter(zoo.net("mlp"), OLD_FILES / "dense", strict="layers"),
    ),
    (
        "load a missing folder",
        "directory",
        lambda: load_adapter(zoo.net("mlp"), OLD_FILES / "none"),
    ),
    ("load a hub id", "directory", lambda: load_adapter(zoo.net("mlp"), "someone/adapter")),
    ("load an empty folder", "directory", lambda: load_adapter(zoo.net("mlp"), tempfile.mkdtemp())),
    (
        "load into another model",
        "model",
        lambda: load_adapter(zoo.net("attention"), OLD_FILES / "dense"),
    ),
    (
        "load into other layers",
        "layers",
        lambda: load_adapter(trained("mlp", target_modules=["up"]), OLD_FILES / "dense"),
    ),
    *(
        (
            f"load factors by {in_file} into a model by {in_model}",
            "layers",
            lambda in_file=in_file, in_model=in_model: load_adapter(
                started("attention", group_by=in_model),
                saved(trained("attention", group_by=in_file)),
            ),
        )
        for in_file, in_model in (
            ("shape", "name"),
            ("name", "shape"),
            ("block", "layer"),
            ("name", EXCHANGED),
        )
    ),
    (
        "load another rank",
        "A",
        lambda: load_adapter(trained("mlp", modules_to_save=["head"]), OLD_FILES / "dense"),
    ),
    (
        "load other modules_to_save",
        "tensors",
        lambda: load_adapter(trained("mlp", rank=2), OLD_FILES / "dense"),
    ),
    (
        "load another dtype",
        "A",
        lambda: load_adapter(
            trained("mlp", rank=2, modules_to_save=["head"], adapter_dtype="bfloat16"),
            OLD_FILES / "dense",
        ),
    ),
    (
        "load into a merged model",
        "load_adapter",
        lambda: load_adapter(
            lotr_ext.merge(trained("mlp", rank=2, modules_to_save=["head"])), OLD_FILES / "dense"
        ),
    ),
    (
        "load under a bank",
        "load_adapter",
        lambda: load_adapter(banked(rank=2, modules_to_save=["head"]), OLD_FILES / "dense"),
    ),
    (
        "load one that was built by hand",
        "model",
        lambda: load_adapter(zoo.net("mlp"), saved(nn.Sequential(LoTRLinear(4, 4, rank=2)))),
    ),
]


# ---- PEFT, conversions, vLLM ---------------------------------------------------------------------


def tuned(
    net: nn.Module | None = None, name: str = "default", **settings: object
) -> peft.PeftModel:
    config = LoTRPeftConfig(**{"rank": 2, "target_modules": ["q", "v"], **settings})
    return peft.get_peft_model(zoo.net("attention") if net is None else net, config, name)


def run_with_adapter_names(
    names: object, prepare: Callable[[peft.PeftModel], object] = nn.Module.eval
) -> None:
    model = tuned()
    prepare(model)
    model(zoo.inputs("attention"), adapter_names=names)


def add_second(name: str, core: str = "dense") -> Callable[[], object]:
    return lambda: tuned(core=core).add_adapter(name, LoTRPeftConfig(rank=2, target_modules=["q"]))


def one_layer_twice() -> nn.Module:
    net = zoo.net("attention")
    net.blocks[1]["q"] = net.blocks[0]["q"]
    return net


def peft_folder(
    config_class: type[peft.PeftConfig], tensors: dict | None = None, **settings: object
) -> str:
    config = config_class(r=2, target_modules=["q", "v", "head"], **settings)
    folder = tempfile.mkdtemp()
    peft.get_peft_model(zoo.net("attention"), config).save_pretrained(folder, state_dict=tensors)
    return folder


lora_folder = partial(peft_folder, peft.LoraConfig)


OTHER_PACKAGES: list[Row] = [
    # settings of PEFT's configuration
    ("PEFT rank 0", "rank", partial(LoTRPeftConfig, rank=0)),
    ("PEFT rank and r", "r", partial(LoTRPeftConfig, r=4, rank=2)),
    ("PEFT init svd", "init", partial(LoTRPeftConfig, init="svd")),
    ("PEFT core custom", "core", partial(LoTRPeftConfig, core="custom")),
    (
        "PEFT group_by a callable",
        "group_by",
        partial(LoTRPeftConfig, group_by=lambda name, module: "g"),
    ),
    ("PEFT a group with a dot", "group_by", partial(LoTRPeftConfig, group_by={"q": "a.b"})),
    ("PEFT lora_alpha", "lora_alpha", partial(LoTRPeftConfig, lora_alpha=8)),
    ("PEFT rank_pattern", "rank_pattern", partial(LoTRPeftConfig, rank_pattern={})),
    ("PEFT use_dora", "use_dora", partial(LoTRPeftConfig, use_dora=True)),
    (
        "PEFT target_parameters",
        "target_parameters",
        partial(LoTRPeftConfig, target_parameters=["experts.down_proj"]),
    ),
    ("PEFT bias of LoRA", "bias", partial(LoTRPeftConfig, bias="lora_only")),
    (
        "PEFT layers_to_transform",
        "layers_to_transform",
        partial(LoTRPeftConfig, layers_to_transform=[0], target_modules="q"),
    ),
    (
        "PEFT layers_pattern alone",
        "layers_pattern",
        partial(LoTRPeftConfig, layers_pattern="blocks"),
    ),
    # models
    ("PEFT an embedding", "target_modules", lambda: tuned(target_modules=["embed"])),
    (
        "PEFT a layer in two places",
        "target_modules",
        lambda: tuned(one_layer_twice(), target_modules=["q"]),
    ),
    ("PEFT a tied layer", "target_modules", lambda: tuned(tied(), target_modules=["out"])),
    (
        "PEFT a layer of LoRA",
        "target_modules",
        lambda: tuned(with_lora(), target_modules=["q"]),
    ),
    ("PEFT adapter_name with a dot", "adapter_name", lambda: tuned(name="a.b")),
    ("PEFT adapter_name keys", "adapter_name", lambda: tuned(name="keys")),
    ("PEFT adapter_name training", "adapter_name", lambda: tuned(name="training")),
    ("PEFT adapter_name of a layer", "adapter_name", add_second("q")),
    ("PEFT adapter_name of a group", "adapter_name", add_second("A_16x16")),
    ("PEFT adapter_name of a factor's tensor", "adapter_name", add_second("value")),
    ("PEFT adapter_name of a core", "adapter_name", add_second("core")),
    ("PEFT adapter_name of computed cores", "adapter_name", add_second("diagonal", "diagonal")),
    ("PEFT adapter_names a word", "adapter_names", partial(run_with_adapter_names, "default")),
    (
        "PEFT too few adapter_names",
        "adapter_names",
        partial(run_with_adapter_names, ["default"] * 2),
    ),
    (
        "PEFT unknown adapter_names",
        "adapter_names",
        partial(run_with_adapter_names, ["nobody"] * 3),
    ),
    (
        "PEFT adapter_names in training",
        "adapter_names",
        partial(run_with_adapter_names, ["default"] * 3, nn.Module.train),
    ),
    (
        "PEFT adapter_names of merged",
        "adapter_names",
        partial(
            run_with_adapter_names, ["default"] * 3, lambda model: model.eval().merge_adapter()
        ),
    ),
    (
        "PEFT a state of other layers",
        "adapter",
        lambda: peft.set_peft_model_state_dict(
            tuned(target_modules=["q"]), peft.get_peft_model_state_dict(tuned())
        ),
    ),
    # conversions
    (
        "export_lora of a plain model",
        "model",
        lambda: export_lora(zoo.net("mlp"), tempfile.mkdtemp()),
    ),
    (
        "export_lora with a wrong task_type",
        "task_type",
        lambda: export_lora(started("mlp"), tempfile.mkdtemp(), task_type="X"),
    ),
    (
        "export_lora in an unknown form",
        "experts",
        lambda: export_lora(started("mlp"), tempfile.mkdtemp(), experts="X"),
    ),
    (
        "lotr_to_lora for unknown hosts",
        "hosts",
        lambda: lotr_to_lora(saved(started("mlp")), tempfile.mkdtemp(), hosts="X"),
    ),
    (
        "export_lora of experts built by hand",
        "experts",
        lambda: export_lora(nn.Sequential(LoTRExperts(2, 4, 4, rank=2)), tempfile.mkdtemp()),
    ),
    (
        "lotr_to_lora of a file of PEFT without tensors",
        "source",
        lambda: lotr_to_lora(peft_folder(LoTRPeftConfig, tensors={}), tempfile.mkdtemp()),
    ),
    (
        "lotr_to_lora of a LoRA",
        "adapter_config.json",
        lambda: lotr_to_lora(lora_folder(), tempfile.mkdtemp()),
    ),
    (
        "lotr_to_lora of an empty folder",
        "directory",
        lambda: lotr_to_lora(tempfile.mkdtemp(), tempfile.mkdtemp()),
    ),
    ("lora_to_lotr of an empty folder", "source", lambda: lora_to_lotr(tempfile.mkdtemp(), rank=2)),
    ("lora_to_lotr of rank 0", "rank", lambda: lora_to_lotr(lora_folder(), rank=0)),
    (
        "lora_to_lotr by width",
        "group_by",
        lambda: lora_to_lotr(lora_folder(), rank=2, group_by="width"),
    ),
    (
        "lora_to_lotr by a mapping of one layer",
        "group_by",
        lambda: lora_to_lotr(lora_folder(), rank=2, group_by={"head": "g"}),
    ),
    (
        "lora_to_lotr of dtype int8",
        "adapter_dtype",
        lambda: lora_to_lotr(lora_folder(), rank=2, dtype=torch.int8),
    ),
    ("lora_to_lotr of DoRA", "use_dora", lambda: lora_to_lotr(lora_folder(use_dora=True), rank=2)),
    (
        "original_to_lotr of another file",
        "source",
        lambda: original_to_lotr(OLD_FILES / "tasks" / "expected.safetensors"),
    ),
    # vLLM
    (
        "export_factors of a plain model",
        "model",
        lambda: export_factors(zoo.net("mlp"), tempfile.mkdtemp()),
    ),
]
ROWS = [*LAYERS, *EXPERTS, *MODELS, *OTHER_PACKAGES]
