"""TaskBank.optimizer: each task as a torch optimizer of its own moves it, and which tasks move."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import torch
from mixtures import IDS
from safetensors import safe_open
from safetensors.torch import save_file
from test_task_mixtures import with_tasks
from test_tasks import adapted as with_bank
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import TaskBank, lotr_parameters, mixed


class Early(torch.optim.Optimizer):
    """Has a state before the first step, and only from then, as Adagrad had: draws a parameter back to where it began."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"sum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p]["sum"] += p.grad
                p -= group["lr"] * self.state[p]["sum"]


KINDS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "fused": True}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "a state before the first step": (Early, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.02}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.02}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.02}),  # has a state a row and a column of a core
    "Muon": (torch.optim.Muon, {"lr": 0.02}),
}
ADAMW = KINDS["AdamW"]
# a task's rows, step by step: one rests, one begins late, one never comes
STEPS = ([0, 1, 1, -1], [1, -1, 0, 0], [1, 3, 1, -1], [3, 1, 0, 1], [-1, -1, 3, -1])


def frozen(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, TaskBank]:
    model, bank = with_bank(dtype)
    for p in lotr_parameters(model):
        p.requires_grad_(False)
    return model, bank.requires_grad_()


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 12, generator=draw, dtype=torch.float64).to(dtype) for _ in STEPS]


def backward(model: nn.Module, x: Tensor, index: Tensor | list) -> None:
    with mixed(model, torch.as_tensor(index)):
        model(x).sin().sum().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, only: int | None = None, dtype=torch.float64) -> None:
    """STEPS; only: one task with its rows, the others' rows without a task, and steps where it has rows."""
    for rows, x in zip(STEPS, batches(dtype), strict=True):
        if only is not None and only not in rows:
            continue
        optimizer.zero_grad()
        backward(model, x, [row if only in (None, row) else -1 for row in rows])
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_moves_as_it_does_alone(kind: str) -> None:
    """Bit for bit: alone is a torch optimizer over the task's own cores, which steps when the task has rows."""
    optimizer_class, settings = KINDS[kind]
    model, bank = frozen(torch.float32)
    before = [core.detach().clone() for core in bank.cores]
    optimizer = bank.optimizer(optimizer_class, **settings)
    train(model, optimizer, dtype=torch.float32)
    for task in (0, 1, 3):
        other, its = frozen(torch.float32)
        own = [nn.Parameter(core.detach()[task].clone()) for core in its.cores]
        alike = {} if "fused" in settings or "foreach" not in signature(optimizer_class).parameters else {"foreach": True}
        alone = optimizer_class(own, **settings, **alike)
        for rows, x in zip(STEPS, batches(torch.float32), strict=True):
            if task in rows:
                backward(other, x, [row if row == task else -1 for row in rows])
                for parameter, core in zip(own, its.cores, strict=True):
                    parameter.grad, core.grad = core.grad[task], None
                alone.step()
                for parameter, core in zip(own, its.cores, strict=True):
                    core.data[task] = parameter.data
        for core, parameter, old in zip(bank.cores, own, before, strict=True):
            assert torch.equal(core[task], parameter) and not torch.equal(core[task], old[task])
    for core, old in zip(bank.cores, before, strict=True):
        assert torch.equal(core[[2, 4, 5]], old[[2, 4, 5]])
    assert optimizer.state_of(2) == {} and set(optimizer.state_dict()["tasks"]) == {0, 1, 3}


def test_a_step_moves_tasks_with_rows_also_without_a_gradient() -> None:
    """A row whose gradient is zero moves its task by momentum and weight decay; a task without rows stays."""
    model, bank = frozen()
    optimizer = bank.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    x = batches()[0]
    backward(model, x, [0, 1, 2, 3])
    optimizer.step()
    before = [core.detach().clone() for core in bank.cores]
    optimizer.zero_grad()
    with mixed(model, torch.tensor([0, 1, 2, -1])):
        (model(x)[:2].sum() * 0).backward()
    optimizer.step()
    for core, old in zip(bank.cores, before, strict=True):
        moved = (core != old).flatten(1).any(1)
        assert moved.tolist() == [True, True, True, False, False, False]


