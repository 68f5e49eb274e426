"""Bad input of every kind: an error of a plain type that says name, expected and got, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import IDS, Tied, Toy, adapted, assert_unchanged, no_warnings, refused, snapshot, toy

from lotr_ext import LoTRConv1D, LoTRFactors, LoTRLinear, LoTRWrapped, TaskBank, adapt, add_adapter, explain, lotr_linear, mixed
from lotr_ext.layers.init import fill_core_, fill_factor_, tucker2
from lotr_ext.model.adapted import lotr_parameters
from lotr_ext.model.apply import apply_lotr, disabled
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.loading import load_adapter
from lotr_ext.model.merging import merge, unload, unmerge
from lotr_ext.model.saving import save_adapter
from lotr_ext.model.summary import trainable_summary

NAN, HUGE = math.nan, 10**400  # beyond any float


def call(**changed) -> Callable[[], object]:
    """lotr_linear with one argument replaced."""
    x, w, b, A, B, G = (
        torch.randn(5, 6),
        torch.randn(4, 6),
        torch.randn(4),
        torch.randn(6, 2),
        torch.randn(4, 2),
        torch.randn(2, 2),
    )
    arguments = {"x": x, "weight": w, "bias": b, "A": A, "B": B, "core": G, "scaling": 1.0, **changed}
    return lambda: lotr_linear(**arguments)


def of(dtype: torch.dtype, **settings) -> Callable[[], object]:
    """A call of a float32 layer on x in dtype."""
    return lambda: LoTRLinear(6, 4, 2, **settings)(torch.ones(5, 6, dtype=dtype))


def under_autocast(action: Callable[[], object]) -> object:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return action()


# name: (what is done, the argument that the message names). All raise one of the three kinds, and say expected and got.
ARGUMENTS: dict[str, tuple[Callable[[], object], str]] = {
    "rank 0": (lambda: LoTRConfig(rank=0), "rank"),
    "rank negative": (lambda: LoTRFactors(6, 4, -1), "rank"),
    "rank a float": (lambda: LoTRConfig(rank=4.0), "rank"),
    "rank a bool": (lambda: LoTRConfig(rank=True), "rank"),
    "rank of three": (lambda: LoTRConfig(rank=(1, 2, 3)), "rank"),
    "rank of one": (lambda: LoTRConfig(rank=(3,)), "rank"),
    "rank in a string": (lambda: LoTRFactors(6, 4, "4"), "rank"),
    "rank unlike the factors'": (lambda: LoTRLinear(6, 4, 3, factors=LoTRFactors(6, 4, 2)), "rank"),
    "features 0": (lambda: LoTRFactors(0, 4, 2), "in_features"),
    "features a float": (lambda: LoTRFactors(6, 4.5, 2), "out_features"),
    "factors of another shape": (lambda: LoTRLinear(6, 4, factors=LoTRFactors(4, 6, 2)), "factors"),
    "factors of another shape, from_linear": (lambda: LoTRLinear.from_linear(nn.Linear(6, 4), LoTRFactors(6, 5, 2)), "factors"),
    "factors that are a string": (lambda: LoTRLinear(4, 5, factors="A"), "factors"),
    "factors that are none": (lambda: LoTRLinear.from_linear(nn.Linear(6, 4), nn.Linear(6, 2)), "factors"),
    "a layer that is no linear": (lambda: LoTRLinear.from_linear(nn.Conv2d(1, 1, 1), LoTRFactors(1, 1, 1)), "linear"),
    "a layer adapted twice": (lambda: LoTRLinear.from_linear(LoTRLinear(6, 4, 2), LoTRFactors(6, 4, 2)), "linear"),
    "a layer wrapped twice": (lambda: LoTRWrapped.from_linear(LoTRLinear(6, 4, 2), LoTRFactors(6, 4, 2)), "linear"),
    "factors in a layer's place": (lambda: adapt(LoTRFactors(6, 4, 2), LoTRFactors(6, 4, 2)), "linear"),
    "a norm in a layer's place": (lambda: adapt(nn.LayerNorm(4), LoTRFactors(4, 4, 2)), "linear"),
    "a layer that is no module": (lambda: adapt("linear", LoTRFactors(6, 4, 2)), "linear"),
    "a linear as a Conv1D": (lambda: LoTRConv1D.from_linear(nn.Linear(6, 6), LoTRFactors(6, 6, 2)), "linear"),
    "a module without a weight as a Conv1D": (lambda: LoTRConv1D.from_linear(nn.ReLU(), LoTRFactors(6, 6, 2)), "linear"),
    "factors on meta": (lambda: LoTRLinear.from_linear(nn.Linear(6, 4), LoTRFactors(6, 4, 2, device="meta")), "factors"),
    "factors on meta for a new layer": (lambda: LoTRLinear(6, 4, factors=LoTRFactors(6, 4, 2, device="meta")), "factors"),
    "factors on meta, wrapped": (
        lambda: LoTRWrapped.from_linear(nn.Linear(6, 4), LoTRFactors(6, 4, 2, device="meta")),
        "factors",
    ),
    "a wrapped layer without sizes": (lambda: LoTRWrapped.from_linear(nn.ReLU(), LoTRFactors(6, 4, 2)), "linear"),
    "factors of an integer dtype": (lambda: LoTRFactors(6, 4, 2, dtype=torch.int32), "dtype"),
    "factors of a dtype in a string": (lambda: LoTRFactors(6, 4, 2, dtype="float32"), "dtype"),
    "a layer of an integer dtype": (lambda: LoTRLinear(6, 4, dtype=torch.int64), "dtype"),
    "a layer of a complex dtype": (lambda: LoTRLinear(6, 4, dtype=torch.complex64), "dtype"),
    "a layer of a dtype in which nothing computes": (lambda: LoTRLinear(6, 4, dtype=torch.float8_e4m3fn), "dtype"),
    "adapter_dtype an integer": (lambda: LoTRConfig(adapter_dtype=torch.int8), "adapter_dtype"),
    "adapter_dtype a string": (lambda: LoTRConfig(adapter_dtype="float32"), "adapter_dtype"),
    "scaling NaN": (lambda: LoTRConfig(scaling=NAN), "scaling"),
    "scaling NaN in a layer": (lambda: LoTRLinear(6, 4, 2, scaling=NAN), "scaling"),
    "scaling infinite": (lambda: LoTRConfig(scaling=math.inf), "scaling"),
    "scaling with alpha": (lambda: LoTRConfig(scaling=1.0, alpha=2.0), "scaling"),
    "scaling with alpha in a layer": (lambda: LoTRLinear(6, 4, 2, scaling=2, alpha=8), "scaling"),
    "scaling with rslora in a layer": (lambda: LoTRLinear(6, 4, 2, scaling=2, rslora=True), "scaling"),
    "scaling a string": (lambda: LoTRLinear(6, 4, 2, scaling="1"), "scaling"),
    "alpha infinite": (lambda: LoTRLinear(6, 4, 2, alpha=math.inf), "alpha"),
    "alpha NaN": (lambda: LoTRConfig(alpha=NAN), "alpha"),
    "alpha a string": (lambda: LoTRConfig(alpha="8"), "alpha"),
    "rslora a number": (lambda: LoTRConfig(rslora=1), "rslora"),
    "dropout 1": (lambda: LoTRConfig(dropout=1.0), "dropout"),
    "dropout negative": (lambda: LoTRLinear(6, 4, 2, dropout=-0.1), "dropout"),
    "dropout NaN": (lambda: LoTRConfig(dropout=NAN), "dropout"),
    "dropout None": (lambda: LoTRConfig(dropout=None), "dropout"),
    "init unknown": (lambda: LoTRConfig(init="ones"), "init"),
    "init unknown in factors": (lambda: LoTRFactors(6, 4, 2, init="ones"), "init"),
    "core_init unknown": (lambda: LoTRConfig(core_init="ones"), "core_init"),
    "core_init with svd": (lambda: LoTRConfig(core_init="identity", init="svd"), "core_init"),
    "train nothing": (lambda: LoTRConfig(train=()), "train"),
    "train something unknown": (lambda: LoTRConfig(train=("A", "G")), "train"),
    "train what cannot move": (lambda: LoTRConfig(train=("A", "B")), "train"),
    "train what cannot move, identity": (lambda: LoTRConfig(train=("A", "core"), core_init="identity"), "train"),
    "group_by unknown": (lambda: LoTRConfig(group_by="layer"), "group_by"),
    "group_by a number": (lambda: LoTRConfig(group_by=3), "group_by"),
    "group_by to numbers": (lambda: LoTRConfig(group_by={"q": 1}), "group_by"),
    "group_by callable in JSON": (lambda: LoTRConfig(group_by=lambda n, m: n).to_dict(), "group_by"),
    "target_modules an empty list": (lambda: LoTRConfig(target_modules=[]), "target_modules"),
    "target_modules of numbers": (lambda: LoTRConfig(target_modules=[1]), "target_modules"),
    "target_modules a bad regex": (lambda: LoTRConfig(target_modules="("), "target_modules"),
    "exclude_modules a number": (lambda: LoTRConfig(exclude_modules=1), "exclude_modules"),
    "modules_to_save a string": (lambda: LoTRConfig(modules_to_save="head"), "modules_to_save"),
    "a field unknown": (lambda: LoTRConfig.from_dict({"r": 4}), "config"),
    "no mapping": (lambda: LoTRConfig.from_dict([4]), "config"),
    "adapter_dtype unknown in JSON": (lambda: LoTRConfig.from_dict({"adapter_dtype": "int4"}), "adapter_dtype"),
    "fill a vector": (lambda: fill_factor_(torch.empty(3), "normal"), "tensor"),
    "fill integers": (lambda: fill_factor_(torch.empty(3, 2, dtype=torch.int64), "normal"), "tensor"),
    "fill a core by an unknown init": (lambda: fill_core_(torch.empty(3, 2), "ones"), "core_init"),
    "fill a core that is a vector": (lambda: fill_core_(torch.empty(3), "zero"), "tensor"),
    "factorise nothing": (lambda: tucker2([], (2, 2)), "weights"),
    "factorise two shapes": (lambda: tucker2([torch.ones(3, 2), torch.ones(2, 3)], (2, 2)), "weights"),
    "factorise a vector": (lambda: tucker2([torch.ones(3)], (2, 2)), "weights"),
    "factorise NaN": (lambda: tucker2([torch.full((3, 2), NAN)], (2, 2)), "weights"),
    "factorise meta": (lambda: tucker2([torch.ones(3, 2, device="meta")], (2, 2)), "weights"),
    "factorise at rank 0": (lambda: tucker2([torch.ones(3, 2)], (0, 2)), "rank"),
    "x too narrow": (call(x=torch.randn(5, 5)), "x"),
    "x too narrow for a layer": (lambda: LoTRLinear(6, 4, 2)(torch.randn(5, 5)), "x"),
    "A of another shape": (call(A=torch.randn(5, 2)), "A"),
    "B of another shape": (call(B=torch.randn(5, 2)), "B"),
    "core of another shape": (call(core=torch.randn(3, 2)), "core"),
    "weight a vector": (call(weight=torch.randn(6)), "weight"),
    "bias of another shape": (call(bias=torch.randn(3)), "bias"),
    "weight in float64": (call(weight=torch.randn(4, 6).double()), "weight"),
    "strategy unknown": (call(strategy="fastest"), "strategy"),
    "explain a layer without an adapter": (lambda: explain(nn.Linear(4, 4), torch.randn(3, 4)), "layer"),
    "x of integers": (call(x=torch.ones(5, 6, dtype=torch.int64)), "x"),
    "A of integers": (call(A=torch.ones(6, 2, dtype=torch.int64)), "A"),
    "A on another device": (call(A=torch.randn(6, 2, device="meta")), "A"),
    "scaling NaN in a call": (call(scaling=NAN), "scaling"),
    "dropout 1 in a call": (call(dropout_p=1.0, training=True), "dropout_p"),
    "dropout None in a call": (call(dropout_p=None), "dropout_p"),
    "bias a list": (call(bias=[0.0] * 4), "bias"),
    "x of integers for a layer": (of(torch.int64), "x: expected dtype torch.float32"),
    "x of bools for a layer": (of(torch.bool), "x: expected dtype torch.float32"),
    "x in float64 for a layer in float32": (of(torch.float64), "x: expected dtype torch.float32"),
    "x in float64, dropout": (of(torch.float64, dropout=0.5), "x: expected dtype torch.float32"),
    "x of integers under autocast": (lambda: under_autocast(of(torch.int64)), "x: expected dtype torch.float32"),
    "x on meta for a layer": (lambda: LoTRLinear(6, 4, 2)(torch.ones(3, 6, device="meta")), "x: expected a tensor on cpu"),
    "x on meta, dropout": (
        lambda: LoTRLinear(6, 4, 2, dropout=0.5)(torch.ones(200, 6, device="meta")),
        "x: expected a tensor on cpu",
    ),
    "x with values for a layer on meta": (
        lambda: LoTRLinear(6, 4, 2, device="meta")(torch.ones(3, 6)),
        "x: expected a tensor on meta",
    ),
    "x in float64 under autocast": (lambda: under_autocast(of(torch.float64)), "x: expected dtype torch.float32"),
    "huge alpha": (lambda: LoTRConfig(alpha=HUGE), "alpha"),
    "huge scaling": (lambda: LoTRConfig(scaling=-HUGE), "scaling"),
    "huge scaling in JSON": (lambda: LoTRConfig.from_dict({"scaling": HUGE}), "scaling"),
    "huge dropout": (lambda: LoTRConfig(dropout=HUGE), "dropout"),
    "huge rank": (lambda: LoTRConfig(rank=HUGE), "rank"),
    "huge rank of two": (lambda: LoTRConfig(rank=(2, HUGE)), "rank"),
    "huge alpha of a layer": (lambda: LoTRLinear(6, 4, 2, alpha=HUGE), "alpha"),
    "huge scaling of a layer": (lambda: LoTRLinear(6, 4, 2, scaling=HUGE), "scaling"),
    "huge rank of factors": (lambda: LoTRFactors(6, 4, HUGE), "rank"),
    "huge scaling of a call": (call(scaling=HUGE), "scaling"),
    "huge dropout of a call": (call(dropout_p=HUGE, training=True), "dropout_p"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    action, name = ARGUMENTS[case]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        action()
    assert_says(caught.value, name)


def assert_says(error: BaseException, name: str) -> None:
    text = str(error)
    assert type(error) in (TypeError, ValueError, RuntimeError)
    assert name in text and "expected" in text and "got" in text, text


class Nested(nn.Module):
    """A linear layer that is adapted inside."""

    in_features, out_features = 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.inner = LoTRLinear(6, 4, 2)


OWNED = {
    "by itself": lambda: LoTRLinear(6, 4, 2),
    "made by adapt": lambda: adapt(nn.Linear(6, 4), LoTRFactors(6, 4, 2)),
    "with factors that another module registers": lambda: adapted().blocks[0].q,
    "inside of another module": Nested,
}


@pytest.mark.parametrize("make", OWNED.values(), ids=OWNED)
@pytest.mark.parametrize("again", [adapt, LoTRWrapped.from_linear])
def test_a_layer_is_adapted_once_and_goes_on_being_trained(make: Callable[[], nn.Module], again: Callable) -> None:
    layer = make()
    before = snapshot(layer)
    with pytest.raises(TypeError) as caught:
        again(layer, LoTRFactors(6, 4, 2))
    assert_says(caught.value, "linear")
    assert_unchanged(layer, before)


class Untouched(nn.Module):
    """Has no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)


