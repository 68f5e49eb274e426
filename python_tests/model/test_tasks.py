"""TaskBank: many tasks in one batch against each task by itself, their gradients, files, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lotr_ext
from lotr_ext import LoTRConfig, TaskBank, add_adapter, apply_lotr, lotr_parameters, mixed, set_adapter, unload
from lotr_ext.layers.request import NOW
from lotr_ext.ops import planner


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.up = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * torch.sigmoid(self.k(x))
        return x + self.down(torch.tanh(self.up(x)))


TARGETS = ["q", "k", "up", "down"]


def adapted(dtype: torch.dtype = torch.float32, tasks: int = 6) -> tuple[nn.Module, TaskBank]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    apply_lotr(model, LoTRConfig(rank=(4, 3), alpha=2.0, target_modules=TARGETS))
    bank = TaskBank(model.to(dtype), tasks)
    for _ in range(tasks - 1):
        task = bank.add()
        bank.replace(task, {name: torch.randn(core.shape) for name, core in bank.cores_of(task).items()})
    return model, bank


def alone(model: nn.Module, bank: TaskBank, task: int, x: Tensor) -> Tensor:
    """The model with the task's cores as its own, or without an adapter."""
    if task < 0:
        with lotr_ext.disabled(model):
            return model(x)
    before = {name: core.detach().clone() for name, core in model.named_parameters() if name.endswith(".core")}
    values = bank.cores_of(task)
    for name, core in model.named_parameters():
        if name in values:
            core.data.copy_(values[name])
    y = model(x)
    for name, core in model.named_parameters():
        if name in before:
            core.data.copy_(before[name])
    return y


