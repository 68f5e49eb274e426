"""Saved adapters: round trips, old files, damaged and foreign files, and saves that are killed.

The old files were saved at commit bd4494a, lotr_ext 0.1.0.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import operator
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
import zoo
from helpers import ERRORS, relative
from models import CASES, moved, same, started, state, trained, unchanged
from safetensors import safe_open
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
    push_to_hub,
    save_adapter,
    use_tasks,
)
from lotr_ext.adapter_state import FILE_NAME
from lotr_ext.cores import DiagonalCores
from lotr_ext.model import adapted_layers
from lotr_ext.old_files import JSON_NAME, config_of_version_1
from lotr_ext.storage import checksum

OLD = Path(__file__).parent / "data" / "bd4494a"
OLD_NETS = {
    "dense": "mlp",
    "width": "llama",
    "tasks": "attention",
    "experts": "mixture",
    "diagonal": "bert",
}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / FILE_NAME)


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / FILE_NAME, "pt") as file:
        return file.metadata()


def document_of(folder: Path) -> dict[str, Any]:
    """Reads the JSON document of an adapter, of version 2 if it has that version's files."""
    if (folder / JSON_NAME).exists():
        return json.loads((folder / JSON_NAME).read_text())
    return json.loads(metadata_of(folder)["adapter"])


def write_document(folder: Path, document: object) -> None:
    """Replaces the document of an adapter of either version. Checksums are right."""
    if (folder / JSON_NAME).exists():
        (folder / JSON_NAME).write_text(json.dumps(document))
    else:
        sealed(folder, document, tensors_in(folder))


