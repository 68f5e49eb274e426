"""Training in two processes, compared with one process.

The checks of test_distributed.py and test_frameworks.py. torch.distributed.run starts them:
`python -m torch.distributed.run --nproc-per-node 2 distributed.py RESULTS CHECK ..`. Each check
returns the largest relative error of the parameters' changes, or of tensors that it names, or a
count.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import models
import torch
import torch.distributed as dist
import zoo
from helpers import worst
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
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
WIDTH = 24
CONFIG = LoTRConfig(
    rank=4, scaling=0.5, target_modules=["q", "k", "v", "o"], modules_to_save=["head"]
)

Changes = dict[str, Tensor]  # how training changes each trained parameter


class Block(nn.Module):
    """A gated mix of q, k and v, which read one x, and o."""

    def __init__(self):
        super().__init__()
        for name in "qkvo":
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


class Net(nn.Module):
    """Two blocks and a fully trained head: x [b, tokens, 24] -> [b, tokens, 5]."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()  # reentrant checkpoints need an input with a gradient
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(
    checkpoints: str | None = None, dtype: torch.dtype = torch.float64, **settings: Any
) -> Net:
    """Returns an adapted Net, with the same values in all processes.

    Args:
        checkpoints: "reentrant" or "non-reentrant" if backward recomputes each block.
        dtype: Of all parameters.
        **settings: Other fields of CONFIG.
    """
    torch.manual_seed(0)
    config = LoTRConfig(**{**vars(CONFIG), "adapter_dtype": dtype, **settings})
    net = apply_lotr(Net().to(dtype), config)
    zoo.fill(net, only=lambda name: name.endswith(".core"))
    if checkpoints is not None:
        is_reentrant = checkpoints == "reentrant"
        for block in net.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=is_reentrant)
    return net


