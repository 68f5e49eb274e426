"""What a layer makes of gemm_lotr's operators (csrc/torch/layer_products.cpp), in numbers and without a GPU: the CUDA form of
its operators on CPU tensors, with those that only a build for 90a has done by torch under cuda_gemm_lotr.cpp's schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lotr_ext  # noqa: F401

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "torch" / "cuda_gemm_lotr.cpp"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
M, K, N, S, FUSED = 40, 24, 32, 0.5, 2


def fold_transposed(B: Tensor, core: Tensor, A: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    F = (scaling * (B.float() @ core.float().T)).to(dtype)
    return F, F.T.contiguous(), A.T.to(dtype).contiguous()


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """What was called, and whether it made Q."""
    called: list[str] = []

    def gemm_lotr(x, weight, bias, At, F, backward, u_forward=None, Q=None, accumulate=False):
        called.append("backward" * backward + " with Q" * (Q is not None) + " added" * accumulate or "forward")
        u = (x.float() @ At.float().T).to(x.dtype)
        y = x.float() @ (weight if backward else weight.T).float() + u.float() @ F.float().T
        if Q is not None:
            new = x.float().T @ u_forward.float()
            Q.copy_(Q + new if accumulate else new)
        return (y if bias is None else y + bias.float()).to(x.dtype), u

    text = re.sub(r'"\s*\n\s*"', "", SOURCE.read_text())
    library = torch.library.Library("lotr", "FRAGMENT")
    does = {"gemm_lotr": gemm_lotr, "fold_transposed": fold_transposed, "gemm_lotr_refusal": lambda *a: ""}
    ours = [name for name in does if not hasattr(torch.ops.lotr, name)]
    for name, function in does.items():
        schema = re.search(rf'"({name}\([^"]*)"', text)
        assert schema, name
        if name in ours:
            library.define(schema[1])
        library.impl(name, function, "CPU")
    yield called
    library._destroy()
    for name in ours:
        torch.ops.lotr.__dict__.pop(name, None)


def call(name: str, *arguments):
    return getattr(torch.ops.lotr, name).default.redispatch(CUDA, *arguments)


def close(got: Tensor, want: Tensor, what: str) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert got.shape == want.shape and error < 0.02, f"{what}: {error}"


@pytest.mark.parametrize("given_Q", [False, True])
@pytest.mark.parametrize("r", [5, 16, 17])
def test_step(launches: list[str], r: int, given_Q: bool) -> None:
    torch.manual_seed(r)
    x, g = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
    weight, bias = torch.randn(N, K, dtype=torch.bfloat16), torch.randn(N, dtype=torch.bfloat16)
    A, B, core = torch.randn(K, r), torch.randn(N, r), torch.randn(r, r)
    y, u, F = call("layer_forward", x, weight, bias, A, B, core, S, FUSED, None, None, 0.0, None)
    X, G, W = x.double(), g.double(), weight.double()
    folded = S * B.double() @ core.double().T
    close(u, X @ A.double(), "u")
    close(F, folded, "F")
    close(y, X @ W.T + bias.double() + X @ A.double() @ folded.T, "y")

    Q0 = torch.randn(N, r) if given_Q else None
    Q = None if Q0 is None else Q0.clone()
    factors = (A, F, B, core, S, FUSED, None, None, Q)
    dx, k, dA, dB, dcore = call("layer_backward_", g, weight, x, u, *factors, None, None, not given_Q, not given_Q, 0.0, None)
    close(k, G @ folded, "k")
    close(dx, G @ W + G @ folded @ A.double().T, "dx")
    close(dA, X.T @ (G @ folded), "dA")
    full = G.T @ X @ A.double()
    if Q is not None and Q0 is not None:
        close(Q, Q0.double() + full, "Q")
    else:
        close(dB, S * full @ core.double(), "dB")
        close(dcore, S * full.T @ B.double(), "dcore")
    in_launch = " with Q" + " added" * given_Q if r <= 16 else ""
    assert launches == ["forward", "backward" + in_launch]
