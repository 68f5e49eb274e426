"""Many LoRAs as one pair of factors a group and a bank of tasks: against dense deltas and their singular values in float64."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft_toys import peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import IDS, toy

from lotr_ext import TaskBank, load_adapter, lotr_parameters, mixed
from lotr_ext.convert import main
from lotr_ext.interop import LoRAAdapter, LoRALayer, lora_to_lotr, loras_to_bank, read_lora
from lotr_ext.interop.loras_to_bank import _Stream, names_of
from lotr_ext.interop.tucker import LowRankStack

SETTINGS = [
    {"r": 2},
    {"r": 3, "lora_alpha": 5, "use_rslora": True},
    {"r": 1, "lora_alpha": 0.5},
    {"r": 2, "alpha_pattern": {"v": 3}},
]
TARGETS = ["k", "v", "up"]  # two groups, whose order by name is not that of the model
TOTAL = 2 * 2 * (2 + 3 + 1 + 2)  # the sum of the LoRA ranks of k and v


def trained(settings: dict, seed: int, targets: list[str] = TARGETS) -> peft.PeftModel:
    model = peft.get_peft_model(toy().eval(), peft.LoraConfig(**{"target_modules": targets, **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four LoRAs of different ranks and scalings."""
    root = tmp_path_factory.mktemp("loras")
    found = [root / name for name in ("law", "art", "sea", "war")]
    for seed, (folder, settings) in enumerate(zip(found, SETTINGS)):
        trained(settings, seed).save_pretrained(folder)
    return found


def dense(folder: Path) -> dict[str, Tensor]:
    return {name: layer.scaling * layer.B.double() @ layer.A.double() for name, layer in read_lora(folder).layers.items()}


def kept(found, task: str) -> dict[str, Tensor]:
    """What a task adds to each weight."""
    parts = {name: t.double() for name, t in found.tensors.items()}
    deltas = {}
    for name, entry in found.layers.items():
        A, B = parts[f"{entry.factors}.A"], parts[f"{entry.factors}.B"]
        deltas[name] = entry.scaling * B @ found.tasks[task][f"{name}.core"].double().T @ A.T
    return deltas


@pytest.mark.parametrize("rank", [TOTAL, TOTAL + 3, (TOTAL, 40)])
def test_exact_from_the_sum_of_the_ranks_on(folders, rank) -> None:
    found = loras_to_bank(folders, rank=rank, dtype=torch.float64)
    assert list(found.tasks) == ["law", "art", "sea", "war"]
    for folder in folders:
        want, got = dense(folder), kept(found, folder.name)
        for layer in want:
            assert (got[layer] - want[layer]).norm() < 1e-10 * want[layer].norm()
            assert found.errors[folder.name][layer] < 1e-10


def test_factors_for_each_layer(folders, tmp_path) -> None:
    """Exact from the sum of the ranks of one layer's LoRAs on; saved and loaded as any grouping."""
    found = loras_to_bank(folders, rank=2 + 3 + 1 + 2, group_by="layer", dtype=torch.float64)
    assert len(found.groups) == 6 and max(found.task_errors.values()) < 1e-10
    found.save(tmp_path)
    bank = TaskBank(load_adapter(toy(), tmp_path), 4)
    assert len(bank.cores_of(bank.add(tmp_path / "sea.task.safetensors"))) == 6


def test_a_small_adapter_beside_large_ones_is_exact_too(folders) -> None:
    """A Gram matrix would have lost it: its singular values are 1e-9 of the others', their squares beyond float64."""
    adapters = {folder.name: read_lora(folder) for folder in folders}
    weak = {name: LoRALayer(own.A.double() * 1e-9, own.B, own.scaling) for name, own in adapters["sea"].layers.items()}
    found = loras_to_bank(adapters | {"sea": LoRAAdapter(weak, {}, (), 0.0)}, rank=TOTAL, dtype=torch.float64)
    want = {name: own * 1e-9 for name, own in dense(folders[2]).items()}
    got = kept(found, "sea")
    assert max(float((got[layer] - want[layer]).norm() / want[layer].norm()) for layer in want) < 1e-4


