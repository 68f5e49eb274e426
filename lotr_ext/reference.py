"""The specification of LoTR in plain torch: every equation once, to be run in float64.

    forward     u = drop(x) A
                F = s B G^T
                y = x W^T + bias + u F^T
    backward    du = g F
                dx = g W + drop(du A^T)
                Q = g^T u
                dA = drop(x)^T du
                dB = s Q G
                dG = s Q^T B

    x [m, k] tokens, W [n, k], A [k, r_in], B [n, r_out], G [r_in, r_out], g = dL/dy [m, n]

LoTR: arXiv 2402.01376. Tests compare the kernels of every device with these functions. Nothing
calls them at run time.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """The gradients of `forward`, each in the shape of its input.

    dA and dB are what one layer adds to the sums of its group.
    """

    dx: Tensor
    dA: Tensor
    dB: Tensor
    dcore: Tensor


def fold(B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """Computes F = s B G^T [.., n, r_in].

    Args:
        B: [n, r_out].
        core: G [.., r_in, r_out].
        scaling: s.
    """
    return scaling * (B @ core.mT)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    mask: Tensor | float = 1.0,
) -> Tensor:
    """Computes y = x W^T + bias + s ((drop(x) A) G) B^T [m, n].

    Args:
        mask: 0 or 1 / (1 - p) for each element of x [m, k]. 1 without dropout.
    """
    u = (x * mask) @ A
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
    mask: Tensor | float = 1.0,
) -> Gradients:
    """Computes the gradients of `forward`, derived by hand. W and the bias are frozen.

    Args:
        g: dL/dy [m, n]. The other arguments are as for `forward`.
    """
    dropped = x * mask
    u = dropped @ A
    F = fold(B, core, scaling)
    du = g @ F
    Q = g.mT @ u
    return Gradients(
        dx=g @ weight + (du @ A.mT) * mask,
        dA=dropped.mT @ du,
        dB=scaling * (Q @ core),
        dcore=scaling * (Q.mT @ B),
    )


def philox_4x32_10(counter_low: Tensor, seed: int) -> Tensor:
    """Returns four 32-bit words for each 64-bit counter (Salmon et al., SC 2011).

    Args:
        counter_low: The lower 64 bits of the counters [q] (int64). The upper ones are zero.
        seed: The key, an int64.

    Returns:
        [q, 4] int64 in [0, 2^32).
    """
    mask = 0xFFFFFFFF
    # torch has no unsigned arithmetic, so 32-bit words are kept in int64 and masked.
    key_0 = seed & mask
    key_1 = (seed >> 32) & mask
    word_0 = counter_low & mask
    word_1 = (counter_low >> 32) & mask
    word_2 = torch.zeros_like(counter_low)
    word_3 = torch.zeros_like(counter_low)
    for _ in range(10):
        high_0, low_0 = _multiply(word_0, 0xD2511F53)
        high_2, low_2 = _multiply(word_2, 0xCD9E8D57)
        word_0 = high_2 ^ word_1 ^ key_0
        word_1 = low_2
        word_2 = high_0 ^ word_3 ^ key_1
        word_3 = low_0
        key_0 = (key_0 + 0x9E3779B9) & mask
        key_1 = (key_1 + 0xBB67AE85) & mask
    return torch.stack([word_0, word_1, word_2, word_3], dim=-1)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Returns the high and the low word of a 32 x 32 bit product.

    The constant is split into halves of 16 bits, so that int64 does not overflow.
    """
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_mask(rows: int, cols: int, p: float, seed: int) -> Tensor:
    """Returns the mask [rows, cols] in float64 that every kernel draws for (p, seed).

    It is 0 where x is dropped, 1 / (1 - p) elsewhere. Element e = i cols + j is kept if word e % 4
    of Philox block e // 4 is at least floor(p 2^32).

    Args:
        rows: The rows of x.
        cols: The columns of x.
        p: The probability of dropping an element.
        seed: An int64.
    """
    count = rows * cols
    blocks = philox_4x32_10(torch.arange((count + 3) // 4, device="cpu"), seed)
    kept = blocks.reshape(-1)[:count] >= math.floor(p * 2.0**32)
    return kept.reshape(rows, cols).double() / (1.0 - p)
