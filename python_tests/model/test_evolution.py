"""CoreES: against a plain loop in float64, on a quadratic, resumed, and what is refused; ../gloo_evolution.py in processes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path

import mixtures
import numpy as np
import pytest
import torch
from gloo_evolution import bank_of_blocks, blocks, evolve, score
from torch import Tensor, nn

from lotr_ext import CoreES, LoTRConfig, TaskBank, apply_lotr, mixed
from lotr_ext.model.adapted import adapted_layers
from nets import relative

WIDE = torch.float64


def directions(seed: int, generation: int, pair: int, numbers: int) -> Tensor:
    """As the class documents them."""
    key = np.array([seed, generation * 2**32 + pair], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(numbers, dtype=np.float32)).double()


def weights_of(rewards: list[float]) -> list[float]:
    """Centred ranks, one by one."""
    below = [sum(other < own for other in rewards) for own in rewards]
    equal = [sum(other == own for other in rewards) for own in rewards]
    return [(b + (e - 1) / 2) / (len(rewards) - 1) - 0.5 for b, e in zip(below, equal, strict=True)]


class Loop:
    """The same strategy written out: each member is a model of its own, all sums are Python's, Adam's formula is here."""

    def __init__(self, model: nn.Module, p: int, sigma: float, lr: float, optimizer: str, antithetic: bool, seed: int):
        self.model, self.p, self.sigma, self.lr, self.adam = model, p, sigma, lr, optimizer == "adam"
        self.antithetic, self.seed, self.t = antithetic, seed, 0
        self.cores = [layer.core for layer in adapted_layers(model).values()]
        self.mean = torch.zeros(sum(core.numel() for core in self.cores), dtype=WIDE)
        self.first, self.second = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    @torch.no_grad()
    def member(self, values: Tensor) -> nn.Module:
        model = copy.deepcopy(self.model)
        layers = adapted_layers(model).values()
        for layer, part in zip(layers, values.split([core.numel() for core in self.cores]), strict=True):
            layer.core.copy_(part.view(layer.core.shape))
        return model

    def step(self, reward: Callable[[nn.Module, int], float]) -> None:
        signs = [-1 if self.antithetic and i % 2 else 1 for i in range(self.p)]
        pairs = [i // 2 if self.antithetic else i for i in range(self.p)]
        e = [s * directions(self.seed, self.t, j, len(self.mean)) for s, j in zip(signs, pairs, strict=True)]
        rewards = [reward(self.member(self.mean + self.sigma * e_i), i) for i, e_i in enumerate(e)]
        g = sum(w * e_i for w, e_i in zip(weights_of(rewards), e, strict=True)) / (self.p * self.sigma)
        self.t += 1
        if self.adam:
            self.first, self.second = 0.9 * self.first + 0.1 * g, 0.999 * self.second + 0.001 * g * g
            g = self.first / (1 - 0.9**self.t) / ((self.second / (1 - 0.999**self.t)).sqrt() + 1e-8)
        self.mean = self.mean + self.lr * g


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_a_loop_over_members_in_float64(antithetic: bool, optimizer: str, ties: bool) -> None:
    model, bank = bank_of_blocks(WIDE, tasks=9)
    settings = {"lr": 0.05, "optimizer": optimizer, "antithetic": antithetic, "seed": 2**64 - 3}
    es, loop = CoreES(bank, 8, 0.3, **settings), Loop(model, 8, 0.3, **settings)
    x = torch.randn(8, 5, 12, dtype=WIDE, generator=torch.Generator().manual_seed(5))

    def by_member(member: nn.Module, i: int) -> float:
        with torch.no_grad():
            found = member(x[i : i + 1]).sin().mean().item()
        return round(found, 1) if ties else found

    for _ in range(3):
        with torch.no_grad(), mixed(model, es.ask()):
            rewards = model(x).sin().mean((1, 2))
        rewards = [round(reward, 1) for reward in rewards.tolist()] if ties else rewards
        assert not ties or len(set(rewards)) < 8
        es.tell(rewards)
        loop.step(by_member)
        got = torch.cat([core.flatten() for core in es.mean().values()])
        assert got.dtype == WIDE and relative(got, loop.mean) < 1e-12
    assert loop.mean.abs().max() > 0.01


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_reaches_the_maximum_of_a_quadratic(optimizer: str, antithetic: bool) -> None:
    torch.manual_seed(1)
    model = apply_lotr(nn.Sequential(nn.Linear(6, 5)), LoTRConfig(rank=(3, 2), target_modules=["0"]))
    bank = TaskBank(model, 64)
    target = torch.randn(3, 2)
    es = CoreES(bank, 64, 0.1, lr=0.1 if optimizer == "adam" else 1.0, optimizer=optimizer, antithetic=antithetic)
    start = target.norm()
    for step in range(80):
        es.optimizer.param_groups[0]["lr"] *= 0.96
        index = es.ask()
        es.tell(-(bank.cores[0].detach()[index] - target).square().sum((1, 2)))
        assert es.generation == step + 1
    assert (es.mean()["0.core"] - target).norm() < 0.05 * start


def test_maximises_what_has_no_gradient_over_compiled_code() -> None:
    """Accuracy by argmax, in inference mode, of a compiled model: one compilation serves all generations."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    model = apply_lotr(net, LoTRConfig(rank=8, scaling=4.0, target_modules=["0"]))
    bank = TaskBank(model, 32)
    es = CoreES(bank, 32, 0.3, lr=0.1)
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(6))
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    compiled, seen = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for generation in range(25):
        index = es.ask()
        stance = torch.compiler.set_stance("fail_on_recompile" if generation else "default")
        with stance, torch.inference_mode(), mixed(model, index.repeat_interleave(40)):
            right = compiled(x.repeat(32, 1)).argmax(1) == labels.repeat(32)
        es.tell(right.view(32, 40).sum(1))
        seen.append(right.double().mean().item())
    torch.compiler.reset()
    assert seen[-1] > seen[0] + 0.2


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_for_bit_that_of_one_piece(tmp_path: Path) -> None:
    whole, _ = evolve(generations=6)
    first, es = evolve(generations=3)
    es.ask()  # and interrupted before its tell
    torch.save(es.state_dict(), tmp_path / "state.pt")
    model, bank = bank_of_blocks(tasks=20)
    bank.add()  # other places than the first run's
    again = CoreES(bank, 8, 9.0, lr=9.0)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.generation == 3 and torch.equal(flat(again), first)
    with pytest.raises(RuntimeError, match="tell: expected a call of ask before it"):
        again.tell([0.0] * 8)
    resumed, _ = evolve(generations=3, es=again, model=model)
    assert torch.equal(resumed, whole) and not torch.equal(first, whole)