@pytest.mark.parametrize("rank", [1, 4, (3, 7), 12])
def test_errors_are_those_of_the_deltas_and_within_the_bounds_of_the_unfoldings(folders, rank) -> None:
    found = loras_to_bank(folders, rank=rank, dtype=torch.float64)
    r_in, r_out = (rank, rank) if isinstance(rank, int) else rank
    want = {folder.name: dense(folder) for folder in folders}
    got = {folder.name: kept(found, folder.name) for folder in folders}
    for task, layers in want.items():
        for layer, delta in layers.items():
            assert abs(float((got[task][layer] - delta).norm() / delta.norm()) - found.errors[task][layer]) < 1e-10
        lost = sum(float((got[task][layer] - delta).square().sum()) for layer, delta in layers.items())
        total = sum(float(delta.square().sum()) for delta in layers.values())
        assert abs((lost / total) ** 0.5 - found.task_errors[task]) < 1e-10
    for group, names in found.groups.items():
        stack = [own[name] for own in want.values() for name in names]
        tails = [
            float(torch.linalg.svdvals(torch.cat(side, 1))[r:].square().sum())
            for side, r in (([d.T for d in stack], r_in), (stack, r_out))
        ]
        lost = sum(float((got[task][name] - want[task][name]).square().sum()) for task in want for name in names)
        total = sum(float(d.square().sum()) for d in stack)
        assert abs((lost / total) ** 0.5 - found.group_errors[group]) < 1e-10
        assert max(tails) - 1e-12 * total <= lost <= sum(tails) + 1e-12 * total


@pytest.mark.parametrize("rank", [2, 5, (6, 3)])
def test_read_one_by_one_as_all_at_once(folders, rank) -> None:
    """LowRankStack has all deltas of a group in memory."""
    found = loras_to_bank(folders, rank=rank, dtype=torch.float64)
    adapters = [read_lora(folder) for folder in folders]
    for group, names in found.groups.items():
        layers = [adapter.layers[name] for adapter in adapters for name in names]
        stack = LowRankStack([(own.scaling * own.B.double(), own.A.double().T) for own in layers])
        at_once = stack.factorise((rank, rank) if isinstance(rank, int) else rank)
        assert abs(at_once.error - found.group_errors[group]) < 2e-3 * at_once.error


def test_one_adapter_is_what_lora_to_lotr_makes(folders) -> None:
    found, other = loras_to_bank(folders[:1], rank=3), lora_to_lotr(folders[0], rank=3)
    assert list(found.tasks) == ["law"]
    for group, error in other.group_errors.items():
        assert abs(error - found.group_errors[group]) < 2e-3 * error


def test_one_adapter_is_in_memory_at_a_time(folders, monkeypatch) -> None:
    alive: list[weakref.ref] = []

    def read(folder: Path) -> LoRAAdapter:
        assert not any(ref() for ref in alive)
        found = read_lora(folder)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sys.modules[loras_to_bank.__module__], "read_lora", read)
    loras_to_bank(folders, rank=3)
    assert len(alive) >= 4 * 4  # several passes


def test_what_is_kept_of_many_adapters_does_not_grow_with_them() -> None:
    """At most 2 k columns and those of one adapter, with the Gram matrix of all deltas."""
    generator = torch.Generator().manual_seed(0)
    r, k, n = 2, 20, 30

    def adapter() -> LoRAAdapter:
        pairs = ((torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)) for _ in range(4))
        return LoRAAdapter({f"{i}": LoRALayer(A, B, 0.5) for i, (A, B) in enumerate(pairs)}, {}, (), 0.0)

    adapters = {f"t{i}": adapter() for i in range(40)}
    stream = _Stream(adapters, lambda what, done: None)
    stream.look("shape")
    (columns,) = stream.roots("", "A").values()
    assert sum(t.shape[1] for t in columns) <= 2 * k + 4 * r < 40 * 4 * r
    deltas = [0.5 * layer.B.double() @ layer.A.double() for own in adapters.values() for layer in own.layers.values()]
    torch.testing.assert_close(sum(t @ t.T for t in columns), sum(d.T @ d for d in deltas), rtol=1e-12, atol=1e-12)


