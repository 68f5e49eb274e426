"""Parameter groups, and the warning of an optimizer that was made before apply_lotr."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from toys import IDS, adapted, loss, no_warnings, randomize, toy

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr, lotr_parameters, parameter_groups
from lotr_ext.model import first_step

QV = LoTRConfig(rank=2, target_modules=["q", "v"], modules_to_save=["head"])


@pytest.fixture(autouse=True)
def no_other_models() -> None:
    """Of the models of other tests none is left."""
    gc.collect()
    first_step._waiting.clear()


def hooks() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss(model).backward()
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_an_optimizer_made_before_apply_lotr_is_warned_of_once(make) -> None:
    model = toy()
    optimizer = make(model.parameters())
    apply_lotr(model, QV)
    before = [p.detach().clone() for p in lotr_parameters(model)]
    with pytest.warns(UserWarning, match=r"holds \d+ frozen parameters of the adapted Toy and none of its adapter") as caught:
        for _ in range(3):
            step(model, optimizer)
    assert len([w for w in caught if "frozen parameters" in str(w.message)]) == 1
    assert model.head.weight.requires_grad  # which this optimizer trains: the adapter it does not
    assert all(torch.equal(p, q) for p, q in zip(before, lotr_parameters(model)))


def test_an_optimizer_of_trained_parameters_is_not_warned_of_and_the_hook_goes() -> None:
    before = hooks()
    with no_warnings():
        for parameters in (lotr_parameters, lambda m: [p for p in m.parameters() if p.requires_grad], parameter_groups):
            model, other = apply_lotr(toy(), QV), nn.Linear(3, 3)
            assert hooks() == before + 1
            foreign = torch.optim.AdamW(other.parameters())
            other(torch.randn(2, 3)).sum().backward()
            foreign.step()  # another model's
            assert hooks() == before + 1
            step(model, torch.optim.AdamW(parameters(model)))
            assert hooks() == before
        model = apply_lotr(toy(), QV)
        step(model, torch.optim.AdamW(model.parameters()))  # all, the frozen ones too
        heads, cores = torch.optim.AdamW(model.head.parameters()), torch.optim.AdamW(lotr_parameters(model))
        step(model, heads)
        step(model, cores)
        assert hooks() == before


def test_an_optimizer_of_frozen_parameters_alone_is_warned_of() -> None:
    model = toy()
    optimizer = torch.optim.AdamW(model.blocks.parameters())
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["q"]))
    with pytest.warns(UserWarning, match="this AdamW holds 26 frozen parameters"):
        step(model, optimizer)


def test_a_model_that_is_gone_is_not_waited_for() -> None:
    apply_lotr(toy(), QV)
    gc.collect()
    assert not list(first_step._waiting)
    other = nn.Linear(3, 3)
    other(torch.randn(2, 3)).sum().backward()
    torch.optim.AdamW(other.parameters()).step()
    assert first_step._handle is None


def test_a_compiled_step_is_right_while_a_model_is_waited_for() -> None:
    torch.compiler.reset()
    model, other = apply_lotr(toy(), QV), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    want = other.weight.detach() - 0.1 * other.weight.grad
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(other.weight.detach(), want)
    assert model in first_step._waiting
    torch.compiler.reset()


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_hold_what_is_trained_once_with_their_rates() -> None:
    model = apply_lotr(toy(), QV)
    groups = parameter_groups(model, core_lr=1e-2, factor_lr=1e-3, weight_decay=0.1)
    assert [(g["name"], g.get("lr"), g["weight_decay"]) for g in groups] == [
        ("cores", 1e-2, 0.1),
        ("factors", 1e-3, 0.1),
        ("other", None, 0.1),
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in g["params"]] for g in groups]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name for names in found for name in names) == sorted(trained)
    assert all(name.endswith(".core") for name in found[0]) and len(found[0]) == 4
    assert found[1] == ["lotr_factors.16x16.A", "lotr_factors.16x16.B"] and found[2] == ["head.weight", "head.bias"]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3, 1e-4]
    assert [g["lr"] for g in parameter_groups(model, 0.5, factor_lr=0.25)] == [0.5, 0.25, 0.5]
    assert [g["lr"] for g in parameter_groups(model, 0.5, core_lr=0.0)] == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("core", ["dense", "tucker", "cp"])
@pytest.mark.parametrize("group_by", ["shape", "width"])
def test_a_step_moves_each_group_at_its_own_rate(core: str, group_by: str) -> None:
    """SGD by hand: p - lr grad, with the lr of the group that the parameter is of."""
    model = adapted(core=core, group_by=group_by)
    groups = parameter_groups(model, core_lr=0.5, factor_lr=0.25)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    is_factor = {id(p): name.startswith("lotr_factors.") for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(groups, lr=0.0)
    loss(model).backward()
    want = [p.detach() - (0.25 if is_factor[id(p)] else 0.5) * p.grad for g in groups for p in g["params"]]
    optimizer.step()
    for p, q in zip((p for g in groups for p in g["params"]), want):
        torch.testing.assert_close(p.detach(), q)


def test_trainer_moves_each_group_at_its_rate_and_scales_all_by_its_schedule(tmp_path) -> None:
    """Two steps of SGD under a linear decay, which halves the second, against the same steps by hand."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class WithLoss(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net = net

        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(ids).square().mean()}

    def made() -> tuple[WithLoss, torch.optim.Optimizer]:
        model = WithLoss(apply_lotr(toy(), QV))
        randomize(model)
        return model, torch.optim.SGD(parameter_groups(model, 0.1, core_lr=0.5, factor_lr=0.25))

    trained, optimizer = made()
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=len(IDS), lr_scheduler_type="linear", use_cpu=True,
        max_grad_norm=0.0, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    rows = [{"ids": row} for row in IDS]
    transformers.Trainer(trained, settings, train_dataset=rows, optimizers=(optimizer, None)).train()
    by_hand, _ = made()
    rates = {"core": 0.5, "A": 0.25, "B": 0.25}
    for share in (1.0, 0.5):
        by_hand.zero_grad()
        by_hand(IDS)["loss"].backward()
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                if p.requires_grad:
                    p -= share * rates.get(name.rpartition(".")[2], 0.1) * p.grad
    for (name, p), q in zip(trained.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")


def test_groups_of_what_is_trained_only_and_of_models_built_by_hand() -> None:
    assert [g["name"] for g in parameter_groups(adapted(train=("core",)))] == ["cores"]
    factors = LoTRFactors(4, 4, rank=2)
    by_hand = nn.Sequential(LoTRLinear(4, 4, factors=factors), nn.Linear(4, 2))
    assert [(g["name"], len(g["params"])) for g in parameter_groups(by_hand)] == [("cores", 1), ("factors", 2), ("other", 2)]
    assert parameter_groups(copy.deepcopy(by_hand))[0]["params"][0] is not parameter_groups(by_hand)[0]["params"][0]


def test_wrong_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="core_lr: expected a number of at least 0, got -1"):
        parameter_groups(adapted(), core_lr=-1)
    with pytest.raises(TypeError, match="weight_decay: expected a number, got str '0'"):
        parameter_groups(adapted(), weight_decay="0")
    with pytest.raises(RuntimeError, match="expected one with a LoTR adapter"):
        parameter_groups(toy())
