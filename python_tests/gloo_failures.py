"""As `gloo_checks`: one process fails while the other waits for it. Both end, the other with the failing one's rank."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo_checks import batch, loss, make_fresh, refusal, shard
from stacks import base, make

from lotr_ext import init_from_gradient, load_adapter, save_adapter

WRITES = (1, 2)  # which of os.fsync's calls in a save are those of the tensors and of the JSON


def gradient(rank: int, folder: Path) -> dict[str, str]:
    """init_from_gradient, with an error in process 1 alone."""
    model, found = make_fresh(), {}
    factors = [p.clone() for p in model.lotr_factors.parameters()]

    def failing(error: BaseException, at: int) -> Callable:
        calls = []

        def wrong(model, x):
            calls.append(x)
            if rank == 1 and len(calls) == at:
                raise error
            return loss(model, x)

        return wrong

    two = [batch(rank), batch(rank, 1)]
    found["loss"] = refusal(lambda: init_from_gradient(model, two, failing(ValueError("a bad batch"), 4)))
    found["interrupt"] = refusal(lambda: init_from_gradient(model, two, failing(KeyboardInterrupt(), 1)))
    found["batches"] = refusal(lambda: init_from_gradient(model, two if rank == 0 else [], loss))
    found["model"] = refusal(lambda: init_from_gradient(model if rank == 0 else base(), two, loss))
    assert all(torch.equal(p, q) for p, q in zip(model.lotr_factors.parameters(), factors))
    init_from_gradient(model, two, loss)  # the processes are still in step
    found["moved"] = str(not any(torch.equal(p, q) for p, q in zip(model.lotr_factors.parameters(), factors)))
    return found


def saving(rank: int, folder: Path) -> dict[str, object]:
    """save_adapter of a sharded model, with an error in one process, and with a full disk at each step."""
    model, plain, target = shard(make()), shard(base(), by="root"), folder / "full"
    found = {"path": refusal(lambda: save_adapter(model, folder / "never" if rank == 0 else 5))}
    found["other model"] = refusal(lambda: save_adapter(model if rank == 0 else plain, folder / "never"))
    found["never"] = (folder / "never").exists()
    real, calls = os.fsync, []

    def full(at: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        return fsync

    for at in WRITES:
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full(at))
            found[f"full {at}"] = refusal(lambda: save_adapter(model, target))
        found[f"left {at}"] = sorted(path.name for path in target.glob("*"))
    save_adapter(model, target)
    calls.clear()
    with torch.no_grad():
        want = load_adapter(base(), target)(batch(0))
        for parameter in model.lotr_factors.parameters():
            parameter.add_(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full(WRITES[-1]))
        found["full again"] = refusal(lambda: save_adapter(model, target))
    with torch.no_grad():
        found["the old one"] = torch.equal(load_adapter(base(), target)(batch(0)), want)
    found["files"] = len(list(target.iterdir()))
    return found
