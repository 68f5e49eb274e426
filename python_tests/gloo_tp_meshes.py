"""As `gloo_tensor_parallel`, for a sequence in parts, a batch in parts, weights in parts by FSDP2, compiled models, and
refusals."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_checks import refusal, whole
from gloo_tensor_parallel import (
    Attention,
    D,
    base,
    config,
    counted,
    differences,
    inputs,
    pair,
    randomize,
    seeded,
    step,
    trained,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from lotr_ext import LoTRLinear, apply_lotr, load_adapter, save_adapter
from nets import relative


class Normed(nn.Module):
    """whole: a layer that no process cuts, on the part of the sequence that each process has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention, self.up, self.down = Attention(D, True), nn.Linear(D, 20), nn.Linear(20, D)
        self.whole = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return self.whole(x + self.down(torch.tanh(self.up(self.second(x)))))


def normed() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(Normed(), Normed()).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def sequence_plan(local: bool) -> dict[str, Any]:
    """As torch's tutorial: norms and residual on a part of the sequence. local: whether parts travel as plain tensors."""
    use, part = {"use_local_output": local}, Shard(1)
    found: dict[str, Any] = {}
    for i in range(2):
        found |= {
            f"{i}.first": SequenceParallel(**use),
            f"{i}.attention": PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(Replicate(),)),
            f"{i}.attention.q": ColwiseParallel(**use),
            f"{i}.attention.k": ColwiseParallel(**use),
            f"{i}.attention.o": RowwiseParallel(output_layouts=part, **use),
            f"{i}.second": SequenceParallel(**use),
            f"{i}.up": ColwiseParallel(input_layouts=part, **use),
            f"{i}.down": RowwiseParallel(output_layouts=part, **use),
            f"{i}.whole": SequenceParallel(**use),
        }
    first = {"input_layouts": (Replicate(),), "desired_input_layouts": (part,), "use_local_output": local}
    found["0"] = PrepareModuleInput(**first)
    found["1"] = PrepareModuleOutput(output_layouts=(part,), desired_output_layouts=(Replicate(),))
    return found


def sequences(rank: int, folder: Path) -> dict:
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for name, after, local, tokens in (("before", False, True, 8), ("after", True, True, 8), ("uneven", False, False, 7)):
        alone, cut = normed(), normed()
        randomize(seeded(partial(apply_lotr, alone, config())))
        if after:
            parallelize_module(cut, mesh, sequence_plan(local))
        seeded(partial(apply_lotr, cut, config()), seed=1 + rank)
        if not after:
            parallelize_module(cut, mesh, sequence_plan(local))
        for norm in (m for m in cut.modules() if isinstance(m, nn.LayerNorm)):
            norm.requires_grad_(False)  # SequenceParallel makes its parameters trainable
        x = torch.randn(3, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        found[name] = differences(alone, randomize(cut), x)
    return found


def two_by_two(cut: Callable[[DeviceMesh], nn.Module], shard: bool) -> tuple[nn.Module, nn.Module, Tensor, int]:
    """(the wrapped model, the model inside, this process's part of a batch, how many parts there are)"""
    size = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (size, 2), mesh_dim_names=("dp", "tp"))
    net, own = cut(mesh["tp"]), mesh.get_local_rank("dp")
    x = inputs(2 * size)[2 * own : 2 * own + 2]
    if shard:
        for block in net.blocks:
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(net, mesh=mesh["dp"]), net, x, size
    group = mesh["dp"].get_group()
    return nn.parallel.DistributedDataParallel(net, process_group=group, init_sync=False), net, x, size


def train(net: nn.Module, x: Tensor, scale: float, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x).square().sum() * scale).backward()
        optimizer.step()


