"""Saved adapters: round trips, old files, other bases, saves that are killed, damaged files.

The old files, of version 1, were saved at commit bd4494a, lotr_ext 0.1.0. A file of version 2 is
written here, by `as_version_2`.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial, reduce
from multiprocessing import get_context
from multiprocessing.pool import Pool, ThreadPool
from operator import getitem
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import zoo
from helpers import ERRORS, OLD_FILES, relative
from models import CASES, flags_of, moved, same, started, state, trained, unchanged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import profile

from lotr_ext import (
    LoTRConfig,
    LoTRFactors,
    LoTRLinear,
    TaskBank,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    merge,
    push_to_hub,
    save_adapter,
    use_tasks,
)
from lotr_ext.adapter_state import FILE_NAME
from lotr_ext.cores import DiagonalCores
from lotr_ext.model import adapted_layers
from lotr_ext.old_files import JSON_NAME, config_of_version_1
from lotr_ext.storage import checksum, tensors_in

OLD_NETS = {
    "dense": "mlp",
    "width": "llama",
    "tasks": "attention",
    "experts": "mixture",
    "diagonal": "bert",
}
VERSION_2_TENSORS = "lotr_adapter.0123456789abcdef.safetensors"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the document and the tensors of an adapter, without tensors for version 2."""
    if (folder / JSON_NAME).exists():
        return json.loads((folder / JSON_NAME).read_text()), {}
    tensors, metadata = tensors_in(folder / FILE_NAME, "folder")
    return json.loads(metadata["adapter"]), tensors


def write(folder: Path, document: object, tensors: dict[str, Tensor]) -> None:
    """Replaces what `read` returns, with right checksums."""
    text = json.dumps(document)
    if (folder / JSON_NAME).exists():
        (folder / JSON_NAME).write_text(text)
        return
    sha256 = checksum(sorted(tensors.items()), text.encode())
    metadata = {"format": "lotr", "format_version": "3", "adapter": text, "sha256": sha256}
    save_file(tensors, folder / FILE_NAME, metadata)


def as_version_2(folder: Path) -> None:
    """Replaces an adapter by the two files of version 2."""
    document, tensors = read(folder)
    save_file(tensors, folder / VERSION_2_TENSORS)
    del document["base"]
    document |= {
        "format": "lotr",
        "format_version": 2,
        "tensors_file": VERSION_2_TENSORS,
        "tensors_sha256": hashlib.sha256((folder / VERSION_2_TENSORS).read_bytes()).hexdigest(),
    }
    (folder / JSON_NAME).write_text(json.dumps(document))
    (folder / FILE_NAME).unlink()


def reloaded(model: nn.Module, other: nn.Module, folder: Path) -> nn.Module:
    """Saves a model's adapter and returns another model that has loaded it."""
    save_adapter(model, folder)
    return load_adapter(other, folder)


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), CASES)
def test_saved_and_loaded_models_compute_the_same(name: str, way: str, tmp_path: Path) -> None:
    model = trained(name, way, dropout=0.25)
    x = zoo.inputs(name)
    y = zoo.output(model, x)
    folder = tmp_path / "new" / "folder"
    plain = reloaded(model, zoo.net(name), folder)
    for other in (plain, load_adapter(started(name, way, dropout=0.25), folder)):
        assert torch.equal(zoo.output(other, x), y)
        assert same(state(other), state(model))
        assert flags_of(other) == flags_of(model)
        assert {layer.dropout for layer in adapted_layers(other).values()} == {0.25}
    assert plain.lotr_config == model.lotr_config


@pytest.mark.parametrize(
    "change",
    [merge, lambda model: torch.compile(model, backend="eager")],
    ids=["merged", "compiled"],
)
def test_a_merged_or_compiled_model_is_saved_as_if_it_were_not(
    model: nn.Module, x: Tensor, change: Callable, tmp_path: Path
) -> None:
    y = model(x)
    assert torch.equal(reloaded(change(model), zoo.net("mlp"), tmp_path)(x), y)


