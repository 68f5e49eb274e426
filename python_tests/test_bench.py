"""The benchmarks: a small run of each program writes rows whose errors are within bounds; kept results can be shown."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("scipy")

from bench import accuracy, common, gpu, plot
from bench.rivals import LAYERS, Rival

SMALL = {
    "layer": "--shapes 32x48x40x4 --dtypes fp32,bf16",
    "model": "--models tiny-lm,tiny-encoder --dtypes fp32",
    "host": "--shapes 2x6x16x4 --forms siblings",
    "shared": "--shapes 3x16x24x4 --dtypes fp32",
    "experts": "--shapes 64x32x16x4x2x4 --dtypes fp32",
    "tasks": "--shapes 4x4x6x32x1x4",
    "kernels": "--shapes 40x24x4 --dtypes fp32",
}


def run(name: str, folder: Path, *more: str) -> int:
    words = [
        *SMALL[name].split(),
        "--device",
        "cpu",
        "--rounds",
        "3",
        "--clock",
        "wall",
        "--results",
        str(folder),
        *more,
    ]
    return importlib.import_module(f"bench.{name}").PROGRAM.main(words)


@pytest.mark.parametrize("name", SMALL)
def test_program_writes_a_row_a_rival_and_stage(name, tmp_path, capsys):
    if name in ("model", "experts", "tasks"):
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    assert run(name, tmp_path, "--markdown") == 0, capsys.readouterr().err
    rows = common.read(tmp_path / f"{name}.jsonl")
    assert (rows["seconds"] > 0).all() and rows[["machine", "commit", "rounds"]].notna().all(
        axis=None
    )
    assert any(rival.startswith("lotr_ext") for rival in rows["rival"])
    assert "error" not in rows or rows["error"].max() < 2e-2
    assert "| lotr_ext" in capsys.readouterr().out
    assert run(name, tmp_path) == 0
    assert len(common.read(tmp_path / f"{name}.jsonl")) == len(
        rows
    )  # a new measurement replaces the old one


def test_rival_with_wrong_numbers_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        LAYERS,
        "lora-beta",
        lambda t: Rival(lambda x: 1.1 * torch.nn.functional.linear(x, t.weight, t.bias)),
    )
    assert run("layer", tmp_path) == 1
    assert (
        "expected <= 1e-05" in capsys.readouterr().err
        and common.read(tmp_path / "layer.jsonl").empty
    )


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("layer", "--shapes 32x48", "expected mxkxnxr"),
        ("layer", "--dtypes int8", "dtypes: expected some of fp32"),
        ("host", "--threads 0", "threads: expected numbers from 1"),
        ("host", "--shapes 1x2x3x0", "expected mxlayersxkxr"),
        ("model", "--against nowhere", "against: expected a checkout"),
    ],
)
def test_bad_option_is_refused(name, words, said, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"bench.{name}").PROGRAM.main([*words.split(), "--device", "cpu"])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_two_checkouts_run_in_turns(tmp_path, capsys):
    assert run("layer", tmp_path, "--against", str(common.ROOT)) == 0
    assert "lotr_ext, step" in capsys.readouterr().out


def test_accuracy_goes_on_from_kept_runs(tmp_path, capsys):
    words = [
        *"--quick --steps 12 --methods base,lotr:2,lora:1 --jobs 1 --results".split(),
        str(tmp_path / "a.jsonl"),
    ]
    assert accuracy.main(words) == 0
    kept = accuracy.runs_in(tmp_path / "a.jsonl")
    assert len(kept) == 7 and kept["loss"].notna().all() and kept["seed"].nunique() == 3
    accuracy.write(tmp_path / "a.jsonl", kept.iloc[:-1])
    capsys.readouterr()
    assert accuracy.main(words) == 0
    said = capsys.readouterr()
    assert said.err.count("seed") == 1 and "ours less rival" in said.out
    again = accuracy.runs_in(tmp_path / "a.jsonl")
    assert again["loss"].iloc[-1] == kept["loss"].iloc[-1]  # the same run, the same numbers


def test_kept_results_can_be_shown_and_drawn(tmp_path, capsys):
    files = [path for path in common.RESULTS.rglob("*.jsonl") if path.stem in SMALL]
    assert files
    for path in files:
        assert (
            importlib.import_module(f"bench.{path.stem}").PROGRAM.main(
                ["--show", str(path), "--device", "cpu"]
            )
            == 0
        )
    assert "lotr_ext" in capsys.readouterr().out
    assert len(list(common.RESULTS.rglob("*.png"))) <= 8
    shutil.copy(common.RESULTS / "accuracy.jsonl", tmp_path)
    assert plot.main([str(tmp_path)]) == 0 and (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_gpu_run_packs_results_and_stops_a_part(tmp_path, capsys):
    assert gpu.main(["--dry-run"]) == 0 and "smoke" in capsys.readouterr().out
    assert gpu.main(["--device", "cpu", "--parts", "info", "--folder", str(tmp_path)]) == 0
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "results/info.log" in archive.getnames()
    assert json.loads((tmp_path / "results" / "summary.json").read_text()) == {"info": "done"}
    endless = gpu.Part("endless", 1.0, (sys.executable, "-c", "while True: pass"))
    assert gpu.run(endless, tmp_path / "log", 1.0) == "stopped"
