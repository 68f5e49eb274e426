"""Files that were made to break a reader, a disk that is full, ranks that no machine holds: an error, and nothing changed."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from gloo import fork
from torch import Tensor, nn
from toys import IDS, IN_A_FILES_PLACE, adapted, edit_json, edit_tensors, full_disk, randomize, refused, tensors_file, toy

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, cores, load_adapter, save_adapter
from lotr_ext.interop import export_lora, lora_factors, lotr_to_lora, read_lora
from lotr_ext.model.adapter_files import JSON_NAME


@pytest.mark.parametrize("what", IN_A_FILES_PLACE)
def test_a_save_does_not_depend_on_what_lies_in_the_folder(tmp_path: Path, what: str) -> None:
    model = adapted()
    IN_A_FILES_PLACE[what](tmp_path / JSON_NAME)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(toy(), tmp_path)(IDS), model(IDS))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("place", ["configuration", "tensors"])
@pytest.mark.parametrize("what", [*IN_A_FILES_PLACE, "a folder"])
def test_what_is_no_adapter_file_is_refused(tmp_path: Path, what: str, place: str) -> None:
    model = toy()
    save_adapter(adapted(), tmp_path)
    path = tmp_path / JSON_NAME if place == "configuration" else tensors_file(tmp_path)
    path.unlink()
    IN_A_FILES_PLACE.get(what, Path.mkdir)(path)
    with refused(model, ValueError, match=r"expected .*, got "):
        load_adapter(model, tmp_path)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def factors_and_cores_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A, B and the cores of rank 1100, as the configuration says; what makes the cores still has the rank that it had."""
    large = {"A": torch.ones(16, 1100), "B": torch.ones(16, 1100), "core": torch.ones(1100, 1100)}
    return {n: large.get(n.rpartition(".")[2], t).clone() if "lotr_cores" not in n else t for n, t in tensors.items()}


def load_in_half_a_gibibyte(directory: Path) -> None:
    """Writes what three ways to load the adapter raise."""
    models = [toy(), adapted(core="tucker"), adapted(core="tucker")]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
    with open(directory / "errors", "w") as errors:
        for model, name in zip(models, (None, None, "another")):
            try:
                load_adapter(model, directory, name=name)
            except ValueError as error:
                print(error, file=errors)


@pytest.mark.parametrize(
    "tensors", [pytest.param(dict, id="the configuration alone"), pytest.param(factors_and_cores_alone, id="and the layers")]
)
def test_shapes_are_compared_before_anything_is_built(tmp_path: Path, tensors: Callable) -> None:
    """Tucker's slices at rank 1100 take 5 GiB; the process may take half of one beyond what it has."""
    save_adapter(adapted(core="tucker"), tmp_path)
    edit_tensors(lambda old: old.update(tensors(old)))(tmp_path)
    edit_json(lambda content: content["config"].update(rank=1100))(tmp_path)
    process = fork(load_in_half_a_gibibyte, tmp_path)
    process.join(timeout=1000)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 0 and len(errors.splitlines()) == 3 and errors.count("expected floating values") == 3


@pytest.mark.parametrize("rank", [2**20, 2**31 - 1])
@pytest.mark.parametrize("core", ["dense", *cores.FORMS])
def test_a_rank_that_no_machine_holds_is_refused_before_the_model_is_changed(core: str, rank: int) -> None:
    model = toy()
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"rank: expected one .* got {rank}"):
        apply_lotr(model, LoTRConfig(rank=rank, target_modules=["q"], core=core))
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before


# ---- a full disk -----------------------------------------------------------------------------------------------------


def save_task(model: nn.Module, path: Path) -> None:
    bank = model.lotr_tasks if hasattr(model, "lotr_tasks") else TaskBank(model, 1)
    if not bank.taken[0]:
        bank.add(None)
    bank.save(0, path / "task.safetensors")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SAVES: dict[str, Callable[[nn.Module, Path], object]] = {"adapter": save_adapter, "lora": export_lora, "task": save_task}


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_disk_leaves_the_earlier_files_whole_and_no_other(tmp_path: Path, kind: str) -> None:
    model = adapted()
    SAVES[kind](model, tmp_path)
    before = files_in(tmp_path)
    randomize(model, seed=2)
    with full_disk(300):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            SAVES[kind](model, tmp_path)
        with pytest.raises(OSError):
            SAVES[kind](model, tmp_path / "new" / "folder")
    assert files_in(tmp_path) == before and Path(caught.value.filename).parent == tmp_path
    assert not caught.value.filename.endswith(".tmp")


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_disk_that_fails_at_either_file_changes_neither(tmp_path: Path, monkeypatch, kind: str, at: int) -> None:
    model, calls = adapted(scaling=1.0), count(1)
    SAVES[kind](model, tmp_path)
    before, fsync = files_in(tmp_path), os.fsync
    for layer in (model.blocks[0].q, model.blocks[1].v):
        layer.scaling = 3.0
    randomize(model, seed=2)

    def full(descriptor: int) -> None:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            SAVES[kind](model, tmp_path)
    assert files_in(tmp_path) == before
    SAVES[kind](model, tmp_path)
    assert set(files_in(tmp_path)) != set(before) or files_in(tmp_path) != before


# ---- memory that tensors share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [(1, 3), (3, 1), (1, 1), 2])
def test_a_lora_of_any_rank_can_be_written(tmp_path: Path, rank: int | tuple[int, int]) -> None:
    """And what lora_factors returns is no view of the model: layers of a group would share it, and training would change it."""
    model = adapted(rank=rank)
    save_adapter(model, tmp_path / "lotr")
    lotr_to_lora(tmp_path / "lotr", tmp_path / "lora")
    export_lora(model, tmp_path / "exported")
    for folder in ("lora", "exported"):
        for name, layer in read_lora(tmp_path / folder).layers.items():
            own = model.get_submodule(name)
            A, B, core = (t.detach().double() for t in (own.factors.A, own.factors.B, own.core))
            want, got = own.scaling * B @ core.T @ A.T, layer.scaling * layer.B.double() @ layer.A.double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for made in lora_factors(model.blocks[0].q):
        before = made.clone()
        randomize(model, seed=9)
        assert torch.equal(made, before)


def test_modules_to_save_may_share_memory(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = toy()
        model.head.bias = nn.Parameter(model.head.weight.detach()[0, :3])
        return model

    model = apply_lotr(tied(), LoTRConfig(rank=2, target_modules=["q"], modules_to_save=["head"]))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(tied(), tmp_path)(IDS), model(IDS))
