"""Private training of cores by Opacus, in one process and in two. Run by test_opacus.py.

The truths: the same function as plain modules under Opacus' own GradSampleModule, and a loop that clips by hand.
"""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import mixtures
import opacus
import torch
import torch.nn.functional as F
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lotr_ext import LoTRConfig, apply_lotr
from lotr_ext.interop.opacus import PrivacyEngine

warnings.simplefilter("ignore")
WIDE = torch.float64
SIZE, TOKENS, STEPS = 7, 3, 6


class Plain(nn.Module):
    """Two layers, of which one runs twice, and a head on the mean over the tokens. reentrant: the kind of checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(SIZE, SIZE, dtype=WIDE), nn.Linear(SIZE, SIZE, dtype=WIDE)
        self.head, self.reentrant = nn.Linear(SIZE, 3, dtype=WIDE), None

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(torch.tanh(self.second(torch.tanh(self.first(x))))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


class Times(nn.Module):
    """x G, whose gradients Opacus computes by functorch."""

    def __init__(self, G: Tensor):
        super().__init__()
        self.G = nn.Parameter(G.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.G


class InModules(nn.Module):
    """An adapted layer as plain modules."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base, self.scaling = nn.Linear(SIZE, SIZE, dtype=WIDE).requires_grad_(False), layer.scaling
        self.base.weight.data, self.base.bias.data = layer.weight.data, layer.bias.data
        self.A, self.B, self.core = layer.factors.A.detach(), layer.factors.B.detach(), Times(layer.core.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.core(x @ self.A) @ self.B.T


def adapted(**settings) -> nn.Module:
    config = {"rank": (2, 3), "target_modules": ["first", "second"], "modules_to_save": ["head"], "train": ["core"]}
    model = apply_lotr(Plain(), LoTRConfig(**(config | settings), adapter_dtype=WIDE))
    for name in ("first", "second"):
        nn.init.normal_(model.get_submodule(name).core)
    return model


def as_modules(model: nn.Module) -> nn.Module:
    other = Plain()
    for name in ("first", "second"):
        setattr(other, name, InModules(model.get_submodule(name)))
    other.head.load_state_dict(model.head.state_dict())
    return other


def trained(model: nn.Module) -> list[Tensor]:
    """The cores and the head, in the order of the layers."""
    layers = [model.first, model.second]
    cores = [layer.core.G if isinstance(layer, InModules) else layer.core for layer in layers]
    return [*cores, model.head.weight, model.head.bias]


def data(n: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, TOKENS, SIZE, generator=generator, dtype=WIDE) * 3
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def train(
    model: nn.Module, engine: opacus.PrivacyEngine, *, batch: int = 8, physical: int | None = None, reduction: str = "mean"
) -> tuple[list[Tensor], list[int]]:
    """What was trained after a few steps, and the sizes of the batches."""
    optimizer = torch.optim.Adam(trained(model), lr=0.1)
    loader = DataLoader(data(), batch_size=batch, generator=torch.Generator().manual_seed(3))
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.8, max_grad_norm=0.7,
        loss_reduction=reduction, noise_generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    sizes: list[int] = []

    def run(loader: DataLoader) -> None:
        for _ in range(2):
            for x, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(private(x), target, reduction=reduction).backward()
                optimizer.step()
                sizes.append(len(x))

    if physical is None:
        run(loader)
    else:
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as cut:
            run(cut)
    return [p.detach().clone() for p in trained(model)], sizes


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def as_opacus(rank: int, folder: Path) -> dict:
    """Steps with noise, Poisson sampling and empty batches, against plain modules under Opacus: parameters, epsilon."""
    found = {}
    for name, words in (
        ("mean", {}),
        ("sum", {"reduction": "sum"}),
        ("empty batches", {"batch": 1}),
        ("virtual steps", {"batch": 20, "physical": 3}),
    ):
        model, mine, theirs = adapted(), PrivacyEngine(), opacus.PrivacyEngine()
        want, _ = train(as_modules(model), theirs, **words)
        start = [p.detach().clone() for p in trained(model)]
        got, sizes = train(model, mine, **words)
        found[name] = {
            "difference": difference(got, want),
            "moved": difference(got, start),
            "epsilon": [mine.get_epsilon(1e-3), theirs.get_epsilon(1e-3)],
            "smallest": min(sizes),
            "largest": max(sizes),
        }
    return found


def as_by_hand(rank: int, folder: Path) -> dict:
    """One step of SGD without noise against a loop over the examples that clips by hand, also under checkpointing."""
    found = {}
    x, target = data().tensors
    for reentrant in (None, False, True):
        model = adapted()
        model.reentrant = reentrant
        start = [p.detach().clone() for p in trained(model)]
        plain, total = as_modules(model), [torch.zeros_like(p) for p in start]
        for i in range(len(x)):
            plain.zero_grad()
            F.cross_entropy(plain(x[i : i + 1]), target[i : i + 1]).backward()
            grads = [p.grad for p in trained(plain)]
            share = min(1.0, 0.3 / float(torch.stack([g.norm() for g in grads]).norm()))
            total = [t + share * g for t, g in zip(total, grads)]
        want = [p - 0.5 * t / len(x) for p, t in zip(start, total)]
        optimizer, loader = torch.optim.SGD(trained(model), lr=0.5), DataLoader(data(), batch_size=len(x))
        private, optimizer, _ = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=0.3,
            poisson_sampling=False,
        )  # fmt: skip
        half = len(x) // 2
        optimizer.expected_batch_size = half  # of two backwards: Opacus divides by the number of them too
        for part in (slice(None, half), slice(half, None)):
            F.cross_entropy(private(x[part].requires_grad_()), target[part]).backward()
        optimizer.step()
        found[str(reentrant)] = {"difference": difference(trained(model), want), "moved": difference(start, want)}
    return found


