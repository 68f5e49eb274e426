"""LoTRConfig, how `apply_lotr` adapts a model, and its JSON form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .functional import check_dtype, check_probability, check_rank
from .init import CORE_INITS, FACTOR_INITS
from .linear import Scaling, scaling_of
from .ops import DTYPES

__all__ = ["GroupBy", "LoTRConfig", "place_of"]

GROUPS = ("shape", "block", "name", "width")
CORE_FORMS = ("diagonal", "cp", "tucker", "train", "few")  # lotr_ext.cores
DIAGONAL = ("diagonal", "cp")  # forms whose core has r numbers on its diagonal: `scaling_of`
HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's names
TASKS = (*HEADED_TASKS, "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION")
PARTS = ("A", "B", "core")
GroupBy = str | Mapping[str, str] | Callable[[str, nn.Module], str]

# LoRA's names of settings in PEFT, and the names here.
NAMES_HERE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
}
_NOT_HERE = {
    "use_dora": "the adapter has no magnitudes",
    "rank_pattern": "the layers of a group share A and B, and so the rank",
    "alpha_pattern": "a configuration has one scaling",
    "lora_bias": "the adapter has no biases",
    "bias": "biases stay frozen; name modules to be trained whole in modules_to_save",
    "trainable_token_indices": "rows of an embedding cannot be trained",
    "layer_replication": "layers cannot be repeated",
    "layers_to_transform": "name the layers in target_modules, or give it a regular expression",
    "fan_in_fan_out": "a Conv1D is detected by its class",
    "loftq_config": "quantise the model first",
}


def check_names(given: Iterable[str], of: str) -> None:
    """Raises TypeError for a setting by the name that PEFT's LoRA has for it. of: the configuration's class."""
    for name in given:
        if name in NAMES_HERE:
            raise TypeError(f"{name}: expected a field of {of}, got LoRA's name for it. Here it is {NAMES_HERE[name]!r}.")
        if name in _NOT_HERE:
            raise TypeError(f"{name}: expected a field of {of}, got one that only LoRA has: {_NOT_HERE[name]}.")


def place_of(name: str) -> tuple[str, str]:
    """(layer, kind) of a layer's name: what stands up to its first number, and after it, such as ("model.layers.3",
    "self_attn.q_proj"). Without a number, layer is ""."""
    found = re.fullmatch(r"((?:.*?\.)??\d+)(?:\.(.*))?", name)
    return ("", name) if found is None else (found[1], found[2] or "")


def _names(value: object, name: str) -> tuple[str, ...] | None:
    """A list of names as a tuple."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)):
        hint = f" Write [{value!r}]." if isinstance(value, str) else ""
        raise TypeError(f"{name}: expected a list of names or None, got {value!r}.{hint}")
    for one in value:
        if not isinstance(one, str) or not one:
            raise TypeError(f"{name}: expected non-empty strings, got {one!r}")
    if not value:
        raise ValueError(f"{name}: expected at least one name or None, got an empty list")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _pattern(value: object, name: str) -> str | tuple[str, ...] | None:
    """A regular expression, or a list of name endings as a tuple."""
    if not isinstance(value, str):
        return _names(value, name)
    if value.replace("_", "-").lower() == "all-linear" and value != "all-linear":
        raise ValueError(f'{name}: expected "all-linear", got {value!r}')
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: expected a regular expression, got {value!r} ({error})") from None
    return value


