"""A model of your own with LoTR: its nn.Linear layers become LoTRLinear, which share two factors.

A small network is trained on one task, frozen, and adapted to a second one: only A, B and one core a layer are trained.

    python examples/custom_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lotr_ext import LoTRFactors, LoTRLinear

WIDTH, DEPTH, RANK = 64, 6, 4


class Net(nn.Module):
    """A residual network [m, 8] -> [m, 1]; linear makes its WIDTH x WIDTH layers."""

    def __init__(self, linear=lambda: nn.Linear(WIDTH, WIDTH)):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList(linear() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.last(h)


def train(model: nn.Module, shift: float, steps: int, lr: float) -> tuple[float, float]:
    """(first, last) loss of AdamW over what requires grad, on the task sin(sum of x + shift) x_0."""
    optimizer, losses = (
        torch.optim.AdamW(
            (p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0
        ),
        [],
    )
    for _ in range(steps):
        x = torch.randn(256, 8)
        loss = (model(x) - torch.sin(x.sum(1, keepdim=True) + shift) * x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the layers are too small for a second thread
    pretrained = Net()
    train(pretrained, shift=0.0, steps=300, lr=3e-3)

    # A LoTRLinear has a frozen `weight` and `bias` under nn.Linear's names, so the pretrained state loads into the same model
    # with adapted layers and one pair of factors for all of them. Only the adapter's tensors are missing in it.
    factors = LoTRFactors(WIDTH, WIDTH, RANK)
    model = Net(lambda: LoTRLinear(WIDTH, WIDTH, factors=factors))
    missing, unexpected = model.load_state_dict(pretrained.state_dict(), strict=False)
    assert not unexpected and all(name.endswith((".core", ".value")) for name in missing)
    model.first.requires_grad_(False), model.last.requires_grad_(False)
    x = torch.randn(5, 8)
    assert torch.allclose(
        model(x), pretrained(x), atol=1e-5
    )  # cores start at zero, so the output does not change
    print(
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad)} parameters are trained: A, B once, {DEPTH} cores"
    )
    first, last = train(model, shift=1.0, steps=200, lr=3e-3)
    print(f"loss on the new task: {first:.4f} before, {last:.4f} after 200 steps")

    adapted = model(x)
    for i, layer in enumerate(model.layers):
        model.layers[i] = layer.to_linear()  # a plain nn.Linear with the adapter in its weight
    assert torch.allclose(model(x), adapted, atol=1e-4)
    print("merged into plain nn.Linear layers: the same outputs")


if __name__ == "__main__":
    main()
