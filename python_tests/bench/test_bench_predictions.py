"""Predictions: kept with date and commit, set beside what a card measured in make gpu's summary, the page and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu import summary as gpu_summary
from bench.measure.store import Store
from bench.pictures import static
from bench.projection import predictions
from bench.projection.assumptions import Spread
from bench.projection.predictions import Prediction
from bench.report import tables

CARD = "NVIDIA H100 80GB HBM3"
KERNEL = {"kernel": "shrink", "m": 8192, "n": 4096, "r": 16, "dtype": "bf16"}
LAYER = {"m": 8192, "k": 4096, "n": 4096, "r": 16, "dtype": "bf16"}
MADE = [
    Prediction("kernels", "h100", "lotr_ext", KERNEL, Spread(20e-6, 25e-6, 30e-6)),
    Prediction("layer", "h100", "lotr_ext", LAYER, Spread(0.18, 0.25, 0.29)),
    Prediction("layer", "h100", "lora-eager", LAYER, Spread(0.5, 0.55, 0.6)),
]


def cell(case: dict, rival: str, seconds: float, excess: float, card: str = CARD) -> dict:
    step = {"seconds": [seconds] * 3, "excess": [excess] * 3, "of_bound": 0.5, "bytes_per_s": 1e12}
    return {"case": case | {"threads": 1}, "rival": rival, "label": rival, "machine": {"name": card}, "step": step, "when": 1}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Predictions, and a card's folder with a kernel at twice its time, a layer inside its interval, and a rival below."""
    (tmp_path / "simt-executor").mkdir()
    assert predictions.keep(MADE, tmp_path / predictions.FILE)
    folder = tmp_path / "nvidia-h100"
    folder.mkdir()
    for name in ("fused", "kernels"):  # the first is another program's: not its prediction
        for rival, dtype, seconds in (("lotr_ext", "bf16", 50e-6), ("library", "bf16", 60e-6), ("lotr_ext", "fp16", 1e-6)):
            Store(folder / f"{name}.jsonl").append(cell(KERNEL | {"dtype": dtype}, rival, seconds, 0.0))
    for rival, excess in (("frozen", 0.0), ("lotr_ext", 0.26), ("lora-eager", 0.44)):
        Store(folder / "layer.jsonl").append(cell(LAYER, rival, 1e-3, excess))
    return tmp_path


def test_predictions_are_kept_with_date_and_commit_until_they_change(tmp_path):
    (tmp_path / "simt-executor").mkdir()
    path = tmp_path / predictions.FILE
    assert predictions.keep(MADE, path) and not predictions.keep(MADE, path)
    text = path.read_text()
    assert set(json.loads(text)) == {"date", "commit", "predictions"} and not predictions.keep([], path)
    assert predictions.keep(MADE[:2], path) and path.read_text() != text
    on, made = predictions.kept(tmp_path)
    assert made == MADE[:2] and on.startswith("20") and "commit" in on
    assert predictions.kept(tmp_path / "none") == ("", [])


def test_a_measured_value_is_set_beside_its_own_prediction(results):
    found = predictions.compared_in(results / "nvidia-h100", MADE)
    assert [one.ratio for one in found] == pytest.approx([2.0, 1.04, 0.8]) and [o.inside for o in found] == [False, True, False]
    assert found[0].cells()[1:] == ["25.0 (20.0-30.0) us", "50.0", "2.00, above"]
    assert found[1].cells()[1:] == ["25.0 (18.0-29.0) %", "26.0", "1.04, within"]
    other = [cell(KERNEL, "lotr_ext", 1e-6, 0.0, "NVIDIA A100-SXM4-80GB"), cell(KERNEL, "lotr_ext", 1e-6, 0.0, "some card")]
    assert predictions.compared("kernels", other, MADE) == []


def test_the_summary_of_make_gpu_says_measured_beside_predicted(results):
    text = "\n".join(gpu_summary.summary(results, {}, results))
    assert "1 of 3 within the interval, measured / likely 1.04 (median)" in text
    assert "kernels: lotr_ext shrink 8192 4096 16 bf16: 50.0, predicted 25.0 (20.0-30.0) us: x 2.00, above" in text
    assert "predicted" not in "\n".join(gpu_summary.summary(results, {}, results / "none"))


def test_the_page_and_a_picture_show_measured_beside_predicted(results):
    table = tables.predicted_table(results / "nvidia-h100", {"predicted": "link.png"})
    assert "| layer: lotr_ext 8192 4096 4096 16 bf16 | 25.0 (18.0-29.0) % | 26.0 | 1.04, within |" in table
    assert "](link.png)" in table and tables.predicted_table(results / "simt-executor", {}) == ""
    found = predictions.compared_in(results / "nvidia-h100", MADE)
    (path,) = static.draw_predicted(found, results)
    assert path.stat().st_size > 5_000
    assert static.draw_predicted([], results) == [] and not path.exists()
