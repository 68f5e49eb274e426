"""The benchmark of experts: its rivals compute what their formulas say, its table and picture are made of what it kept."""

from __future__ import annotations

import pytest
import torch

from bench import experts, targets
from bench.experts import ExpertsCase, randomize, routing
from bench.measure.store import Store
from bench.report import experts_table
from bench.rivals.experts import FLOOR, GROUPED, LABELS, OURS, PEFT, frozen, rivals
from lotr_ext.model.merging import merge

QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1"]


def test_it_measures_keeps_and_shows(tmp_path, capsys):
    arguments = [*QUICK, "--shapes", "48x16x8x4x2x3", "--results", str(tmp_path)]
    assert experts.main(arguments) == 0
    cells = {cell["rival"]: cell for cell in Store(tmp_path / "experts.jsonl").read()}
    assert cells.keys() == LABELS.keys() and cells[OURS]["error"] < 1e-4 and cells[FLOOR]["parameters"] == 0
    assert cells[PEFT]["parameters"] == cells[GROUPED]["parameters"] == 4 * 3 * ((16 + 16) + (8 + 16))
    assert cells[OURS]["parameters"] == 2 * 4 * 3 * 3 + 3 * (16 + 16 + 8 + 16)
    assert (tmp_path / "experts.png").stat().st_size > 5000
    text = experts_table.experts_table(list(cells.values()), {"experts": "x.png"})
    assert "python -m bench.experts --shapes 48x16x8x4x2x3 --rounds 1 --allocator system" in text
    assert "| **lotr_ext** |" in text and "![what adapters add to the frozen experts](x.png)" in text
    capsys.readouterr()
    assert experts.main(arguments) == 0 and "1 of 1 cases are in" in capsys.readouterr().out


def test_rivals_add_nothing_at_the_start_and_what_they_say_later():
    case = ExpertsCase(40, 16, 8, 4, 2, 3, "fp32", 1)
    made, x = rivals(frozen(16, 8, 4, torch.float32, torch.device("cpu")), 3), torch.randn(40, 16)
    chosen = routing(case, x.device, x.dtype)
    assert (chosen[0].sort(1).values.diff(dim=1) > 0).all()  # different experts a token
    with torch.no_grad():
        floor = made[FLOOR](x, *chosen)
        for rival, model in made.items():
            torch.testing.assert_close(model(x, *chosen), floor, msg=rival)
            randomize(model)
        one = made[GROUPED]
        y = one(x, *chosen)
        for name in ("gate_up_proj", "down_proj"):
            base = getattr(one.experts, name)
            base.data = base.data + getattr(one, f"{name}_B") @ getattr(one, f"{name}_A")
        torch.testing.assert_close(one.experts(x, *chosen), y, atol=1e-4, rtol=1e-4)
        y = made[OURS](x, *chosen)
        torch.testing.assert_close(merge(made[OURS])(x, *chosen), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ours", "peft", "peaks", "met"),
    [
        (0.1, 0.3, (5, 9), ["yes", "yes"]),
        (0.3, 0.3, (9, 9), ["no", "no"]),
        (0.12, 0.3, (10, 9), ["yes", "no"]),  # 0.4 x, and no more
    ],
)
def test_the_targets(tmp_path, ours, peft, peaks, met):
    case = ExpertsCase(48, 16, 8, 4, 2, 3, "fp32", 1)._asdict()
    store = Store(tmp_path / "experts.jsonl").prepare()
    for rival, excess, peak in ((OURS, ours, peaks[0]), (PEFT, peft, peaks[1]), (GROUPED, 0.01, 1)):
        step = {"seconds": [1.0] * 3, "excess": [excess] * 3}
        store.append({"case": case, "rival": rival, "label": LABELS[rival], "step": step, "peak_bytes": peak, "build": "b"})
    found = targets.verdicts(tmp_path)
    assert [verdict.met for verdict in found] == met and "x 0.4" in found[0].rival
    assert [verdict.what for verdict in found] == [f"{peak}experts 48x16x8, 2 of 4, r3 fp32 t1" for peak in ("", "peak ")]


def test_quick_is_the_first_shape():
    options = experts.arguments(["--device", "cpu", "--quick"])
    assert options.shapes == [(2048, 512, 256, 32, 4, 16)] and options.rounds == 3
