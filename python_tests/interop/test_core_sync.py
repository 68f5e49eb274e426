"""CoreSync without vLLM: what it sends, what it refuses, and what an HTTP server answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lotr_ext import LoTRConfig, TaskBank, add_adapter, apply_lotr, set_adapter
from lotr_ext.interop.vllm import CoreSync, export_task
from lotr_ext.interop.vllm.message import PATH, SIGNATURE, Message, pack, signature, unpack
from lotr_ext.interop.vllm.sync import joined
from lotr_ext.model.adapted import adapted_layers

SECRET = "sixteen letters."


class Server(BaseHTTPRequestHandler):
    """Answers as server.answers says, one after another, and keeps what it got."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, self.headers[SIGNATURE], data))
        status, answer = self.server.answers.pop(0) if self.server.answers else (200, None)
        if answer is None:
            message = unpack(data)
            answer = {"name": f"{message.name}@{message.version}", "number": 1, "path": "lotr:", "dropped": []}
            answer = answer if message.places else {"held": True}
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.got, found.answers = [], []
    found.url = f"http://127.0.0.1:{found.server_port}/"
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def model(tasks: int = 0) -> nn.Module:
    """Layers in another order than that of their names."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"b": nn.Linear(6, 4), "a": nn.Linear(5, 6), "c": nn.Linear(4, 3)})
    made = apply_lotr(net, LoTRConfig(rank=(2, 3), alpha=5.0, group_by="width", target_modules=["a", "b", "c"]))
    with torch.no_grad():
        for layer in adapted_layers(made).values():
            layer.core.normal_()
    if tasks:
        TaskBank(made, tasks)
    return made


def sent(server: ThreadingHTTPServer) -> Message:
    path, signed, data = server.got[-1]
    assert (path, signed) == (PATH, signature(SECRET.encode(), data))
    return unpack(data)


@torch.no_grad()
def change(net: nn.Module, name: str) -> None:
    adapted_layers(net)[name].core[0, 0] += 1


def test_what_changed_is_sent_with_its_scaling(server: ThreadingHTTPServer) -> None:
    net = model()
    layers = adapted_layers(net)
    sync = CoreSync(net, server.url, secret=SECRET)
    first = sync.push(name="policy")
    whole = torch.cat([(layers[name].scaling * layers[name].core).flatten() for name in "abc"]).detach()
    message = sent(server)
    assert (message.name, message.version, message.base, list(message.places)) == ("policy", 1, 0, [0, 1, 2])
    assert torch.equal(message.cores, whole) and message.factors is None
    assert (first.name, first.version, first.layers, first.request) == ("policy@1", 1, 3, None)
    assert first.bytes == len(server.got[-1][2]) and first.seconds > 0
    change(net, "b")
    second = sync.push(name="policy")
    message = sent(server)
    assert (message.version, message.base, list(message.places), second.layers) == (2, 1, [1], 1)
    assert torch.equal(message.cores, (layers["b"].scaling * layers["b"].core).detach().flatten())
    again = sync.push(name="policy")
    message = sent(server)
    assert (message.base, list(message.places), message.cores.numel()) == (2, [], 0)  # only whether the engine still has it
    assert (again.name, again.layers, again.bytes, len(server.got)) == (second.name, 0, len(server.got[-1][2]), 3)
    assert sync.push(name="other").version == 1  # each name has versions of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_task_of_the_bank_is_sent(server: ThreadingHTTPServer, dtype: torch.dtype) -> None:
    net = model(tasks=3).to(dtype)
    bank = net.lotr_tasks
    task = bank.add({name: torch.randn_like(core) for name, core in bank.cores_of(bank.add()).items()})
    pushed = CoreSync(net, server.url, secret=SECRET).push(task)
    layers, message = adapted_layers(net), sent(server)
    wanted = torch.cat([(layers[name].scaling * bank.cores_of(task)[f"{name}.core"]).flatten() for name in "abc"])
    assert pushed.name == f"task-{task}@1" and message.cores.dtype == dtype and torch.equal(message.cores, wanted)
    with pytest.raises(ValueError, match="task: expected a task of the bank, as add returned it, got 2"):
        CoreSync(net, server.url, secret=SECRET).push(2)


def test_the_engine_says_what_it_lacks(server: ThreadingHTTPServer) -> None:
    net = model()
    sync = CoreSync(net, server.url, secret=SECRET)
    server.answers = [(200, {"need": "factors"})]
    pushed = sync.push()
    message = sent(server)
    assert pushed.version == 2 and pushed.bytes == sum(len(data) for _, _, data in server.got)
    assert message.factors is not None and message.factors.checksum == message.checksum
    layer = adapted_layers(net)["a"]
    A, B = (message.factors.tensors[key] for key in message.factors.layers["a"])
    assert torch.equal(A, layer.factors.A) and torch.equal(B, layer.factors.B)
    change(net, "a")
    server.answers = [(200, {"need": "cores", "version": 70})]  # an engine that was pushed to before, or that forgot
    assert sync.push().version == 71
    message = sent(server)
    assert (message.base, len(message.places)) == (0, 3)
    server.answers = [(200, {"need": "cores"})] * 4
    change(net, "a")
    with pytest.raises(ValueError, match=r"engine: expected an answer to a complete message, got .*cores"):
        sync.push()


def test_what_was_refused_is_sent_again(server: ThreadingHTTPServer) -> None:
    net = model()
    sync = CoreSync(net, server.url, secret=SECRET)
    sync.push()
    change(net, "c")
    server.answers = [(422, {"error": "push: wrong"})]
    with pytest.raises(ValueError, match="push: wrong"):
        sync.push()
    assert sync.push().version == 3
    assert (sent(server).base, list(sent(server).places)) == (1, [2])
    for answer in ((200, b"no json"), (404, b"{}"), (500, {"error": "of another server"})):
        server.answers = [answer]
        with pytest.raises(
            ValueError, match=rf"expected a server with the middleware .*CoreSyncEndpoint, got the answer {answer[0]}"
        ):
            CoreSync(net, server.url, secret=SECRET).push()


def test_what_cannot_be_sent_is_refused(server: ThreadingHTTPServer) -> None:
    net = model()
    sync = CoreSync(net, server.url, secret=SECRET)
    for name in ("a/b", "a@1", "", "../a", 3, "x" * 129, "-a", ".."):
        with pytest.raises(ValueError, match="name: expected up to 128 letters"):
            sync.push(name=name)
    with pytest.raises(RuntimeError, match="push: expected a model with a TaskBank"):
        sync.push(0)
    layer = adapted_layers(net)["b"]
    with torch.no_grad():
        layer.core[0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"push: expected finite values in b.core"):
            sync.push()
        layer.core[0, 0] = 0
        layer.factors.B[0, 0] += 1
    with pytest.raises(ValueError, match=r"model: expected the factors that it had when CoreSync was made, got others in "):
        sync.push()
    assert not server.got


def test_cores_of_other_factors_are_refused(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Another adapter is active than the one whose factors the engine or the bank has."""
    net = model(tasks=2)
    net.lotr_tasks.add()
    sync = CoreSync(net, server.url, secret=SECRET)
    add_adapter(net, "same", share_factors="default")
    add_adapter(net, "other")
    set_adapter(net, "same")
    sync.push(), sync.push(0), export_task(net, tmp_path / "task", task=0, base_model="base")
    set_adapter(net, "other")
    for task in (None, 0):
        with pytest.raises(ValueError, match="model: expected the factors that it had when CoreSync was made"):
            sync.push(task)
    with pytest.raises(ValueError, match="task: expected tasks of the active adapter's factors"):
        CoreSync(net, server.url, secret=SECRET).push(0)
    with pytest.raises(ValueError, match="task: expected tasks of the active adapter's factors"):
        export_task(net, tmp_path / "refused", task=0, base_model="base")
    assert len(server.got) == 2 and not (tmp_path / "refused").exists()


