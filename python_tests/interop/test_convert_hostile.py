"""The convert command over files that were made to break it: 0 or 2, one line of error, and no folder then."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import IN_A_FILES_PLACE, Toy, adapted, edit_tensors, full_disk

from lotr_ext import LoTRConfig, apply_lotr, convert, save_adapter
from lotr_ext.interop import export_lora, lotr_to_peft

VALUES = [
    None, True, -1, 0, 1.5, 10**400, 2**31, float("nan"), float("inf"), "", "x", "(", "a\nb\x1b[31m", "[/bold]", [],
    [None], ["x", 3], {},     {"x": None}, {"(": 2}, [[[[1]]]], {"a": {"b": []}},
]  # fmt: skip
COMMANDS = {
    "lotr": ["lotr-to-lora"],
    "peft": ["lotr-to-peft"],
    "lora": ["lora-to-lotr", "--rank", "2"],
    "bank": ["loras-to-bank", "--rank", "2"],
    "original": ["original-to-lotr", "--modules-to-save", "head"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a LoTR adapter, one with a LoRA, and a checkpoint of the original implementation."""
    folder = tmp_path_factory.mktemp("sources")
    model = adapted(modules_to_save=["head"])
    save_adapter(model, folder / "lotr")
    export_lora(model, folder / "lora")
    export_lora(adapted(), folder / "bank")
    lotr_to_peft(folder / "lotr", folder / "peft")
    state = {f"{name}.lotr.{part}": torch.randn(5, 5) for name in ("x.q", "y.q") for part in ("lhs", "mid", "rhs")}
    (folder / "original").mkdir()
    torch.save(state | {"head.weight": torch.ones(3)}, folder / "original" / "model.bin")
    return {kind: folder / kind for kind in COMMANDS}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str, Path], tuple[int, str]]:
    """Runs the command for a kind of source: the exit code and what it said. A refusal is one line and leaves no folder."""

    def run(kind: str, source: Path) -> tuple[int, str]:
        command, *options = COMMANDS[kind]
        target = tmp_path / "destination" / "inside"
        at = source / "model.bin" if kind == "original" else source
        code = convert.main([command, str(at), str(target), *options])
        error = capsys.readouterr().err
        if code == 0:
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
            target.parent.rmdir()
        else:
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and error.rstrip("\n").isprintable()
        assert not target.parent.exists()
        return code, error

    return run


