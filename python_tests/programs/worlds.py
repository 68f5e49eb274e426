"""The worlds in which one program runs: lotr_ext, plain torch in the program's dtype, and plain torch in float64, the truth.

A program is a function of a world. What it makes it makes through the world; what is to be compared it shows to `see`, `grads`
and `grad`. Ours runs first and leaves in `Decisions` what no specification fixes: the seeds of dropout masks, and which merges
were refused.
"""

from __future__ import annotations

import copy
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from programs import twin
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lotr_ext


class Planned(Exception):
    """Raised by programs, to see what a failure in the middle leaves behind."""


class Undecided(Exception):
    """Raised in the other worlds where lotr_ext has not run and so has decided nothing."""


class Doubled(nn.Module):
    """A parametrization that can be undone."""

    def forward(self, t: Tensor) -> Tensor:
        return t * 2

    def right_inverse(self, t: Tensor) -> Tensor:
        return t / 2


class Decisions:
    """seeds: of the dropout mask of each layer call, in order; refused: whether each call that may be refused was."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.refused: list[bool] = []


def in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


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


def save_policy(name: str) -> Callable:
    """A policy of selective checkpointing."""
    keep = {
        "save_all": lambda op: True,
        "recompute_all": lambda op: False,
        "save_products": lambda op: any(part in str(op) for part in ("mm", "linear", "lotr")),
        "save_others": lambda op: not any(part in str(op) for part in ("mm", "linear", "lotr")),
    }[name]
    return lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if keep(op) else CheckpointPolicy.PREFER_RECOMPUTE


class World:
    """What programs use beside torch itself. exact: all in float64, without autocast. jitter: relative noise on all values."""

    name = "plain"
    exact = False
    ours = False

    def __init__(self, decisions: Decisions, *, jitter: float = 0.0, jitter_seed: int = 0):
        self.decisions, self.jitter = decisions, jitter
        self.noise = torch.Generator().manual_seed(jitter_seed)
        self.seen: list[tuple[str, Tensor | None, bool]] = []
        self.known: list[tuple[str, Tensor | nn.Module]] = []
        self.calls = self.choices = 0
        self.masks: dict[int, int] = {}  # by group, the seed of the last mask
        self.adapters = ["default"]

    # ---- values ------------------------------------------------------------------------------------------------------

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.exact else dtype

    def values(self, shape: Sequence[int], seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal numbers as dtype rounds them: the same in every world."""
        t = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(dtype)
        if self.exact:
            t = t.double()
        return t * (1 + self.jitter * (2 * torch.rand(shape, dtype=t.dtype, generator=self.noise) - 1)) if self.jitter else t

    def tensor(
        self, *shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = True, kind: str = "plain"
    ) -> Tensor:
        """A leaf with a layout of its own; its gradient is compared."""
        t = layout(self.values(shape, seed, dtype, scale), kind).detach().requires_grad_(grad)
        self.known.append((f"x{len(self.known)}", t))
        return t

    def cast(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.to(self.dtype(dtype))

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager:
        return nullcontext() if self.exact else torch.autocast("cpu", dtype)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def fill(self, module: nn.Module, seed: int, dtype: torch.dtype, core_scale: float = 1.0) -> None:
        """Gives every parameter a value that matters; keeps its strides."""
        with torch.no_grad():
            active = (item for item in module.named_parameters() if "lotr_parked" not in item[0])
            for i, (name, p) in enumerate(sorted(active, key=lambda item: item[0])):
                scale = 0.5 if p.dim() < 2 else (p.shape[1] if name.endswith("B") or "weight" in name else p.shape[0]) ** -0.5
                scale *= core_scale if name.endswith("core") else 1.0
                store = dtype if name.endswith(("weight", "bias")) else p.dtype
                p.copy_(self.values(p.shape, seed * 1000 + i, store, scale))

    def factors(self, k: int, n: int, rank: tuple[int, int], *, seed: int, dtype: torch.dtype, train: str = "AB") -> nn.Module:
        factors = self._factors(k, n, rank, self.dtype(dtype))
        with torch.no_grad():
            factors.A.copy_(self.values(factors.A.shape, seed, dtype, k**-0.5))
            factors.B.copy_(self.values(factors.B.shape, seed + 1, dtype, rank[1] ** -0.5))
        factors.A.requires_grad_("A" in train)
        factors.B.requires_grad_("B" in train)
        self.known.append((f"f{len(self.known)}", factors))
        return factors

    def _base(self, k: int, n: int, bias: bool, seed: int, dtype: torch.dtype, weight_kind: str) -> nn.Linear:
        base = nn.Linear(k, n, bias, device="meta")
        base.weight = nn.Parameter(layout(self.values((n, k), seed, dtype, k**-0.5), weight_kind))
        if bias:
            base.bias = nn.Parameter(self.values((n,), seed + 1, dtype, 0.5))
        return base

    def layer(
        self,
        factors: nn.Module,
        *,
        seed: int,
        dtype: torch.dtype,
        bias: bool = True,
        scaling: float = 1.0,
        dropout: float = 0.0,
        train: bool = True,
        wrapped: bool = False,
        core_scale: float = 1.0,
        weight_kind: str = "plain",
    ) -> nn.Module:
        """An adapted layer over shared factors; wrapped: over a base whose weight is its own affair."""
        base = self._base(factors.A.shape[0], factors.B.shape[0], bias, seed, dtype, weight_kind)
        layer = self._layer(base, factors, scaling, dropout, wrapped)
        store = torch.float32 if self.exact else layer.core.dtype
        with torch.no_grad():
            layer.core.copy_(self.values(layer.core.shape, seed + 2, store, core_scale * layer.core.shape[0] ** -0.5))
        layer.core.requires_grad_(train)
        self.known.append((f"l{len(self.known)}", layer))
        self.watch(layer)
        return layer

    def apply(
        self,
        model: nn.Module,
        groups: dict[str, str],
        rank: tuple[int, int],
        *,
        seed: int,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        scaling: float = 1.0,
        dropout: float = 0.0,
        train: str = "A B core",
        core_scale: float = 1.0,
    ) -> nn.Module:
        """The model adapted as a whole, with a forward scope."""
        model.to(self.dtype(dtype))
        settings = {"dtype": self.dtype(adapter_dtype), "scaling": scaling, "dropout": dropout, "train": train.split()}
        self._apply(model, groups, rank, settings)
        self.fill(model, seed, dtype, core_scale)
        self.known.append(("net", model))
        for name in groups:
            self.watch(model.get_submodule(name))
        return model

    # ---- what is compared --------------------------------------------------------------------------------------------

    def see(self, label: str, t: Tensor | None) -> None:
        self.seen.append((label, None if t is None else t.detach().clone(), t is not None and t.requires_grad))

    def grads(self, label: str) -> None:
        """Shows the gradients of all leaves and parameters."""
        met: set[int] = set()
        for name, what in self.known:
            for part, p in [("", what)] if isinstance(what, Tensor) else list(what.named_parameters()):
                if id(p) not in met and "lotr_parked" not in part:
                    met.add(id(p))
                    self.seen.append((f"{label}: {name}.{part}.grad", None if p.grad is None else p.grad.clone(), False))

    def zero(self) -> None:
        for _, what in self.known:
            for p in [what] if isinstance(what, Tensor) else what.parameters():
                p.grad = None

    def loss(self, seed: int, *ys: Tensor, scale: float = 1.0) -> Tensor:
        """A smooth function of all of ys."""
        parts = [(y.sin() * self.values(y.shape, seed + i, torch.float32, scale).to(y.dtype)).sum() for i, y in enumerate(ys)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part.to(total.dtype)
        return total

    def backward(self, label: str, loss: Tensor, *, retain: bool = False, inputs: list[Tensor] | None = None) -> None:
        if loss.requires_grad:
            inputs = None if inputs is None else [t for t in inputs if t.requires_grad]
            if inputs is None or inputs:
                loss.backward(retain_graph=retain, inputs=inputs)
        self.grads(label)

    def grad(
        self, label: str, loss: Tensor, inputs: list[Tensor], *, retain: bool = False, create: bool = False
    ) -> list[Tensor]:
        """autograd.grad of what can be had."""
        inputs = [t for t in inputs if t.requires_grad]
        if not (loss.requires_grad and inputs):
            return []
        found = torch.autograd.grad(loss, inputs, retain_graph=retain or create, create_graph=create, allow_unused=True)
        for i, t in enumerate(found):
            self.seen.append((f"{label}[{i}]", None if t is None else t.detach().clone(), False))
        return [t for t in found if t is not None and t.requires_grad]

    # ---- ways to run -------------------------------------------------------------------------------------------------

    def checkpoint(self, function: Callable, *args, reentrant: bool = False, policy: str | None = None):
        first: list[int] = []

        def again(*args):
            """function; in a recomputation with the masks of the first time."""
            if not first:
                first.append(self.calls)
                return function(*args)
            calls, self.calls = self.calls, first[0]
            try:
                return function(*args)
            finally:
                self.calls = calls

        if policy is None:
            return checkpoint(again, *args, use_reentrant=reentrant)
        make = lambda: create_selective_checkpoint_contexts(save_policy(policy))  # noqa: E731
        return checkpoint(again, *args, use_reentrant=False, context_fn=make)

    def planned(self, function: Callable) -> None:
        """Runs what may raise Planned. Gradients it has left are dropped."""
        try:
            function()
        except Planned:
            pass
        self.zero()

    def threads(self, *functions: Callable) -> list:
        """Each function's result, all run at the same time."""
        results: list = [None] * len(functions)
        errors: list[BaseException] = []

        def run(i: int) -> None:
            try:
                results[i] = functions[i]()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def may_refuse(self, function: Callable) -> None:
        """What lotr_ext may refuse by an error, having changed nothing; the other worlds then leave it out."""
        if self.choices == len(self.decisions.refused):
            raise Undecided
        refused = self.decisions.refused[self.choices]
        self.choices += 1
        if not refused:
            function()


class Plain(World):
    """Plain torch: the twin. keep: nothing changed in place can change a gradient."""

    def __init__(self, decisions: Decisions, *, exact: bool = False, keep: bool = False, **noise):
        super().__init__(decisions, **noise)
        self.exact, self.keep, self.name = exact, keep, "float64" if exact else "plain"

    def _factors(self, k, n, rank, dtype):
        return twin.LoTRFactors(k, n, rank, dtype=dtype)

    def _layer(self, base, factors, scaling, dropout, wrapped):
        return twin.LoTRLinear(base, factors, scaling=scaling, dropout=dropout, wrapped=wrapped)

    def _apply(self, model, groups, rank, settings):
        twin.apply_lotr(model, groups, rank, **settings)

    def watch(self, layer) -> None:
        layer.next_mask, layer.keep = self._mask, self.keep

    def _mask(self, layer, x: Tensor) -> Tensor:
        if self.calls == len(self.decisions.seeds):
            raise Undecided
        seed = self.decisions.seeds[self.calls]
        self.calls += 1
        return twin.dropout_mask(x.shape, layer.dropout, seed)

    def linear(self, x, weight, bias, A, B, core, scaling):
        own = (lambda t: t.clone()) if self.keep else (lambda t: t)
        x, weight, A, B, core = (own(t) for t in (x, weight, A, B, core))
        y = nnf.linear(x, weight, None if bias is None else own(bias))
        return y + ((x @ A.to(x.dtype)) @ core.to(x.dtype)) @ B.to(x.dtype).mT * scaling

    def merge(self, what) -> None:
        for layer in [what] if isinstance(what, twin.LoTRLinear) else twin.layers_of(what):
            layer.merge()

    def unmerge(self, what) -> None:
        for layer in [what] if isinstance(what, twin.LoTRLinear) else twin.layers_of(what):
            layer.unmerge()

    def disabled(self, model):
        return twin.disabled(model)

    def mixed(self, model, names):
        return twin.mixed(model, names)

    def add_adapter(self, model, name: str, *, shared: bool) -> None:
        model.adapters.add(model, name, shared=shared)
        self.adapters.append(name)

    def set_adapter(self, model, name: str) -> None:
        model.adapters.use(model, name)

    def train_merged(self, function: Callable) -> None:
        pass

    @contextmanager
    def saved(self, model):
        """Inside, the adapter may change; after it, it is what it was."""
        named = [item for part in (model.lotr_factors, *twin.layers_of(model)) for item in part.named_parameters()]
        parts = [p for name, p in named if name.split(".")[-1] in ("A", "B", "core", "original")]
        before = [p.detach().clone() for p in parts]
        yield
        with torch.no_grad():
            for p, value in zip(parts, before):
                p.copy_(value)


class Ours(World):
    """lotr_ext."""

    name, ours = "lotr_ext", True

    def _factors(self, k, n, rank, dtype):
        return lotr_ext.LoTRFactors(k, n, rank, dtype=dtype)

    def _layer(self, base, factors, scaling, dropout, wrapped):
        make = lotr_ext.LoTRWrapped if wrapped else lotr_ext.LoTRLinear
        return make.from_linear(base, factors, scaling=scaling, dropout=dropout)

    def _apply(self, model, groups, rank, settings):
        dtype = settings.pop("dtype")
        config = lotr_ext.LoTRConfig(rank=rank, target_modules=list(groups), group_by=groups, adapter_dtype=dtype, **settings)
        lotr_ext.apply_lotr(model, config)

    def watch(self, layer) -> None:
        """Notes which mask each call with dropout takes: a new one if torch's generator moves, else its group's last."""
        if not layer.dropout:
            return
        states: list[Tensor] = []

        def before(module, args) -> None:
            states.append(torch.get_rng_state())

        def after(module, args, output) -> None:
            state, factors = states.pop(), module.factors
            if in_backward() or not (module.training and module.dropout) or module.disabled or module.merged:
                return
            if not torch.equal(state, torch.get_rng_state()):
                drawn = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().set_state(state))
                self.masks[id(factors)] = int(drawn)
            self.decisions.seeds.append(self.masks[id(factors)])

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def linear(self, x, weight, bias, A, B, core, scaling):
        return lotr_ext.lotr_linear(x, weight, bias, A, B, core, scaling)

    def merge(self, what) -> None:
        what.merge() if isinstance(what, lotr_ext.LoTRLinear) else lotr_ext.merge(what)

    def unmerge(self, what) -> None:
        what.unmerge() if isinstance(what, lotr_ext.LoTRLinear) else lotr_ext.unmerge(what)

    def disabled(self, model):
        return lotr_ext.disabled(model)

    def mixed(self, model, names):
        return lotr_ext.mixed(model, names)

    def add_adapter(self, model, name: str, *, shared: bool) -> None:
        factors_of = lotr_ext.active_adapter(model) if shared else None
        lotr_ext.add_adapter(model, name, share_factors=factors_of)
        self.adapters.append(name)

    def set_adapter(self, model, name: str) -> None:
        lotr_ext.set_adapter(model, name)

    def train_merged(self, function: Callable) -> None:
        """A forward with grad enabled over a merged adapter that is to be trained: an error or a warning says so."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                function()
            except RuntimeError as error:
                said.append(error)
        if not any("merge" in str(getattr(word, "message", word)) for word in said):
            raise AssertionError("training while merged: expected an error or a warning, got none")

    @contextmanager
    def saved(self, model):
        with tempfile.TemporaryDirectory() as folder:
            lotr_ext.save_adapter(model, folder)
            yield
            lotr_ext.load_adapter(model, folder)

    def may_refuse(self, function: Callable) -> None:
        try:
            function()
        except (TypeError, ValueError, RuntimeError):
            self.decisions.refused.append(True)
        else:
            self.decisions.refused.append(False)


__all__ = ["Decisions", "Ours", "Plain", "Planned", "Undecided", "World", "copy", "nn", "torch", "warnings"]