def test_modules_to_save_come_along(tmp_path: Path) -> None:
    """Their buffers come along, too, and so do weights that share memory."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.BatchNorm1d(4))
        memory = torch.randn(6, 4)
        model[1].weight = nn.Parameter(memory[:4])
        model[2].weight = nn.Parameter(memory[2:])
        return model

    settings = LoTRConfig(rank=2, target_modules=["0"], modules_to_save=["1", "2", "3"])
    model = moved(apply_lotr(make(), settings))
    x = torch.randn(8, 4)
    model.train()(x)
    zoo.fill(model, 5, 0.2, lambda name: name[0] in "123")
    other = reloaded(model, make(), tmp_path)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert other[3].num_batches_tracked == 1
    assert flags_of(other) == flags_of(model)


def test_hand_built_models_are_filled(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        factors = LoTRFactors(4, 4, 2)
        model = nn.ModuleDict({name: LoTRLinear(4, 4, factors=factors) for name in "ab"})
        cores = DiagonalCores(["c", "d"], 2)
        for name in "cd":
            model[name] = LoTRLinear(4, 4, rank=2, scaling=0.5)
            model[name].use_core(cores.at(name))
        return model

    model = moved(make())
    # A parametrization of the weight must not count as one of the core.
    parametrize.register_parametrization(model["c"], "weight", nn.Identity())
    other = reloaded(model, make(), tmp_path)
    assert read(tmp_path)[0]["config"] is None
    x = torch.randn(3, 4)
    assert all(torch.equal(other[name](x), model[name](x)) for name in "abcd")


def test_dtypes_are_checked_and_cast(x: Tensor, model: nn.Module, tmp_path: Path) -> None:
    other = started("mlp", adapter_dtype="float64")
    with pytest.raises(ValueError, match="cast=True"):
        reloaded(model, other, tmp_path)
    load_adapter(other, tmp_path, cast=True)
    assert {p.dtype for p in lotr_parameters(other)} == {torch.float64}
    assert relative(other(x), model(x)) < 1e-6
    # The saved config has the dtype that the adapter has by then.
    again = reloaded(model.to(torch.bfloat16), zoo.net("mlp", torch.bfloat16), tmp_path)
    assert again.lotr_config.adapter_dtype == torch.bfloat16
    assert torch.equal(again(x.bfloat16()), model(x.bfloat16()))


def with_head(tied: bool) -> nn.Module:
    embed = nn.Embedding(6, 4)
    model = zoo.Children(a=nn.Linear(4, 4), embed=embed, head=nn.Linear(4, 6, bias=False))
    if tied:
        model.head.weight = embed.weight
    return zoo.fill(model)


@pytest.mark.parametrize("saved", [["head"], ["embed", "head"], ["head", "embed"]])
def test_a_tied_tensor_is_stored_once_and_stays_tied(saved: list[str], tmp_path: Path) -> None:
    settings = LoTRConfig(rank=2, target_modules=["a"], modules_to_save=saved)
    model = apply_lotr(with_head(tied=True), settings)
    zoo.fill(model, 3, only=lambda name: not name.startswith("a."))
    other = reloaded(model, with_head(tied=True), tmp_path)
    _, tensors = read(tmp_path)
    assert sum(name.startswith(("embed.", "head.")) for name in tensors) == 1
    assert torch.equal(other.embed.weight, model.head.weight)
    assert other.head.weight is other.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_not_loaded_where_its_ties_differ(tied: bool, tmp_path: Path) -> None:
    """The file has one of two tied weights. The other one would keep the base's values."""
    settings = LoTRConfig(rank=2, target_modules=["a"], modules_to_save=["head"])
    save_adapter(apply_lotr(with_head(tied), settings), tmp_path)
    message = r"modules_to_save: expected .* tied as in the model"
    for other in (with_head(not tied), apply_lotr(with_head(not tied), settings)):
        with unchanged(other), pytest.raises(ValueError, match=message):
            load_adapter(other, tmp_path)


def with_shared_core() -> nn.Module:
    model = started("mlp")
    layers = list(adapted_layers(model).values())
    layers[2].core = layers[0].core
    return model


def test_layers_may_share_one_core(x: Tensor, tmp_path: Path) -> None:
    model = moved(with_shared_core())
    for other in (with_shared_core(), started("mlp"), zoo.net("mlp")):
        assert torch.equal(reloaded(model, other, tmp_path)(x), model(x))


