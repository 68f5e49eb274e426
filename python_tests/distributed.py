"""Training in two processes, compared with one process.

The checks of test_distributed.py and test_frameworks.py. torch.distributed.run starts them:
`python -m torch.distributed.run --nproc-per-node 2 distributed.py RESULTS CHECK ..`. Each check
runs, and asserts, in both processes. RESULTS gets what they raised, by the name of the check.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from helpers import refused, run_python, worst
from models import started, trained_parameters, trained_values
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from lotr_ext import (
    LoTRConfig,
    apply_lotr,
    init_from_gradient,
    load_adapter,
    merge,
    save_adapter,
    sharded,
    unload,
)
from lotr_ext.core import dispatch
from lotr_ext.cores import FORMS

RATE = 0.05
STEPS = 3

Wrap = Callable[[nn.Module], nn.Module]  # an adapted net -> the same net, as two processes train it


# ---- nets ----------------------------------------------------------------------------------------


def build(name: str = "attention", dtype: str = "float64", **settings: Any) -> nn.Module:
    """Returns an adapted net of the zoo, with the same values in all processes.

    Args:
        name: "attention" or "mixture".
        dtype: The dtype of all parameters.
        **settings: Fields of the configuration.
    """
    torch.manual_seed(0)
    head = "head" if name == "attention" else "lm_head"
    settings = {"rank": 4, "scaling": 0.5, "modules_to_save": [head], **settings}
    net = started(name, adapter_dtype=dtype, **settings).to(getattr(torch, dtype))
    return zoo.fill(net, only=lambda key: key.endswith(".core"))


def blocks_of(net: nn.Module) -> nn.Sequential | nn.ModuleList:
    return net.blocks if isinstance(net, zoo.Attention) else net.model.layers


def checkpointed(net: nn.Module, reentrant: bool = False) -> nn.Module:
    """Makes backward recompute each block."""
    # Reentrant checkpoints need an input with a gradient.
    net.embed.register_forward_hook(lambda module, args, x: x.requires_grad_())
    for block in blocks_of(net):
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    return net


def shard(net: nn.Module, reshard: bool = False, **options: Any) -> nn.Module:
    sharded.shard_factors(net, reshard_after_forward=reshard, **options)
    for block in blocks_of(net):
        fully_shard(block, reshard_after_forward=reshard, **options)
    return fully_shard(net, **options)


def tie_and_shard(net: nn.Module) -> nn.Module:
    """Shards a net with a head that is tied to another layer."""
    net.extra = nn.Linear(zoo.WIDTH, zoo.VOCABULARY, bias=False)
    net.extra.weight = net.head.weight
    return shard(net)


# ---- training ------------------------------------------------------------------------------------


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randint(3, zoo.VOCABULARY, (2, 20), generator=generator)


def train(net: nn.Module, ranks: list[int]) -> dict[str, Tensor]:
    """Takes steps of SGD on the mean loss of the batches of these ranks.

    Returns:
        How each trained parameter has changed.
    """
    before = trained_values(net)
    optimizer = torch.optim.SGD(trained_parameters(net), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [zoo.output(net, batch(rank, step)).square().mean() for rank in ranks]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    return {name: after - before[name] for name, after in trained_values(net).items()}


def check_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-10
) -> None:
    assert actual.keys() == expected.keys()
    error = worst(actual.values(), [expected[name] for name in actual])
    assert error < bound, error


def train_wrapped(wrap: Wrap, bound: float = 1e-10, **settings: Any) -> None:
    """Trains a wrapped net in two processes, and the plain net on both batches in one."""
    actual = train(wrap(build(**settings)), [dist.get_rank()])
    check_equal(actual, train(build(**settings), [0, 1]), bound)


def start_from_gradients() -> None:
    """`init_from_gradient` with one batch per process: A, B and the captured shares."""

    def start(ranks: list[int]) -> dict[str, Tensor]:
        net = started("attention", adapter_dtype="float64").double()
        batches = [batch(rank, 0) for rank in ranks]
        captured = init_from_gradient(net, batches, lambda net, ids: net(ids).square().mean())
        return {**trained_values(net), "captured": torch.tensor(list(captured.layers.values()))}

    actual = start([dist.get_rank()])
    with mock.patch.object(dist, "is_initialized", return_value=False):
        expected = start([0, 1])  # as one process
    check_equal(actual, expected)


def fsdp2_reduces_each_factor_once() -> None:
    net = shard(build())
    net(batch(0, 0)).sum().backward()
    names = ("foreach_reduce", "foreach_all_gather")
    counted = {name: mock.Mock(wraps=getattr(_fsdp_param_group, name)) for name in names}
    with mock.patch.multiple(_fsdp_param_group, **counted):
        net(batch(0, 1)).sum().backward()
    # Two blocks, the root, A and B: reduced by backward, and gathered again by the second forward.
    assert [counted[name].call_count for name in names] == [5, 5]


# ---- files ---------------------------------------------------------------------------------------


def shared_folder() -> str:
    """Returns a new folder, the same one in both processes."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def save_and_load(wrap: Wrap, **settings: Any) -> None:
    """Trains, saves in both processes, and loads into another wrapped net and into a plain one.

    A forward without a backward comes before the last step of the optimizer and before the load.
    FSDP2 has gathered full parameters then, but the optimizer changes the sharded ones.
    """
    folder = shared_folder()
    source = wrap(build(**settings))
    target = wrap(build(**settings))
    plain = build(**settings)
    train(source, [dist.get_rank()])
    optimizer = torch.optim.SGD(trained_parameters(source), lr=RATE)
    ids = batch(0, 0)
    source(ids).square().mean().backward()
    with torch.no_grad():
        source(ids)
        target(ids)
    optimizer.step()
    sharded.save_adapter(source, folder)
    sharded.load_adapter(target, folder)
    sharded.load_adapter(plain, folder)
    for net in (source, target):  # a backward frees what FSDP2 has gathered
        net(ids).sum().backward()
    with torch.no_grad():
        expected = {"output": source(ids), **trained_values(source)}
        for net in (target, plain):
            check_equal({"output": net(ids), **trained_values(net)}, expected)