def flags_of(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


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
    save_adapter(plain, tmp_path / "again")
    assert same(tensors_in(folder), tensors_in(tmp_path / "again"))
    assert document_of(folder) == document_of(tmp_path / "again")


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


def test_modules_to_save_and_buffers_come_along(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    model = apply_lotr(make(), LoTRConfig(rank=2, target_modules=["0"], modules_to_save=["1", "2"]))
    x = torch.randn(8, 4)
    moved(model).train()(x)
    zoo.fill(model, 5, 0.2, lambda name: name[0] in "12")
    other = reloaded(model, make(), tmp_path)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert other[1].num_batches_tracked == 1
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
    # A computed weight says nothing about the core, which a form computes.
    parametrize.register_parametrization(model["c"], "weight", nn.Identity())
    other = reloaded(model, make(), tmp_path)
    assert document_of(tmp_path)["config"] is None
    x = torch.randn(3, 4)
    assert all(torch.equal(other[name](x), model[name](x)) for name in "abcd")


def test_dtypes_are_checked_and_cast(x: Tensor, model: nn.Module, tmp_path: Path) -> None:
    other = started("mlp", adapter_dtype="float64")
    with pytest.raises(ValueError, match="cast=True"):
        reloaded(model, other, tmp_path)
    load_adapter(other, tmp_path, cast=True)
    assert {p.dtype for p in lotr_parameters(other)} == {torch.float64}
    assert relative(other(x), model(x)) < 1e-6
    # The config follows what the adapter is.
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
    stored = [name for name in tensors_in(tmp_path) if name.startswith(("embed.", "head."))]
    assert len(stored) == 1
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


def trains_a_head(model: nn.Module) -> None:
    model.head.weight.requires_grad_()


def trains_tasks(model: nn.Module) -> None:
    TaskBank(model, 3).requires_grad_().add()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.Module.eval, None),
        (trains_a_head, r"does not write 1 trained parameters .* head\.weight"),
        (trains_tasks, r"such as lotr_tasks\.cores\.0\..*tasks with"),
    ],
)
def test_warns_of_what_the_file_lacks(
    model: nn.Module,
    change: Callable,
    message: str | None,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    change(model)
    save_adapter(model, tmp_path)
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == int(message is not None)
    assert message is None or re.search(message, texts[0])


def test_computed_cores_in_another_order_are_refused(tmp_path: Path) -> None:
    save_adapter(trained("mlp", "diagonal"), tmp_path)
    document = document_of(tmp_path)
    document["layers"] = dict(reversed(document["layers"].items()))
    write_document(tmp_path, document)
    with pytest.raises(ValueError, match="layers: expected the model's order"):
        load_adapter(started("mlp", "diagonal"), tmp_path)


def test_modules_to_save_may_share_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
        memory = torch.empty(8, 4)
        model["b"].weight = nn.Parameter(memory[:4])
        model["c"].weight = nn.Parameter(memory[2:6])
        return zoo.fill(model)

    settings = LoTRConfig(rank=2, target_modules=["a"], modules_to_save=["b", "c"])
    model = apply_lotr(make(), settings)
    model["b"].weight.data.add_(1)
    other = reloaded(model, make(), tmp_path)
    assert all(torch.equal(other[name].weight, model[name].weight) for name in "bc")


# ---- files of bd4494a ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OLD_NETS)
def test_loads_what_older_code_saved(folder: str, tmp_path: Path) -> None:
    name = OLD_NETS[folder]
    expected = load_file(OLD / folder / "expected.safetensors")
    model = load_adapter(zoo.net(name), OLD / folder)
    y = zoo.output(model, expected["x"])
    assert relative(y, expected["y"]) < 1e-6
    assert {layer.scaling for layer in adapted_layers(model).values()} == {model.lotr_config.s}
    adapted = load_adapter(apply_lotr(zoo.net(name), model.lotr_config), OLD / folder)
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


def test_loads_tasks_that_older_code_saved(tmp_path: Path) -> None:
    expected = load_file(OLD / "tasks" / "expected.safetensors")
    model = load_adapter(zoo.net("attention"), OLD / "tasks")
    bank = TaskBank(model, 4)
    for i in range(3):
        assert bank.add(OLD / "tasks" / f"task{i}.safetensors") == i
    with use_tasks(model, expected["index"]):
        assert relative(zoo.output(model, expected["x"]), expected["y_of_tasks"]) < 1e-6
    bank.save(1, tmp_path / "task.safetensors")
    again = TaskBank(reloaded(model, zoo.net("attention"), tmp_path), 1)
    again.add(tmp_path / "task.safetensors")
    assert same(again.cores_of(0), bank.cores_of(1))


# ---- damaged and foreign files -------------------------------------------------------------------

Change = Callable[[Path], object]


def sealed(folder: Path, document: object, tensors: dict[str, Tensor]) -> None:
    """Writes an adapter's file with the right checksum."""
    text = document if isinstance(document, str) else json.dumps(document)
    metadata = metadata_of(folder)
    metadata["adapter"] = text
    metadata["sha256"] = checksum(sorted(tensors.items()), text.encode())
    save_file(tensors, folder / FILE_NAME, metadata)


def as_version_2(folder: Path) -> None:
    """Replaces an adapter by the two files of version 2."""
    name = "lotr_adapter.0123456789abcdef.safetensors"
    document = document_of(folder)
    save_file(tensors_in(folder), folder / name)
    document["tensors_sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    document |= {"format": "lotr", "format_version": 2, "tensors_file": name}
    del document["base"]
    (folder / JSON_NAME).write_text(json.dumps(document))
    (folder / FILE_NAME).unlink()


def changed(*place: str, **changes: object) -> Change:
    """Returns a change of fields of the document, or of the object at a place in it."""

    def change(folder: Path) -> None:
        document = document_of(folder)
        functools.reduce(operator.getitem, place, document).update(changes)
        write_document(folder, document)

    return change


def of_layer(**changes: object) -> Change:
    return changed("layers", "blocks.1.up", **changes)


def without_a_layer(folder: Path) -> None:
    document = document_of(folder)
    del document["layers"]["blocks.1.up"]
    write_document(folder, document)


def of_tensors(name: str, tensor: Tensor | None) -> Change:
    """Returns a change of one tensor, which is removed if it is None. Checksums are right."""

    def change(folder: Path) -> None:
        tensors = {**tensors_in(folder), name: tensor}
        kept = {key: value for key, value in tensors.items() if value is not None}
        sealed(folder, document_of(folder), kept)

    return change


def rewritten(name: str, data: Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data((folder / name).read_bytes()))

    return change


def of_metadata(**changes: str) -> Change:
    def change(folder: Path) -> None:
        save_file(tensors_in(folder), folder / FILE_NAME, metadata_of(folder) | changes)

    return change


def as_folder(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    (folder / FILE_NAME).mkdir()


def as_fifo(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    os.mkfifo(folder / FILE_NAME)


def of_huge_rank(folder: Path, **more: Tensor) -> None:
    """Cores of rank 700, which would need 1.3 GB, in a file of a few kB."""
    document = document_of(folder)
    document["config"] |= {"rank": 700, "core": "tucker"}
    old = tensors_in(folder)
    tensors = {key: t for key, t in old.items() if "head" in key} | more
    for name, entry in document["layers"].items():
        for key in (entry["A"], entry["B"]):
            tensors[key] = torch.zeros(len(old[key]) if more else 0, 700)
        tensors[f"{name}.core"] = torch.zeros(700, 700)
    sealed(folder, document, tensors)


def of_huge_cores(folder: Path) -> None:
    """As above, with factors and cores of the right sizes, and slices that are too few."""
    shapes = {"lotr_cores.weights": (4, 700), "lotr_cores.slices": (1, 700, 700)}
    of_huge_rank(folder, **{name: torch.zeros(shape) for name, shape in shapes.items()})


# What may be wrong with a document, in either version.
OF_DOCUMENTS: dict[str, Change] = {
    "a list of layers": changed(layers=[]),
    "no layers": changed(layers={}),
    "a layer that is a number": changed(layers={"blocks.0.up": 3}),
    "a layer less": without_a_layer,
    "a scaling that is a word": of_layer(scaling="auto"),
    "a scaling that is not finite": of_layer(scaling=float("inf")),
    "a scaling that is true": of_layer(scaling=True),
    "dropout of 7": of_layer(dropout=7),
    "dropout that is NaN": of_layer(dropout=float("nan")),
    "dropout of None": of_layer(dropout=None),
    "experts of -1": of_layer(experts=-1),
    "experts that are a word": of_layer(experts="8"),
    "experts in a linear layer": of_layer(experts=2),
    "a layer without factors": of_layer(A=None),
    "a layer with one factor": of_layer(A="lotr_factors.0.value", B="lotr_factors.0.value"),
    "a layer with other factors": of_layer(A="lotr_factors.2.value"),
    "a layer with unknown factors": of_layer(A="lotr_factors.9.value"),
    "a layer with an unknown field": of_layer(other=1),
    "a config that is a list": changed(config=[]),
    "a config that is a word": changed(config="dense"),
    "an unknown field": changed("config", other=1),
    "a rank of 0": changed("config", rank=0),
    "another rank": changed("config", rank=2),
    "computed cores that the file lacks": changed("config", core="tucker"),
    "an unknown dtype": changed("config", adapter_dtype="complex64"),
}
OF_FILES: dict[str, Change] = {
    "no file": lambda folder: (folder / FILE_NAME).unlink(),
    "cut off": rewritten(FILE_NAME, lambda data: data[:200]),
    "empty": rewritten(FILE_NAME, lambda data: b""),
    "one bit of a tensor changed": rewritten(
        FILE_NAME, lambda data: data[:-1] + bytes([data[-1] ^ 1])
    ),
    "one digit of the document changed": rewritten(
        FILE_NAME, lambda data: data.replace(b'\\"scaling\\": 1.5', b'\\"scaling\\": 1.6', 1)
    ),
    "a folder": as_folder,
    "a pipe": as_fifo,
    "another format": of_metadata(format="lora"),
    "a newer version": of_metadata(format_version="99"),
    "another checksum": of_metadata(sha256="0" * 64),
    "another document": of_metadata(adapter="{}"),
    "a document that is a list": lambda folder: sealed(folder, [], tensors_in(folder)),
    "endless brackets": lambda folder: sealed(folder, "[" * 200_000, tensors_in(folder)),
    "a base that is a list": changed(base=[]),
    "a base with an unknown field": changed(base={"names": "x"}),
    "values of the base that are a list": changed("base", values=[1.0]),
    "a value of the base that is a word": changed("base", values={"head.weight": ["x"]}),
    "another tensor": of_tensors("extra", torch.zeros(2)),
    "a tensor less": of_tensors("head.bias", None),
    "no core": of_tensors("blocks.1.up.core", None),
    "a tensor of another shape": of_tensors("blocks.1.up.core", torch.zeros(3, 2)),
    "a tensor of another dtype": of_tensors("blocks.1.up.core", torch.zeros(3, 3).half()),
    "integers": of_tensors("blocks.1.up.core", torch.zeros(3, 3, dtype=torch.int32)),
    "a factor of three dimensions": of_tensors("lotr_factors.0.value", torch.zeros(16, 3, 1)),
    "a factor of another size": of_tensors("lotr_factors.0.value", torch.zeros(15, 3)),
    "part of a start": of_tensors("blocks.1.up.start_core", torch.zeros(3, 3)),
    "a rank of 700": of_huge_rank,
    "cores of rank 700": of_huge_cores,
}
OF_OLD_FILES: dict[str, Change] = {
    "no tensors": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "tensors cut off": lambda folder: rewritten(
        next(folder.glob("*.safetensors")).name, lambda data: data[:200]
    )(folder),
    "JSON cut off": rewritten(JSON_NAME, lambda data: data[:100]),
    "JSON a list": rewritten(JSON_NAME, lambda data: b"[]"),
    "JSON of bytes": rewritten(JSON_NAME, lambda data: b"\xff\xfe\x00"),
    "JSON of endless brackets": rewritten(JSON_NAME, lambda data: b"[" * 200_000),
    "another format": changed(format="lora"),
    "a newer version": changed(format_version=99),
    "no version": changed(format_version=None),
    "a path as the tensors' file": changed(
        tensors_file="../lotr_adapter.0123456789abcdef.safetensors"
    ),
    "a number as the tensors' file": changed(tensors_file=3),
    "another checksum": changed(tensors_sha256="0" * 64),
    "no checksum": changed(tensors_sha256=None),
}
HOSTILE = [
    *(pytest.param(change, False, id=name) for name, change in (OF_FILES | OF_DOCUMENTS).items()),
    *(
        pytest.param(change, True, id=f"version 2, {name}")
        for name, change in (OF_OLD_FILES | OF_DOCUMENTS).items()
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(trained("mlp", modules_to_save=["head"]), folder)
    return folder


def copied(saved: Path, tmp_path: Path, old: bool = False) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    if old:
        as_version_2(folder)
    return folder


@pytest.mark.parametrize(("damage", "old"), HOSTILE)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_damaged_files_are_one_clear_error(
    x: Tensor, damage: Change, old: bool, adapted: bool, saved: Path, tmp_path: Path
) -> None:
    """Loading changes nothing, and an adapter can be saved over the damaged one."""
    folder = copied(saved, tmp_path, old)
    damage(folder)
    model = started("mlp", modules_to_save=["head"]) if adapted else zoo.net("mlp")
    y = model(x)
    with unchanged(model), pytest.raises(ERRORS, match="expected") as raised:
        load_adapter(model, folder)
    assert type(raised.value) in ERRORS and len(str(raised.value)) < 2000
    assert torch.equal(model(x), y)
    if not (folder / FILE_NAME).is_dir():
        save_adapter(trained("mlp", modules_to_save=["head"]), folder)
        assert torch.equal(loads(folder, x), loads(saved, x))


def test_a_file_of_a_huge_rank_is_refused_before_memory_is_allocated(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(saved, tmp_path)
    of_huge_cores(folder)
    zeros = torch.zeros

    def small(*size: int, **options: Any) -> Tensor:
        tensor = zeros(*size, **options)
        assert tensor.is_meta or tensor.numel() < 10**7
        return tensor

    monkeypatch.setattr(torch, "zeros", small)
    with pytest.raises(ValueError, match=r"lotr_cores: expected .*slices': \[700, 700, 700\]"):
        load_adapter(zoo.net("mlp"), folder)


BAD_VALUES = [None, True, -1, 0, 7, 1e30, 1e300, "x", "", [], {}, [[]], float("nan"), float("-inf")]


def places_in(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The place of each value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from places_in(inner, (*place, key))


def damaged_document(document: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """Returns a document with one value that is missing or another one."""
    document = copy.deepcopy(document)
    *place, last = generator.choice(list(places_in(document)))
    target = functools.reduce(operator.getitem, place, document)
    if generator.random() < 0.3:
        del target[last]
    else:
        target[last] = generator.choice(BAD_VALUES)
    return document


def loads(folder: Path, x: Tensor) -> Tensor | None:
    """The output with a loaded adapter, None if the file is refused."""
    try:
        return load_adapter(zoo.net("mlp"), folder)(x)
    except ERRORS as error:
        assert type(error) in ERRORS, repr(error)
        assert "expected" in str(error), error
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", [False, True], ids=["version 3", "version 2"])
def test_a_random_change_of_a_document_is_refused_or_computes(
    x: Tensor, old: bool, saved: Path, tmp_path: Path
) -> None:
    generator = random.Random(0)
    folder = copied(saved, tmp_path, old)
    document = document_of(folder)
    refused = 0
    for _ in range(300):
        damaged = damaged_document(document, generator)
        write_document(folder, damaged)
        y = loads(folder, x)
        refused += y is None
        assert y is None or bool(y.isfinite().all()), damaged
    assert refused > 100


@pytest.mark.filterwarnings("ignore")
def test_no_random_damage_loads_as_another_function(x: Tensor, saved: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    folder = copied(saved, tmp_path)
    expected = load_adapter(zoo.net("mlp"), folder)(x)
    path = folder / FILE_NAME
    data = (folder / FILE_NAME).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(400):
        place = generator.randrange(header if i % 2 else len(data))
        damage = [
            data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :],
            data[:place],
            data[:place] + generator.randbytes(3) + data[place:],
            data[:place] + data[place + 2 :],
            data[:place] + generator.choice([b"0", b"9", b"-", b'"', b"}"]) + data[place + 1 :],
        ][generator.randrange(5)]
        path.write_bytes(damage)
        y = loads(folder, x)
        assert y is None or torch.equal(y, expected), (i, place)


# ---- other bases ---------------------------------------------------------------------------------


def deeper(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return zoo.fill(nn.Sequential(*(nn.Linear(4, 4) for _ in range(blocks))))


def test_a_model_with_more_layers_is_refused(tmp_path: Path) -> None:
    save_adapter(apply_lotr(deeper(2), LoTRConfig(rank=2)), tmp_path)
    for strict in ("targets", True):
        model = deeper(3)
        with pytest.raises(ValueError, match=r"its 2 layers, got one with 1 more, such as 2"):
            load_adapter(model, tmp_path, strict=strict)
        assert not hasattr(model, "lotr_config")
    with pytest.warns(UserWarning, match="1 more, such as 2"):
        load_adapter(deeper(3), tmp_path, strict=False)
    with pytest.raises(ValueError, match="strict: expected"):
        load_adapter(deeper(2), tmp_path, strict="layers")


@pytest.mark.parametrize("name", ["mlp", "gpt2", "mixture"])
def test_another_base_of_the_same_shapes_is_noticed(name: str, tmp_path: Path) -> None:
    other = zoo.fill(zoo.net(name), 5)
    with pytest.warns(UserWarning, match="base: expected the model"):
        reloaded(trained(name), other, tmp_path)
    with pytest.raises(ValueError, match="base: expected the model that the adapter") as raised:
        load_adapter(other, tmp_path, strict=True)
    assert not re.search(r"\d{6}", str(raised.value))  # numbers that a reader can compare


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", ["shape", "svd"])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_the_same_base_is_recognized(name: str, way: str, tmp_path: Path) -> None:
    """Also in half precision, adapted, merged before the save, and saved in between."""
    model = trained(name, way)
    save_adapter(model, tmp_path / "first")
    save_adapter(merge(model), tmp_path / "merged")
    save_adapter(load_adapter(zoo.net(name), tmp_path / "first"), tmp_path / "again")
    for folder in ("first", "merged", "again"):
        for other in (zoo.net(name), started(name, way), zoo.net(name).bfloat16()):
            load_adapter(other, tmp_path / folder, strict=True)
        assert document_of(tmp_path / folder)["base"]["values"]


@pytest.mark.parametrize(
    ("before", "saved_settings"),
    [({"scaling": 2.0}, {"alpha": 6, "dropout": 0.25}), ({"alpha": 2.0}, {"scaling": 0.3})],
)
def test_the_configuration_follows_what_is_loaded(
    x: Tensor, before: dict, saved_settings: dict, tmp_path: Path
) -> None:
    source = trained("mlp", **saved_settings)
    model = reloaded(source, started("mlp", **before), tmp_path)
    again = reloaded(model, zoo.net("mlp"), tmp_path)
    assert again.lotr_config == model.lotr_config
    expected = (source.lotr_config.s, source.lotr_config.dropout)
    for loaded in (model, again):
        assert torch.equal(loaded(x), source(x))
        assert (loaded.lotr_config.s, loaded.lotr_config.dropout) == expected
        layers = adapted_layers(loaded).values()
        assert {(layer.scaling, layer.dropout) for layer in layers} == {expected}


def test_the_configuration_follows_a_file_of_a_hand_built_model(tmp_path: Path) -> None:
    model = trained("mlp", scaling=0.3)
    del model.lotr_config
    assert reloaded(model, started("mlp", alpha=2.0), tmp_path).lotr_config.s == 0.3


# ---- other places --------------------------------------------------------------------------------


# A file in a folder, and the message.
WRONG_FOLDERS = [
    ("notes.txt", r"got .*folder, which has no adapter. Pass the folder"),
    ("config.json", r"save_pretrained or of a Trainer.*AdapterCheckpoints"),
    ("adapter_config.json", r"of PEFT.*PeftModel.from_pretrained.*lora_to_lotr"),
]


@pytest.mark.parametrize(("file", "message"), WRONG_FOLDERS)
def test_a_folder_without_an_adapter_is_named(file: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match=r"got .*folder, which is not a folder. Pass the folder"):
        load_adapter(zoo.net("mlp"), folder)
    folder.mkdir()
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_adapter(zoo.net("mlp"), folder)


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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert push_to_hub(model, "user/name", private=True) == "user/name@abc"
    create.assert_called_once_with("user/name", exist_ok=True, private=True)
    assert torch.equal(load_adapter(zoo.net("mlp"), "user/name")(x), model(x))
    with pytest.raises(ValueError, match=r"expected a folder or the id .*user/other"):
        load_adapter(zoo.net("mlp"), "user/other")


# ---- crashes -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process.

    Nothing runs after it, so the test also turns off what cleans up.
    """


def killed_at(step: int, changes: Iterator[int], real: Callable) -> Callable:
    """Returns the real change of the disk, which ends the process from the step-th change on."""

    def call(*args: object, **kwargs: object) -> object:
        if next(changes) >= step:
            raise Killed
        return real(*args, **kwargs)

    return call


def seed_of(folder: Path) -> int:
    """Returns the seed of the model whose adapter is in a folder."""
    x = zoo.inputs("mlp")
    y = load_adapter(zoo.net("mlp"), folder)(x)
    return [torch.equal(y, trained("mlp", seed=seed)(x)) for seed in range(4)].index(True)


@pytest.mark.parametrize("two_files", [False, True], ids=["version 3", "version 2"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_adapter(
    two_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    for step in range(10):
        folder = tmp_path / str(step)
        save_adapter(trained("mlp", seed=1), folder)
        if two_files:
            as_version_2(folder)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            changes = itertools.count()
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")):
                patch.setattr(owner, name, killed_at(step, changes, getattr(owner, name)))
            save_adapter(trained("mlp", seed=2), folder)
        seeds.append(seed_of(folder))
    assert next(changes) == (6 if two_files else 4)
    assert seeds == sorted(seeds) and set(seeds) == {1, 2}
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_a_full_disk_leaves_the_old_adapter_and_no_other_file(
    x: Tensor, model: nn.Module, tmp_path: Path
) -> None:
    save_adapter(model, tmp_path)
    error = OSError(28, "No space left on device")
    with mock.patch.object(os, "fsync", side_effect=error), pytest.raises(OSError, match="space"):
        save_adapter(trained("mlp", seed=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert torch.equal(load_adapter(zoo.net("mlp"), tmp_path)(x), model(x))


def saves_and_loads(seed: int, folder: Path) -> set[int]:
    """Saves an adapter five times. Returns the seeds of those that were there afterwards."""
    seeds = set()
    for _ in range(5):
        save_adapter(trained("mlp", seed=seed), folder)
        seeds.add(seed_of(folder))
    return seeds


@pytest.mark.parametrize("workers", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_saves_at_once_leave_one_of_the_adapters(workers: type[Executor], tmp_path: Path) -> None:
    save_adapter(trained("mlp", seed=0), tmp_path)
    context = {} if workers is ThreadPoolExecutor else {"mp_context": get_context("fork")}
    with workers(4, **context) as pool:
        for seeds in pool.map(saves_and_loads, range(4), [tmp_path] * 4):
            assert seeds  # each loaded adapter was one of the four
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_other_files_in_the_folder_stay(model: nn.Module, tmp_path: Path) -> None:
    for name in ("model.safetensors", "lotr_adapter.txt"):
        (tmp_path / name).write_bytes(b"mine")
    for _ in range(2):
        save_adapter(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_names_in_the_file(tmp_path: Path) -> None:
    save_adapter(started("mlp"), tmp_path)
    assert document_of(tmp_path)["layers"]["blocks.0.up"]["A"] == "lotr_factors.0.value"
    assert metadata_of(tmp_path)["format_version"] == "3"
