"""Adapted experts in transformers' mixtures, through its own interface for implementations of experts.

Its experts classes have their matrices as 3-D parameters, say how they are laid out (`is_transposed`, `has_bias`, `has_gate`,
`has_post_expert_norm`), and hand their forward to a function that is registered under the name in their configuration. One
function serves all of them here. An adapted module has a configuration of its own that names it, so that another choice for the
model, or for decoding, cannot leave the adapter out in silence.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..autograd.call import compute_dtype
from ..autograd.tensor_parallel import is_dtensor
from ..layers.checks import DTYPES
from ..layers.factors import LoTRFactors
from ..layers.hosted import LoTRHostedExperts
from ..layers.mixture import Mixture, tasks_of_tokens
from ..layers.packed import packed, weight_of
from ..layers.quantized import is_plain
from ..layers.settings import Settings
from ..layers.sharded import whole_shape
from ..ops.grouped import grouped_linear, of_groups_alone

__all__ = [
    "CHILD",
    "adapt_parameter",
    "adapted_in",
    "expert_sizes",
    "parameter_name",
    "place",
    "release",
    "take_forward",
    "why_not",
]

CHILD = "lotr"  # an experts module's child that has the adapters of its parameters, by their names
_IMPLEMENTATION = "lotr"  # the name in transformers' interface
_SAYS = ("is_transposed", "has_bias", "num_experts", "config")  # attributes of every class that takes implementations


class AdaptedExperts(nn.ModuleDict):
    """The adapters of an experts module, by parameter. config: the module's configuration as it was. hook: what sends the tasks
    of tokens along, where each process has experts of its own."""

    hook: RemovableHandle | None = None

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register()  # a pickle may come into a process in which nothing was adapted


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts_forward)
    if (fp8 := sys.modules.get("transformers.integrations.finegrained_fp8")) is not None:  # which has an interface of its own
        fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts_forward)


def first_projection(module: nn.Module) -> str:
    """The name of the parameter that is multiplied with the module's input."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def why_not(module: nn.Module, parameter: str, where: str = "") -> str | None:
    """Why a parameter cannot be adapted as experts' matrices, worded as what was got; None if it can. where: the module's name.

    Raises:
        TypeError, ValueError: packed experts in a format that is known, with tensors that do not fit together.
    """
    kind, tensor = type(module).__name__, module._parameters.get(parameter)
    known = packed(module, parameter, getattr(module, "is_transposed", False), where)
    if hasattr(module, f"{parameter}_precision_config"):
        return f"quantised experts of {kind} for kernels without a gradient; load the model with interop.packed.keep_packed"
    if known is None and tensor.dim() != 3:
        return f"a {tensor.dim()}-D parameter of {kind}; target_modules adapts linear layers"
    if known is None and (not is_plain(tensor) or tensor.dtype not in DTYPES.values()):
        how = type(tensor).__name__ if not is_plain(tensor) else str(tensor.dtype)
        return f"quantised experts of {kind} ({how})"
    takes = all(hasattr(module, name) for name in _SAYS) and hasattr(type(module).forward, "__wrapped__")
    if not takes or not hasattr(getattr(module, "config", None), "_experts_implementation"):
        return f"a parameter of {kind}, whose class takes no implementations of experts (use_experts_implementation)"
    if parameter not in (first_projection(module), "down_proj"):
        return f"a parameter of {kind} that is neither its {first_projection(module)} nor its down_proj"
    return None


