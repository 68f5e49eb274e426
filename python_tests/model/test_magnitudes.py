"""Magnitudes (DoRA) in whole models: configuration, training, files, named adapters, merging, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toys import Toy

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    add_adapter,
    apply_lotr,
    delete_adapter,
    disabled,
    load_adapter,
    lotr_parameters,
    merge,
    mixed,
    parameter_groups,
    per_example,
    save_adapter,
    set_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from lotr_ext.model.adapted import adapted_layers
from nets import relative

NAMES = r"blocks\.\d+\.(q|v|up|down)"
CONFIG = LoTRConfig(rank=3, target_modules=NAMES, magnitude=True, scaling=0.7)


@pytest.fixture
def base() -> Toy:
    return Toy().double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(29, (4, 5))


def adapted(base: nn.Module, config: LoTRConfig = CONFIG) -> nn.Module:
    return apply_lotr(copy.deepcopy(base), LoTRConfig(**{**vars(config), "adapter_dtype": torch.float64}))


def moved(model: nn.Module) -> nn.Module:
    """All parts of the active adapter away from where they start."""
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.core.normal_(0, 0.5)
            layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return model


def dense(base: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model with each weight as the formula of DoRA has it."""
    plain = copy.deepcopy(base)
    for name, layer in adapted_layers(model).items():
        rows = base.get_submodule(name).weight + layer.delta_weight()
        lengths = layer.magnitude.detach() / rows.norm(dim=1)
        plain.get_submodule(name).weight.data = rows.detach() * lengths.detach().unsqueeze(1)
    return plain


# ---- the configuration -----------------------------------------------------------------------------------------------


def test_which_parts_are_trained():
    assert LoTRConfig(magnitude=True).train == ("A", "B", "core", "magnitude")
    assert LoTRConfig().train == ("A", "B", "core") == LoTRConfig.from_dict(LoTRConfig().to_dict()).train
    for train in (("core", "magnitude"), ("core",), ("magnitude",)):
        model = apply_lotr(Toy(), LoTRConfig(rank=2, target_modules=NAMES, magnitude=True, train=train))
        layers = adapted_layers(model).values()
        assert {layer.magnitude.requires_grad for layer in layers} == {"magnitude" in train}
        assert {layer.core.requires_grad for layer in layers} == {"core" in train}
        assert not any(p.requires_grad for p in model.lotr_factors.parameters())


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"train": ("core", "magnitude")}, 'train: expected "magnitude" only with magnitude=True'),
        ({"magnitude": True, "train": ("A", "magnitude")}, "train: expected 'core'"),
        ({"magnitude": 1}, "magnitude: expected a bool"),
        ({"magnitude": True, "target_parameters": ["experts.down_proj"]}, "magnitude: expected False with target_parameters"),
        ({"use_dora": True}, "here it is 'magnitude'"),
    ],
)
def test_refused_configurations(fields, match):
    with pytest.raises((TypeError, ValueError), match=match):
        LoTRConfig(**fields)


def test_configurations_of_before_load(base, ids, tmp_path):
    values = LoTRConfig(rank=3, target_modules=NAMES).to_dict()
    del values["magnitude"]
    assert not LoTRConfig.from_dict(values).magnitude and LoTRConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_refused_before_anything_changes(base):
    base.blocks[1].up.to("meta")
    with pytest.raises(ValueError, match=r"magnitude: expected .*'blocks\.1\.up', Linear on the meta device"):
        apply_lotr(base, CONFIG)
    assert type(base.blocks[0].q) is nn.Linear


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"init": "svd"}, {"core": "diagonal"}, {"core_init": "identity"}, {"group_by": "width"}]
)
def test_the_model_starts_as_it_was(base, ids, fields):
    if "core" in fields:
        fields = {**fields, "rank": 4}
    model = adapted(base, LoTRConfig(**{**vars(CONFIG), **fields}))
    assert relative(model(ids), base(ids)) < 1e-12


def test_gradients_are_those_of_the_formula(base, ids):
    """Against the same model by plain autograd, with c detached."""
    model = moved(adapted(base))
    layers = adapted_layers(model)
    model(ids).square().sum().backward()

    def weights() -> dict[str, Tensor]:
        found = {}
        for name, layer in layers.items():
            rows = layer.weight + layer.scaling * layer.factors.B @ layer.core.T @ layer.factors.A.T
            found[f"{name}.weight"] = rows * (layer.magnitude / rows.norm(dim=1).detach()).unsqueeze(1)
        return found

    parameters = list(lotr_parameters(model))
    loss = torch.func.functional_call(base.requires_grad_(False), weights(), ids).square().sum()
    for parameter, want in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        assert relative(parameter.grad, want) < 1e-10


def test_parameter_groups(base):
    groups = {g["name"]: g for g in parameter_groups(adapted(base), 1e-3, core_lr=1e-2, weight_decay=0.1)}
    assert [g for g in groups if groups[g]["params"]] == ["cores", "factors", "magnitudes"]
    assert groups["magnitudes"]["lr"] == 1e-2 and groups["magnitudes"]["weight_decay"] == 0.0
    assert sum(p.numel() for p in groups["magnitudes"]["params"]) == 2 * (16 + 16 + 32 + 16)
    assert next(g for g in parameter_groups(adapted(base), 1e-3, magnitude_lr=2.0) if g["name"] == "magnitudes")["lr"] == 2.0


