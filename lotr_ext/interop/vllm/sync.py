"""CoreSync: sends new cores to a running engine."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from ...model.adapted import adapted_layers
from ...model.saving import contents, unwrapped
from ...model.tasks import cores_and_scalings
from .files import Factors, check_finite, factors_of
from .message import PATH, SIGNATURE, Message, checked_name, checked_secret, cores_checksum, pack, signature

__all__ = ["CoreSync", "Pushed"]


@dataclass(frozen=True)
class Pushed:
    """The result of `CoreSync.push`.

    name: the adapter's name for requests, `task@version`. request: its LoRARequest for an engine in this process; None for a
    server. layers: how many cores were sent. bytes: of the messages. seconds: until the engine had loaded them.
    """

    name: str
    version: int
    request: Any
    layers: int
    bytes: int
    seconds: float


@dataclass
class _Sent:
    """The last version of a task that the engine loaded, and its cores by `Factors.spans`."""

    cores: Tensor
    pushed: Pushed


def joined(cores: Sequence[Tensor]) -> Tensor:
    """All cores in one vector on the CPU, by one copy if they are on one device."""
    flat = [core.flatten() for core in cores]
    if len({core.device for core in flat}) > 1:  # of a model over several devices
        flat = [core.cpu() for core in flat]
    return torch.cat(flat).cpu()


class CoreSync:
    """Sends the cores of a model to a running vLLM engine, each time as a new version of a task.

        sync = CoreSync(model, llm)                      an LLM, or a server's URL with secret=
        request = sync.push(name="policy").request       for generate; a server's requests give the name "policy@1"

    Each version is a separate adapter. Running requests keep the version they started with, and the prefix cache separates
    versions. The engine loads a version whole, between two steps. Only layers whose cores have changed since the last push
    are sent, and all to a server that was started again. The engine holds the last 4 versions of a task until `drop`, and those
    of running requests.

    Start the engine with `worker_extension_cls="lotr_ext.interop.vllm.worker.CoreWorker"`. With LOTR_FACTORS (the
    plugin) cores go into its bank. Without it, A and B are sent once, and the workers compute ordinary LoRA factors from them.

    Args:
        model: from `apply_lotr`. Its factors must not change: train only the cores (`train=("core",)`).
        engine: a vllm.LLM, or the URL of a server with `--middleware lotr_ext.interop.vllm.server.CoreSyncEndpoint`.
        secret: for a server, its LOTR_SYNC_SECRET, at least 16 bytes.
        timeout: for a server, seconds to wait for an answer.

    Raises:
        TypeError: an engine of another kind. ValueError: no http or https URL, a missing or short secret, or an adapter
            that the engine cannot hold (experts, init "svd", magnitudes, modules_to_save). RuntimeError: no adapter.
    """

    def __init__(self, model: nn.Module, engine: Any, *, secret: str | None = None, timeout: float = 60.0):
        self._model = unwrapped(model)
        live = factors_of(*contents(self._model), "CoreSync")
        self._factors = Factors(live.layers, {key: t.detach().cpu().clone() for key, t in live.tensors.items()})
        self._checksum = self._factors.checksum
        layers = adapted_layers(self._model)
        self._layers = {name: layers[name] for name in self._factors.spans}
        self._ends = torch.tensor([span.stop for span in self._factors.spans.values()])
        self._channel = _Server(engine, secret, timeout) if isinstance(engine, str) else _Local(engine)
        self._sent: dict[str, _Sent] = {}
        self._versions: dict[str, int] = {}
        self._lock = threading.Lock()

    def push(self, task: int | None = None, *, name: str | None = None) -> Pushed:
        """Sends the changed cores of a task as its next version.

        task: of the model's TaskBank; None for the cores of the active adapter. name: of the task in the engine, "adapter" or
        "task-<task>" by default. If no core has changed and the engine has the last version, that one stays valid.

        Raises:
            TypeError, ValueError: no such task, a name that cannot be served, cores that are not finite, factors that have
                changed, a wrong secret, or a refusal by the engine, which continues to serve. RuntimeError: a task of a model
                without a bank. OSError: no connection.
        """
        began = time.perf_counter()
        name = checked_name(name if name is not None else "adapter" if task is None else f"task-{task}")
        with self._lock:
            self._check_factors()
            cores = self._cores(task)
            check_finite(cores, self._factors, "push")
            sent = self._sent.get(name)
            places = [] if sent is None else self._changed(cores, sent.cores)
            if sent is not None and not places:
                last, (held, size) = sent.pushed, self._holds(name, sent)
                if held:
                    return Pushed(last.name, last.version, last.request, 0, size, time.perf_counter() - began)
                sent = None
            answer, layers, size = self._send(name, cores, places or range(len(self._layers)), sent)
            took = time.perf_counter() - began
            found = Pushed(answer["name"], self._versions[name], self._channel.request(answer), layers, size, took)
            self._sent[name] = _Sent(cores, found)
            return found

    def drop(self, name: str) -> None:
        """Removes a task's versions from the engine, except those of requests in flight. A later push sends all of its cores.

        Raises:
            ValueError, OSError: as `push`.
        """
        name = checked_name(name)
        with self._lock:
            self._versions[name] = self._versions.get(name, 0) + 1
            self._sent.pop(name, None)
            self._channel.send(pack(Message(name, self._versions[name], 0, self._checksum, (), torch.empty(0))))

    @torch.no_grad()
    def _cores(self, task: int | None) -> Tensor:
        """s G of all layers in one vector, by `Factors.spans`."""
        scaled = torch._foreach_mul(*cores_and_scalings(self._model, self._layers, task, "push"))
        return joined(scaled)

    def _changed(self, cores: Tensor, before: Tensor) -> list[int]:
        """The indices of the layers that differ."""
        at = torch.bucketize((cores != before).nonzero()[:, 0], self._ends, right=True)
        return torch.bincount(at).nonzero()[:, 0].tolist()

    def _check_factors(self) -> None:
        live = {}
        for name, layer in self._layers.items():
            live |= dict(zip(self._factors.layers[name], (layer.factors.A, layer.factors.B), strict=True))
        for key, value in self._factors.tensors.items():
            if not torch.equal(live[key].detach().cpu(), value):
                raise ValueError(
                    f"model: expected the factors that it had when CoreSync was made, got others in {key}; train the cores "
                    "alone, or make a new CoreSync (an engine with LOTR_FACTORS has to be started again)"
                )

    def _holds(self, name: str, sent: _Sent) -> tuple[bool, int]:
        """Whether the engine holds the last version of a task: not after a new start. And the bytes of the message."""
        last, none = sent.pushed.version, torch.empty(0)
        data = pack(Message(name, last + 1, last, self._checksum, (), none, base_checksum=cores_checksum(sent.cores)))
        return "held" in self._channel.send(data), len(data)

    def _send(self, name: str, cores: Tensor, places: Sequence[int], sent: _Sent | None) -> tuple[dict[str, Any], int, int]:
        """The engine's answer, and the numbers of cores and bytes sent. What it lacks is sent once."""
        size, factors = 0, None
        base, of_base = (0, "") if sent is None else (sent.pushed.version, cores_checksum(sent.cores))
        spans = list(self._factors.spans.values())
        for _ in range(3):
            version = self._versions[name] = self._versions.get(name, 0) + 1  # each attempt gets a new version
            some = cores if len(places) == len(spans) else torch.cat([cores[spans[place]] for place in places])
            data = pack(Message(name, version, base, self._checksum, places, some, factors, of_base))
            size += len(data)
            answer = self._channel.send(data)
            need = answer.get("need")
            if need is None:
                return answer, len(places), size
            if need == "factors":
                factors = self._factors
            self._versions[name] = max(version, answer.get("version", 0))
            base, of_base, places = 0, "", range(len(spans))
        raise ValueError(f"engine: expected an answer to a complete message, got {answer}")


