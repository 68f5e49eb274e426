"""Whole models whose cores are made of fewer numbers (LoTRConfig.core), against plain autograd in float64."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path

import pytest
import torch
from test_width import Llama, LlamaBlock, X, assert_right, grads, llama, truth
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal
from toys import no_warnings, refused

from lotr_ext import (
    LoTRConfig,
    active_adapter,
    add_adapter,
    apply_lotr,
    cores,
    disabled,
    load_adapter,
    lotr_parameters,
    merge,
    mixed,
    save_adapter,
    set_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from lotr_ext.interop import lotr_to_lora
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.names import Place, group_name, place_of
from nets import OpCounter, relative

FORMS = pytest.mark.parametrize("core", cores.FORMS)


def base() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaBlock(), LlamaBlock())


@FORMS
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.usefixtures("either_path")
def test_gradients_are_those_of_plain_autograd(core: str, reentrant: bool | None) -> None:
    model = llama(core=core)
    model.reentrant = reentrant
    for _ in range(2):
        assert_right(model, X)


@pytest.mark.parametrize("core", ["dense", *cores.FORMS])
def test_each_factor_and_core_has_one_gradient_a_backward_and_each_b_one_fold(core: str, monkeypatch, two_nodes) -> None:
    model, seen, made = llama(core=core), [], []
    parts = {name: p for name, p in model.named_parameters() if name.startswith(("lotr_factors.", "lotr_cores."))}
    for name, parameter in parts.items():
        parameter.register_hook(lambda grad, name=name: seen.append(name))
    if core != "dense":
        make = type(model.lotr_cores).make
        monkeypatch.setattr(type(model.lotr_cores), "make", lambda self, index=None: (made.append(index), make(self, index))[1])
    counter = OpCounter(monkeypatch)
    model(X).sum().backward()
    assert sorted(seen) == sorted(parts)
    assert {f"lotr_factors.{name}.value" for name in ("A_24", "A_40", "B_24", "B_40", "B_8")} <= parts.keys()
    assert all(m._shared.pending() == 0 for m in model.lotr_factors.values())
    assert made == ([] if core == "dense" else [None])  # all cores at once
    # B for 24 (q, o, down), 8 (k, v) and 40 features (gate, up)
    assert counter["fold"] == counter["fold_grad"] == 3 and "small_forward" not in counter


def test_numbers_of_parameters() -> None:
    """2 blocks of 7 layers at r = 4."""
    factors = 4 * (24 + 40 + 24 + 8 + 40)
    want = {
        "diagonal": 14 * 4,
        "cp": (2 + 7) * 4,
        "tucker": 14 * 4 + 64,
        "train": (2 + 7) * 16,
        "few": 14 * 13,
        "dense": 14 * 16,
    }
    for core, count in want.items():
        assert trainable_summary(llama(core=core)).adapter == factors + count, core


def test_places() -> None:
    assert place_of("model.layers.3.self_attn.q_proj") == Place("model.layers.3", "self_attn.q_proj")
    assert place_of("0.q") == ("0", "q") and place_of("h.0.mlp.c_fc") == ("h.0", "mlp.c_fc")
    assert place_of("encoder.fc1") == ("", "encoder.fc1") and place_of("blocks.12") == ("blocks.12", "")
    assert place_of("layers.1.experts.5.up") == ("layers.1", "experts.5.up")
    assert group_name("h.0.mlp.c_fc", (4, 8), "block") == "h_0_4x8" and group_name("encoder.fc1", (4, 8), "block") == "4x8"


@pytest.mark.parametrize("core", ["dense", *cores.FORMS])
@pytest.mark.parametrize("group_by", ["width", "shape"])
def test_saved_and_loaded(core: str, group_by: str, tmp_path: Path) -> None:
    model = llama(group_by, core=core)
    save_adapter(model, tmp_path)
    with no_warnings():
        fresh = load_adapter(base(), tmp_path)
        other = llama(group_by, core=core)
        with torch.no_grad():
            for parameter in lotr_parameters(other):
                parameter.zero_()
        load_adapter(other, tmp_path)
    assert torch.equal(fresh(X), model(X)) and torch.equal(other(X), model(X))
    assert fresh.lotr_config == model.lotr_config and fresh.state_dict().keys() == model.state_dict().keys()
    assert_right(fresh, X)


@FORMS
@pytest.mark.parametrize("group_by", ["width", "shape"])
def test_files_of_another_form_of_core(core: str, group_by: str, tmp_path: Path) -> None:
    model = llama(group_by, core=core)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="apply_lotr with the same core"):
        dense = load_adapter(llama(group_by), tmp_path)
    assert relative(dense(X), model(X).detach().double()) < 1e-6
    save_adapter(llama(group_by), tmp_path / "dense")
    with refused(model, ValueError, match="core: expected a parametrization that can be set to a value, got"):
        load_adapter(model, tmp_path / "dense")


@pytest.mark.parametrize("core", ["dense", *cores.FORMS])
def test_merged_unmerged_disabled_unloaded_and_as_lora(core: str, tmp_path: Path) -> None:
    model = llama(core=core)
    save_adapter(model, tmp_path / "lotr")
    layers = lotr_to_lora(tmp_path / "lotr", tmp_path / "lora")
    for name, layer in adapted_layers(model).items():
        assert relative(layers[name].scaling * layers[name].B @ layers[name].A, layer.delta_weight().double()) < 1e-6
    with torch.no_grad():
        y = model(X)
        with disabled(model):
            assert torch.equal(model(X), base()(X))
        assert relative(merge(model)(X), y.double()) < 1e-6
        assert torch.equal(unmerge(model)(X), y)
        assert torch.equal(unload(model, merge=False)(X), base()(X)) and not hasattr(model, "lotr_cores")


@pytest.mark.parametrize("core", ["dense", *cores.FORMS])
def test_named_adapters(core: str, tmp_path: Path) -> None:
    model = llama(core=core)
    first = model(X).detach()
    add_adapter(model, "second")
    add_adapter(model, "dense", LoTRConfig(rank=4, group_by="width", train=("core",)), share_factors="default")
    set_adapter(model, "second")
    assert torch.equal(model(X), base()(X))
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.normal_(0, 0.3)
    assert_right(model, X)
    second = model(X).detach()
    save_adapter(model, tmp_path / "second")
    set_adapter(model, "dense")
    assert torch.equal(model(X), base()(X)) and not hasattr(model, "lotr_cores")
    owners = (m for layer in adapted_layers(model).values() for m, _ in layer.factors.owners)
    assert {id(m) for m in model.lotr_factors.values()} == {id(m) for m in owners}
    with torch.no_grad(), mixed(model, ["default"] * 50 + [None] * 50 + ["dense"] * 50):
        y = model(X)
    assert relative(y[:50], first[:50].double()) < 2e-6
    assert relative(y[50:], base()(X[50:]).double()) < 1e-6  # the cores of "dense" are zero
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.normal_(0, 0.3)
    assert_right(model, X)
    save_adapter(model, tmp_path / "parked", name="second")
    load_adapter(model, tmp_path / "parked", name="third")
    for name, want in (("second", second), ("third", second), ("default", first)):
        set_adapter(model, name)
        assert active_adapter(model) == name and torch.equal(model(X), want)
    assert torch.equal(load_adapter(base(), tmp_path / "parked")(X), load_adapter(base(), tmp_path / "second")(X))
    with pytest.raises(ValueError, match=r"config: expected rank \(4, 4\) as in the shared factors of 'default', got \(2, 2\)"):
        add_adapter(model, "fourth", LoTRConfig(rank=2, group_by="width"), share_factors="default")


@FORMS
def test_copies_and_pickles(core: str) -> None:
    model = llama(core=core)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].q.core_form.cores is copied.lotr_cores is not model.lotr_cores
        layers, own = adapted_layers(copied), adapted_layers(model)["0.q"].factors
        assert layers["0.q"].factors.A is layers["0.gate"].factors.A is layers["1.k"].factors.A is not own.A
        assert layers["0.q"].factors._group.A is layers["0.gate"].factors._group.A is not own._group.A
        assert torch.equal(copied(X), model(X))
        assert_right(copied.double().float(), X)


@pytest.mark.parametrize("settings", [{"core": "train"}, {"group_by": "width"}], ids=str)
def test_compiled(settings: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = apply_lotr(nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 24)), LoTRConfig(rank=4, **settings))
    with torch.no_grad():
        for parameter in lotr_parameters(model):
            parameter.normal_(0, 0.3)
    want = truth(model, X)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = {name.removeprefix("_orig_mod."): g for name, g in grads(compiled, X).items()}
    assert max(relative(got[name], value) for name, value in want.items()) < 5e-6


def test_half_precision_beside_float32_cores() -> None:
    model = llama(core="train")
    want = model(X).detach()
    for block in (model[0], model[1]):
        for layer in block.children():
            layer.weight.data = layer.weight.data.bfloat16()
    assert model.lotr_cores.layer.dtype == torch.float32
    y = model(X.bfloat16())
    y.sum().backward()
    assert relative(y, want.double()) < 0.05 and model.lotr_cores.kind.grad.dtype == torch.float32
    model = llama(core="train")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(X), want.double()) < 0.05


def test_only_the_cores_are_trained() -> None:
    model = llama(core="cp", train=("core",))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"lotr_cores.layer", "lotr_cores.kind"}
    assert_right(model, X)
    frozen = llama(core="cp", train=("A", "B", "core"))
    frozen.lotr_cores.requires_grad_(False)
    assert_right(frozen, X)


@pytest.mark.parametrize("core", ["diagonal", "cp", "tucker", "train"])
def test_core_init_identity(core: str) -> None:
    model = apply_lotr(base(), LoTRConfig(rank=4, core=core, core_init="identity", group_by="width"))
    assert torch.equal(model(X), base()(X)) and torch.equal(model[1].down.core, torch.eye(4))
    assert grads(model, X)["lotr_factors.B_24.value"].abs().sum() > 0


def test_a_callable(tmp_path: Path) -> None:
    model = llama(core=functools.partial(cores.FewCores, numbers=3, tied=True))
    assert sum(p.numel() for p in model.lotr_cores.parameters()) == 3
    assert_right(model, X)
    save_adapter(model, tmp_path)
    again = llama(core=functools.partial(cores.FewCores, numbers=3, tied=True))
    assert torch.equal(load_adapter(again, tmp_path)(X), model(X))
    with pytest.warns(UserWarning, match="apply_lotr with the same core"):
        dense = load_adapter(base(), tmp_path)
    assert relative(dense(X), model(X).detach().double()) < 1e-6 and dense.lotr_config.core == "dense"


def test_lora_xs_is_frozen_factors_of_each_layers_own_svd() -> None:
    """dW = U S R V^T with W ~= U S V^T of rank r, R trained: with G of our start, R = S^-1 (G^T - S) up to the order."""
    settings = {"rank": 4, "init": "svd", "train": ("core",), "adapter_dtype": torch.float64}
    model = apply_lotr(base().double(), LoTRConfig(group_by=lambda name, module: name.replace(".", "_"), **settings))
    weights = {name: m.weight.detach() for name, m in base().double().named_modules() if isinstance(m, nn.Linear)}
    assert torch.allclose(model(X.double()), base().double()(X.double()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 14 * 4**2
    for name, layer in adapted_layers(model).items():
        with torch.no_grad():
            layer.core.add_(torch.randn(4, 4, dtype=torch.float64) * 0.1)
        U, S, Vh = torch.linalg.svd(weights[name], full_matrices=False)
        U, S, Vh = U[:, :4], S[:4], Vh[:4]
        delta = layer._merged_weight() - weights[name]
        R = torch.diag(1 / S) @ U.T @ delta @ Vh.T
        assert relative(U @ torch.diag(S) @ R @ Vh, delta) < 1e-6, name


def test_tinylora_is_few_numbers_over_each_layers_svd() -> None:
    """dW = U S (sum_j v_j P_j) V^T with W ~= U S V^T of rank r, v trained."""
    groups = {"group_by": lambda name, module: name.replace(".", "_"), "adapter_dtype": torch.float64}
    model = apply_lotr(base().double(), LoTRConfig(rank=4, core="few", train=("core",), **groups))
    with torch.no_grad():
        model.lotr_cores.numbers.normal_()
    for i, layer in enumerate(adapted_layers(model).values()):
        U, S, Vh = (t.detach() for t in torch.linalg.svd(layer.weight, full_matrices=False))
        with torch.no_grad():
            layer.factors.A.copy_(Vh[:4].T)
            layer.factors.B.copy_(U[:, :4] * S[:4])
        R = sum(v * P.T for v, P in zip(model.lotr_cores.numbers[i], model.lotr_cores.random, strict=True))
        assert relative(layer.delta_weight(), (U[:, :4] @ torch.diag(S[:4]) @ R @ Vh[:4]).detach()) < 1e-12
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 14 * 13
    want, got = truth(model, X.double()), grads(model, X.double())
    assert relative(got["lotr_cores.numbers"], want["lotr_cores.numbers"]) < 1e-12


def test_generated_factors(monkeypatch, two_nodes, tmp_path: Path) -> None:
    """Quantum-PEFT's kind: A and B are orthogonal, made of what is trained."""
    model = llama()
    for factor in model.lotr_factors.values():
        orthogonal(factor, "value")
    assert_right(model, X)
    want, counter = truth(model, X), OpCounter(monkeypatch)
    with parametrize.cached():
        got = grads(model, X)
    assert counter["shrink"] == 2 * 4  # siblings share u again
    assert max(relative(got[name], value) for name, value in want.items()) < 5e-6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(X).square().sum()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(X).square().sum() < loss
        for factor in model.lotr_factors.values():
            assert relative(factor.value.T @ factor.value, torch.eye(4).double()) < 1e-5
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="register the parametrizations"):
        assert relative(load_adapter(base(), tmp_path)(X), model(X).detach().double()) < 1e-6


