"""Uses an installed wheel as a user's first minutes would: layers against float64, a model, its adapter saved and loaded."""

from __future__ import annotations

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

EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def check_layers() -> None:
    """Both forms, forward and backward, in every dtype."""
    torch.manual_seed(0)
    for dtype, limit in EPSILON.items():
        for m in (3, 300):
            values = [
                torch.randn(shape, dtype=torch.float64)
                for shape in ((m, 48), (40, 48), (40,), (48, 4), (40, 4), (4, 4))
            ]
            own = [v.to(dtype).requires_grad_(i in (0, 3, 4, 5)) for i, v in enumerate(values)]
            exact = [v.detach().double().requires_grad_(v.requires_grad) for v in own]
            y = lotr_linear(*own, 0.5)
            x, w, bias, A, B, core = exact
            expected = x @ w.T + bias + 0.5 * ((x @ A) @ core) @ B.T
            g = torch.randn(m, 40, dtype=torch.float64).to(dtype)
            y.backward(g)
            expected.backward(g.double())
            found = [
                (y, expected),
                *((a.grad, b.grad) for a, b in zip(own, exact) if a.requires_grad),
            ]
            worst = max(((a.double() - b).norm() / b.norm()).item() for a, b in found)
            assert worst < limit, f"{dtype}, {m} tokens: relative error {worst:.1e}"


def check_model() -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return apply_lotr(
            nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48)), LoTRConfig(rank=4)
        )

    adapted, x = model(), torch.randn(200, 48)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(20):
        loss = (adapted(x) - x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, folder)
        fresh = load_adapter(model(), folder)
        assert torch.equal((fresh or adapted)(x), adapted(x))


def main() -> None:
    assert "site-packages" in lotr_ext.__file__, (
        f"expected the installed package, got {lotr_ext.__file__}"
    )
    built = build_info()
    assert built["cuda"]["built"] and any("90a" in arch for arch in built["cuda"]["archs"]), built
    check_layers()
    check_model()
    layer = LoTRLinear(48, 48, 4, dtype=torch.bfloat16)
    said = explain(layer, torch.empty(300, 48, dtype=torch.bfloat16))
    assert "kernels of lotr_ext" in said, said
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}: right; {said}")


if __name__ == "__main__":
    main()
