"""torch.ops.lotr behind the interface of the executor's module, so that the table of kernels runs on a CPU and on a GPU.

A numpy view is copied with the whole buffer it lies in, so the poison around a matrix travels with it, and what was written
outside an output comes back with it.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from lotr_ext.ops import TWO_PASS, UNFOLDED

TYPES = {np.dtype(np.uint16): torch.bfloat16, np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}
TYPES |= {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}
lotr = torch.ops.lotr


def shrink_grad(Q: Tensor, g: Tensor, F: Tensor, u: Tensor) -> Tensor:
    """k = g F and Q += g^T u: the backward of a layer without W and x. Where Q is given, B and the core are not read."""
    B, core = F.new_empty(len(F), 1), F.new_empty(F.shape[1], 1)
    operands = (g, None, None, u, None, F, B, core, 1.0, TWO_PASS)
    return lotr.layer_backward_(*operands, None, None, Q, None, None, False, False)[1]


class TorchBackend:
    """Runs a kernel of the executor's table by the operator that launches it on `device`."""

    def __init__(self, device: str):
        self.device = device

    def set_device(self, **machine: int) -> None:
        """Does nothing: the device is what it is."""

    def run(self, name: str, arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
        self.buffers: dict[int, tuple[np.ndarray, Tensor]] = {}
        tensors = {argument: self.on_device(a) for argument, a in arrays.items()}
        getattr(self, name)(tensors, numbers)
        for flat, there in self.buffers.values():
            flat[...] = there.cpu().numpy()

    def on_device(self, a: np.ndarray) -> Tensor:
        root = a
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in self.buffers:
            memory = (ctypes.c_uint8 * root.nbytes).from_address(root.ctypes.data)  # in whatever order its dimensions lie
            flat = np.frombuffer(memory, np.uint8)
            self.buffers[id(root)] = flat, torch.from_numpy(flat.copy()).to(self.device)
        flat, there = self.buffers[id(root)]
        if a.size == 0:
            return torch.empty(a.shape, dtype=TYPES[a.dtype], device=self.device)
        begin = a.ctypes.data - flat.ctypes.data
        extent = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)) + a.itemsize
        typed = there[begin : begin + extent].view(TYPES[a.dtype])
        return typed.as_strided(a.shape, [s // a.itemsize for s in a.strides])

    # Each puts what an operator returns into the outputs.

    def shrink(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        t["u"].copy_(lotr.shrink(t["x"], t["A"], n.get("p", 0.0), t.get("seed")))

    def expand_add(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        lotr.expand_add_(t["y"], t["u"], t["F"], n.get("p", 0.0), t.get("seed"))

    def factor_grad(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        if not n["accumulate"]:
            t["D"].zero_()
        lotr.shrink_backward_(t["v"], None, t["x"], None, t["D"], n.get("p", 0.0), t.get("seed"))

    def shrink_grad(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        if not n["accumulate"]:
            t["Q"].zero_()
        t["k"].copy_(shrink_grad(t["Q"], t["g"], t["F"], t["u"]))

    def fold(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        t["F"].copy_(lotr.fold(t["B"], t["core"], n["scale"], t["F"].dtype))

    def row_core(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        rows = (t.get(name) for name in ("index", "offs", "tokens"))
        t["h"].copy_(lotr.row_core(t["u"], t["cores"], *rows, n["scale"]))

    def row_core_backward(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        rows = (t.get(name) for name in ("index", "offs", "tokens"))
        du, dcores = lotr.row_core_backward(t["g"], t["u"], t["cores"], *rows, n["scale"], True, True)
        t["du"].copy_(du), t["dcores"].copy_(dcores)

    # The unfolded form is a part of a layer's operators, here of a layer whose weight is zero. They make a new y and dx.

    def small_forward(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        x = self.for_library(t["x"])
        weight = x.new_zeros(len(t["B"]), len(t["A"]))
        y, u, _ = lotr.layer_forward(x, weight, None, t["A"], t["B"], t["core"], n["scale"], UNFOLDED)
        t["y"].add_(y), t["u"].copy_(u)

    def small_backward(self, t: dict[str, Tensor], n: dict[str, float]) -> None:
        """The core is float32: beside factors of one dtype dcore would be rounded to it."""
        g, wanted = self.for_library(t["g"]), "dx" in t
        weight = g.new_zeros(len(t["B"]), len(t["A"])) if wanted else None
        operands = (g, weight, t.get("x"), t["u"], t["A"], None, t["B"], t["core"].float(), n["scale"], UNFOLDED)
        dx, _, _, _, dcore = lotr.layer_backward_(*operands, None, None, None, t.get("dA"), t["dB"], True, True)
        t["dcore"].copy_(dcore)
        if wanted:
            t["dx"].add_(dx)

    def for_library(self, t: Tensor) -> Tensor:
        """torch 2.13's bfloat16 product on a CPU with AMX reads what lies between the rows of its operands."""
        return t.contiguous() if self.device == "cpu" else t
