"""Several named adapters on one model, and batches whose rows go through different ones."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch import nn
from toys import IDS, assert_unchanged, randomize, snapshot, toy

import lotr_ext
from lotr_ext import (
    LoTRConfig,
    active_adapter,
    adapter_names,
    add_adapter,
    apply_lotr,
    delete_adapter,
    load_adapter,
    lotr_parameters,
    merge,
    mixed,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lotr_ext.layers.request import NOW
from lotr_ext.ops import planner

CONFIG = LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"], modules_to_save=["head"])
OTHER = LoTRConfig(rank=(3, 2), scaling=0.5)
CORES = LoTRConfig(rank=4, scaling=0.5, train=["core"])


def model_with(*, shared: bool) -> nn.Module:
    """Adapters "default" and "fr", with values that matter, "default" active."""
    model = apply_lotr(toy(), CONFIG)
    randomize(model)
    add_adapter(model, "fr", CORES if shared else OTHER, share_factors="default" if shared else None)
    set_adapter(model, "fr")
    with torch.no_grad():
        for i, parameter in enumerate(lotr_parameters(model)):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + i)) * 0.3)
        model.head.weight.mul_(1.5)
    return set_adapter(model, "default")


def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name in adapter_names(model):
        set_adapter(model, name)
        found[name] = model(IDS).detach().clone()
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["own factors", "cores only"])
def test_switching_gives_each_adapter_its_function_back(shared: bool) -> None:
    alone = apply_lotr(toy(), CONFIG)
    randomize(alone)
    want = alone(IDS)
    model = model_with(shared=shared)
    assert adapter_names(model) == ["default", "fr"] and active_adapter(model) == "default"
    assert torch.equal(model(IDS), want)
    set_adapter(model, "fr")
    other = model(IDS)
    assert (other - want).abs().max() > 1e-2
    assert adapter_names(model) == ["fr", "default"]
    set_adapter(model, "default")
    assert torch.equal(model(IDS), want)
    set_adapter(model, "fr")
    assert torch.equal(model(IDS), other)


def test_only_the_active_adapter_is_trained_and_each_has_its_own_head() -> None:
    model = model_with(shared=False)
    parked = {name: value.clone() for name, value in model.lotr_parked.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS).square().sum().backward()
    optimizer.step()
    for name, value in model.lotr_parked.state_dict().items():
        assert torch.equal(value, parked[name]), name
    assert not any(p.requires_grad for p in model.lotr_parked.parameters())
    trained = model.head.weight.detach().clone()
    set_adapter(model, "fr")
    assert all(p.grad is None for p in model.lotr_parked.parameters())
    assert not torch.equal(model.head.weight, trained)
    set_adapter(model, "default")
    assert torch.equal(model.head.weight, trained)


def test_cores_alone_are_trained_where_the_factors_are_shared() -> None:
    model = set_adapter(model_with(shared=True), "fr")
    names = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")}
    assert names == {f"blocks.{i}.{layer}.core" for i in range(2) for layer in ("q", "k", "v", "up")}
    assert sum(p.numel() for p in lotr_parameters(model)) == 8 * 16
    factors = [m for m in model.modules() if isinstance(m, lotr_ext.LoTRFactors)]
    assert len(factors) == len(set(map(id, factors))) == len(model.lotr_factors)
    set_adapter(add_adapter(model, "de", share_factors="fr"), "de")  # without a config too
    assert {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")} == names
    delete_adapter(set_adapter(model, "fr"), "de")
    before = model(IDS)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in lotr_parameters(model))
    delete_adapter(model, "default")
    assert torch.equal(model(IDS), before) and adapter_names(model) == ["fr"]


def test_parked_adapters_move_copy_and_go_through_state_dict() -> None:
    model = model_with(shared=False)
    want = outputs(copy.deepcopy(model))
    clone = apply_lotr(toy(3), CONFIG)
    add_adapter(clone, "fr", OTHER)
    clone.load_state_dict(model.state_dict())
    for got in (outputs(copy.deepcopy(model)), outputs(clone)):
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert {t.dtype for t in model.double().state_dict().values()} == {torch.float64}
    assert torch.allclose(outputs(model)["fr"].float(), want["fr"], atol=1e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["own factors", "cores only"])
def test_saved_and_loaded_by_name(shared: bool, tmp_path) -> None:
    model = model_with(shared=shared)
    want = outputs(copy.deepcopy(model))
    save_adapter(model, tmp_path / "default")
    save_adapter(model, tmp_path / "fr", name="fr")
    assert active_adapter(model) == "default"
    fresh = load_adapter(toy(), tmp_path / "fr", name="fr")
    assert adapter_names(fresh) == ["fr"] and torch.equal(fresh(IDS), want["fr"])
    load_adapter(fresh, tmp_path / "default", name="default", share_factors="fr" if shared else None)
    assert adapter_names(fresh) == ["fr", "default"]
    assert (fresh.lotr_parked["default"].factors["16x16"] is fresh.lotr_factors["16x16"]) == shared
    got = outputs(fresh)
    assert all(torch.equal(got[name], want[name]) for name in want)
    set_adapter(fresh, "fr")
    load_adapter(fresh, tmp_path / "default", name="default")  # again, into the one that is there
    assert torch.equal(outputs(fresh)["default"], want["default"])


def test_loading_another_adapter_leaves_what_is_trained_and_its_gradients(tmp_path) -> None:
    model = model_with(shared=False)
    save_adapter(model, tmp_path)
    model.lotr_factors.requires_grad_(False)
    model(IDS).sum().backward()
    before = {name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    for name in ("fr", "new"):
        with pytest.raises(ValueError, match="expected") if name == "fr" else contextlib.nullcontext():
            load_adapter(model, tmp_path, name=name)
        for key, (requires_grad, grad) in before.items():
            parameter = model.get_parameter(key)
            assert parameter.requires_grad == requires_grad and (parameter.grad is None) == (grad is None), key
            assert grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("name", ["a.b", "", "keys", "active", 3])
def test_a_plain_model_is_not_adapted_under_a_name_that_cannot_be(name: object, tmp_path) -> None:
    save_adapter(model_with(shared=False), tmp_path)
    model = toy()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="name: expected"):
        load_adapter(model, tmp_path, name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("beside", ["another adapter", "a TaskBank"])
def test_a_start_is_not_taken_from_weights_that_others_use(beside: str, tmp_path) -> None:
    config = LoTRConfig(rank=4, target_modules=["q", "v"])
    save_adapter(apply_lotr(toy(), dataclasses.replace(config, init="svd")), tmp_path)
    model = apply_lotr(toy(), config)
    add_adapter(model, "another adapter") if beside == "another adapter" else lotr_ext.TaskBank(model, 2)
    before = snapshot(model)
    for name in (None, "default"):
        with pytest.raises(RuntimeError, match=f'expected an init other than "svd".* with {beside} over the same weights'):
            load_adapter(model, tmp_path, name=name)
    assert_unchanged(model, before)


def test_the_factors_of_a_bank_are_not_deleted(tmp_path) -> None:
    model = apply_lotr(toy(), LoTRConfig(rank=4, target_modules=["q", "v"]))
    task = lotr_ext.TaskBank(model, 2).add()
    add_adapter(model, "same", share_factors="default")
    add_adapter(model, "own")
    set_adapter(model, "own")
    delete_adapter(model, "default")  # "same" has the factors too
    with pytest.raises(RuntimeError, match="delete_adapter: expected an adapter whose factors no TaskBank uses, got 'same'"):
        delete_adapter(model, "same")
    with mixed(set_adapter(model, "same"), torch.tensor([task] * len(IDS))):
        assert torch.equal(model(IDS), toy()(IDS))
    del model.lotr_tasks
    delete_adapter(set_adapter(model, "own"), "same")


@pytest.mark.parametrize("core", ["dense", "cp", "train"])
def test_cores_over_shared_factors_have_their_dtype(core: str, tmp_path) -> None:
    model = apply_lotr(toy(), LoTRConfig(rank=4, target_modules=["q", "v"])).double()
    add_adapter(model, "new", LoTRConfig(rank=4, core=core), share_factors="default")
    set_adapter(model, "new")
    randomize(model)
    model(IDS).sum().backward()
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(toy().double(), tmp_path)(IDS), model(IDS))


def test_a_failed_load_adds_nothing(tmp_path) -> None:
    model = model_with(shared=False)
    save_adapter(model, tmp_path / "fr", name="fr")
    other = apply_lotr(toy(), LoTRConfig(rank=4, target_modules=["q"]))
    state = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="expected"):
        load_adapter(other, tmp_path / "fr", name="fr")
    with pytest.raises(ValueError, match=r"rank \(4, 4\)"):
        load_adapter(model, tmp_path / "fr", name="two", share_factors="default")
    save_adapter(model, tmp_path / "default")
    with torch.no_grad():
        model.lotr_factors["16x16"].A.add_(1)
    with pytest.raises(ValueError, match=r"lotr_factors.16x16.A to be those of 'default'"):
        load_adapter(model, tmp_path / "default", name="two", share_factors="default")
    assert adapter_names(other) == ["default"] and adapter_names(model) == ["default", "fr"]
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_factors_with_nan_are_the_same_factors(tmp_path) -> None:
    model = model_with(shared=True)
    with torch.no_grad():
        model.lotr_factors["16x16"].A[0, 0] = torch.nan
    save_adapter(model, tmp_path / "fr", name="fr")
    load_adapter(model, tmp_path / "fr", name="two", share_factors="default")
    assert model.lotr_parked["two"].factors["16x16"] is model.lotr_factors["16x16"]


def test_merged_adapters_cannot_be_deleted_switched_or_mixed() -> None:
    model = model_with(shared=True)
    want = outputs(copy.deepcopy(model))
    merge(model)
    for call in (
        lambda: delete_adapter(model, "default"),
        lambda: set_adapter(model, "fr"),
        lambda: add_adapter(model, "de"),
        lambda: mixed(model, ["default"]).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            call()
    delete_adapter(model, "fr")
    unmerge(model)
    assert torch.equal(model(IDS), want["default"])
    add_adapter(model, "de")
    plain = unload(model, merge=False)
    assert not any("lotr" in name for name, _ in plain.named_modules())


# ---- batches of several adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["no grad", "grad", "autocast", "composite"])
def test_each_row_of_a_mixed_batch_goes_through_its_adapter(mode: str, monkeypatch) -> None:
    model = model_with(shared=True)
    model.lotr_parked["fr"].saved[0].data.copy_(model.head.weight)  # one head, which rows cannot choose
    if mode == "composite":
        monkeypatch.setattr(planner, "LOTR_STRATEGY", "composite")
    names = ["fr", "default", None, "fr"]
    with torch.set_grad_enabled(mode != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        want = {name: set_adapter(model, name)(IDS).detach() for name in ("fr", "default")}
        with lotr_ext.disabled(model):
            want[None] = model(IDS).detach()
        for active in ("default", "fr"):
            set_adapter(model, active)
            with mixed(model, names):
                got = model(IDS)
            assert torch.equal(model(IDS), want[active])  # outside of the context as before
            for i, name in enumerate(names):
                atol = 3e-2 if mode == "autocast" else 1e-5
                torch.testing.assert_close(got[i].float(), want[name][i].float(), atol=atol, rtol=atol)
    assert (want["fr"] - want["default"]).abs().max() > 0.1


def test_gradients_of_a_mixed_batch() -> None:
    """Those of plain torch in float64, and one shrink for the siblings q, k, v."""
    model = model_with(shared=True).double()
    fr = model.lotr_parked["fr"]
    fr.cores.requires_grad_(True)
    names = ["fr", "default", "default", "fr"]
    with mixed(model, names):
        model(IDS).square().sum().backward()
    layers = dict(model.named_modules())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()

    def plain(layer: nn.Module, core: torch.Tensor, other: torch.Tensor):
        def hook(module, args, output):
            x, factors = args[0], layer.factors
            cores = torch.stack([0.5 * other if name == "fr" else core for name in names])
            base = nn.functional.linear(x, layer.weight, layer.bias)
            return base + ((x @ factors.A) @ cores) @ factors.B.T

        return hook

    adapted = [layer for layer in layers.values() if isinstance(layer, lotr_ext.LoTRLinear)]
    handles = [layer.register_forward_hook(plain(layer, layer.core, fr.cores[i])) for i, layer in enumerate(adapted)]
    model(IDS).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert any("lotr_parked" in name for name in got) and any(name.endswith(".A") for name in got)
    for name, p in parameters.items():
        torch.testing.assert_close(got[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_a_mixed_batch_shares_one_shrink_among_siblings(monkeypatch) -> None:
    model = model_with(shared=True)
    calls = []
    shrink = lotr_ext.ops.shrink
    monkeypatch.setattr(lotr_ext.ops, "shrink", lambda *a, **k: calls.append(a[0].shape) or shrink(*a, **k))
    with mixed(model, ["fr", "default", "fr", "default"]):
        model(IDS).sum().backward()
    assert len(calls) == 2 * 2  # in each of two blocks one for q, k and v, and one for up


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_core_index_of_lotr_linear(dtype: torch.dtype) -> None:
    """Against plain torch in float64, with gradients; no row, and rows of no tokens too. -1: without the adapter."""
    torch.manual_seed(0)
    x, W, bias = torch.randn(5, 3, 12), torch.randn(7, 12), torch.randn(7)
    A, B, core = torch.randn(12, 4), torch.randn(7, 2), torch.randn(3, 4, 2)
    index = torch.tensor([2, 0, 2, 2, 0])
    given = [t.to(dtype).requires_grad_(t is not W and t is not bias) for t in (x, W, bias, A, B, core)]
    y = lotr_ext.lotr_linear(*given, 0.7, core_index=index)
    y.double().sin().sum().backward()
    x, W, bias, A, B, core = (t.detach().double().requires_grad_() for t in given)
    want = nn.functional.linear(x, W, bias) + 0.7 * ((x @ A) @ core[index]) @ B.T
    want.sin().sum().backward()
    tol = 1e-10 if dtype == torch.float64 else 0.15
    torch.testing.assert_close(y.double(), want, atol=tol, rtol=tol)
    for got, plain in zip(given, (x, W, bias, A, B, core), strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad.double(), plain.grad, atol=4 * tol, rtol=tol)
    assert not core.grad[1].any() and not given[5].grad[1].any()
    for shape in ((0, 3, 12), (5, 0, 12)):
        empty = lotr_ext.lotr_linear(torch.zeros(shape, dtype=dtype), *given[1:], 0.7, core_index=index[: shape[0]])
        assert empty.shape == (*shape[:2], 7)


def test_bad_input() -> None:
    model, bare = model_with(shared=False), toy()
    by_hand = nn.Sequential(lotr_ext.LoTRLinear(4, 4))
    svd = apply_lotr(toy(), LoTRConfig(rank=2, init="svd", target_modules=["q"]))
    grown = apply_lotr(nn.Sequential(nn.Linear(4, 4)), LoTRConfig(rank=2))
    add_adapter(grown, "b", share_factors="default")
    bank = lotr_ext.TaskBank(grown, 2)
    grown.again = copy.deepcopy(grown[0])
    shrunk = add_adapter(apply_lotr(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoTRConfig(rank=2)), "b")
    shrunk[0] = nn.Identity()

    def linear(core, index):
        x, W, A, B = torch.zeros(3, 5), torch.zeros(6, 5), torch.zeros(5, 2), torch.zeros(6, 2)
        return lotr_ext.lotr_linear(x, W, None, A, B, core, 1.0, core_index=index)

    cases = [
        (RuntimeError, "without; apply_lotr", lambda: add_adapter(bare, "a")),
        (RuntimeError, "built by hand", lambda: add_adapter(by_hand, "a")),
        (RuntimeError, "the factors of 'again', got factors that no module owns", lambda: add_adapter(grown, "a")),
        (RuntimeError, "the factors of 'again', got factors that no module owns", lambda: set_adapter(grown, "b")),
        (RuntimeError, "mixed: expected the 1 layers .*, got 2", lambda: mixed(grown, ["b", None]).__enter__()),
        (RuntimeError, "mixed: expected the 1 layers .*, got 2", lambda: mixed(grown, torch.tensor([bank.add()])).__enter__()),
        (RuntimeError, "set_adapter: expected the 2 layers .*, got 1", lambda: set_adapter(shrunk, "b")),
        (RuntimeError, '"svd"', lambda: add_adapter(svd, "a")),
        (RuntimeError, '"svd"', lambda: add_adapter(model, "a", LoTRConfig(init="svd"))),
        (ValueError, 'mixed: expected .* "svd"', lambda: mixed(svd, ["default", None]).__enter__()),
        (ValueError, 'TaskBank: expected .* "svd"', lambda: lotr_ext.TaskBank(svd, 3)),
        (TypeError, "name: expected a str, got int 3", lambda: add_adapter(model, 3)),
        (ValueError, "without dots", lambda: add_adapter(model, "a.b")),
        (ValueError, "without dots", lambda: add_adapter(model, "keys")),
        (ValueError, "'fr', which exists", lambda: add_adapter(model, "fr")),
        (ValueError, "'default', which exists", lambda: add_adapter(model, "default")),
        (TypeError, "config: expected a LoTRConfig, got dict", lambda: add_adapter(model, "a", {})),
        (ValueError, "config: expected target_modules", lambda: add_adapter(model, "a", LoTRConfig(target_modules=["q"]))),
        (ValueError, "share_factors: expected one of default, fr, got 'b'", lambda: add_adapter(model, "a", share_factors="b")),
        (ValueError, r"rank \(3, 2\)", lambda: add_adapter(model, "a", LoTRConfig(rank=4), share_factors="fr")),
        (ValueError, "name: expected one of default, fr, got 'b'", lambda: set_adapter(model, "b")),
        (ValueError, "name: expected one of default, fr, got 'b'", lambda: delete_adapter(model, "b")),
        (RuntimeError, "'default', which is active", lambda: delete_adapter(model, "default")),
        (TypeError, "names: expected a sequence", lambda: mixed(model, "fr").__enter__()),
        (TypeError, "names: expected a sequence", lambda: mixed(model, []).__enter__()),
        (ValueError, "names: expected one of default, fr, got 'b'", lambda: mixed(model, ["b"]).__enter__()),
        (ValueError, "'fr', which has others", lambda: mixed(model, ["default", "fr"]).__enter__()),
        (ValueError, r"core: expected shape \(t, 2, 2\)", lambda: linear(torch.zeros(2, 2), torch.zeros(3).long())),
        (
            TypeError,
            "core_index: expected an int64 tensor, got torch.float32",
            lambda: linear(torch.zeros(4, 2, 2), torch.zeros(3)),
        ),
        (ValueError, r"per row or per token of x \(3, 5\)", lambda: linear(torch.zeros(4, 2, 2), torch.zeros(2).long())),
        (ValueError, r"indices in \[-1, 4\), got 0 to 4", lambda: linear(torch.zeros(4, 2, 2), torch.tensor([0, 4, 1]))),
        (ValueError, r"indices in \[-1, 4\), got -2 to 1", lambda: linear(torch.zeros(4, 2, 2), torch.tensor([0, -2, 1]))),
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    with mixed(model, ["default"] * 3), pytest.raises(ValueError, match="a batch of 3 rows, one per adapter name, got shape"):
        model(IDS)
    assert NOW.any is None
