"""Bad options of every benchmark program are refused by name, with what was expected."""

from __future__ import annotations

import importlib
import os
import shlex

import pytest
import torch

CARDS = "gpus: expected some of a100, .*got 'z80'"
# program, its options, the error
REFUSED = [
    ("layer", "--shapes 7x7", "shapes: expected MxKxNxR"),
    ("layer", "--shapes gpt-9:1:1", "shapes: expected .*roberta-base"),
    ("layer", "--shapes 0x1x1x1", "shapes: expected sizes of at least 1"),
    ("layer", "--dtypes int8", "dtypes: expected some of fp32"),
    ("layer", "--threads 0", "threads: expected numbers"),
    ("layer", "--rivals magic", "rivals: expected some of"),
    ("layer", "--device tpu", "device: expected cpu or cuda"),
    ("layer", f"--device cpu --clock cpu --threads {os.cpu_count()}", "clock: expected one CPU thread"),
    ("layer", "--device cpu --clock events", "clock: expected wall or cpu on a CPU"),
    ("layer", "--rounds 0", "rounds: expected at least 1, got 0"),
    ("layer", "--slice nan", "slice, minutes"),
    ("layer", "--minutes -1", "slice, minutes"),
    ("layer", "--device cpu --autotune", "autotune: expected --device cuda"),
    *(
        ("layer", f"--device cpu --{name} ''", f"{name}: expected")
        for name in ("dtypes", "threads", "results", "shapes", "rivals")
    ),
    ("kernels", "--device cpu --kernels magic", "kernels: expected some of shrink"),
    ("kernels", "--device cpu --kernels ''", "kernels: expected some of shrink"),
    ("kernels", "--device cpu --shapes 0x2x3", "shapes: expected MxNxR"),
    ("kernels", "--device cpu --shapes ''", "shapes: expected MxNxR"),
    ("shared", "--device cpu --layers 4,x", "layers: expected positive"),
    ("shared", "--device cpu --layers ''", "layers: expected positive"),
    ("shared", "--device cpu --shape 3x4", "shape: expected MxKxR"),
    ("shared", "--device cpu --shape ''", "shape: expected MxKxR"),
    ("shared", "--device cpu --rounds 0", "rounds"),
    ("block", "--device cpu --models gpt-9", "models: expected some of llama-3-8b"),
    ("block", "--device cpu --models tiny --tokens 0", "tokens: expected positive numbers"),
    ("block", "--device cpu --models tiny --tokens 3000", "tokens: expected a multiple of 2048"),
    ("block", "--device cpu --models tiny --ranks ''", "ranks: expected positive numbers"),
    ("block", "--device cpu --models tiny --rivals magic", "rivals: expected some of frozen"),
    ("host", "--device cpu --tokens 4,x", "tokens: expected positive"),
    ("host", "--device cpu --tokens ''", "tokens: expected positive"),
    ("host", "--device cpu --layers 4", "layers a multiple of 3, got 4"),
    ("host", "--device cpu --width 0", "layers, width, rank: expected positive"),
    ("host", "--device cpu --forms ring", "forms: expected some of chained, siblings, got 'ring'"),
    ("host", "--device cpu --rivals magic", "rivals: expected some of frozen"),
    ("host", "--device cpu --rounds 0", "rounds"),
    ("model", "--device cpu --model gpt-9", "model: expected one of minilm"),
    ("model", "--device cpu --methods magic", "methods: expected some of frozen"),
    ("model", "--device cpu --batch 0", "batch, sequence, rank: expected at least 1"),
    ("model", "--device cpu --rank 0", "batch, sequence, rank: expected at least 1"),
    ("model", "--device cpu --methods ''", "methods: expected some of frozen"),
    ("model", "--device cpu --targets ''", "targets: expected names of layers"),
    ("experts", "--device cpu --shapes 48x16x8x4x2", "shapes: expected MxHxIxExKxR, comma-separated, got"),
    ("experts", "--device cpu --shapes 48x16x8x4x2x0", "shapes: expected MxHxIxExKxR, comma-separated, got"),
    ("experts", "--device cpu --shapes a", "shapes: expected MxHxIxExKxR, comma-separated, got"),
    ("experts", "--device cpu --shapes 48x16x8x4x5x2", "shapes: expected a top k of at most the 4 experts, got 5"),
    ("tasks", "--device cpu --shapes 4x3x7x16x1", "shapes: expected TOKENSxROWSxTASKSxWIDTHxBLOCKSxRANK, comma-separated, got"),
    (
        "tasks",
        "--device cpu --shapes 4x3x7x16x1x0",
        "shapes: expected TOKENSxROWSxTASKSxWIDTHxBLOCKSxRANK, comma-separated, got",
    ),
    ("tasks", "--device cpu --shapes a", "shapes: expected TOKENSxROWSxTASKSxWIDTHxBLOCKSxRANK, comma-separated, got"),
    ("profile", "--device cpu --slice 0", "slice: expected a positive number, got 0"),
    ("profile", "--device cpu --shapes ''", "shapes: expected MxKxNxR"),
    ("fused", "--shapes 8x8x12x4", "shapes: expected widths that are multiples of 8, got 8 and 12"),
    ("fused", "--shapes 8x8x8x200", "shapes: expected ranks from 1 to 128, got 200"),
    ("fused", "", "device: expected a GPU of compute capability 9.0, found none"),
    ("static", "--gpus h100,z80", CARDS),
    ("static", "--dtypes fp64", "dtypes: expected some of bf16, .*got 'fp64'"),
    ("static", "--kernels gemm", "kernels: expected some of shrink, .*got 'gemm'"),
    ("static", "--ranks 0", "ranks: expected positive numbers"),
    ("static", "--ranks 300", "ranks: expected at most 256"),
    ("static", "--shapes 8192", "shapes: expected MxN"),
    ("traffic", "--shapes ''", "shapes: expected MxKxNxR"),
    ("traffic", "--gpus h100,z80", CARDS),
    ("traffic", "--shapes 1x2", "shapes: expected MxKxNxR"),
    ("traffic", "--shapes 8x8x8x300", "shapes: expected ranks up to 256"),
    ("traffic", "--rows 1x2x3", "rows: expected TOKENSxTOPxCORESxRANK, .*got '1x2x3'"),
    ("traffic", "--rows 8x1x0x4", "rows: expected TOKENSxTOPxCORESxRANK"),
    ("traffic", "--rows 8x1x2x300", "rows: expected ranks up to 256, .*got 300"),
    ("traffic", "--rows 8x3x2x4", "rows: expected at most as many cores a token as there are, 2, got 3"),
    ("gpu.__main__", "--budget 0", "budget: expected seconds of at least 1"),
    ("gpu.__main__", "--budget nan", "budget: expected seconds"),
    ("gpu.__main__", "--parts magic", "parts: expected some of build, info"),
    ("gpu.__main__", "--parts ''", "parts: expected some of build, info"),
    ("gpu.__main__", "--wheel /none.whl", "wheel: expected a wheel of lotr_ext, got /none.whl"),
]


@pytest.mark.parametrize(("program", "options", "message"), REFUSED)
def test_bad_options_are_refused(program: str, options: str, message: str, monkeypatch) -> None:
    if "one CPU thread" in message and os.cpu_count() == 1:
        pytest.skip("one core")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = importlib.import_module(f"bench.{program}")
    with pytest.raises(ValueError, match=message):
        module.arguments(shlex.split(options))
