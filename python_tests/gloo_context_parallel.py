"""As `gloo_checks`, for context parallelism: each process has a part of each sequence. torch's `context_parallel` has no ring
attention for CPUs (2.13: "does not have a sharding strategy registered"), so the keys and values are gathered here."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from stacks import trained_grads
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from toys import plain, randomize

from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter
from nets import relative

D, TOKENS, HEADS = 12, 10, 2


class Block(nn.Module):
    """Causal attention and a layer of another shape. start: which token of the sequence is the first here; None where one
    process has all of them."""

    start: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(D, n) for n in (D, D, D, D, 2 * D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.start is not None:
            k, v = (all_gather_tensor_autograd(t.contiguous(), 2, dist.group.WORLD) for t in (k, v))
        mask = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()[self.start or 0 :][: q.shape[2]]
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        gate, value = self.up(x).chunk(2, -1)
        return x + torch.tanh(gate) * value


def base(start: int | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(2))).double()
    for block in blocks:
        block.start = start
    return blocks


def adapted(start: int | None = None) -> nn.Module:
    model = apply_lotr(base(start), LoTRConfig(rank=4, adapter_dtype=torch.float64))
    randomize(model)
    return model


def sequences(rank: int, folder: Path) -> dict[str, float]:
    """DistributedDataParallel over the processes that share the sequences, against the definition in one process."""
    x = torch.randn(3, TOKENS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    size = TOKENS // dist.get_world_size()
    own, truth = x[:, rank * size : (rank + 1) * size], plain(adapted())
    want = truth(x)
    want.square().mean().backward()
    net = DistributedDataParallel(adapted(rank * size))
    y = net(own)
    y.square().mean().backward()
    gradients = trained_grads(truth)
    save_adapter(net, folder / "sequences")
    dist.barrier()
    trained = {n: p.grad for n, p in net.module.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    return {
        "y": relative(y, want[:, rank * size : (rank + 1) * size]),
        "gradients": max(relative(g, gradients[n]) for n, g in trained.items()),
        "saved": relative(load_adapter(base(), folder / "sequences")(x), want),
    }
