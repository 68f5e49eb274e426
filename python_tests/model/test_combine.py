"""Weighted sums: of a bank's tasks and of named adapters, against sums of their deltas in float64 and PEFT's definitions."""

from __future__ import annotations

import pytest
import torch
from mixtures import mixture
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import IDS, adapted, randomize

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    active_adapter,
    adapter_names,
    add_adapter,
    apply_lotr,
    combine,
    load_adapter,
    merge,
    mixed,
    save_adapter,
    set_adapter,
    unload,
)
from lotr_ext.interop import export_lora
from lotr_ext.model.adapted import adapted_layers

WEIGHTS = {"default": 0.7, "fr": -0.3, "de": 1.5}


def random_parked(model: nn.Module) -> None:
    """Values that matter for all parked adapters, heads apart."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.lotr_parked.named_parameters():
            if ".saved." not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_adapters(dtype: torch.dtype = torch.float64, *, shared: bool = True, form: str = "dense", **settings) -> nn.Module:
    """Adapters "default", "fr" and "de" with values that matter and scalings of their own; "fr" over other factors unless
    shared, "de" always over those of "default"."""
    model = adapted(rank=(4, 3), target_modules=["q", "v", "up"], scaling=2.0, adapter_dtype=dtype, **settings)
    own = {"adapter_dtype": dtype, "core": form}
    fr = LoTRConfig(rank=(4, 3) if shared else (2, 5), scaling=0.5, train=("core",), **own)
    add_adapter(model, "fr", fr, share_factors="default" if shared else None)
    add_adapter(model, "de", LoTRConfig(rank=(4, 3), scaling=1.25, train=("core",), **own), share_factors="default")
    random_parked(model)
    return model.double() if dtype == torch.float64 else model


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    before = active_adapter(model)
    set_adapter(model, name)
    found = {layer: m.delta_weight().double() for layer, m in adapted_layers(model).items()}
    set_adapter(model, before)
    return found


def summed(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    own = {name: deltas(model, name) for name in weights}
    return {layer: sum(w * own[name][layer] for name, w in weights.items()) for layer in adapted_layers(model)}


def relative(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


# ---- tasks of a bank -------------------------------------------------------------------------------------------------


def bank_of_tasks(dtype: torch.dtype = torch.float32, places: int = 5) -> tuple[nn.Module, TaskBank, list[dict[str, Tensor]]]:
    model = adapted(rank=(4, 3), target_modules=["q", "v", "up"], scaling=2.0).to(dtype)
    bank, generator = TaskBank(model, places), torch.Generator().manual_seed(1)
    layers = adapted_layers(model)
    tasks = [{f"{n}.core": torch.randn(4, 3, generator=generator) for n in layers} for _ in range(3)]
    for task in tasks:
        bank.add(task)
    return model, bank, [bank.cores_of(i) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_sum_of_tasks_is_exact(dtype) -> None:
    """To the rounding of one cast, whatever the order of the tasks."""
    _, bank, tasks = bank_of_tasks(dtype)
    place = bank.combine({2: 0.7, 0: -1.25})
    assert place == 3 and len(bank) == 4
    for name, core in bank.cores_of(place).items():
        want = 0.7 * tasks[2][name].double() - 1.25 * tasks[0][name].double()
        assert core.dtype == dtype and torch.equal(core, want.to(dtype)), name


def test_rows_of_a_sum_have_the_summed_adapters() -> None:
    """The layers' adapters add up, so one layer's output is the weighted sum of those of its tasks."""
    torch.manual_seed(0)
    model = apply_lotr(nn.Sequential(nn.Linear(6, 9)), LoTRConfig(rank=(4, 3), target_modules=["0"])).double()
    bank = TaskBank(model, 3)
    tasks = [bank.add({"0.core": torch.randn(4, 3)}) for _ in range(2)]
    both, x = bank.combine({tasks[0]: 0.5, tasks[1]: 2.0}), torch.randn(1, 6, dtype=torch.float64)
    with mixed(model, torch.tensor([0, 1, both, -1])):
        first, second, summed, base = model(x.expand(4, 6))
    torch.testing.assert_close(summed - base, 0.5 * (first - base) + 2.0 * (second - base), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("density", [0.3, 0.55, 1.0, 0.01])
@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune"])
@pytest.mark.filterwarnings("ignore:The density")
def test_methods_are_those_of_peft(method: str, density: float) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    _, bank, tasks = bank_of_tasks()
    place = bank.combine({0: 0.7, 2: -0.4, 1: 1.5}, method, density=density, seed=11)
    torch.manual_seed(11)  # PEFT draws from the global generator
    run = getattr(theirs, "dare_linear" if method == "dare" else method)
    for name, core in bank.cores_of(place).items():
        want = run([tasks[i][name] for i in (0, 2, 1)], torch.tensor([0.7, -0.4, 1.5]), density)
        torch.testing.assert_close(core, want, rtol=1e-6, atol=1e-7)


def test_dare_repeats_with_its_seed_and_keeps_the_sum_in_expectation() -> None:
    _, bank, tasks = bank_of_tasks(torch.float64, places=400)
    weights = {0: 0.5, 1: 1.0}
    one, same, other = (bank.combine(weights, "dare", density=0.5, seed=seed) for seed in (1, 1, 2))
    name = next(iter(tasks[0]))
    assert torch.equal(bank.cores_of(one)[name], bank.cores_of(same)[name])
    assert not torch.equal(bank.cores_of(one)[name], bank.cores_of(other)[name])
    drawn = torch.stack([bank.cores_of(bank.combine(weights, "dare", density=0.5, seed=seed))[name] for seed in range(300)])
    want = 0.5 * tasks[0][name] + tasks[1][name]
    assert ((drawn.mean(0) - want).abs() < 5 * drawn.std(0) / 300**0.5).all()


def test_tasks_over_experts_are_summed() -> None:
    model = apply_lotr(mixture(), LoTRConfig(rank=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    bank = TaskBank(model, 3)
    for seed in range(2):
        cores = bank.cores_of(bank.add())
        bank.replace(seed, {n: torch.randn(c.shape, generator=torch.Generator().manual_seed(seed)) for n, c in cores.items()})
    place = bank.combine({0: 2.0, 1: -0.5})
    for name, core in bank.cores_of(place).items():
        torch.testing.assert_close(core, 2.0 * bank.cores_of(0)[name] - 0.5 * bank.cores_of(1)[name])


@pytest.mark.parametrize(
    ("tasks", "options", "error", "match"),
    [
        ({}, {}, ValueError, "tasks: expected at least one with its weight, got none"),
        ([0, 1], {}, TypeError, "tasks: expected a mapping to weights, got list"),
        ({0: float("nan")}, {}, ValueError, r"tasks\[0\]: expected a finite number, got nan"),
        ({0: "1"}, {}, TypeError, r"tasks\[0\]: expected a number, got str"),
        ({0: 1.0, 3: 1.0}, {}, ValueError, "task: expected a task of the bank, as add returned it, got 3"),
        ({"a": 1.0}, {}, TypeError, "task: expected an int, got str 'a'"),
        ({0: 1.0}, {"method": "mean"}, ValueError, "method: expected one of linear, ties, .*, got 'mean'"),
        ({0: 1.0}, {"density": 0.5}, ValueError, 'density: expected None with "linear"'),
        ({0: 1.0}, {"method": "ties"}, ValueError, 'density: expected the fraction of elements that "ties" keeps, got None'),
        ({0: 1.0}, {"method": "dare", "density": 0}, ValueError, r"density: expected a number in \(0, 1\], got 0"),
        ({0: 1.0}, {"method": "ties", "density": 1.01}, ValueError, r"density: expected a number in \(0, 1\], got 1.01"),
        ({0: 1.0}, {"method": "ties", "density": float("nan")}, ValueError, "density: expected a finite number, got nan"),
        ({0: 1.0}, {"method": "dare", "density": 0.5, "seed": 0.5}, TypeError, "seed: expected an int, got float"),
        ({0: 1.0}, {"method": "dare", "density": 0.5, "seed": -1}, ValueError, "seed: expected an int in"),
    ],
)
def test_a_bank_refuses(tasks, options, error, match: str) -> None:
    _, bank, _ = bank_of_tasks()
    before = [core.clone() for core in bank.cores]
    with pytest.raises(error, match=match):
        bank.combine(tasks, **options)
    assert len(bank) == 3 and all(torch.equal(core, old) for core, old in zip(bank.cores, before))


def test_a_full_bank_refuses() -> None:
    _, bank, _ = bank_of_tasks(places=3)
    with pytest.raises(RuntimeError, match="add: expected a free slot, got 3 that are all taken"):
        bank.combine({0: 1.0})


# ---- named adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ["default", "fr"])
@pytest.mark.parametrize("form", ["dense", "few"])
@pytest.mark.parametrize("shared", [True, False], ids=["same factors", "different factors"])
def test_a_sum_of_adapters_is_the_sum_of_their_deltas(shared: bool, form: str, active: str) -> None:
    model = with_adapters(shared=shared, form=form)
    set_adapter(model, active)
    before, want = model(IDS), summed(model, WEIGHTS)
    errors = combine(model, WEIGHTS, name="all")
    assert set(errors.values()) == {0.0} and adapter_names(model)[-1] == "all" and active_adapter(model) == active
    assert torch.equal(model(IDS), before)
    assert max(relative(deltas(model, "all"), want).values()) < 1e-14
    numbers = sum(p.numel() for p in model.lotr_parked["all"].parameters())
    r_in, r_out = (4, 3) if shared else (6, 8)
    factors = 0 if shared else (16 + 16) * r_in + (16 + 32) * r_out
    assert numbers == 6 * r_in * r_out + factors
    set_adapter(model, "all")
    assert next(iter(adapted_layers(model).values())).scaling == 2.0  # that of the first


def test_adapters_over_two_sets_of_factors_have_their_ranks_once() -> None:
    """Two adapters over one set and one over another: r_1 + r_2, not 2 r_1 + r_2."""
    model = with_adapters(shared=False)
    combine(model, {"fr": 1.0, "de": 2.0, "default": -0.5}, name="all")
    assert model.lotr_parked["all"].config.rank == (6, 8)
    want = summed(model, {"all": 1.0, "fr": 2.0, "de": 1.0})
    add_adapter(model, "it", LoTRConfig(rank=2, adapter_dtype=torch.float64))
    combine(model, {"all": 1.0, "fr": 2.0, "it": 1.0, "de": 1.0}, name="three")  # "it" adds nothing yet
    assert model.lotr_parked["three"].config.rank == (6 + 2 + 2 + 4, 8 + 5 + 2 + 3)
    assert max(relative(deltas(model, "three"), want).values()) < 1e-14


def test_a_sum_with_factors_by_width() -> None:
    model = adapted(rank=4, target_modules=["q", "up", "down"], group_by="width", adapter_dtype=torch.float64).double()
    add_adapter(model, "other", LoTRConfig(rank=(3, 5), scaling=0.5, adapter_dtype=torch.float64))
    random_parked(model)
    want = summed(model, {"default": 1.5, "other": -0.5})
    combine(model, {"default": 1.5, "other": -0.5}, name="both")
    assert max(relative(deltas(model, "both"), want).values()) < 1e-14
    with pytest.raises(ValueError, match='rank: expected None with group_by="width"'):
        combine(model, {"default": 1.0, "other": 1.0}, name="small", rank=2)


def test_sums_of_experts() -> None:
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    model = apply_lotr(mixture().double(), LoTRConfig(rank=4, adapter_dtype=torch.float64, **settings))
    randomize(model)
    add_adapter(model, "other", LoTRConfig(rank=2, adapter_dtype=torch.float64, scaling=3.0))
    random_parked(model)
    weights = {"default": 0.5, "other": 1.5}
    want = summed(model, weights)
    combine(model, weights, name="both")
    assert max(relative(deltas(model, "both"), want).values()) < 1e-14
    errors = combine(model, weights, name="small", rank=3)
    got = relative(deltas(model, "small"), want)
    assert all(abs(got[layer] - error) < 1e-10 and 1e-3 < error < 1 for layer, error in errors.items())


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_of_adapters_uses_their_scaled_cores(method: str) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    model = with_adapters(torch.float32)
    own = {name: [] for name in WEIGHTS}
    for name, cores in own.items():
        set_adapter(model, name)
        cores += [layer.scaling * layer.core.detach() for layer in adapted_layers(model).values()]
    combine(model, WEIGHTS, name="all", method=method, density=0.4, seed=5)
    set_adapter(model, "all")
    torch.manual_seed(5)
    for i, layer in enumerate(adapted_layers(model).values()):
        want = getattr(theirs, method)([own[name][i] for name in WEIGHTS], torch.tensor(list(WEIGHTS.values())), 0.4)
        torch.testing.assert_close(layer.scaling * layer.core, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, (2, 3), (5, 4), (6, 8)])
def test_a_compressed_sum_and_its_errors(rank) -> None:
    """Each error is that of the deltas; over a group it lies between the bounds of the two unfoldings' singular values."""
    model = with_adapters(shared=False)
    want = summed(model, WEIGHTS)
    errors = combine(model, WEIGHTS, name="small", rank=rank)
    got = deltas(model, "small")
    assert all(abs(relative(got, want)[layer] - error) < 1e-10 for layer, error in errors.items())
    r_in, r_out = (rank, rank) if isinstance(rank, int) else rank
    for names in ([n for n in want if "up" in n], [n for n in want if "up" not in n]):
        stack = [want[name] for name in names]
        tails = [
            float(torch.linalg.svdvals(torch.cat(side, 1))[r:].square().sum())
            for side, r in (([d.T for d in stack], r_in), (stack, r_out))
        ]
        lost = sum(float((got[name] - want[name]).square().sum()) for name in names)
        total = sum(float(d.square().sum()) for d in stack)
        assert max(tails) - 1e-12 * total <= lost <= sum(tails) + 1e-12 * total
    if rank == (6, 8):
        assert max(errors.values()) < 1e-10


