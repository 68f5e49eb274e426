"""Adapters for the experts of transformers' mixtures.

    experts module (the host)      gate_up_proj [e, 2 i, h], down_proj [e, h, i]
        .lotr                      AdaptedExperts
            .gate_up_proj          LoTRHostedExperts: core [e, r_in, r_out]
            .down_proj             LoTRHostedExperts: core [e, r_in, r_out]

transformers keeps the matrices of all experts in 3-D parameters. A class of experts describes their
layout by attributes (`is_transposed`, `has_bias`, `has_gate`, `has_post_expert_norm`). Its
configuration names one of the registered functions, which its forward calls. This file registers
`_forward_of_host`, and gives each adapted module a copy of its configuration that names this
function. In the configuration that all modules share, transformers may change the name, for example
for decoding, and the adapter would be skipped without an error.

Not here: what an adapter of experts computes (experts.py), and which parameters are adapted
(targets.py).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .core import dispatch, grouped
from .core.operators import DTYPES
from .experts import LoTRExperts, Routing
from .factors import LoTRFactors, set_unregistered
from .layers import check_plain, device_of

CHILD = "lotr"  # the child of an experts module that holds the adapters, by parameter
_IMPLEMENTATION = "lotr"  # the name of our forward in transformers' interface


class AdaptedExperts(nn.ModuleDict):
    """The adapters of an experts module, by parameter.

    Args:
        config: The configuration of the experts module before it was adapted.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register()  # a pickle may be loaded in a process in which nothing was adapted


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # Under a name that only the configurations of adapted modules have.
    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _forward_of_host)


# ---- which parameters can be adapted -------------------------------------------------------------


def expert_obstacle(module: nn.Module, parameter: str) -> str | None:
    """Returns why a parameter cannot be adapted as the matrices of experts, None if it can.

    The reason completes the "got" of an error.
    """
    kind = type(module).__name__
    tensor = module._parameters.get(parameter)
    if tensor is None or tensor.dim() != 3:
        return f"not a 3-D parameter of {kind}; target_modules adapts linear layers"
    if type(tensor) is not nn.Parameter or tensor.dtype not in DTYPES.values():
        return (
            f"experts of {kind} that are quantized or sharded ({type(tensor).__name__}, "
            f"{tensor.dtype}); load them dense"
        )
    if not _accepts_forward(module):
        return f"a parameter of {kind}, whose class lacks the decorator use_experts_implementation"
    first = _first_projection(module)
    if parameter not in (first, "down_proj"):
        return f"a parameter of {kind} that is neither its {first} nor its down_proj"
    return None


def _accepts_forward(module: nn.Module) -> bool:
    """Whether the class of experts calls a registered function in its forward."""
    # `use_experts_implementation` sets `__wrapped__`. This file reads the other attributes.
    return (
        all(hasattr(module, n) for n in ("is_transposed", "has_bias", "num_experts", "config"))
        and hasattr(type(module).forward, "__wrapped__")
        and hasattr(module.config, "_experts_implementation")
    )


