"""The frontier: which runs are made in which order, what is kept and gone on with, the table, the picture, bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench.frontier import table, training
from bench.frontier.__main__ import arguments, main, passes, todo
from bench.frontier.ways import TRIED, WAYS
from bench.measure.store import ROOT, Store
from bench.report import rebuild as report
from bench.report.plots_frontier import draw_frontier

MODEL = ROOT / "data" / "all-minilm-l6-v2"


def cell(way: str, rank: int, lr: float, seed: int, accuracy: float, validation: float = 0.5, **case: object) -> dict:
    about = training.Run(way, rank, lr, seed, table.STEPS, table.BATCH, "toy")._asdict() | case
    found = {"parameters": 100 * rank, "accuracy": accuracy, "validation": validation, "seconds": 1.0}
    return {"case": about, "rival": way, "label": way, "machine": {"name": "a machine"}} | found


def kept(folder: Path, cells: list[dict]) -> Store:
    store = Store(folder / table.FILE).prepare()
    for one in cells:
        store.append(one)
    return store


SOME = [
    cell("head", 0, 1e-2, 0, 0.7),
    *(cell("lotr", 4, lr, 0, accuracy, accuracy) for lr, accuracy in ((5e-3, 0.80), (1.5e-3, 0.78), (1.5e-2, 0.81))),
    cell("lotr", 4, 1.5e-2, 1, 0.83, 0.1),
    cell("lotr", 4, 5e-3, 1, 0.99, 0.99),  # not the rate that the first seed chose
    cell("lora", 2, 3e-3, 0, 0.82),
]


def test_a_point_is_the_mean_at_the_rate_that_validation_chose_with_the_first_seed():
    head, lotr, lora = table.points(SOME)
    assert (lotr.lr, lotr.tried, lotr.accuracies, lotr.parameters) == (1.5e-2, 3, (0.81, 0.83), 400)
    assert lotr.mean == pytest.approx(0.82) and table.accuracy_text(lotr) == "82.00% (81.0% to 83.0%)"
    assert (head.label, lora.tried, lora.accuracies) == ("head only", 1, (0.82,))
    worse = [one | {"validation": 1 - one["validation"]} for one in SOME]
    assert table.points(worse)[1].lr == 1.5e-3


def test_every_way_gets_the_same_trials_and_an_unfinished_run_is_fair(tmp_path):
    """Each pass has every way and rank once; only the seeds beyond the first ask what was best."""
    options = arguments(["--results", str(tmp_path), "--model", "somewhere/toy"])
    store = kept(tmp_path, SOME)
    made = list(passes(options, store))
    places = [(name, rank) for name, way in WAYS.items() for rank in way.ranks]
    assert len(made) == len(TRIED) + table.SEEDS - 1
    assert all([(run.way, run.rank) for run in runs] == places for runs in made)
    assert [{run.seed for run in runs} for runs in made] == [{0}, {0}, {0}, {1}, {2}]
    tried = {run.lr for runs in made[:3] for run in runs if (run.way, run.rank) == ("lotr", 4)}
    assert tried == {5e-3, 1.5e-3, 1.5e-2} == set(table.rates(WAYS["lotr"]))
    assert [next(run.lr for run in runs if (run.way, run.rank) == ("lotr", 4)) for runs in made[3:]] == [1.5e-2, 1.5e-2]
    left = [len(todo(runs, store)) for runs in made]
    assert left == [len(places) - 3, len(places) - 1, len(places) - 1, len(places) - 1, len(places)]
    assert sum(len(runs) for runs in passes(arguments(["--quick"]), store)) == sum(len(way.quick) for way in WAYS.values())


def test_runs_of_another_length_or_model_stay_out_of_the_table():
    others = [cell("lotr", 4, 5e-3, 0, 0.1, steps=7), cell("lotr", 4, 5e-3, 0, 0.1, model="other")]
    assert table.points(table.of_setting([*others, *SOME])) == table.points(SOME)
    assert table.of_setting([*SOME, others[0]]) == [others[0]]
    assert table.of_setting([]) == [] and table.of_setting([cell("a way of old", 1, 1.0, 0, 0.5)]) == []


def test_table_words_and_picture_come_from_the_file(tmp_path):
    folder = tmp_path / "a-machine"
    kept(folder, SOME)
    assert "frontier.png" in {path.name for path in report.draw(tmp_path)}
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG") and not list(folder.glob("*.tmp*"))
    marked = "<!-- frontier:begin made -->\nold\n<!-- frontier:end -->"
    text = report.rebuild(report.CHOOSING, marked, tmp_path)
    assert "| LoTR | 4 | 400 | 82.00% (81.0% to 83.0%) | 2 | 0.015 of 3 |" in text and "a machine" in text
    assert "Not finished: 3 points" in text and "(../bench/results/a-machine/frontier.png)" in text
    (readme,) = report.sections(tmp_path)["accuracy"]
    assert (
        "The smallest LoTR trains 400 numbers: 82.00% (81.0% to 83.0%). The smallest LoRA trains 200 numbers: 82.00%." in readme
    )
    assert "trains 200 numbers: 82.00%. The best LoTR that is no larger: none is as small." in readme
    assert draw_frontier([], folder) == [] and not (folder / "frontier.png").exists()


def test_words_name_the_lora_that_is_furthest_ahead_and_the_largest():
    """Each against the best LoTR of any form that is no larger; one that is larger, or another relative, does not count."""
    reached = [("head", 0, 0.7), ("lotr", 1, 0.80), ("lotr-width", 2, 0.81), ("lotr", 9, 0.90), ("lora-xs", 1, 0.95)]
    loras = [("lora", 2, 0.82), ("lora", 4, 0.85), ("lora", 8, 0.83)]
    words = table.verdict(table.points([cell(way, rank, 1e-3, 0, accuracy) for way, rank, accuracy in reached + loras]))
    beside = "The best LoTR that is no larger: LoTR, all linear layers, by width, rank 2, 200 numbers: 81.00%."
    assert words[1:] == [
        f"LoRA of rank 8, the largest, trains 800 numbers: 83.00%. {beside}",
        f"LoRA of rank 4, where it is furthest ahead, trains 400 numbers: 85.00%. {beside}",
    ]
    assert table.verdict(table.points([cell(way, rank, 1e-3, 0, accuracy) for way, rank, accuracy in reached])) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """(a one-layer encoder with MiniLM's tokenizer, rated texts that one word decides)"""
    if not MODEL.is_dir():
        pytest.skip("data/ is missing: run make setup")
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(**size)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL, local_files_only=True).save_pretrained(folder / "model")
    rated = [f"{2 if i % 2 else -2}\ta {'fine' if i % 2 else 'dull'} film, number {i}" for i in range(90)]
    (folder / "texts.tsv").write_text("\n".join([*rated, "0.1\tnobody knows"]))
    return folder / "model", folder / "texts.tsv"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_what_it_says(way, tiny):
    """The adapter's numbers by formula, for one block of width 32 (queries and values: 2 layers; all linear: 6)."""
    rank = min(WAYS[way].ranks[0], 4)
    found = training.train(training.Run(way, rank, 1e-3, 0, 2, 8, "model"), *tiny)
    count = {
        "head": 0,
        "lotr": 2 * rank**2 + 64 * rank,
        "lora": 2 * 64 * rank,
        "lotr-core": 2 * rank**2,
        "lora-xs": 2 * rank**2,
        "vera": 2 * (rank + 32),
        "lotr-linear": 6 * rank**2 + (64 + 96 + 96) * rank,
        "lotr-width": 6 * rank**2 + 2 * (32 + 64) * rank,
        "lotr-gradient": 2 * rank**2 + 64 * rank,
        "lotr-diagonal": (2 + 64) * rank,
        "lotr-train": (1 + 2) * rank**2 + 64 * rank,  # a layer, two kinds
        "lora-linear": (4 * 64 + 2 * 96) * rank,
    }
    assert found["parameters"] == count[way]
    assert 0 <= found["accuracy"] <= 1 and found["loss"] > 0


