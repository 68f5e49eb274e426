"""Adapters that older versions saved: a JSON file next to a safetensors file.

    lotr_adapter.json                   format, version, configuration, layers, and the name and
                                        checksum of the other file
    lotr_adapter.<digits>.safetensors   the tensors

Version 1 is of lotr_ext 0.1.0. This file turns both versions into the present one
(adapter_state.py).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .checks import check_rank
from .config import PARTS
from .storage import errors_of, json_in, tensors_in

JSON_NAME = "lotr_adapter.json"
_TENSORS = re.compile(r"lotr_adapter\.[0-9a-f]{16}\.safetensors")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads an adapter of version 1 or 2.

    Args:
        path: The JSON file.

    Returns:
        The document, which `AdapterState.from_document` checks, and the tensors, whose checksum was
        checked here.

    Raises:
        ValueError: If the files are damaged. The message names the file.
    """
    content = json_in(path, "directory")
    kind = content.get("format")
    version = content.get("format_version")
    if kind != "lotr" or version not in (1, 2):
        raise ValueError(
            f"{path}: expected format lotr of version 1 or 2, got {kind!r:.80} of version "
            f"{version!r:.80}"
        )
    name = str(content.get("tensors_file"))
    # A damaged or foreign file could name any path.
    if not _TENSORS.fullmatch(name):
        raise ValueError(
            f"{path}: expected tensors_file lotr_adapter.<digits>.safetensors, got {name:.80}"
        )
    document = {key: content.get(key) for key in ("config", "layers", "modules_to_save")}
    if version == 1:
        with errors_of(str(path)):
            document = _document_of_version_1(document)
    tensors, _ = tensors_in(path.parent / name, "directory", str(content.get("tensors_sha256")))
    return document, tensors


def remove(directory: Path) -> None:
    """Removes an adapter of an older version, after a new one was written."""
    for path in directory.iterdir():
        if path.is_file() and (path.name == JSON_NAME or _TENSORS.fullmatch(path.name)):
            # Another process may save at the same time, and remove it first.
            path.unlink(missing_ok=True)


def factor_names(factors: str | Sequence[str]) -> tuple[str, str]:
    """Returns the names of the tensors A and B of a layer.

    Args:
        factors: The names of two modules, one per factor. In version 1 the name of one module with
            both.
    """
    if isinstance(factors, str):
        return f"{factors}.A", f"{factors}.B"
    A, B = factors
    return f"{A}.value", f"{B}.value"


def config_of_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration of version 1 as one of the present version.

    Settings of version 1 that no longer exist, or had another meaning:

        scaling     None was alpha / r, with alpha = r by default. "auto" had other values.
        init        "gradient", which is now the function `init_from_gradient`.
        magnitude   Whether magnitudes were trained, with a part of this name in `train`.

    Raises:
        TypeError, ValueError: If a value has a wrong type, or is not supported any more.
    """
    config = dict(values)
    if config.pop("magnitude", False):
        raise ValueError("magnitude: expected False, got True, which this version does not have")
    config["train"] = [part for part in config.get("train", PARTS) if part != "magnitude"]
    if config.get("init") == "gradient":
        config["init"] = "orthonormal"
    if config.get("scaling") is None:
        # None meant alpha / r, which "auto" means today if alpha or rslora is given.
        is_one = config.get("alpha") is None and not config.get("rslora")
        config["scaling"] = 1.0 if is_one else "auto"
    elif config["scaling"] == "auto":
        r = max(check_rank(config.get("rank", 16)))
        exponent = 0.5 if config.get("core") == "diagonal" else 1.5
        config["scaling"] = 4.0 * (8 / r) ** exponent
    return config


def _document_of_version_1(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a document of version 1 as one of the present version, not checked yet."""
    entries = {}
    for name, entry in document["layers"].items():
        A, B = factor_names(entry["factors"])
        entries[name] = {
            "A": A,
            "B": B,
            "scaling": entry["scaling"],
            "dropout": entry["dropout"],
            "experts": entry.get("experts", 0),
        }
    config = document["config"]
    return {
        "config": config if config is None else config_of_version_1(config),
        "layers": entries,
        "modules_to_save": document["modules_to_save"],
    }