def flat(es: CoreES) -> Tensor:
    return torch.cat([core.flatten() for core in es.mean().values()])


def test_the_order_of_evaluation_and_the_threads_change_no_bit() -> None:
    want, _ = evolve()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(evolve()[0], want)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(evolve(order=[5, 2, 7, 0, 1, 6, 3, 4])[0], want)
    assert not torch.equal(evolve(seed=8)[0], want)


def test_ask_again_writes_the_same_members_and_nothing_else() -> None:
    model, bank = bank_of_blocks(tasks=12)
    other = bank.add({name: torch.randn(core.shape) for name, core in bank.cores_of(bank.add()).items()})
    before = {name: value.clone() for name, value in model.state_dict().items() if "lotr_tasks" not in name}
    kept = [core[: other + 1].clone() for core in bank.cores]
    es = CoreES(bank, 6, 0.5, lr=0.1, start=bank.cores_of(other))
    index = es.ask()
    assert index.tolist() == [2, 3, 4, 5, 6, 7] and len(bank) == 8
    members = [core.clone() for core in bank.cores]
    assert torch.equal(es.ask(), index)
    for core, once, old in zip(bank.cores, members, kept, strict=True):
        assert torch.equal(core, once) and torch.equal(core[: other + 1], old) and not core[8:].any()
        for plus, minus in zip(core[2:8:2], core[3:8:2], strict=True):
            torch.testing.assert_close((plus + minus) / 2, old[other])
            assert (plus - minus).abs().min() > 0
    es.tell(torch.arange(6))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(core[: other + 1], old) for core, old in zip(bank.cores, kept, strict=True))


@pytest.mark.parametrize("where", ["inference mode", "a default device"])
def test_the_state_of_the_caller_changes_no_bit(where: str) -> None:
    """Two generations inside, then two outside: no tensor of the strategy belongs to the caller's mode or device."""
    want, _ = evolve()
    model, bank = bank_of_blocks(tasks=8)
    es = CoreES(bank, 8, 0.3, lr=0.05, seed=7)
    versions = [core._version for core in bank.cores]
    for step in range(4):
        mode = torch.inference_mode() if where == "inference mode" else torch.device("meta")
        with mode if step < 2 else contextlib.nullcontext():
            index = es.ask()
        rewards = score(model, index)
        with mode if step < 2 else contextlib.nullcontext():
            es.tell(rewards)
    assert torch.equal(flat(es), want)
    assert all(core._version > before for core, before in zip(bank.cores, versions, strict=True))


