"""Packs the results of a run into one file, and imports them into a checkout: bench/results/<GPU>/."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from lotr_ext import __version__

from ..measure.store import RESULTS, Store, write_whole
from ..measure.timing import slug
from .machine import ROOT

SUMMARY = "summary.json"
MOST_BYTES = 256 * 2**20  # limit of the unpacked size


def pack(folder: Path) -> Path:
    """Packs folder/results as folder/results.tar.gz, by way of a temporary name."""
    target = folder / "results.tar.gz"
    temporary = target.with_name("results.tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(folder / "results", arcname="results")
    return temporary.replace(target)


def import_results(path: Path, into: Path = RESULTS) -> list[Path]:
    """Adds a run's measurements to into/<GPU>: adds the cells of each program to the existing ones, the smoke table and
    the summary. Returns the written files; redraws nothing.

    Raises:
        ValueError: no packed results, results of another version, without a GPU or of several, or an unsafe archive. Nothing is
            written then.
    """
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = _unpack(path, Path(temporary))
        try:
            summary = json.loads((unpacked / SUMMARY).read_text(encoding="utf-8"))
            version, gpu = summary["version"], summary["gpu"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"import-results: expected {SUMMARY} of a run in {path}, got {type(error).__name__}") from None
        if version != __version__:
            raise ValueError(f"import-results: expected results of version {__version__}, got {version!r} in {path}")
        files = sorted(unpacked.glob("*/*.jsonl"))
        cards = {cell["machine"]["name"] for file in files for cell in Store(file).read()}
        if len(cards) != 1:
            raise ValueError(f"import-results: expected results of one card in {path}, got {sorted(cards) or gpu}")
        folder = into / slug(cards.pop())
        folder.mkdir(parents=True, exist_ok=True)
        written = [_merge(file, folder / _name(file, folder.name)) for file in files]
        for extra in (unpacked / SUMMARY, unpacked / "smoke" / "smoke.json"):
            if extra.exists():
                written.append(write_whole(folder / f"gpu-{extra.name}", extra.read_text(encoding="utf-8")))
    return written


def redraw() -> int:
    """Redraws the tables and pictures from all kept results."""
    return subprocess.run([sys.executable, "-m", "bench.report"], cwd=ROOT).returncode


def _unpack(path: Path, into: Path) -> Path:
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            if sum(member.size for member in members) > MOST_BYTES:
                raise ValueError(f"import-results: expected at most {MOST_BYTES} bytes in {path}, got more")
            archive.extractall(into, filter="data")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"import-results: expected the whole results.tar.gz of a run, got {path} ({why})") from None
    return into / "results"


def _name(file: Path, card: str) -> str:
    """kernels.jsonl, or without-wgmma.jsonl for a run with a feature switched off."""
    return file.name if file.parent.name == card else f"{file.parent.name}.jsonl"


def _merge(source: Path, target: Path) -> Path:
    """Adds the cells that are missing in target."""
    store = Store(target)
    known = {json.dumps(cell, sort_keys=True) for cell in store.read()}
    for cell in Store(source).read():
        if json.dumps(cell, sort_keys=True) not in known:
            store.append(cell)
    return target
