"""`python -m lotr_ext.convert`: converts adapters of LoRA and of the original LoTR implementation to LoTR, and LoTR to LoRA.

lora-to-lotr SOURCE DESTINATION --rank 16        a PEFT LoRA adapter, by Tucker-2; or --error 0.1, or --parameters 100000
loras-to-bank SOURCE... DESTINATION --rank 16    many of them, by Tucker-2, to shared factors and one task each
lotr-to-lora SOURCE DESTINATION                  for PEFT and other programs that read LoRA, exact
lotr-to-gguf SOURCE FILE --base-model DIR        for llama.cpp, as a LoRA, exact
lotr-to-peft SOURCE DESTINATION                  for PeftModel.from_pretrained, as LoTR; load_adapter reads what PEFT writes
original-to-lotr FILE DESTINATION                a state dict of github.com/daskol/lotr
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .interop import Conversion, ExpertLoRA, LoTRAdapter, lora_to_lotr, lotr_to_lora, lotr_to_peft, original_to_lotr, read_lora
from .interop.expert_lora import FORMS, HOSTS
from .interop.from_lora import exact_rank
from .interop.gguf import lotr_to_gguf
from .interop.lora_files import LoRALayer
from .interop.loras_to_bank import loras_to_bank, names_of
from .layers.checks import check_rank
from .layers.progress import progress_bar
from .ops.planner import DTYPES

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_COLUMNS = 8  # tasks that a table has beside each other


def _rank(text: str) -> int | tuple[int, int]:
    try:
        parts = tuple(int(part) for part in text.split(","))
    except ValueError:
        parts = ()
    if len(parts) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected R or R_IN,R_OUT, got {text!r}")
    return parts[0] if len(parts) == 1 else parts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m lotr_ext.convert", description="Convert adapters to LoTR and back.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, source: str, text: str, several: str | None = None) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("source", help=source, nargs=several)
        what = "new file" if name == "lotr-to-gguf" else "directory for the new adapter, created if missing"
        one.add_argument("destination", help=what)
        return one

    one = command(
        "lora-to-lotr", "directory of a PEFT LoRA adapter", "Convert a LoRA to LoTR by Tucker-2, and print each layer's error."
    )
    size = one.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=_rank, help="rank: R, or R_IN,R_OUT")
    size.add_argument("--error", type=float, help="smallest rank with at most this relative error in each group")
    size.add_argument("--parameters", type=int, help="largest useful rank with at most so many parameters")
    text = "Convert LoRAs of one model to shared factors and one task each, and print each layer's error."
    bank = command("loras-to-bank", "directories of PEFT LoRA adapters", text, "+")
    bank.add_argument("--rank", type=_rank, required=True, help="rank: R, or R_IN,R_OUT")
    for own, more in ((one, ()), (bank, ("layer",))):
        groups = ("shape", "block", "name", *more)
        own.add_argument("--group-by", choices=groups, default="shape", help="which layers share A and B")
        own.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the new adapter")
    one = command(
        "lotr-to-lora", "directory of a LoTR adapter (save_adapter)", "Convert LoTR to an exact LoRA adapter for PEFT."
    )
    one.add_argument("--task-type", help="PEFT's task type, such as SEQ_CLS or CAUSAL_LM")
    one.add_argument("--fan-in-fan-out", action="store_true", help="for GPT-2's Conv1D layers")
    one.add_argument("--experts", choices=FORMS, default="peft", help="the form of a mixture's experts (default peft)")
    one.add_argument("--hosts", choices=tuple(HOSTS), help="the model type, if a server has its own names for its experts")
    one.add_argument("--base-model", help="the base model's path, for base_model_name_or_path")
    one.add_argument("--pad-rank", type=int, metavar="R", help="pad all factors with zeros to this rank")
    one = command(
        "lotr-to-gguf", "directory of a LoTR adapter (save_adapter)", "Convert LoTR to an exact LoRA file for llama.cpp."
    )
    one.add_argument("--base-model", required=True, help="directory of the base model, with its config.json")
    one = command(
        "lotr-to-peft",
        "directory of a LoTR adapter (save_adapter)",
        "Convert LoTR to the folder that PEFT saves for a LoTRPeftConfig, exactly.",
    )
    one.add_argument("--task-type", help="PEFT's task type, such as SEQ_CLS or CAUSAL_LM")
    one = command(
        "original-to-lotr",
        "checkpoint of the original LoTR implementation",
        "Convert a state dict of github.com/daskol/lotr to LoTR.",
    )
    one.add_argument("--scale", type=float, default=1.0, help="the scale that its layers were made with (default 1)")
    one.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="fully trained modules, such as classifier")
    return top


def _line(text: str) -> str:
    """text in one line, with control characters escaped, because names come from files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def _table(console: Console, rows: Sequence[tuple[str, ...]], heads: Sequence[str], title: str) -> None:
    """Prints a table at its full width, even in a narrower terminal, so that names can be copied."""
    from rich.box import SIMPLE_HEAD
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_line, row))
    widest = Measurement.get(console, console.options.update(max_width=2**20), table).maximum
    console.width = max(console.width, widest)
    console.print(table)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 1, 2, 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _sizes(adapter: LoTRAdapter, name: str) -> str:
    entry = adapter.layers[name]
    return f"{entry.in_features} x {entry.out_features}"