def test_the_folder_is_a_bank_and_new_tasks_are_trained_as_cores_only(folders, tmp_path) -> None:
    found = loras_to_bank(folders, rank=TOTAL)
    found.save(tmp_path / "out")
    model = load_adapter(toy().eval(), tmp_path / "out")
    torch.testing.assert_close(model(IDS), toy()(IDS))  # the adapter itself starts as the base model
    assert sum(p.numel() for p in lotr_parameters(model)) == 6 * TOTAL**2  # cores alone are trained
    bank = TaskBank(model, 5)
    places = [bank.add(tmp_path / "out" / f"{folder.name}.task.safetensors") for folder in folders]
    with torch.no_grad(), mixed(model, torch.tensor(places)):
        rows = model(IDS)
    for i, folder in enumerate(folders):
        want = peft.PeftModel.from_pretrained(toy().eval(), folder)(IDS[i : i + 1])
        torch.testing.assert_close(rows[i : i + 1], want, rtol=1e-4, atol=1e-4)
    assert found.parameters == 2 * (16 + 16) * TOTAL // 2 + (16 + 32) * TOTAL + 4 * 6 * TOTAL**2


def test_a_zero_adapter(folders) -> None:
    zero = {name: LoRALayer(own.A, own.B * 0, own.scaling) for name, own in read_lora(folders[0]).layers.items()}
    nothing = LoRAAdapter(zero, {}, (), 0.0)
    for sources in ({"none": nothing}, {"law": folders[0], "none": nothing}):
        found = loras_to_bank(sources, rank=4)
        assert not any(core.any() for core in found.tasks["none"].values()) and set(found.errors["none"].values()) == {0.0}


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    state = {f"l.lora_{part}.weight": torch.full((2, 4) if part == "A" else (4, 2), 300.0) for part in "AB"}
    adapter = read_lora(state, {"r": 2, "lora_alpha": 2})
    for convert, source in ((lora_to_lotr, adapter), (loras_to_bank, {"a": adapter})):
        with pytest.raises(ValueError, match=r"dtype: expected one that can hold the values of l\.core, got torch\.float16"):
            convert(source, rank=2, dtype=torch.float16)


def test_names() -> None:
    assert list(names_of(["/l/law", "/l/art"])) == ["law", "art"]
    assert list(names_of(["/l/law/adapter", "/l/art/x/adapter"])) == ["law", "art-x"]
    assert list(names_of(["/l/law/adapter"])) == ["adapter"]
    assert list(names_of(["/l/a/b-c", "/l/a-b/c"])) == ["0-a-b-c", "1-a-b-c"]
    assert list(names_of(["/l/run", "/l/run/checkpoint-9"])) == ["run", "run-checkpoint-9"]
    assert list(names_of(["/l/law", "/l/law/../art"])) == ["law", "art"]


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(sources, match: str, **options) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        loras_to_bank(sources, **{"rank": 2, **options})


