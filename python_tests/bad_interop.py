"""Rows of the table of bad input for PEFT, conversions and vLLM: (argument, call, exception, what the message matches)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import zoo
from torch import nn

from lotr_ext import LoTRConfig, apply_lotr, save_adapter
from lotr_ext.convert import export_lora, lora_to_lotr, lotr_to_lora, original_to_lotr
from lotr_ext.peft import LoTRPeftConfig
from lotr_ext.vllm import export_factors, export_task

Row = tuple[str, Callable[[], object], type[Exception] | tuple[type[Exception], ...], str]


def _config(name: str, value: object, **more: object) -> Callable[[], object]:
    return lambda: LoTRPeftConfig(**{name: value, **more})


def _tuned(net: nn.Module | None = None, name: str = "default", **settings: object) -> peft.PeftModel:
    settings = {"rank": 2, "target_modules": ["q", "v"], **settings}
    return peft.get_peft_model(zoo.net("attention") if net is None else net, LoTRPeftConfig(**settings), name)


def _named(names: object, change: Callable[[peft.PeftModel], object] = lambda model: model.eval()) -> Callable[[], object]:
    def call() -> None:
        model = _tuned()
        change(model)
        model(zoo.inputs("attention"), adapter_names=names)

    return call


def _shared() -> nn.Module:
    net = zoo.net("attention")
    net.blocks[1]["q"] = net.blocks[0]["q"]
    return net


def _tied() -> nn.Module:
    net = zoo.net("attention")
    net.head.weight = net.embed.weight
    return net


def _with_lora() -> nn.Module:
    net = zoo.net("attention")
    peft.get_peft_model(net, peft.LoraConfig(target_modules=["q"]))
    return net


def _second(name: str) -> Callable[[], object]:
    return lambda: _tuned().add_adapter(name, LoTRPeftConfig(rank=2, target_modules=["q"]))


def _model() -> nn.Module:
    return apply_lotr(zoo.net("mlp"), LoTRConfig(rank=2, target_modules=["up", "down"]))


def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def _saved() -> Path:
    save_adapter(_model(), folder := _folder())
    return folder


def _lora(**settings: object) -> Path:
    model = peft.get_peft_model(zoo.net("attention"), peft.LoraConfig(r=2, target_modules=["q", "v", "head"], **settings))
    model.save_pretrained(folder := _folder())
    return folder


def _checkpoint(**tensors: torch.Tensor) -> Path:
    torch.save(tensors or {"a.lotr.rhs": torch.ones(4, 2), "a.lotr.mid": torch.ones(2, 2), "a.lotr.lhs": torch.ones(2, 4)},
               path := _folder() / "model.pt")  # fmt: skip
    return path


_BOTH = (TypeError, ValueError)
_CONFIG: list[Row] = [
    ("rank", _config("rank", 0), ValueError, "rank: expected an int from 1"),
    ("rank", _config("rank", 2.5), TypeError, "rank: expected an int"),
    ("r", _config("r", 4, rank=2), ValueError, "r: expected rank = 2, or one of them alone, got 4"),
    ("alpha", _config("alpha", "8"), TypeError, "alpha: expected a number"),
    ("scaling", _config("scaling", "Auto"), ValueError, 'scaling: expected a number or "auto"'),
    ("scaling", _config("scaling", 1.0, alpha=2), ValueError, "scaling: expected it alone"),
    ("dropout", _config("dropout", 1.0), ValueError, "dropout: expected a number in"),
    ("init", _config("init", "svd"), ValueError, "init: expected one that does not change the base weights"),
    ("init", _config("init", "zeros"), ValueError, "init: expected one of"),
    ("core", _config("core", "custom"), ValueError, "core: expected"),
    ("core_init", _config("core_init", "ones"), ValueError, "core_init: expected one of"),
    ("group_by", _config("group_by", lambda name, module: "g"), ValueError, "group_by"),
    ("train", _config("train", "core"), TypeError, "train: expected a list"),
    ("bias", _config("bias", "lora_only"), ValueError, "bias: expected one of none, all, lotr_only"),
    ("layers_to_transform", _config("layers_to_transform", [0], target_modules="q"), ValueError, "expected None beside"),
    ("layers_pattern", _config("layers_pattern", "blocks"), ValueError, "expected it with layers_to_transform"),
    ("lora_alpha", _config("lora_alpha", 8), TypeError, "lora_alpha: expected a field of LoTRPeftConfig.*'alpha'"),
    ("use_dora", _config("use_dora", True), TypeError, "use_dora: expected a field"),
    ("magnitude", _config("magnitude", True), TypeError, "magnitude"),
    ("target_parameters", _config("target_parameters", ["experts.down_proj"]), TypeError, "expected linear layers"),
]
_PEFT: list[Row] = [
    ("target_modules", lambda: _tuned(target_modules=["embed"]), TypeError, "target_modules: .*'embed' .Embedding"),
    ("target_modules", lambda: _tuned(_shared(), target_modules=["q"]), ValueError, "blocks.0.q, blocks.1.q"),
    ("target_modules", lambda: _tuned(_tied(), target_modules=["head"]), ValueError, "tied to embed.weight"),
    ("target_modules", lambda: _tuned(_with_lora(), target_modules=["q"]), TypeError, "adapters of other methods"),
    ("adapter_name", lambda: _tuned(name="a.b"), (*_BOTH, KeyError), "adapter_name: expected a name without dots"),
    ("adapter_name", lambda: _tuned(name="keys"), ValueError, "adapter_name: .*'keys'"),
    ("adapter_name", _second("q"), ValueError, "adapter_name: .*'q'"),
    ("adapter_name", _second("16x16"), ValueError, "adapter_name: .*'16x16'"),
    ("adapter_names", _named("default"), TypeError, "adapter_names: expected a list of names"),
    ("adapter_names", _named(["default"] * 2), ValueError, "adapter_names: expected one name for each of the 3 rows, got 2"),
    ("adapter_names", _named(["nobody"] * 3), ValueError, "adapter_names: expected some of default, __base__, got nobody"),
    ("adapter_names", _named(["default"] * 3, lambda model: model.train()), ValueError, "a model in eval mode"),
    ("adapter_names", _named(["default"] * 3, lambda m: m.eval().merge_adapter()), ValueError, "unmerged adapters"),
]
_CONVERT: list[Row] = [
    ("model", lambda: export_lora(zoo.net("mlp"), _folder()), RuntimeError, "model: expected one with a LoTR adapter"),
    ("model", lambda: export_lora(3, _folder()), TypeError, "model: expected an nn.Module"),
    ("directory", lambda: export_lora(_model(), 3), TypeError, "directory: expected a path"),
    ("directory", lambda: export_lora(_model(), _checkpoint()), ValueError, "directory: expected a directory or a new path"),
    ("task", lambda: export_lora(_model(), _folder(), task=0), RuntimeError, "task: expected a model with a TaskBank"),
    ("task_type", lambda: export_lora(_model(), _folder(), task_type="X"), ValueError, "task_type: expected one of"),
    ("experts", lambda: export_lora(_model(), _folder(), experts="X"), ValueError, "experts: expected one of peft"),
    ("hosts", lambda: lotr_to_lora(_saved(), _folder(), hosts="X"), ValueError, "hosts: expected one of mixtral"),
    ("source", lambda: lotr_to_lora(3, _folder()), TypeError, "source: expected a path"),
    ("source", lambda: lotr_to_lora(_lora(), _folder()), ValueError, "expected peft_type LOTR, got 'LORA'"),
    ("source", lambda: lora_to_lotr(_folder(), rank=2), ValueError, "source: expected a directory with adapter_config.json"),
    ("rank", lambda: lora_to_lotr(_lora(), rank=0), ValueError, "rank: expected an int from 1"),
    ("group_by", lambda: lora_to_lotr(_lora(), rank=2, group_by="width"), ValueError, "group_by: expected shape, block"),
    ("group_by", lambda: lora_to_lotr(_lora(), rank=2, group_by={"head": "g"}), ValueError, "group_by: expected a group"),
    ("dtype", lambda: lora_to_lotr(_lora(), rank=2, dtype=torch.int8), TypeError, "dtype: expected one of"),
    ("use_rslora", lambda: lora_to_lotr(_lora(use_dora=True), rank=2), ValueError, "use_dora: expected a LoRA of two factors"),
    ("scale", lambda: original_to_lotr(_checkpoint(), scale="2"), TypeError, "scale: expected a number"),
    ("source", lambda: original_to_lotr(_checkpoint(a=torch.ones(1))), ValueError, "source: expected tensors <layer>.lotr.lhs"),
    (
        "modules_to_save",
        lambda: original_to_lotr(_checkpoint(), modules_to_save=["x"]),
        ValueError,
        "got 'x', which matches none",
    ),
]
_VLLM: list[Row] = [
    ("model", lambda: export_factors(zoo.net("mlp"), _folder()), RuntimeError, "model: expected one with a LoTR adapter"),
    ("directory", lambda: export_task(_model(), 3), TypeError, "directory: expected a path"),
    ("directory", lambda: export_task(_model(), _checkpoint()), ValueError, "directory: expected a directory or a new path"),
    ("task", lambda: export_task(_model(), _folder(), task=0), RuntimeError, "task: expected a model with a TaskBank"),
]
BAD_INTEROP: list[Row] = [*_CONFIG, *_PEFT, *_CONVERT, *_VLLM]