class _Local:
    """An LLM of this process; its workers may be other processes."""

    def __init__(self, engine: Any):
        if not callable(getattr(engine, "collective_rpc", None)) or not hasattr(engine, "llm_engine"):
            raise TypeError(f"engine: expected a vllm.LLM or a server's URL, got {type(engine).__name__}")
        self.engine = engine

    def send(self, data: bytes) -> dict[str, Any]:
        from .engine import names_in_use

        try:
            answers = self.engine.collective_rpc("lotr_push", args=(data, sorted(names_in_use(self.engine.llm_engine))))
        except Exception as error:
            if "lotr_push" not in str(error):
                raise
            raise ValueError(
                "engine: expected one with worker_extension_cls='lotr_ext.interop.vllm.worker.CoreWorker', got one without"
            ) from error
        found = next((answer for answer in answers if "error" in answer), answers[0])
        if "error" in found:
            raise ValueError(found["error"])
        return found

    def request(self, answer: Mapping[str, Any]) -> Any:
        from .engine import LoRARequest

        return LoRARequest(answer["name"], answer["number"], answer["path"])


class _Server:
    """A server's endpoint over one connection that stays open, without proxies and redirects."""

    def __init__(self, url: str, secret: str | None, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"engine: expected a URL as http://127.0.0.1:8000, got {url!r}")
        self.secret = checked_secret(secret, "secret")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(parts.hostname, parts.port, timeout=timeout)
        self.path = parts.path.rstrip("/")

    def send(self, data: bytes) -> dict[str, Any]:
        headers = {"content-type": "application/octet-stream", SIGNATURE: signature(self.secret, data)}
        try:
            status, body = self._post(self.path + PATH, data, headers)
        except BaseException as error:
            self.connection.close()
            if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
                raise ConnectionError(f"engine: expected a whole HTTP answer, got {error!r:.200}; push again") from error
            raise
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        refusal = {"error"} if status in (401, 403, 413, 422) else set()
        fields = {"name", "need", "dropped", "held"} if status == 200 else refusal
        if not isinstance(answer, dict) or fields.isdisjoint(answer):
            raise ValueError(
                f"engine: expected a server with the middleware lotr_ext.interop.vllm.server.CoreSyncEndpoint, got the answer "
                f"{status} {body[:200]!r}"
            )
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _post(self, path: str, data: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        kept = self.connection.sock is not None
        try:
            self.connection.request("POST", path, data, headers)
            answer = self.connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.connection.close()
            if not kept:
                raise
            self.connection.request("POST", path, data, headers)  # the server had closed the idle connection
            answer = self.connection.getresponse()
        return answer.status, answer.read()

    def request(self, answer: Mapping[str, Any]) -> None:
        return None