@pytest.mark.parametrize("mode", ["no grad", "grad", "autocast", "composite"])
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
def test_each_row_goes_through_its_task(mode: str, tokens: tuple[int, ...], monkeypatch) -> None:
    model, bank = adapted()
    if mode == "composite":
        monkeypatch.setattr(planner, "LOTR_STRATEGY", "composite")
    x, index = torch.randn(5, *tokens, 12), torch.tensor([3, 0, -1, 4, 0])
    with torch.set_grad_enabled(mode != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        with mixed(model, index):
            got = model(x)
        for i, task in enumerate(index.tolist()):
            tolerance = 5e-2 if mode == "autocast" else 1e-5
            torch.testing.assert_close(got[i], alone(model, bank, task, x[i : i + 1])[0], atol=tolerance, rtol=tolerance)
    assert (got[1] - alone(model, bank, 3, x[1:2])[0]).abs().max() > 0.1


@pytest.mark.parametrize("by_name", [False, True])
def test_a_scaling_comes_last_in_float16(by_name: bool) -> None:
    """s u G and s G leave the range, y does not."""
    torch.manual_seed(0)
    model = apply_lotr(nn.Sequential(nn.Linear(12, 20)), LoTRConfig(rank=(4, 3), scaling=4000.0, target_modules=["0"]))
    model[0].half()
    layer, bank = model[0], TaskBank(model, 2)
    nn.init.normal_(layer.core, 0, 30)
    nn.init.normal_(layer.factors.B, 0, 1e-4)
    bank.add({"0.core": layer.core.detach()})
    x = torch.randn(3, 12).half()
    with torch.no_grad(), mixed(model, ["default", None, "default"] if by_name else torch.tensor([0, -1, 0])):
        y = model(x)
    A, core, B = (t.detach().double() for t in (layer.factors.A, layer.core, layer.factors.B))
    h = 4000 * x.double() @ A @ core
    assert min(h.abs().max(), 4000 * core.abs().max()) > torch.finfo(torch.float16).max
    want = x.double() @ layer.weight.double().T + layer.bias.double() + h @ B.T * torch.tensor([[1.0], [0.0], [1.0]])
    assert (y.double() - want).abs().max() < 0.01 * want.abs().max()


def test_each_task_gets_the_gradient_of_its_own_rows() -> None:
    """In float64: of a batch of tasks, each task's is that of a batch of its rows alone; tasks without rows get zeros."""
    model, bank = adapted(torch.float64)
    bank.requires_grad_()
    x, index = torch.randn(6, 3, 12, dtype=torch.float64), torch.tensor([2, 0, 2, -1, 4, 0])
    with mixed(model, index):
        model(x).sin().sum().backward()
    together = [core.grad.clone() for core in bank.cores]
    factors = {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith((".A", ".B"))}
    model.zero_grad()
    for task in (0, 2, 4):
        rows = index == task
        with mixed(model, index[rows]):
            model(x[rows]).sin().sum().backward()
    for core, want in zip(bank.cores, together, strict=True):
        torch.testing.assert_close(core.grad, want)
        assert want[[0, 2, 4]].abs().amax((1, 2)).min() > 0 and not want[[1, 3, 5]].any()
    for name, p in model.named_parameters():
        if name in factors:
            torch.testing.assert_close(p.grad, factors[name])


def test_two_tasks_learn_in_one_batch_and_the_others_stay() -> None:
    model, bank = adapted()
    for p in lotr_parameters(model):
        p.requires_grad_(False)
    bank.requires_grad_()
    before = [core.detach().clone() for core in bank.cores]
    optimizer = torch.optim.SGD(bank.parameters(), lr=2.0)
    x, index = torch.randn(8, 4, 12), torch.tensor([0, 1] * 4)
    goal = torch.where((index == 0)[:, None, None], x.flip(-1), -x)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with mixed(model, index):
            loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for core, old in zip(bank.cores, before, strict=True):
        assert torch.equal(core[2:], old[2:]) and not torch.equal(core[0], old[0])


def test_tasks_come_and_go_one_by_one(tmp_path: Path) -> None:
    model, bank = adapted()
    x, index = torch.randn(2, 3, 12), torch.tensor([1, 4])
    with torch.no_grad(), mixed(model, index):
        want = model(x)
        bank.save(2, tmp_path / "two.safetensors")
        bank.drop(2)
        assert len(bank) == 4 and bank.add(tmp_path / "two.safetensors") == 2  # the slot that was free first
        added = bank.add()
        bank.replace(added, tmp_path / "two.safetensors")
        assert torch.equal(model(x), want), "the others go on as before"
    with torch.no_grad():
        for task in (2, added):
            with mixed(model, torch.tensor([task])):
                torch.testing.assert_close(model(x[:1]), alone(model, bank, 2, x[:1]))
    numbers = load_file(tmp_path / "two.safetensors")
    assert sum(t.numel() for t in numbers.values()) == 8 * 4 * 3  # r_in r_out numbers a layer, and no factor
    assert set(numbers) == set(bank.cores_of(2)) and [p.name for p in tmp_path.iterdir()] == ["two.safetensors"]
    with pytest.raises(RuntimeError, match="add: expected a free slot, got 6 that are all taken"):
        bank.add()


def test_a_new_task_is_the_base_model() -> None:
    model, bank = adapted()
    task, x = bank.add(), torch.randn(1, 3, 12)
    with torch.no_grad(), mixed(model, torch.tensor([task])):
        got = model(x)
    with torch.no_grad(), lotr_ext.disabled(model):
        torch.testing.assert_close(got, model(x))


def test_state_dict_copies_and_unload() -> None:
    model, bank = adapted()
    again, other = adapted()
    other.drop(3)
    again.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    x, index = torch.randn(2, 12), torch.tensor([3, 1])
    with torch.no_grad(), mixed(model, index), mixed(again, index), mixed(copied, index):
        assert torch.equal(model(x), again(x)) and torch.equal(model(x), copied(x))
    copied.lotr_tasks.drop(1)
    assert bank.taken[1] and not any("lotr" in name for name, _ in unload(model, merge=False).named_modules())


def test_a_change_between_a_forward_and_its_backward_is_noticed() -> None:
    model, bank = adapted()
    bank.requires_grad_()
    with mixed(model, torch.tensor([0])):
        y = model(torch.randn(1, 12))
    bank.drop(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bad_input(tmp_path: Path) -> None:
    model, bank = adapted()
    bank.save(0, tmp_path / "zero")
    torch.manual_seed(1)
    other = apply_lotr(nn.Sequential(Block(), Block()), LoTRConfig(rank=(4, 3), alpha=2.0, target_modules=TARGETS))
    foreign = TaskBank(other, 1)
    add_adapter(model, "own factors")
    scaled = apply_lotr(nn.Sequential(Block()), LoTRConfig(rank=(4, 3), scaling=3.0, target_modules=TARGETS))
    save_file({"x": torch.zeros(1)}, tmp_path / "no task")
    cores = bank.cores_of(1)
    first = next(iter(cores))
    cases = [
        (RuntimeError, "TaskBank: expected a model without a bank", lambda: TaskBank(model, 3)),
        (TypeError, "tasks: expected an int, got float 3.0", lambda: TaskBank(scaled, 3.0)),
        (ValueError, "tasks: expected at least 1, got 0", lambda: TaskBank(scaled, 0)),
        (RuntimeError, "built by hand", lambda: TaskBank(nn.Sequential(lotr_ext.LoTRLinear(4, 4)), 3)),
        (RuntimeError, "mixed: expected a model with a TaskBank", lambda: mixed(scaled, torch.tensor([0])).__enter__()),
        (TypeError, "task: expected an int, got str 'a'", lambda: bank.drop("a")),
        (ValueError, "task: expected a task of the bank, as add returned it, got 5", lambda: bank.save(5, tmp_path / "x")),
        (ValueError, "task: expected a task of the bank, as add returned it, got -1", lambda: bank.replace(-1, None)),
        (TypeError, "source: expected cores by layer name or a path, got int", lambda: bank.replace(0, 3)),
        (ValueError, "source: expected 8 cores, got .* missing", lambda: bank.replace(0, {first: cores[first]})),
        (
            ValueError,
            rf"{first}: expected shape \(4, 3\), got \(3, 4\)",
            lambda: bank.replace(0, cores | {first: cores[first].mT}),
        ),
        (
            ValueError,
            f"{first}: expected values that the bank's torch.float32 can hold, got larger torch.float64",
            lambda: bank.replace(0, cores | {first: cores[first].double() + 1e300}),
        ),
        (ValueError, "source: expected factors .* as the model has, got", lambda: foreign.add(tmp_path / "zero")),
        (ValueError, "expected scaling 3.0 as the model has, got 0.5", lambda: TaskBank(scaled, 1).add(tmp_path / "zero")),
        (ValueError, "source: expected format lotr_task as the model has, got None", lambda: bank.add(tmp_path / "no task")),
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(foreign) == 0 and not foreign.cores[0].any()


def test_a_batch_may_be_empty() -> None:
    model, bank = adapted()
    optimizer = bank.requires_grad_().optimizer(torch.optim.AdamW, lr=0.1)
    before = [core.detach().clone() for core in bank.cores]
    for index, x in ((torch.zeros(0), torch.randn(0, 5, 12)), (torch.zeros(0, 5), torch.randn(0, 5, 12))):
        with mixed(model, index.long()):
            y = model(x)
        assert y.shape == x.shape
        y.sum().backward()
        optimizer.step()
        assert all(torch.equal(core, old) for core, old in zip(bank.cores, before))
        with mixed(model, index.long()), pytest.raises(ValueError, match=r"x: expected .*\b0"):
            model(torch.randn(2, 5, 12))


def test_an_index_of_other_tasks_is_refused() -> None:
    model, _ = adapted()
    add_adapter(model, "own factors")

    def enter(index: Tensor) -> None:
        mixed(model, index).__enter__()

    for index, kind, message in (
        (torch.ones(1), TypeError, r"names: expected adapter names or an int64 index of tasks, got torch\.float32"),
        (torch.tensor([[[1]]]), ValueError, r"a task per row, or \[b, tokens\], one per token, got shape \(1, 1, 1\)"),
        (torch.zeros(3, 0).long(), ValueError, r"a task per row, or \[b, tokens\], one per token, got shape \(3, 0\)"),
        (torch.tensor([0, 6]), ValueError, r"names: expected tasks in \[-1, 6\), got 0 to 6"),
        (torch.tensor([0, -2]), ValueError, r"names: expected tasks in \[-1, 6\), got -2 to 0"),
        (torch.tensor([0, 5, -1]), ValueError, "names: expected tasks of the bank, got 5, a free slot"),
    ):
        with pytest.raises(kind, match=message):
            enter(index)
    with mixed(model, torch.tensor([0, 1])), pytest.raises(ValueError, match="a batch of 2 rows"):
        model(torch.randn(3, 12))
    nested = torch.nested.nested_tensor([torch.randn(n, 12) for n in (2, 3)], layout=torch.jagged)
    with mixed(model, torch.tensor([0, 1])), pytest.raises(TypeError, match="x: expected a dense batch"):
        model(nested)
    set_adapter(model, "own factors")
    with pytest.raises(ValueError, match="names: expected tasks of the active adapter's factors, got others in"):
        enter(torch.tensor([0]))
    assert NOW.any is None