def _lora_to_lotr(arguments: argparse.Namespace, console: Console) -> str:
    adapter, rank = read_lora(arguments.source), arguments.rank
    most = exact_rank(adapter, arguments.group_by)
    if rank is not None and max(check_rank(rank)) > most:
        raise ValueError(f"rank: expected at most {most}, at which the result is exact, got {rank}")
    with progress_bar("converts", 100) as show:
        found: Conversion = lora_to_lotr(
            adapter,
            rank=rank,
            error=arguments.error,
            parameters=arguments.parameters,
            group_by=arguments.group_by,
            dtype=DTYPES[arguments.dtype],
            report=lambda what, done: show(int(100 * done), what),
        )
    rows = [
        (name, group, _sizes(found, name), f"{found.errors[name]:.2e}")
        for group, names in found.groups.items()
        for name in sorted(names, key=_natural)
    ]
    found.save(arguments.destination)
    _table(console, rows, ("layer", "group", "in x out", "relative error"), "|D - s B G^T A^T| / |D|, D the LoRA's delta")
    groups = ", ".join(f"{group} {error:.2e}" for group, error in found.group_errors.items())
    return (
        f"{len(found.layers)} layers at rank {found.rank}; error over each group: {groups}; {found.parameters:,} parameters, "
        f"the LoRA has {found.lora_parameters:,}"
    )


def _loras_to_bank(arguments: argparse.Namespace, console: Console) -> str:
    with progress_bar("converts", 100) as show:
        found = loras_to_bank(
            names_of(arguments.source),
            rank=arguments.rank,
            group_by=arguments.group_by,
            dtype=DTYPES[arguments.dtype],
            report=lambda what, done: show(int(100 * done), what),
        )
    found.save(arguments.destination)
    title = "|D - B G^T A^T| / |D|, D a LoRA's delta"
    if len(found.tasks) <= _COLUMNS:
        columns, of = [*found.tasks], lambda name: [f"{own[name]:.2e}" for own in found.errors.values()]
        last = [("all layers", "", *(f"{error:.2e}" for error in found.task_errors.values()))]
    else:
        columns, of, last = ["mean", "highest", "task"], lambda name: _spread({t: e[name] for t, e in found.errors.items()}), []
        _table(console, [(task, f"{error:.2e}") for task, error in found.task_errors.items()], ("task", "all layers"), title)
    names = [name for own in found.groups.values() for name in sorted(own, key=_natural)]
    _table(console, [(name, _sizes(found, name), *of(name)) for name in names] + last, ("layer", "in x out", *columns), title)
    groups = ", ".join(f"{group} {error:.2e}" for group, error in found.group_errors.items())
    return (
        f"{len(found.tasks)} tasks of {len(found.layers)} layers at rank {found.config.rank}; error over each group: {groups}; "
        f"{found.parameters:,} parameters, the LoRAs have {found.lora_parameters:,}"
    )


def _spread(errors: Mapping[str, float]) -> list[str]:
    """The mean of a layer's errors, the highest, and the task that has it."""
    worst = max(errors, key=errors.__getitem__)
    return [f"{sum(errors.values()) / len(errors):.2e}", f"{errors[worst]:.2e}", worst]


