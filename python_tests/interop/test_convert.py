"""Conversion to LoTR and back: against the real PEFT, against dense deltas, against the original's three lines."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft_toys import Conv1D, ConvToy, peft
from safetensors.torch import save_file
from tiny_models import bert
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys import IDS, Largest, adapted, no_warnings, randomize, refused, toy

from lotr_ext import load_adapter, save_adapter
from lotr_ext.convert import main
from lotr_ext.interop import export_lora, lora_to_lotr, lotr_to_lora, original_to_lotr, read_lora
from lotr_ext.interop.from_lora import _smallest_rank
from lotr_ext.interop.tucker import LowRankStack
from lotr_ext.layers.init import tucker2
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.adapter_files import read

MAKE = {"toy": toy, "conv": ConvToy}
LORAS = {
    "q and v": ("toy", {"target_modules": ["q", "v"]}),
    "two groups": ("toy", {"target_modules": ["q", "k", "up"], "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        "toy",
        {
            "target_modules": ["q", "v"],
            "rank_pattern": {"v": 3, r"^blocks\.0\.q": 1},
            "alpha_pattern": {"blocks.1.v": 9, "q": 0.5},
        },
    ),
    "modules_to_save": ("toy", {"target_modules": ["q"], "modules_to_save": ["head"]}),
    "conv1d": ("conv", {"target_modules": ["up", "down"], "fan_in_fan_out": True}),
}


def lora(directory: Path, kind: str = "toy", **settings) -> nn.Module:
    """A PEFT LoRA adapter of rank 2 with values that matter, saved; returns the model with it."""
    model = peft.get_peft_model(MAKE[kind]().eval(), peft.LoraConfig(**{"r": 2, **settings})).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.save_pretrained(directory)
    return model


def deltas(source: Path) -> dict[str, Tensor]:
    """What a saved LoTR adapter adds to each weight, dense in float64."""
    manifest, tensors = read(source)
    return {
        name: e.scaling
        * tensors[f"{e.factors}.B"].double()
        @ tensors[f"{name}.core"].double().T
        @ tensors[f"{e.factors}.A"].double().T
        for name, e in manifest.layers.items()
    }


def lora_deltas(model: nn.Module) -> dict[str, Tensor]:
    """The same of a PEFT LoRA model, by PEFT itself."""
    found = {}
    for name, m in model.base_model.model.named_modules():
        if isinstance(m, peft.tuners.lora.LoraLayer):
            delta = m.get_delta_weight("default").detach().double()
            found[name] = delta.T if isinstance(m.get_base_layer(), Conv1D) else delta
    return found


# ---- LoRA to LoTR ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LORAS)
def test_s_adapters_of_rank_r_are_exact_at_rank_s_r(case, tmp_path):
    kind, settings = LORAS[case]
    truth = lora(tmp_path / "lora", kind, **settings)
    count = max(sum(layer.rank for layer in read_lora(tmp_path / "lora").layers.values()), 8)
    found = lora_to_lotr(tmp_path / "lora", rank=count)
    assert max(found.errors.values()) < 1e-12 and max(found.group_errors.values()) < 1e-12
    found.save(tmp_path / "lotr")
    model = load_adapter(MAKE[kind]().eval(), tmp_path / "lotr").eval()
    assert torch.allclose(model(IDS), truth(IDS), atol=2e-5) and (truth(IDS) - MAKE[kind]()(IDS)).abs().max() > 0.01
    assert set(adapted_layers(model)) == set(found.layers) == set(lora_deltas(truth))
    assert model.lotr_config.modules_to_save == (("head",) if case == "modules_to_save" else None)


@pytest.mark.parametrize("size", [{"rank": 3}, {"rank": (5, 2)}, {"error": 0.4}, {"parameters": 300}, {"rank": 20}])
@pytest.mark.parametrize("case", ["q and v", "two groups", "patterns"])
def test_errors_are_those_of_the_dense_deltas_and_no_worse_than_dense_tucker(case, size, tmp_path):
    want = lora_deltas(lora(tmp_path / "lora", **LORAS[case][1]))
    found = lora_to_lotr(tmp_path / "lora", **size, dtype=torch.float64)
    found.save(tmp_path / "lotr")
    got = deltas(tmp_path / "lotr")
    for name, delta in want.items():
        assert abs(float((got[name] - delta).norm() / delta.norm()) - found.errors[name]) < 2e-6
    rank = found.rank if isinstance(found.rank, tuple) else (found.rank, found.rank)
    for group, names in found.groups.items():
        stack = [want[name] for name in names]
        A, B, cores = tucker2(stack, rank, max_iterations=100, tolerance=1e-9)
        dense = sum(float((w - B @ core.T @ A.T).square().sum()) for w, core in zip(stack, cores, strict=True))
        norm = sum(float(w.square().sum()) for w in stack)
        assert found.group_errors[group] < (dense / norm) ** 0.5 + 1e-4
    sizes = found.tensors[f"lotr_factors.{next(iter(found.groups))}.A"].shape
    assert sizes == (16, rank[0]) and found.parameters == sum(t.numel() for t in found.tensors.values())


def test_the_rank_for_an_error_is_the_smallest_and_for_a_budget_the_largest(tmp_path):
    lora(tmp_path, target_modules=["q", "k", "v", "up"])
    errors = {r: max(lora_to_lotr(tmp_path, rank=r).group_errors.values()) for r in range(1, 12)}
    assert sorted(errors.values(), reverse=True) == list(errors.values()) and errors[11] > 1e-3
    for r, error in errors.items():  # what a rank reaches is reached by no smaller one
        found = lora_to_lotr(tmp_path, error=error * 1.001)
        assert found.rank == r and max(found.group_errors.values()) <= error * 1.001
    for budget in (88, 500, 501, 2000):
        found = lora_to_lotr(tmp_path, parameters=budget)
        larger = lora_to_lotr(tmp_path, rank=found.rank + 1)
        assert found.parameters <= budget < larger.parameters
    assert lora_to_lotr(tmp_path, parameters=88).parameters == 88  # (16 + 16) + (16 + 32) + 8


def test_bounds_of_the_rank_hold_for_any_stack():
    for seed in range(12):
        torch.manual_seed(seed)
        pairs = [(torch.randn(9, r), torch.randn(7, r) * 10.0**-seed) for r in (1, 2, 3)]
        stack = LowRankStack(pairs[: 1 + seed % 3])
        for error in (1e-3, 0.2, 0.6):
            low, high = stack.rank_bounds(error)
            assert 1 <= low <= high <= stack.full_rank and stack.factorise((high, high)).error <= error + 1e-9
            assert low == 1 or stack.factorise((low - 1, low - 1)).error > error
    one = LowRankStack([(torch.randn(9, 3), torch.randn(7, 3))])
    assert one.rank_bounds(1e-6) == (3, 3) and one.full_rank == 3


def test_bisection_finds_what_a_scan_of_all_ranks_finds():
    for seed in range(4):
        torch.manual_seed(seed)
        stack = LowRankStack([(torch.randn(24, 3), torch.randn(20, 3)) for _ in range(5)])
        errors = [stack.factorise((r, r)).error for r in range(1, stack.full_rank + 1)]
        for error in (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            scan = 1 + next(i for i, e in enumerate(errors) if e <= error)
            assert _smallest_rank(stack, error, 1, lambda r: None) == scan
            assert _smallest_rank(stack, error, scan + 2, lambda r: None) == scan + 2


def test_a_classifier_of_peft_names_heads_that_the_model_does_not_have(tmp_path: Path) -> None:
    """PEFT writes both "classifier" and "score" into modules_to_save for the task SEQ_CLS."""
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    base = bert()
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "lora")
    assert set(json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"]) == {
        "classifier",
        "score",
    }
    lora_to_lotr(tmp_path / "lora", rank=8).save(tmp_path / "lotr")
    again = load_adapter(base, tmp_path / "lotr").eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_zero_adapter_and_ranks_beyond_the_width(tmp_path):
    state = {f"{n}.lora_{p}.weight": torch.zeros(2, 5) if p == "A" else torch.zeros(4, 2) for n in "xy" for p in "AB"}
    for rank in (1, 7):
        found = lora_to_lotr(state, config={"r": 2, "lora_alpha": 2}, rank=rank)
        assert set(found.errors.values()) == {0.0} and all(t.isfinite().all() for t in found.tensors.values())
        A = found.tensors["lotr_factors.5x4.A"]
        assert A.shape == (5, rank) and torch.allclose(A[:, :5].T @ A[:, :5], torch.eye(min(5, rank)), atol=1e-6)


def test_a_lora_in_a_pickle_and_one_in_half_precision(tmp_path):
    model = lora(tmp_path / "lora", target_modules=["q", "v"])
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").is_file()
    model.half().save_pretrained(tmp_path / "half")
    want, pickled, half = (lora_to_lotr(tmp_path / name, rank=3) for name in ("lora", "bin", "half"))
    assert all(torch.equal(want.tensors[key], value) for key, value in pickled.tensors.items())
    assert {t.dtype for t in half.tensors.values()} == {torch.float32}
    assert all(abs(half.errors[name] - error) < 1e-2 for name, error in want.errors.items())


def test_groups_by_block_by_name_and_by_mapping(tmp_path):
    truth = lora(tmp_path, target_modules=["q", "v"])
    mapping = {name: f"block{name.split('.')[1]}" for name in lora_deltas(truth)}
    by_block = {"blocks_0_16x16", "blocks_1_16x16"}
    for group_by, groups in (("block", by_block), ("name", {"q_16x16", "v_16x16"}), (mapping, {"block0", "block1"})):
        found = lora_to_lotr(tmp_path, rank=4, group_by=group_by)
        assert set(found.groups) == groups and max(found.errors.values()) < 1e-12
        found.save(tmp_path / "lotr")
        assert torch.allclose(load_adapter(toy().eval(), tmp_path / "lotr")(IDS), truth(IDS), atol=2e-5)


def test_no_dense_delta_is_ever_formed():
    """32 layers of 2048 x 2048, r = 8: the largest tensor is that of all factors of one side, an eighth of one delta."""
    width, count, r = 2048, 32, 8
    basis = torch.randn(2, width, 2 * r)
    state = {}
    for i in range(count):
        state[f"l.{i}.lora_A.weight"] = (basis[0] @ torch.randn(2 * r, r) + 0.01 * torch.randn(width, r)).T
        state[f"l.{i}.lora_B.weight"] = basis[1] @ torch.randn(2 * r, r) + 0.01 * torch.randn(width, r)
    layers = read_lora(state, {"r": r, "lora_alpha": 16}).layers.values()
    assert LowRankStack([(layer.B, layer.A.T) for layer in layers]).full_rank == count * r
    with Largest() as largest:
        found = lora_to_lotr(state, config={"r": r, "lora_alpha": 16}, rank=16)
    assert largest.elements == width * count * r == width * width // 8
    assert found.group_errors["2048x2048"] < 0.02 and found.parameters < 0.1 * found.lora_parameters


# ---- LoTR to LoRA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": (3, 5), "target_modules": ["q", "up"], "alpha": 3.0, "modules_to_save": ["head", "0.norm"]},
        {"init": "svd", "alpha": 2.0},
    ],
)
def test_a_saved_lotr_adapter_becomes_a_lora(settings, tmp_path):
    model = adapted(**settings).eval()
    save_adapter(model, tmp_path / "lotr")
    layers = lotr_to_lora(tmp_path / "lotr", tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "lora")).eval()
    assert torch.allclose(other(IDS), model(IDS), atol=2e-5) and set(layers) == set(adapted_layers(model))
    rank = settings.get("rank", max(layer.rank for layer in layers.values()))
    back = lora_to_lotr(tmp_path / "lora", rank=rank)
    back.save(tmp_path / "back")
    assert torch.allclose(load_adapter(toy().eval(), tmp_path / "back")(IDS), model(IDS), atol=2e-5)


def test_patterns_tell_a_name_from_one_that_ends_with_it(tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.inner = nn.Linear(6, 6), nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})

        def forward(self, x):
            return self.inner["b"](torch.tanh(self.inner["a"](torch.tanh(self.a(x)))))

    ranks = {"a": 1, "inner.a": 2, "inner.b": 2}
    state = {}
    for name, r in ranks.items():
        state |= {f"{name}.lora_A.weight": torch.randn(r, 6), f"{name}.lora_B.weight": torch.randn(6, r)}
    pattern = {"r": 2, "lora_alpha": 4, "rank_pattern": {"^a": 1}, "alpha_pattern": {"^a": 3}}
    lora_to_lotr(state, config=pattern, rank=5).save(tmp_path / "lotr")
    model = load_adapter(Nested(), tmp_path / "lotr")
    for layer, scaling in zip(adapted_layers(model).values(), (3.0, 0.5, 0.5), strict=True):
        layer.scaling = scaling
    x = torch.randn(4, 6)
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 15, {}, {})
    assert torch.allclose(peft.PeftModel.from_pretrained(Nested(), str(tmp_path / "lora"))(x), model(x), atol=1e-5)


# ---- the original implementation -------------------------------------------------------------------------------------


class Original(nn.Module):
    """A layer with the names and the equation of the original implementation's LoTRLinear."""

    def __init__(self, linear: nn.Linear, shared: tuple[nn.Parameter, nn.Parameter], scale: float):
        super().__init__()
        self.linear, self.lotr, r = linear, nn.Module(), shared[0].shape[0]
        self.lotr.lhs, self.lotr.rhs = shared
        self.lotr.mid, self.scale = nn.Parameter(torch.randn(r, r)), scale / r

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.lotr.rhs @ self.lotr.mid @ self.lotr.lhs)