def _first_projection(module: nn.Module) -> str:
    """Returns the name of the parameter that is multiplied with the module's input."""
    # A class without the attribute has a gate.
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def expert_sizes(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """Returns (experts, in_features, out_features) of a parameter that can be adapted."""
    experts, out_features, in_features = _weight_of(module, parameter).shape
    return experts, in_features, out_features


def _weight_of(host: nn.Module, parameter: str) -> Tensor:
    """Returns W [e, n, k], a transposed view if the host stores [e, k, n]."""
    weight = getattr(host, parameter)
    return weight.mT if host.is_transposed else weight


# ---- the adapter of one parameter ----------------------------------------------------------------


class LoTRHostedExperts(LoTRExperts):
    """The adapter of one 3-D parameter of an experts module, its host.

    Its only parameter is `core` [e, r_in, r_out]. The host keeps the weights under their names, and
    `apply_lotr` freezes them. In each forward of the host, when sharded training has gathered them,
    `_forward_of_host` passes them to `routed`.
    """

    def __init__(
        self,
        host: nn.Module,
        parameter: str,
        factors: LoTRFactors,
        scaling: float,
        dropout: float = 0.0,
    ):
        nn.Module.__init__(self)  # not LoTRExperts', which allocates a weight
        set_unregistered(self, "host", host)  # the host has this module as its child
        self.parameter = parameter
        self.num_experts, self.in_features, self.out_features = expert_sizes(host, parameter)
        self._add_adapter(factors, scaling, dropout, device_of(host), lead=(self.num_experts,))
        self.train(host.training)

    def called_module(self) -> nn.Module:
        return self.host

    @property
    def weight(self) -> Tensor:
        """The host's W [e, n, k]."""
        return _weight_of(self.host, self.parameter)

    def _weight_to_write(self, caller: str) -> Tensor:
        check_plain(self.host, caller, self.parameter)
        return self.weight

    def to_base(self) -> nn.Module:
        """Removes this adapter from the host, and returns the host."""
        adapted = getattr(self.host, CHILD)
        del adapted[self.parameter]
        # Without adapters, the host is restored.
        if not adapted:
            self.host.config = adapted.config
            delattr(self.host, CHILD)
        return self.host


def adapt_parameter(
    module: nn.Module, parameter: str, factors: LoTRFactors, scaling: float, dropout: float = 0.0
) -> LoTRHostedExperts:
    """Adds an adapter for a parameter of experts, as `module.lotr[parameter]`.

    Args:
        module: The experts module.
        parameter: A name for which `expert_obstacle` returns None.
        factors: The pair of A and B, with the features that `expert_sizes` returns.
        scaling: s.
        dropout: The probability of dropping an element of the adapter's x in training.
    """
    layer = LoTRHostedExperts(module, parameter, factors, scaling, dropout)
    if CHILD not in module._modules:
        _register()
        setattr(module, CHILD, AdaptedExperts(module.config))
        module.config = copy.copy(module.config)
        # Not by the property: its setter would also change the nested configurations, which are not
        # copied.
        module.config._experts_implementation_internal = _IMPLEMENTATION
    getattr(module, CHILD)[parameter] = layer
    return layer


# ---- the forward of an adapted experts module ----------------------------------------------------


def _forward_of_host(
    host: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes an adapted experts module, in place of its class's forward.

    Args:
        host: The experts module.
        hidden_states: [m, hidden].
        top_k_index: The experts of each token [m, top_k]. num_experts stands for no expert.
        top_k_weights: The router's weight of each of them [m, top_k].

    Returns:
        [m, hidden] in the dtype of hidden_states.
    """
    m, top_k = top_k_index.shape
    # Sorted by expert, because a grouped product reads consecutive rows.
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # The rows of expert c end where expert c + 1 would be inserted.
    next_expert = torch.arange(1, host.num_experts + 1, device=expert.device, dtype=expert.dtype)
    offs = torch.searchsorted(expert, next_expert, out_int32=True)
    tokens = order // top_k

    first = _first_projection(host)
    first_routing = Routing(offs, reads=tokens, tokens=tokens)
    y = _project(host, first, hidden_states, first_routing, request_input=hidden_states)
    y = host._apply_gate(y) if first == "gate_up_proj" else host.act_fn(y)
    # y has top_k rows per token. A request has one task per token, so it gets hidden_states.
    y = _project(host, "down_proj", y, Routing(offs, tokens=tokens), request_input=hidden_states)
    if getattr(host, "has_post_expert_norm", False):
        y = host.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)

    # Back to the order of the tokens, whose top_k rows are then neighbors.
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(order.shape[0], device=order.device)
    # A sum over a dimension, and not index_add_: its order is fixed, so the result is reproducible.
    return y[row_of].view(m, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _project(
    host: nn.Module, parameter: str, x: Tensor, routing: Routing, *, request_input: Tensor
) -> Tensor:
    """Computes one projection of the rows, with its adapter if it has one.

    Args:
        host: The experts module.
        parameter: The name of the projection's weight.
        x: As for `LoTRExperts.routed`, as are routing and request_input.
    """
    weight = _weight_of(host, parameter)
    bias = getattr(host, f"{parameter}_bias") if host.has_bias else None
    if dispatch.autocast_dtype(x) is None:
        x = x.to(weight.dtype)  # as transformers' own grouped products do
    layer = getattr(host, CHILD)._modules.get(parameter)
    # A host may have an adapter for only one of its two projections.
    if layer is None:
        return grouped.linear(x, weight, bias, routing.offs, routing.reads)
    return layer.routed(x, weight, bias, routing, request_input)
