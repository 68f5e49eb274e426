"""As `gloo_checks`, for tensor parallel models: the layers run on local tensors, and one all-reduce adds all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_checks import few_tokens, on_all_paths
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lotr_ext import (
    LoTRConfig,
    LoTRFactors,
    LoTRLinear,
    TaskBank,
    add_adapter,
    apply_lotr,
    disabled,
    explain,
    load_adapter,
    merge,
    mixed,
    per_example,
    save_adapter,
    set_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from nets import OpCounter, relative

D, HIDDEN = 12, 20
KINDS = {"q": ColwiseParallel, "k": ColwiseParallel, "o": RowwiseParallel, "up": ColwiseParallel, "down": RowwiseParallel}


class Attention(nn.Module):
    def __init__(self, d: int, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(d, d, bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


class Block(nn.Module):
    def __init__(self, d: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.attention = Attention(d, bias)
        self.up, self.down, self.whole = nn.Linear(d, hidden, bias), nn.Linear(hidden, d, bias), nn.Linear(d, d, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return self.whole(x + self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    """whole: a layer that no process cuts, in the group of those that are cut."""

    def __init__(self, d: int = D, hidden: int = HIDDEN, layers: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, hidden, bias) for _ in range(layers))
        self.checkpointed: bool | None = None  # reentrant or not; None: no checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return x


def plan(net: Net, prepare: bool = False, local: bool = True) -> dict[str, Any]:
    """local: whether the layers in between get local tensors, which are of one size in all processes for RowwiseParallel."""
    own: dict[str, Any] = {}
    for i in range(len(net.blocks)):
        at = f"blocks.{i}."
        for name, kind in KINDS.items():
            options = {} if local or kind is RowwiseParallel else {"use_local_output": False}
            own[at + ("attention." if name in "qko" else "") + name] = kind(**options)
        if prepare:
            layouts = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
            own[at + "attention"] = PrepareModuleInput(**layouts)
    return own


def config(**options: Any) -> LoTRConfig:
    return LoTRConfig(**{"rank": 4, "adapter_dtype": torch.float64} | options)


def base(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def randomize(net: nn.Module, seed: int = 2) -> nn.Module:
    """The adapter's parameters in all processes alike."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and "lotr_factors" not in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))
    return net


