"""lotr_ext as programs use it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from programs.worlds import World, in_backward, invertible, trained_in
from torch import Tensor, nn

import lotr_ext
from lotr_ext.ops import planner


class Ours(World):
    """lotr_ext."""

    name, ours = "lotr_ext", True

    def __init__(self, *args, **noise):
        super().__init__(*args, **noise)
        self.little_work(0)

    def little_work(self, bound: int) -> None:
        planner.LITTLE_WORK = bound

    def _factors(self, k, n, rank, dtype):
        return lotr_ext.LoTRFactors(k, n, rank, dtype=dtype)

    def _layer(self, base, factors, scaling, dropout, wrapped):
        make = lotr_ext.LoTRWrapped if wrapped else lotr_ext.LoTRLinear
        return make.from_linear(base, factors, scaling=scaling, dropout=dropout)

    def _apply(self, model, groups, rank, settings):
        dtype, init = settings.pop("dtype"), "zero" if "core" in settings["train"] else "identity"
        config = lotr_ext.LoTRConfig(
            rank=rank, target_modules=list(groups), group_by=groups, adapter_dtype=dtype, core_init=init, **settings
        )
        lotr_ext.apply_lotr(model, config)

    def watch(self, layer) -> None:
        """Notes which mask each call with dropout takes: a new one if torch's generator moves, else its group's last. That of
        a layer with backward hooks is its own."""
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
                drawn = int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().set_state(state)))
                if module._backward_hooks or module._backward_pre_hooks:
                    self.decisions.seeds.append(drawn)
                    return
                self.masks[id(factors)] = drawn
            self.decisions.seeds.append(self.masks[id(factors)])

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def linear(self, x, weight, bias, A, B, core, scaling, rows=None):
        index = None if rows is None else torch.tensor(rows)
        return lotr_ext.lotr_linear(x, weight, bias, A, B, core, scaling, core_index=index)

    def merge(self, what) -> None:
        what.merge() if isinstance(what, lotr_ext.LoTRLinear) else lotr_ext.merge(what)

    def unmerge(self, what) -> None:
        what.unmerge() if isinstance(what, lotr_ext.LoTRLinear) else lotr_ext.unmerge(what)

    def unload(self, model) -> None:
        lotr_ext.unload(model, merge=True)

    def disabled(self, model):
        return lotr_ext.disabled(model)

    def mixed(self, model, names):
        return lotr_ext.mixed(model, names)

    def _add_adapter(self, model, name, shared):
        lotr_ext.add_adapter(model, name, share_factors=lotr_ext.active_adapter(model) if shared else None)

    def _set_adapter(self, model, name):
        lotr_ext.set_adapter(model, name)

    def train_merged(self, merged: nn.Module, function: Callable) -> None:
        """A forward with grad enabled over a merged adapter that is to be trained: an error or a warning says so. The other
        worlds do without it, so a core or scaling that it sets comes back."""
        layers = [m for m in merged.modules() if hasattr(m, "merged")]
        before = [(m._parameters.get("core"), m.scaling) for m in layers]
        called: list[nn.Module] = []
        look = lambda m, args: called.append(m) if m.merged and trained_in(m) else None  # noqa: E731
        handles = [m.register_forward_pre_hook(look) for m in layers]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                function()
            except RuntimeError as error:
                said.append(error)
        for layer, (core, scaling), handle in zip(layers, before, handles):
            handle.remove()
            layer.scaling = scaling
            if core is not None:
                layer._parameters["core"] = core
        if called and not any("merge" in str(getattr(word, "message", word)) for word in said):
            raise AssertionError("training while merged: expected an error or a warning, got none")

    @contextmanager
    def saved(self, model):
        with tempfile.TemporaryDirectory() as folder:
            lotr_ext.save_adapter(model, folder)
            yield
            load = partial(lotr_ext.load_adapter, model, folder)
            load() if invertible(model) else self.may_refuse(load)

    def may_refuse(self, function: Callable) -> bool:
        try:
            function()
        except (TypeError, ValueError, RuntimeError):
            self.decisions.refused.append(True)
        else:
            self.decisions.refused.append(False)
        return self.decisions.refused[-1]
