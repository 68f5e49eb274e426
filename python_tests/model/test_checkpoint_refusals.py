"""load_adapter and save_adapter refuse what does not fit, and change nothing then."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import trained
from torch import nn
from toys import Toy, adapted, assert_unchanged, edit_json, edit_tensors, refused, snapshot, tensors_file, toy

from lotr_ext.model import adapter_files
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.adapter_files import JSON_NAME
from lotr_ext.model.apply import apply_lotr
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.loading import load_adapter
from lotr_ext.model.merging import merge
from lotr_ext.model.saving import contents, save_adapter


def truncate(name: Callable[[Path], Path], keep: float) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = name(directory)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return edit


def layer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return edit_json(lambda c: change(c["layers"]))


JSON, A = (lambda d: d / JSON_NAME), "lotr_factors.16x16.A"
CORE = "blocks.0.q.core"
BAD_FILES = {
    "no json": (lambda d: (d / JSON_NAME).unlink(), "expected a LoTR adapter"),
    "no tensors": (lambda d: tensors_file(d).unlink(), r"expected lotr_adapter\.\w+\.safetensors beside it"),
    "json truncated": (truncate(JSON, 0.5), "expected JSON"),
    "json empty": (truncate(JSON, 0), "expected JSON"),
    "json is a list": (lambda d: (d / JSON_NAME).write_text("[]"), 'expected "format"'),
    "json of something else": (edit_json(lambda c: c.update(format="lora")), "got 'lora'"),
    "json binary": (lambda d: (d / JSON_NAME).write_bytes(b"\x80\x04\x95\xff"), "expected JSON"),
    "newer format": (edit_json(lambda c: c.update(format_version=2)), r"format_version 1, got 2.*lotr_ext 0"),
    "tensors truncated": (truncate(tensors_file, 0.7), "truncated"),
    "tensors empty": (truncate(tensors_file, 0), "truncated"),
    "tensors of another file": (lambda d: save_file({"w": torch.ones(2)}, tensors_file(d)), "another file"),
    "a path outside": (edit_json(lambda c: c.update(tensors_file="../x.safetensors")), "tensors_file like"),
    "no config": (edit_json(lambda c: c.update(config=None)), "expected a model with LoTR layers"),
    "unknown field": (edit_json(lambda c: c["config"].update(ranks=3)), "got ranks"),
    "bad field": (edit_json(lambda c: c["config"].update(dropout=1.5)), r"dropout: expected.*1\.5"),
    "no layers": (edit_json(lambda c: c.update(layers={})), "at least one layer"),
    "a layer is no object": (layer(lambda ls: ls.update({"blocks.0.q": 3})), "'blocks.0.q' to be an object"),
    "NaN scaling": (layer(lambda ls: ls["blocks.0.q"].update(scaling=float("nan"))), "scaling"),
    "huge scaling": (layer(lambda ls: ls["blocks.0.q"].update(scaling=10**400)), "expected"),
    "huge dropout": (layer(lambda ls: ls["blocks.0.q"].update(dropout=10**400)), "expected"),
    "huge in_features": (layer(lambda ls: ls["blocks.0.q"].update(in_features=10**400)), "expected"),
    "a layer too few": (layer(lambda ls: ls.pop("blocks.0.q")), r"blocks\.0\.q"),
    "a layer too many": (layer(lambda ls: ls.update({"blocks.9.q": ls["blocks.0.q"]})), r"missing blocks\.9\.q\.core"),
    "another shape in the json": (layer(lambda ls: ls["blocks.0.q"].update(in_features=8)), r"\(8, 16\).*got \(16, 16\)"),
    "another group": (layer(lambda ls: ls["blocks.0.q"].update(factors="lotr_factors.other")), r"lotr_factors\.other"),
    "factors elsewhere": (layer(lambda ls: ls["blocks.0.q"].update(factors="x.y")), r"missing x\.y\.A"),
    "a tensor too few": (edit_tensors(lambda t: t.pop(CORE)), r"missing blocks\.0\.q\.core"),
    "a tensor too many": (edit_tensors(lambda t: t.update(w=torch.ones(2))), "not in the model w"),
    "half a start": (edit_tensors(lambda t: t.update({"lotr_factors.16x16.start_A": t[A].clone()})), r"missing.*start_core"),
    "another shape": (
        edit_tensors(lambda t: t.update({A: t[A][:-1].clone()})),
        r"\.A: expected floating values \[16, 4\].*\[15, 4\]",
    ),
    "another rank": (
        edit_tensors(lambda t: t.update({CORE: torch.ones(3, 3)})),
        r"core: expected floating values \[4, 4\].*\[3, 3\]",
    ),
    "another dtype": (edit_tensors(lambda t: t.update({CORE: t[CORE].half()})), r"q\.core: expected float32.*got float16"),
    "json and tensors disagree": (edit_json(lambda c: c["tensors"][CORE].update(shape=[4, 5])), "expected tensors"),
    "modules_to_save disagree": (edit_json(lambda c: c.update(modules_to_save=["head"])), "modules_to_save"),
}


@pytest.mark.parametrize("onto", ["base", "adapted"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_and_changes_nothing(tmp_path: Path, case: str, onto: str) -> None:
    edit, message = BAD_FILES[case]
    save_adapter(trained(), tmp_path)
    edit(tmp_path)
    model = toy() if onto == "base" else adapted()
    if onto == "adapted":
        message = {"no config": None, "another shape in the json": r"\(16, 16\).*got \(8, 16\)"}.get(case, message)
    before = snapshot(model)
    if message is None:
        load_adapter(model, tmp_path)  # an adapted model needs no configuration
        return
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    torch.save(Evil(), tensors_file(tmp_path))
    torch.save(Evil(), tmp_path / "lotr_adapter.bin")
    with pytest.raises(ValueError, match="truncated, or another file"):
        load_adapter(toy(), tmp_path)


WRONG_MODELS = {
    "other layers": (lambda: Toy(layers=3), None),
    "wider": (lambda: Toy(d=32), r"expected \(in_features, out_features\) \(16, 16\).*got \(32, 32\)"),
    "fewer layers": (lambda: Toy(layers=1), r"not in the model blocks\.1\.q"),
    "other names": (lambda: nn.Linear(3, 3), r"not in the model blocks\.0\.q"),
    "adapted at another rank": (lambda: adapted(rank=5), r"A: expected float32 \[16, 5\].*got float32 \[16, 4\]"),
    "adapted elsewhere": (
        lambda: adapted(target_modules=["q", "k"]),
        r"not in the model blocks\.0\.v.*not in the adapter blocks\.0\.k",
    ),
    "grouped otherwise": (lambda: adapted(group_by="name"), r"lotr_factors\.q_16x16.*lotr_factors\.16x16"),
    "another dtype": (lambda: adapted(adapter_dtype=torch.float64), "expected float64.*got float32"),
    "saves more": (lambda: adapted(modules_to_save=["head"]), r"modules_to_save: expected \['head'\]"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_the_wrong_model_is_refused_and_not_changed(tmp_path: Path, case: str) -> None:
    make, message = WRONG_MODELS[case]
    save_adapter(trained(), tmp_path)
    model = make()
    if message is None:  # a deeper model has all the layers that the adapter is for
        assert len(adapted_layers(load_adapter(model, tmp_path))) == 4
        return
    with refused(model, ValueError, match=message):
        load_adapter(model, tmp_path)


def test_states_that_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected one with a LoTR adapter"):
        save_adapter(toy(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(TypeError, match="model"):
        save_adapter({}, tmp_path / "none")
    with torch.device("meta"):
        meta = apply_lotr(Toy(), LoTRConfig(rank=4, target_modules=["q", "v"]))
    with pytest.raises(RuntimeError, match="meta device"):
        save_adapter(meta, tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        save_adapter(adapted(), tmp_path / "file")
    save_adapter(trained(), tmp_path / "good")
    for model in (meta, Toy().to("meta")):
        with pytest.raises(RuntimeError, match="meta device"):
            load_adapter(model, tmp_path / "good")
    model = merge(trained())
    with pytest.raises(RuntimeError, match="merged"):
        load_adapter(model, tmp_path / "good")
    for place in ("missing", "file"):
        with pytest.raises(ValueError, match="expected a LoTR adapter"):
            load_adapter(toy(), tmp_path / place)


@pytest.mark.parametrize("key", ["lotr_factors.16x16.A", "blocks.0.q.core"])
def test_no_file_is_written_with_a_part_of_a_tensor(key: str, tmp_path: Path) -> None:
    """ZeRO-3 leaves a parameter without elements, FSDP1 with some, in one dimension."""
    manifest, tensors = contents(adapted())
    for part in (tensors[key][:0], tensors[key].flatten()[:0], tensors[key][:, :2]):
        with pytest.raises(ValueError, match=rf"{re.escape(key)}: expected shape .*save_adapter in every process"):
            adapter_files.write(tmp_path / "never", manifest, tensors | {key: part})
    assert not (tmp_path / "never").exists()
