"""bench.serving: what it computes from seconds, and a small run of the ways that need no vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.serving.__main__ import arguments, cases, main, same_texts
from bench.serving.pictures import draw_serving
from bench.serving.table import checks, kept, page_table, percentile, retention
from bench.serving.work import Shape, task_of_row

SHAPE = Shape("m", "f", rows=4, prompt=3, new=6, rank=2, tasks=10, threads=1)


def took(prefill: float, decode: float, tokens: int = 0) -> dict:
    return {"prefill": {"cpu": prefill, "wall": 9.0}, "decode": {"cpu": decode, "wall": 9.0}, "tokens": [[tokens]] * 4}


def test_retention_is_the_median_of_rounds_over_the_same_round_without() -> None:
    found = {
        "off": {"rounds": {"0": [took(1, 2), took(2, 2), took(4, 2)]}},
        "native": {"rounds": {"4": [took(2, 4), took(2, 2), took(5, 2.5)]}},
        "peft": {"rounds": {"0": [took(1, 1)], "4": [took(4, 2)]}},
    }
    table = retention(found, SHAPE, "cpu")
    assert table["native"]["4"]["prefill"] == pytest.approx({"tokens_per_s": 12 / 2, "retention": 0.8})  # of 0.5, 1 and 0.8
    assert table["native"]["4"]["decode"] == pytest.approx({"tokens_per_s": 20 / 2.5, "retention": 0.8})
    assert table["peft"]["4"]["decode"]["retention"] == 0.5  # of itself without adapters
    assert "retention" not in table["off"]["0"]["decode"]
    assert retention(found, SHAPE, "wall")["native"]["4"]["decode"]["retention"] == 1


def test_percentiles() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([3.0], 0.99) == 3


def test_tasks_take_turns() -> None:
    assert task_of_row(SHAPE, 0, 5) == [-1] * 4
    assert [task_of_row(SHAPE, 2, turn) for turn in (0, 1)] == [[0, 1, 0, 1]] * 2
    assert task_of_row(SHAPE, 10, 2) == [8, 9, 0, 1]


def results() -> dict:
    part = {"tokens_per_s": 50.0, "retention": 0.86}
    return {
        "shape": {
            "model": "m",
            "rows": 4,
            "prompt": 3,
            "new": 6,
            "rank": 2,
            "threads": 1,
            "clock": "cpu",
            "counts": [1, 4, 10],
        },
        "machine": {"name": "a machine", "torch": "2", "peft": "0.2", "vllm": "0.32"},
        "load": 0.5,
        "same_texts": 1.0,
        "retention": {
            "off": {"0": {"decode": {"tokens_per_s": 60.0}, "prefill": {"tokens_per_s": 70.0}}},
            "native": {"4": {"decode": part, "prefill": part}},
        },
        "bytes_a_task": {"native": 2048},
        "push": {"native": {"milliseconds": [1.0] * 98 + [9.0, 11.0], "bytes": 3000}},
    }


def test_targets_are_met_or_missed(tmp_path: Path) -> None:
    assert [(value, good) for _, value, good in checks(results())] == [("86.0%", True), ("86.0%", False), ("9.0 ms", True)]
    text = page_table(results(), "a.png")
    assert "| **vLLM, lotr_ext's plugin** | 4 | 50 | 86% | 50 | 86% |" in text and "](a.png)" in text
    assert "p50 1.0 ms, p99 9.0 ms of 100 pushes" in text and "missed" in text
    (path,) = draw_serving(results(), tmp_path)
    assert path.stat().st_size > 5000


def make(folder: Path) -> Path:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_small_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = "--ways own,peft --tasks 1,3,9 --rows 3 --prompt 4 --new 3 --rank 2 --rounds 1"
    main([*sizes.split(), "--model", str(make(tmp_path / "model")), "--results", str(tmp_path / "kept")])
    found = kept(tmp_path / "kept")
    assert {way: list(own) for way, own in found["retention"].items()} == {"own": ["0", "1", "3", "9"], "peft": ["0", "1", "3"]}
    layers = 4 * 2 * 2 * 4 + 3 * 2 * 2 * 4
    assert found["bytes_a_task"] == {"own": layers, "peft": 4 * (4 * (32 + 32) * 2 + 3 * (32 + 48) * 2)}
    assert found["push"] == {} and "lotr_ext, mixed" in capsys.readouterr().out
    assert (tmp_path / "kept" / "serving.png").stat().st_size > 5000 and kept(tmp_path) is None
    assert json.loads((tmp_path / "kept" / "serving.json").read_text()) == found


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ["--model", str(make(tmp_path))]
    monkeypatch.setenv("LOTR_VLLM_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"vllm: expected a Python with vLLM, got .*nowhere"):
        main(model)
    with pytest.raises(ValueError, match="model: expected a causal model's folder, got nowhere"):
        main(["--model", "nowhere"])
    for words, text in {
        "--ways magic": "ways: expected some of off",
        "--tasks 0": "tasks: expected numbers from 1, got 0",
        "--rows 0": "rows: expected at least 1, got 0",
        "--new 1": "new: expected at least 2, got 1",
    }.items():
        with pytest.raises(ValueError, match=text):
            arguments([*model, *words.split()])
    options = arguments([*model, "--ways", "own,peft", "--rows", "8", "--tasks", "1,8,99"])
    assert (list(cases("own", options)), list(cases("peft", options))) == ([0, 1, 8, 99], [0, 1, 8])
    assert (list(cases("off", options)), list(cases("native", options)), list(cases("lora", options))) == (
        [0],
        [1, 8, 99],
        [1, 8],
    )


def test_the_same_texts_are_counted() -> None:
    ours, theirs = took(1, 1), took(1, 1)
    ours["tokens"] = [[0], [0], [1], [2]]
    assert same_texts({"own": {"rounds": {"4": [ours]}}, "native": {"rounds": {"4": [theirs]}}}, 4) == 0.5
    assert same_texts({"own": {"rounds": {"4": [ours]}}}, 4) is None
