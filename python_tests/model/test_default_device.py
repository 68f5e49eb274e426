"""Work on a model that is on a CPU, inside `with torch.device("meta")`: each public function gives what it gives outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import IDS, Toy, adapted, toy

from lotr_ext import (
    LoTRConfig,
    LoTRFactors,
    TaskBank,
    add_adapter,
    apply_lotr,
    explain,
    init_from_gradient,
    load_adapter,
    lotr_grouped_linear,
    lotr_linear,
    merge,
    mixed,
    save_adapter,
    set_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from lotr_ext.cores import TuckerCores
from lotr_ext.interop import export_lora, lora_factors, lora_to_lotr, lotr_to_lora
from lotr_ext.layers import tuning

Inside = Callable[[], AbstractContextManager]
X, INDEX = (torch.randn(200, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([1, -1, 0, 1]))
CONFIG = LoTRConfig(rank=4, target_modules=["q", "v"])


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().mean()


def step(model: nn.Module) -> list[Tensor]:
    """The output and all gradients of one step."""
    model.zero_grad()
    out = model(IDS)
    out.square().sum().backward()
    return [out, *(p.grad for p in model.parameters() if p.grad is not None)]


def state(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def new(**settings) -> Callable[[Inside, Path], list[Tensor]]:
    def run(inside: Inside, _: Path) -> list[Tensor]:
        model = toy()
        given = {"batches": [IDS], "loss": loss} if settings.get("init") == "gradient" else {}
        with inside():
            apply_lotr(model, LoTRConfig(**{"rank": 4, "target_modules": ["q", "v"], **settings}), **given)
            return [*state(model), *step(model)]

    return run


def start_from_gradient(inside: Inside, _: Path) -> list[Tensor]:
    model = adapted(random=False, group_by="width")
    with inside():
        return state(init_from_gradient(model, [IDS], loss))


def second_adapter(inside: Inside, _: Path) -> list[Tensor]:
    model = adapted(dropout=0.2)
    with inside():
        for config in (CONFIG, LoTRConfig(rank=3, target_modules=["q", "v"], core="tucker")):
            add_adapter(model, f"rank {config.rank}", config)
            set_adapter(model, f"rank {config.rank}")
        return [*state(model), *step(model)]


def tasks_by_row(inside: Inside, path: Path) -> list[Tensor]:
    model = adapted()
    with inside():
        bank = TaskBank(model, 3)
        first = bank.add()
        bank.save(first, path / "task.safetensors")
        bank.add({f"{name}.core": torch.full((4, 4), 0.5, device="cpu") for name in bank._layers})
        bank.replace(first, path / "task.safetensors")
        with mixed(model, INDEX):
            return [bank.taken, *step(model)]


def adapters_by_row(inside: Inside, _: Path) -> list[Tensor]:
    model = adapted()
    with inside():
        add_adapter(model, "other", share_factors="default")
        with mixed(model, ["default", None, "other", "default"]):
            return step(model)


def files(inside: Inside, path: Path) -> list[Tensor]:
    model, other, third = adapted(core="few"), toy(), adapted()
    with inside():
        save_adapter(model, path / "few")
        load_adapter(other, path / "few")
        export_lora(third, path / "lora")
        lora_to_lotr(path / "lora", rank=6).save(path / "back")
        lotr_to_lora(path / "back", path / "again")
        found = [t for layer in (third.blocks[0].q, third.blocks[1].v) for t in lora_factors(layer)]
        found += [*state(other), *step(other)]
    return [*found, *state(load_adapter(toy(), path / "back"))]


def merging(inside: Inside, _: Path) -> list[Tensor]:
    model, other = adapted(), adapted(init="svd")
    with inside():
        merged = merge(model)(IDS)
        return [merged, *state(unmerge(model)), *state(unload(other, merge=True))]


def functions(inside: Inside, _: Path) -> list[Tensor]:
    factors, core, weight = LoTRFactors(16, 24, 4), torch.full((4, 4), 0.5), torch.full((24, 16), 0.1)
    x, offs = X.clone().requires_grad_(), torch.tensor([80, 200], dtype=torch.int32)
    experts, cores = torch.full((2, 24, 16), 0.1), torch.full((2, 4, 4), 0.5)
    with inside():
        y = lotr_linear(x, weight, None, factors.A, factors.B, core, 1.0, dropout_p=0.5)
        y = y + lotr_grouped_linear(x, experts, offs, factors.A, factors.B, cores, 1.0)
        y.square().sum().backward()
        model = adapted_on_cpu()
        assert explain(model.blocks[0].q, X) and str(trainable_summary(model))
    return [y, x.grad, factors.A.grad, factors.B.grad]


def adapted_on_cpu() -> Toy:
    with torch.device("cpu"):
        return adapted()


def timed(inside: Inside, _: Path) -> list[Tensor]:
    model = adapted()
    with inside():
        for problem in tuning.problems_of(model.blocks[0].q, 256):
            assert set(tuning.measure(problem).seconds) == {"two_pass", "beta"}
    return []


CASES: dict[str, Callable[[Inside, Path], list[Tensor]]] = {
    **{f"core {core}": new(core=core) for core in ("dense", "diagonal", "cp", "tucker", "train", "few")},
    "core custom": new(core=lambda places, rank: TuckerCores(places, rank, 2)),
    "core identity": new(core="tucker", core_init="identity"),
    **{f"init {init}": new(init=init) for init in ("orthonormal", "normal", "kaiming", "svd", "gradient")},
    **{f"init {init}, beyond the width": new(init=init, rank=20) for init in ("svd", "gradient")},
    "width": new(group_by="width", target_modules=["q", "up", "down"], init="gradient"),
    "dropout": new(dropout=0.3),
    "init_from_gradient": start_from_gradient,
    "add_adapter": second_adapter,
    "TaskBank": tasks_by_row,
    "mixed": adapters_by_row,
    "files": files,
    "merge": merging,
    "functions": functions,
    "tune": timed,
}


@pytest.mark.parametrize("name", CASES)
def test_another_default_device_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    found = []
    for place, inside in (("outside", nullcontext), ("inside", lambda: torch.device("meta"))):
        folder = tmp_path / place
        folder.mkdir()
        torch.manual_seed(1)
        found.append(CASES[name](inside, folder))
    want, got = found
    assert len(got) == len(want) and all(t.device.type == "cpu" for t in got)
    assert all(torch.equal(one, other) for one, other in zip(got, want))
