"""Tries an installed wheel: compares layers with float64, trains a model, and loads its adapter."""

import sys
import tempfile

import torch
from torch import nn

import lotr_ext
from lotr_ext import (
    LoTRConfig,
    LoTRLinear,
    apply_lotr,
    explain,
    load_adapter,
    lotr_linear,
    save_adapter,
)
from lotr_ext.core.kernel_support import build_info

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}
K = 48
N = 40
R = 4


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check_layer(m: int, dtype: torch.dtype) -> None:
    """Compares a layer of m tokens with float64, forward and backward."""
    # In the order of lotr_linear's arguments.
    shapes = {"x": (m, K), "W": (N, K), "bias": (N,), "A": (K, R), "B": (N, R), "core": (R, R)}
    rounded = {}
    exact = {}
    for name, shape in shapes.items():
        needs_gradient = name not in ("W", "bias")
        rounded[name] = torch.randn(shape).to(dtype).requires_grad_(needs_gradient)
        exact[name] = rounded[name].detach().double().requires_grad_(needs_gradient)
    y = lotr_linear(*rounded.values(), 0.5)
    x, W, bias, A, B, core = exact.values()
    expected = x @ W.T + bias + 0.5 * ((x @ A) @ core) @ B.T
    g = torch.randn(m, N).to(dtype)
    y.backward(g)
    expected.backward(g.double())
    errors = {"y": relative_error(y, expected)}
    for name in ("x", "A", "B", "core"):
        errors[name] = relative_error(rounded[name].grad, exact[name].grad)
    assert max(errors.values()) < MAX_ERROR[dtype], f"{dtype}, {m} tokens: {errors}"


def make_base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K))


def check_model() -> None:
    """Trains a model for 20 steps, and loads its adapter onto a fresh base model."""
    model = apply_lotr(make_base(), LoTRConfig(rank=R))
    x = torch.randn(200, K)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(20):
        loss = (model(x) - x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        fresh = load_adapter(make_base(), folder)
        assert torch.equal(fresh(x), model(x))


def main() -> None:
    assert "site-packages" in lotr_ext.__file__, lotr_ext.__file__
    cuda = build_info()["cuda"]
    assert cuda["built"], cuda
    assert "90a" in cuda["archs"], cuda
    torch.manual_seed(0)
    for dtype in MAX_ERROR:
        check_layer(3, dtype)
        check_layer(300, dtype)
    check_model()
    layer = LoTRLinear(K, K, R, dtype=torch.bfloat16)
    explanation = explain(layer, torch.empty(300, K, dtype=torch.bfloat16))
    assert "kernels of lotr_ext" in explanation, explanation
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}: passed; {explanation}")


if __name__ == "__main__":
    main()
