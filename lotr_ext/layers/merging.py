"""Helpers of merging: writes that autograd sees, a check that weights are parameters, a warning if a merged model trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..compat import is_compiling
from ..ops import accumulate_dtype

__all__ = ["MergeNotice", "Merges", "check_is_parameter", "plus", "refuse_fsdp2", "write_"]


@torch.no_grad()
def write_(target: Tensor, value: Tensor) -> None:
    """target <- value, counted as a change: a backward that needs the old values raises instead of using the new ones.

    A tensor created under inference_mode has no version counter and no graph; only that mode may write to it.
    """
    if target.is_inference():
        with torch.inference_mode():
            target.copy_(value)
    else:
        target.copy_(value)


def _replace(target: Tensor, value: Tensor) -> Tensor:
    """`write_`, which leaves the old value after an error or an interruption: Ctrl-C is raised when the copy has ended. Returns
    a copy of the old value."""
    before = target.detach().clone()
    try:
        write_(target, value)
    except BaseException:
        write_(target, before)
        raise
    return before


def check_is_parameter(module: nn.Module, name: str, where: str, layer: str = "") -> None:
    """Refuses a weight or bias that is computed in each forward, which would overwrite or ignore a merged value.

    where: the caller's name; layer: the module's name in the model.

    Raises:
        TypeError: module.<name> comes from weight_norm, spectral_norm, a parametrization or pruning.
    """
    if module._parameters.get(name) is None and getattr(module, name, None) is not None:
        got = repr(f"{layer}.{name}") if layer else f"a {name}"
        parts = ", ".join(sorted(own for own, _ in module.named_parameters() if name in own)) or "something else"
        raise TypeError(
            f"{where}: expected a {name} that is a parameter, got {got} computed from {parts} by a reparametrisation; "
            "remove that first (of torch.nn.utils: parametrize.remove_parametrizations, remove_weight_norm, "
            "remove_spectral_norm or prune.remove)"
        )


def refuse_fsdp2(module: nn.Module, where: str) -> None:
    """Raises RuntimeError for a module that FSDP2 holds in parts. The tensors that it gathers for a forward look whole, but a
    write to them is lost. where: the caller's name."""
    of_fsdp1 = getattr(module._parameters.get("weight"), "_fsdp_flattened", False)  # its summon_full_params keeps writes
    if getattr(module, "_is_fsdp_managed_module", False) and not of_fsdp1:
        raise RuntimeError(
            f"{where}: expected whole tensors, got a {type(module).__name__} held in parts by FSDP2; save_adapter, then load "
            "it in one process"
        )


class MergeNotice:
    """One merge of a layer, or of all layers of a model: warns once about a forward with gradients, which trains no adapter."""

    def __init__(self) -> None:
        self.given = False

    def warn(self, adapter: Iterable[nn.Parameter], stacklevel: int = 5) -> None:
        """Called in each forward of a merged layer. adapter: its parameters; stacklevel: that of the caller's caller."""
        if self.given or is_compiling() or not torch.is_grad_enabled() or not any(p.requires_grad for p in adapter):
            return
        self.given = True
        warnings.warn(
            "lotr_ext: a merged adapter is not trained by this forward with gradients; unmerge it to train, or run under "
            "torch.no_grad() to predict",
            stacklevel=stacklevel,
        )


def plus(weight: Tensor, delta: Tensor, sign: int = 1) -> Tensor:
    """weight + sign delta, summed in float32 (or wider) and cast once."""
    wide = torch.promote_types(accumulate_dtype(weight.dtype), delta.dtype)
    return (weight.to(wide) + sign * delta.to(weight.device, wide)).to(weight.dtype)


class Merges(nn.Module):
    """Base class of layers that merge adapters into a weight: holds the backup of the weight and the notice of the merge.

    weight_backup: W before the first merge, a buffer outside state_dict; None without a merge or a backup.
    """

    weight_backup: Tensor | None
    notice: MergeNotice | None = None

    def _write_merged(self, weight: Tensor, merged: Tensor, keep_backup: bool = True) -> None:
        """weight <- merged."""
        before = _replace(weight, merged)
        if keep_backup and self.weight_backup is None:
            self.weight_backup = before
        self.notice = MergeNotice()

    def _write_back(self, weight: Tensor, value: Tensor) -> None:
        """weight <- value, the weight before the merge."""
        if self.weight_backup is None:
            _replace(weight, value)
        else:  # after an interruption the backup is still there, and unmerging works again
            write_(weight, value)
        self.weight_backup = None
        self.__dict__.pop("notice", None)  # the class attribute is None