def test_a_task_has_the_scaling_that_mixed_computes_with(server: ThreadingHTTPServer) -> None:
    net = model(tasks=1)
    task = net.lotr_tasks.add({f"{name}.core": torch.ones(2, 3) for name in "abc"})
    scaling = adapted_layers(net)["a"].scaling
    for layer in adapted_layers(net).values():
        layer.scaling *= 2  # as a file with another scaling does
    CoreSync(net, server.url, secret=SECRET).push(task)
    assert torch.equal(sent(server).cores, torch.full((18,), scaling))


def test_an_engine_that_cannot_be_reached_is_refused(server: ThreadingHTTPServer) -> None:
    net = model()
    for secret in (None, "", "fifteen letters"):
        with pytest.raises(ValueError, match="secret: expected a secret of at least 16 bytes, got"):
            CoreSync(net, server.url, secret=secret)
    for url in ("127.0.0.1:8000", "ftp://a", "http://"):
        with pytest.raises(ValueError, match="engine: expected a URL as"):
            CoreSync(net, url, secret=SECRET)
    with pytest.raises(TypeError, match=r"engine: expected a vllm.LLM or a server's URL, got Linear"):
        CoreSync(net, nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="model: expected one with a LoTR adapter"):
        CoreSync(nn.Linear(1, 1), server.url, secret=SECRET)
    sync = CoreSync(net, server.url, secret=SECRET)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError):
        sync.push()


def test_a_message_that_is_none_is_refused() -> None:
    good = pack(Message("a", 2, 1, "c", [0, 2], torch.arange(4.0)))
    message = unpack(good)
    assert (message.name, message.version, message.base, message.checksum, message.places) == ("a", 2, 1, "c", [0, 2])
    assert torch.equal(message.cores, torch.arange(4.0))
    for end in range(len(good)):
        with pytest.raises(ValueError, match="push"):
            unpack(good[:end])
    with pytest.raises(ValueError, match="push: expected a message by CoreSync"):
        unpack(save({"cores": torch.zeros(2)}))
    fields = {"format": "lotr_push_1", "name": "a", "version": "2", "base": "1", "checksum": "c", "layers": "", "places": "[0]"}
    wrong = [
        {"version": "x"},
        {"base": "2"},
        {"version": "-1", "base": "-2"},
        {"name": "a/b"},
        {"places": "[[0]]"},
        {"layers": "[1]"},
    ]
    for one in wrong:
        with pytest.raises(ValueError, match=r"push|name"):
            unpack(save({"cores": torch.zeros(2)}, fields | one))
    for missing in fields:
        with pytest.raises(ValueError, match="push"):
            unpack(save({"cores": torch.zeros(2)}, {key: value for key, value in fields.items() if key != missing}))
    with pytest.raises(ValueError, match="push"):
        unpack(save({"other": torch.zeros(2)}, fields))


def test_cores_on_several_devices_are_joined() -> None:
    with FakeTensorMode():
        several = [torch.ones(2, 3, device=f"cuda:{i}") for i in range(2)]
        assert (found := joined(several)).device.type == "cpu" and found.shape == (12,)
    assert joined([torch.zeros(2, 1), torch.ones(1, 2)]).tolist() == [0, 0, 1, 1]