def test_a_sum_is_saved_loaded_merged_and_exported_as_any_adapter(tmp_path) -> None:
    for shared in (True, False):
        model, folder = with_adapters(torch.float32, shared=shared), tmp_path / str(shared)
        combine(model, WEIGHTS, name="all")
        want = model(IDS), set_adapter(model, "all")(IDS)
        assert (want[0] - want[1]).abs().max() > 1e-2
        save_adapter(model, folder / "lotr", name="all")
        export_lora(model, folder / "lora")
        assert torch.allclose(merge(model)(IDS), want[1], atol=1e-5)
        bare = unload(with_adapters(torch.float32, shared=shared), merge=False)
        assert torch.equal(load_adapter(bare, folder / "lotr")(IDS), want[1])
        lora, found = load_file(folder / "lora" / "adapter_model.safetensors"), deltas(load_adapter(
            unload(with_adapters(torch.float32, shared=shared), merge=False), folder / "lotr"), "default")  # fmt: skip
        for layer, delta in found.items():
            A, B = (lora[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "AB")
            scaling = 2.0
            assert (scaling * B @ A - delta).norm() < 1e-5 * delta.norm(), layer


def test_a_sum_over_the_same_factors_is_a_row_of_a_mixed_batch() -> None:
    model = with_adapters()
    combine(model, WEIGHTS, name="all")
    with mixed(model, ["all", None, "de", "default"]):
        rows = model(IDS)
    set_adapter(model, "all")
    torch.testing.assert_close(rows[:1], model(IDS[:1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("adapters", "options", "error", "match"),
    [
        ({}, {}, ValueError, "adapters: expected at least one with its weight, got none"),
        ("default", {}, TypeError, "adapters: expected a mapping to weights, got str"),
        ({"default": float("inf")}, {}, ValueError, r"adapters\['default'\]: expected a finite number, got inf"),
        ({"default": 1.0, "it": 1.0}, {}, ValueError, "adapters: expected one of default, fr, de, got 'it'"),
        ({3: 1.0}, {}, TypeError, "adapters: expected the name of an adapter, got int 3"),
        ({"default": 1.0}, {"name": "fr"}, ValueError, "name: expected a new name, got 'fr'"),
        ({"default": 1.0}, {"name": "a.b"}, ValueError, "name: expected a name without dots"),
        ({"default": 1.0}, {"method": "max"}, ValueError, "method: expected one of linear"),
        ({"default": 1.0, "fr": 1.0}, {"method": "ties", "density": 0.5}, ValueError, 'method: expected "linear" for adapters'),
        ({"default": 1.0, "de": 1.0}, {"method": "dare", "density": 0.5, "rank": 2}, ValueError, 'method: expected "linear"'),
        ({"default": 1.0, "fr": 1.0}, {"rank": 7}, ValueError, r"rank: expected at most \(6, 8\), at which the sum is exact"),
        ({"default": 1.0, "fr": 1.0}, {"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
    ],
)
def test_combine_refuses_and_changes_nothing(adapters, options, error, match: str) -> None:
    model = with_adapters(torch.float32, shared=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        combine(model, adapters, **{"name": "new", **options})
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_combine_refuses_different_heads_and_merged_adapters() -> None:
    model = with_adapters(torch.float32, modules_to_save=["head"])
    combine(model, WEIGHTS, name="all")  # the heads are equal so far
    set_adapter(model, "fr")
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(ValueError, match="adapters: expected modules_to_save with the same values"):
        combine(model, WEIGHTS, name="again")
    combine(model, {"fr": 2.0}, name="twice")
    set_adapter(model, "twice")
    set_adapter(model, "default")
    assert torch.equal(model.lotr_parked["twice"].saved[0], model.lotr_parked["fr"].saved[0])
    with pytest.raises(RuntimeError, match="add_adapter: expected unmerged"):
        combine(merge(model), {"default": 1.0}, name="third")
