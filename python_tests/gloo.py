"""Runs checks of `gloo_checks`, or "module:check", in processes joined by gloo.

They are forks of one process that has imported torch: an import takes two seconds of each process that is spawned.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WORLD = 2
IMPORTED = ["gloo_checks", "torch.distributed.pipelining"]  # before the forks; no package that others have to precede
COLLECTIVE_S = 300  # a collective that a failed partner never joins ends after so long; on a loaded machine one may be late


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _worker(rank: int, folder: str, names: Sequence[str], world: int, port: int, packages: str | None) -> None:
    """One process: each check's result, or its traceback, into a file of its own."""
    faulthandler.enable()  # a process that a signal ends says where
    if packages is not None:
        sys.path.append(packages)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        # as torchrun sets them: accelerate and DeepSpeed read these, although the group is there
        started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in started.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        wait = datetime.timedelta(seconds=COLLECTIVE_S)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=wait)
    for name in names:
        try:
            started = time.perf_counter()
            module, _, check = name.rpartition(":")
            check = getattr(importlib.import_module(module or "gloo_checks"), check)
            result = {"value": check(rank, Path(folder)), "seconds": time.perf_counter() - started}
        except Exception:
            result = {"error": traceback.format_exc()}
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(result))
        if "error" in result:
            break  # the partner is somewhere else now: nothing after this could be trusted
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort now and then when the interpreter takes them down


def forks() -> multiprocessing.context.BaseContext:
    """The processes of this context are forks of one process, which has imported IMPORTED."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def fork(function: Callable[..., object], *arguments: object) -> multiprocessing.process.BaseProcess:
    """A process that calls a function of a module. It has started."""
    process = forks().Process(target=function, args=arguments)
    process.start()
    return process


def values_of(
    names: Sequence[str], folder: Path, timeout: float = 1500, *, world: int = WORLD, packages: Path | None = None
) -> dict[str, list[Any]]:
    """{check: [what it returned in process 0, in process 1]}. An error in one fails the test with its traceback.

    world: how many processes; one has no process group. packages: a folder of further packages, imported after all others.
    """
    import torch.distributed as dist
    import torch.multiprocessing as mp

    if not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32":
        pytest.skip("this torch has no gloo")

    arguments = (str(folder), list(names), world, _free_port(), None if packages is None else str(packages))
    context = mp.start_processes(_worker, arguments, nprocs=world, join=False, start_method=forks().get_start_method())
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=5):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes: expected an end within {timeout:.0f} s, got none; see {folder}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    found: dict[str, list[Any]] = {}
    for name in names:
        files = [folder / f"{name}.{rank}.json" for rank in range(world)]
        results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        for rank, result in enumerate(results):
            if "value" not in result:
                pytest.fail(f"{name}, process {rank}:\n{result.get('error', 'it never ran')}")
        found[name] = [result["value"] for result in results]
    return found
