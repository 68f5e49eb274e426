"""What programs and worlds use beside torch: exceptions that are raised on purpose, layouts, other parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.checkpoint import CheckpointPolicy

ADAPTER = {"A", "B", "core", "magnitude"}


class Planned(Exception):
    """Raised by programs, to see what a failure in the middle leaves behind."""


class PlannedInterrupt(KeyboardInterrupt):
    """As Ctrl-C in the middle."""


class PlannedExit(SystemExit):
    """As sys.exit in the middle."""


class PlannedClose(GeneratorExit):
    """As a generator that is closed in the middle."""


PLANNED = (Planned, PlannedInterrupt, PlannedExit, PlannedClose)


class Undecided(Exception):
    """Raised in the other worlds where lotr_ext has not run and so has decided nothing."""


class Doubled(nn.Module):
    """A parametrization that can be undone."""

    def forward(self, t: Tensor) -> Tensor:
        return t * 2

    def right_inverse(self, t: Tensor) -> Tensor:
        return t / 2


class Decisions:
    """seeds: of the dropout mask of each layer call, in order; noises: what each layer call's core was multiplied by, where it
    is made with random numbers; refused: whether each call that may be refused was."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.noises: list[float] = []
        self.refused: list[bool] = []


def invertible(model: nn.Module) -> bool:
    """Whether what is made by parametrizations can be set."""
    lists = (module for module in model.modules() if isinstance(module, ParametrizationList))
    return all(hasattr(step, "right_inverse") for steps in lists for step in steps)


def is_generated(model: nn.Module) -> bool:
    """Whether a factor, a core or the magnitudes are made by parametrizations: they cannot be parked."""
    return any(parametrize.is_parametrized(module, name) for module in model.modules() for name in ADAPTER)


def another(t: Tensor, factor: float) -> nn.Parameter:
    """t * factor, changed in place as often as t was: nobody may tell them apart by that."""
    new = nn.Parameter(t.detach() * factor)
    with torch.no_grad():
        while not t.is_inference() and not new.is_inference() and new._version < t._version:
            new.mul_(1)
    return new


NOISES = (0.5, 1.0, 2.0, -1.0)  # powers of two: a core that was multiplied tells by which one, whatever its dtype


def random_noise(count: int) -> Tensor:
    """What count cores are multiplied by, [count, 1, 1], drawn from torch's generator."""
    return torch.tensor(NOISES)[torch.randint(0, len(NOISES), (count, 1, 1))]


class Product(nn.Module):
    """Cores of all places that are products of fewer numbers, as a user's own module: G_p = L_p R, each perhaps times a random
    number. Both worlds derive from it, in theirs from their base class of such modules."""

    def set_up(self, places: int, rank: tuple[int, int], noisy: bool) -> None:
        self.noisy = noisy
        self.left = nn.Parameter(torch.zeros(places, rank[0], 2))
        self.right = nn.Parameter(torch.zeros(2, rank[1]))

    def product(self, index: int | None) -> Tensor:
        """[r_in, r_out] of a place, of all [places, r_in, r_out]."""
        return (self.left if index is None else self.left[index]) @ self.right


def in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def trained_in(module: nn.Module) -> bool:
    """Whether a call of an adapted layer now would train its adapter, were it not merged."""
    parts = [p for owner in (module.factors, module) for name, p in owner.named_parameters() if ADAPTER & set(name.split("."))]
    return torch.is_grad_enabled() and any(p.requires_grad for p in parts)


def layout(t: Tensor, kind: str) -> Tensor:
    """t's values in another layout; `expanded` repeats its first row."""
    if kind == "plain" or not t.dim():
        return t
    if kind == "neg":
        return torch._neg_view(-t)
    if kind == "conj" and t.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(t), -t).conj().imag
    if kind == "strided":
        return torch.stack((t, t * 0 + 9), -1)[..., 0]
    if kind == "offset":
        return torch.cat((t.new_full((1,), 9), t.flatten()))[1:].view(t.shape)
    if kind == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if kind == "padded" and t.dim() > 1:
        return torch.cat((t, t[..., :1] * 0 + 9), -1)[..., :-1]
    if kind == "expanded" and t.shape[0]:
        return t[:1].expand(t.shape)
    return t


def gradients(loss: Tensor, inputs: list[Tensor], **options: bool) -> Sequence[Tensor | None]:
    """autograd.grad of those inputs that have one; nothing where the loss has none."""
    inputs = [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(loss, inputs, allow_unused=True, **options) if loss.requires_grad and inputs else []


def save_policy(name: str) -> Callable:
    """A policy of selective checkpointing."""
    keep = {
        "save_all": lambda op: True,
        "recompute_all": lambda op: False,
        "save_products": lambda op: any(part in str(op) for part in ("mm", "linear", "lotr")),
        "save_others": lambda op: not any(part in str(op) for part in ("mm", "linear", "lotr")),
    }[name]
    return lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if keep(op) else CheckpointPolicy.PREFER_RECOMPUTE
