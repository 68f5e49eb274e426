"""What two processes check together, each with half of the batch, against one process with all of it in float64.

Every check takes (rank, folder), is called in both processes in the same order, and returns what JSON can hold.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from stacks import D, Stack, base, make, trained_grads
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import IDS, Tied, plain

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, init_from_gradient, load_adapter, merge, save_adapter, unload, unmerge
from lotr_ext.interop import export_lora
from lotr_ext.layers.sharded import agreed
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.adapter_files import JSON_NAME
from lotr_ext.ops import planner
from nets import OpCounter, relative

Grads = dict[str, Tensor]
PATHS = {"two nodes": (0, 0), "one node": (128, 0), "one folded node": (0, 2**62)}  # arguments of few_tokens
OTHERS = {"a factor a width": {"group_by": "width"}, "cores of a tensor train": {"core": "train"}}  # than the default


def make_fresh() -> Stack:
    """`make` with cores of zero."""
    return apply_lotr(base(), LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"]))


def batch(rank: int, step: int = 0) -> Tensor:
    return torch.randn(6, D, generator=torch.Generator().manual_seed(10 * step + rank))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def truth(steps: int = 1, **settings) -> Grads:
    """The gradients of the mean over both halves, summed over steps: float64, plain autograd, one process."""
    model = plain(make(**settings).double())
    for step in range(steps):
        (sum(model(batch(rank, step).double()).square().mean() for rank in range(2)) / 2).backward()
    return trained_grads(model)


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(model: nn.Module, want: Grads) -> float:
    """The worst relative error of the trained parameters' gradients; infinite where one is missing."""
    trained = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == want.keys(), trained.keys() ^ want.keys()
    return max(relative(whole(p.grad), want[n]) for n, p in trained.items())


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.calls[function.__name__.split(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def few_tokens(below: int, little: int = 0) -> Iterator[None]:
    """The few tokens of a test take one node (128) or two (0), as many tokens do; with little work one that folds (0)."""
    before = planner.FEW_TOKENS, planner.LITTLE_WORK
    planner.FEW_TOKENS, planner.LITTLE_WORK = below, little
    try:
        yield
    finally:
        planner.FEW_TOKENS, planner.LITTLE_WORK = before


def on_all_paths(check: Callable[[], Any]) -> dict[str, Any]:
    return {path: on_path(turn, check)[path] for turn, path in enumerate(PATHS)}


def on_path(turn: int, check: Callable[[], Any]) -> dict[str, Any]:
    """On one path. Cases that differ in several things take the paths in turn, so that each value of each thing meets every
    path, but not each pair of values."""
    path = list(PATHS)[turn % len(PATHS)]
    with few_tokens(*PATHS[path]):
        return {path: check()}


def step(model: nn.Module, *inputs: Tensor) -> None:
    """Two optimizer-less steps, so that whatever a first step leaves behind meets a second."""
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        for x in inputs:
            loss(model, x).backward()


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def gradient_start(rank: int, folder: Path) -> dict:
    """The start from the gradient, each process with its own batches: rank 0 saves it, and says whether both have the same."""
    model = init_from_gradient(make_fresh(), [batch(rank), batch(rank, 1)], loss)
    factors = {n: p.detach() for n, p in model.lotr_factors.named_parameters()}
    if rank == 0:
        torch.save(factors, folder / "gradient_start.pt")
    both = []
    for mine in factors.values():
        dist.all_gather(each := [torch.empty_like(mine) for _ in range(2)], mine)
        both.append(torch.equal(*each))
    return {"same": all(both)}


def shard(model: Stack, *, by: str = "block", **options) -> Stack:
    """by: "block" then root (factors with the root), "factors" by themselves too, or the "root" alone."""
    options = {"mesh": init_device_mesh("cpu", (2,)), **options}
    if by == "factors":
        for factors in model.lotr_factors.values():
            fully_shard(factors, reshard_after_forward=False, **options)
    if by != "root":
        for block in model.blocks:
            fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp(rank: int, folder: Path) -> dict:
    """Relative errors by case and path."""
    one, two, x, later = truth(), truth(2), batch(rank), batch(rank, 1)
    found = {}

    def case(name: str, run: Callable[[Stack], None], want: Grads = one, *, turn: int | None, by: str, **settings) -> None:
        """turn: None for all paths."""

        def check() -> float:
            model = shard(make(**settings), by=by)
            run(model)
            return error(model, want)

        found[name] = on_all_paths(check) if turn is None else on_path(turn, check)

    def one_step(model: Stack) -> None:
        step(model, x)

    def with_input_gradient(model: Stack) -> None:
        step(model, x.clone().requires_grad_())

    def two_forwards_first(model: Stack) -> None:
        losses = [loss(model, t.clone().requires_grad_()) for t in (x, later)]
        for one_loss in losses:
            one_loss.backward()

    def accumulated(model: Stack) -> None:
        model.set_requires_gradient_sync(False)
        loss(model, x).backward()
        model.set_requires_gradient_sync(True)
        loss(model, later).backward()

    for i, by in enumerate(("block", "factors", "root")):
        case(f"by {by}", one_step, turn=None, by=by)
        case(f"by {by}, input gradient, two forwards", two_forwards_first, two, turn=i, by=by)
    for i, by in enumerate(("block", "factors")):
        case(f"by {by}, input gradient", with_input_gradient, turn=i, by=by)
        case(f"by {by}, accumulation", accumulated, two, turn=None, by=by)
        case(f"by {by}, non-reentrant checkpointing", one_step, turn=i + 1, by=by, reentrant=False)
        case(f"by {by}, reentrant checkpointing", with_input_gradient, turn=i + 2, by=by, reentrant=True)
    for i, (what, settings) in enumerate(OTHERS.items()):
        want = truth(**settings)
        for j, by in enumerate(("block", "factors")):
            case(f"by {by}, {what}", with_input_gradient, want, turn=i + j, by=by, **settings)
            for reentrant in (False, True):
                name, turn = f"by {by}, {what}, {'' if reentrant else 'non-'}reentrant checkpointing", i + j + 1 + reentrant
                case(name, with_input_gradient, want, turn=turn, by=by, reentrant=reentrant, **settings)
    return found


def fsdp_mixed_precision(rank: int, folder: Path) -> dict:
    """Errors of bfloat16 parameters with float32 reduction; and of plain autograd in bfloat16 in one process."""
    want, found = truth(), {}
    reference = plain(make().bfloat16())
    (sum(loss(reference, batch(r).bfloat16()) for r in range(2)) / 2).backward()
    grads = trained_grads(reference)
    found["eager bfloat16"] = {"one process": max(relative(grads[n], want[n]) for n in want)}
    for i, reentrant in enumerate((None, False)):
        for j, by in enumerate(("block", "factors")):

            def check(reentrant=reentrant, by=by) -> float:
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                model = shard(make(reentrant=reentrant), by=by, mp_policy=policy)
                step(model, batch(rank))
                assert model.lotr_factors["16x16"].A.grad.dtype == torch.float32
                return error(model, want)

            found[f"by {by}, checkpointing {reentrant}"] = on_path(i + j, check) | on_path(i + j + 1, check)
    return found


def fsdp_shares(rank: int, folder: Path) -> dict:
    """Calls of our operators in a step of 3 blocks: q, k and v share one u = x A under FSDP2 too."""
    found = {}
    for by in ("block", "factors"):
        model = shard(make(), by=by)
        with few_tokens(0), pytest.MonkeyPatch.context() as patch:
            calls = OpCounter(patch)
            loss(model, batch(rank)).backward()
        found[by] = calls.take()
    return found


def fsdp_reductions(rank: int, folder: Path) -> dict:
    """Reduce-scatters of one step: one a block, and one for the root's share, where A and B of all groups are."""
    found = {}
    for layers in (1, 4):
        for below in (0, 128):
            model = shard(make(layers))
            with few_tokens(below), Collectives() as collectives:
                loss(model, batch(rank)).backward()
            found[f"{layers} blocks, {below}"] = collectives.calls["reduce_scatter_base"] - layers
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *ranks: int) -> list[float]:
    """Losses of the whole batch by step. ranks: the halves of the batch that this process has; both, if it is alone."""
    losses = []
    for i in steps:
        optimizer.zero_grad()
        mean = sum(loss(model, batch(rank, i)) for rank in ranks) / len(ranks)
        mean.backward()
        optimizer.step()
        mean = mean.detach().clone()
        if len(ranks) == 1:
            dist.all_reduce(mean)
            mean /= 2
        losses.append(mean.item())
    return losses


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(0, 9))


