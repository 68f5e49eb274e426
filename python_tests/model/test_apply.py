"""apply_lotr and what follows it, on small hand-written models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from toys import IDS, adapted, loss, plain, randomize, target_names, toy

from lotr_ext import LoTRFactors, LoTRLinear, adapt, add_adapter, ops
from lotr_ext.model.adapted import adapted_layers, lotr_parameters
from lotr_ext.model.apply import apply_lotr, disabled
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.merging import merge, unload, unmerge
from lotr_ext.model.summary import trainable_summary
from lotr_ext.ops import planner

# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["orthonormal", "normal", "kaiming"])
@pytest.mark.parametrize("core_init", ["zero", "identity"])
def test_starts_as_the_base_model(init: str, core_init: str) -> None:
    base = toy()(IDS)
    model = adapted(random=False, init=init, core_init=core_init, target_modules="all-linear")
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize(("core_init", "moving"), [("zero", "core"), ("identity", "B")])
def test_first_step_moves_one_part(core_init: str, moving: str) -> None:
    model = adapted(random=False, core_init=core_init)
    loss(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.any()) == name.endswith(f".{moving}"), name


@pytest.mark.parametrize("train", [("A", "B", "core"), ("core",), ("B", "core")])
def test_trains_what_was_asked_for_and_nothing_else(train: tuple[str, ...]) -> None:
    model = adapted(train=train, modules_to_save=["head"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    first = loss(model).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < first
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    want = {f"lotr_factors.16x16.{part}" for part in train if part != "core"} | {"head.weight", "head.bias"}
    assert changed == want | {f"blocks.{i}.{n}.core" for i in range(2) for n in "qv"}


def test_equals_the_plain_definition_in_float64() -> None:
    model = apply_lotr(
        toy().double(), LoTRConfig(rank=(3, 5), alpha=8.0, adapter_dtype=torch.float64, modules_to_save=["head"])
    )
    randomize(model)
    truth = plain(copy.deepcopy(model))
    loss(model).backward()
    loss(truth).backward()
    assert torch.allclose(model(IDS), truth(IDS), rtol=1e-12, atol=1e-12)
    want = {n: p.grad for n, p in truth.named_parameters() if p.requires_grad}
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert grad.abs().max() > 0 and torch.allclose(grad, want[name], rtol=1e-10, atol=1e-13), name


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"target_modules": ["q"]}, ["blocks.0.q", "blocks.1.q"]),
        ({"target_modules": ["0.q", "1.v"]}, ["blocks.0.q", "blocks.1.v"]),
        ({"target_modules": ["blocks.1.o"]}, ["blocks.1.o"]),
        ({"target_modules": r"blocks\.\d\.(up|k)"}, ["blocks.0.k", "blocks.0.up", "blocks.1.k", "blocks.1.up"]),
        ({"target_modules": r".*1.*", "exclude_modules": ["up", "down"]}, [f"blocks.1.{n}" for n in "qkvo"]),
        ({"target_modules": ["q", "head"], "modules_to_save": ["head"]}, ["blocks.0.q", "blocks.1.q"]),
        ({"exclude_modules": r"blocks.*"}, ["head"]),
        ({"target_modules": r"blocks\.0\.[a-z]"}, [f"blocks.0.{n}" for n in "qkvo"]),
        ({"exclude_modules": r".*(1|head).*"}, [f"blocks.0.{n}" for n in ("q", "k", "v", "o", "up", "down")]),
    ],
)
def test_targets(settings: dict, want: list[str]) -> None:
    assert target_names(toy(), **settings) == want


def test_none_and_all_linear_take_every_linear_layer() -> None:
    want = [n for n, m in toy().named_modules() if isinstance(m, nn.Linear)]
    assert len(want) == 13
    assert target_names(toy()) == target_names(toy(), target_modules="all-linear") == want


@pytest.mark.parametrize(
    ("group_by", "groups"),
    [
        ("shape", {"16x16": ["q", "k", "v"], "16x32": ["up"]}),
        (
            "block",
            {f"blocks_{i}_16x16": [f"q{i}", f"k{i}", f"v{i}"] for i in (0, 1)}
            | {f"blocks_{i}_16x32": [f"up{i}"] for i in (0, 1)},
        ),
        ("name", {"q_16x16": ["q"], "k_16x16": ["k"], "v_16x16": ["v"], "up_16x32": ["up"]}),
        (
            lambda name, module: "wide" if module.out_features == 32 else name[7],
            {"0": ["q0", "k0", "v0"], "1": ["q1", "k1", "v1"], "wide": ["up"]},
        ),
    ],
)
def test_groups(group_by, groups: dict) -> None:
    model = adapted(target_modules=["q", "k", "v", "up"], group_by=group_by)
    assert set(model.lotr_factors) == set(groups)
    for group, members in groups.items():
        for name, layer in adapted_layers(model).items():
            member = name.rpartition(".")[2]
            assert (layer.factors is model.lotr_factors[group]) == (member in members or f"{member}{name[7]}" in members), name
    again = apply_lotr(toy(), LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"], group_by=mapping(model)))
    assert mapping(again) == mapping(model)


def mapping(model: nn.Module) -> dict[str, str]:
    groups = {id(f): group for group, f in model.lotr_factors.items()}
    return {name: groups[id(layer.factors)] for name, layer in adapted_layers(model).items()}


# ---- state -----------------------------------------------------------------------------------------------------------


def test_state_dict_keeps_the_base_keys_and_names_the_factors_once() -> None:
    base = toy().state_dict()
    model = adapted()
    added = {"lotr_factors.16x16.A", "lotr_factors.16x16.B", *(f"blocks.{i}.{n}.core" for i in range(2) for n in "qv")}
    assert set(model.state_dict()) == set(base) | added
    other = apply_lotr(toy(1), LoTRConfig(rank=4, target_modules=["q", "v"]))
    result = other.load_state_dict(base, strict=False)
    assert set(result.missing_keys) == added and not result.unexpected_keys
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_factors_among_themselves_only(how) -> None:
    model = adapted(group_by=lambda name, module: "all")
    other = how(model)
    assert torch.equal(other(IDS), model(IDS))
    own = other.lotr_factors["all"]
    assert all(layer.factors is own for layer in adapted_layers(other).values()) and own is not model.lotr_factors["all"]
    loss(other).backward()
    assert own.A.grad is not None and model.lotr_factors["all"].A.grad is None


def test_a_layer_in_two_places_stays_one_layer() -> None:
    model = toy()
    model.blocks[1].q = model.blocks[0].q
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["1.q", "v"]))
    assert model.blocks[1].q is model.blocks[0].q and isinstance(model.blocks[0].q, LoTRLinear)
    assert list(adapted_layers(model)) == ["blocks.0.q", "blocks.0.v", "blocks.1.v"]
    unload(model, merge=False)
    assert model.blocks[1].q is model.blocks[0].q and type(model.blocks[0].q) is nn.Linear


def test_sequential_root_runs() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    base = model(x)
    assert torch.equal(apply_lotr(model, LoTRConfig(rank=2))(x), base)


def test_a_forward_folds_once_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a model with a forward scope does; unload takes the scope off again."""
    folds, fold = [], ops.fold
    monkeypatch.setattr(planner, "FEW_TOKENS", 0)
    monkeypatch.setattr(ops, "fold", lambda B, cores, *rest: folds.append(len(cores)) or fold(B, cores, *rest))
    model = adapted(target_modules=["q", "k", "v", "up"])
    loss(model).backward()
    assert folds == [6, 2]
    unload(model, merge=False)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_parameters_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(rank=(3, 5), modules_to_save=["head"])
    found = list(lotr_parameters(model))
    adapter = 16 * 3 + 16 * 5 + 4 * 15
    assert len(found) == len({id(p) for p in found}) == 6 and sum(p.numel() for p in found) == adapter
    summary = trainable_summary(model)
    head = 16 * 3 + 3
    total = sum(p.numel() for p in toy().parameters()) + adapter
    assert (summary.adapter, summary.trained, summary.total, summary.layers) == (adapter, adapter + head, total, 4)
    assert summary.groups == ((16, 16, (3, 5)),)
    assert capsys.readouterr().out == ""
    print(summary)
    assert capsys.readouterr().out.startswith(f"LoTR: 4 layers, 1 pair of factors (16x16 at rank (3, 5)), {adapter:,} adapter")
    frozen = adapted(train=("core",))
    assert [p.shape for p in lotr_parameters(frozen)] == [(4, 4)] * 4


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_backup", [True, False])
def test_merge_sums_in_float32_and_unmerge_restores(dtype: torch.dtype, keep_backup: bool) -> None:
    model = apply_lotr(toy().to(dtype), LoTRConfig(rank=4, alpha=6.0, modules_to_save=["head"]))
    randomize(model)
    before = {n: layer.weight.detach().clone() for n, layer in adapted_layers(model).items()}
    want = model(IDS)
    merge(model, safe=True, keep_backup=keep_backup)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    for name, layer in adapted_layers(model).items():
        f = layer.factors
        total = (before[name].float() + 1.5 * f.B @ layer.core.T @ f.A.T).to(dtype)
        assert layer.merged and torch.allclose(layer.weight.float(), total.float(), rtol=close, atol=1e-6)
    assert torch.allclose(model(IDS).float(), want.float(), atol=1e-4 if dtype == torch.float32 else 0.1)
    unmerge(model)
    for name, layer in adapted_layers(model).items():
        if keep_backup:
            assert torch.equal(layer.weight, before[name])
        else:
            assert torch.allclose(layer.weight.float(), before[name].float(), atol=1e-6 if dtype == torch.float32 else 2e-2)
    if keep_backup:
        assert torch.equal(model(IDS), want)


