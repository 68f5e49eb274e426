"""The numbers of an adapter that are no tensors, and the checks of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Settings", "check_number", "check_probability"]


def check_number(name: str, value: object) -> None:
    """TypeError or ValueError unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond any float
        raise ValueError(f"{name}: expected a finite number, got an int of {value.bit_length()} bits") from None
    if not finite:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_probability(name: str, value: object) -> None:
    """TypeError or ValueError unless value is a number in [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")


@dataclass(frozen=True)
class Settings:
    """The scaling and the dropout of an adapter, as users give them.

    s is `scaling` if given, else alpha / r, with rslora alpha / sqrt(r); alpha = None means alpha = r. dropout: the
    probability of dropping an element of the adapter's x in training, in [0, 1).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or scaling together with alpha or rslora.
    """

    alpha: float | None = None
    rslora: bool = False
    scaling: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "scaling"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        check_probability("dropout", self.dropout)
        if not isinstance(self.rslora, bool):
            raise TypeError(f"rslora: expected a bool, got {type(self.rslora).__name__} {self.rslora!r}")
        if self.scaling is not None and (self.alpha is not None or self.rslora):
            raise ValueError(f"scaling: expected it alone, got {self.scaling} with alpha={self.alpha}, rslora={self.rslora}")
        object.__setattr__(self, "dropout", float(self.dropout))

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Those of a LoTRConfig or a LoTRPeftConfig."""
        return cls(config.alpha, config.rslora, config.scaling, config.dropout)

    def scale(self, rank: int | tuple[int, int]) -> float:
        """s at this rank, r or (r_in, r_out), of which the larger counts."""
        if self.scaling is not None:
            return float(self.scaling)
        r = rank if isinstance(rank, int) else max(rank)
        return (r if self.alpha is None else self.alpha) / (math.sqrt(r) if self.rslora else r)