def test_a_bank_made_in_inference_mode_evolves_in_either_mode() -> None:
    want, _ = evolve(generations=2)
    with torch.inference_mode():
        model, bank = bank_of_blocks(tasks=8)
        es = CoreES(bank, 8, 0.3, lr=0.05, seed=7)
    evolve(generations=1, es=es, model=model)
    with torch.inference_mode():
        assert torch.equal(evolve(generations=1, es=es, model=model)[0], want)


def test_a_generation_has_directions_of_its_own_and_of_the_scale_sigma() -> None:
    model = apply_lotr(nn.Sequential(nn.Linear(40, 40)), LoTRConfig(rank=32, target_modules=["0"]))
    bank = TaskBank(model, 40)
    es = CoreES(bank, 40, 0.25, lr=1e-30)
    seen = []
    for _ in range(2):
        seen.append(bank.cores[0].detach()[es.ask()][::2].flatten(1).clone())
        es.tell(torch.arange(40))
    e = torch.cat(seen) / 0.25
    assert abs(e.mean().item()) < 0.02 and abs(e.std().item() - 1) < 0.02
    alike = (e @ e.T / e.shape[1]).fill_diagonal_(0)  # 40 directions of 1,024 numbers
    assert alike.abs().max() < 5 / math.sqrt(1024)


def test_a_task_of_the_mean_is_saved_and_loaded(tmp_path: Path) -> None:
    _, es = evolve(generations=2)
    task = int(es.ask()[0])
    es.bank.replace(task, es.mean())
    es.bank.save(task, tmp_path / "task.safetensors")
    for core in es.mean().values():
        core.zero_()  # of a copy
    again = CoreES(bank_of_blocks(tasks=8)[1], 8, 0.1, lr=0.1, start=tmp_path / "task.safetensors")
    assert torch.equal(flat(again), flat(es))


# ---- other cores -----------------------------------------------------------------------------------------------------


def test_experts_evolve_a_core_for_each_expert() -> None:
    model = mixtures.adapted("Mixtral", WIDE, target_modules=["q_proj"])
    bank = TaskBank(model, 6)
    es = CoreES(bank, 4, 0.2, lr=0.1, optimizer="sgd")
    shapes = {core.shape for core in es.mean().values()}
    assert {len(shape) for shape in shapes} == {2, 3}
    with torch.no_grad(), mixed(model, es.ask()):
        logits = model(mixtures.IDS[:1].repeat(4, 1), use_cache=False).logits
    assert len({row.sum().item() for row in logits}) == 4
    es.tell(logits.sum((1, 2)))
    e = torch.stack([directions(0, 0, pair, flat(es).numel()) for pair in (0, 1)])
    weights = torch.tensor(weights_of(logits.sum((1, 2)).tolist()), dtype=WIDE)
    want = 0.1 * ((weights[0::2] - weights[1::2]) @ e) / (4 * 0.2)
    torch.testing.assert_close(flat(es), want)