def ddp_is_saved_by_process_0() -> None:
    folder = Path(shared_folder(), str(dist.get_rank()))
    save_adapter(DDP(build()), folder)
    assert folder.exists() == (dist.get_rank() == 0)


def sharded_nets_are_refused() -> None:
    """Functions that need full tensors refuse them."""
    net = shard(build())
    folder = shared_folder()
    if dist.get_rank() == 0:
        save_adapter(build(), folder)
    dist.barrier()
    for call in (
        lambda: save_adapter(net, folder),
        lambda: load_adapter(net, folder),
        lambda: merge(net),
        lambda: unload(net, merge=True),
    ):
        with pytest.raises(TypeError, match="shard"):
            call()


def a_failed_save_raises_in_all() -> None:
    """Process 1 raises too, although it does not write."""
    with pytest.raises((RuntimeError, OSError, ValueError)):
        sharded.save_adapter(shard(build()), "/dev/null/adapter")


def sharded_nets_are_not_adapted() -> None:
    net = zoo.net("mlp")
    mesh = init_device_mesh("cpu", (2,))
    net.head.weight = nn.Parameter(distribute_tensor(net.head.weight.detach(), mesh))
    with refused("target_modules", TypeError):
        apply_lotr(net, LoTRConfig(rank=2))
    apply_lotr(net, LoTRConfig(rank=2, exclude_modules=["head"]))
    for wrap in (fully_shard, DDP):
        with refused("model", TypeError):
            apply_lotr(wrap(zoo.net("mlp")), LoTRConfig(rank=2))


# ---- DeepSpeed -----------------------------------------------------------------------------------


