"""Reading and writing of files. A file is written whole or not at all. A FIFO, a device or endlessly nested JSON is an error,
not a hang. Every error names the file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["check_regular", "folder", "lock", "parse_json", "placed", "put_file", "read_bytes", "together"]

_TEMPORARY = re.compile(r"lotr\.[0-9a-f]{16}\.tmp|lotr_adapter\..*\.tmp")  # the latter by older versions
LEVELS = 100  # of JSON: far below where Python's own recursion ends, so that a value can be printed and compared


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # without it, opening a FIFO waits for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return descriptor


def check_regular(path: Path) -> None:
    """OSError for anything but a regular file that can be read."""
    os.close(_open_regular(os.fspath(path), os.O_RDONLY))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. OSError for anything else: a FIFO, a device, a directory."""
    with open(path, "rb", opener=_open_regular) as file:
        return file.read()


def _inside(values: Iterable[Any]) -> list[Any]:
    """The items of the values that are objects or lists."""
    return [item for v in values if isinstance(v, dict | list) for item in (v.values() if isinstance(v, dict) else v)]


def parse_json(data: bytes) -> Any:
    """The value in data. ValueError for what is no JSON, or is nested more than LEVELS deep."""
    too_deep = ValueError(f"more than {LEVELS} levels of nesting")
    try:
        value = json.loads(data)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(LEVELS):
        level = _inside(level)
    if level:
        raise too_deep
    return value


def lock(file: BinaryIO, *, wait: bool) -> bool:
    """Takes the file's lock; whether that worked. False if another process has it, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def together(directory: Path) -> Iterator[None]:
    """Context with a lock on directory: one caller at a time reads or writes files of it that belong together."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def folder(directory: Path) -> Iterator[None]:
    """Makes directory, with its parents; on an error inside, those that are new and empty are removed again.

    Raises:
        ValueError: directory is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got the file {directory}")
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(directory: Path) -> tuple[Path, BinaryIO]:
    """A new, locked file with a unique name. Unbuffered: otherwise close would write again what a full disk refused."""
    while True:
        path = directory / f"lotr.{secrets.token_hex(8)}.tmp"
        file = open(path, "xb", buffering=0)
        lock(file, wait=True)
        if path.exists():
            return path, file
        file.close()  # another saver took it for a leftover before it was locked


@contextmanager
def _written(directory: Path, data: bytes) -> Iterator[Path]:
    """data in a locked temporary file of directory, on the disk; it is removed at the end unless it was renamed."""
    temporary, file = _temporary(directory)
    try:
        with file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes an OSError inside name path instead of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        text = f"cannot write it ({os.strerror(error.errno)}); what was there before is unchanged"
        raise OSError(error.errno, text, str(path)) from error


@contextmanager
def placed(directory: Path, files: Mapping[str, bytes], *, apart: str | None = None) -> Iterator[None]:
    """Puts files into directory by name, each whole or not at all. They stay locked until the context ends, so that no other
    save removes them as leftovers.

    All are written before the first is renamed, so a full disk changes nothing. They are renamed in the given order. apart: a
    file that is removed before the first is renamed, because its old content does not fit the new files: so a kill in between
    leaves no mixture. Temporary files that killed savers have left in directory are removed.

    Raises:
        OSError: the disk; it names the file.
    """
    with ExitStack() as stack:
        ready = {}
        for name, data in files.items():
            with _naming(directory / name):
                if (directory / name).is_dir():
                    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
                ready[name] = stack.enter_context(_written(directory, data))
        if apart is not None:
            (directory / apart).unlink(missing_ok=True)
        for name, temporary in ready.items():
            with _naming(directory / name):
                os.replace(temporary, directory / name)
                _sync_directory(directory)
        _remove_leftovers(directory)
        yield


def _remove_leftovers(directory: Path) -> None:
    """Removes the temporary files on which no process holds a lock."""
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError), open(path, "r+b", opener=_open_regular) as file:
                if lock(file, wait=False):
                    path.unlink()


def put_file(directory: Path, name: str, data: bytes) -> None:
    """data in directory/name, whole or not at all. OSError names the file."""
    with placed(directory, {name: data}):
        pass