def test_parametrized_cores_are_saved_by_value(x: Tensor, model: nn.Module, tmp_path: Path) -> None:
    parametrize.register_parametrization(model.blocks[0]["up"], "core", nn.Tanh())
    assert torch.equal(reloaded(model, zoo.net("mlp"), tmp_path)(x), model(x))
    with pytest.raises(TypeError, match="parametrizations"):
        load_adapter(model, tmp_path)


@pytest.mark.filterwarnings("error")
def test_warns_of_what_the_file_lacks(model: nn.Module, tmp_path: Path) -> None:
    save_adapter(model, tmp_path)
    model.head.weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"does not write 1 trained parameters .* head\.weight"):
        save_adapter(model, tmp_path)
    model.head.weight.requires_grad_(False)
    TaskBank(model, 3).requires_grad_().add()
    with pytest.warns(UserWarning, match=r"such as lotr_tasks\.cores\.0\..*tasks with"):
        save_adapter(model, tmp_path)


def test_computed_cores_in_another_order_are_refused(tmp_path: Path) -> None:
    save_adapter(trained("mlp", "diagonal"), tmp_path)
    document, tensors = read(tmp_path)
    write(tmp_path, document | {"layers": dict(reversed(document["layers"].items()))}, tensors)
    with pytest.raises(ValueError, match="layers: expected the model's order"):
        load_adapter(started("mlp", "diagonal"), tmp_path)


# ---- files of bd4494a ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OLD_NETS)
def test_loads_what_older_code_saved(folder: str, tmp_path: Path) -> None:
    name = OLD_NETS[folder]
    expected = load_file(OLD_FILES / folder / "expected.safetensors")
    model = load_adapter(zoo.net(name), OLD_FILES / folder)
    y = zoo.output(model, expected["x"])
    assert relative(y, expected["y"]) < 1e-6
    assert {layer.scaling for layer in adapted_layers(model).values()} == {model.lotr_config.s}
    adapted = load_adapter(apply_lotr(zoo.net(name), model.lotr_config), OLD_FILES / folder)
    for again in (adapted, reloaded(model, zoo.net(name), tmp_path)):
        assert torch.equal(zoo.output(again, expected["x"]), y)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"scaling": "auto", "rank": 4}, 4 * 2**1.5),
        ({"scaling": "auto", "rank": [4, 2]}, 4 * 2**1.5),
        ({"scaling": "auto", "rank": [2, 4], "core": "train"}, 4 * 2**1.5),
        ({"scaling": "auto", "rank": 4, "core": "cp"}, 4 * 2**1.5),
        ({"scaling": "auto", "rank": 4, "core": "diagonal"}, 4 * 2**0.5),
        ({"scaling": None, "rank": 4}, 1.0),
        ({"scaling": None, "rank": 4, "rslora": True}, 2.0),
        ({"scaling": None, "rank": 4, "alpha": 2.0}, 0.5),
        ({"scaling": 0.3, "rank": 4, "init": "gradient"}, 0.3),
    ],
)
def test_the_scaling_of_a_configuration_of_version_1(
    settings: dict[str, Any], scaling: float
) -> None:
    config = LoTRConfig.from_dict(config_of_version_1({"magnitude": False, **settings}))
    assert config.s == pytest.approx(scaling)
    assert config.init == "orthonormal"
    assert config.train == ("A", "B", "core")


def test_loads_tasks_that_older_code_saved() -> None:
    expected = load_file(OLD_FILES / "tasks" / "expected.safetensors")
    model = load_adapter(zoo.net("attention"), OLD_FILES / "tasks")
    bank = TaskBank(model, 4)
    for i in range(3):
        assert bank.add(OLD_FILES / "tasks" / f"task{i}.safetensors") == i
    with use_tasks(model, expected["index"]):
        assert relative(zoo.output(model, expected["x"]), expected["y_of_tasks"]) < 1e-6


# ---- other bases ---------------------------------------------------------------------------------


def deeper(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return zoo.fill(nn.Sequential(*(nn.Linear(4, 4) for _ in range(blocks))))


def test_a_model_with_more_layers_is_refused(tmp_path: Path) -> None:
    save_adapter(apply_lotr(deeper(2), LoTRConfig(rank=2)), tmp_path)
    model = deeper(3)
    for strict in ("targets", True):
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"its 2 layers, got one with 1 more, such as 2"),
        ):
            load_adapter(model, tmp_path, strict=strict)
    with pytest.warns(UserWarning, match="1 more, such as 2"):
        assert load_adapter(model, tmp_path, strict=False).lotr_left_out == {
            "not in the loaded adapter": ["2"]
        }


