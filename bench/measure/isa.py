"""Limits our kernels, and the libraries that they are compared with, to a lower instruction set than the machine's own.

Each of them reads an environment variable once, when it is loaded or first run. So a program with --isa starts itself again
with these variables set.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

# ours, torch's own operators, MKL, oneDNN
_VARIABLES = ("LOTR_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
ISAS = {
    "avx2": dict(zip(_VARIABLES, ("avx2", "avx2", "AVX2", "AVX2"))),
    "avx512": dict(zip(_VARIABLES, ("avx512", "avx512", "AVX512", "AVX512_CORE"))),
}


def add_isa_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--isa", help=f"use no more than this instruction set: {', '.join(ISAS)} (all that the CPU has)")


def restart_if_asked(argv: list[str]) -> None:
    """Starts this very command again where argv has an --isa that the environment does not have yet; then never returns."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    add_isa_option(parser)
    try:
        isa = parser.parse_known_args(argv)[0].isa
    except argparse.ArgumentError:
        return  # the program's own parser says what is wrong
    if isa in ISAS and not _is_set(isa):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ISAS[isa]})


def check_isa(isa: str | None, device: str) -> None:
    """Raises ValueError unless this process computes with isa (None: with whatever it has)."""
    if isa is None:
        return
    if isa not in ISAS:
        raise ValueError(f"isa: expected one of {', '.join(ISAS)}, got {isa!r}")
    if device != "cpu":
        raise ValueError(f"isa: expected --device cpu beside it, got {device}")
    from lotr_ext.ops import planner

    try:
        ours = planner.build_info()["cpu"]["isa"]
    except RuntimeError as error:
        raise ValueError(f"isa: {str(error).splitlines()[0]}") from None
    if not (_is_set(isa) and ours == isa and torch.backends.cpu.get_cpu_capability() == isa.upper()):
        names = " ".join(f"{name}={value}" for name, value in ISAS[isa].items())
        raise ValueError(f"isa: expected a process started with {names}, got one in which lotr_ext has chosen {ours}")


def held_to() -> str | None:
    """The instruction set that the environment allows our kernels, "avx2"; None where it does not say."""
    return os.environ.get("LOTR_CPU_ISA") or None


def _is_set(isa: str) -> bool:
    return all(os.environ.get(name) == value for name, value in ISAS[isa].items())
