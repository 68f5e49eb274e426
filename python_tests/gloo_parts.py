"""As `gloo_checks`, for models that FSDP1 and FSDP2 hold in parts: each form of core is trained, saved, and loaded again, into
one process and into parts with other values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from gloo_checks import adam, batch, loss, on_path, output, randomize_parts, refusal, shard, train, truth
from stacks import SmoothBlock, Stack, base, make
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, init_from_gradient, load_adapter, merge, save_adapter, unload
from lotr_ext.model import adapter_files
from nets import relative

CORES = ("dense", "tucker", "few", "train")
FROZEN_CORES = {"train": ("A", "B"), "core_init": "identity"}
STEPS = range(3)


def fsdp1_shard(model: Stack, by: str = "block", **options) -> nn.Module:
    policy = None if by == "root" else ModuleWrapPolicy({SmoothBlock})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device, **options)


def fsdp1_gradients(model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        named = ((n.replace("_fsdp_wrapped_module.", ""), p) for n, p in model.named_parameters())
        return {n: p.grad.clone() for n, p in named if p.requires_grad}


def fsdp2_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}


def around(wrap: Callable[[Stack], nn.Module], gradients: Callable, rank: int, folder: Path) -> dict:
    """By form of core: how far gradients, losses and outputs are from those of one process."""
    found = {}
    for core in CORES:
        model, at = wrap(make(core=core)), folder / core
        loss(model, batch(rank)).backward()
        have, want = gradients(model), truth(core=core)
        assert have.keys() == want.keys(), have.keys() ^ want.keys()
        entry = found[core] = {"gradients": max(relative(have[name], want[name]) for name in want)}
        alone = make(core=core)
        entry["losses"], entry["alone"] = train(model, adam(model), STEPS, rank), train(alone, adam(alone), STEPS, 0, 1)
        save_adapter(model, at)
        trained = output(model)
        entry["trained"] = relative(trained, output(alone).double())
        entry["saved"] = relative(output(load_adapter(base(), at)), trained.double())
        other = wrap(make(core=core))
        randomize_parts(other)
        entry["other"] = relative(output(other), trained.double())
        load_adapter(other, at)
        entry["into parts"] = relative(output(other), trained.double())
        save_adapter(other, folder / f"{core}-again")
        first, second = (adapter_files.read(path)[1] for path in (at, folder / f"{core}-again"))
        entry["again"] = first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
        entry["goes on"] = [train(net, adam(net), range(3, 4), rank) for net in (model, other)]
    return found


def fsdp1(rank: int, folder: Path) -> dict:
    return around(fsdp1_shard, fsdp1_gradients, rank, folder / "fsdp1")


def fsdp2(rank: int, folder: Path) -> dict:
    return around(shard, fsdp2_gradients, rank, folder / "fsdp2")


def fsdp1_resumes(rank: int, folder: Path) -> dict[str, list[list[float]]]:
    """Losses of a run that goes on, and of another model that goes on from its torch.distributed.checkpoint."""
    found = {}
    trained, loose = (StateDictOptions(ignore_frozen_params=True, strict=strict) for strict in (True, False))
    for core in ("dense", "tucker"):
        model, other = (fsdp1_shard(make(core=core)) for _ in range(2))
        optimizer, later, at = adam(model), adam(other), folder / f"fsdp1-{core}"
        train(model, optimizer, STEPS, rank)
        state, moments = get_state_dict(model, optimizer, options=trained)
        dcp.save({"model": state, "optimizer": moments}, checkpoint_id=at)
        randomize_parts(other)
        state, moments = get_state_dict(other, later, options=trained)
        dcp.load({"model": state, "optimizer": moments}, checkpoint_id=at)
        set_state_dict(other, later, model_state_dict=state, optim_state_dict=moments, options=loose)
        found[core] = [train(net, own, range(3, 5), rank) for net, own in ((model, optimizer), (other, later))]
    return found


def fsdp1_ways(rank: int, folder: Path) -> dict[str, dict[str, float]]:
    """Errors of FSDP1's other settings, checkpointing, and accumulation, by case and path."""
    found, later = {}, ShardingStrategy.SHARD_GRAD_OP
    for name, turns, by, options, settings in (
        ("one unit", (1, 2), "root", {}, {}),
        ("whole until the backward", (0, 2), "block", {"sharding_strategy": later}, {}),
        ("whole until the backward, frozen cores", (1,), "block", {"sharding_strategy": later}, FROZEN_CORES),
        ("frozen cores", (0, 2), "block", {}, FROZEN_CORES),
        ("non-reentrant checkpointing", (0, 1), "block", {}, {"reentrant": False}),
        ("a factor a width", (0, 2), "block", {}, {"group_by": "width"}),
    ):
        want = truth(2, **{key: value for key, value in settings.items() if key != "reentrant"})

        def check(by=by, options=options, settings=settings, want=want) -> float:
            model = fsdp1_shard(make(**settings), by, **options)
            for _ in range(2):
                model.zero_grad()
                output(model)  # leaves the units whole, where they are not sharded again after a forward
                with model.no_sync():
                    loss(model, batch(rank).requires_grad_()).backward()
                loss(model, batch(rank, 1).requires_grad_()).backward()
            have = fsdp1_gradients(model)
            return max(relative(have[n], want[n]) for n in want)

        found[name] = {path: value for turn in turns for path, value in on_path(turn, check).items()}
    return found


def fsdp1_refuses(rank: int, folder: Path) -> dict[str, str]:
    """Messages of what cannot be done with FSDP1."""
    model = fsdp1_shard(make())
    return {
        "inside": refusal(lambda: save_adapter(model.module, folder / "inside")),
        "merge": refusal(lambda: merge(model)),
        "unload": refusal(lambda: unload(model, merge=False)),
        "bank": refusal(lambda: TaskBank(model, 2)),
        "start": refusal(lambda: init_from_gradient(model, [batch(rank)], loss)),
        "apply": refusal(lambda: apply_lotr(fsdp1_shard(base()), LoTRConfig(rank=2))),
    }
