"""The core G [r_in, r_out] of a layer: the parameter `core`, or the output of the module `core_form`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from ..autograd.bank import core_form_of, tensors_of, versions_of
from ..compat import any_autocast, is_compiling, same_storage, saved_tensor_hook

__all__ = ["HasCore", "made"]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _as_it_was(form: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns a saved tensor of form, in place of a checkpoint's recomputation: a parameter with its value of now, which the
    recomputation of the core reads too. What was computed of parameters that have changed since raises."""
    own = tensors_of(form)
    before = versions_of(own)

    def unpack(tensor: Tensor) -> Tensor:
        if versions_of(own) == before or any(same_storage(tensor.untyped_storage(), t.untyped_storage()) for t in own):
            return tensor
        raise RuntimeError(
            f"core: expected the parameters of {type(form).__name__} as the forward read them, got ones that were changed in "
            "place before the backward that recomputes it (activation checkpointing); change them after backward"
        )

    return unpack


def made(form: nn.Module, *args) -> Tensor:
    """Returns form(*args), in the dtype of its parameters, without saved-tensor hooks.

    The hook of a checkpoint must not see tensors that computing a core saves. A forward scope computes all cores at once,
    outside the regions, but a recomputation computes them one by one, and must save as many tensors as the first run.
    """
    if is_compiling():
        return form(*args)
    with ExitStack() as around:
        if saved_tensor_hook(False) is not None:
            around.enter_context(saved_tensors_hooks(_as_it_is, _as_it_was(form)))
        if any_autocast():
            device = next((t.device.type for t in form.parameters()), "cpu")
            around.enter_context(torch.autocast(device, enabled=False))
        return form(*args)


class _Core:
    """`module.core`. Not a property: for a forward FSDP1 sets an attribute in a parameter's place, which a property rejects."""

    def __get__(self, module: HasCore | None, owner: type | None = None) -> Tensor:
        if module is None:
            return self
        core = module._parameters.get("core")
        if core is not None:
            return core
        form = core_form_of(module)
        if form is None:
            raise AttributeError(f"{type(module).__name__} has no core yet")
        return made(form)


class HasCore(nn.Module):
    """Base class of modules with a core G [r_in, r_out]: LoTRLayer, and LoTRCore, an adapter of PEFT's layers.

    core: G: the parameter, or the current output of `core_form`.
    """

    core = _Core()

    def held_core(self) -> nn.Parameter | nn.Module:
        """The parameter, or the module that computes the core."""
        core = self._parameters.get("core")
        return core_form_of(self) if core is None else core

    def hold_core(self, held: nn.Parameter | nn.Module) -> None:
        """Replaces the parameter or the module that computes the core, without checks."""
        if isinstance(held, nn.Parameter):
            self.release_core_form()
            self.core = held  # keeps its position among the layer's parameters
        else:
            self._parameters.pop("core", None)
            self.release_core_form()
            self.core_form = held

    def release_core_form(self) -> nn.Module | None:
        """Removes the module that computes the core from the layer, and returns it."""
        return self._modules.pop("core_form", None) or self.__dict__.pop("core_form", None)

    def use_core(self, form: nn.Module) -> None:
        """Replaces the core by a module: form() returns G [r_in, r_out], and its parameters are trained instead of G.

        They get their gradients from G's through autograd. `lotr_ext.cores` has forms that share parameters over layers.

        Raises:
            TypeError, ValueError: no module; one that returns no tensor, or another shape, dtype or device; a layer with a
                parametrized core, or with a core that contains part of the weight (init "svd"). Nothing is changed then.
        """
        if not isinstance(form, nn.Module):
            raise TypeError(f"core: expected a module whose forward returns it, got {type(form).__name__}")
        if parametrize.is_parametrized(self, "core"):
            raise TypeError("core: expected a layer whose core is a parameter, got a parametrized core")
        if self.start_core is not None:
            raise ValueError('core: expected a layer that starts as its base, got one of init "svd"')
        with torch.no_grad():
            before, new = self.core, made(form)
        if not isinstance(new, Tensor):
            raise TypeError(f"core: expected a module that makes a tensor, got {type(form).__name__}, whose forward gives "
                            f"{type(new).__name__}")  # fmt: skip
        for what, want, got in (
            ("shape", tuple(before.shape), tuple(new.shape)),
            ("dtype", before.dtype, new.dtype),
            ("device", before.device, new.device),
        ):
            if want != got:
                raise ValueError(f"core: expected {what} {want}, got {got} of {type(form).__name__}")
        self.hold_core(form)