def message(kind: type[Exception], run: Callable[[], object]) -> str:
    try:
        run()
    except kind as error:
        return str(error)
    raise AssertionError("expected an error, got none")


def refused(rank: int, folder: Path) -> dict:
    """Messages."""

    def private(model: nn.Module, **words) -> nn.Module:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        given = {"data_loader": DataLoader(data(), batch_size=8), "noise_multiplier": 1.0, "max_grad_norm": 1.0} | words
        return PrivacyEngine().make_private(module=model, optimizer=optimizer, **given)[0]

    frozen, beside = adapted(), adapted()
    frozen.second.core.requires_grad_(False)
    beside.shift = nn.Parameter(torch.zeros(3, dtype=WIDE))
    x, target = data().tensors

    def twice() -> None:
        model = private(adapted(modules_to_save=None))
        for _ in range(2):
            F.cross_entropy(model(x), target).backward()

    flat = adapted()
    flat.body = lambda x: Plain.body(flat, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    experts = mixtures.adapted("Mixtral", WIDE, train=["core"])
    return {
        "factors": message(ValueError, lambda: private(adapted(train=["A", "B", "core"]))),
        "frozen": message(ValueError, lambda: private(frozen)),
        "computed": message(ValueError, lambda: private(adapted(core="diagonal", rank=3))),
        "beside": message(ValueError, lambda: private(beside)),
        "experts": message(TypeError, lambda: private(experts.train())),
        "plain": message(RuntimeError, lambda: private(Plain())),
        "mode": message(ValueError, lambda: private(adapted(), grad_sample_mode="ghost")),
        "unwrapped": message(ValueError, lambda: private(adapted(), wrap_model=False)),
        "twice": message(ValueError, twice),
        "flat": message(ValueError, lambda: F.cross_entropy(private(flat)(x), target).backward()),
    }


def evaluated(rank: int, folder: Path) -> dict:
    """Without grad nothing is collected; afterwards the module is the model again."""
    model = adapted()
    with torch.no_grad():
        want = model(data().tensors[0])
    optimizer, loader = torch.optim.SGD(trained(model), lr=0.1), DataLoader(data(), batch_size=8)
    private, _, _ = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    with torch.no_grad():
        got = private(data().tensors[0])
    back = private.to_standard_module()
    return {
        "same": torch.equal(got, want),
        "back": back is model,
        "left": any(hasattr(p, "grad_sample") for p in trained(model)),
    }


def as_documented(rank: int, folder: Path) -> list[float]:
    """The page's program: the epsilon that it prints, and how far the core and the head moved."""
    page = (Path(__file__).parents[2] / "docs" / "private.md").read_text(encoding="utf-8")
    program = "\n".join(line for line in page.splitlines() if line.startswith("    "))
    names: dict = {}
    exec(compile(textwrap.dedent(program), "docs/private.md", "exec"), names)
    return [names["engine"].get_epsilon(1e-3), float(names["model"][0].core.abs().max())]


def in_two_processes(rank: int, folder: Path) -> dict:
    """Opacus' distributed optimizer: without noise two halves give the step of the whole batch, in both processes."""
    x, target = data().tensors
    ends = []
    for world in (1, 2):
        model = adapted()
        module = DPDDP(model) if world == 2 else model
        optimizer = torch.optim.SGD(trained(model), lr=0.5)
        loader = DataLoader(data(), batch_size=len(x))
        private, optimizer, _ = PrivacyEngine().make_private(
            module=module, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=0.3,
            poisson_sampling=False,
        )  # fmt: skip
        part = slice(rank, None, 2) if world == 2 else slice(None)
        F.cross_entropy(private(x[part]), target[part]).backward()
        optimizer.step()
        ends.append(copy.deepcopy(trained(model)))
    start = trained(adapted())
    return {"difference": difference(*ends), "moved": difference(ends[1], start), "values": [float(p.sum()) for p in ends[1]]}