def test_what_is_refused(folders, tmp_path) -> None:
    refused([], "sources: expected folders of LoRA adapters, got none")
    refused({}, "sources: expected LoRA adapters, got none")
    refused([folders[0], folders[0]], "sources: expected different folders, got .*law twice")
    refused({"a/b": folders[0]}, "sources: expected names of tasks that a file can have, got 'a/b'")
    refused({"..": folders[0]}, "sources: expected names of tasks")
    refused(folders, "rank: expected at most 48, beyond which no group can use any, got 49", rank=49)
    refused(folders, "rank: expected at least 1, got 0", rank=0)
    refused(folders, "dtype: expected that of the new adapter, got None", dtype=None)
    refused(folders, 'group_by: expected "shape", "block", "name" or a mapping, got "width"', group_by="width")
    refused([*folders, tmp_path / "absent"], "absent: source: expected a directory with adapter_config.json")
    trained({"r": 2}, 0, ["k", "v"]).save_pretrained(tmp_path / "fewer")
    refused(
        [*folders, tmp_path / "fewer"], r"fewer: expected the layers and sizes of .*law, got 4 for 6; blocks.0.up has .* none"
    )
    settings = [({"use_dora": True}, "use_dora: expected a LoRA of two factors"), ({"bias": "all"}, "bias: expected 'none'")]
    settings += [({"modules_to_save": ["head"]}, "expected a LoRA without modules_to_save, .* got head")]
    for i, (own, match) in enumerate(settings):
        trained({"r": 2, **own}, 0).save_pretrained(tmp_path / f"it{i}")
        refused([*folders, tmp_path / f"it{i}"], f"it{i}: {match}")


def test_damaged_adapters_are_refused_by_name_and_nothing_is_written(folders, tmp_path, capsys) -> None:
    for what in ("truncated", "nan", "rank", "width"):
        bad = tmp_path / what
        trained({"r": 2}, 0).save_pretrained(bad)
        path = bad / "adapter_model.safetensors"
        tensors = load_file(path)
        key = next(key for key in tensors if "blocks.0.up.lora_A" in key)
        if what == "truncated":
            path.write_bytes(path.read_bytes()[:-7])
        elif what == "nan":
            save_file(tensors | {key: tensors[key] * float("nan")}, path)
        elif what == "width":
            save_file(tensors | {key: torch.ones(2, 17)}, path)
        else:
            text = json.loads((bad / "adapter_config.json").read_text())
            (bad / "adapter_config.json").write_text(json.dumps(text | {"r": 3}))
        assert main(["loras-to-bank", *map(str, folders), str(bad), str(tmp_path / "out"), "--rank", "2"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and what in error
        assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_while_it_is_read(folders, tmp_path) -> None:
    changing = tmp_path / "it"
    trained({"r": 2}, 0).save_pretrained(changing)

    def report(what: str, done: float) -> None:
        if what.startswith("B, sweep"):
            trained({"r": 2}, 0, ["k", "v"]).save_pretrained(changing)

    refused([*folders, changing], "it: expected the layers and sizes of", report=report)


def test_the_command(folders, tmp_path, capsys) -> None:
    """It prints each layer's error for each adapter."""
    assert main(["loras-to-bank", *map(str, folders), str(tmp_path / "out"), "--rank", "4", "--dtype", "float64"]) == 0
    told = capsys.readouterr().out
    found = loras_to_bank(folders, rank=4, dtype=torch.float64)
    for layer in found.layers:
        (line,) = (line for line in told.splitlines() if line.split()[:1] == [layer])
        assert line.split()[-4:] == [f"{found.errors[folder.name][layer]:.2e}" for folder in folders]
    assert {path.name for path in (tmp_path / "out").glob("*.task.*")} == {f"{f.name}.task.safetensors" for f in folders}


def test_the_command_with_more_adapters_than_a_table_has_columns(folders, tmp_path, capsys) -> None:
    """Each layer's mean and highest error and the task that has it, and each task's error over all layers."""
    copies = [tmp_path / "many" / f"{i}-{folder.name}" for i in range(3) for folder in folders]
    for folder, copy in zip(folders * 3, copies):
        shutil.copytree(folder, copy)
    assert main(["loras-to-bank", *map(str, copies), str(tmp_path / "out"), "--rank", "4", "--dtype", "float64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = loras_to_bank(copies, rank=4, dtype=torch.float64)
    for task, error in found.task_errors.items():
        assert [task, f"{error:.2e}"] in lines
    for layer in found.layers:
        own = {task: errors[layer] for task, errors in found.errors.items()}
        (line,) = (line for line in lines if line[:1] == [layer])
        assert line[-3:-1] == [f"{sum(own.values()) / 12:.2e}", f"{max(own.values()):.2e}"]
        assert abs(own[line[-1]] - max(own.values())) < 1e-12
