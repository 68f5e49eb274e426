"""As `gloo_checks`, for pipelines: each process has stages, whose replicas of A and B get one sum of gradients a step."""

from __future__ import annotations

import copy
import datetime
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_checks import Collectives, refusal
from gloo_checks import whole as full
from stacks import trained_grads
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from toys import plain

from lotr_ext import LoTRConfig, PipelineStages, apply_lotr, load_adapter, save_adapter
from nets import relative

D, HIDDEN, BLOCKS, MICRO_BATCHES, STEPS = 12, 20, 4, 4, 3
CLIP = 0.05  # below the norm of a step
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class Block(nn.Module):
    """mix is in one group in all blocks. hidden: D in the first half of them, so that their stages have no layer of the other
    groups."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(D, hidden), nn.Linear(hidden, D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): Block(D if i < BLOCKS // 2 else HIDDEN) for i in range(BLOCKS)})
        self.head: nn.Module | None = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def base() -> Net:
    torch.manual_seed(0)
    return Net().double()


def config(**options: Any) -> LoTRConfig:
    given = {"rank": 4, "adapter_dtype": torch.float64, "target_modules": ["up", "down", "mix"], "modules_to_save": ["head"]}
    return LoTRConfig(**given | options)


def cut(net: Net, index: int, stages: int) -> Net:
    """The stage of that index, of a whole model, which it changes."""
    own = range(index * BLOCKS // stages, (index + 1) * BLOCKS // stages)
    for name in list(net.blocks):
        if int(name) not in own:
            del net.blocks[name]
    if index < stages - 1:
        net.head = None
    return net


def indices(rank: int, world: int, schedule: str) -> tuple[list[int], int]:
    """The stages of a process, and how many there are."""
    each = BLOCKS // world if schedule == "interleaved" else 1
    return [rank + i * world for i in range(each)], world * each


def randomize(net: nn.Module) -> nn.Module:
    """The cores, and what makes them, by name: alike in the whole model and in its stages."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and "lotr_factors" not in name and "head" not in name:
                seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=seed))
    return net


def apart(index: int, stages: int, seed: int = 0, **options: Any) -> Net:
    """A stage that was adapted by itself, its factors begin with values of its own."""
    own = cut(base(), index, stages)
    torch.manual_seed(100 + 10 * seed + index)
    return apply_lotr(own, config(**options | ({} if index == stages - 1 else {"modules_to_save": None})))


def whole(**options: Any) -> Net:
    net = base()
    torch.manual_seed(1)
    return randomize(apply_lotr(net, config(**options)))


def batch(step: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    return tuple(torch.randn(rows, 5, size, dtype=torch.float64, generator=made) for size in (D, 3))


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)


class Pipeline:
    """The stages of one process and their schedule. wrap: around each stage, after PipelineStages has it."""

    def __init__(
        self,
        own: Sequence[nn.Module],
        at: Sequence[int],
        count: int,
        schedule: str,
        group: Any = None,
        wrap: Callable = lambda m: m,
    ) -> None:
        self.stages = PipelineStages(*own, group=group)
        pieces = [PipelineStage(wrap(m), i, count, torch.device("cpu"), group=group) for m, i in zip(own, at)]
        self.first, self.last = 0 in at, count - 1 in at
        kind = SCHEDULES[schedule]
        self.schedule = kind(pieces if schedule == "interleaved" else pieces[0], MICRO_BATCHES, loss_fn=loss)

    def step(self, x: Tensor, target: Tensor) -> None:
        """Gradients of the mean loss."""
        self.schedule.step(*((x,) if self.first else ()), **({"target": target} if self.last else {}))
        with Collectives() as found:
            self.stages.reduce_gradients()
        self.sums = found.calls["allreduce"]


def trained(stages: PipelineStages) -> dict[str, nn.Parameter]:
    return {n: p for stage in stages.inner for n, p in stage.named_parameters() if p.requires_grad}


# ---- against one process ---------------------------------------------------------------------------------------------