def test_merge_that_fails_in_the_middle_merges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    want = model(IDS)
    last = list(adapted_layers(model).values())[-1]
    monkeypatch.setattr(last, "merge", lambda **_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        merge(model)
    assert not any(layer.merged for layer in adapted_layers(model).values()) and torch.equal(model(IDS), want)


@pytest.mark.parametrize("init", ["orthonormal", "svd"])
@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_unload(init: str, merged_before: bool, keep: bool) -> None:
    base, state = toy()(IDS), toy().state_dict()
    model = adapted(init=init)
    with_adapter = model(IDS)
    if merged_before:
        merge(model)
    assert unload(model, merge=keep) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in toy().modules()] and vars(model).keys() == vars(toy()).keys()
    assert model.state_dict().keys() == state.keys()
    assert torch.allclose(model(IDS), with_adapter if keep else base, atol=1e-5)
    if not keep and init != "svd":
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    apply_lotr(model, LoTRConfig(rank=2))  # it is a plain model again


class Own(nn.Linear):
    """Wrapped, for its forward, and mergeable on request."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def dequantize(self) -> torch.Tensor:
        return self.weight


def test_unload_of_a_model_around_the_adapted_one_leaves_nothing() -> None:
    part, config = toy(), LoTRConfig(rank=2, target_modules=["q"], core="cp")
    before = set(part.state_dict())
    apply_lotr(part, config)
    add_adapter(part, "other")
    unload(nn.Sequential(part), merge=False)
    assert set(part.state_dict()) == before and not any("lotr" in name for name in (*vars(part), *part._modules))
    apply_lotr(part, config)


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_unload_of_a_layer_by_itself_returns_the_plain_layer(kind: type[nn.Linear], merged_before: bool, keep: bool) -> None:
    base, how = kind(6, 4), {"dequantize": kind is Own}
    layer, x = adapt(base, LoTRFactors(6, 4, 2)), torch.randn(5, 6)
    nn.init.normal_(layer.core)
    want, children = (layer(x) if keep else base(x)).detach(), list(layer._modules)
    if merged_before:
        merge(layer, **how)
    found = unload(layer, merge=keep, **how)
    assert type(found) is (nn.Linear if keep else kind) and list(found.state_dict()) == ["weight", "bias"]
    assert found.weight is layer.weight and found.bias is layer.bias and list(layer._modules) == children
    torch.testing.assert_close(found(x), want)


def test_disabled_gives_the_base_model_and_ends_with_its_block() -> None:
    base, model = toy()(IDS), adapted()
    want = model(IDS)
    with pytest.raises(KeyError):
        with disabled(model) as same:
            assert same is model and torch.equal(model(IDS), base)
            with disabled(model):
                assert torch.equal(model(IDS), base)
            assert torch.equal(model(IDS), base)
            raise KeyError
    assert torch.equal(model(IDS), want) and not torch.equal(want, base)
