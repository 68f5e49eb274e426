"""Adapted experts in transformers' mixtures, through transformers' interface for implementations of experts.

These classes have their matrices as 3-D parameters, describe the layout (`is_transposed`, `has_bias`, `has_gate`,
`has_post_expert_norm`), and call the function that is registered under the name in their configuration. Here one function,
`experts_forward`, is registered for all classes. An adapted module has a copy of the configuration that names it: otherwise
another choice for the model, or for decoding, would silently skip the adapter.
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
from ..layers.factors import LoTRFactors
from ..layers.hosted import LoTRHostedExperts
from ..layers.mixture import Mixture, tasks_of_tokens
from ..layers.packed import packed, weight_of
from ..layers.quantized import is_plain
from ..layers.settings import Settings
from ..layers.sharded import whole_shape
from ..ops.grouped import grouped_linear, of_groups_alone
from ..ops.planner import DTYPES

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

CHILD = "lotr"  # the child of an experts module that holds the adapters of its parameters, by their names
_IMPLEMENTATION = "lotr"  # the name in transformers' interface
_ATTRIBUTES = ("is_transposed", "has_bias", "num_experts", "config")  # of every class that takes implementations


class AdaptedExperts(nn.ModuleDict):
    """The adapters of an experts module, by parameter. config: the module's original configuration. hook: with expert
    parallelism, the hook that sends tokens' tasks to other processes."""

    hook: RemovableHandle | None = None

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register()  # in case a pickle is loaded in a process in which nothing was adapted


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts_forward)
    if (fp8 := sys.modules.get("transformers.integrations.finegrained_fp8")) is not None:  # it has its own interface
        fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts_forward)


def first_projection(module: nn.Module) -> str:
    """The name of the parameter that is multiplied with the module's input."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def why_not(module: nn.Module, parameter: str, where: str = "") -> str | None:
    """Why a parameter cannot be adapted as experts' matrices, for the "got" of an error; None if it can. where: the module's
    name.

    Raises:
        TypeError, ValueError: packed experts in a known format whose tensors do not fit together.
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
    takes = all(hasattr(module, name) for name in _ATTRIBUTES) and hasattr(type(module).forward, "__wrapped__")
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
    """Adds an adapter for a parameter for which `why_not` is None."""
    bias = f"{parameter}_bias" if module.has_bias else None
    layer = LoTRHostedExperts(module, parameter, factors, transposed=module.is_transposed, bias=bias, settings=settings)
    adapted = place(module)
    adapted[parameter] = layer
    if adapted.hook is None and layer.cut is not None and layer.cut.by == "experts":
        adapted.hook = module.register_forward_pre_hook(_send_tasks)
    return layer


def place(module: nn.Module) -> AdaptedExperts:
    """The ModuleDict with the adapters of an experts module, by parameter; created if needed."""
    if CHILD not in module._modules:
        adapted = AdaptedExperts(module.config)
        take_forward(module)
        setattr(module, CHILD, adapted)
    return getattr(module, CHILD)


def take_forward(module: nn.Module) -> None:
    """Makes `experts_forward` the forward of an experts module."""
    _register()
    config = copy.copy(module.config)
    config._experts_implementation_internal = _IMPLEMENTATION  # the property would also change the sub-configurations
    module.config = config


def adapted_in(module: nn.Module) -> Iterable[str]:
    """The parameters of a module that have adapters."""
    adapted = module._modules.get(CHILD)
    return adapted if isinstance(adapted, AdaptedExperts) else ()


def parameter_name(name: str) -> str:
    """The full name of the parameter that an adapter of this name adapts."""
    host, _, own = name.rpartition(".")
    return f"{host.removesuffix(CHILD)}{own}"


def release(module: nn.Module) -> None:
    """Removes all adapters from an experts module."""
    module.config = getattr(module, CHILD).config
    if (hook := getattr(module, CHILD).hook) is not None:
        hook.remove()
    delattr(module, CHILD)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of adapted or packed experts: hidden_states [m, hidden], top_k_index and top_k_weights [m, top_k] -> as
    hidden_states. With expert parallelism, an index of num_experts or above is an expert of another process."""
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
    elsewhere = getattr(self, "_is_expert_parallel", False)  # rows of other processes' experts are zero here
    y = _projected(self, first_projection(self), x, offs, tokens, tasks, elsewhere)
    y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)
    y = _projected(self, "down_proj", y, offs, None, tasks, elsewhere)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return y[back].view(m, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)  # a fixed order of sums: deterministic


# ---- tasks of tokens that go to other processes -----------------------------------------------------------------------

_BASE, _DIGITS = 128, 3  # a task as digits: bfloat16 represents every integer up to 256


def _mixture(module: nn.Module) -> Mixture | None:
    return next((layer.mixture for layer in getattr(module, CHILD, {}).values()), None)  # the same batch for all


def _send_tasks(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A pre-forward hook with expert parallelism. Inside `mixed`, it appends each token's task to the token, so that the task
    arrives wherever transformers sends the token, in any order."""
    if (mixture := _mixture(module)) is None:
        return None
    x, *rest = args
    x = x.to_local() if is_dtensor(x) else x
    return with_tasks(x, tasks_of_tokens(mixture, torch.arange(len(x), device=x.device), len(x))), *rest


def with_tasks(x: Tensor, tasks: Tensor) -> Tensor:
    """x [m, k] with the tasks [m] of its rows, -1 for none, as digits in additional columns."""
    digits = torch.stack([(1 + tasks) // _BASE**i % _BASE for i in range(_DIGITS)], 1)
    return torch.cat((x, digits.to(x.dtype)), 1)


def without_tasks(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x, tasks): the inverse of `with_tasks`."""
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
