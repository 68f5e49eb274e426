"""CoreSync against the package's own worker, whose vLLM is a stand-in: lost connections, engines that are started again, and
two senders of one name."""

from __future__ import annotations

import importlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, apply_lotr
from lotr_ext.interop.vllm import CoreSync
from lotr_ext.interop.vllm.message import Message, pack
from lotr_ext.model.adapted import adapted_layers

SECRET, PACKAGE = "sixteen letters.", "lotr_ext.interop.vllm"
SIZES = {"a": (5, 6), "b": (6, 4), "c": (4, 3)}


class Adapters:
    """vLLM's store of adapters. loaded: lora_A and lora_B of each layer, by the adapter's name."""

    load: Any = None

    def __init__(self) -> None:
        self.loaded: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def add_adapter(self, request: SimpleNamespace) -> None:
        self.loaded[request.lora_name] = Adapters.load(self, request)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of CoreWorker with a stand-in for the private names of vLLM."""
    engine = ModuleType(f"{PACKAGE}.engine")
    engine.Adapters, engine.LoRAModel = Adapters, dict
    engine.LoRARequest = lambda name, number, path: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)
    engine.adapters_of, engine.check_version = lambda worker: worker.adapters, lambda: None
    engine.load_first = lambda load: setattr(Adapters, "load", staticmethod(load))
    engine.has_all_blocks, engine.max_rank, engine.sizes_of_layers = lambda: True, lambda _: 8, lambda _: SIZES
    engine.adapter = lambda _, number, layers, rank: {name: (A.clone(), B.clone()) for name, (A, B) in layers.items()}
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    yield importlib.import_module(f"{PACKAGE}.worker")
    for name in ("worker", "loading"):
        del sys.modules[f"{PACKAGE}.{name}"]
        delattr(importlib.import_module(PACKAGE), name)


class Endpoint(BaseHTTPRequestHandler):
    """The worker behind HTTP. server.faults: what goes wrong with the next messages, one after another."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else None
        size = int(self.headers["content-length"])
        if fault == "lost":
            self.rfile.read(size // 2)
            return self.end()
        data = self.rfile.read(size)
        if fault == "restart":
            self.server.engine = self.server.start()
        answer = self.server.engine.lotr_push(data)
        if fault == "no answer":
            return self.end()
        body = json.dumps(answer if fault != "other" else {}).encode()
        self.send_response(422 if "error" in answer else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:5] if fault == "half" else body)
        if fault in ("half", "closes"):
            self.end()

    def end(self) -> None:
        self.close_connection = True
        if self.connection.fileno() >= 0:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(worker: ModuleType) -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)

    def start() -> Any:
        engine = worker.CoreWorker()
        engine.adapters = Adapters()
        return engine

    found.faults, found.start, found.engine = [], start, start()
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def trainer(server: ThreadingHTTPServer, seed: int) -> tuple[nn.Module, CoreSync]:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in SIZES.items()})
    apply_lotr(model, LoTRConfig(rank=(2, 3), alpha=5.0, group_by="width", target_modules=list(SIZES)))
    torch.manual_seed(seed)
    change(model, *SIZES)
    return model, CoreSync(model, f"http://127.0.0.1:{server.server_port}", secret=SECRET)


@torch.no_grad()
def change(model: nn.Module, *names: str) -> None:
    for name in names:
        adapted_layers(model)[name].core.normal_()


def serves(server: ThreadingHTTPServer, name: str, model: nn.Module) -> bool:
    """Whether the engine's adapter is the model's."""
    found = server.engine.adapters.loaded[name]
    return all(torch.allclose(B @ A, adapted_layers(model)[at].delta_weight(), atol=1e-5) for at, (A, B) in found.items())


