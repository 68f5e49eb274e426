"""Saved adapters: round trips, files of bd4494a, damaged and foreign files, and saves that are killed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zoo
from helpers import relative
from models import CASES, config, moved, started, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lotr_ext import (
    LoTRConfig,
    LoTRFactors,
    LoTRLinear,
    TaskBank,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    merge,
    save_adapter,
    unload,
    use_tasks,
)
from lotr_ext.cores import DiagonalCores
from lotr_ext.files import JSON_NAME
from lotr_ext.model import adapted_layers

OLD = Path(__file__).parent / "data" / "bd4494a"
OLD_NETS = {
    "dense": "mlp",
    "width": "llama",
    "tasks": "attention",
    "experts": "mixture",
    "diagonal": "bert",
}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tensors_file(folder: Path) -> Path:
    (found,) = folder.glob("lotr_adapter.*.safetensors")
    return found


# ---- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), CASES)
def test_saved_and_loaded_models_compute_the_same(name: str, way: str, tmp_path: Path) -> None:
    model, x = trained(name, way, dropout=0.25), zoo.inputs(name)
    y = zoo.output(model, x)
    save_adapter(model, tmp_path / "new" / "folder")
    plain = load_adapter(zoo.net(name), tmp_path / "new" / "folder")
    adapted = load_adapter(started(name, way, dropout=0.25), tmp_path / "new" / "folder")
    for other in (plain, adapted):
        assert torch.equal(zoo.output(other, x), y) and same(state(other), state(model))
        assert [p.requires_grad for p in other.parameters()] == [
            p.requires_grad for p in model.parameters()
        ]
        assert {layer.dropout for layer in adapted_layers(other).values()} == {0.25}
    assert plain.lotr_config == model.lotr_config
    save_adapter(plain, tmp_path / "again")
    first, second = (
        load_file(tensors_file(tmp_path / folder)) for folder in ("new/folder", "again")
    )
    assert same(first, second)
    if name != "mixture":
        unload(plain)
        assert set(plain.state_dict()) == set(zoo.net(name).state_dict())


@pytest.mark.parametrize(
    "change",
    [merge, lambda model: torch.compile(model, backend="eager")],
    ids=["merged", "compiled"],
)
def test_a_merged_or_compiled_model_is_saved_as_if_it_were_not(
    change: Callable, tmp_path: Path
) -> None:
    model, x = trained("mlp"), zoo.inputs("mlp")
    y = model(x)
    save_adapter(change(model), tmp_path)
    assert torch.equal(load_adapter(zoo.net("mlp"), tmp_path)(x), y)


def test_modules_to_save_and_buffers_come_along(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    model, x = (
        apply_lotr(make(), LoTRConfig(rank=2, target_modules=["0"], modules_to_save=["1", "2"])),
        torch.randn(8, 4),
    )
    moved(model)
    model.train()(x)
    zoo.fill(model, 5, 0.2, lambda name: name[0] in "12")
    save_adapter(model, tmp_path)
    other = load_adapter(make(), tmp_path)
    assert torch.equal(other.eval()(x), model.eval()(x)) and other[1].num_batches_tracked == 1
    assert [n for n, p in other.named_parameters() if p.requires_grad and "lotr" not in n] == [
        *("0.core", "1.weight", "1.bias", "2.weight", "2.bias")
    ]


def test_hand_built_models_are_filled(tmp_path: Path) -> None:
    def make() -> nn.Module:
        factors = LoTRFactors(4, 4, 2)
        model = nn.ModuleDict({n: LoTRLinear(4, 4, factors=factors) for n in "ab"})
        cores = DiagonalCores(["c", "d"], 2)
        model["c"], model["d"] = (LoTRLinear(4, 4, rank=2, scaling=0.5) for _ in range(2))
        for n in "cd":
            model[n].use_core(cores.at(n))
        return model

    model, other, x = moved(make()), make(), torch.randn(3, 4)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / JSON_NAME).read_text())["config"] is None
    for n in "abcd":
        (
            other[n].weight.data.copy_(model[n].weight.data),
            other[n].bias.data.copy_(model[n].bias.data),
        )
    load_adapter(other, tmp_path)
    assert all(torch.equal(other[n](x), model[n](x)) for n in "abcd")


def test_dtypes_are_checked_and_cast(tmp_path: Path) -> None:
    model, x = trained("mlp"), zoo.inputs("mlp")
    save_adapter(model, tmp_path)
    other = started("mlp", adapter_dtype="float64")
    with pytest.raises(ValueError, match="cast=True"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, cast=True)
    assert {p.dtype for p in lotr_parameters(other)} == {torch.float64} and relative(
        other(x), model(x)
    ) < 1e-6
    save_adapter(model.to(torch.bfloat16), tmp_path)  # the config follows what the adapter is
    again = load_adapter(zoo.net("mlp", torch.bfloat16), tmp_path)
    assert again.lotr_config.adapter_dtype == torch.bfloat16 and torch.equal(
        again(x.bfloat16()), model(x.bfloat16())
    )


def test_scaling_is_loaded_with_the_values(tmp_path: Path) -> None:
    model, other, x = trained("mlp", scaling=0.3), started("mlp", scaling=2.0), zoo.inputs("mlp")
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(other, tmp_path)(x), model(x))


def test_a_tied_tensor_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = zoo.fill(
            nn.ModuleDict(
                {
                    "a": nn.Linear(4, 4),
                    "embed": nn.Embedding(6, 4),
                    "head": nn.Linear(4, 6, bias=False),
                }
            )
        )
        model["head"].weight = model["embed"].weight
        return model

    for saved in (["head"], ["embed", "head"], ["head", "embed"]):
        model = zoo.fill(
            apply_lotr(make(), LoTRConfig(rank=2, target_modules=["a"], modules_to_save=saved)), 3
        )
        save_adapter(model, tmp_path)
        assert (
            len(
                [
                    n
                    for n in load_file(tensors_file(tmp_path))
                    if n.split(".")[0] in ("embed", "head")
                ]
            )
            == 1
        )
        other = load_adapter(make(), tmp_path)
        assert (
            torch.equal(other["embed"].weight, model["head"].weight)
            and other["head"].weight is other["embed"].weight
        )


def test_parametrized_cores_are_saved_by_value(tmp_path: Path) -> None:
    class Halved(nn.Module):
        def forward(self, core: Tensor) -> Tensor:
            return core / 2

    model, x = trained("mlp"), zoo.inputs("mlp")
    parametrize.register_parametrization(model.blocks[0]["up"], "core", Halved())
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(zoo.net("mlp"), tmp_path)(x), model(x))
    with pytest.raises(TypeError, match="parametrizations"):
        load_adapter(model, tmp_path)


def test_warns_of_what_the_file_lacks(tmp_path: Path) -> None:
    model = trained("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    model.head.weight.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"does not write 1 trained parameters .* head\.weight"
    ) as caught:
        save_adapter(model, tmp_path)
    assert len(caught) == 1
    model.head.weight.requires_grad_(False)
    bank = TaskBank(model, 3).requires_grad_()
    bank.add(), bank.add()
    with pytest.warns(UserWarning, match=r"such as lotr_tasks\.cores\.0\..*tasks with") as caught:
        save_adapter(model, tmp_path)
    assert len(caught) == 1


# ---- files of bd4494a -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OLD_NETS)
def test_loads_what_older_code_saved(folder: str, tmp_path: Path) -> None:
    name, expected = OLD_NETS[folder], load_file(OLD / folder / "expected.safetensors")
    model = load_adapter(zoo.net(name), OLD / folder)
    assert relative(zoo.output(model, expected["x"]), expected["y"]) < 1e-6
    assert {layer.scaling for layer in adapted_layers(model).values()} == {model.lotr_config.s}
    adapted = apply_lotr(zoo.net(name), model.lotr_config)
    load_adapter(adapted, OLD / folder)
    save_adapter(model, tmp_path)
    for again in (adapted, load_adapter(zoo.net(name), tmp_path)):
        assert torch.equal(zoo.output(again, expected["x"]), zoo.output(model, expected["x"]))


def test_loads_tasks_that_older_code_saved(tmp_path: Path) -> None:
    model, expected = zoo.net("attention"), load_file(OLD / "tasks" / "expected.safetensors")
    load_adapter(model, OLD / "tasks")
    bank = TaskBank(model, 4)
    for i in range(3):
        assert bank.add(OLD / "tasks" / f"task{i}.safetensors") == i
    with use_tasks(model, expected["index"]):
        assert relative(zoo.output(model, expected["x"]), expected["y_of_tasks"]) < 1e-6
    save_adapter(model, tmp_path)
    bank.save(1, tmp_path / "task.safetensors")
    again = load_adapter(zoo.net("attention"), tmp_path)
    TaskBank(again, 1).add(tmp_path / "task.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.lotr_tasks.cores_of(0).values(), bank.cores_of(1).values())
    )


# ---- damaged and foreign files ----------------------------------------------------------------------------------------


def edited(*place: str, **changes: object) -> Callable[[Path], None]:
    """A change of entries of the JSON file, or of the object at a place in it."""

    def change(folder: Path) -> None:
        content = within = json.loads((folder / JSON_NAME).read_text())
        for key in place:
            within = within[key]
        within.update(changes)
        (folder / JSON_NAME).write_text(json.dumps(content))

    return change


def of_layer(**changes: object) -> Callable[[Path], None]:
    return edited("layers", "blocks.1.up", **changes)


def of_tensors(name: str, tensor: Tensor) -> Callable[[Path], None]:
    """Another tensor in a file that is whole otherwise."""

    def change(folder: Path) -> None:
        path = tensors_file(folder)
        save_file({**load_file(path), name: tensor}, path)
        edited(tensors_sha256=hashlib.sha256(path.read_bytes()).hexdigest())(folder)

    return change


def overwritten(suffix: str, data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.glob(f"*.{suffix}")
        path.write_bytes(data(path.read_bytes()))

    return change


HOSTILE: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda folder: (folder / JSON_NAME).unlink(),
    "no tensors": lambda folder: tensors_file(folder).unlink(),
    "tensors cut off": overwritten("safetensors", lambda data: data[:200]),
    "tensors of length 0": overwritten("safetensors", lambda data: b""),
    "one bit changed": overwritten("safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "JSON cut off": overwritten("json", lambda data: data[:100]),
    "JSON a list": overwritten("json", lambda data: b"[]"),
    "JSON of bytes": overwritten("json", lambda data: b"\xff\xfe\x00"),
    "JSON a folder": lambda folder: ((folder / JSON_NAME).unlink(), (folder / JSON_NAME).mkdir()),
    "another format": edited(format="lora"),
    "a newer version": edited(format_version=99),
    "no version": edited(format_version=None),
    "a path as the tensors' file": edited(
        tensors_file="../lotr_adapter.0123456789abcdef.safetensors"
    ),
    "a number as the tensors' file": edited(tensors_file=3),
    "another checksum": edited(tensors_sha256="0" * 64),
    "a list of layers": edited(layers=[]),
    "no layers": edited(layers={}),
    "a layer that is a number": edited(layers={"blocks.0.up": 3}),
    "a layer with a scaling as a word": of_layer(scaling="auto"),
    "a layer without factors": of_layer(A=None),
    "a layer with other factors": of_layer(A="lotr_factors.2.value"),
    "a layer with unknown factors": of_layer(A="lotr_factors.9.value"),
    "a config that is a list": edited(config=[]),
    "an unknown field": edited("config", other=1),
    "a rank of 0": edited("config", rank=0),
    "an unknown dtype": edited("config", adapter_dtype="complex64"),
    "another tensor": of_tensors("extra", torch.zeros(2)),
    "a tensor of another shape": of_tensors("blocks.1.up.core", torch.zeros(3, 2)),
    "a tensor of another dtype": of_tensors("blocks.1.up.core", torch.zeros(3, 3).half()),
    "a factor of three dimensions": of_tensors("lotr_factors.0.value", torch.zeros(16, 3, 1)),
    "part of a start": of_tensors("blocks.1.up.start_core", torch.zeros(3, 3)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(trained("mlp", modules_to_save=["head"]), folder)
    return folder


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_damaged_files_are_one_clear_error(
    damage: Callable[[Path], object], adapted: bool, saved: Path, tmp_path: Path
) -> None:
    """Whatever is wrong with a file, an error that says what was expected, and a model that is as it was."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage(folder)
    model, x = zoo.net("mlp"), zoo.inputs("mlp")
    if adapted:
        model = started("mlp", modules_to_save=["head"])
    before, y, flags = state(model), model(x), [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError, RuntimeError), match="expected") as raised:
        load_adapter(model, folder)
    assert (
        type(raised.value) in (ValueError, TypeError, RuntimeError)
        and len(str(raised.value)) < 2000
    )
    assert same(state(model), before) and torch.equal(model(x), y)
    assert flags == [p.requires_grad for p in model.parameters()]


