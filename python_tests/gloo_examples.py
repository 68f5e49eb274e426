"""The examples that torchrun starts, in processes that gloo has joined. folder: has "model", "two layers" and text.csv."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path


def printed(program: str, folder: Path, model: str, *arguments: str) -> str:
    """What the program prints in this process; its adapter goes to the folder that is named as its end: tp or pp."""
    module = importlib.import_module(program)
    words = ["--model", str(folder / model), "--text", str(folder / "text.csv"), "--out", str(folder / program[-2:])]
    options = module.arguments([*words, *"--steps 3 --batch 4 --rank 2".split(), *arguments])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module.run(options)
    return out.getvalue()


def train_tp(rank: int, folder: Path) -> str:
    return printed("train_tp", folder, "model")


def train_pp(rank: int, folder: Path) -> str:
    return printed("train_pp", folder, "two layers", "--tokens", "8")