@dataclass(frozen=True)
class LoTRConfig:
    """How `apply_lotr` adapts a model. Frozen, and checked when it is made.

    Attributes:
        rank: r, or (r_in, r_out) for A [K, r_in], B [N, r_out] and cores [r_in, r_out].
        alpha: s is alpha / r (alpha / sqrt(r) with rslora), r = max(r_in, r_out), instead of scaling's value.
        rslora: divide by sqrt(r) instead of r (arXiv 2312.03732). alpha is r if it is not given.
        scaling: s itself, or "auto": with it LoRA's learning rate serves at every rank (`lotr_ext.linear.scaling_of`).
        dropout: on the adapter's x, in [0, 1).
        target_modules: name endings (["query", "value"]: whole dotted parts), a regular expression that matches the full
            name, or "all-linear" (also for None): every linear layer except those that cannot be adapted or share their weight
            with another module, and, as in PEFT, a transformers model's output layer (or its head) and a timm model's
            classifier. `trainable_summary` lists the layers that were left out. With target_parameters, None: no linear layer.
        exclude_modules: name endings, or a regular expression, to leave out.
        modules_to_save: name endings of modules to be trained whole and saved with the adapter (a new head).
        group_by: which layers share A and B. "shape": one pair for each (K, N), the paper's; "block": one for each shape and
            block, the layers whose names agree up to their first number ("model.layers.3"); "name": one for each last part of
            the name and shape (q and v apart); "width": one A for each K and one B for each N, over all adapted layers; a
            mapping from layer name to group; or a callable (name, module) -> group.
        init: "orthonormal", "normal", "kaiming" or "svd" (lotr_ext.init).
        train: which of "A", "B" and "core" are trained; the rest stays as it starts.
        adapter_dtype: of A, B and the cores: float32, float64, bfloat16 or float16.
        core_init: "zero", or "identity" (then B starts at zero).
        target_parameters: name endings of the 3-D parameters of a transformers mixture's experts, as PEFT matches them:
            ["experts.gate_up_proj", "experts.down_proj"].
        core: "dense", each layer has its own core; or cores made of fewer numbers that layers share (`lotr_ext.cores`):
            "diagonal", "cp", "tucker", "train" or "few", or a callable (places, rank) -> Cores, where a place is a layer's
            (layer, kind), ("model.layers.3", "self_attn.q_proj"). A saved adapter's config has "custom" for a callable.
        task_type: PEFT's name of the task. With "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" `apply_lotr` adds the model's head
            to modules_to_save; "CAUSAL_LM", "SEQ_2_SEQ_LM" and "FEATURE_EXTRACTION" change nothing.

    Raises:
        TypeError, ValueError: a field of the wrong type or value. For LoRA's names of these settings (r, lora_alpha, ..) the
            message gives the name used here.
    """

    rank: int | tuple[int, int] = 16
    alpha: float | None = None
    rslora: bool = False
    scaling: Scaling = "auto"
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    group_by: GroupBy = "shape"
    init: str = "orthonormal"
    train: Sequence[str] = PARTS
    adapter_dtype: torch.dtype = torch.float32
    core_init: str = "zero"
    target_parameters: Sequence[str] | None = None
    core: str | Callable[..., Any] = "dense"
    task_type: str | None = None

    def __new__(cls, *_: Any, **given: Any) -> LoTRConfig:
        check_names(given, "LoTRConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        ranks = check_rank(self.rank)
        put("rank", self.rank if isinstance(self.rank, int) else ranks)
        scaling_of(self.rank, self.alpha, self.rslora, self.scaling)
        check_probability("dropout", self.dropout)
        for name in ("target_modules", "exclude_modules"):
            put(name, _pattern(getattr(self, name), name))
        for name in ("modules_to_save", "target_parameters"):
            put(name, _names(getattr(self, name), name))
        self._check_group_by()
        for name, known in (("init", (*FACTOR_INITS, "svd")), ("core_init", CORE_INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.adapter_dtype is None:
            raise TypeError(f"adapter_dtype: expected one of {', '.join(DTYPES)}, got None")
        check_dtype(self.adapter_dtype, "adapter_dtype")
        if self.task_type is not None and self.task_type not in TASKS:
            raise ValueError(f"task_type: expected one of {', '.join(TASKS)} or None, got {self.task_type!r}")
        put("task_type", None if self.task_type is None else str.__str__(self.task_type))  # PEFT's is an enumeration
        self._check_train()
        self._check_core()

    def _check_group_by(self) -> None:
        expected = f"expected one of {', '.join(GROUPS)}, a mapping or a callable"
        if isinstance(self.group_by, str):
            if self.group_by not in GROUPS:
                raise ValueError(f"group_by: {expected}, got {self.group_by!r}")
        elif isinstance(self.group_by, Mapping):
            for name, group in self.group_by.items():
                if not (isinstance(name, str) and isinstance(group, str)):
                    raise TypeError(f"group_by: expected layer names to group names, got {name!r}: {group!r}")
            object.__setattr__(self, "group_by", dict(self.group_by))
        elif not callable(self.group_by):
            raise TypeError(f"group_by: {expected}, got {self.group_by!r}")

    def _check_train(self) -> None:
        train = _names(self.train, "train")
        if train is None or len(set(train)) != len(train) or not set(train) <= set(PARTS):
            raise ValueError(f"train: expected some of {', '.join(PARTS)}, each once, got {self.train!r}")
        object.__setattr__(self, "train", tuple(part for part in PARTS if part in train))
        moves = "core" if self.core_init == "zero" else "B"  # the only part with a nonzero gradient at the start
        if self.init != "svd" and moves not in train:
            raise ValueError(
                f"train: expected {moves!r} among the trained parts with core_init {self.core_init!r}, because all other "
                f"gradients are zero at the start, got {self.train!r}"
            )

    def _check_core(self) -> None:
        known = ("dense", *CORE_FORMS)
        if not callable(self.core) and self.core not in (*known, "custom"):
            raise ValueError(f"core: expected one of {', '.join(known)}, or a callable, got {self.core!r}")
        if self.core != "dense" and self.target_parameters is not None:
            raise ValueError(
                f'core: expected "dense" with target_parameters, whose experts have a core each, got {self.core!r}'
            )
        if self.init == "svd":  # the start of A, B and of each layer's core
            for name, want in (("core", "dense"), ("core_init", "zero"), ("target_parameters", None)):
                if getattr(self, name) != want:
                    raise ValueError(
                        f'{name}: expected {want!r} with init "svd", which sets the cores, got {getattr(self, name)!r}'
                    )
            if self.group_by == "width":
                raise ValueError('init: expected another one with group_by "width", got "svd", which needs layers of one shape')

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_in, r_out)."""
        return check_rank(self.rank)

    @property
    def s(self) -> float:
        """The scaling of each layer."""
        return scaling_of(self.rank, self.alpha, self.rslora, self.scaling, self.core in DIAGONAL)

    @property
    def everything(self) -> bool:
        """Whether it selects all linear layers."""
        return self.target_modules == "all-linear" or (self.target_modules is None and self.target_parameters is None)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; a callable core is "custom". Raises ValueError for a callable group_by: use a mapping."""
        if callable(self.group_by):
            raise ValueError(f"group_by: expected one of {', '.join(GROUPS)} or a mapping for JSON, got a callable")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["adapter_dtype"] = str(self.adapter_dtype).removeprefix("torch.")
        values["core"] = "custom" if callable(self.core) else self.core
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoTRConfig:
        """The inverse of `to_dict`. Raises TypeError or ValueError for no mapping, an unknown field or a wrong value."""
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a mapping, got {type(values).__name__}")
        check_names(values, "LoTRConfig")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"config: expected fields among {', '.join(known)}, got {', '.join(map(str, unknown))}")
        values = dict(values)
        if "adapter_dtype" in values:
            name = values["adapter_dtype"]
            if not isinstance(name, str) or name not in DTYPES:
                raise ValueError(f"adapter_dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
            values["adapter_dtype"] = DTYPES[name]
        return cls(**values)
