"""The adapter of experts in a transformers mixture, next to the module that has their weights.

That module, the host, keeps the weights under their names. Its forward passes them to the adapter, so that they are whole
also in sharded training.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from ..autograd.tensor_parallel import ExpertsCut, experts_cut, is_dtensor
from ..ops.grouped import Packed
from .experts import LoTRExperts
from .factors import LoTRFactors
from .merging import check_is_parameter
from .packed import weight_of
from .placement import home
from .settings import Settings

__all__ = ["Host", "Hosted", "LoTRHostedExperts"]


class Host:
    """A weak reference from a module to one above it. A copy or pickle of the tree refers to the copied module."""

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)

    def __call__(self) -> nn.Module:
        found = self.module()
        if found is None:
            raise RuntimeError("host: expected the module that has the adapted parameter, got one that was deleted")
        return found

    def __reduce__(self):
        return Host, (self.module(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        return Host(memo.get(id(self.module()), self.module()))


class Hosted:
    """Mixin of adapters of a 3-D parameter of their host: gives the host's current weight and bias.

    `weight` [e, n, k] is a transposed view if the host stores [e, k, n], and a `Packed` if its experts are quantised. `bias`
    [e, n] is None without one.
    """

    host: Host

    def _refer_to(self, host: nn.Module, parameter: str, transposed: bool, bias: str | None) -> None:
        self.__dict__["host"], self.parameter, self.transposed, self.bias_name = Host(host), parameter, transposed, bias

    @property
    def holder(self) -> nn.Module:
        """The host."""
        return self.host()

    @property
    def weight(self) -> Tensor | Packed:
        """W [e, n, k]."""
        return weight_of(self.holder, self.parameter, self.transposed)

    @property
    def bias(self) -> Tensor | None:
        """[e, n], or None."""
        return None if self.bias_name is None else getattr(self.holder, self.bias_name)

    def check_parameter(self, part: str, where: str, name: str = "") -> None:
        """Raises TypeError unless the host's weight or bias is a dense parameter."""
        own = self.parameter if part == "weight" else self.bias_name
        if part == "weight" and isinstance(weight := self.weight, Packed):
            if where == "unload":  # unload does not change the weight
                return
            got = f"{name or self.parameter!r} packed as {weight.format}"
            raise TypeError(f"{where}: expected dense experts, got {got}; use it unmerged, or load it dequantised")
        if own is not None:
            check_is_parameter(self.holder, own, where, name)


class LoTRHostedExperts(Hosted, LoTRExperts):
    """The adapter of one 3-D parameter of its host. Its only parameter is `core` [e, r_in, r_out].

    Merging writes to the host's weight.
    """

    def __init__(
        self,
        host: nn.Module,
        parameter: str,
        factors: LoTRFactors,
        *,
        transposed: bool = False,
        bias: str | None = None,
        settings: Settings | None = None,
    ):
        nn.Module.__init__(self)
        self._refer_to(host, parameter, transposed, bias)
        e, n, k = self.weight.shape
        device = home(host)
        self._check_factors(factors, k, n)
        self._check_device(factors, device)
        for own, tensor in host.named_parameters(recurse=False):
            if own.startswith(parameter):  # the weight or its packed tensors, and the bias
                tensor.requires_grad_(False)
        self.num_experts, self.in_features, self.out_features = e, k, n
        stored = host._parameters.get(parameter)
        self._cut = experts_cut(stored, transposed) if is_dtensor(stored) else None
        self._attach(factors, device, settings or Settings())
        self.train(host.training)

    @property
    def cut(self) -> ExpertsCut | None:
        """How the host's matrices are sharded over processes, also during its forward, which has local tensors."""
        return self._cut