def refusal(attempt: Callable[[], object]) -> str:
    """What it raises, as "kind: message"."""
    try:
        attempt()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def fsdp_saves(rank: int, folder: Path) -> dict:
    """Three steps, then everything saved in both ways, then two steps more. The parent goes on from the files by itself."""
    model = shard(make())
    optimizer = adam(model)
    found = {"before": train(model, optimizer, range(3), rank)}
    only_trained = StateDictOptions(ignore_frozen_params=True)
    state, moments = get_state_dict(model, optimizer, options=only_trained)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder / "dcp")
    found["saved"] = sorted(state)
    with torch.no_grad():
        model(batch(rank))  # the root's parameters are gathered now
    save_adapter(model, folder / "adapter")
    found["there"] = (folder / "adapter" / "lotr_adapter.json").is_file()
    found["after"] = train(model, optimizer, range(3, 5), rank)
    return found


def fsdp_resumes(rank: int, folder: Path) -> dict:
    """What one process saved (the parent, before it started these two), in two."""
    model = shard(make())
    randomize_parts(model)
    optimizer = adam(model)
    options = StateDictOptions(ignore_frozen_params=True)
    state, moments = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=folder / "single")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state,
        optim_state_dict=moments,
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    found = {"dcp": train(model, optimizer, range(3, 5), rank)}
    loaded = shard(make(saved=None))  # state_dict() of a module to save would put the gathered parameters away
    randomize_parts(loaded)
    with torch.no_grad():
        loaded(batch(0))  # the root's parameters are gathered now: what is loaded must reach the parts
    assert load_adapter(loaded, folder / "bare-adapter") is loaded
    loaded.reshard()
    with torch.no_grad():
        found["adapter"] = loaded(batch(0)).sum().item()
    return found