@pytest.mark.parametrize("name", ["mlp", "gpt2", "mixture"])
def test_another_base_of_the_same_shapes_is_noticed(name: str, tmp_path: Path) -> None:
    other = zoo.fill(zoo.net(name), 5)
    with pytest.warns(UserWarning, match="base: expected the model"):
        reloaded(trained(name), other, tmp_path)
    with pytest.raises(ValueError, match="base: expected the model that the adapter") as raised:
        load_adapter(other, tmp_path, strict=True)
    # No number has more digits than a reader can compare.
    assert not re.search(r"\d{6}", str(raised.value))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", ["shape", "svd"])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_the_same_base_is_recognized(name: str, way: str, tmp_path: Path) -> None:
    """The base may be adapted or in half precision. The adapter may be saved merged, and twice."""
    model = trained(name, way)
    save_adapter(model, tmp_path / "first")
    save_adapter(merge(model), tmp_path / "merged")
    save_adapter(load_adapter(zoo.net(name), tmp_path / "first"), tmp_path / "again")
    for folder in ("first", "merged", "again"):
        for other in (zoo.net(name), started(name, way), zoo.net(name).bfloat16()):
            load_adapter(other, tmp_path / folder, strict=True)
        assert read(tmp_path / folder)[0]["base"]["values"]


@pytest.mark.parametrize(
    ("before", "saved_settings"),
    [({"scaling": 2.0}, {"alpha": 6, "dropout": 0.25}), ({"alpha": 2.0}, {"scaling": 0.3})],
)
def test_the_configuration_follows_what_is_loaded(
    x: Tensor, before: dict, saved_settings: dict, tmp_path: Path
) -> None:
    source = trained("mlp", **saved_settings)
    model = reloaded(source, started("mlp", **before), tmp_path)
    assert torch.equal(model(x), source(x))
    expected = (source.lotr_config.s, source.lotr_config.dropout)
    assert (model.lotr_config.s, model.lotr_config.dropout) == expected
    assert {(layer.scaling, layer.dropout) for layer in adapted_layers(model).values()} == {
        expected
    }


def test_the_configuration_follows_a_file_of_a_hand_built_model(tmp_path: Path) -> None:
    model = trained("mlp", scaling=0.3)
    del model.lotr_config
    assert reloaded(model, started("mlp", alpha=2.0), tmp_path).lotr_config.s == 0.3


