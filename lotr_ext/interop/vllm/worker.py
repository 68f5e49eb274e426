"""Receives CoreSync's messages in each of vLLM's workers: `worker_extension_cls="lotr_ext.interop.vllm.worker.CoreWorker"`.

Each pushed version is a separate adapter, `name@version`. Requests in flight keep the version that they started with;
vLLM's slots and store hold versions like any adapters. The cores of each version are kept here, because vLLM may drop
an adapter from its store and load it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from . import engine
from .files import Factors, check_finite
from .loading import check_layers, expanded, native, served
from .message import PREFIX, Message, cores_checksum, unpack, versioned

__all__ = ["KEPT", "CoreWorker"]

KEPT = 4  # newest versions of a task to keep, in addition to those of requests in flight
_FIRST = 1 << 30  # lowest number of pushed adapters, above the numbers from users and the server

_versions: WeakKeyDictionary[engine.Adapters, _Versions] = WeakKeyDictionary()


class CoreWorker:
    """Methods that vLLM adds to its worker."""

    def lotr_push(self, data: bytes, in_use: Iterable[str] = ()) -> dict[str, Any]:
        """Adds a version of a task, drops a task, or says whether a version is held. data: of `message.pack`. in_use: the
        adapters of requests in flight.

        Returns {"name", "number", "path", "dropped"}, without a new version {"dropped"} or {"held"}, or {"error": message}, or
        what the sender must add: {"need": "factors"}, or {"need": "cores", "version": the newest one of this name}.
        """
        try:
            adapters = engine.adapters_of(self)
            if adapters is None:
                raise ValueError("engine: expected one with enable_lora=True and max_loras slots, got one without slots")
            _install()
            if adapters not in _versions:
                _versions[adapters] = _Versions(adapters)
            return _versions[adapters].push(unpack(data), frozenset(in_use))
        except ValueError as error:
            return {"error": str(error)}


class _Versions:
    """The versions in one worker. held: {task: {version: (checksum of the factors, vector of the cores)}}, oldest first.
    newest: the last version of each task, also of a dropped one: vLLM's prefix cache may still have a version of this name."""

    def __init__(self, adapters: engine.Adapters):
        own = served()
        self.native = own is not None
        self.adapters = adapters
        self.factors: dict[str, Factors] = {} if own is None else {own[1]: own[0]}  # by checksum
        self.held: dict[str, dict[int, tuple[str, Tensor]]] = {}
        self.newest: dict[str, int] = {}
        self.fitting: set[str] = set()  # checksums of the factors that match the model
        self.numbers = _FIRST

    def push(self, message: Message, in_use: frozenset[str]) -> dict[str, Any]:
        newest = self.newest.get(message.name, 0)
        own = self.held.get(message.name, {})
        before = own.get(message.base)
        if not message.places and message.base:
            return {"held": True} if _is_base(before, message) else {"need": "cores", "version": newest}
        if not message.places:
            self.newest[message.name] = max(newest, message.version)
            return {"dropped": self._drop(message.name, 0, in_use)}
        if message.checksum not in self.factors:
            if self.native:
                raise ValueError(
                    f"push: expected a task over the engine's factors {next(iter(self.factors))[:12]}, got one over "
                    f"{message.checksum[:12]}; start the engine with LOTR_FACTORS from export_factors of this model"
                )
            if message.factors is None:
                return {"need": "factors"}
            if message.factors.checksum != message.checksum:
                raise ValueError("push: expected factors with the checksum that the message says, got others")
        factors = self.factors.get(message.checksum) or message.factors
        name = versioned(message.name, message.version)
        if message.version <= newest or (message.base and not _is_base(before, message)):
            return {"need": "cores", "version": newest}
        cores = _merged(message, factors, before[1] if message.base else None)
        if message.checksum not in self.fitting:
            check_layers(self.adapters, factors)
            self.fitting.add(message.checksum)
        request = engine.LoRARequest(name, self.numbers, f"{PREFIX}{name}")
        kept = self.factors
        self.factors = kept | {message.checksum: factors}
        self.held[message.name] = own | {message.version: (message.checksum, cores)}
        try:
            self.adapters.add_adapter(request)
        except BaseException:
            self.factors, self.held[message.name] = kept, own
            raise
        self.newest[message.name] = message.version
        self.numbers += 1
        gone = self._drop(message.name, KEPT, in_use)
        return {"name": name, "number": request.lora_int_id, "path": request.lora_path, "dropped": gone}

    def _drop(self, task: str, kept: int, in_use: frozenset[str]) -> list[str]:
        """Drops the versions of a task except the newest `kept` and those in use, and factors that no version uses. Returns the
        names of the versions."""
        own = self.held.pop(task, {})
        gone = [version for version in list(own)[: max(0, len(own) - kept)] if versioned(task, version) not in in_use]
        if left := {version: one for version, one in own.items() if version not in gone}:
            self.held[task] = left
        if not self.native:
            used = {checksum for versions in self.held.values() for checksum, _ in versions.values()}
            self.factors = {checksum: factors for checksum, factors in self.factors.items() if checksum in used}
        return [versioned(task, version) for version in gone]

    def load(self, request: engine.LoRARequest) -> engine.LoRAModel:
        name, _, version = request.lora_path.removeprefix(PREFIX).rpartition("@")
        found = self.held.get(name, {}).get(int(version))
        if found is None:
            raise ValueError(
                f"adapter: expected a version that the engine holds, got {request.lora_name}; use the request of the last push"
            )
        checksum, cores = found
        if self.native:
            return native(self.adapters, request.lora_int_id, cores)
        return expanded(self.adapters, request.lora_int_id, self.factors[checksum], cores)


def _is_base(before: tuple[str, Tensor] | None, message: Message) -> bool:
    """Whether a held version is the one that the message's cores are to be merged into."""
    return before is not None and (before[0], cores_checksum(before[1])) == (message.checksum, message.base_checksum)


def _merged(message: Message, factors: Factors, before: Tensor | None) -> Tensor:
    """The vector of all cores. Raises ValueError for wrong places, counts or values."""
    spans, cores = list(factors.spans.values()), message.cores
    if before is None and list(message.places) != list(range(len(spans))):
        raise ValueError(f"push: expected the cores of all {len(spans)} layers, got {len(message.places)}")
    if sorted({*message.places}) != list(message.places) or not all(0 <= place < len(spans) for place in message.places):
        raise ValueError(f"push: expected places below {len(spans)}, rising, got {list(message.places)[:5]}")
    chosen = [spans[place] for place in message.places]
    size = sum(span.stop - span.start for span in chosen)
    if tuple(cores.shape) != (size,) or not cores.is_floating_point():
        raise ValueError(f"push: expected {size} floating numbers in cores, got {cores.dtype} {tuple(cores.shape)}")
    whole = cores
    if before is not None and len(chosen) < len(spans):
        whole = before.to(cores.dtype, copy=True)
        for span, part in zip(chosen, cores.split([span.stop - span.start for span in chosen]), strict=True):
            whole[span] = part
    check_finite(whole, factors, "push")
    return whole


@cache
def _install() -> None:
    """Makes vLLM load the adapters of pushed versions from `_versions`; called once per process."""
    engine.check_version()
    engine.load_first(_load)


def _load(adapters: engine.Adapters, request: engine.LoRARequest) -> engine.LoRAModel | None:
    if not request.lora_path.startswith(PREFIX) or adapters not in _versions:
        return None
    return _versions[adapters].load(request)