def _lotr_to_lora(arguments: argparse.Namespace, console: Console) -> str:
    names = ("task_type", "fan_in_fan_out", "experts", "hosts", "base_model", "pad_rank")
    options = {name: getattr(arguments, name) for name in names}
    layers: dict[str, LoRALayer | ExpertLoRA] = lotr_to_lora(arguments.source, arguments.destination, **options)
    return _lora_table(console, layers)


def _lotr_to_gguf(arguments: argparse.Namespace, console: Console) -> str:
    return _lora_table(console, lotr_to_gguf(arguments.source, arguments.destination, base_model=arguments.base_model))


def _lora_table(console: Console, layers: Mapping[str, LoRALayer | ExpertLoRA]) -> str:
    rows = [
        (name, "{} x {}".format(*layer.sizes), str(layer.rank), f"{layer.scaling:g}", f"{layer.A.numel() + layer.B.numel():,}")
        for name, layer in sorted(layers.items(), key=lambda item: _natural(item[0]))
    ]
    _table(console, rows, ("layer", "in x out", "rank", "scaling", "parameters"), "exact")
    return f"{len(layers)} layers; {sum(layer.A.numel() + layer.B.numel() for layer in layers.values()):,} parameters"


def _lotr_to_peft(arguments: argparse.Namespace, console: Console) -> str:
    layers = lotr_to_peft(arguments.source, arguments.destination, task_type=arguments.task_type)
    rows = [
        (name, f"{entry.in_features} x {entry.out_features}", f"{entry.scaling:g}")
        for name, entry in sorted(layers.items(), key=lambda item: _natural(item[0]))
    ]
    _table(console, rows, ("layer", "in x out", "scaling"), "exact")
    return f"{len(layers)} layers"


def _original_to_lotr(arguments: argparse.Namespace, console: Console) -> str:
    options = {"scale": arguments.scale, "modules_to_save": arguments.modules_to_save}
    found = original_to_lotr(arguments.source, **options)
    rows = [(name, group, _sizes(found, name)) for group, names in found.groups.items() for name in sorted(names, key=_natural)]
    found.save(arguments.destination)
    _table(console, rows, ("layer", "group", "in x out"), "exact")
    scaling = found.config.scaling
    return f"{len(found.layers)} layers at rank {found.config.rank}, scaling {scaling:g}; {found.parameters:,} parameters"


def _check_destination(destination: Path, *, a_file: bool) -> None:
    """Raises ValueError, before anything is read, if destination cannot be written. Tests it by a file without a name."""
    if a_file and destination.is_dir():
        raise ValueError(f"destination: expected a file, got the directory {destination}")
    above = destination.absolute().parents if a_file else (destination.absolute(), *destination.absolute().parents)
    there = next(path for path in above if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got {destination}, where {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"destination: expected a directory that can be written, got {destination}, in {there}: {error.strerror}"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 with a message on stderr if the input cannot be converted; then nothing was written."""
    parsed = parser().parse_args(arguments)
    try:
        from rich.console import Console
    except ImportError:
        print(
            "error: expected the package rich for the table, got none: pip install 'lotr_ext[convert]'",
            file=sys.stderr,
        )
        return 2
    run = {
        "lora-to-lotr": _lora_to_lotr,
        "loras-to-bank": _loras_to_bank,
        "lotr-to-lora": _lotr_to_lora,
        "lotr-to-gguf": _lotr_to_gguf,
        "lotr-to-peft": _lotr_to_peft,
        "original-to-lotr": _original_to_lotr,
    }
    console = Console(markup=False, emoji=False, highlight=False)
    try:
        _check_destination(Path(parsed.destination), a_file=parsed.command == "lotr-to-gguf")
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always", UserWarning)
            told = run[parsed.command](parsed, console)
        console.print(_line(f"{told} -> {parsed.destination}"), soft_wrap=True)
        for doubt in doubts:
            print(f"warning: {_line(str(doubt.message).removeprefix('lotr_ext: '))}", file=sys.stderr)
    except (ImportError, TypeError, ValueError, OSError) as error:
        print(f"error: {_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
