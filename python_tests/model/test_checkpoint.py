"""save_adapter and load_adapter: round trips, kills in the middle, files that must be refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from gloo import fork, forks
from safetensors.torch import load_file
from torch import nn
from toys import IDS, Tied, Toy, adapted, assert_unchanged, no_warnings, randomize, refused, snapshot, tensors_file, toy

from lotr_ext import LoTRFactors, LoTRLinear
from lotr_ext.interop import export_lora, lotr_to_lora, lotr_to_peft
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.adapter_files import JSON_NAME
from lotr_ext.model.adapters import active_adapter, add_adapter
from lotr_ext.model.apply import apply_lotr, disabled
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.loading import load_adapter
from lotr_ext.model.merging import merge, unload, unmerge
from lotr_ext.model.saving import save_adapter

SETTINGS = [
    {},
    {"rank": (2, 5), "alpha": 3.0, "dropout": 0.25, "group_by": "name", "train": ("core",), "target_modules": "all-linear"},
    {
        "modules_to_save": ["head", "embed"],
        "group_by": lambda name, module: f"g{module.out_features}",
        "target_modules": r".*\.(q|up)",
    },
    {"adapter_dtype": torch.bfloat16, "scaling": 0.3, "exclude_modules": ["down"], "target_modules": None},
    {"init": "svd", "alpha": 2.0, "modules_to_save": ["1.norm"]},
    {"core_init": "identity", "group_by": "block"},
    {"init": "svd", "train": ("A", "B"), "group_by": "name"},
]


def trained(**settings) -> Toy:
    model = adapted(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("onto", ["base", "adapted"])
def test_round_trip(tmp_path: Path, settings: dict, onto: str) -> None:
    model = trained(**settings)
    save_adapter(model, tmp_path / "a" / "b")
    fresh = toy() if onto == "base" else adapted(**settings)
    if onto == "adapted":
        randomize(fresh, seed=9)
    assert load_adapter(fresh.eval(), tmp_path / "a" / "b") is fresh
    assert torch.equal(fresh(IDS), model(IDS))
    want, got = model.state_dict(), fresh.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert fresh.lotr_config == (model.lotr_config if onto == "base" else fresh.lotr_config)
    for name, layer in adapted_layers(model).items():
        assert adapted_layers(fresh)[name].dropout == layer.dropout and adapted_layers(fresh)[name].scaling == layer.scaling
    with disabled(fresh), disabled(model):
        assert torch.equal(fresh(IDS), model(IDS))
    merge(fresh), unmerge(fresh), unload(fresh, merge=True)


def test_what_is_trained_beside_the_adapter_is_named_since_the_file_lacks_it(tmp_path: Path) -> None:
    part, by_hand = nn.Sequential(adapted(), nn.Linear(4, 4)), nn.Sequential(LoTRLinear(4, 4), nn.LayerNorm(4))
    for model in (adapted(modules_to_save=["head"]), adapted(train=("core",)), adapted(core="tucker"), part, by_hand):
        add_adapter(model, "other").lotr_parked.requires_grad_(True) if model not in (part, by_hand) else None
        with no_warnings():
            save_adapter(model, tmp_path)
    for model, at in ((adapted(modules_to_save=["head"]), "embed"), (part, "0.embed")):
        model.get_submodule(at).requires_grad_(True)
        for write in (save_adapter, export_lora):
            match = rf"{write.__name__} does not write 1 trained parameters .* such as {at}.weight; .*modules_to_save"
            with pytest.warns(UserWarning, match=match):
                write(model, tmp_path / write.__name__)


@pytest.mark.parametrize("settings", [{}, {"group_by": "width", "core": "cp"}, {"magnitude": True}], ids=str)
def test_an_adapter_in_another_dtype_than_it_was_made_in_loads(settings: dict, tmp_path: Path) -> None:
    model = trained(modules_to_save=["head"], **settings).bfloat16()
    save_adapter(model, tmp_path)
    fresh = load_adapter(toy().eval().bfloat16(), tmp_path)
    assert torch.equal(fresh(IDS), model(IDS)) and fresh.blocks[0].q.core.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"got bfloat16.* in the adapter; give cast=True"):
        load_adapter(onto := adapted(modules_to_save=["head"], **settings).eval(), tmp_path)
    load_adapter(onto, tmp_path, cast=True)
    assert torch.equal(onto.blocks[0].q.factors.A.bfloat16(), model.blocks[0].q.factors.A)


FIRST_FIELDS = {
    *("rank", "alpha", "rslora", "scaling", "dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("group_by", "init", "train", "adapter_dtype", "core_init"),
}


def test_an_adapter_of_the_first_version_loads(tmp_path: Path) -> None:
    """Its config knew neither experts nor forms of cores."""
    model = trained(rank=3, modules_to_save=["head"])
    save_adapter(model, tmp_path)
    file = tmp_path / JSON_NAME
    saved = json.loads(file.read_text())
    assert saved["format_version"] == 1 and set(saved["config"]) > FIRST_FIELDS
    saved["config"] = {name: saved["config"][name] for name in FIRST_FIELDS}
    file.write_text(json.dumps(saved))
    fresh = load_adapter(toy().eval(), tmp_path)
    assert torch.equal(fresh(IDS), model(IDS)) and fresh.lotr_config == model.lotr_config


def test_a_tied_tensor_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = apply_lotr(Tied(), LoTRConfig(rank=2, modules_to_save=["embed", "head"]))
    model.embed.weight.data.normal_()
    save_adapter(model, tmp_path)
    stored = load_file(tensors_file(tmp_path))
    assert "embed.weight" in stored and "head.weight" not in stored and "head.bias" in stored
    fresh = load_adapter(Tied(), tmp_path)
    assert torch.equal(fresh(IDS), model(IDS)) and fresh.head.weight is fresh.embed.weight


TIES = [["head"], ["embed"], ["embed", "head"], ["head", "embed"]]


def tied(saved: list[str]) -> nn.Module:
    model = apply_lotr(Tied(), LoTRConfig(rank=2, modules_to_save=saved, target_modules=["q", "v"]))
    randomize(model)
    with torch.no_grad():
        model.head.weight.normal_()
    return model


@pytest.mark.parametrize("saved", TIES, ids=str)
def test_a_tied_tensor_loads_whatever_the_order_of_modules_to_save(saved: list[str], tmp_path: Path) -> None:
    model = tied(saved)
    save_adapter(model, tmp_path)
    for fresh in (Tied(), apply_lotr(Tied(), model.lotr_config)):
        assert torch.equal(load_adapter(fresh, tmp_path)(IDS), model(IDS)) and fresh.head.weight is fresh.embed.weight


def test_a_model_with_an_adapted_part_is_saved_with_the_modules_to_save_of_the_part(tmp_path: Path) -> None:
    def around() -> nn.Sequential:
        model = nn.Sequential(toy(), nn.Linear(3, 2))
        apply_lotr(model[0], LoTRConfig(rank=2, target_modules=["q"], modules_to_save=["head"]))
        return model.requires_grad_(False)

    model = around()
    with torch.no_grad():
        for parameter in (*model[0].head.parameters(), model[0].blocks[0].q.core, *model[1].parameters()):
            parameter.fill_(0.3)
    save_adapter(model, tmp_path / "lotr")
    fresh = load_adapter(around(), tmp_path / "lotr")
    assert torch.equal(fresh[0](IDS), model[0](IDS))
    fresh = load_adapter(nn.Sequential(toy(), nn.Linear(3, 2)), tmp_path / "lotr", name="one")
    assert torch.equal(fresh[0](IDS), model[0](IDS)) and active_adapter(fresh[0]) == "one"
    assert fresh[1].weight.requires_grad  # only the part was adapted
    with pytest.raises(ValueError, match="layers: expected a model with the adapted part '0', got a Toy without"):
        load_adapter(toy(), tmp_path / "lotr")
    with pytest.raises(ValueError, match="source: expected an adapter of the whole model, got one of its part '0'"):
        lotr_to_peft(tmp_path / "lotr", tmp_path / "peft")
    export_lora(model, tmp_path / "lora", base_model="base")
    assert "base_model.model.0.head.weight" in load_file(tmp_path / "lora" / "adapter_model.safetensors")


def untied() -> nn.Module:
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


@pytest.mark.parametrize("make, onto", [(Tied, untied), (untied, Tied)], ids=["tied", "untied"])
def test_a_head_is_not_loaded_where_its_ties_differ(make: Callable, onto: Callable, tmp_path: Path) -> None:
    """One of the two tensors would get the other's value, or keep the base model's."""
    model = apply_lotr(make(), LoTRConfig(rank=2, modules_to_save=["head"], target_modules=["q", "v"]))
    save_adapter(model, tmp_path)
    for fresh in (onto(), apply_lotr(onto(), model.lotr_config)):
        before = snapshot(fresh)
        with pytest.raises(
            ValueError, match=r"embed.weight: expected a tensor (tied to head.weight|of its own), as in the model"
        ):
            load_adapter(fresh, tmp_path)
        assert_unchanged(fresh, before)


@pytest.mark.parametrize("saved", TIES, ids=str)
def test_each_of_two_tied_modules_has_its_tensors_in_an_export(saved: list[str], tmp_path: Path) -> None:
    """PEFT copies each module of modules_to_save, so a trained tensor that two modules share belongs to both."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("lotr_ext.interop.peft")
    model = tied(saved)
    export_lora(model, tmp_path / "exported", base_model="base")
    save_adapter(model, tmp_path / "lotr")
    folders = ["exported"]
    if saved == ["embed"]:
        for convert in (lotr_to_lora, lotr_to_peft):
            with pytest.raises(
                ValueError, match=r"shares its tensors with that of 'head.bias', whose value is not in the file"
            ):
                convert(tmp_path / "lotr", tmp_path / "converted")
        assert not (tmp_path / "converted").exists()
    else:
        folders += ["lora", "peft"]
        lotr_to_lora(tmp_path / "lotr", tmp_path / "lora", base_model="base")
        lotr_to_peft(tmp_path / "lotr", tmp_path / "peft")
        assert torch.equal(load_adapter(Tied(), tmp_path / "peft")(IDS), model(IDS))
    for folder in folders:
        again = peft.PeftModel.from_pretrained(Tied(), tmp_path / folder)
        assert torch.allclose(again(IDS), model(IDS), atol=1e-5), folder


