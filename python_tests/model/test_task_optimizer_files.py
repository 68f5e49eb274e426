"""The state that TaskBank.optimizer has for tasks that come, go, and are saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_task_optimizer import ADAMW, KINDS, backward, batches, frozen, train
from torch import Tensor


def test_a_dropped_or_replaced_task_forgets_its_state() -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    train(model, optimizer)
    assert optimizer.state_of(0)["0.q.core"]["step"] == 3
    bank.drop(0)
    assert 0 not in optimizer.state_dict()["tasks"]
    assert bank.add() == 0 and optimizer.state_of(0) == {}
    bank.replace(1, None)
    optimizer.zero_grad()
    backward(model, batches()[0], [0, 1, 3, 3])
    optimizer.step()
    assert [int(optimizer.state_of(task)["0.q.core"]["step"]) for task in (0, 1, 3)] == [1, 1, 4]
    optimizer.zero_grad()
    backward(model, batches()[0], [0, 1, 1, 1])
    bank.drop(1)  # between a backward and its step: what is gone is not moved, nor what has its place now
    bank.replace(0, None)
    optimizer.step()
    assert not any(core[:2].any() for core in bank.cores) and bank.add() == 1
    backward(model, batches()[0], [1, -1, -1, -1])
    optimizer.step()
    assert all(core[1].any() and not core[0].any() for core in bank.cores)


@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum", "Adagrad", "Adafactor"])
def test_a_task_is_saved_with_its_state_and_goes_on(kind: str, tmp_path: Path) -> None:
    optimizer_class, settings = KINDS[kind]
    model, bank = frozen()
    optimizer = bank.optimizer(optimizer_class, **settings)
    train(model, optimizer)
    optimizer.save(1, tmp_path / "one")
    bank.save(1, tmp_path / "cores alone")
    assert set(load_file(tmp_path / "cores alone")) == set(bank.cores_of(1))
    other, its = frozen()
    again = its.optimizer(optimizer_class, **settings)
    assert again.add(tmp_path / "one") == 5  # the free slot
    for key, value in optimizer.state_of(1)["1.down.core"].items():
        found = again.state_of(5)["1.down.core"][key]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
    for which, place, step in ((model, 1, optimizer), (other, 5, again)):
        step.zero_grad()
        backward(which, batches()[0], [place] * 4)
        step.step()
    assert all(torch.equal(a[1], b[5]) for a, b in zip(bank.cores, its.cores, strict=True))
    its.drop(5)
    assert its.add(tmp_path / "one") == 5 and again.state_of(5) == {}  # the bank reads the cores alone


def test_everything_is_saved_and_resumed() -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer)
    schedule.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer)
    other, its = frozen()
    again = its.optimizer(ADAMW[0], **ADAMW[1])
    train(other, again)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.param_groups[0]["lr"] == 0.01
    train(other, again)
    assert all(torch.equal(a, b) for a, b in zip(bank.cores, its.cores, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
def test_a_copy_with_its_model_goes_on_alone(copied) -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    other, again = copied((model, optimizer))
    before = [core.clone() for core in bank.cores]
    train(other, again)
    assert all(torch.equal(a, b) for a, b in zip(bank.cores, before, strict=True))
    train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(bank.cores, other.lotr_tasks.cores, strict=True))
