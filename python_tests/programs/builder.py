"""What a program is written with: choices, names, lines. A program is source text, a function of a world (`worlds.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from programs.script import dtype_name

T = TypeVar("T")

HALVES = (torch.bfloat16, torch.float16)
HEAD = """from contextlib import nullcontext

import torch
from programs.given import Doubled, Planned, PlannedClose, PlannedExit, PlannedInterrupt, another, gradients
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm


"""
KINDS = ("strided", "offset", "transposed", "padded", "expanded", "neg", "conj")


class Value(NamedTuple):
    """A tensor of a program: its name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.shape[-1]


class Layer(NamedTuple):
    """An adapted layer: the expression that it is reached by, its group's, and its sizes."""

    name: str
    factors: str
    k: int
    n: int
    wrapped: bool = False
    magnitude: bool = False


class Builder:
    """A program in the making. compute: the dtype of x, weights and products; adapter: of A, B and the cores.

    integer(low, high): draws one of these numbers, both ends among them; the lowest is the simplest.
    """

    def __init__(self, integer: Callable[[int, int], int]):
        self.integer = integer
        self.lines: list[str] = []
        self.indent = 1
        self.names = 0
        self.layers: list[Layer] = []
        self.values: list[Value] = []  # inputs and what was made of them, the newest last
        self.fresh: list[Value] = []  # with no backward through them yet
        self.compute = self.one_of(torch.float32, torch.float32, torch.float64, *HALVES)
        self.autocast = self.one_of(*HALVES) if self.compute == torch.float32 and self.chance(0.2) else None
        self.adapter = torch.float32 if self.compute in HALVES and self.chance(0.5) else self.compute
        self.widths = [self.small(1, 40) for _ in range(self.small(1, 3))]
        self.many = self.chance(0.4)  # at least 128 tokens, where other paths are taken
        self.dropout = self.one_of(0.3, 0.5) if self.chance(0.15) else 0.0
        self.large = self.compute == torch.float16 and self.chance(0.3)  # a scaling and cores whose product leaves float16
        # not beside large cores: z = x W^T + .. is taken from y, of which the bias then leaves nothing
        self.magnitude = not self.large and self.chance(0.25)  # whether layers have some
        self.net: str | None = None
        self.outputs = 0  # of the model
        self.net_replaces = False  # whether its forward makes parameters
        self.net_sets = False  # whether it makes parameters or sets scalings: what was recorded before would be recomputed anew
        self.net_swaps = False  # whether its forward calls torch.func.functional_call, which swaps parameters for all threads
        self.made_cores = False  # whether a module makes the cores of the model
        self.tasks: set[int] | None = None  # of the model's bank, by their places
        self.shared: list[str] = []  # adapters that share the first one's factors
        self.net_recomputes = False  # whether the model's forward checkpoints some of its layers
        self.cached: set[str] = set()  # what selective checkpointing may have kept, which torch does not allow to be changed
        self.recomputes = False  # whether something waits for its recomputation
        self.flipped = False  # whether what requires grad has changed since the forward
        self.unwatched = False  # whether hooks have what was saved, so that no one sees that it is changed in place
        self.frozen = not self.dropout and self.chance(0.03)  # made under inference_mode, never trained

    @property
    def coarsest(self) -> torch.dtype:
        used = [t for t in (self.compute, self.autocast, self.adapter) if t is not None]
        return max(used, key=lambda t: torch.finfo(t).eps)

    # ---- choices -----------------------------------------------------------------------------------------------------

    def one_of(self, *options: T) -> T:
        return options[self.number(0, len(options) - 1)]

    def chance(self, p: float) -> bool:
        """True with about this probability; False is the simpler choice."""
        return self.number(0, 99) >= 100 - round(100 * p)

    def number(self, low: int, high: int) -> int:
        return self.integer(low, high)

    def small(self, low: int, high: int) -> int:
        """Mostly near low."""
        return self.number(low, min(high, low + 6)) if self.chance(0.7) else self.number(low, high)

    def some(self, options: Sequence[T], least: int = 1) -> list[T]:
        """At least `least` of them, in any order."""
        left = list(options)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(self.number(least, min(4, len(left))))]

    # ---- text --------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def seed(self) -> int:
        """No choice: values do not matter, only that they differ."""
        self.names += 1
        return 100 * self.names

    def dtype(self, dtype: torch.dtype | None = None) -> str:
        return f"torch.{dtype_name(dtype or self.compute)}"

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def tokens(self) -> tuple[int, ...]:
        """The leading dimensions of an input."""
        if self.many:
            return self.one_of((128,), (130,), (2, 65), (200,))
        return self.one_of((3,), (2,), (1,), (2, 3), (), (5,), (0,), (2, 0), (127,), (17,))

    def kind(self, p: float = 0.25) -> str:
        return self.one_of(*KINDS) if self.chance(p) else "plain"

    def input(self, width: int, tokens: tuple[int, ...] | None = None) -> Value:
        """A new leaf."""
        shape = (*(self.tokens() if tokens is None else tokens), width)
        grad, kind = not (self.frozen or self.chance(0.25)), self.kind()
        scale = ", scale=1e-3" if self.large else ""
        extra = ("" if grad else ", grad=False") + ("" if kind == "plain" else f', kind="{kind}"') + scale
        value = Value(self.name("x"), shape)
        sizes = ", ".join(map(str, shape))
        self.line(f"{value.name} = w.tensor({sizes}, seed={self.seed()}, dtype={self.dtype()}{extra})")
        self.values.append(value)
        return value

    def input_for(self, width: int) -> Value:
        """A value of this width, often the one last used, or a new leaf."""
        fitting = [value for value in self.values if value.width == width]
        if fitting and self.chance(0.8):
            return fitting[-1] if self.chance(0.6) else self.one_of(*fitting)
        return self.input(width)

    def made(self, shape: tuple[int, ...], letter: str = "y") -> Value:
        value = Value(self.name(letter), shape)
        self.values.append(value)
        self.fresh.append(value)
        return value

    def forget(self) -> None:
        """No more backwards through what there is: its graph is gone, or would raise."""
        self.fresh.clear()
        self.recomputes, self.flipped, self.unwatched = self.net_recomputes, False, False
        self.values = [value for value in self.values if value.name.startswith("x")]

    def changed(self) -> None:
        """A layer computes something else from now on: a recomputation would."""
        if self.recomputes:
            self.forget()

    def changed_in_place(self) -> None:
        """Of what no one watches plain torch's backward takes the old values here and the new ones there."""
        if self.unwatched:
            self.forget()

    def source(self) -> str:
        return HEAD + "def program(w):\n" + "\n".join(self.lines or ["    pass"]) + "\n"
