"""The commands: python -m lotr_ext.convert COMMAND SOURCE DESTINATION."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m lotr_ext.convert", description="Convert adapters to LoTR and back."
    )
    commands = top.add_subparsers(dest="command", required=True)
    added = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in COMMANDS.items()
    }
    for name, command in added.items():
        if name == "loras-to-bank":
            command.add_argument(
                "source", nargs="+", help="the LoRAs' folders; tasks are named after them"
            )
        else:
            command.add_argument("source")
        command.add_argument(
            "destination", help="directory for the new adapter, created if missing"
        )
    _add_lora_options(added["lotr-to-lora"])
    for name, grouping in (("lora-to-lotr", "shape"), ("loras-to-bank", "layer")):
        added[name].add_argument(
            "--group-by",
            choices=GROUPS_OF_ONE_SHAPE,
            default=grouping,
            help=f"which layers share A and B (default {grouping})",
        )
        added[name].add_argument(
            "--dtype", choices=DTYPES, default="float32", help="dtype of the new adapter"
        )
    added["lora-to-lotr"].add_argument(
        "--rank",
        type=int,
        nargs="+",
        required=True,
        metavar="R",
        help="the rank, or r_in and r_out",
    )
    added["loras-to-bank"].add_argument(
        "--rank",
        required=True,
        metavar="R",
        help="the rank, or auto=0.95: the smallest that keeps this share of the squared norms",
    )
    original = added["original-to-lotr"]
    original.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the scale that its layers were made with (default 1)",
    )
    original.add_argument(
        "--modules-to-save",
        nargs="+",
        metavar="NAME",
        help="fully trained modules, such as classifier",
    )
    return top


def _add_lora_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task-type", help="PEFT's task type, such as SEQ_CLS or CAUSAL_LM")
    command.add_argument("--fan-in-fan-out", action="store_true", help="for GPT-2's Conv1D layers")
    command.add_argument(
        "--experts",
        choices=EXPERT_FORMS,
        default="peft",
        help="the form of a mixture's experts (default peft)",
    )
    command.add_argument(
        "--hosts",
        choices=tuple(HOSTS),
        help="the model type, if a server has its own names for its experts",
    )
    command.add_argument("--base-model", help="the base model's path, for base_model_name_or_path")


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
