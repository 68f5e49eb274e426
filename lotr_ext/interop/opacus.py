"""Private training of cores with Opacus, which does the clipping, noise, Poisson sampling and accounting.

    from lotr_ext.interop.opacus import PrivacyEngine       # instead of opacus.PrivacyEngine

    model = apply_lotr(model, LoTRConfig(rank=16, train=["core"]))
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)

The gradient of each example with respect to the cores comes from the backward that runs anyway (`per_example`). Opacus' hooks
compute the gradients of other trained modules, such as a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import opacus
import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module import promote_current_grad_sample
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers.experts import LoTRExperts
from ..layers.factors import LoTRFactors
from ..layers.layer import LoTRLayer
from ..layers.parametrized import parameters_of
from ..model.per_example import collecting, layers_of

__all__ = ["LoTRGradSampleModule", "PrivacyEngine"]


class PrivacyEngine(opacus.PrivacyEngine):
    """opacus.PrivacyEngine for models with LoTR adapters, whose `make_private` and `make_private_with_epsilon` wrap them in a
    `LoTRGradSampleModule`. Everything else, including BatchMemoryManager, works as Opacus documents it.

    Raises:
        TypeError, ValueError, RuntimeError: as `LoTRGradSampleModule`; grad_sample_mode or wrap_model that are not the
            defaults.
    """

    def _prepare_model(
        self, module: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", grad_sample_mode: str = "hooks",
        wrap_model: bool = True, **_: Any,
    ) -> LoTRGradSampleModule:  # fmt: skip
        if grad_sample_mode != "hooks" or not wrap_model:
            got = f"{grad_sample_mode!r}, wrap_model={wrap_model}"
            raise ValueError(f"grad_sample_mode: expected 'hooks' and a model that is wrapped, got {got}; omit them")
        self.validate(module=module, optimizer=None, data_loader=None)
        return LoTRGradSampleModule(module, batch_first=batch_first, loss_reduction=loss_reduction)


class LoTRGradSampleModule(GradSampleModule):
    """opacus.GradSampleModule of a model with LoTR adapters: backward puts the gradient of each example [b, r_in, r_out] into
    `core.grad_sample`, and those of other trained modules as Opacus' hooks do.

    The first dimension of the model's first tensor argument is the batch, and must equal that of each adapted layer's
    input. Where Opacus allows several forwards, their gradients are kept one after another, as in Opacus.

    Args:
        m: a model from `apply_lotr` or built by hand. The factors are frozen, and the cores are trained parameters.
        loss_reduction: "mean" or "sum", how the loss combines the examples.

    Raises:
        TypeError, ValueError, RuntimeError: no adapter, or a merged one; trained factors, frozen or computed cores, experts;
            a trained parameter beside adapted layers in one module; batch_first=False. In backward: another number of rows.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", **options: Any):
        if not batch_first:
            raise ValueError("batch_first: expected True, got False")
        layers = _checked(m)
        super().__init__(m, loss_reduction=loss_reduction, **options)
        self._adapted = layers

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        """Opacus' check of the modules that get its hooks."""
        own = [part for part in module.modules() if not isinstance(part, (LoTRLayer, LoTRFactors)) and _trained(part)]
        return [error for part in own for error in super(LoTRGradSampleModule, cls).validate(part, strict=strict)]

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """The modules that get Opacus' hooks."""
        return () if isinstance(module, (LoTRLayer, LoTRFactors)) else super().iterate_submodules(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and self.hooks_enabled):
            return super().forward(*args, **kwargs)
        b = next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()), None)
        own: dict[nn.Module, Tensor] = {}

        def add(layer: nn.Module, gradient: Tensor) -> None:
            rows = len(gradient)
            if b is not None and rows != b:
                raise ValueError(f"x: expected a row for each of {b} examples in every adapted layer, got {rows} rows")
            gradient = gradient * rows if self.loss_reduction == "mean" else gradient
            if layer in own:  # called twice in one forward
                own[layer] += gradient
                return
            core = layer.core
            core._current_grad_sample = own[layer] = gradient
            promote_current_grad_sample(core)
            if not self.grad_accumulation_allowed and isinstance(core.grad_sample, list):
                raise ValueError(
                    "backward: expected optimizer.step() and zero_grad() after each under Poisson sampling, got a second one; "
                    "opacus.utils.batch_memory_manager.BatchMemoryManager cuts large batches"
                )

        with collecting(self._adapted, add):
            return super().forward(*args, **kwargs)


def _trained(module: nn.Module) -> bool:
    """Whether the module itself has a trained parameter."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _checked(model: nn.Module) -> dict[str, LoTRLayer]:
    """The adapted layers of a model. Raises unless all its trained parameters will have gradients for each example."""
    layers = layers_of(model, "PrivacyEngine")
    names = {p: name for name, p in model.named_parameters()}
    for name, layer in layers.items():
        if isinstance(layer, LoTRExperts):
            raise TypeError(f"model: expected adapted linear layers, got experts in {name!r}")
        if layer._parameters.get("core") is None:
            raise ValueError(f"model: expected cores that are parameters, got a computed one in {name!r}")
        for p in _factor_parameters(layer):
            if p.requires_grad:
                raise ValueError(
                    f"model: expected frozen factors, got a trained one, {names.get(p, 'A or B')!r}, whose gradient of each "
                    'example would be as large as LoRA\'s; adapt with LoTRConfig(train=["core"])'
                )
    for name, module in model.named_modules():
        if isinstance(module, (LoTRLayer, LoTRFactors)) or type(module) in GradSampleModule.GRAD_SAMPLERS:
            continue
        if _trained(module) and any(isinstance(part, LoTRLayer) for part in module.modules()):
            own = next(own for own, p in module.named_parameters(recurse=False) if p.requires_grad)
            raise ValueError(
                f"model: expected trained parameters in modules without adapted layers, got {own!r} in "
                f"{name or 'the model'!r}; freeze it, or move it into a separate module"
            )
    return layers


def _factor_parameters(layer: LoTRLayer) -> Iterator[nn.Parameter]:
    for owner, part in layer.factors.owners:
        yield from parameters_of(owner, part)