def test_every_tensor_is_stored_once_and_nothing_else(tmp_path: Path) -> None:
    model = trained(modules_to_save=["head"], init="svd", target_modules=["q", "k", "v", "o"])
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([JSON_NAME, tensors_file(tmp_path).name])
    stored = load_file(tensors_file(tmp_path))
    factors = {f"lotr_factors.16x16.{start}{part}" for start in ("", "start_") for part in "AB"}
    cores = {f"blocks.{i}.{n}.{start}core" for i in range(2) for n in "qkvo" for start in ("", "start_")}
    assert set(stored) == factors | cores | {"head.weight", "head.bias"}
    elements = sum(t.numel() for t in stored.values())
    assert elements == 2 * (2 * 16 * 4 + 8 * 16) + 16 * 3 + 3


def test_svd_moves_the_weights_of_an_adapted_model_to_the_loaded_start(tmp_path: Path) -> None:
    model = trained(init="svd", alpha=2.0)
    save_adapter(model, tmp_path / "svd")
    other = trained(alpha=1.0)
    save_adapter(other, tmp_path / "zero")
    switched = adapted(init="svd", rank=4, alpha=5.0, group_by=lambda name, module: "16x16")
    for directory, want in (("svd", model), ("zero", other), ("svd", model)):
        load_adapter(switched, tmp_path / directory)
        assert torch.allclose(switched(IDS), want(IDS), atol=1e-5)
        with disabled(switched):
            assert torch.allclose(switched(IDS), toy()(IDS), atol=1e-5)


