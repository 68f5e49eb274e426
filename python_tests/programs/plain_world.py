"""Plain torch: the twin, in the program's own dtype or in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from programs.given import Decisions, Undecided, invertible
from programs.twin import OPEN, LoTRExperts, LoTRFactors, LoTRLinear, Output, dropout_mask, grouped_linear, lengths, read
from programs.twin_model import TaskBank, apply_lotr, disabled, layers_of, mixed
from programs.worlds import World
from torch import Tensor, nn
from torch.nn import functional as nnf


class Plain(World):
    """Plain torch: the twin. keep: nothing changed in place can change a gradient. once: nothing is computed again."""

    def __init__(self, decisions: Decisions, *, exact: bool = False, keep: bool = False, once: bool = False, **noise):
        super().__init__(decisions, **noise)
        self.once = once
        self.exact, self.keep, self.name = exact, keep, "float64" if exact else "plain"
        self.strict = exact and not keep
        OPEN.clear()

    def contexts(self, *state):
        if state:
            OPEN[:] = state[0]
        return list(OPEN)

    def checkpoint(self, function: Callable, *args, **settings):
        return function(*args) if self.once else super().checkpoint(function, *args, **settings)

    def _factors(self, k, n, rank, dtype):
        return LoTRFactors(k, n, rank, dtype=dtype)

    def _layer(self, base, factors, **settings):
        return LoTRLinear(base, factors, **settings)

    def _apply(self, model, groups, rank, settings):
        apply_lotr(model, groups, rank, **settings)

    def _experts(self, weight, bias, factors, scaling):
        return LoTRExperts(weight, bias, factors, scaling=scaling)

    def _bank(self, model, tasks):
        TaskBank(model, tasks)

    def watch(self, layer) -> None:
        layer.next_mask = lambda layer, x: self._mask(layer, x)  # a copy of layer copies no world
        if getattr(layer.__dict__.get("cores"), "noisy", False):
            layer.next_noise = lambda: self._noise()
        if self.jitter:  # u is rounded too, and so are cores that are made
            layer.moved = lambda u: self.moved(u)
            if (make := layer.__dict__.get("make_core")) is not None:
                layer.make_core = lambda layer: self.moved(make(layer))
        layer.keep, layer.strict = self.keep, self.strict
        layer.register_forward_hook(lambda layer, args, y: self._look(y))

    def _look(self, y: Tensor) -> None:
        if self.finite is None and y.dtype == torch.float16 and not bool(torch.isfinite(y).all()):
            self.finite = len(self.seen)

    def _mask(self, layer, x: Tensor) -> Tensor:
        if self.calls == len(self.decisions.seeds):
            raise Undecided
        seed = self.decisions.seeds[self.calls]
        self.calls += 1
        return dropout_mask(x.shape, layer.dropout, seed)

    def _noise(self) -> float:
        if self.reads == len(self.decisions.noises):
            raise Undecided
        self.reads += 1
        return self.decisions.noises[self.reads - 1]

    def linear(self, x, weight, bias, A, B, core, scaling, rows=None, magnitude=None):
        own = (lambda t: t.clone()) if self.keep else (lambda t: t)
        x, weight, A, B, core = (own(t) for t in (x, weight, A, B, core))
        bias = None if bias is None else own(bias)
        y = nnf.linear(x, weight, bias if magnitude is None else None)
        if rows is not None:  # a core for each row of x
            core = core[torch.tensor(rows)].view(len(rows), *(1,) * (x.dim() - 3), *core.shape[1:])
            x = x.unsqueeze(1) if x.dim() == 2 else x
        x, A, B, core = read(x, A, B, core) if self.strict else (x, A, B, core)
        delta = ((x @ A.to(x.dtype)) @ core.to(x.dtype)) @ B.to(x.dtype).mT * scaling
        y = y + delta.view(y.shape)
        if magnitude is not None:
            y = y * (own(magnitude).double() / lengths(weight, A, B, core, scaling)).to(y.dtype)
            y = y if bias is None else y + bias.to(y.dtype)
            y = Output.apply(y) if self.strict and magnitude.requires_grad else y
        self._look(y)
        return y

    def grouped(self, x, weight, offs, A, B, cores, scaling, *, bias=None, tokens=None):
        y = grouped_linear(x, weight, offs, A, B, cores, scaling, bias=bias, tokens=tokens)
        self._look(y)
        return y

    def merge(self, what) -> None:
        for layer in [what] if isinstance(what, LoTRLinear) else layers_of(what):
            layer.merge()

    def unmerge(self, what) -> None:
        for layer in [what] if isinstance(what, LoTRLinear) else layers_of(what):
            layer.unmerge()

    def unload(self, model) -> None:
        """For good: the adapter stays in the weights."""
        self.merge(model)

    def disabled(self, model):
        return disabled(model)

    def mixed(self, model, names):
        return mixed(model, names)

    def task_from_file(self, model, task: int) -> int:
        return model.lotr_tasks.add(model.lotr_tasks.cores_of(task))

    def _add_adapter(self, model, name, shared):
        model.adapters.add(model, name, shared=shared)

    def _set_adapter(self, model, name):
        model.adapters.use(model, name)

    def train_merged(self, merged: nn.Module, function: Callable) -> None:
        pass

    @contextmanager
    def saved(self, model):
        """Inside, the adapter may change; after it, it is what it was."""
        named = [item for part in (model.lotr_factors, *layers_of(model)) for item in part.named_parameters()]
        parts = [p for name, p in named if name.split(".")[-1] in ("A", "B", "core", "magnitude", "original")]
        parts += model.lotr_cores.parameters() if hasattr(model, "lotr_cores") else ()
        before = [p.detach().clone() for p in parts]
        yield

        @torch.no_grad()
        def restore() -> None:
            for p, value in zip(parts, before):
                p.copy_(value)

        restore() if invertible(model) else self.may_refuse(restore)

    def may_refuse(self, function: Callable) -> bool:
        """What lotr_ext may refuse by an error, having changed nothing; the other worlds then leave it out. Whether it did."""
        if self.choices == len(self.decisions.refused):
            raise Undecided
        refused = self.decisions.refused[self.choices]
        self.choices += 1
        if not refused:
            function()
        return refused
