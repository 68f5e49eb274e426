"""Linear layers with a forward of their own or with hooks: whether they still return x W^T + bias.

Not every subclass of nn.Linear does: Llama 4's router returns a tuple, DeepSeek V4's output projection multiplies by blocks.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..compat import FakeTensorMode
from .quantized import has_plain_weight, is_conv1d
from .sharded import in_parts

__all__ = ["Other", "dense_view", "has_own_forward", "other_result", "returns_product"]


class Other(NamedTuple):
    """What a forward makes of one row instead of [1, out_features]. certain: False if it raised an error, perhaps because it
    cannot run without values."""

    what: str
    certain: bool


def has_own_forward(module: nn.Module) -> bool:
    """Whether the class of an nn.Linear has another forward."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def other_result(module: nn.Module) -> Other | None:
    """None unless module is a subclass of nn.Linear whose forward returns something else than [.., out_features].

    Runs the forward of a copy, without hooks and on tensors without values, so no state changes. A quantised weight is not
    tried: its product may need values.
    """
    if not has_own_forward(module) or not has_plain_weight(module) or in_parts(module.weight):
        return None
    own = copy.copy(module)
    vars(own).update({held: dict(vars(module)[held]) for held in ("_parameters", "_buffers", "_modules")})
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            y = type(module).forward(own, module.weight.new_zeros(1, module.in_features))
    except Exception as error:  # of any kind: the forward is not ours
        return Other(f"its forward raises {type(error).__name__} for an x of [1, {module.in_features}]", False)
    if not isinstance(y, Tensor):
        return Other(f"its forward returns a {type(y).__name__}", True)
    if y.shape != (1, module.out_features):
        return Other(f"its forward returns {list(y.shape)} for an x of [1, {module.in_features}]", True)
    return None


def dense_view(module: nn.Module) -> Tensor | None:
    """W [out_features, in_features], a view of the weight, of an nn.Linear, a subclass of it or a Conv1D; None for a quantised
    weight, and for one that ZeRO-3 gathers, or compressed-tensors rounds, in the forward."""
    if not has_plain_weight(module) or hasattr(module.weight, "ds_id") or "quantization_scheme" in vars(module):
        return None
    if is_conv1d(module):
        return module.weight.t()
    return module.weight if isinstance(module, nn.Linear) else None


@torch.no_grad()
def returns_product(module: nn.Module) -> bool:
    """Whether a module that has a `dense_view` W returns x W^T + bias, up to rounding: calls it on two rows of random numbers,
    with its hooks and in eval mode."""
    weight, modes = dense_view(module), [(part, part.training) for part in module.modules()]
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    want = nnf.linear(x, weight, module.bias)
    try:
        y = module.eval()(x)
    except Exception:  # of any kind: the forward is not ours
        return False
    finally:
        for part, training in modes:
            part.training = training
    if not isinstance(y, Tensor) or y.shape != want.shape:
        return False
    want, relative = want.double(), max(1e-4, 4 * torch.finfo(weight.dtype).eps)
    return torch.allclose(y.double(), want, rtol=0, atol=relative * want.abs().max().item(), equal_nan=True)
