"""The core G [r_in, r_out] of a layer: the parameter `core`, or the output of the module `core_form`."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from ..autograd.bank import core_form_of
from ..compat import any_autocast, saved_tensor_hook

__all__ = ["HasCore", "made"]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def made(form: nn.Module, *args) -> Tensor:
    """form(*args), in the dtype of its parameters, and by autograd alone.

    A checkpoint's hook must not see what making a core saves: in a forward scope all cores are made at once and outside of the
    regions, in a recomputation one by one, and each region has to save as much as before.
    """
    if is_compiling():
        return form(*args)
    with ExitStack() as around:
        if saved_tensor_hook(False) is not None:
            around.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
        if any_autocast():
            device = next((t.device.type for t in form.parameters()), "cpu")
            around.enter_context(torch.autocast(device, enabled=False))
        return form(*args)


class _Core:
    """`module.core`. No property: for a forward FSDP1 sets an attribute in a parameter's place, and a property would refuse."""

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

    core: G, the parameter, or what `core_form` makes now.
    """

    core = _Core()

    def held_core(self) -> nn.Parameter | nn.Module:
        """The parameter, or the module that makes it."""
        core = self._parameters.get("core")
        return core_form_of(self) if core is None else core

    def hold_core(self, held: nn.Parameter | nn.Module) -> None:
        """Replaces the parameter, or the module that makes the core. Checks nothing."""
        if isinstance(held, nn.Parameter):
            self.release_core_form()
            self.core = held  # among the layer's parameters it stays where it is
        else:
            self._parameters.pop("core", None)
            self.release_core_form()
            self.core_form = held

    def release_core_form(self) -> nn.Module | None:
        """Takes the module that makes the core out of the layer, and returns it."""
        return self._modules.pop("core_form", None) or self.__dict__.pop("core_form", None)

    def use_core(self, form: nn.Module) -> None:
        """Replaces the core by a module: form() returns G [r_in, r_out], and its parameters are trained instead of G.

        They get their gradients from G's through autograd. `lotr_ext.cores` has forms that share parameters over layers.

        Raises:
            TypeError, ValueError: no module; one that makes no tensor, or one of another shape, dtype or device; a layer with a
                parametrized core, or one that an init began with part of the weight in. Nothing is changed then.
        """
        if not isinstance(form, nn.Module):
            raise TypeError(f"core: expected a module whose forward gives it, got {type(form).__name__}")
        if parametrize.is_parametrized(self, "core"):
            raise TypeError("core: expected a parameter to take the place of, got a parametrized core")
        if self.start_core is not None:
            raise ValueError('core: expected a layer that begins as its base, got one of init "svd"')
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