def test_flora_is_a_group_a_layer() -> None:
    """dW = A G B^T with A, G and B of each layer's own."""
    model = llama(lambda name, module: name.replace(".", "_"))
    assert len(model.lotr_factors) == 14 and trainable_summary(model).adapter == sum(
        4 * (m.in_features + m.out_features) + 16 for m in adapted_layers(model).values()
    )
    assert_right(model, X)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"core": "tuck"},
            ValueError,
            "core: expected one of dense, diagonal, cp, tucker, train, few, or a callable, got 'tuck'",
        ),
        ({"core": 3}, ValueError, "core: expected one of .*, got 3"),
        ({"core": "custom"}, ValueError, 'core: expected a name or a callable, got "custom"'),
        (
            {"core": "train", "init": "svd"},
            ValueError,
            'core: expected "dense" with init "svd", which sets the cores, got \'train\'',
        ),
        *(
            (
                {"core": core, "target_parameters": ["experts.gate_up_proj"]},
                ValueError,
                f'core: expected "dense" with target_parameters, whose experts have a core each, got .*{core}',
            )
            for core in (*cores.FORMS, "custom")
        ),
        ({"core": "diagonal", "rank": (3, 4)}, ValueError, r"rank: expected one rank for DiagonalCores, got \(3, 4\)"),
        ({"core": "few", "core_init": "identity"}, ValueError, 'core_init: expected "zero" with FewCores, got "identity"'),
        (
            {"core": lambda places, rank: nn.Linear(2, 2)},
            TypeError,
            r"core: expected a callable that returns lotr_ext\.cores\.Cores, got",
        ),
        (
            {"core": lambda places, rank: cores.TuckerCores(places, 3)},
            ValueError,
            r"core: expected cores of rank \(4, 4\), got \(3, 3\)",
        ),
        ({"core": lambda places, rank: cores.TuckerCores(places[:3], rank)}, ValueError, "place: expected one of .*, got"),
        (
            {"core": lambda places, rank: cores.TrainCores(places[:1], rank)},
            ValueError,
            "place: expected a kind among .*, got 'k'",
        ),
    ],
)
def test_bad_input_changes_nothing(settings, error, message) -> None:
    model = base()
    with refused(model, error, match=message):
        apply_lotr(model, LoTRConfig(**{"rank": 4, **settings}))


@FORMS
def test_a_diverged_run_loads(core: str, tmp_path: Path) -> None:
    model = llama(core=core)
    with torch.no_grad():
        next(model.lotr_cores.parameters())[0] = torch.nan
    save_adapter(model, tmp_path)
    for onto in (base().double(), llama(core=core)):
        load_adapter(onto, tmp_path)
        own = onto.lotr_cores.state_dict()
        assert all(torch.equal(own[key].nan_to_num(7), t.nan_to_num(7)) for key, t in model.lotr_cores.state_dict().items())