def expert_sizes(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(experts, in_features, out_features) of a parameter that can be adapted."""
    if (known := packed(module, parameter, module.is_transposed)) is not None:
        e, n, k = known.shape
        return e, k, n
    e, n, k = whole_shape(getattr(module, parameter))
    return (e, n, k) if module.is_transposed else (e, k, n)


def adapt_parameter(
    module: nn.Module, parameter: str, factors: LoTRFactors, settings: Settings | None = None
) -> LoTRHostedExperts:
    """Puts an adapter beside a parameter for which `why_not` is None."""
    bias = f"{parameter}_bias" if module.has_bias else None
    layer = LoTRHostedExperts(module, parameter, factors, transposed=module.is_transposed, bias=bias, settings=settings)
    adapted = place(module)
    adapted[parameter] = layer
    if adapted.hook is None and layer.cut is not None and layer.cut.by == "experts":
        adapted.hook = module.register_forward_pre_hook(_send_tasks)
    return layer


def place(module: nn.Module) -> AdaptedExperts:
    """The ModuleDict with the adapters of an experts module, by parameter; made if it is not there."""
    if CHILD not in module._modules:
        adapted = AdaptedExperts(module.config)
        take_forward(module)
        setattr(module, CHILD, adapted)
    return getattr(module, CHILD)


def take_forward(module: nn.Module) -> None:
    """Makes `experts_forward` the forward of an experts module."""
    _register()
    config = copy.copy(module.config)
    config._experts_implementation_internal = _IMPLEMENTATION  # the property would change the parts of config, too
    module.config = config


def adapted_in(module: nn.Module) -> Iterable[str]:
    """The parameters of a module that have adapters."""
    adapted = module._modules.get(CHILD)
    return adapted if isinstance(adapted, AdaptedExperts) else ()


def parameter_name(name: str) -> str:
    """The full name of the parameter whose adapter has that name in an adapted model."""
    host, _, own = name.rpartition(".")
    return f"{host.removesuffix(CHILD)}{own}"


def release(module: nn.Module) -> None:
    """Takes all adapters off an experts module."""
    module.config = getattr(module, CHILD).config
    if (hook := getattr(module, CHILD).hook) is not None:
        hook.remove()
    delattr(module, CHILD)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of adapted or packed experts: hidden_states [m, hidden], top_k_index and top_k_weights [m, top_k] -> as
    hidden_states. An index of num_experts or above, with expert parallelism, is that of an expert elsewhere."""
    (m, top_k), e = top_k_index.shape, self.num_experts
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offs = torch.searchsorted(experts, torch.arange(1, e + 1, device=experts.device, dtype=experts.dtype), out_int32=True)
    x, tokens = hidden_states, order // top_k
    tasks = None
    if (mixture := _mixture(self)) is not None and getattr(self, CHILD).hook is not None:
        x, tasks = without_tasks(x)
        tasks = tasks[tokens]
    elif mixture is not None:
        tasks = tasks_of_tokens(mixture, tokens, m)
    elsewhere = getattr(self, "_is_expert_parallel", False)  # some rows may be of experts elsewhere, and are zero here
    y = _projected(self, first_projection(self), x, offs, tokens, tasks, elsewhere)
    y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)
    y = _projected(self, "down_proj", y, offs, None, tasks, elsewhere)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return y[back].view(m, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)  # in the order of top_k: the same bits every time


# ---- tasks of tokens that go to other processes -----------------------------------------------------------------------

_BASE, _DIGITS = 128, 3  # bfloat16 has every integer up to 256


def _mixture(module: nn.Module) -> Mixture | None:
    return next((layer.mixture for layer in getattr(module, CHILD, {}).values()), None)  # the same batch for all


def _send_tasks(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A hook before the forward of experts of which each process has its own. While `mixed` is on, each token takes its task
    along, wherever transformers sends it, and in whatever order."""
    if (mixture := _mixture(module)) is None:
        return None
    x, *rest = args
    x = x.to_local() if is_dtensor(x) else x
    return with_tasks(x, tasks_of_tokens(mixture, torch.arange(len(x), device=x.device), len(x))), *rest


def with_tasks(x: Tensor, tasks: Tensor) -> Tensor:
    """x [m, k] and the tasks [m] of its rows, -1 for none, as digits in further columns."""
    digits = torch.stack([(1 + tasks) // _BASE**i % _BASE for i in range(_DIGITS)], 1)
    return torch.cat((x, digits.to(x.dtype)), 1)


def without_tasks(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x, tasks), as `with_tasks` was given them."""
    digits = x[:, -_DIGITS:].detach().long()
    return x[:, :-_DIGITS].contiguous(), sum(digits[:, i] * _BASE**i for i in range(_DIGITS)) - 1


def _projected(
    module: nn.Module,
    parameter: str,
    x: Tensor,
    offs: Tensor,
    tokens: Tensor | None,
    tasks: Tensor | None,
    padded: bool,
) -> Tensor:
    weight = weight_of(module, parameter, module.is_transposed)
    bias = getattr(module, f"{parameter}_bias") if module.has_bias else None
    dtype = compute_dtype(x)
    if dtype is None and weight.dtype is not None:
        x = x.to(weight.dtype)  # as transformers' own grouped products do
    adapted = getattr(module, CHILD, {})
    if parameter in adapted:
        return adapted[parameter].routed(x, weight, bias, offs, tokens, tasks, padded)

    def run(x: Tensor, tokens: Tensor | None) -> Tensor:
        return grouped_linear(x if tokens is None else x[tokens], weight, offs, bias, dtype)

    return of_groups_alone(run, x, offs, tokens) if padded else run(x, tokens)