def test_summary_counts_magnitudes(base):
    plain = trainable_summary(adapted(base, LoTRConfig(**{**vars(CONFIG), "magnitude": False, "train": ("A", "B", "core")})))
    assert trainable_summary(adapted(base)).adapter == plain.adapter + 2 * (16 + 16 + 32 + 16)


# ---- merging, files, named adapters ----------------------------------------------------------------------------------


def test_merge_unmerge_unload_disabled(base, ids):
    model = moved(adapted(base))
    want, before = model(ids), [layer.weight.detach().clone() for layer in adapted_layers(model).values()]
    assert relative(want, dense(base, model)(ids)) < 1e-12
    with disabled(model):
        assert relative(model(ids), base(ids)) < 1e-12
    with torch.no_grad():
        assert relative(merge(model)(ids), want) < 1e-12
    unmerge(model)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, adapted_layers(model).values()))
    merge(model, keep_backup=False)
    with pytest.raises(RuntimeError, match="unmerge: expected a copy of the base"):
        unmerge(model)
    assert relative(unload(model, merge=True)(ids), want) < 1e-12 and type(model.blocks[0].q) is nn.Linear


def test_a_failed_merge_leaves_the_weights(base, ids):
    model = moved(adapted(base))
    want = model(ids)
    last = list(adapted_layers(model).values())[-1]
    last.merge = lambda **_: (_ for _ in ()).throw(OSError("no memory"))
    with pytest.raises(OSError):
        merge(model, keep_backup=False)
    assert relative(model(ids), want) < 1e-12


@pytest.mark.parametrize("onto", ["plain", "adapted", "other dtype"])
def test_saved_and_loaded(base, ids, tmp_path, onto):
    model = moved(adapted(base))
    save_adapter(model, tmp_path)
    other = copy.deepcopy(base) if onto == "plain" else adapted(base)
    if onto == "other dtype":
        other = apply_lotr(copy.deepcopy(base), CONFIG)
    load_adapter(other, tmp_path, cast=onto == "other dtype")
    assert relative(other(ids), model(ids)) < (1e-5 if onto == "other dtype" else 1e-12)
    assert all(layer.magnitude.requires_grad for layer in adapted_layers(other).values())
    without = adapted(base, LoTRConfig(**{**vars(CONFIG), "magnitude": False, "train": ("A", "B", "core")}))
    with pytest.raises(ValueError, match=r"not in the model blocks\.0\.down\.magnitude"):
        load_adapter(without, tmp_path)


def test_each_named_adapter_has_its_own(base, ids, tmp_path):
    model = moved(adapted(base))
    first = model(ids)
    add_adapter(model, "second")
    add_adapter(model, "plain", LoTRConfig(rank=3, adapter_dtype=torch.float64, target_modules=NAMES))
    assert relative(set_adapter(model, "second")(ids), base(ids)) < 1e-12
    second = moved(model)(ids)
    assert relative(second, dense(base, model)(ids)) < 1e-12
    assert relative(set_adapter(model, "plain")(ids), base(ids)) < 1e-12
    assert all(layer.magnitude is None for layer in adapted_layers(model).values())
    assert relative(set_adapter(model, "default")(ids), first) < 1e-12
    assert all(layer.magnitude.requires_grad for layer in adapted_layers(model).values())
    save_adapter(model, tmp_path, name="second")
    delete_adapter(model, "second")
    load_adapter(model, tmp_path, name="again")
    assert relative(set_adapter(model, "again")(ids), second) < 1e-12


def test_parameters_keep_their_order(base):
    """As optimizers save their state by it."""
    model = adapted(base)
    names = [name for name, _ in model.blocks[0].q.named_parameters()]
    add_adapter(model, "second")
    model.blocks[0].q.register_parameter("later", nn.Parameter(torch.zeros(1)))
    set_adapter(model, "second")
    assert [name for name, _ in model.blocks[0].q.named_parameters()] == [*names, "later"]


def test_shared_factors_begin_with_lengths_of_their_own(base, ids):
    model = moved(adapted(base))
    add_adapter(model, "cores", share_factors="default")
    assert relative(set_adapter(model, "cores")(ids), base(ids)) < 1e-12
    layer = model.blocks[0].q
    assert layer.magnitude.requires_grad and layer.core.requires_grad and not layer.factors.A.requires_grad


def test_copies_train_apart(base, ids):
    model = moved(adapted(base))
    want, other = model(ids), copy.deepcopy(model)
    torch.optim.SGD(lotr_parameters(other), 0.1).step(lambda: other(ids).sum().backward())
    assert relative(model(ids), want) == 0 and relative(other(ids), dense(base, other)(ids)) < 1e-12


# ---- rows with cores of their own ------------------------------------------------------------------------------------


def test_cores_by_row_are_refused(base, ids):
    model = adapted(base)
    with pytest.raises(ValueError, match="TaskBank: expected an adapter without magnitudes"):
        TaskBank(model, 3)
    with pytest.raises(ValueError, match="per_example: expected an adapter without magnitudes"), per_example(model):
        pass
    with pytest.raises(ValueError, match="mixed: expected an adapter without magnitudes"), mixed(model, ["default"] * 4):
        pass
    plain = adapted(base, LoTRConfig(rank=3, target_modules=NAMES))
    add_adapter(plain, "rows", LoTRConfig(rank=3, magnitude=True, adapter_dtype=torch.float64), share_factors="default")
    with pytest.raises(ValueError, match="names: expected adapters without magnitudes"), mixed(plain, ["rows"] * 4):
        pass