def with_relu() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


def with_nan() -> Toy:
    model = toy()
    model.blocks[1].v.weight.data[0, 0] = NAN
    return model


def lazy() -> nn.Module:
    return nn.ModuleDict({"q": nn.LazyLinear(4)})


def attention() -> nn.Module:
    return nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})


def apply(**settings) -> Callable[[nn.Module], object]:
    return lambda model: apply_lotr(model, LoTRConfig(**{"rank": 2, **settings}))


def merged() -> Toy:
    return merge(adapted())


def around() -> nn.Module:
    return nn.Sequential(adapted())


def with_infinite_core() -> Toy:
    model = adapted()
    model.blocks[1].v.core.data[0, 0] = math.inf
    return model


def at_two_shapes(name: str, module: nn.Module) -> str:
    return "all"


# name: (a model, what is done to it, what the message names)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "a target that matches nothing": (toy, apply(target_modules=["query"]), "target_modules"),
    "one target of two that matches nothing": (toy, apply(target_modules=["q", "valeu"]), "'valeu'"),
    "a part of a name": (toy, apply(target_modules=["own"]), "target_modules"),
    "a regex that matches nothing": (toy, apply(target_modules="q"), "target_modules"),
    "a target that is no linear layer": (toy, apply(target_modules=["norm"]), "LayerNorm"),
    "a target that is a container": (toy, apply(target_modules=["blocks"]), "ModuleList"),
    "a regex for what is no linear layer": (toy, apply(target_modules=r".*norm"), "target_modules"),
    "a model without linear layers": (Untouched, apply(), "target_modules"),
    "a model that is a linear layer": (lambda: nn.Linear(3, 3), apply(), "target_modules"),
    "an exclusion that matches nothing": (toy, apply(exclude_modules=["hed"]), "exclude_modules"),
    "an exclusion of everything": (toy, apply(exclude_modules=r".*"), "target_modules"),
    "modules_to_save that match nothing": (toy, apply(modules_to_save=["clasifier"]), "modules_to_save"),
    "modules_to_save without parameters": (with_relu, apply(modules_to_save=["1"]), "ReLU"),
    "modules_to_save that hold all targets": (toy, apply(target_modules=["q"], modules_to_save=["blocks"]), "target_modules"),
    "groups of two shapes": (toy, apply(group_by=at_two_shapes), "(16, 32)"),
    "a group without a name": (toy, apply(group_by=lambda n, m: ""), "group_by"),
    "a group with a dot": (toy, apply(group_by=lambda n, m: "a.b"), "group_by"),
    "a group named like a method": (toy, apply(group_by=lambda n, m: "items"), "group_by"),
    "a group that is a number": (toy, apply(group_by=lambda n, m: 3), "group_by"),
    "a mapping without a layer": (toy, apply(target_modules=["q"], group_by={"blocks.0.q": "a"}), "blocks.1.q"),
    "a mapping with a layer too many": (toy, apply(target_modules=["0.q"], group_by={"blocks.0.q": "a", "x": "a"}), "group_by"),
    "a tied output layer": (Tied, apply(target_modules=["head"]), "embed.weight"),
    "attention's output projection": (attention, apply(target_modules=["out_proj"]), "MultiheadAttention"),
    "a lazy layer": (lazy, apply(target_modules=["q"]), "'q'"),
    "svd of NaN": (with_nan, apply(init="svd"), "blocks.1.v"),
    "svd at scaling 0": (toy, apply(init="svd", scaling=0.0), "scaling"),
    "svd on the meta device": (lambda: Toy().to("meta"), apply(init="svd"), "meta"),
    "a configuration that is none": (toy, lambda m: apply_lotr(m, {"rank": 4}), "config"),
    "adapting twice": (adapted, apply(), "model"),
    "adapting a compiled model": (lambda: torch.compile(toy()), apply(), "OptimizedModule"),
    "merging without an adapter": (toy, merge, "model"),
    "merging twice": (merged, merge, "merge"),
    "merging one layer twice": (merged, lambda m: m.blocks[0].q.merge(), "merge"),
    "merging infinity, safe": (with_infinite_core, lambda m: merge(m, safe=True), "blocks.1.v"),
    "merging infinity in one layer, safe": (with_infinite_core, lambda m: m.blocks[1].v.merge(safe=True), "merge"),
    "merging on the meta device": (lambda: adapted().to("meta"), merge, "meta"),
    "unmerging what is not merged": (adapted, unmerge, "unmerge"),
    "unmerging one layer that is not merged": (adapted, lambda m: m.blocks[0].q.unmerge(), "unmerge"),
    "unloading without an adapter": (toy, lambda m: unload(m, merge=True), "model"),
    "unloading with an unclear wish": (adapted, lambda m: unload(m, merge="yes"), "merge"),
    "disabling without an adapter": (toy, lambda m: disabled(m).__enter__(), "model"),
    "tasks for a model around the adapted one": (around, lambda m: TaskBank(m, 2), "Sequential around one"),
    "a mixed batch in a model around the adapted one": (around, lambda m: mixed(m, ["default"]).__enter__(), "around one"),
    "disabling while merged": (merged, lambda m: disabled(m).__enter__(), "disabled"),
    "parameters without an adapter": (toy, lotr_parameters, "model"),
    "a summary without an adapter": (toy, trainable_summary, "model"),
    "state_dict of a merged model": (merged, lambda m: m.blocks[0].q.state_dict(), "state_dict"),
    "saving without an adapter": (toy, lambda m: save_adapter(m, "nowhere"), "model"),
    "saving to no path": (adapted, lambda m: save_adapter(m, None), "directory"),
    "loading from no path": (toy, lambda m: load_adapter(m, None), "directory"),
    "loading from no path into an adapted model": (adapted, lambda m: load_adapter(m, 3), "directory"),
    "loading from nowhere": (toy, lambda m: load_adapter(m, "nowhere/at/all"), "directory"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_are_refused_and_not_changed(case: str) -> None:
    make, action, name = MODELS[case]
    model = make()
    merged_state = any(getattr(m, "merged", False) for m in model.modules())
    before = None if merged_state else snapshot(model)
    want = model(IDS).detach() if merged_state else None
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        action(model)
    assert_says(caught.value, name)
    if before is None:
        assert torch.equal(model(IDS), want) and all(m.merged for m in model.modules() if hasattr(m, "merged"))
    else:
        assert_unchanged(model, before)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("call_it", [merge, unmerge, lotr_parameters, trainable_summary, apply()])
def test_what_is_no_model(call_it: Callable[[object], object]) -> None:
    with pytest.raises(TypeError) as caught:
        call_it([nn.Linear(3, 3)])
    assert_says(caught.value, "model")


@pytest.mark.parametrize("name", ["training", "_modules", "_parameters", "forward", "pop", "active", "T_destination"])
def test_names_that_modules_use_themselves(name: str, tmp_path: Path) -> None:
    model = adapted()
    before = snapshot(model)
    for action in (
        lambda: add_adapter(model, name),
        lambda: load_adapter(model, tmp_path, name=name),
        lambda: load_adapter(model, tmp_path / "one", name=name),
    ):
        save_adapter(adapted(), tmp_path / "one")
        with pytest.raises(ValueError) as caught:
            action()
        assert "expected" in str(caught.value)
    assert_unchanged(model, before)
    if name == "active":
        return  # of adapters alone
    plain = toy()
    with refused(plain, ValueError, match="group_by: expected"):
        apply(group_by=lambda n, m: name)(plain)


def test_a_rank_beyond_the_widths_warns_once_a_pair() -> None:
    with pytest.warns(UserWarning, match="rank 999 over layers of 16 in and 16 out") as found:
        apply_lotr(toy(), LoTRConfig(rank=999, target_modules=["q", "v"]))
    assert len(found) == 1
    with pytest.warns(UserWarning, match=r"rank \(4, 17\)"):
        LoTRFactors(32, 16, (4, 17))
    with no_warnings():
        LoTRFactors(32, 16, (32, 16))
