"""A world is what a program runs in: lotr_ext (`our_world.py`), plain torch in the program's dtype or in float64, the truth
(`plain_world.py`).

A program is a function of a world. What it makes it makes through the world; what is to be compared it shows to `see`, `grads`
and `grad`. Ours runs first and leaves in `Decisions` what no specification fixes: the seeds of dropout masks, and which merges
were refused.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from programs.given import PLANNED, Decisions, gradients, is_generated, layout, save_policy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


class World:
    """What programs use beside torch itself. exact: all in float64, without autocast. jitter: relative noise on all values."""

    name = "plain"
    exact = False
    ours = False

    def __init__(self, decisions: Decisions, *, jitter: float = 0.0, jitter_seed: int = 0):
        self.decisions, self.jitter = decisions, jitter
        self.noise = torch.Generator().manual_seed(jitter_seed)
        self.seen: list[tuple[str, Tensor | None, bool]] = []
        self.finite: int | None = None  # how many it had seen when a layer's output left the dtype's range
        self.known: list[tuple[str, Tensor | nn.Module]] = []
        self.calls = self.reads = self.choices = 0  # of dropout masks, of random cores, of refusals
        self.masks: dict[int, int] = {}  # by group, the seed of the last mask
        self.adapters = {"default": "default"}  # and whose factors each has
        self.active = "default"
        self.tasks_of = ""  # whose factors the bank of tasks is for
        self.stored: dict[nn.Module, torch.dtype] = {}  # the dtype of factors, also where all is computed in float64

    # ---- values ------------------------------------------------------------------------------------------------------

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.exact else dtype

    def values(
        self, shape: Sequence[int], seed: int, dtype: torch.dtype, scale: float = 1.0, least: float | None = None
    ) -> Tensor:
        """Normal numbers as dtype rounds them: the same in every world. least: their absolute values plus this."""
        t = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul_(scale)
        t = (t if least is None else t.abs_().add_(least)).to(dtype)
        return self.moved(t.double() if self.exact else t)

    def moved(self, t: Tensor) -> Tensor:
        """t, each value moved by as much as a rounding may move it where there is noise."""
        return t * (1 + self.jitter * (2 * torch.rand(t.shape, dtype=t.dtype, generator=self.noise) - 1)) if self.jitter else t

    def tensor(
        self,
        *shape: int,
        seed: int,
        dtype: torch.dtype,
        scale: float = 1.0,
        grad: bool = True,
        kind: str = "plain",
        least: float | None = None,
    ) -> Tensor:
        """A leaf with a layout of its own; its gradient is compared."""
        t = layout(self.values(shape, seed, dtype, scale, least), kind).detach().requires_grad_(grad)
        self.known.append((f"x{len(self.known)}", t))
        return t

    def cast(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.to(self.dtype(dtype))

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager:
        """In threads without torch's cache of casts. All threads share it, and the first that leaves its autocast empties it:
        plain torch's own selective checkpointing then misses casts in the others."""
        alone = threading.current_thread() is threading.main_thread()
        return nullcontext() if self.exact else torch.autocast("cpu", dtype, cache_enabled=alone)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def fill(
        self, module: nn.Module, seed: int, dtype: torch.dtype, adapter_dtype: torch.dtype, core_scale: float = 1.0
    ) -> None:
        """Gives every parameter a value that matters, rounded to the dtype that it has in the program."""
        with torch.no_grad():
            active = (item for item in module.named_parameters() if "lotr_parked" not in item[0])
            for i, (name, p) in enumerate(sorted(active, key=lambda item: item[0])):
                scale = 0.5 if p.dim() < 2 else (p.shape[1] if name.endswith("B") or "weight" in name else p.shape[0]) ** -0.5
                scale *= core_scale if name.endswith("core") else 1.0
                base = name.endswith(("weight", "bias")) or ".weight." in name
                store = dtype if base else adapter_dtype
                p.copy_(self.values(p.shape, seed * 1000 + i, store, scale, 0.5 if name.endswith("magnitude") else None))

    def factors(self, k: int, n: int, rank: tuple[int, int], *, seed: int, dtype: torch.dtype, train: str = "AB") -> nn.Module:
        factors = self._factors(k, n, rank, self.dtype(dtype))
        with torch.no_grad():
            factors.A.copy_(self.values(factors.A.shape, seed, dtype, k**-0.5))
            factors.B.copy_(self.values(factors.B.shape, seed + 1, dtype, rank[1] ** -0.5))
        factors.A.requires_grad_("A" in train)
        factors.B.requires_grad_("B" in train)
        self.stored[factors] = dtype
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
        magnitude: str | None = None,
    ) -> nn.Module:
        """An adapted layer over shared factors; wrapped: around its base as another module. magnitude: "trained", "frozen" or
        None for none."""
        base = self._base(factors.A.shape[0], factors.B.shape[0], bias, seed, dtype, weight_kind)
        settings = {"scaling": scaling, "dropout": dropout, "wrapped": wrapped, "magnitude": magnitude is not None}
        layer, store = self._layer(base, factors, **settings), self.stored[factors]
        with torch.no_grad():
            layer.core.copy_(self.values(layer.core.shape, seed + 2, store, core_scale * layer.core.shape[0] ** -0.5))
            if magnitude is not None:
                layer.magnitude.copy_(self.values(layer.magnitude.shape, seed + 3, store, 0.5, 0.5))
                layer.magnitude.requires_grad_(magnitude == "trained")
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
        form: str | None = None,
        magnitude: bool = False,
    ) -> nn.Module:
        """The model adapted as a whole, with a forward scope. form: of cores that a module makes (`twin_model.apply_lotr`)."""
        model.to(self.dtype(dtype))
        settings = {"dtype": self.dtype(adapter_dtype), "scaling": scaling, "dropout": dropout, "train": train.split()}
        settings.update(form=form, magnitude=magnitude)
        self._apply(model, groups, rank, settings)
        self.fill(model, seed, dtype, adapter_dtype, core_scale)
        self.known.append(("net", model))
        for name in groups:
            self.watch(model.get_submodule(name))
        return model

    def experts(
        self,
        factors: nn.Module,
        count: int,
        *,
        seed: int,
        dtype: torch.dtype,
        bias: bool = True,
        scaling: float = 1.0,
        train: bool = True,
    ) -> nn.Module:
        """The adapted matrices of several experts over shared factors."""
        (k, r_in), (n, r_out) = factors.A.shape, factors.B.shape
        weight, cores = (
            self.values(shape, seed + i, store, shape[-1] ** -0.5)
            for i, (shape, store) in enumerate((((count, n, k), dtype), ((count, r_in, r_out), self.stored[factors])))
        )
        extra = nn.Parameter(self.values((count, n), seed + 2, dtype, 0.5)) if bias else None
        layer = self._experts(nn.Parameter(weight), extra, factors, scaling)
        with torch.no_grad():
            layer.core.copy_(cores)
        layer.core.requires_grad_(train)
        self.known.append((f"e{len(self.known)}", layer))
        self.watch(layer)
        return layer

    def padded(self, *shape: int, rows: Sequence[int], holding: float, **settings) -> Tensor:
        """A leaf of which these rows hold what none must read."""
        x = self.tensor(*shape, **settings)
        with torch.no_grad():
            x[list(rows)] = holding
        return x

    def copied(self, *modules: nn.Module) -> tuple[nn.Module, ...]:
        """Copies in the place of modules, which share what these share."""
        memo: dict[int, object] = {}
        copies = copy.deepcopy(modules, memo)
        self.known = [(name, memo.get(id(what), what) if isinstance(what, nn.Module) else what) for name, what in self.known]
        return copies

    def add_adapter(self, model: nn.Module, name: str, *, shared: bool) -> None:
        """As the active one, with cores at zero; shared: over its factors."""
        self._add_adapter(model, name, shared)
        self.adapters[name] = self.adapters[self.active] if shared else name

    def set_adapter(self, model: nn.Module, name: str) -> None:
        def use() -> None:
            self._set_adapter(model, name)
            self.active = name

        self.may_refuse(use) if name != self.active and is_generated(model) else use()

    def mixes(self, model: nn.Module, names: Sequence[str | None] | Tensor) -> bool:
        """Whether the adapters of these names, or the tasks, can be mixed: they have the active one's factors, and all are
        parameters."""
        owners = [self.adapters.get(name) for name in names if name is not None] if isinstance(names, list) else [self.tasks_of]
        return not is_generated(model) and all(owner == self.adapters[self.active] for owner in owners)

    def bank(self, model: nn.Module, tasks: int) -> None:
        """Places for tasks over the active adapter's factors."""
        self._bank(model, tasks)
        self.tasks_of = self.adapters[self.active]

    def task(self, model: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values for a task's cores."""
        layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "merged")]
        return {
            f"{name}.core": self.values(layer.core.shape, seed + i, dtype, layer.core.shape[-2] ** -0.5)
            for i, (name, layer) in enumerate(layers)
        }

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

    def loss(self, seed: int, *ys: Tensor | None, scale: float = 1.0, linear: bool = False) -> Tensor:
        """A smooth function of those of ys that there are; a linear one has a gradient that depends on none of them."""
        there = [(y if linear else y.sin(), seed + i) for i, y in enumerate(ys) if y is not None]
        parts = [(y * self.values(y.shape, at, torch.float32, scale).to(y.dtype)).sum() for y, at in there]
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
    ) -> list[Tensor | None]:
        """Shows autograd.grad of what can be had; returns what can be differentiated again, each in its place, if any can."""
        found = gradients(loss, inputs, retain_graph=retain or create, create_graph=create)
        for i, t in enumerate(found):
            self.seen.append((f"{label}[{i}]", None if t is None else t.detach().clone(), False))
        again = [t if t is not None and t.requires_grad else None for t in found]
        return again if any(t is not None for t in again) else []

    # ---- ways to run -------------------------------------------------------------------------------------------------

    def little_work(self, bound: int) -> None:
        """What lotr_ext takes for little: it goes through other nodes. Plain torch has one way."""

    def contexts(self, *state) -> object:
        """The contexts that are open; given them, makes them those."""

    def checkpoint(self, function: Callable, *args, reentrant: bool = False, policy: str | None = None):
        first: list[tuple] = []

        def again(*args):
            """function; in a recomputation with the masks, random cores and contexts of the first time."""
            now = self.calls, self.reads, self.contexts()
            if not first:
                first.append(now)
                return function(*args)
            self.calls, self.reads, contexts = first[0]
            self.contexts(contexts)
            try:
                return function(*args)
            finally:
                self.calls, self.reads, contexts = now
                self.contexts(contexts)

        if policy is None:
            return checkpoint(again, *args, use_reentrant=reentrant)
        make = lambda: create_selective_checkpoint_contexts(save_policy(policy))  # noqa: E731
        return checkpoint(again, *args, use_reentrant=False, context_fn=make)

    def inference(self, function: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode():
            return function()

    def planned(self, function: Callable) -> None:
        """Runs what may raise one of PLANNED. Gradients it has left are dropped."""
        try:
            function()
        except PLANNED:
            pass
        self.zero()

    def threads(self, *functions: Callable) -> list:
        """Each function's result; lotr_ext runs them at the same time."""
        return [function() for function in functions]

    def meet(self) -> None:
        """In a thread: waits until all of them are here."""

    # ---- what only lotr_ext is asked ---------------------------------------------------------------------------------

    def same_bits(self, function: Callable[[], Sequence[Tensor | None]]) -> None:
        """What function returns has the same bits at any number of threads."""

    def refuses(self, function: Callable[[], object], *names: str) -> None:
        """function raises an error that says one of these names."""

    def refuses_operator(self, name: str, argument: str, **settings) -> None:
        """A raw operator refuses an argument (`operands.py`)."""

    def begin(self, model: nn.Module, batches: list[Tensor], loss: Callable) -> None:
        """A start from the gradient: what it finds is dropped, and nothing else must have changed."""
