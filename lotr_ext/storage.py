"""Files: written atomically, read with errors that name them.

A write goes to a temporary name and is renamed, so a process that is killed leaves the old file or
the new one. Nothing in a file is ever executed.

Not here: what the file of an adapter (adapter_state.py) and of a task (task_files.py) contains.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FilePath = str | os.PathLike[str]


def expect_names(kind: str, expected: Collection[str], actual: Collection[str]) -> None:
    """Checks that a file has the names of the model.

    Args:
        kind: What has these names, for the error: "layers" or "tensors", for example.
        expected: The names in the model.
        actual: The names in the file.

    Raises:
        ValueError: If they differ.
    """
    missing = sorted(set(expected) - set(actual))
    foreign = sorted(map(str, set(actual) - set(expected)))
    if missing or foreign:
        raise ValueError(
            f"{kind}: expected the model's {len(expected)}, got {len(actual)}: missing "
            f"{', '.join(missing[:5]) or 'none'}; not in the model "
            f"{', '.join(foreign[:5]) or 'none'}"
        )


@contextmanager
def errors_of(where: str) -> Iterator[None]:
    """Turns whatever Python raises for a malformed document into one ValueError that names it."""
    try:
        yield
    except (
        AttributeError,
        LookupError,
        OverflowError,  # of float(), for an integer that is too large
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # With its type, because a KeyError prints only the key.
        raise ValueError(
            f"{where}: expected a well-formed adapter, got {type(error).__name__}: {error!s:.500}"
        ) from None


# ---- writing -------------------------------------------------------------------------------------


def put_file(path: Path, data: bytes) -> None:
    """Writes a file into an existing directory, atomically."""
    # In the same directory, because a rename is atomic only within a file system.
    temporary = path.parent / f"lotr.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            # Otherwise a crash after the rename may leave an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, atomically.

    Args:
        path: The file. Its directory is created if it does not exist.
        tensors: On any device, of any strides.
        metadata: For the file's header.

    Raises:
        FileExistsError: If the directory is a file.
        OSError: If the file cannot be written. The files in the directory are then unchanged.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, so each is copied.
    contiguous = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    data = save(contiguous, metadata)
    # Only now, so that a failure above leaves no empty directory.
    path.parent.mkdir(parents=True, exist_ok=True)
    put_file(path, data)


# ---- reading -------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """Returns the content of a regular file.

    Raises:
        OSError: If there is none, or it cannot be read.
    """
    # Opening a pipe would wait for a writer.
    if not path.is_file():
        raise OSError("another kind of file" if path.exists() else "no such file")
    return path.read_bytes()


def tensors_in(
    path: Path, argument: str, sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file.

    Args:
        path: The file.
        argument: The caller's argument that leads to the file, for the error.
        sha256: The expected checksum of the file, if known.

    Returns:
        The tensors and the metadata.

    Raises:
        ValueError: If there is no such file, it is damaged, or it has a dtype that
            safetensors.torch lacks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Once, because another process may replace the file between two reads.
        data = read_bytes(path)
        actual = hashlib.sha256(data).hexdigest()
        if sha256 is not None and actual != sha256:
            raise ValueError(f"sha256 {actual} instead of {sha256}: truncated, or another file")
        tensors = load(data)
        # `load` does not return the metadata. It is in the header, which `load` has checked: JSON,
        # after the eight bytes of its length.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{argument}: expected a safetensors file {path}, got {error}") from None
    # Of `load`, which looks the dtype up by its name in the file.
    except KeyError as error:
        raise ValueError(
            f"{argument}: expected dtypes that safetensors.torch reads in {path}, got {error}"
        ) from None
    return tensors, header.get("__metadata__") or {}


def checksum(tensors: Iterable[tuple[str, Tensor]], start: bytes = b"") -> str:
    """Returns the SHA-256 of start, and of the names, shapes, dtypes and values of tensors."""
    digest = hashlib.sha256(start)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        # As bytes, because NumPy has no bfloat16.
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_in(path: Path, argument: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        path: The file.
        argument: The caller's argument that leads to the file, for the error.

    Raises:
        ValueError: If there is no such file, or it contains something else.
    """
    try:
        content = json.loads(read_bytes(path))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{argument}: expected a JSON file {path}, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: expected a JSON object in {path}, got {content!r:.80}")
    return content