def original(scale: float, groups: dict[str, str]) -> nn.Module:
    """A toy with such layers. groups: containers by name ending."""
    model, containers = toy(), {}
    torch.manual_seed(5)
    for block in model.blocks:
        for name, container in groups.items():
            linear = getattr(block, name)
            shapes = (3, linear.out_features), (linear.in_features, 3)
            shared = containers.setdefault(container, tuple(nn.Parameter(0.3 * torch.randn(s)) for s in shapes))
            setattr(block, name, Original(linear, shared, scale))
    with torch.no_grad():
        model.head.bias += 1.0
    return model.eval()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("groups", "names"),
    [({"q": "one", "v": "one"}, {"16x16"}), ({"q": "one", "v": "two", "up": "three"}, {"16x16", "16x16_2", "16x32"})],
)
def test_an_original_checkpoint(groups, names, suffix, tmp_path):
    truth, path = original(2.0, groups), tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(truth.state_dict(), path)
    else:
        save_file({key: value.clone() for key, value in truth.state_dict().items()}, path)
    found = original_to_lotr(path, scale=2.0, modules_to_save=["head"])
    assert set(found.groups) == names
    found.save(tmp_path / "lotr")
    model = load_adapter(toy().eval(), tmp_path / "lotr")
    assert torch.allclose(model(IDS), truth(IDS), atol=1e-5) and (truth(IDS) - toy()(IDS)).abs().max() > 0.1
    assert sum(name.endswith((".A", ".B")) for name, _ in model.named_parameters()) == 2 * len(names)


