"""Settings: the options of an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_number, check_probability

__all__ = ["Settings"]

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """The scaling and the dropout of an adapter, and whether it has magnitudes, as given by users.

    s is `scaling` if given, otherwise alpha / r, with rslora alpha / sqrt(r); alpha = None means alpha = r. scaling = "auto" is
    4 (8 / r)^1.5, which lets one learning rate serve every rank (docs/choosing.md, One rate for every rank), with diagonal
    cores, whose products have a factor r fewer terms, 4 (8 / r)^0.5. dropout: the probability of dropping an element of the
    adapter's x in training, in [0, 1). magnitude: a trained length of each row of W (DoRA).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or scaling together with alpha or rslora.
    """

    alpha: float | None = None
    rslora: bool = False
    scaling: float | Literal["auto"] | None = None
    dropout: float = 0.0
    magnitude: bool = False
    diagonal: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        if isinstance(self.scaling, str):
            if self.scaling != AUTO:
                raise ValueError(f'scaling: expected a number or "{AUTO}", got {self.scaling!r}')
        elif self.scaling is not None:
            check_number("scaling", self.scaling)
        check_probability("dropout", self.dropout)
        for name in ("rslora", "magnitude", "diagonal"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
        if self.scaling is not None and (self.alpha is not None or self.rslora):
            raise ValueError(f"scaling: expected it alone, got {self.scaling} with alpha={self.alpha}, rslora={self.rslora}")
        object.__setattr__(self, "dropout", float(self.dropout))

    @classmethod
    def of(cls, config: Any) -> Settings:
        """The Settings of a LoTRConfig or a LoTRPeftConfig."""
        return cls(config.alpha, config.rslora, config.scaling, config.dropout, config.magnitude, config.core == "diagonal")

    def scale(self, rank: int | tuple[int, int]) -> float:
        """s at this rank: r, or the larger of (r_in, r_out)."""
        r = rank if isinstance(rank, int) else max(rank)
        if self.scaling == AUTO:
            return 4.0 * (8 / r) ** (0.5 if self.diagonal else 1.5)
        if self.scaling is not None:
            return float(self.scaling)
        return (r if self.alpha is None else self.alpha) / (math.sqrt(r) if self.rslora else r)
