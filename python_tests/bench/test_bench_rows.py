"""Counted bytes of row_core against sums made by hand, and the pages' tables of them and of many tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.measure.store import Store
from bench.projection import counts
from bench.projection import row_counts as rows
from bench.projection.row_counts import Mixture
from bench.report import rebuild as report
from bench.report import tasks_table


@pytest.fixture(scope="module")
def lib():
    return counts.executor()


def test_each_operand_once_where_each_row_has_a_core_of_its_own(lib):
    case = Mixture(5, 1, 9, 8)
    found = rows.count(lib, "row_core", case, 132)
    by_hand = {"index": 5 * 8, "u": 5 * 8 * 2, "cores": 5 * 64 * 2, "h": 5 * 8 * 2}  # four of the nine cores have no row
    assert found.moved == by_hand and found.total == found.least and found.launches == [("row_core", 5)]


def test_a_mixture_by_hand(lib):
    case = Mixture(6, 2, 4, 8)
    which = rows.indices(case)
    core = np.repeat(np.arange(4), np.diff(which["offs"], prepend=0))
    assert which["offs"][-1] == 12 and (np.bincount(which["tokens"]) == 2).all()
    assert len(set(zip(which["tokens"], core))) == 12  # a token goes to two different experts
    forward, backward = (rows.count(lib, operator, case, 4) for operator in rows.OPERATORS)
    # u is read for each row, h written once, a core read once for each block that has rows of it: four blocks of few rows
    assert forward.moved["u"] == forward.moved["h"] == 12 * 8 * 2
    rows_a_block = -(-12 // dict(forward.launches)["row_core"])
    runs = len({(row // rows_a_block, own) for row, own in enumerate(core)})
    assert forward.moved["cores"] == runs * 64 * 2 == backward.moved["cores"]
    indices = 4 * 4 + 12 * 8
    assert forward.least == 6 * 8 * 2 + 12 * 8 * 2 + 4 * 64 * 2 + indices
    assert backward.moved["dcores"] == 4 * 64 * 4 and backward.moved["du"] == 6 * 8 * 2
    assert backward.least == 2 * 6 * 8 * 2 + 12 * 8 * 2 + 4 * 64 * 2 + 4 * 64 * 4 + indices
    assert backward.moved[rows.ORDER] > 2 * 12 * 8 * 4  # k written and read in float32, and the sorted order
    assert [name for name, _ in backward.launches] == ["row_ends", "row_core", "sum_rows", "row_core_grad"]
    assert forward.total > forward.least and backward.total > backward.least


def test_an_unknown_operator_is_refused(lib):
    with pytest.raises(ValueError, match="operator: expected one of row_core, row_core backward, got 'x'"):
        rows.count(lib, "x", Mixture(1, 1, 1, 8), 132)


def test_the_page_shows_the_newest_counts(tmp_path):
    store = Store(tmp_path / "simt-executor" / rows.FILE).prepare()
    key = rows.needed(rows.parse(rows.CASES))[0]
    for build, size in (("old", 10**6), ("new", 2 * 10**6)):
        row = {"launches": [["row_core", 7]], "moved": {"cores": size}, "sectors": size // 32, "least": 10**6}
        case = {"operator": key[0]} | key[1]._asdict() | {"multiprocessors": key[2]}
        store.append({"case": case, "rival": "lotr_ext", "build": build, "row": row})
    (text,) = report.SECTIONS["traffic"](tmp_path, "")
    assert "| row_core | 2,048, 4 of 32, 16 | row_core: 7 | 2.000 MB | 2.000 MB | 1.000 MB | 2.00 | 100.0% |" in text


ONE_FOR_ALL = ("LoTR, one adapter", "no adapter")


def test_the_page_shows_many_tasks(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    shape = {
        "tasks": 1000,
        "rows": 64,
        "tokens": 2,
        "hidden": 512,
        "layers": 4,
        "rank": 16,
        "rounds": 3,
        "threads": 1,
        "peft": 64,
    }
    ways = {"LoTR, 64 tasks in the batch": {"seconds": 0.064, "over_one": 1.25}}
    ways |= {name: {"seconds": 0.05, "over_one": 1.0} for name in ("LoRA PEFT, 64 tasks in the batch", *ONE_FOR_ALL)}
    run = {"shape": shape, "machine": {"name": "box", "torch": "2", "peft": "0"}, "ways": ways}
    run |= {"bytes_a_task": {"LoTR": 2048}, "most_over_one_task": {"LoTR": 1.05}}
    (folder / "many-tasks-2-tokens.json").write_text(json.dumps(run))
    (text,) = report.SECTIONS["many-tasks"](tmp_path, "")
    assert 'make many-tasks ARGS="--tokens 2 --rounds 3 --threads 1"' in text
    assert "| **LoTR, 64 tasks in the batch** | 64.00 ms | 2,000 | 1.25 x |" in text
    assert "LoTR 1.05 x" in text and "LoTR 2 KiB" in text
    assert "| LoRA PEFT, 64 tasks in the batch | 50.00 ms |" in text
    assert tasks_table.task_runs(folder) == [run]
    assert report.draw(tmp_path) == [folder / "many-tasks-2-tokens.png"]
    assert "](bench/results/machine/many-tasks-2-tokens.png)" in report.SECTIONS["many-tasks"](tmp_path, "")[0]