def copied(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where there is something to replace in a JSON value."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def replaced(value: Any, at: tuple, new: Any) -> Any:
    if not at:
        return new
    value = copy.copy(value)
    value[at[0]] = replaced(value[at[0]], at[1:], new)
    return value


@pytest.mark.parametrize("kind", ["lotr", "peft", "lora", "bank"])
def test_any_value_in_the_place_of_another_in_the_configuration(kind, sources, run, tmp_path) -> None:
    folder, draw = copied(sources[kind], tmp_path), random.Random(0)
    path = next(folder.glob("*.json"))
    good = json.loads(path.read_text())
    more = dict.fromkeys(("rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "use_dora", "layers_pattern"))
    good |= {k: v for k, v in more.items() if kind in ("lora", "bank") and k not in good}
    assert run(kind, folder)[0] == 0
    codes = set()
    for at in places(good):
        for new in draw.sample(VALUES, 6):
            path.write_text(json.dumps(replaced(good, at, new)))
            codes.add(run(kind, folder)[0])
    assert codes == {0, 2}


@pytest.mark.parametrize("kind", COMMANDS)
def test_any_tensor_in_the_place_of_another(kind, sources, run, tmp_path) -> None:
    folder = copied(sources[kind], tmp_path)
    path = next(p for p in folder.iterdir() if p.suffix != ".json")
    read, write = (torch.load, torch.save) if kind == "original" else (load_file, save_file)
    good = read(path)
    assert run(kind, folder)[0] == 0
    for name in [n for n in good if "lora_A" in n or n.endswith((".A", ".core", ".mid", ".rhs", "head.bias"))][:4]:
        others = [torch.ones(0), torch.ones(()), torch.ones(2, 0), torch.ones(3, 4, 5), torch.full((4, 16), torch.nan), None]
        like = good[name]
        others += [like.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64)]
        others += [torch.full_like(like, value) for value in (3e38, torch.inf, torch.nan, 0.0)]
        for other in others:
            write({k: v for k, v in {**good, name: other}.items() if v is not None}, path)
            if kind == "lotr":
                edit_tensors(lambda tensors: None)(folder)  # the configuration describes them
            run(kind, folder)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


CONTENTS = {
    "nothing": b"",
    "a huge header": header(b"{}", 2**63),
    "a long header": header(b"{" + b" " * 10_000 + b"}", 9_999),
    "no JSON": header(b"\xff" * 64),
    "nesting": header(b"[" * 50_000),
    "a dtype that is none": header(b'{"x":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
    "a dtype that torch has not": header(b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}') + bytes(1),
    "a shape that overflows": header(b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}') + bytes(4),
    "offsets outside": header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}'),
    "offsets that overlap": header(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + bytes(4),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a pickle of a call": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "a pickle of a number": b"\x80\x02K\x05.",
    "a pickle that pops": b"\x80\x020000.",
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_any_content_in_the_place_of_the_tensors(kind, sources, run, tmp_path) -> None:
    folder = copied(sources[kind], tmp_path)
    path = next(p for p in folder.iterdir() if p.suffix != ".json")
    good = path.read_bytes()
    assert run(kind, folder)[0] == 0
    draw = random.Random(0)
    flipped = []
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 4, 64])):
            bad[draw.randrange(min(len(bad), 4096))] = draw.randrange(256)
        flipped.append(bytes(bad))
    cut = [good[: int(len(good) * part)] for part in (0.01, 0.3, 0.9, 0.999)]
    legacy = io.BytesIO()
    torch.save({"x": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    no_storage = re.sub(rb"\d{14,}", lambda found: b"9" * len(found[0]), legacy.getvalue(), count=1)
    assert no_storage != legacy.getvalue()
    for content in (*CONTENTS.values(), *cut, good + b"more", no_storage, *flipped):
        path.write_bytes(content)
        if kind == "lotr":
            manifest = next(folder.glob("*.json"))
            text = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(text | {"tensors_sha256": hashlib.sha256(content).hexdigest()}))
        run(kind, folder)


IN_ITS_PLACE = {**IN_A_FILES_PLACE, "nothing": lambda path: None, "a folder": Path.mkdir}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
@pytest.mark.parametrize("kind", COMMANDS)
def test_anything_in_the_place_of_a_file(kind, what, sources, run, tmp_path) -> None:
    for which in ("*.json", "*.safetensors", "*.bin"):
        folder = copied(sources[kind], tmp_path)
        for path in folder.glob(which):
            path.unlink()
            IN_ITS_PLACE[what](path)
            assert run(kind, folder)[0] == 2
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_file_that_may_not_be_read(kind, sources, run, tmp_path, monkeypatch) -> None:
    folder, opened = copied(sources[kind], tmp_path), os.open

    def refused(path: object, *rest: Any) -> int:
        if str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refused)  # the tests may run as root, who may read everything
    assert "Permission denied" in run(kind, folder)[1]


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_full_disk(kind, sources, run) -> None:
    with full_disk(100):
        code, error = run(kind, sources[kind])
    assert code == 2 and os.strerror(errno.EFBIG) in error and "destination" in error


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.parametrize("kind", ["lotr", "lora"])
def test_names_are_whole_however_narrow_the_terminal(kind, columns, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    long = "a_name_that_is_longer_than_a_line_of_a_terminal_" * 3
    model = nn.ModuleDict({long: Toy()})
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["q"]))
    (save_adapter if kind == "lotr" else export_lora)(model, tmp_path / "source")
    command, *options = COMMANDS[kind]
    destination = tmp_path / ("d" * 100)
    assert convert.main([command, str(tmp_path / "source"), str(destination), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    for i in range(2):
        assert any(f"{long}.blocks.{i}.q " in line for line in lines)
    assert any(line.endswith(f"-> {destination}") for line in lines)