def test_micro_batches_and_tokens_add_up() -> None:
    """Rows of several backwards of one step, and tasks of single tokens; what is forgotten with zero_grad is not moved."""
    x = batches()[0]
    indices = [torch.tensor([[0, -1, 3]] * 4), torch.tensor([1, -1, 1, -1])]

    def moved(reset: Callable[[nn.Module, torch.optim.Optimizer], object], *, first: list[int]) -> list[bool]:
        model, bank = frozen()
        optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
        before = bank.cores[0].detach().clone()
        backward(model, x, first)
        reset(model, optimizer)
        for index in indices:
            backward(model, x, index)
        with torch.no_grad(), mixed(model, torch.tensor([2] * 4)):
            model(x)  # an evaluation
        optimizer.step()
        return (bank.cores[0] != before).flatten(1).any(1).tolist()

    assert moved(lambda model, optimizer: None, first=[4, 4, 4, 4]) == [True, True, False, True, True, False]
    for reset in (
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: model.zero_grad(),
    ):
        assert moved(reset, first=[4, 4, 4, 4]) == [True, True, False, True, False, False]


def test_a_task_that_is_added_or_replaced_between_micro_batches() -> None:
    """The step moves it by the gradient of its own rows, as if there had been no task in its slot before."""
    moved = []
    for late in (False, True):
        model, bank = frozen()
        new = {name: torch.ones_like(core) for name, core in bank.cores_of(1).items()}
        optimizer = bank.optimizer(torch.optim.SGD, lr=0.1)
        if late:
            backward(model, batches()[0], [0, 1, 1, 2])
        bank.replace(1, new)
        assert bank.add(new) == 5 and all(core.grad is None or not core.grad[1].any() for core in bank.cores)
        if not late:
            backward(model, batches()[0], [0, -1, -1, 2])
        backward(model, batches()[1], [0, 1, 5, -1])
        optimizer.step()
        moved.append([core.detach() for core in bank.cores])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other)
        assert (one[[1, 5]] != 1).flatten(1).any(1).all()


def test_a_learning_rate_in_a_tensor() -> None:
    moved = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model, bank = frozen()
        train(model, bank.optimizer(torch.optim.AdamW, lr=lr))
        moved.append([core.detach() for core in bank.cores])
    torch.testing.assert_close(*moved)


def test_an_index_that_is_written_to_in_place() -> None:
    """Each forward counts with the index that it saw."""
    model, bank = frozen()
    optimizer = bank.optimizer(torch.optim.SGD, lr=0.1)
    before, index = bank.cores[0].detach().clone(), torch.tensor([0, 0, 0, 0])
    with mixed(model, index):
        for task in (0, 3):
            index.fill_(task)
            model(batches()[0]).sum().backward()
        index.fill_(4)
    optimizer.step()
    assert (bank.cores[0] != before).flatten(1).any(1).tolist() == [True, False, False, True, False, False]