def zero_engine(net: nn.Module, stage: int) -> Any:
    """Returns DeepSpeed's engine around net, with SGD. Even small tensors are sharded."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Otherwise DeepSpeed compiles an extension for shared memory, which takes minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    optimizer = torch.optim.SGD(trained_parameters(net), lr=RATE)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]


def zero_steps(engine: Any, steps: range) -> None:
    for step in steps:
        engine.backward(engine(batch(dist.get_rank(), step)).square().mean())
        engine.step()


def train_with_zero(stage: int, prepare: Wrap = lambda net: net, core: str = "dense") -> None:
    """Trains two steps, saves, loads into another engine, and takes the third step with it."""
    folder = shared_folder()
    build_net = partial(build, dtype="float32", core=core)
    before = trained_values(build_net())
    expected = train(build_net(), [0, 1])
    source = zero_engine(prepare(build_net()), stage)
    target = zero_engine(prepare(build_net()), stage)
    zero_steps(source, range(STEPS - 1))
    sharded.save_adapter(source, folder)
    sharded.load_adapter(target, folder)
    zero_steps(target, range(STEPS - 1, STEPS))
    changes = {name: after - before[name] for name, after in trained_values(target.module).items()}
    check_equal(changes, expected, bound=1e-4)


# ---- the table -----------------------------------------------------------------------------------


def recomputed_and_resharded(net: nn.Module) -> nn.Module:
    return shard(checkpointed(net), reshard=True)


RESHARDED = partial(shard, reshard=True)
IN_BFLOAT16 = partial(  # compared with one process in float32
    shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
)
FINDS_UNUSED = partial(DDP, find_unused_parameters=True)
STATIC = partial(DDP, static_graph=True)
CHECKS: dict[str, Callable[[], None]] = {
    "ddp": partial(train_wrapped, DDP),
    "ddp, a bucket view, static graph": partial(
        train_wrapped, partial(STATIC, gradient_as_bucket_view=True)
    ),
    "ddp, find_unused_parameters": partial(train_wrapped, FINDS_UNUSED),
    "ddp, checkpoints": partial(train_wrapped, lambda net: DDP(checkpointed(net))),
    "ddp, reentrant checkpoints": partial(
        train_wrapped, lambda net: STATIC(checkpointed(net, reentrant=True))
    ),
    "ddp, experts": partial(train_wrapped, FINDS_UNUSED, name="mixture"),
    "ddp, saved and loaded": partial(save_and_load, DDP),
    "ddp, saved by process 0": ddp_is_saved_by_process_0,
    "fsdp2": partial(train_wrapped, shard),
    "fsdp2, resharded": partial(train_wrapped, RESHARDED),
    "fsdp2, checkpoints": partial(train_wrapped, recomputed_and_resharded),
    "fsdp2, one factor per width": partial(train_wrapped, shard, group_by="width"),
    "fsdp2, experts": partial(train_wrapped, shard, name="mixture"),
    "fsdp2, saved and loaded": partial(save_and_load, shard),
    "fsdp2, saved and loaded, resharded": partial(save_and_load, RESHARDED),
    "fsdp2 without shard_factors, saved and loaded": partial(
        save_and_load, fully_shard, core="tucker"
    ),
    "fsdp2, a tied head": partial(save_and_load, tie_and_shard),
    "fsdp2, functions for full tensors": sharded_nets_are_refused,
    "fsdp2 before apply_lotr": sharded_nets_are_not_adapted,
    "fsdp2, collectives": fsdp2_reduces_each_factor_once,
    "a failed save": a_failed_save_raises_in_all,
    "a start from the gradients": start_from_gradients,
    "zero 2": partial(train_with_zero, 2),
    "zero 3": partial(train_with_zero, 3),
    "zero 3, checkpoints": partial(train_with_zero, 3, checkpointed),
}
for form in FORMS:
    CHECKS |= {
        f"ddp, {form}": partial(train_wrapped, DDP, core=form),
        f"ddp, {form}, saved": partial(save_and_load, DDP, core=form),
        f"fsdp2, {form}": partial(train_wrapped, shard, core=form),
        f"fsdp2, {form}, checkpoints": partial(train_wrapped, recomputed_and_resharded, core=form),
        f"fsdp2, {form}, saved": partial(save_and_load, shard, core=form),
        f"fsdp2, {form}, bfloat16": partial(
            train_wrapped, IN_BFLOAT16, bound=0.1, core=form, dtype="float32"
        ),
        f"zero 3, {form}": partial(train_with_zero, 3, core=form),
    }


def run_in_two_processes(names: list[str], path: Path) -> dict[str, str]:
    """Runs checks in two processes. Returns by name what they raised, "" for nothing."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = run_python(*launch, __file__, path, *names, timeout=900)
    assert path.exists(), process.stderr[-4000:]
    return json.loads(path.read_text())


def main(path: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dispatch.LITTLE_WORK = 0  # siblings share u = x A, as with large inputs
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        error = ""
        try:
            CHECKS[name]()
        except (Exception, pytest.fail.Exception):
            error = traceback.format_exc()
        errors = ["", ""]
        dist.all_gather_object(errors, error)
        results[name] = "".join(errors)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
