"""Receives CoreSync's messages in vLLM's HTTP server: `--middleware lotr_ext.interop.vllm.server.CoreSyncEndpoint`.

`POST /lotr/push` takes the bytes of `message.pack`. The header X-Lotr-Signature is their HMAC-SHA256 under the secret in
LOTR_SYNC_SECRET, so the secret is never sent, and a message that was cut or changed on its way is refused. A message that is
sent again changes nothing, because its version is not new.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from . import engine
from .message import PATH, SIGNATURE, checked_secret, signature

__all__ = ["LIMIT", "CoreSyncEndpoint"]

LIMIT = 1 << 28  # maximal bytes of a message

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class CoreSyncEndpoint:
    """ASGI middleware that answers requests to PATH and passes on all others.

    Accepts only messages from this machine, unless LOTR_SYNC_REMOTE=1.

    Raises:
        ValueError: LOTR_SYNC_SECRET is missing or shorter than 16 bytes. RuntimeError: a version of vLLM that is not tested.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        engine.check_version()
        self.app, self.secret = app, checked_secret(os.environ.get("LOTR_SYNC_SECRET"), "LOTR_SYNC_SECRET")
        self.remote = os.environ.get("LOTR_SYNC_REMOTE") == "1"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            return await self.app(scope, receive, send)
        status, answer = await self._answer(scope, receive)
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive) -> tuple[int, dict[str, Any]]:
        if not self.remote and not _is_local(scope.get("client")):
            return 403, {"error": "client: expected this machine, got another; LOTR_SYNC_REMOTE=1 lets others push"}
        if scope["method"] != "POST":
            return 405, {"error": f"method: expected POST, got {scope['method']}"}
        parts, size, more = [], 0, True
        while more:
            event = await receive()
            parts.append(event.get("body", b""))
            size, more = size + len(parts[-1]), event.get("more_body", False)
            if event["type"] != "http.request" or size > LIMIT:
                return 413, {"error": f"push: expected a whole message of at most {LIMIT} bytes, got {size} bytes"}
        data = b"".join(parts)
        given = dict(scope["headers"]).get(SIGNATURE.encode(), b"")
        if not hmac.compare_digest(given, signature(self.secret, data).encode()):
            return 401, {"error": "secret: expected a whole message signed with the server's LOTR_SYNC_SECRET, got another"}
        return await self._push(scope["app"].state, data)

    async def _push(self, state: Any, data: bytes) -> tuple[int, dict[str, Any]]:
        client, served = engine.client_and_names(state)
        answers = await client.collective_rpc("lotr_push", args=(data, sorted(engine.names_in_use(client))))
        found = next((answer for answer in answers if "error" in answer), answers[0])
        if "error" in found:
            return 422, found
        if "name" in found:
            served[found["name"]] = engine.LoRARequest(found["name"], found["number"], found["path"])
        for name in found.get("dropped", ()):
            served.pop(name, None)
        return 200, found


def _is_local(client: tuple[str, int] | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
