"""The benchmark of many tasks: what each way trains, its table and picture, and bad shapes."""

from __future__ import annotations

import pytest
import torch

from bench import tasks
from bench.measure.store import Store
from bench.report import rebuild, tasks_table
from bench.rivals.tasks import LABELS, WAYS, index_of, optimizer_of, state_bytes, task_of_row, with_tasks
from bench.tasks import Batch, TasksCase, check

QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1"]
CASE = TasksCase(4, 3, 7, 16, 1, 2, "fp32", 1)


def test_it_measures_keeps_and_shows(tmp_path, capsys):
    folder = tmp_path / "machine"
    arguments = [*QUICK, "--shapes", "4x3x7x16x1x2", "--results", str(folder)]
    assert tasks.main(arguments) == 0
    cells = {cell["rival"]: cell for cell in Store(folder / "tasks.jsonl").read()}
    assert cells.keys() == LABELS.keys()
    numbers = 4 * 2 * 2  # of a task: four layers of r = 2
    assert cells["one"]["state_bytes"] == 4 * (2 * numbers + 4)  # two moments a number and a step count a layer
    assert cells["whole-bank"]["state_bytes"] == 4 * (7 * 2 * numbers + 4)
    assert cells["per-task"]["state_bytes"] == 7 * 4 * (2 * numbers + 4)
    assert (folder / "tasks.png").stat().st_size > 5000
    (text,) = rebuild.SECTIONS["tasks"](tmp_path, "")
    assert "python -m bench.tasks --shapes 4x3x7x16x1x2 --threads 1 --rounds 1 --allocator system" in text
    assert "| **a task a row, bank.optimizer(AdamW)** |" in text and "| one adapter, AdamW |" in text
    assert "](bench/results/machine/tasks.png)" in text and tasks_table.place(CASE._asdict()) in text
    capsys.readouterr()
    assert tasks.main(arguments) == 0 and "1 of 1 cases are in" in capsys.readouterr().out


@pytest.mark.parametrize("name", WAYS)
def test_a_step_moves_what_its_way_says(name):
    """And the check finds a step that moves another task, or none."""
    model, bank = with_tasks(CASE.hidden, CASE.blocks, CASE.r, CASE.tasks)
    before, batch = [core.detach().clone() for core in bank.cores], Batch(CASE, torch.device("cpu"))
    optimizer = optimizer_of(WAYS[name], model, bank)
    assert all(torch.equal(core, old) for core, old in zip(bank.cores, before, strict=True))
    check(WAYS[name], model, optimizer, batch)
    assert state_bytes(optimizer) > 0
    step = optimizer.step
    if WAYS[name].index is None:
        optimizer.step = lambda: (step(), bank.cores[0].data.add_(1))
    else:
        optimizer.step = lambda: None
    with pytest.raises(ArithmeticError, match="expected a step to move"):
        check(WAYS[name], model, optimizer, batch)


def test_the_index_of_a_way():
    rows = task_of_row(4, 4, 9)
    assert len(set(rows.tolist())) == 4 and len(set(task_of_row(5, 2, 9).tolist())) == 2
    assert torch.equal(index_of(WAYS["per-task"], rows, 3), rows)
    by_token = index_of(WAYS["by-token"], rows, 3)
    assert by_token.shape == (4, 3) and torch.equal(by_token[:, 0], rows) and torch.equal(by_token[:3, 1], rows[1:])
    activated = index_of(WAYS["activated"], rows, 4)
    assert activated[:, :2].eq(-1).all() and torch.equal(activated[:, 2], rows) and torch.equal(activated[:, 3], rows)