QUICK = ("--quick", "--steps", "2", "--batch", "8", "--ways", "head,lotr", "--jobs", "1")


def test_a_run_that_was_cut_off_is_gone_on_with(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    given = [*QUICK, "--model", str(tiny[0]), "--texts", str(tiny[1]), "--results", str(tmp_path)]
    assert main(given) == 0
    lines = (tmp_path / table.FILE).read_text().splitlines()
    assert "[3/3] LoTR, r = 32" in capsys.readouterr().out and len(lines) == 3 and (tmp_path / "frontier.png").is_file()
    (tmp_path / table.FILE).write_text("\n".join([*lines[:2], lines[2][:40]]))  # killed while it wrote the third
    assert main(given) == 0
    printed = capsys.readouterr()
    assert "[1/1] LoTR, r = 32" in printed.out and "no whole result" in printed.err
    again = [json.loads(line) for line in (tmp_path / table.FILE).read_text().splitlines() if line.endswith("}")]
    assert [one["case"] for one in again] == [json.loads(line)["case"] for line in lines]
    assert again[2]["accuracy"] == json.loads(lines[2])["accuracy"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--ways", "lotr,magic"], ["ways", "head, lotr", "'magic'"]),
        (["--seeds", "0"], ["seeds", "at least 1", "got 0"]),
        (["--jobs", "-1"], ["jobs", "at least 1", "got -1"]),
        (["--results", "Makefile/results"], ["results", "cannot write", "Makefile/results"]),
        (["--model", "nowhere"], ["model", "nowhere", "config.json"]),
    ],
)
def test_bad_input_is_said_before_any_run(given, words, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("bench.frontier.__main__.make_runs", None)
    with pytest.raises((ValueError, OSError)) as error:
        main([*QUICK, "--results", str(tmp_path), *given])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / table.FILE).exists() or not (tmp_path / table.FILE).read_text()
