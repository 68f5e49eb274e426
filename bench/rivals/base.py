"""The tensors of a case, and the class of the rivals built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.shapes import DTYPES, Case

SCALING = 2.0
LORA, LOTR, VERA = ("A", "B"), ("A", "B", "core"), ("b", "d")


class Written(nn.Module):
    """A formula as a module, so that every rival's time includes a module call."""

    def __init__(self, formula: Callable[[Tensor], Tensor]):
        super().__init__()
        self.forward = formula


@dataclass
class Rival:
    """layer(x [m, k]) -> y [m, n], a module or a formula; parameters: the trained tensors by their name in the formula, each
    with whether it is stored transposed (LoRA's modules keep A and B as nn.Linear weights); frozen: its other tensors,
    which are not trained."""

    name: str
    layer: Callable[[Tensor], Tensor]
    parameters: dict[str, tuple[Tensor, bool]]
    frozen: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.layer, nn.Module):
            self.layer = Written(self.layer)


@dataclass
class Tensors:
    """A case's tensors: A [k, r], B [n, r], core [r, r], weight [n, k], bias [n] or None, and VeRA's vectors d [r], b [n]."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    core: Tensor
    d: Tensor
    b: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Tensors:
        g, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]

        def normal(*shape: int, scale: float) -> Tensor:
            if device.type == "meta":
                return torch.empty(*shape, dtype=dtype, device=device)
            return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

        return cls(
            normal(case.n, case.k, scale=case.k**-0.5),
            normal(case.n, scale=0.1) if case.has_bias() else None,
            normal(case.k, case.r, scale=case.k**-0.5),
            normal(case.n, case.r, scale=case.r**-0.5),
            normal(case.r, case.r, scale=case.r**-0.5),
            normal(case.r, scale=1.0),
            normal(case.n, scale=1.0),
        )


def parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.clone().contiguous())


def frozen_linear(t: Tensors) -> nn.Linear:
    """The base layer as a module that uses these tensors, not copies."""
    linear = nn.Linear(t.weight.shape[1], t.weight.shape[0], bias=t.bias is not None, device="meta")
    linear.weight = nn.Parameter(t.weight, requires_grad=False)
    if t.bias is not None:
        linear.bias = nn.Parameter(t.bias, requires_grad=False)
    return linear


def lora_forward(t: Tensors, A: Tensor, B: Tensor) -> Callable[[Tensor], Tensor]:
    """Plain LoRA: A [r, k], B [n, r]."""
    return lambda x: F.linear(x, t.weight, t.bias) + SCALING * F.linear(F.linear(x, A), B)


def lora_rival(name: str, t: Tensors, layer: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]) -> Rival:
    """A rival of LoRA's parameters: layer(A [r, k], B [n, r]) is x -> y."""
    A, B = parameter(t.A.T), parameter(t.B)
    return Rival(name, layer(A, B), {"A": (A, True), "B": (B, False)})