def fsdp_tied_head(rank: int, folder: Path) -> dict:
    """How far what a sharded model with a trained, tied head saves and loads is from what it computes."""
    config = LoTRConfig(rank=2, target_modules=["q"], modules_to_save=["head"])
    whole, mesh = apply_lotr(Tied(), config), init_device_mesh("cpu", (2,))
    with torch.no_grad():
        for parameter in (whole.head.weight, *(layer.core for layer in adapted_layers(whole).values())):
            parameter.fill_(0.3)
    want = whole(IDS).detach()
    if rank == 0:
        save_adapter(whole, folder / "tied, whole")
    save_adapter(fully_shard(whole, mesh=mesh), folder / "tied-adapter")
    tied = [json.loads((folder / at / JSON_NAME).read_text())["tied"] for at in ("tied, whole", "tied-adapter")]
    again = fully_shard(load_adapter(Tied(), folder / "tied-adapter"), mesh=mesh)
    export_lora(again, folder / "tied-lora", base_model="base")
    lora = load_file(folder / "tied-lora" / "adapter_model.safetensors")
    assert torch.equal(lora["base_model.model.embed.weight"], lora["base_model.model.head.weight"])
    assert tied[0] == tied[1] == {"embed.weight": "head.weight"}, tied
    found = {"in one process": relative(load_adapter(Tied(), folder / "tied-adapter")(IDS), want)}
    again = fully_shard(apply_lotr(Tied(), config), mesh=mesh)
    return found | {"in parts": relative(load_adapter(again, folder / "tied-adapter")(IDS), want)}


def randomize_parts(model: nn.Module) -> None:
    """Other values than those to be loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)


def fsdp_refuses(rank: int, folder: Path) -> dict:
    """Messages of what cannot be done with parts of tensors."""
    (folder / "file").touch()
    sharded, cores = shard(make()), {}
    plain_base = fully_shard(base(), mesh=init_device_mesh("cpu", (2,)))
    cores = {n: p.to_local().clone() for n, p in sharded.named_parameters()}
    attempts = {
        "merge": lambda: merge(sharded),
        "apply": lambda: apply_lotr(plain_base, LoTRConfig(rank=2)),
        "a file in the way": lambda: save_adapter(sharded, folder / "file"),
        "an error of another kind": lambda: agreed("saving", lambda: {0: "fine"}[rank]),
        "svd": lambda: load_adapter(sharded, folder / "svd-adapter"),
        "other rank": lambda: load_adapter(sharded, folder / "rank-2-adapter"),
    }
    gathered, merged = shard(make(), by="root"), shard(merge(make()), by="root")
    with torch.no_grad():  # the root stays gathered: its parameters look whole
        gathered(batch(0)), merged(batch(0))
    attempts |= {
        "merge, gathered": lambda: merge(gathered),
        "unmerge, gathered": lambda: unmerge(merged),
        "unload, gathered": lambda: unload(gathered, merge=False),
        "merge, gathered layer": lambda: gathered.blocks[0].q.merge(),
        "unmerge, gathered layer": lambda: merged.blocks[0].q.unmerge(),
        "merge, sharded layer": lambda: sharded.blocks[0].q.merge(),
        "bank": lambda: TaskBank(gathered, 2),
    }
    found = {name: refusal(attempt) for name, attempt in attempts.items()}
    assert all(torch.equal(p.to_local(), cores[n]) for n, p in sharded.named_parameters())
    assert not any(layer.merged for layer in adapted_layers(sharded).values()) and not hasattr(plain_base, "lotr_factors")
    return found
