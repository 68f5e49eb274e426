"""The raw operators: what each takes, and calls of them with an argument that they have to refuse.

An argument's name says its shape; `!` marks one that is written in place; other words are values.
"""

from __future__ import annotations

import ast

import torch
from torch import Tensor

SHAPES = {
    "x": "mk",
    "A": "kr",
    "B": "ns",
    "core": "rs",
    "F": "nr",
    "u": "mr",
    "g": "mn",
    "y": "mn",
    "weight": "nk",
    "bias": "n",
    "k": "mr",
    "dx": "mk",
    "dA": "kr",
    "dB": "ns",
    "Q": "nr",
    "acc": "kr",
    "cores": "lrs",
}
OPERATORS = {
    "shrink": "x A",
    "expand": "y u F",
    "expand_add_": "y! u F",
    "factor_grad_": "acc! x k",
    "shrink_grad_": "Q! g F u",
    "fold": "B cores 0.5 dtype",
    "fold_grad": "Q:lnr B cores 0.5 dB!",
    "layer_forward": "x weight bias A B core 0.5 0",
    "layer_forward unfolded": "x weight bias A B core 0.5 4",
    "layer_backward_": "g weight x u A F B core 0.5 0 None dx! None dA! dB! True True",
    "layer_backward_ unfolded": "g weight x u A None B core 0.5 4 None None None dA! dB! True True",
    "shrink_backward_": "k dx! x A dA!",
    "row_core": "u cores index None None 0.5",
    "row_core_backward": "g:ms u cores index None None 0.5 True True",
    "grouped_mm": "x weight:lnk offs",
    "grouped_outer": "g x offs",
}
SIZES = {"k": 6, "n": 4, "r": 3, "s": 2, "l": 3}


def argument_names(operator: str, *, written: bool = False) -> list[str]:
    """The tensors that an operator takes; written: those that it writes."""
    words = [word for word in OPERATORS[operator].split() if word.endswith("!") or not written]
    names = [word.rstrip("!").partition(":")[0] for word in words]
    return [name for name in names if name in SHAPES or name in ("index", "offs")]


def call_operator(
    operator: str, argument: str, *, rows: int, dtype: torch.dtype, shares: str | None = None, offset: int = 0
) -> object:
    """Calls it with the argument on the meta device, or, given shares, in the memory of the argument of that name, `offset`
    numbers further on."""
    values: list[object] = []
    tensors: dict[str, Tensor] = {}
    for word in OPERATORS[operator].split():
        name, _, shape = word.rstrip("!").partition(":")
        if name == "dtype":
            values.append(dtype)
        elif name == "index":
            tensors[name] = torch.arange(rows) % SIZES["l"]
        elif name == "offs":
            tensors[name] = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
        elif not (shape or name in SHAPES):
            values.append(ast.literal_eval(name))
        else:
            sizes = [rows if letter == "m" else SIZES[letter] for letter in shape or SHAPES[name]]
            tensors[name] = torch.randn(sizes, dtype=dtype, generator=torch.Generator().manual_seed(len(values)))
        if name in tensors:
            values.append(tensors[name])
    old = tensors[argument]
    if shares is None:
        new = old.to("meta")
    else:
        other = tensors[shares]
        memory = torch.randn(offset + max(old.numel(), other.numel()) + offset, dtype=dtype)
        new = memory[offset : offset + old.numel()].view(old.shape)
        values = [memory[: other.numel()].view(other.shape) if t is other else t for t in values]
    return getattr(torch.ops.lotr, operator.split()[0])(*(new if t is old else t for t in values))