# ---- crashes ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs, so the test also turns off what cleans up."""


def killed_at(step: int, changes: Iterator[int], real: Callable) -> Callable:
    """The real change of the disk, or the end of the process if it is the step-th or a later one."""

    def call(*args: object, **kwargs: object) -> object:
        if next(changes) >= step:
            raise Killed
        return real(*args, **kwargs)

    return call


def test_a_kill_at_any_step_leaves_the_old_or_the_new_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, x = trained("mlp", seed=1), trained("mlp", seed=2), zoo.inputs("mlp")
    wanted, found = [zoo.output(model, x) for model in (old, new)], []
    for step in range(10):
        save_adapter(old, folder := tmp_path / str(step))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            changes = itertools.count()
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")):
                patch.setattr(owner, name, killed_at(step, changes, getattr(owner, name)))
            save_adapter(new, folder)
        y = zoo.output(load_adapter(zoo.net("mlp"), folder), x)
        found.append([torch.equal(y, want) for want in wanted].index(True))
    assert next(changes) == 8 and found == sorted(found) and set(found) == {0, 1}
    assert sorted(path.suffix for path in folder.iterdir()) == [
        ".json",
        ".safetensors",
    ]  # the old tensors are removed


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "lotr_adapter.txt").write_bytes(b"mine")
    for _ in range(2):
        save_adapter(trained("mlp"), tmp_path)
    assert (
        len(list(tmp_path.iterdir())) == 4
        and (tmp_path / "model.safetensors").read_bytes() == b"mine"
    )


def test_names_in_the_files(tmp_path: Path) -> None:
    save_adapter(started("mlp"), tmp_path)
    content = json.loads((tmp_path / JSON_NAME).read_text())
    assert LoTRConfig.from_dict(content["config"]) == config("mlp")
    assert (
        content["format_version"] == 2
        and content["layers"]["blocks.0.up"]["A"] == "lotr_factors.0.value"
    )
