"""Changes of a TaskBank: from several threads, stopped half-way, killed; and a scaling a layer, in batches and in files."""

from __future__ import annotations

import copy
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gloo import fork
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lotr_ext import LoTRConfig, TaskBank, add_adapter, apply_lotr, files, mixed
from nets import relative

D, R = 8, 3
SCALINGS = (0.5, 2.0, 3.5)


def with_bank(tasks: int = 4, scalings: tuple[float, ...] | None = None) -> tuple[nn.Sequential, TaskBank]:
    torch.manual_seed(0)
    model = apply_lotr(nn.Sequential(*(nn.Linear(D, D) for _ in SCALINGS)), LoTRConfig(rank=R, scaling=0.5))
    for layer, scaling in zip(model, scalings or ()):
        layer.scaling = scaling
    return model, TaskBank(model, tasks)


def task(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}.core": torch.randn(R, R, generator=generator) for i in range(len(SCALINGS))}


def same(bank: TaskBank, place: int, want: dict[str, Tensor]) -> bool:
    return all(torch.equal(core, want[name]) for name, core in bank.cores_of(place).items())


def test_each_layer_has_its_own_scaling() -> None:
    model, bank = with_bank(scalings=SCALINGS)
    tasks = [task(seed) for seed in range(3)]
    for one in tasks:
        bank.add(one)
    x, index = torch.randn(4, 5, D), [2, -1, 0, 1]
    h, factors = x.double(), model.lotr_factors[f"{D}x{D}"]
    for i, (layer, scaling) in enumerate(zip(model, SCALINGS)):
        none = torch.zeros(R, R)
        cores = torch.stack([tasks[t][f"{i}.core"] if t >= 0 else none for t in index]).double()
        adapted = h @ factors.A.double() @ cores @ factors.B.double().T
        h = h @ layer.weight.double().T + layer.bias.double() + scaling * adapted
    with torch.no_grad(), mixed(model, torch.tensor(index)):
        assert relative(model(x), h) < 1e-6


def test_a_file_of_a_task_names_the_scaling_of_each_layer(tmp_path: Path) -> None:
    _, bank = with_bank(scalings=SCALINGS)
    _, uniform = with_bank()
    for source in (bank, uniform):
        source.add(task(1))
    bank.save(0, tmp_path / "differ")
    uniform.save(0, tmp_path / "one")
    assert same(bank, bank.add(tmp_path / "differ"), task(1)) and same(uniform, uniform.add(tmp_path / "one"), task(1))
    for own, path, other in ((bank, "one", "0.5"), (uniform, "differ", r"\[0.5, 2.0, 3.5\]")):
        with pytest.raises(ValueError, match=rf"source: expected scaling .* as the model has, got {other}"):
            own.add(tmp_path / path)


def test_a_file_that_an_older_version_wrote(tmp_path: Path) -> None:
    """It has one scaling, that of all layers."""
    _, bank = with_bank()
    metadata = {"format": "lotr_task", "version": "1", "factors": bank._checksum(), "scaling": "0.5"}
    save_file(task(3), tmp_path / "old", metadata)
    assert same(bank, bank.add(tmp_path / "old"), task(3))


def test_a_file_fits_factors_whatever_the_order_of_their_groups(tmp_path: Path) -> None:
    """Also one of version 0.1.0, whose checksum is in the order of the model's groups."""
    torch.manual_seed(0)
    model = apply_lotr(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 9)), LoTRConfig(rank=R, scaling=0.5))
    bank, cores = TaskBank(model, 3), {f"{i}.core": torch.randn(R, R) for i in range(2)}
    assert list(model.lotr_factors) == ["9x8", "8x9"]
    bank.save(bank.add(cores), tmp_path / "new")
    metadata = {"format": "lotr_task", "version": "1", "factors": bank._checksum(), "scaling": "0.5"}
    save_file(cores, tmp_path / "old", metadata)
    bank._owners = dict(reversed(bank._owners.items()))
    assert torch.equal(bank.cores_of(bank.add(tmp_path / "new"))["0.core"], cores["0.core"])
    with pytest.raises(ValueError, match="source: expected factors"):
        bank.add(tmp_path / "old")
    bank._owners = dict(reversed(bank._owners.items()))
    bank.add(tmp_path / "old")


def test_four_threads_add_tasks() -> None:
    _, bank = with_bank(tasks=200)
    together = threading.Barrier(4)

    def add(first: int) -> dict[int, int]:
        together.wait()
        return {bank.add(task(seed)): seed for seed in range(first, first + 50)}

    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(add, range(0, 200, 50)))
    found = {place: seed for own in places for place, seed in own.items()}
    assert len(found) == len(bank) == 200
    assert all(same(bank, place, task(seed)) for place, seed in found.items())


