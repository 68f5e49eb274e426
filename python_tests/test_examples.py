"""The examples run, short and on small inputs, and refuse bad input with one line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import text_model as tm  # noqa: E402

MODEL = ROOT / "data" / "all-minilm-l6-v2"
needs_data = pytest.mark.skipif(not MODEL.is_dir(), reason="data/ is missing: run make setup")


def run(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # waiting threads slow a busy machine
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


# ---- examples --------------------------------------------------------------------------------------------------------


def test_custom_model_runs():
    result = run("examples/custom_model.py")
    assert result.returncode == 0, result.stderr
    assert "608 of 26209 parameters are trained" in result.stdout and "the same outputs" in result.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """(a one-layer encoder folder with MiniLM's tokenizer, a labelled file that one word decides)"""
    if not MODEL.is_dir():
        pytest.skip("data/ is missing: run make setup")
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(**size)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL, local_files_only=True).save_pretrained(folder / "model")
    rows = [("good", f"a fine film, number {i}") if i % 2 else ("bad", f"a dull film, number {i}") for i in range(60)]
    with open(folder / "text.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    return folder / "model", folder / "text.csv"


def test_finetune_text_on_another_model_and_file(tiny, tmp_path):
    model, text = tiny
    result = run(
        *("examples/finetune_text.py", "--model", str(model), "--text", str(text), "--steps", "3", "--batch", "8"),
        *("--rank", "2", "--threads", "1", "--out", str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    assert "the same 12 predictions" in result.stdout
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    head, core, pair = 32 * 2 + 2, 2 * 2, 2 * 32 * 2
    assert rows["head only"]["trained_parameters"] == head
    assert rows["LoTR"]["trained_parameters"] == head + 2 * core + pair
    assert rows["LoRA (PEFT)"]["trained_parameters"] == head + 2 * pair
    assert all(len(run["losses"]) == 3 and run["peak_memory_bytes"] > 50e6 for run in table["runs"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "lotr-r2").is_dir()


@needs_data
def test_finetune_text_trains_on_the_snippets(tmp_path):
    options = ("--methods", "lotr", "--steps", "4", "--held-out", "60", "--threads", "1", "--quiet", "--out", str(tmp_path))
    result = run("examples/finetune_text.py", *options)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert row["trained_parameters"] == 12 * 16 * 16 + 2 * 384 * 16 + 384 * 2 + 2 == 16_130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], ["rank", "at least 1", "got 0"]),
        (["--methods", "lotr,magic"], ["methods", "head, lotr, lora", "magic"]),
        (["--lr", "nan"], ["lr", "positive", "nan"]),
        (["--targets", ","], ["targets", "none"]),
        (["--text", "nowhere.tsv"], ["text", "nowhere.tsv", "no file"]),
        (["--held-out", "9000"], ["held-out", "9000"]),
    ],
)
def test_finetune_text_refuses(arguments, words, tmp_path):
    result = run("examples/finetune_text.py", "--out", str(tmp_path / "out"), *arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in ["finetune_text:", *words]), result.stderr


@needs_data
def test_finetune_text_refuses_what_only_the_model_can_tell(tiny, tmp_path):
    text = tiny[1]
    options = ("--text", str(text), "--steps", "1", "--threads", "1", "--methods", "lotr", "--out", str(tmp_path))
    result = run("examples/finetune_text.py", "--model", str(tmp_path), *options)
    assert result.returncode == 1 and result.stderr.startswith("finetune_text: model: expected a Hugging Face model folder")
    result = run("examples/finetune_text.py", "--model", str(tiny[0]), "--targets", "absent", *options)
    assert result.returncode == 1 and "finetune_text: " in result.stderr and "absent" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good\ta\nbad\n", "line 2: expected a label and a text, got 1"),
        ("good\ta\nbad\tb\tc\n", "line 2: expected a label and a text, got 3"),
        ("good\ta\ngood\tb\n", "at least two different labels"),
        ("", "at least two different labels"),
    ],
)
def test_labelled_text_names_the_line(tmp_path, content, message):
    path = tmp_path / "text.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tm.read_labelled(path)
    path.write_bytes(b"good\t\xff\n")
    with pytest.raises(ValueError, match="expected UTF-8"):
        tm.read_labelled(path)


def test_batches_cover_an_epoch_and_repeat():
    ids = [[0] * (1 + i % 7) for i in range(100)]

    def lengths(seed: int) -> list[int]:
        batches = tm.Batches(ids, list(range(100)), 5, seed)
        return [int(c) for _ in range(20) for c in batches.next()[1]]

    assert sorted(lengths(0)) == list(range(100)) and lengths(0) == lengths(0) != lengths(1)


def test_predictions_keep_the_order():
    class Length(torch.nn.Module):
        def forward(self, ids):
            return torch.tensor([[float(len(row))] for row in ids])

    ids = [[0] * n for n in (3, 1, 2, 5, 4)]
    assert tm.predict(Length(), ids, batch=2).flatten().tolist() == [3, 1, 2, 5, 4]