WAYS: dict[str, dict] = {
    "gpipe, by shape": {"schedule": "gpipe"},
    "1f1b, by width": {"schedule": "1f1b", "group_by": "width"},
    "interleaved, by shape": {"schedule": "interleaved"},
    "interleaved, by width, apart": {"schedule": "interleaved", "group_by": "width", "apart": True},
    "1f1b, by shape, apart": {"schedule": "1f1b", "apart": True},
    "gpipe, tucker": {"schedule": "gpipe", "core": "tucker"},
    "1f1b, diagonal": {"schedule": "1f1b", "core": "diagonal"},
    "gpipe, frozen factors": {"schedule": "gpipe", "train": ("core",)},
    "1f1b, a stage without layers": {"schedule": "1f1b", "target_modules": r"blocks\.[01]\..*"},
    "1f1b, two ranks": {"schedule": "1f1b", "rank": (3, 5)},
}


def one_way(rank: int, folder: Path, schedule: str, apart_: bool, options: dict) -> dict:
    at, count = indices(rank, dist.get_world_size(), schedule)
    if apart_:
        own = [apart(i, count, **options) for i in at]
    else:
        own = [cut(whole(**options), i, count) for i in at]
    pipe = Pipeline(own, at, count, schedule)
    stages = pipe.stages
    for stage in own if apart_ else ():
        randomize(stage)
    save_adapter(stages, folder / "start")
    alone = load_adapter(base(), folder / "start") if apart_ else whole(**options)
    truth = plain(copy.deepcopy(alone))
    loss(truth(batch()[0]), batch()[1]).backward()
    pipe.step(*batch())
    want = trained_grads(truth)
    found = {"gradients": max(relative(p.grad, want[name]) for name, p in trained(stages).items()), "sums": pipe.sums}
    stages.zero_grad()
    optimizer, single = adam(stages.parameters()), adam(alone.parameters())
    for i in range(STEPS):
        single.zero_grad()
        loss(alone(batch(i)[0]), batch(i)[1]).backward()
        want = torch.nn.utils.clip_grad_norm_([p for p in alone.parameters() if p.requires_grad], CLIP)
        single.step()
        optimizer.zero_grad()
        pipe.step(*batch(i))
        norm = stages.clip_grad_norm_(CLIP)
        optimizer.step()
    found |= {"norm": relative(norm, want), "clipped": want.item() > CLIP}
    after = dict(alone.named_parameters())
    found["trained"] = max(relative(p, after[name]) for name, p in trained(stages).items())
    save_adapter(stages, folder / "end")
    x = batch(9)[0]
    loaded = load_adapter(base(), folder / "end")
    found["saved"] = relative(loaded(x), alone(x))
    others = [apart(i, count, 7, **options) if apart_ else cut(base_adapted(options), i, count) for i in at]
    again = load_adapter(PipelineStages(*others), folder / "end")
    found["loaded"] = max(relative(p, after[name]) for name, p in trained(again).items())
    return found


def base_adapted(options: dict) -> Net:
    torch.manual_seed(5)
    return apply_lotr(base(), config(**options))


def ways(rank: int, folder: Path, names: Iterable[str] = WAYS) -> dict:
    found = {}
    for name in names:
        options = dict(WAYS[name])
        schedule, apart_ = options.pop("schedule"), options.pop("apart", False)
        found[name] = one_way(rank, folder / name, schedule, apart_, options)
    return found


def of_four(rank: int, folder: Path) -> dict:
    """A block a process: two of them have no layer of half of the groups."""
    return ways(rank, folder, ("gpipe, by shape", "1f1b, by width", "1f1b, by shape, apart"))


def around(kind: str, mesh: DeviceMesh) -> Callable[[nn.Module], nn.Module]:
    """How a stage is shared by the processes of a mesh, once its pipeline is known."""
    if kind == "ddp":
        return lambda stage: nn.parallel.DistributedDataParallel(stage, process_group=mesh.get_group())
    return (lambda stage: fully_shard(stage, mesh=mesh)) if kind == "fsdp2" else lambda stage: stage


