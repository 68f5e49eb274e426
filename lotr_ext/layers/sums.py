"""Weighted sums of adapters' tensors: linear, TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), as in PEFT's merge_utils.

linear            sum_i w_i T_i
magnitude_prune   sum_i w_i keep(T_i)      keep: the int(density numel) largest magnitudes, zero elsewhere
ties              sum_i w_i keep(T_i) [sign keep(T_i) = e] / max(1, how many agree),  e = sign sum_i keep(T_i)
dare              sum_i w_i drop(T_i)      drop: each element kept with probability density, and divided by it
dare_ties         ties with drop for keep
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_number

__all__ = ["METHODS", "Rule", "check_weights"]

METHODS = ("linear", "ties", "dare", "dare_ties", "magnitude_prune")
_MAJORITIES = ("total", "frequency")


def check_weights(name: str, weights: object) -> dict[object, float]:
    """Returns the checked weights. name: the argument, for the message.

    Raises:
        TypeError: not a mapping, or a weight that is not a number. ValueError: an empty mapping, or a weight not finite.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name}: expected a mapping to weights, got {type(weights).__name__}")
    if not weights:
        raise ValueError(f"{name}: expected at least one with its weight, got none")
    for key, weight in weights.items():
        check_number(f"{name}[{key!r}]", weight)
    return {key: float(weight) for key, weight in weights.items()}


@dataclass(frozen=True)
class Rule:
    """The rule for summing tensors. Checked at construction.

    Attributes:
        method: one of METHODS.
        density: the fraction of elements that are kept, in (0, 1]; None for "linear", which keeps all.
        seed: of the random drops of "dare" and "dare_ties": the same elements on every device.
        majority: how TIES elects the sign of an element: by the "total" of the tensors or the "frequency" of their signs.

    Raises:
        TypeError, ValueError: a value that is not one of these.
    """

    method: str = "linear"
    density: float | None = None
    seed: int = 0
    majority: str = "total"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.majority not in _MAJORITIES:
            raise ValueError(f"majority: expected one of {', '.join(_MAJORITIES)}, got {self.majority!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: expected an int, got {type(self.seed).__name__} {self.seed!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an int in [0, 2**63), got {self.seed}")
        if self.method == "linear":
            if self.density is not None:
                raise ValueError(f'density: expected None with "linear", which keeps every element, got {self.density!r}')
            return
        if self.density is None:
            raise ValueError(f'density: expected the fraction of elements that "{self.method}" keeps, got None')
        check_number("density", self.density)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: expected a number in (0, 1], got {self.density}")

    @torch.no_grad()
    def sum_by_name(self, several: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
        """The sum of several adapters' tensors by name, in float64. Names are processed in order, and
        for each name the adapters in order."""
        generator = torch.Generator().manual_seed(self.seed)
        return {name: self._sum([tensors[name] for tensors in several], weights, generator) for name in several[0]}

    def sum_of_cores(
        self, several: Sequence[Sequence[tuple[Tensor, float]]], weights: Sequence[float], scalings: Sequence[float]
    ) -> list[Tensor]:
        """The sum of several adapters' cores over the same factors, in float64. several: by adapter and layer a core and its
        scaling. scalings: by layer, the scalings of the sums."""
        tensors = [
            {
                str(i): core.double() * (own / scaling)
                for i, ((core, own), scaling) in enumerate(zip(one, scalings, strict=True))
            }
            for one in several
        ]
        return list(self.sum_by_name(tensors, weights).values())

    def _sum(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        stack = torch.stack([self._sparse(t.detach().double(), generator) for t in tensors])
        weighted = stack * torch.tensor(weights, dtype=stack.dtype).view(-1, *(1 for _ in stack.shape[1:])).to(stack.device)
        if not self.method.endswith("ties"):
            return weighted.sum(0)
        sign = stack.sign()
        elected = torch.where((stack if self.majority == "total" else sign).sum(0) >= 0, 1.0, -1.0)
        agree = sign == elected
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _sparse(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        if self.density is None or self.density == 1:
            return tensor
        if self.method.startswith("dare"):
            kept = torch.bernoulli(torch.full(tensor.shape, float(self.density)), generator=generator)
            return tensor * kept.to(tensor) / self.density
        kept = torch.zeros_like(tensor).view(-1)
        kept[tensor.abs().reshape(-1).topk(int(self.density * tensor.numel())).indices] = 1
        return tensor * kept.view(tensor.shape)
