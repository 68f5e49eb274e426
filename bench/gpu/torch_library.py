"""The operators on a torch device behind the interface of the executor's module, so that both take the same tests.

A numpy view is copied with the whole buffer it lies in, so the poison around a matrix travels with it, and what was written
outside an output comes back with it.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from csrc.simt.checks.arrays import wide
from lotr_ext.ops import UNFOLDED

_TORCH = {np.dtype(np.uint16): torch.bfloat16, np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}


class TorchLibrary:
    """lotr_simt's functions, run by torch.ops.lotr on `device`."""

    adds_unfolded = False  # the unfolded form is part of a layer's operators, which make a new y and dx

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._buffers: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def set_device(self, *, float32: str = "exact", **machine: object) -> None:
        """machine: the GPU that the executor would simulate; ignored here. Switches come from LOTR_CUDA_WITHOUT."""
        torch.set_float32_matmul_precision("high" if float32 == "tf32" else "highest")

    def set_options(self, **schedule: object) -> None:
        """Does nothing: the order of threads is the device's."""

    def _on_device(self, a: np.ndarray | None) -> torch.Tensor | None:
        if a is None:
            return None
        root = a
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in self._buffers:
            memory = (ctypes.c_uint8 * root.nbytes).from_address(root.ctypes.data)  # in whatever order its dimensions lie
            flat = np.frombuffer(memory, np.uint8)
            self._buffers[id(root)] = (flat, torch.from_numpy(flat.copy()).to(self.device))
        flat, there = self._buffers[id(root)]
        begin = a.ctypes.data - flat.ctypes.data
        if a.size == 0:
            return torch.empty(a.shape, dtype=_TORCH[a.dtype], device=self.device)
        extent = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)) + a.itemsize
        typed = there[begin : begin + extent].view(_TORCH[a.dtype])
        return typed.as_strided(a.shape, [s // a.itemsize for s in a.strides])

    def _back(self) -> None:
        for flat, there in self._buffers.values():
            flat[...] = there.cpu().numpy()
        self._buffers.clear()

    def _call(self, name: str, *arguments: object, out: tuple = (), **keywords: object) -> None:
        """Runs an operator on copies, puts what it returns into `out`, and copies everything back."""
        there = [self._on_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
        into = [self._on_device(a) for a in out]
        seed = keywords.pop("seed", None)
        if seed is not None:
            keywords["seed"] = torch.from_numpy(seed).to(self.device)
        result = getattr(torch.ops.lotr, name)(*there, **keywords)
        results = result if isinstance(result, tuple) else (result,)
        for target, value in zip(into, results, strict=False):
            if target is not None:
                target.copy_(value)
        self._back()

    def shrink(self, x, A, u, *, p=0.0, seed=None) -> None:
        self._call("shrink", x, A, p, seed=seed, out=(u,))

    def expand_add_(self, y, u, F, *, p=0.0, seed=None) -> None:
        self._call("expand_add_", y, u, F, p, seed=seed)

    def scale_backward(self, g, y, bias, scale, g0, dscale) -> None:
        self._call("scale_backward", g, y, bias, scale, out=(g0, dscale))

    def factor_grad_(self, acc, x, k, *, p=0.0, seed=None) -> None:
        self._call("factor_grad_", acc, x, k, p, seed=seed)

    def shrink_grad(self, g, F, u, k, Q, accumulate=False) -> None:
        if not accumulate:
            Q[...] = 0
        self._call("shrink_grad_", Q, g, F, u, out=(k,))

    def fold(self, B, cores, scaling, F) -> None:
        self._call("fold", B, cores, scaling, _TORCH[F.dtype], out=(F,))

    def fold_grad(self, Q, B, cores, scaling, dB, dcores) -> None:
        self._call("fold_grad", Q, B, cores, scaling, dB, out=(dcores,))

    def row_core(self, u, cores, index, offs, tokens, scaling, h, *, multiprocessors=0) -> None:
        self._call("row_core", u, cores, *map(self._integers, (index, offs, tokens)), scaling, out=(h,))

    def row_core_backward(self, g, u, cores, index, offs, tokens, scaling, du, dcores, *, multiprocessors=0) -> None:
        rows = map(self._integers, (index, offs, tokens))
        self._call("row_core_backward", g, u, cores, *rows, scaling, True, True, out=(du, dcores))

    def _integers(self, a: np.ndarray | None) -> torch.Tensor | None:
        return None if a is None else torch.from_numpy(a).to(self.device)

    def small_forward_(self, y, x, A, core, B, scaling, u) -> None:
        """A layer whose weight is zero."""
        weight, x = np.zeros((len(B), len(A)), x.dtype), self._for_library(x)
        self._call("layer_forward", x, weight, None, A, B, core, scaling, UNFOLDED, out=(y, u))

    def small_backward_(self, *, dx, g, x, u, A, core, B, scaling, dA, dB, dcore) -> None:
        """The core is float32: beside factors of one dtype dcore would be rounded to it."""
        weight, g = None if dx is None else np.zeros((len(B), len(A)), g.dtype), self._for_library(g)
        operands = (g, weight, x, u, A, None, B, wide(core).astype(np.float32), scaling, UNFOLDED)
        sums = (None, None, None, dA, dB, dB is not None, dcore is not None)
        self._call("layer_backward_", *operands, *sums, out=(dx, None, None, None, dcore))

    def _for_library(self, a: np.ndarray) -> np.ndarray:
        """torch 2.13's bfloat16 product on a CPU with AMX reads what lies between the rows of its operands."""
        return np.ascontiguousarray(a) if self.device.type == "cpu" else a
