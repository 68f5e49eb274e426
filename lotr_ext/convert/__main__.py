"""The commands: python -m lotr_ext.convert COMMAND SOURCE DESTINATION."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..core.operators import DTYPES
from .bank import loras_to_bank
from .hosts import EXPERT_FORMS, HOSTS
from .to_lora import lotr_to_lora
from .to_lotr import GROUPS_OF_ONE_SHAPE, Conversion, lora_to_lotr, original_to_lotr

COMMANDS = {
    "lotr-to-lora": "Convert a LoTR adapter's folder to an exact LoRA for PEFT and servers.",
    "lora-to-lotr": "Convert a PEFT LoRA's folder to LoTR, and print each layer's error.",
    "loras-to-bank": "Convert many PEFT LoRAs to one adapter and a task for each, "
    "and print each LoRA's error.",
    "original-to-lotr": "Convert a file with a state dict of github.com/daskol/lotr to LoTR.",
}


_GROUP_BY = {
    "choices": GROUPS_OF_ONE_SHAPE,
    "help": "which layers share A and B (default %(default)s)",
}
_DTYPE = {"choices": DTYPES, "default": "float32", "help": "dtype of the new adapter"}

# The options of each command, as for ArgumentParser.add_argument.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "lotr-to-lora": {
        "--task-type": {"help": "PEFT's task type, such as SEQ_CLS or CAUSAL_LM"},
        "--fan-in-fan-out": {"action": "store_true", "help": "for GPT-2's Conv1D layers"},
        "--experts": {
            "choices": EXPERT_FORMS,
            "default": "peft",
            "help": "the form of a mixture's experts (default peft)",
        },
        "--hosts": {
            "choices": HOSTS,
            "help": "the model type, if a server has special names for its experts",
        },
        "--base-model": {"help": "the base model's path, for base_model_name_or_path"},
    },
    "lora-to-lotr": {
        "--rank": {
            "type": int,
            "nargs": "+",
            "required": True,
            "metavar": "R",
            "help": "the rank, or r_in and r_out",
        },
        "--group-by": {**_GROUP_BY, "default": "shape"},
        "--dtype": _DTYPE,
    },
    "loras-to-bank": {
        "--rank": {
            "required": True,
            "metavar": "R",
            "help": "the rank, or auto=0.95: the smallest that keeps this share of the squared "
            "norms",
        },
        "--group-by": {**_GROUP_BY, "default": "layer"},
        "--dtype": _DTYPE,
    },
    "original-to-lotr": {
        "--scale": {
            "type": float,
            "default": 1.0,
            "help": "the scale that its layers were made with (default 1)",
        },
        "--modules-to-save": {
            "nargs": "+",
            "metavar": "NAME",
            "help": "fully trained modules, such as classifier",
        },
    },
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m lotr_ext.convert", description="Convert adapters to LoTR and back."
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        source = {}
        if name == "loras-to-bank":
            source = {"nargs": "+", "help": "the LoRAs' folders; tasks are named after them"}
        command.add_argument("source", **source)
        command.add_argument(
            "destination", help="directory for the new adapter, created if missing"
        )
        for flag, settings in OPTIONS[name].items():
            command.add_argument(flag, **settings)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, or 2 with a message on stderr if the input cannot be converted; then nothing was written.
    """
    options = vars(parser().parse_args(arguments))
    run = RUNS[options.pop("command")]
    destination = options["destination"]
    try:
        lines = run(**options)
    except (TypeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, f"-> {destination}", sep="\n")
    return 0


def _lotr_to_lora(source: str, destination: str, **options: object) -> list[str]:
    layers = lotr_to_lora(source, destination, **options)
    lines = []
    for name, layer in layers.items():
        k, n = layer.sizes
        lines.append(f"{name}  {k} x {n}  rank {layer.rank}")
    return [*lines, f"{len(lines)} layers"]


def _lora_to_lotr(
    source: str, destination: str, *, rank: list[int], group_by: str, dtype: str
) -> list[str]:
    ranks = rank[0] if len(rank) == 1 else tuple(rank)
    converted = lora_to_lotr(source, rank=ranks, group_by=group_by, dtype=DTYPES[dtype])
    return _saved(converted, destination)


def _loras_to_bank(
    source: list[str], destination: str, *, rank: str, group_by: str, dtype: str
) -> list[str]:
    number = int(rank) if rank.isdigit() else rank
    bank = loras_to_bank(source, destination, rank=number, group_by=group_by, dtype=DTYPES[dtype])
    lines = [f"{name}  error {error:.2e}" for name, error in bank.errors.items()]
    return [*lines, f"{len(lines)} tasks of rank {bank.config.ranks[0]}"]


def _original_to_lotr(source: str, destination: str, **options: object) -> list[str]:
    return _saved(original_to_lotr(source, **options), destination)


def _saved(converted: Conversion, destination: str) -> list[str]:
    converted.save(destination)
    lines = [f"{name}  error {error:.2e}" for name, error in converted.errors.items()]
    return [*lines, f"{len(lines)} layers"]


RUNS = {
    "lotr-to-lora": _lotr_to_lora,
    "lora-to-lotr": _lora_to_lotr,
    "loras-to-bank": _loras_to_bank,
    "original-to-lotr": _original_to_lotr,
}


if __name__ == "__main__":
    sys.exit(main())