class ByHand(nn.Module):
    """Two layers over one pair of factors, built by hand."""

    def __init__(self, owner: bool) -> None:
        super().__init__()
        factors = LoTRFactors(8, 8, 3)
        if owner:
            self.shared = factors
        self.first, self.second = LoTRLinear(8, 8, factors=factors), LoTRLinear(8, 8, factors=factors)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("owner", [True, False])
def test_models_built_by_hand(tmp_path: Path, owner: bool) -> None:
    model, other, x = ByHand(owner), ByHand(owner), torch.randn(5, 8)
    randomize(model)
    save_adapter(model, tmp_path)
    assert len(load_file(tensors_file(tmp_path))) == 4
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))}, strict=False)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="model with LoTR layers"):
        load_adapter(nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)}), tmp_path)


def test_wrapped_models_and_merged_ones(tmp_path: Path) -> None:
    model = trained()
    save_adapter(torch.compile(model), tmp_path / "compiled")
    want = model(IDS)
    merge(model)
    save_adapter(model, tmp_path / "merged")
    for directory in ("compiled", "merged"):
        assert torch.equal(load_adapter(toy().eval(), tmp_path / directory)(IDS), want)


def test_cast(tmp_path: Path) -> None:
    model = trained(modules_to_save=["head"])
    save_adapter(model, tmp_path)
    base = toy().to(torch.bfloat16)
    with refused(base, ValueError, match=r"head.weight: expected bfloat16 \[3, 16\].*got float32"):
        load_adapter(base, tmp_path)
    load_adapter(base, tmp_path, cast=True)
    assert base.head.weight.dtype == torch.bfloat16 and torch.equal(base.head.weight, model.head.weight.bfloat16())


