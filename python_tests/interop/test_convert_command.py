"""`python -m lotr_ext.convert`: what it makes, prints and refuses. Hostile files: test_convert_hostile.py."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from test_convert import PLAIN, lora, lora_deltas, original, unrelated
from toys import IDS, toy

from lotr_ext import load_adapter
from lotr_ext.convert import main


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    truth = lora(tmp_path / "lora", target_modules=["q", "v"])
    paths = [str(tmp_path / name) for name in ("lora", "lotr", "again")]
    for size in (["--rank", "8"], ["--rank", "8,8"], ["--error", "1e-6", "--group-by", "name"], ["--parameters", "512"]):
        assert main(["lora-to-lotr", *paths[:2], *size]) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in lora_deltas(truth)) and len(re.findall(r"\d\.\d\de-\d\d *$", text, re.M)) == 4
        assert torch.allclose(load_adapter(toy().eval(), paths[1])(IDS), truth(IDS), atol=2e-5)
    assert main(["lotr-to-lora", *paths[1:], "--task-type", "SEQ_CLS"]) == 0
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    torch.save(original(1.0, {"q": "one"}).state_dict(), tmp_path / "model.pt")
    assert main(["original-to-lotr", str(tmp_path / "model.pt"), paths[1], "--modules-to-save", "head"]) == 0
    assert "2 layers at rank 3, scaling 0.333333" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["lora-to-lotr", *paths[:2], "--rank", "1,2,3"])
    with pytest.raises(SystemExit):
        main(["lora-to-lotr", *paths[:2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora-to-lotr", "none", "new", "--rank", "4"], "source: expected a directory with adapter_config.json"),
        (["lora-to-lotr", "lora", "new", "--rank", "0"], "rank: expected at least 1, got 0"),
        (["lora-to-lotr", "lora", "new", "--error", "1.5"], "error: expected a number between 0 and 1, got 1.5"),
        (["lora-to-lotr", "lora", "new", "--parameters", "35"], "parameters: expected at least 36, what rank 1 needs, got 35"),
        (["lora-to-lotr", "lora", "file", "--rank", "4"], "directory: expected a directory or a new path"),
        (
            ["lora-to-lotr", "lora", "file/new", "--rank", "4"],
            "directory: expected a directory or a new path, got file/new, where",
        ),
        (
            ["lora-to-lotr", "lora", "/proc/none/new", "--rank", "4"],
            "destination: expected a directory that can be written, got",
        ),
        (
            ["lotr-to-lora", "lora", "/proc/none"],
            "destination: expected a directory that can be written, got /proc/none, in /proc: ",
        ),
        (
            ["lotr-to-lora", "lora", "new"],
            "expected peft_type 'LOTR', got 'LORA'; convert a LoRA with python -m lotr_ext.convert lora-to-lotr",
        ),
        (["original-to-lotr", "none.pt", "new"], "source: expected a file that can be read"),
        (["original-to-lotr", "file", "new"], "expected tensors by safetensors or torch.save"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora(tmp_path / "lora", target_modules=["q", "v"])
    (tmp_path / "file").write_text("no tensors")
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err.replace("\n", " ")
    assert not captured.out.strip()  # no table of what was not converted
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_sorts_layers_and_says_what_speaks_against_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "lora").mkdir()
    save_file(unrelated(), tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(PLAIN))
    for command in (["lora-to-lotr", "lora", "lotr", "--rank", "2"], ["lotr-to-lora", "lotr", "back"]):
        assert main([command[0], *(str(tmp_path / name) for name in command[1:3]), *command[3:]]) == 0
        found = capsys.readouterr()
        assert re.findall(r"^ *m\.(\d+)", found.out, re.M) == [str(i) for i in range(12)]
        assert found.err.startswith("warning: 12 of 12 layers lose") == (command[0] == "lora-to-lotr")
