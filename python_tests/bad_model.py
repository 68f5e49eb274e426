"""Rows of BAD (test_bad_input.py) for models, tasks and files.

(id, the argument that the message names, a call that must be refused)
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
import zoo
from models import started, trained
from torch import nn

import lotr_ext
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, load_adapter, save_adapter, use_tasks

FOLDER = Path(__file__).parent / "data" / "bd4494a"
LORA = peft.LoraConfig(target_modules=["up"])

# As many pairs as by name. Those of q and k are exchanged in the second block.
EXCHANGED = {f"blocks.0.{name}": name for name in "qkvo"} | {
    f"blocks.1.{name}": other for name, other in zip("qkvo", "kqvo")
}


def _config(**settings: object) -> Callable[[], object]:
    return lambda: LoTRConfig(**settings)


def _mlp(**settings: object) -> Callable[[], object]:
    return lambda: apply_lotr(zoo.net("mlp"), LoTRConfig(rank=2, **settings))


def _tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "out": nn.Linear(4, 4)})
    model["out"].weight = model["embed"].weight
    return model


def _with_peft() -> nn.Module:
    return peft.get_peft_model(zoo.net("mlp"), LORA)


def _banked(name: str = "mlp", tasks: int = 3, **settings: object) -> nn.Module:
    model = trained(name, **settings)
    bank = TaskBank(model, tasks)
    bank.add()
    bank.add()
    return model


def _within(
    index: object, name: str = "mlp", x: object = None, **call: object
) -> Callable[[], object]:
    def run() -> None:
        model = _banked(name)
        with use_tasks(model, index):
            model(zoo.inputs(name) if x is None else x, **call)

    return run


def _merged(name: str = "mlp") -> nn.Module:
    return lotr_ext.merge(trained(name))


def _saved(model: nn.Module) -> str:
    folder = tempfile.mkdtemp()
    save_adapter(model, folder)
    return folder


_CONFIGS = [
    ("rank", [0, -1, 2.0, "8", True, (1, 2, 3), None]),
    ("alpha", ["1", True, float("nan")]),
    ("rslora", [1, "yes"]),
    ("scaling", ["Auto", None, float("inf"), True]),
    ("dropout", [1.0, -0.1, "0", None, float("nan")]),
    ("target_modules", [[], [""], [1], "(", 3]),
    ("exclude_modules", [[], "(", 3]),
    ("modules_to_save", [[], "head", [""], 3]),
    ("target_parameters", [[], "down_proj", [1]]),
    ("group_by", ["layers", 3, None]),
    ("init", ["zeros", None, True]),
    ("train", ["core", [], ["A", "A"], ["C"], ["A", "B"], None]),
    ("adapter_dtype", [None, torch.int8, "float32", torch.float8_e4m3fn]),
    ("core_init", ["ones", None]),
    ("core", ["sparse", 3, None]),
    ("task_type", ["SEQ", 3]),
    *(
        (name, [1])
        for name in (
            *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "use_dora"),
            *("rank_pattern", "alpha_pattern", "bias", "layers_to_transform", "layers_pattern"),
            "fan_in_fan_out",
        )
    ),
]
BAD_MODEL: list[tuple[str, str, Callable[[], object]]] = [
    *(
        (f"config {name}={value!r}", name, _config(**{name: value}))
        for name, values in _CONFIGS
        for value in values
    ),
    ("config scaling and alpha", "scaling", _config(scaling=1.0, alpha=2.0)),
    ("config svd and width", "init", _config(init="svd", group_by="width")),
    ("config svd and identity", "init", _config(init="svd", core_init="identity")),
    ("config svd and computed cores", "core", _config(init="svd", core="diagonal")),
    (
        "config computed cores and experts",
        "core",
        _config(core="diagonal", target_parameters=["down_proj"]),
    ),
    ("config identity without B", "train", _config(core_init="identity", train=["core"])),
    ("config from a dtype", "adapter_dtype", lambda: LoTRConfig.from_dict({"adapter_dtype": 3})),
    # apply_lotr
    ("apply to no module", "model", lambda: apply_lotr(3, LoTRConfig())),
    (
        "apply to a linear layer",
        "target_modules",
        lambda: apply_lotr(nn.Linear(4, 4), LoTRConfig()),
    ),
    ("apply no config", "config", lambda: apply_lotr(zoo.net("mlp"), {"rank": 2})),
    # rank_for
    *(
        (
            f"rank_for like={like!r}",
            "like",
            lambda like=like: lotr_ext.rank_for(zoo.net("mlp"), like=like),
        )
        for like in ("lora", "lora:0", "lora:x", "vera:1", 4)
    ),
    ("rank_for nothing", "like", lambda: lotr_ext.rank_for(zoo.net("mlp"))),
    (
        "rank_for both",
        "like",
        lambda: lotr_ext.rank_for(zoo.net("mlp"), like="lora:1", numbers=100),
    ),
    *(
        (
            f"rank_for numbers={n!r}",
            "numbers",
            lambda n=n: lotr_ext.rank_for(zoo.net("mlp"), numbers=n),
        )
        for n in (0, 20, 2.0, "9")
    ),
    (
        "rank_for with a rank",
        "rank",
        lambda: lotr_ext.rank_for(zoo.net("mlp"), like="lora:1", rank=4),
    ),
    (
        "rank_for an adapted model",
        "model",
        lambda: lotr_ext.rank_for(started("mlp"), like="lora:1"),
    ),
    # apply_lotr, with configurations and models of other kinds
    ("apply PEFT's config", "config", lambda: apply_lotr(zoo.net("mlp"), LORA)),
    (
        "apply to convolutions",
        "target_modules",
        lambda: apply_lotr(nn.Sequential(nn.Conv2d(3, 3, 1)), LoTRConfig()),
    ),
    ("apply where all is tied", "target_modules", lambda: apply_lotr(_tied(), LoTRConfig())),
    ("apply twice", "model", lambda: apply_lotr(started("mlp"), LoTRConfig(rank=2))),
    (
        "apply to a compiled model",
        "model",
        lambda: apply_lotr(torch.compile(zoo.net("mlp")), LoTRConfig(rank=2)),
    ),
    ("apply over PEFT's LoRA", "model", lambda: apply_lotr(_with_peft(), LoTRConfig(rank=2))),
    ("a misspelt layer", "target_modules", _mlp(target_modules=["upp"])),
    ("a layer that is no linear one", "target_modules", _mlp(target_modules=["blocks.0"])),
    ("a misspelt exclusion", "exclude_modules", _mlp(exclude_modules=["hed"])),
    ("all layers excluded", "target_modules", _mlp(target_modules=["up"], exclude_modules=["up"])),
    ("a misspelt module to save", "modules_to_save", _mlp(modules_to_save=["hed"])),
    ("a group of two shapes", "group_by", _mlp(group_by=lambda name, module: "one")),
    ("a group that is no string", "group_by", _mlp(group_by=lambda name, module: 1)),
    ("a mapping without a layer", "group_by", _mlp(group_by={"head": "a"})),
    ("a callable core", "core", _mlp(core=lambda places, rank: None)),
    (
        "a tied layer",
        "target_modules",
        lambda: apply_lotr(zoo.net("gpt2"), LoTRConfig(rank=2, target_modules=["lm_head"])),
    ),
    ("a task without a head", "task_type", _mlp(task_type="SEQ_CLS")),
    (
        "an expert parameter that is none",
        "target_parameters",
        _mlp(target_parameters=["up.weight"]),
    ),
    # an adapted model
    *(
        (f"{call.__name__} of a plain model", "model", lambda call=call: call(zoo.net("mlp")))
        for call in (
            lotr_ext.merge,
            lotr_ext.unmerge,
            lotr_ext.unload,
            lotr_ext.trainable_summary,
            lotr_ext.parameter_groups,
        )
    ),
    ("disabled of a merged model", "disabled", lambda: lotr_ext.disabled(_merged()).__enter__()),
    ("merge twice", "merge", lambda: lotr_ext.merge(_merged())),
    ("unmerge an unmerged model", "unmerge", lambda: lotr_ext.unmerge(trained("mlp"))),
    (
        "unload experts that are no transformers ones",
        "unload",
        lambda: lotr_ext.unload(
            nn.Sequential(lotr_ext.LoTRLinear(4, 4, rank=2), lotr_ext.LoTRExperts(2, 4, 4, rank=2)),
            merge=True,
        ),
    ),
    (
        "dequantize=int8",
        "dequantize",
        lambda: lotr_ext.merge(trained("mlp"), dequantize=torch.int8),
    ),
    ("a NumPy x", "x", lambda: trained("mlp").blocks[0]["up"](np.zeros((2, 16), np.float32))),
    (
        "the gradient of no batches",
        "batches",
        lambda: lotr_ext.init_from_gradient(started("mlp"), [], lambda m, b: m(b).sum()),
    ),
    (
        "the gradient of a loss without the adapted layers",
        "loss",
        lambda: lotr_ext.init_from_gradient(
            started("mlp", target_modules=["up"]),
            [zoo.inputs("mlp")],
            lambda m, b: m.head.requires_grad_().weight.sum(),
        ),
    ),
    (
        "the gradient at other cores",
        "core",
        lambda: lotr_ext.init_from_gradient(
            trained("mlp"), [zoo.inputs("mlp")], lambda m, b: m(b).sum()
        ),
    ),
    # tasks
    ("a bank of a plain model", "model", lambda: TaskBank(zoo.net("mlp"), 2)),
    ("a bank of no tasks", "tasks", lambda: TaskBank(trained("mlp"), 0)),
    ("a second bank", "TaskBank", lambda: TaskBank(_banked(), 2)),
    ("a bank over svd", "TaskBank", lambda: TaskBank(trained("mlp", "svd"), 2)),
    ("a task too many", "add", lambda: _banked(tasks=2).lotr_tasks.add()),
    ("a task that is no int", "task", lambda: _banked().lotr_tasks.remove("0")),
    ("a free task", "task", lambda: _banked().lotr_tasks.cores_of(2)),
    (
        "a task of other layers",
        "source",
        lambda: _banked().lotr_tasks.add({"a.core": torch.zeros(3, 3)}),
    ),
    ("a task that is no file", "source", lambda: _banked().lotr_tasks.add(__file__)),
    (
        "a task of another model",
        "source",
        lambda: _banked().lotr_tasks.add(FOLDER / "tasks" / "task0.safetensors"),
    ),
    (
        "tasks without a bank",
        "use_tasks",
        lambda: use_tasks(trained("mlp"), torch.zeros(3, dtype=torch.long)).__enter__(),
    ),
    ("an index as a list", "index", _within([0, 1, 0])),
    ("an index of floats", "index", _within(torch.zeros(3))),
    ("an index beyond the bank", "index", _within(torch.tensor([0, 1, 3]))),
    ("an index below -1", "index", _within(torch.tensor([0, 1, -2]))),
    ("an index of a free slot", "index", _within(torch.tensor([0, 1, 2]))),
    ("an index without columns", "index", _within(torch.zeros(3, 0, dtype=torch.long))),
    ("an index of three dimensions", "index", _within(torch.zeros(3, 5, 1, dtype=torch.long))),
    ("an index of other rows", "x", _within(torch.zeros(4, dtype=torch.long))),
    ("an index of other tokens", "x", _within(torch.zeros(3, 4, dtype=torch.long))),
    ("an index per token of other rows", "x", _within(torch.zeros(4, 5, dtype=torch.long))),
    (
        "an index per token of a flat x",
        "x",
        _within(torch.zeros(3, 5, dtype=torch.long), x=torch.randn(15, 16)),
    ),
    # files
    ("save a plain model", "model", lambda: save_adapter(zoo.net("mlp"), tempfile.mkdtemp())),
    (
        "load with an unknown strictness",
        "strict",
        lambda: load_adapter(zoo.net("mlp"), FOLDER / "dense", strict="layers"),
    ),
    ("load a hub id", "directory", lambda: load_adapter(zoo.net("mlp"), "someone/adapter")),
    ("load a missing folder", "directory", lambda: load_adapter(zoo.net("mlp"), FOLDER / "none")),
    ("load an empty folder", "directory", lambda: load_adapter(zoo.net("mlp"), tempfile.mkdtemp())),
    (
        "load into another model",
        "model",
        lambda: load_adapter(zoo.net("attention"), FOLDER / "dense"),
    ),
    (
        "load into other layers",
        "layers",
        lambda: load_adapter(trained("mlp", target_modules=["up"]), FOLDER / "dense"),
    ),
    *(
        (
            f"load factors by {in_file} into a model by {in_model}",
            "layers",
            lambda in_file=in_file, in_model=in_model: load_adapter(
                started("attention", group_by=in_model),
                _saved(trained("attention", group_by=in_file)),
            ),
        )
        for in_file, in_model in (
            ("shape", "name"),
            ("name", "shape"),
            ("block", "layer"),
            ("name", EXCHANGED),
        )
    ),
    (
        "load another rank",
        "A",
        lambda: load_adapter(trained("mlp", modules_to_save=["head"]), FOLDER / "dense"),
    ),
    (
        "load other modules_to_save",
        "tensors",
        lambda: load_adapter(trained("mlp", rank=2), FOLDER / "dense"),
    ),
    (
        "load another dtype",
        "A",
        lambda: load_adapter(
            trained("mlp", rank=2, modules_to_save=["head"], adapter_dtype="bfloat16"),
            FOLDER / "dense",
        ),
    ),
    (
        "load into a merged model",
        "load_adapter",
        lambda: load_adapter(
            lotr_ext.merge(trained("mlp", rank=2, modules_to_save=["head"])), FOLDER / "dense"
        ),
    ),
    (
        "load under a bank",
        "load_adapter",
        lambda: load_adapter(_banked(rank=2, modules_to_save=["head"]), FOLDER / "dense"),
    ),
    (
        "load one that was built by hand",
        "model",
        lambda: load_adapter(
            zoo.net("mlp"), _saved(nn.Sequential(lotr_ext.LoTRLinear(4, 4, rank=2)))
        ),
    ),
]