@pytest.mark.parametrize("form", ["diagonal", "tucker", "train"])
def test_over_made_cores_the_members_are_dense(form: str) -> None:
    """The bank's cores are; the model's own stay as they are made."""
    torch.manual_seed(0)
    model = apply_lotr(blocks(), LoTRConfig(rank=4, core=form, group_by="width"))
    bank = TaskBank(model, 4)
    es = CoreES(bank, 4, 0.2, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lotr_tasks" not in name}
    with torch.no_grad(), mixed(model, es.ask()):
        y = model(torch.ones(4, 2, 12))
    es.tell(y.sum((1, 2)))
    assert all(core.shape == (4, 4) and (core != 0).all() for core in es.mean().values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_bank_in_half_precision_has_a_mean_in_float32() -> None:
    _, bank = bank_of_blocks(torch.bfloat16, tasks=4)
    es = CoreES(bank, 4, 0.5, lr=1e-4, optimizer="sgd")
    index = es.ask()
    es.tell([1, 2, 3, 4])
    assert all(core.dtype == torch.float32 and core.any() for core in es.mean().values())
    e = directions(0, 0, 1, flat(es).numel()).float() * -0.5
    assert torch.equal(torch.cat([core[index[3]].flatten() for core in bank.cores]), e.bfloat16())


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"population": 7}, ValueError, "population: expected at least 2 members, an even number"),
        ({"population": 1, "antithetic": False}, ValueError, "population: expected at least 2 members, got 1"),
        ({"population": 2.0}, TypeError, "population: expected an int, got float"),
        ({"population": 12}, ValueError, "population: expected at most 10 members in this process, .* got 12"),
        ({"sigma": 0.0}, ValueError, r"sigma: expected a number above 0, got 0\.0"),
        ({"sigma": float("nan")}, ValueError, "sigma: expected a finite number"),
        ({"lr": -1.0}, ValueError, "lr: expected a number above 0"),
        ({"optimizer": "lion"}, ValueError, 'optimizer: expected "adam" or "sgd", got'),
        ({"seed": -1}, ValueError, "seed: expected 0 to"),
        ({"seed": True}, TypeError, "seed: expected an int, got bool"),
        ({"start": {"0.q.core": torch.zeros(4, 3)}}, ValueError, "source: expected 8 cores"),
        ({"processes": (2, 2)}, ValueError, "processes: expected a number below 2"),
        ({"processes": 2}, TypeError, "processes: expected"),
        ({"processes": (0, 9)}, ValueError, "population: expected at least one member for each of 9"),
        ({"bank": nn.Linear(2, 2)}, TypeError, "bank: expected a TaskBank, got Linear"),
    ],
)
def test_refuses_an_argument_and_takes_no_place(settings: dict, error: type[Exception], message: str) -> None:
    _, bank = bank_of_blocks(tasks=10)
    given = {"bank": bank, "population": 8, "sigma": 0.1, "lr": 0.1, **settings}
    with pytest.raises(error, match=message):
        CoreES(**given)
    assert len(bank) == 0


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([0.0, float("nan"), *[1.0] * 6], ValueError, "rewards: expected numbers, got nan for member 1"),
        (torch.zeros(7), ValueError, r"rewards: expected shape \(8,\), one per member, got \(7,\)"),
        (torch.zeros(8, 1), ValueError, r"got \(8, 1\)"),
        (["good"] * 8, TypeError, "rewards: expected a tensor or a list of numbers, got list"),
        (torch.zeros(8, dtype=torch.complex64), TypeError, "rewards: expected real numbers"),
        (None, TypeError, "rewards: expected a tensor or a list of numbers, got NoneType"),
    ],
)
def test_refuses_rewards_and_stays_where_it_is(rewards: object, error: type[Exception], message: str) -> None:
    _, es = evolve(generations=1)
    es.ask()
    before = copy.deepcopy(es.state_dict())
    with pytest.raises(error, match=message):
        es.tell(rewards)
    assert es.generation == 1 and torch.equal(flat(es), before["mean"])
    es.tell([float("-inf"), *range(6), True])  # a failed member, and a bool beside numbers
    assert not torch.equal(flat(es), before["mean"])


def test_refuses_a_tell_before_ask_and_a_member_that_was_dropped() -> None:
    _, es = evolve(generations=1)
    with pytest.raises(RuntimeError, match="tell: expected a call of ask before it"):
        es.tell([0.0] * 8)
    es.bank.drop(int(es.ask()[3]))
    with pytest.raises(RuntimeError, match="ask: expected the members' slots in the bank"):
        es.ask()


def test_refuses_the_state_of_another_bank_or_population() -> None:
    _, es = evolve(generations=1)
    state = es.state_dict()
    _, others = bank_of_blocks(tasks=8, start=1)  # the same shapes over other factors
    _, narrow = bank_of_blocks(tasks=8, rank=2)
    _, own = bank_of_blocks(tasks=8)
    for bank, p, settings, message in (
        (others, 8, {}, "state: expected bank"),
        (narrow, 8, {}, "state: expected bank"),
        (own, 6, {}, "state: expected population 6, got 8"),
    ):
        other = CoreES(bank, p, 0.1, lr=0.1, **settings)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.generation == 0 and not flat(other).any()
    with pytest.raises(ValueError, match="state: expected optimizer SGD, got Adam"):
        CoreES(bank_of_blocks(tasks=8)[1], 8, 0.1, lr=0.1, optimizer="sgd").load_state_dict(state)
    with pytest.raises(TypeError, match="state: expected a dictionary from CoreES"):
        es.load_state_dict({"mean": state["mean"]})


def test_all_rewards_equal_is_no_step() -> None:
    _, bank = bank_of_blocks(tasks=8)
    es = CoreES(bank, 8, 0.1, lr=0.1)
    es.ask()
    es.tell(torch.ones(8))
    assert not flat(es).any()


def test_score_of_the_members_is_that_of_the_helper() -> None:
    """The helper's reward depends on every core, or the tests above would show little."""
    model, bank = bank_of_blocks(tasks=8)
    es = CoreES(bank, 8, 0.3, lr=0.05)
    index = es.ask()
    first = score(model, index)
    for core in bank.cores:
        core.data[index[0]] += 0.5
        second = score(model, index)
        assert second[0] != first[0] and torch.equal(second[1:], first[1:])
        first = second