def test_a_converted_adapter_on_the_wrong_model_changes_nothing(tmp_path):
    lora(tmp_path / "lora", target_modules=["q", "v"])
    lora_to_lotr(tmp_path / "lora", rank=4).save(tmp_path / "lotr")
    adapted_already = adapted(rank=3)
    randomize(adapted_already)
    for model in (toy(d=24), toy(layers=1), ConvToy(), adapted_already):
        with refused(model, ValueError, match="expected"):
            load_adapter(model, tmp_path / "lotr")


# ---- what speaks against a conversion --------------------------------------------------------------------------------


def unrelated(layers: int = 12, k: int = 40, r: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {
        f"m.{i}.{part}.weight": torch.randn(r, k) if part == "lora_A" else torch.randn(k, r)
        for i in range(layers)
        for part in ("lora_A", "lora_B")
    }


PLAIN = {"r": 2, "lora_alpha": 2}


def test_a_rank_that_loses_most_and_one_larger_than_the_lora_are_said():
    with pytest.warns(UserWarning, match=r"12 of 12 layers lose most .* rank 2 \(an error above 0.5; m\.\d+ has"):
        found = lora_to_lotr(unrelated(), config=PLAIN, rank=2)
    assert min(found.errors.values()) > 0.5
    with pytest.warns(UserWarning, match="has 8,832 parameters, more than the 1,920 of the LoRA") as caught:
        lora_to_lotr(unrelated(), config=PLAIN, rank=24)
    assert len(caught) == 1
    with no_warnings():
        one = unrelated(layers=1)
        lora_to_lotr({k.replace("m.0", f"m.{i}"): t for k, t in one.items() for i in range(12)}, config=PLAIN, rank=2)


@pytest.mark.parametrize(("layers", "rank"), [(12, 24), (30, 40)])  # the sum of the LoRA ranks, or the width
@pytest.mark.filterwarnings("ignore:lotr_ext. at rank")
def test_a_budget_above_the_exact_rank_gives_that_rank(layers: int, rank: int):
    found = lora_to_lotr(unrelated(layers), config=PLAIN, parameters=10**15)
    assert found.rank == rank and max(found.errors.values()) < 1e-6
    assert max(lora_to_lotr(unrelated(layers), config=PLAIN, rank=rank - 1).errors.values()) > 1e-3


def test_a_rank_that_nothing_can_use_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(ValueError, match="rank: expected at most 80, beyond which no group can use any, got 99999"):
        lora_to_lotr(unrelated(), config=PLAIN, rank=99999)
    with pytest.raises(ValueError, match=r"rank: expected at most 80, .*got \(3, 81\)"):
        lora_to_lotr(unrelated(), config=PLAIN, rank=(3, 81))
    lora(tmp_path / "lora", target_modules=["q", "v"])
    for rank, got in (("99999", "99999"), ("3,9", r"\(3, 9\)"), (str(10**30), "")):
        assert main(["lora-to-lotr", str(tmp_path / "lora"), str(tmp_path / "new"), "--rank", rank]) == 2
        assert re.search(rf"rank: expected at most .*{got}", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_low_ranks_cost_the_least_and_lose_nothing_by_it():
    """Beyond the sizes where everything is dense: products counted, and the error against iterations without end."""
    torch.manual_seed(0)
    basis = torch.randn(2, 700, 24)
    pairs = [[(b @ torch.randn(24, 16)) / 5 + 0.3 * torch.randn(700, 16) for b in basis] for _ in range(41)]
    stack = LowRankStack(pairs)
    assert stack.full_rank == 656
    costs = {}
    for r in (8, 24, 64):
        with FlopCounterMode(display=False) as counter:
            found = stack.factorise((r, r))
        costs[r] = counter.get_total_flops()
        assert found.iterations < 50
        if r == 8:
            best = stack.factorise((r, r), tolerance=-1.0)
            assert best.iterations == 100 and found.error < best.error + 1e-4
    assert costs[8] < costs[24] < costs[64]
