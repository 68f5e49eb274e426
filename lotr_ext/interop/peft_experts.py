"""Experts of a transformers mixture under PEFT's tuner: the counterpart of `peft_layer.py`. Imported by
`lotr_ext.interop.peft`.

The adapter is a sibling of the parameter that it adapts, as with `apply_lotr` (`model.experts`). The experts module stays in
place, and its forward calls the adapters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..autograd.call import call_routed, compute_dtype
from ..layers.factors import LoTRFactors
from ..layers.functional import explain_call
from ..layers.hosted import Hosted
from ..layers.placement import home
from ..model.experts import expert_sizes
from ..ops.grouped import Packed, grouped_linear, of_groups_alone
from ..ops.planner import Plan
from .peft_config import LoTRPeftConfig
from .peft_layer import LoTRCore, LoTRPeftLinear, expect_values


def hosts(layers: Iterable[LoTRPeftLinear]) -> list[nn.Module]:
    """The experts modules of the layers that adapt experts, each once."""
    return list({id(host): host for host in (layer.host() for layer in layers if isinstance(layer, LoTRPeftExperts))}.values())


class LoTRPeftExperts(Hosted, LoTRPeftLinear):
    """A 3-D parameter of an experts module with LoTR adapters by name, each with a core [e, r_in, r_out].

    state_dict: `lotr_adapter.<name>.core`. Merging as in LoTRPeftLinear, into the host's parameter.
    """

    def __init__(self, host: nn.Module, parameter: str):
        nn.Module.__init__(self)
        self._refer_to(host, parameter, host.is_transposed, f"{parameter}_bias" if host.has_bias else None)
        self.num_experts, self.in_features, self.out_features = expert_sizes(host, parameter)
        self._start()

    def place(self) -> tuple[torch.device, torch.dtype]:
        weight = self.weight
        return home(self.host()) if weight.is_meta else weight.device, weight.dtype

    def _core(self, factors: LoTRFactors, config: LoTRPeftConfig, form: None) -> LoTRCore:
        return LoTRCore(factors, config, self.num_experts)

    def forward(self, x: Tensor, offs: Tensor, tokens: Tensor | None = None) -> Tensor:
        """As `lotr_grouped_linear`."""
        return self.routed(x, self.weight, self.bias, offs, tokens)

    def routed(
        self,
        x: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        offs: Tensor,
        tokens: Tensor | None,
        places: None = None,
        padded: bool = True,
    ) -> Tensor:
        """forward with the host's current weight and bias. places: as in LoTRExperts under `mixed`; always None here."""

        cores = self._running(warn=True).values()

        def run(x: Tensor, tokens: Tensor | None) -> Tensor:
            y = None
            for core in cores:
                y = core(lambda A, B, call, y=y: call_routed(x, weight, bias, offs, tokens, y, A, B, call.core, None, call))
            return grouped_linear(x if tokens is None else x[tokens], weight, offs, bias, compute_dtype(x)) if y is None else y

        return of_groups_alone(run, x, offs, tokens) if padded else run(x, tokens)

    def explain(self, x: Tensor, device: torch.device | str | None = None) -> dict[str, Plan]:
        running = self._running().items()
        return {name: explain_call(x, core.factors, core.call(), None, device) for name, core in running}

    def mergeable_weight(self) -> Tensor:
        self.check_parameter("weight", "merge")
        return expect_values(self.host(), self.weight)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """s B G_c^T A^T in the layout and dtype of the host's parameter."""
        delta = self.lotr_adapter[adapter_name].delta().to(self.weight.dtype)
        return delta.mT.contiguous() if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