# ---- other places --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("notes.txt", r"got .*, which has no adapter. Pass the folder"),
        ("config.json", r"save_pretrained or of a Trainer.*AdapterCheckpoints"),
        ("adapter_config.json", r"of PEFT.*PeftModel.from_pretrained.*lora_to_lotr"),
    ],
)
def test_a_folder_without_an_adapter_is_named(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_adapter(zoo.net("mlp"), tmp_path)


def test_pushes_to_a_hub_and_loads_from_it(
    x: Tensor, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that is a local folder: the cache in which huggingface_hub looks for a repository."""
    cache = tmp_path / "models--user--name"

    def upload(self: object, *, repo_id: str, folder_path: str) -> str:
        shutil.copytree(folder_path, cache / "snapshots" / "abc")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("abc")
        return f"{repo_id}@abc"

    create = mock.Mock()
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert push_to_hub(model, "user/name", private=True) == "user/name@abc"
    create.assert_called_once_with("user/name", exist_ok=True, private=True)
    assert torch.equal(load_adapter(zoo.net("mlp"), "user/name")(x), model(x))
    with pytest.raises(ValueError, match=r"expected a folder or the id .*user/other"):
        load_adapter(zoo.net("mlp"), "user/other")


# ---- crashes -------------------------------------------------------------------------------------


def killed_at(step: int, changes: Iterator[int], real: Callable) -> Callable:
    """Wraps a function that changes the disk. It raises from the step-th change on.

    Later changes fail too, because a process that has ended cleans nothing up.

    Args:
        step: The number of changes that succeed.
        changes: A counter that all wrapped functions share.
        real: The function to wrap.
    """

    def call(*args: object, **kwargs: object) -> object:
        if next(changes) >= step:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return call


def seed_of(folder: Path) -> int:
    """Returns the seed of the model whose adapter is in a folder."""
    x = zoo.inputs("mlp")
    y = load_adapter(zoo.net("mlp"), folder)(x)
    for seed in range(4):
        if torch.equal(y, trained("mlp", seed=seed)(x)):
            return seed
    pytest.fail("the folder has none of the saved adapters")


@pytest.mark.parametrize("is_version_2", [False, True], ids=["version 3", "version 2"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_adapter(
    is_version_2: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    for step in range(10):
        folder = tmp_path / str(step)
        save_adapter(trained("mlp", seed=1), folder)
        if is_version_2:
            as_version_2(folder)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            changes = itertools.count()
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")):
                patch.setattr(owner, name, killed_at(step, changes, getattr(owner, name)))
            save_adapter(trained("mlp", seed=2), folder)
        seeds.append(seed_of(folder))
    # The last save was not killed: it makes fewer changes of the disk than there are steps.
    assert next(changes) == (6 if is_version_2 else 4)
    assert seeds == sorted(seeds) and set(seeds) == {1, 2}
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_a_full_disk_leaves_the_old_adapter_and_no_other_file(
    x: Tensor, model: nn.Module, tmp_path: Path
) -> None:
    save_adapter(model, tmp_path)
    with (
        mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="space"),
    ):
        save_adapter(trained("mlp", seed=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert torch.equal(load_adapter(zoo.net("mlp"), tmp_path)(x), model(x))


def save_and_load(seed: int, folder: Path) -> None:
    """Saves an adapter five times. After each save, the folder has one of the saved adapters."""
    for _ in range(5):
        save_adapter(trained("mlp", seed=seed), folder)
        seed_of(folder)


@pytest.mark.parametrize(
    "workers", [ThreadPool, get_context("fork").Pool], ids=["threads", "processes"]
)
def test_saves_at_once_leave_one_of_the_adapters(
    workers: Callable[[int], Pool], tmp_path: Path
) -> None:
    with workers(4) as pool:
        pool.starmap(save_and_load, [(seed, tmp_path) for seed in range(4)])
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_other_files_in_the_folder_stay(model: nn.Module, tmp_path: Path) -> None:
    names = ("model.safetensors", "lotr_adapter.txt")
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    save_adapter(model, tmp_path)
    assert all((tmp_path / name).read_bytes() == b"mine" for name in names)


# ---- damaged and foreign files -------------------------------------------------------------------

Damage = Callable[[Path], object]  # of an adapter's folder
Change = Callable[[dict, dict], object]  # of the document and the tensors
UP = "blocks.1.up"


def edit(folder: Path, change: Change) -> None:
    document, tensors = read(folder)
    change(document, tensors)
    write(folder, document, tensors)


def document_with(*path: str, **fields: object) -> Damage:
    """Replaces fields of the document, or of the object at a path in it."""
    return partial(edit, change=lambda document, _: reduce(getitem, path, document).update(fields))


config_with = partial(document_with, "config")
layer_with = partial(document_with, "layers", UP)


def tensor_with(name: str, values: Tensor) -> Damage:
    return partial(edit, change=lambda document, tensors: tensors.update({name: values}))


def rewritten(change: Callable[[bytes], bytes], name: str = FILE_NAME) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def change_metadata(folder: Path, **changes: str) -> None:
    tensors, metadata = tensors_in(folder / FILE_NAME, "folder")
    save_file(tensors, folder / FILE_NAME, metadata | changes)


def replace_file(folder: Path, make: Callable[[Path], object]) -> None:
    (folder / FILE_NAME).unlink()
    make(folder / FILE_NAME)


def use_huge_cores(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Cores that are computed from 1.3 GB, of which the file has one slice."""
    document["config"] |= {"rank": 700, "core": "tucker"}
    for name, entry in document["layers"].items():
        for key in (entry["A"], entry["B"]):
            tensors[key] = torch.zeros(len(tensors[key]), 700)
        tensors[f"{name}.core"] = torch.zeros(700, 700)
    tensors |= {
        "lotr_cores.weights": torch.zeros(4, 700),
        "lotr_cores.slices": torch.zeros(1, 700, 700),
    }


# What may be wrong with a document, in either version.
DOCUMENT_DAMAGES: dict[str, Damage] = {
    "a list of layers": document_with(layers=[]),
    "no layers": document_with(layers={}),
    "a layer that is a number": document_with("layers", **{UP: 3}),
    "one layer less": partial(edit, change=lambda document, tensors: document["layers"].pop(UP)),
    "a scaling that is a word": layer_with(scaling="auto"),
    "a scaling that is not finite": layer_with(scaling=float("inf")),
    "a scaling that is true": layer_with(scaling=True),
    "dropout of 7": layer_with(dropout=7),
    "dropout that is NaN": layer_with(dropout=float("nan")),
    "dropout of None": layer_with(dropout=None),
    "experts of -1": layer_with(experts=-1),
    "experts that are a word": layer_with(experts="8"),
    "experts in a linear layer": layer_with(experts=2),
    "a layer without factors": layer_with(A=None),
    "a layer with one factor": layer_with(A="lotr_factors.0.value", B="lotr_factors.0.value"),
    "a layer with other factors": layer_with(A="lotr_factors.2.value"),
    "a layer with unknown factors": layer_with(A="lotr_factors.9.value"),
    "a layer with an unknown field": layer_with(other=1),
    "a config that is a list": document_with(config=[]),
    "a config that is a word": document_with(config="dense"),
    "an unknown field": config_with(other=1),
    "a rank of 0": config_with(rank=0),
    "another rank": config_with(rank=2),
    "computed cores that the file lacks": config_with(core="tucker"),
    "an unknown dtype": config_with(adapter_dtype="complex64"),
}
# In version 3, also damages of the base, the tensors and the file itself.
DAMAGES = DOCUMENT_DAMAGES | {
    "a base that is a list": document_with(base=[]),
    "a base with an unknown field": document_with(base={"names": "x"}),
    "values that are a list": document_with("base", values=[1.0]),
    "a value past every float": document_with("base", "values", x=[10**400]),
    "a value that is a word": document_with("base", "values", x=["x"]),
    "another tensor": tensor_with("extra", torch.zeros(2)),
    "one tensor less": partial(edit, change=lambda document, tensors: tensors.pop("head.bias")),
    "no core": partial(edit, change=lambda document, tensors: tensors.pop(f"{UP}.core")),
    "a tensor of another shape": tensor_with(f"{UP}.core", torch.zeros(3, 2)),
    "a tensor of another dtype": tensor_with(f"{UP}.core", torch.zeros(3, 3).half()),
    "integers": tensor_with(f"{UP}.core", torch.zeros(3, 3).int()),
    "a factor of three dimensions": tensor_with("lotr_factors.0.value", torch.zeros(16, 3, 1)),
    "a factor of another size": tensor_with("lotr_factors.0.value", torch.zeros(15, 3)),
    "part of a start": tensor_with(f"{UP}.start_core", torch.zeros(3, 3)),
    "cores of rank 700": partial(edit, change=use_huge_cores),
    "cut off": rewritten(lambda data: data[:200]),
    "one byte less": rewritten(lambda data: data[:8] + data[9:]),
    "another dtype in the header": rewritten(lambda data: data.replace(b'"F32"', b'"I32"', 1)),
    "empty": rewritten(lambda data: b""),
    "a dtype that safetensors.torch lacks": rewritten(
        lambda data: (
            bytes([53, *bytes(7)]) + b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}\0'
        )
    ),
    "one bit of a tensor changed": rewritten(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "one digit of the document changed": rewritten(
        lambda data: data.replace(b'\\"scaling\\": 1.5', b'\\"scaling\\": 1.6', 1)
    ),
    "no file": lambda folder: (folder / FILE_NAME).unlink(),
    "a folder": partial(replace_file, make=Path.mkdir),
    "a pipe": partial(replace_file, make=os.mkfifo),
    "another format": partial(change_metadata, format="lora"),
    "a newer version": partial(change_metadata, format_version="99"),
    "another checksum": partial(change_metadata, sha256="0" * 64),
    "another document": partial(change_metadata, adapter="{}"),
    "a document that is a list": partial(write, document=[], tensors={}),
}
VERSION_2_DAMAGES = DOCUMENT_DAMAGES | {
    "another format": document_with(format="lora"),
    "a newer version": document_with(format_version=99),
    "no version": document_with(format_version=None),
    "a path as the tensors' file": document_with(tensors_file=f"../{VERSION_2_TENSORS}"),
    "a number as the tensors' file": document_with(tensors_file=3),
    "another checksum": document_with(tensors_sha256="0" * 64),
    "no checksum": document_with(tensors_sha256=None),
    "JSON cut off": rewritten(lambda data: data[:100], JSON_NAME),
    "JSON a list": rewritten(lambda data: b"[]", JSON_NAME),
    "JSON of bytes": rewritten(lambda data: b"\xff\xfe\x00", JSON_NAME),
    "JSON of endless brackets": rewritten(lambda data: b"[" * 200_000, JSON_NAME),
    "no tensors": lambda folder: (folder / VERSION_2_TENSORS).unlink(),
    "tensors cut off": rewritten(lambda data: data[:200], VERSION_2_TENSORS),
}
HOSTILE = {name: [damage] for name, damage in DAMAGES.items()} | {
    f"version 2, {name}": [as_version_2, damage] for name, damage in VERSION_2_DAMAGES.items()
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an adapter of the MLP and its head."""
    save_adapter(trained("mlp", modules_to_save=["head"]), tmp_path)
    return tmp_path


def output_after_load(folder: Path, x: Tensor) -> Tensor | None:
    """Returns the output with a loaded adapter, None if the file is refused."""
    try:
        return load_adapter(zoo.net("mlp"), folder)(x)
    except ERRORS as error:
        assert type(error) in ERRORS, repr(error)
        assert "expected" in str(error), error
        return None


@pytest.mark.parametrize("damages", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_damaged_files_are_one_clear_error(
    x: Tensor, damages: list[Damage], adapted: bool, folder: Path
) -> None:
    """Loading changes nothing, and an adapter can be saved over the damaged one."""
    for damage in damages:
        damage(folder)
    model = started("mlp", modules_to_save=["head"]) if adapted else zoo.net("mlp")
    with unchanged(model), pytest.raises(ERRORS, match="expected") as raised:
        load_adapter(model, folder)
    assert type(raised.value) in ERRORS
    assert len(str(raised.value)) < 2000
    if not (folder / FILE_NAME).is_dir():
        source = trained("mlp", modules_to_save=["head"])
        save_adapter(source, folder)
        assert torch.equal(output_after_load(folder, x), source(x))


def test_a_file_of_a_huge_rank_is_refused_before_memory_is_allocated(folder: Path) -> None:
    edit(folder, use_huge_cores)
    message = r"lotr_cores: expected .*slices': \[700, 700, 700\]"
    with profile(profile_memory=True) as events, pytest.raises(ValueError, match=message):
        load_adapter(zoo.net("mlp"), folder)
    assert 0 < max(event.cpu_memory_usage for event in events.events()) < 10**8


BAD_VALUES = [None, True, -1, 0, 7, 1e30, 1e300, "x", "", [], {}, [[]], float("nan"), float("-inf")]


def change_one(document: dict[str, Any] | list, generator: random.Random) -> None:
    """Removes or replaces one value, at any depth."""
    is_object = isinstance(document, dict)
    key = generator.choice(list(document) if is_object else range(len(document)))
    if document[key] and isinstance(document[key], (dict, list)) and generator.random() < 0.9:
        change_one(document[key], generator)
    elif generator.random() < 0.3:
        del document[key]
    else:
        document[key] = generator.choice(BAD_VALUES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_version_2", [False, True], ids=["version 3", "version 2"])
def test_a_random_change_of_a_document_is_refused_or_computes(
    x: Tensor, is_version_2: bool, folder: Path
) -> None:
    generator = random.Random(0)
    if is_version_2:
        as_version_2(folder)
    document, tensors = read(folder)
    refused = 0
    for _ in range(300):
        changed = copy.deepcopy(document)
        change_one(changed, generator)
        write(folder, changed, tensors)
        y = output_after_load(folder, x)
        refused += y is None
        assert y is None or bool(y.isfinite().all()), changed
    assert 100 < refused < 300