def seeded(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def pair(
    mesh: DeviceMesh,
    after: bool = False,
    prepare: bool = False,
    local: bool = True,
    settings: dict | None = None,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """(a model in one process, the same cut over mesh). after: apply_lotr comes after parallelize_module. The factors of the
    cut one begin with other values in each process."""
    settings, rank = settings or {}, mesh.get_local_rank()
    single, cut = base(**options), base(**options)
    alone = randomize(seeded(lambda: apply_lotr(single, config(**settings))))
    if after:
        parallelize_module(cut, mesh, plan(cut, prepare, local))
    alike = rank == 0 or settings.get("group_by") == "name"  # else each pair of factors has a layer that is cut
    seeded(lambda: apply_lotr(cut, config(**settings)), seed=1 if alike else 100 + rank)
    if not after:
        parallelize_module(cut, mesh, plan(cut, prepare, local))
    return alone, randomize(cut)


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, gradient of x)"""
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def differences(alone: nn.Module, cut: nn.Module, x: Tensor | None = None) -> dict[str, float]:
    """The largest relative differences of outputs, of the gradients of x, and of the adapter's gradients."""
    x = inputs() if x is None else x
    (y, dx), (y_cut, dx_cut) = step(alone, x), step(cut, x)
    want, got = trained(alone), trained(cut)
    assert want.keys() == got.keys()
    assert all(type(p) is nn.Parameter and not isinstance(p.data, DTensor) for p in got.values())
    assert all((p.grad is None) == (want[name].grad is None) for name, p in got.items())
    gradients = max(relative(p.grad, want[name].grad) for name, p in got.items() if p.grad is not None)
    return {"y": relative(y_cut, y), "x": relative(dx_cut, dx), "gradients": gradients}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many collectives run, by name."""
    found: dict[str, int] = {}
    names = ("all_reduce", "all_gather_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all_single")
    before = {name: getattr(collectives, name) for name in names}

    def count(name: str, *args: Any, **kwargs: Any) -> Any:
        found[name] = found.get(name, 0) + 1
        return before[name](*args, **kwargs)

    for name in names:
        setattr(collectives, name, partial(count, name))
    try:
        yield found
    finally:
        for name in names:
            setattr(collectives, name, before[name])


# ---- checks ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict] = {
    "before": {},
    "after": {"after": True},
    "without biases": {"bias": False},
    "one x for siblings": {"prepare": True},
    "uneven": {"hidden": 13, "local": False},
    "by width": {"settings": {"group_by": "width"}},
    "by name": {"settings": {"group_by": "name"}},
    "two ranks": {"settings": {"rank": (3, 5)}},
    "diagonal": {"settings": {"core": "diagonal"}},
    **{core: {"settings": {"core": core}} for core in ("cp", "few", "train", "tucker")},
    "svd": {"settings": {"init": "svd"}},
    "frozen factors": {"settings": {"train": ("core",)}},
    "frozen cores": {"settings": {"train": ("A", "B"), "core_init": "identity"}},
}


def layouts(rank: int, folder: Path) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {name: differences(*pair(mesh, **options)) for name, options in LAYOUTS.items()}
    for path, own in on_all_paths(lambda: differences(*pair(mesh, prepare=True))).items():
        found[path] = own
    return found


def shared_u(rank: int, folder: Path) -> dict:
    """Calls of our operators in a step of one block: q and k share one u = x A on local tensors."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for prepare in (False, True):
        _, cut = pair(mesh, prepare=prepare, layers=1)
        with few_tokens(0), pytest.MonkeyPatch.context() as patch:
            calls = OpCounter(patch)
            step(cut, inputs())
        found[str(prepare)] = calls.take()
    return found


def more_processes_than_rows(rank: int, folder: Path) -> dict:
    """The last process has no row of the layers of 9 and 3 features."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {n: differences(*pair(mesh, hidden=n, local=False, settings={"rank": 2})) for n in (9, 3)}
    return {f"{n} {name}": value for n, own in found.items() for name, value in own.items()}


def checkpoints(rank: int, folder: Path) -> dict:
    found, mesh = {}, init_device_mesh("cpu", (dist.get_world_size(),))
    for reentrant in (False, True):
        alone, cut = pair(mesh)
        cut.checkpointed = reentrant
        found[f"reentrant {reentrant}"] = differences(alone, cut)
    alone, cut = pair(mesh)
    for net in (alone, cut):  # two forwards, then two backwards; then a third step onto their gradients
        losses = [net(inputs() * scale).square().sum() for scale in (1.0, 0.5)]
        for loss in losses:
            loss.backward()
    return found | {"accumulated": differences(alone, cut)}


def sums(rank: int, folder: Path) -> dict:
    """Collectives of a step: of the base alone at 4 blocks, adapted at 4 and at 40."""
    found, mesh = {}, init_device_mesh("cpu", (dist.get_world_size(),))
    plain = base(layers=4)
    nets = {"base 4": parallelize_module(plain, mesh, plan(plain))}
    for name, net in (nets | {f"adapted {n}": pair(mesh, layers=n)[1] for n in (4, 40)}).items():
        with counted() as count:
            step(net, inputs())
        found[name] = sum(count.values())
    return found


def told(rank: int, folder: Path) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    _, cut = pair(mesh)
    at = cut.blocks[0]
    return {name: str(explain(layer, inputs())) for name, layer in (("up", at.up), ("whole", at.whole))} | {
        "down": str(explain(at.down, torch.zeros(3, 5, HIDDEN, dtype=torch.float64))),
        "summary": str(trainable_summary(cut)),
    }


def dropout(rank: int, folder: Path) -> dict:
    """The mean over many masks is the output without, also of a second layer while the first one's graph is alive; the
    processes have the same masks; a second call on the same x has another one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone, cut = pair(mesh, settings={"dropout": 0.5})
    torch.manual_seed(rank)  # the seeds of masks are rank 0's
    layer, single, x = cut.blocks[0].down, alone.blocks[0].down, torch.ones(4, HIDDEN, dtype=torch.float64)
    local = x.chunk(dist.get_world_size(), -1)[rank]
    drawn = [layer(local).detach() for _ in range(400)]
    spread = torch.stack(drawn).std(0).max().item()
    off = (torch.stack(drawn).mean(0) - single.eval()(x).detach()).abs().max().item()
    alike = [torch.empty_like(drawn[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(alike, drawn[0])
    up = [torch.equal(a, alike[0]) for a in alike]
    y, later = layer(local), cut.blocks[1].down
    again = [later(-3 * local).detach() for _ in range(400)]
    off_later = (torch.stack(again).mean(0) - alone.blocks[1].down.eval()(-3 * x).detach()).abs().max().item()
    return {
        "spread": spread,
        "off": off,
        "spread later": torch.stack(again).std(0).max().item(),
        "off later": off_later,
        "alike": all(up),
        "drawn again": not torch.equal(y, layer(local)),
    }


def files(rank: int, folder: Path) -> dict:
    """Saved, loaded by one process and into a cut model, merged and unmerged, and taken off."""
    mesh, x, found = init_device_mesh("cpu", (dist.get_world_size(),)), inputs(), {}
    alone, cut = pair(mesh)
    want = alone(x)
    save_adapter(cut, folder / "adapter")
    found["in one"] = relative(load_adapter(base(), folder / "adapter")(x), want)
    other = randomize(pair(mesh)[1], seed=9)
    load_adapter(other, folder / "adapter")
    found["in parts"] = relative(other(x), want)
    later = base()
    parallelize_module(later, mesh, plan(later))
    found["onto parts"] = relative(load_adapter(later, folder / "adapter")(x), want)
    before = [p.to_local().clone() for p in cut.parameters() if isinstance(p, DTensor)]
    merge(cut)
    found["merged"] = relative(cut(x), want)
    unmerge(cut)
    found["bits"] = all(
        torch.equal(a, b.to_local()) for a, b in zip(before, (p for p in cut.parameters() if isinstance(p, DTensor)))
    )
    found["unmerged"] = relative(cut(x), want)
    unload(cut, merge=True)
    assert type(cut.blocks[0].up) is nn.Linear
    found["taken off"] = relative(cut(x), want)
    alone, cut = pair(mesh, settings={"init": "svd"})
    save_adapter(cut, folder / "svd")
    found["svd"] = relative(load_adapter(base(), folder / "svd")(x), alone(x))
    with disabled(alone), disabled(cut):
        found["svd, disabled"] = relative(cut(x), alone(x))
    return found


def rows_apart(rank: int, folder: Path) -> dict:
    """A core for each row or token: named adapters, a bank of tasks, the gradients of each example."""
    mesh, x, found, sums = init_device_mesh("cpu", (dist.get_world_size(),)), inputs(), {}, {}
    for prepare in (False, True):
        alone, cut = pair(mesh, prepare=prepare)
        banks = []
        for net, seed in ((alone, 1), (cut, 1 + rank)):
            seeded(lambda: add_adapter(net, "fresh"), seed=seed)  # noqa: B023  called at once
            add_adapter(net, "other", share_factors="default")
            banks.append(TaskBank(net, tasks=3))
            torch.manual_seed(6)
            for core in (*(c for c in net.lotr_parked["other"].values), *banks[-1].requires_grad_().cores):
                core.data.copy_(torch.randn(core.shape, dtype=core.dtype))
            banks[-1].taken.fill_(True)
        want, got = (list(m.lotr_parked["fresh"].factors.values()) for m in (alone, cut))
        found["agreed"] = max(relative(b.A, a.A.detach()) for a, b in zip(want, got))
        of_tokens = torch.tensor([[0, 1, 2, -1, 1], [2, 2, 0, 1, 1], [-1, 0, 0, 2, 0]])
        ways = {"names": ["other", None, "default"], "tasks": torch.tensor([2, 0, 2]), "tokens": of_tokens}
        for name, way in ways.items():
            with mixed(alone, way), mixed(cut, way):
                own = differences(alone, cut)
                if name != "names":
                    own["bank"] = max(relative(b.grad, a.grad) for a, b in zip(*(m.cores for m in banks)))
                with counted() as count:
                    step(cut, x)
            for net in (alone, cut):
                net.zero_grad()
            found |= {f"{name} {key} {prepare}": value for key, value in own.items()}
            sums[f"{name} {prepare}"] = sum(count.values())
        with per_example(alone) as of_alone, per_example(cut) as of_cut:
            own = differences(alone, cut)
        own["each"] = max(relative(of_cut[name], of_alone[name]) for name in of_alone)
        found |= {f"examples {key} {prepare}": value for key, value in own.items()}
        for net in (alone, cut):
            randomize(set_adapter(net, "fresh"), seed=8)
        found |= {f"another {key} {prepare}": value for key, value in differences(alone, cut).items()}
    return {"off": found, "sums": sums}


class ByHand(nn.Module):
    """Without apply_lotr, so without a forward scope."""

    def __init__(self) -> None:
        super().__init__()
        factors = LoTRFactors(D, D, 4, dtype=torch.float64)
        self.factors = factors
        self.up, self.down = (LoTRLinear(D, D, factors=factors, dtype=torch.float64) for _ in range(2))
        self.up.leave_factors_to_owner()
        self.down.leave_factors_to_owner()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def by_hand(rank: int, folder: Path) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone = randomize(seeded(ByHand))
    cut = copy.deepcopy(alone)
    return differences(alone, parallelize_module(cut, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}))