def batch_in_parts(rank: int, folder: Path) -> dict:
    """DDP or FSDP2 over one dimension of a mesh, tensor parallelism over the other: trained, saved, loaded."""
    found: dict[str, Any] = {}
    of_base = 2 * 4 - 1  # x has no gradient
    own_sums = {"DDP": of_base + 1, "FSDP2": of_base + 2, "FSDP2, parallelize_module first": of_base + 2}  # one a block
    for way, shard, after in (("DDP", False, False), ("FSDP2", True, False), ("FSDP2, parallelize_module first", True, True)):
        alone: list[nn.Module] = []

        def cut(mesh: DeviceMesh) -> nn.Module:
            single, parts = pair(mesh, after=after)  # noqa: B023  called at once
            alone.append(single)  # noqa: B023
            return parts

        net, inside, x, size = two_by_two(cut, shard)
        whole_x = inputs(2 * size)
        step(alone[0], whole_x)
        with counted() as count:
            net(x).square().sum().backward()
        own = {"gradients": 0.0, "sums": abs(count["all_reduce"] - own_sums[way])}
        for name, p in trained(inside).items():
            own["gradients"] = max(own["gradients"], relative(whole(p.grad) * size, trained(alone[0])[name].grad))
        train(alone[0], whole_x, 1.0), train(net, x, size)
        with torch.no_grad():
            want = alone[0](whole_x)
            own["steps"] = relative(net(x), want[2 * (rank // 2) : 2 * (rank // 2) + 2])
            save_adapter(net, folder / way)
            dist.barrier()
            own["in one"] = relative(load_adapter(base(), folder / way)(whole_x), want)
            other, _, _, _ = two_by_two(lambda mesh: randomize(pair(mesh)[1], seed=9), shard)
            own["in parts"] = relative(load_adapter(other, folder / way)(x), want[2 * (rank // 2) : 2 * (rank // 2) + 2])
        found[way] = own
    return found


def factors_in_parts(rank: int, folder: Path) -> dict:
    """A and B in parts over the mesh that cuts the layers too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone, cut = pair(mesh, settings={"group_by": "width"})
    for factors in cut.lotr_factors.values():
        fully_shard(factors, mesh=mesh)
    x, want = inputs(), trained(alone)
    (y, dx), (y_cut, dx_cut) = step(alone, x), step(cut, x)
    found = {"y": relative(y_cut, y), "x": relative(dx_cut, dx)}
    found["gradients"] = max(relative(whole(p.grad), want[name].grad) for name, p in trained(cut).items())
    found["parts"] = abs(sum(isinstance(p, DTensor) for p in cut.lotr_factors.parameters()) - 4)  # widths 12 and 20
    train(alone, x, 1.0), train(cut, x, 1.0)
    save_adapter(cut, folder / "factors in parts")
    dist.barrier()
    with torch.no_grad():
        found["steps"] = relative(cut(x), alone(x))
        found["in one"] = relative(load_adapter(base(), folder / "factors in parts")(x), alone(x))
    return found


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, D)).double()


def compiled(rank: int, folder: Path, backend: str = "eager") -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone, cut = (randomize(seeded(partial(apply_lotr, two_layers(), config()))) for _ in range(2))
    parallelize_module(cut, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = inputs().requires_grad_()
    y = torch.compile(cut, backend=backend, fullgraph=True)(x)
    y.square().sum().backward()
    want, dx = step(alone, inputs())
    gradients = max(relative(p.grad, trained(alone)[name].grad) for name, p in trained(cut).items())
    masked = randomize(seeded(partial(apply_lotr, two_layers(), config(dropout=0.5))))
    parallelize_module(masked, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    said = refusal(lambda: torch.compile(masked, backend="eager", fullgraph=True)(inputs()))
    return {"off": max(relative(y, want), relative(x.grad, dx), gradients), "dropout": said}


def compiled_by_aot(rank: int, folder: Path) -> dict:
    return compiled(rank, folder, "aot_eager")


def refusals(rank: int, folder: Path) -> dict:
    """Each process raises, before it waits for another: the barrier at the end is reached by all."""
    size = dist.get_world_size()
    mesh, grid = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (1, size))
    _, cut = pair(mesh, layers=1)
    up, found = cut.blocks[0].up, {"mesh": refusal(lambda: init_device_mesh("cpu", (size + 1,)))}
    weight = base(layers=1).blocks[0].down.weight.detach()
    strange = {
        "cut twice": distribute_tensor(weight, grid, [Shard(0), Shard(1)]),
        "a sum": DTensor.from_local(weight / size, mesh, [Partial()]),
        "in two pieces": DTensor.from_local(weight[::size], mesh, [_StridedShard(0, split_factor=2)], run_check=False),
    }
    for name, one in strange.items():
        net = base(layers=1)
        net.blocks[0].down.register_parameter("weight", nn.Parameter(one))
        found[name] = refusal(partial(apply_lotr, net, config()))
        found[name] += "" if all(type(m) is not LoTRLinear for m in net.modules()) else ", but it was changed"
    _, later = pair(mesh, layers=1)
    later.blocks[0].up.register_parameter("weight", nn.Parameter(DTensor.from_local(up.weight.to_local(), mesh, [Partial()])))
    found["a sum, later"] = refusal(lambda: later(inputs()))
    hooks = up._forward_pre_hooks.copy()
    up._forward_pre_hooks.clear()
    found["plain x"] = refusal(lambda: up(inputs()))
    found["another mesh"] = refusal(lambda: up(distribute_tensor(inputs(), grid, [Replicate(), Replicate()])))
    up._forward_pre_hooks.update(hooks)
    y = cut(inputs())
    found["recorded"] = refusal(lambda: torch.autograd.grad(y.sum(), up.core, create_graph=True)[0].sum().backward())
    dist.barrier()
    return found


def saves_alone(rank: int, folder: Path) -> dict:
    """Process 0 saves by itself. The processes cannot talk to each other after this."""
    _, cut = pair(init_device_mesh("cpu", (dist.get_world_size(),)))
    _set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
    said = "" if rank else refusal(lambda: save_adapter(cut, folder / "alone"))
    return {"said": said, "left": (folder / "alone").exists()}
