"""The specification of LoTR in plain torch: every equation once, readable, meant to be run in float64.

    forward     u = drop(x) A
                F = s B G^T
                y = x W^T + bias + u F^T
    backward    k = g F
                dx = g W + drop(k A^T)
                Q = g^T u
                dA = drop(x)^T k
                dB = s Q G
                dG = s Q^T B

x [m, k] tokens, W [n, k], A [k, r_in], B [n, r_out], G [r_in, r_out], g = dL/dy [m, n]. LoTR: arXiv 2402.01376.
Tests compare the kernels of every device with these functions; nothing at run time calls them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """What `backward` returns, each of its input's shape; dA and dB are one layer's part of the group's sum."""

    dx: Tensor
    dA: Tensor
    dB: Tensor
    dcore: Tensor
    dweight: Tensor
    dbias: Tensor


def fold(B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """F = s B G^T: [n, r_out] and [..., r_in, r_out] -> [..., n, r_in]."""
    return scaling * (B @ core.mT)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + s ((drop(x) A) G) B^T: [m, k] -> [m, n]. mask [m, k] holds 0 or 1 / (1 - p)."""
    u = (x if mask is None else x * mask) @ A
    y = x @ weight.mT + u @ fold(B, core, scaling).mT
    return y if bias is None else y + bias


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Gradients:
    """All gradients of `forward` for g = dL/dy [m, n], derived by hand."""
    dropped = x if mask is None else x * mask
    u, F = dropped @ A, fold(B, core, scaling)
    k, Q = g @ F, g.mT @ u
    dropped_dx = k @ A.mT
    return Gradients(
        dx=g @ weight + (dropped_dx if mask is None else dropped_dx * mask),
        dA=dropped.mT @ k,
        dB=scaling * (Q @ core),
        dcore=scaling * (Q.mT @ B),
        dweight=g.mT @ x,
        dbias=g.sum(0),
    )


def philox_4x32_10(counter_low: Tensor, seed: int) -> Tensor:
    """Four 32-bit words for each 64-bit counter: [q] int64 -> [q, 4] int64 in [0, 2^32). Salmon et al., SC 2011."""
    word = 0xFFFFFFFF
    key = [seed & word, (seed >> 32) & word]
    zero = torch.zeros_like(counter_low)
    c = [counter_low & word, (counter_low >> 32) & word, zero, zero]
    for _ in range(10):
        high0, low0 = _multiply(c[0], 0xD2511F53)
        high1, low1 = _multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return torch.stack(c, dim=-1)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 without overflow: the constant goes in 16-bit halves."""
    low, high = a * (constant & 0xFFFF), a * (constant >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_mask(rows: int, cols: int, p: float, seed: int) -> Tensor:
    """The mask [rows, cols] in float64 that every kernel draws for (p, seed): 0, or 1 / (1 - p) where kept.

    Element e = i cols + j is kept iff word e % 4 of Philox block e / 4 is at least floor(p 2^32).
    """
    if p == 0.0:
        return torch.ones(rows, cols, dtype=torch.float64, device="cpu")
    count = rows * cols
    blocks = philox_4x32_10(torch.arange((count + 3) // 4, device="cpu"), seed)
    kept = blocks.reshape(-1)[:count] >= math.floor(p * 2.0**32)
    return kept.reshape(rows, cols).double() / (1.0 - p)