def batch(rank: int, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(2, 40, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def trained(net: nn.Module) -> dict[str, Tensor]:
    """Returns the trained parameters as full tensors."""
    return {
        name.removeprefix("module."): sharded.full_tensor(parameter).detach().clone()
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    }


def trained_parameters(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def train(net: nn.Module, ranks: list[int]) -> Changes:
    """Takes steps of SGD on the mean loss of the batches of these ranks."""
    before = trained(net)
    dtype = next(net.parameters()).dtype
    optimizer = torch.optim.SGD(trained_parameters(net), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [net(batch(rank, step, dtype)).square().mean() for rank in ranks]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    return {name: after - before[name] for name, after in trained(net).items()}


def error(actual: Changes, expected: Changes) -> float:
    if actual.keys() != expected.keys():
        return float("inf")
    return worst(actual.values(), [expected[name] for name in actual])


def shard(net: Net, reshard: bool = False, **options: Any) -> Net:
    sharded.shard_factors(net, reshard_after_forward=reshard, **options)
    for block in net.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    return fully_shard(net, **options)


# ---- training ------------------------------------------------------------------------------------


def training(
    wrap: Callable[[Net], nn.Module], checkpoints: str | None = None, **settings: Any
) -> float:
    """Trains a wrapped model in two processes, and the model on both batches in one."""
    net = wrap(build(checkpoints, **settings))
    return error(train(net, [dist.get_rank()]), train(build(**settings), [0, 1]))


def fsdp2_in_bfloat16(core: str) -> float:
    """FSDP2 that computes in bfloat16, against one process in float32. Returns 0 within 10 %."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrap = partial(shard, mp_policy=policy)
    relative_error = training(wrap, core=core, dtype=torch.float32)
    return relative_error * (relative_error >= 0.1)


def experts(wrap: Callable[[nn.Module], nn.Module]) -> float:
    """The experts of a transformers mixture: the gradients of one step."""

    def make() -> nn.Module:
        return models.trained("mixture", adapter_dtype="float64").double()

    def gradients(net: nn.Module, x: Tensor) -> Changes:
        zoo.output(net, x).square().mean().backward()
        return {
            name.removeprefix("module."): sharded.full_tensor(parameter.grad)
            for name, parameter in net.named_parameters()
            if parameter.requires_grad
        }

    x = zoo.inputs("mixture", rows=4)
    return error(gradients(wrap(make()), x.chunk(2)[dist.get_rank()]), gradients(make(), x))


def shard_mixture(net: nn.Module) -> nn.Module:
    sharded.shard_factors(net)
    for layer in net.model.layers:
        fully_shard(layer)
    return fully_shard(net)


def gradient_start() -> float:
    """`init_from_gradient` with one batch per process: A, B and the captured shares."""

    def start(ranks: list[int]) -> dict[str, Tensor]:
        net = build()
        for name, parameter in net.named_parameters():
            if name.endswith(".core"):
                nn.init.zeros_(parameter)
        batches = [batch(rank, 0, torch.float64) for rank in ranks]
        captured = init_from_gradient(net, batches, lambda model, x: model(x).square().mean())
        return {**trained(net), "captured": torch.tensor(list(captured.layers.values()))}

    actual = start([dist.get_rank()])
    with mock.patch.object(dist, "is_initialized", return_value=False):
        expected = start([0, 1])  # as one process
    largest_error = torch.tensor(error(actual, expected))
    dist.all_reduce(largest_error, dist.ReduceOp.MAX)
    return largest_error.item()


def fsdp2_collectives() -> list[int]:
    """The reductions of a step (two blocks, the root, A and B), and the gathers of the next one."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    net = shard(build())
    net(batch(0, 0, torch.float64)).sum().backward()
    names = ("foreach_reduce", "foreach_all_gather")
    counted = {name: mock.Mock(wraps=getattr(groups, name)) for name in names}
    with mock.patch.multiple(groups, **counted):
        net(batch(0, 1, torch.float64)).sum().backward()
    return [counted[name].call_count for name in names]


# ---- files ---------------------------------------------------------------------------------------


def shared_folder() -> str:
    """Returns a new folder, the same one in both processes."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def saved_and_loaded(wrap: Callable[[Net], nn.Module], **settings: Any) -> float:
    """Trains, saves in both processes, and loads into another wrapped model.

    A forward without a backward comes before the last step of the optimizer and before the load.
    FSDP2 has gathered full parameters then, but the optimizer changes the sharded ones.
    """
    folder = shared_folder()
    source = wrap(build(**settings))
    target = wrap(build(**settings))
    plain = build(**settings)
    train(source, [dist.get_rank()])
    optimizer = torch.optim.SGD(trained_parameters(source), lr=RATE)
    x = batch(0, 0, torch.float64)
    source(x).square().mean().backward()
    with torch.no_grad():
        source(x)
        target(x)
    optimizer.step()
    sharded.save_adapter(source, folder)
    sharded.load_adapter(target, folder)
    sharded.load_adapter(plain, folder)
    for model in (source, target):  # a backward frees what FSDP2 has gathered
        model(x).sum().backward()
    expected = trained(source)
    with torch.no_grad():
        y = source(x)
        output_error = worst([target(x), plain(x)], [y, y])
    return max(error(trained(target), expected), error(trained(plain), expected), output_error)


def saved_by_process_0() -> float:
    """`lotr_ext.save_adapter` of a DDP model. Returns the number of wrong folders."""
    folder = Path(shared_folder(), str(dist.get_rank()))
    save_adapter(DistributedDataParallel(build()), folder)
    return float(folder.exists() != (dist.get_rank() == 0))


def functions_for_full_tensors() -> float:
    """What needs full tensors, called with a sharded model. Returns how many calls do not raise."""
    model = shard(build())
    folder = shared_folder()
    if dist.get_rank() == 0:
        save_adapter(build(), folder)
    dist.barrier()
    calls = (
        lambda: save_adapter(model, folder),
        lambda: load_adapter(model, folder),
        lambda: merge(model),
        lambda: unload(model, merge=True),
    )
    refusals = 0
    for call in calls:
        try:
            call()
        except TypeError as refusal:
            refusals += "shard" in str(refusal)
    return float(len(calls) - refusals)


def a_tied_head() -> float:
    """Saves and loads a sharded model with a head that is tied to another layer."""

    def wrap(net: Net) -> nn.Module:
        net.extra = nn.Linear(WIDTH, 5, bias=False, dtype=torch.float64)
        net.extra.weight = net.head.weight
        return shard(net)

    return saved_and_loaded(wrap)


def failure_reaches_all() -> float:
    """A save that fails in process 0. Returns the number of processes without an error."""
    without_error = torch.zeros(())
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        sharded.save_adapter(shard(build()), "/dev/null/adapter")
        without_error.fill_(1)
    dist.all_reduce(without_error)
    return without_error.item()


# ---- the table -----------------------------------------------------------------------------------

RESHARDED = partial(shard, reshard=True)
FINDS_UNUSED = partial(DistributedDataParallel, find_unused_parameters=True)
CHECKS: dict[str, Callable[[], Any]] = {
    "ddp": partial(training, DistributedDataParallel),
    "ddp, a bucket view, static graph": partial(
        training,
        partial(DistributedDataParallel, static_graph=True, gradient_as_bucket_view=True),
    ),
    "ddp, find_unused_parameters": partial(training, FINDS_UNUSED),
    "ddp, checkpoints": partial(training, DistributedDataParallel, "non-reentrant"),
    "ddp, reentrant checkpoints": partial(
        training, partial(DistributedDataParallel, static_graph=True), "reentrant"
    ),
    "ddp, experts": partial(experts, FINDS_UNUSED),
    "ddp, saved and loaded": partial(saved_and_loaded, DistributedDataParallel),
    "ddp, saved by process 0": saved_by_process_0,
    "fsdp2": partial(training, shard),
    "fsdp2, resharded": partial(training, RESHARDED),
    "fsdp2, checkpoints": partial(training, RESHARDED, "non-reentrant"),
    "fsdp2, one factor per width": partial(training, shard, group_by="width"),
    "fsdp2, experts": partial(experts, shard_mixture),
    "fsdp2, saved and loaded": partial(saved_and_loaded, shard),
    "fsdp2, saved and loaded, resharded": partial(saved_and_loaded, RESHARDED),
    "fsdp2 without shard_factors, saved and loaded": partial(
        saved_and_loaded, fully_shard, core="tucker"
    ),
    "fsdp2, a tied head": a_tied_head,
    "fsdp2, functions for full tensors": functions_for_full_tensors,
    "a failed save": failure_reaches_all,
    "a start from the gradients": gradient_start,
    "collectives": fsdp2_collectives,
}

for form in FORMS:
    CHECKS |= {
        f"ddp, {form}": partial(training, DistributedDataParallel, core=form),
        f"ddp, {form}, saved": partial(saved_and_loaded, DistributedDataParallel, core=form),
        f"fsdp2, {form}": partial(training, shard, core=form),
        f"fsdp2, {form}, checkpoints": partial(training, RESHARDED, "non-reentrant", core=form),
        f"fsdp2, {form}, saved": partial(saved_and_loaded, shard, core=form),
        f"fsdp2, {form}, bfloat16": partial(fsdp2_in_bfloat16, form),
    }


# ---- DeepSpeed -----------------------------------------------------------------------------------


def zero_engine(stage: int, net: Net) -> Any:
    """Returns DeepSpeed's engine around net, with SGD. Even small tensors are sharded."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # An extension for speed, which takes minutes to compile.
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


def zero_steps(engine: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        engine.backward(engine(batch(dist.get_rank(), step, torch.float32)).square().mean())
        engine.step()


def zero(stage: int, checkpoints: str | None = None, core: str = "dense") -> float:
    """Trains two steps, saves, loads into another engine, and takes the third step with it."""
    folder = shared_folder()
    settings = {"dtype": torch.float32, "core": core}
    before = trained(build(**settings))
    expected = train(build(**settings), [0, 1])
    source = zero_engine(stage, build(checkpoints, **settings))
    target = zero_engine(stage, build(checkpoints, **settings))
    zero_steps(source, 0, STEPS - 1)
    sharded.save_adapter(source, folder)
    sharded.load_adapter(target, folder)
    zero_steps(target, STEPS - 1, 1)
    changes = {name: after - before[name] for name, after in trained(target.module).items()}
    return error(changes, expected)


CHECKS |= {
    "zero 2": partial(zero, 2),
    "zero 3": partial(zero, 3),
    "zero 3, checkpoints": partial(zero, 3, "non-reentrant"),
}
for form in FORMS:
    CHECKS[f"zero 3, {form}"] = partial(zero, 3, core=form)


def main(path: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dispatch.LITTLE_WORK = 0  # siblings share u = x A, as with large inputs
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        try:
            results[name] = CHECKS[name]()
        except Exception as failure:
            results[name] = f"{type(failure).__name__}: {failure}"
        dist.barrier()
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