def test_threads_replace_drop_and_save(tmp_path: Path) -> None:
    """A saved task is one of those that were there, whole."""
    _, bank = with_bank(tasks=3)
    shared, together = bank.add(task(0)), threading.Barrier(4)
    known = [task(seed) for seed in range(20)]

    def change(thread: int) -> None:
        together.wait()
        for turn in range(25):
            if thread < 2:
                bank.replace(shared, known[(7 * turn + thread) % 20])
            elif thread == 2:
                bank.drop(bank.add(task(99)))
            else:
                bank.save(shared, tmp_path / f"{turn}")

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(change, thread) for thread in range(4)]:
            result.result()
    saved = [load_file(path) for path in tmp_path.iterdir()]
    assert len(saved) == 25
    assert all(any(all(torch.equal(one[name], t) for name, t in got.items()) for one in known) for got in saved)
    assert bank.taken.tolist() == [True, False, False] and not bank.cores[0][1:].any()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("way", ["add", "replace", "drop"])
def test_a_change_that_is_stopped_half_way_changes_nothing(kind: type[BaseException], way: str, monkeypatch) -> None:
    _, bank = with_bank()
    held = bank.add(task(0))
    before = copy.deepcopy(bank.state_dict())
    copy_, writes = Tensor.copy_, []

    def stopped(own: Tensor, *args, **kwargs) -> Tensor:
        writes.append(own)
        if len(writes) == 2:
            raise kind("stopped")
        return copy_(own, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", stopped)
    calls = {"add": lambda: bank.add(task(1)), "replace": lambda: bank.replace(held, task(1)), "drop": lambda: bank.drop(held)}
    with pytest.raises(kind):
        calls[way]()
    monkeypatch.undo()
    assert len(writes) > 2 and all(torch.equal(t, before[name]) for name, t in bank.state_dict().items())


def test_a_source_with_one_bad_tensor_changes_nothing(tmp_path: Path) -> None:
    _, bank = with_bank()
    held, last = bank.add(task(0)), f"{len(SCALINGS) - 1}.core"
    before = copy.deepcopy(bank.state_dict())
    bank.save(held, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-7])
    (tmp_path / "text").write_text("no task")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")  # opening it waits for a writer
    for source, kind, message in (
        (
            task(1) | {last: torch.zeros(R, R, dtype=torch.int64)},
            TypeError,
            f"{last}: expected a floating dtype, got torch.int64",
        ),
        (task(1) | {last: torch.zeros(R, R, dtype=torch.complex64)}, TypeError, f"{last}: expected a floating dtype, got"),
        (
            task(1) | {last: torch.zeros(R, R, device="meta")},
            ValueError,
            f"{last}: expected a tensor with values, got one on the",
        ),
        (task(1) | {last: [1.0]}, TypeError, f"{last}: expected a tensor, got list"),
        (task(1) | {last: torch.zeros(R, R).numpy()}, TypeError, f"{last}: expected a tensor, got ndarray"),
        (task(1) | {last: torch.zeros(R)}, ValueError, rf"{last}: expected shape \(3, 3\), got \(3,\)"),
        (tmp_path / "cut", ValueError, "source: expected a safetensors file, got .*cut"),
        (tmp_path / "text", ValueError, "source: expected a safetensors file, got .*text"),
        (tmp_path / "folder", ValueError, "source: expected a safetensors file, got .*folder"),
        (tmp_path / "none", ValueError, "source: expected a safetensors file, got .*none"),
        (tmp_path / "fifo", ValueError, "source: expected a safetensors file, got .*fifo"),
    ):
        for call in (lambda s=source: bank.replace(held, s), lambda s=source: bank.add(s)):
            with pytest.raises(kind, match=message):
                call()
    assert all(torch.equal(t, before[name]) for name, t in bank.state_dict().items())


def test_cores_in_fp8_are_cast() -> None:
    _, bank = with_bank()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        small = {name: core.to(dtype) for name, core in task(1).items()}
        assert same(bank, bank.add(small), {name: core.float() for name, core in small.items()})


def die_while_saving(directory: Path) -> None:
    files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    files.put_file(directory, "killed", b"half")


def test_what_a_killed_save_leaves_goes_with_the_next_one(tmp_path: Path) -> None:
    """And what another saver is writing stays."""
    killed = fork(die_while_saving, tmp_path)
    killed.join(timeout=1000)
    assert killed.exitcode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    _, bank = with_bank()
    bank.add(task(0))
    running, file = files._temporary(tmp_path)
    with file:
        bank.save(0, tmp_path / "task")
        assert {path.name for path in tmp_path.iterdir()} == {"task", running.name}
    bank.save(0, tmp_path / "task")
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_mixed_where_meta_is_the_default_device() -> None:
    model, bank = with_bank()
    place = bank.add(task(0))
    add_adapter(model, "other", share_factors="default")
    x, index = torch.randn(2, D), torch.tensor([place, -1])
    for names in (["default", "other"], index):
        with mixed(model, names):
            want = model(x)
        with torch.device("meta"), mixed(model, names):
            assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="names: expected an index with values, got one on the meta device"):
        mixed(model, torch.zeros(2, dtype=torch.int64, device="meta")).__enter__()
