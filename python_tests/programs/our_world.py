"""lotr_ext as programs use it."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from programs.given import NOISES, PLANNED, Product, in_backward, invertible, random_noise, trained_in
from programs.operands import argument_names, call_operator
from programs.worlds import World
from torch import Tensor, nn

import lotr_ext
from lotr_ext.cores import Cores
from lotr_ext.ops import planner


class OurProductCores(Product, Cores):
    """A user's own cores."""

    def __init__(self, places, rank, noisy: bool):
        Cores.__init__(self, places, rank)
        self.set_up(len(places), rank, noisy)

    def make(self, index: int | None = None) -> Tensor:
        cores = self.product(index)
        if not self.noisy:
            return cores
        noise = random_noise(len(self.places) if index is None else 1).to(cores.dtype)
        return cores * (noise if index is None else noise[0])


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

    def _layer(self, base, factors, wrapped, **settings):
        make = lotr_ext.LoTRWrapped if wrapped else lotr_ext.LoTRLinear
        return make.from_linear(base, factors, **settings)

    def _apply(self, model, groups, rank, settings):
        dtype, init = settings.pop("dtype"), "zero" if "core" in settings["train"] else "identity"
        form = settings.pop("form")
        if form is not None:
            settings["core"], init = partial(OurProductCores, noisy=form == "noisy"), "zero"
        config = lotr_ext.LoTRConfig(
            rank=rank, target_modules=list(groups), group_by=groups, adapter_dtype=dtype, core_init=init, **settings
        )
        lotr_ext.apply_lotr(model, config)

    def _experts(self, weight, bias, factors, scaling):
        return lotr_ext.LoTRExperts.from_weight(weight, factors, bias=bias, scaling=scaling)

    def _bank(self, model, tasks):
        lotr_ext.TaskBank(model, tasks)

    def task_from_file(self, model, task: int) -> int:
        """Another task of the same cores, by way of a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.safetensors"
            model.lotr_tasks.save(task, path)
            return model.lotr_tasks.add(path)

    def watch(self, layer) -> None:
        """Notes which mask each call with dropout takes: a new one if torch's generator moves, else its group's last. That of
        a layer with backward hooks is its own."""
        form = layer._modules.get("core_form")
        if form is not None and form.cores.noisy:
            self._watch_cores(layer, form)
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

    def _watch_cores(self, layer, form) -> None:
        """Notes what the core of each call was multiplied by: the first that the call reads."""
        reads: list[list[float]] = []

        def read(form, args, core: Tensor) -> None:
            if reads and not reads[-1]:
                clean = form.cores.product(form.index).detach().flatten()
                ratio = float(core.detach().flatten()[clean.abs().argmax()] / clean.abs().max())
                sign = 1 if clean[clean.abs().argmax()] > 0 else -1
                reads[-1].append(min(NOISES, key=lambda noise: abs(noise - sign * ratio)))

        def after(*_) -> None:
            noises = reads.pop()
            self.decisions.noises.extend([] if in_backward() else noises)

        layer.register_forward_pre_hook(lambda *_: reads.append([]))
        layer.register_forward_hook(after)
        form.register_forward_hook(read)

    def linear(self, x, weight, bias, A, B, core, scaling, rows=None, magnitude=None):
        index = None if rows is None else torch.tensor(rows)
        return lotr_ext.lotr_linear(x, weight, bias, A, B, core, scaling, core_index=index, magnitude=magnitude)

    def grouped(self, *tensors, **options):
        return lotr_ext.lotr_grouped_linear(*tensors, **options)

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
        numbers = dict(merged.lotr_cores._parameters) if hasattr(merged, "lotr_cores") else {}
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
        if numbers:
            merged.lotr_cores._parameters.update(numbers)
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

    # ---- threads and refusals ----------------------------------------------------------------------------------------

    def threads(self, *functions: Callable) -> list:
        results: list = [None] * len(functions)
        errors: list[BaseException] = []
        self.barrier = threading.Barrier(len(functions))

        def run(i: int) -> None:
            try:
                results[i] = functions[i]()
            except BaseException as error:
                errors.append(error)
            finally:
                self.barrier.abort()  # no one waits for a thread that has ended

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def meet(self) -> None:
        with suppress(threading.BrokenBarrierError):
            self.barrier.wait()

    def same_bits(self, function: Callable[[], Sequence[Tensor | None]]) -> None:
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append([t.detach().clone() for t in function() if t is not None])
        finally:
            torch.set_num_threads(threads)
        for i, (one, two) in enumerate(zip(*found)):
            if not torch.equal(one.nan_to_num(), two.nan_to_num()):
                raise AssertionError(f"tensor {i}: other bits at 1 and 2 threads")

    def refuses(self, function: Callable[[], object], *names: str) -> None:
        try:
            got = function()
        except (TypeError, ValueError, RuntimeError) as error:
            if any(f"{name}: " in str(error) for name in names):
                return
            raise AssertionError(f"expected an error that names {' or '.join(names)}, got {error!r:.200}") from None
        raise AssertionError(f"expected an error that names {' or '.join(names)}, got {got!r:.200}")

    def refuses_operator(self, name: str, argument: str, **settings) -> None:
        self.refuses(lambda: call_operator(name, argument, **settings), *argument_names(name))

    def begin(self, model: nn.Module, batches: list[Tensor], loss: Callable) -> None:
        parts = [p for m in model.modules() if hasattr(m, "merged") for p in (m.core, m.factors.A, m.factors.B)]
        before = [p.detach().clone() for p in parts]
        with torch.no_grad():
            for m in model.modules():
                if hasattr(m, "merged"):
                    m.core.zero_()
        with suppress(*PLANNED):
            lotr_ext.init_from_gradient(model, batches, loss, progress=False)
        with torch.no_grad():
            for p, value in zip(parts, before):
                p.copy_(value)
