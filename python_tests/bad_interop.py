"""Rows of BAD (test_bad_input.py) for PEFT, conversions and vLLM."""

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
from lotr_ext.vllm import export_factors

Row = tuple[str, str, Callable[[], object]]


def _config(name: str, value: object, **more: object) -> Callable[[], object]:
    return lambda: LoTRPeftConfig(**{name: value, **more})


def _tuned(
    net: nn.Module | None = None, name: str = "default", **settings: object
) -> peft.PeftModel:
    settings = {"rank": 2, "target_modules": ["q", "v"], **settings}
    return peft.get_peft_model(
        zoo.net("attention") if net is None else net, LoTRPeftConfig(**settings), name
    )


def _named(
    names: object, change: Callable[[peft.PeftModel], object] = lambda model: model.eval()
) -> Callable[[], object]:
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
    folder = _folder()
    save_adapter(_model(), folder)
    return folder


def _lora(**settings: object) -> Path:
    config = peft.LoraConfig(r=2, target_modules=["q", "v", "head"], **settings)
    folder = _folder()
    peft.get_peft_model(zoo.net("attention"), config).save_pretrained(folder)
    return folder


def _checkpoint(**tensors: torch.Tensor) -> Path:
    good = {
        "a.lotr.rhs": torch.ones(4, 2),
        "a.lotr.mid": torch.ones(2, 2),
        "a.lotr.lhs": torch.ones(2, 4),
    }
    path = _folder() / "model.pt"
    torch.save(tensors or good, path)
    return path


_CONFIG: list[Row] = [
    ("PEFT rank 0", "rank", _config("rank", 0)),
    ("PEFT rank and r", "r", _config("r", 4, rank=2)),
    ("PEFT init svd", "init", _config("init", "svd")),
    ("PEFT core custom", "core", _config("core", "custom")),
    ("PEFT group_by a callable", "group_by", _config("group_by", lambda name, module: "g")),
    ("PEFT lora_alpha", "lora_alpha", _config("lora_alpha", 8)),
    ("PEFT rank_pattern", "rank_pattern", _config("rank_pattern", {})),
    ("PEFT use_dora", "use_dora", _config("use_dora", True)),
    (
        "PEFT target_parameters",
        "target_parameters",
        _config("target_parameters", ["experts.down_proj"]),
    ),
    ("PEFT bias of LoRA", "bias", _config("bias", "lora_only")),
    (
        "PEFT layers_to_transform",
        "layers_to_transform",
        _config("layers_to_transform", [0], target_modules="q"),
    ),
    ("PEFT layers_pattern alone", "layers_pattern", _config("layers_pattern", "blocks")),
]
_PEFT: list[Row] = [
    ("PEFT an embedding", "target_modules", lambda: _tuned(target_modules=["embed"])),
    (
        "PEFT a layer in two places",
        "target_modules",
        lambda: _tuned(_shared(), target_modules=["q"]),
    ),
    ("PEFT a tied layer", "target_modules", lambda: _tuned(_tied(), target_modules=["head"])),
    ("PEFT a layer of LoRA", "target_modules", lambda: _tuned(_with_lora(), target_modules=["q"])),
    ("PEFT adapter_name with a dot", "adapter_name", lambda: _tuned(name="a.b")),
    ("PEFT adapter_name keys", "adapter_name", lambda: _tuned(name="keys")),
    ("PEFT adapter_name of a layer", "adapter_name", _second("q")),
    ("PEFT adapter_name of a group", "adapter_name", _second("A_16x16")),
    ("PEFT adapter_names a word", "adapter_names", _named("default")),
    ("PEFT too few adapter_names", "adapter_names", _named(["default"] * 2)),
    ("PEFT unknown adapter_names", "adapter_names", _named(["nobody"] * 3)),
    (
        "PEFT adapter_names in training",
        "adapter_names",
        _named(["default"] * 3, lambda model: model.train()),
    ),
    (
        "PEFT adapter_names of merged",
        "adapter_names",
        _named(["default"] * 3, lambda model: model.eval().merge_adapter()),
    ),
    (
        "PEFT a state of other layers",
        "adapter",
        lambda: peft.set_peft_model_state_dict(
            _tuned(target_modules=["q"]), peft.get_peft_model_state_dict(_tuned())
        ),
    ),
]
_CONVERT: list[Row] = [
    ("export_lora of a plain model", "model", lambda: export_lora(zoo.net("mlp"), _folder())),
    (
        "export_lora with a wrong task_type",
        "task_type",
        lambda: export_lora(_model(), _folder(), task_type="X"),
    ),
    (
        "export_lora in an unknown form",
        "experts",
        lambda: export_lora(_model(), _folder(), experts="X"),
    ),
    (
        "lotr_to_lora for unknown hosts",
        "hosts",
        lambda: lotr_to_lora(_saved(), _folder(), hosts="X"),
    ),
    ("lotr_to_lora of a LoRA", "adapter_config.json", lambda: lotr_to_lora(_lora(), _folder())),
    ("lotr_to_lora of an empty folder", "directory", lambda: lotr_to_lora(_folder(), _folder())),
    ("lora_to_lotr of an empty folder", "source", lambda: lora_to_lotr(_folder(), rank=2)),
    ("lora_to_lotr of rank 0", "rank", lambda: lora_to_lotr(_lora(), rank=0)),
    ("lora_to_lotr by width", "group_by", lambda: lora_to_lotr(_lora(), rank=2, group_by="width")),
    (
        "lora_to_lotr by a mapping of one layer",
        "group_by",
        lambda: lora_to_lotr(_lora(), rank=2, group_by={"head": "g"}),
    ),
    (
        "lora_to_lotr of dtype int8",
        "adapter_dtype",
        lambda: lora_to_lotr(_lora(), rank=2, dtype=torch.int8),
    ),
    ("lora_to_lotr of DoRA", "use_dora", lambda: lora_to_lotr(_lora(use_dora=True), rank=2)),
    (
        "original_to_lotr of another file",
        "source",
        lambda: original_to_lotr(_checkpoint(a=torch.ones(1))),
    ),
]
_VLLM: list[Row] = [
    ("export_factors of a plain model", "model", lambda: export_factors(zoo.net("mlp"), _folder())),
]
BAD_INTEROP: list[Row] = [*_CONFIG, *_PEFT, *_CONVERT, *_VLLM]
