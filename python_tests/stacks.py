"""A smooth stack of blocks with adapters, for tests that compare gradients of the whole model in different settings."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import plain, randomize

from lotr_ext import LoTRConfig, apply_lotr

D = 16


class SmoothBlock(nn.Module):
    """q, k, v of one input, up of another shape; smooth, so that rounding moves gradients by no more than rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        a, b = self.up(torch.sigmoid(self.q(h)) * torch.tanh(self.k(h)) + self.v(h)).chunk(2, -1)
        return x + torch.tanh(a) * torch.sigmoid(b)


class Stack(nn.Module):
    """[m, D] -> [m, D], and a head to be trained whole. reentrant: None without checkpointing, else its use_reentrant."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SmoothBlock() for _ in range(layers))
        self.head = nn.Linear(D, 5)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def base(layers: int = 3) -> Stack:
    torch.manual_seed(0)
    return Stack(layers)


def make(layers: int = 3, *, reentrant: bool | None = None, saved: tuple[str, ...] | None = ("head",), **settings) -> Stack:
    """The same adapted model at each call and in every process; two groups, 16x16 and 16x32."""
    config = LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"], modules_to_save=saved, **settings)
    model = apply_lotr(base(layers), config)
    randomize(model)
    model.reentrant = reentrant
    return model


def definition(model: Stack, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of an adapted model in plain torch, by the definition, without checkpointing."""
    model = plain(copy.deepcopy(model).to(dtype))
    model.reentrant = None
    return model


def trained_grads(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of what is trained, under the names of the adapted model."""
    named = ((n.replace(".base.", ".").replace("_orig_mod.", ""), p) for n, p in model.named_parameters())
    return {n: p.grad for n, p in named if p.requires_grad}