@pytest.mark.parametrize("fault", ["lost", "no answer", "half", "closes", "other", "restart"])
def test_a_push_after_a_fault_has_all_changes(server: ThreadingHTTPServer, fault: str) -> None:
    model, sync = trainer(server, 1)
    assert serves(server, sync.push(name="policy").name, model)
    for turn in range(4):
        change(model, "abc"[turn % 3])
        server.faults = [fault] * (2 if fault in ("lost", "no answer") else 1)  # a kept connection is tried again
        if fault in ("closes", "restart"):
            pushed = sync.push(name="policy")
        else:
            with pytest.raises(ValueError if fault == "other" else OSError):
                sync.push(name="policy")
            server.faults.clear()
            change(model, "abc"[(turn + 1) % 3])
            pushed = sync.push(name="policy")
        assert serves(server, pushed.name, model)


def test_a_push_without_changes_reaches_an_engine_that_was_started_again(server: ThreadingHTTPServer) -> None:
    (model, sync), (_, other) = trainer(server, 1), trainer(server, 2)
    first = sync.push(name="policy")
    assert (sync.push(name="policy").name, list(server.engine.adapters.loaded)) == (first.name, [first.name])
    for turn in range(2):
        server.engine = server.start()
        if turn:
            other.push(name="policy")  # a version of the same number, with other cores
        pushed = sync.push(name="policy")
        assert pushed.layers == 3 and serves(server, pushed.name, model)


def test_changes_are_merged_only_into_the_senders_own_version(server: ThreadingHTTPServer) -> None:
    (one, first), (other, second) = trainer(server, 1), trainer(server, 2)
    for _ in range(3):
        assert serves(server, first.push(name="policy").name, one)
        server.engine = server.start()
        assert serves(server, second.push(name="policy").name, other)
        change(one, "b"), change(other, "a")
        for sync, model in ((first, one), (second, other)):  # the engine has a version of the number of first's base
            assert serves(server, sync.push(name="policy").name, model)
        change(one, "c"), change(other, "c")


def test_an_incomplete_answer_says_so(server: ThreadingHTTPServer) -> None:
    _, sync = trainer(server, 1)
    server.faults = ["half"]
    with pytest.raises(ConnectionError, match=r"engine: expected a whole HTTP answer, got IncompleteRead.*push again"):
        sync.push()
    server.faults = ["other"]
    with pytest.raises(ValueError, match=r"expected a server with the middleware .*CoreSyncEndpoint, got the answer 200"):
        sync.push()


def test_a_dropped_task_leaves_only_its_version_number(server: ThreadingHTTPServer, worker: ModuleType) -> None:
    (model, sync), (_, other) = trainer(server, 1), trainer(server, 2)
    for i in range(50):
        change(model, "a")
        sync.push(name=f"user-{i}")
        if i:
            sync.drop(f"user-{i - 1}")
    (versions,) = worker._versions.values()
    assert list(versions.held) == ["user-49"] and len(versions.factors) == 1
    kept = sync.push(name="policy")
    in_flight = server.engine.lotr_push(pack(Message("policy", 7, 0, sync._checksum, (), torch.empty(0))), [kept.name])
    assert in_flight == {"dropped": []} and list(versions.held["policy"]) == [1]
    sync.drop("policy"), sync.drop("policy"), sync.drop("user-49")
    assert not versions.held and not versions.factors
    assert other.push(name="policy").version > 7  # the prefix cache may still have an older version of this name
    assert serves(server, sync.push(name="policy").name, model)


def test_factors_without_a_version_are_dropped(server: ThreadingHTTPServer, worker: ModuleType) -> None:
    for seed in range(6):
        model, _ = trainer(server, seed)
        with torch.no_grad():
            for parameter in model.lotr_factors.parameters():
                parameter.normal_()
        sync = CoreSync(model, f"http://127.0.0.1:{server.server_port}", secret=SECRET)
        assert serves(server, sync.push(name="policy").name, model)
    (versions,) = worker._versions.values()
    assert len(versions.held["policy"]) == len(versions.factors) == worker.KEPT
