"""Several savers and loaders of one directory at once: threads, processes, and each order of their steps."""

from __future__ import annotations

import os
import threading
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from gloo import fork, forks
from toys import IDS, adapted, at_once, randomize, toy

from lotr_ext import files, load_adapter, save_adapter
from lotr_ext.model import adapter_files


def model_of(seed: int) -> torch.nn.Module:
    model = adapted()
    randomize(model, seed=seed)
    return model.eval()


def seed_in(directory: Path, models: dict[int, torch.nn.Module]) -> int:
    """Which of the models the directory holds, whole."""
    got = load_adapter(toy(), directory).eval()(IDS)
    return next(seed for seed, model in models.items() if torch.equal(model(IDS), got))


def test_threads_that_save_at_once_leave_a_whole_adapter(tmp_path: Path) -> None:
    models = {seed: model_of(seed) for seed in range(4)}
    for trial in range(15):
        directory = tmp_path / str(trial % 3)  # new, or with an adapter in it
        assert at_once(*(partial(save_adapter, m, directory) for m in models.values())) == []
        assert seed_in(directory, models) in models
        save_adapter(models[0], directory)
        assert seed_in(directory, models) == 0
        assert len(list(directory.iterdir())) == 2  # of the others nothing is left


def test_a_load_during_saves_gets_a_whole_adapter(tmp_path: Path) -> None:
    models = {seed: model_of(seed) for seed in range(2)}
    save_adapter(models[0], tmp_path)
    done = threading.Event()
    seen: list[int] = []

    def save() -> None:
        try:
            for _ in range(20):
                for model in models.values():
                    save_adapter(model, tmp_path)
        finally:
            done.set()

    def load() -> None:
        while not done.is_set():
            core = adapter_files.read(tmp_path)[1]["blocks.0.q.core"]
            seen.append(next(seed for seed, m in models.items() if torch.equal(m.blocks[0].q.core, core)))

    assert at_once(save, load, load) == []
    assert set(seen) <= set(models) and seen


TRIALS = 5


def save_two(directory: Path, first: int, together: Barrier) -> None:
    """Saves two models in turn, and again, in each trial."""
    models = [model_of(seed) for seed in (first, first + 1)]
    try:
        for trial in range(TRIALS):
            together.wait()
            for model in models * 3:
                save_adapter(model, directory / str(trial))
    except BaseException:
        together.abort()  # or the other would wait
        raise


def test_processes_that_save_at_once_leave_a_whole_adapter(tmp_path: Path) -> None:
    together = forks().Barrier(2, timeout=1000)
    savers = [fork(save_two, tmp_path, first, together) for first in (0, 2)]
    for saver in savers:
        saver.join(timeout=1000)
    assert [saver.exitcode for saver in savers] == [0, 0]
    models = {seed: model_of(seed) for seed in range(4)}
    for trial in range(TRIALS):
        assert seed_in(tmp_path / str(trial), models) in (1, 3)  # the last of one of them


# ---- each order of two savers' steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupting", [1, 3])
@pytest.mark.parametrize("saving", [1, 2])
@pytest.mark.parametrize("step", range(1, 8))
def test_a_save_that_another_whole_one_interrupts(
    step: int, saving: int, interrupting: int, tmp_path: Path, monkeypatch
) -> None:
    """Before each of its steps (fsync, replace, fsync, twice), and not at all; each of the adapter that is there or another."""
    models = {seed: model_of(seed) for seed in {1, saving, interrupting}}
    save_adapter(models[1], tmp_path)
    count = 0

    def interrupted(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                save_adapter(models[interrupting], tmp_path)
                assert seed_in(tmp_path, models) == interrupting
            return real(*args, **kwargs)

        return call

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
    save_adapter(models[saving], tmp_path)
    monkeypatch.undo()
    assert seed_in(tmp_path, models) == (interrupting if step == 6 else saving)
    save_adapter(models[saving], tmp_path)
    assert seed_in(tmp_path, models) == saving and len(list(tmp_path.iterdir())) == 2


def test_a_load_that_whole_saves_interrupt(tmp_path: Path, monkeypatch) -> None:
    models = {seed: model_of(seed) for seed in range(3)}
    save_adapter(models[0], tmp_path)
    real, left = adapter_files._content, [1, 2]

    def interrupted(directory: Path) -> dict:
        content = real(directory)
        if left:
            save_adapter(models[left.pop(0)], tmp_path)
        return content

    monkeypatch.setattr(adapter_files, "_content", interrupted)
    assert seed_in(tmp_path, models) == 2 and not left


def test_a_missing_tensors_file_is_still_an_error(tmp_path: Path) -> None:
    save_adapter(model_of(1), tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected lotr_adapter\.\w+\.safetensors beside it, got lotr_adapter.json"):
        load_adapter(toy(), tmp_path)


def test_the_leftovers_of_a_saver_that_is_alive_stay(tmp_path: Path) -> None:
    save_adapter(model_of(1), tmp_path)
    with files.placed(tmp_path, {"lotr_adapter.0123456789abcdef.safetensors": b"of a saver that is at its next file"}):
        save_adapter(model_of(2), tmp_path)
        assert (tmp_path / "lotr_adapter.0123456789abcdef.safetensors").exists()
    save_adapter(model_of(2), tmp_path)
    assert not (tmp_path / "lotr_adapter.0123456789abcdef.safetensors").exists()


def test_without_locks_a_save_removes_what_it_replaces_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / "lotr_adapter.json.77.tmp").write_text("of a kill, or of one that is at work")
    for seed in (1, 2):
        save_adapter(model_of(seed), tmp_path)
    assert seed_in(tmp_path, {2: model_of(2)}) == 2 and len(list(tmp_path.iterdir())) == 3