def meshes(rank: int, folder: Path) -> dict:
    """A pipeline over one dimension of a mesh, and each stage in another way over the other, against one process."""
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inner", "pp"))
    inner, index = mesh["inner"], mesh.get_local_rank("pp")
    for kind in ("ddp", "fsdp2", "tensor parallel"):
        own, alone = cut(whole(), index, 2), whole()
        if kind == "tensor parallel":
            parallelize_module(own, inner, {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()})
        pipe = Pipeline([own], [index], 2, "1f1b", mesh.get_group("pp"), around(kind, inner))
        x, target = batch(rows=16)
        loss(alone(x), target).backward()
        here = slice(None) if kind == "tensor parallel" else slice(8 * inner.get_local_rank(), 8 * inner.get_local_rank() + 8)
        pipe.step(x[here], target[here])
        want = {n: p.grad for n, p in alone.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_([p for p in alone.parameters() if p.requires_grad], CLIP)
        entry = found[kind] = {"norm": relative(pipe.stages.clip_grad_norm_(CLIP), norm)}
        entry["clipped gradients"] = max(relative(full(p.grad), want[n]) for n, p in trained(pipe.stages).items())
        save_adapter(pipe.stages, folder / kind)
        entry["saved"] = relative(load_adapter(base(), folder / kind)(x), alone(x))
        load_adapter(pipe.stages, folder / kind)
    return found


# ---- bad input -------------------------------------------------------------------------------------------------------


def refusals(rank: int, folder: Path) -> dict[str, Any]:
    """Messages of what cannot be a pipeline, in each process."""

    def stages(**options: Any) -> PipelineStages:
        return PipelineStages(apart(rank, 2, **options))

    found = {
        "none": refusal(PipelineStages),
        "no module": refusal(lambda: PipelineStages(cut(whole(), 0, 2) if rank == 0 else "stage 1")),
        "other rank": refusal(lambda: stages(rank=4 - rank)),
        "other dtype": refusal(lambda: stages(adapter_dtype=(torch.float64, torch.float32)[rank])),
        "other values": refusal(lambda: PipelineStages(randomize(apart(rank, 2)))),
        "one stage twice": refusal(lambda: PipelineStages(cut(whole(), 0, 2))),
        "cores of each stage": refusal(lambda: stages(core="tucker")),
        "without values": refusal(lambda: PipelineStages(cut(whole(), rank, 2).to("meta" if rank else "cpu"))),
    }
    own = PipelineStages(stage := cut(whole(), rank, 2))
    save_adapter(own, folder / "right")
    found |= {
        "a stage saved": refusal(lambda: save_adapter(stage, folder / "stage")),
        "a stage loaded": refusal(lambda: load_adapter(stage, folder / "right")),
        "a path": refusal(lambda: save_adapter(own, folder / "never" if rank == 0 else 5)),
    }
    save_adapter(apply_lotr(base(), config(target_modules=["up"])), folder / f"other layers {rank}")
    other = apply_lotr(base(), config(adapter_dtype=torch.float32 if rank else torch.float64))
    save_adapter(other, folder / f"other dtype {rank}")
    before = {name: p.detach().clone() for name, p in trained(own).items()}
    found |= {
        "other layers": refusal(lambda: load_adapter(own, folder / f"other layers {rank}")),
        "other file in process 1": refusal(lambda: load_adapter(own, folder / f"other dtype {rank}")),
        "unchanged": all(torch.equal(p, before[name]) for name, p in trained(own).items()),
    }
    with torch.no_grad():
        stage.lotr_factors["12x12"].A.add_(rank)
    found["apart"] = refusal(lambda: save_adapter(own, folder / "apart"))
    return found | {"left": sorted(path.name for path in folder.glob("*") if path.name in ("stage", "never", "apart"))}


def alone(rank: int, folder: Path) -> dict[str, str]:
    """Process 1 saves by itself. The processes cannot talk to each other after this."""
    own = PipelineStages(cut(whole(), rank, 2))
    _set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
    if rank == 1:
        return {"save": refusal(lambda: save_adapter(own, folder / "alone"))}
    time.sleep(2)
    return {"sum": refusal(own.reduce_gradients), "left": str((folder / "alone").exists())}
