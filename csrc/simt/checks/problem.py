"""A kernel's call with its truth, and what the cases (cases.py) are made of: operands in poisoned memory, masks, tolerances."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import ModuleType

import numpy as np

from .arrays import DTYPE, Output, check_close, narrow, operand, philox_keep, place
from .shapes import Shape

SEED = -0x123456789ABCDEF  # negative: all 64 bits matter


def schedule(name: str) -> dict:
    """forward, reverse, or the seed of a random order, above 100 with switches at memory accesses; after a slash, for gemm_lotr
    on a Hopper GPU's shared memory, how many clusters run at the same time."""
    order, _, resident = name.partition("/")
    options = {"order": order} if order in ("forward", "reverse") else {"order": "random", "seed": int(order)}
    if order.isdigit() and int(order) > 100:
        options["preempt"] = 24
    return {**options, "resident": int(resident), "shared_limit": 232448} if resident else options


class Problem:
    """Inputs and truth of one call. `run` makes fresh poisoned outputs, calls the kernel and returns them by name."""

    def __init__(self, run: Callable[[ModuleType], dict[str, np.ndarray]], check: Callable[[dict[str, np.ndarray]], None]):
        self.run, self.check = run, check

    def checked(self, lib: ModuleType) -> list[bytes]:
        """Runs once and checks; the bits of the outputs."""
        outputs = self.run(lib)
        self.check(outputs)
        return [np.ascontiguousarray(a).tobytes() for a in outputs.values()]


class Maker:
    def __init__(self, shape: Shape, kind: str, name: str):
        self.shape, self.kind, self.name = shape, kind, name
        self.rng = np.random.default_rng(zlib.crc32(f"{shape}{kind}{name}".encode()))
        self.dtype = DTYPE[kind]
        self.seed = np.array([SEED], np.int64) if shape.p else None

    def values(self, rows: int, cols: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.standard_normal((rows, cols)) * scale

    def large(self, rows: int, cols: int) -> np.ndarray:
        return place(narrow(self.values(rows, cols), self.kind), self.dtype, self.shape.layout)

    def factor(self, rows: int, cols: int) -> np.ndarray:
        values = self.values(rows, cols)
        if self.shape.float_factors:
            return place(values.astype(np.float32), np.float32, self.shape.layout)
        return place(narrow(values, self.kind), self.dtype, self.shape.layout)

    def vector(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """[cols], in poisoned memory as a row of the layout."""
        return place(values[None], dtype, self.shape.layout)[0]

    def scale_and_bias(self, cols: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales of y's columns, some of them 0, and a bias where the shape has no dropout."""
        scale = self.values(1, cols)[0].astype(np.float32)
        scale[::7] = 0
        bias = None if self.shape.p else self.vector(narrow(self.values(1, cols)[0], self.kind), self.dtype)
        return self.vector(scale, np.float32), bias

    def mask(self, rows: int, cols: int) -> np.ndarray | float:
        """What drop() multiplies by."""
        return philox_keep(SEED, rows, cols, self.shape.p) / (1 - self.shape.p) if self.shape.p else 1.0

    def prepare(self, lib: ModuleType) -> dict:
        float32 = "tf32" if self.kind == "tf32" else "exact"
        on = {"wgmma": self.shape.wgmma, "early": self.shape.early, "without": self.shape.without}
        lib.set_device(multiprocessors=self.shape.sms, float32=float32, most_of_cluster=self.shape.most_of_cluster, **on)
        return {"p": self.shape.p, "seed": self.seed}

    def close(self, got, left, right, what, add=0.0, mask=1.0, kind=None, scale=1.0) -> None:
        """got = add + mask * scale * left right, in float64 and as float32 arithmetic has it."""
        kind = kind or self.kind
        truth = add + mask * scale * (left @ right)
        eager = add + mask * scale * (left.astype(np.float32) @ right.astype(np.float32))
        size = np.abs(add) + np.abs(mask * scale) * (np.abs(left) @ np.abs(right))
        check_close(got, truth, narrow(eager, kind), size, kind, f"{self.name} {kind} {self.shape}: {what}")

    def op(self, a: np.ndarray) -> np.ndarray:
        return operand(a, self.kind)


def finish(**outputs: Output) -> dict[str, np.ndarray]:
    for output in outputs.values():
        output.check_outside()
    return {name: output.view for name, output in outputs.items()}