def test_saving_over_an_adapter_replaces_it_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "lotr_adapter.json.77.tmp").write_text("left by a kill")
    for seed in (1, 2):
        model = adapted()
        randomize(model, seed=seed)
        save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["notes.txt", JSON_NAME, tensors_file(tmp_path).name])
    assert torch.equal(load_adapter(toy(), tmp_path)(IDS), model(IDS))


def test_an_adapter_lies_beside_what_accelerate_saves(tmp_path: Path) -> None:
    """Each is read without the other, and neither save removes the other's files."""
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), trained()
    for _ in range(2):
        accelerator.save_model(model, tmp_path, max_shard_size="4KB")
        save_adapter(accelerator.unwrap_model(model), tmp_path)
    again = adapted(random=False)
    accelerate.load_checkpoint_in_model(again, str(tmp_path))
    for got in (again, load_adapter(toy(), tmp_path)):
        assert torch.equal(got(IDS), model(IDS))


# ---- killed in the middle --------------------------------------------------------------------------------------------


def large() -> Toy:
    return adapted(target_modules="all-linear", rank=64)


def save(model: Toy, directory: Path, seed: int) -> None:
    randomize(model, seed=seed)
    save_adapter(model, directory)


def save_and_die(directory: Path, point: int) -> None:
    """Saves, and is killed before the fsync or replace with this number."""
    count = itertools.count(1)

    def dying(real: Callable) -> Callable:
        def call(*args, **kwargs):
            if next(count) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    save(large(), directory, 2)


def save_forever(directory: Path, saved: Connection) -> None:
    model = large()
    for seed in itertools.count(2):
        save(model, directory, seed)
        saved.send(seed)


def outputs(*seeds: int) -> dict[int, torch.Tensor]:
    model, found = large(), {}
    for seed in seeds:
        randomize(model, seed=seed)
        found[seed] = model(IDS)
    return found


def loaded_seed(directory: Path, seeds: range) -> int:
    got = load_adapter(toy(), directory)(IDS)
    return next(seed for seed, want in outputs(*seeds).items() if torch.equal(got, want))


def test_a_kill_at_each_step_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    """fsync of both files; then replace and the directory's fsync of each. The fifth step, the JSON's replace, decides."""
    model = large()
    for point in range(1, 8):
        save(model, directory := tmp_path / str(point), 1)
        killed = fork(save_and_die, directory, point)
        killed.join(timeout=1000)
        assert killed.exitcode == (-signal.SIGKILL if point < 7 else 0)
        assert loaded_seed(directory, range(1, 3)) == (1 if point <= 5 else 2), point
        save_adapter(model, directory)
        assert len(list(directory.iterdir())) == 2  # what the kill left is gone


def test_a_kill_at_any_time_leaves_a_whole_adapter(tmp_path: Path) -> None:
    seeds, saved = forks().Pipe(duplex=False)
    process = fork(save_forever, tmp_path, saved)
    for _ in range(8):  # at least so many saves, then kill wherever it is
        assert seeds.poll(1000)
        last = seeds.recv()
    time.sleep(0.003)
    process.kill()
    process.join(timeout=1000)
    while seeds.poll():
        last = seeds.recv()
    assert process.exitcode == -signal.SIGKILL
    assert loaded_seed(tmp_path, range(last, last + 2)) >= last