def test_a_layer_without_a_gradient_stays() -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    before = [core.detach().clone() for core in bank.cores]
    with mixed(model, torch.tensor([0, 1, -1, -1])):
        model[0](batches()[0]).sum().backward()  # the second block is left out
    optimizer.step()
    moved = [bool((core[:2] != old[:2]).any()) for core, old in zip(bank.cores, before, strict=True)]
    assert moved == [True] * 4 + [False] * 4 and all(name.startswith("0.") for name in optimizer.state_of(0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        model, bank = frozen()
        optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
        for rows, x in zip(STEPS, batches(), strict=True):
            optimizer.zero_grad()
            with mixed(model, torch.tensor(rows)):
                x.requires_grad_()
                y = checkpoint(model[1], checkpoint(model[0], x, use_reentrant=reentrant), use_reentrant=reentrant)
                (y if checkpointed else model(x)).sin().sum().backward()
            optimizer.step()
        results.append([core.detach().clone() for core in bank.cores])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_index_that_is_given_counts_alone() -> None:
    """As compiled code and several processes need it."""
    model, bank = frozen()
    optimizer = bank.optimizer(torch.optim.SGD, lr=0.1)
    compiled = torch.compile(model, backend="eager")
    with mixed(model, torch.tensor([0, 1, -1, 2])):
        compiled(batches()[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"step: expected tasks with rows in 0\.q\.core, got a gradient without rows"):
        optimizer.step()
    before = bank.cores[0].detach().clone()
    optimizer.step(index=torch.tensor([[0, -1], [2, 0]]))
    assert (bank.cores[0] != before).flatten(1).any(1).tolist() == [True, False, True, False, False, False]
    torch.compiler.reset()


def test_several_processes_must_say_which_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each knows its own rows, and its gradients are those of all."""
    model, bank = frozen()
    optimizer = bank.optimizer(torch.optim.SGD, lr=0.1)
    backward(model, batches()[0], [0, 0, 1, 1])
    before = bank.cores[0].detach().clone()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="index: expected the tasks of all 2 processes, got None"):
        optimizer.step()
    assert torch.equal(bank.cores[0], before)
    optimizer.step(index=torch.tensor([0, 1, 2]))
    assert (bank.cores[0] != before).flatten(1).any(1).tolist() == [True, True, False, False, False, False]  # 2: zeros


def test_experts_have_a_state_a_task() -> None:
    model, bank = with_tasks("Mixtral")
    bank.requires_grad_()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    before = [core.detach().clone() for core in bank.cores]
    with mixed(model, torch.tensor([2, -1, 0])):
        model(IDS, use_cache=False).logits.square().sum().backward()
    own = [nn.Parameter(core.detach()[2].clone()) for core in bank.cores]
    for parameter, core in zip(own, bank.cores, strict=True):
        parameter.grad = core.grad[2].clone()
    ADAMW[0](own, **ADAMW[1]).step()
    optimizer.step()
    for core, parameter, old in zip(bank.cores, own, before, strict=True):
        assert torch.equal(core[2], parameter) and torch.equal(core[1], old[1])


def test_a_schedule_and_a_scaler_drive_it() -> None:
    """Settings of the group count at each step; a step with infinite gradients is left out."""
    model, bank = frozen(torch.float32)
    optimizer = bank.optimizer(torch.optim.SGD, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, x = bank.cores[0].detach().clone(), batches(torch.float32)[0]
    for factor, lr in ((float("inf"), 1.0), (1.0, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        with mixed(model, torch.tensor([0, 0, 1, -1])):
            scaler.scale(model(x).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor > 1:
            assert torch.equal(bank.cores[0], before)
    now, gradient = bank.cores[0].detach(), bank.cores[0].grad
    torch.testing.assert_close(now, before - 0.25 * gradient)
    assert (now != before).flatten(1).any(1).tolist() == [True, True, False, False, False, False]


def test_a_backward_through_a_forward_of_before_the_step_raises() -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(torch.optim.AdamW, lr=0.1, fused=True)
    with mixed(model, torch.tensor([0, 1, 0, 1])):
        y = model(batches()[0]).sum()
    y.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_optimizer_ends_with_its_user() -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(torch.optim.SGD, lr=0.1)
    train(model, optimizer)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    backward(model, batches()[0], [0, 1, 2, 3])  # and the bank goes on without
    copy.deepcopy(model)


def test_a_bank_with_other_memory_is_found_and_another_dtype_is_refused() -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    train(model, optimizer)
    for core in bank.cores:
        core.data = core.data.clone()
    train(model, optimizer)
    want, its = frozen()
    other = its.optimizer(ADAMW[0], **ADAMW[1])
    train(want, other), train(want, other)
    assert all(torch.equal(a, b) for a, b in zip(bank.cores, its.cores, strict=True))
    model.float()
    backward(model, batches(torch.float32)[0], [0, 1, 0, 1])
    with pytest.raises(RuntimeError, match=r"expected cores in torch\.float64 on cpu, as the state is, got torch\.float32"):
        optimizer.step()


class Together(torch.optim.SGD):
    """Counts its steps for all parameters together."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


def test_bad_input(tmp_path: Path) -> None:
    model, bank = frozen()
    optimizer = bank.optimizer(ADAMW[0], **ADAMW[1])
    train(model, optimizer)
    optimizer.zero_grad()
    optimizer.save(0, tmp_path / "adamw")
    bank.save(0, tmp_path / "cores")
    state = optimizer.state_dict()
    with safe_open(tmp_path / "adamw", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file(tensors, tmp_path / "damaged", metadata | {"values": "3"})
    _, other = with_bank(torch.float64)
    sgd = other.optimizer(torch.optim.SGD, lr=0.1)
    full = frozen()[1]
    its = full.optimizer(ADAMW[0], **ADAMW[1])
    full.add()
    wrong = {0: {"0.q.core": {"step": torch.tensor(1.0), "exp_avg": torch.zeros(5, 3)}}}
    cases = [
        (TypeError, "optimizer_class: expected a class of torch.optim.Optimizer, got 'AdamW'", lambda: bank.optimizer("AdamW")),
        (TypeError, "needs only dense gradients, got LBFGS", lambda: bank.optimizer(torch.optim.LBFGS)),
        (TypeError, "needs only dense gradients, got SparseAdam", lambda: bank.optimizer(torch.optim.SparseAdam)),
        (TypeError, r"belongs to each parameter, got Together, which keeps \['k'\]", lambda: bank.optimizer(Together, lr=0.1)),
        (TypeError, "unexpected keyword argument 'rate'", lambda: bank.optimizer(torch.optim.SGD, rate=1)),
        (TypeError, "index: expected an int64 tensor, got torch.int32", lambda: optimizer.step(index=torch.zeros(1).int())),
        (ValueError, r"index: expected indices in \[-1, 6\), got 0 to 6", lambda: optimizer.step(index=torch.tensor([0, 6]))),
        (ValueError, "index: expected tasks of the bank, got 5, a free slot", lambda: optimizer.step(index=torch.tensor([5]))),
        (RuntimeError, "expected only the bank's cores", lambda: optimizer.add_param_group({"params": [nn.Parameter()]})),
        (ValueError, "task: expected a task of the bank, as add returned it, got 5", lambda: optimizer.save(5, tmp_path / "x")),
        (ValueError, "task: expected a task of the bank, as add returned it, got 5", lambda: optimizer.state_of(5)),
        (ValueError, "source: expected the state of SGD, got AdamW", lambda: sgd.add(tmp_path / "adamw")),
        (ValueError, "expected the state of AdamW, got a file without state", lambda: optimizer.add(tmp_path / "cores")),
        (ValueError, "source: expected the state's numbers .* got a damaged file", lambda: optimizer.add(tmp_path / "damaged")),
        (RuntimeError, "add: expected a free slot", lambda: its.add(tmp_path / "adamw")),
        (ValueError, "state_dict: expected one of SGD, got 'AdamW'", lambda: sgd.load_state_dict(state)),
        (ValueError, "expected tasks of the bank, got 5", lambda: optimizer.load_state_dict(state | {"tasks": {5: {}}})),
        (
            ValueError,
            "state of layers of the bank, got that of x",
            lambda: optimizer.load_state_dict(state | {"tasks": {0: {"x": {}}}}),
        ),
        (
            ValueError,
            r"expected state of 0.q.core like \(4, 3\), got exp_avg of shape \(5, 3\)",
            lambda: optimizer.load_state_dict(state | {"tasks": wrong}),
        ),
    ]
    before = copy.deepcopy((bank.state_dict(), optimizer.state_dict()))
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    after = bank.state_dict(), optimizer.state_dict()
    assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())
    for name, own in before[1]["tasks"][0].items():
        assert all(torch.equal(value, after[1]["tasks"][0][name][key]) for key, value in own.items())
    assert optimizer.step() is None  # no gradient: nothing to do
