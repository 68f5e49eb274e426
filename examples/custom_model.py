"""LoTR in a custom model: its nn.Linear layers become LoTRLinear layers that share A and B.

A small network is trained on one task, frozen, and adapted to a second task. Only A, B and one core
per layer are trained. Takes a few seconds.

    python examples/custom_model.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lotr_ext import LoTRFactors, LoTRLinear

WIDTH = 64
DEPTH = 6
RANK = 4


class Net(nn.Module):
    """A residual network [m, 8] -> [m, 1].

    Args:
        make_layer: Makes one of the DEPTH layers of WIDTH x WIDTH.
    """

    def __init__(self, make_layer: Callable[[], nn.Module]):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(make_layer() for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.last(h)


def train(model: nn.Module, shift: float, steps: int, lr: float) -> tuple[float, float]:
    """Trains the parameters that require a gradient on the task sin(sum of x + shift) x_0.

    Returns:
        The loss of the first and of the last step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        x = torch.randn(256, 8)
        target = torch.sin(x.sum(1, keepdim=True) + shift) * x[:, :1]
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the layers are too small for a second thread
    pretrained = Net(lambda: nn.Linear(WIDTH, WIDTH))
    train(pretrained, shift=0.0, steps=300, lr=3e-3)

    # A LoTRLinear has a frozen `weight` and `bias` under the names of nn.Linear. So the pretrained
    # state loads into a model with adapted layers. It lacks only the tensors of the adapter.
    factors = LoTRFactors(WIDTH, WIDTH, RANK)
    model = Net(lambda: LoTRLinear(WIDTH, WIDTH, factors=factors))
    missing, unexpected = model.load_state_dict(pretrained.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith((".core", ".value")) for name in missing)
    model.first.requires_grad_(False)
    model.last.requires_grad_(False)

    # Cores start at zero, so the output does not change.
    x = torch.randn(5, 8)
    assert torch.allclose(model(x), pretrained(x), atol=1e-5)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters} parameters are trained: A, B and {DEPTH} cores")
    first, last = train(model, shift=1.0, steps=200, lr=3e-3)
    print(f"loss on the new task: {first:.4f} before, {last:.4f} after 200 steps")

    adapted = model(x)
    for i, layer in enumerate(model.layers):
        model.layers[i] = layer.to_linear()  # an nn.Linear with the adapter in its weight
    assert torch.allclose(model(x), adapted, atol=1e-4)
    print("merged into plain nn.Linear layers: the same outputs")


if __name__ == "__main__":
    main()
