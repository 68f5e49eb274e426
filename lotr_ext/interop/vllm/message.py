"""The message from CoreSync to an engine: one safetensors file in memory.

Tensors: `cores`, the numbers s G of the layers that changed, one after another in the order of `Factors.spans`; for an engine
that has no factors also `factor.<key>`. Metadata: the fields of `Message` as text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...files import parse_json
from ...model.adapter_files import tensors_of
from ...model.shared_factors import add_values
from .files import Factors

__all__ = [
    "PATH",
    "PREFIX",
    "SIGNATURE",
    "Message",
    "checked_name",
    "checked_secret",
    "cores_checksum",
    "pack",
    "signature",
    "unpack",
    "versioned",
]

PREFIX = "lotr:"  # of the path by which an engine identifies a pushed version
PATH, SIGNATURE = "/lotr/push", "x-lotr-signature"  # of a server: the path for messages, and the header with their signature
_FORMAT, _FACTOR = "lotr_push_1", "factor."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Message:
    """One version of a task.

    base: the version from which the other layers are taken; 0 if all are sent. base_checksum: of the cores of that version: a
    restarted engine may have another sender's version of this number; "" without a base. checksum: of the factors. places:
    indices of the sent layers in the order of `Factors.spans`; none, without a base: the engine drops the task's versions, with
    one: it says whether it holds that version. cores: numbers s G.
    """

    name: str
    version: int
    base: int
    checksum: str
    places: Sequence[int]
    cores: Tensor
    factors: Factors | None = None
    base_checksum: str = ""


def cores_checksum(cores: Tensor) -> str:
    """SHA-256 of a vector of cores."""
    digest = hashlib.sha256()
    add_values(digest, "cores", cores)
    return digest.hexdigest()


def checked_name(name: object) -> str:
    """Raises ValueError for a name that cannot be used in a request, a path and a URL."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"name: expected up to 128 letters, digits, '.', '_' and '-', the first a letter or digit, got {name!r:.150}"
        )
    return name


def versioned(name: str, version: int) -> str:
    """The adapter's name in requests."""
    return f"{name}@{version}"


def pack(message: Message) -> bytes:
    """The message as bytes."""
    from safetensors.torch import save

    tensors, layers = {"cores": message.cores}, ""
    if message.factors is not None:
        layers = json.dumps(message.factors.layers)
        tensors |= {f"{_FACTOR}{key}": value.contiguous() for key, value in message.factors.tensors.items()}
    fields = {"name": message.name, "version": str(message.version), "base": str(message.base), "checksum": message.checksum}
    fields["base_checksum"] = message.base_checksum
    return save(tensors, {"format": _FORMAT, "layers": layers, "places": json.dumps(list(message.places)), **fields})


def unpack(data: bytes) -> Message:
    """The message in data.

    Raises:
        ValueError: not a message, a truncated one, or a name that cannot be served.
    """
    metadata = _metadata(data)
    tensors = tensors_of(Path("push"), data)
    try:
        version, base = int(metadata["version"]), int(metadata["base"])
        factors = None
        if metadata["layers"]:
            layers = {str(name): (str(A), str(B)) for name, (A, B) in parse_json(metadata["layers"].encode()).items()}
            factors = Factors(layers, {key: tensors[f"{_FACTOR}{key}"] for pair in layers.values() for key in pair})
        places = [operator.index(place) for place in parse_json(metadata["places"].encode())]
        name, checksum, cores = metadata["name"], metadata["checksum"], tensors["cores"]
        base_checksum = metadata["base_checksum"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"push: expected the fields of a message by CoreSync, got {error!r} wrong") from None
    if version < 1 or not 0 <= base < version:
        raise ValueError(f"push: expected a version above its base, got {version} on {base}")
    return Message(checked_name(name), version, base, checksum, places, cores, factors, base_checksum)


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 + size:
        raise ValueError(f"push: expected a whole message by CoreSync, got {len(data)} bytes of one that was cut, or of none")
    header = parse_json(data[8 : 8 + size])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(f"push: expected a message by CoreSync in the format {_FORMAT}, got another file; use CoreSync.push")
    return metadata


def checked_secret(secret: str | None, where: str) -> bytes:
    """Raises ValueError for a secret that is missing or too short."""
    if not secret or len(secret.encode()) < 16:
        raise ValueError(f"{where}: expected a secret of at least 16 bytes, got {len((secret or '').encode())}")
    return secret.encode()


def signature(secret: bytes, data: bytes) -> str:
    """The value of the header SIGNATURE for data."""
    return hmac.new(secret, data, hashlib.sha256).hexdigest()
