"""The commands: python -m lotr_ext.convert COMMAND SOURCE DESTINATION."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.operators import DTYPES
from .bank import loras_to_bank
from .hosts import EXPERT_FORMS, SERVER_NAMES
from .to_lora import lotr_to_lora
from .to_lotr import GROUPS_OF_ONE_SHAPE, Conversion, lora_to_lotr, original_to_lotr

# ---- each command's function: writes the destination and returns the lines to print --------------


def _lotr_to_lora(source: str, destination: str, **options: object) -> list[str]:
    return [
        f"{name}  {layer.sizes[0]} x {layer.sizes[1]}  rank {layer.rank}"
        for name, layer in lotr_to_lora(source, destination, **options).items()
    ]


def _lora_to_lotr(
    source: str, destination: str, *, rank: list[int], group_by: str, dtype: str
) -> list[str]:
    ranks = rank[0] if len(rank) == 1 else tuple(rank)
    conversion = lora_to_lotr(source, rank=ranks, group_by=group_by, dtype=DTYPES[dtype])
    return _save(conversion, destination)


def _loras_to_bank(
    source: list[str], destination: str, *, rank: str, group_by: str, dtype: str
) -> list[str]:
    rank_or_share = int(rank) if rank.isdigit() else rank
    bank = loras_to_bank(
        source, destination, rank=rank_or_share, group_by=group_by, dtype=DTYPES[dtype]
    )
    return [*_error_lines(bank.errors), f"all tasks have rank {bank.config.rank}"]


def _original_to_lotr(source: str, destination: str, **options: object) -> list[str]:
    return _save(original_to_lotr(source, **options), destination)


def _save(conversion: Conversion, destination: str) -> list[str]:
    conversion.save(destination)
    return _error_lines(conversion.errors)


def _error_lines(errors: Mapping[str, float]) -> list[str]:
    return [f"{name}  error {error:.2e}" for name, error in errors.items()]


# ---- the command line ----------------------------------------------------------------------------

Arguments = dict[str, dict[str, Any]]  # the options of ArgumentParser.add_argument by name
_FOLDERS: Arguments = {
    "source": {},
    "destination": {"help": "directory for the new adapter, created if missing"},
}
_GROUP_BY = {
    "choices": GROUPS_OF_ONE_SHAPE,
    "help": "which layers share A and B (default %(default)s)",
}
_DTYPE = {"choices": DTYPES, "default": "float32", "help": "dtype of the new adapter"}
# The function of each command, its help and its arguments.
COMMANDS: dict[str, tuple[Any, str, Arguments]] = {
    "lotr-to-lora": (
        _lotr_to_lora,
        "Convert a LoTR adapter's folder to an exact LoRA for PEFT and servers.",
        {
            **_FOLDERS,
            "--task-type": {"help": "PEFT's task type, such as SEQ_CLS or CAUSAL_LM"},
            "--fan-in-fan-out": {"action": "store_true", "help": "for GPT-2's Conv1D layers"},
            "--experts": {
                "choices": EXPERT_FORMS,
                "default": "peft",
                "help": "the form of a mixture's experts (default peft)",
            },
            "--hosts": {
                "choices": SERVER_NAMES,
                "help": "the model type, if a server has special names for its experts",
            },
            "--base-model": {"help": "the base model's path, for base_model_name_or_path"},
        },
    ),
    "lora-to-lotr": (
        _lora_to_lotr,
        "Convert a PEFT LoRA's folder to LoTR, and print each layer's error.",
        {
            **_FOLDERS,
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
    ),
    "loras-to-bank": (
        _loras_to_bank,
        "Convert many PEFT LoRAs to one adapter and a task for each, and print each LoRA's error.",
        {
            **_FOLDERS,
            "source": {"nargs": "+", "help": "the LoRAs' folders; tasks are named after them"},
            "--rank": {
                "required": True,
                "metavar": "R",
                "help": "the rank, or auto=0.95: the smallest that keeps this share of the squared "
                "norms",
            },
            "--group-by": {**_GROUP_BY, "default": "layer"},
            "--dtype": _DTYPE,
        },
    ),
    "original-to-lotr": (
        _original_to_lotr,
        "Convert a file with a state dict of github.com/daskol/lotr to LoTR.",
        {
            **_FOLDERS,
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
    ),
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m lotr_ext.convert", description="Convert adapters to LoTR and back."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, text, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for argument, settings in arguments.items():
            command.add_argument(argument, **settings)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0. After an error, 2, with a message on stderr. An input that cannot be converted leaves the
        destination as it was.
    """
    options = vars(parser().parse_args(arguments))
    run = options.pop("run")
    try:
        lines = run(**options)
    except (TypeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, f"-> {options['destination']}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
