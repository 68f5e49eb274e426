"""Loads a transformers mixture and keeps its experts in the quantised format of the checkpoint, on every device."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from ..model.experts import take_forward

__all__ = ["keep_packed"]

_OURS = {"mxfp4": "lotr_mxfp4", "fp8": "lotr_fp8"}


def keep_packed(model: str | PathLike[str] | PreTrainedConfig, **kwargs: Any) -> PreTrainedConfig:
    """A configuration with which from_pretrained keeps experts packed: mxfp4 (GPT-OSS) or fp8 by blocks (DeepSeek-V3, Qwen3).

    `AutoModelForCausalLM.from_pretrained(path, config=keep_packed(path))`, then `apply_lotr` with target_parameters. Without
    it, transformers makes such experts dense where its kernels do not run, and its mxfp4 kernels have no gradient. All other
    layers are made dense, as with `dequantize=True`. The model runs with and without an adapter. Save only
    the adapter (`save_adapter`): save_pretrained would write the packed experts under names that no other program reads.

    Args:
        model: a folder or a name, as from_pretrained takes it, or its configuration, which is not changed.
        **kwargs: for AutoConfig.from_pretrained.

    Returns:
        The configuration, for from_pretrained's config.

    Raises:
        ValueError: a checkpoint that is not quantised, or in another format.
    """
    given = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model, **kwargs)
    config = type(given).from_dict(given.to_dict())
    found = getattr(given, "quantization_config", None)
    found = dict(found if isinstance(found, dict) else found.to_dict()) if found is not None else {}
    method = found.get("quant_method")
    if method not in _OURS:
        got = "one without a format" if method is None else f"{getattr(method, 'value', method)!r}"
        raise ValueError(f"model: expected a checkpoint in {' or '.join(_OURS)}, got {got}; load it without keep_packed")
    config.quantization_config = found | {"quant_method": _OURS[method]}
    return config


@register_quantization_config("lotr_mxfp4")
class _Mxfp4Config(Mxfp4Config):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs | {"dequantize": True})
        self.quant_method = _OURS["mxfp4"]


@register_quantization_config("lotr_fp8")
class _FP8Config(FineGrainedFP8Config):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs | {"dequantize": True, "quant_method": _OURS["fp8"]})


def _experts(model: nn.Module, skipped: list[str] | None) -> list[tuple[str, nn.Module]]:
    """The experts modules of a model that are not skipped, by name."""
    found = [(name, m) for name, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "num_experts")]
    return [(name, m) for name, m in found if should_convert_module(name, skipped)]


class _Packed:
    """The common part of the two quantizers: they and the forward of their experts run on every device."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for _, module in _experts(model, self.quantization_config.modules_to_not_convert):
            take_forward(module)
        return model


@register_quantizer("lotr_mxfp4")
class _Mxfp4(_Packed, Mxfp4HfQuantizer):
    """Experts get parameters for the checkpoint's blocks and scales, which are loaded unchanged."""

    serialized_names: ClassVar[dict[str, list[str]]] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for _, module in _experts(model, self.quantization_config.modules_to_not_convert):
            for name in ("gate_up_proj", "down_proj"):
                e, k, n = getattr(module, name).shape
                delattr(module, name)
                for part, shape in (("blocks", (e, n, k // 32, 16)), ("scales", (e, n, k // 32))):
                    empty = torch.empty(shape, dtype=torch.uint8, device="meta")
                    module.register_parameter(f"{name}_{part}", nn.Parameter(empty, requires_grad=False))
            module._is_hf_initialized = True  # the model's init would look for the dense weights

    def get_load_operations(self) -> dict[str, type]:
        return {}


@register_quantizer("lotr_fp8")
class _FP8(_Packed, FineGrainedFP8HfQuantizer):
    """Experts become FP8Experts; all other layers become dense."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

        self._normalize_modules_to_not_convert(model)
        config = self.quantization_config
        experts = [name for name, _ in _experts(model, config.modules_to_not_convert)]
        others = [name for name, m in model.named_modules() if name not in experts and isinstance(m, nn.Linear)]
        config.dequantize = False
        replace_with_fp8_linear(model, [*others, *(config.modules_to_not_convert or ())], config)
        config.dequantize = True
